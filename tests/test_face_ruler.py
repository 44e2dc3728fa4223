"""The face ruler's arithmetic where the answer is known; needs neither dlib nor real faces."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from torchvision.transforms.functional import to_pil_image

import cspgan as cs

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import face_ruler


@pytest.fixture
def points():
    """300 vectors of 4 numbers, correlated, far from each other."""
    random = torch.Generator().manual_seed(0)
    mix = torch.randn(4, 4, generator=random, dtype=torch.float64)
    return 50 * torch.randn(300, 4, generator=random, dtype=torch.float64) @ mix


def frechet(a, b):
    return face_ruler.measure(a, b, a)["frechet"] / 1e3


def test_frechet_distance_of_equal_and_of_shifted_sets(points):
    shift = torch.tensor([3.0, 0, -4, 12])
    other_order = points.flip(0)
    assert frechet(points, other_order) == pytest.approx(0, abs=1e-6)
    assert frechet(points, points + shift) == pytest.approx(169, rel=1e-6)


def test_frechet_distance_of_other_shapes(points):
    """The root's trace of a 2x2 matrix is sqrt(trace + 2 sqrt(det))."""
    spread = points.T.cov().trace().item()
    assert frechet(points, 3 * points) == pytest.approx(4 * spread + 4 * mean_square(points))
    a, b = points[:, :2], points[:, 2:]
    product = a.T.cov() @ b.T.cov()
    root = math.sqrt(product.trace() + 2 * math.sqrt(product.det()))
    wanted = a.T.cov().trace() + b.T.cov().trace() - 2 * root + mean_square(a, b)
    assert frechet(a, b) == pytest.approx(wanted.item())


def mean_square(a, b=0):
    """Of the distance between two means."""
    return (a - b).mean(0).square().sum().item()


def test_nearest_other_is_another_one(points):
    line = torch.arange(5.0).view(5, 1) * torch.tensor([3.0, 4])  # 5 apart
    twice = torch.cat([points, points])
    assert face_ruler.measure(line, line, line)["nearest_other"] == pytest.approx(5)
    assert face_ruler.measure(twice, twice, twice)["nearest_other"] == pytest.approx(0, abs=1e-4)


def test_near_training_is_the_share_below_0_4(points):
    faces = points[:100].clone()
    faces[:, 0] += 0.41
    faces[:25, 0] -= 0.02  # 0.39 from its own
    assert face_ruler.measure(faces, faces, points)["near_training"] == 0.25


def test_record_has_real_faces_beside_and_keeps_the_others(tmp_path, monkeypatch):
    """Descriptors are 5 pixels; in the dark images no face is found."""

    def describe(images):
        light = images[images.amax((1, 2, 3)) > 80]
        return light.flatten(1)[:, :5].double()

    images = cs.toy_faces(60, 16)
    images[:15] //= 4
    (tmp_path / "fake").mkdir()
    for k, image in enumerate(images):
        to_pil_image(image).save(tmp_path / f"fake/{k}.png")
    (tmp_path / "results").mkdir()
    file = tmp_path / "results/face_ruler.json"
    file.write_text('{"other": 1}')
    monkeypatch.setattr(face_ruler, "ROOT", tmp_path)
    monkeypatch.setattr(face_ruler, "describe", describe)
    monkeypatch.setattr(cs, "load_faces", lambda source, size: cs.toy_faces(600, size).split(400))
    face_ruler.main(str(tmp_path / "fake"), "faces.zip", 60)

    filed = json.loads(file.read_text(), parse_constant=pytest.fail)
    record = filed.pop("fake 16")
    assert filed == {"other": 1}
    assert [record[name]["found"] for name in ("fake", "held_out", "training")] == [0.75, 1, 1]
    assert record["fake"].keys() == record["held_out"].keys()
    assert (record["n"], record["image_size"], record["data"]) == (60, 16, "faces.zip")
