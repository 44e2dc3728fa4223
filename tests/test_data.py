"""Finding, decoding and caching faces: cases that went wrong for others, as their whole kinds."""
import io, multiprocessing, os, pickle, shutil, signal, struct, zipfile, zlib
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image, features

import cspgan as cs

KINDS = {"JPEG": ".jfif", "PNG": ".png", "WEBP": ".webp", "GIF": ".gif", "BMP": ".bmp",
         "TIFF": ".tif", "PPM": ".ppm", "JPEG2000": ".jp2"}
KINDS |= {"AVIF": ".avif"} if features.check("avif") else {}

def encoded(image, kind="PNG", **options):
    image.save(stream := io.BytesIO(), kind, **options)
    return stream.getvalue()

def noise(seed, size=(20, 24), dark=1.0):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3)) * dark
    return Image.fromarray(pixels.astype(np.uint8))

def fill(folder, n, seed=0, dark=1.0):
    """The folder, with n different pictures in it."""
    folder.mkdir(parents=True, exist_ok=True)
    for k in range(seed, seed + n):
        noise(k, dark=dark).save(folder / f"{k:04d}.png")
    return folder

def zipped(files):
    """The bytes of a zip of {name: bytes}, or of what a folder holds."""
    if not isinstance(files, dict):
        paths = [path for path in sorted(files.rglob("*"), reverse=True) if path.is_file()]
        files = {str(path.relative_to(files)): path.read_bytes() for path in paths}
    with zipfile.ZipFile(stream := io.BytesIO(), "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return stream.getvalue()

def put(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path

def load(source, tmp_path, size=16):
    return cs.load_faces(source, size, cache_dir=tmp_path / "cache")

def load_bytes(source, tmp_path):
    return load(source, tmp_path).numpy().tobytes()  # a tensor would not outlive its process

def keys(images):
    return {image.numpy().tobytes() for image in images}  # what tells them apart

@pytest.fixture(autouse=True)
def in_time():
    """An endless wait becomes a failure."""
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("waited for 8 seconds"))
    signal.alarm(8)
    yield
    signal.alarm(0)

# ------------------------------------------------------------- decoding
RED = Image.new("RGB", (40, 40), "red")
MORE = {"save_all": True, "append_images": [Image.new("RGB", (40, 40), "blue")]}

@pytest.mark.parametrize("mode, kind, options", [
    *(("RGB", kind, {"quality": 95}) for kind in KINDS), ("P", "PNG", {}), ("P", "GIF", {}),
    ("CMYK", "JPEG", {"quality": 95}), ("CMYK", "TIFF", {}),
    ("RGBA", "PNG", {}), ("RGBA", "WEBP", {}), ("RGB", "PNG", MORE), ("RGB", "MPO", MORE)])
@pytest.mark.parametrize("shape", [(40, 40), (3000, 1), (1, 3000), (1, 1)])
def test_red_is_red_in_every_format_mode_and_shape(mode, kind, options, shape):
    image = RED.resize(shape).convert(mode)
    pixels = cs.Faces.decode(encoded(image, kind, **(options if shape == RED.size else {})), 16)
    assert pixels.shape == (3, 16, 16) and pixels.dtype == np.uint8
    assert np.abs(pixels.astype(int).mean((1, 2)) - [255, 0, 0]).max() < 6

SIXTEEN = Image.fromarray(np.full((20, 20), 100 * 257, np.uint16))
PALETTE = Image.new("P", (20, 20), 1)
PALETTE.putpalette([0, 0, 0, 255, 0, 0])

@pytest.mark.parametrize("image, level, kind, options", [
    (Image.new("L", (20, 20), 100), 100, "PNG", {}), (Image.new("1", (20, 20), 1), 255, "PNG", {}),
    (Image.new("LA", (20, 20), (100, 255)), 100, "PNG", {}), (SIXTEEN, 100, "PNG", {}),
    (SIXTEEN, 100, "TIFF", {}), (SIXTEEN, 100, "PPM", {}),  # convert alone would give white
    (Image.new("LA", (20, 20)), 255, "PNG", {}),  # what lies behind a transparent pixel is white
    (Image.new("RGBA", (20, 20), (0, 0, 0, 128)), 127, "PNG", {}),
    (Image.new("RGBA", (20, 20)), 255, "WEBP", {}), (Image.new("RGBA", (20, 20)), 255, "TIFF", {}),
    (Image.new("L", (20, 20)), 255, "PNG", {"transparency": 0}),
    (Image.new("RGB", (20, 20)), 255, "PNG", {"transparency": (0, 0, 0)}),
    (PALETTE, 255, "PNG", {"transparency": 1}), (PALETTE, 255, "GIF", {"transparency": 1}),
    (PALETTE, 255, "PNG", {"transparency": bytes([255, 0])})])
def test_grey_levels_sixteen_bits_and_transparency(image, level, kind, options):
    pixels = cs.Faces.decode(encoded(image, kind, **options), 16)
    assert np.abs(pixels.astype(int) - level).max() <= 1

@pytest.mark.parametrize("width, height", [(60, 30), (30, 60), (31, 64), (178, 218)])
def test_crop_is_the_centred_square_and_nothing_is_squashed(width, height):
    y, x = np.mgrid[:height, :width]
    disc = (x + 0.5 - width / 2) ** 2 + (y + 0.5 - height / 2) ** 2 < (min(width, height) / 2) ** 2
    pixels = cs.Faces.decode(encoded(Image.fromarray(disc.astype(np.uint8) * 255)), 32)[0] / 255
    y, x = np.mgrid[:32, :32]
    assert np.abs(pixels - ((x - 15.5) ** 2 + (y - 15.5) ** 2 < 16**2)).mean() < 0.06

def test_resize_is_antialiased_and_a_large_jpeg_unpacked_smaller_looks_the_same():
    stripes = np.zeros((256, 256), np.uint8)
    stripes[:, ::2] = 255  # finer than the result can show: an even grey
    pixels = cs.Faces.decode(encoded(Image.fromarray(stripes)), 16)
    assert np.abs(pixels[:, :, 1:-1].astype(int) - 128).max() < 4
    face = noise(1, (150, 150)).resize((600, 600))
    found = cs.Faces.decode(encoded(face, "JPEG", quality=95), 64)
    expected = np.asarray(face.resize((64, 64), Image.Resampling.LANCZOS)).transpose(2, 0, 1)
    assert np.abs(found.astype(int) - expected).mean() < 2

@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_every_orientation_of_exif_is_turned_upright(kind):
    a, exif = np.asarray(noise(1, (16, 16))), Image.Exif()
    b, options = a.transpose(1, 0, 2), {"lossless": True} if kind == "WEBP" else {}
    for orientation, upright in enumerate((a, a[:, ::-1], a[::-1, ::-1], a[::-1], b, b[:, ::-1],
                                           b[::-1, ::-1], b[::-1]), start=1):
        exif[0x112] = orientation
        pixels = cs.Faces.decode(encoded(Image.fromarray(a), kind, exif=exif, **options), 16)
        assert np.array_equal(pixels, upright.transpose(2, 0, 1))

@pytest.mark.filterwarnings("ignore")  # Pillow says that it is corrupt
def test_malformed_exif_is_no_reason_to_lose_the_pixels():  # case 6
    start, image = b"Exif\0\0II*\0\x08\0\0\0", noise(1, (16, 16))
    entries = [(0x8769, 4, 1, 99999), (0x10F, 2, 50, 99999), (0x10F, 99, 1, 1), (0x8825, 2, 4, 0),
               (0x10F, 2, 2**31, 26), (0x112, 2, 4, 0x41414141), (0x112, 3, 1, 99)]
    blocks = [start + b"\1\0" + struct.pack("<HHII", *entry) + bytes(4) for entry in entries]
    files, jpegs = [], [encoded(image, "JPEG")]
    for bad in (b"garbage", b"Exif\0\0garbage", start, start[:9] + b"\xff\xff", *blocks):
        files += [encoded(image, exif=bad), encoded(image, "WEBP", exif=bad, lossless=True)]
        jpegs += [encoded(image, "JPEG", exif=bad)]
    assert {cs.Faces.decode(data, 16).tobytes() for data in files} == {
        np.asarray(image).transpose(2, 0, 1).tobytes()}
    assert len({cs.Faces.decode(data, 16).tobytes() for data in jpegs}) == 1

# ------------------------------------------------------------- what is loaded, what is passed over
@pytest.mark.parametrize("form, start", [("folder", ""), ("zip", ""), ("zip of bsdtar", "./")])
def test_formats_go_by_content_and_the_rest_is_counted_by_ending(tmp_path, capsys, form, start):
    # case 3
    files = {"list.csv": b"a,b", "more.CSV": b"", "x/notes.txt": b"text", "README": b"P",
             "._0.png": b"macOS", "__MACOSX/0.png": b"macOS", ".cache/0.png": encoded(noise(1))}
    for k, (kind, ending) in enumerate(KINDS.items()):
        for i, wrong in enumerate((ending, ending.upper(), ".jpg", ".PNG", "", ".img", ".0001")):
            files[f"{kind}/{i}{wrong}"] = encoded(noise(10 * k + i), kind)
    source = put(tmp_path / "mixed.zip", zipped({f"{start}{name}": files[name] for name in files}))
    if form == "folder":
        zipfile.ZipFile(source).extractall(source := tmp_path / "mixed")
    assert len(load(source, tmp_path)) == 7 * len(KINDS)
    said = capsys.readouterr().out
    assert all(words in said for words in ("'.csv': 2", "'.txt': 1", "'without ending': 1"))
    assert "Skipped" not in said

def bomb(side):
    """A PNG whose header promises side x side pixels."""
    head = b"IHDR" + struct.pack(">II", side, side) + bytes([1, 0, 0, 0, 0])
    return encoded(RED)[:12] + head + struct.pack(">I", zlib.crc32(head)) + encoded(RED)[33:]

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0"
HTML = b"<!DOCTYPE html><html><body>Quota exceeded"

@pytest.mark.parametrize("name, data, words", [  # case 12
    ("a.jpg", LFS, "git lfs pull"), ("a.bmp", LFS, "b'version https"), ("b.PNG", HTML, "<!DOCT"),
    ("c.png", b"just some text", "just some text"), ("d.jpg", b"", "b''"), ("e.gif", b"PK\3", "PK"),
    ("f.jpg", encoded(noise(1), "JPEG")[:900], "trunc"), ("g.jpg", encoded(RED, "EPS"), "identify"),
    ("h.png", encoded(noise(1))[:700], "truncated"), ("i.jpeg", b"\0\0\0\x18ftypheic", "ftypheic"),
    ("j.png", bomb(60_000), "3600000000 pixels"), ("k.png", bomb(9_000), "remove it")])
def test_damaged_files_are_skipped_and_named(tmp_path, capsys, name, data, words):
    folder = fill(tmp_path / "photos", 4)
    put(folder / name, data)
    archive = put(tmp_path / "photos.zip", zipped(folder))
    for source in (folder, archive):
        assert len(load(source, tmp_path)) == 4
        said, faces = capsys.readouterr().out, cs.Faces(source, 16)
        assert "Skipped 1" in said and name in said and words in said and "BytesIO" not in said
        with pytest.raises(ValueError, match=f"{name}.* cannot be read"):
            faces[faces.names.index(name)]

def test_links_pipes_and_huge_files_are_named_and_never_read(tmp_path, capsys):
    folder, secret = fill(tmp_path / "photos", 3), fill(tmp_path / "secret", 1, 50)
    for name, target in (("a.png", secret / "0050.png"), ("b.png", "gone"), ("c.png", "c.png"),
                         ("round", folder), ("out", secret)):
        (folder / name).symlink_to(target)
    os.mkfifo(folder / "d.png"), os.mkfifo(folder / "pipe")
    os.truncate(put(folder / "e.png", b""), 300_000_000)  # takes no room on the disk
    put(folder / os.fsdecode(b"\xff.jpg"), b"a name that is no text")
    assert len(load(folder, tmp_path)) == 3
    said = capsys.readouterr().out
    assert "Skipped 6" in said and all(f"{n}.png" in said for n in "abcde") and "300,000," in said
    assert "'without ending': 3" in said

@pytest.mark.parametrize("form", ["folder", "zip"])
def test_any_loader_with_workers_gives_the_same_images(tmp_path, form):
    folder = fill(tmp_path / "photos", 60)
    os.renames(folder / "0003.png", folder / "sub" / "x.PNG")
    source = folder if form == "folder" else put(tmp_path / "photos.zip", zipped(folder))
    images, faces = load(source, tmp_path), pickle.loads(pickle.dumps(cs.Faces(source, 16)))
    order = [*range(60)] * 10  # long enough for two workers to meet in one open file
    batches = torch.cat([*torch.utils.data.DataLoader(faces, 7, sampler=order, num_workers=2)])
    assert torch.equal(batches, torch.stack([cs.Faces(folder, 16)[i] for i in range(60)])[order])
    assert keys(batches) == keys(images) and len(keys(images)) == 60
    assert images.shape == (60, 3, 16, 16) and images.dtype == torch.uint8
    assert torch.equal(images, torch.cat(cs.hold_out(images)))  # held-out ones last

@pytest.mark.parametrize("size", [np.int64(16), np.int32(16), np.uint8(128), np.float64(16)])
def test_numbers_are_taken_as_numbers(tmp_path, size):
    put(fill(tmp_path / "photos", 3) / "large.jpg", encoded(noise(1, (600, 600)), "JPEG"))
    assert load(tmp_path / "photos", tmp_path, size).shape == (4, 3, int(size), int(size))
    assert cs.toy_faces(np.int64(2), size, np.int64(1)).shape == (2, 3, int(size), int(size))

# ------------------------------------------------------------- the cache
@pytest.mark.parametrize("form", ["folder", "zip"])
@pytest.mark.parametrize("change", ["none", "other pixels", "added", "removed", "renamed", "size"])
def test_cache_is_made_anew_when_it_must_be_and_only_then(tmp_path, monkeypatch, form, change):
    monkeypatch.setattr(cs.Faces, "decode", decode := Mock(side_effect=cs.Faces.decode))
    folder, archive = fill(tmp_path / "photos", 5), tmp_path / "photos.zip"
    source = folder if form == "folder" else put(archive, zipped(folder))
    first, one = load(source, tmp_path).clone(), folder / "0000.png"
    if change == "other pixels":
        noise(99).save(one), os.utime(one, (1, 1))
    {"added": lambda: fill(folder, 1, seed=50), "removed": one.unlink,
     "renamed": lambda: one.rename(folder / "z.png")}.get(change, lambda: None)()
    if form == "zip" and change not in ("none", "size"):
        os.replace(put(tmp_path / "new.zip", zipped(folder)), archive)
    images = load(str(source), tmp_path, 32 if change == "size" else 16)
    n = {"added": 6, "removed": 4}.get(change, 5)
    assert len(images) == n and len(decode.mock_calls) == (5 if change == "none" else 5 + n)
    if change != "size":
        assert (keys(images) == keys(first)) == (change in ("none", "renamed"))
    images.zero_()  # a reader's own copy
    assert load(source, tmp_path).any() and not [*(tmp_path / "cache").glob("*.part*")]

def test_interrupted_decoding_leaves_no_half_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(cs.Faces, "decode", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        load(fill(tmp_path / "photos", 5), tmp_path)
    monkeypatch.undo()
    assert not [*(tmp_path / "cache").iterdir()] and len(load(tmp_path / "photos", tmp_path)) == 5

@pytest.mark.parametrize("form", ["folder", "zip"])
def test_eight_threads_and_two_processes_at_once_all_get_the_images(tmp_path, form):  # case 11
    folder = fill(tmp_path / "photos", 60)
    source = folder if form == "folder" else put(tmp_path / "photos.zip", zipped(folder))
    with ThreadPoolExecutor(8) as pool:
        found = [*pool.map(load_bytes, [source] * 8, [tmp_path] * 8)]
    with ProcessPoolExecutor(2, multiprocessing.get_context("fork")) as pool:
        found += pool.map(load_bytes, [source] * 2, [tmp_path / "more"] * 2)
    assert len(found[0]) == 60 * 3 * 16 * 16 and set(found) == {found[0]}
    assert len([*tmp_path.rglob("*.u8*")]) == 2

@pytest.mark.parametrize("way", ["a file", "under a file", "a broken link"])
def test_cache_folder_that_cannot_be_used_is_said(tmp_path, capsys, monkeypatch, way):
    (tmp_path / "spare").mkdir()
    monkeypatch.setattr(cs.tempfile, "gettempdir", lambda: str(tmp_path / "spare"))
    cache, sub = tmp_path / "cache", "sub" if way == "under a file" else ""
    cache.symlink_to("x/y") if way == "a broken link" else cache.touch()
    assert len(cs.load_faces(fill(tmp_path / "photos", 3), 16, cache_dir=cache / sub)) == 3
    assert f"{cache / sub} cannot be used" in capsys.readouterr().out

# ------------------------------------------------------------- holding out
def test_what_is_held_out_is_a_random_draw_whatever_the_names(tmp_path):  # case 1
    fill(tmp_path / "p" / "a", 150, dark=0.3), fill(tmp_path / "p" / "b", 150, seed=1000)
    train, held = cs.hold_out(load(tmp_path / "p", tmp_path))
    assert 15 <= len(held) <= 50 and len(train) + len(held) == 300
    assert abs((held.float().mean((1, 2, 3)) < 80).float().mean() - 0.5) < 0.3
    assert train.untyped_storage().data_ptr() == held.untyped_storage().data_ptr()  # views
    (tmp_path / "p" / "a").rename(tmp_path / "p" / "z")
    again = cs.hold_out(load(put(tmp_path / "p.zip", zipped(tmp_path / "p")), tmp_path))
    assert keys(train) == keys(again[0]) and keys(held) == keys(again[1])

def test_the_draw_is_the_same_on_every_machine():  # case 1
    images = (torch.arange(60 * 768) * 7919 % 251).to(torch.uint8).view(60, 3, 16, 16)
    assert cs.hold_out(images)[1][:, 0, 0, 0].tolist() == [0, 245, 177, 174, 236, 233, 41]
    few, half = cs.hold_out(images)[1], cs.hold_out(images, np.float64(0.5))[1]
    assert keys(few) < keys(half) and 18 < len(half) < 42

def test_a_picture_stays_on_its_side_when_others_come_go_or_get_other_names(tmp_path):  # case 8
    folder = fill(tmp_path / "photos", 100)
    sides = [cs.hold_out(load(folder, tmp_path))]
    fill(folder, 100, seed=1000)
    sides += [cs.hold_out(load(folder, tmp_path))]
    for k in range(0, 100, 3):
        (folder / f"{k:04d}.png").unlink()
        (folder / f"{k + 1000}.png").rename(folder / f"_{k}.png")
    sides += [cs.hold_out(load(folder, tmp_path)), cs.hold_out(load(folder, tmp_path).flip(0))]
    trained, held = (set().union(*(keys(pair[k]) for pair in sides)) for k in (0, 1))
    assert not trained & held and len(trained | held) == 200
    assert [len(a) + len(b) for a, b in sides] == [100, 200, 166, 166]

def test_copies_are_counted_and_never_lie_on_both_sides(tmp_path, capsys):  # case 7
    folder = fill(tmp_path / "photos", 100)
    for k, path in enumerate(sorted(folder.iterdir())[:60]):  # a copy may be of another format
        Image.open(path).save(folder / f"copy_{k}{('.png', '.bmp', '.tif')[k % 3]}")
    constant = torch.tensor([9, 100, 200] * 5).to(torch.uint8).view(15, 1, 1, 1)  # no key below 0.1
    for images in (load(folder, tmp_path), constant.expand(15, 3, 16, 16)):
        train, held = cs.hold_out(images)
        assert len(train) + len(held) == len(images) and not keys(train) & keys(held)
    assert "copies of others: 60." in capsys.readouterr().out

# ------------------------------------------------------------- finding
@pytest.mark.parametrize("mount", ["celeba-dataset", "d/jess/celeba", "datasets/jess/celeba",
                                   "competitions/c", "notebooks/jess/celeba/x/y", "archive"])
@pytest.mark.parametrize("nested", ["img_align_celeba", "img_align_celeba/img_align_celeba"])
def test_celeba_is_found_wherever_it_is_mounted(tmp_path, capsys, mount, nested):
    fill(tmp_path / "datasets" / "aaa" / "other", 9)
    celeba = tmp_path / mount / "img_align_celeba"
    fill(tmp_path / mount / nested, 2)
    if mount == "archive":
        celeba = put(tmp_path / "archive.zip", zipped(tmp_path / mount))
        shutil.rmtree(tmp_path / mount)
    assert cs.find_faces((tmp_path / "nowhere", tmp_path)) == celeba
    said = capsys.readouterr().out
    assert f"{celeba} (2)" in said and f"'{tmp_path}/datasets/aaa/other': 9" in said

@pytest.mark.parametrize("layout", [
    "{}", "d/{}/x", "datasets/{}/x", "notebooks/{}/x", "competitions/{}", "models/{}/x/pytorch/v/1"])
def test_inputs_are_told_apart_in_every_layout(tmp_path, capsys, layout):  # case 2
    alice, bob = (tmp_path / layout.format(name) for name in ("alice", "bob"))
    fill(alice / "train" / "a", 4), fill(alice / "test", 2, 50), fill(bob / "a", 5)
    put(bob / "list.csv", b"a,b")
    found, said = cs.find_faces((tmp_path,)), capsys.readouterr().out
    assert "alice" in str(found) and len(load(found, tmp_path)) == 6 and f"{found} (6)" in said
    assert str(found).replace("alice", "bob") + "': 5" in said and "'.csv': 1" in said

def test_what_is_said_is_what_is_loaded(tmp_path, capsys):
    fill(tmp_path / "data", 1), fill(tmp_path / "data" / "dogs", 4, 50)
    found, said = cs.find_faces((tmp_path / "data",)), capsys.readouterr().out
    assert f"{found} ({len(load(found, tmp_path))})" in said
    assert ("passed over" in said) == (found != tmp_path / "data")

@pytest.mark.parametrize("name, target, chosen", [
    ("link", "photos", "link"), ("a.zip", "photos.zip", "a.zip"), ("link", "gone", "faces"),
    ("link", "data/link", "faces"), ("link", "data", "faces"), ("link", ".", "faces"),
    ("pipe.zip", None, "faces")])
def test_links_in_the_place_are_followed_once_and_pipes_never(tmp_path, capsys, name, target, chosen):
    data = fill(tmp_path / "data" / "faces", 5).parent
    fill(data / "few", 1, 50), put(tmp_path / "photos.zip", zipped(fill(tmp_path / "photos", 6)))
    (data / name).symlink_to(tmp_path / target) if target else os.mkfifo(data / name)
    assert cs.find_faces((data,)) == data / chosen
    assert ("without ending" in capsys.readouterr().out) == (name == "link" != chosen)

UNUSABLE = {  # what is there and holds no image that can be read
    "celeba.tar.gz": b"\x1f\x8b\x08", "x.TAR": b"faces/0.jpg" + bytes(500), "a.7z": b"7z\xbc\xaf",
    "a.npz": zipped({"faces.npy": b"\x93NUMPY"}), "a.parquet": b"PAR1", "a.h5": b"\x89HDF\r\n",
    "half.zip": zipped({"0.png": encoded(noise(1))})[:-30], "lfs.zip": LFS, "html.ZIP": HTML,
    "a.heic": b"\0\0\0\x18ftypheic", "a.rar": b"Rar!", "x.zip": zipped({"train.zip": b"PK"}),
    "bmi.csv": b"BMI,age\n1,2", "p.csv": b"P1,P2\n1,2", "a.txt": b"Python"}

@pytest.mark.parametrize("name", UNUSABLE)
@pytest.mark.parametrize("where", [".", "datasets/alice/faces"])
def test_what_lies_there_and_cannot_be_used_is_named_first(tmp_path, capsys, name, where):  # case 4
    ending = os.path.splitext(put(tmp_path / where / name, UNUSABLE[name]))[1].lower()
    assert cs.find_faces((tmp_path / "nowhere", tmp_path)) is None
    assert f"'{ending}'" in capsys.readouterr().out

@pytest.mark.parametrize("name, data", [*UNUSABLE.items(), ("lfs/0.jpg", LFS), ("void/.x", b""),
                                        ("gone", None), ("pipe", None)])
def test_data_asked_for_by_name_is_never_replaced(tmp_path, monkeypatch, capsys, name, data):
    asked, good = tmp_path / name.split("/")[0], fill(tmp_path / "good", 3)
    put(tmp_path / name, data) if data is not None else name == "gone" or os.mkfifo(asked)
    monkeypatch.setenv("CSPGAN_DATA", str(asked))
    with pytest.raises((ValueError, FileNotFoundError), match=f"{asked.name}.*CSPGAN_DATA"):
        load(cs.find_faces((good,)), tmp_path)
    assert asked.name != "lfs" or "git lfs pull" in capsys.readouterr().out
    monkeypatch.setenv("CSPGAN_DATA", str(good))
    assert cs.find_faces((fill(tmp_path / "more", 9),)) == good

@pytest.mark.parametrize("call", [  # case 10
    *(lambda p, n=n: cs.toy_faces(n, 16) for n in (0, -1, 2.5, "4", None)),
    *(lambda p, x=x: cs.hold_out(x) for x in ("photos/", None, np.zeros(9))),
    *(lambda p, x=x: cs.Faces(*x) for x in ((".", 20), (".", "16"), (5, 16), (None, 16))),
    *(lambda p, n=n: cs.hold_out(cs.toy_faces(1, 16)[[0] * n]) for n in (0, 1, 9)),
    *(lambda p, x=x: cs.hold_out(cs.toy_faces(4, 16), x) for x in (0, 1, -0.1, 1.5, np.nan)),
    lambda p: load(None, p, 20), lambda p: cs.toy_faces(4, 20)])
def test_wrong_arguments_are_named_with_what_was_expected(tmp_path, call):
    with pytest.raises(ValueError, match="=.*expected"):
        call(tmp_path)

# ------------------------------------------------------------- procedural faces
def test_toy_faces_depend_on_their_arguments_only():
    states = [torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()]
    faces = cs.toy_faces(60, 32)
    assert states == [torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()]
    assert torch.equal(faces[:9], cs.toy_faces(9, 32)) and faces.dtype == torch.uint8
    assert not keys(faces) & keys(cs.toy_faces(60, 32, 2**62)) and len(keys(faces)) == 60
    small = torch.nn.functional.avg_pool2d(cs.toy_faces(9, 128).float(), 4)
    assert (small - faces[:9].float()).abs().mean() < 6  # the same faces at every size
    none = cs.load_faces(None, 16)
    assert none.shape == (4096, 3, 16, 16) and torch.equal(none[:5], cs.toy_faces(5, 16))
