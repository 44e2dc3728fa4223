"""What each ruler reads where the answer is known, and SWD against a slow, literal reference."""

import dataclasses
import io
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import cspgan as cs


@pytest.fixture(scope="module")
def faces():
    return cs.toy_faces(128, 32, seed=1)


@pytest.fixture(scope="module")
def halves(faces):
    return faces[::2], faces[1::2]


@pytest.fixture
def run(tiny, toys):
    return cs.train(tiny, toys, progress=False)


def swd(real, fake):
    return cs.sliced_wasserstein(real, fake)["avg"]


def as_bytes(images):
    return images.clamp(0, 255).to(torch.uint8)


def noise_like(images):
    return torch.randn(images.shape, generator=torch.Generator().manual_seed(0))


def test_a_set_against_itself(faces):
    other_order = faces.flip(0)
    assert swd(faces, faces) == 0
    assert cs.diversity(faces, faces) == pytest.approx(1, abs=1e-6)
    assert cs.coverage(faces, other_order) == 1
    distance, index = cs.nearest(other_order, faces)
    assert distance.eq(0).all()
    assert torch.equal(faces[index], other_order)
    assert cs.nearest(faces, faces)[0].min() > 0  # another one, where both are one tensor


def test_real_images_read_as_real_beside_every_record(run, toys):
    record = cs.evaluate(run, toys[::2], toys[1::2])
    assert record["measured_on"] == 128
    assert record["diversity_real"] == pytest.approx(1, abs=0.1)
    assert record["coverage_real"] > 0.9
    assert 0 < record["swd_floor"]["avg"] < record["swd"]["avg"] / 2
    assert record["swd_floor"].keys() == record["swd"].keys() == {"16", "avg"}
    assert cs.evaluate(run, toys[::2], toys[1::2], n=40)["measured_on"] == 40


def test_record_is_json_that_every_parser_reads(run):
    """Also where all images are copies, so that diversity has no number."""
    grey = torch.full((64, 3, 16, 16), 128, dtype=torch.uint8)
    record = cs.evaluate(run, grey, grey)
    assert record["diversity_real"] is None
    text = json.dumps(record, allow_nan=False)
    assert json.loads(text) == record


def test_copies_among_real_images_do_not_count(faces):
    twice = faces[:64].repeat(2, 1, 1, 1)
    alone = cs.diversity(faces[:64], faces[:64])
    assert cs.diversity(twice, faces) == pytest.approx(alone, rel=0.01)


def test_swd_grows_step_by_step_and_stays_finite(halves):
    real, other = halves
    floor = swd(real, other)
    noisy = swd(real, as_bytes(other + 20 * noise_like(other)))
    noisier = swd(real, as_bytes(other + 80 * noise_like(other)))
    constant = swd(real, torch.full_like(real, 128))
    assert 1.5 * floor < noisy < noisier < constant < 1e4


def test_colour_shift_is_seen_by_coverage_and_not_by_swd(halves):
    real, other = (half.clamp(60, 195) for half in halves)
    shifted = as_bytes(other + torch.tensor([60, 0, -60]).view(3, 1, 1))
    assert cs.coverage(real, shifted) < 0.8 * cs.coverage(real, other)
    assert swd(real, shifted) == pytest.approx(swd(real, other), rel=0.1)


def test_collapse_is_seen_of_near_copies_too(halves):
    real, other = halves
    four_each = other[:16].repeat(4, 1, 1, 1)
    two = other[:2].repeat(32, 1, 1, 1)
    assert cs.diversity(real, other) > 0.9
    assert cs.diversity(real, four_each) < 0.01
    assert cs.coverage(real, other) > cs.coverage(real, four_each) > cs.coverage(real, two)
    few = other[:4].repeat(16, 1, 1, 1)
    jittered = as_bytes(few + 4 * noise_like(few))
    assert cs.diversity(real, jittered) < 0.3


def test_nearest_real_finds_the_memorised(halves):
    train, held = halves
    copies = as_bytes(train[[40, 7]].int() + 2)
    samples = torch.cat([held[:8], copies])
    distance, index = cs.nearest(samples, train)
    assert index[8:].tolist() == [40, 7]
    assert distance[:8].min() > 5 * distance[8:].max()
    samples, train = (F.avg_pool2d(images / 255, 2) for images in (samples, train))
    for image, found in zip(samples, distance):
        slow = (train - image).square().mean((1, 2, 3)).sqrt()
        assert slow.min().item() == pytest.approx(found.item(), rel=1e-4)


def test_global_random_state_neither_matters_nor_moves(halves):
    real, other = (half[:16] for half in halves)
    torch.manual_seed(1)
    first = cs.measure(real, other)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert cs.measure(real, other) == first
    assert torch.equal(torch.get_rng_state(), state)


def test_unequal_sets_are_refused(faces):
    with pytest.raises(ValueError, match="128, 3, 32, 32.*10, 3, 32, 32"):
        cs.sliced_wasserstein(faces, faces[:10])
    with pytest.raises(ValueError, match="128 real, 10 fake"):
        cs.diversity(faces, faces[:10])
    with pytest.raises(ValueError, match="5 real images: expected more than k=5"):
        cs.coverage(faces[:5], faces)
    with pytest.raises(ValueError, match="n=600: expected 1 to 128"):
        cs.pick(faces, 600)


def test_images_that_are_no_bytes_are_refused(faces):
    for wrong, words in (
        (faces.float() / 255, "torch.float32"),
        (faces[:, :1], "128, 1, 32, 32"),
        (faces[:, :, 1:], "128, 3, 31, 32"),
    ):
        for function in (cs.sliced_wasserstein, cs.diversity, cs.coverage, cs.nearest):
            with pytest.raises(ValueError, match=f"{words}.*expected torch.uint8 .N, 3, S, S"):
                function(faces[: len(wrong)], wrong)
        with pytest.raises(ValueError, match=words):
            cs.show_images(wrong)


def test_figures_are_drawn(run):
    begun = dataclasses.replace(run, history=[{**run.history[0]}])  # before its first epoch's end
    begun.history[0].pop("diversity", None)
    for figure in (cs.compare({"a": run, "b": run}), cs.plot_losses(run), cs.plot_losses(begun)):
        file = io.BytesIO()
        figure.savefig(file)
        assert len(file.getvalue()) > 5000


# ------------------------------------------------------------- Progressive GAN's SWD, slowly
BINOMIAL = np.outer([1, 4, 6, 4, 1], [1, 4, 6, 4, 1]) / 256


def smooth(image):
    """By the 5x5 binomial, (3, H, W)."""
    _, height, width = image.shape
    padded = np.pad(image, ((0, 0), (2, 2), (2, 2)), "reflect")
    total = np.zeros_like(image)
    for i in range(5):
        for j in range(5):
            total += BINOMIAL[i, j] * padded[:, i : i + height, j : j + width]
    return total


def detail(image, level):
    """A level of an image's Laplacian pyramid; the one of 16 px keeps what is left."""
    for _ in range(level):
        image = smooth(image)[:, ::2, ::2]
    if image.shape[1] == 16:
        return image
    spread = np.zeros_like(image)
    spread[:, ::2, ::2] = smooth(image)[:, ::2, ::2]
    return image - 4 * smooth(spread)


def literal_swd(sets, level, corners, directions):
    """Of two sets of images, with random numbers given: corners (2, N, 128), (512, 147)."""
    projected = []
    for images in sets:
        patches = []
        for image, (rows, columns) in zip(images.double().numpy(), corners.transpose(0, 1)):
            found = detail(image, level)
            patches += [found[:, y : y + 7, x : x + 7] for y, x in zip(rows, columns)]
        patches = np.array(patches)  #                                          (128 N, 3, 7, 7)
        patches -= patches.mean((0, 2, 3), keepdims=True)
        patches /= patches.std((0, 2, 3), keepdims=True)
        lengths = np.linalg.norm(directions, axis=1)
        values = patches.reshape(-1, 147) @ directions.T / lengths
        projected.append(np.sort(values, axis=0))
    return 1e3 * np.abs(projected[0] - projected[1]).mean()


@pytest.mark.parametrize("damage", ["blurred", "one copied"])
def test_swd_agrees_with_a_literal_reference(halves, damage):
    real, fake = (half[:16] for half in halves)
    fake = F.interpolate(F.avg_pool2d(fake.float(), 4), scale_factor=4).to(torch.uint8)
    if damage == "one copied":
        fake = halves[1][:1].expand_as(real)
    random = torch.Generator().manual_seed(5)
    slow = []
    for level, side in enumerate((32, 16)):  # random numbers in the order the module draws them
        corners = torch.randint(side - 6, (2, 16, 128), generator=random)
        drawn = [torch.randn(128, 147, generator=random) for _ in range(4)]
        directions = torch.cat(drawn).double().numpy()
        slow.append(literal_swd([real, fake], level, corners, directions))
    fast = cs.sliced_wasserstein(real, fake, seed=5)
    assert list(fast) == ["32", "16", "avg"]
    assert [fast["32"], fast["16"]] == pytest.approx(slow, rel=1e-3)
    assert fast["avg"] == pytest.approx(sum(slow) / 2, rel=1e-3)
