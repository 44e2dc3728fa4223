"""128 px and width 1024, the assignment's own size: `converged`, a course recipe, the control.

    python scripts/full_size.py faces.zip   # on a GPU: minutes on an H100, by count three hours on a T4

Trains each of them for 512,000 images, in results/latest/full_size/, and goes on where it was
stopped. Leaves results/full_size.json, {name: config, environment, history, swd}, with the floor
and the distances to the nearest training faces, pictures of `converged` in results/figures/, and
its generator, made small, in results/generators/converged/."""
import io, json, sys, zlib
from pathlib import Path

import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import nn
from torchvision.utils import make_grid

sys.path.insert(0, str(ROOT := Path(__file__).parents[1]))
import cspgan as cs

NAMES = ("converged", "h3_smooth_tanh", "dcgan")  # h3: the best of the course's at 64 px
FIGURES = ROOT / "results" / "figures"

def picture(images, columns):
    grid = make_grid(images, columns, padding=1, pad_value=255)          # (3, H, W)
    return Image.fromarray(grid.permute(1, 2, 0).numpy())

@torch.no_grad()
def pictures(run):
    """Sixty samples, four walks between noise vectors along an arc, and the film of the training."""
    picture(cs.sample(run, 60, seed=1), 12).save(FIGURES / "full_size.jpg", quality=90)
    ends = torch.randn(4, 2, run.config.z_dim, generator=torch.Generator().manual_seed(1))
    angle = torch.linspace(0, torch.pi / 2, 12).view(1, 12, 1)
    z = (ends[:, :1] * angle.cos() + ends[:, 1:] * angle.sin()).flatten(0, 1)  # (48, z_dim)
    made = run.generator.eval()(z.to(next(run.generator.parameters()).device)).cpu()
    walks = cs.to_uint8(made, run.config)                                # (48, 3, 128, 128)
    picture(walks, 12).save(FIGURES / "full_size_walks.jpg", quality=90)
    film = [picture(images[:16], 8).quantize(96) for _, images in run.snapshots]
    film[0].save(FIGURES / "full_size_film.gif", save_all=True, append_images=film[1:], loop=0,
                 duration=[300] * (len(film) - 1) + [3000])  # milliseconds

def curves(found):
    """SWD by images seen, a line for each recipe."""
    ax = (figure := Figure(figsize=(10, 3), layout="constrained")).subplots()
    for name in NAMES:
        line = [r for r in found[name]["history"] if "swd" in r]
        ax.plot([r["images"] / 1000 for r in line], [r["swd"] for r in line], "o-", ms=3, lw=1, label=name)
    ax.axhline(found["floor"]["swd_floor"]["avg"], color="grey", ls="--", lw=1, label="real faces")
    ax.set(title="SWD x1e3 at 128 px and width 1024", xlabel="thousand images seen", yscale="log")
    ax.legend(fontsize=8)
    figure.savefig(FIGURES / "full_size_swd.png", dpi=90)

def nearest(samples, held_out, images):
    """How far the nearest training face is, of samples and of held-out faces: [mean, lowest]."""
    found = {"samples": cs.nearest(samples, images)[0], "held_out": cs.nearest(held_out, images)[0]}
    return {name: [round(d.mean().item(), 4), round(d.min().item(), 4)] for name, d in found.items()}

def shrink(run, folder):
    """A run.pt.gz for `load_run`: weights as whole steps of a part of their output channel's RMS."""
    kept = {k: v.half() if v.is_floating_point() else v for k, v in run.generator.cpu().state_dict().items()}
    for name, layer in run.generator.named_modules():
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)) and layer.weight.numel() > 20_000:
            w, others = layer.weight.detach(), (0 if isinstance(layer, nn.ConvTranspose2d) else 1, 2, 3)
            step = 0.32 if w.numel() > 1_200_000 else 0.10  # most of the file; what the rest needs
            scale = step * w.square().mean(others, keepdim=True).sqrt()
            kept[f"{name}.weight"] = (w / scale).round().clamp(-127, 127).to(torch.int8), scale
    torch.save({"identity": vars(run.config), "history": run.history, "snapshots": [],
                "environment": run.environment, "kept": kept}, buffer := io.BytesIO())
    coder = zlib.compressobj(9, zlib.DEFLATED, 31, 9, zlib.Z_HUFFMAN_ONLY)  # gzip; nothing repeats
    (folder / "run.pt.gz").write_bytes(coder.compress(buffer.getvalue()) + coder.flush())
    (folder / "config.json").write_text(json.dumps(vars(run.config), indent=1))

if __name__ == "__main__":
    images, held_out = cs.hold_out(cs.load_faces(sys.argv[1], 128))
    found = {"floor": cs.reference(held_out, images)}
    n = found["floor"]["measured_on"]  # 1024, or all that are held out
    for name in NAMES:
        config = cs.PRESETS[name].but(epochs=20, epoch_images=25_600)
        run = cs.train(config, images, ROOT / "results/latest/full_size" / name,
                       on_epoch=cs.watch(held_out, n))
        found[name] = {"config": vars(config), "environment": run.environment,
                       "history": [{k: round(v, 4) for k, v in r.items()} for r in run.history],
                       "swd": cs.sliced_wasserstein(cs.pick(held_out, n), cs.sample(run, n))}
    run = cs.load_run(ROOT / "results/latest/full_size/converged")
    pictures(run), curves(found)
    found["nearest"] = nearest(cs.sample(run, n), cs.pick(held_out, n), images)
    shrink(run, folder := ROOT / "results/generators/converged")
    small = cs.sample(cs.load_run(folder), n)
    found["converged"]["swd_rounded"] = cs.sliced_wasserstein(cs.pick(held_out, n), small)
    (ROOT / "results/full_size.json").write_text(json.dumps(found, indent=0).replace("NaN", "null"))
