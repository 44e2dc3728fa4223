"""Make an executed notebook fit to be committed: run before it is, in place.

    python scripts/strip_real_images.py gan_hw.ipynb

Cells tagged `real-images` lose their outputs (CelebA may not be passed on), and every cell its
progress bars and timestamps. Large pictures get a palette of 256 colours, a third of their size.
"""
import base64, io, sys

import nbformat
from PIL import Image

WIDGET = "application/vnd.jupyter.widget-view+json"
for path in sys.argv[1:]:
    notebook = nbformat.read(path, as_version=4)
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if "real-images" in cell.metadata.get("tags", []):
            cell.outputs = []  # nbconvert's own tag remover would take the execution count as well
        elif cell.cell_type == "code":
            cell.outputs = [out for out in cell.outputs if WIDGET not in out.get("data", {})
                            and out.get("name") != "stderr"]
            for png in [out.data for out in cell.outputs if len(out.get("data", {}).get("image/png", "")) > 100_000]:
                picture, small = Image.open(io.BytesIO(base64.b64decode(png["image/png"]))), io.BytesIO()
                picture.convert("RGB").quantize(256).save(small, "PNG", optimize=True)
                png["image/png"] = base64.b64encode(small.getvalue()).decode()
    nbformat.write(notebook, path)
