"""What SWD, diversity and coverage read where the answer is known: the report's figure of them.

    python scripts/ruler.py faces.zip    # ten minutes of a CPU core

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


def spoil(faces):
    """{what was done: uint8 (N, 3, S, S)}"""
    half = torch.nn.functional.avg_pool2d(faces.float(), 2)
    noise = torch.randn(faces.shape, generator=torch.Generator().manual_seed(0))
    is_left = torch.arange(faces.shape[3]) < faces.shape[3] // 2
    return {
        "other real faces": faces,
        "blurred": models.as_bytes(half.repeat_interleave(2, 2).repeat_interleave(2, 3)),
        "with noise": models.as_bytes(faces + 25 * noise),
        "the left half, mirrored": torch.where(is_left, faces, faces.flip(3)),
        "three faces, repeated": faces[:3].repeat(len(faces) // 3 + 1, 1, 1, 1)[: len(faces)],
    }


def draw_ruler(readings, pictures):
    figure = Figure((9, 1.72 * len(readings)), layout="constrained", dpi=80)
    for ax, (words, read) in zip(figure.subplots(len(readings), 1), readings.items()):
        ax.imshow(torch.cat(list(pictures[words][:6]), dim=2).permute(1, 2, 0).numpy())
        ax.set(xticks=[], yticks=[])
        swd = f"SWD {read['swd']['avg']:.1f}"
        rest = f"diversity {read['diversity']:.2f}, coverage {read['coverage']:.2f}"
        ax.set_title(f"{words}: {swd}, {rest}", loc="left", fontsize=12)
    figure.savefig(RESULTS / "figures" / "ruler.png")


def main(source, n=900):
    faces, held_out = cs.load_faces(source, 64)
    real = cs.pick(held_out, n)
    drawn = cs.sample(cs.load_run(RESULTS / "generators" / "converged"), 16)  #    (16, 3, 128, 128)
    small = torch.nn.functional.avg_pool2d(drawn.float(), 2)
    vae = models.train_vae(faces)
    made = {
        "independent pixels": models.independent_pixels(faces, n),
        "an autoencoder (VAE)": models.draw(vae, n),
    }
    images = {**spoil(cs.pick(faces, n)), **made}
    readings = {words: cs.measure(real, found) for words, found in images.items()}
    (RESULTS / "ruler.json").write_text(json.dumps(readings, indent=1))
    draw_ruler(readings, {**spoil(models.as_bytes(small)), **made})


if __name__ == "__main__":
    main(*sys.argv[1:])
