"""The benchmark compares like with like, ends at what "auto" chooses, and files what it promises."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cspgan as cs

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("benchmark", ROOT / "scripts/benchmark.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(params=["h1_bn_leaky", "converged"])
def config(request):
    return cs.PRESETS[request.param].but(image_size=16, width=8, z_dim=8, batch_size=8, epochs=1, epoch_images=8, flip=False)


def test_reference_loop_takes_the_module_s_plain_step(benchmark, config, tmp_path):
    faces = cs.toy_faces(8, 16)
    benchmark.write_jpegs(tmp_path / "faces", faces, 8, (16, 16))
    reference = benchmark.Reference(config, tmp_path, 8, CPU)
    training = cs.Training(config.but(**cs.PLAIN), faces, CPU)
    real, z = cs.to_network(faces, config), torch.randn(8, 8)
    d_loss, *_ = training_step(training, real, z)
    losses = (reference.learn_with_penalties if config.r1 else reference.learn_dcgan)(real, z)
    assert losses[0] == pytest.approx(d_loss, rel=1e-5)
    for mine, theirs in ((training.generator, reference.generator), (training.discriminator, reference.discriminator)):
        for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
            assert torch.allclose(a, b, atol=1e-6)


def training_step(training, real, z):
    """The module's two steps on given images and noise, at the rates that a run begins with."""
    fake = training.generator.train()(z)
    stats = cs.d_step(training.discriminator, training.opt_d, real, fake, training.chosen)
    g_loss = cs.g_step(training.discriminator, training.opt_g, real, fake, training.chosen)
    return stats[0].item(), g_loss.item()


def test_ladder_begins_with_nothing_and_ends_with_auto(benchmark, config):
    steps = [c for name, c in benchmark.ladder(config, CPU).items() if "not in auto" not in name and "bfloat16" not in name]
    assert steps[0] == config.but(**cs.PLAIN) and steps[-1] == cs.on_hardware(config, CPU)
    for before, after in zip(steps, steps[1:]):  # one addition at a time
        assert len(after.differences(before)) == 1


def test_quick_benchmark_files_what_it_promises(tmp_path):
    done = subprocess.run([sys.executable, ROOT / "scripts/benchmark.py", "--quick", "--threads", "1", "--out", tmp_path],
                          capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "benchmark.json").read_text())
    assert (tmp_path / "benchmark.png").exists() and {"hardware", "versions", "code", "growth", "input", "targets"} <= set(found)
    for variants in found["recipes"].values():
        reference, *others = variants.values()
        assert reference["ratio"]["step"] == 1 and len(others) >= 4
        for row in variants.values():
            assert min(row["peak_memory_mb"], row["flops_per_image"], row["share_of_peak"]) > 0
            assert set(row["images_per_second"]) == set(row["ratio"]) == {"step", "first_epoch", "later_epochs"}
    linear = [row["flops_per_image"] for name, row in found["recipes"]["converged"].items() if "linear" in name]
    double = found["recipes"]["converged"]["module, all off"]["flops_per_image"]
    assert linear and all(flops < double for flops in linear)
