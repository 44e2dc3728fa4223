"""The runs behind the report: the path to `converged`, its parts, additions, claims; several seeds.

    python scripts/evidence.py faces.zip              # all of them; about 95 hours of one CPU core
    python scripts/evidence.py faces.zip path_3_pace  # some of them

At 64 px and width 128, with half the presets' batch and 25,600 images in an epoch. They train side
by side in results/latest/evidence/NAME/seedK, and the same call goes on where it was stopped.
What is finished is measured and filed: a record in results/table.json, and history.json,
losses.png and samples.png (24 samples, pixel for pixel) in results/runs/NAME/seedK.
`python scripts/figures.py` then draws results/figures/path.png.
"""

import json
import sys
from pathlib import Path

from PIL import Image
from torchvision.utils import make_grid

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import cspgan as cs  # noqa: E402

RUNS = ROOT / "results" / "latest" / "evidence"
RESULTS = ROOT / "results"
TABLE = RESULTS / "table.json"
H1 = cs.PRESETS["h1_bn_leaky"]
CONVERGED = cs.PRESETS["converged"]

RECIPES = {}

# The path from h1_bn_leaky to converged: each step on top of the last.
step = H1.but(head="tanh", loss="bce_logits")
RECIPES["path_1_tanh_logits"] = step
step = step.but(d_norm=False, init="he", r1=2.0, r2=2.0)
RECIPES["path_2_penalties"] = step
step = step.but(beta1=0.0, beta2=0.9, lr_g=2e-3, lr_d=2e-3, lr_width=64, lr_end=0.1)
RECIPES["path_3_pace"] = step
step = step.but(d_wider=2)
RECIPES["path_4_wide_d"] = step
step = step.but(ema_images=20_000)
RECIPES["path_5_ema"] = step
RECIPES["h1_bn_leaky"] = H1
RECIPES["dcgan_paper"] = cs.PRESETS["dcgan_paper"]

# Parts of converged, which is within a fifth of itself without them.
RECIPES["converged"] = CONVERGED
RECIPES["without_he"] = CONVERGED.but(init="dcgan")
RECIPES["without_ema"] = CONVERGED.but(ema_images=0)
RECIPES["without_bn_in_g"] = CONVERGED.but(block_norm="none")
RECIPES["without_flip"] = CONVERGED.but(flip=False)
RECIPES["without_pairs"] = CONVERGED.but(loss="bce_logits")
RECIPES["cspup_last"] = CONVERGED.but(ladder="cspup_last")
THRICE = list(RECIPES)  # from three seeds, those below from two

# Parts without which it is another recipe, and longer runs.
RECIPES["without_penalties"] = CONVERGED.but(r1=0.0, r2=0.0)
plain = {"beta1": 0.5, "beta2": 0.999, "lr_g": 2e-4, "lr_d": 2e-4, "lr_width": 0, "lr_end": 1.0}
RECIPES["without_pace"] = CONVERGED.but(**plain)
RECIPES["without_wide_d"] = CONVERGED.but(d_wider=1)
RECIPES["without_cspup"] = CONVERGED.but(generator="dcgan")
RECIPES["path_2_without_he"] = RECIPES["path_2_penalties"].but(init="dcgan")
longer = ("converged", "dcgan", "dcgan_paper", "h1_bn_leaky", "h2_l2_big_batch", "h3_smooth_tanh")
for name in longer:
    RECIPES[f"{name}_20"] = cs.PRESETS[name].but(epochs=20)
for name in ("h1_bn_leaky", "h2_l2_big_batch", "h3_smooth_tanh"):  # five epochs of CelebA
    RECIPES[f"{name}_40"] = cs.PRESETS[name].but(epochs=40)
RECIPES["h0_more_epochs_80"] = cs.PRESETS["h0_more_epochs"].but(epochs=80)

# Is a wide D better because it is wide? `adam` divides both networks' rates by G's width, so a D
# twice as wide learns twice as fast as the width rule would have it. And which part of the pace?
RECIPES["path_3_double_rate_d"] = RECIPES["path_3_pace"].but(lr_d=4e-3)
RECIPES["path_4_half_rate_d"] = RECIPES["path_4_wide_d"].but(lr_d=1e-3)
RECIPES["path_2_rates"] = RECIPES["path_2_penalties"].but(lr_g=2e-3, lr_d=2e-3, lr_width=64)

# The sections of the course, and all that the students tried.
for name, config in cs.PRESETS.items():
    RECIPES.setdefault(name, config)

# Additions, each alone on h1_bn_leaky.
RECIPES["h1_with_penalties"] = H1.but(d_norm=False, r1=2.0, r2=2.0)
RECIPES["h1_with_wide_d"] = H1.but(d_wider=2)
RECIPES["h1_with_pairs"] = H1.but(loss="relativistic")
RECIPES["h1_with_falling_rates"] = H1.but(lr_end=0.1)
RECIPES["h1_with_ema"] = H1.but(ema_images=20_000)

# The course's claims, where they can be decided.
RECIPES["h1_bce_logits"] = H1.but(loss="bce_logits")
RECIPES["h1_lazy_d"] = H1.but(d_every=2)
RECIPES["h1_shallow_d"] = H1.but(d_fewer=1)
RECIPES["h1_half_batch"] = H1.but(batch_size=64)
RECIPES["h1_adam_default"] = H1.but(beta1=0.9)
RECIPES["h1_tanh_block"] = H1.but(block_act="tanh")
RECIPES["h1_relu_block"] = H1.but(block_act="relu")


def jobs_of(names):
    """[(name, config, folder)] of each seed, the first seeds first."""
    jobs = []
    for seed in range(3):
        for name in names:
            if seed == 2 and name not in THRICE:
                continue
            config = RECIPES[name].but(image_size=64, width=128, epoch_images=25_600, seed=seed)
            config = config.but(batch_size=config.batch_size // 2)
            jobs.append((name, config, RUNS / name / f"seed{seed}"))
    return jobs


def file_run(name, folder, faces, held_out, data):
    """Copy what a finished run left to results/, and its record to the table."""
    run = cs.load_run(folder)
    record = {"preset": name, "data": data, **cs.evaluate(run, held_out, faces, 900)}
    target = RESULTS / "runs" / name / folder.name
    target.mkdir(parents=True, exist_ok=True)
    about = {"config": vars(run.config), "environment": run.environment, "history": run.history}
    (target / "history.json").write_text(json.dumps(about, allow_nan=False))
    cs.plot_losses(run).savefig(target / "losses.png")
    save_samples(run.snapshots[-1][1][:24], target / "samples.png")
    table = [other for other in json.loads(TABLE.read_text()) if not is_same(other, record)]
    TABLE.write_text(json.dumps([*table, record], indent=1, allow_nan=False))


def is_same(a, b):
    names = ("preset", "seed", "data", "image_size", "width", "images_seen")
    return all(a[name] == b[name] for name in names)


def save_samples(images, path):
    grid = make_grid(images, 12, padding=0).permute(1, 2, 0)  #                     (2 S, 12 S, 3)
    Image.fromarray(grid.numpy()).save(path)


def main(source, *names):
    unknown = set(names) - set(RECIPES)
    cs.check(not unknown, f"{unknown}: expected some of {list(RECIPES)}")
    jobs = jobs_of(names or RECIPES)
    to_train = [(config, folder) for _, config, folder in jobs]
    unfinished = cs.train_all(to_train, source, measured_on=900)
    faces, held_out = cs.load_faces(source, 64)
    for name, _, folder in jobs:
        if str(folder) in unfinished:
            print(f"{folder}: not finished, {unfinished[str(folder)]}")
        else:
            file_run(name, folder, faces, held_out, Path(source).name)


if __name__ == "__main__":
    main(*sys.argv[1:])
