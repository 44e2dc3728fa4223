"""Run the report on Kaggle's GPUs: one command sends it, one fetches what it made.

    python scripts/push_to_kaggle.py --dry-run    # write the staged folder, show what would be sent, send nothing
    python scripts/push_to_kaggle.py              # send it: Kaggle runs the notebook from top to bottom
    python scripts/push_to_kaggle.py --pull       # when it has ended: the executed notebook, results/ and the log

Kaggle takes one file, so the module travels inside the notebook, whose first cell writes it. What is pulled goes to
results/latest/kaggle, so that no local run is overwritten, and shows faces of CelebA: strip_real_images.py first, if
it is to be committed. Kaggle gives GPU and internet only to accounts with a verified phone number.

Checked against the code of the kaggle package 2.2.4, not against Kaggle. That code leaves open whether the executed
notebook comes among the output files or from `kernels_pull`: both are tried, and one without outputs is reported.
"""

import argparse
import contextlib
import io
import json
import shutil
import sys
import tempfile
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parents[1]
STAGED, PULLED = ROOT / "results/latest/kaggle-push", ROOT / "results/latest/kaggle"
NOTEBOOK, MODULE = "gan_hw.ipynb", "cspgan.py"
TITLE, SLUG = "CSPup GAN", "cspup-gan"  # Kaggle derives the slug from the title: they must match
DATASET = "jessicali9530/celeba-dataset"
MACHINE = "NvidiaTeslaT4"  # two of them; unasked, Kaggle has given a P100, which its PyTorch cannot use any more
NOBODY = "YOUR-KAGGLE-NAME"
NO_CREDENTIALS = ("Kaggle credentials are missing or stale: create an API token at kaggle.com/settings and put it into "
                  "~/.kaggle/access_token or KAGGLE_API_TOKEN, or run 'kaggle auth login'")


def ask(what, call, *arguments, **options):
    """Kaggle's answer, or a RuntimeError that says what failed and what to do next."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # without credentials the package prints a page, twice
            return call(*arguments, **options)
    except (Exception, SystemExit) as error:  # without credentials it exits instead of raising
        status = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(error, SystemExit) or status == 401:
            advice = NO_CREDENTIALS
        elif status in (403, 404) or "Cannot access kernel" in str(error):
            advice = ("no such user or notebook, or it is not yours: --user must be the NAME of kaggle.com/NAME that the "
                      "credentials belong to, and --pull needs a push before it")
        elif isinstance(error, (ImportError, AttributeError, TypeError)):
            advice = "the kaggle package is missing or too old: pip install --upgrade kaggle six"
        else:
            advice = "check the network and the reason given here, and try again"
        raise RuntimeError(f"{what} failed: {advice}. ({type(error).__name__}: {str(error)[:300]})") from error


def log_in():
    """The kaggle package's API with credentials, and the name of the user they belong to."""
    from kaggle.api.kaggle_api_extended import KaggleApi

    api = KaggleApi()
    api.authenticate()
    return api, api.get_config_value("username") or NOBODY


def stage(folder, kernel):
    """Write the notebook, with the module in its first cell, and the metadata; returns the metadata."""
    notebook = nbformat.read(ROOT / NOTEBOOK, as_version=4)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    source = f"%%writefile {MODULE}\n" + (ROOT / MODULE).read_text(encoding="utf-8")
    folded = {"_kg_hide-input": True, "jupyter": {"source_hidden": True}}  # 1,500 lines before the report's title
    notebook.cells.insert(0, nbformat.v4.new_code_cell(source, id="module", metadata=folded))
    metadata = {
        "id": kernel, "title": TITLE, "code_file": NOTEBOOK, "language": "python", "kernel_type": "notebook",
        "is_private": True, "enable_gpu": True, "enable_internet": True, "machine_shape": MACHINE,
        "dataset_sources": [DATASET], "competition_sources": [], "kernel_sources": [],
    }
    folder.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, folder / NOTEBOOK)
    (folder / "kernel-metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
    return metadata


def push(api, folder, kernel, url):
    """Send the staged folder. Kaggle refuses in fields of its answer, without an error."""
    # `acc` repeats the metadata: packages before 1.8.4 ignore the machine there, and fail here instead.
    answer = ask(f"pushing {kernel}", api.kernels_push, str(folder), acc=MACHINE)
    if answer is None or answer.error:
        raise RuntimeError(f"Kaggle refused {kernel}: {answer and answer.error}. Check the name and the GPU hours left at "
                           "kaggle.com/settings, and push again")
    if answer.invalid_dataset_sources:
        raise RuntimeError(f"{url} runs, but without {', '.join(answer.invalid_dataset_sources)}, which Kaggle could not add, "
                           "and so on drawn faces: cancel it there, 'Add Input' by hand, and run it")
    print(f"Version {answer.version_number} is on its way: {answer.url or url}\nWhen it has ended: --pull")


def pull(api, folder, kernel, url):
    """Fetch the executed notebook, results/ and the log, once the run has ended; what there is of a failed one too."""
    answer = ask(f"asking for {kernel}", api.kernels_status, kernel)
    status = getattr(answer.status, "name", str(answer.status)).lower()
    print(f"{kernel}: {status}")
    if status not in ("complete", "error", "cancel_acknowledged"):
        raise RuntimeError(f"{kernel} is {status}, and can be fetched when it has ended: look at {url} and pull again later")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:  # what breaks off leaves an earlier pull whole
        ask(f"fetching the files of {kernel}", api.kernels_output, kernel, scratch, force=True)
        executed, results = Path(scratch, "__notebook__.ipynb"), Path(scratch, "results/latest")
        if not executed.exists():
            executed = Path(ask(f"fetching the notebook of {kernel}", api.kernels_pull, kernel, scratch))
        is_whole = '"output_type"' in executed.read_text(encoding="utf-8") and (results / "table.json").exists()
        executed.replace(folder / NOTEBOOK)
        for log in Path(scratch).glob("*.log"):
            log.replace(folder / log.name)
        if results.exists():
            shutil.copytree(results, folder, dirs_exist_ok=True, copy_function=shutil.move)
    if status != "complete":
        reason = answer.failure_message or "no reason given"
        raise RuntimeError(f"{kernel} ended with {status} ({reason}): its log and what it made are in {folder} and at {url}")
    if not is_whole:
        raise RuntimeError(f"{folder} lacks the outputs of {NOTEBOOK} or table.json: download them in a browser at {url}")
    print(f"Fetched into {folder}")


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--dry-run", action="store_true", help="stage and show what would be sent, send nothing")
    mode.add_argument("--pull", action="store_true", help="fetch the executed notebook, results/ and the log")
    parser.add_argument("--user", metavar="NAME", help="Kaggle user (default: the one the credentials belong to)")
    parser.add_argument("--to", metavar="FOLDER", type=Path, help="folder to stage in or to pull into (default: see above)")
    options = parser.parse_args(arguments)
    folder = (options.to or (PULLED if options.pull else STAGED)).resolve()
    try:
        try:
            api, user = ask("logging in", log_in)
        except RuntimeError as error:
            if not options.dry_run:
                raise
            api, user = None, NOBODY
            print(f"{error}\nFor the dry run, {options.user or NOBODY} is taken as your name.")
        kernel = f"{options.user or user}/{SLUG}"
        url = f"https://www.kaggle.com/code/{kernel}"
        if options.pull:
            return pull(api, folder, kernel, url)
        metadata = stage(folder, kernel)
        if not options.dry_run:
            return push(api, folder, kernel, url)
        print(json.dumps(metadata, indent=2))
        for path in sorted(folder.iterdir()):
            print(f"{path}  {path.stat().st_size / 1000:,.1f} kB")
        print("Nothing was sent.")
    except (RuntimeError, OSError) as error:
        sys.exit(" ".join(str(error).split()))


if __name__ == "__main__":
    main()
