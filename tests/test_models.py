"""Shapes, parameter counts by independent arithmetic, branches, gradients."""

import math

import pytest
import torch
from torch import nn

import cspgan as cs
from cspgan import BASELINE, CSPup, DCGANGenerator, Discriminator, Generator


def count(network):
    return sum(p.numel() for p in network.parameters())


def csp_up_parameters(c, out, k, norm_left=False, norm_right=False):
    """Weights and biases of the block, written out from the drawing."""
    left, right = c // 2, c - c // 2
    deconvs = left * out * k * k + out + right * out * k * k + out
    convs = right * right + right + 2 * (out * out * 9 + out)
    norms = 2 * out * norm_left + 2 * (right + 2 * out) * norm_right
    return deconvs + convs + norms


@pytest.mark.parametrize("c, out", [(8, 4), (100, 64), (7, 3), (2, 5)])
def test_block_doubles_the_resolution(c, out):
    assert CSPup(c, out)(torch.randn(2, c, 5, 3)).shape == (2, out, 10, 6)
    assert CSPup(c, out, deconv=(2, 2, 0))(torch.randn(2, c, 5, 3)).shape == (2, out, 10, 6)
    assert CSPup(c, out, deconv=(4, 1, 0))(torch.randn(2, c, 1, 1)).shape == (2, out, 4, 4)


@pytest.mark.parametrize("norms", [(False, False), (False, True), (True, True)])
def test_block_parameters(norms):
    assert count(CSPup(64, 32, nn.ReLU, *norms)) == csp_up_parameters(64, 32, 4, *norms)


def test_block_is_the_sum_of_two_branches_fed_with_one_half_each():
    torch.manual_seed(0)
    block, x = CSPup(8, 4, nn.Tanh), torch.randn(1, 8, 4, 4, requires_grad=True)
    assert torch.allclose(block(x), block.left(x[:, :4]) + block.right(x[:, 4:]))
    (gradient,) = torch.autograd.grad(block.left(x[:, :4]).square().sum(), x)
    assert gradient[:, :4].abs().min() > 0 and not gradient[:, 4:].any()
    for branch, half in ((block.left, slice(0, 4)), (block.right, slice(4, 8))):
        changed = x.detach().clone()
        changed[:, half] += 1
        moved = block(changed) - block(x)
        assert torch.allclose(moved, branch(changed[:, half]) - branch(x[:, half]), atol=1e-6)
        assert moved.abs().max() > 1e-3


def test_branches_share_no_weights():
    block = CSPup(8, 4)
    left, right = ({p.data_ptr() for p in branch.parameters()} for branch in (block.left, block.right))
    assert left and right and not left & right


def test_block_copied_elsewhere_needs_only_torch():
    import inspect

    scope = {}
    exec("import torch\nfrom torch import nn\n" + inspect.getsource(CSPup), scope)
    assert scope["CSPup"](8, 4)(torch.randn(1, 8, 2, 2)).shape == (1, 4, 4, 4)


@pytest.mark.parametrize("size", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("width", [16, 37])
def test_any_size_and_width(size, width):
    config = BASELINE.but(image_size=size, width=width)
    z = torch.randn(2, config.z_dim)
    for make in (Generator, DCGANGenerator):
        images = make(config)(z)
        assert images.shape == (2, 3, size, size)
        assert Discriminator(config)(images).shape == (2,)


def test_the_assignment_has_the_prescribed_ladder_and_size():
    config = BASELINE
    assert cs.channel_ladder(config) == [1024, 512, 256, 128, 64]
    generator, discriminator = Generator(config), Discriminator(config)
    x, sides = torch.randn(1, 100, 1, 1), []
    for layer in (generator.stem, *generator.blocks, generator.to_rgb):
        x = layer(x)
        sides.append(tuple(x.shape[1:]))
    assert sides == [(1024, 4, 4), (512, 8, 8), (256, 16, 16), (128, 32, 32), (64, 64, 64), (3, 128, 128)]
    ladder = [100, 1024, 512, 256, 128, 64]
    assert count(generator) == sum(csp_up_parameters(c, out, 4) for c, out in zip(ladder, ladder[1:])) + 64 * 3 * 16 + 3
    widths = [3, 64, 128, 256, 512, 1024]
    convs = sum(c * out * 16 + out for c, out in zip(widths, widths[1:]))
    assert count(discriminator) == convs + 2 * sum(widths[2:]) + 1024 * 16 + 1


def test_options_change_the_network():
    config = BASELINE.but(image_size=32, width=32)
    assert isinstance(Generator(config.but(stem="deconv")).stem, nn.ConvTranspose2d)
    assert count(Generator(config.but(deconv_kernel=2))) < count(Generator(config))
    assert not any(isinstance(m, nn.BatchNorm2d) for m in Discriminator(config.but(d_norm=False)).modules())
    wide = [m.out_channels for m in Discriminator(config.but(d_wider=3)).modules() if isinstance(m, nn.Conv2d)]
    assert wide == [24, 48, 96, 1] and count(Generator(config.but(d_wider=3))) == count(Generator(config))
    shallow = Discriminator(config.but(d_fewer=1))
    assert sum(isinstance(m, nn.Conv2d) for m in shallow.modules()) == 3
    assert shallow(torch.randn(2, 3, 32, 32)).shape == (2,)
    assert all(cs.Discriminator(cs.BASELINE.but(image_size=size, width=16, d_fewer=1))(torch.randn(2, 3, size, size)).shape == (2,)
               for size in (16, 64))
    norms = {norm: sum(isinstance(m, nn.BatchNorm2d) for m in Generator(config.but(block_norm=norm)).modules())
             for norm in ("none", "right", "both")}
    assert norms == {"none": 0, "right": 9, "both": 12}  # three blocks of three and of four
    for act, kind in (("relu", nn.ReLU), ("leaky_relu", nn.LeakyReLU), ("tanh", nn.Tanh)):
        assert isinstance(Generator(config.but(block_act=act)).stem.right[1], kind)


@pytest.mark.parametrize("head, low, high", [("tanh", -1, 1), ("sigmoid", 0, 1), ("relu", 0, math.inf)])
def test_head_sets_the_range(head, low, high):
    config = BASELINE.but(image_size=16, width=16, head=head)
    generator = Generator(config)
    for parameter in generator.parameters():
        parameter.data.mul_(30)
    images = generator(torch.randn(8, 100))
    assert images.min() >= low and images.max() <= high and images.std() > 0


def test_discriminator_returns_raw_logits():
    discriminator = Discriminator(BASELINE.but(image_size=16, width=16))
    for parameter in discriminator.parameters():
        parameter.data.mul_(10)
    logits = discriminator(torch.rand(32, 3, 16, 16))
    assert logits.min() < 0 or logits.max() > 1


@pytest.mark.parametrize("norm", ["none", "right", "both"])
@pytest.mark.parametrize("kind", ["cspup", "dcgan"])
def test_every_parameter_gets_a_gradient(kind, norm):
    config = BASELINE.but(image_size=32, width=32, generator=kind, block_norm=norm, block_act="leaky_relu")
    generator, discriminator = cs.GENERATORS[kind](config), Discriminator(config)
    # He-like scale: DCGAN's 0.02 shrinks the signal of so thin a network below what float32 adds up
    for parameter in (*generator.parameters(), *discriminator.parameters()):
        if parameter.dim() > 1:
            nn.init.kaiming_normal_(parameter)
    discriminator(generator(torch.randn(8, config.z_dim))).sum().backward()
    missing = [name for network in (generator, discriminator) for name, p in network.named_parameters()
               if p.grad is None or not p.grad.any()]
    assert not missing


def test_weights_are_initialised_as_dcgan_does():
    generator = Generator(BASELINE.but(image_size=32, width=256, block_norm="both"))
    weights = torch.cat([m.weight.flatten() for m in generator.modules() if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d))])
    scales = torch.cat([m.weight for m in generator.modules() if isinstance(m, nn.BatchNorm2d)])
    biases = torch.cat([m.bias for m in generator.modules() if getattr(m, "bias", None) is not None])
    assert abs(weights.mean()) < 1e-3 and abs(weights.std() - 0.02) < 1e-3
    assert abs(scales.mean() - 1) < 5e-3 and abs(scales.std() - 0.02) < 5e-3
    assert not biases.any()


@pytest.mark.parametrize("size", [16, 64])
def test_he_keeps_the_scale_of_activations_and_dcgan_does_not(size):
    """From noise of size 1, G's images grow by at most 1.8 a block and D's logits stay of size 1; DCGAN's 0.02 shrinks both."""
    sizes = {}
    for init in ("he", "dcgan"):
        config = BASELINE.but(image_size=size, width=128, block_act="leaky_relu", d_norm=False, init=init)
        generator, discriminator = Generator(config), Discriminator(config)
        generator.to_rgb[1] = nn.Identity()
        images = generator(torch.randn(64, 100))
        sizes[init] = images.std().item(), discriminator(torch.randn(64, 3, size, size)).square().mean().sqrt().item()
    assert 0.5 < sizes["he"][0] < 1.8 ** (len(cs.channel_ladder(config)) + 1) and 0.4 < sizes["he"][1] < 3
    assert sizes["dcgan"][0] < 0.05 and sizes["dcgan"][1] < 0.2


def test_weights_follow_the_seed_alone():
    config = BASELINE.but(image_size=16, width=16)
    torch.manual_seed(1)
    first = Generator(config).state_dict()
    torch.manual_seed(2)
    second, other = Generator(config).state_dict(), Generator(config.but(seed=1)).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not torch.equal(first["to_rgb.0.weight"], other["to_rgb.0.weight"])
