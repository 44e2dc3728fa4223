"""Losses and penalties against formulas, the two steps, rates, precision, and the order of images."""
import copy, math

import pytest
import torch

import cspgan as cs

CPU = torch.device("cpu")

def state(network):
    return {name: value.clone() for name, value in network.state_dict().items()}

def same(before, network):
    return all(torch.equal(before[name], value) for name, value in network.state_dict().items())

def still(network):
    """An optimiser that moves nothing, so that gradients and losses can be looked at."""
    return torch.optim.SGD(network.parameters(), 0.0)

def watched(monkeypatch, name):
    """The arguments of all calls of one of the module's functions."""
    calls, function = [], getattr(cs, name)
    monkeypatch.setattr(cs, name, lambda *args: calls.append(args) or function(*args))
    return calls

@pytest.fixture
def paired(tiny):
    return tiny.but(loss="relativistic", d_norm=False, init="he", r1=3.0, r2=5.0)

def networks(config, toys):
    """G, D, and a real and a generated batch."""
    generator = cs.Generator(config)
    z = torch.randn(16, config.z_dim, generator=torch.Generator().manual_seed(9))
    return generator, cs.Discriminator(config), cs.to_network(toys[:16], config), generator(z)

# ---- losses
@pytest.mark.parametrize("loss", cs.D_LOSSES)
@pytest.mark.parametrize("s", [0.0, 0.1])
def test_losses_of_the_steps_are_the_formulas(tiny, toys, loss, s):
    config = tiny.but(block_norm="both", loss=loss, label_smoothing=s, init="he")
    generator, d, real, fake = networks(config, toys)
    a, b = d(real).double(), d(fake).double()
    p, q = a.sigmoid(), b.sigmoid()
    d_formula = -((1 - s) * p.log() + s * (1 - p).log()).mean() - (1 - q).log().mean()
    g_formula = -q.log().mean()
    if loss == "relativistic":
        d_formula, g_formula = -(a - b).sigmoid().log().mean(), -(b - a).sigmoid().log().mean()
    stats = cs.d_step(d, still(d), real, fake, config)
    assert stats.tolist() == pytest.approx([x.item() for x in (d_formula, a.mean(), b.mean(), 0 * p[0])],
                                           rel=1e-4, abs=1e-5)
    assert cs.g_step(d, still(generator), real, fake, config).item() == pytest.approx(g_formula.item())

def test_equilibrium_is_the_best_constant_answer(tiny):
    logits = torch.linspace(-3, 3, 6001)[:, None]
    for s in (0.0, 0.1, 0.3):
        d_losses = [cs.bce_logits(x, 1 - s) + cs.bce_logits(x, 0) for x in logits]
        best = min(range(len(logits)), key=d_losses.__getitem__)
        d_loss, g_loss = cs.equilibrium(tiny.but(label_smoothing=s))
        assert d_loss == pytest.approx(d_losses[best].item(), abs=1e-4)
        assert g_loss == pytest.approx(cs.bce_logits(logits[best], 1).item(), abs=1e-3)
    assert cs.equilibrium(tiny) == pytest.approx((2 * math.log(2), math.log(2)))
    assert cs.equilibrium(tiny.but(loss="relativistic")) == pytest.approx((math.log(2), math.log(2)))

def test_penalty_is_the_squared_slope_by_differences(paired, toys):
    _, d, real, fake = networks(paired, toys)
    exact, slopes = copy.deepcopy(d).double(), []
    steps = 1e-4 * torch.eye(768, dtype=torch.double).view(768, 3, 16, 16)
    with torch.no_grad():
        for image in (*real[:4].double(), *fake[:4].double()):
            slope = (exact(image + steps) - exact(image - steps)) / 2e-4  # (768,)
            slopes.append(slope.square().sum().item())
    penalties = []
    for images in (real[:4], fake[:4].detach()):
        images.requires_grad_()
        penalties += cs.gradient_penalty(d(images), images).tolist()
    assert penalties == pytest.approx(slopes, rel=1e-3)
    stats = cs.d_step(d, still(d), real[:4], fake[:4], paired)
    assert stats[3].item() == pytest.approx(3 / 2 * sum(slopes[:4]) / 4 + 5 / 2 * sum(slopes[4:]) / 4, rel=1e-3)

@pytest.mark.parametrize("loss, s", [("relativistic", 0.0), ("bce", 0.0), ("bce_logits", 0.2)])
@pytest.mark.parametrize("r1, r2", [(3.0, 5.0), (2.0, 0.0), (0.0, 2.0)])
@pytest.mark.parametrize("size", [16, 32])
def test_linear_step_is_the_double_backward(paired, loss, s, r1, r2, size):
    config = paired.but(loss=loss, label_smoothing=s, r1=r1, r2=r2, image_size=size, d_wider=2)
    d, found = cs.Discriminator(config).double(), []
    random = torch.Generator().manual_seed(1)
    for p in d.parameters():  # biases are 0 at first, and would hide that v is sent without them
        p.data.add_(0.3 * torch.randn(p.shape, generator=random, dtype=torch.double) * (p.dim() == 1))
    real, fake = torch.rand(2, 6, 3, size, size, generator=random, dtype=torch.double)
    for step in (cs.d_step, cs.d_step_linear):
        stats = step(d, still(d), real, fake, config)
        found.append([stats, *(p.grad.clone() for p in d.parameters())])
    assert found[0][0][3] > 0
    for plain, linear in zip(*found):
        assert torch.allclose(plain, linear, rtol=1e-5, atol=1e-12 + 1e-5 * plain.abs().max())

def test_linear_step_is_taken_where_it_is_exact(paired, toys):
    for config, step in ((paired, cs.d_step_linear), (paired.but(r1=0.0), cs.d_step_linear),
                         (paired.but(d_norm=True), cs.d_step), (paired.but(r1=0.0, r2=0.0), cs.d_step)):
        assert cs.Training(config, toys, CPU).d_step is step

# ---- the two steps
@pytest.mark.parametrize("kind", ["bce", "double", "linear"])
@pytest.mark.parametrize("learner", ["d", "g"])
def test_a_step_moves_its_own_network_and_leaves_the_other_alone(tiny, paired, toys, kind, learner):
    config = (tiny if kind == "bce" else paired).but(block_norm="both")
    generator, d, real, fake = networks(config, toys)
    moved, kept = (d, generator) if learner == "d" else (generator, d)
    step = cs.g_step if learner == "g" else cs.d_step_linear if kind == "linear" else cs.d_step
    before, optimizer, losses = (state(d), state(generator)), cs.adam(moved, config, 1e-3), []
    for _ in range(6):
        losses.append(step(d, optimizer, real, fake, config).flatten()[0])
        assert not real.requires_grad and all(p.grad is None for p in kept.parameters())
        assert same(before[learner == "d"], kept) and not same(before[learner == "g"], moved)
        if learner == "g":
            fake = generator(torch.randn(16, 8, generator=torch.Generator().manual_seed(9)))
            before = before[0], state(generator)  # its BatchNorm counts every batch that it makes
    assert losses[-1] < losses[0]
    fake.sum().backward()  # what G made is still there for G's step

def test_short_training_learns():
    images, held_out = cs.toy_faces(512, 16), cs.toy_faces(128, 16, seed=1)
    config = cs.CONVERGED.but(image_size=16, width=16, batch_size=16, epochs=1, epoch_images=16 * 150,
                              ema_images=0)
    training, read = cs.Training(config, images, CPU), []
    run = cs.Run(config, [], training.generator, [], {})
    for steps in (0, 150):
        for _ in range(steps):
            training.advance()
        samples = cs.sample(run, 128)
        read.append((cs.sliced_wasserstein(held_out, samples)["avg"], cs.diversity(held_out, samples)))
    assert read[1][0] < 0.8 * read[0][0] and read[1][1] > 0.2

# ---- what a step sees
def test_every_image_is_seen_once_in_a_turn_and_in_another_order_in_the_next(tiny):
    n = 16 * 16 + 5  # the last five wait for another turn
    turns = [torch.cat([cs.batch_index(16 * turn + k, n, tiny) for k in range(16)]) for turn in range(3)]
    assert all(len(set(turn.tolist())) == 256 and turn.max() < n for turn in turns)
    assert not torch.equal(turns[0], turns[1]) and not torch.equal(turns[1], turns[2])
    other = torch.cat([cs.batch_index(k, n, tiny.but(seed=1)) for k in range(16)])
    assert not any(torch.equal(other, turn) for turn in turns)
    assert torch.equal(turns[1][:16], cs.batch_index(16, n, tiny))  # a function of the step alone

def test_steps_see_the_images_of_their_index_mirrored_every_second_time(tiny, toys, monkeypatch):
    for flip, low, high in ((False, 0, 0), (True, 90, 166)):
        config, seen = tiny.but(flip=flip), watched(monkeypatch, "g_step")
        training, mirrored = cs.Training(config, toys, CPU), []
        for k in range(16):
            training.advance()
            plain = toys[cs.batch_index(k, len(toys), config)]
            for image, before in zip(cs.to_uint8(seen[k][2], config), plain):
                mirrored.append(torch.equal(image, before.flip(2)))
                assert mirrored[-1] or torch.equal(image, before)
        assert len(mirrored) == 256 and low <= sum(mirrored) <= high

@pytest.mark.parametrize("head", ["tanh", "sigmoid", "relu"])
def test_pixels_there_and_back(tiny, head):
    config = tiny.but(head=head)
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(2, 3, 16, 16)
    images = cs.to_network(levels, config)
    assert (images.min(), images.max()) == pytest.approx((-1 if head == "tanh" else 0, 1))
    assert torch.equal(cs.to_uint8(images, config), levels)
    assert cs.to_uint8(torch.tensor([[-9.0, 9.0]]), config).tolist() == [[0, 255]]

def test_training_follows_its_seed_and_leaves_the_callers_numbers_alone(tiny, toys):
    found = []
    for seed, other in ((0, 0), (0, 1), (1, 0)):
        training = cs.Training(tiny.but(seed=seed), toys, CPU)
        torch.manual_seed(other)
        before = torch.get_rng_state()
        training.advance()
        assert torch.equal(before, torch.get_rng_state())
        found.append(training.sums.tolist())
    assert found[0] == found[1] != found[2]

def test_lazy_d_learns_in_every_second_step_and_records_are_means(tiny, toys, monkeypatch):
    training = cs.Training(tiny.but(d_every=2), toys, CPU)
    d_calls, stats, g_losses = 0, [], []
    for _ in range(5):
        before = state(training.discriminator)
        training.advance()
        d_calls += not same(before, training.discriminator)
        stats.append(training.d_stats.clone())
        g_losses.append(training.sums[4].item() - sum(g_losses))
    record = training.record()
    assert d_calls == 3 and torch.equal(stats[0], stats[1]) and not torch.equal(stats[1], stats[2])
    expected = [*torch.stack(stats).mean(0).tolist(), sum(g_losses) / 5]
    assert [record[key] for key in ("d_loss", "d_real", "d_fake", "penalty", "g_loss")] == (
        pytest.approx(expected, rel=1e-5))
    assert (record["step"], record["images"], record["epoch"]) == (5, 80, 2.5)
    training.advance()
    assert training.record()["g_loss"] != record["g_loss"] and len(training.history) == 2

# ---- rates and means
def test_running_mean_forgets_half_in_its_half_life(tiny, toys):
    config, means = tiny.but(block_norm="both", ema_images=64), []
    network = cs.Generator(config)
    for step, times in ((10**6, 4), (5, 1), (20, 1)):  # early on, a tenth of the images is the half-life
        mean = copy.deepcopy(network)
        for value in mean.state_dict().values():
            value.zero_()
        for _ in range(times):
            cs.update_ema(mean, network, config, step)
        means.append([(a / b).mean().item() for a, b in zip(mean.parameters(), network.parameters()) if b.all()])
    assert means[0] and means == [pytest.approx([x] * len(means[0])) for x in (0.5, 0.75, 1 - 0.5**0.5)]
    trained = [cs.Training(config.but(ema_images=h), toys, CPU) for h in (64, 0)]
    for training in trained:
        for _ in range(3):
            training.advance()
    assert same(state(trained[0].generator), trained[1].generator)  # it changes nothing in the training
    kept = trained[0].kept.state_dict()
    assert not torch.equal(kept["to_rgb.0.weight"], trained[0].generator.state_dict()["to_rgb.0.weight"])
    assert kept["stem.left.1.running_mean"].any() and kept["stem.left.1.num_batches_tracked"] == 3

def test_rates_fall_on_a_half_cosine(tiny, toys):
    for lr_end in (0.1, 1.0):
        config = tiny.but(lr_end=lr_end, epoch_images=160, lr_g=1e-3, lr_d=2e-3, lr_width=8)
        training = cs.Training(config, toys, CPU)
        for k in range(10):
            training.advance()
            fall = lr_end + (1 - lr_end) * (1 + math.cos(math.pi * k / 10)) / 2
            for optimizer, lr in ((training.opt_g, 1e-3), (training.opt_d, 2e-3)):
                rates = sorted(group["lr"] for group in optimizer.param_groups)
                assert rates == pytest.approx([lr * fall / 2, lr * fall])

def test_l2_is_added_to_the_gradient_and_betas_are_the_configs(tiny):
    config = tiny.but(weight_decay=0.01, beta1=0.3, beta2=0.7)
    network = cs.Generator(config)
    optimizer, before = cs.adam(network, config, 1e-3), [p.clone() for p in network.parameters()]
    for p in network.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for p, old in zip(network.parameters(), before):  # Adam's first step is the sign; AdamW's is not
        assert (old - p - 1e-3 * old.sign()).abs().mean() < 1e-5
    assert {group["betas"] for group in optimizer.param_groups} == {(0.3, 0.7)}

# ---- the width rule
READ_Z_OR_RGB = {"cspup_first": {"stem.left.0", "stem.right.0", "stem.right.3"},
                 "deconv_first": {"stem"}, "cspup_last": {"stem"}}

@pytest.mark.parametrize("ladder", cs.LADDERS)
@pytest.mark.parametrize("make", [cs.Generator, cs.DCGANGenerator, cs.Discriminator])
def test_weights_whose_inputs_grow_with_the_width_learn_more_slowly(ladder, make):
    config = cs.BASELINE.but(image_size=32, width=64, ladder=ladder, lr_width=16)
    fixed = {cs.Generator: READ_Z_OR_RGB[ladder], cs.Discriminator: {"features.0"},
             cs.DCGANGenerator: {"stem.0"} if ladder == "cspup_first" else {"stem"}}[make]
    network = make(config)
    names = {id(p): name for name, p in network.named_parameters()}
    for lr_width, slow in ((16, 1e-3 / 4), (64, 1e-3), (0, 1e-3)):
        optimizer = cs.adam(network, config.but(lr_width=lr_width), 1e-3)
        rates = [(names[id(p)], group["lr"]) for group in optimizer.param_groups for p in group["params"]]
        assert len(rates) == len(names) == len(dict(rates))
        for name, rate in rates:
            full = names and name.removesuffix(".weight") in fixed or network.get_parameter(name).dim() == 1
            assert rate == pytest.approx(1e-3 if full else slow), name

def growth(toys, kind, lr_width):
    """{hidden layer: exponent by which its change after one step grows with the width}."""
    changes = []
    for width in (32, 256):
        config = cs.CONVERGED.but(image_size=16, width=width, batch_size=16, lr_width=lr_width,
                                  lr_g=2e-3, lr_d=2e-3)
        training, outputs = cs.Training(config, toys, CPU), {}
        network = getattr(training, kind)
        x = cs.to_network(toys[:16], config)
        if kind == "generator":
            x = torch.randn(16, config.z_dim, generator=torch.Generator().manual_seed(1))
        for name, layer in network.named_modules():
            if getattr(layer, "in_channels", 3) not in (3, config.z_dim // 2):
                layer.register_forward_hook(lambda m, i, y, name=name: outputs.update({name: y.detach()}))
        network(x)
        before = dict(outputs)
        training.advance()
        network(x)
        changes.append({name: (y - before[name]).abs().mean().item() for name, y in outputs.items()})
    return {name: math.log(changes[1][name] / changes[0][name]) / math.log(8) for name in changes[0]}

def test_the_width_rule_keeps_the_change_of_layers(toys):
    """As the authors of the parametrization check theirs. With literal rates it grows."""
    for kind in ("generator", "discriminator"):
        with_rule, literal = growth(toys, kind, 32), growth(toys, kind, 0)
        with_rule.pop("to_logit", 0)  # He's scale is kept there, and what it reads moves along it
        assert with_rule and max(with_rule.values()) < 0.25, (kind, with_rule)
        assert min(literal.values()) > 0.4, (kind, literal)
