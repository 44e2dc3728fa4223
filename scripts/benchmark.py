"""How fast cspgan.py trains beside the loop that everyone writes: same files, networks and batch.

    python scripts/benchmark.py            # minutes: results/benchmark.json and benchmark.png
    python scripts/benchmark.py --quick    # does it run? Too small to mean anything

The reference is the loop of PyTorch's DCGAN example and of the course's solutions: ImageFolder, a
DataLoader without workers that decodes and resizes in every epoch, float32, D's weights not frozen
while G learns, `.item()` in each step, a double backward for penalties. Against it: `load_faces`
and `Training`, as `train` uses them.

"step": steps on data that lies ready. "end_to_end": later epochs with all that brings the data
(drawn faces, JPEG of 178x218), and the module's record. Both run in one process, where the module's
settings (cuDNN's benchmark, denormal numbers as 0) help the reference too, by turns in rounds of
short blocks; the first round warms up. A figure is the median of the rounds, a ratio that of their
ratios. share_of_peak: FLOPs of convolutions and products in all passes, over the best product of
large matrices here in the same precision.

side_by_side, on a CPU: two runs of converged, one here and one in a second process, with one thread
each, until the later one ends, against one after the other here with two threads.
"""

import argparse
import contextlib
import json
import multiprocessing
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import partial
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
from torchvision.transforms.functional import to_pil_image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import cspgan as cs  # noqa: E402

FIELDS = ("image_size", "width", "batch_size", "files", "rounds", "block_s", "side_steps", "matrix")
SIZES = {
    "quick": (16, 8, 16, 128, 2, 0.01, 2, 256),
    "cpu": (64, 64, 32, 1000, 5, 0.9, 60, 2048),
    "cuda": (128, 1024, 128, 4000, 5, 0.9, 0, 8192),
}
RECIPES = ("h1_bn_leaky", "converged")
MEASURES = ("end_to_end", "step")


# --------------------------------------------------------------------------------- what is measured


class Reference:
    """The loop as it is usually written. root: a folder of folders of images."""

    def __init__(self, config, root, device):
        self.config = config
        self.device = device
        self.steps = 0
        files = datasets.ImageFolder(root, preparation(config))
        self.loader = DataLoader(files, config.batch_size, shuffle=True, drop_last=True)
        self.generator = cs.make_generator(config).to(device)
        self.kept = cs.make_generator(config).to(device)
        self.discriminator = cs.make_discriminator(config).to(device)
        betas = (config.beta1, config.beta2)
        self.opt_g = torch.optim.Adam(self.generator.parameters(), config.lr_g, betas)
        self.opt_d = torch.optim.Adam(self.discriminator.parameters(), config.lr_d, betas)

    def train(self, batches):
        for real, _ in batches:
            self.learn(real.to(self.device))

    def train_on_files(self, steps):
        self.train(islice(self.loader, steps))

    def learn(self, real):
        """A step of D and one of G. Returns both losses, the penalty, and what D says."""
        z = torch.randn(len(real), self.config.z_dim, device=self.device)  #              (N, z_dim)
        fake = self.generator(z)  #                                                     (N, 3, S, S)
        d_loss, penalty, d_real, d_fake = self.learn_d(real, fake)
        g_loss = self.learn_g(real, fake)
        self.steps += 1
        if self.config.ema_images:
            cs.update_ema(self.kept, self.generator, self.config, self.steps)
        return [x.item() for x in (d_loss, g_loss, penalty, d_real.mean(), d_fake.mean())]

    def learn_d(self, real, fake):
        config = self.config
        real = real.detach().requires_grad_(config.r1 > 0)  #                           (N, 3, S, S)
        fake = fake.detach().requires_grad_(config.r2 > 0)  #                           (N, 3, S, S)
        self.discriminator.zero_grad()
        d_real = self.discriminator(real)  #                                                    (N,)
        d_fake = self.discriminator(fake)  #                                                    (N,)
        if config.loss == "relativistic":
            d_loss = F.softplus(d_fake - d_real).mean()
        else:
            d_loss = bce(d_real, 1) + bce(d_fake, 0)
        penalty = torch.zeros_like(d_loss)
        if config.r1:
            penalty = penalty + config.r1 / 2 * squared_gradient(d_real, real)
        if config.r2:
            penalty = penalty + config.r2 / 2 * squared_gradient(d_fake, fake)
        (d_loss + penalty).backward()
        self.opt_d.step()
        return d_loss, penalty, d_real, d_fake

    def learn_g(self, real, fake):
        self.generator.zero_grad()
        d_fake = self.discriminator(fake)  #                                                    (N,)
        if self.config.loss == "relativistic":
            d_real = self.discriminator(real)  #                                                (N,)
            g_loss = F.softplus(d_real - d_fake).mean()
        else:
            g_loss = bce(d_fake, 1)
        g_loss.backward()
        self.opt_g.step()
        return g_loss


def preparation(config):
    """What is done with an image in every epoch."""
    steps = [transforms.Resize(config.image_size), transforms.CenterCrop(config.image_size)]
    if config.flip:
        steps.append(transforms.RandomHorizontalFlip())
    steps.append(transforms.ToTensor())
    if config.head == "tanh":
        steps.append(transforms.Normalize((0.5,) * 3, (0.5,) * 3))
    return transforms.Compose(steps)


def bce(logits, target):
    return F.binary_cross_entropy(torch.sigmoid(logits), torch.full_like(logits, target))


def squared_gradient(logits, images):
    """Mean |grad_x D(x)|^2, by a double backward."""
    (v,) = torch.autograd.grad(logits.sum(), images, create_graph=True)  #              (N, 3, S, S)
    return v.square().sum(dim=(1, 2, 3)).mean()


def advance(training, steps):
    for _ in range(steps):
        training.advance()


def advance_and_record(training, steps):
    advance(training, steps)
    training.record()


# ------------------------------------------------------------------------------- how it is measured


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
    a, b = torch.randn(2, side, side, device=device).to(getattr(torch, precision))
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32
    best = min(seconds(torch.mm, a, b) for _ in range(10))
    return 2 * side**3 / best


def measure_recipe(config, root, faces, setting, device):
    """{variant: its figures}, see the header."""
    precision = cs.choose_precision(config, faces, device)
    training = cs.Training(config, faces, device, precision)
    reference = Reference(config, root, device)
    steps = block_length(training, setting["block_s"])
    images = steps * config.batch_size
    blocks = make_blocks(reference, training, steps)
    rounds = time_rounds(blocks, images, setting["rounds"])
    found = {}
    for name, its_precision in (("reference", "float32"), ("module", precision)):
        row = compare(rounds, name)
        flops = count_flops(blocks[name, "step"]) / images
        peak = peak_flops(its_precision, setting["matrix"], device)
        row["flops_per_image"] = flops
        row["share_of_peak"] = flops * row["images_per_second"]["step"] / peak
        row["precision"] = its_precision
        row["repeats"] = len(rounds)
        found[name] = row
    return found


def block_length(training, wanted):
    """How many steps take so many seconds: at least two, at most all images once."""
    advance(training, 3)  # the first steps are slower
    steps = round(wanted * 3 / seconds(advance, training, 3))
    most = len(training.images) // training.config.batch_size
    return max(2, min(steps, most))


def make_blocks(reference, training, steps):
    """{(variant, measure): what is timed}."""
    batch = next(iter(reference.loader))
    ready = [[x.to(reference.device) for x in batch]] * steps
    return {
        ("reference", "step"): partial(reference.train, ready),
        ("module", "step"): partial(advance, training, steps),
        ("reference", "end_to_end"): partial(reference.train_on_files, steps),
        ("module", "end_to_end"): partial(advance_and_record, training, steps),
    }


def time_rounds(blocks, images, rounds):
    """[{block: images per second}], one dictionary for each round."""
    found = []
    for turn in range(1 + rounds):
        order = list(blocks)
        if turn % 2:
            order.reverse()  # nobody always comes after the same one
        found.append({key: images / seconds(blocks[key]) for key in order})
    return found[1:]  # the first one warms up


def compare(rounds, name):
    """One variant's speed in the rounds, and its ratio to the reference's."""
    row = {"images_per_second": {}, "ratio": {}, "ratios": {}}
    for measure in MEASURES:
        speeds = [speed[name, measure] for speed in rounds]
        ratios = [speed[name, measure] / speed["reference", measure] for speed in rounds]
        row["images_per_second"][measure] = median(speeds)
        row["ratio"][measure] = median(ratios)
        row["ratios"][measure] = ratios
    return row


def train_seconds(config, faces, threads):
    torch.set_num_threads(threads)
    run = cs.train(config, torch.from_numpy(faces), progress=False)
    return run.history[-1]["seconds"]


def measure_side_by_side(config, faces, setting):
    """Images per second of two runs together, see the header."""
    images = setting["side_steps"] * config.batch_size
    one = config.but(seed=0, epochs=1, epoch_images=images)
    two = one.but(seed=1)
    data = faces.numpy()  # a tensor would go to the other process through shared memory
    in_turn = []
    at_once = []
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn) as other:
        for _ in range(1 + setting["rounds"]):
            both = train_seconds(one, data, threads=2) + train_seconds(two, data, threads=2)
            in_turn.append(2 * images / both)
            job = other.submit(train_seconds, two, data, threads=1)
            here = train_seconds(one, data, threads=1)
            at_once.append(2 * images / max(here, job.result()))
    del in_turn[0], at_once[0]  # the first round warmed up
    ratios = [b / a for a, b in zip(in_turn, at_once)]
    speed = {"one_after_the_other": median(in_turn), "side_by_side": median(at_once)}
    return {
        "images_per_second": speed,
        "ratio": median(ratios),
        "ratios": ratios,
        "repeats": len(ratios),
    }


# ------------------------------------------------------------------------------------ what is shown


def list_rows(result):
    """[(name, images per second, ratio)], in pairs: the reference, and what is held against it."""
    rows = []
    for recipe, variants in result["recipes"].items():
        for measure in MEASURES:
            for name, row in variants.items():
                label = f"{recipe}, {measure.replace('_', ' ')}: {name}"
                rows.append((label, row["images_per_second"][measure], row["ratio"][measure]))
    side = result["side_by_side"]
    if side:
        ratios = (1, side["ratio"])
        for (name, rate), ratio in zip(side["images_per_second"].items(), ratios):
            rows.append((f"two of converged, {name.replace('_', ' ')}", rate, ratio))
    return rows


def show(result, file):
    """Print images per second and ratios, and draw them as bars, in pairs."""
    rows = list_rows(result)
    setting = result["settings"]
    figure = Figure((8, 0.9 + 0.3 * len(rows)), layout="constrained")
    ax = figure.subplots()
    places = [-k - k // 2 / 2 for k in range(len(rows))]  # half a bar between two pairs
    for k, (name, rate, ratio) in enumerate(rows):
        print(f"{name:45}{rate:10,.0f} images/s{ratio:8.2f} x")
        label = f" {rate:,.0f}"
        if k % 2:
            label += f"   {ratio:.2f} x"
        ax.barh(places[k], rate, 0.9, color=("silver", "C0")[k % 2])
        ax.text(rate, places[k], label, va="center")
    ax.set_yticks(places, [name for name, _, _ in rows])
    fastest = max(rate for _, rate, _ in rows)
    ax.set(xlabel="images per second", xlim=(0, 1.3 * fastest))
    ax.spines[["top", "right"]].set_visible(False)
    size = "{image_size} px, width {width}, batch {batch_size}".format(**setting)
    title = f"{size}, {result['hardware']}, PyTorch {torch.__version__}"
    figure.suptitle(title, fontsize=11)
    figure.savefig(file, dpi=150)


# --------------------------------------------------------------------------------------------- main


def measure(setting, device):
    """All that is filed."""
    about = cs.environment(device, "float32")  # the precision stands with each recipe's figures
    result = {key: about[key] for key in ("hardware", "version", "date")}
    result["versions"] = {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
    }
    result["settings"] = setting
    result["recipes"] = {}
    result["side_by_side"] = None
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as root:
        files = Path(root, "files")  # the cache must not lie in it: ImageFolder would look there
        draw_files(files / "faces", setting["files"])
        faces, _ = cs.load_faces(files / "faces", setting["image_size"], Path(root, "cache"))
        for name in RECIPES:
            config = adapt(name, setting)
            result["recipes"][name] = measure_recipe(config, files, faces, setting, device)
        if device.type == "cpu":
            config = adapt("converged", setting)
            result["side_by_side"] = measure_side_by_side(config, faces, setting)
    return result


def draw_files(folder, n):
    """n drawn faces as files of CelebA's format."""
    folder.mkdir(parents=True)
    for k, face in enumerate(cs.toy_faces(n, 128)):
        to_pil_image(face).resize((178, 218)).save(folder / f"{k}.jpg")


def adapt(name, setting):
    """A preset at the size that is measured, with rates at which no width blows up."""
    size = {key: setting[key] for key in ("image_size", "width", "batch_size")}
    return cs.PRESETS[name].but(lr_g=1e-4, lr_d=1e-4, lr_width=0, **size)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "results")
    parser.add_argument("--quick", action="store_true", help="too small to mean anything")
    options = parser.parse_args()
    device = cs.best_device()
    sizes = SIZES["quick" if options.quick else device.type]
    result = measure(dict(zip(FIELDS, sizes)), device)
    options.out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result, indent=1, allow_nan=False)
    (options.out / "benchmark.json").write_text(text)
    show(result, options.out / "benchmark.png")


if __name__ == "__main__":
    main()
