"""What is sent to Kaggle, and what is taken out of a notebook before it is committed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import torch

import cspgan as cs

ROOT = Path(cs.__file__).parent
STAGE = ROOT / "scripts" / "stage_for_kaggle.py"
STRIP = ROOT / "scripts" / "strip_real_images.py"


def stage(folder, *options, path=os.environ["PATH"]):
    """What the command says, and the cells of the notebook that it writes."""
    command = [sys.executable, str(STAGE), str(folder), "--user", "me", *options]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PATH": path})
    book = nbformat.read(folder / "gan_hw.ipynb", as_version=4)
    return done, book.cells


def test_staged_folder_has_the_module_in_its_first_cell_and_says_what_to_do(tmp_path):
    done, cells = stage(tmp_path)
    head, _, module = cells[0].source.partition("\n")
    assert head == "%%writefile cspgan.py"
    assert module == (ROOT / "cspgan.py").read_text()
    for cell in cells:
        assert not cell.get("outputs")
        assert not cell.get("execution_count")

    about = json.loads((tmp_path / "kernel-metadata.json").read_text())
    assert about["id"] == "me/cspup-gan"
    assert about["machine_shape"] == "NvidiaTeslaT4"
    assert about["code_file"] == "gan_hw.ipynb"
    assert len(about["dataset_sources"]) == 1
    assert f"kaggle kernels push -p {tmp_path}" in done.stdout
    assert f"kaggle kernels output me/cspup-gan -p {tmp_path}" in done.stdout


def test_push_calls_kaggles_own_command_or_says_that_it_is_missing(tmp_path):
    folder = tmp_path / "a"
    command = tmp_path / "bin" / "kaggle"
    command.parent.mkdir()
    command.write_text("#!/bin/sh\necho called $@\nexit 3\n")
    command.chmod(0o755)
    done, _ = stage(folder, "--push", path=f"{command.parent}:/bin:/usr/bin")
    assert f"called kernels push -p {folder}" in done.stdout
    assert done.returncode == 3

    done, _ = stage(folder, "--push", path=str(tmp_path))
    assert "access_token" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.returncode == 1


def test_smoke_runs_every_kind_of_run_after_the_preview(tmp_path, capsys):
    _, cells = stage(tmp_path, "--smoke")
    assert "preview" in cells[1].source
    assert "converged" in cells[-1].source
    exec(cells[-1].source, {"cs": cs, "torch": torch})
    said = capsys.readouterr().out
    assert said.count("images/s") == 6
    assert "not finite" not in said


def test_what_may_not_be_committed_is_taken_out(tmp_path):
    kept = nbformat.v4.new_output("stream", name="stdout", text="kept")
    bar = nbformat.v4.new_output("stream", name="stderr", text="50%|#####")
    data = {"application/vnd.jupyter.widget-view+json": {}}
    widget = nbformat.v4.new_output("display_data", data=data)
    tags = {"tags": ["real-images"]}
    cells = [
        nbformat.v4.new_code_cell("1", outputs=[kept], metadata=tags),
        nbformat.v4.new_code_cell("2", outputs=[kept, bar, widget]),
    ]
    book = nbformat.v4.new_notebook(cells=cells, metadata={"widgets": {"a": 1}})
    path = tmp_path / "a.ipynb"
    nbformat.write(book, path)
    subprocess.run([sys.executable, str(STRIP), str(path)], check=True)
    book = nbformat.read(path, as_version=4)
    assert [cell.outputs for cell in book.cells] == [[], [kept]]
    assert "widgets" not in book.metadata
