"""What the report's section "The assignment's own size" rests on, and its appendix.

    python scripts/width_rule.py faces.zip      # a day on two cores; goes on where it was stopped

Fills results/width.json, {measurement: record}: `converged` by exponent, width and rate; its first
steps at widths up to the assignment's own; how far its layers move in 1 and 4 steps; the course's
recipes by width. Draws results/figures/width.png of it, and leaves what the report says of it
under "summary". Without faces.zip it only draws.
"""

import json
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import cspgan as cs  # noqa: E402

FILE = ROOT / "results" / "width.json"
FIGURES = ROOT / "results" / "figures"
BASE = cs.CONVERGED.but(image_size=32, lr_width=64, batch_size=64, epoch_images=12_800)
COURSE = ("baseline", "h1_bn_leaky", "h3_smooth_tanh", "slow_d", "dcgan")
CPU = torch.device("cpu")
MEASURED_ON = 900  # held-out images, as many as the report's runs


# --------------------------------------------------------------------------------- the measurements


def rates_by(power):
    """A context in which the width rule's exponent is `power`, not 1.

    A layer whose fan-in grows with the width then has the rate lr * (lr_width / width)^power.
    """
    by_the_rule = cs.adam

    def adam(network, config, lr):
        optimizer = by_the_rule(network, config, lr)
        _, scaled = optimizer.param_groups
        scaled["full_lr"] = lr * (config.lr_width / config.width) ** power
        return optimizer

    return patch.object(cs, "adam", adam)


def final(source, width, power, seed, faster=1.0, size=32):
    """64,000 images at 32 px, measured like the report's runs. faster: times both rates."""
    rates = {"lr_g": faster * BASE.lr_g, "lr_d": faster * BASE.lr_d}
    config = BASE.but(image_size=size, width=width, seed=seed, **rates)
    faces, held_out = cs.load_faces(source, size)
    with rates_by(power):
        run = cs.train(config, faces, progress=False)
    return cs.evaluate(run, held_out, faces, MEASURED_ON)


def larger(source, width, power, seed):
    """The same at 64 px, where SWD is further from its floor."""
    return final(source, width, power, seed, size=64)


def loud(source, width, power, seed, faster=1.0):
    """The same with G's last layer at He's own scale, four times that of `converged`.

    So the exponents were compared, before the smaller scale was found to be better.
    """
    make_quiet = cs.make_generator

    def make_loud(config):
        generator = make_quiet(config)
        generator.to_rgb[0].weight.data.mul_(4)
        return generator

    with patch.object(cs, "make_generator", make_loud):
        return final(source, width, power, seed, faster)


def course(source, name, width, seed):
    """A recipe of the course at another width, half its batch, its rates as they were written."""
    preset = cs.PRESETS[name]
    config = preset.but(image_size=32, width=width, seed=seed, epochs=5, epoch_images=12_800)
    config = config.but(batch_size=preset.batch_size // 2)
    faces, held_out = cs.load_faces(source, 32)
    run = cs.train(config, faces, progress=False)
    return {"preset": name, **cs.evaluate(run, held_out, faces, MEASURED_ON)}


def first(source, size, width, power, steps):
    """The first steps of batch 8: losses, penalty, D's largest activation, saturated pixels."""
    config = BASE.but(image_size=size, width=width, batch_size=8, epoch_images=25_600)
    faces, _ = cs.load_faces(source, size)
    with rates_by(power):
        training = cs.Training(config, faces, CPU)
    seen = watch_activations(training)
    began = time.monotonic()
    rows = []
    for _ in range(steps):
        seen["largest_d"] = 0.0
        training.advance()
        training.record()
        last = training.run.history[-1]
        row = {key: last[key] for key in ("step", "d_loss", "g_loss", "penalty")}
        rows.append({**row, **seen})
    return {
        "image_size": size,
        "width": width,
        "power": power,
        "batch_size": 8,
        "steps": rows,
        "seconds": time.monotonic() - began,
        **training.run.environment,
    }


def watch_activations(training):
    """Numbers that change with every step: D's largest since it was set to 0, G's share near 1."""
    seen = {"largest_d": 0.0, "saturated": 0.0}

    def note_largest(layer, inputs, output):
        largest = output.detach().abs().max().item()
        seen["largest_d"] = max(seen["largest_d"], largest)

    def note_saturated(generator, inputs, images):
        is_saturated = images.detach().abs() > 0.99
        seen["saturated"] = is_saturated.float().mean().item()

    for layer in training.discriminator.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(note_largest)
    training.generator.register_forward_hook(note_saturated)
    return seen


def layers(source, width, rule, seed):
    """{steps: {layer: mean absolute change of its output}}, 32 px, batch 16; rule: 1 or 0."""
    config = BASE.but(width=width, seed=seed, batch_size=16, lr_width=64 * rule)
    faces, _ = cs.load_faces(source, 32)
    training = cs.Training(config, faces, CPU)
    random = torch.Generator().manual_seed(1)
    z = torch.randn(16, config.z_dim, generator=random)
    images = cs.to_network(faces[-16:], config)
    before = outputs_of_all(training, z, images)
    found = {}
    for step in range(1, 5):
        training.advance()
        if step in (1, 4):
            after = outputs_of_all(training, z, images)
            found[step] = changes(before, after)
    return found


def outputs_of_all(training, z, images):
    """{layer: output} of G at z and of D at images."""
    of_g = outputs(training.generator, z)
    of_d = outputs(training.discriminator, images)
    named_g = {f"G {name}": output for name, output in of_g.items()}
    named_d = {f"D {name}": output for name, output in of_d.items()}
    return {**named_g, **named_d}


@torch.no_grad()
def outputs(network, x):
    """{layer: output} of a network's convolutions and deconvolutions at x."""
    found = {}
    hooks = []
    for name, layer in network.named_modules():
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
            hooks.append(layer.register_forward_hook(keep_output(found, name)))
    network.train()(x)
    for hook in hooks:
        hook.remove()
    return found


def keep_output(found, name):
    def keep(layer, inputs, output):
        found[name] = output.clone()

    return keep


def changes(before, after):
    """{layer: mean absolute change}."""
    found = {}
    for name, output in after.items():
        found[name] = (output - before[name]).abs().mean().item()
    return found


def plan():
    """[(measurement, its arguments but for the source)]."""
    jobs = []
    for rule in (1, 0):
        for width in (32, 64, 128, 256, 512):
            jobs += [(layers, (width, rule, seed)) for seed in (0, 1)]
    jobs.append((first, (32, 1024, 0, 15)))
    jobs.append((first, (32, 1024, 0.5, 60)))
    jobs.append((first, (32, 1024, 1, 300)))
    jobs.append((first, (128, 1024, 1, 60)))
    for width, seeds in ((64, 3), (128, 3), (256, 2)):
        for seed in range(seeds):
            jobs.append((final, (width, 1, seed)))
            jobs.append((loud, (width, 1, seed)))
            if width > 64:  # at 64 all exponents are the same
                jobs.append((loud, (width, 0.5, seed)))
                jobs.append((loud, (width, 0, seed)))
    jobs.append((loud, (256, 1, 0, 0.5)))
    jobs.append((loud, (256, 1, 0, 2.0)))
    for width, seeds in ((64, 2), (128, 2), (256, 1)):
        jobs += [(larger, (width, 1, seed)) for seed in range(seeds)]
    for width in (64, 128, 256):
        jobs += [(course, (name, width, 0)) for name in COURSE]
    return jobs


def name_of(job, arguments):
    """As "final 128 1 0", the key of its record."""
    return " ".join([job.__name__, *map(str, arguments)])


def do(job, source, arguments):
    torch.set_num_threads(1)
    return job(source, *arguments)


def measure_what_is_missing(found, source):
    """A process for each core. Each record is filed when it is there."""
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        names = {}
        for job, arguments in plan():
            name = name_of(job, arguments)
            if name not in found:
                names[pool.submit(do, job, source, arguments)] = name
        for future in as_completed(names):
            name = names[future]
            found[name] = future.result()
            save(found)
            print(time.strftime("%H:%M"), name, flush=True)


def save(found):
    text = json.dumps(dict(sorted(found.items())), indent=0)
    part = FILE.with_name(f"{FILE.name}.part")
    part.write_text(text)
    part.replace(FILE)  # whoever stops it now leaves the old file or the new, never half


# -------------------------------------------------------------------------------------- the figures


def records_of(found, kind):
    """{arguments: record} of one measurement whose arguments are numbers."""
    records = {}
    for key, record in found.items():
        name, *arguments = key.split()
        if name == kind:
            records[tuple(map(float, arguments))] = record
    return records


def draw(found):
    """How far layers move, D's largest activation, SWD by width, stacked. Returns the summary."""
    moves = layer_moves(found)
    growing = growing_layers(moves)
    trained = trained_swd(found)
    peaks = largest_activations(found)
    figure = Figure((6, 4.4), layout="constrained")
    top, middle, bottom = figure.subplots(3, 1)
    draw_moves(top, moves, growing)
    draw_first_steps(middle, peaks)
    draw_widths(bottom, trained)
    for ax in (top, middle, bottom):
        ax.legend(fontsize=9, loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    figure.savefig(FIGURES / "width.png", dpi=100)
    with_rule = [slope(moves[1, layer]) for layer in growing]
    literal = [slope(moves[0, layer]) for layer in growing]
    return {
        "least_slope_literal": min(literal),
        "largest_d": {f"{size:.0f} px, a = {a:g}": max(line) for (size, a), line in peaks.items()},
        "greatest_slope_rule": max(with_rule),
        "swd_64px": swd_by_width(trained, "larger"),
        "swd_32px": swd_by_width(trained, "final"),
    }


def layer_moves(found):
    """{(rule, layer): {width: change in four steps, mean over seeds}}."""
    moves = {}
    for (width, rule, _), record in records_of(found, "layers").items():
        for layer, change in record["4"].items():
            line = moves.setdefault((rule, layer), {})
            line.setdefault(width, []).append(change)
    means = {}
    for key, line in moves.items():
        means[key] = {width: np.mean(line[width]) for width in sorted(line)}
    return means


def growing_layers(moves):
    """Those whose fan-in grows with the width."""
    fixed = ("G stem.left.0", "G stem.right.0", "G stem.right.3", "D features.0")  # read z or RGB
    return [layer for rule, layer in moves if rule == 0 and layer not in fixed]


def slope(line):
    """The exponent of a power of the width."""
    widths = np.log(list(line))
    changes = np.log(list(line.values()))
    return np.polyfit(widths, changes, 1)[0]


def trained_swd(found):
    """{(measurement, exponent, width): SWD of each seed}, at the rates of `converged`."""
    trained = {}
    for kind in ("final", "larger", "loud"):
        for (width, power, _, *faster), record in records_of(found, kind).items():
            if not faster:
                seeds = trained.setdefault((kind, power, width), [])
                seeds.append(record["swd"]["avg"])
    return trained


def swd_by_width(trained, kind):
    """{width: SWD of each seed} where the exponent is 1."""
    found = {}
    for (its_kind, power, width), swd in sorted(trained.items()):
        if its_kind == kind and power == 1:
            found[f"{width:.0f}"] = swd
    return found


def largest_activations(found):
    """{(size, exponent): D's largest activation in each of the first steps}."""
    lines = {}
    for (size, _, power, _), record in records_of(found, "first").items():
        lines[size, power] = [step["largest_d"] for step in record["steps"]]
    return lines


def draw_moves(ax, moves, growing):
    labels = {1: "a = 1, the rule", 0: "a = 0, literal rates"}
    colors = {1: "C0", 0: "C3"}
    for (rule, layer), line in moves.items():
        if layer not in growing:
            continue
        label = labels[rule] if layer == growing[0] else None  # one for all lines of a colour
        relative = [change / line[32] for change in line.values()]
        ax.plot(list(line), relative, colors[rule], lw=1, label=label)
    widths_below(ax, (32, 64, 128, 256, 512))
    ax.set_title("how far each layer moves, over that at width 32")
    ax.set(yscale="log", yticks=(0.5, 1, 2, 4, 8))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter("")


def draw_widths(ax, trained):
    lines = (
        ("larger", 1, "C0o-", "a = 1, 64 px"),
        ("final", 1, "C0s--", "a = 1, 32 px"),
        ("loud", 1, "C0.:", "a = 1, 32 px trials"),
        ("loud", 0.5, "C1.:", "a = 0.5, 32 px trials"),
        ("loud", 0, "C3.:", "a = 0, 32 px trials"),
    )
    for kind, power, style, label in lines:
        line = {}
        for (its_kind, its_power, width), swd in trained.items():
            is_alike = its_power == power or width == 64  # at 64 all exponents are the same
            if its_kind == kind and is_alike:
                line[width] = np.mean(swd)
        widths = sorted(line)
        ax.plot(widths, [line[width] for width in widths], style, ms=4, label=label)
    widths_below(ax, (64, 128, 256))
    ax.set(title="SWD x1e3 after 64,000 images", ylim=(0, 40))


def draw_first_steps(ax, peaks):
    colors = {1: "C0", 0.5: "C1", 0: "C3"}
    for (size, power), line in peaks.items():
        drawn = line[:60]
        style = "-" if size > 32 else ":"
        label = f"a = {power:g}, {size:.0f} px"
        ax.plot(drawn, colors[power], lw=1, ls=style, label=label)
    ax.set(title="largest activation of D", xlabel="steps of 8 images at width 1024", yscale="log")


def widths_below(ax, widths):
    ax.set_xscale("log", base=2)
    ax.set(xlabel="width", xticks=widths, xticklabels=widths)


def draw_course(found):
    """SWD and diversity by width: `converged`, and what is measured of the course's recipes."""
    lines = course_lines(found)
    figure = Figure((10, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, line in lines.items():
        widths = sorted(line)
        swd = [line[width]["swd"]["avg"] for width in widths]
        diversity = [line[width]["diversity"] for width in widths]
        left.plot(widths, swd, "o-", ms=4, label=name)
        right.plot(widths, diversity, "o-", ms=4)
    for ax in (left, right):
        widths_below(ax, (64, 128, 256))
    floor = lines["converged"][64]["swd_floor"]["avg"]
    left.axhline(floor, color="grey", ls="--", lw=1, label="real faces")
    ticks = (10, 20, 50, 100, 200, 500)
    left.set(yscale="log", yticks=ticks, yticklabels=ticks)
    left.set(title="SWD x1e3 after 64,000 images, 32 px")
    left.yaxis.set_minor_formatter("")
    right.set(title="diversity, real faces: 1", ylim=(0, None))
    figure.legend(loc="outside right center", fontsize=8, frameon=False)
    if len(lines) > 1:  # of one recipe alone there is nothing to compare
        figure.savefig(FIGURES / "width_course.png", dpi=110)


def course_lines(found):
    """{recipe: {width: record}}, of one seed each."""
    lines = {"converged": {}}
    for (width, power, seed), record in records_of(found, "final").items():
        if (power, seed) == (1, 0):
            lines["converged"][width] = record
    for key, record in found.items():
        if key.startswith("course"):
            line = lines.setdefault(record["preset"], {})
            line[record["width"]] = record
    return lines


def main():
    found = json.loads(FILE.read_text()) if FILE.exists() else {}
    if len(sys.argv) > 1:
        measure_what_is_missing(found, sys.argv[1])
    found["summary"] = draw(found)
    draw_course(found)
    save(found)


if __name__ == "__main__":
    main()
