"""The committed report is whole and shows no real face; the notebook runs in its smallest profile; README holds."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

import cspgan as cs

ROOT = Path(__file__).parents[1]
SECTIONS = ["The answer first", "Setup", "The task", "Data", "The block", "The loop", "The ruler", "Baseline", "Hypothesis 0",
            "Hypothesis 1", "Hypothesis 2", "Hypothesis 3", "What other students tried", "A recipe built to converge",
            "Conclusions", "How to reuse"]
FIVE = ["baseline", "h0_more_epochs", "h1_bn_leaky", "h2_l2_big_batch", "h3_smooth_tanh"]


@pytest.fixture(scope="module")
def notebook():
    return nbformat.read(ROOT / "gan_hw.ipynb", as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def pictures(cell):
    return sum("image/png" in output.get("data", {}) for output in cell.outputs)


def tags(cell):
    return cell.metadata.get("tags", [])


def test_sections_in_order(notebook):
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    headings = re.findall(r"^## (.*)$", text, flags=re.M)
    assert [h[: len(s)] for h, s in zip(headings, SECTIONS, strict=True)] == SECTIONS


def test_committed_notebook_was_executed_in_order_without_error(notebook):
    assert [cell.execution_count for cell in code_cells(notebook)] == list(range(1, len(code_cells(notebook)) + 1))
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert not [output for output in outputs if output.get("name") == "stderr"]


def test_no_real_image_is_committed(notebook):
    shown = [cell for cell in code_cells(notebook) if "real-images" in tags(cell)]
    assert shown and not any(cell.outputs for cell in shown)
    for cell in code_cells(notebook):  # what draws from the data must carry the tag, what is not tagged must not draw
        draws = re.search(r"(show_images|imshow|savefig|make_grid|imsave)\((images|real|other|known|faces|held_out)\b", cell.source)
        assert not draws or "real-images" in tags(cell), cell.source
        generated = r"draw_|experiment\(|samples\(|made|comparison|scores|picture|timeline|slopes|progress|losses"
        assert not pictures(cell) or re.search(generated, cell.source), cell.source
    allowed = {"losses.png", "samples.png", "compare.png", "scores.png", "timeline.png", "largest.png", "progress.png", "movie.gif",
               "benchmark.png", "generator.pt"}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    assert "cspgan.py" in tracked
    found = [name for name in tracked if name.lower().endswith((".png", ".jpg", ".jpeg", ".webp", ".gif", ".zip", ".u8", ".pt"))]
    assert not [name for name in found if Path(name).name not in allowed]


def test_strip_script_empties_tagged_cells_only(tmp_path):
    copy = tmp_path / "copy.ipynb"
    notebook = nbformat.read(ROOT / "gan_hw.ipynb", as_version=4)
    for cell in code_cells(notebook):
        cell.outputs = [nbformat.v4.new_output("stream", text="shown")]
    nbformat.write(notebook, copy)
    subprocess.run([sys.executable, ROOT / "scripts/strip_real_images.py", copy], check=True)
    cells = code_cells(nbformat.read(copy, as_version=4))
    assert all(bool(cell.outputs) != ("real-images" in tags(cell)) for cell in cells)


def test_every_hypothesis_shows_losses_samples_and_a_finding(notebook):
    for name in FIVE:
        cells = [cell for cell in code_cells(notebook) if f'"{name}"' in cell.source]
        assert any(f'experiment("{name}")' in cell.source and pictures(cell) == 1 for cell in cells)
        assert any(f'samples(runs["{name}"], "{name}")' in cell.source and pictures(cell) == 1 for cell in cells)
        assert any("Finding." in output.get("data", {}).get("text/markdown", "") for cell in cells for output in cell.outputs)


def test_cells_can_be_copied_and_the_page_opens(notebook):
    assert max(len(cell.source.splitlines()) for cell in code_cells(notebook)) <= 26
    assert (ROOT / "gan_hw.ipynb").stat().st_size < 10e6


def folder(record):
    place = ROOT / "results" / ("large" if record["preset"] == "converged_large" else "") / record["preset"]
    return place / f"seed{record['seed']}" if record["seed"] else place


def test_results_on_file_are_of_the_runs_beside_them():
    table = json.loads((ROOT / "results/table.json").read_text())
    groups = cs.by_preset(table)
    assert set(groups) == set(cs.RUNS)
    for name in [*cs.PRESETS, *cs.LONG]:  # a spread needs seeds
        assert len({record["seed"] for record in groups[name]}) == len(groups[name]) >= (3 if "converged" in name else 2), name
    for record in table:
        history = json.loads((folder(record) / "history.json").read_text())
        assert history["history"][-1]["images"] == record["images_seen"] and history["config"]["seed"] == record["seed"]
        assert history["config"]["image_size"] == record["image_size"] and history["config"]["width"] == record["width"]
        assert [r["diversity"] for r in history["history"] if "diversity" in r]
        assert record["swd"]["avg"] > record["swd_floor"]["avg"] > 0 and {
            "hardware", "torch", "data", "ms_ssim_real"} <= set(record)
    for group in groups.values():
        assert all((folder(group[0]) / picture).exists() for picture in ("losses.png", "samples.png"))
    assert 1e5 < (ROOT / "results/converged/movie.gif").stat().st_size < 8e6


def test_committed_generator_makes_the_committed_samples():
    run = cs.load_run(ROOT / "results/converged_20")
    table = json.loads((ROOT / "results/table.json").read_text())
    (record,) = [r for r in table if r["preset"] == "converged_20" and not r["seed"]]
    samples = cs.sample(run, record["measured_on"])
    assert cs.ms_ssim(samples) == pytest.approx(record["ms_ssim"], abs=0.002)


def test_long_runs_of_converged_keep_getting_better():
    """What the report says of them, from the histories on file: never rising over the last half of the run."""
    for folder in (ROOT / "results/converged_20").glob("**/history.json"):
        curve = [r["swd"] for r in json.loads(folder.read_text())["history"] if "swd" in r]
        quarters = [sum(part) / len(part) for part in (curve[-10:-5], curve[-5:])]
        assert len(curve) == 20 and quarters[1] < 1.05 * quarters[0]


def test_readme_and_ci_agree_and_its_table_is_the_one_on_file():
    readme = (ROOT / "README.md").read_text()
    (tests,) = [line for line in readme.splitlines() if "pytest" in line and line.startswith("python3 -m venv")]
    assert tests in (ROOT / ".ci/run").read_text().splitlines()
    for link in re.findall(r"\]\(([^)#:]+)\)", readme):
        assert (ROOT / link).exists(), link
    groups = cs.by_preset(json.loads((ROOT / "results/table.json").read_text()))
    (large,) = groups.pop("converged_large")  # of another size: a sentence of its own
    assert f"the same recipe ends after {large['images_seen']:,} images at SWD {large['swd']['avg']:.1f}" in readme
    for name, group in groups.items():
        row = next(line for line in readme.splitlines() if line.startswith(f"| `{name}`"))
        assert f"| {cs.spread([r['swd']['avg'] for r in group], 1)} |" in row
        assert f"| {cs.spread([r['diversity'] for r in group], 2)} |" in row


def run_notebook(folder, **variables):
    environment = {**os.environ, "CSPGAN_PROFILE": "smoke", "OMP_NUM_THREADS": "1", **variables}
    for name in ("CSPGAN_DATA", "CSPGAN_RESULTS"):
        environment.pop(name, None)
    command = [sys.executable, "-m", "jupyter", "nbconvert", "--to", "notebook", "--execute", "gan_hw.ipynb",
               "--output-dir", "results/latest"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return nbformat.read(folder / "results/latest/gan_hw.ipynb", as_version=4)


def test_notebook_runs_from_top_to_bottom_and_again(tmp_path):
    for name in ("gan_hw.ipynb", "cspgan.py"):
        shutil.copy(ROOT / name, tmp_path)
    first = run_notebook(tmp_path)
    text = json.dumps(first)
    assert "procedural faces" in text and "Loaded, not trained" not in text
    top = code_cells(first)[0]  # the answer was put where the report begins, when the last section had run
    assert "the plain baseline" in json.dumps(top.outputs) and pictures(top) == 1
    for name in cs.RUNS:
        assert all((tmp_path / "results/latest" / name / file).exists() for file in
                   ("losses.png", "samples.png", "history.json", "generator.pt"))
    records = json.loads((tmp_path / "results/latest/table.json").read_text())
    assert set(cs.by_preset(records)) == set(cs.RUNS)
    assert (tmp_path / "results/latest/converged/movie.gif").exists()
    size = (tmp_path / "results/latest/gan_hw.ipynb").stat().st_size

    # "Run all" once more, with no time left and two runs missing: nothing is trained again, and the report says so
    for missing in ("slow_d_20", "dcgan"):
        shutil.rmtree(tmp_path / "results/latest" / missing)
    second = run_notebook(tmp_path, CSPGAN_TIME_BUDGET="0")
    assert json.dumps(second).count("Loaded, not trained") == len(records) - 2
    answer = json.dumps(code_cells(second)[0].outputs)
    assert "Not finished: dcgan, seed 0: not begun; slow_d_20, seed 0: not begun" in answer
    assert len(json.loads((tmp_path / "results/latest/table.json").read_text())) == len(records)
    assert size < 4e6
