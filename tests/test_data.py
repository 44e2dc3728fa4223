"""Finding, decoding and caching faces; images of every mode and damage; procedural faces."""

import contextlib
import functools
import io
import os
import shutil
import signal
import socket
import struct
import sys
import tracemalloc
import types
import zipfile
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import cspgan as cs


def encoded(image, kind="PNG", **options):
    stream = BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def red(mode="RGB", size=(40, 40)):
    """A picture that is red wherever it is seen."""
    if mode == "RGBA":
        return Image.new("RGBA", size, (255, 0, 0, 255))
    return Image.new("RGB", size, (255, 0, 0)).convert(mode)


@pytest.fixture
def photos(tmp_path):
    """A folder of six pictures of different brightness, one of them in a sub-folder."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for k in range(5):
        Image.new("RGB", (30, 40), (40 * k, 0, 0)).save(folder / f"{k}.png")
    Image.new("RGB", (40, 30), (200, 0, 0)).save(folder / "more" / "5.png")
    return folder


@contextlib.contextmanager
def in_time(seconds):
    """An endless wait becomes an error."""
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail(f"waited for more than {seconds} seconds"))
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def load(source, tmp_path, size=16, **options):
    return cs.load_faces(source, size, cache_dir=tmp_path / "cache", **options)


# ---- decoding


@pytest.mark.parametrize("data", [
    encoded(red()), encoded(red(), "JPEG", quality=95), encoded(red(), "WEBP", lossless=True), encoded(red("P")),
    encoded(red("CMYK"), "JPEG", quality=95), encoded(red("RGBA")), encoded(red("RGBA"), "WEBP", lossless=True),
], ids=["png", "jpeg", "webp", "palette", "cmyk", "rgba", "webp-alpha"])
def test_every_mode_of_red_is_red(data):
    pixels = cs.decode_face(data, 16)
    assert pixels.shape == (3, 16, 16) and pixels.dtype == np.uint8
    assert np.abs(pixels.astype(int).mean((1, 2)) - [255, 0, 0]).max() < 6


@pytest.mark.parametrize("image, level", [
    (Image.new("L", (20, 20), 100), 100),
    (Image.new("1", (20, 20), 1), 255),
    (Image.new("LA", (20, 20), (100, 255)), 100),
    (Image.fromarray(np.full((20, 20), 100 * 257, np.uint16)), 100),  # convert("RGB") alone would give white
    (Image.new("LA", (20, 20), (0, 0)), 255),  # wholly transparent black is what lies behind: white
    (Image.new("RGBA", (20, 20), (0, 0, 0, 128)), 127),
], ids=["grey", "one bit", "grey with alpha", "16 bit", "transparent", "half transparent"])
def test_grey_levels_and_transparency(image, level):
    pixels = cs.decode_face(encoded(image), 16)
    assert np.abs(pixels.astype(int) - level).max() <= 1


def test_palette_with_transparency_lies_on_white():
    image = Image.new("P", (20, 20), 1)
    image.putpalette([0, 0, 0, 255, 0, 0])
    assert (cs.decode_face(encoded(image, transparency=1), 16) == 255).all()


def test_exif_rotation_is_applied():
    image = Image.new("RGB", (20, 20))
    image.paste((255, 255, 255), (0, 0, 20, 10))  # white above black
    exif = Image.Exif()
    exif[0x0112] = 3  # stored upside down
    pixels = cs.decode_face(encoded(image, "JPEG", exif=exif, quality=95), 16)
    assert pixels[:, :6].mean() < 10 and pixels[:, 10:].mean() > 245


@pytest.mark.parametrize("width, height", [(60, 30), (30, 60), (31, 64), (178, 218)])
def test_crop_is_the_centred_square_and_nothing_is_squashed(width, height):
    """A disc in the middle, as wide as the short side, must come out as a disc as wide as the picture."""
    y, x = np.mgrid[:height, :width]
    radius = min(width, height) / 2
    disc = ((x + 0.5 - width / 2) ** 2 + (y + 0.5 - height / 2) ** 2 < radius**2).astype(np.uint8) * 255
    pixels = cs.decode_face(encoded(Image.fromarray(disc)), 32)[0] / 255
    y, x = np.mgrid[:32, :32]
    expected = (x - 15.5) ** 2 + (y - 15.5) ** 2 < 16**2
    assert abs(pixels.mean() - np.pi / 4) < 0.02
    assert np.abs(pixels - expected).mean() < 0.06


def test_resize_is_antialiased():
    stripes = np.zeros((256, 256), np.uint8)
    stripes[:, ::2] = 255  # finer than the result can show: must become an even grey
    pixels = cs.decode_face(encoded(Image.fromarray(stripes)), 16)
    assert np.abs(pixels[:, :, 1:-1].astype(int) - 128).max() < 4


# ---- sources


@pytest.mark.parametrize("side, decoded", [(255, 255), (256, 128), (600, 150), (1100, 138)])
def test_large_jpeg_is_unpacked_smaller_and_looks_the_same(side, decoded, monkeypatch):
    """From four times the size on by JPEG's own halving, an eighth at most and never to less than twice the size."""
    face = Image.fromarray(cs.toy_faces(1, 256)[0].permute(1, 2, 0).numpy()).resize((side, side))
    buffer = BytesIO()
    face.save(buffer, "JPEG", quality=95)
    sizes, resize = [], Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda self, *rest, **more: sizes.append(self.width) or resize(self, *rest, **more))
    found = cs.decode_face(buffer.getvalue(), 64)
    expected = np.asarray(resize(face, (64, 64), Image.Resampling.LANCZOS)).transpose(2, 0, 1)
    assert sizes == [decoded]
    assert np.abs(found.astype(int) - expected).mean() < (2.5 if side % 8 else 1.5)  # where 137.5 pixels become 138


def test_folder_and_zip_give_the_same_images_in_the_order_of_names(photos, tmp_path):
    archive = tmp_path / "photos.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted(photos.rglob("*.png"), reverse=True):
            file.write(path, path.relative_to(photos))
        file.writestr("__MACOSX/._0.png", b"not an image")
        file.writestr("list_attr_celeba.csv", "a,b")
    from_folder, from_zip = load(photos, tmp_path), load(archive, tmp_path)
    assert from_folder.shape == (6, 3, 16, 16) and from_folder.dtype == torch.uint8
    assert from_folder[:, 0].float().mean((1, 2)).tolist() == [0, 40, 80, 120, 160, 200]
    assert torch.equal(from_folder, from_zip)
    assert torch.equal(load(photos, tmp_path, limit=2), from_folder[:2])


def test_no_link_is_followed_and_each_is_named(photos, tmp_path, capsys):
    (tmp_path / "outside").mkdir()
    Image.new("RGB", (30, 40), "white").save(tmp_path / "outside" / "secret.png")
    outside = tmp_path / "outside"
    for name, target in [("round", photos), ("itself", "itself"), ("there", "back"), ("back", "there"),
                         ("gone.png", "nowhere"), ("twice.png", photos / "0.png"),
                         ("out", outside), ("out.png", outside / "secret.png")]:
        (photos / "more" / name).symlink_to(target)
    images = load(photos, tmp_path)
    said = capsys.readouterr().out
    assert len(images) == 6 and images.float().mean((2, 3)).max() < 201  # the secret is white
    links = [f"'{path.relative_to(photos)}'" for path in (photos / "more").iterdir() if path.is_symlink()]
    assert "skipped 8 of 14 files" in said and all(link in said for link in links)


def test_source_may_be_a_link_or_lie_behind_one(photos, tmp_path, decodings, capsys):
    (tmp_path / "link").symlink_to(photos)
    (tmp_path / "way").symlink_to(tmp_path)
    assert len(load(tmp_path / "link", tmp_path)) == len(load(tmp_path / "way" / "link", tmp_path)) == 6
    assert len(decodings) == 6 and "skipped" not in capsys.readouterr().out  # one place by two names: one cache
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(FileNotFoundError, match="loop.*no such folder or zip"):
        load(tmp_path / "loop", tmp_path)


@pytest.mark.parametrize("kind", ["pipe", "socket"])
def test_what_is_no_file_is_skipped_and_never_waited_for(photos, tmp_path, capsys, monkeypatch, kind):
    with in_time(20), socket.socket(socket.AF_UNIX) as listener:
        monkeypatch.chdir(photos)  # a socket's path must be short
        if kind == "pipe":
            os.mkfifo("special.jpg")
        else:
            listener.bind("special.jpg")
        assert len(load(photos, tmp_path)) == 6
        assert "skipped 1 of 7 files: 'special.jpg'" in capsys.readouterr().out


def test_pipe_as_source_is_refused_and_none_is_found(tmp_path, monkeypatch):
    monkeypatch.delenv("CSPGAN_DATA", raising=False)
    os.mkfifo(tmp_path / "pipe.zip")
    with in_time(20):
        assert cs.find_faces((tmp_path,)) is None
        with pytest.raises(FileNotFoundError, match="pipe.zip.*no such folder or zip"):
            load(tmp_path / "pipe.zip", tmp_path)


@pytest.mark.parametrize("name", ["/etc/a.png", "../a.png", "x/../../a.png", "..\\a.png", "C:\\a.png", "C:/a.png"])
def test_zip_members_that_lead_out_are_skipped_and_named(tmp_path, capsys, name):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        for member in ("x/in..side.png", name):
            file.writestr(member, encoded(red()))
    assert len(load(tmp_path / "a.zip", tmp_path)) == 1
    assert f"skipped 1 of 2 files: {name!r} (ValueError: an absolute or parent path" in capsys.readouterr().out


@pytest.mark.parametrize("side", [8_100, 10_000, 60_000])  # above our limit; where Pillow warns; where it refuses
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_picture_of_absurd_size_is_skipped_before_it_is_decoded(photos, tmp_path, capsys, monkeypatch, side):
    data = bytearray(encoded(Image.new("1", (8, 8))))
    data[16:24] = struct.pack(">II", side, side)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))  # of the header, so that all looks right
    (photos / "bomb.png").write_bytes(data)
    monkeypatch.setattr(cs.ImageOps, "exif_transpose", lambda image, whole=cs.ImageOps.exif_transpose: whole(image)
                        if max(image.size) < 100 else pytest.fail("decoded"))
    assert len(load(photos, tmp_path)) == 6
    said = capsys.readouterr().out
    assert "skipped 1 of 7 files: 'bomb.png'" in said and "pixels" in said and "decoded" not in said


def test_what_only_calls_itself_an_image_is_skipped(photos, tmp_path, capsys):
    Image.new("RGB", (40, 40)).save(photos / "program.jpg", "EPS")  # Pillow would hand it to Ghostscript
    Image.new("RGB", (40, 40)).save(photos / "z.jpg", "GIF")
    assert len(load(photos, tmp_path)) == 7
    assert "skipped 1 of 8 files: 'program.jpg' (UnidentifiedImageError" in capsys.readouterr().out


def zipped_lie(path, packing, real=50_000_000, claimed=1000):
    """A zip with one member that unpacks to more than it says."""
    with zipfile.ZipFile(path, "w", packing) as file:
        file.writestr("bomb.png", bytes(real))
    data = bytearray(path.read_bytes())
    for place in (22, data.index(b"PK\x01\x02") + 24):  # in the member's header and in the table of contents
        data[place : place + 4] = struct.pack("<I", claimed)
    path.write_bytes(data)


@pytest.mark.parametrize("kind", ["folder", "zip", "lying deflate", "lying bzip2", "lying lzma"])
def test_file_of_absurd_size_is_skipped_and_not_read(photos, tmp_path, capsys, monkeypatch, kind):
    monkeypatch.setattr(cs, "MAX_BYTES", 1_000_000, raising=False)
    source = photos if kind == "folder" else tmp_path / "bomb.zip"
    if kind == "folder":
        (photos / "bomb.png").touch()
        os.truncate(photos / "bomb.png", 50_000_000)  # takes no room on the disk
    elif kind == "zip":
        zipped_lie(source, zipfile.ZIP_DEFLATED, claimed=50_000_000)
    else:
        zipped_lie(source, {"deflate": zipfile.ZIP_DEFLATED, "bzip2": zipfile.ZIP_BZIP2, "lzma": zipfile.ZIP_LZMA}[kind[6:]])
    tracemalloc.start()
    with contextlib.suppress(ValueError):  # none of the zip's 1 files can be read
        load(source, tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5_000_000 and "'bomb.png' (" in capsys.readouterr().out


def test_damaged_files_are_skipped_counted_and_named(photos, tmp_path, capsys):
    whole = encoded(Image.effect_noise((64, 64), 90).convert("RGB"), "JPEG")
    (photos / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (photos / "empty.jpg").write_bytes(b"")
    (photos / "text.png").write_bytes(b"no picture at all")
    (photos / "notes.txt").write_text("not meant to be one")
    assert len(load(photos, tmp_path)) == 6
    said = capsys.readouterr().out
    assert "skipped 3 of 9" in said and all(name in said for name in ("cut.jpg", "empty.jpg", "text.png"))
    assert "notes.txt" not in said


def test_zip_member_with_wrong_checksum_is_skipped(photos, tmp_path, capsys):
    archive = tmp_path / "a.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in photos.glob("*.png"):
            file.write(path, path.name)
    data = bytearray(archive.read_bytes())
    data[data.index(b"IDAT") + 8] ^= 0xFF
    archive.write_bytes(data)
    assert len(load(archive, tmp_path)) == 4 and "skipped 1 of 5" in capsys.readouterr().out


@pytest.mark.parametrize("make, words", [
    (lambda p: p / "nowhere", ["nowhere", "no such folder or zip"]),
    (lambda p: (p / "a.rar", (p / "a.rar").write_bytes(b"Rar!"))[0], ["a.rar", "neither a folder nor a zip"]),
    (lambda p: (p / "void", (p / "void").mkdir())[0], ["void", ".jpg"]),
    (lambda p: (p / "bad", (p / "bad").mkdir(), (p / "bad/x.jpg").write_bytes(b"x"))[0], ["bad", "none of its 1"]),
])
def test_unusable_sources_say_where_was_looked_and_what_to_do(tmp_path, make, words):
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        load(make(tmp_path), tmp_path)
    for word in [*words, "CSPGAN_DATA", "toy_faces"]:
        assert word in str(error.value)


@pytest.mark.parametrize("what", ["0.png", "more", "."])
@pytest.mark.parametrize("way", ["bits", "told"])
def test_what_may_not_be_read_is_skipped_and_named(photos, tmp_path, capsys, monkeypatch, what, way):
    closed = photos / what
    if way == "bits":
        closed.chmod(0)
        if os.access(closed, os.R_OK):
            pytest.skip("permission bits do not bind this user")
    else:
        def refuse(path, *args, really, **options):
            if Path(path) == closed:
                raise PermissionError(13, "Permission denied", str(path))
            return really(path, *args, **options)

        for module, name in ((os, "scandir"), (io, "open")):
            monkeypatch.setattr(module, name, functools.partial(refuse, really=getattr(module, name)))
    if what == ".":
        with pytest.raises((ValueError, PermissionError), match="photos"):
            load(photos, tmp_path)
    else:
        assert len(load(photos, tmp_path)) == 5
        assert f"skipped 1 of 6 files: {what!r}" in capsys.readouterr().out
    monkeypatch.undo()
    closed.chmod(0o700)
    assert len(load(photos, tmp_path)) == 6  # allowed again: taken, though no date has changed


# ---- cache


@pytest.fixture
def decodings(monkeypatch):
    """A list that grows by one with every image decoded."""
    calls = []
    decode = cs.decode_face
    monkeypatch.setattr(cs, "decode_face", lambda *args: calls.append(1) or decode(*args))
    return calls


def test_cache_is_used_when_nothing_changed(photos, tmp_path, decodings):
    first = load(photos, tmp_path)
    again = load(str(photos) + "/../photos", tmp_path)
    assert len(decodings) == 6 and torch.equal(first, again)


@pytest.mark.parametrize("change", ["added", "removed", "touched", "size", "limit", "pixels cut", "crop"])
def test_cache_is_rebuilt_when_it_must_be(photos, tmp_path, monkeypatch, decodings, change):
    load(photos, tmp_path)
    before, options = len(decodings), {}
    if change == "added":
        Image.new("RGB", (30, 30), "blue").save(photos / "9.png")
    if change == "removed":
        (photos / "0.png").unlink()
    if change == "touched":  # other pixels under the same name
        Image.new("RGB", (30, 40), "white").save(photos / "0.png")
        os.utime(photos / "0.png", ns=(1, 1))
    if change in ("size", "limit"):
        options = {"size": 32} if change == "size" else {"limit": 3}
    if change == "pixels cut":
        pixels = next((tmp_path / "cache").glob("*.u8"))
        pixels.write_bytes(pixels.read_bytes()[:-1])
    if change == "crop":
        monkeypatch.setattr(cs, "CROP", "squashed")
    images = load(photos, tmp_path, **options)
    expected = {"added": 7, "removed": 5, "limit": 3}.get(change, 6)
    assert len(images) == expected and len(decodings) == before + expected
    if change == "touched":
        assert (images[0] == 255).all()
    assert not list((tmp_path / "cache").glob("*.part*"))


def test_interrupted_decoding_leaves_the_old_cache_whole(photos, tmp_path, monkeypatch):
    old = load(photos, tmp_path).clone()
    kept = {path.name: path.read_bytes() for path in (tmp_path / "cache").iterdir()}

    def interrupted(data, size):
        raise KeyboardInterrupt

    monkeypatch.setattr(cs, "decode_face", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load(photos, tmp_path, limit=3)
    assert {path.name: path.read_bytes() for path in (tmp_path / "cache").iterdir()} == kept
    monkeypatch.undo()
    assert torch.equal(load(photos, tmp_path), old)


@pytest.mark.parametrize("what", ["photos", "emptied photos", "photos.zip"])  # a disk that is unmounted leaves an empty folder
@pytest.mark.parametrize("when", ["before", "listed", "half decoded"])
def test_vanished_source_is_named_and_the_old_cache_stays(photos, tmp_path, monkeypatch, what, when):
    source = tmp_path / what.split()[-1]
    if source.suffix:
        shutil.make_archive(str(photos), "zip", photos)
    load(source, tmp_path, limit=3)
    kept = {path.name: path.read_bytes() for path in (tmp_path / "cache").iterdir()}

    def vanish():
        source.unlink() if source.is_file() else shutil.rmtree(source, ignore_errors=True)
        if what.startswith("emptied"):
            source.mkdir()

    def after(name, calls):
        """The function `name`; before its n-th call the source vanishes."""
        whole, calls = getattr(cs, name), iter([*[lambda: None] * (calls - 1), vanish])
        monkeypatch.setattr(cs, name, lambda *args: (next(calls, lambda: None)(), whole(*args))[1])

    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    after(*{"before": ("_list_images", 1), "listed": ("_decode_all", 1), "half decoded": ("decode_face", 3)}[when])
    if source.suffix and when == "half decoded":  # an open file stays until it is closed
        assert len(load(source, tmp_path)) == 6
        return
    with pytest.raises((OSError, ValueError), match=f"{source}.*CSPGAN_DATA"):
        load(source, tmp_path)
    assert {path.name: path.read_bytes() for path in (tmp_path / "cache").iterdir()} == kept


def test_one_file_that_vanishes_once_listed_is_skipped_and_named(photos, tmp_path, monkeypatch, capsys):
    listed = cs._list_images
    monkeypatch.setattr(cs, "_list_images", lambda source: (listed(source), (photos / "0.png").unlink(missing_ok=True))[0])
    assert len(load(photos, tmp_path)) == 5
    assert "skipped 1 of 6 files: '0.png' (FileNotFoundError" in capsys.readouterr().out


def test_disk_that_fills_up_while_decoding_is_named_and_the_old_cache_stays(photos, tmp_path):
    resource = pytest.importorskip("resource")
    load(photos, tmp_path, size=256, limit=2)
    kept = {path.name: path.read_bytes() for path in (tmp_path / "cache").iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (700_000, limits[1]))  # three of the six pictures
    try:
        with pytest.raises(OSError, match="cache.*0.0 GB: free some, or pass another cache_dir"):
            load(photos, tmp_path, size=256)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path.name: path.read_bytes() for path in (tmp_path / "cache").iterdir()} == kept


def test_source_that_could_not_be_read_is_tried_again(tmp_path, decodings):
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "0.png").write_bytes(b"not yet")
    for _ in range(2):
        with pytest.raises(ValueError, match="none of its 1"):
            load(folder, tmp_path)
    assert len(decodings) == 2


def test_one_source_and_size_keeps_one_cache(photos, tmp_path):
    load(photos, tmp_path)
    load(photos, tmp_path, limit=3)
    assert len(list((tmp_path / "cache").glob("*.u8"))) == 1


def test_changing_the_tensor_does_not_change_the_cache(photos, tmp_path):
    load(photos, tmp_path).zero_()
    assert load(photos, tmp_path).any()


def test_cache_folder_that_cannot_be_written_is_named(photos, tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(OSError, match="cache"):
        load(photos, tmp_path)


# ---- finding


def test_find_faces_prefers_what_is_asked_for(photos, tmp_path, monkeypatch):
    monkeypatch.setenv("CSPGAN_DATA", str(photos))
    assert cs.find_faces() == photos
    monkeypatch.setenv("CSPGAN_DATA", str(tmp_path / "gone"))
    with pytest.raises(FileNotFoundError, match="gone"):
        cs.find_faces()


@pytest.mark.parametrize("mount", ["celeba-dataset", "d/jessicali9530/celeba-dataset", "datasets/jessicali9530/celeba-dataset"])
def test_celeba_is_found_wherever_kaggle_mounts_it(tmp_path, monkeypatch, mount):
    monkeypatch.delenv("CSPGAN_DATA", raising=False)
    folder = tmp_path / "input" / mount / "img_align_celeba" / "img_align_celeba"
    other = tmp_path / "input" / "aaa-other"
    for place, count in ((folder, 2), (other, 9)):
        place.mkdir(parents=True)
        for k in range(count):
            (place / f"{k:06d}.jpg").write_bytes(b"")
    assert cs.find_faces((tmp_path / "input", tmp_path / "data")) == folder


def test_downloaded_zip_is_found_and_nothing_is_none(tmp_path, monkeypatch):
    monkeypatch.delenv("CSPGAN_DATA", raising=False)
    assert cs.find_faces((tmp_path / "input", tmp_path / "data")) is None
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "broken.zip").write_bytes(b"PK half a download")
    assert cs.find_faces((tmp_path / "input", tmp_path / "data")) is None
    with zipfile.ZipFile(tmp_path / "data" / "celeba-dataset.zip", "w") as file:
        file.writestr("img_align_celeba/0.jpg", b"")
    assert cs.find_faces((tmp_path / "input", tmp_path / "data")).name == "celeba-dataset.zip"


def test_folder_is_found_with_its_subfolders_and_through_links(photos, tmp_path, monkeypatch):
    monkeypatch.delenv("CSPGAN_DATA", raising=False)
    data = tmp_path / "data"
    for part in ("faces/a", "faces/b", "few"):
        (data / part).mkdir(parents=True)
        (data / part / "0.jpg").write_bytes(b"")
    (data / "round").symlink_to(data)  # circles
    (data / "up").symlink_to(tmp_path)
    (data / "itself").symlink_to("itself")
    (data / "few" / "photos").symlink_to(photos)  # inside a source: not followed
    assert cs.find_faces((data,)) == data / "faces"
    (data / "photos").symlink_to(photos)
    (photos / "round").symlink_to(data)
    assert cs.find_faces((data,)) == data / "photos"


def test_zip_is_found_through_a_link_in_the_place_only_and_a_broken_one_passed_over(photos, tmp_path, monkeypatch):
    monkeypatch.delenv("CSPGAN_DATA", raising=False)
    archive = Path(shutil.make_archive(str(tmp_path / "all"), "zip", photos))
    data = tmp_path / "data"
    (data / "few").mkdir(parents=True)
    (data / "few" / "0.jpg").write_bytes(b"")
    (data / "few" / "out.zip").symlink_to(archive)
    broken = bytearray(archive.read_bytes())
    broken[broken.index(b"PK\x01\x02")] = 0  # the end is there, the table of contents is not
    (data / "broken.zip").write_bytes(broken)
    assert cs.find_faces((data,)) == data / "few"
    (data / "faces.zip").symlink_to(archive)
    assert cs.find_faces((data,)) == data / "faces.zip"


def test_linked_celeba_is_found(tmp_path, monkeypatch):
    monkeypatch.delenv("CSPGAN_DATA", raising=False)
    (tmp_path / "mounted" / "img_align_celeba").mkdir(parents=True)
    (tmp_path / "mounted" / "img_align_celeba" / "0.jpg").write_bytes(b"")
    (tmp_path / "input").mkdir()
    (tmp_path / "input" / "celeba-dataset").symlink_to(tmp_path / "mounted")
    (tmp_path / "kaggle").symlink_to(tmp_path / "input")
    assert cs.find_faces((tmp_path / "kaggle",)) == tmp_path / "kaggle" / "celeba-dataset" / "img_align_celeba"


# ---- download


def kaggle_with(monkeypatch, authenticate=lambda: None, download=lambda *args, **options: None):
    """A kaggle package that behaves as given."""
    module = types.ModuleType("kaggle.api.kaggle_api_extended")
    module.KaggleApi = lambda: types.SimpleNamespace(authenticate=authenticate, dataset_download_files=download)
    monkeypatch.setitem(sys.modules, "kaggle", types.ModuleType("kaggle"))
    monkeypatch.setitem(sys.modules, "kaggle.api", types.ModuleType("kaggle.api"))
    monkeypatch.setitem(sys.modules, "kaggle.api.kaggle_api_extended", module)


def test_download_asks_for_celeba_once(tmp_path, monkeypatch):
    asked = []

    def download(dataset, path, **options):
        asked.append(dataset)
        with zipfile.ZipFile(f"{path}/celeba-dataset.zip", "w") as file:
            file.writestr("img_align_celeba/0.png", encoded(red()))

    kaggle_with(monkeypatch, download=download)
    archive = cs.download_celeba(tmp_path / "data")
    assert cs.download_celeba(tmp_path / "data") == archive and asked == ["jessicali9530/celeba-dataset"]
    assert len(load(archive, tmp_path)) == 1


def test_download_without_credentials_says_what_to_do(tmp_path, monkeypatch):
    def leave():
        raise SystemExit(1)

    kaggle_with(monkeypatch, authenticate=leave)
    with pytest.raises(RuntimeError, match="access_token.*KAGGLE_API_TOKEN"):
        cs.download_celeba(tmp_path)


@pytest.mark.parametrize("failure", [ConnectionError("no route"), OSError(28, "No space left on device"), SystemExit(1)])
def test_download_that_fails_leaves_no_half_archive(tmp_path, monkeypatch, failure):
    def download(dataset, path, **options):
        with open(f"{path}/celeba-dataset.zip", "wb") as file:
            file.write(b"PK half")
        raise failure

    kaggle_with(monkeypatch, download=download)
    with pytest.raises(RuntimeError, match="network.*2 GB free"):
        cs.download_celeba(tmp_path)
    assert not list(tmp_path.iterdir())


def test_download_onto_a_full_disk_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(cs.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=10**6))
    with pytest.raises(RuntimeError, match="less than 2 GB free"):
        cs.download_celeba(tmp_path)


# ---- procedural faces


@pytest.mark.parametrize("size", [16, 64, 256])
def test_toy_faces_shape_and_seed(size):
    faces = cs.toy_faces(5, size, seed=1)
    assert faces.shape == (5, 3, size, size) and faces.dtype == torch.uint8
    assert torch.equal(faces, cs.toy_faces(5, size, seed=1)) and not torch.equal(faces, cs.toy_faces(5, size, seed=2))
    assert torch.equal(faces[:3], cs.toy_faces(3, size, seed=1))


def test_toy_faces_are_the_same_at_every_size():
    large = torch.nn.functional.avg_pool2d(cs.toy_faces(20, 128).float(), 4)
    assert (large - cs.toy_faces(20, 32).float()).abs().mean() < 6


def test_toy_faces_all_differ_and_leave_global_state_alone():
    state = torch.get_rng_state()
    faces = cs.toy_faces(200, 16).float().flatten(1)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.cdist(faces, faces).fill_diagonal_(1e9).min() > 100
    assert 60 < faces.mean() < 200


def test_every_factor_of_a_toy_face_matters():
    """Each random number moves some picture: at least ten independent factors, and none is dead."""
    generator = torch.Generator().manual_seed(0)
    numbers = torch.rand(40, cs.FACTORS, generator=generator)
    base = cs.draw_faces(numbers, 64)
    for factor in range(cs.FACTORS):
        changed = numbers.clone()
        changed[:, factor] = (changed[:, factor] + 0.5) % 1
        assert (cs.draw_faces(changed, 64) - base).abs().amax() > 0.02, factor


@pytest.mark.parametrize("n, size", [(0, 32), (5, 48), (5, 8)])
def test_toy_faces_refuse_what_they_cannot_draw(n, size):
    with pytest.raises(ValueError, match=str(n) if n < 1 else str(size)):
        cs.toy_faces(n, size)
