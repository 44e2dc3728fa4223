"""Finding, decoding and caching faces: cases that went wrong for others, as their whole kinds."""

import functools
import io
import itertools
import os
import pickle
import shutil
import struct
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image, features

import cspgan as cs


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def noise(seed, size=(24, 20), levels=256):
    pixels = np.random.default_rng(seed).integers(0, levels, (*size, 3), np.uint8)
    return Image.fromarray(pixels)


def put(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def fill(folder, n, seed=0, levels=256):
    """The folder, with n different pictures in it."""
    for k in range(seed, seed + n):
        put(folder / f"{k:04d}.png", encoded(noise(k, levels=levels)))
    return folder


def unzipped(folder):
    return folder


def zipped(folder):
    """The zip beside a folder with all that it holds, in another order."""
    archive = folder.with_suffix(".zip")
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted(folder.rglob("*"), reverse=True):
            file.write(path, path.relative_to(folder))
    return archive


both_forms = pytest.mark.parametrize("form", [unzipped, zipped])


def keys(images):
    """What tells images apart."""
    return {image.numpy().tobytes() for image in images}


@pytest.fixture
def load(tmp_path):
    return functools.partial(cs.load_faces, size=16, cache_dir=tmp_path / "cache")


@pytest.fixture
def load_all(load):
    return lambda source: torch.cat(load(source))


# ------------------------------------------------------------- decoding
FORMATS = ["JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF"]
OTHER_MODES = {"P": ["PNG", "GIF"], "CMYK": ["JPEG", "TIFF"], "RGBA": ["PNG", "WEBP", "TIFF"]}


@pytest.mark.parametrize("mode", ["RGB", *OTHER_MODES])
def test_red_is_red_in_every_format_mode_and_shape(mode):
    for kind in OTHER_MODES.get(mode, FORMATS):
        if kind == "AVIF" and not features.check("avif"):
            continue
        for shape in ((40, 40), (3000, 1), (1, 3000), (1, 1)):
            red = Image.new("RGB", shape, "red").convert(mode)
            pixels = cs.decode_image(encoded(red, kind, quality=95), 16)
            assert pixels.shape == (3, 16, 16)
            assert pixels.dtype == np.uint8
            error = pixels.mean((1, 2)) - [255, 0, 0]
            assert np.abs(error).max() < 6, (kind, shape)


def level(image, kind="PNG", **options):
    """The one grey level that an image has once it was decoded."""
    pixels = cs.decode_image(encoded(image, kind, **options), 16)
    assert np.ptp(pixels) == 0
    return pixels[0, 0, 0]


def flat(mode, colour):
    return Image.new(mode, (20, 20), colour)


def test_grey_levels_and_sixteen_bits():
    assert level(flat("L", 100)) == level(flat("LA", (100, 255))) == 100
    assert level(flat("1", 1)) == 255
    sixteen = Image.fromarray(np.full((20, 20), 100 * 257, np.uint16))
    for kind in ("PNG", "TIFF", "PPM"):
        assert level(sixteen, kind) == 100  # Pillow's convert alone would give white
    with pytest.raises(ValueError, match="floats"):  # they would all be black
        level(Image.fromarray(np.ones((20, 20), np.float32)), "TIFF")


def test_what_is_transparent_is_white():
    assert level(flat("LA", (0, 0))) == 255
    assert level(flat("RGBA", (0, 0, 0, 128))) == 127
    assert level(flat("L", 0), transparency=0) == 255
    assert level(flat("RGB", 0), transparency=(0, 0, 0)) == 255
    for kind in ("PNG", "WEBP", "TIFF"):
        assert level(flat("RGBA", (0, 0, 0, 0)), kind) == 255
    palette = flat("P", 1)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    assert level(palette, "GIF", transparency=1) == 255
    assert level(palette, transparency=bytes([255, 0])) == 255


@pytest.mark.parametrize("width, height", [(60, 30), (30, 60), (31, 64), (178, 218)])
def test_crop_is_the_centred_square_and_nothing_is_squashed(width, height):
    def disc(width, height):
        y, x = np.mgrid[:height, :width] + 0.5
        square = (x - width / 2) ** 2 + (y - height / 2) ** 2
        return 255 * (square < min(width, height) ** 2 / 4)

    image = Image.fromarray(disc(width, height).astype(np.uint8))
    pixels = cs.decode_image(encoded(image), 32)
    assert np.abs(pixels - disc(32, 32)).mean() < 15


def test_resize_is_antialiased_and_a_large_jpeg_unpacked_smaller_looks_the_same():
    stripes = np.zeros((256, 256), np.uint8)
    stripes[:, ::2] = 255  # finer than the result can show: an even grey
    pixels = cs.decode_image(encoded(Image.fromarray(stripes)), 16)
    assert np.abs(pixels[:, :, 1:-1] - 127.5).max() < 4
    face = noise(1, (150, 150)).resize((600, 600))
    found = cs.decode_image(encoded(face, "JPEG", quality=95), 64).transpose(1, 2, 0)
    expected = face.resize((64, 64), Image.Resampling.LANCZOS)
    assert np.abs(np.asarray(expected, float) - found).mean() < 2


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_every_orientation_of_exif_is_turned_upright(kind):
    stored = noise(1, (2, 2)).resize((16, 16), Image.Resampling.NEAREST)
    a = np.asarray(stored, int)
    b = a.transpose(1, 0, 2)
    turned = (a, a[:, ::-1], a[::-1, ::-1], a[::-1], b, b[:, ::-1], b[::-1, ::-1], b[::-1])
    exif = Image.Exif()
    for orientation, upright in enumerate(turned, start=1):
        exif[0x112] = orientation
        pixels = cs.decode_image(encoded(stored, kind, exif=exif, quality=100), 16)
        error = pixels.transpose(1, 2, 0) - upright
        assert np.abs(error).mean() < 10, orientation


@pytest.mark.filterwarnings("ignore")  # Pillow says that it is corrupt
def test_malformed_exif_is_no_reason_to_lose_the_pixels():  # case 5
    start = b"Exif\0\0II*\0\x08\0\0\0"
    blocks = [b"garbage", b"Exif\0\0garbage", start, start + b"\xff\xff"]
    tags = (0x10F, 0x112, 0x8769)  # maker, orientation, where a further block begins
    for entry in itertools.product(tags, (2, 3, 4, 99), (1, 50, 2**31), (26, 99999)):
        blocks.append(start + b"\1\0" + struct.pack("<HHII", *entry) + bytes(4))
    image = noise(1, (16, 16))
    for kind in ("PNG", "JPEG", "WEBP"):
        whole = cs.decode_image(encoded(image, kind), 16)
        for block in blocks:
            found = cs.decode_image(encoded(image, kind, exif=block), 16)
            assert np.array_equal(found, whole), (kind, block)


# ------------------------------------------------------------- what is loaded, and what is not
DAMAGED = {  # case 11: file: its bytes, which are named
    "pointer.jpg": b"version https://git-lfs.github.com/spec/v1\noid sha256:0",
    "page.png": b"<!DOCTYPE html><html><body>Quota exceeded",
    "empty.gif": b"",
    "cut.jpg": encoded(noise(1), "JPEG")[:900],
    "cut.png": encoded(noise(1))[:700],
}


@both_forms
def test_damaged_files_are_skipped_and_named_with_their_first_bytes(
    tmp_path, load_all, capsys, form
):
    folder = fill(tmp_path / "photos", 4)
    for name, data in DAMAGED.items():
        put(folder / name, data)
    assert len(load_all(form(folder))) == 4
    said = capsys.readouterr().out
    assert "5 skipped" in said
    for name, data in DAMAGED.items():
        assert f"{name} is damaged" in said
        assert f"begins with {data[:24]}" in said


def test_zip_of_bsdtar_is_a_zip(tmp_path, load_all):
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as file:
        file.writestr("./0.png", encoded(noise(0)))
        file.writestr("./.hidden/1.png", encoded(noise(1)))
    assert len(load_all(tmp_path / "photos.zip")) == 1


def test_names_that_are_no_text(tmp_path, load_all, capsys):
    folder = fill(tmp_path / "photos", 2)
    put(folder / os.fsdecode(b"\xff/a.png"), encoded(noise(9)))
    put(folder / os.fsdecode(b"\xff.jpg"), b"damaged")
    assert len(load_all(folder)) == 3
    assert "1 skipped: \\udcff.jpg is damaged" in capsys.readouterr().out


def test_names_that_the_console_cannot_show(tmp_path, load_all, monkeypatch):
    folder = fill(tmp_path / "照片", 2)
    put(folder / "脸.jpg", b"damaged")
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "cp1252"))  # as on Windows
    assert len(load_all(folder)) == 2
    assert b"1 skipped: \\u8138.jpg is damaged" in sys.stdout.buffer.getvalue()


def test_damage_in_a_zip_costs_one_image(tmp_path, load_all, capsys):
    archive = zipped(fill(tmp_path / "photos", 4))
    data = archive.read_bytes()
    archive.write_bytes(data.replace(encoded(noise(2))[-60:], bytes(60)))
    assert len(load_all(archive)) == 3
    assert "0002.png is damaged (BadZipFile: Bad CRC-32" in capsys.readouterr().out


@both_forms
@pytest.mark.parametrize("error", [PermissionError, MemoryError])
def test_error_of_reading_is_not_damage(tmp_path, load_all, monkeypatch, form, error):  # case 16
    source = form(fill(tmp_path / "photos", 5))
    monkeypatch.setattr(Path, "read_bytes", Mock(side_effect=error))
    monkeypatch.setattr(zipfile.ZipFile, "read", Mock(side_effect=error))
    with pytest.raises(error):
        load_all(source)
    monkeypatch.undo()
    assert not any((tmp_path / "cache").iterdir())
    assert len(load_all(source)) == 5


@both_forms
def test_known_endings_are_taken_and_others_are_counted(tmp_path, load_all, capsys, form):  # case 3
    folder = tmp_path / "mixed"
    for k, ending in enumerate((".jpg", ".JPEG", ".jfif", ".png", ".webp", ".gif", ".BMP", ".tif")):
        kind = Image.registered_extensions()[ending.lower()]
        put(folder / f"{k % 2}/face{ending}", encoded(noise(k), kind))
    for name in ("list.csv", "more.CSV", "1/notes.txt", "README", "._0.png", ".cache/0.png"):
        put(folder / name, b"none of ours")
    assert len(load_all(form(folder))) == 8
    said = capsys.readouterr().out
    assert "8 images (0 4, 1 4); passed over 2 .csv, " in said
    assert "1 .txt" in said
    assert "1 no ending" in said
    assert "skipped" not in said


@both_forms
def test_any_loader_with_workers_gives_the_same_images(tmp_path, load_all, form):
    source = form(fill(tmp_path / "photos", 60))
    pixels = [cs.decode_image(encoded(noise(k)), 16) for k in range(60)]
    expected = torch.from_numpy(np.stack(pixels * 10))  # long enough for two to meet in one file
    faces = pickle.loads(pickle.dumps(cs.Faces(source, 16)))
    assert torch.equal(faces[0], expected[0])  # the zip is open when workers begin
    order = list(range(60)) * 10
    loader = torch.utils.data.DataLoader(faces, 7, sampler=order, num_workers=2)
    assert torch.equal(torch.cat(list(loader)), expected)
    assert keys(load_all(source)) == keys(expected)


# ------------------------------------------------------------- the cache
def replace_at_once(folder):
    path = folder / "0000.png"
    changed = path.stat().st_mtime_ns
    put(path, encoded(noise(99)) + bytes(9))
    os.utime(path, ns=(changed, changed))


CHANGES = {
    "none": lambda folder: None,
    "other pixels": lambda folder: put(folder / "0000.png", encoded(noise(99))),
    "other pixels at the same time": replace_at_once,
    "added": lambda folder: fill(folder, 1, seed=50),
    "removed": lambda folder: (folder / "0000.png").unlink(),
}


@both_forms
@pytest.mark.parametrize("change", CHANGES)
def test_cache_is_made_anew_when_it_must_be_and_only_then(
    tmp_path, load_all, monkeypatch, change, form
):
    folder = fill(tmp_path / "photos", 5)
    load_all(form(folder))
    CHANGES[change](folder)
    expected = {cs.decode_image(path.read_bytes(), 16).tobytes() for path in folder.iterdir()}
    decode = Mock(side_effect=cs.decode_image)
    monkeypatch.setattr(cs, "decode_image", decode)
    assert keys(load_all(form(folder))) == expected
    assert decode.called == (change != "none")


def test_each_size_has_its_cache(tmp_path, load):
    folder = fill(tmp_path / "photos", 3)
    for size in (16, np.int64(32), 16):
        train, held_out = load(folder, size=size)
        assert train.shape[1:] == held_out.shape[1:] == (3, size, size)
        assert len(train) + len(held_out) == 3


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux tells what is mapped")
def test_both_parts_are_views_of_one_file_mapped_read_only(tmp_path, load):  # case 22
    train, held_out = load(fill(tmp_path / "photos", 40))
    assert len(held_out) > 0
    assert train.untyped_storage().data_ptr() == held_out.untyped_storage().data_ptr()
    (file,) = (tmp_path / "cache").rglob("images.u8")
    assert file.stat().st_size == 40 * 3 * 16 * 16
    maps = Path("/proc/self/maps").read_text().splitlines()
    (mapping,) = [line for line in maps if str(file) in line]
    assert mapping.split()[1] == "r--s"


def test_interrupted_decoding_leaves_no_cache(tmp_path, load_all, monkeypatch):
    folder = fill(tmp_path / "photos", 5)
    first = cs.decode_image(encoded(noise(0)), 16)
    decode = Mock(side_effect=[first, KeyboardInterrupt, first, first, first])
    monkeypatch.setattr(cs, "decode_image", decode)
    with pytest.raises(KeyboardInterrupt):
        load_all(folder)
    monkeypatch.undo()
    assert not any((tmp_path / "cache").iterdir())
    assert len(load_all(folder)) == 5


def test_cache_that_was_cut_short_is_named(tmp_path, load):
    folder = fill(tmp_path / "photos", 5)
    load(folder)
    (file,) = (tmp_path / "cache").rglob("images.u8")
    file.write_bytes(file.read_bytes()[:-768])
    with pytest.raises(ValueError, match="photos-16px.* lost some of its 5 images: delete it"):
        load(folder)


def test_cache_that_cannot_be_filed_is_said(tmp_path, load, monkeypatch):
    monkeypatch.setattr(Path, "rename", Mock(side_effect=PermissionError("a scanner holds it")))
    with pytest.raises(PermissionError, match="a scanner"):
        load(fill(tmp_path / "photos", 3))


def test_decoding_does_not_run_far_ahead_of_a_slow_disk():
    class Many:
        taken = 0

        def __len__(self):
            return 4000

        def __getitem__(self, i):
            self.taken += 1
            return torch.zeros(1)

    many = Many()
    next(cs.decoded(many))
    time.sleep(0.3)
    assert many.taken <= 1024
    assert len(list(cs.decoded(many))) == 4000


def test_full_disk_is_said_before_decoding(tmp_path, load, monkeypatch):  # case 23
    decode = Mock()
    monkeypatch.setattr(cs, "decode_image", decode)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(ValueError, match="cache.* GB needed, .* free: take another cache_dir"):
        load(fill(tmp_path / "photos", 5))
    assert not decode.called
    assert not any((tmp_path / "cache").iterdir())


@both_forms
def test_four_threads_at_once_all_get_the_images(tmp_path, load_all, form):  # case 10
    source = form(fill(tmp_path / "photos", 60))
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(load_all, [source] * 4))
    for images in found:
        assert len(keys(images)) == 60
        assert torch.equal(images, found[0])
    (cache,) = (tmp_path / "cache").iterdir()  # and nothing else is left


# ------------------------------------------------------------- holding out
def test_what_is_held_out_is_spread_over_all_folders(tmp_path, load):  # case 1
    folder = tmp_path / "photos"
    fill(folder / "a", 200, levels=100)
    fill(folder / "b", 200, seed=1000)
    train, held_out = load(folder)
    assert len(train) + len(held_out) == 400
    is_dark = held_out.float().mean((1, 2, 3)) < 80
    assert 10 < is_dark.sum() < 30
    assert 10 < (~is_dark).sum() < 30
    (folder / "a").rename(folder / "z")
    again = load(zipped(folder))
    assert keys(train) == keys(again[0])
    assert keys(held_out) == keys(again[1])


def test_the_draw_is_the_same_on_every_machine(tmp_path, load):
    images = (torch.arange(60 * 768) * 7919 % 251).to(torch.uint8).view(60, 3, 16, 16)
    for k, image in enumerate(images.permute(0, 2, 3, 1)):
        put(tmp_path / f"photos/{k:02d}.png", encoded(Image.fromarray(image.numpy())))
    _, held_out = load(tmp_path / "photos")
    assert held_out[:, 0, 0, 0].tolist() == [0, 245, 177, 174, 236, 233, 41]


def test_a_picture_stays_on_its_side_when_others_come_and_go(tmp_path, load):  # case 7
    folder = fill(tmp_path / "photos", 100)
    first = load(folder)
    fill(folder, 100, seed=1000)
    more = load(folder)
    for k in range(0, 100, 3):
        (folder / f"{k:04d}.png").unlink()
        (folder / f"{k + 1000}.png").rename(folder / f"_{k}.png")
    fewer = load(folder)
    trained, held_out = (set.union(*map(keys, parts)) for parts in zip(first, more, fewer))
    assert not trained & held_out
    assert len(trained | held_out) == 200


def test_copies_are_counted_and_lie_on_one_side(tmp_path, load, capsys):  # case 6
    folder = fill(tmp_path / "photos", 100)
    for k in range(100):
        put(folder / f"copy{k}.bmp", encoded(noise(k), "BMP"))  # of another format
    train, held_out = load(folder)
    assert "100 exact copies" in capsys.readouterr().out
    assert len(train) + len(held_out) == 200
    assert len(held_out) > 0
    assert not keys(train) & keys(held_out)


def test_the_whole_of_celeba_has_its_own_test_partition(tmp_path, load, monkeypatch):
    numbers = (1, 162770, 182637, 182638, 182639, 202599)
    folder = tmp_path / "img_align_celeba"
    for k in numbers:
        put(folder / f"img_align_celeba/{k:06d}.jpg", encoded(noise(k), "JPEG"))
    monkeypatch.setattr(cs, "CELEBA_IMAGES", len(numbers))
    train, held_out = load(folder)
    faces = cs.Faces(folder, 16)
    assert torch.equal(train, torch.stack([faces[i] for i in range(3)]))
    assert torch.equal(held_out, torch.stack([faces[i] for i in range(3, 6)]))


# ------------------------------------------------------------- finding
@pytest.fixture
def find(tmp_path, monkeypatch):
    monkeypatch.delenv("CSPGAN_DATA", raising=False)
    return lambda: cs.find_faces(tmp_path / "kaggle", tmp_path / "data")


@pytest.mark.parametrize("mount", ["celeba-dataset", "datasets/jess/celeba", "d/jess/celeba/x"])
def test_of_kaggles_input_celeba_is_taken_and_nothing_else(tmp_path, find, capsys, mount):
    fill(tmp_path / "kaggle/aaa/other", 9)
    put(tmp_path / "kaggle/aaa/img_align_celeba.csv", b"no images")
    celeba = tmp_path / "kaggle" / mount / "img_align_celeba"
    fill(celeba / "img_align_celeba", 2)
    assert find() == celeba
    archive = zipped(celeba)
    shutil.rmtree(celeba)
    assert find() == archive
    said = capsys.readouterr().out
    for place in (celeba, archive):
        assert f"Taken: {place}: 2 images (img_align_celeba 2); passed over nothing" in said


def test_of_kaggles_input_nothing_but_celeba_is_taken(tmp_path, find, capsys):
    fill(tmp_path / "kaggle/datasets/alice/faces", 6)  # cases 2, 19, 25
    assert find() is None
    assert "No data set. On Kaggle: Add Input" in capsys.readouterr().out


def test_data_is_taken_with_its_count_by_folder(tmp_path, find, capsys):
    fill(tmp_path / "data/faces", 3)
    fill(tmp_path / "data/masks", 4)
    (tmp_path / "data/link.png").symlink_to(tmp_path / "data/masks/0000.png")  # is not followed
    (tmp_path / "data/linked").symlink_to(tmp_path / "data/masks")
    zipped(fill(tmp_path / "data/more", 2))
    shutil.rmtree(tmp_path / "data/more")
    assert find() == tmp_path / "data"
    said = capsys.readouterr().out
    assert (
        f"Taken: {tmp_path}/data: 7 images (masks 4, faces 3); passed over 2 links, 1 .zip" in said
    )
    assert f"Not taken: {tmp_path}/data/more.zip: 2 images (. 2)" in said
    for name in ("faces", "masks"):
        shutil.rmtree(tmp_path / "data" / name)
    assert find() == tmp_path / "data/more.zip"


def test_zip_that_cannot_be_read_now_is_not_passed_over(tmp_path, find, monkeypatch):
    put(tmp_path / "data/faces.zip", zipped(fill(tmp_path / "faces", 3)).read_bytes())
    monkeypatch.setattr(Path, "open", Mock(side_effect=PermissionError("not now")))
    with pytest.raises(PermissionError, match="not now"):
        find()


@pytest.mark.parametrize("name", ["celeba.tar.gz", "a.parquet", "a.npz", "half.zip", "a.heic"])
def test_what_cannot_be_used_is_said_before_procedural_faces(tmp_path, find, capsys, name):
    put(tmp_path / "data" / name, b"PK\3\4 and no more")  # case 4
    assert find() is None
    assert f"passed over 1 {Path(name).suffix}" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["gone", "half.zip", "celeba.tar.gz", "a.parquet/x"])
def test_data_asked_for_by_name_is_never_replaced(tmp_path, find, load, monkeypatch, capsys, name):
    fill(tmp_path / "data", 3)
    fill(tmp_path / "kaggle/img_align_celeba", 4)
    asked = tmp_path / "asked" / name.split("/")[0]
    if name != "gone":
        put(tmp_path / "asked" / name, b"PK\3\4 and no more")
    monkeypatch.setenv("CSPGAN_DATA", str(asked))
    with pytest.raises(ValueError, match=f"{asked}.*CSPGAN_DATA"):
        load(find())
    monkeypatch.setenv("CSPGAN_DATA", str(tmp_path / "data"))
    assert find() == tmp_path / "data"
    assert "Taken: " in capsys.readouterr().out


def test_wrong_arguments_are_named_with_what_was_expected():
    for n in (0, 2.5, "4"):
        with pytest.raises(ValueError, match=f"n={n!r}, size=16: expected 1 or more"):
            cs.toy_faces(n, 16)
    for size in (20, "16", None):
        for source in (".", None):
            with pytest.raises(ValueError, match=f"size={size!r}: expected .*16, 32, 64, 128, 256"):
                cs.load_faces(source, size)


# ------------------------------------------------------------- procedural faces
def test_toy_faces_depend_on_their_arguments_only():
    faces = cs.toy_faces(60, 32)
    assert len(keys(faces)) == 60
    assert torch.equal(faces[:9], cs.toy_faces(9, 32))
    assert not keys(faces) & keys(cs.toy_faces(60, 32, seed=1))
    small = torch.nn.functional.avg_pool2d(cs.toy_faces(9, 128).float(), 4)
    assert (small - faces[:9]).abs().mean() < 6  # the same faces at every size


def test_without_a_source_there_are_procedural_faces(monkeypatch):
    toys = cs.toy_faces(60, 16)
    monkeypatch.setattr(cs, "toy_faces", lambda n, size: toys.repeat(n // 60 + 1, 1, 1, 1)[:n])
    train, held_out = cs.load_faces(None, 16)
    assert len(train) + len(held_out) == 4096
    assert len(held_out) > 0
    assert not keys(train) & keys(held_out)
