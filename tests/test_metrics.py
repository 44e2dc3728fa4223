"""What each ruler reads where the answer is known, and SWD against a slow, literal reference."""

import json
import sys
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import cspgan as cs


@pytest.fixture(scope="module")
def faces():
    return cs.toy_faces(256, 32, seed=1)


@pytest.fixture(scope="module")
def halves(faces):
    return faces[::2], faces[1::2]


def damaged(images):
    generator = torch.Generator().manual_seed(0)
    noise = 40 * torch.randn(images.shape, generator=generator)
    blurred = F.interpolate(F.avg_pool2d(images.float(), 4), scale_factor=4)
    return {"noise": (images + noise).clamp(0, 255).to(torch.uint8), "blur": blurred.to(torch.uint8),
            "one copied": images[:1].expand_as(images)}


# ------------------------------------------------------------- known answers


def test_a_set_against_itself(faces):
    assert cs.sliced_wasserstein(faces, faces)["avg"] == 0
    assert cs.diversity(faces, faces) == pytest.approx(1, abs=1e-6)
    assert cs.coverage(faces, faces.flip(0)) == 1
    distance, index = cs.nearest(faces.flip(0), faces)
    assert not distance.any() and torch.equal(faces[index], faces.flip(0))
    assert cs.nearest(faces, faces)[0].min() > 0  # another one, where both are one tensor


def test_floor_reads_as_real(halves):
    floor = cs.reference(*halves)
    assert floor["measured_on"] == 128 and floor["diversity_real"] == pytest.approx(1, abs=0.1)
    assert floor["coverage_real"] > 0.9 and set(floor["swd_floor"]) == {"32", "16", "avg"}
    assert floor["swd_floor"]["avg"] > 0 and cs.reference(*halves, n=40)["measured_on"] == 40


def test_record_is_json_that_every_parser_reads(faces, tiny):
    """Copies among the real images do not count; where all are copies there is no number."""
    twice = faces[:64].repeat(2, 1, 1, 1)
    assert cs.diversity(twice, faces[:128]) == pytest.approx(cs.diversity(faces[:64], faces[:64]), rel=0.01)
    grey = torch.full((64, 3, 16, 16), 128, dtype=torch.uint8)
    assert np.isnan(cs.diversity(grey, grey)) and cs.measure(grey, grey)["diversity"] is None
    run = cs.train(tiny, cs.toy_faces(64, 16), progress=False)
    record = cs.evaluate(run, grey, cs.reference(grey, grey))
    assert json.loads(json.dumps(record, allow_nan=False))["seed"] == 0


def test_swd_grows_with_damage(halves):
    real, other = halves
    base = cs.sliced_wasserstein(real, other)["avg"]
    for name, images in damaged(other).items():
        assert cs.sliced_wasserstein(real, images)["avg"] > 1.5 * base, name


def test_colour_shift_is_seen_by_coverage_and_not_by_swd(halves):
    real, other = halves[0].clamp(40, 215), halves[1].clamp(40, 215)
    shifted = (other + torch.tensor([40, 0, -40]).view(3, 1, 1)).to(torch.uint8)
    assert cs.coverage(real, shifted) < 0.8 * cs.coverage(real, other)
    assert cs.nearest(shifted, real)[0].mean() > 1.2 * cs.nearest(other, real)[0].mean()
    swd = cs.sliced_wasserstein(real, shifted)["avg"]
    assert swd == pytest.approx(cs.sliced_wasserstein(real, other)["avg"], rel=0.1)


def test_swd_grows_step_by_step(halves):
    real, other = halves
    noise = torch.randn(other.shape, generator=torch.Generator().manual_seed(0))
    noisy = [(other + s * noise).clamp(0, 255).to(torch.uint8) for s in (0, 10, 20, 40, 80)]
    readings = [cs.sliced_wasserstein(real, images)["avg"] for images in noisy]
    assert readings == sorted(readings)


def test_collapse_is_seen(halves):
    real, other = halves
    sets = [other, other[:32].repeat(4, 1, 1, 1), other[:2].repeat(64, 1, 1, 1)]
    assert [cs.diversity(real, fakes) < 0.01 for fakes in sets] == [False, True, True]
    coverages = [cs.coverage(real, fakes) for fakes in sets]
    assert coverages[0] > coverages[1] > coverages[2]


def test_near_copies_are_collapse_too(halves):
    real, other = halves
    jitter = torch.randint(-6, 7, other.shape, generator=torch.Generator().manual_seed(0))
    few = (other[:4].repeat(32, 1, 1, 1).int() + jitter).clamp(0, 255).to(torch.uint8)
    assert cs.diversity(real, few) < 0.3


def test_nearest_real_finds_the_memorised(halves):
    train, held = halves
    samples = torch.cat([held[:8], train[[40, 7]]])
    samples[8:] = (samples[8:].int() + 2).clamp(0, 255)
    distance, index = cs.nearest(samples, train)
    assert index[8:].tolist() == [40, 7]
    assert distance[8:].max() == pytest.approx(2 / 255, rel=0.1) and distance[:8].min() > 5 * distance[8:].max()
    small = [F.avg_pool2d(images.float() / 255, 2) for images in (samples, train)]
    slow = [(small[1] - sample).square().mean((1, 2, 3)).sqrt().min() for sample in small[0]]
    assert distance.tolist() == pytest.approx([x.item() for x in slow], rel=1e-4)


def test_nearest_real_counts_on_past_its_first_chunk():
    many = torch.randint(0, 256, (8300, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    distance, index = cs.nearest(many[[8250, 3]], many)
    assert index.tolist() == [8250, 3] and not distance.any()


def test_one_constant_image_has_a_finite_distance(halves):
    grey = torch.full_like(halves[0], 128)
    assert 0 < cs.sliced_wasserstein(halves[0], grey)["avg"] < 1e4
    assert cs.diversity(halves[0], grey) == 0


def test_global_random_state_neither_matters_nor_moves(halves):
    torch.manual_seed(1)
    first = cs.measure(*halves), cs.reference(*halves)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert (cs.measure(*halves), cs.reference(*halves)) == first
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("size", [16, 64])
def test_every_size_has_its_levels(size):
    faces = cs.toy_faces(64, size)
    sides = [str(side) for side in (64, 32, 16) if side <= size]
    assert list(cs.sliced_wasserstein(faces[:32], faces[32:])) == [*sides, "avg"]


def test_unequal_sets_are_refused(faces):
    with pytest.raises(ValueError, match="256, 3, 32, 32.*10, 3, 32, 32"):
        cs.sliced_wasserstein(faces, faces[:10])
    with pytest.raises(ValueError, match="256 real, 10 fake"):
        cs.diversity(faces, faces[:10])
    with pytest.raises(ValueError, match="n=600"):
        cs.pick(faces, 600)
    with pytest.raises(ValueError, match="5 real images"):
        cs.coverage(faces[:5], faces)


def test_a_figure_is_shown_once_in_any_notebook(faces, tiny):  # case 5
    from IPython.core.formatters import DisplayFormatter
    run = cs.train(tiny, cs.toy_faces(64, 16), progress=False)
    for figure in (cs.show_images(faces[:9], "nine"), cs.plot_losses(run), cs.compare({"a": run, "b": run})):
        data, _ = DisplayFormatter().format(figure)  # of a fresh kernel, without %matplotlib inline
        assert data["image/png"][:4] == b"\x89PNG" and [*data].count("image/png") == 1
    run.history = run.history[:1]  # stopped before its first epoch
    run.history[0].pop("diversity", None)
    assert cs.plot_losses(run)


# ------------------------------------------------------------- references


def reference_swd(real, fake, corners, directions):
    """Progressive GAN's SWD, literally and slowly: loops over images, patches, directions, float64.

    corners: per level, (2, N, 128), of both sides; directions: per level, (4 * 128, 147). Random
    numbers are given, so that the rest can be compared closely."""
    binomial = np.outer([1, 4, 6, 4, 1], [1, 4, 6, 4, 1]) / 256

    def smooth(image, scale=1.0):
        padded = np.pad(image, ((0, 0), (2, 2), (2, 2)), mode="reflect")
        height, width = image.shape[1:]
        return sum(scale * binomial[i, j] * padded[:, i : i + height, j : j + width]
                   for i in range(5) for j in range(5))

    def pyramid(image):
        levels = [image]
        while levels[-1].shape[1] > 16:
            smaller = smooth(levels[-1])[:, ::2, ::2]
            larger = np.zeros_like(levels[-1])
            larger[:, ::2, ::2] = smaller
            levels[-1] = levels[-1] - smooth(larger, 4.0)
            levels.append(smaller)
        return levels

    def descriptors(images, corner):
        found = []
        for number, image in enumerate(images):
            for level, content in enumerate(pyramid(image.astype(np.float64))):
                if level == len(found):
                    found.append([])
                for y, x in corner[level][:, number].T:
                    found[level].append(content[:, y : y + 7, x : x + 7])
        result = []
        for level in found:
            level = np.array(level)
            for channel in range(3):
                level[:, channel] -= level[:, channel].mean()
                level[:, channel] /= level[:, channel].std()
            result.append(level.reshape(len(level), -1))
        return result

    distances = []
    for a, b, chosen in zip(descriptors(real, corners), descriptors(fake, corners), directions):
        found = []
        for direction in chosen:
            direction = direction / np.linalg.norm(direction)
            found.append(np.abs(np.sort(a @ direction) - np.sort(b @ direction)).mean())
        distances.append(1e3 * np.mean(found))
    return distances


@pytest.mark.parametrize("damage", ["blur", "noise", "one copied"])
def test_swd_agrees_with_a_literal_reference(halves, damage):
    real, fake = halves[0][:32], damaged(halves[1])[damage][:32]
    random, corners, directions = torch.Generator().manual_seed(5), [], []
    for side in (32, 16):  # the same numbers in the same order as the module draws them
        corners.append(torch.randint(side - 6, (2, 32, 128), generator=random))
        drawn = [torch.randn(128, 147, generator=random) for _ in range(4)]
        directions.append(torch.cat(drawn).double().numpy())
    slow = reference_swd(real.numpy(), fake.numpy(), corners, directions)
    fast = cs.sliced_wasserstein(real, fake, seed=5)
    assert [fast["32"], fast["16"]] == pytest.approx(slow, rel=1e-3)
    assert fast["avg"] == pytest.approx((fast["32"] + fast["16"]) / 2)


# ------------------------------------------------------------- FID, where it can be had


def test_fid_is_a_dash_with_the_reason_where_it_cannot_be_had(halves, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)  # what an import of a missing package meets
    found = cs.fid_kid(*halves)
    assert found["fid"] is None and found["kid"] is None and "torch_fidelity" in found["no_fid"]

    def no_network(**options):
        raise OSError("no route to the weights")

    monkeypatch.setitem(sys.modules, "torch_fidelity", types.SimpleNamespace(calculate_metrics=no_network))
    assert "no route to the weights" in cs.fid_kid(*halves)["no_fid"]


def test_fid_hands_torch_fidelity_two_sets_of_bytes(halves, monkeypatch):
    def calculate(input1, input2, **options):
        for dataset, images in ((input1, halves[0]), (input2, halves[1])):
            assert isinstance(dataset, torch.utils.data.Dataset) and len(dataset) == 128
            assert dataset[3].dtype == torch.uint8 and torch.equal(dataset[3], images[3])
        assert options["fid"] and options["kid"] and options["kid_subset_size"] == 128
        return {"frechet_inception_distance": 12.5, "kernel_inception_distance_mean": 0.25}

    monkeypatch.setitem(sys.modules, "torch_fidelity", types.SimpleNamespace(calculate_metrics=calculate))
    assert cs.fid_kid(*halves) == {"fid": 12.5, "kid": 0.25, "no_fid": ""}
