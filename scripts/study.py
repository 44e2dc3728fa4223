"""The runs of the committed report, a few hours at a time.

    python scripts/study.py faces.zip 2.5 baseline/seed0 converged/seed1   # hours, runs; or all of them

Trains what is not finished, as the notebook does in its profile `study`, in results/latest/. A
checkpoint is too large for a repository, so a finished run is packed beside it: without D and
Adam, weights rounded to bfloat16 (a pixel moves by two grey levels at most). Such a file stands in
for the run where its checkpoint is missing: the notebook loads it like any other."""
import json, lzma, os, sys
from pathlib import Path

import torch

sys.path.insert(0, str(ROOT := Path(__file__).parents[1]))
RESULTS, PACKED = ROOT / "results/latest", ROOT / "results/packed"

def unpack():
    for file in sorted(PACKED.glob("*/*.xz")):
        path = RESULTS / "runs" / file.parent.name / file.stem / "run.pt"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(lzma.decompress(file.read_bytes()))

def pack(folder):
    file = PACKED / folder.parent.name / f"{folder.name}.xz"
    state = torch.load(folder / "run.pt", map_location="cpu", weights_only=True)
    finished = state["step"] >= state["identity"]["epochs"] * state["epoch_steps"]
    if file.exists() or not finished:
        return
    for name in ("generator", "discriminator", "opt_g", "opt_d"):
        state.pop(name, None)
    state["kept"] = {k: v.bfloat16() if v.is_floating_point() else v for k, v in state["kept"].items()}
    state["snapshots"] = state["snapshots"] if "converged_20" in str(folder) else state["snapshots"][-1:]
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, folder / "packed.pt")
    file.write_bytes(lzma.compress((folder / "packed.pt").read_bytes(), preset=9))

if __name__ == "__main__":
    os.environ |= {"CSPGAN_PROFILE": "study", "CSPGAN_DATA": sys.argv[1], "CSPGAN_RESULTS": str(RESULTS)}
    cells = json.loads((ROOT / "gan_hw.ipynb").read_text())["cells"]
    for cell in [cell for cell in cells if cell["id"] in ("c04", "c05", "c06", "c07", "c08")]:
        exec("".join(cell["source"]), there := globals())  # jobs, folder, source, profile, cs
    unpack()
    wanted = sys.argv[3:] or [f"{name}/seed{seed}" for _, name, seed in there["jobs"]]
    todo = {f"{name}/seed{seed}": (job, there["folder"](name, seed, at))
            for (at, name, seed), job in there["jobs"].items()}
    try:
        there["cs"].train_all([todo[name] for name in wanted], there["source"],
                              there["profile"]["measured_on"], float(sys.argv[2]))
    finally:
        for path in RESULTS.glob("runs/*/*/run.pt"):
            pack(path.parent)
