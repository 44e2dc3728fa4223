"""Losses and penalties against formulas, the two steps, what they see, rates and precision."""

import copy
import dataclasses
import math

import pytest
import torch
from torch import nn

import cspgan as cs

CPU = torch.device("cpu")
CONVERGED = cs.PRESETS["converged"].but(image_size=16, width=16, batch_size=16)


def values(network):
    return {name: value.clone() for name, value in network.state_dict().items()}


def same(before, network):
    after = network.state_dict()
    return all(torch.equal(value, after[name]) for name, value in before.items())


def gradients(network):
    return [weight.grad.clone() for weight in network.parameters()]


def still(network):
    """An optimizer that moves nothing, so that gradients and losses can be looked at."""
    return torch.optim.SGD(network.parameters(), 0.0)


@pytest.fixture
def paired(tiny):
    return tiny.but(loss="relativistic", d_norm=False, init="he", r1=3.0, r2=5.0)


def networks(config, toys):
    """G, D, and a real and a generated batch."""
    training = cs.Training(config, toys, CPU)
    real, z = training.next_batch()
    return training.generator, training.discriminator, real, training.generator(z)


# ---- losses
@pytest.mark.parametrize("s", [0.0, 0.1])
@pytest.mark.parametrize("loss", cs.LOSSES)
def test_losses_of_the_steps_are_the_formulas(tiny, toys, loss, s):
    config = tiny.but(loss=loss, label_smoothing=s, init="he")
    generator, d, real, fake = networks(config, toys)
    a = d(real).double()
    b = d(fake).double()
    p = a.sigmoid()
    q = b.sigmoid()
    d_loss = -((1 - s) * p.log() + s * (1 - p).log() + (1 - q).log()).mean()
    g_loss = -q.log().mean()
    if loss == "relativistic":
        d_loss = -(a - b).sigmoid().log().mean()
        g_loss = -(b - a).sigmoid().log().mean()
    stats = cs.d_step(d, still(d), real, fake, config)
    expected = [x.item() for x in (d_loss, a.mean(), b.mean())]
    assert stats.tolist() == pytest.approx([*expected, 0], rel=1e-4, abs=1e-5)
    found = cs.g_step(d, still(generator), real, fake, config)
    assert found.item() == pytest.approx(g_loss.item())


@pytest.mark.parametrize("s", [0.0, 0.1, 0.3])
@pytest.mark.parametrize("loss", cs.LOSSES.values())
def test_equilibrium_is_the_best_constant_answer(loss, s):
    logits = torch.linspace(-1, 1, 501, dtype=torch.double)[:, None]
    d_losses = [loss.d(logit, logit, s).item() for logit in logits]
    best = logits[min(range(501), key=d_losses.__getitem__)]
    expected = min(d_losses), loss.g(best, best).item()
    assert loss.equilibrium(s) == pytest.approx(expected, abs=2e-3)


def dashed_lines(run):
    lines = cs.plot_losses(run).axes[0].lines
    return [line.get_ydata()[0] for line in lines if line.get_linestyle() == "--"]


def test_a_loss_is_added_by_one_entry(paired, toys, monkeypatch):
    monkeypatch.setitem(
        cs.LOSSES,
        "least_squares",
        cs.Loss(
            d=lambda d_real, d_fake, s: (d_real - 1).square().mean() + d_fake.square().mean(),
            g=lambda d_real, d_fake: (d_fake - 1).square().mean(),
            g_needs_real=False,
            fair_logit=lambda s: 0.5,
        ),
    )
    loss = cs.LOSSES["least_squares"]
    assert loss.equilibrium() == (1 / 2, 1 / 4)
    run = cs.train(paired.but(loss="least_squares", epochs=4), toys, progress=False)
    assert run.history[-1]["d_loss"] < run.history[0]["d_loss"]
    assert dashed_lines(run) == [1 / 2, 1 / 4]
    unknown = dataclasses.replace(loss, fair_logit=None)
    monkeypatch.setitem(cs.LOSSES, "least_squares", unknown)
    assert unknown.equilibrium() is None
    assert dashed_lines(run) == []


def test_penalty_is_the_squared_slope_by_differences(paired, toys):
    _, d, real, fake = networks(paired, toys)
    d.double()
    real = real[:4].double()
    fake = fake[:4].detach().double()
    steps = 1e-4 * torch.eye(768, dtype=torch.double).view(768, 3, 16, 16)
    sizes = []
    for image in (*real, *fake):
        slope = (d(image + steps) - d(image - steps)) / 2e-4  #                            (768,)
        sizes.append(slope.square().sum().item())
    penalty = cs.d_step(d, still(d), real, fake, paired)[3].item()
    expected = 3 / 2 * sum(sizes[:4]) / 4 + 5 / 2 * sum(sizes[4:]) / 4
    assert penalty == pytest.approx(expected, rel=1e-3)


# ---- faster penalties
@pytest.mark.parametrize("loss, s", [("relativistic", 0.0), ("bce", 0.0), ("bce_logits", 0.2)])
@pytest.mark.parametrize("r1, r2", [(3.0, 5.0), (2.0, 0.0), (0.0, 2.0)])
def test_linear_step_is_the_double_backward(paired, loss, s, r1, r2):
    config = paired.but(loss=loss, label_smoothing=s, r1=r1, r2=r2, image_size=32)
    d = cs.make_discriminator(config).double()
    random = torch.Generator().manual_seed(1)
    for name, bias in d.named_parameters():
        if "bias" in name:  # 0 at first, which would hide that v goes without them
            bias.data.normal_(0, 0.3, generator=random)
    real, fake = torch.rand(2, 6, 3, 32, 32, generator=random, dtype=torch.double)
    if loss != "relativistic":
        fake = fake[:4]  # a loss without pairs asks for no equal numbers
    stats = cs.d_step(d, still(d), real, fake, config)
    exact = gradients(d)
    assert torch.allclose(stats, cs.d_step_linear(d, still(d), real, fake, config), rtol=1e-5)
    for a, b in zip(exact, gradients(d)):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-12 + 1e-5 * a.abs().max())


class Skipping(cs.Discriminator):
    """Its layers are all known; what it does with them is not."""

    def forward(self, x):
        return super().forward(x) + x.sum(dim=(1, 2, 3)) / 100


@pytest.mark.parametrize(
    "kind, position, layer, step",
    [
        (cs.Discriminator, 1, nn.LeakyReLU(0.6), cs.d_step_linear),
        (cs.Discriminator, 1, nn.Tanh(), cs.d_step),
        (cs.Discriminator, 0, nn.Conv2d(3, 8, 4, 2, 1, bias=False), cs.d_step),
        (cs.Discriminator, 0, nn.Conv2d(3, 8, 3, 2, 2, dilation=2), cs.d_step),
        (Skipping, 1, nn.LeakyReLU(0.2), cs.d_step),
    ],
)
def test_any_d_learns_by_the_right_gradient(
    paired, toys, monkeypatch, capsys, kind, position, layer, step
):
    def make(config):
        discriminator = kind(16, 16, norm=False)
        discriminator.features[position] = copy.deepcopy(layer)
        cs.init_he(discriminator, 1)
        return discriminator

    monkeypatch.setattr(cs, "make_discriminator", make)
    exact = cs.Training(paired, toys, CPU)
    exact.chosen_d_step = cs.d_step
    exact.advance()
    training = cs.Training(paired, toys, CPU)
    training.advance()
    assert training.chosen_d_step is step
    assert not same(values(make(paired)), training.discriminator)
    assert ("double backward" in capsys.readouterr().out) == (step is cs.d_step)
    for a, b in zip(gradients(exact.discriminator), gradients(training.discriminator)):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-6 + 1e-4 * a.abs().max())


def test_linear_step_refuses_layers_that_it_does_not_know(paired, toys):
    _, d, real, fake = networks(paired, toys)
    d.features[1] = nn.Tanh()
    with pytest.raises(ValueError, match="use d_step"):
        cs.d_step_linear(d, still(d), real, fake, paired)


# ---- the two steps
@pytest.mark.parametrize("step", [cs.d_step, cs.d_step_linear, cs.g_step])
def test_a_step_moves_its_own_network_and_leaves_the_other_alone(paired, toys, step):
    generator, d, real, fake = networks(paired, toys)
    moved, kept = d, generator
    if step is cs.g_step:
        moved, kept = generator, d
    as_kept = values(kept)
    as_moved = values(moved)
    optimizer = cs.adam(moved, paired, 1e-3)
    first = step(d, optimizer, real, fake, paired).flatten()[0]
    assert same(as_kept, kept)
    assert not same(as_moved, moved)
    assert not real.requires_grad
    assert all(weight.grad is None for weight in kept.parameters())
    for _ in range(5):
        fake = generator(cs.Training(paired, toys, CPU).next_batch()[1])
        last = step(d, optimizer, real, fake, paired).flatten()[0]
    assert last < first
    if kept is generator:
        fake.sum().backward()  # what G made is still there for G's step


def test_short_training_learns():
    held_out = cs.toy_faces(128, 16, seed=1)
    config = CONVERGED.but(epochs=1, epoch_images=16 * 60, ema_images=0)
    training = cs.Training(config, cs.toy_faces(512, 16), CPU)
    run = cs.Run(config, [], training.generator, [], {})
    before = cs.sliced_wasserstein(held_out, cs.sample(run, 128))["avg"]
    for _ in range(60):
        training.advance()
    samples = cs.sample(run, 128)
    assert cs.sliced_wasserstein(held_out, samples)["avg"] < 0.8 * before
    assert cs.diversity(held_out, samples) > 0.5


# ---- what a step sees
def test_every_image_is_seen_once_in_a_turn_and_in_another_order_in_the_next(tiny, toys):
    images = toys[: 16 * 4 + 5]  # the last five wait for another turn
    orders = set()
    for seed in (0, 1):
        training = cs.Training(tiny.but(seed=seed), images, CPU)
        for step in range(0, 12, 4):
            seen = []
            drawn = []
            for training.step in range(step, step + 4):
                real, _ = training.next_batch()
                seen += cs.nearest(cs.to_uint8(real, tiny), images)[1].tolist()
                drawn.append(training.order)
            assert len(set(seen)) == 64
            assert all(order is drawn[0] for order in drawn)
            orders.add(tuple(seen))
    assert len(orders) == 6


def test_images_are_mirrored_half_of_the_time(tiny, toys):
    plain = cs.Training(tiny, toys, CPU)
    flipping = cs.Training(tiny.but(flip=True), toys, CPU)
    mirrored = 0
    for step in range(16):
        plain.step = flipping.step = step
        for image, found in zip(plain.next_batch()[0], flipping.next_batch()[0]):
            is_mirrored = torch.equal(found, image.flip(2))
            assert is_mirrored or torch.equal(found, image)
            mirrored += is_mirrored
    assert 90 <= mirrored <= 166  # of 256


@pytest.mark.parametrize("head, low", [("tanh", -1), ("sigmoid", 0), ("relu", 0)])
def test_pixels_there_and_back(tiny, head, low):
    config = tiny.but(head=head)
    levels = torch.arange(256, dtype=torch.uint8)
    pixels = cs.to_network(levels, config)
    assert (pixels.min(), pixels.max()) == pytest.approx((low, 1))
    assert torch.equal(cs.to_uint8(pixels, config), levels)
    assert cs.to_uint8(torch.tensor([-9.0, 9.0]), config).tolist() == [0, 255]


def test_training_follows_its_seed_and_leaves_the_callers_numbers_alone(tiny, toys):
    found = []
    for seed, others in ((0, 0), (0, 1), (1, 0)):
        torch.manual_seed(others)
        training = cs.Training(tiny.but(seed=seed), toys, CPU)
        before = torch.get_rng_state()
        training.advance()
        assert torch.equal(before, torch.get_rng_state())
        found.append(training.recent[0].tolist())
    assert found[0] == found[1] != found[2]


def test_lazy_d_learns_in_every_second_step(tiny, toys):
    training = cs.Training(tiny.but(d_every=2), toys, CPU)
    learned = []
    for _ in range(5):
        before = values(training.discriminator)
        training.advance()
        learned.append(not same(before, training.discriminator))
    first, second, third = training.recent[:3]
    assert learned == [True, False, True, False, True]
    assert torch.equal(first[:4], second[:4])
    assert not torch.equal(second[:4], third[:4])


def test_records_are_means_of_the_steps_that_are_finite(tiny, toys):
    training = cs.Training(tiny, toys, CPU)
    rows = [[1, 2, 3, 4, math.nan], [3, math.nan, 5, math.inf, math.nan]]
    training.recent = [torch.tensor(row) for row in rows]
    training.step = 5
    training.record()
    record = training.run.history[0]
    means = [record[name] for name in ("d_loss", "d_real", "d_fake", "penalty", "g_loss")]
    assert means == pytest.approx([2, 2, 4, 4, math.nan], nan_ok=True)
    assert (record["step"], record["images"], record["epoch"]) == (5, 80, 2.5)
    assert not training.recent


@pytest.mark.parametrize("head", ["sigmoid", "tanh"])
def test_slopes_of_d_are_at_real_images_and_at_samples_by_pixels_from_minus_one(tiny, toys, head):
    training = cs.Training(tiny.but(head=head, d_norm=False, init="he"), toys, CPU)
    training.advance()
    training.record()
    training.look(None)
    record = training.run.history[-1]
    low = training.config.pixel_range[0]
    samples = cs.sample(training.run, len(toys))
    for name, images in (("grad_d", toys), ("grad_d_fake", samples)):
        y = (images[:64] / 127.5 - 1).requires_grad_()
        x = low + (1 - low) * (y + 1) / 2
        (slope,) = torch.autograd.grad(training.discriminator(x).sum(), y)
        expected = slope.flatten(1).norm(dim=1).square().mean().sqrt().item()
        assert record[name] == pytest.approx(expected, rel=1e-4)
    assert record["grad_d"] != pytest.approx(record["grad_d_fake"], rel=1e-3)


# ---- rates and means
@pytest.mark.parametrize("step, times, share", [(10**6, 4, 0.5), (5, 1, 0.75), (20, 2, 0.5)])
def test_running_mean_forgets_half_in_its_half_life(tiny, step, times, share):
    config = tiny.but(block_norm="both", ema_images=64)
    network = cs.make_generator(config)
    mean = copy.deepcopy(network)
    for value in mean.state_dict().values():
        value.zero_()
    for _ in range(times):
        cs.update_ema(mean, network, config, step)  # early on its half-life is a tenth of all
    for a, b in zip(mean.state_dict().values(), network.state_dict().values()):
        assert torch.allclose(a, (share * b).to(a.dtype))


def test_running_mean_is_kept_and_changes_nothing_in_the_training(tiny, toys):
    plain = cs.Training(tiny.but(block_norm="both"), toys, CPU)
    averaged = cs.Training(tiny.but(block_norm="both", ema_images=64), toys, CPU)
    for training in (plain, averaged):
        for _ in range(3):
            training.advance()
    generator = values(plain.generator)
    assert same(generator, averaged.generator)
    assert same(generator, plain.kept)
    for other in (plain.generator, cs.make_generator(plain.config)):  # neither last nor first
        kept = averaged.kept.stem.parameters()
        assert not any(map(torch.equal, kept, other.stem.parameters()))


@pytest.mark.parametrize("lr_end", [0.1, 1.0])
def test_rates_fall_on_a_half_cosine(tiny, toys, lr_end):
    config = tiny.but(lr_end=lr_end, epoch_images=160, lr_g=1e-3, lr_d=2e-3, lr_width=8)
    training = cs.Training(config, toys, CPU)
    for k in range(10):
        training.advance()
        fall = lr_end + (1 - lr_end) * (1 + math.cos(math.pi * k / 10)) / 2
        for optimizer, lr in ((training.opt_g, 1e-3), (training.opt_d, 2e-3)):
            rates = [group["lr"] for group in optimizer.param_groups]
            assert rates == pytest.approx([lr * fall, lr * fall / 2])


def test_l2_is_added_to_the_gradient_and_betas_are_the_configs(tiny):
    network = cs.make_generator(tiny)
    before = values(network)
    optimizer = cs.adam(network, tiny.but(weight_decay=0.01, beta1=0.3, beta2=0.7), 1e-3)
    for weight in network.parameters():
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    for name, weight in network.named_parameters():  # Adam's first step is the sign; AdamW's is not
        moved = before[name] - weight
        assert (moved - 1e-3 * before[name].sign()).abs().mean() < 1e-5
    assert {group["betas"] for group in optimizer.param_groups} == {(0.3, 0.7)}


def fan_ins(network):
    """{layer: channels that it reads}."""
    layers = network.named_modules()
    return {name: layer.in_channels for name, layer in layers if hasattr(layer, "in_channels")}


KINDS = [(cs.make_generator, {"ladder": ladder}) for ladder in cs.CHOICES["ladder"]]
KINDS += [(cs.make_generator, {"generator": "dcgan"}), (cs.make_discriminator, {"d_wider": 2})]


@pytest.mark.parametrize("width", [50, 100, 200])  # z_dim is 100, and a CSPup takes half of it
@pytest.mark.parametrize("make, changes", KINDS)
def test_weights_whose_inputs_grow_with_the_width_learn_more_slowly(make, changes, width):
    config = cs.BASELINE.but(image_size=32, width=width, block_norm="both", **changes)
    network = make(config)
    wider = fan_ins(make(config.but(width=2 * width)))
    grows = {name for name, channels in fan_ins(network).items() if wider[name] > channels}
    for lr_width, slow in ((25, 1e-3 * 25 / width), (0, 1e-3)):
        rates = {}
        for group in cs.adam(network, config.but(lr_width=lr_width), 1e-3).param_groups:
            rates.update(dict.fromkeys(group["params"], group["full_lr"]))
        for name, weight in network.named_parameters():
            layer, part = name.rsplit(".", 1)
            is_slow = part == "weight" and layer in grows
            assert rates.pop(weight) == pytest.approx([1e-3, slow][is_slow]), name
        assert grows and not rates


def growth(toys, kind, lr_width):
    """{hidden layer: exponent by which its change after one step grows with the width}."""
    changes = []
    for width in (32, 128):
        training = cs.Training(CONVERGED.but(width=width, lr_width=lr_width), toys, CPU)
        network = getattr(training, kind)
        real, z = training.next_batch()
        outputs = {}
        for name, channels in fan_ins(network).items():
            if channels not in (3, 50):  # 50: half of z

                def note(layer, inputs, output, name=name):
                    outputs[name] = output.detach()

                network.get_submodule(name).register_forward_hook(note)
        x = {"generator": z, "discriminator": real}[kind]
        network(x)
        before = dict(outputs)
        training.advance()
        network(x)
        changes.append({name: (y - before[name]).abs().mean() for name, y in outputs.items()})
    narrow, wide = changes
    return {name: math.log(wide[name] / narrow[name]) / math.log(4) for name in narrow}


@pytest.mark.parametrize("kind", ["generator", "discriminator"])
def test_the_width_rule_keeps_the_change_of_layers(toys, kind):
    """As the authors of the parametrization check theirs. With literal rates it grows."""
    with_rule = growth(toys, kind, 32)
    with_rule.pop("to_logit", 0)  # He's scale is kept there, and what it reads moves along it
    literal = growth(toys, kind, 0)
    assert max(with_rule.values()) < 0.25, with_rule
    assert min(literal.values()) > 0.4, literal


# ---- precision
def test_gradients_in_float16_are_those_in_float32(toys):
    training = cs.Training(CONVERGED.but(width=32), toys, CPU)
    for _ in range(20):
        training.advance()
    generator = training.generator
    d = training.discriminator
    real, z = training.next_batch()
    for step, network, bound in (
        (cs.d_step_linear, d, 0.02),
        (cs.d_step, d, 0.02),
        (cs.g_step, generator, 0.04),  # two networks, and BatchNorm
    ):
        found = []
        for name in ("float32", "float16"):
            precision = cs.Precision(name)
            with precision.autocast():
                fake = generator(z)
            step(d, still(network), real, fake, training.config, precision)
            found.append(gradients(network))  # unscaled by SGD's step
        exact, half = (torch.cat([x.flatten() for x in parts]) for parts in found)
        assert 0 < (half - exact).norm() < bound * exact.norm(), step
        for exact, half in zip(*found):
            if exact.dim() == 4:
                assert (half - exact).norm() < 2.5 * bound * exact.norm(), step


def test_step_that_overflows_is_left_out_and_the_scale_is_halved(paired, toys):
    _, d, real, fake = networks(paired, toys)
    optimizer = cs.adam(d, paired, 1e-3)
    precision = cs.Precision("float16")
    precision.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30)
    before = values(d)
    cs.d_step_linear(d, optimizer, real, fake, paired, precision)
    assert same(before, d)
    assert precision.scaler.get_scale() == 2.0**29
    cs.d_step_linear(d, optimizer, real, fake, paired, cs.Precision("float16"))
    assert not same(before, d)


def test_half_precision_is_the_cards_and_is_tried(tiny, paired, toys, monkeypatch, capsys):
    gpu = torch.device("cuda")
    training, step = cs.Training, cs.g_step
    monkeypatch.setattr(
        cs, "Training", lambda config, images, device, name: training(config, images, CPU, name)
    )
    for capability, half in (((7, 5), "float16"), ((8, 0), "bfloat16")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        assert cs.choose_precision(tiny, toys, gpu) == half
        assert cs.choose_precision(paired, toys, gpu) == half
    assert cs.choose_precision(paired.but(d_norm=True), toys, gpu) == "float32"
    assert "double backward" in capsys.readouterr().out
    assert cs.choose_precision(tiny, toys, CPU) == "float32" and not capsys.readouterr().out
    for factor in (2, math.nan):
        factors = {"float32": 1, "bfloat16": factor}
        monkeypatch.setattr(cs, "g_step", lambda *args: step(*args) * factors[args[-1].name])
        assert cs.choose_precision(tiny, toys, gpu) == "float32"
        assert "in bfloat16" in capsys.readouterr().out
