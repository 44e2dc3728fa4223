"""What the report's section "Does it hold at the assignment's size?" rests on.

    python scripts/width_rule.py faces.zip      # a day on two cores; goes on where it was stopped

Fills results/width.json, {measurement: record}: `converged` by exponent, width and rate; its first
steps at widths up to the assignment's own; how far its layers move in 1 and 4 steps; the course's
recipes by width. Draws results/figures/width.png of it, and leaves what the report says of it
under "summary". Without faces.zip it only draws."""
import functools, json, os, sys, time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from matplotlib.figure import Figure

sys.path.insert(0, str(ROOT := Path(__file__).parents[1]))
import cspgan as cs

FILE = ROOT / "results" / "width.json"
BASE = cs.CONVERGED.but(image_size=32, lr_width=64, batch_size=64, epoch_images=12_800)
ADAM = cs.adam

def faces(source, size):
    return cs.hold_out(cs.load_faces(source, size))

def final(source, width, power, seed, mult=1.0, size=32):
    """64,000 images at 32 px, measured like the report's runs."""
    cs.adam = functools.partial(ADAM, power=power)
    rates = {"lr_g": mult * BASE.lr_g, "lr_d": mult * BASE.lr_d}
    config = BASE.but(image_size=size, width=width, seed=seed, **rates)
    images, held_out = faces(source, size)
    run = cs.train(config, images, progress=False)
    return cs.evaluate(run, held_out, cs.reference(held_out, images, 900))

def larger(source, width, power, seed):
    """The same at 64 px, where SWD is further from its floor."""
    return final(source, width, power, seed, size=64)

def loud(source, width, power, seed, mult=1.0):
    """The same with G's last layer at He's own scale, four times that of `converged`: so the
    exponents were compared, before the smaller scale was found to be better."""
    make = cs.Generator.__init__

    def at_full_scale(self, config):
        make(self, config)
        self.to_rgb[0].weight.data *= 4

    with patch.object(cs.Generator, "__init__", at_full_scale):
        return final(source, width, power, seed, mult)

def course(source, name, width, seed):
    """A recipe of the course at another width, half its batch, its rates as they were written."""
    preset = cs.PRESETS[name]
    config = preset.but(image_size=32, width=width, batch_size=preset.batch_size // 2, seed=seed,
                        epochs=5, epoch_images=12_800)
    images, held_out = faces(source, 32)
    run = cs.train(config, images, progress=False)
    return {"preset": name, **cs.evaluate(run, held_out, cs.reference(held_out, images, 900))}

def first(source, size, width, power, steps):
    """The first steps of batch 8: losses, penalty, D's largest activation, saturated pixels."""
    cs.adam = functools.partial(ADAM, power=power)
    config = BASE.but(image_size=size, width=width, batch_size=8, epoch_images=25_600)
    training = cs.Training(config, faces(source, size)[0], torch.device("cpu"))
    seen, rows, began = {"d": 0.0, "saturated": 0.0}, [], time.monotonic()
    for layer in training.discriminator.modules():
        if isinstance(layer, torch.nn.Conv2d):
            layer.register_forward_hook(
                lambda m, i, y: seen.update(d=max(seen["d"], y.detach().abs().max().item())))
    training.generator.register_forward_hook(
        lambda m, i, y: seen.update(saturated=(y.detach().abs() > 0.99).float().mean().item()))
    for _ in range(steps):
        seen["d"] = 0.0
        training.advance()
        record = training.record()
        rows.append({key: record[key] for key in ("step", "d_loss", "g_loss", "penalty")})
        rows[-1] |= {"largest_d": seen["d"], "saturated": seen["saturated"]}
    return {"image_size": size, "width": width, "power": power, "batch_size": 8, "steps": rows,
            "seconds": time.monotonic() - began, **training.environment}

def layers(source, width, rule, seed):
    """{steps: {layer: mean absolute change of its output}}, 32 px, batch 16; rule: 1 or 0."""
    cs.adam = ADAM
    config = BASE.but(width=width, seed=seed, batch_size=16, lr_width=64 * rule)
    images, outputs, found = faces(source, 32)[0], {}, {}
    training = cs.Training(config, images, torch.device("cpu"))
    z = torch.randn(16, config.z_dim, generator=torch.Generator().manual_seed(1))
    inputs = [("G", training.generator, z),
              ("D", training.discriminator, cs.to_network(images[-16:], config))]
    for kind, network, _ in inputs:
        for name, layer in network.named_modules():
            if isinstance(layer, (torch.nn.Conv2d, torch.nn.ConvTranspose2d)):
                layer.register_forward_hook(
                    lambda m, i, y, key=f"{kind} {name}": outputs.update({key: y.detach().clone()}))

    @torch.no_grad()
    def look():
        for _, network, x in inputs:
            network.train()(x)
        return dict(outputs)

    before = look()
    for step in range(1, 5):
        training.advance()
        if step in (1, 4):
            found[step] = {k: (y - before[k]).abs().mean().item() for k, y in look().items()}
    return found

JOBS = {f"{job.__name__} {' '.join(map(str, args))}": (job, args) for job, args in [
    *((layers, (w, rule, seed)) for rule in (1, 0) for w in (32, 64, 128, 256, 512) for seed in (0, 1)),
    (first, (32, 1024, 0, 15)), (first, (32, 1024, 0.5, 60)), (first, (32, 1024, 1, 300)),
    (first, (128, 1024, 1, 60)),
    *((job, (w, a, seed)) for w, seeds in ((64, 3), (128, 3), (256, 2)) for seed in range(seeds)
      for job, a in ((final, 1), (loud, 1), (loud, 0.5), (loud, 0)) if w > 64 or a == 1),
    *((loud, (256, 1, 0, mult)) for mult in (0.5, 2.0)),
    *((larger, (w, 1, seed)) for w, seeds in ((64, 2), (128, 2), (256, 1)) for seed in range(seeds)),
    *((course, (name, w, 0)) for w in (64, 128, 256)
      for name in ("baseline", "h1_bn_leaky", "h3_smooth_tanh", "slow_d", "dcgan"))]}

def do(name, source):
    torch.set_num_threads(1)
    job, args = JOBS[name]
    return job(source, *args)

def measured(found, kind):
    """{arguments: record} of one kind of measurement."""
    keys = [key for key in found if key.split()[0] == kind]
    return {tuple(map(float, key.split()[1:])): found[key] for key in keys}

def draw(found):
    """How far layers move, SWD by width, D's largest activation, in one row. Returns the summary."""
    moves, trained = {}, {}  # {(rule, layer): {width: changes}}, {(kind, a, width): SWDs}
    for (width, rule, _), record in measured(found, "layers").items():
        for layer, change in record["4"].items():
            moves.setdefault((rule, layer), {}).setdefault(width, []).append(change)
    for kind in ("final", "larger", "loud"):
        for (width, a, _, *faster), record in measured(found, kind).items():
            if not faster:
                trained.setdefault((kind, a, width), []).append(record["swd"]["avg"])
    moves = {key: {w: np.mean(x) for w, x in sorted(line.items())} for key, line in moves.items()}
    slopes = {key: np.polyfit(*np.log([*line.items()]).T, 1)[0] for key, line in moves.items()}
    fixed = "G stem.left.0", "G stem.right.0", "G stem.right.3", "D features.0"  # read z or pixels
    grow = [layer for rule, layer in slopes if not rule and layer not in fixed]
    left, middle, right = (figure := Figure((10, 3.4), layout="constrained")).subplots(1, 3)
    for (rule, layer), line in moves.items():
        if layer in grow:
            left.plot(line.keys(), np.divide([*line.values()], line[32]), "C0" if rule else "C3", lw=1,
                      label={grow[0]: "with the rule" if rule else "literal rates"}.get(layer))
    for kind, a, style, label in (("larger", 1, "C2o-", "64 px"), ("final", 1, "C4o-", "32 px"),
            ("loud", 1, "C0o:", "a = 1"), ("loud", 0.5, "C1o:", "a = 0.5"), ("loud", 0, "C3o:", "a = 0")):
        line = {w: np.mean(x) for (k, b, w), x in trained.items() if k == kind and (b == a or w == 64)}
        middle.plot(sorted(line), [line[w] for w in sorted(line)], style, ms=4, label=label)
    peaks = {}
    for (side, _, a, _), record in measured(found, "first").items():
        largest = [step["largest_d"] for step in record["steps"]]
        peaks[f"{side:.0f} px, a = {a:g}"], drawn = max(largest), largest[:60]
        right.plot(drawn, {1: "C0", 0.5: "C1", 0: "C3"}[a], lw=1, ls="-" if side > 32 else ":",
                   label=f"a = {a:g}, {side:.0f} px, {len(drawn)} steps")
    for ax, ticks in ((left, (32, 64, 128, 256, 512)), (middle, (64, 128, 256))):
        ax.set_xscale("log", base=2), ax.set(xlabel="width", xticks=ticks, xticklabels=ticks)
    left.set(title="change in 4 steps, relative to width 32", yscale="log", yticks=(0.5, 1, 2, 4, 8))
    left.yaxis.set_major_formatter("{x:g}"), left.yaxis.set_minor_formatter("")
    middle.set(title="SWD x1e3 after 64,000 images", ylim=(0, None))
    right.set(title="largest activation of D", xlabel="steps of 8 images at width 1024", yscale="log")
    [ax.legend(fontsize=7.5) for ax in (left, middle, right)]
    figure.savefig(ROOT / "results/figures/width.png", dpi=110)
    swd = {kind: {f"{w:.0f}": x for (k, a, w), x in sorted(trained.items()) if k == kind and a == 1}
           for kind in ("larger", "final")}
    return {"least_slope_literal": min(slopes[0, layer] for layer in grow), "largest_d": peaks,
            "greatest_slope_rule": max(slopes[1, layer] for layer in grow),
            "swd_64px": swd["larger"], "swd_32px": swd["final"]}

def draw_course(found):
    """SWD and diversity by width: `converged` and what of the course's recipes has been measured."""
    lines = {"converged": {w: r for (w, a, seed), r in measured(found, "final").items() if (a, seed) == (1, 0)}}
    for key in [key for key in found if key.startswith("course")]:
        lines.setdefault(found[key]["preset"], {})[found[key]["width"]] = found[key]
    left, right = (figure := Figure((10, 3.4), layout="constrained")).subplots(1, 2)
    for name, line in lines.items():
        widths = sorted(line)
        left.plot(widths, [line[w]["swd"]["avg"] for w in widths], "o-", ms=4, label=name)
        right.plot(widths, [line[w]["diversity"] for w in widths], "o-", ms=4)
    for ax in (left, right):
        ax.set_xscale("log", base=2), ax.set(xlabel="width", xticks=widths, xticklabels=widths)
    floor = lines["converged"][64]["swd_floor"]["avg"]
    left.axhline(floor, color="grey", ls="--", lw=1, label="real faces")
    ticks = (10, 20, 50, 100, 200, 500)
    left.set(yscale="log", yticks=ticks, yticklabels=ticks, title="SWD x1e3 after 64,000 images, 32 px")
    left.yaxis.set_minor_formatter("")
    right.set(title="diversity, real faces: 1", ylim=(0, None))
    figure.legend(loc="outside right center", fontsize=8, frameon=False)
    if len(lines) > 1:  # of one recipe alone there is nothing to compare
        figure.savefig(ROOT / "results/figures/width_course.png", dpi=110)

if __name__ == "__main__":
    found = json.loads(FILE.read_text()) if FILE.exists() else {}
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        left = [name for name in JOBS if name not in found and len(sys.argv) > 1]
        jobs = {pool.submit(do, name, sys.argv[1]): name for name in left}
        for job in as_completed(jobs):
            found[jobs[job]] = job.result()
            text = json.dumps(dict(sorted(found.items())), indent=0)
            cs.write_aside(FILE, lambda file: file.write(text.encode()))
            print(time.strftime("%H:%M"), jobs[job], flush=True)
    found["summary"] = draw(found)
    draw_course(found)
    FILE.write_text(json.dumps(dict(sorted(found.items())), indent=0))
