"""The report: its shape, and that it runs from top to bottom where nothing else is."""
import json, os, re, subprocess, sys
from pathlib import Path

import nbformat
import pytest

import cspgan as cs

ROOT = Path(cs.__file__).parent
NOTEBOOK = ROOT / "gan_hw.ipynb"

@pytest.fixture(scope="module")
def cells():
    return nbformat.read(NOTEBOOK, as_version=4).cells

def test_shape_of_the_committed_notebook(cells):
    code = [cell for cell in cells if cell.cell_type == "code"]
    assert len(cells) <= 75 and NOTEBOOK.stat().st_size < 5e6
    assert max(len(cell.source.splitlines()) for cell in code) <= 20
    lines = [line for cell in code for line in cell.source.splitlines() if line.strip()]
    assert len(lines) <= 450 and max(map(len, lines)) <= 110
    assert sum(len(cell.source.split()) for cell in cells if cell.cell_type == "markdown") <= 2500
    assert [cell.execution_count for cell in code] == [*range(1, len(code) + 1)]  # once, in order
    for cell in code:
        assert not any(output.output_type == "error" for output in cell.outputs)
        if "real-images" in cell.metadata.get("tags", []):
            assert not cell.outputs  # CelebA may not be passed on
        for output in cell.outputs:
            assert "widget" not in str(output.get("data", {}).keys()) and output.get("name") != "stderr"
    assert sum("infrastructure" in cell.metadata.get("tags", []) for cell in code) == 4

def test_every_preset_is_planned_and_every_section_is_there(cells):
    text = "\n".join(cell.source for cell in cells)
    for name in [*cs.PRESETS][:5] + ["converged"]:
        assert f'folder("{name}")' in text and f'finding(run, "{name}"' in text
    assert "RUNS = {**PRESETS, **ABLATIONS" in text
    assert set(re.findall(r'"(\d)\. ', text)) == set("123456789")

def test_readme_says_how_the_notebook_and_the_tests_are_run():
    readme, run = (ROOT / "README.md").read_text(), (ROOT / ".ci/run").read_text()
    commands = re.findall(r"```bash\n(python3 .*)\n```", readme)
    assert len(commands) == 2 and commands[1] in run.splitlines()
    for link in re.findall(r"\]\(([^)#:]+)\)", readme):
        assert (ROOT / link).exists(), link
    assert len(readme.splitlines()) <= 150
    run = cs.load_run(ROOT / "results/generators/converged")  # its weights are rounded to int8, scaled
    assert run.config.width == 1024 and 1 < max(x.abs().max() for x in run.generator.parameters()) < 10
    module = (ROOT / "cspgan.py").read_text().splitlines()
    assert len(module) <= 1100 and max(map(len, module)) <= 100

def test_staged_notebook_runs_alone_in_an_empty_folder(tmp_path):
    stage = [sys.executable, str(ROOT / "scripts/stage_for_kaggle.py"), str(tmp_path), "--smoke"]
    subprocess.run(stage, check=True, capture_output=True)
    run = [sys.executable, "-m", "nbconvert", "--to", "notebook", "--execute", "--inplace", "gan_hw.ipynb"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": "", "CSPGAN_RESULTS": "out"}
    environment.pop("CSPGAN_DATA", None)
    done = subprocess.run(run, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    records = json.loads((tmp_path / "out/table.json").read_text())
    assert {record["preset"] for record in records} >= {*cs.PRESETS, *cs.ABLATIONS}
    assert all((tmp_path / "out/figures" / name).exists() for name in ("faces.png", "comparison.png"))
    history = json.loads((tmp_path / "out/runs/converged/seed0/history.json").read_text())
    assert history["config"]["loss"] == "relativistic" and history["history"][-1]["epoch"] == 5
