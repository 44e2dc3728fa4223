"""The benchmark compares like with like, and files what it promises."""
import json, os, subprocess, sys
from pathlib import Path

import pytest
import torch

import cspgan as cs

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import benchmark

@pytest.mark.parametrize("recipe", ["h1_bn_leaky", "converged"])
def test_reference_loop_takes_the_module_s_steps(recipe, tmp_path):
    changes = {"image_size": 16, "width": 8, "batch_size": 8, "flip": False, "lr_width": 0}
    config, faces = cs.PRESETS[recipe].but(lr_end=1, **changes), cs.toy_faces(8, 16)
    (tmp_path / "faces").mkdir()
    for k, face in enumerate(faces):
        benchmark.transforms.functional.to_pil_image(face).save(tmp_path / f"faces/{k}.png")
    training = cs.Training(config, faces, torch.device("cpu"))
    reference = benchmark.Reference(config, tmp_path, training.device)
    mine, theirs = cs.to_network(faces, config), next(iter(reference.loader))[0]
    mine, theirs = (x[x.sum(dim=(1, 2, 3)).argsort()] for x in (mine, theirs))  # it shuffles
    assert torch.allclose(mine, theirs, atol=1e-6)
    torch.manual_seed(4 * config.seed + 2)  # the reference draws the noise of the module
    for step in range(3):
        training.advance()
        record = training.record()
        real = cs.to_network(faces[cs.batch_index(step, 8, config)], config)
        wanted = [record[key] for key in ("d_loss", "g_loss", "penalty", "d_real", "d_fake")]
        assert reference.learn(real) == pytest.approx(wanted, rel=1e-4, abs=1e-5)
    kept = reference.kept if config.ema_images else reference.generator
    for a, b in zip(training.kept.parameters(), kept.parameters(), strict=True):
        assert a.dim() == 1 or (a - b).abs().mean() < 1e-5  # biases before BatchNorm drift

def test_quick_benchmark_files_what_it_promises(tmp_path):
    folder, fair = tmp_path / "new", {**os.environ, "OMP_WAIT_POLICY": "passive"}
    command = [sys.executable, benchmark.__file__, "--quick", "--out", folder]
    done = subprocess.run(command, env=fair, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((folder / "benchmark.json").read_text(), parse_constant=pytest.fail)
    assert (folder / "benchmark.png").stat().st_size > 10_000
    assert {"hardware", "versions", "code", "date", "settings"} < set(found)
    rates, shares = [*found["side_by_side"]["images_per_second"].values()], {}
    for recipe in ("h1_bn_leaky", "converged"):
        reference, module = (found["recipes"][recipe][name] for name in ("reference", "module"))
        shares[recipe] = module["flops_per_image"] / reference["flops_per_image"]
        rates += [row[key][part] for row in (reference, module) for part in ("step", "end_to_end")
                  for key in ("images_per_second", "ratio")]
    assert min(rates) > 0 and shares["converged"] < 0.75 and shares["h1_bn_leaky"] < 1
