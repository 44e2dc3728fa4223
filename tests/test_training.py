"""The two steps, the loop, seeds, and that a short training learns."""

import copy
import math

import pytest
import torch

import cspgan as cs


def snapshot(network):
    return {key: value.clone() for key, value in network.state_dict().items()}


def same(before, network):
    return all(torch.equal(before[key], value) for key, value in network.state_dict().items())


def without_seconds(history):
    return [{key: value for key, value in record.items() if key != "seconds"} for record in history]


@pytest.fixture(params=["bce", "relativistic"])
def pair(request, tiny):
    config = tiny.but(block_norm="both", loss=request.param)
    if request.param == "relativistic":
        config = config.but(r1=1.0, r2=1.0, d_norm=False, init="he")
    return config, cs.Generator(config), cs.Discriminator(config)


@pytest.mark.parametrize("learner", ["d", "g"])
def test_a_step_moves_its_own_network_and_leaves_the_other_untouched(pair, toys, learner):
    config, generator, discriminator = pair
    real, fake = cs.to_network(toys[:16], config), generator(torch.randn(16, config.z_dim))
    step, moved, still = {"d": (cs.d_step, discriminator, generator), "g": (cs.g_step, generator, discriminator)}[learner]
    before_moved, before_still = snapshot(moved), snapshot(still)
    step(discriminator, cs.adam(moved, 1e-3, config), real, fake, config)
    assert same(before_still, still) and not same(before_moved, moved)
    assert all(p.grad is None for p in still.parameters())


def test_each_step_moves_its_loss_down(pair, toys):
    config, generator, discriminator = pair
    real, z = cs.to_network(toys[:16], config), torch.randn(16, config.z_dim)
    opt_d, opt_g = cs.adam(discriminator, 1e-3, config), cs.adam(generator, 1e-3, config)
    d_losses = [cs.d_step(discriminator, opt_d, real, generator(z), config)[0] for _ in range(8)]
    g_losses = [cs.g_step(discriminator, opt_g, real, generator(z), config) for _ in range(8)]
    assert d_losses[-1] < d_losses[0] and g_losses[-1] < g_losses[0]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_losses_of_the_steps_are_the_formulas(tiny, toys, smoothing):
    config = tiny.but(block_norm="both", label_smoothing=smoothing)
    generator, discriminator = cs.Generator(config), cs.Discriminator(config)
    real, fake = cs.to_network(toys[:16], config), generator(torch.randn(16, config.z_dim))
    d_real, d_fake = discriminator(real).sigmoid(), discriminator(fake).sigmoid()
    target = 1 - smoothing
    expected = -(target * d_real.log() + smoothing * (1 - d_real).log()).mean() - (1 - d_fake).log().mean()
    still = torch.optim.SGD(discriminator.parameters(), 0.0), torch.optim.SGD(generator.parameters(), 0.0)
    d_loss, mean_real, mean_fake, penalty = cs.d_step(discriminator, still[0], real, fake, config)
    assert d_loss.item() == pytest.approx(expected.item(), rel=1e-5) and penalty == 0
    assert mean_real.item() == pytest.approx(d_real.logit().mean().item(), abs=1e-5)
    assert mean_fake.item() == pytest.approx(d_fake.logit().mean().item(), abs=1e-5)
    g_loss = cs.g_step(discriminator, still[1], real, fake, config)
    assert g_loss.item() == pytest.approx(-d_fake.log().mean().item(), rel=1e-5)


def test_batchnorm_learns_its_statistics_while_training(tiny, toys):
    run = cs.train(tiny.but(block_norm="both", epoch_images=160), toys, progress=False)
    norms = [m for m in run.generator.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert norms and all(m.num_batches_tracked == 10 and m.running_mean.any() for m in norms)


def relativistic_pair(tiny):
    config = tiny.but(loss="relativistic", d_norm=False, init="he", r1=3.0, r2=5.0)
    return config, cs.Generator(config), cs.Discriminator(config)


def test_relativistic_losses_and_penalties_are_the_formulas(tiny, toys):
    config, generator, discriminator = relativistic_pair(tiny)
    real, fake = cs.to_network(toys[:16], config), generator(torch.randn(16, config.z_dim))
    d_real, d_fake = discriminator(real).double(), discriminator(fake).double()
    still = torch.optim.SGD(discriminator.parameters(), 0.0), torch.optim.SGD(generator.parameters(), 0.0)
    d_loss, _, _, penalty = cs.d_step(discriminator, still[0], real, fake, config)
    g_loss = cs.g_step(discriminator, still[1], real, fake, config)
    assert d_loss.item() == pytest.approx(-(d_real - d_fake).sigmoid().log().mean().item(), rel=1e-5)
    assert g_loss.item() == pytest.approx(-(d_fake - d_real).sigmoid().log().mean().item(), rel=1e-5)
    squares = [numerical_gradient(discriminator, images).square().sum((1, 2, 3)).mean().item() for images in (real, fake.detach())]
    assert penalty.item() == pytest.approx(3 / 2 * squares[0] + 5 / 2 * squares[1], rel=1e-3)


def numerical_gradient(discriminator, images, h=1e-4):
    """grad_x D(x) of each image by central differences, one pixel at a time, in float64."""
    discriminator, images = copy.deepcopy(discriminator).double(), images.double()
    gradient = torch.zeros_like(images)
    with torch.no_grad():
        for place in range(images[0].numel()):
            step = torch.zeros(images[0].numel(), dtype=torch.double)
            step[place] = h
            step = step.view_as(images[0])
            gradient.flatten(1)[:, place] = (discriminator(images + step) - discriminator(images - step)) / (2 * h)
    return gradient


@pytest.mark.parametrize("half", ["bfloat16", "float16"])
def test_penalties_are_exact_under_mixed_precision(tiny, toys, half):
    config, generator, discriminator = relativistic_pair(tiny)
    real, fake = cs.to_network(toys[:16], config), generator(torch.randn(16, config.z_dim))
    for penalties in ("double_backward", "linear"):
        results = []
        for precision in ("float32", half):
            network, chosen = copy.deepcopy(discriminator), config.but(precision=precision, penalties=penalties)
            with torch.autocast("cpu", cs.HALF[half], enabled=precision == half):  # whatever the caller has set
                stats = cs.d_step(network, torch.optim.SGD(network.parameters(), 0.01), real, fake, chosen)
            results.append((stats, [p.clone() for p in network.parameters()]))
        assert torch.equal(results[0][0], results[1][0]) and all(map(torch.equal, results[0][1], results[1][1]))
    free = config.but(r1=0.0, r2=0.0)  # without penalties the networks do run in half precision
    exact, mixed = (cs.d_step(copy.deepcopy(discriminator), torch.optim.SGD([torch.zeros(1)]), real, fake, free.but(precision=name))
                    for name in ("float32", half))
    assert not torch.equal(mixed, exact) and torch.allclose(mixed, exact, atol=0.05)


def test_gradient_of_the_penalty_agrees_with_differences(tiny, toys):
    """The second derivative: how the penalty changes when a weight of D does."""
    config, _, discriminator = relativistic_pair(tiny)
    discriminator.double()
    images = cs.to_network(toys[:4], config).double().requires_grad_()

    def penalty():
        return cs.gradient_penalty(discriminator(images), images).mean()

    parameters = [p for p in discriminator.parameters() if p.dim() > 1]
    for parameter, gradient in zip(parameters, torch.autograd.grad(penalty(), parameters)):
        place = gradient.abs().argmax()  # biases aside, which only shift LeakyReLU's kinks
        weight, kept = parameter.data.view(-1), parameter.data.view(-1)[place].item()
        found = []
        for step in (1e-6, -1e-6):
            weight[place] = kept + step
            found.append(penalty().item())
        weight[place] = kept
        assert (found[0] - found[1]) / 2e-6 == pytest.approx(gradient.reshape(-1)[place].item(), rel=1e-3)


def test_relativistic_loss_sees_differences_only():
    a, b = torch.randn(2, 8)
    assert cs.relativistic(a + 7, b + 7).item() == pytest.approx(cs.relativistic(a, b).item(), rel=1e-5)
    assert cs.relativistic(a, a).item() == pytest.approx(math.log(2))


def test_penalties_hold_d_s_slope_down(tiny, toys):
    base = tiny.but(loss="relativistic", d_norm=False, init="he", epoch_images=16 * 80, lr_d=1e-3, lr_g=1e-3)
    free, held = (cs.train(config, toys, progress=False).history[-1] for config in (base, base.but(r1=10.0, r2=10.0)))
    assert held["grad_real"] < 0.5 * free["grad_real"] and held["grad_fake"] < 0.5 * free["grad_fake"]
    assert free["penalty"] == 0 < held["penalty"]


def test_ema_is_the_running_mean_of_weights_and_buffers(tiny, toys, monkeypatch):
    config = tiny.but(block_norm="both", epoch_images=16 * 6, ema_images=64)
    states = []
    update = cs.update_ema
    monkeypatch.setattr(cs, "update_ema", lambda mean, network, *
                        rest: (update(mean, network, *rest), states.append(snapshot(network))))
    run = cs.train(config, toys, progress=False)
    plain = cs.train(config.but(ema_images=0), toys, progress=False)
    assert same(states[-1], plain.generator)  # the mean changes nothing in the training itself
    for name, value in cs.Generator(config).state_dict().items():
        if not value.is_floating_point():
            continue
        mean = value.double()
        for step, state in enumerate(states, start=1):
            decay = 0.5 ** (16 / min(64, 0.1 * step * 16))
            mean = decay * mean + (1 - decay) * state[name].double()
        assert torch.allclose(run.generator.state_dict()[name].double(), mean, atol=1e-5), name
    assert not same(states[-1], run.generator)


@pytest.mark.parametrize("network", ["d", "g"])
def test_learning_rates_fall_on_a_half_cosine(tiny, toys, monkeypatch, network):
    rates, step = [], getattr(cs, f"{network}_step")
    monkeypatch.setattr(cs, f"{network}_step", lambda d, optimizer, *
                        rest: rates.append(optimizer.param_groups[0]["lr"]) or step(d, optimizer, *rest))
    cs.train(tiny.but(lr_end=0.1, epoch_images=16 * 10, lr_g=1e-3, lr_d=1e-3), toys, progress=False)
    assert rates == pytest.approx([1e-3 * (0.1 + 0.45 * (1 + math.cos(math.pi * k / 10))) for k in range(10)])
    rates.clear()
    cs.train(tiny, toys, progress=False)
    assert set(rates) == {tiny.lr_g}


def test_augmentation_is_of_real_and_generated_images_in_both_steps(tiny, toys, monkeypatch):
    made, seen = [], []
    monkeypatch.setattr(cs, "diff_augment", lambda images, *rest: made.append(images * 1) or made[-1])
    for name in ("d_step", "g_step"):
        step = getattr(cs, name)
        monkeypatch.setattr(cs, name, lambda d, optimizer, real, fake, *rest, step=step: (
            seen.append(real is made[-2] and fake is made[-1]) or step(d, optimizer, real, fake, *rest)))
    cs.train(tiny.but(augment=True), toys, progress=False)
    assert len(made) == 4 and seen == [True] * 4


@pytest.mark.parametrize("head", ["tanh", "sigmoid"])
def test_augmentation_changes_images_and_lets_gradients_through(tiny, toys, head):
    config = tiny.but(head=head, image_size=16)
    images = cs.to_network(toys[:64], config).requires_grad_()
    first, again, other = (cs.diff_augment(images, config, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other) and first.shape == images.shape
    low, high = config.pixel_range
    erased = (first - (low + high) / 2).abs().max(dim=1).values < 1e-6  # (N, S, S): grey, the middle of the range
    assert (erased.flatten(1).sum(1) >= 3 * 3).all() and 0.1 < erased.float().mean() < 0.5
    first.sum().backward()
    assert (images.grad.flatten(1).abs().sum(1) > 0).all()
    assert len({tuple(image) for image in erased.flatten(1).tolist()}) > 32  # each image has numbers of its own
    even = cs.diff_augment(torch.full((64, 3, 16, 16), 0.3), config, torch.Generator().manual_seed(1))
    assert len({round((image - (low + high) / 2).abs().max().item(), 4) for image in even}) > 32


def test_augmentation_shifts_by_at_most_an_eighth(tiny):
    config = tiny.but(image_size=64, head="tanh")
    moved = cs.diff_augment(torch.full((400, 3, 64, 64), 0.9), config, torch.Generator().manual_seed(0))
    empty = moved.abs().amax(dim=1) < 1e-6                               # (400, 64, 64): shifted in, or cut out
    for lines in (empty.all(dim=2), empty.all(dim=1)):
        counts = lines.sum(dim=1)
        assert counts.max() == 8 and counts.min() == 0 and not lines[:, 8:-8].any()


def test_flip_mirrors_every_second_real_image_and_no_generated_one(tiny, toys, monkeypatch):
    seen, step = [], cs.d_step
    monkeypatch.setattr(cs, "d_step", lambda d, o, real, fake, *rest: seen.append((real, fake)) or step(d, o, real, fake, *rest))
    config = tiny.but(flip=True, epoch_images=256)
    cs.train(config, toys, progress=False)
    mirrored = []
    for k, (real, _) in enumerate(seen):
        plain = toys[cs.batch_index(k, len(toys), config)]
        for image, before in zip(cs.to_uint8(real, config), plain):
            mirrored.append(torch.equal(image, before.flip(2)))
            assert mirrored[-1] or torch.equal(image, before)
    assert len(mirrored) == 256 and 90 < sum(mirrored) < 166


@pytest.mark.parametrize("loss", [cs.bce, cs.bce_logits])
def test_loss_values(loss):
    assert loss(torch.zeros(4), 1).item() == pytest.approx(math.log(2))
    assert loss(torch.tensor([2.0, -1.0]), 0.9).item() == pytest.approx(
        sum(-0.9 * math.log(p) - 0.1 * math.log(1 - p) for p in (1 / (1 + math.exp(-2)), 1 / (1 + math.exp(1)))) / 2)


def test_equilibrium_is_the_best_constant_answer(tiny):
    for smoothing in (0.0, 0.1, 0.3):
        config = tiny.but(label_smoothing=smoothing, loss="bce_logits")
        logits = torch.linspace(-3, 3, 6001)[:, None]
        d_losses = [cs.bce_logits(x, 1 - smoothing) + cs.bce_logits(x, 0) for x in logits]
        best = min(range(len(d_losses)), key=lambda k: d_losses[k])
        d_loss, g_loss = cs.equilibrium(config)
        assert d_loss == pytest.approx(d_losses[best].item(), abs=1e-4)
        assert g_loss == pytest.approx(cs.bce_logits(logits[best], 1).item(), abs=1e-3)
    assert cs.equilibrium(tiny) == pytest.approx((2 * math.log(2), math.log(2)))


def test_seed_reproduces_and_global_state_does_not_matter(tiny, toys):
    torch.manual_seed(1)
    first = cs.train(tiny, toys, progress=False)
    torch.manual_seed(2)
    torch.rand(5)
    second, other = cs.train(tiny, toys, progress=False), cs.train(tiny.but(seed=1), toys, progress=False)
    assert without_seconds(first.history) == without_seconds(second.history)
    assert same(snapshot(first.generator), second.generator)
    assert without_seconds(first.history) != without_seconds(other.history)
    assert torch.equal(cs.sample(first, 5, seed=1), cs.sample(second, 5, seed=1))
    assert not torch.equal(cs.sample(first, 5, seed=1), cs.sample(first, 5, seed=2))


def test_history_and_snapshots(tiny, toys):
    run = cs.train(tiny.but(epochs=3, epoch_images=64), toys, progress=False)
    assert [r["step"] for r in run.history] == list(range(1, 13)) and run.history[-1]["epoch"] == 3
    assert {"step", "epoch", "images", "seconds", "d_loss", "g_loss", "penalty", "d_real", "d_fake"} == set(run.history[0])
    assert [r["epoch"] for r in run.history if "diversity" in r] == [1, 2, 3]
    assert [seen for seen, _ in run.snapshots] == [64, 128, 192]
    assert run.snapshots[0][1].shape == (36, 3, 16, 16) and run.snapshots[0][1].dtype == torch.uint8
    assert not torch.equal(run.snapshots[0][1], run.snapshots[-1][1])
    samples = cs.sample(run, 256, seed=0)
    assert torch.equal(run.snapshots[-1][1], samples[:36])
    assert run.history[-1]["diversity"] == cs.diversity(toys, samples)


def test_alarm_and_slopes_leave_the_training_alone(tiny, toys, monkeypatch):
    with_them = cs.train(tiny.but(epochs=3), toys, progress=False)
    monkeypatch.setattr(cs.Training, "check_up", lambda self: None)
    assert same(snapshot(with_them.generator), cs.train(tiny.but(epochs=3), toys, progress=False).generator)


def test_alarm_rings_on_collapse(tiny, toys):
    """An untrained network of the plain architecture makes one grey of every z; its alarm reads next to nothing."""
    run = cs.train(tiny.but(lr_g=0.0), toys, progress=False)
    assert run.history[-1]["diversity"] < 0.05


def test_every_epoch_ends_with_a_record(tiny, toys):
    run = cs.train(tiny.but(epochs=7, epoch_images=16 * 31), toys, progress=False)  # 217 steps in some 200 windows
    ends = [r["step"] for r in run.history if "diversity" in r]
    assert ends == [31 * k for k in range(1, 8)] and len(run.snapshots) == 7


def test_history_windows_are_means_over_all_steps(tiny, toys, monkeypatch):
    seen = []
    step = cs.d_step
    monkeypatch.setattr(cs, "d_step", lambda *args: seen.append(step(*args)) or seen[-1])
    run = cs.train(tiny.but(epochs=2, epoch_images=16 * 205), toys, progress=False)  # 410 steps, 200 windows
    steps = [0] + [r["step"] for r in run.history]
    assert len(run.history) == 200 and steps[-1] == 410
    for start, end, record in zip(steps, steps[1:], run.history):
        assert record["d_loss"] == pytest.approx(torch.stack(seen[start:end])[:, 0].mean().item(), rel=1e-4)


def test_batches_show_every_image_once_before_any_again(tiny):
    passes = [torch.cat([cs.batch_index(16 * turn + k, 256, tiny) for k in range(16)]) for turn in range(2)]
    assert all(sorted(order.tolist()) == list(range(256)) for order in passes)
    assert not torch.equal(*passes) and not torch.equal(passes[0][:16], cs.batch_index(0, 256, tiny.but(seed=1)))
    assert {len(cs.batch_index(k, 40, tiny)) for k in range(9)} == {16}


def test_a_step_trains_on_the_images_of_its_index(tiny, toys, monkeypatch):
    seen, step = [], cs.d_step
    monkeypatch.setattr(cs, "d_step", lambda d, optimizer, real, *rest: seen.append(real) or step(d, optimizer, real, *rest))
    cs.train(tiny, toys, progress=False)
    for k, real in enumerate(seen):
        assert torch.equal(cs.to_uint8(real, tiny), toys[cs.batch_index(k, len(toys), tiny)])


@pytest.mark.parametrize("head", ["tanh", "sigmoid"])
def test_pixel_range_there_and_back(tiny, head):
    config = tiny.but(head=head)
    every_level = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(2, 3, 16, 16)
    images = cs.to_network(every_level, config)
    low, high = config.pixel_range
    assert images.min().item() == pytest.approx(low) and images.max().item() == pytest.approx(high)
    assert torch.equal(cs.to_uint8(images, config), every_level)
    assert cs.to_uint8(torch.tensor([[-9.0, 9.0]]), config).tolist() == [[0, 255]]


def test_lazy_d_learns_in_every_second_step(tiny, toys, monkeypatch):
    calls = []
    step = cs.d_step
    monkeypatch.setattr(cs, "d_step", lambda *args: calls.append(1) or step(*args))
    run = cs.train(tiny.but(d_every=2, epoch_images=96), toys, progress=False)
    assert len(calls) == 3
    assert [r["d_loss"] for r in run.history[::2]] == [r["d_loss"] for r in run.history[1::2]]
    assert all(r["d_loss"] > 0 for r in run.history)


def test_weight_decay_shrinks_weights(tiny, toys):
    def size(run):
        return sum(p.square().sum() for p in run.generator.parameters())

    assert size(cs.train(tiny.but(weight_decay=1.0), toys, progress=False)) < size(cs.train(tiny, toys, progress=False))


@pytest.mark.parametrize("images, words", [
    (torch.zeros(64, 3, 16, 16), ["torch.float32", "uint8"]),
    (torch.zeros(64, 3, 32, 32, dtype=torch.uint8), ["(64, 3, 32, 32)", "load_faces(source, 16)"]),
    (torch.zeros(64, 16, 16, dtype=torch.uint8), ["(64, 16, 16)"]),
    (torch.zeros(7, 3, 16, 16, dtype=torch.uint8), ["7 images", "batch_size"]),
])
def test_unusable_images_are_named(tiny, images, words):
    with pytest.raises(ValueError) as error:
        cs.train(tiny, images)
    assert all(word in str(error.value) for word in words)


def test_short_training_learns(toys):
    """400 steps at 16 px bring the samples nearer to the faces, by more than the floor's size, and make them differ."""
    images = cs.toy_faces(1024, 16)
    config = cs.PRESETS["h1_bn_leaky"].but(image_size=16, width=32, batch_size=16, epochs=1, epoch_images=16 * 400)
    train_on, held_out = cs.hold_out(images, 0.25)
    reference = cs.floor(held_out, train_on)
    trained = cs.train(config, train_on, progress=False)
    start = cs.Run(config, trained.history, cs.Generator(config), [], {})
    before, after = (cs.evaluate(run, held_out, reference=reference) for run in (start, trained))
    assert after["swd"]["avg"] < before["swd"]["avg"] - reference["swd_floor"]["avg"]
    assert after["diversity"] > 0.2 > before["diversity"]
