"""What `converged` should set at 128 px: its penalties' gamma, mirrored faces, the running mean.

    python scripts/gamma.py faces.zip    # two hours on one core; trials that are there are kept

Fills results/gamma.json, {trial: record}: 51,200 images at 128 px and width 128, batch 32, seed 0,
measured on held-out faces at the end; and under "running mean" what other half-lives give in the
same run, for they do not change the training. Draws results/figures/gamma.png.
"""

import copy
import json
import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import cspgan as cs  # noqa: E402

FILE = ROOT / "results" / "gamma.json"
BASE = cs.CONVERGED.but(image_size=128, width=128, batch_size=32, epochs=4, epoch_images=12_800)
TRIALS = {f"gamma {gamma}": BASE.but(r1=gamma, r2=gamma) for gamma in (2, 8, 16, 4)}
TRIALS["gamma 2, not mirrored"] = BASE.but(flip=False)
HALF_LIVES = (500, 2_000, 5_000)  # images; `converged` has at most a tenth of all: 5,120


def trial(config, faces, held_out):
    """The record of a run, with the SWD of its generator under other running means."""
    training = cs.Training(config, faces, cs.best_device())
    means = {life: copy.deepcopy(training.generator) for life in HALF_LIVES}
    while training.step < training.steps:
        training.advance()
        for life, mean in means.items():
            other = config.but(ema_images=life)
            cs.update_ema(mean, training.generator, other, training.step)
        if training.step % 50 == 0 or training.step == training.steps:
            training.record()
    means[0] = training.generator  # no mean
    record = cs.evaluate(as_run(training, training.kept), held_out, faces)
    record["history"] = training.run.history
    record["running mean"] = {}
    real = cs.pick(held_out, record["measured_on"])  # what evaluate has measured on
    for life, mean in means.items():
        fake = cs.sample(as_run(training, mean), len(real))
        record["running mean"][life] = cs.sliced_wasserstein(real, fake)
    return record


def as_run(training, generator):
    return cs.Run(training.config, training.run.history, generator, [], training.run.environment)


def draw(found):
    figure = Figure((10, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    trials = {}
    for gamma in (2, 4, 8, 16):
        name = f"gamma {gamma}"
        if name in found:
            trials[name] = found[name]
    draw_swd(left, trials)
    draw_duel(right, trials)
    figure.savefig(ROOT / "results/figures/gamma.png", dpi=90)


def draw_swd(ax, trials):
    """A line for each size of the pyramid, and one for their mean."""
    records = list(trials.values())
    for scale in records[0]["swd"]:
        line = [record["swd"][scale] for record in records]
        label = "mean" if scale == "avg" else f"at {scale} px"
        ax.plot(list(trials), line, "o-", lw=1, label=label)
    ax.set(title="SWD x1e3 after 51,200 images, lower is better", ylim=(0, None))
    ax.legend(fontsize=8, loc=(0.6, 0.4))


def draw_duel(ax, trials):
    """D's loss by images seen."""
    for name, record in trials.items():
        images = [point["images"] / 1000 for point in record["history"]]
        d_loss = [point["d_loss"] for point in record["history"]]
        ax.plot(images, d_loss, lw=1, label=name)
    fair, _ = cs.LOSSES[BASE.loss].equilibrium()
    ax.axhline(fair, color="grey", ls="--", lw=1, label="equilibrium")
    ax.set(title="D's loss", xlabel="thousand images seen", ylim=(0, None))
    ax.legend(fontsize=8, ncols=3, loc="lower right")


def filed():
    """What has been measured so far."""
    if not FILE.exists():
        return {}
    return json.loads(FILE.read_text())


def main():
    torch.set_num_threads(1)
    faces, held_out = cs.load_faces(sys.argv[1], 128)
    for name in sys.argv[2:] or TRIALS:  # some of them, or all
        if name in filed():
            continue
        record = trial(TRIALS[name], faces, held_out)
        found = {**filed(), name: record}  # read again: another process may measure the others
        text = json.dumps(found, indent=0)
        FILE.write_text(text.replace("NaN", "null"))
        print(name, record["swd"], record["diversity"], record["coverage"], flush=True)
    draw(filed())


if __name__ == "__main__":
    main()
