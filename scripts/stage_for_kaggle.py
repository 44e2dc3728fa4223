"""Write the folder that Kaggle's own command sends: the notebook, its module in its first cell.

    python scripts/stage_for_kaggle.py --user NAME            # the whole report
    python scripts/stage_for_kaggle.py --user NAME --smoke    # minutes of quota: send this first

Then `kaggle kernels push -p FOLDER`, which --push runs, and at its end `kaggle kernels output`.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parents[1]
METADATA = {
    "title": "CSPup GAN",
    "code_file": "gan_hw.ipynb",
    "language": "python",
    "kernel_type": "notebook",
    "is_private": True,
    "enable_gpu": True,
    "enable_internet": False,
    "machine_shape": "NvidiaTeslaT4",  # two of them
    "dataset_sources": ["jessicali9530/celeba-dataset"],
}
FOLDED = {"_kg_hide-input": True, "jupyter": {"source_hidden": True}}

# Two cells of the smoke test, the first before all others and the second after them.
SMALLEST = "import os\n\nos.environ['CSPGAN_PROFILE'] = 'preview'"
EVERY_KIND = """\
import time

on_gpu = cs.best_device().type == "cuda"
recipes = {name: cs.PRESETS[name] for name in ("baseline", "tanh_bn", "no_bn_d", "dcgan")}
recipes["without_pairs"] = cs.CONVERGED.but(loss="bce_logits")
recipes["converged"] = cs.CONVERGED
for name, config in recipes.items():
    if not on_gpu:  # the same at a size for a CPU: does it run?
        config = config.but(image_size=16, width=8, batch_size=8)
    config = config.but(epochs=1, epoch_images=20 * config.batch_size)  # twenty steps
    began = time.time()
    run = cs.train(config, cs.toy_faces(512, config.image_size), progress=False)
    seconds = time.time() - began
    last = run.history[-1]
    rate = last["images"] / last["seconds"]
    memory = torch.cuda.max_memory_allocated() / 1e9 if on_gpu else 0
    print(f"{name}: {seconds:.0f} s, {rate:.1f} images/s, {memory:.1f} GB,", end=" ")
    print(f"D {last['d_loss']:.3f}, G {last['g_loss']:.3f} {run.stopped}")"""


def stage(folder, user, smoke=False):
    """Write notebook and metadata into folder."""
    notebook = nbformat.read(ROOT / "gan_hw.ipynb", as_version=4)
    for cell in notebook.cells:
        clear(cell)
    notebook.cells.insert(0, module_cell())
    if smoke:
        notebook.cells.insert(1, nbformat.v4.new_code_cell(SMALLEST, id="smallest"))
        notebook.cells.append(nbformat.v4.new_code_cell(EVERY_KIND, id="every-kind"))
    folder.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, folder / METADATA["code_file"])
    metadata = {"id": f"{user}/cspup-gan", **METADATA}
    text = json.dumps(metadata, indent=1) + "\n"
    (folder / "kernel-metadata.json").write_text(text)


def clear(cell):
    cell.metadata.pop("execution", None)
    if cell.cell_type == "code":
        cell.outputs = []
        cell.execution_count = None


def module_cell():
    """A cell that writes the module beside the notebook: Kaggle takes one file."""
    module = (ROOT / "cspgan.py").read_text(encoding="utf-8")
    source = "%%writefile cspgan.py\n" + module
    return nbformat.v4.new_code_cell(source, id="module", metadata=FOLDED)


def main():
    user = os.environ.get("KAGGLE_USERNAME", "YOUR-KAGGLE-NAME")
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / "results/latest/kaggle")
    parser.add_argument("--user", default=user)
    parser.add_argument("--smoke", action="store_true", help="the preview, and every kind of step")
    parser.add_argument("--push", action="store_true", help="send it with the kaggle command")
    options = parser.parse_args()
    stage(options.folder, options.user, options.smoke)
    push = ["kaggle", "kernels", "push", "-p", str(options.folder)]
    print(*push)
    print(f"kaggle kernels output {options.user}/cspup-gan -p {options.folder}", flush=True)
    if options.push:
        sys.exit(call(push))


def call(command):
    """Its exit status, or what to do where there is no such command."""
    try:
        return subprocess.call(command)
    except OSError as error:
        token = "an API token of kaggle.com/settings in ~/.kaggle/access_token"
        return f"{error}: pip install kaggle, and {token}"


if __name__ == "__main__":
    main()
