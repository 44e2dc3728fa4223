"""The course's first homework: independent pixels, a variational autoencoder, a detector of blots.

    python scripts/first_homework.py faces.zip    # half an hour of a busy CPU core

Leaves results/figures/blots.png. `scripts/ruler.py` measures what both models draw.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import cspgan as cs  # noqa: E402


class VAE(nn.Module):
    """Images (N, 3, S, S) in [0, 1] -> (reconstructions, KL divergence of their codes (N,))."""

    def __init__(self, size, width=32, code=64):
        super().__init__()
        features = 4 * width * (size // 8) ** 2
        self.encode = nn.Sequential(
            down(3, width),
            down(width, 2 * width),
            down(2 * width, 4 * width),
            nn.Flatten(),
            nn.Linear(features, 2 * code),
        )
        self.decode = nn.Sequential(
            nn.Linear(code, features),
            nn.Unflatten(1, (4 * width, size // 8, size // 8)),
            up(4 * width, 2 * width),
            up(2 * width, width),
            up(width, 3),
            nn.Sigmoid(),
        )

    def forward(self, x):
        mean, log_var = self.encode(x).chunk(2, dim=1)  #                            (N, code) each
        code = mean + (log_var / 2).exp() * torch.randn_like(mean)  #                     (N, code)
        kl = (mean**2 + log_var.exp() - 1 - log_var).sum(1) / 2  #                             (N,)
        return self.decode(code), kl


def down(n_in, n_out):
    return nn.Sequential(nn.Conv2d(n_in, n_out, 4, 2, 1), nn.BatchNorm2d(n_out), nn.ReLU())


def up(n_in, n_out):
    return nn.Sequential(nn.BatchNorm2d(n_in), nn.ReLU(), nn.ConvTranspose2d(n_in, n_out, 4, 2, 1))


def train_vae(faces, steps=1000, noise=0.1):
    """Minimise -log p(x | code) + KL, where a pixel is Gaussian around what is decoded."""
    torch.manual_seed(0)
    vae = VAE(faces.shape[-1])
    optimizer = torch.optim.Adam(vae.parameters(), 1e-3)
    for _ in tqdm(range(steps), "VAE"):
        x = faces[torch.randint(len(faces), (64,))].float() / 255  #                  (64, 3, S, S)
        y, kl = vae(x)
        error = (x - y).square().sum((1, 2, 3)) / (2 * noise**2)  #                           (64,)
        loss = (error + kl).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return vae.eval()


@torch.no_grad()
def draw(vae, n, code=64):
    z = torch.randn(n, code, generator=torch.Generator().manual_seed(0))
    return as_bytes(255 * vae.decode(z))


@torch.no_grad()
def rebuild(vae, images):
    """What the VAE makes of images from the means of their codes, uint8 (N, 3, S, S)."""
    mean, _ = vae.encode(images.float() / 255).chunk(2, dim=1)
    return as_bytes(255 * vae.decode(mean))


def independent_pixels(faces, n):
    """Every value drawn from those that faces have at its place and channel."""
    size = faces.shape[-1]
    random = torch.Generator().manual_seed(0)
    which = torch.randint(len(faces), (n, 3, size, size), generator=random)
    return faces.gather(0, which)


def as_bytes(images):
    return images.round().clamp(0, 255).to(torch.uint8)


# -------------------------------------------------------------------------------------------- blots


def damage(images, radius=0.1):
    """A bright blot somewhere on every image, as a leak on a casting would be."""
    random = torch.Generator().manual_seed(0)
    axis = torch.linspace(0, 1, images.shape[-1])
    y, x = torch.rand(2, len(images), 1, 1, 1, generator=random)
    down = (axis.view(-1, 1) - y).square()  #                                          (N, 1, S, 1)
    across = (axis - x).square()  #                                                    (N, 1, 1, S)
    return torch.where(down + across < radius**2, 255, images)


def excess(vae, images):
    """How much brighter patches of a blot's size are than they are rebuilt, (N, 1, P, P)."""
    difference = images.float() - rebuild(vae, images)
    return nn.functional.avg_pool2d(difference.mean(1, keepdim=True), images.shape[-1] // 5, 1)


def find_blots(vae, held_out):
    """Scores of whole and of damaged faces, and the threshold that 95 of 100 others pass."""
    validation, test = held_out[::2], held_out[1::2]
    usual = excess(vae, validation)

    def score(images):
        deviations = (excess(vae, images) - usual.mean(0)) / usual.std(0)
        return deviations.flatten(1).amax(1)

    return score(test), score(damage(test)), score(validation).quantile(0.95)


def draw_blots(whole, damaged, threshold):
    found = (damaged > threshold).float().mean()
    passed = (whole <= threshold).float().mean()
    print(f"{found:.3f} of the damaged found, {passed:.3f} of the whole passed, {len(whole)} each")
    figure = Figure((8, 3), layout="constrained", dpi=80)
    ax = figure.subplots()
    bins = np.linspace(0, torch.cat([whole, damaged]).quantile(0.99), 40)
    ax.hist(whole, bins, alpha=0.6, label="whole faces")
    ax.hist(damaged, bins, alpha=0.6, label="faces with a blot")
    ax.axvline(threshold, color="k", ls="--", lw=1, label="threshold")
    ax.set_title(
        f"{found:.0%} of the blots are found, {passed:.0%} of the whole faces pass", loc="left"
    )
    ax.set(xlabel="largest excess over the reconstruction, in standard deviations", ylabel="faces")
    ax.legend()
    figure.savefig(ROOT / "results/figures/blots.png")


def main(source):
    faces, held_out = cs.load_faces(source, 64)
    draw_blots(*find_blots(train_vae(faces), held_out))


if __name__ == "__main__":
    main(*sys.argv[1:])
