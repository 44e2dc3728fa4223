"""Finding, decoding and caching faces: cases that went wrong for others, as their whole kinds."""
import io
import json
import os
import pickle
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import cspgan as cs


def encoded(image, kind="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def noise(seed, size=(40, 50)):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def fill(folder, n, ending=".png", seed=0, dark=1.0):
    folder.mkdir(parents=True, exist_ok=True)
    for k in range(n):
        noise(seed + k).point(lambda v: int(v * dark)).save(folder / f"{k:04d}{ending}")
    return folder


def load(source, tmp_path, size=16):
    return cs.load_faces(source, size, cache_dir=tmp_path / "cache")


# ---- decoding


@pytest.mark.parametrize("data", [
    encoded(Image.new("RGB", (40, 40), "red").convert(mode), kind, **options) for mode, kind, options in [
        ("RGB", "PNG", {}), ("RGB", "JPEG", {"quality": 95}), ("RGB", "WEBP", {"lossless": True}),
        ("P", "PNG", {}), ("CMYK", "JPEG", {"quality": 95}), ("RGBA", "PNG", {}), ("RGB", "BMP", {}),
        ("RGB", "TIFF", {}), ("P", "GIF", {}), ("RGB", "PPM", {}), ("RGB", "JPEG2000", {})]])
def test_red_is_red_in_every_mode_and_format(data):
    pixels = cs.Faces.decode(data, 16)
    assert pixels.shape == (3, 16, 16) and pixels.dtype == np.uint8
    assert np.abs(pixels.astype(int).mean((1, 2)) - [255, 0, 0]).max() < 6


@pytest.mark.parametrize("image, level", [
    (Image.new("L", (20, 20), 100), 100), (Image.new("1", (20, 20), 1), 255),
    (Image.new("LA", (20, 20), (100, 255)), 100), (Image.new("LA", (20, 20), (0, 0)), 255),
    (Image.fromarray(np.full((20, 20), 100 * 257, np.uint16)), 100),  # convert would give white
    (Image.new("RGBA", (20, 20), (0, 0, 0, 128)), 127)])
def test_grey_levels_sixteen_bits_and_transparency(image, level):
    assert np.abs(cs.Faces.decode(encoded(image), 16).astype(int) - level).max() <= 1


@pytest.mark.parametrize("width, height", [(60, 30), (30, 60), (31, 64), (178, 218)])
def test_crop_is_the_centred_square_and_nothing_is_squashed(width, height):
    y, x = np.mgrid[:height, :width]
    disc = (x + 0.5 - width / 2) ** 2 + (y + 0.5 - height / 2) ** 2 < (min(width, height) / 2) ** 2
    pixels = cs.Faces.decode(encoded(Image.fromarray(disc.astype(np.uint8) * 255)), 32)[0] / 255
    y, x = np.mgrid[:32, :32]
    assert np.abs(pixels - ((x - 15.5) ** 2 + (y - 15.5) ** 2 < 16**2)).mean() < 0.06


def test_resize_is_antialiased_and_exif_turns_upright():
    stripes = np.zeros((256, 256), np.uint8)
    stripes[:, ::2] = 255  # finer than the result can show: an even grey
    pixels = cs.Faces.decode(encoded(Image.fromarray(stripes)), 16)
    assert np.abs(pixels[:, :, 1:-1].astype(int) - 128).max() < 4
    half = Image.new("RGB", (20, 20))
    half.paste("white", (0, 0, 20, 10))
    exif = Image.Exif()
    exif[0x0112] = 3  # stored upside down
    pixels = cs.Faces.decode(encoded(half, "JPEG", exif=exif, quality=95), 16)
    assert pixels[:, :6].mean() < 10 and pixels[:, 10:].mean() > 245


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG"])
def test_malformed_exif_is_no_reason_to_lose_the_pixels(kind):  # case 6
    bad = b"Exif\0\0II*\0\xff\xff\xff\xffgarbage"
    data = encoded(Image.new("RGB", (40, 40), "red"), kind, exif=bad)
    assert cs.Faces.decode(data, 16)[0].mean() > 240


# ---- what is loaded, and what is passed over


def test_formats_go_by_content_and_the_rest_is_counted_by_ending(tmp_path, capsys):  # case 3
    folder = tmp_path / "mixed"
    for k, (ending, kind, n) in enumerate([(".bmp", "BMP", 4), (".TIF", "TIFF", 2), (".jfif", "JPEG", 2),
                                           (".gif", "GIF", 2), (".png", "PNG", 3), ("", "PNG", 2),
                                           (".dat", "JPEG", 1), (".jpg", "PNG", 2)]):
        folder.mkdir(exist_ok=True)
        for i in range(n):
            (folder / f"{k}_{i}{ending}").write_bytes(encoded(noise(10 * k + i), kind))
    (folder / "list.csv").write_text("a,b")
    (folder / "more.csv").write_text("a,b")
    (folder / "._0.png").write_bytes(b"macOS")
    assert len(load(folder, tmp_path)) == 18
    assert "{'.csv': 2}" in capsys.readouterr().out


@pytest.mark.parametrize("name, data, words", [  # case 12
    ("a.jpg", b"version https://git-lfs.github.com/spec/v1\noid sha256:0", ["git lfs pull"]),
    ("b.png", b"just some text", ["just some text"]), ("c.jpg", b"", ["b''"]),
    ("d.jpg", encoded(noise(1), "JPEG")[:900], ["truncated"]),
    ("e.png", b"<!DOCTYPE html><html>", ["<!DOCTYPE html>"])])
def test_damaged_files_are_skipped_and_named_with_what_they_are(tmp_path, capsys, name, data, words):
    folder = fill(tmp_path / "photos", 4)
    (folder / name).write_bytes(data)
    assert len(load(folder, tmp_path)) == 4
    said = capsys.readouterr().out
    assert "Skipped 1" in said and all(word in said for word in [name, *words]) and "BytesIO" not in said
    faces = cs.Faces(folder, 16)
    with pytest.raises(ValueError, match=name):
        faces[faces.names.index(name)]


def test_links_and_pipes_are_named_and_neither_followed_nor_waited_for(tmp_path, capsys):
    folder = fill(tmp_path / "photos", 3)
    (folder / "link.png").symlink_to(folder / "0000.png")
    (folder / "gone.png").symlink_to(folder / "nowhere")
    (folder / "round").symlink_to(folder)
    os.mkfifo(folder / "pipe.jpg")
    assert len(load(folder, tmp_path)) == 3 and "Skipped 3" in capsys.readouterr().out


def test_folder_and_zip_are_the_same_through_any_loader(tmp_path):
    folder, archive = fill(tmp_path / "photos", 12), tmp_path / "photos.zip"
    (folder / "sub").mkdir()
    (folder / "0003.png").rename(folder / "sub" / "x.PNG")
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted(folder.rglob("*.*"), reverse=True):
            file.write(path, path.relative_to(folder))
        file.writestr("__MACOSX/._0.png", b"no image")
    from_folder, from_zip = load(folder, tmp_path), load(archive, tmp_path)
    assert from_folder.shape == (12, 3, 16, 16) and torch.equal(from_folder, from_zip)
    faces = pickle.loads(pickle.dumps(cs.Faces(archive, 16)))
    batches = torch.cat([*torch.utils.data.DataLoader(faces, 5, num_workers=2)])
    assert torch.equal(batches, torch.stack([cs.Faces(folder, 16)[i] for i in range(12)]))
    assert {x.sum().item() for x in batches} == {x.sum().item() for x in from_zip}


# ---- the cache


def test_cache_is_used_again_and_made_anew_when_a_file_changes(tmp_path, monkeypatch):
    folder, calls, decode = fill(tmp_path / "photos", 5), [], cs.Faces.decode
    monkeypatch.setattr(cs.Faces, "decode", staticmethod(lambda *a: calls.append(1) or decode(*a)))
    first = load(folder, tmp_path)
    assert torch.equal(load(str(folder), tmp_path), first) and len(calls) == 5
    noise(99).save(folder / "0000.png")
    os.utime(folder / "0000.png", (1, 1))
    assert not torch.equal(load(folder, tmp_path), first) and len(calls) == 10
    assert not [*(tmp_path / "cache").glob("*.part*")]


def test_eight_threads_at_once_all_get_the_images(tmp_path):  # case 11
    folder = fill(tmp_path / "photos", 30)
    with ThreadPoolExecutor(8) as pool:
        found = [*pool.map(lambda _: load(folder, tmp_path), range(8))]
    assert all(torch.equal(images, found[0]) for images in found) and len(found[0]) == 30


def test_cache_folder_that_cannot_be_used_is_said(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cs.tempfile, "gettempdir", lambda: str(tmp_path))
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert len(load(fill(tmp_path / "photos", 3), tmp_path)) == 3
    assert "cannot be used" in capsys.readouterr().out


# ---- holding out


def test_what_is_held_out_is_a_random_draw_whatever_the_names(tmp_path):  # case 1
    fill(tmp_path / "p" / "a", 150, dark=0.3)
    fill(tmp_path / "p" / "b", 150, seed=1000)
    train, held = cs.hold_out(load(tmp_path / "p", tmp_path))
    assert 10 <= len(held) <= 60 and len(train) + len(held) == 300
    assert abs((held.float().mean((1, 2, 3)) < 80).float().mean() - 0.5) < 0.3
    again, _ = cs.hold_out(load(tmp_path / "p", tmp_path))
    assert torch.equal(train, again) and train.untyped_storage().size() == held.untyped_storage().size()


def test_a_picture_stays_on_its_side_when_others_come(tmp_path):  # case 8
    images = torch.randint(0, 256, (400, 3, 16, 16), dtype=torch.uint8)
    few, all_, turned = (cs.hold_out(x) for x in (images[:150], images, images.flip(0)))
    keys = [{x.sum().item() * 1000 + x[0, 0, 0].item() for x in side} for side in (few[1], all_[0], all_[1], turned[1])]
    assert not keys[0] & keys[1] and keys[0] <= keys[2] == keys[3]


def test_copies_are_counted_and_never_lie_on_both_sides(tmp_path, capsys):  # case 7
    folder = fill(tmp_path / "photos", 100)
    for path in list(folder.iterdir()):
        (folder / f"copy_{path.name}").write_bytes(path.read_bytes())
    train, held = cs.hold_out(load(folder, tmp_path))
    assert "copies of others: 100" in capsys.readouterr().out
    assert cs.nearest(held, train)[0].min() > 0
    with pytest.raises(ValueError, match="differ"):
        cs.hold_out(torch.zeros(50, 3, 16, 16, dtype=torch.uint8))


# ---- finding


@pytest.mark.parametrize("mount", ["celeba-dataset", "d/jess/celeba", "datasets/jess/celeba", "competitions/c"])
def test_celeba_is_found_wherever_it_is_mounted(tmp_path, monkeypatch, mount, capsys):
    monkeypatch.delenv("CSPGAN_DATA", raising=False)
    celeba = fill(tmp_path / mount / "img_align_celeba" / "img_align_celeba", 2).parent
    fill(tmp_path / "datasets" / "aaa" / "other", 9)
    assert cs.find_faces((tmp_path,)) == celeba
    assert f"{celeba} (2)" in (said := capsys.readouterr().out) and "'" + str(tmp_path / "datasets/aaa/other") in said


@pytest.mark.parametrize("kind", ["datasets/{}/x", "d/{}/x", "notebooks/{}/x", "competitions/{}", "{}"])
def test_inputs_are_told_apart_in_every_layout(tmp_path, monkeypatch, capsys, kind):  # case 2
    monkeypatch.delenv("CSPGAN_DATA", raising=False)
    faces = fill(tmp_path / kind.format("alice"), 6)
    fill(tmp_path / kind.format("bob") / "a", 5)
    assert cs.find_faces((tmp_path,)) == faces
    assert "(6)" in (said := capsys.readouterr().out) and ": 5" in said


@pytest.mark.parametrize("name", ["celeba.tar.gz", "train.parquet", "half.zip", "faces.npz", "x.7z"])
def test_what_lies_there_and_cannot_be_used_is_named(tmp_path, monkeypatch, capsys, name):  # case 4
    monkeypatch.delenv("CSPGAN_DATA", raising=False)
    (tmp_path / name).write_bytes(b"PK\x03\x04 half a download" * 9)
    assert cs.find_faces((tmp_path / "nowhere", tmp_path)) is None
    assert Path(name).suffix in capsys.readouterr().out
    monkeypatch.setenv("CSPGAN_DATA", str(tmp_path / name))
    with pytest.raises(FileNotFoundError, match=name):
        cs.find_faces()
    monkeypatch.setenv("CSPGAN_DATA", str(fill(tmp_path / "mine", 1)))
    assert cs.find_faces() == tmp_path / "mine"


@pytest.mark.parametrize("call", [  # case 10, and sources that hold nothing
    lambda p: cs.toy_faces(0, 16), lambda p: cs.toy_faces(4, 20), lambda p: cs.Faces(p, 20),
    lambda p: cs.Faces(5, 16), lambda p: load(p / "nowhere", p), lambda p: load(fill(p / "void", 0), p),
    lambda p: cs.hold_out(cs.toy_faces(4, 16), 1.5), lambda p: cs.hold_out(cs.toy_faces(1, 16))])
def test_wrong_arguments_are_named_with_what_was_expected(tmp_path, call):
    with pytest.raises((ValueError, FileNotFoundError), match="expected|CSPGAN_DATA"):
        call(tmp_path)


def test_toy_faces_depend_on_their_arguments_only():
    state, faces = torch.get_rng_state(), cs.toy_faces(60, 32)
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(faces[:9], cs.toy_faces(9, 32))
    assert not torch.equal(faces, cs.toy_faces(60, 32, seed=1)) and cs.diversity(faces, faces) == 1
    assert cs.nearest(faces, faces)[0].min() > 0.01  # all different
    assert json.dumps(faces[0].tolist()) and cs.load_faces(None, 16).shape == (4096, 3, 16, 16)
