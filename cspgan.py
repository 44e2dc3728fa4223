"""CSPup GAN: a generator of cross-stage-partial upsampling blocks, from noise z (100) to faces (128x128x3).

Read from top to bottom: config, environment, processes, data, models, losses, training, presets, runs, metrics, plots,
command line.
The report that uses all of it is gan_hw.ipynb. Every experiment is one line:

    run = train(BASELINE.but(block_norm="both", block_act="leaky_relu"), images, "results/my_idea")

Measured (results/table.json; 900 held-out faces of aligned64.zip at 32 px, width 64, one CPU core, PyTorch 2.14.1; SWD
x1e3, lower is better, mean and half the range over seeds): after 256,000 images `converged` has SWD 12.9 ± 1.9 and
0.97 ± 0.02 of the real diversity (3 seeds); the best other recipe, `dcgan_20`, 27.6 ± 1.8 (2 seeds); real faces among
themselves 10.7. After 64,000 images: `converged` 17 ± 1, the best of the 22 others, `dcgan`, 57 ± 3; the course's
baseline 399 ± 116, collapsed. Speed: results/benchmark.json.
"""

from __future__ import annotations

import argparse
import ast
import atexit
import contextlib
import copy
import ctypes
import dataclasses
import functools
import hashlib
import inspect
import json
import math
import os
import platform
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from difflib import get_close_matches
from io import BytesIO
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.utils import make_grid
from tqdm import tqdm

# Where D has won, gradients sink below 1e-38, and a CPU convolution of such denormal numbers takes 100 times as long
# (measured: 2258 against 23 ms). They are taken as 0.
np.finfo(np.float32), np.finfo(np.float64)  # looked at before, or older NumPys warn that the smallest one is 0
torch.set_flush_denormal(True)
torch.backends.cudnn.benchmark = True  # shapes stay the same: cuDNN tries its algorithms once

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
    flip: bool = False  # every second real image, at random, is mirrored
    augment: bool = False  # DiffAugment of real and generated images before D sees them: for small datasets
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
    d_wider: int = 1  # its channels, times those of G
    d_fewer: int = 0  # stride-2 convolutions left out of D, the deepest first
    # both networks
    init: str = "dcgan"  # weights N(0, 0.02), or "he": scaled so that activations keep their size
    # objective
    loss: str = "bce"  # "bce" (after a sigmoid, as the course has it), "bce_logits" or "relativistic"
    label_smoothing: float = 0.0  # one-sided: D's target for real images is 1 minus this; not for "relativistic"
    r1: float = 0.0  # weight gamma of the penalty gamma/2 |grad D|^2 at real images
    r2: float = 0.0  # the same at generated images
    # optimisation
    batch_size: int = 128  # images in one step
    epochs: int = 5
    epoch_images: int | None = None  # images that count as one epoch; None: as many as the dataset has
    lr_g: float = 2e-4  # Adam's step size for G
    lr_d: float = 2e-4  # Adam's step size for D
    beta1: float = 0.5  # Adam; 0.5 as in DCGAN, 0.9 is PyTorch's default
    beta2: float = 0.999
    lr_end: float = 1.0  # both step sizes fall on a half cosine to this share of themselves; 1: they stay
    weight_decay: float = 0.0  # L2 on the weights of both networks, added to the gradient as Adam does
    ema_images: int = 0  # half-life, in images, of a running mean of G's weights, which is then what is kept; 0: none
    d_every: int = 1  # D learns in every d_every-th step, G in every one
    seed: int = 0  # of weights, noise and data order
    # speed: the same training by other means, equal up to rounding; "auto" goes by the hardware, see `on_hardware`
    precision: str = "auto"  # of the networks: "float32", "bfloat16" or "float16"; penalties are always in float32
    layout: str = "auto"  # of images and weights in memory: "contiguous" or "channels_last"
    penalties: str = "auto"  # R1 and R2 by "double_backward", as they are written, or "linear": see `d_backward_linear`
    adam: str = "auto"  # "plain", or "fused": all weights in one kernel
    graph: str = "auto"  # a step is recorded once as a CUDA graph and then replayed: "on" or "off"
    memory: str = "auto"  # what a CPU step frees goes back to the system ("return") or waits for the next one ("keep")
    accumulate: int = 1  # a batch goes through the networks in so many parts: takes less memory, BatchNorm goes by parts

    def __post_init__(self) -> None:
        legal = {
            "image_size": (16, 32, 64, 128, 256), "head": HEADS, "generator": GENERATORS, "stem": ("cspup", "deconv"),
            "deconv_kernel": DECONVS, "block_act": ACTIVATIONS, "block_norm": ("none", "right", "both"), "d_norm": (True, False),
            "loss": D_LOSSES, "init": INITS, "flip": (True, False), "augment": (True, False),
            "precision": ("auto", "float32", *HALF), "layout": ("auto", *LAYOUTS), "penalties": D_BACKWARD,
            "adam": ("auto", "plain", "fused"), "graph": ("auto", "on", "off"), "memory": ("auto", "return", "keep"),
        }
        lowest = {"z_dim": 2, "width": 2, "d_wider": 1, "batch_size": 2, "epochs": 1, "d_every": 1, "accumulate": 1}  # others: 0
        below = {"label_smoothing": 1, "beta1": 1, "beta2": 1}
        for field in dataclasses.fields(self):
            name, value = field.name, getattr(self, field.name)
            kind: Any = type(field.default)
            if name in legal:
                if value not in legal[name] or type(value) is not kind:
                    raise ValueError(f"{name}={value!r}: expected one of {', '.join(map(repr, legal[name]))}")
            elif name != "epoch_images":
                low, high = lowest.get(name, 0), below.get(name, math.inf)
                if not (isinstance(value, kind if kind is int else (int, float)) and low <= value < high):
                    raise ValueError(f"{name}={value!r}: expected a {'whole ' * (kind is int)}number of at least {low}"
                                     + f" and below {high}" * (high < math.inf))
                object.__setattr__(self, name, kind(value))  # a NumPy number could be saved, but not loaded again
        if self.lr_end > 1:
            raise ValueError(f"lr_end={self.lr_end}: expected a share from 0 to 1")
        if self.d_fewer >= len(channel_ladder(self)):
            raise ValueError(f"d_fewer={self.d_fewer}: D has {len(channel_ladder(self))} such convolutions at {self.image_size} px")
        if self.epoch_images is not None and not (isinstance(self.epoch_images, int) and self.epoch_images >= self.batch_size):
            raise ValueError(f"epoch_images={self.epoch_images}: expected at least one batch of {self.batch_size}")
        if self.batch_size % self.accumulate:
            raise ValueError(f"accumulate={self.accumulate}: expected a divisor of batch_size={self.batch_size}")
        if self.penalties == "linear" and self.d_norm:
            raise ValueError("penalties='linear': D with BatchNorm (d_norm=True) is not linear between kinks: 'double_backward'")
        if self.graph == "on" and (self.d_every > 1 or self.accumulate > 1 or self.precision == "float16"):
            raise ValueError("graph='on': needs d_every=1, accumulate=1 and no float16, so that all steps are alike")

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


# ------------------------------------------------------------------------------------------- environment


@functools.cache
def best_device() -> torch.device:
    """The GPU if one really works, else the CPU; says so where torch lists a GPU that it cannot use."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    try:  # is_available() is true for cards that this build has no kernels for (P100): try a real operation
        F.conv2d(torch.ones(1, 1, 8, 8, device="cuda"), torch.ones(1, 1, 3, 3, device="cuda")).sum().item()
    except RuntimeError as error:
        print(f"{torch.cuda.get_device_name()} is listed but cannot be used ({said(error)}): training on the CPU. "
              "On Kaggle choose the accelerator 'GPU T4 x2'.")
        return torch.device("cpu")
    return torch.device("cuda")


def said(error: BaseException) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def environment(device: torch.device) -> dict[str, str]:
    """What a number depends on beside the config: hardware, versions, date and the hash of the code."""
    is_gpu, cores = device.type == "cuda", torch.get_num_threads()
    times = f"{processes()} x " if processes() > 1 else ""
    return {
        "hardware": times + (torch.cuda.get_device_name(device) if is_gpu else f"{cores} CPU core{'s' * (cores > 1)}"),
        "python": platform.python_version(), "torch": str(torch.__version__),
        "code": CODE, "date": time.strftime("%Y-%m-%d"),
    }


def peak_memory(device: torch.device) -> int:
    """MB that this process has held at most: of a GPU's memory, or of main memory with all else that it did."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) >> 20
    try:
        import resource  # not on Windows
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> (20 if sys.platform == "darwin" else 10)


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


# --------------------------------------------------------------------------------------------- processes

# With several GPUs, one process each trains its share of every batch, with averaged gradients, as if it were one. The first
# process is the program itself; the others only train along. They come from torchrun, or the first one hires them.

HIRED: list[subprocess.Popen] = []
TALK: list[Any] = []  # the group in which the first process says how it goes on
warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")  # since 2.14; the new name is unknown to 2.6


def processes() -> int:
    """How many train together; 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this one is; 0 is the program that writes, shows and decides."""
    return dist.get_rank() if processes() > 1 else 0


def join(this: int, world: int, address: str) -> None:
    """Become process `this` of `world`; address: "env://" for torchrun's, or "tcp://host:port" of the first one."""
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", this)))
    dist.init_process_group("cuda:nccl,cpu:gloo" if on_gpu else "gloo", init_method=address, rank=this, world_size=world,
                            timeout=timedelta(minutes=15))  # whoever does not come, or dies, is waited for so long
    TALK.append(dist.new_group(backend="gloo", timeout=timedelta(days=7)))  # while the first one measures, the others wait


def leave() -> None:
    """No longer train together."""
    TALK.clear()
    dist.destroy_process_group()


def hire(world: int) -> None:
    """Start the other processes, for a program that torchrun has not started: a notebook. They end with it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    print(f"Training on {world} GPUs, a process for each.")
    ours = {name: value for name, value in os.environ.items() if not name.startswith("TORCHELASTIC")}
    for this in range(1, world):
        place = {"RANK": this, "LOCAL_RANK": this, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command, variables = [sys.executable, __file__], {**ours, **{name: str(value) for name, value in place.items()}}
        HIRED.append(subprocess.Popen(command, env=variables, start_new_session=True))  # Ctrl-C is the first one's
    atexit.register(dismiss)
    join(0, world, f"tcp://127.0.0.1:{port}")


def dismiss(broken: bool = False) -> None:
    """End the processes that were hired. Broken: in the middle of a step, which will not end; else they wait for a run."""
    if not HIRED:
        return

    def end() -> None:
        with contextlib.suppress(Exception):  # of one that is gone already
            if broken:
                getattr(dist.distributed_c10d, "_abort_process_group", leave)()
            else:
                agree(None)
                leave()

    ending = threading.Thread(target=end, daemon=True)  # NCCL may wait for somebody who is gone
    ending.start()
    ending.join(20)
    TALK.clear()
    for process in HIRED:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.1 if broken else 20)
        process.kill()
    HIRED.clear()


def follow(this: int, world: int, address: str) -> None:
    """All that a process but the first does: trains along, run after run, until there are no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process decides when to stop, and says so
    join(this, world, address)
    while (config := agree(None)) is not None:
        with contextlib.suppress(FloatingPointError):
            train(Config(**config), share(None), progress=False)
    leave()


def agree(value: Any) -> Any:
    """What the first process says, in all of them. It goes by the CPU: no GPU is waited for."""
    if processes() > 1:
        said_by_first = [value]
        dist.broadcast_object_list(said_by_first, 0, TALK[0], torch.device("cpu"))
        (value,) = said_by_first
    return value


def averaged(x: Tensor) -> Tensor:
    """The mean of x over the processes, in all of them."""
    if processes() > 1:
        x = x.clone()
        dist.all_reduce(x)
        x /= processes()
    return x


def share(images: Tensor | None) -> Tensor:
    """The first process's images in all of them, uint8 (N, 3, S, S), wherever they have room."""
    shape, device = agree(images.shape if images is not None else None), best_device()
    if images is None:
        images = torch.empty(shape, dtype=torch.uint8)
        images = images.to(device) if fits_on(device, images) else images
    for part in images.split(4096):
        sent = part.to(device).contiguous()
        dist.broadcast(sent, 0)
        if rank() > 0:
            part.copy_(sent)
    return images


def fits_on(device: torch.device, images: Tensor) -> bool:
    """Whether images leave a GPU three quarters of its free memory."""
    return device.type == "cuda" and images.numel() < torch.cuda.mem_get_info(device)[0] / 4


# -------------------------------------------------------------------------------------------------- data


def find_faces(places: tuple[str | Path, ...] = ("/kaggle/input", "data")) -> Path | None:
    """A folder or zip of face images: CSPGAN_DATA, then Kaggle's input folder, then ./data; None: use toy_faces.

    Kaggle mounts a dataset under a name that varies, so CelebA's `img_align_celeba` is searched for; failing
    that, the folder (with its sub-folders) or zip with the most images. Links count if they lie directly in there.
    """
    if given := os.environ.get("CSPGAN_DATA"):
        if not Path(given).expanduser().exists():
            raise FileNotFoundError(f"CSPGAN_DATA={given}: no such folder or zip. {HOW_TO_GET_FACES}")
        return Path(given).expanduser()
    for place in filter(Path.is_dir, map(Path, places)):
        counts: Counter[Path] = Counter()
        links = [path for path in sorted(place.glob("[!.]*")) if path.is_symlink() and path.is_dir()
                 and not place.resolve().is_relative_to(path.resolve())]  # not round to where it lies itself
        for source in (place, *links):
            for name, about in _list_images(source).items():
                folders = (*source.relative_to(place).parts, *name.split(os.sep)[:-1])
                if "img_align_celeba" in folders:
                    return place.joinpath(*folders)
                counts[place.joinpath(*folders[:1])] += bool(about) and stat.S_ISREG(about[-1])
        for archive in place.rglob("*.[zZ][iI][pP]"):
            if archive.parent == place or not archive.is_symlink():
                with contextlib.suppress(OSError, ValueError):  # half a download
                    counts[archive] = len(_list_images(archive))
        if any(counts.values()):
            return max(counts, key=lambda path: counts[path])
    return None


def _list_images(source: Path) -> dict[str, tuple[int, ...]]:
    """{name: (bytes, date, mode) of its file} of the images in a folder (with its sub-folders) or a zip, sorted; no hidden ones."""
    found: dict[str, tuple[int, ...]] = {}
    if source.is_dir():
        _scan(str(source), "", found)
    elif not source.is_file():  # a pipe would be waited for
        raise FileNotFoundError(f"{source}: no such folder or zip. {HOW_TO_GET_FACES}")
    else:
        try:
            names = [name for name in zipfile.ZipFile(source).namelist() if name.lower().endswith(IMAGE_ENDINGS)]
        except Exception as error:  # whatever a damaged one raises
            raise ValueError(f"{source}: neither a folder nor a zip that can be read ({error}). {HOW_TO_GET_FACES}") from error
        for name in names:
            parts = name.replace("\\", "/").split("/")
            if not any(part.startswith(HIDDEN) and part not in (".", "..") for part in parts):
                found[name] = _about(source.stat())
    return {name: found[name] for name in sorted(found)}


HIDDEN = (".", "__MACOSX")


def _about(status: os.stat_result) -> tuple[int, ...]:
    return status.st_size, status.st_mtime_ns, status.st_mode


def _scan(folder: str, before: str, found: dict[str, tuple[int, ...]]) -> None:
    """Add a folder's images to `found`, names beginning with `before`. Links and what cannot be read are listed too: _read
    refuses them, so that they get named. One call of the system for each file: 200,000 take a second."""
    try:
        entries = list(os.scandir(folder))
    except OSError:
        found[before.rstrip(os.sep)] = ()
        return
    for entry in entries:
        name = entry.name
        if name.startswith(HIDDEN):
            continue
        if entry.is_dir(follow_symlinks=False):
            _scan(entry.path, before + name + os.sep, found)
        elif entry.is_symlink() or name.lower().endswith(IMAGE_ENDINGS):
            try:
                found[before + name] = _about(entry.stat(follow_symlinks=False))
            except FileNotFoundError:  # vanished since it was listed
                found[before + name] = ()


def load_faces(source: str | Path, size: int, cache_dir: str | Path = CACHE_DIR, limit: int | None = None) -> Tensor:
    """Images of a folder or zip as one memory-mapped tensor, decoded once and cached.

    Takes JPEG, PNG and WebP of any mode and shape, sub-folders included, in the order of their names; each
    becomes the largest centred square, resized with antialiasing. `limit` keeps the first so many files.
    The cache is made anew when the files, their dates, the size or the crop changed.

    Returns uint8 (N, 3, size, size). A file that is damaged, unreadable, of absurd size or a link is skipped, and named
    when the cache is made. A source that is missing, vanishes or holds no usable image is an error that says what to do.
    """
    source, cache_dir = Path(os.path.realpath(Path(source).expanduser())), Path(cache_dir).expanduser()
    found = _list_images(source)
    names = list(found)[:limit]
    if not names:
        raise ValueError(f"{source}: no {', '.join(IMAGE_ENDINGS)} file in it. {HOW_TO_GET_FACES}")
    made_from = (names, [found[name] for name in names], CROP)
    place, state = (hashlib.sha1(repr(part).encode()).hexdigest()[:8] for part in (str(source), made_from))
    cache = cache_dir / f"{source.stem}-{size}px-{place}-{state}.u8"  # with this name, a file that exists is up to date
    image_bytes = 3 * size * size
    if not cache.exists() or cache.stat().st_size % image_bytes:
        try:
            cache_dir.mkdir(parents=True, exist_ok=True)
            _decode_all(source, names, size, cache)
        except OSError as error:
            raise OSError(f"cannot make the image cache in {cache_dir} ({error}). {source} must stay there; the cache needs "
                          f"{len(names) * image_bytes / 1e9:.1f} GB: free some, or pass another cache_dir.") from error
        for old in set(cache_dir.glob(f"*-{size}px-{place}-*.u8")) - {cache}:  # one source and size keeps one cache
            with contextlib.suppress(OSError):  # Windows keeps a file that is still mapped
                old.unlink()
    pixels = torch.from_file(str(cache), size=cache.stat().st_size, dtype=torch.uint8)  # what is changed is copied first
    return pixels.view(-1, 3, size, size)


CROP = "largest centred square, EXIF upright, alpha on white, draft, Lanczos"  # as decode_face does it; part of a cache's name
MAX_BYTES, MAX_PIXELS = 256_000_000, 64_000_000  # of a file; more than cameras make, and each thread holds 16 B a pixel


def decode_face(data: bytes, size: int) -> np.ndarray:
    """One encoded image of any mode as RGB uint8 (3, size, size): centred square, antialiased resize."""
    formats = ("JPEG", "PNG", "WEBP", "BMP", "GIF")  # whatever the name says; EPS would start Ghostscript
    image: Image.Image = Image.open(BytesIO(data), formats=formats)
    if image.width * image.height > MAX_PIXELS:  # from the header: nothing is decoded yet
        raise ValueError(f"{image.width} x {image.height} pixels, expected at most {MAX_PIXELS:,}: make it smaller")
    image.draft("RGB", (2 * size, 2 * size))  # a JPEG four times too large is unpacked at half its size, and so on to an eighth
    image.load()
    if image.getexif().get(0x0112, 1) != 1:  # exif_transpose copies even what is upright
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":  # 16 bits a pixel: convert("RGB") would clip, not scale
        image = Image.fromarray((np.asarray(image, dtype=np.float32) / 257).clip(0, 255).round().astype(np.uint8))
    if image.has_transparency_data:  # the colours under transparent pixels are arbitrary: lay it on white
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image if image.mode == "RGB" else image.convert("RGB")  # which copies
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.resize((size, size), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side))
    return np.asarray(square).transpose(2, 0, 1)  # (3, size, size)


def _read(source: Path | zipfile.ZipFile, name: str) -> bytes:
    """One file of a folder or zip, unless it leads out of there, would be waited for, or would fill the memory."""
    if isinstance(source, Path):
        status = os.lstat(source / name)
        size, is_file = status.st_size, stat.S_ISREG(status.st_mode)
    else:
        size, is_file = source.getinfo(name).file_size, True
    if size > MAX_BYTES:
        raise ValueError(f"{size:,} bytes, expected at most {MAX_BYTES:,}: make it smaller")
    if not is_file:
        raise ValueError("a link, a pipe or a folder that may not be read: put a plain file there")
    if isinstance(source, Path):
        return (source / name).read_bytes()
    if name[0] in "/\\" or name[1:2] == ":" or ".." in name.replace("\\", "/").split("/"):
        raise ValueError("an absolute or parent path, expected one inside the zip: pack it anew")
    if source.getinfo(name).compress_type > zipfile.ZIP_DEFLATED:  # others are unpacked without a bound, whatever size says
        raise ValueError("packed by bzip2 or the like, expected deflate: pack it anew")
    with source.open(name) as file:
        return file.read(size)


def _decode_all(source: Path, names: list[str], size: int, cache: Path) -> None:
    """Decode on all cores (Pillow releases the interpreter lock) into a file that gets its name when it is whole."""
    opened: Path | zipfile.ZipFile = zipfile.ZipFile(source) if source.is_file() else source
    damaged = []

    def decode(some: list[str]) -> bytes:  # 16 to a task: threads that hand over after each image wait for each other
        faces = []
        for name in some:
            try:
                faces.append(decode_face(_read(opened, name), size).tobytes())
            except Exception as error:  # whatever a damaged file raises, it must not cost the other 200,000
                damaged.append(f"{name!r} ({type(error).__name__}: {error})")
        return b"".join(faces)

    def write(file: IO[bytes]) -> None:
        with (ThreadPoolExecutor(os.cpu_count()) as pool, progress_bar(len(names), "decoding", "image") as bar):
            for start in range(0, len(names), 1024):  # in blocks, so that results never pile up in memory
                block = names[start : start + 1024]
                file.writelines(pool.map(decode, [block[k : k + 16] for k in range(0, len(block), 16)]))
                bar.update(len(block))
        if damaged:
            shown = "; ".join(sorted(damaged)[:10]) + " ..." * (len(damaged) > 10)
            print(f"skipped {len(damaged)} of {len(names)} files: {shown}")
        if damaged and not _list_images(source) or len(damaged) == len(names):  # vanished, or of no use
            raise ValueError(f"{source}: none of its {len(names)} image files can be read. {HOW_TO_GET_FACES}")

    write_aside(cache, write)


def write_aside(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Write beside, flush to disk, rename: a reader sees the old file or the new one, never half of one."""
    part = path.with_name(f"{path.name}.part{os.getpid()}")
    try:
        with open(part, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_json(path: Path, value: Any, indent: int | None = 1) -> None:
    """`write_aside` for JSON."""
    write_aside(path, lambda file: file.write(json.dumps(value, indent=indent).encode()))


def download_celeba(folder: str | Path = "data") -> Path:
    """Download CelebA (1.4 GB) with the kaggle package, on request and outside Kaggle; returns the zip.

    Raises RuntimeError that says what to do when credentials or the network are missing or the disk is full.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    archive = folder / f"{CELEBA.split('/')[1]}.zip"
    if zipfile.is_zipfile(archive):
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


FACTORS = 38  # random numbers that one face takes


def draw_faces(factors: Tensor, size: int) -> Tensor:
    """Images in [0, 1], (m, 3, size, size), of faces given by numbers in [0, 1), (m, FACTORS)."""
    numbers = iter(factors.t()[..., None, None, None])

    def between(low, high):  # two numbers, giving (m, 1, 1, 1), or two colours, giving (m, 3, 1, 1)
        return torch.lerp(*torch.tensor([low, high], dtype=torch.float32).view(2, -1, 1, 1), next(numbers))

    def paint(colour, x, y, a, b, where=1):  # an ellipse with an edge one pixel wide; a thinner one gets fainter instead
        high = torch.as_tensor(b).clamp(min=1.6 / size)
        mask = (.5 + (1 - (x / a).square() - (y / high).square()) * (high * size / 4)).clamp_(0, 1) * (b / high * where)
        image.lerp_(torch.as_tensor(colour), mask)
        return mask                                                                       # (m, 1, size, size)

    line, tilt = (torch.arange(size) + .5) * (2 / size) - 1, between(-.2, .2)
    x, y = line * between(.75, 1) - between(-.12, .12), line.view(size, 1) * between(.8, 1) - between(-.1, .05)
    image = torch.cat([between(.45, .85) for _ in range(3)], 1) * (1 + between(-.3, .3) * x + between(-.3, .3) * y)
    skin, hair = between((1, .85, .75), (.4, .25, .17)), between((.08, .06, .05), (.85, .65, .35))
    paint(between((.2, .3, .6), (.9, .4, .3)), x, y - 1.2, between(.7, 1), .5)  # clothes
    x, y = x + tilt * y, y - tilt * x                                                     # (m, 1, size, size)
    fx, fy, long = x - between(-.08, .08), y - between(-.05, .05), between(0, .7)  # f: the face may turn and nod
    dome = paint(hair, x, y + .25 - long, between(.5, .62), .5 + long)
    paint(skin * .7, x, y - .65, .24, .3)  # neck
    paint(skin, x * (1 + between(0, .35) * y), y, .48, .63)
    paint(hair, fx - between(-.3, .3), y + .65, between(.3, .6), between(.1, .4), dome)  # fringe
    paint(skin * .6, fx, fy - .2, between(.05, .1), .03)  # nose
    smile = fy - between(.34, .42) + between(-1, 3) * (fx.square() - .01)
    paint(between((.75, .4, .35), (.7, .1, .2)), fx, smile, between(.12, .24), between(.025, .08))
    eye = fx.abs() - between(.18, .24)  # both at once
    white = paint(.97, eye, fy, .12, between(.04, .08))
    paint(between((.12, .07, .04), (.2, .5, .7)), eye * fx.sign() - between(-.04, .04), fy, .06, .06, white)  # iris
    paint(hair * .6, eye, fy + between(.13, .2) + between(-.3, .3) * eye, .14, between(.015, .04))  # brows
    paint(.1, eye, torch.hypot(eye, fy) - .16, 1, .02, between(0, 1) < .25)  # glasses
    return (image * (1 + between(-.4, .4) * x + between(-.25, .1) * y)).clamp_(0, 1)       # (m, 3, size, size)


def toy_faces(n: int, size: int, seed: int = 0) -> Tensor:
    """Procedural faces, uint8 (n, 3, size, size), size 16, 32, 64, 128 or 256: a data set that needs no download.

    Only (n, size, seed) matter: a smaller n gives the first of the same faces, another size the same at that size.
    """
    if n < 1 or size not in (16, 32, 64, 128, 256):
        raise ValueError(f"toy_faces: n is {n} and size {size}, expected n >= 1 and a power of two from 16 to 256")
    parts = torch.rand(n, FACTORS, generator=torch.Generator().manual_seed(seed)).split(2 ** 17 // size ** 2)  # fit a cache
    return torch.cat([draw_faces(part, size).mul_(255).round_().byte() for part in parts])


# ------------------------------------------------------------------------------------------------ models


ACTIVATIONS = {"relu": nn.ReLU, "leaky_relu": lambda: nn.LeakyReLU(0.2), "tanh": nn.Tanh}
HEADS = {"sigmoid": nn.Sigmoid, "tanh": nn.Tanh, "relu": nn.ReLU}
DECONVS = {4: (4, 2, 1), 2: (2, 2, 0)}  # kernel -> (kernel, stride, padding) that doubles the resolution


def channel_ladder(config: Config) -> list[int]:
    """Channels at 4x4, 8x8, ... up to half the image size: [1024, 512, 256, 128, 64] for 128 px, width 1024."""
    stages = int(math.log2(config.image_size)) - 2
    return [max(2, config.width >> stage) for stage in range(stages)]


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
            self.stem: nn.Module = CSPup(config.z_dim, ladder[0], act, *norms, deconv=(4, 1, 0))  # type: ignore[arg-type]
        else:
            self.stem = nn.ConvTranspose2d(config.z_dim, ladder[0], 4, 1, 0)
        self.blocks = nn.Sequential(*(
            CSPup(c, out, act, *norms, deconv=double) for c, out in zip(ladder, ladder[1:])))  # type: ignore[arg-type]
        self.to_rgb = nn.Sequential(nn.ConvTranspose2d(ladder[-1], 3, *double), HEADS[config.head]())
        INITS[config.init](self, 4 * config.seed)

    def forward(self, z: Tensor) -> Tensor:
        x = self.stem(z[:, :, None, None])                               # (N, width, 4, 4)
        x = self.blocks(x)                                               # (N, width / 2^k, S/2, S/2)
        with torch.autocast(x.device.type, enabled=False):  # half precision has fewer levels than a pixel near 1
            return self.to_rgb(x.float())                                # (N, 3, S, S)


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
        INITS[config.init](self, 4 * config.seed)

    def forward(self, z: Tensor) -> Tensor:
        x = self.layers[:-2](z[:, :, None, None])                        # (N, width / 2^k, S/2, S/2)
        with torch.autocast(x.device.type, enabled=False):
            return self.layers[-2:](x.float())                           # (N, 3, S, S)


class Discriminator(nn.Module):
    """DCGAN's discriminator: images (N, 3, S, S) -> raw logits (N,). A sigmoid belongs to the loss.

    Stride-2 convolutions 4x4 down to 4x4 with the generator's widths in reverse, times `d_wider`; LeakyReLU(0.2),
    BatchNorm on all but the first, then one convolution over what is left. `d_fewer` of the deepest are left out.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        widths = [config.d_wider * channels for channels in channel_ladder(config)[::-1]]
        widths = widths[: len(widths) - config.d_fewer]
        layers: list[nn.Module] = []
        for c, out in zip([3, *widths], widths):
            layers.append(nn.Conv2d(c, out, 4, 2, 1))
            if config.d_norm and c != 3:  # no running statistics: D is never asked outside training
                layers.append(nn.BatchNorm2d(out, track_running_stats=False))
            layers.append(nn.LeakyReLU(0.2, inplace=True))
        self.features = nn.Sequential(*layers)
        self.to_logit = nn.Conv2d(widths[-1], 1, config.image_size >> len(widths))
        INITS[config.init](self, 4 * config.seed + 1)

    def forward(self, images: Tensor, activations: list[Tensor] | None = None) -> Tensor:
        """What each LeakyReLU returns is added to `activations`, if that is given."""
        x = images
        for layer in self.features:
            x = layer(x)                                                 # ... (N, width, 4, 4)
            if activations is not None and isinstance(layer, nn.LeakyReLU):
                activations.append(x)
        return self.to_logit(x).flatten()                                # (N,)


GENERATORS = {"cspup": Generator, "dcgan": DCGANGenerator}


def init_dcgan(network: nn.Module, seed: int) -> None:
    """DCGAN's initialisation: weights N(0, 0.02), BatchNorm scales N(1, 0.02), biases 0; by its own seed."""
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d)):
            mean = 1.0 if isinstance(module, nn.BatchNorm2d) else 0.0
            nn.init.normal_(module.weight, mean, 0.02, generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def init_he(network: nn.Module, seed: int) -> None:
    """He's initialisation (arXiv 1502.01852): weights N(0, gain^2 / inputs), BatchNorm scales 1, biases 0; by its own seed.

    gain^2 is 2 for a convolution and 1 for a deconvolution, which no activation follows. A pixel out of a deconvolution
    sees only one in stride^2 of the kernel's weights. CSPup adds two branches, so without BatchNorm its activations still
    grow by 1.7 a block, where DCGAN's shrink to nothing.
    """
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            area = module.kernel_size[0] * module.kernel_size[1]
            is_deconv = isinstance(module, nn.ConvTranspose2d)
            opens = is_deconv and module.stride[0] == 1  # 1x1 to 4x4: every pixel out sees one weight a channel
            seen = 1 if opens else area / module.stride[0] ** 2 if is_deconv else area
            nn.init.normal_(module.weight, 0, math.sqrt((1 if is_deconv else 2) / (module.in_channels * seen)), generator=generator)
            nn.init.zeros_(module.bias) if module.bias is not None else None


INITS = {"dcgan": init_dcgan, "he": init_he}


# ------------------------------------------------------------------------------------------------ losses


def bce(logits: Tensor, target: float) -> Tensor:
    """Mean binary cross-entropy of sigmoid(logits) (N,) against one target; ln 2 where D cannot tell.

    As the course writes it, a sigmoid and then the logarithm: below a logit of about -28 the sigmoid is under 1e-12,
    where PyTorch clamps, and G's gradient dies.
    """
    p = torch.sigmoid(logits)                                            # (N,)
    # A NaN goes around the first term, which would stop on it with an error, on a GPU with one that ends the process.
    return F.binary_cross_entropy(p.nan_to_num(), torch.full_like(logits, target)) + 0 * logits.sum()


def bce_logits(logits: Tensor, target: float) -> Tensor:
    """The same value from the logits themselves: its gradient never dies."""
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, target))


def relativistic(higher: Tensor, lower: Tensor) -> Tensor:
    """Mean softplus(lower - higher) over pairs of logits, (N,) each; ln 2 where they do not differ.

    The relativistic pairing (arXiv 1807.00734, 2501.05441): it asks by how much a real image is more real than a
    generated one, not whether each is on its side of 0, so D cannot win by moving all generated images far away at once.
    """
    return F.softplus(lower - higher).mean()


# Objectives of D and G from their logits, (N,) each; s is the label smoothing. G's are the non-saturating forms.
D_LOSSES = {
    "bce": lambda d_real, d_fake, s: bce(d_real, 1 - s) + bce(d_fake, 0),
    "bce_logits": lambda d_real, d_fake, s: bce_logits(d_real, 1 - s) + bce_logits(d_fake, 0),
    "relativistic": lambda d_real, d_fake, s: relativistic(d_real, d_fake),
}
G_LOSSES = {
    "bce": lambda d_real, d_fake: bce(d_fake, 1),
    "bce_logits": lambda d_real, d_fake: bce_logits(d_fake, 1),
    "relativistic": lambda d_real, d_fake: relativistic(d_fake, d_real),
}


def gradient_penalty(logits: Tensor, images: Tensor) -> Tensor:
    """|grad_x D(x)|^2 of each image (N,): R1 at real images, R2 at generated ones (arXiv 1801.04406, section 4.1).

    logits: (N,) of D at images (N, 3, S, S), which must require a gradient. Keeps the graph, so that D can learn from it.
    BatchNorm in D would mix the images of a batch into each other's gradient.
    """
    (gradient,) = torch.autograd.grad(logits.sum(), images, create_graph=True)  # (N, 3, S, S)
    return gradient.square().sum(dim=(1, 2, 3))                          # (N,)


def equilibrium(config: Config) -> tuple[float, float]:
    """(D loss, G loss) where real and generated images have the same distribution and D is the best it can be.

    The best D then says p = (1 - s) / 2 everywhere (Goodfellow 2014, proposition 1, with smoothing s), so without
    smoothing D's two terms are ln 2 each, and G's one term is ln 2. The relativistic loss has one term on either side.
    """
    if config.loss == "relativistic":
        return math.log(2), math.log(2)
    target = 1 - config.label_smoothing
    p = target / 2
    d_loss = -target * math.log(p) - (1 - target) * math.log(1 - p) - math.log(1 - p)
    return d_loss, -math.log(p)


# ---------------------------------------------------------------------------------------------- training


def to_network(images: Tensor, config: Config) -> Tensor:
    """uint8 (N, 3, S, S) to float in the config's pixel range."""
    low, high = config.pixel_range
    return images.float().mul_((high - low) / 255).add_(low)


def to_uint8(images: Tensor, config: Config) -> Tensor:
    """Float in the config's pixel range to uint8 (N, 3, S, S)."""
    low, high = config.pixel_range
    return ((images - low) * (255 / (high - low))).round().clamp(0, 255).to(torch.uint8)


@functools.lru_cache(2)
def _shuffled(n: int, seed: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


def batch_index(step: int, n: int, config: Config) -> Tensor:
    """Which of n images step 0, 1, 2, ... sees, (batch_size,): every image once before any comes again.

    A function of the step alone, so that a resumed run needs no position to be saved.
    """
    turn, k = divmod(step, n // config.batch_size)
    order = _shuffled(n, (turn << 16) + 4 * config.seed + 3)             # (n,); of a seed only 32 bits count
    return order[k * config.batch_size : (k + 1) * config.batch_size]


HALF = {"bfloat16": torch.bfloat16, "float16": torch.float16}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
PLAIN = {"precision": "float32", "layout": "contiguous", "penalties": "double_backward", "adam": "plain", "graph": "off",
         "memory": "return"}  # the step as it is written, with nothing to make it faster: BASELINE.but(**PLAIN)


def on_hardware(config: Config, device: torch.device) -> Config:
    """The config with each "auto" of its speed replaced by what is best here; what cannot be had here is an error.

    On a CPU by measurement (results/benchmark.json). On a GPU by what is documented of it, until it is measured: tensor
    cores take half precision in channels_last, bfloat16 from compute capability 8 on (a T4 has 7.5), and float16 before.
    """
    if config.batch_size % (processes() * config.accumulate):
        raise ValueError(f"batch_size={config.batch_size}: cannot be shared by {processes()} processes with {config.accumulate} "
                         "part(s) each: expected a multiple of the two")
    on_gpu = device.type == "cuda"
    if on_gpu and processes() > 1 and config.d_norm and (config.r1 or config.r2):
        raise ValueError("r1 and r2 with d_norm=True: BatchNorm over several GPUs has no second derivative: d_norm=False")
    precision = config.precision
    if precision == "auto":
        precision = "float32" if not on_gpu else "bfloat16" if torch.cuda.get_device_capability(device) >= (8, 0) else "float16"
    like = config.d_every == config.accumulate == 1 and precision != "float16"  # every step is the same list of kernels
    best = {
        "precision": precision,
        "layout": "contiguous" if on_gpu and precision == "float32" else "channels_last",
        "penalties": "double_backward" if config.d_norm or not (config.r1 or config.r2) else "linear",
        "adam": "fused",
        "graph": "on" if on_gpu and like and processes() == 1 else "off",
        "memory": "return" if on_gpu else "keep",
    }
    chosen = config.but(**{name: value for name, value in best.items() if getattr(config, name) == "auto"})
    if chosen.graph == "on" and (not on_gpu or processes() > 1):
        raise ValueError(f"graph='on' on {device}, processes: {processes()}: expected one GPU and one process; 'auto' knows")
    return chosen


def mixed(config: Config, device: torch.device, exact: bool = False) -> torch.autocast:
    """The config's precision as a context; float32 where it must be exact, or where no precision is chosen."""
    half = None if exact else HALF.get(config.precision)
    return torch.autocast(device.type, half, enabled=half is not None)


NO_SCALING = torch.amp.GradScaler("cpu", enabled=False)


def d_step(discriminator: nn.Module, optimizer: torch.optim.Optimizer, real: Tensor, fake: Tensor, config: Config,
           scaler: torch.amp.GradScaler = NO_SCALING) -> Tensor:
    """D: minimise  L_D(D(real), D(fake)) + r1/2 |grad D(real)|^2 + r2/2 |grad D(fake)|^2  over D's weights.

    real, fake: (N, 3, S, S); fake's graph is left alone. L_D is Goodfellow's (2014, algorithm 1) for "bce".
    Returns detached (4,): the loss without penalties, mean logits on real and fake, the penalties.
    """
    discriminator.train().requires_grad_(True)
    optimizer.zero_grad()
    parts = [D_BACKWARD[config.penalties](discriminator, *part, config, scaler)
             for part in zip(real.detach().chunk(config.accumulate), fake.detach().chunk(config.accumulate))]
    scaler.step(optimizer)
    scaler.update()
    return torch.stack(parts).mean(0)                                    # (4,)


def d_backward(discriminator: nn.Module, real: Tensor, fake: Tensor, config: Config, scaler: torch.amp.GradScaler) -> Tensor:
    """The gradient of D's objective for a part of a batch, as it is written. Arguments and result: see `d_step`."""
    real, fake = real.requires_grad_(config.r1 > 0), fake.requires_grad_(config.r2 > 0)  # (n, 3, S, S)
    with mixed(config, real.device, exact=config.r1 + config.r2 > 0):  # half precision would spoil second derivatives
        d_real = discriminator(real).float()                             # (n,)
        d_fake = discriminator(fake).float()                             # (n,)
    d_loss = D_LOSSES[config.loss](d_real, d_fake, config.label_smoothing)  # ()
    penalty = torch.zeros_like(d_loss)
    if config.r1:
        penalty = penalty + config.r1 / 2 * gradient_penalty(d_real, real).mean()
    if config.r2:
        penalty = penalty + config.r2 / 2 * gradient_penalty(d_fake, fake).mean()
    scaler.scale((d_loss + penalty) / config.accumulate).backward()
    return torch.stack([d_loss, d_real.mean(), d_fake.mean(), penalty]).detach()  # (4,)


def d_backward_linear(discriminator: nn.Module, real: Tensor, fake: Tensor, config: Config, scaler: torch.amp.GradScaler) -> Tensor:
    """The same gradient without a double backward, in 4 passes through D instead of 6. D: convolutions and LeakyReLU only.

    Between its kinks D is linear, D(x) = <v, x> + b with v = grad_x D(x). The gradient of logit n by a layer's weights is
    slope x input, slope being that of the logit at the layer's output. The gradient of gamma/2 |v|^2 is gamma slope x (what
    comes in when v is sent through the layers without their biases), for a kink has no second derivative. Both are linear
    in what is sent, so one walk of u = dL/dD(x) x + gamma v through the layers gives their sum.
    """
    n, kink = len(real), torch.ops.aten.leaky_relu_backward
    layers = [layer for layer in discriminator.modules() if isinstance(layer, nn.Conv2d)]
    with mixed(config, real.device, exact=True):
        x = torch.cat([real, fake]).requires_grad_()                     # (2n, 3, S, S)
        activations: list[Tensor] = []
        logits = discriminator(x, activations)                           # (2n,)
        v, *slopes = torch.autograd.grad(logits, [x, *activations, logits], torch.ones_like(logits))  # (2n, 3, S, S), ...
        answers = logits.detach().requires_grad_()                       # (2n,)
        d_real, d_fake = answers.chunk(2)                                # (n,)
        d_loss = D_LOSSES[config.loss](d_real, d_fake, config.label_smoothing)  # ()
        (weight,) = torch.autograd.grad(d_loss / config.accumulate, answers)  # (2n,)
        weight = weight.view(-1, 1, 1, 1)                                # (2n, 1, 1, 1)
        gamma = torch.cat([x.new_full((n, 1, 1, 1), r / n) for r in (config.r1, config.r2)])  # (2n, 1, 1, 1)
        u, outputs = torch.addcmul(gamma / config.accumulate * v, weight, x.detach()), []  # (2n, 3, S, S)
        for k, layer in enumerate(layers):
            y = F.conv2d(u, layer.weight, None, layer.stride, layer.padding)  # (2n, c, s, s)
            outputs.append(y + weight * layer.bias[:, None, None])  # type: ignore[index]
            if k < len(activations):  # times 1 or 0.2, as this kink has decided
                u, slopes[k] = (kink(y, activations[k].detach(), 0.2, True) for y in (outputs[k].detach(), slopes[k]))
        torch.autograd.backward(outputs, [*slopes[:-1], slopes[-1].view(-1, 1, 1, 1)])
        penalty = (gamma / 2 * v.square()).sum()                         # ()
    return torch.stack([d_loss, d_real.mean(), d_fake.mean(), penalty]).detach()  # (4,)


D_BACKWARD = {"auto": d_backward, "double_backward": d_backward, "linear": d_backward_linear}


def g_step(discriminator: nn.Module, optimizer: torch.optim.Optimizer, real: Tensor, fake: Tensor | Iterable[Tensor],
           config: Config, scaler: torch.amp.GradScaler = NO_SCALING) -> Tensor:
    """G: minimise  L_G(D(real), D(fake))  over G's weights (the non-saturating form, Goodfellow 2014, section 3).

    real, fake: (N, 3, S, S), fake with its graph; only the relativistic loss looks at real. Where the config accumulates,
    fake is an iterable of its parts, and each one's graph is gone before the next is made. Returns the detached loss, ().
    """
    discriminator.train().requires_grad_(False)
    optimizer.zero_grad()
    losses = []
    for x, made in zip(real.chunk(config.accumulate), [fake] if isinstance(fake, Tensor) else fake):  # (n, 3, S, S) each
        with mixed(config, real.device):
            d_real = discriminator(x).float() if config.loss == "relativistic" else None  # (n,)
            d_fake = discriminator(made).float()                         # (n,)
        g_loss = G_LOSSES[config.loss](d_real, d_fake)                   # ()
        scaler.scale(g_loss / config.accumulate).backward()
        losses.append(g_loss.detach())
    scaler.step(optimizer)
    scaler.update()
    return torch.stack(losses).mean()                                    # ()


class Batches:
    """Batches of images on the device, uint8, in the order of `batch_index`; with several processes, this one's share.

    Images that take up to a quarter of the GPU's free memory lie there as a whole, and a batch is an index into them. Of a
    larger set the next batch is gathered by a thread and copied from pinned memory while the GPU works on this one.
    """

    def __init__(self, images: Tensor, config: Config, device: torch.device, resident: bool | None = None) -> None:
        self.config, self.device, self.n = config, device, len(images)
        if resident is None:
            resident = device.type == "cpu" or images.is_cuda or fits_on(device, images)
        self.images = images.to(device) if resident else images
        self.stream = None if resident or device.type == "cpu" else torch.cuda.Stream(device)
        here = functools.partial(torch.cuda.set_device, torch.cuda.current_device()) if self.stream else None
        self.pool = None if resident else ThreadPoolExecutor(1, initializer=here)
        self.ahead: dict[int, Any] = {}

    def __call__(self, step: int) -> Tensor:
        if self.pool is None:
            return self.fetch(step)                                      # (N, 3, S, S)
        batch = (self.ahead.get(step) or self.pool.submit(self.fetch, step)).result()
        self.ahead = {step + 1: self.pool.submit(self.fetch, step + 1)}
        if self.stream:
            batch.record_stream(torch.cuda.current_stream())  # its memory is not given to the next copy before it is used
        return batch                                                     # (N, 3, S, S)

    def fetch(self, step: int) -> Tensor:
        share = self.config.batch_size // processes()
        index = batch_index(step, self.n, self.config)[rank() * share : (rank() + 1) * share]  # (N,)
        batch = self.images[index.to(self.images.device, non_blocking=True)]  # (N, 3, S, S)
        if self.stream:
            with torch.cuda.stream(self.stream):
                batch = batch.pin_memory().to(self.device, non_blocking=True)
            self.stream.synchronize()  # in this thread, which has nothing else to do
        return batch


class Training:
    """All that the next step depends on, and that step. An interrupted run goes on from `state_dict`, bit for bit."""

    def __init__(self, config: Config, images: Tensor, device: torch.device) -> None:
        self.config, self.device = config, device
        self.chosen = chosen = on_hardware(config, device)
        keep_memory(chosen.memory == "keep")
        layout: Any = LAYOUTS[chosen.layout]
        self.generator = GENERATORS[config.generator](config).to(device, memory_format=layout)  # type: ignore[call-overload]
        self.discriminator = Discriminator(config).to(device, memory_format=layout)  # type: ignore[call-overload]
        self.kept = copy.deepcopy(self.generator) if config.ema_images else self.generator  # the generator that a run returns
        self.opt_g = adam(self.generator, config.lr_g, chosen)
        self.opt_d = adam(self.discriminator, config.lr_d, chosen)
        half = chosen.precision == "float16"
        self.scale_g = torch.amp.GradScaler(device.type, enabled=half)
        exact = config.r1 or config.r2 or chosen.penalties == "linear"  # D is in float32
        self.scale_d = torch.amp.GradScaler(device.type, enabled=half and not exact)
        self.parallel_g: nn.Module = self.generator  # what a step calls: with several processes, it averages gradients
        self.parallel_d: nn.Module = self.discriminator
        self.noise = torch.Generator(device).manual_seed(4 * config.seed + 2)
        self.batches = Batches(images, config, device)
        self.images = self.batches.images
        self.d_stats = torch.zeros(4, device=device)                     # of D's latest step
        self.sums = torch.zeros(5, device=device)                        # d_loss, d_real, d_fake, penalty, g_loss since a record
        self.new = torch.zeros((), device=device)                        # weight of G's weights in their running mean
        self.step = self.recorded = 0  # steps taken, and of them those that the records cover
        self.start = time.perf_counter()
        self.history: list[dict[str, float]] = []
        self.snapshots: list[tuple[int, Tensor]] = []
        self.epoch_steps = (config.epoch_images or len(images)) // config.batch_size
        self.steps = config.epochs * self.epoch_steps
        self.replay: Callable[[], None] | None = None  # the step as a CUDA graph, once it is recorded
        self.eager = 0  # steps before that

    @property
    def speed(self) -> str:
        """What is on, in words."""
        names = ["precision", "layout", "adam", "memory"] + ["penalties"] * bool(self.config.r1 or self.config.r2) + ["graph"] * (
            self.chosen.graph == "on") + ["accumulate"] * (self.chosen.accumulate > 1)
        return ", ".join(f"{name}={getattr(self.chosen, name)}" for name in names)

    def connect(self) -> None:
        """Train on together with the other processes, from where the first one is: same weights, same state, shared gradients.

        On GPUs, BatchNorm takes its statistics over the whole batch, as one process does; on CPUs (a test) by processes.
        """
        if processes() == 1:
            return
        buffer = BytesIO()
        torch.save(self.state_dict() if rank() == 0 and self.step else None, buffer)
        if state := torch.load(BytesIO(agree(buffer.getvalue())), map_location="cpu", weights_only=True):
            self.load_state_dict(state)
        if self.device.type == "cuda":
            for network in (self.generator, self.discriminator):
                nn.SyncBatchNorm.convert_sync_batchnorm(network)
        self.parallel_g, self.parallel_d = (
            DistributedDataParallel(network, broadcast_buffers=False) for network in (self.generator, self.discriminator))

    def advance(self) -> None:
        """One step of D and one of G, on the same images and noise."""
        config = self.config
        fall = config.lr_end + (1 - config.lr_end) * (1 + math.cos(math.pi * self.step / self.steps)) / 2
        for optimizer, rate in ((self.opt_g, config.lr_g), (self.opt_d, config.lr_d)):
            set_rate(optimizer, fall * rate)
        if config.ema_images:
            self.new.fill_(ema_weight(config, self.step + 1))
        batch = self.batches(self.step)                                  # (N, 3, S, S)
        if self.chosen.graph == "on":
            self.compute_as_graph(batch)
        else:
            self.compute(batch)
        self.step += 1

    def compute(self, batch: Tensor) -> None:
        """What a step does on the device, the same kernels in every step (but for d_every): nothing waits for their result."""
        config = self.chosen
        mine = slice(rank() * len(batch), (rank() + 1) * len(batch))  # of what is drawn for all processes
        real = to_network(batch, config).contiguous(memory_format=LAYOUTS[config.layout])  # (N, 3, S, S)
        if config.flip:
            mirrored = torch.rand(config.batch_size, 1, 1, 1, generator=self.noise, device=self.device)[mine] < 0.5
            real = torch.where(mirrored, real.flip(3), real)             # (N, 3, S, S)
        z = torch.randn(config.batch_size, config.z_dim, generator=self.noise, device=self.device)[mine]  # (N, z_dim)

        def generate() -> Iterator[Tensor]:
            for part in z.chunk(config.accumulate):
                with mixed(config, self.device):
                    fake = self.parallel_g.train()(part)                 # (n, 3, S, S)
                yield diff_augment(fake, config, self.noise) if config.augment else fake

        if config.augment:
            real = diff_augment(real, config, self.noise)
        with torch.set_grad_enabled(config.accumulate == 1):  # accumulating, G's graph is made anew for its own step
            fake = torch.cat(list(generate())) if config.accumulate > 1 else next(generate())  # (N, 3, S, S)
        if self.step % config.d_every == 0:
            self.d_stats = d_step(self.parallel_d, self.opt_d, real, fake, config, self.scale_d)
        g_loss = g_step(self.discriminator, self.opt_g, real, generate() if config.accumulate > 1 else fake, config, self.scale_g)
        if config.ema_images:
            update_ema(self.kept, self.generator, self.new)
        self.sums += torch.cat([self.d_stats, g_loss[None]])
        self.latest = real, fake.detach()

    def compute_as_graph(self, batch: Tensor) -> None:
        """`compute` by replaying a recording of it: one launch instead of a thousand. The first steps warm up for it."""
        if self.eager < 3:
            on_side_stream(lambda: self.compute(batch))
            self.eager += 1
            return
        if self.replay is None:
            self.batch, noise = batch.clone(), self.noise.get_state()
            try:
                self.replay = record_graph(lambda: self.compute(self.batch), self.noise)
            except RuntimeError as error:
                if is_out_of_memory(error):
                    raise
                print(f"No CUDA graph of this step ({said(error)}): it goes on without one.")
                self.chosen = self.chosen.but(graph="off")
                self.noise = torch.Generator(self.device)  # the old one waits for the end of the recording
                self.noise.set_state(noise)
                self.compute(batch)
                return
        self.batch.copy_(batch)
        self.replay()

    def record(self) -> None:
        """Add the means since the last record to the history: the only wait for the GPU."""
        sums = averaged(self.sums)
        d_loss, d_real, d_fake, penalty, g_loss = (sums / (self.step - self.recorded)).tolist()
        self.history.append({
            "step": self.step, "epoch": self.step / self.epoch_steps, "images": self.step * self.config.batch_size,
            "seconds": time.perf_counter() - self.start, "d_loss": d_loss, "g_loss": g_loss, "penalty": penalty,
            "d_real": d_real, "d_fake": d_fake,
        })
        self.recorded = self.step
        self.sums.zero_()

    def check_up(self) -> None:
        """The end of an epoch: keeps a snapshot, and adds to the latest record what the losses do not tell.

        diversity: the collapse alarm, `diversity` of up to 256 samples against as many images; below 0.5 something is wrong.
        grad_real, grad_fake: mean |grad_x D(x)| at the latest batch, the slope that D offers G.
        """
        n, record = min(256, len(self.images)), self.history[-1]
        samples = draw(self.kept, self.config, n, seed=0)                # (n, 3, S, S)
        some = self.images[torch.linspace(0, len(self.images) - 1, n).long().to(self.images.device)].cpu()
        self.snapshots.append((int(record["images"]), samples[:36].clone()))
        record["diversity"] = diversity(some, samples)
        self.discriminator.requires_grad_(False)
        for name, images in zip(("grad_real", "grad_fake"), self.latest):
            parts = [x.detach().clone().requires_grad_() for x in images.chunk(self.chosen.accumulate)]
            slopes = [torch.autograd.grad(self.discriminator(x).sum(), x)[0] for x in parts]  # (n, 3, S, S) each
            record[name] = torch.cat(slopes).square().sum(dim=(1, 2, 3)).sqrt().mean().item()

    SAVED = ("generator", "discriminator", "kept", "opt_g", "opt_d", "scale_g", "scale_d")  # have states of their own
    PLAIN = ("d_stats", "sums", "step", "recorded", "history", "snapshots")

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        states = {name: getattr(self, name).state_dict() for name in self.SAVED}
        return {**states, **{name: getattr(self, name) for name in self.PLAIN}, "noise": self.noise.get_state(),
                "seconds": time.perf_counter() - self.start}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        for name in self.SAVED:
            mine, saved = getattr(self, name), state[name] if name in state or "scale" not in name else {}
            if "param_groups" in saved:  # how Adam goes about it here is not what the checkpoint says
                saved = {**saved, "param_groups": mine.state_dict()["param_groups"]}
            if saved:  # a scaler that scales nothing has no state, and older checkpoints have no scaler
                mine.load_state_dict(saved)
        for optimizer in (self.opt_g, self.opt_d):  # a fused Adam takes it that its moments lie in memory as the weights do
            for p, moments in optimizer.state.items():
                moments.update({k: torch.empty_like(p).copy_(v) for k, v in moments.items() if v.shape == p.shape and k != "step"})
        for name in self.PLAIN:
            value = state[name]
            setattr(self, name, value.to(self.device) if isinstance(value, Tensor) else value)
        self.noise.set_state(state["noise"])
        self.start = time.perf_counter() - state["seconds"]

    @contextlib.contextmanager
    def clock_stopped(self) -> Iterator[None]:
        """What is done inside does not count as training time."""
        begun = time.perf_counter()
        yield
        self.start += time.perf_counter() - begun


def on_side_stream(compute: Callable[[], None]) -> None:
    """Run on another CUDA stream, as PyTorch asks for the steps before a graph is recorded."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        compute()
    torch.cuda.current_stream().wait_stream(stream)


def record_graph(compute: Callable[[], None], noise: torch.Generator) -> Callable[[], None]:
    """A CUDA graph of all that `compute` starts on the GPU: a function that does it again, with new numbers from `noise`."""
    graph = torch.cuda.CUDAGraph()
    graph.register_generator_state(noise)
    stream = torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # the thread that copies batches ahead goes on
            compute()
    finally:
        torch.cuda.set_stream(stream)  # a recording that fails leaves its own
    return graph.replay


def keep_memory(keep: bool) -> None:
    """Whether glibc keeps what is freed, or returns large blocks to the system and gets them back page by page.

    What it brings, results/benchmark.json has. Does nothing where there is no glibc.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0 if keep else 65536)  # M_MMAP_MAX: how many blocks may be mapped for themselves
        mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD: from which size on; glibc adapts it up to here by itself
        mallopt(-1, 2**31 - 1 if keep else 64 << 20)  # M_TRIM_THRESHOLD: from which size on free memory is returned


def ema_weight(config: Config, step: int) -> float:
    """How much of a running mean is new after a step, so that after half-life images half is.

    Early on the half-life is a tenth of the images seen, so that the mean soon forgets the first weights.
    """
    half_life = min(config.ema_images, 0.1 * step * config.batch_size)
    return 1 - 0.5 ** (config.batch_size / half_life)


@torch.no_grad()
def update_ema(mean: nn.Module, network: nn.Module, new: float | Tensor) -> None:
    """Move the running mean of a network's weights and buffers by one step: (1 - new) of the old, `new` of the new."""
    for a, b in zip((*mean.parameters(), *mean.buffers()), (*network.parameters(), *network.buffers())):
        a.lerp_(b, new) if a.is_floating_point() else a.copy_(b)


def diff_augment(images: Tensor, config: Config, generator: torch.Generator) -> Tensor:
    """DiffAugment (arXiv 2006.10738): colour, a shift by up to 1/8, half a side cut out; G's gradient passes through.

    images: (N, 3, S, S) in the config's pixel range; each gets its own random numbers from `generator`.
    """
    n, _, size, _ = images.shape
    low, high = config.pixel_range
    middle, device = (low + high) / 2, images.device
    mine, n_all = slice(rank() * n, (rank() + 1) * n), n * processes()   # each process has its share of what is drawn
    brightness, saturation, contrast = torch.rand(3, n_all, 1, 1, 1, generator=generator, device=device)[:, mine]
    x = images - middle + (high - low) * (brightness - 0.5) / 2          # (N, 3, S, S), grey is now 0
    grey = x.mean(dim=1, keepdim=True)                                   # (N, 1, S, S)
    x = grey + (x - grey) * 2 * saturation
    mean = x.mean(dim=(1, 2, 3), keepdim=True)                           # (N, 1, 1, 1)
    x = mean + (x - mean) * (0.5 + contrast)
    reach, line = size // 8, torch.arange(size, device=device)
    shift = torch.randint(-reach, reach + 1, (2, n_all, 1), generator=generator, device=device)[:, mine] + line + reach  # (2, N, S)
    x = F.pad(x, (reach,) * 4)[torch.arange(n, device=device)[:, None, None], :, shift[0, :, :, None], shift[1, :, None, :]]
    x = x.permute(0, 3, 1, 2)                                            # (N, 3, S, S)
    centre = torch.randint(0, size + 1, (2, n_all, 1), generator=generator, device=device)[:, mine]
    inside = (line - centre).abs() < size // 4                           # (2, N, S)
    return x * ~(inside[0, :, :, None] & inside[1, :, None, :])[:, None] + middle


def adam(network: nn.Module, lr: float, config: Config) -> torch.optim.Adam:
    """Adam with the config's betas and L2; in a graph its rate and step count are tensors that the recording reads."""
    parameters, in_graph = list(network.parameters()), config.graph == "on"
    rate = torch.tensor(lr, device=parameters[0].device) if in_graph else lr
    return torch.optim.Adam(parameters, rate, (config.beta1, config.beta2), weight_decay=config.weight_decay,
                            fused=config.adam == "fused" or None, capturable=in_graph)


def set_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """The step size from now on."""
    (group,) = optimizer.param_groups
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(lr)
    else:
        group["lr"] = lr


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
def draw(generator: nn.Module, config: Config, n: int, seed: int = 0) -> Tensor:
    """n images of a generator from noise of its own seed: uint8 (n, 3, S, S) on the CPU."""
    device = next(generator.parameters()).device
    z = torch.randn(n, config.z_dim, generator=torch.Generator().manual_seed(seed))  # (n, z_dim)
    generator.eval()
    return torch.cat([to_uint8(generator(part.to(device)), config).cpu() for part in z.split(256)])


# ----------------------------------------------------------------------------------------------- presets


BASELINE = Config()
H1 = BASELINE.but(block_norm="both", block_act="leaky_relu")
SLOW_D = BASELINE.but(block_norm="right", block_act="tanh", head="tanh", lr_d=2e-5, batch_size=256)
# The regularised relativistic GAN (arXiv 2501.05441) with the assignment's generator: see the report for each part's share.
CONVERGED = H1.but(loss="relativistic", r1=2.0, r2=2.0, d_norm=False, d_wider=2, init="he", head="tanh", flip=True, beta1=0.0,
                   beta2=0.9, lr_g=2e-3, lr_d=2e-3, lr_end=0.1, ema_images=20_000)

# Every experiment, in the report's order: name -> (config, the preset it is compared with).
EXPERIMENTS = {
    "baseline": (BASELINE, "baseline"),
    "h0_more_epochs": (BASELINE.but(epochs=20), "baseline"),
    "h1_bn_leaky": (H1, "baseline"),
    "h2_l2_big_batch": (H1.but(batch_size=2 * H1.batch_size, weight_decay=1e-4), "h1_bn_leaky"),
    "h3_smooth_tanh": (H1.but(label_smoothing=0.1, lr_d=3e-4, lr_g=8e-4, head="tanh"), "h1_bn_leaky"),
    # what other students of the course tried
    "slow_d": (SLOW_D, "baseline"),
    "slow_d_equal_rates": (SLOW_D.but(lr_d=SLOW_D.lr_g), "slow_d"),  # ours: is it the slow D, or the rest of slow_d?
    "unit_range": (SLOW_D.but(head="sigmoid"), "slow_d"),
    "fast_d": (BASELINE.but(block_norm="both", lr_d=2e-3), "baseline"),
    "low_lr": (BASELINE.but(lr_g=1e-5, lr_d=1e-5), "baseline"),
    "tanh_block": (BASELINE.but(block_act="tanh", block_norm="right", lr_g=1e-4, lr_d=1e-4), "baseline"),
    "bce_logits": (BASELINE.but(loss="bce_logits"), "baseline"),
    "lazy_d": (BASELINE.but(d_every=2), "baseline"),
    "shallow_d": (BASELINE.but(d_fewer=1), "baseline"),
    "no_bn_d": (BASELINE.but(d_norm=False, stem="deconv", deconv_kernel=2), "baseline"),
    "batch_64": (BASELINE.but(batch_size=BASELINE.batch_size // 2), "baseline"),
    "leaky_block": (BASELINE.but(block_act="leaky_relu"), "baseline"),  # ours: h1 changes two things at once
    "dcgan": (BASELINE.but(generator="dcgan", lr_g=1e-4, lr_d=1e-4), "baseline"),
    "adam_default": (BASELINE.but(beta1=0.9), "baseline"),
    "smooth_labels": (H1.but(label_smoothing=0.1), "h1_bn_leaky"),
    "tanh_head": (H1.but(head="tanh"), "h1_bn_leaky"),
    "h3_rates": (H1.but(lr_d=3e-4, lr_g=8e-4), "h1_bn_leaky"),
    # ours
    "converged": (CONVERGED, "baseline"),
}
PRESETS = {name: config for name, (config, _) in EXPERIMENTS.items()}

# One part taken out of converged, or added to it; and one part of it alone, in the best of the others.
ABLATIONS = {
    "without_pairs": (CONVERGED.but(loss="bce_logits"), "converged"),
    "without_penalties": (CONVERGED.but(r1=0.0, r2=0.0), "converged"),
    "without_bn_in_g": (CONVERGED.but(block_norm="none"), "converged"),
    "without_he": (CONVERGED.but(init="dcgan"), "converged"),
    "without_wide_d": (CONVERGED.but(d_wider=1), "converged"),
    "without_flip": (CONVERGED.but(flip=False), "converged"),
    "without_ema": (CONVERGED.but(ema_images=0), "converged"),
    "with_augment": (CONVERGED.but(augment=True), "converged"),
    "fast_d_wide": (PRESETS["fast_d"].but(d_wider=2), "fast_d"),
}
# As long as h0_more_epochs: does a recipe get better for as long as it runs? And how near does a tenth of it come?
LONG = {f"{name}_20": (PRESETS[name].but(epochs=20), name) for name in ("converged", "fast_d", "dcgan", "h3_smooth_tanh", "slow_d")}
LONG["converged_2"] = (CONVERGED.but(epochs=2), "converged")
RUNS = {**EXPERIMENTS, **ABLATIONS, **LONG, "converged_large": (CONVERGED.but(epochs=20), "converged")}


# ------------------------------------------------------------------------------------------------- runs


def _code_hash() -> str:
    """Eight digits that change with what makes a run: the sections models, losses and training, comments aside."""
    source = inspect.getsource(sys.modules[__name__])
    tree = ast.parse(source[source.index("\nACTIVATIONS") : source.index("\nBASELINE")])
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node):
            node.body = node.body[1:] or [ast.Pass()]
    return hashlib.sha1(ast.unparse(tree).encode()).hexdigest()[:8]


CODE = _code_hash()  # taken at import, so that it is of the code that runs


@dataclass
class Run:
    """One trained experiment and what it measured on the way."""

    config: Config
    history: list[dict[str, float]]  # records of a few hundred windows, see `train`
    generator: nn.Module  # with the running mean of the weights, where the config asks for one
    snapshots: list[tuple[int, Tensor]]  # (images seen, uint8 (36, 3, S, S)), the same noise in every one
    environment: dict[str, Any]
    stopped: str = ""  # why it ended early, if it did: "SIGINT", "SIGTERM", "time" or "not finite"

    @property
    def seconds(self) -> float:
        """Wall time of the training."""
        return self.history[-1]["seconds"] if self.history else 0.0

    @property
    def finished(self) -> bool:
        """Whether it has come to the end of its last epoch."""
        return bool(self.history) and self.history[-1]["epoch"] >= self.config.epochs


def sample(run: Run, n: int, seed: int = 0) -> Tensor:
    """n images of the run's generator from noise of its own seed: uint8 (n, 3, S, S) on the CPU."""
    return draw(run.generator, run.config, n, seed)


def train(config: Config, images: Tensor, run_dir: str | Path | None = None, device: torch.device | None = None,
          progress: bool = True, on_epoch: Callable[[Run], dict[str, float] | None] | None = None, time_budget: float = math.inf,
          save_every: float = 120.0) -> Run:
    """Train one generator on images, uint8 (N, 3, S, S), and save the run into run_dir.

    An epoch is `config.epoch_images` images. The history has one record for each of some 200 windows of equal
    length, with means over the window: step, epoch, images (seen), seconds, d_loss, g_loss, penalty, d_real, d_fake (D's
    mean logits). The record that ends an epoch also has what `Training.check_up` finds: whether samples collapse. The
    same config on the same images and CPU gives the same history, seconds aside.

    on_epoch: called with the run at the end of every epoch; numbers that it returns join the epoch's record.
    time_budget (in hours), Ctrl-C, 'Interrupt kernel' and SIGTERM: the run so far is saved and returned, and the same call
    goes on with it later, as if nothing had been. So does a call after a crash, from a checkpoint that is at most
    save_every seconds old.
    device: None takes every GPU there is, each for a share of the batch; the number of GPUs changes the speed only.
    """
    images, folder = check_images(images, config), Path(run_dir) if run_dir is not None else None
    try:
        gpus = gpus_for(config) if device is None else 1
        if HIRED and gpus != processes():
            dismiss()
        if processes() == 1 and gpus > 1:
            hire(gpus)
        if processes() > 1 and rank() == 0:
            agree(dataclasses.asdict(config))
            images = share(images)
        return _train(config, images, folder, device or best_device(), progress, on_epoch, time_budget, save_every)
    except BaseException:
        dismiss(broken=True)
        raise


def _train(config: Config, images: Tensor, folder: Path | None, device: torch.device, progress: bool,
           on_epoch: Callable[[Run], dict[str, float] | None] | None, time_budget: float, save_every: float) -> Run:
    """`train`, in every process: the first one has the folder and decides when to stop."""
    data = fingerprint(images)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()  # fails now, if at all, and not when the training is done
        if (folder / "generator.pt").exists():
            set_aside(folder)
    training = resume(config, images, device, folder, data) or Training(config, images, device)
    training.connect()
    run = Run(config, training.history, training.kept, training.snapshots, {**environment(device), "speed": training.speed})
    windows = {round(k * training.steps / min(200, training.steps)) for k in range(1, 201)}
    begun = saved = time.perf_counter()
    name = "/".join(folder.parts[-2:]) if folder else config.label()
    with progress_bar(training.steps, name, "step", progress) as bar, stop_signals() as signals:
        bar.n = bar.initial = training.step
        while training.step < training.steps:
            try:
                training.advance()
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                error.__traceback__ = error.__context__ = training = run = None  # type: ignore[assignment]
                raise MemoryError(what_fits(config, images, device)) from error
            bar.update()
            ends_epoch = training.step % training.epoch_steps == 0
            if training.step in windows or ends_epoch:
                training.record()
                run.environment["peak_memory_mb"] = peak_memory(device)
                d_loss, g_loss = (training.history[-1][key] for key in ("d_loss", "g_loss"))
                bar.set_postfix_str(f"D {d_loss:.3f} G {g_loss:.3f}", refresh=False)
                if not math.isfinite(d_loss + g_loss):
                    message = f"step {training.step}: D loss {d_loss}, G loss {g_loss}, with {config.label()}"
                    training = None  # type: ignore[assignment]  # room for the one that takes its place
                    good = resume(config, images, device, folder, data)
                    if good is None:
                        raise FloatingPointError(f"{message}. There is no checkpoint to go back to: try a lower learning rate.")
                    print(f"{message}. This is the run as it was at its last good checkpoint.")
                    return Run(config, good.history, good.kept, good.snapshots, run.environment, "not finite")
            if ends_epoch:
                training.check_up()
                with training.clock_stopped():
                    found = (on_epoch(run) if on_epoch else None) or {}
                    training.history[-1].update({key: float(value) for key, value in found.items()})
            now = time.perf_counter()
            reason = agree(signals[0] if signals else "time" if now - begun > 3600 * time_budget else "")
            if folder is not None and (reason or now - saved > save_every):
                is_saved = save_checkpoint(training, folder, data)
                saved = time.perf_counter()
            run.stopped = reason if training.step < training.steps or reason != "time" else ""
            if reason and training.step < training.steps:
                hope = "The same call goes on from here." if folder and is_saved else "It is not saved."
                if rank() == 0:
                    print(f"{reason}: stopped at step {training.step} of {training.steps}. {hope}")
                return run
    if folder is not None:
        save_run(run, folder, data)
    return run


def gpus_for(config: Config) -> int:
    """How many of the GPUs here can have an equal share of each part of a batch."""
    gpus = torch.cuda.device_count() if best_device().type == "cuda" else 1
    return next(n for n in range(gpus, 0, -1) if config.batch_size % (n * config.accumulate) == 0)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a GPU or the system had no more memory to give."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "allocate memory" in str(error)


def what_fits(config: Config, images: Tensor, device: torch.device) -> str:
    """The message for a batch that does not fit: found by trying, the largest halved one that does."""
    n, trial = config.batch_size, None
    while processes() == 1 and n > 2:
        if device.type == "cuda":
            torch.cuda.empty_cache()
        n, trial = n // 2, None
        try:
            trial = Training(config.but(batch_size=n, accumulate=1), images, device)
            for _ in range(5):  # the fourth records a graph, where there is one
                trial.advance()
            break
        except (RuntimeError, MemoryError):
            trial = None
    parts = next(k for k in range(config.batch_size // n, config.batch_size + 1) if config.batch_size % k == 0)
    advice = (f"batch_size={n} does (tried), or accumulate={parts}, which takes the same batch in {parts} parts" if trial else
              "try a smaller one, a larger accumulate, or a smaller width")
    return f"batch_size={config.batch_size} does not fit into the memory of {environment(device)['hardware']}: {advice}."


def images_per_second(config: Config, images: Tensor, seconds: float = 1.0) -> float:
    """How fast a run of this config would train here, measured on a few of its steps: to plan with."""
    steps = 8
    while True:  # each step has a record; the first ones choose algorithms and fill caches
        trial = config.but(epochs=1, epoch_images=steps * config.batch_size)
        first, *_, last = train(trial, images, progress=False).history[steps // 2 - 1 :]
        rate = (last["images"] - first["images"]) / (last["seconds"] - first["seconds"])
        if steps == 200 or last["seconds"] > seconds:
            return rate
        steps = min(200, max(2 * steps, int(seconds * rate / config.batch_size)))


@contextlib.contextmanager
def stop_signals() -> Iterator[list[str]]:
    """A list that names the signal once Ctrl-C or SIGTERM has come, so that a step is finished first; the second one raises."""
    names: list[str] = []

    def handle(number: int, frame: Any) -> None:
        if names and rank() == 0:
            raise KeyboardInterrupt
        names.append(signal.Signals(number).name)

    main = threading.current_thread() is threading.main_thread()  # signals come to no other one
    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM) if main}
    try:
        yield names
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


FORMAT = 1  # of checkpoints: to be raised when an older module could misread them


def save_checkpoint(training: Training, folder: Path, data: str) -> bool:
    """checkpoint.pt, with the previous one as checkpoint.old.pt; False where it was not saved.

    Weights that are not finite are not saved. Where the folder cannot be written, that is said, and what was there stays.
    """
    if not all(p.isfinite().all() for network in (training.generator, training.discriminator) for p in network.parameters()):
        return False
    state = {"format": FORMAT, "config": dataclasses.asdict(training.config), "data": data, "code": CODE,
             "training": training.state_dict()}
    new, path = folder / "checkpoint.new.pt", folder / "checkpoint.pt"
    try:
        write_aside(new, lambda file: torch.save(state, file))
        if path.exists():
            os.replace(path, folder / "checkpoint.old.pt")
        os.replace(new, path)
    except (OSError, RuntimeError) as error:  # torch.save raises either when the disk is full
        print(f"step {training.step}: no checkpoint, {folder} cannot be written ({said(error)}).")
        return False
    return True


def resume(config: Config, images: Tensor, device: torch.device, folder: Path | None, data: str) -> Training | None:
    """The training of the newest good checkpoint in folder; None where there is none.

    A checkpoint that cannot be used is named and put aside as it is, the run of another config or other images as well.
    """
    for name in ("checkpoint.new.pt", "checkpoint.pt", "checkpoint.old.pt"):
        if folder is None or not (path := folder / name).exists():
            continue
        training = Training(config, images, device)
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
            if saved["format"] > FORMAT:
                raise ValueError(f"it has format {saved['format']}, this module reads up to {FORMAT}: update cspgan.py")
            differing, state = differences(saved, config, data), saved["training"]
            if not differing:
                if len(state["noise"]) != len(training.noise.get_state()):
                    print(f"{path} was made on another kind of device: the noise begins anew, so not bit for bit.")
                    state["noise"] = training.noise.manual_seed((state["step"] << 16) + 4 * config.seed + 2).get_state()
                training.load_state_dict(state)
        except Exception as error:  # whatever a damaged file raises, the one before it may be whole
            print(f"{path} is refused ({said(error)}).")
            with contextlib.suppress(OSError):
                path.replace(path.with_suffix(".refused"))
            continue
        if differing:
            set_aside(folder, differing)
            return None
        code = "" if saved["code"] == CODE else f", so far by code {saved['code']} (the code is {CODE} now)"
        print(f"Resumed: {folder} [{config.label()}] at step {training.step} of {training.steps}{code}.")
        return training
    return None


def differences(saved: dict[str, Any], config: Config, data: str) -> str:
    """What differs between a saved run and this one, in words; empty if nothing does."""
    there = {**dataclasses.asdict(BASELINE), **saved["config"], "data": saved["data"]}  # a newer field had no effect yet
    here = {**dataclasses.asdict(config), "data": data}
    return ", ".join(f"{name}={there[name]} there, {value} here" for name, value in here.items() if there[name] != value)


def set_aside(folder: Path, differing: str = "") -> None:
    """Move the files of a run to a folder beside it, so that nothing is overwritten; folders in it are other runs, and stay."""
    kept = next(p for k in range(1, 1000) if not (p := folder.with_name(f"{folder.name}.old{k}")).exists())
    kept.mkdir()
    for path in [path for path in folder.iterdir() if path.is_file()]:
        path.rename(kept / path.name)
    print(f"{folder} held {f'another run ({differing})' if differing else 'a run'}, which is kept as {kept.name}: training anew.")


def fingerprint(images: Tensor) -> str:
    """A short name for a dataset: its shape and the hash of some of its images."""
    some = images[:: max(1, len(images) // 256)].cpu().contiguous()
    return f"{'x'.join(map(str, images.shape))}-{hashlib.sha1(some.numpy().tobytes()).hexdigest()[:8]}"


def save_run(run: Run, folder: Path, data: str) -> None:
    """generator.pt (a plain state_dict), snapshots.pt, and history.json with config, environment and history.

    Where they cannot be written, that is said, and checkpoints stay.
    """
    about = {"config": dataclasses.asdict(run.config), "data": data, "environment": run.environment, "history": run.history}
    try:
        write_aside(folder / "snapshots.pt", lambda file: torch.save(run.snapshots, file))
        write_json(folder / "history.json", about, indent=None)  # 200 records: a line, not 2,000
        weights = {name: value.cpu() for name, value in run.generator.state_dict().items()}
        write_aside(folder / "generator.pt", lambda file: torch.save(weights, file))  # last: now the run is whole
        for old in folder.glob("checkpoint*.pt*"):
            old.unlink()
    except (OSError, RuntimeError) as error:
        print(f"{folder} cannot be written ({said(error)}): the run is in memory only. Free some space and save "
              "it by save_run(run, folder, fingerprint(images)).")


def load_run(folder: str | Path) -> Run:
    """A finished run from its folder."""
    folder = Path(folder)
    if not (folder / "generator.pt").exists():
        raise FileNotFoundError(f"{folder}/generator.pt: no finished run here. Train one: train(config, images, {str(folder)!r})")
    try:
        saved = json.loads((folder / "history.json").read_text())
        config = Config(**saved["config"])
        generator = GENERATORS[config.generator](config).to(best_device())
        generator.load_state_dict(torch.load(folder / "generator.pt", map_location=best_device(), weights_only=True))
        snapshots = torch.load(folder / "snapshots.pt", weights_only=True) if (folder / "snapshots.pt").exists() else []
    except Exception as error:  # whatever a damaged file raises
        raise ValueError(f"{folder} holds a damaged run ({said(error)}): rename the folder and train again") from error
    snapshots = snapshots or [(int(saved["history"][-1]["images"]), draw(generator, config, 256)[:36])]
    return Run(config, saved["history"], generator, snapshots, saved["environment"])


def run_or_load(config: Config, images: Tensor, run_dir: str | Path, **options: Any) -> Run:
    """The run saved in run_dir if it is of this config and these images, else a new one; says which. Options: see `train`.

    A run of another config or other images is not lost: its folder is renamed.
    """
    folder, data = Path(run_dir), fingerprint(check_images(images, config))
    if (folder / "generator.pt").exists():
        differing = differences(json.loads((folder / "history.json").read_text()), config, data)
        if not differing:
            run = load_run(folder)
            made = run.environment
            print(f"Loaded, not trained: {folder} [{config.label()}], trained {made['date']} on {made['hardware']} in "
                  f"{run.seconds:.0f} s by code {made['code']}" + ("." if made["code"] == CODE else f" (the code is {CODE} now)."))
            return run
        set_aside(folder, differing)
    return train(config, images, folder, **options)


# ----------------------------------------------------------------------------------------------- metrics

# Pure functions of uint8 images (N, 3, S, S). What they draw at random depends on `seed` and on the images' content,
# not on their order and not on the global random state.


def hold_out(images: Tensor, share: float = 0.1) -> tuple[Tensor, Tensor]:
    """(images to train on, images to measure on): the last tenth is never trained on. Views, no copy."""
    held = round(len(images) * share)
    if not 0 < held < len(images):
        raise ValueError(f"share={share} of {len(images)} images leaves none on one side: expected a share between 0 and 1")
    return images[:-held], images[-held:]


def sliced_wasserstein(real: Tensor, fake: Tensor, seed: int = 0) -> dict[str, float]:
    """Sliced Wasserstein distance of Progressive GAN (arXiv 1710.10196, section 5), x1e3; lower is better.

    real, fake: uint8 (N, 3, S, S), equally many. Returns {"64": .., "32": .., "16": .., "avg": ..}: the distance
    between 7x7 patches at each level of a Laplacian pyramid, and their mean. Its floor is real against other real
    images, same count; it falls as N grows. Each image's content says where it is cut, so a set is at distance 0 from
    itself. The normalisation of the patches makes it blind to a colour shift of all images: `coverage` sees that.
    """
    if real.shape != fake.shape or real.dtype != torch.uint8 or fake.dtype != torch.uint8:
        raise ValueError(f"real {real.dtype} {tuple(real.shape)}, fake {fake.dtype} {tuple(fake.shape)}: expected "
                         "uint8 (N, 3, S, S), equally many of equal size")
    size, random = real.shape[-1], torch.Generator().manual_seed(seed)
    levels, distances = max(1, int(math.log2(size)) - 3), {}
    corners = [_corners(images, levels, seed) for images in (real, fake)]
    for level in range(levels):
        a, b = (_patches(images, level, corner[level]) for images, corner in zip((real, fake), corners))  # (147, 128 N) each
        repeats = []
        for _ in range(4):
            d = F.normalize(torch.randn(128, len(a), generator=random), dim=1).to(a.device)  # (128, 147)
            repeats.append(_sorted(d @ a).sub_(_sorted(d @ b)).abs_().mean().item())  # of (128, 128 N)
        distances[str(size >> level)] = 1e3 * sum(repeats) / 4
    return {**distances, "avg": sum(distances.values()) / len(distances)}


def _keys(images: Tensor, seed: int) -> list[int]:
    """A random number for each image, from its content and the seed alone; copies of one image get different ones."""
    copies: Counter[int] = Counter()
    salt, keys = seed.to_bytes(8, "little"), []
    for image in images.cpu().contiguous().numpy():
        key = int.from_bytes(hashlib.blake2b(image.tobytes(), digest_size=8, salt=salt).digest(), "little")
        keys.append(key + copies[key])
        copies[key] += 1
    return keys


def _corners(images: Tensor, levels: int, seed: int) -> Tensor:
    """Upper left corners of 128 random 7x7 patches of each image at each level: (levels, 2, N, 128)."""
    places = np.stack([np.random.default_rng(key).random((levels, 2, 128), dtype=np.float32) for key in _keys(images, seed)])
    free = torch.tensor([(images.shape[-1] >> level) - 6 for level in range(levels)])
    return (torch.from_numpy(places).permute(1, 2, 0, 3) * free.view(-1, 1, 1, 1)).long()


def _sorted(rows: Tensor) -> Tensor:
    """Rows sorted. On a CPU by NumPy on all cores: torch.sort also makes the indices, and took 10 times as long."""
    if rows.device.type == "cpu":
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            list(pool.map(np.ndarray.sort, rows.numpy()))  # in place, row by row
        return rows
    return rows.sort(dim=1).values


def _patches(images: Tensor, level: int, corner: Tensor) -> Tensor:
    """7x7 patches of a Laplacian pyramid's level, as columns, normalised per channel over all of them: (147, 128 N).

    corner: (2, N, 128), as of `_corners`. Level 0 has the images' size, and the last one (16 px) keeps what is
    left instead of a difference. Smoothing is with the 5x5 binomial filter and mirrored edges.
    """
    device = best_device()
    row = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0], device=device) / 16
    binomial = (row[:, None] * row).expand(3, 1, 5, 5)                   # (3, 1, 5, 5)

    def smooth(x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (2, 2, 2, 2), mode="reflect"), binomial, groups=3)

    span = torch.arange(7)
    rows, columns = corner[0][..., None, None] + span[:, None], corner[1][..., None, None] + span
    side, done = images.shape[-1] >> level, 0
    patches = torch.empty(3, 49, 128 * len(images), device=device)       # (3, 49, 128 N)
    for chunk, index in zip(images.split(256), (rows * side + columns).flatten(1).split(256)):  # bounds the memory
        x = chunk.to(device).float()                                     # (n, 3, S, S)
        for _ in range(level):
            x = smooth(x)[:, :, ::2, ::2]
        if side > 16:
            up = torch.zeros_like(x)
            up[:, :, ::2, ::2] = 4 * smooth(x)[:, :, ::2, ::2]
            x = x - smooth(up)                                           # (n, 3, side, side): what half the size loses
        index = index.to(device)[:, None].expand(-1, 3, -1)              # (n, 3, 128 * 49)
        cut = x.flatten(2).gather(2, index).view(-1, 3, 128, 49).permute(1, 3, 0, 2).flatten(2)  # (3, 49, 128 n)
        patches[:, :, done : done + cut.shape[2]] = cut
        done += cut.shape[2]
    std, mean = torch.std_mean(patches, dim=(1, 2), correction=0, keepdim=True)
    return patches.sub_(mean).div_(std.clamp(min=1e-3)).flatten(0, 1)    # (147, 128 N); one even grey has std 0


def ms_ssim(images: Tensor, seed: int = 0) -> float:
    """Mean multi-scale structural similarity of random pairs, as in Progressive GAN; near the real images' own is right.

    uint8 (N, 3, S, S). Up to 1; higher than real images read means that the samples resemble each other. Five scales
    (Wang 2003), an 11x11 Gaussian window of sigma 1.5 that shrinks where the image is smaller than it.
    """
    if len(images) < 2 or images.dtype != torch.uint8:
        raise ValueError(f"images {images.dtype} {tuple(images.shape)}: expected uint8 (N, 3, S, S), at least two of them")
    keys = _keys(images, seed)
    order = torch.tensor(sorted(range(len(keys)), key=keys.__getitem__))  # each image is compared with the next in it
    pairs = zip(images[order].split(256), images[order.roll(-1)].split(256))
    return torch.cat([_ms_ssim(*(x.to(best_device()).float() for x in pair)) for pair in pairs]).mean().item()


def _ms_ssim(a: Tensor, b: Tensor) -> Tensor:
    """MS-SSIM of each pair (N,) of images in [0, 255], (N, 3, S, S)."""
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    result = torch.ones(len(a), device=a.device)
    weights = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
    for scale, weight in enumerate(weights):
        window = min(11, a.shape[-1])
        at = torch.arange(window, device=a.device) - (window - 1) / 2
        row = torch.exp(-0.5 * (at / (window * 1.5 / 11)).square())
        row = (row / row.sum()).expand(15, 1, 1, window)  # along rows, then along columns: the Gaussian is separable
        moments = F.conv2d(torch.cat([a, b, a * a, b * b, a * b], dim=1), row, groups=15)
        moments = F.conv2d(moments, row.transpose(2, 3), groups=15)
        mean_a, mean_b, aa, bb, ab = moments.chunk(5, dim=1)             # (N, 3, s, s) each
        contrast = (2 * (ab - mean_a * mean_b) + c2) / (aa - mean_a.square() + bb - mean_b.square() + c2)
        luminance = (2 * mean_a * mean_b + c1) / (mean_a.square() + mean_b.square() + c1)
        last = scale == len(weights) - 1
        value = (luminance * contrast if last else contrast).mean(dim=(1, 2, 3))  # (N,)
        result = result * value.clamp(min=0) ** weight
        if not last:
            a, b = (x if x.shape[-1] == 1 else F.avg_pool2d(x, 2) for x in (a, b))
    return result


def _small(images: Tensor) -> Tensor:
    """Images averaged down to 16 px, as vectors (N, 768) in [0, 255]."""
    return torch.cat([F.adaptive_avg_pool2d(part.double(), 16).flatten(1) for part in images.split(1024)])


def _distances(a: Tensor, b: Tensor) -> Tensor:
    """Root mean square differences of pixels in [0, 1] between vectors as of `_small`: (N, M).

    Computed from products, which is fast, and exact: averages of bytes over 2^k pixels are binary fractions, and their
    products fit a float64. So a copy is at distance 0.
    """
    return torch.cdist(a, b, compute_mode="use_mm_for_euclid_dist") / (255 * math.sqrt(a.shape[1]))


def _nearest(points: Tensor, k: int = 1) -> Tensor:
    """Distance of every point to its k-th nearest other one, (N,)."""
    return _distances(points, points).fill_diagonal_(math.inf).kthvalue(k, dim=1).values


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
    if len(real) <= k:
        raise ValueError(f"{len(real)} real images: expected more than k={k}")
    distances, _ = nearest_real(real, fake)
    return (distances <= _nearest(_small(real), k)).float().mean().item()


def nearest_real(fake: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """(distances, indices), (N,) each: the image of `real` nearest to each of `fake`, to see whether G has memorised.

    uint8 (N, 3, S, S) and (M, 3, S, S), root mean square difference of pixels in [0, 1] at 16 px. A copy is at 0.
    How near is too near, held-out real images tell, in the place of `fake`.
    """
    points = _small(fake)                                                # (N, 768)
    best, index = torch.full((len(points),), math.inf).double(), torch.zeros(len(points), dtype=torch.long)
    for start in range(0, len(real), 8192):  # in chunks: 200,000 images would be 1.2 GB of points
        distance, at = _distances(points, _small(real[start : start + 8192].cpu())).min(dim=1)
        index = torch.where(distance < best, at + start, index)
        best = torch.minimum(best, distance)
    return best, index


def fid_kid(real: Tensor, fake: Tensor) -> dict[str, Any]:
    """{"fid": .., "kid": .., "no_fid": ""} by torch-fidelity; {"fid": None, "kid": None, "no_fid": why} where it cannot.

    uint8 (N, 3, S, S) each; both lower is better. They need `pip install torch-fidelity` and its Inception weights, which
    it downloads. Fewer than about 10,000 images of each side bias FID upwards; KID is unbiased.
    """
    try:
        from torch_fidelity import calculate_metrics

        as_dataset: Any = torch.utils.data.Subset  # of uint8 (3, S, S)
        sides = [as_dataset(images, range(len(images))) for images in (real, fake)]
        found = calculate_metrics(input1=sides[0], input2=sides[1], fid=True, kid=True, kid_subset_size=min(1000, len(real)),
                                  cuda=best_device().type == "cuda", cache=False, verbose=False)
    except Exception as error:  # not installed, or no network for the weights: the report goes on without
        return {"fid": None, "kid": None, "no_fid": said(error)}
    return {"fid": found["frechet_inception_distance"], "kid": found["kernel_inception_distance_mean"], "no_fid": ""}


def pick(images: Tensor, n: int, seed: int = 0) -> Tensor:
    """n of the images at random, uint8 (n, 3, S, S) on the CPU, in the order they had."""
    if len(images) < n:
        raise ValueError(f"n={n}: there are only {len(images)} images")
    index = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:n].sort().values
    return images[index.to(images.device)].cpu()


def floor(images: Tensor, other: Tensor | None = None, n: int = 1024, seed: int = 0) -> dict[str, Any]:
    """What every metric reads on real images: n of `images` against n of `other`, the reference of `evaluate`.

    other: real images too; None splits `images` in two disjoint halves. n is lowered to what there is.
    """
    if other is None:
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
        images, other = (images[half.sort().values] for half in (order[: len(order) // 2], order[len(order) // 2 :]))
    n = min(n, len(images), len(other))
    real, other = pick(images, n, seed), pick(other, n, seed)
    found = measure(real, other, seed)
    return {"swd_floor": found["swd"], "ms_ssim_real": found["ms_ssim"], "diversity_real": found["diversity"],
            "coverage_real": found["coverage"], "fid_floor": found["fid"], "kid_floor": found["kid"], "measured_on": n}


def measure(real: Tensor, fake: Tensor, seed: int = 0) -> dict[str, Any]:
    """Every metric of fake against as many real images, uint8 (N, 3, S, S) each."""
    return {"swd": sliced_wasserstein(real, fake, seed), "ms_ssim": ms_ssim(fake, seed), "diversity": diversity(real, fake),
            "coverage": coverage(real, fake), **fid_kid(real, fake)}


def evaluate(run: Run, images: Tensor, seed: int = 0, reference: dict[str, Any] | None = None) -> dict[str, Any]:
    """One record of results/table.json: every metric of samples against images the run was not trained on, with its floor.

    reference: `floor(images, ...)`, which says on how many images to measure; None takes halves of `images`.
    """
    reference = reference or floor(images, seed=seed)
    n = reference["measured_on"]
    last = run.history[-max(1, len(run.history) // 20) :]  # the last twentieth: one window alone is noisy
    return {
        "image_size": run.config.image_size, "width": run.config.width, "seed": run.config.seed,
        "images_seen": int(run.history[-1]["images"]), "parameters": sum(p.numel() for p in run.generator.parameters()),
        **measure(pick(images, n, seed), sample(run, n, seed), seed), **reference,
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
    """Losses of D and G with the values they should approach, D's mean logits, the collapse alarm, and D's slope."""
    epochs = [record for record in run.history if "diversity" in record]
    d_level, g_level = equilibrium(run.config)
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True, height_ratios=(2, 1))

    def curves(ax: Any, records: list, marker: str, **lines: tuple[str, str]) -> None:
        for key, (name, colour) in lines.items():
            ax.plot([r["images"] / 1000 for r in records], [r[key] for r in records], colour, marker=marker, ms=4, lw=1, label=name)

    curves(axes[0, 0], run.history, "", d_loss=("D", "C0"), g_loss=("G", "C1"))
    axes[0, 0].axhline(d_level, color="C0", ls="--", lw=1, label=f"equilibrium D, {d_level:.2f}")
    axes[0, 0].axhline(g_level, color="C1", ls="--" if g_level != d_level else ":", lw=1, label=f"equilibrium G, {g_level:.2f}")
    axes[0, 0].set(title=title or "losses", ylabel="loss (nats)", ylim=(0, None))
    curves(axes[0, 1], run.history, "", d_real=("real images", "C2"), d_fake=("generated images", "C3"))
    axes[0, 1].axhline(0, color="grey", ls="--", lw=1)
    axes[0, 1].set(title="what D says: mean logit", ylabel="logit")
    curves(axes[1, 0], epochs, "o", diversity=("diversity of 256 samples", "C4"))
    axes[1, 0].axhspan(0, 0.3, color="C3", alpha=0.15, lw=0, label="collapsed")
    axes[1, 0].axhline(1, color="C4", ls="--", lw=1, label="as real images")
    axes[1, 0].set(ylabel="diversity", ylim=(0, None))
    curves(axes[1, 1], epochs, "o", grad_real=("at real images", "C2"), grad_fake=("at generated images", "C3"))
    axes[1, 1].set(ylabel="slope of D,\nmean |grad D|", ylim=(0, None))
    for ax in axes.flat:
        ax.legend(frameon=False, fontsize=7.5, ncols=2)
        ax.spines[["top", "right"]].set_visible(False)
    for ax in axes[1]:
        ax.set_xlabel("thousand images seen")
    return figure


def compare(runs: dict[str, Run], n: int = 12, seed: int = 0) -> Figure:
    """One row of n samples for each run, the same noise in every row."""
    figure = Figure(figsize=(10, 8.3 / n * len(runs)), dpi=72)  # rows as high as n square images across are, a little apart
    margins = {"left": 0.2, "right": 0.995, "top": 1 - 0.01 / len(runs), "bottom": 0.01 / len(runs), "hspace": 0.04}
    for ax, (name, run) in zip(figure.subplots(len(runs), 1, squeeze=False, gridspec_kw=margins)[:, 0], runs.items()):
        ax.imshow(make_grid(sample(run, n, seed), nrow=n, padding=1, pad_value=255).permute(1, 2, 0).numpy())
        ax.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
    return figure


def by_preset(records: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """{preset: its records, one for each seed}, in the order of first appearance."""
    return {name: [r for r in records if r["preset"] == name] for name in dict.fromkeys(r["preset"] for r in records)}


def plot_scores(records: list[dict[str, Any]]) -> Figure:
    """Who collapsed and who came near, at a glance: diversity and SWD of every preset, a dot for each seed."""
    groups = sorted(by_preset(records).items(), key=lambda item: -np.mean([r["swd"]["avg"] for r in item[1]]))
    level = records[0]["swd_floor"]["avg"]
    figure = Figure(figsize=(10, 0.9 + 0.26 * len(groups)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for row, (_, group) in enumerate(groups):
        for ax, values in ((left, [r["diversity"] for r in group]), (right, [r["swd"]["avg"] for r in group])):
            colour = "C3" if max(r["diversity"] for r in group) < 0.3 else "C0"
            ax.plot(values, [row] * len(values), color=colour, marker="o", ms=5, lw=1.5, alpha=0.8)
    left.set_yticks(range(len(groups)), [name for name, _ in groups], fontsize=9)
    left.axvspan(0, 0.3, color="C3", alpha=0.12, lw=0)
    left.text(0.15, len(groups) - 0.35, "collapsed", color="C3", ha="center", fontsize=9)
    left.axvline(1, color="grey", ls="--", lw=1)
    left.set(xlabel="diversity of samples: 1 is as real images", xlim=(0, None), ylim=(-0.7, len(groups) + 0.4))
    right.axvline(level, color="grey", ls="--", lw=1)
    right.text(level * 1.05, len(groups) - 0.35, "real images", color="grey", fontsize=9)
    right.set(xlabel="SWD x1e3, lower is better", xscale="log")
    for ax in (left, right):
        ax.grid(axis="y", lw=0.4, alpha=0.5)
        ax.spines[["top", "right"]].set_visible(False)
    return figure


def plot_progress(runs: dict[str, list[Run]], floor: float) -> Figure:
    """SWD while they trained, by images and by time, a line for each seed, for runs whose `on_epoch` noted "swd"."""
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for ax, key, unit in ((left, "images", 1000), (right, "seconds", 60)):
        for k, (name, group) in enumerate(runs.items()):
            for run in group:
                records = [r for r in run.history if "swd" in r]
                ax.plot([r[key] / unit for r in records], [r["swd"] for r in records], f"C{k}", lw=1.3,
                        label=name if run is group[0] and ax is right else None)
        ax.axhline(floor, color="grey", ls="--", lw=1)
        ax.set(yscale="log", xlim=(0, None))
        ax.grid(which="both", lw=0.3, alpha=0.5)
        ax.spines[["top", "right"]].set_visible(False)
    left.text(0, floor * 1.04, " real images", color="grey", fontsize=8)
    left.set(xlabel="thousand images seen", ylabel="SWD x1e3, lower is better")
    right.set(xlabel="minutes of training")
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    return figure


def save_movie(run: Run, path: str | Path) -> None:
    """The snapshots of a run, up to 24 of them, as a GIF that repeats itself: faces as they come out of the noise."""
    size, frames = run.config.image_size, []
    columns, zoom = min(6, 600 // size), max(1, 96 // size)
    for k in np.unique(np.linspace(0, len(run.snapshots) - 1, 24).round().astype(int)):
        grid = make_grid(run.snapshots[k][1][: columns**2], nrow=columns, padding=1, pad_value=255)
        image = Image.fromarray(grid.permute(1, 2, 0).numpy())
        image = image.resize((zoom * image.width, zoom * image.height), Image.Resampling.NEAREST)
        frames.append(image.quantize(128))
    pauses = [300] * (len(frames) - 1) + [2500]  # milliseconds
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=pauses, loop=0)


def spread(values: list[float], digits: int) -> str:
    """'87.0 ± 3.1': the mean and half the range, the range being from the lowest to the highest seed."""
    half = f" ± {(max(values) - min(values)) / 2:.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{half}"


def results_table(records: list[dict[str, Any]]) -> str:
    """Markdown of records as `evaluate` returns them, each with a `preset` and, where it has one, a `difference`.

    One row for each preset, mean ± half the range over its seeds; direction and reference in the header.
    """
    if not records:
        raise ValueError("no records: no run is finished yet")
    first = records[0]
    lines = [
        f"| preset | difference | seeds | images seen | SWD x1e3 ↓ (real: {first['swd_floor']['avg']:.1f}) | diversity → 1 | "
        f"coverage ↑ (real: {first['coverage_real']:.2f}) | MS-SSIM → {first['ms_ssim_real']:.2f} | FID ↓ | D loss | G loss "
        "| seconds | parameters of G |",
        "|---|---|" + "---:|" * 11,
    ]
    for name, group in by_preset(records).items():
        swd, fid = [r["swd"]["avg"] for r in group], [r["fid"] for r in group if r["fid"] is not None]
        cells = [f"`{name}`", group[0].get("difference", ""), len(group), f"{group[0]['images_seen']:,}", spread(swd, 1)]
        cells += [spread([r[key] for r in group], 2) for key in ("diversity", "coverage", "ms_ssim")]
        cells += [spread(fid, 1) if fid else "—", *(spread([r[key] for r in group], 2) for key in ("d_loss", "g_loss"))]
        cells += [f"{np.mean([r['seconds'] for r in group]):.0f}", f"{group[0]['parameters']:,}"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    reasons = {r["no_fid"] for r in records if r["fid"] is None}
    return "\n".join(lines) + "".join(f"\n\nFID and KID: — ({reason})" for reason in reasons)


# ------------------------------------------------------------------------------------------ command line


def main(arguments: list[str] | None = None) -> None:
    """Train a preset, sample from a run, measure a run. Errors are one line."""
    parser = argparse.ArgumentParser(description="A CSPup GAN in a shell. Images: any folder or zip; without one, what "
                                     "find_faces() finds, or else procedural faces.")
    commands = parser.add_subparsers(dest="command", required=True)
    train_ = commands.add_parser("train", help="train a preset; the same command goes on with a run that was interrupted")
    train_.add_argument("preset", nargs="?", default="converged", choices=RUNS, metavar="preset", help=f"{', '.join(RUNS)}")
    train_.add_argument("changes", nargs="*", help="fields of Config, such as epochs=20 lr_d=1e-3; without a GPU "
                        "image_size=32 width=64 batch_size=64 are assumed")
    train_.add_argument("--time-budget", type=float, default=math.inf, metavar="HOURS", help="stop and save after so many")
    sample_ = commands.add_parser("sample", help="a grid of samples as a picture")
    sample_.add_argument("--n", type=int, default=36)
    sample_.add_argument("--seed", type=int, default=0)
    sample_.add_argument("--out", type=Path, help="the picture; by default samples.png in the run's folder")
    evaluate_ = commands.add_parser("evaluate", help="every metric on the tenth of the images that is held out, as JSON")
    for command in (train_, evaluate_):
        command.add_argument("--images", type=Path, help="folder or zip")
    for command in (sample_, evaluate_):
        command.add_argument("run", nargs="?", default="results/latest/shell/converged", help="folder of a finished run")
    train_.add_argument("--folder", "--run", help="folder of the run; by default results/latest/shell/ and the preset's name "
                        "(torchrun takes --run for its own)")
    options, more = parser.parse_known_args(arguments)  # fields may follow the options as well
    if any(text.startswith("-") for text in more) or more and options.command != "train":
        parser.error(f"{options.command}: unknown argument {more[0]!r}")
    try:
        if options.command == "train":
            small = {} if best_device().type == "cuda" else {"image_size": 32, "width": 64, "batch_size": 64}
            config = RUNS[options.preset][0].but(**{**small, **dict(map(_parse_change, options.changes + more))})
            faces, _ = hold_out(_images(options.images, config.image_size))
            folder = options.folder or f"results/latest/shell/{options.preset}"
            run = run_or_load(config, faces, folder, time_budget=options.time_budget)
            sys.exit(130 if run.stopped.startswith("SIG") else 0)
        run = load_run(options.run)
        if options.command == "sample":
            out = options.out or Path(options.run) / "samples.png"
            show_images(sample(run, options.n, options.seed)).savefig(out, dpi=150)
            print(out)
        else:
            _, held_out = hold_out(_images(options.images, run.config.image_size))
            print(json.dumps(evaluate(run, held_out), indent=1))
    except (ValueError, OSError, RuntimeError, FloatingPointError, MemoryError) as error:
        sys.exit(f"cspgan.py {options.command}: {said(error)}")


def _parse_change(text: str) -> tuple[str, Any]:
    """'lr_g=1e-3' as ("lr_g", 0.001)."""
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"{text!r}: expected field=value")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value  # head=tanh


def _images(source: Path | None, size: int) -> Tensor:
    source = source or find_faces()
    return load_faces(source, size) if source else toy_faces(4096, size)


if __name__ == "__main__":
    if (world := int(os.environ.get("WORLD_SIZE", 1))) == 1:
        main()
    elif this := int(os.environ["RANK"]):  # of torchrun: the same command line in every process, but one follows it
        follow(this, world, "env://")
    else:
        join(this, world, "env://")
        try:
            main()
        finally:
            agree(None)
            leave()
