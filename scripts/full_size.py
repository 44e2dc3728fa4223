"""128 px and width 1024, the assignment's own size: `converged`, h3 of the course, the control.

    python scripts/full_size.py faces.zip    # minutes on an H100, by count three hours on a T4

Trains each of them for 512,000 images, in results/latest/full_size/, and goes on where it was
stopped. Leaves results/full_size.json, {name: config, environment, history, swd}, with the floor
and the distances to the nearest training faces, pictures of `converged` in results/figures/, and
its generator, made small, in results/generators/converged/.
"""

import io
import json
import sys
import zlib
from pathlib import Path

import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import nn
from torchvision.utils import make_grid

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import cspgan as cs  # noqa: E402

NAMES = ("converged", "h3_smooth_tanh", "dcgan_paper")
CHANGES = {"epochs": 20, "epoch_images": 25_600}
SIZE = 128
RUNS = ROOT / "results" / "latest" / "full_size"
FIGURES = ROOT / "results" / "figures"
SMALL = ROOT / "results" / "generators" / "converged"
FILE = ROOT / "results" / "full_size.json"


# ----------------------------------------------------------------------------------------- pictures


def draw_pictures(run):
    """Sixty samples, and the film of the training."""
    samples = cs.sample(run, 60, seed=1)  #                                        (60, 3, 128, 128)
    picture(samples, columns=12).save(FIGURES / "full_size.jpg", quality=90)
    save_film(run)


def picture(images, columns):
    grid = make_grid(images, columns, padding=1, pad_value=255)  #                         (3, H, W)
    return Image.fromarray(grid.permute(1, 2, 0).numpy())


def save_film(run):
    frames = [picture(images[:16], columns=8).quantize(96) for _, images in run.snapshots]
    duration = [300] * (len(frames) - 1) + [3000]  # milliseconds
    path = FIGURES / "full_size_film.gif"
    frames[0].save(path, save_all=True, append_images=frames[1:], loop=0, duration=duration)


def draw_curves(found):
    """SWD by images seen, a line for each recipe."""
    figure = Figure(figsize=(8, 2.15), layout="constrained")
    ax = figure.subplots()
    for name in NAMES:
        if name not in found:  # of a file that an earlier list of names left
            continue
        measured = [record for record in found[name]["history"] if "swd" in record]
        images = [record["images"] / 1000 for record in measured]
        swd = [record["swd"] for record in measured]
        ax.plot(images, swd, "o-", ms=3, lw=1, label=name)
    floor = found["floor"]["swd_floor"]["avg"]
    ax.axhline(floor, color="grey", ls="--", lw=1, label="real faces")
    ax.set(title="SWD x1e3 at 128 px and width 1024", xlabel="thousand images seen", yscale="log")
    ax.legend(fontsize=8)
    figure.savefig(FIGURES / "full_size_swd.png", dpi=90)


# ------------------------------------------------------------------------------ the small generator


def shrink(run, folder):
    """Write a run.pt.gz for `load_run`: weights as whole steps of a part of their channel's RMS."""
    generator = run.generator.cpu()
    kept = {}
    for name, value in generator.state_dict().items():
        kept[name] = value.half() if value.is_floating_point() else value
    for name, layer in generator.named_modules():
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)) and layer.weight.numel() > 20_000:
            kept[f"{name}.weight"] = round_weights(layer)
    state = {
        "identity": vars(run.config),
        "history": run.history,
        "snapshots": [],
        "environment": run.environment,
        "kept": kept,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.pt.gz").write_bytes(compress(state))
    (folder / "config.json").write_text(json.dumps(vars(run.config), indent=1))


def round_weights(layer):
    """Nearly the layer's weights, as (int8, scale); a scale for each output channel."""
    weight = layer.weight.detach()
    others = (1, 2, 3)
    if isinstance(layer, nn.ConvTranspose2d):  # its output channels are the second dimension
        others = (0, 2, 3)
    step = 0.10  # what most layers need
    if weight.numel() > 1_200_000:  # these are most of the file
        step = 0.32
    rms = weight.square().mean(others, keepdim=True).sqrt()
    scale = step * rms
    whole = (weight / scale).round().clamp(-127, 127)
    return whole.to(torch.int8), scale


def compress(state):
    """What torch.save writes, as gzip. Nothing in it repeats: only its bytes are coded."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    gzip_format = 31  # for zlib: the largest window, and gzip's header
    coder = zlib.compressobj(9, zlib.DEFLATED, gzip_format, 9, zlib.Z_HUFFMAN_ONLY)
    return coder.compress(buffer.getvalue()) + coder.flush()


# --------------------------------------------------------------------------------------- the record


def train_and_measure(name, faces, held_out):
    """What is filed of one recipe, and what the metrics read on real faces."""
    config = cs.PRESETS[name].but(**CHANGES)
    watch = cs.watch(held_out, 1024)
    run = cs.train(config, faces, RUNS / name, on_epoch=watch)
    measured = cs.evaluate(run, held_out, faces)
    floor_keys = ("measured_on", "swd_floor", "coverage_real", "diversity_real")
    floor = {key: measured[key] for key in floor_keys}
    filed = {
        "config": vars(config),
        "environment": run.environment,
        "history": [rounded(record) for record in run.history],
        "swd": measured["swd"],
    }
    return filed, floor


def rounded(record):
    return {key: round(value, 4) for key, value in record.items()}


def nearest(images, faces):
    """How far the nearest training face is: [mean, lowest]."""
    distances, _ = cs.nearest(images, faces)
    return [round(distances.mean().item(), 4), round(distances.min().item(), 4)]


def main():
    faces, held_out = cs.load_faces(sys.argv[1], SIZE)
    found = {"floor": {}}
    for name in NAMES:
        found[name], found["floor"] = train_and_measure(name, faces, held_out)
    n = found["floor"]["measured_on"]  # 1024, or all that are held out
    real = cs.pick(held_out, n)
    run = cs.load_run(RUNS / "converged")
    draw_pictures(run)
    draw_curves(found)
    found["nearest"] = {
        "samples": nearest(cs.sample(run, n), faces),
        "held_out": nearest(real, faces),
    }
    shrink(run, SMALL)
    small = cs.sample(cs.load_run(SMALL), n)
    found["converged"]["swd_rounded"] = cs.sliced_wasserstein(real, small)
    text = json.dumps(found, indent=0)
    FILE.write_text(text.replace("NaN", "null"))


if __name__ == "__main__":
    main()
