"""Finding, decoding and caching faces; images of every mode and damage; procedural faces."""

import os
import sys
import types
import zipfile
from io import BytesIO

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


def test_links_are_followed_but_no_image_comes_twice(photos, tmp_path):
    (photos / "more" / "round").symlink_to(photos)  # a circle
    (photos / "gone.png").symlink_to(tmp_path / "nowhere")
    linked = tmp_path / "linked"
    linked.mkdir()
    for name in ("a", "b"):
        (linked / name).symlink_to(photos)
    assert len(load(photos, tmp_path)) == len(load(linked, tmp_path)) == 6


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
    assert cs.find_faces((data,)) == data / "faces"
    (data / "photos").symlink_to(photos)
    (photos / "round").symlink_to(data)  # a circle
    assert cs.find_faces((data,)) == data / "photos"


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
