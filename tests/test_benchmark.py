"""The benchmark compares like with like, and files what it promises."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torchvision.transforms.functional import to_pil_image

import cspgan as cs

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import benchmark

STATS = ("d_loss", "g_loss", "penalty", "d_real", "d_fake")


def sorted_by_sum(images):
    return images[images.sum(dim=(1, 2, 3)).argsort()]


@pytest.mark.parametrize("recipe", ["h1_bn_leaky", "converged"])
def test_reference_loop_takes_the_module_s_steps(recipe, tmp_path):
    size = {"image_size": 16, "width": 8, "batch_size": 8}
    config = cs.PRESETS[recipe].but(flip=False, lr_width=0, lr_end=1, **size)
    faces = cs.toy_faces(8, 16)
    (tmp_path / "faces").mkdir()
    for k, face in enumerate(faces):
        to_pil_image(face).save(tmp_path / f"faces/{k}.png")
    training = cs.Training(config, faces, torch.device("cpu"))
    reference = benchmark.Reference(config, tmp_path, training.device)

    mine = cs.to_network(faces, config)
    theirs, _ = next(iter(reference.loader))  # it shuffles
    assert torch.allclose(sorted_by_sum(mine), sorted_by_sum(theirs), atol=1e-6)

    torch.manual_seed(4 * config.seed + 2)  # the reference draws the noise of the module
    for _ in range(3):
        training.advance()
        training.record()
        wanted = [training.run.history[-1][name] for name in STATS]
        real = cs.to_network(faces[training.order], config)  # a batch of all there are
        assert reference.learn(real) == pytest.approx(wanted, rel=1e-4, abs=1e-5)

    kept = reference.kept if config.ema_images else reference.generator
    for a, b in zip(training.kept.parameters(), kept.parameters(), strict=True):
        if a.dim() > 1:  # biases before BatchNorm drift
            assert (a - b).abs().mean() < 1e-5


def test_quick_benchmark_files_what_it_promises(tmp_path):
    folder = tmp_path / "new"
    command = [sys.executable, benchmark.__file__, "--quick", "--out", folder]
    fair = {**os.environ, "OMP_WAIT_POLICY": "passive"}
    done = subprocess.run(command, env=fair, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (folder / "benchmark.png").stat().st_size > 10_000
    text = (folder / "benchmark.json").read_text()
    found = json.loads(text, parse_constant=pytest.fail)  # no NaN
    assert {"hardware", "versions", "version", "date", "settings"} < set(found)

    numbers = list(found["side_by_side"]["images_per_second"].values())
    shares = {}
    for recipe, variants in found["recipes"].items():
        for row in variants.values():
            for measure in ("step", "end_to_end"):
                numbers.append(row["images_per_second"][measure])
                numbers.append(row["ratio"][measure])
        mine = variants["module"]["flops_per_image"]
        shares[recipe] = mine / variants["reference"]["flops_per_image"]
    assert min(numbers) > 0
    assert shares.keys() == {"h1_bn_leaky", "converged"}
    assert shares["converged"] < 0.75
    assert shares["h1_bn_leaky"] < 1
