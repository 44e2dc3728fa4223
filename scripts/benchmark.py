"""How fast cspgan.py is beside the loop that everyone writes: same data, networks and batch, in one process, by turns.

    python scripts/benchmark.py             # measure here, at most 10 minutes: results/benchmark.json and benchmark.png
    python scripts/benchmark.py --quick     # the same in a minute and too small to mean anything: does it run?
    python scripts/benchmark.py --train --images faces.zip     # hours: do the plain and the fast step train alike?

The reference is the training loop of PyTorch's DCGAN example and of the course's solutions: ImageFolder, a DataLoader that
decodes and resizes image by image in every epoch, float32, D's weights not frozen while G learns, `.item()` in each step.
Against it stands the module with everything off (PLAIN), and then with one addition at a time, up to what "auto" chooses.

"step" is a step of D and G on data that lies ready. "later_epochs" are whole epochs with all that brings the data,
"first_epoch" also has the module's decoding of its cache; the reference decodes always. The variants take turns in rounds
of short blocks, each made anew and warmed up. A figure is the median of the rounds, a ratio the median of the rounds' ratios,
so that what else the machine does meets both sides.
"MB peak" is that of ten steps in a process of their own, with some 350 MB of imports on a CPU. FLOPs are counted by PyTorch,
and set against the best product of large matrices of the same precision here. Growth is measured with one thread.
"""

import argparse
import contextlib
import copy
import gc
import io
import json
import math
import multiprocessing
import os
import platform
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from statistics import median

import torch
import torchvision
from matplotlib.figure import Figure
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Subset
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms
from torchvision.datasets import ImageFolder

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import cspgan as cs  # noqa: E402

RECIPES = ("h1_bn_leaky", "converged")  # the course's, and the one with penalties
PLAIN, AUTO = "module, all off", "  = auto"
ADDITIONS = ("memory", "layout", "adam", "penalties", "precision", "graph")  # in this order
GROWTH = (2_000, 20_000, 200_000)
SIZES = {  # px, channels at 4x4, images a step, files, rounds, seconds of a block, N of the growth section
    "quick": {"size": 16, "width": 8, "batch": 16, "files": 128, "rounds": 2, "block": 0.05, "growth": (200, 2_000)},
    "cpu": {"size": 64, "width": 64, "batch": 32, "files": 1000, "rounds": 5, "block": 0.9, "growth": GROWTH},
    "cuda": {"size": 128, "width": 1024, "batch": 128, "files": 6000, "rounds": 5, "block": 1.0, "growth": GROWTH},
}
MEASURES = {"step": "step alone", "first_epoch": "first epoch", "later_epochs": "later epochs, end to end"}
DTYPES = {"float32": torch.float32, **cs.HALF}
CPU = torch.device("cpu")
SECONDS = 560  # no further round begins that would end after so many, as long as there are three
START = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"


# ------------------------------------------------------------------------------------------------ the variants


class Reference:
    """The loop as it is usually written. step() is one on a batch that lies in memory."""

    name = "reference loop"

    def __init__(self, config, root, images, device):
        cs.keep_memory(False)
        self.config, self.device, self.steps = config, device, 0
        low, high = config.pixel_range
        prepare = [transforms.Resize(config.image_size), transforms.CenterCrop(config.image_size)]
        prepare += [transforms.RandomHorizontalFlip()] * config.flip + [transforms.ToTensor()]
        prepare += [transforms.Normalize((0.5,) * 3, (0.5,) * 3)] * (low < 0)
        self.dataset = Subset(ImageFolder(root, transforms.Compose(prepare)), range(images))
        self.loader = DataLoader(self.dataset, config.batch_size, shuffle=True, drop_last=True, num_workers=0)
        self.generator = cs.GENERATORS[config.generator](config).to(device)
        self.discriminator = cs.Discriminator(config).to(device)
        self.kept = copy.deepcopy(self.generator)
        betas = (config.beta1, config.beta2)
        self.opt_g = torch.optim.Adam(self.generator.parameters(), config.lr_g, betas)
        self.opt_d = torch.optim.Adam(self.discriminator.parameters(), config.lr_d, betas)
        self.batch = next(iter(self.loader))[0].to(device)                # (N, 3, S, S)

    def step(self):
        self.learn(self.batch)

    def epoch(self):
        for real, _ in self.loader:
            self.learn(real.to(self.device))

    first_epoch = epoch

    def learn(self, real):
        z = torch.randn(len(real), self.config.z_dim, device=self.device)  # (N, z_dim)
        losses = self.learn_with_penalties(real, z) if self.config.r1 else self.learn_dcgan(real, z)
        self.steps += 1
        return losses

    def learn_dcgan(self, real, z):
        """A step as in PyTorch's DCGAN example. Returns the losses of D and G."""
        criterion, ones = nn.BCELoss(), torch.ones(len(real), device=self.device)
        self.discriminator.zero_grad()
        p = torch.sigmoid(self.discriminator(real))                       # (N,)
        d_real = criterion(p, ones)
        d_real.backward()
        p_real = p.mean().item()
        fake = self.generator(z)                                          # (N, 3, S, S)
        p = torch.sigmoid(self.discriminator(fake.detach()))
        d_fake = criterion(p, 0 * ones)
        d_fake.backward()
        p_fake = p.mean().item()
        self.opt_d.step()
        self.generator.zero_grad()
        p = torch.sigmoid(self.discriminator(fake))
        g_loss = criterion(p, ones)
        g_loss.backward()
        self.opt_g.step()
        return (d_real + d_fake).item(), g_loss.item(), p_real, p_fake, p.mean().item()

    def learn_with_penalties(self, real, z):
        """The same loop with the objective of `converged`: pairs, R1 and R2, falling rates, a running mean of G."""
        config, softplus = self.config, nn.functional.softplus
        fall = config.lr_end + (1 - config.lr_end) * (1 + math.cos(math.pi * self.steps / 10_000)) / 2
        self.opt_d.param_groups[0]["lr"], self.opt_g.param_groups[0]["lr"] = fall * config.lr_d, fall * config.lr_g
        self.discriminator.zero_grad()
        fake = self.generator(z)                                          # (N, 3, S, S)
        x_real, x_fake = real.clone().requires_grad_(), fake.detach().requires_grad_()
        d_real, d_fake = self.discriminator(x_real), self.discriminator(x_fake)  # (N,) each
        d_loss = softplus(d_fake - d_real).mean()
        (v,) = torch.autograd.grad(d_real.sum(), x_real, create_graph=True)
        r1 = config.r1 / 2 * v.square().sum(dim=(1, 2, 3)).mean()
        (v,) = torch.autograd.grad(d_fake.sum(), x_fake, create_graph=True)
        r2 = config.r2 / 2 * v.square().sum(dim=(1, 2, 3)).mean()
        (d_loss + r1 + r2).backward()
        self.opt_d.step()
        self.generator.zero_grad()
        g_loss = softplus(self.discriminator(real) - self.discriminator(fake)).mean()
        g_loss.backward()
        self.opt_g.step()
        new = cs.ema_weight(config, self.steps + 1)
        with torch.no_grad():
            for mean, weight in zip(self.kept.parameters(), self.generator.parameters()):
                mean.mul_(1 - new).add_(weight, alpha=new)
        return d_loss.item(), g_loss.item(), d_real.mean().item(), d_fake.mean().item(), (r1 + r2).item()


class Module:
    """The module's own step and data. Making one also sets whether memory is kept: see cs.keep_memory."""

    def __init__(self, config, root, images, device, cache):
        self.load = partial(cs.load_faces, root / "faces", config.image_size, limit=images)
        with quiet():
            self.training = cs.Training(config, self.load(cache), device)

    def step(self):
        self.training.advance()

    def epoch(self):
        for _ in range(self.training.epoch_steps):
            self.training.advance()
        self.training.record()

    def first_epoch(self):
        with tempfile.TemporaryDirectory() as fresh, quiet():
            self.training.batches = cs.Batches(self.load(fresh), self.training.config, self.training.device)
            self.epoch()


def ladder(config, device):
    """{name: config} from everything off to what "auto" chooses, one addition more in each, that one marked."""
    auto, current = cs.on_hardware(config, device), config.but(**cs.PLAIN)
    found = {PLAIN: current}
    for field in ADDITIONS:
        if getattr(auto, field) != getattr(current, field):
            current = current.but(**{field: getattr(auto, field)})
            found[f"+ {field}={getattr(auto, field)}" + AUTO * (current == auto)] = current
    assert current == auto, f"{auto.label(current)}: not among the additions"
    if device.type == "cpu":
        found["auto + precision=bfloat16"] = auto.but(precision="bfloat16")
    return found


# ------------------------------------------------------------------------------------------------ measuring


def quiet():
    """Without progress bars."""
    return contextlib.redirect_stderr(io.StringIO())


def seconds(do, device):
    """Wall time of do(), with all that it starts on a GPU."""
    wait = partial(torch.cuda.synchronize, device) if device.type == "cuda" else int
    wait()
    begun = time.perf_counter()
    do()
    wait()
    return time.perf_counter() - begun


def repeated(do, times):
    for _ in range(times):
        do()


def summary(values):
    return {"median": median(values), "lowest": min(values), "highest": max(values), "repeats": len(values)}


def in_fresh_process(function, *arguments):
    """What function(*arguments) returns in a process that does nothing else, so that its memory and start are its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context(START)) as pool:
        return pool.submit(function, *arguments).result()


def measure_block(make, steps, images, device):
    """{measure: images per second} of a variant made anew; steps, images: in each of its three blocks."""
    gc.collect()  # the variant before
    variant = make()
    repeated(variant.step, 5 if device.type == "cuda" else 2)  # a GPU's fourth step records the graph
    blocks = {"step": partial(repeated, variant.step, steps), "first_epoch": variant.first_epoch, "later_epochs": variant.epoch}
    return {name: images / seconds(do, device) for name, do in blocks.items()}


def peak_memory_of(make, threads, device):
    """MB, of ten steps in a process of their own: of main memory with all imports, or of the GPU's."""
    torch.set_num_threads(threads)
    repeated(make().step, 10)
    return cs.peak_memory(device)


def count_flops(config, reference, root):
    """Floating-point operations per image of a step: convolutions and products of matrices, a multiplication and addition
    as two, in all passes forward, backward and twice backward. They grow with the batch, so a batch of four tells."""
    small = config.but(batch_size=4, epochs=1, epoch_images=4, precision="float32", graph="off")
    images = torch.randint(256, (4, 3, config.image_size, config.image_size), dtype=torch.uint8)
    step = Reference(small, root, 4, CPU).step if reference else cs.Training(small, images, CPU).advance
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = contextlib.nullcontext()  # its hooks cannot bear a penalty's autograd.grad; the sum needs no modules
    counter.mod_tracker.parents = {"Global"}
    with counter:
        step()
    return counter.get_total_flops() / 4


def peak_gflops(precision, device):
    """What the hardware does at most, measured: the best of ten products of large matrices."""
    side = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, side, side, device=device).to(DTYPES[precision])
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32  # float32 as the convolutions have it
    best = min(seconds(lambda: a @ b, device) for _ in range(10))
    torch.backends.cuda.matmul.allow_tf32 = False
    return 2 * side**3 / best / 1e9


def measure_steps(recipes, root, cache, setting, threads, device, until):
    """{recipe: {variant: its figures}}."""
    makers, blocks, rates, found = {}, {}, {}, {}
    for recipe, config in recipes.items():
        variants = {Reference.name: config.but(**cs.PLAIN), **ladder(config, device)}
        place = cache / recipe  # of one source and size a folder keeps one cache, and recipes have blocks of their own length
        plain = Module(variants[PLAIN], root, 2 * config.batch_size, device, place)
        repeated(plain.step, 2)
        steps = round(setting["block"] / seconds(plain.step, device))
        steps = blocks[recipe] = max(2, min(steps, setting["files"] // config.batch_size))
        del plain  # its memory, for those that are measured in processes of their own
        gc.collect()
        torch.cuda.empty_cache()
        found[recipe] = {}
        for name, variant in variants.items():
            variant = variant.but(epochs=1000, epoch_images=steps * config.batch_size)
            arguments = (variant, root, steps * config.batch_size, device)
            make = partial(Reference, *arguments) if name == Reference.name else partial(Module, *arguments, place)
            makers[recipe, name], rates[recipe, name] = make, []
            found[recipe][name] = {
                "speed": {field: getattr(variant, field) for field in ADDITIONS},
                "peak_memory_mb": in_fresh_process(peak_memory_of, make, threads, device),
                "flops_per_image": count_flops(variant, name == Reference.name, root),
            }
    used = {row["speed"]["precision"] for rows in found.values() for row in rows.values()}
    peaks = {precision: peak_gflops(precision, device) for precision in sorted(used)}
    took = 0
    for turn in range(setting["rounds"]):
        begun = time.perf_counter()
        if turn >= 3 and begun + took > until:
            break
        print(f"round {turn + 1} of {setting['rounds']}", flush=True)
        for (recipe, name), make in list(makers.items())[:: -1 if turn % 2 else 1]:  # nobody always comes after the same one
            steps = blocks[recipe]
            rates[recipe, name].append(measure_block(make, steps, steps * recipes[recipe].batch_size, device))
        took = time.perf_counter() - begun
    for (recipe, name), mine in rates.items():
        theirs, row = rates[recipe, Reference.name], found[recipe][name]
        row["images_per_second"] = {m: median(r[m] for r in mine) for m in MEASURES}
        row["lowest_highest"] = {m: [min(r[m] for r in mine), max(r[m] for r in mine)] for m in MEASURES}
        row["ratio"] = {m: median(a[m] / b[m] for a, b in zip(mine, theirs)) for m in MEASURES}
        row["share_of_peak"] = row["images_per_second"]["step"] * row["flops_per_image"] / peaks[row["speed"]["precision"]] / 1e9
        row["repeats"], row["images_in_a_block"] = len(mine), blocks[recipe] * recipes[recipe].batch_size
    return found, peaks


def decode_only(paths):
    """What any reader has to do: read the files and decode them to RGB."""
    for path in paths:
        Image.open(path).convert("RGB")


def measure_input(config, root, cache, setting, device):
    """Images per second of ways to read the files for the first time, and what fetching batches adds to a step later on."""
    images, rounds = setting["files"], setting["rounds"]
    dataset = Reference(config, root, images, CPU).dataset
    paths = [path for path, _ in dataset.dataset.samples[:images]]
    parts = [paths[k : k + 16] for k in range(0, images, 16)]

    def load_faces():
        with tempfile.TemporaryDirectory() as fresh, quiet():
            cs.load_faces(root / "faces", config.image_size, fresh, images)

    def decoder():
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(decode_only, parts))

    readers = {
        "one_by_one": lambda: [None for _ in dataset], "load_faces": load_faces, "decoder_alone": decoder,
        "dataloader_2_workers": lambda: [None for _ in DataLoader(dataset, config.batch_size, num_workers=2)],  # last: they linger
    }
    rates = [{name: images / seconds(read, CPU) for name, read in readers.items()} for _ in range(rounds)]
    found = {"images_per_second": {name: summary([r[name] for r in rates]) for name in readers}}
    found["ratio"] = {name: median(r[name] / r["one_by_one"] for r in rates) for name in readers}
    training = Module(config.but(epochs=1000), root, images, device, cache).training
    repeated(training.advance, 5)
    shares = []
    for _ in range(rounds):
        fetch = seconds(lambda: [training.batches(training.step + k) for k in range(100)], device) / 100
        step = seconds(lambda: repeated(training.advance, 5), device) / 5
        shares.append(fetch / (step - fetch))
    return {**found, "threads": os.cpu_count(), "files": images, "fetching_adds_to_step": summary(shares),
            "bytes_per_file": sum(map(os.path.getsize, paths)) // images}


def growing_step(faces, images):
    """Microseconds per image of tiny steps on so many images, and MB beyond the dataset's own. In a fresh process."""
    torch.set_num_threads(1)  # for steps this small threads would mostly wait for each other
    device, before = cs.best_device(), cs.peak_memory(cs.best_device())
    data = torch.from_numpy(faces).repeat(images // len(faces), 1, 1, 1)  # (images, 3, 16, 16)
    training = cs.Training(tiny(), data, device)
    repeated(training.advance, 20)
    took = seconds(lambda: repeated(training.advance, 200), device) / 200 / tiny().batch_size
    return 1e6 * took, cs.peak_memory(device) - before - data.numel() / 2**20


def start_up(folder, cache):
    """Seconds from a folder with a warm cache to the first step, imports aside, and MB that it takes. In a fresh process."""
    device, before = cs.best_device(), cs.peak_memory(CPU)
    torch.zeros(1, device=device)  # waking the GPU is the driver's time
    begun = time.perf_counter()
    faces, _ = cs.hold_out(cs.load_faces(folder, 16, cache))
    cs.Training(tiny(), faces, device)
    return time.perf_counter() - begun, cs.peak_memory(CPU) - before


def tiny():
    return cs.CONVERGED.but(image_size=16, width=8, batch_size=64, epochs=1000)


def measure_growth(place, cache, setting):
    """A record for each N: what an image costs as the dataset grows, and how long a warm start takes."""
    counts, found = setting["growth"], []
    faces = cs.toy_faces(counts[0], 16)
    for n in counts:
        folder = place / f"growth-{n}"
        write_jpegs(folder, faces, n, (16, 16))
        with quiet():
            decode = seconds(lambda folder=folder: cs.load_faces(folder, 16, cache), CPU)
        found.append({"images": n, "dataset_mb": n * 768 / 2**20, "first_decode_us_per_image": 1e6 * decode / n})
    for turn in range(3):  # in turns, as above
        for record in found[:: -1 if turn % 2 else 1]:
            n = record["images"]
            step = in_fresh_process(growing_step, faces.numpy(), n)
            start = in_fresh_process(start_up, place / f"growth-{n}", cache)
            names = ("step_us_per_image", "memory_beyond_dataset_mb", "start_up_seconds", "start_up_memory_mb")
            for name, value in zip(names, step + start):
                record.setdefault(name, []).append(value)
    for record in found:
        record.update({name: summary(value) for name, value in record.items() if isinstance(value, list)})
    return found


def write_jpegs(folder, faces, files, size):
    """So many JPEG files, faces (N, 3, S, S) again and again, at a (width, height)."""
    folder.mkdir(parents=True)
    encoded = []
    for face in faces:
        buffer = io.BytesIO()
        Image.fromarray(face.permute(1, 2, 0).numpy()).resize(size).save(buffer, "JPEG", quality=90)
        encoded.append(buffer.getvalue())
    for k in range(files):
        (folder / f"{k:06}.jpg").write_bytes(encoded[k % len(encoded)])


def import_seconds():
    """Of the module with all that it needs, in a fresh interpreter."""
    code = "import time; t = time.perf_counter(); import cspgan; print(time.perf_counter() - t)"
    return float(subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout)


# ------------------------------------------------------------------------------------------------ what came out


def targets(result, device):
    """[{target, reached, measured}], from the measurement alone."""
    found, on_gpu = [], device.type == "cuda"

    def judge(target, reached, measured):
        found.append({"target": target, "reached": bool(reached), "measured": measured})

    for recipe, variants in result["recipes"].items():
        (auto,) = (row["ratio"] for name, row in variants.items() if name.endswith(AUTO))
        for measure, least in (("later_epochs", 5 if on_gpu else 1.3), *[("step", 3)] * on_gpu):
            judge(f"{recipe}, {MEASURES[measure]}: at least {least}x the reference loop", auto[measure] >= least,
                  f"{auto[measure]:.2f}x")
    ratio = result["input"]["ratio"]
    judge("first decode at least 4x the one-by-one reader, or within a tenth of the decoder's own limit",
          ratio["load_faces"] >= min(4, 0.9 * ratio["decoder_alone"]),
          f"{ratio['load_faces']:.1f}x, the decoder alone {ratio['decoder_alone']:.1f}x with {result['input']['threads']} threads")
    share = result["input"]["fetching_adds_to_step"]["median"]
    judge("later epochs add less than 3% to the step's own time", share < 0.03, f"{share:.2%}")
    for name, unit in (("step_us_per_image", "us"), ("memory_beyond_dataset_mb", "MB")):
        values = [record[name]["median"] for record in result["growth"]]
        judge(f"{name} flat (within a tenth) from {result['growth'][0]['images']:,} to {result['growth'][-1]['images']:,} images",
              max(values) <= 1.1 * min(values), ", ".join(f"{value:.1f}" for value in values) + f" {unit}")
    starts = [record["start_up_seconds"]["median"] for record in result["growth"]]
    judge("start-up with a warm cache under 2 s", max(starts) < 2, ", ".join(f"{value:.2f}" for value in starts) + " s")
    return found


def plot(result):
    """Images per second of every variant, with the ratio to the reference loop at the bar's end."""
    recipes = result["recipes"]
    rows = [len(variants) for variants in recipes.values()]
    figure = Figure(figsize=(10, 1.6 + 0.5 * sum(rows)), layout="constrained")
    for ax, (recipe, variants) in zip(figure.subplots(len(recipes), 1, squeeze=False, height_ratios=rows)[:, 0], recipes.items()):
        for shift, measure, colour in ((-0.2, "later_epochs", "C0"), (0.2, "step", "C1")):
            for k, row in enumerate(variants.values()):
                rate, (low, high) = row["images_per_second"][measure], row["lowest_highest"][measure]
                label = MEASURES[measure] if k == 0 else None
                ax.barh(k + shift, rate, 0.38, color=colour, alpha=0.85, label=label)
                ax.plot([low, high], [k + shift] * 2, color="black", lw=0.8)
                ax.text(max(rate, high), k + shift, f"  {rate:,.0f}   {row['ratio'][measure]:.2f}x", va="center", fontsize=8)
        ax.set_yticks(range(len(variants)), variants, fontsize=9)
        ax.invert_yaxis()
        ax.set_title(recipe, loc="left", fontsize=11)
        ax.margins(x=0.14)
        ax.set_xlim(0, None)
        ax.spines[["top", "right"]].set_visible(False)
    ax.set_xlabel("images per second: medians, lines from the lowest to the highest round, and the ratio to the reference loop")
    figure.axes[0].legend(frameon=False, fontsize=9, loc="lower right", bbox_to_anchor=(1, 1), ncols=2)
    setting = result["settings"]
    figure.suptitle(f"Training speed on {result['hardware']}: {setting['size']} px, width {setting['width']}, batch "
                    f"{setting['batch']}, PyTorch {result['versions']['torch']}. Each + adds to all above it.", fontsize=11)
    return figure


def show(result):
    """The short table, and what was reached."""
    for recipe, variants in result["recipes"].items():
        print(f"\n{recipe:30}" + "".join(f"{measure:>16} ratio" for measure in MEASURES) + "   MB peak  of peak (images/s)")
        for name, row in variants.items():
            rates = "".join(f"{row['images_per_second'][m]:16,.0f}{row['ratio'][m]:6.2f}" for m in MEASURES)
            print(f"{name:30}{rates}{row['peak_memory_mb']:10,}  {row['share_of_peak']:.1%}")
    print()
    for line in result["targets"]:
        print(f"{'reached    ' if line['reached'] else 'not reached'}  {line['target']}: {line['measured']}")


def processor():
    """The CPU's name, where Linux tells it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def merge(path, **found):
    """Add to benchmark.json, or replace there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    filed = json.loads(path.read_text()) if path.exists() else {}
    cs.write_json(path, {**filed, **found})


def benchmark(options):
    """Measure everything; writes benchmark.json and benchmark.png."""
    begun, device = time.perf_counter(), cs.best_device()
    setting = {**SIZES["quick" if options.quick else device.type]}
    setting.update({name: value for name in ("size", "width", "batch") if (value := getattr(options, name))})
    torch.set_num_threads(options.threads)
    if START == "forkserver":
        multiprocessing.set_forkserver_preload(["torchvision", "matplotlib.figure", "torch.utils.flop_counter"])
    about = cs.environment(device)
    with tempfile.TemporaryDirectory() as place:
        place = Path(place)
        root, cache = place / "files", place / "cache"
        if options.images:
            root.mkdir()
            (root / "faces").symlink_to(options.images.resolve())  # ImageFolder wants a folder for each class
            setting["files"] = min(setting["files"], sum(len(files) for _, _, files in os.walk(options.images)))
        else:
            write_jpegs(root / "faces", cs.toy_faces(min(200, setting["files"]), 128), setting["files"], (178, 218))
        recipes = {name: cs.PRESETS[name].but(image_size=setting["size"], width=setting["width"], batch_size=setting["batch"])
                   for name in RECIPES}
        result = {"hardware": about["hardware"], "processor": processor(), "cores": os.cpu_count(), "threads": options.threads,
                  "date": about["date"], "code": about["code"], "settings": {**setting, "quick": options.quick},
                  "data": str(options.images or "drawn faces, JPEG of 178x218"), "import_seconds": import_seconds(),
                  "versions": {"python": about["python"], "torch": about["torch"], "torchvision": torchvision.__version__}}
        print("reading", flush=True)
        result["input"] = measure_input(recipes[RECIPES[0]], root, cache, setting, device)
        print("growing", flush=True)
        result["growth"] = measure_growth(place, cache, setting)
        print("stepping", flush=True)
        result["recipes"], peaks = measure_steps(recipes, root, cache, setting, options.threads, device, begun + SECONDS)
    result["peak_gflops_measured"] = {**peaks, "how": "the best of ten products of large matrices, same threads, in this run"}
    result["targets"] = targets(result, device)
    result["seconds"] = time.perf_counter() - begun
    merge(options.out / "benchmark.json", **result)
    plot(result).savefig(options.out / "benchmark.png", dpi=120)
    show(result)
    print(f"\n{result['seconds'] / 60:.1f} minutes: {options.out / 'benchmark.json'}, {options.out / 'benchmark.png'}")


# ------------------------------------------------------------------------------------------------ do they train alike?


def train_one(preset, speed, seed, source, folder, length):
    """The record of one run, which goes on where an earlier call has left it."""
    torch.set_num_threads(1)
    faces, held_out = cs.hold_out(cs.load_faces(source, 32))
    config = cs.PRESETS[preset].but(image_size=32, width=64, batch_size=64, seed=seed, **length)
    config = config.but(**cs.PLAIN) if speed == "plain" else config
    run = cs.run_or_load(config, faces, folder / f"{preset}-{speed}-{seed}", progress=False)
    found = cs.evaluate(run, held_out, reference=cs.floor(held_out, faces))
    return {"preset": preset, "seed": seed, "speed": speed, "swd": found["swd"]["avg"], "diversity": found["diversity"],
            "seconds": run.seconds, "swd_real": found["swd_floor"]["avg"], "speed_on": run.environment["speed"],
            **{name: run.environment[name] for name in ("hardware", "torch", "code", "date")}, "data": Path(source).name}


def train(options):
    """Plain and fast runs of both recipes from three seeds; the records go to benchmark.json as they come."""
    path, folder = options.out / "benchmark.json", options.out / "latest/benchmark"
    length = {"epochs": 1, "epoch_images": 640} if options.quick else {"epochs": 5, "epoch_images": 12_800}
    jobs = [(preset, speed, seed) for seed in range(3) for preset in reversed(RECIPES) for speed in ("plain", "auto")]
    records = json.loads(path.read_text()).get("training", []) if path.exists() else []
    with quiet():
        cs.load_faces(options.images, 32)  # the processes find the cache
    with ProcessPoolExecutor(options.processes, multiprocessing.get_context(START), max_tasks_per_child=1) as pool:
        for future in as_completed([pool.submit(train_one, *job, options.images, folder, length) for job in jobs]):
            new = future.result()
            key = [new[name] for name in ("preset", "seed", "speed")]
            records = [r for r in records if [r[name] for name in ("preset", "seed", "speed")] != key] + [new]
            merge(path, training=sorted(records, key=lambda r: (r["preset"], r["speed"], r["seed"])))
            print(f"{key}: SWD {new['swd']:.1f}, diversity {new['diversity']:.2f}, {new['seconds']:.0f} s", flush=True)
    for preset in RECIPES:
        groups = {speed: [r["swd"] for r in records if (r["preset"], r["speed"]) == (preset, speed)] for speed in ("plain", "auto")}
        print(f"{preset}: SWD x1e3 " + ", ".join(f"{speed} {cs.spread(values, 1)}" for speed, values in groups.items())
              + (": they overlap" if max(map(min, groups.values())) <= min(map(max, groups.values())) else ": they do not overlap"))


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder of benchmark.json and benchmark.png; by default results")
    parser.add_argument("--images", type=Path, help="folder of faces (with --train a zip as well); by default drawn ones")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of PyTorch; by default all cores")
    parser.add_argument("--size", type=int, help="pixels a side; by default 64 on a CPU and 128 on a GPU")
    parser.add_argument("--width", type=int, help="channels at 4x4; by default 64 on a CPU and 1024 on a GPU")
    parser.add_argument("--batch", type=int, help="images a step; by default 32 on a CPU and 128 on a GPU")
    parser.add_argument("--quick", action="store_true", help="does it run? Too small to mean anything; into results/latest/")
    parser.add_argument("--train", action="store_true", help="instead: plain and fast runs, do they train alike? Takes hours")
    parser.add_argument("--processes", type=int, default=1, help="runs of --train side by side, one thread each")
    options = parser.parse_args(arguments)
    options.out = options.out or ROOT / ("results/latest/benchmark-quick" if options.quick else "results")
    if options.train and not options.images:
        parser.error("--train needs --images")
    if options.images and not (options.images.is_dir() or options.train and options.images.exists()):
        parser.error(f"--images {options.images}: no such folder")
    train(options) if options.train else benchmark(options)


if __name__ == "__main__":
    main()
