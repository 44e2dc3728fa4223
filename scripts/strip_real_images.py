"""Make an executed notebook fit to be committed: run before it is, in place.

    python scripts/strip_real_images.py gan_hw.ipynb

Cells tagged `real-images` lose their outputs (CelebA may not be passed on), and every cell its
progress bars and timestamps. Large pictures get a palette of 256 colours, a third of their size.
"""

import base64
import io
import sys

import nbformat
from PIL import Image

WIDGET = "application/vnd.jupyter.widget-view+json"
PNG = "image/png"


def strip(path):
    notebook = nbformat.read(path, as_version=4)
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if "real-images" in cell.metadata.get("tags", []):
            cell.outputs = []  # nbconvert's own tag remover would take the execution count as well
        elif cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if not is_progress(output)]
            shrink_pictures(cell)
    nbformat.write(notebook, path)


def is_progress(output):
    """A widget, or what a progress bar wrote."""
    return WIDGET in output.get("data", {}) or output.get("name") == "stderr"


def shrink_pictures(cell):
    for output in cell.outputs:
        data = output.get("data", {})
        if len(data.get(PNG, "")) > 100_000:
            data[PNG] = with_palette(data[PNG])


def with_palette(png):
    """A picture in 256 colours; before and after in base64."""
    picture = Image.open(io.BytesIO(base64.b64decode(png)))
    small = io.BytesIO()
    # The usual quantizer turns a chart's few green points olive.
    picture = picture.convert("RGB").quantize(256, Image.Quantize.FASTOCTREE)
    picture.save(small, "PNG", optimize=True)
    return base64.b64encode(small.getvalue()).decode()


if __name__ == "__main__":
    for path in sys.argv[1:]:
        strip(path)
