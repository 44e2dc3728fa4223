"""What is sent to Kaggle, and what is taken out of a notebook before it is committed."""
import json, os, subprocess, sys
from pathlib import Path

import nbformat
import torch

import cspgan as cs

ROOT = Path(cs.__file__).parent
STAGE = ROOT / "scripts" / "stage_for_kaggle.py"

def staged(folder, *options, path=os.environ["PATH"]):
    done = subprocess.run([sys.executable, str(STAGE), str(folder), "--user", "me", *options],
                          capture_output=True, text=True, env={**os.environ, "PATH": path})
    book = nbformat.read(folder / "gan_hw.ipynb", as_version=4)
    return done, book.cells

def test_staged_folder_has_the_module_in_its_first_cell_and_says_what_to_do(tmp_path):
    done, cells = staged(tmp_path)
    head, _, module = cells[0].source.partition("\n")
    assert head == "%%writefile cspgan.py" and module == (ROOT / "cspgan.py").read_text()
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)
    about = json.loads((tmp_path / "kernel-metadata.json").read_text())
    assert about["id"] == "me/cspup-gan" and about["machine_shape"] == "NvidiaTeslaT4"
    assert about["code_file"] == "gan_hw.ipynb" and len(about["dataset_sources"]) == 1
    assert f"kaggle kernels push -p {tmp_path}" in done.stdout
    assert f"kaggle kernels output me/cspup-gan -p {tmp_path}" in done.stdout

def test_push_calls_kaggles_own_command_or_says_that_it_is_missing(tmp_path):
    command = tmp_path / "bin" / "kaggle"
    command.parent.mkdir()
    command.write_text("#!/bin/sh\necho called $@\nexit 3\n")
    command.chmod(0o755)
    done, _ = staged(tmp_path / "a", "--push", path=f"{command.parent}:/bin:/usr/bin")
    assert f"called kernels push -p {tmp_path / 'a'}" in done.stdout and done.returncode == 3
    done, _ = staged(tmp_path / "a", "--push", path=str(tmp_path))
    assert "access_token" in done.stderr and "Traceback" not in done.stderr and done.returncode == 1

def test_smoke_runs_every_kind_of_run_after_the_smallest_profile(tmp_path, capsys):
    _, cells = staged(tmp_path, "--smoke")
    assert "smoke" in cells[1].source and "converged" in cells[-1].source
    exec(cells[-1].source, {"cs": cs, "torch": torch})
    said = capsys.readouterr().out
    assert said.count("images/s") == 6 and "not finite" not in said

def test_what_may_not_be_committed_is_taken_out(tmp_path):
    code, out = nbformat.v4.new_code_cell, nbformat.v4.new_output
    kept = out("stream", name="stdout", text="kept")
    cells = [code("1", outputs=[kept], metadata={"tags": ["real-images"]}),
             code("2", outputs=[kept, out("stream", name="stderr", text="50%|#####"), out(
                 "display_data", data={"application/vnd.jupyter.widget-view+json": {}})])]
    path = tmp_path / "a.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"widgets": {"a": 1}}), path)
    subprocess.run([sys.executable, str(ROOT / "scripts/strip_real_images.py"), str(path)], check=True)
    book = nbformat.read(path, as_version=4)
    assert [cell.outputs for cell in book.cells] == [[], [kept]] and "widgets" not in book.metadata
