"""Empty the outputs of all cells tagged `real-images`: run before a notebook made with CelebA is committed.

    python scripts/strip_real_images.py gan_hw.ipynb
"""

import sys

import nbformat

for path in sys.argv[1:]:
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if "real-images" in cell.metadata.get("tags", []):
            cell.outputs = []  # nbconvert's own tag remover would take the execution count as well
    nbformat.write(notebook, path)
