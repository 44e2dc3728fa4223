"""How fast cspgan.py trains beside the loop that everyone writes: same files, networks and batch.

    python scripts/benchmark.py            # minutes: results/benchmark.json and benchmark.png
    python scripts/benchmark.py --quick    # does it run? Too small to mean anything

The reference is the loop of PyTorch's DCGAN example and of the course's solutions: ImageFolder, a
DataLoader without workers that decodes and resizes in every epoch, float32, D's weights not frozen
while G learns, `.item()` in each step, a double backward for penalties. Against it: `load_faces`
and `Training`, as `train` uses them. "step": steps on data that lies ready. "end_to_end": later
epochs with all that brings the data (drawn faces, JPEG of 178x218), and the module's record. Both
run in one process, where the module's settings (cuDNN's benchmark, denormal numbers as 0) help the
reference too, by turns in rounds of short blocks; the first round warms up. A figure is the median
of the rounds, a ratio that of their ratios. share_of_peak: FLOPs of convolutions and products in
all passes, over the best product of large matrices here in the same precision. side_by_side, on a
CPU: two runs of converged, one here and one in a second process, with one thread each, until the
later one ends, against one after the other here with two threads.
"""
import argparse
import contextlib
import json
import multiprocessing
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
import torch.nn.functional as F
import torchvision
from matplotlib.figure import Figure
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from torchvision import datasets, transforms

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import cspgan as cs  # noqa: E402

FIELDS = ("image_size", "width", "batch_size", "files", "rounds", "block_s", "side_steps", "matrix")
SIZES = {"quick": (16, 8, 16, 128, 2, 0.01, 2, 256), "cpu": (64, 64, 32, 1000, 5, 0.9, 60, 2048),
         "cuda": (128, 1024, 128, 4000, 5, 0.9, 0, 8192)}
MEASURES = ("end_to_end", "step")

class Reference:
    """The loop as it is usually written. root: a folder of folders of images."""

    def __init__(self, config, root, device):
        self.config, self.device, self.steps = config, device, 0
        prepare = [transforms.Resize(config.image_size), transforms.CenterCrop(config.image_size)]
        prepare += [transforms.RandomHorizontalFlip()] * config.flip + [transforms.ToTensor()]
        prepare += [transforms.Normalize((0.5,) * 3, (0.5,) * 3)] * (config.head == "tanh")
        files = datasets.ImageFolder(root, transforms.Compose(prepare))
        self.loader = DataLoader(files, config.batch_size, shuffle=True, drop_last=True)
        make, betas = cs.GENERATORS[config.generator], (config.beta1, config.beta2)
        self.generator, self.kept = make(config).to(device), make(config).to(device)
        self.discriminator = cs.Discriminator(config).to(device)
        self.opt_g = torch.optim.Adam(self.generator.parameters(), config.lr_g, betas)
        self.opt_d = torch.optim.Adam(self.discriminator.parameters(), config.lr_d, betas)

    def train(self, batches):
        return [self.learn(real.to(self.device)) for real, _ in batches]

    def learn(self, real):
        """A step of D and one of G. Returns both losses, the penalty, and what D says."""
        config, ones = self.config, torch.ones(len(real), device=self.device)
        paired, bce = config.loss == "relativistic", F.binary_cross_entropy
        z = torch.randn(len(real), config.z_dim, device=self.device)     # (N, z_dim)
        self.discriminator.zero_grad()
        fake = self.generator(z)                                         # (N, 3, S, S)
        x_real, x_fake = (x.detach().requires_grad_(config.r1 > 0) for x in (real, fake))
        d_real, d_fake = self.discriminator(x_real), self.discriminator(x_fake)  # (N,) each
        d_loss = (F.softplus(d_fake - d_real).mean() if paired else
                  bce(torch.sigmoid(d_real), ones) + bce(torch.sigmoid(d_fake), 0 * ones))
        penalty = torch.zeros_like(d_loss)
        for r, logits, x in ((config.r1, d_real, x_real), (config.r2, d_fake, x_fake)):
            if r:
                (v,) = torch.autograd.grad(logits.sum(), x, create_graph=True)  # (N, 3, S, S)
                penalty = penalty + r / 2 * v.square().sum(dim=(1, 2, 3)).mean()
        (d_loss + penalty).backward()
        self.opt_d.step()
        self.generator.zero_grad()
        logits = self.discriminator(fake)                                # (N,)
        g_loss = (F.softplus(self.discriminator(real) - logits).mean() if paired else
                  bce(torch.sigmoid(logits), ones))
        g_loss.backward()
        self.opt_g.step()
        self.steps += 1
        if config.ema_images:
            cs.update_ema(self.kept, self.generator, config, self.steps)
        return [x.item() for x in (d_loss, g_loss, penalty, d_real.mean(), d_fake.mean())]

def advance(training, steps):
    for _ in range(steps):
        training.advance()

def seconds(do, *arguments):
    """Wall time of do(*arguments), with all that it starts on a GPU."""
    begun = perf_counter()
    do(*arguments)
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()  # so what was before has ended too
    return perf_counter() - begun

def count_flops(do):
    """Of convolutions and matrix products; a multiplication and an addition are two."""
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = contextlib.nullcontext()  # its hooks cannot bear autograd.grad
    counter.mod_tracker.parents = {"Global"}
    with counter:
        do()
    return counter.get_total_flops()

def peak_flops(precision, side, device):
    """A second, of the best of ten products of large matrices; float32 as convolutions have it."""
    a, b = torch.randn(2, side, side, device=device).to(precision)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32
    return 2 * side**3 / min(seconds(torch.mm, a, b) for _ in range(10))

def measure_recipe(config, root, faces, setting, device):
    """{variant: its figures}, see the header."""
    n, half = config.batch_size, cs.half_for(config, faces, device)
    training = cs.Training(config, faces, device, half)
    seconds(advance, training, 3)  # the first steps are slower
    steps = round(setting["block_s"] * 3 / seconds(advance, training, 3))
    steps = max(2, min(steps, len(faces) // n))  # of every block
    reference = Reference(config, root, device)
    ready = [[x.to(device) for x in next(iter(reference.loader))]] * steps
    blocks = {
        ("reference", "step"): lambda: reference.train(ready),
        ("module", "step"): lambda: advance(training, steps),
        ("reference", "end_to_end"): lambda: reference.train(islice(reference.loader, steps)),
        ("module", "end_to_end"): lambda: (advance(training, steps), training.record())}
    rounds, found = [], {}
    for turn in range(1 + setting["rounds"]):
        order = [*blocks][:: -1 if turn % 2 else 1]  # nobody always comes after the same one
        rounds.append({key: steps * n / seconds(blocks[key]) for key in order})
    del rounds[0]
    for name, precision in (("reference", torch.float32), ("module", half or torch.float32)):
        speed = {m: median(r[name, m] for r in rounds) for m in MEASURES}
        ratios = {m: [r[name, m] / r["reference", m] for r in rounds] for m in MEASURES}
        flops = count_flops(blocks[name, "step"]) / (steps * n)
        share = flops * speed["step"] / peak_flops(precision, setting["matrix"], device)
        found[name] = {"images_per_second": speed, "ratio": {m: median(ratios[m]) for m in ratios},
                       "ratios": ratios, "flops_per_image": flops, "share_of_peak": share,
                       "precision": str(precision), "repeats": len(rounds)}
    return found

def train_seconds(config, faces, threads):
    torch.set_num_threads(threads)
    return cs.train(config, torch.from_numpy(faces), progress=False).history[-1]["seconds"]

def measure_side_by_side(config, faces, setting):
    """Images per second of two runs together, see the header."""
    images, data = setting["side_steps"] * config.batch_size, faces.numpy()
    one, two = (config.but(seed=seed, epochs=1, epoch_images=images) for seed in (0, 1))
    in_turn, at_once, spawn = [], [], multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn) as other:
        for _ in range(1 + setting["rounds"]):
            in_turn.append(2 * images / sum(train_seconds(mine, data, 2) for mine in (one, two)))
            job = other.submit(train_seconds, two, data, 1)
            at_once.append(2 * images / max(train_seconds(one, data, 1), job.result()))
    ratios = [b / a for a, b in zip(in_turn, at_once)][1:]  # the first round warmed up
    return {"images_per_second": {"one_after_the_other": median(in_turn[1:]),
                                  "side_by_side": median(at_once[1:])},
            "ratio": median(ratios), "ratios": ratios, "repeats": len(ratios)}

def show(result, file):
    """Print images per second and ratios, and draw them as bars, in pairs."""
    rows, setting = [], result["settings"]
    for recipe, variants in result["recipes"].items():
        for m in MEASURES:
            rows += [(f"{recipe}, {m.replace('_', ' ')}: {name}", row["images_per_second"][m],
                      row["ratio"][m]) for name, row in variants.items()]
    if side := result["side_by_side"]:
        for (name, rate), ratio in zip(side["images_per_second"].items(), (1, side["ratio"])):
            rows.append((f"two of converged, {name.replace('_', ' ')}", rate, ratio))
    figure = Figure((8, 0.9 + 0.3 * len(rows)), layout="constrained")
    ax, places = figure.subplots(), [-k - k // 2 / 2 for k in range(len(rows))]
    for k, (name, rate, ratio) in enumerate(rows):
        print(f"{name:45}{rate:10,.0f} images/s{ratio:8.2f} x")
        ax.barh(places[k], rate, 0.9, color=("silver", "C0")[k % 2])
        ax.text(rate, places[k], f" {rate:,.0f}" + f"   {ratio:.2f} x" * (k % 2), va="center")
    ax.set_yticks(places, [name for name, *_ in rows])
    ax.set(xlabel="images per second", xlim=(0, 1.3 * max(rate for _, rate, _ in rows)))
    ax.spines[["top", "right"]].set_visible(False)
    figure.suptitle("{image_size} px, width {width}, batch {batch_size}, ".format(**setting)
                    + f"{result['hardware']}, PyTorch {torch.__version__}", fontsize=11)
    figure.savefig(file, dpi=150)

def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "results")
    parser.add_argument("--quick", action="store_true", help="too small to mean anything")
    options, device = parser.parse_args(), cs.best_device()
    setting = dict(zip(FIELDS, SIZES["quick" if options.quick else device.type]))
    result = {key: cs.environment(device)[key] for key in ("hardware", "code", "date")}
    versions = {module.__name__: module.__version__ for module in (torch, torchvision)}
    result["versions"] = {"python": sys.version.split()[0], **versions}
    result.update(settings=setting, recipes={}, side_by_side=None)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as root:
        source = Path(root, "faces")
        source.mkdir()
        for k, face in enumerate(cs.toy_faces(setting["files"], 128)):
            transforms.functional.to_pil_image(face).resize((178, 218)).save(source / f"{k}.jpg")
        faces = cs.load_faces(source, setting["image_size"], root)
        for name in ("h1_bn_leaky", "converged"):
            config = cs.PRESETS[name].but(**{key: setting[key] for key in FIELDS[:3]})
            config = config.but(lr_g=1e-4, lr_d=1e-4, lr_width=0)  # at this no width blows up
            result["recipes"][name] = measure_recipe(config, root, faces, setting, device)
        if device.type == "cpu":
            result["side_by_side"] = measure_side_by_side(config, faces, setting)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "benchmark.json").write_text(json.dumps(result, indent=1, allow_nan=False))
    show(result, options.out / "benchmark.png")

if __name__ == "__main__":
    main()
