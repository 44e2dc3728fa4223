"""What each ruler reads where the answer is known."""

import pytest
import torch
import torch.nn.functional as F

import cspgan as cs


@pytest.fixture(scope="module")
def faces():
    return cs.toy_faces(512, 32, seed=1)


@pytest.fixture(scope="module")
def halves(faces):
    return cs.two_sets(faces, 256)


def damaged(images):
    generator = torch.Generator().manual_seed(0)
    noise = 40 * torch.randn(images.shape, generator=generator)
    blurred = F.interpolate(F.avg_pool2d(images.float(), 2), scale_factor=2)
    return {"noise": (images + noise).clamp(0, 255).to(torch.uint8), "blur": blurred.to(torch.uint8)}


def test_a_set_against_itself(faces):
    assert cs.sliced_wasserstein(faces, faces)["avg"] == 0
    assert cs.diversity(faces, faces) == 1
    assert cs.coverage(faces, faces) == 1


def test_floor_reads_as_real(faces):
    floor = cs.floor(faces, 256)
    assert floor["diversity_real"] == pytest.approx(1, abs=0.1)
    assert floor["coverage_real"] > 0.9
    assert set(floor["swd_floor"]) == {"32", "16", "avg"}


def test_swd_grows_with_damage(halves):
    real, other = halves
    base = cs.sliced_wasserstein(real, other)["avg"]
    for name, images in damaged(other).items():
        assert cs.sliced_wasserstein(real, images)["avg"] > 1.5 * base, name


def test_collapse_is_seen(halves):
    real, other = halves
    readings = [(cs.diversity(real, fakes), cs.coverage(real, fakes))
                for fakes in (other, other[:64].repeat(4, 1, 1, 1), other[:2].repeat(128, 1, 1, 1))]
    assert [r[0] < 0.01 for r in readings] == [False, True, True]
    assert readings[0][1] > readings[1][1] > readings[2][1]


def test_near_copies_are_collapse_too(halves):
    real, other = halves
    jitter = torch.randint(-6, 7, other.shape, generator=torch.Generator().manual_seed(0))
    few = (other[:4].repeat(64, 1, 1, 1).int() + jitter).clamp(0, 255).to(torch.uint8)
    assert cs.diversity(real, few) < 0.3


def test_one_constant_image_has_a_finite_distance(halves):
    grey = torch.full_like(halves[0], 128)
    assert 0 < cs.sliced_wasserstein(halves[0], grey)["avg"] < 1e4
    assert cs.diversity(halves[0], grey) == 0


def test_global_random_state_does_not_matter(halves):
    torch.manual_seed(1)
    first = cs.sliced_wasserstein(*halves)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert cs.sliced_wasserstein(*halves) == first
    assert torch.equal(torch.get_rng_state(), state)


def test_unequal_sets_are_refused(faces):
    with pytest.raises(ValueError, match="equally many"):
        cs.sliced_wasserstein(faces, faces[:10])
    with pytest.raises(ValueError, match="512 real and 10 fake"):
        cs.diversity(faces, faces[:10])
    with pytest.raises(ValueError, match="n=300"):
        cs.floor(faces, 300)


def test_two_sets_share_no_image(faces):
    real, other = cs.two_sets(faces, 256)
    found = {tuple(image) for image in torch.cat([real, other]).flatten(1).tolist()}
    assert len(found) == 512
