"""Shapes, parameter counts by independent arithmetic, branches, gradients, initial weights."""
import copy, inspect, math

import pytest
import torch
from torch import nn

import cspgan as cs
from cspgan import BASELINE, CSPup, DCGANGenerator, Discriminator, Generator

def count(network):
    return sum(p.numel() for p in network.parameters())

def conv(c, out, kernel):
    return c * out * kernel**2 + out

def csp_up(c, out, kernel=4):
    """Weights and biases of a block without norms, written out from the drawing."""
    half = c // 2
    return (conv(half, out, kernel) + conv(half, half, 1) + conv(half, out, kernel)
            + conv(out, out, 3) + conv(out, out, 3))

def shapes(generator):
    """The shape that every part gives, from z on. By parts: autocast does not know `meta`."""
    x, found = torch.randn(2, 100, 1, 1), []
    for part in (generator.stem, *generator.blocks, generator.to_rgb):
        x = part(x)
        found.append(tuple(x.shape[1:]))
    return found

BOXES = [(1024, 4, 4), (512, 8, 8), (256, 16, 16), (128, 32, 32), (64, 64, 64)]
PAIRS = [(1024, 512), (512, 256), (256, 128), (128, 64)]
FOUR = sum(csp_up(*pair) for pair in PAIRS)

@pytest.mark.parametrize("ladder, outputs, parameters", [
    ("cspup_first", BOXES, csp_up(100, 1024) + FOUR + conv(64, 3, 4)),
    ("deconv_first", BOXES, conv(100, 1024, 4) + FOUR + conv(64, 3, 4)),
    ("cspup_last", [*BOXES, (32, 128, 128)],
     conv(100, 1024, 4) + FOUR + csp_up(64, 32) + conv(32, 3, 3))])
def test_the_three_readings_of_the_drawing_at_full_size(ladder, outputs, parameters):
    with torch.device("meta"):  # allocates nothing
        generator = Generator(BASELINE.but(ladder=ladder))
        assert shapes(generator) == [*outputs, (3, 128, 128)]
    assert count(generator) == parameters
    blocks = [m for m in generator.modules() if isinstance(m, CSPup)]
    assert len(blocks) == (4 if ladder == "deconv_first" else 5)
    assert isinstance(generator.stem, CSPup if ladder == "cspup_first" else nn.ConvTranspose2d)

def test_d_and_the_control_at_full_size():
    widths = [3, 64, 128, 256, 512, 1024]
    for wider, fewer, kernel in ((1, 0, 4), (2, 0, 4), (1, 1, 8), (1, 4, 64)):
        channels = [3, *(wider * c for c in widths[1:])][: 6 - fewer]
        with torch.device("meta"):
            d = Discriminator(BASELINE.but(d_wider=wider, d_fewer=fewer))
            assert d(torch.randn(2, 3, 128, 128)).shape == (2,)
        convs = sum(conv(c, out, 4) for c, out in zip(channels, channels[1:]))
        assert count(d) == convs + 2 * sum(channels[2:]) + conv(channels[-1], 1, kernel)
    with torch.device("meta"):
        dcgan = DCGANGenerator(BASELINE)
        assert shapes(dcgan) == [*BOXES, (3, 128, 128)]
    deconvs = sum(c * out * 16 + 2 * out for c, out in [(100, 1024), *PAIRS])
    assert count(dcgan) == deconvs + conv(64, 3, 4)

@pytest.mark.parametrize("size", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("width", [2, 37])
def test_any_size_and_width(size, width):
    for ladder in cs.LADDERS:
        config = BASELINE.but(image_size=size, width=width, ladder=ladder, z_dim=7)
        for make in (Generator, DCGANGenerator):
            images = make(config)(torch.randn(2, 7))
            assert images.shape == (2, 3, size, size)
    assert Discriminator(config)(images).shape == (2,)

def test_block_is_the_sum_of_two_branches_fed_with_one_half_each():
    torch.manual_seed(0)
    block, x = CSPup(8, 4, nn.Tanh), torch.randn(1, 8, 4, 4)
    for branch, half in ((block.left, slice(0, 4)), (block.right, slice(4, 8))):
        changed = x.clone()
        changed[:, half] += 1
        moved = block(changed) - block(x)
        assert torch.allclose(moved, branch(changed[:, half]) - branch(x[:, half]), atol=1e-6)
        assert moved.abs().max() > 1e-3
    left, right = ({id(p) for p in branch.parameters()} for branch in (block.left, block.right))
    assert left and right and not left & right  # a deconvolution each
    with pytest.raises(ValueError, match="in_channels=1.*'left'"):
        CSPup(1, 4, norm="left")

@pytest.mark.parametrize("norm, left, right", [
    ("none", "T", "C1 A T C3 A C3"), ("right", "T", "C1 B A T C3 B A C3"),
    ("both", "T B", "C1 B A T C3 B A C3 B")])
@pytest.mark.parametrize("act, kind", [
    ("relu", nn.ReLU), ("leaky_relu", nn.LeakyReLU), ("tanh", nn.Tanh)])
def test_block_has_its_layers_in_the_order_of_the_drawing(norm, left, right, act, kind):
    def letters(branch):
        names = {nn.ConvTranspose2d: "T", nn.BatchNorm2d: "B", kind: "A"}
        layers = [m for m in branch if not isinstance(m, nn.Identity)]
        return " ".join(names.get(type(m)) or f"C{m.kernel_size[0]}" for m in layers)
    config = BASELINE.but(image_size=32, width=16, block_norm=norm, block_act=act)
    blocks = [m for m in Generator(config).modules() if isinstance(m, CSPup)]
    assert [(letters(b.left), letters(b.right)) for b in blocks] == [(left, right)] * 3

def test_block_copied_elsewhere_needs_only_torch():
    scope = {"torch": torch, "nn": nn}
    exec(inspect.getsource(CSPup), scope)
    assert scope["CSPup"](8, 4, nn.ReLU, "both")(torch.randn(2, 8, 2, 2)).shape == (2, 4, 4, 4)

@pytest.mark.parametrize("head, low, high", [
    ("tanh", -1, 1), ("sigmoid", 0, 1), ("relu", 0, math.inf)])
def test_head_sets_the_range_and_d_returns_raw_logits(head, low, high):
    config = BASELINE.but(image_size=16, width=16, head=head, init="he")
    generator, d = Generator(config), Discriminator(config)
    generator.to_rgb[0].weight.data.mul_(30)
    images = generator(torch.randn(8, 100))
    assert low <= images.min() and images.max() <= high and images.std() > 0
    assert images.min() < 0 or head != "tanh"
    logits = d(100 * torch.randn(64, 3, 16, 16))
    assert logits.min() < 0 and logits.max() > 1

@pytest.mark.parametrize("name", [*cs.PRESETS, *cs.ABLATIONS])
def test_a_step_of_every_preset_reaches_every_weight(name, toys):
    """At He's scale: 0.02 shrinks the signal of so thin a network below what float32 adds up."""
    config = {**cs.PRESETS, **cs.ABLATIONS}[name].but(
        image_size=16, width=16, z_dim=8, batch_size=16, epochs=1, epoch_images=None, init="he")
    training = cs.Training(config, toys, torch.device("cpu"))
    networks = training.generator, training.discriminator
    before = copy.deepcopy(networks)
    training.advance()
    assert training.sums.isfinite().all() and training.sums[0] > 0 and training.sums[4] > 0
    for network, old in zip(networks, before):
        for (weight, p), q in zip(network.named_parameters(), old.parameters()):
            assert p.grad is not None and p.grad.isfinite().all(), weight
            if weight.endswith("weight"):  # biases that a BatchNorm follows are cancelled by it
                assert (p.grad != 0).float().mean() > 0.2 and not torch.equal(p, q), weight

def layers_of(*networks):
    kinds = nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d
    return {name: m for network in networks for name, m in network.named_modules()
            if isinstance(m, kinds)}

def test_initial_weights_of_dcgan():
    config = BASELINE.but(image_size=32, width=128, block_norm="both")
    layers = layers_of(Generator(config), Discriminator(config))
    for name, m in layers.items():
        n, mean = m.weight.numel(), 1 if isinstance(m, nn.BatchNorm2d) else 0
        assert abs(m.weight.mean() - mean) < 5 * 0.02 / math.sqrt(n), name
        assert m.weight.std().item() == pytest.approx(0.02, rel=4 / math.sqrt(2 * n)), name
        assert not m.bias.any()

def test_initial_weights_of_he():
    """Gain over inputs that one output sees, written out for every kind of layer."""
    config = BASELINE.but(image_size=32, width=128, init="he", d_norm=False)
    last = config.but(ladder="cspup_last", deconv_kernel=2, block_norm="both")
    expected = {
        "stem.left.0": 1 / 50, "stem.right.0": 2 / 50, "stem.right.3": 1 / 50,
        "stem.right.4": 2 / (9 * 128), "stem.right.7": 2 / (9 * 128),
        "blocks.0.left.0": 1 / (4 * 64), "blocks.0.right.0": 2 / 64,
        "blocks.0.right.3": 1 / (4 * 64), "blocks.0.right.4": 2 / (9 * 64), "to_rgb.0": 1 / (64 * 32),
        "features.0": 2 / (16 * 3), "features.2": 2 / (16 * 32), "to_logit": 2 / (16 * 128)}
    expected_last = {"stem": 1 / 100, "blocks.0.left.0": 1 / 64, "to_rgb.0": 1 / (144 * 16)}
    for found, variances in ((layers_of(Generator(config), Discriminator(config)), expected),
                             (layers_of(Generator(last)), expected_last)):
        for name, variance in variances.items():
            weight = found[name].weight
            close = 4 / math.sqrt(2 * weight.numel())
            assert weight.std().item() == pytest.approx(math.sqrt(variance), rel=close), name
    norms = [m for m in Generator(last).modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms and all((m.weight == 1).all() for m in norms)

def test_weights_follow_the_seed_alone():
    config, made = BASELINE.but(image_size=16, width=16, block_norm="both"), []
    for seed, other in ((1, 0), (2, 0), (1, 1)):
        torch.manual_seed(seed)
        made.append(Generator(config.but(seed=other)))
    (first, d), state = (made[0], Discriminator(config)), torch.get_rng_state()
    cs.initialise(first, "dcgan", 0)
    assert torch.equal(state, torch.get_rng_state())  # no draw is taken from the caller's numbers
    for p, q, r in zip(*(network.parameters() for network in made)):
        assert torch.equal(p, q) and (not p.any() or not torch.equal(p, r))
    first, other = (next(network.parameters()).flatten()[:50] for network in (first, d))
    assert not torch.equal(first, other)  # G and D do not begin with the same draws
