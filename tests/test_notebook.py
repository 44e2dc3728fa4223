"""The report: its shape, and that it runs from top to bottom where nothing else is."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

import cspgan as cs

ROOT = Path(cs.__file__).parent
NOTEBOOK = ROOT / "gan_hw.ipynb"


@pytest.fixture(scope="module")
def cells():
    return nbformat.read(NOTEBOOK, as_version=4).cells


@pytest.fixture(scope="module")
def code(cells):
    return [cell for cell in cells if cell.cell_type == "code"]


def test_shape_of_the_committed_notebook(cells, code):
    assert len(cells) <= 75
    assert NOTEBOOK.stat().st_size < 5e6
    lines = [line for cell in code for line in cell.source.splitlines() if line.strip()]
    assert len(lines) <= 460
    assert max(map(len, lines)) <= 110
    texts = [cell.source for cell in cells if cell.cell_type == "markdown"]
    assert sum(len(text.split()) for text in texts) <= 2500
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))


def test_outputs_of_the_committed_notebook_are_whole_and_may_be_passed_on(code):
    for cell in code:
        if "real-images" in cell.metadata.get("tags", []):
            assert not cell.outputs  # CelebA may not be passed on
        for output in cell.outputs:
            assert output.output_type != "error"
            assert output.get("name") != "stderr"
            assert not any("widget" in kind for kind in output.get("data", {}))


def test_every_section_is_there(cells):
    text = "\n".join(cell.source for cell in cells)
    for name in [*list(cs.PRESETS)[:5], "converged"]:
        assert f'folder("{name}")' in text
        assert f'finding(run, "{name}"' in text
    assert "RUNS = {**PRESETS, **ABLATIONS" in text


def test_readme_says_how_the_notebook_and_the_tests_are_run():
    readme = (ROOT / "README.md").read_text()
    commands = re.findall(r"```bash\n(python3 .*?)```", readme, re.DOTALL)
    assert len(commands) == 2
    assert commands[1] in (ROOT / ".ci/run").read_text()
    for link in re.findall(r"\]\(([^)#:]+)\)", readme):
        assert (ROOT / link).exists(), link


def number_of(record, metric):
    value = record[metric]
    return value["avg"] if metric == "swd" else value


def shown(values, text):
    """The mean of values and half their range, with as many digits as the text has."""
    digits = len(text.split()[0].partition(".")[2])
    if "±" not in text:
        return f"{sum(values) / len(values):.{digits}f}"
    half = (max(values) - min(values)) / 2
    return f"{sum(values) / len(values):.{digits}f} ± {half:.{digits}f}"


def wrong_numbers(text):
    """Cells of a result table that do not say what is on file: recipe, images (seeds), metrics."""
    table = json.loads((ROOT / "results/table.json").read_text())
    wrong = []
    for name, images, seeds, *cells in re.findall(TABLE_ROW, text):
        records = [record for record in table if record["preset"] == name]
        seen = {f"{record['images_seen']:,}" for record in records}
        if seen != {images} or len(records) != int(seeds):
            wrong.append((name, images, seeds))
        for metric, cell in zip(("swd", "diversity", "coverage"), cells):
            right = shown([number_of(record, metric) for record in records], cell)
            if cell != right:
                wrong.append((name, metric, cell, right))
    return wrong


TABLE_ROW = r"\| `(\w+)`[^|]*\| ([\d,]+) \((\d)\) \| (\S[^|]*) \| (\S[^|]*) \| (\S[^|]*) \|"


def test_numbers_of_the_readme_are_those_on_file():
    readme = (ROOT / "README.md").read_text()
    assert len(re.findall(TABLE_ROW, readme)) >= 8
    assert not wrong_numbers(readme)
    assert len(wrong_numbers(readme.replace("16.9 ± 1.1", "16.8 ± 1.1"))) == 1
    assert len(wrong_numbers(readme.replace("| 0.93 ± 0.00 |", "| 0.94 ± 0.00 |"))) == 1


def test_staged_notebook_runs_alone_in_an_empty_folder(tmp_path):
    stage = [sys.executable, str(ROOT / "scripts/stage_for_kaggle.py"), str(tmp_path), "--smoke"]
    subprocess.run(stage, check=True, capture_output=True)
    run = [sys.executable, "-m", "nbconvert", "--to", "notebook", "--execute", "--inplace"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": "", "CSPGAN_RESULTS": "out"}
    environment.pop("CSPGAN_DATA", None)
    done = subprocess.run(
        [*run, "gan_hw.ipynb"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    records = json.loads((tmp_path / "out/table.json").read_text())
    assert {record["preset"] for record in records} >= {*cs.PRESETS, "without_he"}
    for name in ("faces.png", "comparison.png"):
        assert (tmp_path / "out/figures" / name).exists()
    history = json.loads((tmp_path / "out/runs/converged/seed0/history.json").read_text())
    assert history["config"]["loss"] == "relativistic"
    assert history["history"][-1]["epoch"] == 5
