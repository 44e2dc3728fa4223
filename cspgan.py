"""CSPup GAN: a generator of cross-stage-partial upsampling blocks, from noise to faces.

At 128 px and width 1024, after 20 epochs of 25,600 images (4.3 minutes on one H100), the recipe
`converged` has a sliced Wasserstein distance of 11.6; the last of the course's five recipes,
`h3_smooth_tanh`, has 45.1, real faces have 8.8 (lower is better; one seed; results/full_size.json).
At 64 px and width 128 `converged` has 17.3 +- 1.1 over three seeds, real faces 9.9
(results/table.json).

    faces, held_out = load_faces("photos.zip", size=64)
    config = PRESETS["converged"].but(image_size=64, width=128)
    run = train(config, faces, "results/my_idea")
    show_images(sample(run, 36)).savefig("samples.png")
    evaluate(run, held_out, faces)

Contents: networks, losses, the two steps, config, training, runs, data, metrics, plots, faster
penalties. Images are uint8 (N, 3, S, S) everywhere but inside the networks, which see floats in
[-1, 1] where G ends in tanh, else in [0, 1].
"""

import contextlib
import copy
import dataclasses
import functools
import gzip
import hashlib
import io
import math
import multiprocessing
import numbers
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from concurrent import futures
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator
from PIL import Image, ImageDraw, ImageOps
from torch import nn
from torchvision.utils import make_grid
from tqdm.auto import tqdm

VERSION = "3.0"  # stored with every run
# Once D has won, denormal numbers make a CPU 100 times as slow: they become 0. Only threads that
# start after this call do it, so import this module before torch computes.
torch.set_flush_denormal(True)
torch.backends.cudnn.benchmark = True  # shapes stay the same: cuDNN tries its algorithms once


def check(condition, message):
    if not condition:
        raise ValueError(message)


def check_images(images, size=None, n=1, expected="torch.uint8 (N, 3, S, S)"):
    """Raise unless they are n or more, uint8 (N, 3, size, size); size None: any."""
    expected = f"expected {expected}, see load_faces"
    check(isinstance(images, torch.Tensor), f"images are a {type(images)}: {expected}")
    shape = tuple(images.shape)
    is_legal = (
        images.dtype == torch.uint8
        and len(shape) == 4
        and shape[1:] == (3, size or shape[3], size or shape[3])
        and len(images) >= n
    )
    check(is_legal, f"images are {images.dtype} {shape}: {expected}")


def say(text):
    """Print text; what the console cannot show, as in some files' names, is escaped."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)


# ---------------------------------------------------------------------------------------- networks


class CSPup(nn.Module):
    """Cross-stage-partial block that doubles the resolution: (N, in, H, W) -> (N, out, 2H, 2W).

    One half of the channels is only upsampled. The other half is transformed as well. Their sum is
    the output (after arXiv 1911.11929). The two deconvolutions have weights of their own.

    act: makes an activation, like nn.ReLU.
    norm: "none", "right" (BatchNorm after the 1x1 and after the first 3x3) or "both" (after the
        last 3x3 and after the left deconvolution as well).
    kernel, stride, padding: of both deconvolutions. 4, 2, 1 doubles; 4, 1, 0 opens 1x1 to 4x4.
    """

    def __init__(
        self, in_channels, out_channels, act=nn.ReLU, norm="none", kernel=4, stride=2, padding=1
    ):
        super().__init__()
        norms = ("none", "right", "both")
        if in_channels < 2 or norm not in norms:  # no `check`, so that the class can be pasted
            expected = "expected at least 2 channels, and norm none, right or both"
            raise ValueError(f"{in_channels=}, {norm=}: {expected}")
        left = in_channels // 2
        right = in_channels - left
        inner_norm = nn.Identity if norm == "none" else nn.BatchNorm2d
        outer_norm = nn.BatchNorm2d if norm == "both" else nn.Identity
        self.left = nn.Sequential(
            nn.ConvTranspose2d(left, out_channels, kernel, stride, padding),
            outer_norm(out_channels),
        )
        self.right = nn.Sequential(
            nn.Conv2d(right, right, 1),
            inner_norm(right),
            act(),
            nn.ConvTranspose2d(right, out_channels, kernel, stride, padding),  # as drawn: no act
            nn.Conv2d(out_channels, out_channels, 3, padding=1),
            inner_norm(out_channels),
            act(),
            nn.Conv2d(out_channels, out_channels, 3, padding=1),
            outer_norm(out_channels),
        )

    def forward(self, x):
        half = x.shape[1] // 2
        left = self.left(x[:, :half])  #                                            (N, out, 2H, 2W)
        right = self.right(x[:, half:])  #                                          (N, out, 2H, 2W)
        return left + right


class Generator(nn.Module):
    """The assignment's generator: z (N, z_dim) -> images (N, 3, S, S), in the range of the head.

    The assignment draws five boxes, 4x4x1024 to 64x64x64, and a last deconvolution. `ladder` says
    how the drawing is read:

    "cspup_first":  z as 1x1 -> CSPup -> 4x4 ... CSPup -> 64x64 -> deconvolution -> 128x128
    "deconv_first": z as 1x1 -> deconvolution -> 4x4 ... CSPup -> 64x64 -> deconvolution -> 128x128
    "cspup_last":   z as 1x1 -> deconvolution -> 4x4 ... CSPup -> 128x128 -> 3x3 deconvolution

    image_size: a power of two from 16 up; `Config` checks it. width: channels at 4x4, halved with
    every doubling.
    act, norm: of the blocks, see `CSPup`. kernel: of the deconvolutions that double, 4 or 2.
    head: makes the last activation: nn.Tanh for [-1, 1], nn.Sigmoid or nn.ReLU for [0, 1].
    """

    def __init__(
        self,
        image_size=128,
        width=1024,
        z_dim=100,
        ladder="cspup_first",
        act=nn.ReLU,
        norm="none",
        kernel=4,
        head=nn.Sigmoid,
    ):
        super().__init__()
        double = (kernel, 2, kernel // 2 - 1)  # 4, 2, 1 or 2, 2, 0
        last = {"cspup_first": double, "deconv_first": double, "cspup_last": (3, 1, 1)}[ladder]
        rungs = image_size.bit_length() - 3  # 4x4, 8x8, ... half of the image
        if ladder == "cspup_last":
            rungs += 1
        channels = [max(2, width >> k) for k in range(rungs)]
        if ladder == "cspup_first":
            self.stem = CSPup(z_dim, channels[0], act, norm, 4, 1, 0)
        else:
            self.stem = nn.ConvTranspose2d(z_dim, channels[0], 4, 1, 0)
        blocks = [CSPup(c, out, act, norm, *double) for c, out in zip(channels, channels[1:])]
        self.blocks = nn.Sequential(*blocks)
        self.to_rgb = nn.Sequential(nn.ConvTranspose2d(channels[-1], 3, *last), head())

    def forward(self, z):
        x = self.stem(z[:, :, None, None])  #                                       (N, width, 4, 4)
        x = self.blocks(x)  #                                              (N, C, S/2, S/2), or S, S
        with torch.autocast(x.device.type, enabled=False):  # bfloat16 is coarser than a pixel
            return self.to_rgb(x.float())  #                                            (N, 3, S, S)


class DCGANGenerator(nn.Module):
    """The control: DCGAN's generator (arXiv 1511.06434), z and images as those of `Generator`."""

    def __init__(self, image_size=128, width=1024, z_dim=100, head=nn.Tanh):
        super().__init__()
        channels = [max(2, width >> k) for k in range(image_size.bit_length() - 3)]
        self.stem = self.up(z_dim, channels[0], 1, 0)
        blocks = [self.up(c, out, 2, 1) for c, out in zip(channels, channels[1:])]
        self.blocks = nn.Sequential(*blocks)
        self.to_rgb = nn.Sequential(nn.ConvTranspose2d(channels[-1], 3, 4, 2, 1), head())

    def up(self, c, out, stride, padding):
        deconv = nn.ConvTranspose2d(c, out, 4, stride, padding, bias=False)
        return nn.Sequential(deconv, nn.BatchNorm2d(out), nn.ReLU(inplace=True))

    def forward(self, z):
        x = self.stem(z[:, :, None, None])  #                                       (N, width, 4, 4)
        x = self.blocks(x)  #                                                       (N, C, S/2, S/2)
        with torch.autocast(x.device.type, enabled=False):  # as in `Generator`
            return self.to_rgb(x.float())  #                                            (N, 3, S, S)


class Discriminator(nn.Module):
    """DCGAN's discriminator: images (N, 3, S, S) -> raw logits (N,). A sigmoid belongs to the loss.

    Convolutions of kernel 4 and stride 2 down to a map of 4x4, with the generator's channels in
    reverse, each followed by BatchNorm (`norm`; not the first) and LeakyReLU(0.2). A last
    convolution covers the map. fewer: convolutions left out, the deepest first, so that the map is
    larger.
    """

    def __init__(self, image_size=128, width=1024, norm=True, fewer=0):
        super().__init__()
        rungs = image_size.bit_length() - 3
        channels = [max(2, width >> k) for k in range(rungs)][fewer:][::-1]
        layers = []
        for c, out in zip([3, *channels], channels):
            layers.append(nn.Conv2d(c, out, 4, 2, 1))
            if norm and len(layers) > 1:  # no running statistics: D is never in evaluation mode
                layers.append(nn.BatchNorm2d(out, track_running_stats=False))
            layers.append(nn.LeakyReLU(0.2))
        self.features = nn.Sequential(*layers)
        self.to_logit = nn.Conv2d(channels[-1], 1, image_size >> len(channels))

    def forward(self, x):
        x = self.features(x)  #                                                         (N, C, s, s)
        return self.to_logit(x).flatten().float()  #                                            (N,)


def init_dcgan(network, seed):
    """DCGAN's: weights N(0, 0.02^2), BatchNorm's scales N(1, 0.02^2), biases 0."""
    random = torch.Generator().manual_seed(int(seed))
    for layer in network.modules():
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.normal_(layer.weight, 0, 0.02, generator=random)
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.weight, 1, 0.02, generator=random)
        if getattr(layer, "bias", None) is not None:
            nn.init.zeros_(layer.bias)


def init_he(network, seed):
    """He's (arXiv 1502.01852): a layer and its activation keep the variance; biases 0.

    A weight's variance is gain / fan-in, the number of products summed in one output. The gain is
    2, because an activation loses half of what it is given; of a deconvolution it is 1, because in
    CSPup none follows it. The last 3x3 of a block keeps 2 although none follows it either: with
    the left branch, and without BatchNorm, a block's output has three times its input's variance.
    The weights of `to_rgb` are a quarter as large, or pixels would saturate.
    """
    random = torch.Generator().manual_seed(int(seed))
    for layer in network.modules():
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
            variance = 2 / (layer.in_channels * layer.kernel_size[0] ** 2)
            if isinstance(layer, nn.ConvTranspose2d):
                # Inputs that reach one pixel of the output, along a side. Without padding it is
                # one: where 1x1 opens to 4x4, and with kernel 2.
                overlap = layer.kernel_size[0] // layer.stride[0]
                if layer.padding[0] == 0:
                    overlap = 1
                variance = 1 / (layer.in_channels * overlap**2)
            nn.init.normal_(layer.weight, 0, math.sqrt(variance), generator=random)
        if getattr(layer, "bias", None) is not None:
            nn.init.zeros_(layer.bias)
    if hasattr(network, "to_rgb"):
        network.to_rgb[0].weight.data.mul_(0.25)


# ------------------------------------------------------------------------------------------ losses


@dataclasses.dataclass(frozen=True)
class Loss:
    """What D and G minimise, by D's logits (N,) on real and on generated images."""

    d: Callable  # (d_real, d_fake, smoothing) -> (); smoothing: real images' target is 1 minus this
    g: Callable  # (d_real, d_fake) -> ()
    g_needs_real: bool = True  # False: d_real is None in G's step, which saves a pass through D
    # smoothing -> the best D's logit for every image, if it cannot tell them apart. None: unknown.
    fair_logit: Callable | None = None

    def equilibrium(self, smoothing=0.0):
        """(D's loss, G's loss) where generated images are as real ones, or None."""
        if self.fair_logit is None:
            return None
        logit = torch.tensor([self.fair_logit(smoothing)], dtype=torch.float64)  #              (1,)
        return self.d(logit, logit, smoothing).item(), self.g(logit, logit).item()


def bce(logits, target):
    """Mean binary cross-entropy of sigmoid(logits), (N,), and one target; ln 2 if D cannot tell.

    This is the course's form. In float32 its gradient fades: for target 1 below logit -28 (to a
    millionth at -41); for target 0 it is 0 above logit 17.
    """
    p = torch.sigmoid(logits)  #                                                                (N,)
    # CUDA's function ends the process where it is given NaN, so NaN is hidden here ...
    loss = F.binary_cross_entropy(p.nan_to_num(), torch.full_like(p, target))
    return loss + 0 * logits.sum()  # ... and put back


def bce_logits(logits, target):
    """The same function, from the logits themselves: its gradient never dies.

    Where the sigmoid rounds to 1 (target 0, logits above 17), `bce` is 100, and this the logit.
    """
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, target))


def relativistic(higher, lower):
    """Mean softplus(lower - higher) over pairs of logits, (N,) each; ln 2 where they are equal.

    It does not change when all logits shift: D learns an order (arXiv 1807.00734, 2501.05441).
    """
    return F.softplus(lower - higher).mean()


def bce_losses(cross_entropy):
    """The first GAN's; G's is the non-saturating one (Goodfellow 2014, section 3)."""
    return Loss(
        d=lambda d_real, d_fake, smoothing: (
            cross_entropy(d_real, 1 - smoothing) + cross_entropy(d_fake, 0)
        ),
        g=lambda d_real, d_fake: cross_entropy(d_fake, 1),
        g_needs_real=False,
        # The best D says p = (1 - smoothing) / 2 everywhere (Goodfellow 2014, proposition 1).
        fair_logit=lambda smoothing: math.log((1 - smoothing) / (1 + smoothing)),
    )


LOSSES = {
    "bce": bce_losses(bce),
    "bce_logits": bce_losses(bce_logits),
    "relativistic": Loss(
        d=lambda d_real, d_fake, smoothing: relativistic(d_real, d_fake),
        g=lambda d_real, d_fake: relativistic(d_fake, d_real),
        fair_logit=lambda smoothing: 0.0,
    ),
}


def gradient_penalty(logits, images):
    """|grad_x D(x)|^2 of each image, (N,): R1 at real, R2 at generated ones (arXiv 1801.04406).

    logits: (N,), of D on images (N, 3, S, S). A D with BatchNorm mixes the images of a batch, and
    with them these gradients. The graph is kept, so that the penalty can be minimised.
    """
    (gradient,) = torch.autograd.grad(logits.sum(), images, create_graph=True)  #       (N, 3, S, S)
    return gradient.square().sum(dim=(1, 2, 3))  #                                              (N,)


# ----------------------------------------------------------------------------------- the two steps


class Precision:
    """What a network's passes are computed in: "float32", or "float16" or "bfloat16" by autocast.

    Weights' gradients in float16 are scaled up, or the small ones would be 0. The scale is halved
    where they overflow, and that step is left out; after 2,000 good steps it doubles. One object
    for each optimizer. In float32 it does nothing, and its device does not matter.
    """

    def __init__(self, name="float32", device="cpu"):
        self.name = name
        self.device = device
        # Not the usual 65,536, at which the penalties' gradients overflow (`d_step_linear`).
        self.scaler = torch.amp.GradScaler(device, init_scale=256, enabled=name == "float16")

    def autocast(self):
        enabled = self.name != "float32"
        return torch.autocast(self.device, getattr(torch, self.name), enabled)

    def step(self, optimizer):
        self.scaler.step(optimizer)
        self.scaler.update()


FLOAT32 = Precision()


# `converged` takes this step by other arithmetic: `d_step_linear`, at the end of this file.
def d_step(discriminator, optimizer, real, fake, config, precision=FLOAT32):
    """D: minimise  L_D(D(real), D(fake)) + r1/2 |grad D(real)|^2 + r2/2 |grad D(fake)|^2.

    real, fake: (N, 3, S, S). G is left alone. config: its loss, label_smoothing, r1 and r2. For
    "bce" this is Goodfellow's step (2014, algorithm 1).
    Returns (4,), detached: L_D, the mean logits on real and on fake, the sum of the penalties.
    """
    loss = LOSSES[config.loss]
    discriminator.requires_grad_(True)
    optimizer.zero_grad()
    real = real.detach().requires_grad_(config.r1 > 0)  #                               (N, 3, S, S)
    fake = fake.detach().requires_grad_(config.r2 > 0)  #                               (N, 3, S, S)
    with precision.autocast():
        d_real = discriminator(real)  #                                                         (N,)
        d_fake = discriminator(fake)  #                                                         (N,)
    d_loss = loss.d(d_real, d_fake, config.label_smoothing)  #                                    ()
    penalty = torch.zeros_like(d_loss)  #                                                         ()
    if config.r1:
        penalty = penalty + config.r1 / 2 * gradient_penalty(d_real, real).mean()
    if config.r2:
        penalty = penalty + config.r2 / 2 * gradient_penalty(d_fake, fake).mean()
    precision.scaler.scale(d_loss + penalty).backward()
    precision.step(optimizer)
    return torch.stack([d_loss, d_real.mean(), d_fake.mean(), penalty]).detach()  #             (4,)


def g_step(discriminator, optimizer, real, fake, config, precision=FLOAT32):
    """G: minimise  L_G(D(real), D(fake)).

    real, fake: (N, 3, S, S), fake with its graph. D is left alone. config: its loss.
    Returns L_G, detached.
    """
    loss = LOSSES[config.loss]
    discriminator.requires_grad_(False)
    optimizer.zero_grad()
    with precision.autocast():
        d_real = discriminator(real) if loss.g_needs_real else None  #                          (N,)
        d_fake = discriminator(fake)  #                                                         (N,)
    g_loss = loss.g(d_real, d_fake)  #                                                            ()
    precision.scaler.scale(g_loss).backward()
    precision.step(optimizer)
    return g_loss.detach()


# ------------------------------------------------------------------------------------------ config

GENERATORS = {"cspup": Generator, "dcgan": DCGANGenerator}
ACTIVATIONS = {"relu": nn.ReLU, "leaky_relu": functools.partial(nn.LeakyReLU, 0.2), "tanh": nn.Tanh}
HEADS = {"sigmoid": nn.Sigmoid, "tanh": nn.Tanh, "relu": nn.ReLU}
INITS = {"dcgan": init_dcgan, "he": init_he}
SIZES = (16, 32, 64, 128, 256)
CHOICES = {  # fields with a list of legal values; a new entry in a table is legal too
    "image_size": SIZES,
    "head": HEADS,
    "flip": (False, True),
    "generator": GENERATORS,
    "ladder": ("cspup_first", "deconv_first", "cspup_last"),
    "deconv_kernel": (2, 4),
    "block_act": ACTIVATIONS,
    "block_norm": ("none", "right", "both"),
    "d_norm": (False, True),
    "init": INITS,
    "loss": LOSSES,
}
# Bounds of the other fields; where there is none, 0 and 10**12.
LEAST = {"z_dim": 2, "width": 2, "d_wider": 1, "batch_size": 2, "epochs": 1, "d_every": 1}
MOST = {"lr_end": 1, "label_smoothing": 0.99, "beta1": 0.9999, "beta2": 0.999999, "seed": 2**14 - 1}


@dataclasses.dataclass(frozen=True)
class Config:
    """What makes one run differ from another. Frozen: derive new ones with `.but(...)`."""

    image_size: int = 128  # pixels a side: 16, 32, 64, 128 or 256
    head: str = "sigmoid"  # G's last activation: "tanh" ([-1, 1]), "sigmoid" or "relu" ([0, 1])
    flip: bool = False  # each real image is mirrored with probability 1/2
    generator: str = "cspup"  # "cspup", or "dcgan" as the control
    z_dim: int = 100  # numbers in one noise vector, each drawn from N(0, 1)
    width: int = 1024  # channels of G at 4x4; halved with every doubling of the resolution
    ladder: str = "cspup_first"  # or "deconv_first", "cspup_last": see `Generator`
    deconv_kernel: int = 4  # of what doubles: 4 (4x4, stride 2, padding 1) or 2 (2x2, stride 2)
    block_act: str = "relu"  # inside CSPup: "relu", "leaky_relu" (slope 0.2) or "tanh"
    block_norm: str = "none"  # BatchNorm inside CSPup: "none", "right" or "both", see there
    d_norm: bool = True  # BatchNorm on all of D's convolutions but the first and the last
    d_wider: int = 1  # D has this many times G's channels
    d_fewer: int = 0  # stride-2 convolutions left out of D, the deepest first
    init: str = "dcgan"  # weights N(0, 0.02^2), or "he": activations keep their size
    loss: str = "bce"  # "bce" (after a sigmoid, as the course has it), "bce_logits", "relativistic"
    label_smoothing: float = 0.0  # D's target for real images is 1 minus this; only of the two bce
    r1: float = 0.0  # weight gamma of the penalty gamma/2 |grad D|^2 at real images
    r2: float = 0.0  # the same at generated images
    batch_size: int = 128  # images in one step
    epochs: int = 5
    epoch_images: int = 0  # images that count as one epoch; 0: as many as there are
    lr_g: float = 2e-4  # Adam's step size for G
    lr_d: float = 2e-4  # Adam's step size for D
    lr_width: int = 0  # width at which the rates were found, see `adam`; 0: no width rule
    lr_end: float = 1.0  # the rates fall on a half cosine to this share of themselves; 1: they stay
    beta1: float = 0.5  # Adam; 0.5 as in DCGAN, 0.9 is PyTorch's default
    beta2: float = 0.999
    weight_decay: float = 0.0  # L2 on both networks, added to the gradient as Adam does
    ema_images: int = 0  # half-life of a running mean of G, which makes the samples; 0: G itself
    d_every: int = 1  # D learns in every d_every-th step, G in every one
    seed: int = 0  # 4 seed + 0 and 1 are the seeds of weights, + 2 of noise, + 3 of data order

    def __post_init__(self):
        for name, value in vars(self).items():
            kind = type(getattr(Config, name))  # of the default
            if name in CHOICES:
                legal = list(CHOICES[name])
                check(value in legal, f"{name}={value!r}: expected one of {legal}")
            else:
                low, high = LEAST.get(name, 0), MOST.get(name, 10**12)
                is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
                # The last part: 2.5 is no whole number.
                is_legal = is_number and low <= value <= high and kind(value) == value
                expected = f"expected {kind.__name__} from {low} to {high}"
                check(is_legal, f"{name}={value!r}: {expected}")
            object.__setattr__(self, name, kind(value))  # NumPy's numbers are taken
        most = self.image_size.bit_length() - 4  # one convolution stays
        check(self.d_fewer <= most, f"d_fewer={self.d_fewer}: expected int from 0 to {most}")
        is_epoch = self.epoch_images == 0 or self.epoch_images >= self.batch_size
        check(is_epoch, f"epoch_images={self.epoch_images}: expected 0, or batch_size at least")

    def but(self, **changes):
        """The same config with some fields changed: one experiment is one call."""
        unknown = changes.keys() - vars(self).keys()
        check(not unknown, f"Config has no field {unknown}: expected some of {list(vars(self))}")
        return dataclasses.replace(self, **changes)

    def label(self, base=None):
        """The difference from `base` (None: BASELINE) in words: "head=tanh, lr_d=0.0003"."""
        others = vars(base or BASELINE)
        changes = [f"{name}={value}" for name, value in vars(self).items() if value != others[name]]
        return ", ".join(changes) or "no change"

    @property
    def pixel_range(self):
        """What the networks see: the range of the head, for real and generated images alike."""
        return (-1.0, 1.0) if self.head == "tanh" else (0.0, 1.0)


BASELINE = Config()
H1 = BASELINE.but(block_norm="both", block_act="leaky_relu")
TANH_BN = BASELINE.but(  # another student's network
    ladder="cspup_last",
    block_act="tanh",
    block_norm="right",
    head="tanh",
    d_wider=2,
    batch_size=256,
    epochs=20,
)
CONVERGED = H1.but(  # the regularised relativistic GAN (arXiv 2501.05441) with this generator
    loss="relativistic",
    r1=2.0,
    r2=2.0,
    d_norm=False,
    d_wider=2,
    init="he",
    head="tanh",
    flip=True,
    beta1=0.0,
    beta2=0.9,
    lr_g=2e-3,
    lr_d=2e-3,
    lr_width=64,
    lr_end=0.1,
    ema_images=20_000,
)
PRESETS = {
    # The course's sections, in the report's order.
    "baseline": BASELINE,
    "h0_more_epochs": BASELINE.but(epochs=20),
    "h1_bn_leaky": H1,
    "h2_l2_big_batch": H1.but(batch_size=256, weight_decay=1e-4),
    "h3_smooth_tanh": H1.but(label_smoothing=0.1, lr_d=3e-4, lr_g=8e-4, head="tanh"),
    # Another student's family.
    "tanh_bn": TANH_BN.but(lr_g=1e-4, lr_d=1e-4),
    "low_lr": TANH_BN.but(lr_g=1e-5, lr_d=1e-5),
    "fast_d": TANH_BN.but(block_norm="both", lr_d=2e-3),
    "slow_d": TANH_BN.but(lr_d=2e-5),
    "slow_d_equal_rates": TANH_BN,  # no student's: the control of slow_d, both rates 2e-4
    "unit_range": TANH_BN.but(lr_d=2e-5, head="sigmoid"),
    "dcgan": BASELINE.but(generator="dcgan", lr_g=1e-4, lr_d=1e-4),
    # The control: DCGAN as published (arXiv 1511.06434).
    "dcgan_paper": BASELINE.but(generator="dcgan", head="tanh", loss="bce_logits"),
    # What the others tried: one change each, but for no_bn_d and two_to_one.
    "bce_logits": BASELINE.but(loss="bce_logits"),
    "lazy_d": BASELINE.but(d_every=2),
    "shallow_d": BASELINE.but(d_fewer=1),
    "leaky_block": BASELINE.but(block_act="leaky_relu"),
    "batch_64": BASELINE.but(batch_size=64),
    "no_bn_d": BASELINE.but(
        ladder="deconv_first", deconv_kernel=2, block_act="leaky_relu", head="relu", d_norm=False
    ),
    "two_to_one": BASELINE.but(block_norm="both", head="tanh", lr_d=1e-4),
    "adam_default": BASELINE.but(beta1=0.9),
    # No student's: the three parts of h3, each alone.
    "smooth_labels": H1.but(label_smoothing=0.1),
    "tanh_head": H1.but(head="tanh"),
    "h3_rates": H1.but(lr_d=3e-4, lr_g=8e-4),
    "converged": CONVERGED,
}


# ---------------------------------------------------------------------------------------- training

STATS = ("d_loss", "d_real", "d_fake", "penalty", "g_loss")  # of each step: `d_step`, `g_step`


def make_generator(config: Config) -> nn.Module:
    """The config's generator with its initial weights."""
    options = {"head": HEADS[config.head]}
    if config.generator == "cspup":
        options.update(
            ladder=config.ladder,
            act=ACTIVATIONS[config.block_act],
            norm=config.block_norm,
            kernel=config.deconv_kernel,
        )
    make = GENERATORS[config.generator]
    generator = make(config.image_size, config.width, config.z_dim, **options)
    INITS[config.init](generator, 4 * config.seed)
    return generator


def make_discriminator(config: Config) -> nn.Module:
    """The config's discriminator with its initial weights."""
    width = config.width * config.d_wider
    discriminator = Discriminator(config.image_size, width, config.d_norm, config.d_fewer)
    INITS[config.init](discriminator, 4 * config.seed + 1)
    return discriminator


def reads_input(name, layer):
    """Whether a layer reads z (in `stem`) or RGB (`features.0`): its fan-in is not a width."""
    if name.startswith("stem"):
        return layer.kernel_size != (3, 3)  # in a CSPup only the two 3x3 read `width` channels
    return name == "features.0"


def adam(network, config, lr):
    """Adam with the config's betas and L2, and the width rule where `lr_width` is given.

    The rule: weights whose fan-in grows with the width get lr * lr_width / width, as in the maximal
    update parametrization (arXiv 2203.03466). Biases, BatchNorm, and what reads z or RGB keep lr.
    width is G's in both networks, so a D twice as wide learns twice as fast as its own would ask.
    """
    unscaled = {"params": [], "full_lr": lr}
    scaled = {"params": [], "full_lr": lr}
    if config.lr_width:
        scaled["full_lr"] = lr * config.lr_width / config.width
    for name, layer in network.named_modules():
        for weight in layer.parameters(recurse=False):
            if weight.dim() == 4 and not reads_input(name, layer):
                scaled["params"].append(weight)
            else:
                unscaled["params"].append(weight)
    betas = (config.beta1, config.beta2)
    # Before each step `Training.set_rates` replaces lr by a share of the group's full_lr.
    groups = [unscaled, scaled]
    return torch.optim.Adam(groups, lr, betas, weight_decay=config.weight_decay, fused=True)


def to_network(images, config):
    """uint8 (N, 3, S, S) to float in the config's pixel range."""
    low, high = config.pixel_range
    return images.float().mul_((high - low) / 255).add_(low)


def to_uint8(images, config):
    """Float in the config's pixel range to uint8 (N, 3, S, S)."""
    low, high = config.pixel_range
    return ((images - low) * (255 / (high - low))).round().clamp(0, 255).to(torch.uint8)


@torch.no_grad()
def update_ema(average, network, config, step):
    """Move a running mean of weights towards the network's, BatchNorm's statistics included.

    Its half-life is ema_images, or a tenth of the images seen so far, whichever is less.
    """
    half_life = min(config.ema_images, 0.1 * step * config.batch_size)
    new = 1 - 0.5 ** (config.batch_size / half_life)
    for a, b in zip(average.state_dict().values(), network.state_dict().values()):
        if a.is_floating_point():  # BatchNorm's count of batches is not, and nothing reads it
            a.lerp_(b, new)


class Training:
    """All that the next step depends on, and that step.

    images: uint8 (N, 3, S, S). precision: of both networks, see `Precision`. With equal arguments
    and what `state_dict` gave, a training goes on as if it had never been stopped.
    A turn is one pass through the images, without the few that do not fill a last batch; an epoch
    is a number of images, as the config has it.
    """

    def __init__(self, config, images, device, precision="float32"):
        self.config = config
        self.device = device
        self.images = images
        if device.type == "cuda" and images.numel() < torch.cuda.mem_get_info(device)[0] / 4:
            self.images = images.to(device)  # all of them, once
        layout = torch.channels_last
        self.generator = make_generator(config).to(device, memory_format=layout)
        self.discriminator = make_discriminator(config).to(device, memory_format=layout)
        self.kept = self.generator  # makes the samples: it is `run.generator`
        if config.ema_images:
            self.kept = copy.deepcopy(self.generator)  # the running mean, see `update_ema`
        self.run = Run(config, [], self.kept, [], environment(device, precision))
        self.opt_g = adam(self.generator, config, config.lr_g)
        self.opt_d = adam(self.discriminator, config, config.lr_d)
        self.precision_g = Precision(precision, device.type)
        self.precision_d = Precision(precision, device.type)
        self.chosen_d_step = None  # chosen in the first step, see `choose_d_step`
        self.d_stats = torch.zeros(4, device=device)  # of D's latest step
        self.noise = torch.Generator().manual_seed(4 * config.seed + 2)
        self.turn = None  # the number of the turn whose order is known
        self.order = None  # of the images in that turn, (N,)
        self.step = 0
        self.epoch_steps = (config.epoch_images or len(images)) // config.batch_size
        self.steps = config.epochs * self.epoch_steps
        self.recent = []  # `STATS` of each step since the last record
        self.started = time.monotonic()

    def next_batch(self):
        """Real images as the networks see them, (n, 3, S, S), and noise, (n, z_dim)."""
        config = self.config
        n = config.batch_size
        turn, k = divmod(self.step, len(self.images) // n)
        if turn != self.turn:  # the images are seen again, in another order
            seed = 4 * config.seed + 3  # at most 16 bits, see MOST
            random = torch.Generator().manual_seed((turn << 16) + seed)
            order = torch.randperm(len(self.images), generator=random)  #                       (N,)
            self.order = order.to(self.images.device)
            self.turn = turn
        real = self.images[self.order[k * n : (k + 1) * n]].to(self.device, non_blocking=True)
        real = to_network(real, config).contiguous(memory_format=torch.channels_last)
        if config.flip:
            coin = torch.rand(n, 1, 1, 1, generator=self.noise).to(self.device, non_blocking=True)
            real = torch.where(coin < 0.5, real.flip(3), real)
        z = torch.randn(n, config.z_dim, generator=self.noise)
        return real, z.to(self.device, non_blocking=True)

    def set_rates(self):
        """The rates fall on a half cosine, from full_lr to lr_end * full_lr."""
        decay = (1 - math.cos(math.pi * self.step / self.steps)) / 2  # from 0 to 1
        for group in self.opt_g.param_groups + self.opt_d.param_groups:
            group["lr"] = group["full_lr"] * (1 - (1 - self.config.lr_end) * decay)

    def advance(self):
        """A step of D, every d_every-th time, and one of G, on the same images and noise."""
        config = self.config
        d = self.discriminator
        self.set_rates()
        real, z = self.next_batch()
        with self.precision_g.autocast():
            fake = self.generator.train()(z)  #                                         (n, 3, S, S)
        if self.chosen_d_step is None:
            self.chosen_d_step = choose_d_step(d, real, fake, config)
        if self.step % config.d_every == 0:
            take_step = self.chosen_d_step
            self.d_stats = take_step(d, self.opt_d, real, fake, config, self.precision_d)  #    (4,)
        g_loss = g_step(d, self.opt_g, real, fake, config, self.precision_g)
        self.recent.append(torch.cat([self.d_stats, g_loss.view(1)]))  #                        (5,)
        self.step += 1
        if config.ema_images:
            update_ema(self.kept, self.generator, config, self.step)

    def record(self):
        """Add the means over the steps since the last record to the history.

        Steps that are not finite are left out, as float16 skips some; nan if all are. Between two
        records nothing is read back from a GPU.
        """
        means = [x[x.isfinite()].mean().item() for x in torch.stack(self.recent).T]
        self.recent.clear()
        record = dict(
            zip(STATS, means),
            step=self.step,
            epoch=self.step / self.epoch_steps,
            images=self.step * self.config.batch_size,
            seconds=time.monotonic() - self.started,
        )
        self.run.history.append(record)

    def look(self, on_epoch):
        """After an epoch: a snapshot, diversity, the slopes of D, what on_epoch finds."""
        began = time.monotonic()
        record = self.run.history[-1]
        real = pick(self.images, min(256, len(self.images)))  #                         (n, 3, S, S)
        fake = sample(self.run, len(real))  #                                           (n, 3, S, S)
        if on_epoch:
            found = on_epoch(self.run) or {}
            found = {name: float(value) for name, value in found.items()}
            record.update({**found, **record})  # what is recorded anyway stays as it is
        record["diversity"] = diversity(real, fake)
        for name, images in (("grad_d", real), ("grad_d_fake", fake)):
            some = images[:64].to(self.device)  #                                      (64, 3, S, S)
            record[name] = gradient_size(self.discriminator, some, self.config)
        self.run.snapshots.append((record["images"], fake[:36].clone()))  # 36 are kept, not 256
        self.started += time.monotonic() - began  # so that `seconds` leaves this out

    def state_dict(self):
        """What a checkpoint holds. The rest is made anew from the same arguments."""
        return {
            "identity": identify(self.config, self.images),
            "environment": self.run.environment,
            "step": self.step,
            "seconds": time.monotonic() - self.started,
            "generator": self.generator.state_dict(),
            "discriminator": self.discriminator.state_dict(),
            "kept": self.kept.state_dict(),
            "opt_g": self.opt_g.state_dict(),
            "opt_d": self.opt_d.state_dict(),
            "scaler_g": self.precision_g.scaler.state_dict(),
            "scaler_d": self.precision_d.scaler.state_dict(),
            "noise": self.noise.get_state(),
            "d_stats": self.d_stats,
            "recent": self.recent,
            "history": self.run.history,
            "snapshots": self.run.snapshots,
        }

    def load_state_dict(self, state):
        """Go on from what `state_dict` returned. `environment` stays that of the start."""
        for name in ("generator", "discriminator", "kept", "opt_g", "opt_d"):
            getattr(self, name).load_state_dict(state[name])
        self.precision_g.scaler.load_state_dict(state["scaler_g"])
        self.precision_d.scaler.load_state_dict(state["scaler_d"])
        self.noise.set_state(state["noise"])
        self.d_stats = state["d_stats"].to(self.device)
        self.recent = [stats.to(self.device) for stats in state["recent"]]
        self.step = state["step"]
        self.started -= state["seconds"]
        self.run.history = state["history"]
        self.run.snapshots = state["snapshots"]
        self.run.environment = state["environment"]


def gradient_size(discriminator, images, config):
    """Root mean square of |grad_x D(x)| over images, uint8 (N, 3, S, S), with x in [-1, 1]."""
    low, high = config.pixel_range
    x = to_network(images, config).requires_grad_()  #                                  (N, 3, S, S)
    squares = gradient_penalty(discriminator(x), x)  #                                          (N,)
    return squares.mean().sqrt().item() * (high - low) / 2


def choose_precision(config, images, device):
    """On a GPU half precision: float16 below compute capability 8, bfloat16 from there on.

    Else float32: on a CPU; where penalties need a double backward, of which in half precision only
    a single step is tested; and where mean losses of four steps differ by more than 0.1 + 10
    percent, which is printed.
    """
    if device.type != "cuda":
        return "float32"
    half = "float16"
    if torch.cuda.get_device_capability(device) >= (8, 0):
        half = "bfloat16"
    exact, take_step = try_precision(config, images, device, "float32")
    if take_step is d_step and config.r1 + config.r2 > 0:
        return "float32"
    found, _ = try_precision(config, images, device, half)
    if torch.allclose(found, exact, rtol=0.1, atol=0.1):  # false where one is nan
        return half
    say(
        f"{config.label()}: trains in float32, for D's and G's losses are "
        f"{found.tolist()} in {half}, {exact.tolist()} in float32"
    )
    return "float32"


def try_precision(config, images, device, precision):
    """D's and G's mean loss over the first four steps, (2,), and the chosen step of D."""
    training = Training(config, images, device, precision)
    for _ in range(4):
        training.advance()
    losses = torch.stack(training.recent)[:, [0, -1]].mean(0).cpu()  #                          (2,)
    take_step = training.chosen_d_step
    del training
    torch.cuda.empty_cache()  # the next `Training` looks at what is free
    return losses, take_step


def train(
    config,
    images,
    run_dir=None,
    progress=True,
    on_epoch=None,
    time_budget=math.inf,
    save_every=600,
):
    """Train one generator on images, uint8 (N, 3, S, S).

    run_dir: where the run lives, in run.pt; None: it is not saved. A finished one is loaded, and a
    line says so; a stopped one goes on, bit for bit on a CPU. A run of another version, config or
    of other images (up to 511 are compared) is refused, with the differences. More epochs can be
    asked for where the rates do not fall. Weights that are not finite are not saved.
    Changed code is not seen: take another run_dir for it.
    on_epoch: a function of the run; the dictionary of numbers that it returns is recorded.
    time_budget: hours; then the run is saved and returned, `stopped`. Ctrl-C, SIGTERM and a closed
    terminal save it where this is the main thread, and then do what they always do.
    save_every: seconds that a crash may cost.

    The history has a record for each step, in longer runs at least 200, each the means over the
    steps since the one before: step, epoch, images, seconds, d_loss, g_loss, penalty, d_real,
    d_fake (D's mean logits). The record at an epoch's end also has diversity (of 256 samples; near
    0 is collapse), grad_d and grad_d_fake (`gradient_size` at real images and at samples) and what
    on_epoch found.
    """
    check(hasattr(config, "but"), f"{config=}: expected a Config, as PRESETS['converged']")
    check(not callable(progress), f"{progress=}: expected True or False; on_epoch is the next one")
    deadline = time.monotonic() + 3600 * float(time_budget)
    folder = None if run_dir is None else Path(run_dir).expanduser()
    name = folder or config.label()
    training = open_training(config, images, folder)
    run = training.run
    try_to_write(training, folder)
    opened_at = (training.step, len(run.snapshots))
    window = max(1, training.steps // 200)  # steps between two records
    saved = time.monotonic()
    bar = tqdm(
        desc=str(name),
        total=training.steps,
        initial=training.step,
        mininterval=2,
        disable=not progress,
    )
    with stop_signals() as signals, bar:
        while True:
            epochs_looked_at = len(run.snapshots)  # one fewer than done, if a look had failed
            if training.step // training.epoch_steps > epochs_looked_at:
                look_safely(training, on_epoch, folder)
            run.stopped = reason_to_stop(training, signals, deadline)
            if run.stopped or training.step >= training.steps:
                break
            training.advance()
            bar.update()
            if training.step % training.epoch_steps == 0 or training.step % window == 0:
                training.record()
            if time.monotonic() - saved > save_every:
                save(training, folder)
                saved = time.monotonic()
        if (training.step, len(run.snapshots)) != opened_at:  # else all of it is on file
            reasons = [run.stopped, save(training, folder)]
            run.stopped = "; ".join(filter(None, reasons))
        if run.stopped:
            say(f"{name}: stopped at step {training.step} of {training.steps} ({run.stopped})")
    return run


def look_safely(training, on_epoch, folder):
    """`Training.look`; what was trained is saved before an error of on_epoch goes on."""
    if not is_finite(training):  # there is nothing to see: `reason_to_stop` says so
        return
    try:
        training.look(on_epoch)
    except BaseException:  # an on_epoch may end the process
        save(training, folder)
        raise


def reason_to_stop(training, signals, deadline):
    """Why a training cannot or must not go on, or ""."""
    if training.run.history:
        last = training.run.history[-1]
        losses = last["d_loss"], last["g_loss"]
        is_suspect = not np.isfinite(losses).all() or training.step % training.epoch_steps == 0
        # A float16 step that overflowed was left out: its loss proves nothing. And BatchNorm's
        # statistics can be lost where no loss shows it.
        if is_suspect and not is_finite(training):
            return f"weights or BatchNorm's statistics not finite, losses of D and G {losses}"
    if training.step < training.steps:
        if signals:
            return signals[0].name
        if time.monotonic() > deadline:
            return "time"
    return ""


# -------------------------------------------------------------------------------------------- runs


@dataclasses.dataclass
class Run:
    """One trained experiment and what it measured on the way."""

    config: Config
    history: list[dict]  # see `train`
    generator: nn.Module  # with the running mean of its weights, where the config asks for one
    snapshots: list[tuple]  # (images seen, uint8 (36, 3, S, S)), always the same noise
    environment: dict  # hardware, precision, versions and date of the start
    stopped: str = ""  # why it ended early: a signal, "time", weights not finite, not saved

    @property
    def finished(self):
        epoch = self.history[-1]["epoch"] if self.history else 0
        return epoch >= self.config.epochs and not self.stopped


@torch.no_grad()
def sample(run, n, seed=0):
    """n images of the run's generator, from noise of a seed: uint8 (n, 3, S, S) on the CPU."""
    check(isinstance(n, numbers.Integral) and n > 0, f"{n=}: expected 1 image or more")
    generator = run.generator.eval()
    device = next(generator.parameters()).device
    random = torch.Generator().manual_seed(int(seed))
    z = torch.randn(n, run.config.z_dim, generator=random)  #                             (n, z_dim)
    parts = [to_uint8(generator(part.to(device)), run.config).cpu() for part in z.split(256)]
    return torch.cat(parts)  #                                                          (n, 3, S, S)


def open_training(config, images, folder):
    """The training in folder/run.pt, or a new one. Another run that lies there is refused."""
    here = identify(config, images)
    device = best_device()
    state = folder and read_checkpoint(folder)
    if not state:
        return Training(config, images, device, choose_precision(config, images, device))
    stored = state.get("identity", {})  # {}: another program's file
    if config.lr_end == 1:  # a constant rate knows of no end: more epochs may be asked for
        stored["epochs"] = max(stored.get("epochs", 0), config.epochs)
    differences = [
        f"{name}: {stored.get(name)} there, {value} here"
        for name, value in here.items()
        if stored.get(name) != value
    ]
    check(not differences, f"{folder} holds another run ({differences}): take another run_dir")
    training = Training(config, images, device, state["environment"]["precision"])
    training.load_state_dict(state)
    made = ", ".join(training.run.environment.values())
    say(f"{folder}: loaded at step {training.step} of {training.steps}; {made}")
    return training


def try_to_write(training, folder):
    """Raise now, and not after hours, if a run to be trained cannot be saved there."""
    if folder and training.step < training.steps:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()


def read_checkpoint(folder):
    """What `save` wrote, or None. A file that was cut off is set aside."""
    path = folder / "run.pt"
    if not path.exists():
        return None
    file = io.BytesIO(path.read_bytes())  # an error here says nothing of what is in it
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged file raises
        if zipfile.is_zipfile(file):  # its end is there: short memory, or other damage
            raise ValueError(f"{path} cannot be read now ({describe(error)})") from error
        path.replace(folder / "run.pt.damaged")
        say(f"{path}.damaged: set aside, and the run begins anew ({describe(error)})")
        return None


def identify(config, images):
    """What equal runs have in common: version, config, the images' shape, a hash of some."""
    size, n = config.image_size, config.batch_size
    expected = f"torch.uint8 (N, 3, {size}, {size}), N at least batch_size={n}"
    check_images(images, size, n, expected)
    some = images[:: max(1, len(images) // 256)].cpu().numpy()
    data = f"{tuple(images.shape)} {hashlib.sha1(some.tobytes()).hexdigest()[:8]}"
    return {"version": VERSION, **dataclasses.asdict(config), "data": data}


def save(training, folder):
    """Write folder/run.pt. Returns, and prints, why it could not be written, or "".

    A full disk raises nothing: the training goes on, and there may be room the next time.
    """
    problem = ""
    if not is_finite(training):
        problem = "weights are not finite and are not saved"
    elif folder:
        part = folder / f"run.pt.part{os.getpid()}"
        try:
            torch.save(training.state_dict(), part)
            part.replace(folder / "run.pt")  # whoever reads sees the old file or the new one
        except (OSError, RuntimeError) as error:  # torch.save raises either on a full disk
            with contextlib.suppress(OSError):
                part.unlink()
            problem = f"step {training.step} is not saved in {folder}: {describe(error)}"
    if problem:
        say(problem)
    return problem


def is_finite(training):
    """Whether all weights and BatchNorm's statistics are. No scaler protects the latter."""
    networks = (training.generator, training.discriminator)
    return all(x.isfinite().all() for network in networks for x in network.state_dict().values())


def load_run(folder):
    """The run in a folder; the images that it was trained on are not needed.

    From run.pt, or else from the smaller run.pt.gz that scripts/full_size.py makes of it: there a
    weight is a pair, whole numbers and a scale.
    """
    file = Path(folder).expanduser() / "run.pt"
    small = file.with_name("run.pt.gz")
    is_there = file.exists() or small.exists()
    check(is_there, f"{file}: no run. Train one: train(config, images, {str(folder)!r})")
    try:
        if not file.exists():
            file = io.BytesIO(gzip.decompress(small.read_bytes()))
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged file raises
        raise ValueError(f"{folder}: its run cannot be read ({describe(error)})") from error
    missing = vars(BASELINE).keys() - state.get("identity", {}).keys()
    check(not missing, f"{folder}: another version's run, without {missing}: load it with that one")
    config = Config(**{name: state["identity"][name] for name in vars(BASELINE)})
    for name, weight in state["kept"].items():
        if isinstance(weight, tuple):
            state["kept"][name] = weight[0] * weight[1]
    generator = make_generator(config)
    generator.load_state_dict(state["kept"])
    generator.to(best_device())
    return Run(config, state["history"], generator, state["snapshots"], state["environment"])


def watch(held_out, n):
    """An on_epoch for `train`: SWD and coverage of up to n samples, against held-out images."""
    real = pick_measured(held_out, n)  #                                               (n, 3, S, S)

    def on_epoch(run):
        fake = sample(run, len(real))
        swd = sliced_wasserstein(real, fake)["avg"]
        return {"swd": swd, "coverage": coverage(real, fake)}

    return on_epoch


def train_all(jobs, source, executor=None, measured_on=512, time_budget=math.inf):
    """Train many runs side by side. The same call goes on where it was stopped.

    jobs: (config, folder) each. source: of their images, see `load_faces`. executor: any of
    concurrent.futures' kind, as Dask's or mpi4py's; None: a process for each GPU, or for each CPU
    core with one thread. A script then needs `if __name__ == "__main__":`.
    measured_on: `watch` measures on so many held-out images. time_budget: hours, for all together.
    Returns {folder: why it is not finished}. A run that fails costs no other. If a worker process
    dies, the pool ends: running jobs are saved, waiting ones do not start; call again. Ctrl-C and
    SIGTERM end the processes that are ours, and each saves its run first (on Windows not always:
    up to ten minutes of it are lost).
    A process imports this module anew: it does not know a loss that a notebook's cell has added.
    """
    jobs = list(jobs)
    for folder, n in Counter(Path(folder).expanduser().resolve() for _, folder in jobs).items():
        check(n == 1, f"{folder} is the folder of {n} runs: expected one for each")
    deadline = time.time() + 3600 * time_budget
    if source:
        for size in {config.image_size for config, _ in jobs}:
            load_faces(source, size)  # decoded once, not by each of the processes
    reasons = {}
    pool = contextlib.nullcontext(executor) if executor else worker_processes()
    with pool as workers:
        folders = {
            workers.submit(train_job, config, folder, source, measured_on, deadline): str(folder)
            for config, folder in jobs
        }
        for future in tqdm(futures.as_completed(folders), "runs", len(jobs)):
            reason = why_unfinished(future)
            if reason:
                reasons[folders[future]] = reason
    return reasons


def train_job(config, folder, source, measured_on, deadline):
    """One run of `train_all`: why it is not finished, or ""."""
    # A run that was begun is opened even then: it may be finished.
    if time.time() > deadline and not Path(folder).expanduser().exists():
        return "time"
    faces, held_out = load_faces(source, config.image_size)
    hours = (deadline - time.time()) / 3600
    on_epoch = watch(held_out, measured_on)
    run = train(config, faces, folder, progress=False, on_epoch=on_epoch, time_budget=hours)
    return run.stopped


def why_unfinished(future):
    """What a `train_job` returned, or its error in words."""
    try:
        return future.result()
    except futures.BrokenExecutor:
        return "a worker died: killed, out of memory, or a script without `if __name__ == ...`"
    except Exception as error:
        return describe(error)


@contextlib.contextmanager
def worker_processes():
    """An executor with a process for each GPU, or else for each CPU core that may be used."""
    n = torch.get_num_threads()  # the cores that this process may use
    if best_device().type == "cuda":
        n = torch.cuda.device_count()
    spawn = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
    slots = spawn.SimpleQueue()
    for slot in range(n):
        slots.put(slot)
    others = multiprocessing.active_children()
    executor = futures.ProcessPoolExecutor(n, spawn, begin_worker, (slots,))
    try:
        yield executor
    except BaseException:  # Ctrl-C, which may have come to this process alone
        for process in set(multiprocessing.active_children()) - set(others):
            process.terminate()  # SIGTERM: `train` saves its run, but on Windows
        raise
    finally:
        executor.shutdown(cancel_futures=True)


def begin_worker(slots):
    """What a process of `worker_processes` does first."""
    # Ctrl-C, which comes to all, is to end a worker after its run is saved (`stop_signals`). As
    # KeyboardInterrupt it would end the job alone, and the worker would take the next one.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=end_with_parent, daemon=True).start()
    torch.set_num_threads(1)  # two that share a core wait for each other by spinning
    slot = slots.get()
    if slot < torch.cuda.device_count():  # before `best_device` opens one
        torch.cuda.set_device(slot)


def end_with_parent():
    """In a thread of a worker: when its parent is gone, it saves its run and ends."""
    multiprocessing.parent_process().join()
    os.kill(os.getpid(), signal.SIGTERM)


@contextlib.contextmanager
def stop_signals():
    """A list that holds the signal once Ctrl-C, SIGTERM or a closed terminal's SIGHUP has come.

    At the end the caller's handlers are back, and the signal is raised again for them.
    """
    arrived = []

    def note(number, frame):
        arrived.append(signal.Signals(number))

    before = {}
    if threading.current_thread() is threading.main_thread():  # no other may set handlers
        hangup = getattr(signal, "SIGHUP", signal.SIGTERM)  # Windows has none
        for number in {signal.SIGINT, signal.SIGTERM, hangup}:
            if signal.getsignal(number) != signal.SIG_IGN:  # as Ctrl-C is in `python a.py &`
                before[number] = signal.signal(number, note) or signal.SIG_DFL
    try:
        yield arrived
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if arrived:
            signal.raise_signal(max(arrived))  # SIGTERM, if several came


@functools.cache
def best_device():
    """The GPU if one really works, else the CPU; says so of one that is listed and does not."""
    try:  # is_available() is true for cards that this build has no kernels for (P100)
        if torch.cuda.is_available():
            torch.ones(8, device="cuda").cos().sum().item()
            return torch.device("cuda")
    except RuntimeError as error:
        say(f"This GPU cannot be used, the CPU is ({describe(error)}). On Kaggle take GPU T4 x2.")
    return torch.device("cpu")


def environment(device, precision):
    hardware = "CPU"
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    return {
        "hardware": hardware,
        "precision": precision,
        "torch": str(torch.__version__),
        "version": VERSION,
        "date": time.strftime("%Y-%m-%d"),
    }


def describe(error):
    """An error in one line."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


# -------------------------------------------------------------------------------------------- data

CACHE_DIR = Path.home() / ".cache" / "cspgan"  # Kaggle would keep 10 GB in the working folder
HOW_TO_GET_FACES = (
    "On Kaggle: Add Input, jessicali9530/celeba-dataset. Elsewhere: a folder or zip of images in "
    "data/, or named by CSPGAN_DATA."
)
CELEBA_IMAGES = 202_599
CELEBA_FIRST_TEST = "182638.jpg"  # of its own test partition, which shares no person with the rest
ENDINGS = ".jpg .jpeg .jfif .png .webp .gif .bmp .tif .tiff .ppm .jp2 .avif"


class Faces(torch.utils.data.Dataset):
    """The images of a folder or zip, sub-folders too: [i] -> uint8 (3, size, size), RGB.

    An image is its largest centred square, upright, on white, antialiased. names: of the files with
    an image's ending. passed_over: how many others, by ending. Links are not followed.
    A file that cannot be decoded raises a ValueError, one that cannot be read an OSError.
    """

    def __init__(self, source, size):
        check(size in SIZES, f"{size=}: expected one of {SIZES}")
        self.source = Path(source).expanduser().resolve()
        self.size = int(size)
        self.is_zip = is_zip(self.source)
        is_known = self.is_zip or self.source.is_dir()
        check(is_known, f"{self.source}: neither a folder nor a whole zip. {HOW_TO_GET_FACES}")
        open_zip.cache_clear()  # another zip may lie there by now
        self.stamps = {}  # {name: checksum, or time and bytes}: another where a file has changed
        self.passed_over = Counter()
        list_files = files_in_zip if self.is_zip else files_in_folder
        for name, stamp in sorted(list_files(self.source)):
            path = Path(name)
            if any(part.startswith((".", "__MACOSX")) for part in path.parts):  # hidden files
                continue
            ending = path.suffix.lower()
            if stamp is None:
                self.passed_over["links"] += 1
            elif ending in ENDINGS.split():
                self.stamps[name] = stamp
            else:
                self.passed_over[ending or "no ending"] += 1
        self.names = list(self.stamps)

    def __len__(self):
        return len(self.names)

    def __getitem__(self, i):
        name = self.names[i]
        data = None
        try:
            data = self.read(name)
            return torch.from_numpy(decode_image(data, self.size))  #                (3, size, size)
        except Exception as error:  # whatever a damaged file raises
            is_unread = data is None and isinstance(error, OSError)
            if is_unread or isinstance(error, MemoryError):
                raise
            start = (data or b"")[:24]
            what = f"{name} is damaged ({describe(error)}), it begins with {start}"
            raise ValueError(what) from error

    def read(self, name):
        """The bytes of a file."""
        if self.is_zip:
            return open_zip(self.source, os.getpid()).read(name)
        return (self.source / name).read_bytes()


@functools.lru_cache(4)
def open_zip(path, process):
    """An open zip, one for each process: a DataLoader's forks would share its position."""
    return zipfile.ZipFile(path)


def files_in_zip(path):
    """(name, checksum) of all files."""
    for info in open_zip(path, os.getpid()).infolist():
        if not info.is_dir():
            yield info.filename, info.CRC


def files_in_folder(folder, below=""):
    """(name, (time of the last change, bytes)) of all files below it; (name, None) of links."""
    for entry in os.scandir(folder / below):
        name = os.path.join(below, entry.name)
        if entry.is_symlink():
            yield name, None
        elif entry.is_dir():
            yield from files_in_folder(folder, name)
        else:
            about = os.stat(entry)
            yield name, (about.st_mtime_ns, about.st_size)


def decode_image(data, size):
    """One encoded image as RGB, uint8 (3, size, size)."""
    image = Image.open(io.BytesIO(data))
    image.draft("RGB", (2 * size, 2 * size))  # a far larger JPEG is unpacked at 1/2, 1/4 or 1/8
    image.load()
    with contextlib.suppress(Exception):  # a malformed EXIF block says nothing of the pixels
        image = ImageOps.exif_transpose(image)
    check(image.mode != "F", "an image of floats: expected 8 or 16 bits, for what is white?")
    if image.mode[0] == "I":  # 16 bits a pixel: convert would clip, not scale
        grey = np.asarray(image, dtype=np.float32) / 257
        image = Image.fromarray(grey.clip(0, 255).round().astype(np.uint8))
    if image.has_transparency_data:  # the colours under transparent pixels are arbitrary
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    square = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.LANCZOS)
    return np.asarray(square).transpose(2, 0, 1).copy()  #                           (3, size, size)


def is_source(path):
    return path.is_dir() or is_zip(path)


def is_zip(path):
    if not path.is_file():
        return False
    with path.open("rb") as file:  # given the path, is_zipfile says no where it may not read
        return zipfile.is_zipfile(file)


def find_faces(kaggle="/kaggle/input", data="data"):
    """CSPGAN_DATA, else img_align_celeba in Kaggle's input folder, else what lies in data/.

    Says what was taken, with its count by folder, and what else has images. None: nothing is there.
    """
    asked = os.environ.get("CSPGAN_DATA")
    places = [asked]
    if not asked:
        celeba = sorted(filter(is_source, Path(kaggle).rglob("img_align_celeba*")))
        others = filter(is_source, [Path(data), *sorted(Path(data).rglob("*.zip"))])
        places = [*celeba[:1], *others]  # of nested folders the outer
    found = [Faces(place, SIZES[0]) for place in places]  # any size: nothing is decoded
    # Nothing takes the place of what is asked for: if it is empty, `load_faces` raises.
    usable = [faces for faces in found if faces.names or asked]
    if not usable:
        say("\n".join([f"No data set. {HOW_TO_GET_FACES}", *map(what_is_in, found)]))
        return None
    say(f"Taken: {what_is_in(usable[0])}")
    for faces in usable[1:]:
        say(f"Not taken: {what_is_in(faces)}")
    return usable[0].source


def what_is_in(faces):
    """As "photos.zip: 40 images (a 30, b 10); passed over 2 .csv"."""
    folders = Counter(os.path.dirname(name) or "." for name in faces.names)
    by_folder = ", ".join(f"{folder} {n:,}" for folder, n in folders.most_common(8))
    if len(folders) > 8:
        by_folder += f", {len(folders) - 8} more"
    others = ", ".join(f"{n:,} {ending}" for ending, n in faces.passed_over.most_common(8))
    count = f"{len(faces):,} images ({by_folder})"
    return f"{faces.source}: {count}; passed over {others or 'nothing'}"


def load_faces(source, size, cache_dir=CACHE_DIR):
    """(faces to train on, faces held out to measure on), uint8 (N, 3, size, size) each.

    source: a folder or zip, or None for 4,096 procedural faces. Its images are decoded once, into
    cache_dir, and memory-mapped read-only: clone them before you write to them, or Python dies.
    What cannot be decoded is named and skipped. Held out is CelebA's own test partition where the
    whole of CelebA is there, else a tenth, by a hash of the pixels: at one size an image and its
    copies stay on one side, whatever else comes.
    """
    if source is None:
        return drawn_faces(size)
    faces = Faces(source, size)
    check(faces.names, f"{what_is_in(faces)}. {HOW_TO_GET_FACES}")
    stamp = hashlib.sha1(repr((faces.stamps, "decoder 7")).encode()).hexdigest()[:12]
    cache = Path(cache_dir).expanduser() / f"{faces.source.stem}-{size}px-{stamp}"
    if not cache.exists():
        cache.parent.mkdir(parents=True, exist_ok=True)
        # A killed process leaves it there: its name tells what it is.
        with tempfile.TemporaryDirectory(prefix=f"{cache.name}.part-", dir=cache.parent) as folder:
            decode_all(faces, Path(folder, "whole"))
            try:
                Path(folder, "whole").rename(cache)
            except OSError:
                if not cache.exists():  # else another process was faster
                    raise
    n, n_all = map(int, (cache / "counts.txt").read_text().split())
    pixels = np.memmap(cache / "images.u8", np.uint8, mode="r")
    is_whole = len(pixels) == n_all * 3 * faces.size**2
    check(is_whole, f"{cache} has lost some of its {n_all} images: delete it, and call again")
    with warnings.catch_warnings(action="ignore"):  # that it must not be written to
        images = torch.from_numpy(pixels).view(-1, 3, faces.size, faces.size)
    return images[:n], images[n:]


@functools.lru_cache(1)  # for the many runs of a worker
def drawn_faces(size):
    """4,096 procedural faces, as `load_faces` gives them."""
    images = toy_faces(4096, size)
    held = torch.tensor([content_hash(image.numpy()) < 0.1 for image in images])  #             (N,)
    return images[~held], images[held]


def decode_all(faces, folder):
    """Write all pixels to folder/images.u8, those held out last; (others, all) to counts.txt."""
    folder.mkdir()
    needed_gb = 1.2 * len(faces) * 3 * faces.size**2 / 1e9  # those held out are written twice
    free_gb = shutil.disk_usage(folder).free / 1e9
    check(
        needed_gb < free_gb,
        f"{folder}: {needed_gb:.1f} GB needed, {free_gb:.1f} free: take another cache_dir",
    )
    say(f"Decoding {what_is_in(faces)}")
    is_celeba = len(faces) == CELEBA_IMAGES
    n, hashes, damaged = 0, [], []
    with (folder / "images.u8").open("wb") as file, tempfile.TemporaryFile(dir=folder) as held_out:
        bar = tqdm(decoded(faces), "decoding", len(faces), mininterval=2)
        for pixels, name in zip(bar, faces.names):
            if isinstance(pixels, ValueError):
                damaged.append(str(pixels))
                continue
            hashes.append(content_hash(pixels))
            is_held_out = hashes[-1] < 0.1
            if is_celeba:
                is_held_out = name[-10:] >= CELEBA_FIRST_TEST
            if is_held_out:
                held_out.write(pixels)
            else:
                file.write(pixels)
                n += 1
        held_out.seek(0)
        shutil.copyfileobj(held_out, file)
    (folder / "counts.txt").write_text(f"{n} {len(hashes)}")
    rule = "CelebA's test partition" if is_celeba else "a tenth, by a hash of the pixels"
    say(f"{n:,} to train on, {len(hashes) - n:,} held out: {rule}")
    some = "; ".join(damaged[:10])
    copies = len(hashes) - len(set(hashes))
    if copies or damaged:
        say(f"{copies:,} exact copies. {len(damaged):,} skipped: {some}")
    check(hashes, f"{faces.source}: no image can be decoded. {HOW_TO_GET_FACES}")


def decoded(faces):
    """The pixels of each image as bytes, or the ValueError, by all cores, in order."""

    def decode(i):
        try:
            return faces[i].numpy().tobytes()
        except ValueError as error:  # it must not cost the other 200,000
            return error

    with futures.ThreadPoolExecutor(torch.get_num_threads()) as pool:  # Pillow lets them run
        for start in range(0, len(faces), 1024):  # more would wait in memory for a slow disk
            yield from pool.map(decode, range(start, min(start + 1024, len(faces))))


def content_hash(pixels):
    """A number in [0, 1) from an image's bytes alone: the same on every call and machine."""
    return int.from_bytes(hashlib.blake2b(pixels, digest_size=8).digest(), "little") / 2**64


def toy_faces(n, size, seed=0):
    """Procedural faces, uint8 (n, 3, size, size); a smaller n gives the first of the same faces."""
    is_count = isinstance(n, numbers.Integral) and n > 0
    check(is_count and size in SIZES, f"{n=}, {size=}: expected 1 or more, and one of {SIZES}")
    faces = [toy_face(np.random.default_rng((seed, i))) for i in range(n)]
    small = [face.resize((int(size), int(size)), Image.Resampling.BOX) for face in faces]
    return torch.from_numpy(np.stack(small)).permute(0, 3, 1, 2).contiguous()


def toy_face(random):
    """A face of ellipses, 256x256, mirrored at its middle."""
    ground, hair, iris = random.integers(20, 220, (3, 3)).tolist()
    skin = random.integers((150, 110, 90), (250, 200, 170)).tolist()
    x, y, width = random.uniform((100, 110, 50), (156, 146, 70))
    ellipses = [  # colour, distance from (x, y), half of width and height
        (hair, 0, 0, width + 14, 90),
        (skin, 0, 12, width, 76),
        ([200, 70, 80], 0, 54, 22, 9),
        (iris, 27, 0, 12, 8),
        (iris, -27, 0, 12, 8),
    ]
    image = Image.new("RGB", (256, 256), tuple(ground))
    draw = ImageDraw.Draw(image)
    for colour, dx, dy, a, b in ellipses:
        box = (x + dx - a, y + dy - b, x + dx + a, y + dy + b)
        draw.ellipse(box, tuple(colour))
    return image


# ----------------------------------------------------------------------------------------- metrics


def sliced_wasserstein(real, fake, seed=0):
    """Sliced Wasserstein distance of Progressive GAN (arXiv 1710.10196), x1e3; lower is better.

    real, fake: uint8 (N, 3, S, S), equally many. Returns the distance of 7x7 patches at each level
    of a Laplacian pyramid and their mean: {"64": .., "32": .., "16": .., "avg": ..}. Its floor,
    real against other real images, falls with N. Blind to each colour's mean and contrast.
    """
    check_images(real)
    check_images(fake)
    found = f"{tuple(real.shape)} real, {tuple(fake.shape)} fake"
    check(real.shape == fake.shape, f"{found} images: expected as many, of one size")
    random = torch.Generator().manual_seed(int(seed))
    distances = {}
    for a, b in zip(laplacian_pyramid(real), laplacian_pyramid(fake)):  #          (N, 3, s, s) each
        side = a.shape[-1]
        corner = torch.randint(side - 6, (2, len(a), 128), generator=random)  # the same for both
        a = cut_patches(a, corner)  #                                                   (147, 128 N)
        b = cut_patches(b, corner)  #                                                   (147, 128 N)
        means = []
        for _ in range(4):
            directions = F.normalize(torch.randn(128, 147, generator=random), dim=1).to(a.device)
            # By NumPy: torch.sort also makes the indices, and takes 10 times as long on a CPU.
            sorted_a = np.sort((directions @ a).cpu().numpy())  #                       (128, 128 N)
            sorted_b = np.sort((directions @ b).cpu().numpy())  #                       (128, 128 N)
            means.append(1e3 * float(np.abs(sorted_a - sorted_b).mean()))
        distances[str(side)] = sum(means) / len(means)
    return {**distances, "avg": sum(distances.values()) / len(distances)}


def laplacian_pyramid(images):
    """[(N, 3, S, S), ... (N, 3, 16, 16)]: what each size adds to the next smaller, and 16 px."""
    x = images.to(best_device()).float()  #                                             (N, 3, S, S)
    levels = []
    while x.shape[-1] > 16:
        small = smooth(x)[:, :, ::2, ::2]  #                                        (N, 3, s/2, s/2)
        enlarged = torch.zeros_like(x)  #                                               (N, 3, s, s)
        enlarged[:, :, ::2, ::2] = 4 * small  # 4: for the three zeros beside each
        levels.append(x - smooth(enlarged))
        x = small
    return [*levels, x]


def smooth(x):
    """By the 5x5 binomial, (N, 3, s, s)."""
    row = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0], device=x.device) / 16
    binomial = torch.outer(row, row).expand(3, 1, 5, 5)
    return F.conv2d(F.pad(x, (2, 2, 2, 2), mode="reflect"), binomial, groups=3)


def cut_patches(images, corner):
    """7x7 patches with upper left corners (2, N, 128), normalised per channel: (147, 128 N)."""
    n = torch.arange(len(images), device=images.device)[:, None]  #                           (N, 1)
    rows, columns = corner.to(images.device)  #                                        (N, 128) each
    patches = images.unfold(2, 7, 1).unfold(3, 7, 1)[n, :, rows, columns]  #       (N, 128, 3, 7, 7)
    patches = patches.permute(2, 3, 4, 0, 1).reshape(3, 49, -1)  #                    (3, 49, 128 N)
    std, mean = torch.std_mean(patches, dim=(1, 2), correction=0, keepdim=True)
    return ((patches - mean) / std.clamp(min=1e-3)).flatten(0, 1)  #                    (147, 128 N)


def thumbnails(images):
    """Images at 16 px as vectors of doubles in [0, 255], (N, 768)."""
    check_images(images)
    parts = images.cpu().split(1024)
    return torch.cat([F.adaptive_avg_pool2d(part.double(), 16).flatten(1) for part in parts])


def nearest(images, among, k=1):
    """(distance, index), (N,) each, of an image's k-th nearest one of `among`.

    Not itself, where both are one tensor. Distance: root mean square difference of pixels in
    [0, 1], at 16 px. Of a copy it is exactly 0: means of 2^k bytes are exact in doubles.
    """
    a = thumbnails(images)  #                                                               (N, 768)
    b = thumbnails(among)  #                                                                (M, 768)
    distances = torch.cdist(a, b, compute_mode="use_mm_for_euclid_dist")  #                   (N, M)
    if among is images:
        distances.fill_diagonal_(math.inf)
    values, index = distances.kthvalue(k, dim=1)  #                                       (N,), (N,)
    return values / (255 * math.sqrt(768)), index


def diversity(real, fake):
    """Mean distance of a fake image to its nearest other fake one, over the same for real ones.

    real, fake: uint8 (N, 3, S, S), equally many. 1 is right, towards 0 is collapse. Equal real
    images count once, and as many fake ones are used as then remain; nan if it is one.
    """
    check(len(real) == len(fake), f"{len(real)} real, {len(fake)} fake images: expected as many")
    real = real.unique(dim=0)  #                                                        (M, 3, S, S)
    fake = fake[: len(real)]  #                                                         (M, 3, S, S)
    if len(real) == 1:
        return math.nan
    return (nearest(fake, fake)[0].mean() / nearest(real, real)[0].mean()).item()


def coverage(real, fake, k=5):
    """Share of real images with a fake one as near as their k-th real neighbour (arXiv 2002.09797).

    real: uint8 (N, 3, S, S), fake: (M, 3, S, S). Higher is better; real against real reads 0.97.
    """
    check(len(real) > k, f"{len(real)} real images: expected more than k={k}")
    covered = nearest(real, fake)[0] <= nearest(real, real, k)[0]  #                            (N,)
    return covered.float().mean().item()


def pick(images, n, seed=0):
    """n of the images at random, uint8 (n, 3, S, S) on the CPU, in the order they had."""
    check(0 < n <= len(images), f"n={n}: expected 1 to {len(images)}, the number of images")
    random = torch.Generator().manual_seed(int(seed))
    index = torch.randperm(len(images), generator=random)[:n].sort().values  #                  (n,)
    return images[index.to(images.device)].cpu()


def pick_measured(held_out, n, seed=0):
    """Up to n of the held-out images."""
    n = min(n, len(held_out))
    check(n > 5, f"{n} of {len(held_out)} held-out images: expected 6 or more to measure on")
    return pick(held_out, n, seed)


def measure(real, fake, seed=0):
    """Every metric of fake images against as many real ones. None where there is no number."""
    return {
        "swd": sliced_wasserstein(real, fake, seed),
        "coverage": coverage(real, fake),
        "diversity": or_none(diversity(real, fake)),
    }


def or_none(value):
    """JSON has no nan."""
    return value if math.isfinite(value) else None


def evaluate(run, held_out, others, n=1024, seed=0):
    """A record for results/table.json: every metric of n samples against n held-out images.

    Their reference, what the metrics read on n other real images, stands beside: swd_floor,
    coverage_real, diversity_real. n: at most as many as there are.
    """
    check(run.history, f"this run has no record yet ({run.stopped}): call train again")
    real = pick_measured(held_out, min(n, len(others)), seed)  #                       (n, 3, S, S)
    n = len(real)
    last = run.history[-1]
    floor = measure(real, pick(others, n, seed), seed)
    return {
        "image_size": run.config.image_size,
        "width": run.config.width,
        "seed": run.config.seed,
        "images_seen": last["images"],
        "seconds": last["seconds"],
        "d_loss": or_none(last["d_loss"]),
        "g_loss": or_none(last["g_loss"]),
        **measure(real, sample(run, n, seed), seed),
        "measured_on": n,
        "swd_floor": floor["swd"],
        "coverage_real": floor["coverage"],
        "diversity_real": floor["diversity"],
        **run.environment,
    }


# ------------------------------------------------------------------------------------------- plots


def show_images(images, title="", columns=6):
    """A grid of uint8 images (N, 3, S, S)."""
    check_images(images)
    columns = min(columns, len(images))
    grid = make_grid(images, columns, padding=1, pad_value=255).permute(1, 2, 0)  #        (H, W, 3)
    height, width, _ = grid.shape
    figure = Figure((10, 10 * height / width + 0.3), layout="constrained", dpi=72)
    ax = figure.subplots()
    ax.imshow(grid.numpy(), interpolation="nearest" if width < 1000 else "auto")
    ax.set(title=title, xticks=[], yticks=[])
    return figure


def compare(runs, n=6, seed=0):
    """One row of n samples for each run of one image size, the same noise in every row."""
    rows = torch.cat([sample(run, n, seed) for run in runs.values()])
    figure = show_images(rows, columns=n)
    middles = (np.arange(len(runs)) + 0.5) * (rows.shape[-1] + 1)
    figure.axes[0].set_yticks(middles, list(runs))
    return figure


def plot_losses(run, title="losses"):
    """Losses with the values they should approach, D's mean logits, and the collapse alarm."""
    figure = Figure((8, 4.8), layout="constrained", dpi=80)
    losses, logits, alarm = figure.subplots(3, 1, sharex=True)
    losses.set_yscale("symlog", linthresh=1e-3)  # 0.001 is not 0: D learns on; may be negative
    losses.yaxis.set_major_formatter("{x:g}")
    plot_history(losses, run, title, d_loss="D", g_loss="G")
    if losses.get_ylim()[0] > 0.05:  # else the decades are ticks enough
        losses.yaxis.set_major_locator(FixedLocator((0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)))
    plot_history(logits, run, "D's mean logit", d_real="real images", d_fake="generated images")
    plot_history(alarm, run, "diversity (real: 1; red: collapse)", diversity="256 samples")
    fair = LOSSES[run.config.loss].equilibrium(run.config.label_smoothing)
    for level, line in zip(fair or (), list(losses.lines)):
        losses.axhline(level, color=line.get_color(), ls="--", label=f"equilibrium, {level:.2f}")
    alarm.axhline(1, ls="--")
    alarm.axhspan(0, 0.3, color="C3", alpha=0.15)
    alarm.set(ylim=0, xlabel="thousand images seen")
    for ax in (losses, logits, alarm):  # beside the title, where no curve is
        ax.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=4, fontsize=8, frameon=False)
    return figure


def plot_history(ax, run, title, **labels):
    """Numbers of the history, each with its label, over the images seen."""
    for name, label in labels.items():
        records = [record for record in run.history if name in record]
        images = [record["images"] / 1000 for record in records]
        ax.plot(images, [record[name] for record in records], ".-", ms=3, lw=1, label=label)
    ax.set_title(title, loc="left")


# -------------------------------------------------------------------------------- faster penalties


def linear_layers(discriminator):
    """D's layers in their order. Raise unless each is a convolution with biases or a LeakyReLU."""
    layers = [layer for layer in discriminator.modules() if not list(layer.children())]
    for layer in layers:
        has_bias = getattr(layer, "bias", True) is not None
        is_known = type(layer) in (nn.Conv2d, nn.LeakyReLU) and has_bias
        check(is_known, f"{layer}: expected nn.Conv2d with biases or nn.LeakyReLU; use d_step")
    return layers


def d_step_linear(discriminator, optimizer, real, fake, config, precision=FLOAT32):
    """`d_step` without a double backward: 4 passes through D, not 6. See `choose_d_step`.

    A D of convolutions and LeakyReLU is linear between its kinks: D(x) = <v, x> + b. For each
    convolution k, with weights W_k and biases b_k:

        v      grad_x D(x), the gradient that is penalised
        x_k    what enters convolution k when x goes through D
        v_k    what enters convolution k when v goes through D, with the kinks of x, no biases
        s_k    the gradient of D(x) by what convolution k gives
        w      the gradient of the loss by the logit D(x)

    The loss gives dW_k = s_k (outer) w x_k. The penalty gamma/2 |v|^2 has the gradient
    gamma <v, dv>, the left v held fixed: that of D's linear part at v, because a kink has no second
    derivative. It gives s_k (outer) gamma v_k. So dW_k = s_k (outer) u_k with
    u_k = w x_k + gamma v_k. One pass of u = w x + gamma v through D gives all of them:
    u_{k+1} = kinks(W_k u_k + w b_k). Only x meets the biases, so they count w times in it, and
    db_k = w s_k.
    Passes: x; back, for v and s; u; back, for the weights.
    """
    layers = linear_layers(discriminator)
    discriminator.requires_grad_(True)
    optimizer.zero_grad()
    n = len(real)

    # x through D, and back; m generated images, N = n + m
    x = torch.cat([real, fake]).detach().requires_grad_()  #                            (N, 3, S, S)
    passed = [x]  # what enters the first layer, and what each returns               (N, c, s, s)
    with precision.autocast():
        for layer in layers:
            passed.append(layer(passed[-1]))
    logits = passed[-1].flatten().float()  #                                                    (N,)
    v, *slopes = torch.autograd.grad(logits.sum(), passed)  #  each of the shape of one of `passed`

    # the loss and the penalty, and their gradients: w by each logit, gamma v by v
    logits = logits.detach().requires_grad_()  #                                                (N,)
    v.requires_grad_()
    d_real, d_fake = logits.split([n, len(fake)])  #                                      (n,), (m,)
    d_loss = LOSSES[config.loss].d(d_real, d_fake, config.label_smoothing)  #                     ()
    squares = v.square().sum(dim=(1, 2, 3))  #                                                  (N,)
    penalty = config.r1 / 2 * squares[:n].mean() + config.r2 / 2 * squares[n:].mean()  #          ()
    w, gamma_v = torch.autograd.grad(precision.scaler.scale(d_loss + penalty), [logits, v])
    w = w.view(-1, 1, 1, 1)  #                                                          (N, 1, 1, 1)

    # u through D, at the kinks of x, and from each convolution back to its weights.
    # before: what entered the layer; slope: the gradient of D(x) by what it gave.
    u = torch.addcmul(gamma_v, w, x.detach())  #                                        (N, 3, S, S)
    for layer, before, slope in zip(layers, passed, slopes):
        if isinstance(layer, nn.LeakyReLU):
            u = torch.where(before > 0, u, layer.negative_slope * u)  #                 (N, c, s, s)
            continue
        with precision.autocast():
            u = F.conv2d(u.detach(), layer.weight, None, layer.stride, layer.padding)
        u = u + w * layer.bias.view(-1, 1, 1)  #                                        (N, c, s, s)
        u.backward(slope)
    precision.step(optimizer)
    return torch.stack([d_loss, d_real.mean(), d_fake.mean(), penalty]).detach()  #             (4,)


def choose_d_step(discriminator, real, fake, config):
    """`d_step_linear` where there are penalties and it is exact for this D, else `d_step`.

    It is tried with weights and images in float64, on up to 4 images, so that a D whose layers are
    known but whose forward does something else with them is found out.
    """
    if config.r1 + config.r2 == 0:
        return d_step
    try:
        linear = gradient_of(d_step_linear, discriminator, real[:4], fake[:4], config)
    except (ValueError, RuntimeError) as error:  # other layers, or they do not follow each other
        say(f"Penalties by a double backward: the linear form fails ({describe(error)}).")
        return d_step
    exact = gradient_of(d_step, discriminator, real[:4], fake[:4], config)
    difference = ((linear - exact).norm() / exact.norm()).item()
    if difference < 1e-3:
        return d_step_linear
    say(f"Penalties by a double backward: the linear form is off by {difference:.1%} for this D.")
    return d_step


def gradient_of(take_step, discriminator, real, fake, config):
    """The gradient of all weights that `take_step` takes, as one vector."""
    twin = copy.deepcopy(discriminator).double()  # in float32 a GPU may compute in TF32
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.0)
    take_step(twin, optimizer, real.double(), fake.double(), config)
    for weight in twin.parameters():
        if weight.grad is None:  # the linear form has not seen it
            weight.grad = torch.zeros_like(weight)
    return torch.cat([weight.grad.flatten() for weight in twin.parameters()])
