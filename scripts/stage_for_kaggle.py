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
SMALLEST = "import os\n\nos.environ['CSPGAN_PROFILE'] = 'smoke'"
EVERY_KIND = """\
import time

on_gpu = cs.best_device().type == "cuda"  # else the same at a size for a CPU: does it run?
for name in ("baseline", "tanh_bn", "no_bn_d", "dcgan", "without_pairs", "converged"):
    small = {} if on_gpu else dict(image_size=16, width=8, batch_size=8)
    config = (cs.PRESETS | cs.ABLATIONS)[name].but(epochs=1, **small)
    config = config.but(epoch_images=20 * config.batch_size)  # twenty steps
    began = time.time()
    run = cs.train(config, cs.toy_faces(512, config.image_size), progress=False)
    r, memory = run.history[-1], torch.cuda.max_memory_allocated() / 1e9 if on_gpu else 0
    print(f"{name}: {time.time() - began:.0f} s, {r['images'] / r['seconds']:.1f} images/s, "
          f"{memory:.1f} GB, D {r['d_loss']:.3f}, G {r['g_loss']:.3f} {run.stopped}")"""


def stage(folder, user, smoke=False, notebook=ROOT / "gan_hw.ipynb", module=ROOT / "cspgan.py"):
    """Write notebook and metadata into folder."""
    book = nbformat.read(notebook, as_version=4)
    for cell in book.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    code = nbformat.v4.new_code_cell
    folded = {"_kg_hide-input": True, "jupyter": {"source_hidden": True}}
    source = "%%writefile cspgan.py\n" + module.read_text(encoding="utf-8")
    first = [code(source, id="module", metadata=folded)] + [code(SMALLEST, id="smallest")] * smoke
    book.cells = first + book.cells + [code(EVERY_KIND, id="every-kind")] * smoke
    folder.mkdir(parents=True, exist_ok=True)
    nbformat.write(book, folder / "gan_hw.ipynb")
    (folder / "kernel-metadata.json").write_text(json.dumps({
        "id": f"{user}/cspup-gan", "title": "CSPup GAN", "code_file": "gan_hw.ipynb",
        "language": "python", "kernel_type": "notebook", "is_private": True, "enable_gpu": True,
        "enable_internet": False, "machine_shape": "NvidiaTeslaT4",  # two of them
        "dataset_sources": ["jessicali9530/celeba-dataset"]}, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / "results/latest/kaggle")
    parser.add_argument("--user", default=os.environ.get("KAGGLE_USERNAME", "YOUR-KAGGLE-NAME"))
    parser.add_argument("--smoke", action="store_true", help="the smallest profile, and every kind")
    parser.add_argument("--push", action="store_true", help="send it with the kaggle command")
    options = parser.parse_args()
    stage(options.folder, options.user, options.smoke)
    push = ["kaggle", "kernels", "push", "-p", str(options.folder)]
    print(*push, f"\nkaggle kernels output {options.user}/cspup-gan -p {options.folder}")
    try:
        sys.exit(subprocess.call(push) if options.push else 0)
    except OSError as error:
        sys.exit(f"{error}: pip install kaggle, and an API token of kaggle.com/settings in "
                 "~/.kaggle/access_token")
