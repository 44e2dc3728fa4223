"""What each ruler reads where the answer is known, and SWD against a slow, literal reference."""
import json, sys, types

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
    alone = cs.diversity(faces[:64], faces[:64])
    assert cs.diversity(twice, faces[:128]) == pytest.approx(alone, rel=0.01)
    grey = torch.full((64, 3, 16, 16), 128, dtype=torch.uint8)
    assert np.isnan(cs.diversity(grey, grey)) and cs.measure(grey, grey)["diversity"] is None
    run = cs.train(tiny, cs.toy_faces(64, 16), progress=False)
    record = cs.evaluate(run, grey, cs.reference(grey, grey))
    assert json.loads(json.dumps(record, allow_nan=False))["seed"] == 0

def test_swd_grows_step_by_step_and_stays_finite(halves):
    real, other = halves
    noise = torch.randn(other.shape, generator=torch.Generator().manual_seed(0))
    noisy = [(other + s * noise).clamp(0, 255).to(torch.uint8) for s in (0, 20, 80)]
    noisy.append(torch.full_like(real, 128))
    readings = [cs.sliced_wasserstein(real, images)["avg"] for images in noisy]
    assert readings == sorted(readings) and 1.5 * readings[0] < readings[1] < readings[3] < 1e4

def test_colour_shift_is_seen_by_coverage_and_not_by_swd(halves):
    real, other = halves[0].clamp(40, 215), halves[1].clamp(40, 215)
    shifted = (other + torch.tensor([40, 0, -40]).view(3, 1, 1)).to(torch.uint8)
    assert cs.coverage(real, shifted) < 0.8 * cs.coverage(real, other)
    swd = cs.sliced_wasserstein(real, shifted)["avg"]
    assert swd == pytest.approx(cs.sliced_wasserstein(real, other)["avg"], rel=0.1)

def test_collapse_is_seen_of_near_copies_too(halves):
    real, other = halves
    sets = [other, other[:32].repeat(4, 1, 1, 1), other[:2].repeat(64, 1, 1, 1)]
    assert [cs.diversity(real, fakes) < 0.01 for fakes in sets] == [False, True, True]
    coverages = [cs.coverage(real, fakes) for fakes in sets]
    assert coverages[0] > coverages[1] > coverages[2]
    jitter = torch.randint(-6, 7, other.shape, generator=torch.Generator().manual_seed(0))
    few = (other[:4].repeat(32, 1, 1, 1).int() + jitter).clamp(0, 255).to(torch.uint8)
    assert cs.diversity(real, few) < 0.3

def test_nearest_real_finds_the_memorised(halves):
    train, held = halves
    samples = torch.cat([held[:8], train[[40, 7]]])
    samples[8:] = (samples[8:].int() + 2).clamp(0, 255)
    distance, index = cs.nearest(samples, train)
    assert index[8:].tolist() == [40, 7] and distance[:8].min() > 5 * distance[8:].max()
    small = [F.avg_pool2d(images.float() / 255, 2) for images in (samples, train)]
    slow = [(small[1] - image).square().mean((1, 2, 3)).sqrt().min().item() for image in small[0]]
    assert distance.tolist() == pytest.approx(slow, rel=1e-4)
    many = train[:, :, ::2, ::2].repeat(65, 1, 1, 1) ^ torch.arange(8320).view(-1, 1, 1, 1) // 128
    distance, index = cs.nearest(many[[8250, 3]], many)  # past its first chunk
    assert index.tolist() == [8250, 3] and not distance.any()

def test_global_random_state_neither_matters_nor_moves(halves):
    torch.manual_seed(1)
    real, other = halves[0][:32], halves[1][:32]
    first = cs.measure(real, other), cs.reference(real, other)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert (cs.measure(real, other), cs.reference(real, other)) == first
    assert torch.equal(torch.get_rng_state(), state)

@pytest.mark.parametrize("size", [16, 64])
def test_every_size_has_its_levels(size):
    faces = cs.toy_faces(64, size)
    sides = [str(side) for side in (64, 32, 16) if side <= size]
    assert list(cs.sliced_wasserstein(faces[:32], faces[32:])) == [*sides, "avg"]

@pytest.mark.parametrize("call, words", [
    (lambda x: cs.sliced_wasserstein(x, x[:10]), "256, 3, 32, 32.*10, 3, 32, 32"),
    (lambda x: cs.diversity(x, x[:10]), "256 real, 10 fake"), (lambda x: cs.pick(x, 600), "n=600"),
    (lambda x: cs.coverage(x[:5], x), "5 real images")])
def test_unequal_sets_are_refused(faces, call, words):
    with pytest.raises(ValueError, match=words):
        call(faces)

def test_a_figure_is_shown_once_in_any_notebook(faces, tiny):  # case 5
    from IPython.core.formatters import DisplayFormatter
    run = cs.train(tiny, cs.toy_faces(64, 16), progress=False)
    rows = cs.compare({"a": run, "b": run})
    for figure in (cs.show_images(faces[:9], "nine"), cs.plot_losses(run), rows):
        data, _ = DisplayFormatter().format(figure)  # of a fresh kernel, without %matplotlib inline
        assert data["image/png"][:4] == b"\x89PNG" and [*data].count("image/png") == 1
    run.history = run.history[:1]  # stopped before its first epoch
    run.history[0].pop("diversity", None)
    assert cs.plot_losses(run)

def literal_swd(images, corners, directions):
    """Progressive GAN's SWD of two sets, slowly: loops over images and patches, in float64. Random
    numbers are given: corners (2, N, 128) and directions (512, 147) of each level."""
    binomial = np.outer([1, 4, 6, 4, 1], [1, 4, 6, 4, 1]) / 256
    def smooth(image, scale):
        padded, (height, width) = np.pad(image, ((0, 0), (2, 2), (2, 2)), "reflect"), image.shape[1:]
        return sum(scale * binomial[i, j] * padded[:, i : i + height, j : j + width]
                   for i in range(5) for j in range(5))
    def projections(images, level):
        patches = []
        for number, image in enumerate(images.astype(np.float64)):
            for _ in range(level + 1):
                small, large = smooth(image, 1)[:, ::2, ::2], np.zeros_like(image)
                large[:, ::2, ::2] = small
                image, detail = small, image - smooth(large, 4)
                if detail.shape[1] == 16:  # the last level keeps what is left
                    detail = detail + smooth(large, 4)
            patches += [detail[:, y : y + 7, x : x + 7] for y, x in corners[level][:, number].T]
        patches = np.array(patches).transpose(1, 0, 2, 3)
        patches = np.stack([(c - c.mean()) / c.std() for c in patches], 1).reshape(-1, 147)
        unit = directions[level] / np.linalg.norm(directions[level], axis=1, keepdims=True)
        return np.sort(patches @ unit.T, axis=0)
    return [1e3 * np.abs(projections(images[0], k) - projections(images[1], k)).mean()
            for k in range(len(corners))]

@pytest.mark.parametrize("damage", ["blur", "one copied"])
def test_swd_agrees_with_a_literal_reference(halves, damage):
    real, fake = (half[:32] for half in halves)
    blurred = F.interpolate(F.avg_pool2d(fake.float(), 4), scale_factor=4).to(torch.uint8)
    fake = blurred if damage == "blur" else fake[:1].expand_as(fake)
    random, corners, directions = torch.Generator().manual_seed(5), [], []
    for side in (32, 16):  # the same numbers in the same order as the module draws them
        corners.append(torch.randint(side - 6, (2, 32, 128), generator=random))
        drawn = [torch.randn(128, 147, generator=random) for _ in range(4)]
        directions.append(torch.cat(drawn).double().numpy())
    slow = literal_swd([real.numpy(), fake.numpy()], corners, directions)
    fast = cs.sliced_wasserstein(real, fake, seed=5)
    assert [fast["32"], fast["16"]] == pytest.approx(slow, rel=1e-3)
    assert fast["avg"] == pytest.approx((fast["32"] + fast["16"]) / 2)

# ------------------------------------------------------------- FID, where it can be had
def test_fid_is_a_dash_with_the_reason_where_it_cannot_be_had(halves, monkeypatch):
    def no_network(**options):
        raise OSError("no route to the weights")
    broken = types.SimpleNamespace(calculate_metrics=no_network)
    for module, words in ((None, "torch_fidelity"), (broken, "no route to the weights")):
        monkeypatch.setitem(sys.modules, "torch_fidelity", module)  # None: as if not installed
        found = cs.fid_kid(*halves)
        assert found["fid"] is None and found["kid"] is None and words in found["no_fid"]

def test_fid_hands_torch_fidelity_two_sets_of_bytes(halves, monkeypatch):
    def calculate(input1, input2, **options):
        for dataset, images in ((input1, halves[0]), (input2, halves[1])):
            assert isinstance(dataset, torch.utils.data.Dataset) and len(dataset) == 128
            assert dataset[3].dtype == torch.uint8 and torch.equal(dataset[3], images[3])
        assert options["fid"] and options["kid"] and options["kid_subset_size"] == 128
        return {"frechet_inception_distance": 12.5, "kernel_inception_distance_mean": 0.25}
    found = types.SimpleNamespace(calculate_metrics=calculate)
    monkeypatch.setitem(sys.modules, "torch_fidelity", found)
    assert cs.fid_kid(*halves) == {"fid": 12.5, "kid": 0.25, "no_fid": ""}
