"""The report: its shape, and that it runs from top to bottom where nothing else is."""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

import cspgan as cs

ROOT = Path(cs.__file__).parent
NOTEBOOK = ROOT / "gan_hw.ipynb"
TABLE = json.loads((ROOT / "results/table.json").read_text())
FULL_SIZE = json.loads((ROOT / "results/full_size.json").read_text())


@pytest.fixture(scope="module")
def cells():
    return nbformat.read(NOTEBOOK, as_version=4).cells


@pytest.fixture(scope="module")
def code(cells):
    return [cell for cell in cells if cell.cell_type == "code"]


def test_shape_of_the_committed_notebook(cells, code):
    assert len(cells) <= 45
    assert NOTEBOOK.stat().st_size < 5e6
    lines = [line for cell in code for line in cell.source.splitlines() if line.strip()]
    assert len(lines) <= 260
    assert max(map(len, lines)) <= 110
    texts = [cell.source for cell in cells if cell.cell_type == "markdown"]
    words = [word for text in texts for word in text.split() if re.search(r"\w", word)]
    assert len(words) <= 2600
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))


def test_outputs_of_the_committed_notebook_are_whole_and_may_be_passed_on(code):
    for cell in code:
        if "real-images" in cell.metadata.get("tags", []):
            assert not cell.outputs  # CelebA may not be passed on
        for output in cell.outputs:
            assert output.output_type != "error"
            assert output.get("name") != "stderr"
            assert not any("widget" in kind for kind in output.get("data", {}))


def test_every_picture_has_an_alternative_text(code):
    pictures = [output for cell in code for output in cell.outputs if shows_picture(output)]
    assert len(pictures) >= 15
    for picture in pictures:
        about = picture.metadata.get("image/png") or picture.metadata.get("image/jpeg") or {}
        assert len(about.get("alt", "")) > 20


def shows_picture(output):
    return any(kind.startswith("image/") for kind in output.get("data", {}))


def test_every_section_is_there_in_the_order_of_the_course(cells):
    text = "\n".join(cell.source for cell in cells)
    places = [text.index(f'train("{name}")') for name in [*list(cs.PRESETS)[:5], "converged"]]
    assert places == sorted(places)


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
    wrong = []
    for name, images, seeds, *cells in re.findall(TABLE_ROW, text):
        records = [record for record in TABLE if record["preset"] == name]
        seen = {f"{record['images_seen']:,}" for record in records}
        if seen != {images} or len(records) != int(seeds):
            wrong.append((name, images, seeds))
        for metric, cell in zip(("swd", "diversity", "coverage"), cells):
            right = shown([number_of(record, metric) for record in records], cell)
            if cell != right:
                wrong.append((name, metric, cell, right))
    return wrong


TABLE_ROW = r"\| `(\w+)`[^|]*\| ([\d,]+) \((\d)\) \| (\S[^|]*) \| (\S[^|]*) \| (\S[^|]*) \|"


def test_every_run_on_file_is_a_recipe_that_can_be_repeated():
    recipes = runpy.run_path(str(ROOT / "scripts/evidence.py"))["RECIPES"]
    assert {record["preset"] for record in TABLE} <= set(recipes)


def test_numbers_of_the_readme_are_those_on_file():
    readme = (ROOT / "README.md").read_text()
    assert len(re.findall(TABLE_ROW, readme)) >= 8
    assert not wrong_numbers(readme)
    swd, diversity = re.search(TABLE_ROW, readme).groups()[3:5]
    assert len(wrong_numbers(readme.replace(swd, f"1{swd}", 1))) == 1
    assert len(wrong_numbers(readme.replace(diversity, f"1{diversity}", 1))) == 1


# Numbers in sentences: one with a point belongs to the recipe and the metric that it follows.
# In a table's row SWD need not be named.
METRICS = {"SWD": "swd", "diversity": "diversity", "coverage": "coverage"}
WORD = r"`(\w+)`|\b(SWD|diversity|coverage)\b|(?<![\w.,-])(\d+\.\d+)(?![\w-])"


def numbers_in(text):
    """(recipe, metric, number as it is written)"""
    found = []
    text = re.sub(TABLE_ROW, "", text)  # `wrong_numbers` reads these
    text = re.sub(r"\n(?![\n|-])", " ", text)
    for line in text.splitlines():
        is_row = line.startswith("|")
        for sentence in [line] if is_row else re.split(r"(?<=[.:;])\s", line):
            recipe = None
            metric = "swd" if is_row else None
            for name, word, number in re.findall(WORD, sentence):
                recipe = name or recipe
                metric = METRICS.get(word, metric)
                if number and recipe and metric:
                    found.append((recipe, metric, number))
    return found


def values_of(recipe, metric):
    """What may be said: the seeds' mean and half their range, each seed, full size, the floor."""
    records = [record for record in TABLE if record["preset"] == recipe]
    values = [number_of(record, metric) for record in records]
    if values:
        values += [sum(values) / len(values), (max(values) - min(values)) / 2]
    if recipe in FULL_SIZE:
        values.append(FULL_SIZE[recipe]["history"][-1][metric])
    if metric == "swd":
        values += [record["swd_floor"]["avg"] for record in records[:1]]
        values.append(FULL_SIZE["floor"]["swd_floor"]["avg"])
    return values


def wrong_in_sentences(text):
    wrong = []
    for recipe, metric, number in numbers_in(text):
        digits = len(number.partition(".")[2])
        right = {f"{value:.{digits}f}" for value in values_of(recipe, metric)}
        if number not in right:
            wrong.append((recipe, metric, number, sorted(right)))
    return wrong


def test_numbers_in_the_prose_are_those_on_file(cells):
    texts = [cell.source for cell in cells if cell.cell_type == "markdown"]
    for text in ("\n".join(texts), (ROOT / "README.md").read_text()):
        found = numbers_in(text)
        assert len(found) >= 3
        assert not wrong_in_sentences(text)
        missed = 0
        for recipe, metric, number in found:
            last = "1" if number[-1] == "0" else "0"
            changed = f"`{recipe}` {metric.replace('swd', 'SWD')} {number[:-1]}{last}"
            missed += not wrong_in_sentences(changed)
        assert (
            missed <= len(found) / 10
        )  # a wrong digit that another seed or the floor happens to have


PREVIEW = '"preview": {"image_size": 32, "width": 64, "epoch_images": 3_200}'
TINY = '"preview": {"image_size": 16, "width": 8, "epoch_images": 64}'


def test_staged_notebook_runs_alone_in_an_empty_folder(tmp_path):
    stage = [sys.executable, str(ROOT / "scripts/stage_for_kaggle.py"), str(tmp_path), "--smoke"]
    subprocess.run(stage, check=True, capture_output=True)
    path = tmp_path / "gan_hw.ipynb"
    book = nbformat.read(path, as_version=4)
    changed = [cell for cell in book.cells if PREVIEW in cell.source]
    assert len(changed) == 1
    changed[0].source = changed[0].source.replace(PREVIEW, TINY)
    nbformat.write(book, path)
    run = [sys.executable, "-m", "nbconvert", "--to", "notebook", "--execute", "--inplace"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": "", "CSPGAN_RESULTS": "out"}
    environment.pop("CSPGAN_DATA", None)
    done = subprocess.run(
        [*run, str(path)], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for name in [*list(cs.PRESETS)[:5], "converged"]:
        run = cs.load_run(tmp_path / "out" / name)
        assert run.history[-1]["epoch"] == run.config.epochs
