"""What each ruler reads where the answer is known, and SWD and MS-SSIM against slow, literal references."""

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
    shuffled = faces[torch.randperm(len(faces))]
    for same in (faces, shuffled):
        assert cs.sliced_wasserstein(faces, same)["avg"] == pytest.approx(0, abs=1e-4)  # rounding, where the order differs
        assert cs.diversity(faces, same) == pytest.approx(1, abs=1e-6)
        assert cs.coverage(faces, same) == 1
        distance, index = cs.nearest_real(same, faces)
        assert not distance.any() and torch.equal(faces[index], same)


def test_order_of_the_images_does_not_matter(halves):
    real, fake = halves
    first, second = (torch.randperm(len(real), generator=torch.Generator().manual_seed(k)) for k in (1, 2))
    readings, shuffled = cs.measure(real, fake), cs.measure(real[first], fake[second])
    assert readings["swd"] == pytest.approx(shuffled["swd"], rel=1e-4)
    for name in ("ms_ssim", "diversity", "coverage"):
        assert readings[name] == pytest.approx(shuffled[name], rel=1e-5), name


def test_floor_reads_as_real(faces, halves):
    for floor in (cs.floor(faces), cs.floor(*halves)):
        assert floor["measured_on"] == 128
        assert floor["diversity_real"] == pytest.approx(1, abs=0.1)
        assert floor["coverage_real"] > 0.9
        assert set(floor["swd_floor"]) == {"32", "16", "avg"}
        assert floor["swd_floor"]["avg"] > 0 and 0 < floor["ms_ssim_real"] < 0.5


def test_swd_grows_with_damage(halves):
    real, other = halves
    base = cs.sliced_wasserstein(real, other)["avg"]
    for name, images in damaged(other).items():
        assert cs.sliced_wasserstein(real, images)["avg"] > 1.5 * base, name


def test_colour_shift_is_seen_by_coverage_and_not_by_swd(halves):
    real, other = halves[0].clamp(40, 215), halves[1].clamp(40, 215)
    shifted = (other + torch.tensor([40, 0, -40]).view(3, 1, 1)).to(torch.uint8)
    assert cs.coverage(real, shifted) < 0.8 * cs.coverage(real, other)
    assert cs.nearest_real(shifted, real)[0].mean() > 1.2 * cs.nearest_real(other, real)[0].mean()
    assert cs.sliced_wasserstein(real, shifted)["avg"] == pytest.approx(cs.sliced_wasserstein(real, other)["avg"], rel=0.1)


def test_swd_grows_step_by_step(halves):
    real, other = halves
    noise = torch.randn(other.shape, generator=torch.Generator().manual_seed(0))
    readings = [cs.sliced_wasserstein(real, (other + s * noise).clamp(0, 255).to(torch.uint8))["avg"] for s in (0, 10, 20, 40, 80)]
    assert readings == sorted(readings)


def test_collapse_is_seen(halves):
    real, other = halves
    sets = [other, other[:32].repeat(4, 1, 1, 1), other[:2].repeat(64, 1, 1, 1)]
    assert [cs.diversity(real, fakes) < 0.01 for fakes in sets] == [False, True, True]
    coverages, similarities = [cs.coverage(real, fakes) for fakes in sets], [cs.ms_ssim(fakes) for fakes in sets]
    assert coverages[0] > coverages[1] > coverages[2]
    assert similarities[0] < similarities[1] < similarities[2]
    assert cs.ms_ssim(other[:1].repeat(8, 1, 1, 1)) == pytest.approx(1)


def test_near_copies_are_collapse_too(halves):
    real, other = halves
    jitter = torch.randint(-6, 7, other.shape, generator=torch.Generator().manual_seed(0))
    few = (other[:4].repeat(32, 1, 1, 1).int() + jitter).clamp(0, 255).to(torch.uint8)
    assert cs.diversity(real, few) < 0.3


def test_nearest_real_finds_the_memorised(halves):
    train, held = halves
    samples = torch.cat([held[:8], train[[40, 7]]])
    samples[8:] = (samples[8:].int() + 2).clamp(0, 255)
    distance, index = cs.nearest_real(samples, train)
    assert index[8:].tolist() == [40, 7]
    assert distance[8:].max() == pytest.approx(2 / 255, rel=0.1) and distance[:8].min() > 5 * distance[8:].max()
    small = [F.avg_pool2d(images.float() / 255, 2) for images in (samples, train)]
    slow = [(small[1] - sample).square().mean((1, 2, 3)).sqrt().min() for sample in small[0]]
    assert distance.tolist() == pytest.approx([x.item() for x in slow], rel=1e-4)


def test_nearest_real_counts_on_past_its_first_chunk():
    many = torch.randint(0, 256, (8300, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    distance, index = cs.nearest_real(many[[8250, 3]], many)
    assert index.tolist() == [8250, 3] and not distance.any()


def test_one_constant_image_has_a_finite_distance(halves):
    grey = torch.full_like(halves[0], 128)
    assert 0 < cs.sliced_wasserstein(halves[0], grey)["avg"] < 1e4
    assert cs.diversity(halves[0], grey) == 0
    assert cs.ms_ssim(grey) == pytest.approx(1)


def test_global_random_state_neither_matters_nor_moves(halves):
    torch.manual_seed(1)
    first = cs.measure(*halves), cs.floor(halves[0])
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert (cs.measure(*halves), cs.floor(halves[0])) == first
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("size", [16, 64])
def test_every_size_has_its_levels(size):
    faces = cs.toy_faces(64, size)
    sides = [str(side) for side in (64, 32, 16) if side <= size]
    assert list(cs.sliced_wasserstein(faces[:32], faces[32:])) == [*sides, "avg"]
    assert 0 < cs.ms_ssim(faces) < 1


def test_unequal_sets_are_refused(faces):
    with pytest.raises(ValueError, match="equally many"):
        cs.sliced_wasserstein(faces, faces[:10])
    with pytest.raises(ValueError, match="256 real and 10 fake"):
        cs.diversity(faces, faces[:10])
    with pytest.raises(ValueError, match="n=600"):
        cs.pick(faces, 600)
    with pytest.raises(ValueError, match="at least two"):
        cs.ms_ssim(faces[:1])
    with pytest.raises(ValueError, match="5 real images"):
        cs.coverage(faces[:5], faces)
    with pytest.raises(ValueError, match="share=0.1 of 3"):
        cs.hold_out(faces[:3])


def test_hold_out_and_floor_share_no_image(faces, monkeypatch):
    train, held = cs.hold_out(faces)
    assert len(held) == 26 and torch.equal(torch.cat([train, held]), faces)
    seen, measure = [], cs.measure
    monkeypatch.setattr(cs, "measure", lambda real, other, seed: seen.extend((real, other)) or measure(real, other, seed))
    cs.floor(faces)
    assert len({tuple(image) for image in torch.cat(seen).flatten(1).tolist()}) == 256


# ------------------------------------------------------------- references


def reference_swd(real, fake, corners, directions):
    """Progressive GAN's SWD, literally and slowly: loops over images, patches and directions, in float64.

    corners: for real and fake, (levels, 2, N, 128); directions: per level, (4 * 128, 147). Random numbers are given, so
    that the rest can be compared closely.
    """
    binomial = np.outer([1, 4, 6, 4, 1], [1, 4, 6, 4, 1]) / 256

    def smooth(image, scale=1.0):
        padded = np.pad(image, ((0, 0), (2, 2), (2, 2)), mode="reflect")
        height, width = image.shape[1:]
        return sum(scale * binomial[i, j] * padded[:, i : i + height, j : j + width] for i in range(5) for j in range(5))

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
                for y, x in corner[level, :, number].T:
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
    for a, b, chosen in zip(descriptors(real, corners[0]), descriptors(fake, corners[1]), directions):
        found = []
        for direction in chosen:
            direction = direction / np.linalg.norm(direction)
            found.append(np.abs(np.sort(a @ direction) - np.sort(b @ direction)).mean())
        distances.append(1e3 * np.mean(found))
    return distances


@pytest.mark.parametrize("damage", ["blur", "noise", "one copied"])
def test_swd_agrees_with_a_literal_reference(halves, damage):
    real, fake = halves[0][:32], damaged(halves[1])[damage][:32]
    random = torch.Generator().manual_seed(5)
    directions = [torch.cat([torch.randn(128, 147, generator=random) for _ in range(4)]).double().numpy() for _ in range(2)]
    corners = [cs._corners(images, 2, seed=5).numpy() for images in (real, fake)]
    slow = reference_swd(real.numpy(), fake.numpy(), corners, directions)
    fast = cs.sliced_wasserstein(real, fake, seed=5)
    assert [fast["32"], fast["16"]] == pytest.approx(slow, rel=1e-3)
    assert fast["avg"] == pytest.approx((fast["32"] + fast["16"]) / 2)


def test_patches_are_cut_everywhere_and_differently_from_every_image(faces):
    same = faces[:1].expand(64, -1, -1, -1)
    for images in (faces[:64], same):
        corners = cs._corners(images, 2, seed=0)
        assert [(level.min().item(), level.max().item()) for level in corners] == [(0, 25), (0, 9)]
        assert len({tuple(corner) for corner in corners[0].permute(1, 0, 2).flatten(1).tolist()}) == 64
        for level, free in zip(corners, (26, 10)):
            assert abs(level.double().mean().item() - (free - 1) / 2) < 0.02 * free
    assert not torch.equal(cs._corners(faces[:9], 1, seed=0), cs._corners(faces[:9], 1, seed=1))


def reference_ms_ssim(a, b):
    """Wang's formula for one pair, (3, S, S) each, window by window."""
    weights, result = [0.0448, 0.2856, 0.3001, 0.2363, 0.1333], 1.0
    for scale, weight in enumerate(weights):
        side = a.shape[1]
        window = min(11, side)
        at = np.arange(window) - (window - 1) / 2
        gauss = np.exp(-(at[:, None] ** 2 + at**2) / (2 * (window * 1.5 / 11) ** 2))
        gauss /= gauss.sum()
        values = []
        for c in range(3):
            for y in range(side - window + 1):
                for x in range(side - window + 1):
                    p, q = a[c, y : y + window, x : x + window], b[c, y : y + window, x : x + window]
                    mean_p, mean_q = (gauss * p).sum(), (gauss * q).sum()
                    var_p, var_q = (gauss * (p - mean_p) ** 2).sum(), (gauss * (q - mean_q) ** 2).sum()
                    together = (gauss * (p - mean_p) * (q - mean_q)).sum()
                    contrast = (2 * together + 58.5225) / (var_p + var_q + 58.5225)  # (0.03 * 255)^2
                    luminance = (2 * mean_p * mean_q + 6.5025) / (mean_p**2 + mean_q**2 + 6.5025)  # (0.01 * 255)^2
                    values.append(luminance * contrast if scale == 4 else contrast)
        result *= max(0, np.mean(values)) ** weight
        if side > 1:
            a, b = (x.reshape(3, side // 2, 2, side // 2, 2).mean((2, 4)) for x in (a, b))
    return result


@pytest.mark.parametrize("size", [16, 32])
def test_ms_ssim_agrees_with_a_literal_reference(size):
    a, b = cs.toy_faces(4, size).double().split(2)
    fast = cs._ms_ssim(a.float(), b.float()).tolist()
    assert fast == pytest.approx([reference_ms_ssim(x.numpy(), y.numpy()) for x, y in zip(a, b)], rel=1e-3)


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
