"""CSPup GAN: a generator of cross-stage-partial upsampling blocks, from noise z (100) to faces.
An experiment is one line: train(BASELINE.but(block_norm="both"), images, "results/my_idea").
At 128 px, width 1024, after 512,000 images `converged` has SWD 11.6 (1 seed; lower is better),
the best of the course's five 45.1, real faces 8.8: results/full_size.json, results/table.json.

In this order: config, data, models, losses, training, presets, runs, metrics, plots. Images are
uint8 (N, 3, S, S); the networks see floats in `Config.pixel_range`."""
from __future__ import annotations

import contextlib, copy, dataclasses, functools, gzip, hashlib, io, math, multiprocessing, numbers
import os, signal, tempfile, threading, time, zipfile
from collections import Counter
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, ThreadPoolExecutor, wait
from difflib import get_close_matches
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor, nn
from torchvision.utils import make_grid
from tqdm.auto import tqdm

torch.set_flush_denormal(True)  # where D has won, a CPU is 100 times as slow with denormal numbers
torch.backends.cudnn.benchmark = True  # shapes stay the same: cuDNN tries its algorithms once

def need(is_right: Any, message: str) -> None:
    if not is_right:
        raise ValueError(message)

# ---------------------------------------------------------------------------------------- config
@dataclasses.dataclass(frozen=True)
class Config:
    """What makes one run differ from another. Frozen: derive new ones with `.but(...)`."""
    image_size: int = 128  # pixels a side: 16, 32, 64, 128 or 256
    head: str = "sigmoid"  # G's last activation: "tanh" ([-1, 1]), "sigmoid" or "relu" ([0, 1])
    flip: bool = False  # every second real image, at random, is mirrored
    generator: str = "cspup"  # "cspup", or "dcgan" as the control
    z_dim: int = 100  # numbers in one noise vector, each drawn from N(0, 1)
    width: int = 1024  # channels at 4x4 of G and D; halved with every doubling of the resolution
    ladder: str = "cspup_first"  # or "deconv_first", "cspup_last": see `Generator`
    deconv_kernel: int = 4  # of what doubles: 4 (4x4, stride 2, padding 1) or 2 (2x2, stride 2)
    block_act: str = "relu"  # inside CSPup: "relu", "leaky_relu" (slope 0.2) or "tanh"
    block_norm: str = "none"  # BatchNorm inside CSPup: "none", "right" or "both", see there
    d_norm: bool = True  # BatchNorm on all its convolutions but the first and the last
    d_wider: int = 1  # its channels, times those of G
    d_fewer: int = 0  # stride-2 convolutions left out of D, the deepest first
    init: str = "dcgan"  # weights N(0, 0.02), or "he": activations keep their size (`initialise`)
    loss: str = "bce"  # "bce" (after a sigmoid, as the course has it), "bce_logits", "relativistic"
    label_smoothing: float = 0.0  # D's target for real images is 1 minus this; not "relativistic"
    r1: float = 0.0  # weight gamma of the penalty gamma/2 |grad D|^2 at real images
    r2: float = 0.0  # the same at generated images
    batch_size: int = 128  # images in one step
    epochs: int = 5
    epoch_images: int | None = None  # images that count as one epoch; None: as many as there are
    lr_g: float = 2e-4  # Adam's step size for G
    lr_d: float = 2e-4  # Adam's step size for D
    lr_width: int = 0  # width at which the rates were found, see `adam`; 0: they hold at every one
    lr_end: float = 1.0  # the rates fall on a half cosine to this share of themselves; 1: they stay
    beta1: float = 0.5  # Adam; 0.5 as in DCGAN, 0.9 is PyTorch's default
    beta2: float = 0.999
    weight_decay: float = 0.0  # L2 on both networks, added to the gradient as Adam does
    ema_images: int = 0  # half-life, in images, of a running mean of G, which is then kept; 0: none
    d_every: int = 1  # D learns in every d_every-th step, G in every one
    seed: int = 0  # 4 seed + 0 and 1 are the seeds of weights, + 2 of noise, + 3 of data order
    def __post_init__(self) -> None:
        choices: dict[str, Any] = {
            "image_size": SIZES, "head": HEADS, "generator": GENERATORS, "ladder": LADDERS,
            "deconv_kernel": DECONVS, "block_act": ACTIVATIONS, "block_norm": NORMS, "init": INITS,
            "loss": D_LOSSES, "flip": (True, False), "d_norm": (True, False)}
        least = {"z_dim": 2, "width": 2, "batch_size": 2, "d_wider": 1, "epochs": 1, "d_every": 1,
                 "epoch_images": self.batch_size}
        most = {"lr_end": 1, "label_smoothing": 0.99, "beta1": 0.9999, "beta2": 0.999999,
                "seed": 2**14 - 1, "d_fewer": [*SIZES, self.image_size].index(self.image_size) + 1}
        for name, value in [x for x in vars(self).items() if x != ("epoch_images", None)]:
            if name in choices:
                legal, wish = list(choices[name]), f"one of {list(choices[name])}"
                good = value in legal
                plain = legal[legal.index(value)] if good else value
            else:
                low, high = least.get(name, 0), most.get(name, 1e99)
                is_real = type(self).__annotations__[name] == "float"  # a string, by __future__
                good = isinstance(value, numbers.Real if is_real else numbers.Integral)
                good = good and not isinstance(value, bool) and low <= value <= high
                plain = (float if is_real else int)(value) if good else value
                wish = f"a {'' if is_real else 'whole '}number from {low} to {high}"
            need(good, f"{name}={value!r}: expected {wish}")
            object.__setattr__(self, name, plain)  # no NumPy number
    def but(self, **changes: Any) -> Config:
        """The same config with some fields changed: one experiment is one call."""
        names = [*vars(self)]
        for name in changes.keys() - set(names):
            near = get_close_matches(name, names, 1)
            need(False, f"Config has no field {name!r}: expected one of {near or names}")
        return dataclasses.replace(self, **changes)
    def label(self, base: Config | None = None) -> str:
        """The difference from `base` (None: BASELINE) in words: "lr_d=0.0003, head=tanh"."""
        there, here = (dataclasses.asdict(config) for config in (base or BASELINE, self))
        return ", ".join(f"{k}={v}" for k, v in here.items() if v != there[k]) or "no change"
    @property
    def pixel_range(self) -> tuple[float, float]:
        """What the networks see: the range of the head, for real and generated images alike."""
        return (-1.0, 1.0) if self.head == "tanh" else (0.0, 1.0)

# ------------------------------------------------------------------------------------------ data
SIZES = (16, 32, 64, 128, 256)
CACHE_DIR = Path.home() / ".cache" / "cspgan"  # Kaggle would keep 10 GB in the working folder
HOW_TO_GET_FACES = ("On Kaggle add jessicali9530/celeba-dataset. Elsewhere: a folder or zip of "
                    "images in CSPGAN_DATA or data/. Without any: toy_faces(n, size).")
Image.init()
FORMATS = [kind for kind in "JPEG PNG WEBP GIF BMP TIFF PPM JPEG2000 AVIF".split()
           if kind in Image.OPEN]  # of cameras, browsers and data sets; EPS would start Ghostscript
ENDINGS = {ending for ending, kind in Image.registered_extensions().items() if kind in FORMATS}
open_zip = functools.lru_cache(4)(lambda path, process: zipfile.ZipFile(path))  # forks share none

class Faces(torch.utils.data.Dataset):
    """The images of a folder or zip, sub-folders too, for any DataLoader: [i] -> uint8 (3, size,
    size), the largest centred square, upright, on white, antialiased; passed_over counts links and
    what is no image. A file that cannot be read raises a ValueError, with what to do."""
    def __init__(self, source: str | Path, size: int) -> None:
        need(size in SIZES and isinstance(source, (str, os.PathLike)),
             f"source={source!r}, size={size!r}: expected a path, and one of {SIZES}")
        self.source, self.size = Path(os.path.realpath(os.path.expanduser(source))), int(size)
        self.passed_over: Counter[str] = Counter()
        self.is_zip = self.source.is_file() and zipfile.is_zipfile(self.source)  # no pipe is opened
        open_zip.cache_clear()  # another zip may lie there by now
        if not self.is_zip and not self.source.is_dir():
            raise FileNotFoundError(f"{self.source}: no folder, and no zip that can be read (other "
                                    f"archives must be unpacked). {HOW_TO_GET_FACES}")
        walk = os.walk(self.source, onerror=lambda _: self.passed_over.update(["closed folder"]))
        files = (open_zip(self.source, os.getpid()).namelist() if self.is_zip else
                 [os.path.join(top, name)[len(str(self.source)) + 1 :] for top, dirs, names in walk
                  for name in [*names, *(d for d in dirs if os.path.islink(f"{top}/{d}"))]])
        shown = [name for name in files if "/." not in f"/{name.removeprefix('./')}" and
                 "__MACOSX/" not in name]
        self.names = sorted(name for name in shown if name[-1] != "/" and self.is_image(name))
    def __len__(self) -> int:
        return len(self.names)
    def __getitem__(self, i: int) -> Tensor:
        name, data = self.names[i], b""
        try:
            data = self.read(name)
            return torch.from_numpy(self.decode(data, self.size))        # (3, size, size)
        except Exception as error:  # whatever a damaged file raises
            why = f"{said(error).split(' <_io')[0]}, it begins with {data[:24]!r}"
            todo = "run 'git lfs pull'" if b"git-lfs" in data[:40] else "replace or remove it"
            raise ValueError(f"{self.source}/{name!r} cannot be read ({why}): {todo}") from error
    def is_image(self, name: str) -> bool:
        ending = os.path.splitext(name)[1].lower()
        found = ending in ENDINGS
        with contextlib.suppress(Exception):
            start = b"" if found else self.read(name, 32)
            if any(Image.OPEN[kind][1](start) is True for kind in FORMATS):  # or a text begins so
                found = bool(Image.open(io.BytesIO(self.read(name)), formats=FORMATS))
        self.passed_over.update([] if found else [ending or "without ending"])
        return found
    def read(self, name: str, most: int = 256_000_000) -> bytes:
        """A file's first bytes. No pipe, no link (it may lead anywhere), nothing too large."""
        path, archive = self.source / name, self.is_zip and open_zip(self.source, os.getpid())
        size = archive.getinfo(name).file_size if archive else path.lstat().st_size
        need(size <= 256_000_000 and (archive or path.is_file() and not path.is_symlink()),
             f"{size:,} bytes: expected a file, no link, of up to 256 MB")
        with archive.open(name) if archive else open(path, "rb") as file:
            return file.read(most)
    @staticmethod
    def decode(data: bytes, size: int) -> np.ndarray:
        """One encoded image of any mode as RGB, uint8 (3, size, size)."""
        image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
        image.draft("RGB", (2 * size, 2 * size))  # a far larger JPEG is unpacked at 1/2, 1/4, 1/8
        image.load()
        with contextlib.suppress(Exception):  # a malformed EXIF block says nothing of the pixels
            image = ImageOps.exif_transpose(image)
        if image.mode[0] in "IF":  # 16 bits a pixel: convert would clip, not scale
            grey = np.asarray(image, dtype=np.float32) / 257
            image = Image.fromarray(grey.clip(0, 255).round().astype(np.uint8))
        if image.has_transparency_data:  # the colours under transparent pixels are arbitrary
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        square = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.LANCZOS)
        return np.asarray(square).transpose(2, 0, 1).copy()              # (3, size, size)

def find_faces(places: tuple[str | Path, ...] = ("/kaggle/input", "data")) -> Path | None:
    """CSPGAN_DATA, or the folder or zip in Kaggle's input folder, or in ./data, that holds CelebA's
    `img_align_celeba`, or else most images. What is passed over is printed. None: `toy_faces`."""
    if given := os.environ.get("CSPGAN_DATA"):
        return Faces(given, SIZES[0]).source  # or its error: nothing takes the place of this
    # Names that lead to one data set: datasets/OWNER/SLUG (once d/), competitions/NAME, else NAME.
    depths = {"": 0, "d": 3, "datasets": 3, "notebooks": 3, "models": 3, "competitions": 2}
    for place in filter(Path.is_dir, map(Path, places)):
        counts, celeba, files = Counter(), set(), Faces(place, SIZES[0])
        for name in files.names:
            parts = os.path.dirname(name).split(os.sep)
            depth = depths.get(parts[0], 1)
            if "img_align_celeba" in parts:
                depth = parts.index("img_align_celeba") + 1
                celeba.add(place.joinpath(*parts[:depth]))
            counts[place.joinpath(*parts[:depth])] += 1
        for path in {*place.rglob("*.[zZ][iI][pP]"), *filter(os.path.islink, place.iterdir())}:
            with contextlib.suppress(OSError, ValueError):  # half a download
                inside = Faces(path, SIZES[0])
                if not files.source.is_relative_to(inside.source):  # no link to a folder above
                    counts[path] = len(inside)
                    celeba.update(path for name in inside.names if "img_align_celeba/" in name)
                ending = os.path.splitext(path)[1].lower() or "without ending"
                files.passed_over[ending] -= counts[path] > 0  # what is used is not passed over
        found = sorted(+counts, key=lambda p: (p not in celeba, -counts[p], p))  # +: no zeros
        if over := {str(path): counts[path] for path in found[1:]} | +files.passed_over:
            print(f"{place}: passed over {over} (archives must be unpacked, or zips).")
        if found:
            print(f"Images: {found[0]} ({counts[found[0]]:,}).")
            return found[0]
    return None

def load_faces(source: str | Path | None, size: int, cache_dir: str | Path = CACHE_DIR) -> Tensor:
    """All images of a folder or zip (None: 4,096 procedural faces), uint8 (N, 3, size, size),
    decoded once, memory-mapped, those last that `hold_out` holds out. Names what it cannot read."""
    if source is None:
        return toy_faces(4096, size)
    faces, folder = Faces(source, size), Path(cache_dir).expanduser()
    passed = f"passed over: {dict(faces.passed_over) or 'nothing'}"
    need(faces.names, f"{faces.source}: no image ({passed}). {HOW_TO_GET_FACES}")
    files = [faces.source] if faces.is_zip else [faces.source / name for name in faces.names]
    stats = [(s.st_size, s.st_mtime_ns) for s in map(os.lstat, files)]
    state = repr((faces.source, faces.names, stats, "crop 3")).encode()  # 3rd version of `decode`
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        print(f"{folder} cannot be used ({said(error)}): images are cached in a temporary folder.")
        folder = Path(tempfile.gettempdir())
    cache = folder / f"{faces.source.stem}-{size}px-{hashlib.sha1(state).hexdigest()[:12]}.u8"
    if not cache.exists():
        print(f"Decoding {len(faces):,} images of {faces.source} ({passed}).")
        write_aside(cache, lambda file: decode_all(faces, file))
    pixels = torch.from_file(str(cache), size=cache.stat().st_size, dtype=torch.uint8)
    return pixels.view(-1, 3, faces.size, faces.size)

def decode_all(faces: Faces, file: IO[bytes]) -> None:
    """Write the pixels of all images, held-out ones last, on all cores: Pillow lets threads run."""
    def decode(i: int) -> bytes | str:
        try:
            return faces[i].numpy().tobytes()
        except ValueError as error:  # it must not cost the other 200,000
            return str(error).removeprefix(f"{faces.source}/")
    damaged, held, keys = [], [], Counter()
    with ThreadPoolExecutor(os.cpu_count()) as pool, progress_bar(len(faces), "decoding") as bar:
        for start in range(0, len(faces), 512):  # no more wait in memory, except `held`
            for image in pool.map(decode, range(len(faces))[start : start + 512]):
                bar.update()
                if isinstance(image, str):
                    damaged.append(image)
                    continue
                keys[key := content_key(image)] += 1
                held.append(image) if key < 0.1 else file.write(image)  # the share of `hold_out`
    file.writelines(held)
    if damaged or keys.total() > len(keys):
        print(f"Exact copies of others: {keys.total() - len(keys):,}. Skipped {len(damaged):,}:",
              "; ".join(damaged[:10]))
    need(keys, f"{faces.source}: none of its images can be read. {HOW_TO_GET_FACES}")

def content_key(image: Any) -> float:
    """A random number in [0, 1) from an image's bytes alone: the same on every call and machine."""
    return int.from_bytes(hashlib.blake2b(image, digest_size=8).digest(), "little") / 2**64

def hold_out(images: Tensor, share: float = 0.1) -> tuple[Tensor, Tensor]:
    """(images to train on, the rest, to measure on), views of what `load_faces` made, or copies. An
    image's content alone decides: it stays on its side when others come, and so do its copies."""
    need(isinstance(images, Tensor) and isinstance(share, numbers.Real),
         f"images={images!r:.80}, share={share!r}: expected what load_faces gives, and a number")
    keys = np.array([content_key(image) for image in images.cpu().contiguous().numpy()])
    held = torch.from_numpy((keys < share) | (keys == keys.min(initial=1)))  # (N,), one at least
    n = int((~held).sum())
    need(n and held.any() and 0 < share < 1, f"share={share} of {len(images)} images, of which "
         f"{len(set(keys))} differ: expected 0 < share < 1, and some for either side")
    return (images[:n], images[n:]) if held[n:].all() else (images[~held], images[held])

def toy_faces(n: int, size: int, seed: int = 0) -> Tensor:
    """Procedural faces, uint8 (n, 3, size, size); a smaller n gives the first of the same faces."""
    need(isinstance(n, numbers.Integral) and n > 0 and size in SIZES,
         f"n={n!r}, size={size!r}: expected 1 or more, and one of {SIZES}")
    faces = np.empty((n, 3, size := int(size), size), dtype=np.uint8)
    for i in range(n):
        u = np.random.default_rng((seed, i)).random(13)
        ground, skin, hair, lips, iris, dress = (tuple(int(v) for v in colour) for colour in (
            110 + 110 * u[:3], (0.4 + 0.6 * u[3]) * np.array([255, 208, 180]),
            (0.1 + 0.7 * u[4]) * np.array([255, 190, 105]), (190, 100 - 70 * u[5], 80),
            (40, 20 + 100 * u[6], 10 + 170 * u[6]), (60 + 170 * u[7], 85, 150 - 75 * u[7])))
        x, y, wide, long = 102 + 52 * u[8], 112 + 32 * u[9], 52 + 18 * u[10], 80 * u[11]
        image = Image.new("RGB", (256, 256), ground)
        for colour, dx, dy, a, b in (
                (dress, 0, 150, 110, 62), (hair, 0, long - 25, wide + 14, 66 + long),
                (skin, 0, 12, wide, 76), (lips, 0, 54, 22, 4 + 9 * u[12]), ("white", 27, 0, 15, 9),
                (iris, 27, 0, 8, 8), (hair, 27, -22, 18, 5)):  # ellipses, mirrored
            for cx, cy in {(x - dx, y + dy), (x + dx, y + dy)}:
                ImageDraw.Draw(image).ellipse((cx - a, cy - b, cx + a, cy + b), colour)
        faces[i] = np.asarray(image.resize((size, size), Image.Resampling.BOX)).transpose(2, 0, 1)
    return torch.from_numpy(faces)

# ---------------------------------------------------------------------------------------- models
ACTIVATIONS = {"relu": nn.ReLU, "leaky_relu": lambda: nn.LeakyReLU(0.2), "tanh": nn.Tanh}
HEADS = {"sigmoid": nn.Sigmoid, "tanh": nn.Tanh, "relu": nn.ReLU}
INITS, DECONVS = ("dcgan", "he"), {4: (4, 2, 1), 2: (2, 2, 0)}  # kernel: (it, stride, padding)
LADDERS, NORMS = ("cspup_first", "deconv_first", "cspup_last"), ("none", "right", "both")

class CSPup(nn.Module):
    """Cross-stage-partial block that doubles the resolution: (N, in, H, W) -> (N, out, 2H, 2W).
    Half of the channels goes through a deconvolution only; the other half through conv 1x1, its
    own deconvolution and two conv 3x3; the branches are added (after arXiv 1911.11929). act: makes
    an activation. norm: BatchNorm after the first two convolutions on the right ("right"), or after
    all three and the left deconvolution ("both"). deconv: (kernel, stride, padding) of both."""
    def __init__(self, in_channels: int, out_channels: int, act=nn.ReLU, norm: str = "none",
                 deconv: tuple[int, int, int] = (4, 2, 1)) -> None:
        super().__init__()
        if in_channels < 2 or norm not in ("none", "right", "both"):
            raise ValueError(f"{in_channels=}, {norm=}: expected 2 or more; none, right or both")
        left, right, out = in_channels // 2, in_channels - in_channels // 2, out_channels
        early: Any = nn.BatchNorm2d if norm != "none" else nn.Identity
        late: Any = nn.BatchNorm2d if norm == "both" else nn.Identity
        self.left = nn.Sequential(nn.ConvTranspose2d(left, out, *deconv), late(out))
        self.right = nn.Sequential(
            nn.Conv2d(right, right, 1), early(right), act(),
            nn.ConvTranspose2d(right, out, *deconv),
            nn.Conv2d(out, out, 3, padding=1), early(out), act(),
            nn.Conv2d(out, out, 3, padding=1), late(out))
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        half = x.shape[1] // 2
        left, right = x[:, :half], x[:, half:]                           # (N, in/2, H, W) each
        return self.left(left) + self.right(right)                       # (N, out, 2H, 2W)

def channel_ladder(config: Config) -> list[int]:
    """Channels at 4x4, 8x8, ... half the image size: [1024, 512, 256, 128, 64] at full size."""
    return [max(2, config.width >> stage) for stage in range(int(math.log2(config.image_size)) - 2)]

class Generator(nn.Module):
    """The assignment's generator: z (N, z_dim) -> images (N, 3, S, S) in the config's pixel range.
    Its drawing has five boxes, 4x4x1024 to 64x64x64, and a deconvolution; by `ladder` that is
    "cspup_first":  z as 1x1 -> CSPup -> 4x4 ... CSPup -> 64x64 -> deconvolution -> 128x128
    "deconv_first": z as 1x1 -> deconvolution -> 4x4 ... CSPup -> 64x64 -> deconvolution -> 128x128
    "cspup_last":   z as 1x1 -> deconvolution -> 4x4 ... CSPup -> 128x128 -> 3x3, same size"""
    cast: torch.dtype | None = None  # precision of all layers except the last, None for float32
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config, channels = config, channel_ladder(config)
        double = to_rgb = DECONVS[config.deconv_kernel]
        if config.ladder == "cspup_last":
            channels, to_rgb = [*channels, max(2, channels[-1] // 2)], (3, 1, 1)
        self.stem = nn.ConvTranspose2d(config.z_dim, channels[0], 4, 1, 0)  # 1x1 to 4x4
        if config.ladder == "cspup_first":
            self.stem = self.up(config.z_dim, channels[0], (4, 1, 0))
        pairs, head = zip(channels, channels[1:]), HEADS[config.head]()
        self.blocks = nn.Sequential(*(self.up(c, out, double) for c, out in pairs))
        self.to_rgb = nn.Sequential(nn.ConvTranspose2d(channels[-1], 3, *to_rgb), head)
        initialise(self, config.init, 4 * config.seed)
        self.to_rgb[0].weight.data *= 0.25 if config.init == "he" else 1  # at He's, pixels saturate
    def up(self, in_channels: int, out_channels: int, deconv: tuple[int, int, int]) -> nn.Module:
        act: Any = ACTIVATIONS[self.config.block_act]
        return CSPup(in_channels, out_channels, act, self.config.block_norm, deconv)
    def forward(self, z: Tensor) -> Tensor:
        with torch.autocast(z.device.type, self.cast) if self.cast else contextlib.nullcontext():
            x = self.stem(z[:, :, None, None])                           # (N, width, 4, 4)
            x = self.blocks(x)                                           # (N, C, S/2, S/2), or S
        return self.to_rgb(x.float())  # half precision is coarser than a pixel: (N, 3, S, S)

class DCGANGenerator(Generator):
    """The control: DCGAN's (arXiv 1511.06434), with z, channels and output of `Generator`."""
    def up(self, in_channels: int, out_channels: int, deconv: tuple[int, int, int]) -> nn.Module:
        return nn.Sequential(nn.ConvTranspose2d(in_channels, out_channels, *deconv, bias=False),
                             nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True))

class Discriminator(nn.Module):
    """DCGAN's discriminator: images (N, 3, S, S) -> raw logits (N,). A sigmoid belongs to the loss.
    Convolutions of kernel 4, stride 2, down to a map of 4x4, with the generator's channels in
    reverse, times `d_wider`; LeakyReLU(0.2), BatchNorm on all but the first; one over the map."""
    cast: torch.dtype | None = None  # precision of all layers, None for float32
    def __init__(self, config: Config) -> None:
        super().__init__()
        channels = [config.d_wider * c for c in channel_ladder(config)[config.d_fewer :][::-1]]
        layers: list[nn.Module] = []
        for c, out in zip([3, *channels], channels):
            layers.append(nn.Conv2d(c, out, 4, 2, 1))
            if config.d_norm and len(layers) > 1:  # no running statistics: D only works in training
                layers.append(nn.BatchNorm2d(out, track_running_stats=False))
            layers.append(nn.LeakyReLU(0.2, inplace=True))
        self.features = nn.Sequential(*layers)
        self.to_logit = nn.Conv2d(channels[-1], 1, config.image_size >> len(channels))
        initialise(self, config.init, 4 * config.seed + 1)
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, self.cast) if self.cast else contextlib.nullcontext():
            x = self.features(x)                                         # (N, C, s, s)
            return self.to_logit(x).flatten().float()                    # (N,)
GENERATORS = {"cspup": Generator, "dcgan": DCGANGenerator}

def initialise(network: nn.Module, init: str, seed: int) -> None:
    """Biases 0; weights N(0, std^2), from the network's own seed. "dcgan": std 0.02, BatchNorm's
    scales N(1, 0.02^2). "he" (arXiv 1502.01852): scales 1, std^2 = gain / (products that are summed
    in one output). gain: 2, or 1 for a deconvolution, as in CSPup no activation follows it. In it
    kernel^2 / stride^2 inputs overlap in one output pixel; where 1x1 opens to 4x4, one does."""
    random = torch.Generator().manual_seed(seed)
    for layer in network.modules():
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
            kernel, stride = layer.kernel_size[0], layer.stride[0]
            gain, overlap = 2, kernel**2
            if isinstance(layer, nn.ConvTranspose2d):
                gain, overlap = 1, (1 if (kernel, stride) == (4, 1) else kernel**2 // stride**2)
            std = math.sqrt(gain / (layer.in_channels * overlap)) if init == "he" else 0.02
            nn.init.normal_(layer.weight, 0, std, generator=random)
        elif isinstance(layer, nn.BatchNorm2d) and init == "dcgan":
            nn.init.normal_(layer.weight, 1, 0.02, generator=random)
        if getattr(layer, "bias", None) is not None:
            nn.init.zeros_(layer.bias)

# ---------------------------------------------------------------------------------------- losses
def bce(logits: Tensor, target: float) -> Tensor:
    """Mean binary cross-entropy of sigmoid(logits), (N,), and one target; ln 2 if D cannot tell.
    As the course has it: below a logit of -28 its backward clamps p (1 - p): G's gradient dies."""
    p = torch.sigmoid(logits)                                            # (N,)
    loss = F.binary_cross_entropy(p.nan_to_num(), torch.full_like(p, target))
    return loss + 0 * logits.sum()  # NaN again, if there was one: CUDA's loss would end the process

def bce_logits(logits: Tensor, target: float) -> Tensor:
    """The same value from the logits themselves: its gradient never dies."""
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, target))

def relativistic(higher: Tensor, lower: Tensor) -> Tensor:
    """Mean softplus(lower - higher) over pairs of logits, (N,) each; ln 2 where they do not differ.
    A shift of all logits changes nothing: D learns an order (arXiv 1807.00734, 2501.05441)."""
    return F.softplus(lower - higher).mean()

# Objectives of D and G by their logits, (N,) each; s: label smoothing. G's are non-saturating.
D_LOSSES = {
    "bce": lambda d_real, d_fake, s: bce(d_real, 1 - s) + bce(d_fake, 0),
    "bce_logits": lambda d_real, d_fake, s: bce_logits(d_real, 1 - s) + bce_logits(d_fake, 0),
    "relativistic": lambda d_real, d_fake, s: relativistic(d_real, d_fake)}
G_LOSSES = {
    "bce": lambda d_real, d_fake: bce(d_fake, 1),
    "bce_logits": lambda d_real, d_fake: bce_logits(d_fake, 1),
    "relativistic": lambda d_real, d_fake: relativistic(d_fake, d_real)}

def gradient_penalty(logits: Tensor, images: Tensor) -> Tensor:
    """|grad_x D(x)|^2 of each image, (N,): R1 at real, R2 at generated ones (arXiv 1801.04406).
    logits: (N,) of D; its BatchNorm would mix the images' gradients. Keeps the graph."""
    (gradient,) = torch.autograd.grad(logits.sum(), images, create_graph=True)  # (N, 3, S, S)
    return gradient.square().sum(dim=(1, 2, 3))                          # (N,)

def equilibrium(config: Config) -> tuple[float, float]:
    """(D loss, G loss) where images are as real ones: the best D says p = (1 - s) / 2 everywhere
    (Goodfellow 2014, proposition 1, with smoothing s). Each term is ln 2 if s is 0."""
    s = config.label_smoothing
    logit = torch.tensor(math.log((1 - s) / (1 + s)), dtype=torch.float64)  # of that p: ()
    return D_LOSSES[config.loss](logit, logit, s).item(), G_LOSSES[config.loss](logit, logit).item()

# -------------------------------------------------------------------------------------- training
UNSCALED = torch.amp.GradScaler("cpu", enabled=False)  # does nothing; for float16 see `Training`

def d_step(discriminator, optimizer, real, fake, config, scaler=UNSCALED) -> Tensor:
    """D: minimise  L_D(D(real), D(fake)) + r1/2 |grad D(real)|^2 + r2/2 |grad D(fake)|^2.
    real, fake: (N, 3, S, S); G is left alone. L_D is Goodfellow's (2014, algorithm 1) for "bce".
    Returns detached (4,): L_D, mean logits on real and on fake, the sum of the penalties."""
    discriminator.train().requires_grad_(True)
    optimizer.zero_grad()
    real = real.detach().requires_grad_(config.r1 > 0)                   # (N, 3, S, S)
    fake = fake.detach().requires_grad_(config.r2 > 0)                   # (N, 3, S, S)
    d_real = discriminator(real)                                         # (N,)
    d_fake = discriminator(fake)                                         # (N,)
    d_loss = D_LOSSES[config.loss](d_real, d_fake, config.label_smoothing)  # ()
    penalty = torch.zeros_like(d_loss)                                   # ()
    if config.r1:
        penalty = penalty + config.r1 / 2 * gradient_penalty(d_real, real).mean()
    if config.r2:
        penalty = penalty + config.r2 / 2 * gradient_penalty(d_fake, fake).mean()
    scaler.scale(d_loss + penalty).backward()
    scaler.step(optimizer)
    scaler.update()
    return torch.stack([d_loss, d_real.mean(), d_fake.mean(), penalty]).detach()  # (4,)

def d_step_linear(discriminator, optimizer, real, fake, config, scaler=UNSCALED) -> Tensor:
    """`d_step` without a double backward: 4 passes through D, not 6. D: convolutions and LeakyReLU,
    so linear between its kinks, D(x) = <v, x> + b, v = grad_x D(x). Let x_k be the input of layer k
    when x goes through D, v_k the same for v, without biases; slope_k the gradient of D(x) by what
    layer k returns. Its weights' gradient is, for the loss, slope_k times dL/dD(x) x_k, and for
    gamma/2 |v|^2 slope_k times gamma v_k (a kink has no second derivative). Both at once: send
    u = dL/dD(x) x + gamma v through D, biases times dL/dD(x), and take slope_k times u_k.
    Passes: x; back, for v and slopes; u; back, for weights. With penalties nothing is scaled."""
    discriminator.train().requires_grad_(True)
    optimizer.zero_grad()
    n, layers = len(real), [m for m in discriminator.modules() if isinstance(m, nn.Conv2d)]
    y = x = torch.cat([real, fake]).detach().requires_grad_()            # (2n, 3, S, S)
    bends: list[Tensor] = []  # what each LeakyReLU returns: its sign tells the side of the kink
    for layer in layers[:-1]:
        y = F.leaky_relu(layer(y), 0.2)                                  # (2n, c, s, s)
        bends.append(y)
    logits = layers[-1](y).flatten()                                     # (2n,)
    v, *slopes = torch.autograd.grad(logits, [x, *bends, logits], torch.ones_like(logits))
    answers = logits.detach().requires_grad_()                           # (2n,)
    d_real, d_fake = answers.chunk(2)                                    # (n,)
    d_loss = D_LOSSES[config.loss](d_real, d_fake, config.label_smoothing)  # ()
    weight = torch.autograd.grad(d_loss, answers)[0].view(-1, 1, 1, 1)   # (2n, 1, 1, 1)
    gamma = torch.cat([x.new_full((n, 1, 1, 1), r / n) for r in (config.r1, config.r2)])
    u, outputs = torch.addcmul(gamma * v, weight, x.detach()), []        # (2n, 3, S, S)
    for k, layer in enumerate(layers):
        sent = F.conv2d(u, layer.weight, None, layer.stride, layer.padding)  # (2n, c, s, s)
        outputs.append(sent + weight * layer.bias[:, None, None])        # (2n, c, s, s)
        if k < len(bends):  # times 1 or 0.2, as this kink has decided
            u, slopes[k] = (torch.ops.aten.leaky_relu_backward(t, bends[k].detach(), 0.2, True)
                            for t in (outputs[k].detach(), slopes[k]))
    torch.autograd.backward(outputs, [*slopes[:-1], slopes[-1].view(-1, 1, 1, 1)])
    optimizer.step()
    penalty = (gamma / 2 * v.square()).sum()                             # ()
    return torch.stack([d_loss, d_real.mean(), d_fake.mean(), penalty]).detach()  # (4,)

def g_step(discriminator, optimizer, real, fake, config, scaler=UNSCALED) -> Tensor:
    """G: minimise  L_G(D(real), D(fake)), the non-saturating form (Goodfellow 2014, section 3).
    real, fake: (N, 3, S, S), fake with its graph; D is left alone. Returns the detached loss."""
    discriminator.train().requires_grad_(False)
    optimizer.zero_grad()
    d_real = None if "bce" in config.loss else discriminator(real)       # (N,), not for BCE
    d_fake = discriminator(fake)                                         # (N,)
    g_loss = G_LOSSES[config.loss](d_real, d_fake)                       # ()
    scaler.scale(g_loss).backward()
    scaler.step(optimizer)
    scaler.update()
    return g_loss.detach()

def adam(network: nn.Module, config: Config, lr: float, power: float = 1.0) -> torch.optim.Adam:
    """Adam with the config's betas and L2, and the width rule if `lr_width` is given: weights whose
    fan-in grows with the width get lr / (width / lr_width)^power (1 after arXiv 2203.03466)."""
    slower = (config.lr_width / config.width) ** power if config.lr_width else 1.0
    with torch.device("meta"):  # takes no memory; so much wider that it differs at every stage
        twin = type(network)(config.but(width=config.width + 8192))
    groups: dict[float, list[Tensor]] = {}
    for layer, wider in zip(network.modules(), twin.modules()):
        grows = getattr(layer, "in_channels", 0) != getattr(wider, "in_channels", 0)
        for name, weight in layer.named_parameters(recurse=False):
            rate = lr * slower if grows and name == "weight" else lr
            groups.setdefault(rate, []).append(weight)
    return torch.optim.Adam(
        [{"params": weights, "lr": rate, "full_lr": rate} for rate, weights in groups.items()],
        betas=(config.beta1, config.beta2), weight_decay=config.weight_decay, fused=True)

def to_network(images: Tensor, config: Config) -> Tensor:
    """uint8 (N, 3, S, S) to float in the config's pixel range."""
    low, high = config.pixel_range
    return images.float().mul_((high - low) / 255).add_(low)

def to_uint8(images: Tensor, config: Config) -> Tensor:
    """Float in the config's pixel range to uint8 (N, 3, S, S)."""
    low, high = config.pixel_range
    return ((images - low) * (255 / (high - low))).round().clamp(0, 255).to(torch.uint8)

def batch_index(step: int, n: int, config: Config) -> Tensor:
    """Which of n images a step sees, (batch_size,). A turn goes through all, in a new order."""
    turn, k = divmod(step, n // config.batch_size)
    random = torch.Generator().manual_seed((turn << 16) + 4 * config.seed + 3)  # 16 bits each
    return torch.randperm(n, generator=random)[k * config.batch_size : (k + 1) * config.batch_size]

@torch.no_grad()
def update_ema(mean: nn.Module, network: nn.Module, config: Config, step: int) -> None:
    """Move a running mean; its half-life is ema_images, early on a tenth of all images so far."""
    new = 1 - 0.5 ** (config.batch_size / min(config.ema_images, 0.1 * step * config.batch_size))
    for a, b in zip(mean.state_dict().values(), network.state_dict().values()):
        a.lerp_(b, new) if a.is_floating_point() else a.copy_(b)

class Training:
    """All that the next step depends on, and that step; `state_dict` keeps it, bit for bit. images:
    uint8 (N, 3, S, S). half: precision of both networks, None for float32, see `half_for`."""
    def __init__(self, config: Config, images: Tensor, device: Any, half: Any = None) -> None:
        self.config, self.device, self.environment = config, device, environment(device)
        self.identity, on_gpu = identify(config, images), device.type == "cuda"
        fits = on_gpu and images.numel() < torch.cuda.mem_get_info(device)[0] / 4
        self.images = images.to(device) if fits else images
        # channels_last, except for float32 on a GPU, where it may be slower.
        self.layout: Any = torch.contiguous_format if on_gpu and not half else torch.channels_last
        self.generator = GENERATORS[config.generator](config).to(device, memory_format=self.layout)
        self.discriminator = Discriminator(config).to(device, memory_format=self.layout)
        self.generator.cast = self.discriminator.cast = self.half = half
        self.kept = copy.deepcopy(self.generator) if config.ema_images else self.generator
        self.opt_g = adam(self.generator, config, config.lr_g)
        self.opt_d = adam(self.discriminator, config, config.lr_d)
        self.scale_g, self.scale_d = (
            torch.amp.GradScaler(device.type, enabled=half == torch.float16) for _ in "GD")
        self.d_step = d_step_linear if config.r1 + config.r2 > 0 and not config.d_norm else d_step
        self.noise = torch.Generator(device).manual_seed(4 * config.seed + 2)
        self.d_stats = torch.zeros(4, device=device)  # of D's latest step
        self.sums = torch.zeros(6, device=device)  # since a record: d_stats, G's loss, steps
        self.history: list[dict[str, float]] = []  # see `train`
        self.snapshots: list[tuple[int, Tensor]] = []  # see `Run`
        self.step, self.begun = 0, time.monotonic()
        self.epoch_steps = (config.epoch_images or len(images)) // config.batch_size
        self.steps = config.epochs * self.epoch_steps
    def advance(self) -> None:
        """A step of D and one of G, on the same images and noise, without waiting for a GPU."""
        config, n = self.config, self.config.batch_size
        fall = (1 + math.cos(math.pi * self.step / self.steps)) / 2
        for group in (*self.opt_g.param_groups, *self.opt_d.param_groups):
            group["lr"] = group["full_lr"] * (config.lr_end + (1 - config.lr_end) * fall)
        index = batch_index(self.step, len(self.images), config).to(self.images.device)  # (N,)
        batch = self.images[index].to(self.device)                       # (N, 3, S, S)
        real = to_network(batch, config).contiguous(memory_format=self.layout)  # (N, 3, S, S)
        if config.flip:
            mirrored = torch.rand(n, 1, 1, 1, generator=self.noise, device=self.device) < 0.5
            real = torch.where(mirrored, real.flip(3), real)             # (N, 3, S, S)
        z = torch.randn(n, config.z_dim, generator=self.noise, device=self.device)  # (N, z_dim)
        fake = self.generator.train()(z)                                 # (N, 3, S, S)
        if self.step % config.d_every == 0:
            self.d_stats = self.d_step(
                self.discriminator, self.opt_d, real, fake, config, self.scale_d)  # (4,)
        g_loss = g_step(self.discriminator, self.opt_g, real, fake, config, self.scale_g)  # ()
        self.step += 1
        if config.ema_images:
            update_ema(self.kept, self.generator, config, self.step)
        stats = torch.cat([self.d_stats, torch.stack([g_loss, torch.ones_like(g_loss)])])  # (6,)
        if self.half == torch.float16:  # a step whose loss overflowed is not counted
            stats = torch.where(stats.isfinite().all(), stats, 0)
        self.sums += stats
    def record(self) -> dict[str, float]:
        """Add the means since the last record to the history: the only wait for the GPU."""
        *sums, count = self.sums.tolist()
        means = [x / count if count else math.nan for x in sums]
        self.sums.zero_()
        now, names = time.monotonic(), ("d_loss", "d_real", "d_fake", "penalty", "g_loss")
        self.history.append({
            "step": self.step, "epoch": self.step / self.epoch_steps, "seconds": now - self.begun,
            "images": self.step * self.config.batch_size, **dict(zip(names, means))})
        return self.history[-1]
    def check_up(self, run: Run, on_epoch: Any) -> None:
        """A snapshot, what on_epoch finds, and the diversity of 256 samples: the collapse alarm."""
        began, real = time.monotonic(), pick(self.images, min(256, len(self.images)))
        samples = sample(run, len(real))                                 # (n, 3, S, S)
        self.snapshots.append((int(self.history[-1]["images"]), samples[:36].clone()))  # not 256
        self.history[-1]["diversity"] = diversity(real, samples)
        self.history[-1] |= {k: float(v) for k, v in (on_epoch(run) if on_epoch else {}).items()}
        self.begun += time.monotonic() - began  # measuring is not training
    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds: all but what `__init__` makes from its arguments."""
        state = {**vars(self), "noise": self.noise.get_state(),
                 "seconds": time.monotonic() - self.begun}
        for name in ("config", "device", "half", "images", "layout", "d_step", "steps", "begun"):
            del state[name]
        return {k: v.state_dict() if hasattr(v, "state_dict") else v for k, v in state.items()}
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned; `environment` stays that of the start."""
        if state["noise"].shape == self.noise.get_state().shape:  # else from another kind of device
            self.noise.set_state(state["noise"])
        self.begun = time.monotonic() - state["seconds"]
        for name in state.keys() - {"noise", "seconds"}:
            value, mine = state[name], getattr(self, name)
            if not hasattr(mine, "load_state_dict"):
                setattr(self, name, value.to(self.device) if isinstance(value, Tensor) else value)
            elif value:  # empty for a scaler that is off, and for Adam after the end: `save`
                mine.load_state_dict(value)

def half_for(config: Config, images: Tensor, device: torch.device) -> torch.dtype | None:
    """Half precision on a GPU, if there are no penalties: bfloat16 from compute capability 8 on,
    else float16. None, float32, if four steps in both from one start disagree, which is said."""
    half, losses = None, {}
    if device.type == "cuda" and not (config.r1 or config.r2):
        half = torch.bfloat16 if torch.cuda.get_device_capability(device)[0] > 7 else torch.float16
    for precision in (None, half) if half else ():  # without a half nothing is compared
        training = Training(config, images, device, precision)
        for _ in range(4):
            training.advance()
        losses[precision] = [*map(training.record().get, ("d_loss", "g_loss"))]
    if all(abs(a - b) <= 0.1 * (1 + abs(a)) for a, b in zip(*losses.values())):  # not for NaN
        return half
    print(f"{config.label()}: losses (D, G) {losses}, so it trains in float32.")
    return None

# --------------------------------------------------------------------------------------- presets
BASELINE = Config()
H1 = BASELINE.but(block_norm="both", block_act="leaky_relu")
TANH_BN = BASELINE.but(ladder="cspup_last", block_act="tanh", block_norm="right", head="tanh",
                       d_wider=2, batch_size=256, epochs=20)  # another student's network
CONVERGED = H1.but(  # the regularised relativistic GAN (arXiv 2501.05441) with this generator
    loss="relativistic", r1=2.0, r2=2.0, d_norm=False, d_wider=2, init="he", head="tanh", flip=True,
    beta1=0.0, beta2=0.9, lr_g=2e-3, lr_d=2e-3, lr_width=64, lr_end=0.1, ema_images=20_000)
PRESETS = {  # every experiment, in the report's order; h0 to h3 are the course's hypotheses
    "baseline": BASELINE,
    "h0_more_epochs": BASELINE.but(epochs=20),
    "h1_bn_leaky": H1,
    "h2_l2_big_batch": H1.but(batch_size=256, weight_decay=1e-4),
    "h3_smooth_tanh": H1.but(label_smoothing=0.1, lr_d=3e-4, lr_g=8e-4, head="tanh"),
    "tanh_bn": TANH_BN.but(lr_g=1e-4, lr_d=1e-4),
    "low_lr": TANH_BN.but(lr_g=1e-5, lr_d=1e-5),
    "fast_d": TANH_BN.but(block_norm="both", lr_d=2e-3),
    "slow_d": TANH_BN.but(lr_d=2e-5),
    "slow_d_equal_rates": TANH_BN,  # no student's: is it the slow D, or the rest?
    "unit_range": TANH_BN.but(lr_d=2e-5, head="sigmoid"),
    "dcgan": BASELINE.but(generator="dcgan", lr_g=1e-4, lr_d=1e-4),
    "bce_logits": BASELINE.but(loss="bce_logits"),
    "lazy_d": BASELINE.but(d_every=2),
    "shallow_d": BASELINE.but(d_fewer=1),
    "leaky_block": BASELINE.but(block_act="leaky_relu"),
    "batch_64": BASELINE.but(batch_size=64),
    "no_bn_d": BASELINE.but(ladder="deconv_first", deconv_kernel=2, block_act="leaky_relu",
                            head="relu", d_norm=False),
    "two_to_one": BASELINE.but(block_norm="both", head="tanh", lr_d=1e-4),
    "adam_default": BASELINE.but(beta1=0.9),
    "smooth_labels": H1.but(label_smoothing=0.1),  # no student's: the three parts of h3
    "tanh_head": H1.but(head="tanh"),
    "h3_rates": H1.but(lr_d=3e-4, lr_g=8e-4),
    "converged": CONVERGED}
ABLATIONS = {f"without_{part}": CONVERGED.but(**change) for part, change in {
    "pairs": {"loss": "bce_logits"}, "penalties": {"r1": 0, "r2": 0}, "wide_d": {"d_wider": 1},
    "bn_in_g": {"block_norm": "none"}, "he": {"init": "dcgan"}, "flip": {"flip": False},
    "ema": {"ema_images": 0}, "cspup": {"generator": "dcgan"}}.items()}  # no penalty: half on a GPU

# ------------------------------------------------------------------------------------------ runs
_, _, CODE = Path(__file__).read_text(encoding="utf-8").partition("- models\n")
CODE = hashlib.sha1(CODE.partition("- presets\n")[0].encode()).hexdigest()[:8]  # of what trains

@dataclasses.dataclass
class Run:
    """One trained experiment and what it measured on the way."""
    config: Config
    history: list[dict[str, float]]  # records of some 200 windows, see `train`
    generator: nn.Module  # with the running mean of its weights, where the config asks for one
    snapshots: list[tuple[int, Tensor]]  # (images seen, uint8 (36, 3, S, S)), always the same noise
    environment: dict[str, str]  # hardware, torch, date and the hash of models, losses, training
    stopped: str = ""  # why it ended early: a signal, "time", or a loss that is not finite
    @property
    def finished(self) -> bool:
        done = bool(self.history) and self.history[-1]["epoch"] >= self.config.epochs
        return done and "not finite" not in self.stopped

@torch.no_grad()
def sample(run: Run, n: int, seed: int = 0) -> Tensor:
    """n images of the run's generator from noise of its own seed: uint8 (n, 3, S, S) on the CPU."""
    need(n > 0, f"n={n}: expected at least 1 image")
    generator, device = run.generator.eval(), next(run.generator.parameters()).device
    z = torch.randn(n, run.config.z_dim, generator=torch.Generator().manual_seed(seed))
    parts = [to_uint8(generator(part.to(device)), run.config).cpu() for part in z.split(256)]
    return torch.cat(parts)                                              # (n, 3, S, S)

def train(config: Config, images: Tensor, run_dir: Any = None, progress: Any = True,
          on_epoch: Any = None, time_budget: float = math.inf, save_every: float = 600) -> Run:
    """Train one generator on images, uint8 (N, 3, S, S). run_dir: where the run lives, see `begin`.
    The history has a record for each of some 200 windows, with means over it: step, epoch, images,
    seconds, d_loss, g_loss, penalty, d_real, d_fake (D's mean logits); after an epoch also
    diversity and what on_epoch(run) returns. progress: a bar, none, or f(images of a
    step). After time_budget (hours), Ctrl-C, 'Interrupt kernel' or SIGTERM the run is saved and
    returned; the same call goes on, bit for bit on a CPU; a crash costs save_every seconds."""
    training = begin(config, images, folder := Path(run_dir) if run_dir is not None else None)
    run = Run(config, training.history, training.kept, training.snapshots, training.environment)
    windows = {round(k * training.steps / min(200, training.steps)) for k in range(1, 201)}
    name, n = folder or config.label(), config.batch_size
    begun = saved = time.monotonic()
    with progress_bar(training.steps * n, name, progress is True) as bar, stop_signals() as stops:
        tick = progress if callable(progress) else bar.update
        tick(training.step * n)
        while training.step < training.steps and not run.stopped:
            training.advance()
            tick(n)
            ends_epoch = training.step % training.epoch_steps == 0
            if ends_epoch or training.step in windows:
                record = training.record()
                if not math.isfinite(record["d_loss"] + record["g_loss"]):
                    run.stopped = f"not finite: D {record['d_loss']}, G {record['g_loss']}"
                    break
            if ends_epoch:
                training.check_up(run, on_epoch)
            now, over = time.monotonic(), training.step >= training.steps
            late = not over and now - begun > 3600 * time_budget
            run.stopped = stops[0] if stops else "time" if late else ""
            if folder and (run.stopped or over or now - saved > save_every):
                save(training, folder)
                saved = now
    if not run.finished:
        print(f"{name}: stopped at step {training.step} of {training.steps} ({run.stopped}).")
    return run
run_or_load = train  # its other name, for notebooks: a finished run is loaded, and that is said

def begin(config: Config, images: Tensor, folder: Path | None) -> Training:
    """The training in folder/run.pt, or a new one. The folder of another config, of other images or
    with a damaged run.pt gets another name. More epochs are granted if the rates do not fall."""
    identity, device, state, reason = identify(config, images), best_device(), {}, ""
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()  # fails now, if at all, not after the training
    if folder and (folder / "run.pt").exists():
        try:
            state = torch.load(folder / "run.pt", map_location="cpu", weights_only=True)
            there, over = state["identity"], state["step"] >= config.epochs * state["epoch_steps"]
            if config.lr_end == 1 and there["epochs"] < config.epochs:
                there["epochs"] = config.epochs  # a constant rate knows of no end
            for name, value in {**dataclasses.asdict(BASELINE), **there}.items():  # or newer fields
                if value != identity.get(name):
                    reason += f"{name}={value} there, {identity.get(name)} here; "
        except Exception as error:  # whatever a damaged file raises
            reason = f"damaged: {said(error)}"
    if reason:
        kept = next(p for k in range(1, 999) if not (p := Path(f"{folder}.old{k}")).exists())
        folder.rename(kept), folder.mkdir()
        print(f"{folder} held another run ({reason}), which is now {kept}: it begins anew.")
    if reason or not state:
        return Training(config, images, device, half_for(config, images, device))
    training = Training(config, images, device, None if over else half_for(config, images, device))
    training.load_state_dict(state)
    print(f"{folder} [{config.label()}]: loaded at step {training.step} of {training.steps},",
          "{date}, {hardware}, code {code}.".format(**training.environment))  # also of other code
    return training

def identify(config: Config, images: Tensor) -> dict[str, Any]:
    """What equal runs have in common: config, and the images' shape and content. Bad ones raise."""
    size, n = config.image_size, config.batch_size
    found = [images.dtype, *images.shape] if isinstance(images, Tensor) else repr(images)[:80]
    need(found[:1] == [torch.uint8] and found[2:] == [3, size, size] and found[1] >= n,
         f"images={found}: expected a torch.uint8 tensor (N, 3, {size}, {size}), as of "
         f"load_faces(source, {size}), with N at least batch_size={n}")
    some = images[:: max(1, len(images) // 256)].cpu().contiguous().numpy()
    content = hashlib.sha1(some.tobytes()).hexdigest()[:8]
    return {**dataclasses.asdict(config), "data": f"{tuple(images.shape)} {content}"}

def save(training: Training, folder: Path) -> None:
    """Write folder/run.pt, unless weights are not finite. A full disk is said; the run goes on."""
    state = training.state_dict()
    if training.step >= training.steps and training.config.lr_end < 1:
        state["opt_g"] = state["opt_d"] = {}  # most of the file, and nothing can follow
    if all(x.isfinite().all() for k in ("generator", "discriminator") for x in state[k].values()):
        try:
            write_aside(folder / "run.pt", lambda file: torch.save(state, file))
        except (OSError, RuntimeError) as error:  # torch.save raises either on a full disk
            print(f"step {training.step}: {folder}/run.pt cannot be written ({said(error)}).")

def load_run(folder: str | Path) -> Run:
    """The run in a folder, without its images. run.pt.gz: one made small, weights in int8 steps."""
    path, small = Path(folder) / "run.pt", Path(folder) / "run.pt.gz"
    if not path.exists() and not small.exists():
        raise FileNotFoundError(f"{path}: no run. Train one: train(config, images, {folder!r})")
    file = path if path.exists() else io.BytesIO(gzip.decompress(small.read_bytes()))
    state = torch.load(file, map_location="cpu", weights_only=True)
    config = Config(**{name: value for name, value in state["identity"].items() if name != "data"})
    generator = GENERATORS[config.generator](config).to(best_device())
    generator.load_state_dict({name: x if isinstance(x, Tensor) else x[0] * x[1]  # int8, scale
                               for name, x in state["kept"].items()})
    return Run(config, state["history"], generator, state["snapshots"], state["environment"])

def watch(held_out: Tensor, n: int) -> Any:
    """An on_epoch for `train`: SWD and coverage of up to n samples, against held-out images."""
    real = pick(held_out, min(n, len(held_out)))
    return lambda run: {"swd": sliced_wasserstein(real, fake := sample(run, len(real)))["avg"],
                        "coverage": coverage(real, fake)}

split_faces = functools.lru_cache(1)(lambda source, size: hold_out(load_faces(source, size)))
def begin_work(seen: Any, slot: int, gpus: int) -> None:
    """What a process of `train_all` does first. It ends with its parent, even a killed one."""
    def follow() -> None:
        multiprocessing.parent_process().join()
        os.kill(os.getpid(), signal.SIGTERM)  # saves the run, if there is one
        time.sleep(120)
        os._exit(1)
    do_job.seen, do_job.slot = seen, slot  # images seen by each process, which one it is
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides, and sends SIGTERM
    threading.Thread(target=follow, daemon=True).start()
    torch.set_num_threads(1)  # two that share a core wait for each other by spinning
    torch.cuda.set_device(slot % gpus) if gpus else None

def do_job(config: Config, folder: str, source: Any, n: int, hours: float) -> tuple[str, str]:
    """One run in such a process: (why it is not finished or "", what it said of note)."""
    def tick(images: int) -> None:
        do_job.seen[do_job.slot] += images
    with contextlib.redirect_stdout(io.StringIO()) as out:
        images, held_out = split_faces(source, config.image_size)
        run = train(config, images, folder, tick, watch(held_out, n), hours)
    lines = [x for x in out.getvalue().splitlines() if "loaded at" not in x and "(time)" not in x]
    return "" if run.finished else run.stopped, "\n".join(lines)

def train_all(jobs: list, source: str | Path | None, measured_on: int = 512,
              time_budget: float = math.inf, workers: int = 0) -> dict[str, str]:
    """Train many runs side by side: a process for each GPU, or CPU core with one thread, or as many
    as workers. jobs: (config, folder) each, in this order; source: of their images; see `train`,
    `load_faces`. `watch` measures on up to measured_on held-out ones. time_budget: hours, for all.
    Returns {folder: why it is not finished}. A run that fails, or a process that dies, costs no
    other. Ctrl-C and SIGTERM save all and raise. Scripts need `if __name__ == "__main__":`."""
    for size in {config.image_size for config, _ in jobs if source}:
        load_faces(source, size)  # decoded once, not by each of the processes
    gpus = torch.cuda.device_count() if best_device().type == "cuda" else 0
    spawn, others = multiprocessing.get_context("spawn"), multiprocessing.active_children()
    free, pools, busy, reasons = [*range(workers or gpus or os.cpu_count() or 1)], {}, {}, {}
    waiting, ends = [*jobs], time.monotonic() / 3600 + time_budget
    seen = spawn.RawArray("q", len(free))  # images; without a lock that a dead process could hold
    total = sum(config.epochs * (config.epoch_images or 0) for config, _ in jobs)  # 0: not known
    with progress_bar(total, f"{len(jobs)} runs") as bar, stop_signals() as stops:
        try:
            while (waiting or busy) and not stops:
                while waiting and free:  # over time as well: a finished run is then known as such
                    (config, folder), slot = waiting.pop(0), free.pop(0)
                    args, hours = (seen, slot, gpus), ends - time.monotonic() / 3600
                    pools[slot] = pools.get(slot) or ProcessPoolExecutor(1, spawn, begin_work, args)
                    job = pools[slot].submit(do_job, config, folder, source, measured_on, hours)
                    busy[job] = slot, folder
                for job in wait(busy, 0.5, FIRST_COMPLETED).done:
                    slot, folder = busy.pop(job)
                    free.append(slot)
                    if error := job.exception():  # it failed or died: the next gets a new process
                        pools.pop(slot).shutdown(wait=False)
                    reason, text = (w := said(error), f"{folder}: {w}") if error else job.result()
                    reasons.update({str(folder): reason} if reason else {})
                    bar.write(text) if text else None
                bar.update(sum(seen) - bar.n)
        finally:
            for child in multiprocessing.active_children() if busy else ():
                child.terminate() if child not in others else None  # SIGTERM: it saves its run
            for pool in pools.values():
                pool.shutdown()
    if stops:
        raise KeyboardInterrupt(f"{stops[0]}: the same call goes on with the runs in progress")
    return reasons

def write_aside(path: Path, write: Any) -> None:
    """write(file) beside path, flush, rename: a reader sees the old file or the new, never half."""
    part = path.with_name(f"{path.name}.part{os.getpid()}-{threading.get_ident()}")
    try:
        with open(part, "wb") as file:
            write(file)
            file.flush(), os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)

@contextlib.contextmanager
def stop_signals() -> Any:
    """A list that names the signal once Ctrl-C or SIGTERM has come; a second Ctrl-C raises."""
    def handle(number: int, frame: Any) -> None:
        names.append(signal.Signals(number).name)
        if len(names) > 1 and number == signal.SIGINT:
            raise KeyboardInterrupt
    names, main = [], threading.current_thread() is threading.main_thread()  # none else handles
    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)
              if main and signal.getsignal(number) != signal.SIG_IGN}  # as in a worker
    try:
        yield names
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

def progress_bar(total: int, name: Any, show: bool = True) -> tqdm:
    return tqdm(total=total, desc=str(name), unit="img", mininterval=2, disable=not show)

@functools.cache
def best_device() -> torch.device:
    """The GPU if one really works, else the CPU; says so of one that is listed and does not."""
    try:  # is_available() is true for cards that this build has no kernels for (P100)
        if torch.cuda.is_available() and torch.ones(8, device="cuda").cos().sum().item():
            return torch.device("cuda")
    except RuntimeError as error:
        print(f"This GPU cannot be used, the CPU is; on Kaggle choose 'GPU T4 x2' ({said(error)}).")
    return torch.device("cpu")

def environment(device: torch.device) -> dict[str, str]:
    cpu = f"{(n := torch.get_num_threads())} CPU core{'s' * (n > 1)}"
    return {"hardware": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu,
            "torch": str(torch.__version__), "code": CODE, "date": time.strftime("%Y-%m-%d")}

def said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]

# --------------------------------------------------------------------------------------- metrics
def sliced_wasserstein(real: Tensor, fake: Tensor, seed: int = 0) -> dict[str, float]:
    """Sliced Wasserstein distance of Progressive GAN (arXiv 1710.10196), x1e3; lower is better. Of
    uint8 (N, 3, S, S), equally many: {"64": .., "32": .., "16": .., "avg": ..}, the distance of 7x7
    patches at each level of a Laplacian pyramid. Its floor falls with N. Blind to colour shifts."""
    need(real.shape == fake.shape and real.dtype == fake.dtype == torch.uint8, f"real {real.dtype} "
         f"{[*real.shape]}, fake {fake.dtype} {[*fake.shape]}: expected uint8 (N, 3, S, S), alike")
    random, distances = torch.Generator().manual_seed(seed), {}
    for a, b in zip(laplacian_pyramid(real), laplacian_pyramid(fake)):   # (N, 3, s, s) each
        side, gaps = a.shape[-1], []
        corner = torch.randint(side - 6, (2, len(a), 128), generator=random)  # the same for both
        a, b = cut_patches(a, corner), cut_patches(b, corner)            # (147, 128 N) each
        for _ in range(4):
            d = F.normalize(torch.randn(128, 147, generator=random), dim=1).to(a.device)
            # NumPy sorts, for torch.sort also makes the indices: 10 times as long on a CPU.
            rows = [np.sort((d @ x).cpu().numpy(), axis=1) for x in (a, b)]  # (128, 128 N) each
            gaps.append(1e3 * float(np.abs(rows[0] - rows[1]).mean()))
        distances[str(side)] = sum(gaps) / 4
    return {**distances, "avg": sum(distances.values()) / len(distances)}

def laplacian_pyramid(images: Tensor) -> list[Tensor]:
    """[(N, 3, S, S), ... (N, 3, 16, 16)]: what each size adds to the next, by the 5x5 binomial."""
    def smooth(x: Tensor) -> Tensor:
        row = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0], device=x.device) / 16
        binomial = (row[:, None] * row).expand(3, 1, 5, 5)
        return F.conv2d(F.pad(x, (2, 2, 2, 2), mode="reflect"), binomial, groups=3)
    levels = [images.to(best_device()).float()]
    while levels[-1].shape[-1] > 16:
        small, up = smooth(levels[-1])[:, :, ::2, ::2], torch.zeros_like(levels[-1])
        up[:, :, ::2, ::2] = 4 * small  # for the three zeros beside each
        levels[-1:] = [levels[-1] - smooth(up), small]
    return levels

def cut_patches(images: Tensor, corner: Tensor) -> Tensor:
    """7x7 patches with upper left corners (2, N, 128), normalised per channel: (147, 128 N)."""
    rows, columns = (corner[..., None] + torch.arange(7)).to(images.device)  # (N, 128, 7) each
    n = torch.arange(len(images), device=images.device)[:, None, None, None]
    cut = images[n, :, rows[..., None], columns[..., None, :]]           # (N, 128, 7, 7, 3)
    patches = cut.permute(4, 2, 3, 0, 1).flatten(1, 2).flatten(2)        # (3, 49, 128 N)
    std, mean = torch.std_mean(patches, dim=(1, 2), correction=0, keepdim=True)
    return ((patches - mean) / std.clamp(min=1e-3)).flatten(0, 1)        # (147, 128 N)

def nearest(images: Tensor, among: Tensor, k: int = 1) -> tuple[Tensor, Tensor]:
    """(distance, index), (N,) each, of an image's k-th nearest one of `among`; not itself, if both
    are one tensor. Distance: RMS of pixels in [0, 1], at 16 px; of a copy exactly 0."""
    a, b = (torch.cat([F.adaptive_avg_pool2d(part.cpu().double(), 16).flatten(1)  # (N, 768)
                       for part in x.split(1024)]) for x in (images, among))
    d = torch.cdist(a, b, compute_mode="use_mm_for_euclid_dist") / (255 * math.sqrt(768))  # (N, M)
    return tuple((d.fill_diagonal_(math.inf) if among is images else d).kthvalue(k, dim=1))

def diversity(real: Tensor, fake: Tensor) -> float:
    """Mean distance of a fake image to its nearest other fake one, over the same for real ones but
    for copies: 1 is right, towards 0 is collapse, nan if all real ones are copies."""
    need(len(real) == len(fake), f"{len(real)} real, {len(fake)} fake images: expected as many")
    real = real.flatten(1).unique(dim=0).view(-1, *real.shape[1:])       # (M, 3, S, S)
    fake = fake[: len(real)]                                             # (M, 3, S, S)
    ratio = nearest(fake, fake)[0].mean() / nearest(real, real)[0].mean()
    return ratio.item() if len(real) > 1 else math.nan

def coverage(real: Tensor, fake: Tensor, k: int = 5) -> float:
    """Share of real images with a fake one nearer than their k-th real one (arXiv 2002.09797)."""
    need(len(real) > k, f"{len(real)} real images: expected more than k={k}")
    return (nearest(real, fake)[0] <= nearest(real, real, k)[0]).float().mean().item()

def fid_kid(real: Tensor, fake: Tensor) -> dict[str, Any]:
    """FID and KID by torch-fidelity, lower is better; None, and why, if it cannot be had."""
    try:
        from torch_fidelity import calculate_metrics
        sides = [torch.utils.data.Subset(images, range(len(images))) for images in (real, fake)]
        found = calculate_metrics(input1=sides[0], input2=sides[1], fid=True, kid=True, cache=False,
            verbose=False, kid_subset_size=min(1000, len(real)), cuda=best_device().type == "cuda")
        return {"fid": found["frechet_inception_distance"], "no_fid": "",
                "kid": found["kernel_inception_distance_mean"]}
    except Exception as error:  # not installed, or no network for the weights
        return {"fid": None, "kid": None, "no_fid": said(error)}

def pick(images: Tensor, n: int, seed: int = 0) -> Tensor:
    """n of the images at random, uint8 (n, 3, S, S) on the CPU, in the order they had."""
    need(0 < n <= len(images), f"n={n}: expected 1 to {len(images)}, as many as there are images")
    index = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:n]
    return images[index.sort().values.to(images.device)].cpu()

def measure(real: Tensor, fake: Tensor, seed: int = 0) -> dict[str, Any]:
    """Every metric of fake images against as many real ones; nan becomes None, for JSON."""
    return {"swd": sliced_wasserstein(real, fake, seed), "coverage": coverage(real, fake),
            "diversity": d if (d := diversity(real, fake)) == d else None, **fid_kid(real, fake)}

def reference(held_out: Tensor, others: Tensor, n: int = 1024, seed: int = 0) -> dict[str, Any]:
    """What every metric reads on real images: n held-out ones, or all, against others."""
    n = min(n, len(held_out), len(others))
    found = measure(pick(held_out, n, seed), pick(others, n, seed), seed)
    return {"measured_on": n, "swd_floor": found["swd"], "fid_floor": found["fid"],
            "coverage_real": found["coverage"], "diversity_real": found["diversity"]}

def evaluate(run: Run, held_out: Tensor, floor: dict[str, Any], seed: int = 0) -> dict[str, Any]:
    """A record for results/table.json: every metric, on held-out images, and the floor given."""
    n, last = floor["measured_on"], run.history[-max(1, len(run.history) // 20) :]
    losses = {key: sum(record[key] for record in last) / len(last) for key in ("d_loss", "g_loss")}
    return {**{key: vars(run.config)[key] for key in ("image_size", "width", "seed")}, **losses,
            "images_seen": last[-1]["images"], "seconds": last[-1]["seconds"],
            **measure(pick(held_out, n, seed), sample(run, n, seed)), **floor, **run.environment}

# ----------------------------------------------------------------------------------------- plots
class Picture(Figure):
    """A figure that a notebook shows once, without pyplot and without `%matplotlib inline`."""
    def _repr_png_(self) -> bytes:
        self.savefig(buffer := io.BytesIO(), format="png", dpi=72)
        return buffer.getvalue()

def show_images(images: Tensor, title: str = "", columns: int = 12) -> Figure:
    """A grid of uint8 (N, 3, S, S); only one too large for the figure is smoothed."""
    grid = make_grid(images, min(columns, len(images)), padding=1, pad_value=255).permute(1, 2, 0)
    figure = Picture((10, 10 * len(grid) / len(grid[0]) + 0.3), layout="constrained")
    ax = figure.subplots(subplot_kw={"xticks": [], "yticks": [], "title": title})
    ax.imshow(grid.numpy(), interpolation="nearest" if len(grid[0]) < 1000 else None)
    return figure

def compare(runs: dict[str, Run], n: int = 12, seed: int = 0) -> Figure:
    """One row of n samples for each run of one image size, the same noise in every row."""
    figure = show_images(torch.cat([sample(run, n, seed) for run in runs.values()]), columns=n)
    rows = (torch.arange(len(runs)) + 0.5) * (next(iter(runs.values())).config.image_size + 1)
    figure.axes[0].set_yticks(rows.tolist(), [*runs], fontsize=9)
    return figure

def plot_losses(run: Run, title: str = "") -> Figure:
    """Losses with the values they should approach, D's mean logits, and the collapse alarm."""
    losses, logits, alarm = (figure := Picture((10, 3), layout="constrained")).subplots(1, 3)
    lines = {"d_loss": (losses, "D"), "g_loss": (losses, "G"), "d_real": (logits, "real images"),
             "d_fake": (logits, "generated images"), "diversity": (alarm, "256 samples")}
    for k, (key, (ax, name)) in enumerate(lines.items()):
        records = [record for record in run.history if key in record]
        ax.plot([record["images"] / 1000 for record in records], [r[key] for r in records], f"C{k}",
                marker="o" if ax is alarm else "", ms=4, lw=1, label=name)
    for k, level in enumerate(equilibrium(run.config)):
        losses.axhline(level, color=f"C{k}", ls="--", lw=1, label=f"equilibrium, {level:.2f}")
    alarm.axhline(1, color="C4", ls="--", lw=1), alarm.axhspan(0, 0.3, color="C3", alpha=0.15)
    words = "diversity (real: 1; red: collapse)"  # below 0.3, by eye
    for ax, name in ((losses, title or "losses"), (logits, "mean logit"), (alarm, words)):
        ax.set(title=name, xlabel="thousand images seen", ylim=(None if ax is logits else 0, None))
        ax is alarm or ax.legend(frameon=False, fontsize=7.5)
    return figure
