"""What is sent to Kaggle, what comes back, how each failure ends, and that the staged notebook runs alone."""

import ast
import importlib.util
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager
from PIL import Image

import cspgan as cs

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts/push_to_kaggle.py"
WITHOUT_OUTPUTS = '{"cells": [{"cell_type": "code", "outputs": []}]}'
EXECUTED = '{"cells": [{"cell_type": "code", "outputs": [{"output_type": "stream"}]}]}'

spec = importlib.util.spec_from_file_location("push_to_kaggle", SCRIPT)
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)


def kaggle_with(monkeypatch, **methods):
    """A kaggle package that behaves as given, with ada's credentials; returns the names of the methods called, in order."""
    calls = []

    def recorded(name):
        return lambda *args, **options: calls.append(name) or methods[name](*args, **options)

    module = types.ModuleType("kaggle.api.kaggle_api_extended")
    methods = {"authenticate": lambda: None, "get_config_value": {"username": "ada"}.get, **methods}
    module.KaggleApi = lambda: types.SimpleNamespace(**{name: recorded(name) for name in methods})
    for name in ("kaggle", "kaggle.api"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return calls


def pushed(error=None, invalid=()):
    return types.SimpleNamespace(error=error, invalid_dataset_sources=list(invalid), version_number=7,
                                 url="https://www.kaggle.com/code/ada/cspup-gan")


def status_of(name, failure=""):
    return lambda kernel: types.SimpleNamespace(status=types.SimpleNamespace(name=name), failure_message=failure)


def raising(error):
    def method(*args, **options):
        raise error

    return method


def http_error(status):
    error = OSError(f"{status} Client Error\nfor url: kaggle.com")
    error.response = types.SimpleNamespace(status_code=status)
    return error


def refusal(*arguments):
    """The one line on stderr that the script ends with."""
    with pytest.raises(SystemExit) as ended:
        script.main([str(argument) for argument in arguments])
    assert isinstance(ended.value.code, str) and ended.value.code and "\n" not in ended.value.code  # printed, status 1
    return ended.value.code


# ---- what is sent


@pytest.fixture(scope="module")
def staged(tmp_path_factory):
    folder = tmp_path_factory.mktemp("staged")
    script.stage(folder, "ada/cspup-gan")
    return folder


def test_staged_metadata_turns_on_what_the_report_needs(staged):
    assert sorted(path.name for path in staged.iterdir()) == ["gan_hw.ipynb", "kernel-metadata.json"]
    metadata = json.loads((staged / "kernel-metadata.json").read_text())
    assert metadata["id"] == "ada/cspup-gan" and metadata["code_file"] == "gan_hw.ipynb"
    assert metadata["enable_gpu"] is metadata["enable_internet"] is metadata["is_private"] is True
    assert metadata["dataset_sources"] == [cs.CELEBA] and metadata["machine_shape"] == "NvidiaTeslaT4"
    assert metadata["id"].split("/")[1] == metadata["title"].lower().replace(" ", "-")  # as Kaggle makes the slug


def test_staged_notebook_is_the_report_without_outputs_below_the_module(staged):
    notebook, report = (nbformat.read(path / "gan_hw.ipynb", as_version=4) for path in (staged, ROOT))
    nbformat.validate(notebook)
    assert [cell.source for cell in notebook.cells[1:]] == [cell.source for cell in report.cells]
    assert notebook.metadata == report.metadata
    for cell in notebook.cells:
        assert cell.cell_type != "code" or cell.outputs == [] and cell.execution_count is None
        assert "execution" not in cell.metadata
    assert notebook.cells[0].source.startswith("%%writefile cspgan.py\n")
    assert (staged / "gan_hw.ipynb").stat().st_size < 1e6


def test_first_cell_writes_the_module_byte_for_byte(staged):
    cell = nbformat.read(staged / "gan_hw.ipynb", as_version=4).cells[0]
    call = ast.parse(TransformerManager().transform_cell(cell.source)).body[0].value  # get_ipython().run_cell_magic(...)
    magic, line, body = map(ast.literal_eval, call.args)
    assert (magic, line) == ("writefile", "cspgan.py") and body.encode() == (ROOT / "cspgan.py").read_bytes()


def test_dry_run_shows_and_stages_but_sends_nothing(tmp_path, monkeypatch, capsys):
    calls = kaggle_with(monkeypatch, kernels_push=raising(AssertionError))
    script.main(["--dry-run", "--to", str(tmp_path)])
    said = capsys.readouterr().out
    assert "kernels_push" not in calls and "Nothing was sent" in said and "ada/cspup-gan" in said and cs.CELEBA in said
    assert (tmp_path / "gan_hw.ipynb").exists() and (tmp_path / "kernel-metadata.json").exists()


def test_dry_run_needs_no_credentials_and_says_whose_name_it_takes(tmp_path, monkeypatch, capsys):
    kaggle_with(monkeypatch, authenticate=raising(SystemExit(1)))
    script.main(["--dry-run", "--to", str(tmp_path)])
    assert "YOUR-KAGGLE-NAME is taken" in capsys.readouterr().out
    script.main(["--dry-run", "--user", "grace", "--to", str(tmp_path)])
    assert json.loads((tmp_path / "kernel-metadata.json").read_text())["id"] == "grace/cspup-gan"


def test_push_sends_the_staged_folder_and_prints_where_it_runs(tmp_path, monkeypatch, capsys):
    sent = []
    kaggle_with(monkeypatch, kernels_push=lambda folder, acc: sent.append((sorted(os.listdir(folder)), acc)) or pushed())
    script.main(["--to", str(tmp_path)])
    assert sent == [(["gan_hw.ipynb", "kernel-metadata.json"], "NvidiaTeslaT4")]
    assert "https://www.kaggle.com/code/ada/cspup-gan" in capsys.readouterr().out


def test_the_real_package_reads_from_the_metadata_what_is_meant(tmp_path):
    """The installed package up to its last step, in a process of its own, with made-up credentials and no network."""
    program = f"""if True:
        import contextlib, json, runpy, sys, types
        from kaggle.api.kaggle_api_extended import KaggleApi

        def save(request):
            names = ("slug new_title language kernel_type is_private enable_gpu enable_internet machine_shape "
                     "dataset_data_sources").split()
            print("SENT", json.dumps({{**{{name: getattr(request, name) for name in names}}, "text": request.text}}))
            return types.SimpleNamespace(error="a stand-in\\nanswered", invalid_dataset_sources=[], url="", version_number=1)

        service = types.SimpleNamespace(save_kernel=save)
        client = types.SimpleNamespace(kernels=types.SimpleNamespace(kernels_api_client=service))
        KaggleApi.build_kaggle_client = lambda self: contextlib.nullcontext(client)
        script = runpy.run_path({str(SCRIPT)!r})
        script["contextlib"].redirect_stdout = lambda stream: contextlib.nullcontext()
        script["main"](["--to", {str(tmp_path / "staged")!r}])"""
    done = run_python(tmp_path, "-c", program, KAGGLE_USERNAME="ada", KAGGLE_KEY="0" * 32)
    sent = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("SENT"))[5:])
    assert "%%writefile cspgan.py" in sent.pop("text")
    assert sent == {"slug": "ada/cspup-gan", "new_title": "CSPup GAN", "language": "python", "kernel_type": "notebook",
                    "is_private": True, "enable_gpu": True, "enable_internet": True, "machine_shape": "NvidiaTeslaT4",
                    "dataset_data_sources": [cs.CELEBA]}
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "Kaggle refused ada/cspup-gan: a stand-in" in done.stderr


# ---- what goes wrong


def run_python(home, *arguments, **variables):
    """Python on its own, without Kaggle credentials other than those given."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("KAGGLE")}
    environment.update(HOME=str(home), USERPROFILE=str(home), **variables)
    return subprocess.run([sys.executable, *arguments], env=environment, cwd=home, capture_output=True, text=True, timeout=120)


def test_without_credentials_the_real_package_ends_in_one_line(tmp_path):
    done = run_python(tmp_path, str(SCRIPT))
    assert done.returncode == 1 and done.stdout == "" and done.stderr.count("\n") == 1
    assert "KAGGLE_API_TOKEN" in done.stderr and "access_token" in done.stderr


@pytest.mark.parametrize("arguments", [[], ["--pull"]])
def test_missing_or_stale_credentials_say_where_to_get_them(tmp_path, monkeypatch, arguments):
    kaggle_with(monkeypatch, authenticate=raising(SystemExit(1)))
    assert "kaggle.com/settings" in refusal("--to", tmp_path, *arguments)
    kaggle_with(monkeypatch, kernels_push=raising(http_error(401)), kernels_status=raising(http_error(401)))
    assert "kaggle.com/settings" in refusal("--to", tmp_path, *arguments)


@pytest.mark.parametrize("error", [http_error(403), http_error(404), ValueError("Cannot access kernel 'nobody/x' (denied).")])
def test_unknown_user_is_named(tmp_path, monkeypatch, error):
    kaggle_with(monkeypatch, kernels_push=raising(error), kernels_status=raising(error))
    for arguments in ([], ["--pull"]):
        said = refusal("--user", "nobody", "--to", tmp_path, *arguments)
        assert "nobody/cspup-gan" in said and "no such user" in said and "--user" in said


@pytest.mark.parametrize("push, words", [
    (lambda folder, acc: pushed(error="Maximum weekly GPU quota\nreached."), ["ada/cspup-gan", "quota reached", "push again"]),
    (lambda folder, acc: None, ["refused ada/cspup-gan"]),
    (lambda folder, acc: pushed(invalid=[cs.CELEBA]), [cs.CELEBA, "could not add", "cancel"]),
    (raising(ConnectionError("no route\nto host")), ["ada/cspup-gan", "no route to host", "network"]),
    (lambda folder: pushed(), ["too old", "pip install"]),  # a package that cannot choose the machine
])
def test_failed_push_ends_in_a_message(tmp_path, monkeypatch, push, words):
    kaggle_with(monkeypatch, kernels_push=push)
    said = refusal("--to", tmp_path)
    assert all(word in said for word in words)


def test_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "kaggle.api.kaggle_api_extended", None)
    assert "pip install" in refusal("--to", tmp_path)


def test_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    kaggle_with(monkeypatch)
    (tmp_path / "file").write_text("where the folder should be")
    assert "file" in refusal("--dry-run", "--to", tmp_path / "file")


# ---- what comes back


def run_that_left(files, source):
    """Methods for a run that is complete, left these files and its log behind, and whose notebook is pulled as `source`."""
    def output(kernel, path, force):
        assert kernel == "ada/cspup-gan"
        for name, text in files.items():
            Path(path, name).parent.mkdir(parents=True, exist_ok=True)
            Path(path, name).write_text(text)
        Path(path, "cspup-gan.log").write_text("[]")

    def pull(kernel, path):
        Path(path, "cspup-gan.ipynb").write_text(source)
        return str(Path(path, "cspup-gan.ipynb"))

    return {"kernels_status": status_of("COMPLETE"), "kernels_output": output, "kernels_pull": pull}


@pytest.mark.parametrize("status", ["QUEUED", "RUNNING", "CANCEL_REQUESTED"])
def test_pull_refuses_while_it_runs(tmp_path, monkeypatch, capsys, status):
    calls = kaggle_with(monkeypatch, kernels_status=status_of(status), kernels_output=raising(AssertionError))
    said = refusal("--pull", "--to", tmp_path)
    assert status.lower() in said and "later" in said and "kernels_output" not in calls
    assert f"ada/cspup-gan: {status.lower()}" in capsys.readouterr().out and not list(tmp_path.iterdir())


FILES = {"results/latest/table.json": "[1]", "results/latest/baseline/history.json": "{}", "cspgan.py": "of Kaggle"}


@pytest.mark.parametrize("files, source", [
    ({**FILES, "__notebook__.ipynb": EXECUTED}, WITHOUT_OUTPUTS), (FILES, EXECUTED),
], ids=["among the files", "pulled"])
def test_pull_fetches_notebook_results_and_log(tmp_path, monkeypatch, capsys, files, source):
    kaggle_with(monkeypatch, **run_that_left(files, source))
    (tmp_path / "baseline").mkdir()
    (tmp_path / "table.json").write_text("of an earlier pull")
    script.main(["--pull", "--to", str(tmp_path)])
    came = {path.relative_to(tmp_path).as_posix(): path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
    assert came == {"gan_hw.ipynb": EXECUTED, "table.json": "[1]", "baseline/history.json": "{}", "cspup-gan.log": "[]"}
    assert "ada/cspup-gan: complete" in capsys.readouterr().out


@pytest.mark.parametrize("files, source", [(FILES, WITHOUT_OUTPUTS), ({}, EXECUTED)], ids=["no outputs", "no results"])
def test_pull_says_when_it_did_not_get_everything(tmp_path, monkeypatch, files, source):
    kaggle_with(monkeypatch, **run_that_left(files, source))
    (tmp_path / "table.json").write_text("of an earlier pull")
    assert "lacks" in refusal("--pull", "--to", tmp_path)


def test_pull_of_a_failed_run_brings_the_log_and_the_reason(tmp_path, monkeypatch):
    failed = status_of("ERROR", "Your notebook ran out\nof memory")
    kaggle_with(monkeypatch, **{**run_that_left({}, EXECUTED), "kernels_status": failed})
    said = refusal("--pull", "--to", tmp_path)
    assert "ended with error" in said and "out of memory" in said and (tmp_path / "cspup-gan.log").exists()


def test_pull_that_breaks_off_leaves_the_earlier_one_whole(tmp_path, monkeypatch):
    def broken(*arguments, **options):
        methods["kernels_output"](*arguments, **options)
        raise ConnectionError("cut")

    methods = run_that_left(FILES, EXECUTED)
    kaggle_with(monkeypatch, **{**methods, "kernels_output": broken})
    (tmp_path / "table.json").write_text("of an earlier pull")
    assert "cut" in refusal("--pull", "--to", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["table.json"]
    assert (tmp_path / "table.json").read_text() == "of an earlier pull"


# ---- alone on Kaggle


def test_staged_notebook_runs_alone_where_the_data_lies_as_on_kaggle(staged, tmp_path):
    working, module = tmp_path / "working", (ROOT / "cspgan.py").read_bytes()
    faces = working / "data/celeba-dataset/img_align_celeba/img_align_celeba"  # data/ is searched as /kaggle/input is
    faces.mkdir(parents=True)
    (working / "data/celeba-dataset/list_attr_celeba.csv").write_text("image_id,Smiling\n")
    for k, face in enumerate(cs.toy_faces(300, 64, seed=5), 1):
        Image.fromarray(face.permute(1, 2, 0).numpy()).resize((178, 218)).save(faces / f"{k:06d}.jpg")
    (working / "gan_hw.ipynb").write_bytes((staged / "gan_hw.ipynb").read_bytes())

    environment = {**os.environ, "CSPGAN_PROFILE": "smoke", "OMP_NUM_THREADS": "1", "HOME": str(tmp_path / "home")}
    for name in ("CSPGAN_DATA", "CSPGAN_RESULTS", "PYTHONPATH"):
        environment.pop(name, None)
    command = [sys.executable, "-m", "jupyter", "nbconvert", "--to", "notebook", "--execute", "gan_hw.ipynb",
               "--output", "executed.ipynb"]
    done = subprocess.run(command, cwd=working, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (working / "cspgan.py").read_bytes() == module
    said = json.dumps([cell.get("outputs") for cell in nbformat.read(working / "executed.ipynb", as_version=4).cells])
    assert "Writing cspgan.py" in said and "data       img_align_celeba: " in said and "Loaded, not trained" not in said
    records = json.loads((working / "results/latest/table.json").read_text())
    assert set(cs.by_preset(records)) == set(cs.RUNS)
