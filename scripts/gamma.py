"""What `converged` should set at 128 px: its penalties' gamma, mirrored faces, the running mean.

    python scripts/gamma.py faces.zip           # two hours on one core; trials that are there are kept

Fills results/gamma.json, {trial: record}: 51,200 images at 128 px and width 128, batch 32, seed 0,
measured on held-out faces at the end; and under "running mean" what other half-lives give in the
same run, for they do not change the training. Draws results/figures/gamma.png."""
import copy, json, sys
from pathlib import Path

import torch
from matplotlib.figure import Figure

sys.path.insert(0, str(ROOT := Path(__file__).parents[1]))
import cspgan as cs

FILE = ROOT / "results" / "gamma.json"
BASE = cs.CONVERGED.but(image_size=128, width=128, batch_size=32, epochs=4, epoch_images=12_800)
TRIALS = {**{f"gamma {g}": BASE.but(r1=g, r2=g) for g in (2, 8, 16, 4)},
          "gamma 2, not mirrored": BASE.but(flip=False)}
HALF_LIVES = (500, 2_000, 5_000)  # images; `converged` has at most a tenth of all: 5,120

def trial(config, images, held_out, floor):
    """The record of a run, with those of its generator under other running means."""
    training = cs.Training(config, images, cs.best_device())
    means = {life: copy.deepcopy(training.generator) for life in HALF_LIVES}
    while training.step < training.steps:
        training.advance()
        for life, mean in means.items():
            cs.update_ema(mean, training.generator, config.but(ema_images=life), training.step)
        if training.step % 50 == 0 or training.step == training.steps:
            training.record()
    def measured(generator):
        run = cs.Run(config, training.history, generator, [], training.environment)
        return cs.evaluate(run, held_out, floor)
    means[0] = training.generator  # no mean
    return {**measured(training.kept), "history": training.history,
            "running mean": {life: measured(mean)["swd"] for life, mean in means.items()}}

def draw(found):
    swd, duel = (figure := Figure((10, 3), layout="constrained")).subplots(1, 2)
    names = [name for name in (f"gamma {g}" for g in (2, 4, 8, 16)) if name in found]
    for scale in found[names[0]]["swd"]:
        label = "mean" if scale == "avg" else f"at {scale} px"
        swd.plot(names, [found[name]["swd"][scale] for name in names], "o-", lw=1, label=label)
    for name in names:
        line = found[name]["history"]
        duel.plot([r["images"] / 1000 for r in line], [r["d_loss"] for r in line], lw=1, label=name)
    duel.axhline(cs.equilibrium(BASE)[0], color="grey", ls="--", lw=1, label="equilibrium")
    swd.set(title="SWD x1e3 after 51,200 images, lower is better", ylim=(0, None))
    duel.set(title="D's loss", xlabel="thousand images seen", ylim=(0, None))
    swd.legend(fontsize=8, loc=(0.6, 0.4)), duel.legend(fontsize=8, ncols=3, loc="lower right")
    figure.savefig(ROOT / "results/figures/gamma.png", dpi=90)

def filed():
    return json.loads(FILE.read_text()) if FILE.exists() else {}

if __name__ == "__main__":
    torch.set_num_threads(1)
    images, held_out = cs.hold_out(cs.load_faces(sys.argv[1], 128))
    floor = cs.reference(held_out, images)
    for name in sys.argv[2:] or TRIALS:  # some of them, or all
        if name not in filed():
            record = trial(TRIALS[name], images, held_out, floor)
            FILE.write_text(json.dumps({**filed(), name: record}, indent=0).replace("NaN", "null"))
            print(name, record["swd"], record["diversity"], record["coverage"], flush=True)
    draw(filed())
