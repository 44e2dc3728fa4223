"""Shapes, parameter counts by independent arithmetic, branches, gradients, initial weights."""

import copy
import inspect
import math

import pytest
import torch
from torch import nn

import cspgan as cs
from cspgan import BASELINE, CSPup, DCGANGenerator, Discriminator, Generator


def count(network):
    return sum(p.numel() for p in network.parameters())


def conv(c, out, kernel):
    return c * out * kernel**2 + out


def csp_up(c, out):
    """Weights and biases of a block without norms, written out from the drawing."""
    half = c // 2
    left = conv(half, out, 4)
    right = conv(half, half, 1) + conv(half, out, 4) + 2 * conv(out, out, 3)
    return left + right


def shapes(generator):
    """The shape that every part gives, from z on. By parts: autocast does not know `meta`."""
    x = torch.randn(2, 100, 1, 1)
    found = []
    for part in (generator.stem, *generator.blocks, generator.to_rgb):
        x = part(x)
        found.append(tuple(x.shape[1:]))
    return found


BOXES = [(1024, 4, 4), (512, 8, 8), (256, 16, 16), (128, 32, 32), (64, 64, 64)]
PAIRS = [(1024, 512), (512, 256), (256, 128), (128, 64)]
FOUR = sum(csp_up(*pair) for pair in PAIRS)
LAST = conv(64, 3, 4)
RGB = (3, 128, 128)


def test_the_generator_is_the_assignments_unless_told_otherwise():
    with torch.device("meta"):  # allocates nothing
        generator = Generator()
        assert shapes(generator) == [*BOXES, RGB]
    assert count(generator) == csp_up(100, 1024) + FOUR + LAST
    kinds = [type(part) for part in (generator.stem, *generator.blocks)]
    assert kinds == [CSPup] * 5


def test_the_other_readings_of_the_drawing_at_full_size():
    with torch.device("meta"):
        deconv_first = Generator(ladder="deconv_first")
        cspup_last = Generator(ladder="cspup_last")
        assert shapes(deconv_first) == [*BOXES, RGB]
        assert shapes(cspup_last) == [*BOXES, (32, 128, 128), RGB]
    stem = conv(100, 1024, 4)
    assert count(deconv_first) == stem + FOUR + LAST
    assert count(cspup_last) == stem + FOUR + csp_up(64, 32) + conv(32, 3, 3)


def test_the_control_at_full_size():
    with torch.device("meta"):
        dcgan = DCGANGenerator()
        assert shapes(dcgan) == [*BOXES, RGB]
    deconvs = sum(c * out * 16 for c, out in [(100, 1024), *PAIRS])
    norms = sum(2 * channels for channels, _, _ in BOXES)
    assert count(dcgan) == deconvs + norms + LAST


@pytest.mark.parametrize("wider, fewer, kernel", [(1, 0, 4), (2, 0, 4), (1, 1, 8), (1, 4, 64)])
def test_d_at_full_size(wider, fewer, kernel):
    width = 1024 * wider
    with torch.device("meta"):
        d = Discriminator(width=width, fewer=fewer)
        bare = Discriminator(width=width, fewer=fewer, norm=False)
        assert d(torch.randn(2, *RGB)).shape == (2,)
    channels = [wider * c for c in (64, 128, 256, 512, 1024)][: 5 - fewer]
    convs = sum(conv(c, out, 4) for c, out in zip([3, *channels], channels))
    assert count(bare) == convs + conv(channels[-1], 1, kernel)
    assert count(d) == count(bare) + 2 * sum(channels[1:])  # no norm after the first


@pytest.mark.parametrize("size, width", [(16, 2), (32, 37), (64, 8), (128, 5), (256, 2)])
def test_any_size_and_width(size, width):
    z = torch.randn(2, 7)
    for ladder in cs.CHOICES["ladder"]:
        for kernel in (2, 4):
            images = Generator(size, width, 7, ladder, kernel=kernel)(z)
            assert images.shape == (2, 3, size, size)
    assert DCGANGenerator(size, width, 7)(z).shape == images.shape
    assert Discriminator(size, width)(images).shape == (2,)


def test_block_is_the_sum_of_two_branches_fed_with_one_half_each():
    torch.manual_seed(0)
    block = CSPup(9, 4, nn.Tanh)
    x = torch.randn(1, 9, 4, 4)
    for branch, half in ((block.left, slice(0, 4)), (block.right, slice(4, 9))):
        changed = x.clone()
        changed[:, half] += 1
        moved = block(changed) - block(x)
        torch.testing.assert_close(moved, branch(changed[:, half]) - branch(x[:, half]))
        assert moved.abs().max() > 1e-3
    assert count(block) == count(block.left) + count(block.right)  # a deconvolution each
    with pytest.raises(ValueError, match="in_channels=1, norm='left': expected"):
        CSPup(1, 4, norm="left")


# Of the left branch, then of the right: deconvolution, BatchNorm, convolution, activation.
ORDER = {
    "none": "T C A T C A C",
    "right": "T C B A T C B A C",
    "both": "T B C B A T C B A C B",
}
LETTERS = {nn.ConvTranspose2d: "T", nn.BatchNorm2d: "B", nn.Conv2d: "C", nn.Identity: ""}


@pytest.mark.parametrize(
    "act, kind", [("relu", nn.ReLU), ("leaky_relu", nn.LeakyReLU), ("tanh", nn.Tanh)]
)
def test_block_has_its_layers_in_the_order_of_the_drawing(act, kind):
    letters = {**LETTERS, kind: "A"}
    for norm, order in ORDER.items():
        config = BASELINE.but(image_size=16, width=4, block_norm=norm, block_act=act)
        generator = cs.make_generator(config)
        for block in (generator.stem, *generator.blocks):
            found = [letters[type(layer)] for layer in (*block.left, *block.right)]
            assert " ".join(found).split() == order.split()


@pytest.mark.parametrize("head, low, high", [("tanh", -1, 1), ("sigmoid", 0, 1), ("relu", 0, 1e9)])
@pytest.mark.parametrize("kind", cs.GENERATORS)
def test_head_sets_the_range_and_d_returns_raw_logits(head, low, high, kind):
    torch.manual_seed(0)
    config = BASELINE.but(image_size=16, width=16, head=head, generator=kind, init="he")
    generator = cs.make_generator(config)
    generator.to_rgb[0].weight.data.mul_(30)
    images = generator(torch.randn(8, 100))
    assert low <= images.min() <= low + 0.1
    assert 0.9 < images.max() <= high
    logits = cs.make_discriminator(config)(100 * torch.randn(64, 3, 16, 16))
    assert logits.min() < 0
    assert logits.max() > 1


def test_pixels_and_logits_are_float32_in_half_precision_too():
    with torch.autocast("cpu", torch.bfloat16):
        block = CSPup(2, 2)(torch.randn(1, 2, 4, 4))
        images = Generator(16, 8)(torch.randn(2, 100))
        control = DCGANGenerator(16, 8)(torch.randn(2, 100))
        logits = Discriminator(16, 8)(images)
    assert block.dtype == torch.bfloat16
    assert images.dtype == control.dtype == logits.dtype == torch.float32
    assert images.mul(2**12).frac().any()  # and were computed in it


# ------------------------------------------------------------- pasted into an empty file
NETWORKS = "import torch\nfrom torch import nn\n"
LOSSES = "import torch\nimport torch.nn.functional as F\n"
STEPS = "import torch\nfrom cspgan import FLOAT32, LOSSES, gradient_penalty\n"


def pasted(imports, *things):
    """The last of some functions or classes, of a file that holds their text and these imports."""
    scope = {"__name__": "pasted"}
    exec(imports + "\n".join(map(inspect.getsource, things)), scope)
    return scope[things[-1].__name__]


def test_networks_run_where_they_are_pasted():
    z = torch.randn(2, 100)
    block = pasted(NETWORKS, CSPup)(8, 4, norm="both")
    assert block(torch.randn(2, 8, 4, 4)).shape == (2, 4, 8, 8)
    for kind in (Generator, DCGANGenerator):
        images = pasted(NETWORKS, CSPup, kind)(16, 8)(z)
        assert images.shape == (2, 3, 16, 16)
    d = pasted(NETWORKS, Discriminator)(16, 8)
    assert d(images).shape == (2,)


def test_losses_and_penalty_run_where_they_are_pasted():
    logits = torch.tensor([-1.0, 0.5])
    for loss in (cs.bce, cs.bce_logits):
        assert pasted(LOSSES, loss)(logits, 0.9) == loss(logits, 0.9)
    found = pasted(LOSSES, cs.relativistic)(logits, logits.flip(0))
    assert found == cs.relativistic(logits, logits.flip(0))
    x = torch.tensor([1.0, 3.0]).view(2, 1, 1, 1).requires_grad_()
    penalty = pasted("import torch\n", cs.gradient_penalty)
    assert penalty(x.square().flatten(), x).tolist() == [4, 36]


@pytest.mark.parametrize("step", [cs.d_step, cs.g_step])
def test_steps_run_where_they_are_pasted(step, tiny):
    config = tiny.but(loss="relativistic", r1=1.0, r2=1.0, d_norm=False)
    real = torch.rand(4, 3, 16, 16)
    results = []
    for take in (step, pasted(STEPS, step)):
        g = cs.make_generator(config)
        d = cs.make_discriminator(config)
        learner = g if step is cs.g_step else d
        optimizer = torch.optim.SGD(learner.parameters(), 0.1)
        fake = g(torch.ones(4, 8))
        take(d, optimizer, real, fake, config)
        results.append(next(learner.parameters()))
    assert torch.equal(*results)


# ------------------------------------------------------------- weights
@pytest.mark.parametrize("name", cs.PRESETS)
def test_a_step_of_every_preset_reaches_every_weight(name, toys):
    """At He's scale: 0.02 shrinks the signal of so thin a network below what float32 adds up."""
    small = {"image_size": 16, "width": 16, "z_dim": 8, "batch_size": 16, "init": "he"}
    config = cs.PRESETS[name].but(**small)
    training = cs.Training(config, toys, torch.device("cpu"))
    networks = nn.ModuleList([training.generator, training.discriminator])
    before = copy.deepcopy(networks)
    training.advance()
    d_loss, *_, g_loss = training.recent[0].tolist()
    assert 0 < d_loss < math.inf
    assert 0 < g_loss < math.inf
    for (weight, p), old in zip(networks.named_parameters(), before.parameters()):
        assert p.grad.isfinite().all(), weight
        if weight.endswith("weight"):  # biases that a BatchNorm follows are cancelled by it
            assert (p.grad != 0).float().mean() > 0.2, weight
            assert not torch.equal(p, old), weight


def layers_of(config):
    """The layers of both networks that have weights, by name."""
    networks = (cs.make_generator(config), cs.make_discriminator(config))
    layers = [layer for network in networks for layer in network.named_modules()]
    return {name: layer for name, layer in layers if hasattr(layer, "weight")}


def test_initial_weights_of_dcgan():
    layers = layers_of(BASELINE.but(image_size=32, width=128, block_norm="both"))
    for name, layer in layers.items():
        weight = layer.weight
        mean = float(isinstance(layer, nn.BatchNorm2d))
        error = 0.02 / math.sqrt(weight.numel())
        assert weight.mean().item() == pytest.approx(mean, abs=5 * error), name
        assert weight.std().item() == pytest.approx(0.02, abs=3 * error), name
        assert layer.bias.eq(0).all()


def check_variances(layers, expected):
    for name, variance in expected.items():
        weight = layers[name].weight
        close = 4 / math.sqrt(2 * weight.numel())
        std = weight.std().item()
        assert std == pytest.approx(math.sqrt(variance), rel=close), name
        assert layers[name].bias.eq(0).all()


def test_initial_weights_of_he():
    """Gain over inputs that one output sees, written out for every kind of layer."""
    expected = {
        "stem.left.0": 1 / 50,
        "stem.right.0": 2 / 50,
        "stem.right.3": 1 / 50,
        "stem.right.4": 2 / (9 * 128),
        "blocks.0.left.0": 1 / (4 * 64),
        "blocks.0.right.0": 2 / 64,
        "blocks.0.right.3": 1 / (4 * 64),
        "to_rgb.0": 1 / (4 * 32) / 16,
        "features.0": 2 / (16 * 3),
        "features.2": 2 / (16 * 32),
        "to_logit": 2 / (16 * 128),
    }
    config = BASELINE.but(image_size=32, width=128, init="he", d_norm=False)
    check_variances(layers_of(config), expected)
    layers = layers_of(config.but(ladder="cspup_last", deconv_kernel=2, block_norm="both"))
    expected = {"stem": 1 / 100, "blocks.0.left.0": 1 / 64, "to_rgb.0": 1 / (9 * 16) / 16}
    check_variances(layers, expected)
    for layer in layers.values():
        if isinstance(layer, nn.BatchNorm2d):
            assert layer.weight.eq(1).all()


@pytest.mark.parametrize("init", cs.INITS)
def test_weights_follow_the_seed_alone(init):
    config = BASELINE.but(image_size=16, width=16, block_norm="both", init=init)
    first = layers_of(config)
    torch.manual_seed(1)
    again = layers_of(config)
    other = layers_of(config.but(seed=1))
    for name, layer in first.items():
        assert torch.equal(layer.weight, again[name].weight), name
        if not isinstance(layer, nn.BatchNorm2d):
            assert not torch.equal(layer.weight, other[name].weight), name
    g, d = (first[name].weight.flatten()[:50] for name in ("stem.left.0", "features.0"))
    assert not torch.equal(g, d)  # they do not begin with the same draws
