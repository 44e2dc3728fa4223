"""CSPup GAN: a generator of cross-stage-partial upsampling blocks, from noise z (100) to faces (128x128x3).

Read from top to bottom: config, environment, data, models, losses, training loop, metrics, plots.
The report that uses all of it is gan_hw.ipynb. Every experiment is one line:

    run = train(BASELINE.but(block_norm="both", block_act="leaky_relu"), images, "results/my_idea")

Measured (results/table.json; aligned64.zip, 64 px, width 128, one CPU core, PyTorch 2.15.0, one seed, so no spread
yet): of the course's five recipes `h1_bn_leaky` comes closest to real faces, SWD 85 against 245 for the plain baseline and
9 for real faces among themselves. None of the five converges.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import functools
import hashlib
import inspect
import json
import math
import os
import platform
import shutil
import sys
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from difflib import get_close_matches
from io import BytesIO
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from torch import Tensor, nn
from torchvision.utils import make_grid
from tqdm import tqdm

# Where D has won, gradients sink below 1e-38, and a CPU convolution of such denormal numbers takes 100 times as long
# (measured: 2258 against 23 ms). They are taken as 0.
np.finfo(np.float32), np.finfo(np.float64)  # looked at before, or older NumPys warn that the smallest one is 0
torch.set_flush_denormal(True)

ACTIVATIONS = {"relu": nn.ReLU, "leaky_relu": lambda: nn.LeakyReLU(0.2), "tanh": nn.Tanh}
HEADS = {"sigmoid": nn.Sigmoid, "tanh": nn.Tanh, "relu": nn.ReLU}
DECONVS = {4: (4, 2, 1), 2: (2, 2, 0)}  # kernel -> (kernel, stride, padding) that doubles the resolution
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp")
CELEBA = "jessicali9530/celeba-dataset"
CACHE_DIR = Path.home() / ".cache" / "cspgan"  # not the working folder: Kaggle would keep 10 GB of it as output
HOW_TO_GET_FACES = (
    f"On Kaggle: 'Add input', {CELEBA}. Elsewhere: set CSPGAN_DATA to a folder or zip of face images, "
    "or call download_celeba('data'). Without any: toy_faces(n, size)."
)


# ------------------------------------------------------------------------------------------------ config


@dataclass(frozen=True)
class Config:
    """Everything that makes one run differ from another. Frozen: derive new ones with `.but(...)`."""

    # images
    image_size: int = 128  # pixels a side: a power of two, 16 to 256
    head: str = "sigmoid"  # G's last activation: "tanh" puts images in [-1, 1], "sigmoid" and "relu" in [0, 1]
    # generator
    generator: str = "cspup"  # "cspup", or "dcgan" as the control
    z_dim: int = 100  # numbers in one noise vector, each drawn from N(0, 1)
    width: int = 1024  # channels at 4x4 of G and D; halved with every doubling of the resolution
    stem: str = "cspup"  # from z to 4x4: "cspup", or "deconv" (one plain transposed convolution)
    deconv_kernel: int = 4  # deconvolution that doubles: 4 (4x4, stride 2, padding 1) or 2 (2x2, stride 2)
    block_act: str = "relu"  # inside CSPup: "relu", "leaky_relu" (slope 0.2) or "tanh"
    block_norm: str = "none"  # BatchNorm inside CSPup: "none", "right" (branch) or "both"
    # discriminator
    d_norm: bool = True  # BatchNorm on all its convolutions but the first and the last
    d_stages: int = 0  # its stride-2 convolutions; 0: as many as lead down to 4x4
    # objective
    loss: str = "bce"  # "bce" (after a sigmoid, as the course has it) or "bce_logits"
    label_smoothing: float = 0.0  # one-sided: D's target for real images is 1 minus this
    # optimisation
    batch_size: int = 128  # images in one step
    epochs: int = 5
    epoch_images: int | None = None  # images that count as one epoch; None: as many as the dataset has
    lr_g: float = 2e-4  # Adam's step size for G
    lr_d: float = 2e-4  # Adam's step size for D
    beta1: float = 0.5  # Adam; 0.5 as in DCGAN, 0.9 is PyTorch's default
    beta2: float = 0.999
    weight_decay: float = 0.0  # L2 on the weights of both networks, added to the gradient as Adam does
    d_every: int = 1  # D learns in every d_every-th step, G in every one
    seed: int = 0  # of weights, noise and data order

    def __post_init__(self) -> None:
        legal = {
            "image_size": (16, 32, 64, 128, 256), "head": tuple(HEADS), "generator": tuple(GENERATORS),
            "stem": ("cspup", "deconv"), "deconv_kernel": tuple(DECONVS), "block_act": tuple(ACTIVATIONS),
            "block_norm": ("none", "right", "both"), "d_norm": (True, False), "loss": tuple(LOSSES),
        }
        lowest = {
            "z_dim": 2, "width": 2, "d_stages": 0, "label_smoothing": 0, "batch_size": 2, "epochs": 1, "lr_g": 0,
            "lr_d": 0, "beta1": 0, "beta2": 0, "weight_decay": 0, "d_every": 1, "seed": 0,
        }
        for field in dataclasses.fields(self):
            name, value = field.name, getattr(self, field.name)
            if name in legal and (value not in legal[name] or type(value) is not type(legal[name][0])):
                raise ValueError(f"{name}={value!r}: expected one of {', '.join(map(repr, legal[name]))}")
            whole = isinstance(field.default, int)
            if name in lowest and not (isinstance(value, int if whole else (int, float)) and lowest[name] <= value < math.inf):
                raise ValueError(f"{name}={value!r}: expected a {'whole ' * whole}number of at least {lowest[name]}")
            if name in ("label_smoothing", "beta1", "beta2") and value >= 1:
                raise ValueError(f"{name}={value!r}: expected a number below 1")
        if self.d_stages > len(channel_ladder(self)):
            raise ValueError(f"d_stages={self.d_stages}: at {self.image_size} px at most {len(channel_ladder(self))}")
        if self.epoch_images is not None and not (isinstance(self.epoch_images, int) and self.epoch_images >= self.batch_size):
            raise ValueError(f"epoch_images={self.epoch_images}: expected at least one batch of {self.batch_size}")

    def but(self, **changes: Any) -> Config:
        """The same config with some fields changed: one experiment is one call."""
        names = [field.name for field in dataclasses.fields(self)]
        for name in changes:
            if name not in names:
                near = get_close_matches(name, names, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(names)}"
                raise ValueError(f"Config has no field {name!r}: {hint}")
        return dataclasses.replace(self, **changes)

    def differences(self, base: Config) -> dict[str, tuple[Any, Any]]:
        """{field: (value in base, value here)} of every field that differs."""
        pairs = {f.name: (getattr(base, f.name), getattr(self, f.name)) for f in dataclasses.fields(self)}
        return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}

    def label(self, base: Config | None = None) -> str:
        """The difference from `base` (default: BASELINE) in words, 'lr_d=0.0003, head=tanh': the run's name."""
        changed = self.differences(BASELINE if base is None else base)
        return ", ".join(f"{name}={value}" for name, (_, value) in changed.items()) or "no change"

    @property
    def pixel_range(self) -> tuple[float, float]:
        """What the networks see: the range of the head, for real and generated images alike."""
        return (-1.0, 1.0) if self.head == "tanh" else (0.0, 1.0)


def channel_ladder(config: Config) -> list[int]:
    """Channels at 4x4, 8x8, ... up to half the image size: [1024, 512, 256, 128, 64] for 128 px, width 1024."""
    stages = int(math.log2(config.image_size)) - 2
    return [max(2, config.width >> stage) for stage in range(stages)]


# ------------------------------------------------------------------------------------------- environment


@functools.cache
def best_device() -> torch.device:
    """The GPU if one really works, else the CPU; says so where torch lists a GPU that it cannot use."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    try:  # is_available() is true for cards that this build has no kernels for (P100): try a real operation
        F.conv2d(torch.ones(1, 1, 8, 8, device="cuda"), torch.ones(1, 1, 3, 3, device="cuda")).sum().item()
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        print(f"{torch.cuda.get_device_name()} is listed but cannot be used ({reason}): training on the CPU. "
              "On Kaggle choose the accelerator 'GPU T4 x2'.")
        return torch.device("cpu")
    return torch.device("cuda")


def environment(device: torch.device) -> dict[str, str]:
    """What a number depends on beside the config: hardware, versions, date and the hash of the code."""
    is_gpu, cores = device.type == "cuda", torch.get_num_threads()
    return {
        "hardware": torch.cuda.get_device_name(device) if is_gpu else f"{cores} CPU core{'s' * (cores > 1)}",
        "python": platform.python_version(), "torch": str(torch.__version__),
        "code": CODE, "date": time.strftime("%Y-%m-%d"),
    }


class _NotebookOutput:
    """A file for tqdm that shows its bar as one notebook output, replaced in place.

    Plain bars rewrite themselves with carriage returns, and a saved notebook keeps every state of them.
    """

    def __init__(self) -> None:
        from IPython.display import display

        self.handle = display({"text/plain": ""}, raw=True, display_id=True)

    def write(self, text: str) -> None:
        if text.strip():
            self.handle.update({"text/plain": text.strip()}, raw=True)

    def flush(self) -> None:
        pass


def progress_bar(total: int, label: str, unit: str, show: bool = True) -> tqdm:
    """A tqdm bar for where it is shown: live in a terminal, in place in a notebook, sparse in a log file."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    in_notebook = show and hasattr(shell, "kernel")
    file: IO[str] | Any = _NotebookOutput() if in_notebook else sys.stderr
    pause = 2.0 if in_notebook else 0.1 if sys.stderr.isatty() else 30.0  # seconds between two states
    return tqdm(total=total, desc=label, unit=unit, file=file, mininterval=pause, maxinterval=60, disable=not show,
                ascii=False, dynamic_ncols=not in_notebook, ncols=100 if in_notebook else None)


# -------------------------------------------------------------------------------------------------- data


def find_faces(places: tuple[str | Path, ...] = ("/kaggle/input", "data")) -> Path | None:
    """A folder or zip of face images: CSPGAN_DATA, then Kaggle's input folder, then ./data; None: use toy_faces.

    Kaggle mounts a dataset under a name that varies, so CelebA's `img_align_celeba` is searched for; failing
    that, the folder (with its sub-folders) or zip with the most images.
    """
    given = os.environ.get("CSPGAN_DATA")
    if given:
        if not Path(given).expanduser().exists():
            raise FileNotFoundError(f"CSPGAN_DATA={given}: no such folder or zip. {HOW_TO_GET_FACES}")
        return Path(given).expanduser()
    for place in map(Path, places):
        counts: dict[Path, int] = {}
        visited: set[str] = set()
        for folder, subfolders, files in os.walk(place, followlinks=True):
            visited.add(os.path.realpath(folder))  # a link may lead to where the walk has been
            subfolders[:] = [name for name in subfolders if os.path.realpath(os.path.join(folder, name)) not in visited]
            images = sum(name.lower().endswith(IMAGE_ENDINGS) for name in files)
            if images and "img_align_celeba" in folder:
                return Path(folder)
            top = place.joinpath(*Path(folder).relative_to(place).parts[:1])
            counts[top] = counts.get(top, 0) + images
            for archive in (Path(folder, name) for name in files if name.lower().endswith(".zip")):
                if zipfile.is_zipfile(archive):
                    counts[archive] = sum(name.lower().endswith(IMAGE_ENDINGS) for name in zipfile.ZipFile(archive).namelist())
        if any(counts.values()):
            return max(counts, key=lambda path: counts[path])
    return None


def load_faces(source: str | Path, size: int, cache_dir: str | Path = CACHE_DIR, limit: int | None = None) -> Tensor:
    """Images of a folder or zip as one memory-mapped tensor, decoded once and cached.

    Takes JPEG, PNG and WebP of any mode and shape, sub-folders included, in the order of their names; each
    becomes the largest centred square, resized with antialiasing. `limit` keeps the first so many files.
    The cache is rebuilt when the source, the size, the crop or the limit changed.

    Returns uint8 (N, 3, size, size). A damaged file is skipped and named at the end; a source that is missing,
    is neither a folder nor a zip, or holds no usable image is an error that says how to get the data.
    """
    source, cache_dir = Path(source).expanduser().resolve(), Path(cache_dir).expanduser()
    names, read, state = _open_source(source)
    names = names[:limit]
    if not names:
        raise ValueError(f"{source}: no {', '.join(IMAGE_ENDINGS)} file in it. {HOW_TO_GET_FACES}")
    stem = f"{source.stem}-{size}px-{hashlib.sha1(str(source).encode()).hexdigest()[:6]}"
    manifest_path = cache_dir / f"{stem}.json"
    made_from = {"source": str(source), "state": state, "size": size, "limit": limit, "files": len(names),
                 "crop": "largest centred square, EXIF upright, alpha on white, Lanczos"}

    manifest = _read_manifest(manifest_path)
    if manifest is None or {key: manifest.get(key) for key in made_from} != made_from:
        try:
            cache_dir.mkdir(parents=True, exist_ok=True)
            manifest = _decode_all(names, read, size, made_from, manifest_path)
        except OSError as error:
            raise OSError(f"cannot write the image cache in {cache_dir} ({error}). It needs "
                          f"{len(names) * 3 * size * size / 1e9:.1f} GB: free some, or pass another cache_dir.") from error
    skipped, count = manifest["skipped"], manifest["count"]
    if skipped:
        shown = "; ".join(f"{name} ({reason})" for name, reason in skipped[:10])
        print(f"skipped {len(skipped)} of {len(names)} files: {shown}{' ...' if len(skipped) > 10 else ''}")
    if not count:
        manifest_path.unlink()
        raise ValueError(f"{source}: none of its {len(names)} image files can be read. {HOW_TO_GET_FACES}")
    try:
        pixels = torch.from_file(str(cache_dir / manifest["file"]), size=count * 3 * size * size, dtype=torch.uint8)
    except RuntimeError as error:
        raise MemoryError(f"{count:,} images of {size} px do not fit this machine's memory: pass a limit, or a smaller "
                          f"size. ({error})") from error
    return pixels.view(count, 3, size, size)


def _open_source(source: Path) -> tuple[list[str], Any, str]:
    """(names of its images, function name -> bytes, a fingerprint that changes when a file does)."""

    def is_image(name: str) -> bool:
        hidden = any(part.startswith(".") or part == "__MACOSX" for part in Path(name).parts)
        return name.lower().endswith(IMAGE_ENDINGS) and not hidden

    if not source.exists():
        raise FileNotFoundError(f"{source}: no such folder or zip. {HOW_TO_GET_FACES}")
    if source.is_dir():
        stats = {}
        for folder, _, files in os.walk(source):  # os.walk does not follow links to folders: no endless loops
            for path in (os.path.join(folder, file) for file in files):
                name = os.path.relpath(path, source)
                if is_image(name) and os.path.isfile(path):
                    stats[name] = (os.stat(path).st_size, os.stat(path).st_mtime_ns)
        names = sorted(stats)
        state = hashlib.sha1(repr([(name, stats[name]) for name in names]).encode()).hexdigest()
        return names, lambda name: (source / name).read_bytes(), state
    if zipfile.is_zipfile(source):
        archive = zipfile.ZipFile(source)
        stat = source.stat()
        return sorted(filter(is_image, archive.namelist())), archive.read, f"{stat.st_size} bytes, {stat.st_mtime_ns} ns"
    raise ValueError(f"{source}: neither a folder nor a zip. {HOW_TO_GET_FACES}")


def decode_face(data: bytes, size: int) -> np.ndarray:
    """One encoded image of any mode as RGB uint8 (3, size, size): centred square, antialiased resize."""
    image = ImageOps.exif_transpose(Image.open(BytesIO(data)))
    if image.mode.startswith("I") or image.mode == "F":  # 16 bits a pixel: convert("RGB") would clip, not scale
        image = Image.fromarray((np.asarray(image, dtype=np.float32) / 257).clip(0, 255).round().astype(np.uint8))
    if image.has_transparency_data:  # the colours under transparent pixels are arbitrary: lay it on white
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.resize((size, size), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side))
    return np.asarray(square).transpose(2, 0, 1)  # (3, size, size)


def _decode_all(names: list[str], read: Any, size: int, made_from: dict, manifest_path: Path) -> dict:
    """Decode on all cores (Pillow releases the interpreter lock) and write pixels, then manifest, atomically."""

    def decode(name: str) -> np.ndarray | str:
        try:
            return decode_face(read(name), size)
        except Exception as error:  # whatever a damaged file raises, it must not cost the other 200,000
            return f"{type(error).__name__}: {error}"

    skipped, count = [], 0
    part = manifest_path.with_suffix(f".part{os.getpid()}")
    try:
        with open(part, "wb") as pixels, ThreadPoolExecutor(os.cpu_count()) as pool:
            with progress_bar(len(names), "decoding", "image") as bar:
                for start in range(0, len(names), 1024):  # in blocks, so that results never pile up in memory
                    block = names[start : start + 1024]
                    for name, result in zip(block, pool.map(decode, block)):
                        if isinstance(result, str):
                            skipped.append((name, result))
                        else:
                            pixels.write(result.tobytes())
                            count += 1
                    bar.update(len(block))
            pixels.flush()
            os.fsync(pixels.fileno())
        token = hashlib.sha1(json.dumps(made_from).encode()).hexdigest()[:8]
        manifest = {**made_from, "count": count, "skipped": skipped, "file": f"{manifest_path.stem}-{token}.u8"}
        old = _read_manifest(manifest_path)
        os.replace(part, manifest_path.with_name(manifest["file"]))
        write_json(manifest_path, manifest)  # last: a manifest that exists points at pixels that are whole
        if old and old["file"] != manifest["file"]:
            with contextlib.suppress(OSError):  # Windows keeps a file that is still mapped
                manifest_path.with_name(old["file"]).unlink()
    finally:
        part.unlink(missing_ok=True)
    return manifest


def _read_manifest(path: Path) -> dict | None:
    """The manifest of a cache whose pixels are there and whole, else None."""
    try:
        manifest = json.loads(path.read_text())
        whole = path.with_name(manifest["file"]).stat().st_size == manifest["count"] * 3 * manifest["size"] ** 2
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return manifest if whole else None


def write_json(path: Path, value: Any) -> None:
    """Write aside, flush to disk, rename: a reader sees the old file or the new one, never half of one."""
    part = path.with_name(f"{path.name}.part{os.getpid()}")
    with open(part, "w") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def download_celeba(folder: str | Path = "data") -> Path:
    """Download CelebA (1.4 GB) with the kaggle package, on request and outside Kaggle; returns the zip.

    Raises RuntimeError that says what to do when credentials or the network are missing or the disk is full.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    archive = folder / f"{CELEBA.split('/')[1]}.zip"
    if archive.exists() and zipfile.is_zipfile(archive):
        return archive
    if shutil.disk_usage(folder).free < 2e9:
        raise RuntimeError(f"{folder.resolve()} has less than 2 GB free: free some, or name another folder.")
    advice = ("Kaggle credentials are missing or stale: create an API token at kaggle.com/settings and put it into "
              "~/.kaggle/access_token or KAGGLE_API_TOKEN, or run 'kaggle auth login'")
    try:
        from kaggle.api.kaggle_api_extended import KaggleApi

        api = KaggleApi()
        api.authenticate()
        advice = (f"downloading {CELEBA} failed: check the network, that the token is still valid, and that "
                  f"{folder.resolve()} has 2 GB free; or download it in a browser into that folder")
        api.dataset_download_files(CELEBA, path=str(folder), quiet=False)
    except BaseException as error:  # without credentials the package exits instead of raising
        archive.unlink(missing_ok=True)
        if isinstance(error, KeyboardInterrupt):
            raise
        raise RuntimeError(f"{advice}. ({type(error).__name__}: {error})") from error
    return archive


FACTORS = 60  # random numbers that one face takes


def rgb(red: float, green: float, blue: float) -> Tensor:
    return torch.tensor([red, green, blue], dtype=torch.float32).view(3, 1, 1)


def draw_faces(factors: Tensor, size: int) -> Tensor:
    """Images in [0, 1], (m, 3, size, size), of faces given by numbers in [0, 1), (m, FACTORS)."""
    numbers = iter(factors.t()[..., None, None, None])
    def between(low, high):
        return low + (high - low) * next(numbers)                                               # (m, 1, 1, 1)
    def chance(p):
        return (next(numbers) < p).float()                                                      # (m, 1, 1, 1)
    def tint(saturation, value):
        wheel = torch.cos(2 * math.pi * (next(numbers) + rgb(0, 1 / 3, 2 / 3)))
        return value * (1 - saturation * (.5 + .5 * wheel))                                     # (m, 3, 1, 1)
    def over(edge):  # a ramp one pixel wide: clamped, since a sigmoid's denormal tails are slow to multiply
        return (.5 + edge * (size / 2)).clamp_(0, 1)                                      # (m, 1, size, size)
    def ellipse(x, y, a, b, soft=False):  # what is thinner than a pixel is drawn a pixel wide, but fainter
        a, b, thin = torch.as_tensor(a), torch.as_tensor(b), 1.6 / size
        cover = (a / thin).clamp(max=1) * (b / thin).clamp(max=1)
        a, b = a.clamp(min=thin), b.clamp(min=thin)
        sharp = torch.tensor(.5) if soft else torch.minimum(a, b) * (size / 4)
        across, along = x * (sharp.sqrt() / a), y * (sharp.sqrt() / b)
        inside = torch.addcmul(.5 + sharp * (2 * cover - 1), across, across, value=-1)
        return torch.addcmul(inside, along, along, value=-1).clamp_(0, 1)                 # (m, 1, size, size)
    def paint(mask, colour):  # lerp_ takes one pass over the image where mask * (colour - image) takes three
        image.lerp_(colour, mask)

    # x, y turn with the head (half its width, half its height: w, h); fx, fy slide over it as a face does
    line, zoom = (torch.arange(size) + .5) * (2 / size) - 1, between(.8, .92)
    x0, y0 = (line - between(-.12, .12)) * zoom, (line.view(size, 1) - between(-.09, .04)) * zoom
    tilt, turn, nod = between(-.2, .2), between(-.16, .16), between(-.04, .04)
    x, y = x0 * tilt.cos() + y0 * tilt.sin(), y0 * tilt.cos() - x0 * tilt.sin()           # (m, 1, size, size)
    w, h = between(.44, .56), between(.60, .70)
    fx, fy = x - turn * (1 - (x / w).square().clamp(max=1)), y - nod                      # (m, 1, size, size)
    light = between(-.6, .6) * x + between(-.4, .1) * y                                   # (m, 1, size, size)

    # pigments absorb exponentially, blue first: that keeps every skin and hair on natural colours
    skin = rgb(1, .87, .78) * torch.exp(-between(0, 1.4).square() * rgb(.35, .53, .68))         # (m, 3, 1, 1)
    hair = torch.exp(-between(.15, 3.2) * rgb(.85, 1, 1.1) - between(0, 1) * rgb(.1, .45, 1))   # (m, 3, 1, 1)
    strands = 1 + light + .08 * torch.sin(between(20, 40) * (x + between(-.3, .3) * y))   # (m, 1, size, size)
    locks, rosy = hair * strands, skin * rgb(1, .62, .62)

    image = tint(between(.05, .5), between(.5, 1)) * (1 + between(-.3, .3) * x0 + between(-.3, .3) * y0)
    clothes = tint(between(.1, .8), between(.25, .95)) * (1 + light)
    paint(ellipse(x0, y0 - 1.12, between(.75, .95), .42), clothes)
    paint(ellipse(x.abs() - w, y - .04, .08, .14), skin * .82)  # ears, which long hair hides
    long, volume, crown = chance(.45), between(.03, .12), y + .15
    ends = long * between(.4, 1.2) + (1 - long) * between(-.15, .1)
    dome = chance(.92) * ellipse(x, crown - crown.clamp(0, 1), w + volume, h - .15 + volume)
    paint(dome * over(ends - .3 * x.square() - y), locks * .85)
    paint(ellipse(x0, y0 - .7, w * .48, .3), skin * .72)  # neck, in the shadow of the chin

    head = ellipse(x * (1 + between(.05, .25) * y / h), y, w, h)
    paint(head, skin * (1.02 - .2 * ((x / w).square() + (y / h).square()).square() + .5 * light))
    paint(head * ellipse(fx.abs() - .27, fy - .2, .16, .14, soft=True) * between(0, .5), rosy)
    paint(chance(.2) * head * over(fy - between(.38, .5) + 1.7 * fx.square()), locks)  # beard
    nose = fx - .25 * turn
    paint(ellipse(nose, fy - .06, .04, .2, soft=True) * .5, skin * 1.15)
    paint(ellipse(nose, fy - .22 + 3 * nose.square(), between(.06, .11), .03) * .8, skin * .58)
    mouth_y, mouth_w = between(.33, .39), between(.14, .24)
    moustache = chance(.2) * ellipse(fx, fy - mouth_y + .085 - fx.square(), mouth_w * 1.1, .035)
    paint(moustache, locks)
    smile = fy - mouth_y + between(-.5, 2.5) * (fx.square() - .01)
    paint(ellipse(fx, smile, mouth_w, between(.04, .065)), rosy.lerp(rgb(.72, .12, .2), between(0, .8)))
    teeth = (skin * .2).lerp(rgb(.95, .95, .95), chance(.5))
    paint(ellipse(fx, smile, mouth_w * .8, between(.008, .035)), teeth)

    apart, eye_w, eye_h = w * between(.40, .46), between(.1, .13), between(.045, .08)
    eye = fx.abs() - apart  # the absolute value folds both eyes into one
    paint(ellipse(eye, fy, .17, .14, soft=True) * .5, skin * .65)
    paint(ellipse(eye, fy + .022, eye_w * 1.12, eye_h * 1.08), skin * .2)
    white, gaze = ellipse(eye, fy, eye_w, eye_h), eye * fx.sign() - between(-.03, .03)
    paint(white, rgb(.97, .96, .95))
    paint(white * ellipse(gaze, fy, .06, .06), rgb(.25, .14, .07).lerp(rgb(.2, .45, .7), between(0, 1)))
    paint(white * ellipse(gaze, fy, .03, .03), rgb(.03, .03, .03))
    brow = fy + between(.15, .2) + between(-.15, .15) * eye - 1.5 * eye.square()
    paint(ellipse(eye, brow, .14, between(.018, .04)), hair * .7)

    fringe = chance(.4)
    hairline = between(-.5, -.36) + .2 * fringe + (1.3 - .9 * fringe) * (fx - between(-.2, .2)).square()
    paint(dome * over(torch.minimum(hairline, ends) - y), locks)
    lens_w, lens_h, rim = between(.15, .18), between(.11, .16), between(.025, .045)
    frame = ellipse(eye, fy, lens_w, lens_h) - ellipse(eye, fy, lens_w - rim, lens_h - rim)
    bridge = ellipse(fx, fy + .02, apart - lens_w + .01, .02)
    paint(chance(.25) * torch.maximum(frame, bridge), tint(between(0, .8), between(.05, .4)))  # glasses
    return image.clamp_(0, 1)                                                             # (m, 3, size, size)


def toy_faces(n: int, size: int, seed: int = 0) -> Tensor:
    """Procedural faces, uint8 (n, 3, size, size): a data set that needs no download.

    Each face has its own FACTORS independent uniform numbers: background colour and gradient, clothes, light;
    place, zoom, tilt, turn and nod of the head, its width, height and jaw; skin, blush; hair colour, length,
    volume, strands, parting, fringe, baldness; eye colour, spacing, size, opening, gaze; brows; nose; mouth
    height, width, smile, lips, teeth; beard, moustache; glasses.

    n >= 1, size 16, 32, 64, 128 or 256. Only (n, size, seed) matter, never the global random state: a smaller
    n gives the first of the same faces, another size the same faces at that size.
    """
    if n < 1:
        raise ValueError(f"toy_faces: n is {n}, expected at least 1 face")
    if size not in (16, 32, 64, 128, 256):
        raise ValueError(f"toy_faces: size is {size}, expected a power of two from 16 to 256")
    factors = torch.rand(n, FACTORS, generator=torch.Generator().manual_seed(seed))             # (n, FACTORS)
    faces = torch.empty(n, 3, size, size, dtype=torch.uint8)
    chunk = 2 ** 17 // size ** 2  # faces at a time: few enough for the processor's cache
    for part, out in zip(factors.split(chunk), faces.split(chunk)):
        out.copy_(draw_faces(part, size).mul_(255).round_())
    return faces


def to_network(images: Tensor, config: Config) -> Tensor:
    """uint8 (N, 3, S, S) to float in the config's pixel range."""
    low, high = config.pixel_range
    return images.float().mul_((high - low) / 255).add_(low)


def to_uint8(images: Tensor, config: Config) -> Tensor:
    """Float in the config's pixel range to uint8 (N, 3, S, S)."""
    low, high = config.pixel_range
    return ((images - low) * (255 / (high - low))).round().clamp(0, 255).to(torch.uint8)


def real_batches(images: Tensor, config: Config, device: torch.device) -> Iterator[Tensor]:
    """Endless batches (batch_size, 3, S, S) for the networks; every image once before any comes again."""
    order = torch.Generator().manual_seed(4 * config.seed + 3)
    while True:
        for index in torch.randperm(len(images), generator=order).split(config.batch_size):
            if len(index) == config.batch_size:
                yield to_network(images[index.to(images.device)].to(device), config)


# ------------------------------------------------------------------------------------------------ models


class CSPup(nn.Module):
    """Cross-stage-partial block that doubles the resolution: (N, in, H, W) -> (N, out, 2H, 2W).

    Half of the channels goes through one deconvolution only; the other half through conv 1x1, a deconvolution of its
    own and two conv 3x3; the branches are added. After Cross Stage Partial Networks (arXiv 1911.11929).

    act: called without arguments, makes one activation. norm_left: BatchNorm at the end of the left branch.
    norm_right: BatchNorm after the three convolutions of the right one. deconv: (kernel, stride, padding) of both
    deconvolutions; (4, 1, 0) takes 1x1 to 4x4.
    """

    def __init__(self, in_channels: int, out_channels: int, act: type[nn.Module] = nn.ReLU, norm_left: bool = False,
                 norm_right: bool = False, deconv: tuple[int, int, int] = (4, 2, 1)) -> None:
        super().__init__()
        if in_channels < 2:
            raise ValueError(f"in_channels={in_channels}: expected at least 2, one for each branch")
        left, right = in_channels // 2, in_channels - in_channels // 2

        def norm(channels: int, wanted: bool) -> list[nn.Module]:
            return [nn.BatchNorm2d(channels)] if wanted else []

        self.left = nn.Sequential(
            nn.ConvTranspose2d(left, out_channels, *deconv), *norm(out_channels, norm_left),
        )
        self.right = nn.Sequential(
            nn.Conv2d(right, right, 1), *norm(right, norm_right), act(),
            nn.ConvTranspose2d(right, out_channels, *deconv),
            nn.Conv2d(out_channels, out_channels, 3, padding=1), *norm(out_channels, norm_right), act(),
            nn.Conv2d(out_channels, out_channels, 3, padding=1), *norm(out_channels, norm_right),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        half = x.shape[1] // 2
        left, right = x[:, :half], x[:, half:]                           # (N, in/2, H, W) each
        return self.left(left) + self.right(right)                       # (N, out, 2H, 2W)


class Generator(nn.Module):
    """The assignment's generator: z (N, z_dim) -> images (N, 3, S, S) in the config's pixel range.

    At 128 px and width 1024: z, 4x4x1024, 8x8x512, 16x16x256, 32x32x128, 64x64x64, and one deconvolution with
    the head's activation to 128x128x3. Every arrow but the last is a CSPup; the first works on z as a 1x1 map.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        ladder = channel_ladder(config)
        act = ACTIVATIONS[config.block_act]
        norms = (config.block_norm == "both", config.block_norm in ("right", "both"))
        double = DECONVS[config.deconv_kernel]
        if config.stem == "cspup":
            self.stem: nn.Module = CSPup(config.z_dim, ladder[0], act, *norms, deconv=(4, 1, 0))
        else:
            self.stem = nn.ConvTranspose2d(config.z_dim, ladder[0], 4, 1, 0)
        self.blocks = nn.Sequential(*(CSPup(c, out, act, *norms, deconv=double) for c, out in zip(ladder, ladder[1:])))
        self.to_rgb = nn.Sequential(nn.ConvTranspose2d(ladder[-1], 3, *double), HEADS[config.head]())
        init_weights(self, 4 * config.seed)

    def forward(self, z: Tensor) -> Tensor:
        x = self.stem(z[:, :, None, None])                               # (N, width, 4, 4)
        x = self.blocks(x)                                               # (N, width / 2^k, S/2, S/2)
        return self.to_rgb(x)                                            # (N, 3, S, S)


class DCGANGenerator(nn.Module):
    """The control: DCGAN's generator (arXiv 1511.06434) with the same ladder, z and output as `Generator`."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        ladder = channel_ladder(config)
        layers: list[nn.Module] = []
        for c, out in zip([config.z_dim, *ladder], ladder):
            deconv = (4, 2, 1) if layers else (4, 1, 0)
            layers += [nn.ConvTranspose2d(c, out, *deconv, bias=False), nn.BatchNorm2d(out), nn.ReLU(inplace=True)]
        self.layers = nn.Sequential(*layers, nn.ConvTranspose2d(ladder[-1], 3, 4, 2, 1), HEADS[config.head]())
        init_weights(self, 4 * config.seed)

    def forward(self, z: Tensor) -> Tensor:
        return self.layers(z[:, :, None, None])                          # (N, 3, S, S)


class Discriminator(nn.Module):
    """DCGAN's discriminator: images (N, 3, S, S) -> raw logits (N,). A sigmoid belongs to the loss.

    Stride-2 convolutions 4x4 down to 4x4 with the generator's widths in reverse, LeakyReLU(0.2), BatchNorm on all
    but the first, then one convolution over what is left. With `d_stages` fewer of them.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        widths = channel_ladder(config)[::-1]
        widths = widths[: config.d_stages or len(widths)]
        layers: list[nn.Module] = []
        for c, out in zip([3, *widths], widths):
            layers.append(nn.Conv2d(c, out, 4, 2, 1))
            if config.d_norm and c != 3:  # no running statistics: D is never asked outside training
                layers.append(nn.BatchNorm2d(out, track_running_stats=False))
            layers.append(nn.LeakyReLU(0.2, inplace=True))
        self.features = nn.Sequential(*layers)
        self.to_logit = nn.Conv2d(widths[-1], 1, config.image_size >> len(widths))
        init_weights(self, 4 * config.seed + 1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.features(images)                                        # (N, width, 4, 4)
        return self.to_logit(x).flatten()                                # (N,)


GENERATORS = {"cspup": Generator, "dcgan": DCGANGenerator}


def init_weights(network: nn.Module, seed: int) -> None:
    """DCGAN's initialisation: weights N(0, 0.02), BatchNorm scales N(1, 0.02), biases 0; by its own seed."""
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d)):
            mean = 1.0 if isinstance(module, nn.BatchNorm2d) else 0.0
            nn.init.normal_(module.weight, mean, 0.02, generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


# ------------------------------------------------------------------------------------------------ losses


def bce(logits: Tensor, target: float) -> Tensor:
    """Mean binary cross-entropy of sigmoid(logits) (N,) against one target; ln 2 where D cannot tell.

    As the course writes it, a sigmoid and then the logarithm: below a logit of about -28 the sigmoid is under 1e-12,
    where PyTorch clamps, and G's gradient dies.
    """
    return F.binary_cross_entropy(torch.sigmoid(logits), torch.full_like(logits, target))


def bce_logits(logits: Tensor, target: float) -> Tensor:
    """The same value from the logits themselves: its gradient never dies."""
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, target))


LOSSES = {"bce": bce, "bce_logits": bce_logits}


def equilibrium(config: Config) -> tuple[float, float]:
    """(D loss, G loss) where real and generated images have the same distribution and D is the best it can be.

    The best D then says p = (1 - s) / 2 everywhere (Goodfellow 2014, proposition 1, with smoothing s), so without
    smoothing D's two terms are ln 2 each, and G's one term is ln 2.
    """
    target = 1 - config.label_smoothing
    p = target / 2
    d_loss = -target * math.log(p) - (1 - target) * math.log(1 - p) - math.log(1 - p)
    return d_loss, -math.log(p)


# ---------------------------------------------------------------------------------------- presets


BASELINE = Config()
H1 = BASELINE.but(block_norm="both", block_act="leaky_relu")

PRESETS = {
    "baseline": BASELINE,
    "h0_more_epochs": BASELINE.but(epochs=20),
    "h1_bn_leaky": H1,
    "h2_l2_big_batch": H1.but(batch_size=2 * H1.batch_size, weight_decay=1e-4),
    "h3_smooth_tanh": H1.but(label_smoothing=0.1, lr_d=3e-4, lr_g=8e-4, head="tanh"),
}


# ---------------------------------------------------------------------------------------------- training


@dataclass
class Run:
    """One trained experiment and what it measured on the way."""

    config: Config
    history: list[dict[str, float]]  # records of a few hundred windows, see `train`
    generator: nn.Module
    snapshots: list[tuple[int, Tensor]]  # (images seen, uint8 (36, 3, S, S)), the same noise in every one
    environment: dict[str, str]

    @property
    def seconds(self) -> float:
        """Wall time of the training."""
        return self.history[-1]["seconds"]


def d_step(discriminator: nn.Module, optimizer: torch.optim.Optimizer, real: Tensor, fake: Tensor, config: Config) -> Tensor:
    """D: minimise  L(D(real), 1 - s) + L(D(fake), 0)  over D's weights (Goodfellow 2014, algorithm 1).

    real, fake: (N, 3, S, S), fake without its graph. Returns detached (3,): the loss, mean logits on real and fake.
    """
    discriminator.train().requires_grad_(True)
    loss = LOSSES[config.loss]
    d_real = discriminator(real)                                         # (N,)
    d_fake = discriminator(fake.detach())                                # (N,)
    d_loss = loss(d_real, 1 - config.label_smoothing) + loss(d_fake, 0)  # ()
    optimizer.zero_grad()
    d_loss.backward()
    optimizer.step()
    return torch.stack([d_loss, d_real.mean(), d_fake.mean()]).detach()  # (3,)


def g_step(discriminator: nn.Module, optimizer: torch.optim.Optimizer, fake: Tensor, config: Config) -> Tensor:
    """G: minimise  L(D(fake), 1)  over G's weights (the non-saturating form, Goodfellow 2014, section 3).

    fake: (N, 3, S, S) with its graph. Returns the detached loss, ().
    """
    discriminator.train().requires_grad_(False)
    loss = LOSSES[config.loss]
    d_fake = discriminator(fake)                                         # (N,)
    g_loss = loss(d_fake, 1)                                             # ()
    optimizer.zero_grad()
    g_loss.backward()
    optimizer.step()
    return g_loss.detach()                                               # ()


def train(config: Config, images: Tensor, run_dir: str | Path | None = None, device: torch.device | None = None,
          progress: bool = True) -> Run:
    """Train one generator on images, uint8 (N, 3, S, S), and save the run into run_dir.

    An epoch is `config.epoch_images` images. The history has one record for each of at most 400 windows of equal
    length, with means over the window: step, epoch, images (seen), seconds, d_loss, g_loss, d_real, d_fake (D's mean
    logits). The same config on the same images and CPU gives the same history, seconds aside.
    """
    images = check_images(images, config)
    if run_dir is not None:
        Path(run_dir).mkdir(parents=True, exist_ok=True)  # fails now, if at all, and not when the training is done
    device = device or best_device()
    if device.type == "cuda" and images.numel() < torch.cuda.mem_get_info(device)[0] / 4:
        images = images.to(device)  # a batch is then an index into GPU memory
    # Measured with one CPU core at 64 px: channels-last makes a step 1.2 times faster.
    layout = torch.channels_last if device.type == "cpu" else torch.contiguous_format
    generator = GENERATORS[config.generator](config).to(device, memory_format=layout)
    discriminator = Discriminator(config).to(device, memory_format=layout)
    opt_g = adam(generator, config.lr_g, config)
    opt_d = adam(discriminator, config.lr_d, config)
    batches = real_batches(images, config, device)
    noise = torch.Generator(device).manual_seed(4 * config.seed + 2)

    epoch_steps = (config.epoch_images or len(images)) // config.batch_size
    steps = config.epochs * epoch_steps
    windows = {round(k * steps / min(400, steps)) for k in range(1, 401)}
    run = Run(config, [], generator, [], environment(device))
    stats = torch.zeros(4, device=device)                                # d_loss, d_real, d_fake, g_loss: sums
    d_stats = torch.zeros(3, device=device)
    last, start = 0, time.perf_counter()
    with progress_bar(steps, Path(run_dir).name if run_dir else config.label(), "step", progress) as bar:
        for step in range(1, steps + 1):
            real = next(batches)                                         # (N, 3, S, S)
            z = torch.randn(config.batch_size, config.z_dim, generator=noise, device=device)  # (N, z_dim)
            generator.train()
            fake = generator(z)                                          # (N, 3, S, S)
            if (step - 1) % config.d_every == 0:
                d_stats = d_step(discriminator, opt_d, real, fake, config)
            g_loss = g_step(discriminator, opt_g, fake, config)
            stats += torch.cat([d_stats, g_loss[None]])

            if step in windows:
                d_loss, d_real, d_fake, g_mean = (stats / (step - last)).tolist()  # the only wait for the GPU
                run.history.append({
                    "step": step, "epoch": step / epoch_steps, "images": step * config.batch_size,
                    "seconds": time.perf_counter() - start, "d_loss": d_loss, "g_loss": g_mean, "d_real": d_real, "d_fake": d_fake,
                })
                bar.set_postfix_str(f"D {d_loss:.3f} G {g_mean:.3f}", refresh=False)
                last = step
                stats.zero_()
            bar.update()
            if step % epoch_steps == 0:
                run.snapshots.append((step * config.batch_size, sample(run, 36, seed=0)))
    if run_dir is not None:
        save_run(run, Path(run_dir), fingerprint(images))
    return run


def adam(network: nn.Module, lr: float, config: Config) -> torch.optim.Adam:
    """Adam with the config's betas and L2."""
    return torch.optim.Adam(network.parameters(), lr, (config.beta1, config.beta2), weight_decay=config.weight_decay)


def check_images(images: Tensor, config: Config) -> Tensor:
    """The images themselves if the config can train on them, else an error that says what to change."""
    size = config.image_size
    if images.dtype != torch.uint8 or images.dim() != 4 or tuple(images.shape[1:]) != (3, size, size):
        raise ValueError(f"images are {images.dtype} {tuple(images.shape)}: expected torch.uint8 (N, 3, {size}, {size}). "
                         f"Load them with load_faces(source, {size}), or change image_size.")
    if len(images) < config.batch_size:
        raise ValueError(f"{len(images)} images are fewer than one batch of {config.batch_size}: lower batch_size")
    return images


@torch.no_grad()
def sample(run: Run, n: int, seed: int = 0) -> Tensor:
    """n images of the run's generator from noise of its own seed: uint8 (n, 3, S, S) on the CPU."""
    device = next(run.generator.parameters()).device
    z = torch.randn(n, run.config.z_dim, generator=torch.Generator().manual_seed(seed))  # (n, z_dim)
    run.generator.eval()
    return torch.cat([to_uint8(run.generator(part.to(device)), run.config).cpu() for part in z.split(256)])


# ----------------------------------------------------------------------------------------- saved runs


def _code_hash(*parts: Any) -> str:
    """Eight digits that change with what the code does, not with its comments, docstrings or layout."""
    layers = [f"{name} {make()!r}" for name, make in (*ACTIVATIONS.items(), *HEADS.items())] + [repr(DECONVS)]
    trees = [ast.parse(inspect.getsource(part)) for part in parts]
    for node in [node for tree in trees for node in ast.walk(tree)]:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node):
            node.body = node.body[1:] or [ast.Pass()]
    return hashlib.sha1("\n".join([*layers, *map(ast.unparse, trees)]).encode()).hexdigest()[:8]


# What makes a run: networks, losses and training. Taken at import, so that it is of the code that runs.
CODE = _code_hash(channel_ladder, to_network, real_batches, CSPup, *GENERATORS.values(), Discriminator, init_weights,
                  *LOSSES.values(), d_step, g_step, train, adam)


def fingerprint(images: Tensor) -> str:
    """A short name for a dataset: its shape and the hash of up to 256 of its images."""
    some = images[:: max(1, len(images) // 256)].cpu().contiguous()
    return f"{'x'.join(map(str, images.shape))}-{hashlib.sha1(some.numpy().tobytes()).hexdigest()[:8]}"


def save_run(run: Run, run_dir: Path, data: str) -> None:
    """run.pt (config, weights, snapshots, history, environment) and history.json, each written atomically.

    A folder that holds a run already is renamed, not overwritten.
    """
    if (run_dir / "run.pt").exists():
        kept = next(p for k in range(1, 1000) if not (p := run_dir.with_name(f"{run_dir.name}.old{k}")).exists())
        run_dir.rename(kept)
        print(f"the run that was in {run_dir} is kept as {kept.name}")
    run_dir.mkdir(parents=True, exist_ok=True)
    state = {
        "config": dataclasses.asdict(run.config), "data": data, "environment": run.environment, "history": run.history,
        "generator": run.generator.state_dict(), "snapshots": run.snapshots,
    }
    part = run_dir / f"run.pt.part{os.getpid()}"
    torch.save(state, part)
    os.replace(part, run_dir / "run.pt")
    write_json(run_dir / "history.json", {"config": state["config"], "data": data, "environment": run.environment,
                                          "history": run.history})


def run_or_load(config: Config, images: Tensor, run_dir: str | Path) -> Run:
    """The run saved in run_dir if it is of this config and these images, else a new one; says which.

    A run of another config or other images is not lost: when the new one is saved, its folder is renamed.
    """
    run_dir, data = Path(run_dir), fingerprint(check_images(images, config))
    if (run_dir / "run.pt").exists():
        state = torch.load(run_dir / "run.pt", map_location=best_device(), weights_only=True)
        saved = {**dataclasses.asdict(BASELINE), **state["config"]}  # a field that is newer than the run had no effect yet
        differing = [f"{k}={saved[k]} there, {v} here" for k, v in dataclasses.asdict(config).items() if saved[k] != v]
        if state["data"] != data:
            differing.append(f"data={state['data']} there, {data} here")
        if not differing:
            made = state["environment"]
            print(f"Loaded, not trained: {run_dir} [{config.label()}], trained {made['date']} on {made['hardware']} in "
                  f"{state['history'][-1]['seconds']:.0f} s by code {made['code']}"
                  + ("." if made["code"] == CODE else f" (the code is {CODE} now)."))
            generator = GENERATORS[config.generator](config).to(best_device())
            generator.load_state_dict(state["generator"])
            return Run(config, state["history"], generator, [(n, s.cpu()) for n, s in state["snapshots"]], made)
        print(f"{run_dir} holds another run ({'; '.join(differing)}): training anew.")
    return train(config, images, run_dir)


# ----------------------------------------------------------------------------------------------- metrics


def sliced_wasserstein(real: Tensor, fake: Tensor, seed: int = 0) -> dict[str, float]:
    """Sliced Wasserstein distance of Progressive GAN (arXiv 1710.10196, section 5), x1e3; lower is better.

    real, fake: uint8 (N, 3, S, S), equally many. Returns {"64": .., "32": .., "16": .., "avg": ..}: the distance
    between 7x7 patches at each level of a Laplacian pyramid, and their mean. Its floor is real against other real
    images, same count; it falls as N grows. One departure from the authors' code: both sides are cut at the same random
    places, so that a set is at distance 0 from itself.
    """
    if real.shape != fake.shape or real.dtype != torch.uint8 or fake.dtype != torch.uint8:
        raise ValueError(f"real {real.dtype} {tuple(real.shape)}, fake {fake.dtype} {tuple(fake.shape)}: expected "
                         "uint8 (N, 3, S, S), equally many of equal size")
    directions = torch.Generator().manual_seed(seed)
    device = best_device()
    distances = {}
    for size, patches in zip(_level_sizes(real), zip(_pyramid_patches(real, seed, device), _pyramid_patches(fake, seed, device))):
        a, b = patches                                                   # (128 N, 147) each
        repeats = []
        for _ in range(4):
            d = torch.randn(a.shape[1], 128, generator=directions).to(device)  # (147, 128)
            d /= d.norm(dim=0)
            repeats.append((_sorted(d.T @ a.T) - _sorted(d.T @ b.T)).abs().mean().item())  # of (128, 128 N)
        distances[str(size)] = 1e3 * sum(repeats) / 4
    return {**distances, "avg": sum(distances.values()) / len(distances)}


def _sorted(rows: Tensor) -> Tensor:
    """Rows sorted. On a CPU by NumPy: torch.sort also makes the indices, and took 10 times as long."""
    return torch.from_numpy(np.sort(rows.numpy(), axis=1)) if rows.device.type == "cpu" else rows.sort(dim=1).values


def _level_sizes(images: Tensor) -> list[int]:
    return [images.shape[-1] >> level for level in range(int(math.log2(images.shape[-1])) - 3)]


def _pyramid_patches(images: Tensor, seed: int, device: torch.device) -> Iterator[Tensor]:
    """Per level: 128 random 7x7 patches of every image, normalised per channel over all of them, (128 N, 147)."""
    row = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0], device=device) / 16
    binomial = (row[:, None] * row).expand(3, 1, 5, 5)                   # (3, 1, 5, 5)

    def smooth(x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (2, 2, 2, 2), mode="reflect"), binomial, groups=3)

    places = torch.Generator().manual_seed(seed)
    sizes = _level_sizes(images)
    x = images.to(device).float()                                        # (N, 3, S, S)
    for size in sizes:
        level = x
        if size > sizes[-1]:
            x = smooth(x)[:, :, ::2, ::2]                                # (N, 3, S/2, S/2)
            up = torch.zeros_like(level)
            up[:, :, ::2, ::2] = x * 4
            level = level - smooth(up)                                   # (N, 3, S, S): what the half size lost
        corner = torch.randint(0, size - 6, (2, len(images), 128, 1, 1), generator=places).to(device)
        span = torch.arange(7, device=device)
        rows, columns = corner[0] + span[:, None], corner[1] + span      # (N, 128, 7, 1), (N, 128, 1, 7)
        index = (rows * size + columns).flatten(1)                       # (N, 128 * 49)
        patches = level.flatten(2).gather(2, index[:, None].expand(-1, 3, -1))  # (N, 3, 128 * 49)
        std, mean = torch.std_mean(patches, dim=(0, 2), correction=0, keepdim=True)
        patches = ((patches - mean) / std.clamp(min=1e-3)).view(len(images), 3, 128, 49)  # one even grey has std 0
        yield patches.transpose(1, 2).reshape(-1, 147)                   # (128 N, 147)


def _small(images: Tensor) -> Tensor:
    """Images averaged down to 16 px, as vectors in [0, 1]: (N, 768)."""
    return F.adaptive_avg_pool2d(images.float() / 255, 16).flatten(1)


def _nearest(points: Tensor, k: int = 1) -> Tensor:
    """Distance of every point, (N, D), to its k-th nearest other one, (N,)."""
    distances = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")
    return distances.fill_diagonal_(math.inf).kthvalue(k, dim=1).values


def diversity(real: Tensor, fake: Tensor) -> float:
    """Mean distance of a fake image to its nearest other fake one, over the same for as many real ones.

    uint8 (N, 3, S, S) each, compared at 16 px. 1 is right, towards 0 is collapse; the mean over all pairs would be
    blind to samples that repeat a few faces.
    """
    if len(real) != len(fake):
        raise ValueError(f"{len(real)} real and {len(fake)} fake images: expected as many, nearest distances depend on it")
    return (_nearest(_small(fake)).mean() / _nearest(_small(real)).mean()).item()


def coverage(real: Tensor, fake: Tensor, k: int = 5) -> float:
    """Share of real images with a fake one nearer than their k-th nearest real one (arXiv 2002.09797); up to 1.

    uint8 (N, 3, S, S) each, compared at 16 px. Real against other real images reads about 0.97.
    """
    real_small, fake_small = _small(real), _small(fake)
    nearest_fake = torch.cdist(real_small, fake_small).min(dim=1).values  # (N,)
    return (nearest_fake <= _nearest(real_small, k)).float().mean().item()


def two_sets(images: Tensor, n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two disjoint random sets of n images each, uint8 (n, 3, S, S)."""
    if len(images) < 2 * n:
        raise ValueError(f"n={n}: two disjoint sets take {2 * n} images, there are {len(images)}")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    return images[order[:n].sort().values].cpu(), images[order[n : 2 * n].sort().values].cpu()


def floor(images: Tensor, n: int = 1024, seed: int = 0) -> dict[str, Any]:
    """What every metric reads on n real images against n others: the reference of `evaluate`."""
    real, other = two_sets(images, n, seed)
    return {"swd_floor": sliced_wasserstein(real, other, seed), "diversity_real": diversity(real, other),
            "coverage_real": coverage(real, other)}


def evaluate(run: Run, images: Tensor, seed: int = 0, n: int = 1024, reference: dict | None = None) -> dict[str, Any]:
    """One record of results/table.json: every metric of n samples against n images, each with its floor.

    reference: `floor(images, n, seed)` where it is at hand already, since it costs as much as the rest.
    """
    real, _ = two_sets(images, n, seed)
    fake = sample(run, n, seed)                                          # (n, 3, S, S)
    last = run.history[-max(1, len(run.history) // 20) :]  # the last twentieth: one window alone is noisy
    return {
        "image_size": run.config.image_size, "width": run.config.width, "seed": run.config.seed,
        "images_seen": int(run.history[-1]["images"]), "measured_on": n,
        "swd": sliced_wasserstein(real, fake, seed), "diversity": diversity(real, fake), "coverage": coverage(real, fake),
        **(reference or floor(images, n, seed)),
        "d_loss": sum(r["d_loss"] for r in last) / len(last), "g_loss": sum(r["g_loss"] for r in last) / len(last),
        "seconds": run.seconds, **run.environment,
    }


def file_results(path: str | Path, records: list[dict[str, Any]]) -> None:
    """Append records to a JSON list; a record of the same run, measured again, takes the place of the old one."""
    path = Path(path)

    def key(record: dict[str, Any]) -> list[Any]:
        return [record[name] for name in ("preset", "seed", "data", "image_size", "width", "images_seen")]

    filed = json.loads(path.read_text()) if path.exists() else []
    new = [key(record) for record in records]
    write_json(path, [record for record in filed if key(record) not in new] + records)


# ------------------------------------------------------------------------------------------------- plots

# Each returns a matplotlib Figure that pyplot knows nothing of: a notebook shows it once, where it is asked for, and
# nothing piles up in memory.


def show_images(images: Tensor, title: str = "", columns: int = 12, width: float = 10.0) -> Figure:
    """A grid of uint8 (N, 3, S, S); nothing is smoothed, so that what the network drew is what is seen."""
    grid = make_grid(images, nrow=min(columns, len(images)), padding=1, pad_value=255).permute(1, 2, 0).numpy()
    figure = Figure(figsize=(width, width * grid.shape[0] / grid.shape[1] + 0.3), layout="constrained")
    ax = figure.subplots()
    ax.imshow(grid, interpolation="nearest" if grid.shape[1] < 100 * width else "antialiased")
    ax.set_title(title, loc="left", fontsize=10)
    ax.axis("off")
    return figure


def plot_losses(run: Run, title: str = "") -> Figure:
    """D and G losses with the values they should approach, and D's mean logits on real and generated images."""
    seen = [record["images"] / 1000 for record in run.history]
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for key, name, level, colour in zip(("d_loss", "g_loss"), "DG", equilibrium(run.config), ("C0", "C1")):
        left.plot(seen, [record[key] for record in run.history], colour, lw=1, label=f"{name} loss")
        left.axhline(level, color=colour, ls="--", lw=1, label=f"equilibrium, {level:.2f}")
    left.set(title=title, ylabel="loss (nats)", ylim=(0, None))
    for key, name, colour in (("d_real", "real", "C2"), ("d_fake", "generated", "C3")):
        right.plot(seen, [record[key] for record in run.history], colour, lw=1, label=f"{name} images")
    right.axhline(0, color="grey", ls="--", lw=1, label="D cannot tell")
    right.set(title="what D says (mean logit)", ylabel="logit")
    for ax in (left, right):
        ax.set_xlabel("thousand images seen")
        ax.legend(frameon=False, fontsize=8, ncols=4, loc="lower center", bbox_to_anchor=(0.5, -0.36))
        ax.spines[["top", "right"]].set_visible(False)
    return figure


def compare(runs: dict[str, Run], n: int = 10, seed: int = 0) -> Figure:
    """One row of n samples for each run, the same noise in every row."""
    figure = Figure(figsize=(10, 8.6 / n * len(runs)), layout="constrained")
    for ax, (name, run) in zip(figure.subplots(len(runs), 1, squeeze=False)[:, 0], runs.items()):
        ax.imshow(make_grid(sample(run, n, seed), nrow=n, padding=1, pad_value=255).permute(1, 2, 0).numpy())
        ax.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=10)
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
    return figure


def results_table(records: list[dict[str, Any]]) -> str:
    """Markdown of records as `evaluate` returns them, each with a `preset`: direction and reference in the header."""
    first = records[0]
    lines = [
        f"| preset | images seen | SWD x1e3 ↓ (real: {first['swd_floor']['avg']:.1f}) | diversity → 1 | "
        f"coverage ↑ (real: {first['coverage_real']:.2f}) | D loss | G loss | seconds |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for r in records:
        lines.append(f"| `{r['preset']}` | {r['images_seen']:,} | {r['swd']['avg']:.1f} | {r['diversity']:.2f} | "
                     f"{r['coverage']:.2f} | {r['d_loss']:.2f} | {r['g_loss']:.2f} | {r['seconds']:.0f} |")
    return "\n".join(lines)
