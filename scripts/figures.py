"""The report's drawn figures, from what is on file: faces, block, path, long runs, single changes.

    python scripts/figures.py

Leaves faces.jpg, rows.png, block.png, path.png, time.png and changes.png in results/figures/.
Needs no data and no GPU.
No row has more than six faces: on a phone each is then 60 pixels wide.
"""

import json
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from torchvision.utils import make_grid

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import cspgan as cs  # noqa: E402

RESULTS = ROOT / "results"
FIGURES = RESULTS / "figures"
ROWS = {
    "h3_smooth_tanh": "h3_smooth_tanh, the last section of the course",
    "dcgan_paper": "dcgan_paper, DCGAN's recipe at width 128",
    "converged": "converged",
}
PATH = {  # a row each, and what it changes
    "h1_bn_leaky": "the course's h1: BatchNorm and LeakyReLU",
    "path_1_tanh_logits": "+ tanh, BCE from logits",
    "path_2_penalties": "+ R1 and R2, D without BatchNorm, He's weights",
    "path_3_pace": "+ the pace: Adam (0, 0.9), higher rates that fall",
    "path_4_wide_d": "+ a D twice as wide",
    "path_5_ema": "+ a running mean of G",
    "converged": "+ pairs, mirrored faces: converged",
}
LONG = {  # runs of 512,000 or 1,024,000 images: a seed with slopes on file, and a colour
    "h1_bn_leaky_40": (1, "C1"),
    "h2_l2_big_batch_40": (1, "C4"),
    "h3_smooth_tanh_40": (1, "C2"),
    "dcgan_paper_20": (0, "C0"),
    "converged_20": (1, "C3"),
}
SCALES = {"64": "C0", "32": "C1", "16": "C2"}  # pixels a side, and their colour
CHANGES = {  # one thing changed in h1_bn_leaky: the course's claims, then parts of converged
    "h1_bn_leaky": "",
    "h1_bce_logits": "loss from D's logits",
    "h1_lazy_d": "D every second step",
    "h1_shallow_d": "a shallower D",
    "h1_half_batch": "half the batch",
    "h1_adam_default": "beta1 0.9 instead of 0.5",
    "h1_tanh_block": "tanh for LeakyReLU in the block",
    "h1_relu_block": "ReLU for LeakyReLU in the block",
    "h2_l2_big_batch": "twice the batch, and L2",
    "smooth_labels": "smoothed labels",
    "tanh_head": "tanh at G's end",
    "h3_rates": "faster rates",
    "h3_smooth_tanh": "these three",
    "h1_with_penalties": "R1 and R2, D without BatchNorm",
    "h1_with_pairs": "pairs",
    "h1_with_wide_d": "a D twice as wide",
    "h1_with_falling_rates": "falling rates",
    "h1_with_ema": "a running mean of G",
}
PARTS = {  # one thing changed in converged
    "converged": "",
    "without_penalties": "",
    "without_pace": "h1's rates and betas",
    "without_wide_d": "a D of G's width",
    "without_cspup": "DCGAN's generator",
    "without_pairs": "BCE from logits",
    "without_flip": "",
    "without_ema": "",
    "without_bn_in_g": "G without BatchNorm",
    "without_he": "weights N(0, 0.02)",
    "cspup_last": "deconvolution first, CSPup to the end",
}


def draw_faces():
    """24 samples of the full-size generator, at their own size, as they come."""
    run = cs.load_run(RESULTS / "generators" / "converged")
    images = cs.sample(run, 24)  #                                                 (24, 3, 128, 128)
    grid = make_grid(images, 6, padding=2, pad_value=255).permute(1, 2, 0)  #              (H, W, 3)
    Image.fromarray(grid.numpy()).save(FIGURES / "faces.jpg", quality=92)


def draw_samples(ax, name, words, seed=0):
    """Six samples of a run on file, with words above them."""
    picture = Image.open(RESULTS / "runs" / name / f"seed{seed}" / "samples.png")
    expected = "expected 768 pixels, as scripts/evidence.py files them"
    cs.check(picture.width == 768, f"{picture.filename} is {picture.width} wide: {expected}")
    ax.imshow(np.asarray(picture.convert("RGB"))[:64, : 6 * 64])
    ax.set(xticks=[], yticks=[])
    ax.set_title(words, loc="left", fontsize=14)


def draw_rows():
    """The course's best, the control and `converged`, from the same noise."""
    figure = Figure((9, 5.0), layout="constrained", dpi=60)
    for ax, (name, words) in zip(figure.subplots(len(ROWS), 1), ROWS.items()):
        draw_samples(ax, name, words)
    figure.savefig(FIGURES / "rows.png")


def draw_path():
    """A row of samples for each step; below them SWD by scale, a point for each seed."""
    table = json.loads((RESULTS / "table.json").read_text())
    figure = Figure((9, 1.2 * len(PATH) + 2.2), layout="constrained", dpi=60)
    *rows, chart = figure.subplots(len(PATH) + 1, 1, height_ratios=[1.2] * len(PATH) + [2.2])
    for k, (name, words) in enumerate(PATH.items()):
        draw_samples(rows[k], name, f"{k}  {words}")
        records = [record for record in table if record["preset"] == name]
        for scale, colour in SCALES.items():
            swd = [record["swd"][scale] for record in records]
            chart.plot(swd, [k] * len(swd), colour + "o", alpha=0.7)
    for scale, colour in SCALES.items():
        floor = table[0]["swd_floor"][scale]
        chart.axvline(floor, color=colour, ls="--", label=f"{scale} px, real faces {floor:.1f}")
    chart.set_title("SWD by scale, lower is better: a point for each seed", loc="left", fontsize=14)
    chart.set(xscale="log", xlim=(5, 400), ylim=(len(PATH) - 0.5, -0.5), ylabel="step")
    chart.set_yticks(range(len(PATH)))
    chart.set_xticks([10, 30, 100, 300], ["10", "30", "100", "300"])
    chart.legend(loc="lower right")
    chart.grid(alpha=0.3)
    figure.savefig(FIGURES / "path.png")


def draw_time():
    """Samples of two long runs; below them the slope of D over the images seen."""
    figure = Figure((9, 4.3), layout="constrained", dpi=60)
    top, bottom, chart = figure.subplots(3, 1, height_ratios=(1.35, 1.35, 1.9))
    draw_samples(top, "h3_smooth_tanh_40", "h3 after 1,024,000 images", seed=1)
    draw_samples(bottom, "dcgan_paper_20", "DCGAN's recipe after 512,000 images")
    for name, (seed, colour) in LONG.items():
        path = RESULTS / "runs" / name / f"seed{seed}" / "history.json"
        history = json.loads(path.read_text())["history"]
        records = [record for record in history if "grad_d" in record]
        images = [record["images"] / 1000 for record in records]
        slopes = [record["grad_d"] for record in records]
        chart.plot(images, slopes, ".-", color=colour, label=name)
    chart.set_title("|grad D| at real images, pixels in [-1, 1]", loc="left", fontsize=14)
    chart.set(yscale="log", xlabel="thousand images seen")
    chart.set_yticks([0.1, 1, 10], ["0.1", "1", "10"])
    chart.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    chart.grid(alpha=0.3)
    figure.savefig(FIGURES / "time.png")


def draw_changes():
    """SWD and diversity of h1 and of `converged` with one change each, a point for each seed."""
    table = json.loads((RESULTS / "table.json").read_text())
    groups = [CHANGES, PARTS]
    heights = [len(changes) for changes in groups]
    figure = Figure((9.6, 0.146 * sum(heights) + 0.75), layout="constrained", dpi=80)
    panels = figure.subplots(
        2, 2, sharex="col", sharey="row", width_ratios=(3, 2), height_ratios=heights
    )
    for (left, right), changes in zip(panels, groups):
        draw_group(left, right, changes, table)
    panels[0, 0].set_title("SWD (dashed: real faces)", fontsize=11)
    panels[0, 1].set_title("diversity (red: collapse)", fontsize=11)
    panels[1, 0].set(xscale="log", xlim=(8, 300))
    panels[1, 0].set_xticks([10, 30, 100, 300], ["10", "30", "100", "300"])
    panels[1, 1].set(xlim=(0, 1.2))
    figure.savefig(FIGURES / "changes.png")


def draw_group(left, right, changes, table):
    """A row for each recipe; the band is the range of the first, which the others change."""
    swd, diversity = {}, {}
    for name in changes:
        records = [record for record in table if record["preset"] == name]
        swd[name] = [record["swd"]["avg"] for record in records]
        diversity[name] = [record["diversity"] for record in records]
    base, *_ = swd.values()
    left.axvspan(min(base), max(base), color="C0", alpha=0.15)
    left.axvline(table[0]["swd_floor"]["avg"], color="grey", ls="--", lw=1)
    right.axvspan(0, 0.3, color="C3", alpha=0.15)
    right.axvline(1, color="grey", ls="--", lw=1)
    for y, name in enumerate(changes):
        left.plot(swd[name], [y] * len(swd[name]), "C0o", alpha=0.7)
        right.plot(diversity[name], [y] * len(swd[name]), "C0o", alpha=0.7)
    labels = [f"{name}: {words}" if words else name for name, words in changes.items()]
    left.set_yticks(range(len(changes)), labels)
    left.set(ylim=(len(changes) - 0.5, -0.5))
    for ax in (left, right):
        ax.grid(alpha=0.3)


def draw_block():
    """The block with its two branches, and the ladder of blocks from noise to image."""
    figure = Figure((8.4, 5.2), layout="constrained", dpi=84)
    block, ladder = figure.subplots(1, 2, width_ratios=(6, 5))
    for ax in (block, ladder):
        ax.set(xlim=(0, 10), ylim=(0, 10))
        ax.axis("off")
    block.set_title("CSPup(in, out)")
    box(block, 5, 9.3, "x: in, H, W")
    box(block, 2.5, 7.6, "first half: in/2")
    box(block, 7.5, 7.6, "second half: in/2")
    right = ("conv 1x1, act", "deconv, x2", "conv 3x3, act", "conv 3x3")
    box(block, 2.5, 5.0, "deconv, x2", "#cfe3f5")
    for y, words in zip((6.3, 5.0, 3.7, 2.4), right):
        box(block, 7.5, y, words, "#cfe3f5")
    box(block, 5, 0.7, "sum: out, 2H, 2W")
    arrows = [(5, 9.3, 2.5, 7.6), (5, 9.3, 7.5, 7.6), (2.5, 7.6, 2.5, 5.0), (2.5, 5.0, 5, 0.7)]
    arrows += [(7.5, y, 7.5, y - 1.3) for y in (7.6, 6.3, 5.0, 3.7)]
    arrows += [(7.5, 2.4, 5, 0.7)]
    for arrow in arrows:
        draw_arrow(block, *arrow)
    draw_ladder(ladder)
    figure.savefig(FIGURES / "block.png")


def draw_ladder(ax):
    ax.set_title("the generator, a ladder of them")
    rungs = ["z: 100, 1x1", "1024, 4x4", "512, 8x8", "256, 16x16", "128, 32x32", "64, 64x64"]
    rungs.append("image: 3, 128x128")
    for k, words in enumerate(rungs):
        y = 9.3 - 1.43 * k
        box(ax, 5, y, words)
        if k:
            draw_arrow(ax, 5, y + 1.43, 5, y)
            step = "deconv" if k == 6 else "CSPup"
            ax.text(5.2, y + 0.71, step, va="center", fontsize=10, color="C0")


def box(ax, x, y, words, colour="white"):
    style = {"boxstyle": "round,pad=0.4", "facecolor": colour}
    ax.text(x, y, words, ha="center", va="center", fontsize=11, bbox=style, zorder=2)


def draw_arrow(ax, x, y, to_x, to_y):
    style = {"arrowstyle": "-|>", "color": "0.3", "shrinkA": 12, "shrinkB": 12}
    ax.annotate("", (to_x, to_y), (x, y), arrowprops=style, zorder=1)


if __name__ == "__main__":
    draw_faces()
    draw_rows()
    draw_block()
    draw_path()
    draw_time()
    draw_changes()
