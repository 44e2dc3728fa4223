"""The benchmark compares like with like, and files what it promises."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cspgan as cs

SCRIPT = Path(__file__).parents[1] / "scripts/benchmark.py"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("benchmark", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("recipe", ["h1_bn_leaky", "converged"])
def test_reference_loop_takes_the_module_s_steps(benchmark, recipe, tmp_path):
    config = cs.PRESETS[recipe].but(image_size=16, width=8, z_dim=8, batch_size=8, flip=False,
                                    lr_width=0, lr_end=1)
    faces = cs.toy_faces(8, 16)
    (tmp_path / "faces").mkdir()
    for k, face in enumerate(faces):
        benchmark.transforms.functional.to_pil_image(face).save(tmp_path / f"faces/{k}.png")
    training, reference = cs.Training(config, faces, CPU), benchmark.Reference(config, tmp_path, CPU)
    torch.manual_seed(4 * config.seed + 2)  # the reference draws the noise of the module
    batch = torch.stack(sorted(next(iter(reference.loader))[0], key=torch.sum))
    mine = torch.stack(sorted(cs.to_network(faces, config), key=torch.sum))
    assert torch.allclose(batch, mine, atol=1e-6)  # ImageFolder brings the same pixels
    torch.manual_seed(4 * config.seed + 2)
    for step in range(3):
        training.advance()
        real = cs.to_network(faces[cs.batch_index(step, 8, config)], config)
        d_loss, g_loss, penalty, d_real, d_fake = reference.learn(real)
        record = training.record()
        found = [record[key] for key in ("d_loss", "g_loss", "penalty", "d_real", "d_fake")]
        assert found == pytest.approx([d_loss, g_loss, penalty, d_real, d_fake], rel=1e-3, abs=1e-5)
    for a, b in zip(training.kept.parameters(), (reference.kept if config.ema_images else
                                                 reference.generator).parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-4)


def test_quick_benchmark_files_what_it_promises(tmp_path):
    done = subprocess.run([sys.executable, SCRIPT, "--quick", "--out", tmp_path / "new"], text=True,
                          env={**os.environ, "OMP_WAIT_POLICY": "passive"}, capture_output=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "new/benchmark.json").read_text())
    assert {"hardware", "versions", "code", "date", "settings"} < set(found)
    assert set(found["versions"]) == {"python", "torch", "torchvision"}
    assert (tmp_path / "new/benchmark.png").stat().st_size > 10_000
