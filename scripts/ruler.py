"""What SWD, diversity and coverage read where the answer is known: the report's figure of them.

    python scripts/ruler.py faces.zip    # half an hour of a busy CPU core

Real faces are spoiled in four ways; two models of the course's first homework draw others. Leaves
the readings in results/ruler.json, and results/figures/ruler.png. CelebA's faces may not be shown:
the pictures are faces that `converged` drew at full size, spoiled in the same way.
"""

import json
import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]
import first_homework as models  # noqa: E402

import cspgan as cs  # noqa: E402

RESULTS = ROOT / "results"
SHOWN = {"other real faces": "other real faces (here: from noise)"}


def spoil(faces):
    """{what was done: uint8 (N, 3, S, S)}"""
    small = torch.nn.functional.avg_pool2d(faces.float(), 2)
    blurred = small.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    random = torch.Generator().manual_seed(0)
    noise = 25 * torch.randn(faces.shape, generator=random)
    size = faces.shape[-1]
    is_left = torch.arange(size) < size // 2
    which = torch.arange(len(faces)) % 3
    return {
        "other real faces": faces,
        "blurred": models.as_bytes(blurred),
        "with noise": models.as_bytes(faces + noise),
        "the left half, mirrored": torch.where(is_left, faces, faces.flip(3)),
        "three faces, repeated": faces[which],
    }


def draw_ruler(readings, pictures):
    figure = Figure((9, 1.72 * len(readings)), layout="constrained", dpi=60)
    axes = figure.subplots(len(readings), 1)
    for ax, (words, read) in zip(axes, readings.items()):
        row = torch.cat(list(pictures[words][:6]), dim=2)  #                           (3, S, 6 S)
        ax.imshow(row.permute(1, 2, 0).numpy())
        ax.set(xticks=[], yticks=[])
        swd = read["swd"]["avg"]
        rest = f"diversity {read['diversity']:.2f}, coverage {read['coverage']:.2f}"
        words = SHOWN.get(words, words)
        ax.set_title(f"{words}: SWD {swd:.1f}, {rest}", loc="left", fontsize=14)
    figure.savefig(RESULTS / "figures" / "ruler.png")


def main(source, n=900):
    faces, held_out = cs.load_faces(source, 64)
    real = cs.pick(held_out, n)
    other = cs.pick(faces, n)
    vae = models.train_vae(faces)
    made = {
        "independent pixels": models.independent_pixels(faces, n),
        "an autoencoder (VAE)": models.draw(vae, n),
    }
    readings = {}
    for words, images in (spoil(other) | made).items():
        readings[words] = cs.measure(real, images)
    (RESULTS / "ruler.json").write_text(json.dumps(readings, indent=1))
    run = cs.load_run(RESULTS / "generators" / "converged")
    drawn = cs.sample(run, 6).float()  #                                            (6, 3, 128, 128)
    shown = models.as_bytes(torch.nn.functional.avg_pool2d(drawn, 2))  #              (6, 3, 64, 64)
    draw_ruler(readings, spoil(shown) | made)


if __name__ == "__main__":
    main(*sys.argv[1:])
