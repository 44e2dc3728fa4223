"""Faster by other means, the same training: speed settings, linear penalties, graphs, accumulation, several processes, memory."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import cspgan as cs

CPU = torch.device("cpu")


@pytest.fixture
def converged(tiny):
    return cs.CONVERGED.but(image_size=16, width=16, z_dim=8, batch_size=16, epochs=1, epoch_images=128)


def weights(*networks):
    return [value.clone() for network in networks for value in network.state_dict().values()]


def near(a, b, rtol=1e-4, atol=1e-5):
    return all(torch.allclose(x.float(), y.float(), rtol=rtol, atol=atol) for x, y in zip(a, b, strict=True))


def answers(training):
    """What the networks do: biases that BatchNorm or the relativistic loss cancel are moved by rounding alone."""
    with torch.no_grad():
        z = torch.randn(16, training.config.z_dim, generator=torch.Generator().manual_seed(1))
        fake = training.generator.train()(z)
        logits = training.discriminator(fake)
    return [fake, logits - logits.mean(), training.sums[[0, 3, 4]], (training.sums[1] - training.sums[2])[None]]


def after(config, images, steps, hook=lambda training: None):
    """A training after some steps."""
    training = cs.Training(config, images, CPU)
    hook(training)
    for _ in range(steps):
        training.advance()
    return training


# ---- settings


def test_auto_on_a_cpu_and_nothing_left_to_choose(converged):
    chosen = cs.on_hardware(converged, CPU)
    assert (chosen.precision, chosen.layout, chosen.penalties, chosen.adam, chosen.graph, chosen.memory) == (
        "float32", "channels_last", "linear", "fused", "off", "keep")
    for config in (cs.BASELINE, converged.but(d_norm=True)):
        assert cs.on_hardware(config, CPU).penalties == "double_backward"
    plain = converged.but(**cs.PLAIN)
    assert cs.on_hardware(plain, CPU) == plain  # what is turned off stays off


@pytest.mark.parametrize("capability, precision, layout, graph", [
    ((9, 0), "bfloat16", "channels_last", "on"), ((8, 0), "bfloat16", "channels_last", "on"),
    ((7, 5), "float16", "channels_last", "off")])
def test_auto_on_gpus(converged, monkeypatch, capability, precision, layout, graph):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    gpu = torch.device("cuda")
    chosen = cs.on_hardware(converged, gpu)
    assert (chosen.precision, chosen.layout, chosen.graph, chosen.adam) == (precision, layout, graph, "fused")
    assert cs.on_hardware(converged.but(d_every=2), gpu).graph == cs.on_hardware(converged.but(accumulate=2), gpu).graph == "off"
    assert cs.on_hardware(converged.but(precision="float32"), gpu).layout == "contiguous"
    monkeypatch.setattr(cs, "processes", lambda: 2)
    assert cs.on_hardware(converged, gpu).graph == "off"


@pytest.mark.parametrize("changes, words", [
    ({"precision": "half"}, "'bfloat16'"), ({"layout": "nchw"}, "'channels_last'"), ({"accumulate": 0}, "at least 1"),
    ({"penalties": "linear", "d_norm": True}, "d_norm=True"), ({"accumulate": 3}, "batch_size=16"),
    ({"graph": "on", "d_every": 2}, "d_every=1"), ({"graph": "on", "precision": "float16"}, "float16")])
def test_impossible_settings_are_named(converged, changes, words):
    with pytest.raises(ValueError, match=words):
        converged.but(**changes)


def test_graph_without_a_gpu_is_an_error_that_says_so(converged, toys):
    with pytest.raises(ValueError, match="expected one GPU"):
        cs.train(converged.but(graph="on"), toys, progress=False)


@pytest.mark.parametrize("change", [
    {"layout": "channels_last"}, {"adam": "fused"}, {"penalties": "linear"}, {"memory": "keep"}, {}])
def test_each_setting_is_the_same_training_up_to_rounding(converged, toys, change):
    plain = after(converged.but(**cs.PLAIN), toys, 4)
    other = after(converged.but(**{**cs.PLAIN, **change} if change else {}), toys, 4)
    assert near(answers(plain), answers(other)) and plain.sums[3] > 0
    assert plain.speed != other.speed and plain.speed.startswith("precision=float32, layout=contiguous, adam=plain")
    layout = other.generator.to_rgb[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert layout == ("layout" in change or not change) and bool(other.opt_d.defaults["fused"]) == ("adam" in change or not change)


@pytest.mark.parametrize("half", ["bfloat16", "float16"])
@pytest.mark.parametrize("preset", ["h1_bn_leaky", "converged"])
def test_half_precision_trains_like_float32(tiny, toys, half, preset):
    config = cs.PRESETS[preset].but(image_size=16, width=16, z_dim=8, batch_size=16, epochs=1, epoch_images=64, augment=False)
    exact, mixed = after(config, toys, 4), after(config.but(precision=half), toys, 4)
    assert torch.allclose(exact.sums[[0, 4]], mixed.sums[[0, 4]], rtol=0.05) and not torch.equal(exact.sums, mixed.sums)
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in mixed.generator.parameters())
    assert mixed.scale_g.is_enabled() == (half == "float16")
    assert mixed.scale_d.is_enabled() == (half == "float16" and preset != "converged")
    assert mixed.latest[1].dtype == torch.float32  # the head is never in half precision: pixels near 1 would lose levels


def test_loss_scaling_is_in_checkpoints_and_overflow_skips_the_step(tiny, toys):
    config = tiny.but(block_norm="both", precision="float16")
    first, second = (cs.Training(config, toys, CPU) for _ in range(2))
    first.scale_g = torch.amp.GradScaler("cpu", init_scale=1e30)  # far too high: G's first gradients overflow
    before = weights(first.generator)[0]
    first.advance()
    assert torch.equal(weights(first.generator)[0], before) and first.scale_g.get_scale() == pytest.approx(5e29)
    second.load_state_dict(first.state_dict())
    assert second.scale_g.get_scale() == pytest.approx(5e29)


# ---- linear penalties


def gradients(config, discriminator, real, fake, parts=1):
    network = copy.deepcopy(discriminator)
    stats = cs.d_step(network, torch.optim.SGD(network.parameters(), 0.0), real, fake, config.but(accumulate=parts))
    return stats, [p.grad for p in network.parameters()]


@pytest.mark.parametrize("loss, smoothing", [("relativistic", 0.0), ("bce", 0.0), ("bce_logits", 0.2)])
@pytest.mark.parametrize("r1, r2", [(3.0, 5.0), (2.0, 0.0), (0.0, 2.0)])
def test_linear_penalties_give_the_gradient_of_the_double_backward(tiny, toys, loss, smoothing, r1, r2):
    config = tiny.but(loss=loss, label_smoothing=smoothing, d_norm=False, init="he", r1=r1, r2=r2, image_size=16, width=32)
    discriminator = cs.Discriminator(config).double()  # but losses are of float32 logits
    for p in discriminator.parameters():  # biases are 0 at first, and would hide that the penalties leave them out
        torch.nn.init.normal_(p, std=0.3) if p.dim() == 1 else None
    real, fake = cs.to_network(toys[:16], config).double(), torch.rand(16, 3, 16, 16).double()
    for parts in (1, 4):
        (stats, plain), (stats_linear, linear) = (
            gradients(config.but(penalties=name), discriminator, real, fake, parts) for name in ("double_backward", "linear"))
        assert torch.allclose(stats, stats_linear, rtol=1e-6) and stats[3] > 0
        assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(plain, linear, strict=True))


def test_linear_penalties_leave_the_images_and_g_alone(converged, toys):
    generator, discriminator = cs.Generator(converged), cs.Discriminator(converged)
    real, fake = cs.to_network(toys[:16], converged), generator(torch.randn(16, 8))
    cs.d_step(discriminator, cs.adam(discriminator, 1e-3, converged), real, fake, converged.but(penalties="linear"))
    assert not real.requires_grad and all(p.grad is None for p in generator.parameters())
    fake.sum().backward()  # its graph is still there for G's step


# ---- accumulation


def test_accumulated_gradients_are_those_of_the_whole_batch(converged, toys):
    config = converged.but(block_norm="none", r1=1.0)
    whole, parts = (after(config.but(accumulate=k, **cs.PLAIN), toys, 3) for k in (1, 4))
    assert near(answers(whole), answers(parts))


def test_accumulation_makes_g_s_graph_one_part_at_a_time(converged, toys, monkeypatch):
    sizes, forward = [], cs.Generator.forward
    monkeypatch.setattr(cs.Generator, "forward", lambda self, z: (
        sizes.append((len(z), torch.is_grad_enabled())) or forward(self, z)))
    after(converged.but(accumulate=4), toys, 1)
    assert sizes == [(4, False)] * 4 + [(4, True)] * 4


# ---- data


def test_batches_copied_ahead_are_those_of_the_index(converged, toys):
    resident, ahead = (cs.Batches(toys, converged, CPU, resident=flag) for flag in (True, False))
    for step in (0, 1, 2, 7, 8, 3):  # also where a resumed run begins, and after a jump
        expected = toys[cs.batch_index(step, len(toys), converged)]
        assert torch.equal(resident(step), expected) and torch.equal(ahead(step), expected)


def test_an_error_in_the_copying_thread_is_not_lost(converged, toys):
    batches = cs.Batches(toys, converged, CPU, resident=False)
    batches.images = toys[:1]
    with pytest.raises(IndexError):
        batches(0)


# ---- graphs, replayed on a CPU


class Recording(TorchDispatchMode):
    """What a CUDA graph does, on a CPU: notes every operation with its tensors, and does the same again on the same memory."""

    def __init__(self):
        super().__init__()
        self.calls = []

    WAITS = (torch.ops.aten.lift_fresh.default, torch.ops.aten._local_scalar_dense.default)  # from the host, to the host

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        assert operation not in self.WAITS, operation  # a GPU could not record it
        result = operation(*args, **(kwargs or {}))
        self.calls.append((operation, args, kwargs or {}, result))
        return result

    @torch.no_grad()  # what was recorded lies below autograd
    def replay(self):
        for operation, args, kwargs, result in self.calls:
            inputs = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
            outputs = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
            again = [x for x in tree_leaves(operation(*args, **kwargs)) if isinstance(x, torch.Tensor)]
            for old, new in zip(outputs, again, strict=True):
                if old.untyped_storage().data_ptr() not in inputs:  # a view or an operation in place has done it already
                    old.copy_(new)


def record_on_cpu(compute, noise):
    """As `record_graph`: nothing that the recording does may count as a step, so the state is put back after it."""
    training = compute.__closure__[0].cell_contents
    before = copy.deepcopy(training.state_dict())
    with Recording() as recording:
        compute()
    with torch.no_grad():
        for name in ("generator", "discriminator", "kept"):
            for p, value in zip(getattr(training, name).state_dict().values(), before[name].values()):
                p.copy_(value)
        for name in ("opt_g", "opt_d"):
            for k, state in enumerate(getattr(training, name).state.values()):
                for key, value in state.items():
                    value.copy_(before[name]["state"][k][key])
        training.sums.copy_(before["sums"])
    noise.set_state(before["noise"])
    return recording.replay


@pytest.mark.parametrize("change", [{}, {"block_norm": "none", "flip": False}, {"augment": True, "lr_end": 0.5}])
def test_replayed_steps_are_the_eager_ones(converged, toys, monkeypatch, change):
    """No number that changes from step to step is frozen in the recording: rates, EMA, images, noise, Adam's step count."""
    config = converged.but(adam="fused", **change)
    eager = after(config, toys, 8)
    choice = {"layout": "channels_last", "penalties": "linear", "graph": "on"}
    monkeypatch.setattr(cs, "on_hardware", lambda config, device: config.but(**choice))
    monkeypatch.setattr(cs, "on_side_stream", lambda compute: compute())
    monkeypatch.setattr(cs, "record_graph", record_on_cpu)
    replayed = after(config, toys, 8)
    assert replayed.replay is not None
    assert near(answers(eager), answers(replayed))
    assert near([eager.kept(torch.ones(2, 8))], [replayed.kept(torch.ones(2, 8))]) and eager.new == replayed.new


def test_graph_that_cannot_be_recorded_is_done_without(converged, toys, monkeypatch, capsys):
    def fails(compute, noise):
        raise RuntimeError("operation not permitted when stream is capturing")

    eager = after(converged, toys, 6)
    monkeypatch.setattr(cs, "on_hardware", lambda config, device: config.but(graph="on", layout="channels_last", adam="fused"))
    monkeypatch.setattr(cs, "on_side_stream", lambda compute: compute())
    monkeypatch.setattr(cs, "record_graph", fails)
    assert near(answers(eager), answers(after(converged, toys, 6))) and "goes on without" in capsys.readouterr().out


def test_resuming_in_another_layout_goes_on_the_same(converged, toys):
    """Adam's moments come from a checkpoint in its layout, and a fused Adam would mix them up with weights in another."""
    config = converged.but(**cs.PLAIN)
    first = after(config, toys, 3)
    second = cs.Training(converged, toys, CPU)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    moved = second.opt_g.state[second.generator.to_rgb[0].weight]["exp_avg_sq"]
    assert moved.is_contiguous(memory_format=torch.channels_last)
    for training in (first, second):
        for _ in range(3):
            training.advance()
    assert near(answers(first), answers(second))


def test_losses_are_not_computed_under_autocast(tiny, toys, monkeypatch):
    """On a GPU, binary cross-entropy refuses to be: F.binary_cross_entropy is unsafe to autocast."""
    seen, bce = [], torch.nn.functional.binary_cross_entropy
    monkeypatch.setattr(torch.nn.functional, "binary_cross_entropy", lambda p, target: (
        seen.append((torch.is_autocast_enabled("cpu"), p.dtype)) or bce(p, target)))
    after(tiny.but(precision="bfloat16", block_norm="both"), toys, 2)
    assert len(seen) == 6 and set(seen) == {(False, torch.float32)}


def test_resuming_keeps_how_adam_goes_about_it_here(converged, toys):
    """A checkpoint of a plain Adam, taken up where it is fused, with its rate in a tensor for the graph."""
    plain, fused = cs.Training(converged.but(**cs.PLAIN), toys, CPU), cs.Training(converged, toys, CPU)
    plain.advance()
    fused.opt_d = cs.adam(fused.discriminator, 1e-3, fused.chosen.but(graph="on"))
    fused.load_state_dict(plain.state_dict())
    (group,) = fused.opt_d.param_groups
    assert group["fused"] and group["capturable"] and isinstance(group["lr"], torch.Tensor)
    assert len(fused.opt_d.state) == len(plain.opt_d.state) > 0


# ---- several processes


TOGETHER = """
import sys
import torch
import cspgan as cs
torch.set_num_threads(1)

def gradients(network):
    return [p.grad.clone() for p in network.parameters()]

def main(folder, config):
    images = cs.toy_faces(256, 16, seed=3)
    seen = {}
    step = cs.Training.compute
    def compute(self, batch):
        step(self, batch)
        if not seen:
            seen.update(d=gradients(self.discriminator), g=gradients(self.generator))
    cs.Training.compute = compute
    run = cs.train(config, images, folder, progress=False)
    torch.save({"gradients": seen, "history": run.history, "weights": run.generator.state_dict(),
                "hardware": run.environment["hardware"]}, folder + ".pt")

folder, kind, world = sys.argv[1:]
cs.gpus_for = lambda config: int(world)
if int(world) > 1:
    def fails(run):
        raise KeyError("an error of the caller's")

    try:  # in the middle of a run: the helpers are dismissed, and others are hired for the next one
        cs.train({CONFIGS}[kind], cs.toy_faces(256, 16, seed=3), progress=False, on_epoch=fails)
    except KeyError:
        assert cs.processes() == 1 and not cs.HIRED
main(folder, {CONFIGS}[kind])
"""
CONFIGS = """{kind: config.but(image_size=16, width=16, z_dim=8, batch_size=16, epochs=2, epoch_images=64) for kind, config in {
    "no_norm": cs.CONVERGED.but(block_norm="none"),
    "norm": cs.PRESETS["h1_bn_leaky"],
    "norm_parts": cs.PRESETS["h1_bn_leaky"].but(accumulate=2),
}.items()}"""


def train_together(folder, kind, world):
    script = folder / "together.py"
    script.write_text(TOGETHER.replace("{CONFIGS}", CONFIGS))
    environment = {**os.environ, "PYTHONPATH": str(Path(cs.__file__).parent), "OMP_NUM_THREADS": "1"}
    run = folder / f"{kind}{world}"
    done = subprocess.run([sys.executable, script, run, kind, str(world)], env=environment, capture_output=True, text=True,
                          timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(f"{run}.pt", weights_only=True)


def test_two_processes_train_as_one(tmp_path):
    alone, together = (train_together(tmp_path, "no_norm", world) for world in (1, 2))
    for network in "dg":  # the averaged gradient is that of the joint batch
        assert near(alone["gradients"][network], together["gradients"][network], rtol=1e-3, atol=1e-5)
    assert together["hardware"] == "2 x 1 CPU core" and len(alone["history"]) == len(together["history"]) == 8
    for a, b in zip(alone["history"], together["history"]):  # same format, and up to rounding the same numbers
        assert list(a) == list(b) and a["d_loss"] == pytest.approx(b["d_loss"], rel=0.02)
        assert a["d_real"] - a["d_fake"] == pytest.approx(b["d_real"] - b["d_fake"], abs=0.02)
    assert near(alone["weights"].values(), together["weights"].values(), rtol=0.05, atol=0.01)
    files = [{p.name for p in (tmp_path / f"no_norm{world}").iterdir()} for world in (1, 2)]
    assert files[0] == files[1] == {"generator.pt", "history.json", "snapshots.pt"}


def test_batchnorm_of_two_cpu_processes_goes_by_parts(tmp_path):
    parts, together = train_together(tmp_path, "norm_parts", 1), train_together(tmp_path, "norm", 2)
    for network in "dg":
        assert near(parts["gradients"][network], together["gradients"][network], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("first", ["whole", "stopped"])
def test_torchrun_trains_resumes_and_has_one_writer(tmp_path, first):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", Path(cs.__file__), "train",
               "converged", "image_size=16", "width=16", "batch_size=16", "epochs=1", "epoch_images=64",
               "--folder", tmp_path / "run", "--images", tmp_path]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HOME": str(tmp_path / "home")}
    for k, image in enumerate(cs.toy_faces(64, 16)):
        cs.Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / f"{k:02}.png")
    for budget in (["--time-budget", "0"] if first == "stopped" else [], []):
        done = subprocess.run([*map(str, command), *budget], env=environment, capture_output=True, text=True, timeout=300,
                              cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
        if first == "stopped" and budget:
            assert done.stdout.count("stopped at step 1 of 4") == 1 and (tmp_path / "run/checkpoint.pt").exists()
    assert done.stdout.count("at step 1 of 4" if first == "stopped" else "Loaded, not trained") == 1
    run = cs.load_run(tmp_path / "run")
    assert run.finished and run.environment["hardware"] == "2 x 1 CPU core" and len(run.history) == 4


def test_sync_batchnorm_is_what_gpus_get(converged, toys, monkeypatch):
    training = cs.Training(converged, toys, CPU)
    training.device = torch.device("cuda")
    monkeypatch.setattr(cs, "processes", lambda: 2)
    monkeypatch.setattr(cs, "rank", lambda: 0)
    monkeypatch.setattr(cs, "agree", lambda value: value)
    monkeypatch.setattr(cs, "DistributedDataParallel", lambda network, **_: network)
    monkeypatch.setattr(cs.Training, "load_state_dict", lambda self, state: None)
    parameters = list(training.generator.parameters())
    training.connect()
    norms = [m for m in training.generator.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    assert norms and all(isinstance(m, torch.nn.SyncBatchNorm) for m in norms)
    assert all(a is b for a, b in zip(parameters, training.generator.parameters()))  # the optimiser still has them


def test_gpus_take_equal_shares_of_a_batch(converged, monkeypatch):
    monkeypatch.setattr(cs, "best_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert [cs.gpus_for(converged.but(batch_size=n)) for n in (16, 18, 15, 2)] == [4, 3, 3, 2]
    assert cs.gpus_for(converged.but(batch_size=16, accumulate=8)) == 2


# ---- memory


def test_batch_that_does_not_fit_names_one_that_does(converged, toys, monkeypatch):
    compute = cs.Training.compute

    def limited(self, batch):
        if len(batch) // self.chosen.accumulate > 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        compute(self, batch)

    monkeypatch.setattr(cs.Training, "compute", limited)
    with pytest.raises(MemoryError, match=r"batch_size=16 does not fit .* batch_size=4 does \(tried\), or accumulate=4"):
        cs.train(converged, toys, progress=False)
    assert cs.train(converged.but(accumulate=4), toys, progress=False).finished
    assert cs.train(converged.but(batch_size=4), toys, progress=False).finished


def test_other_errors_are_not_taken_for_a_lack_of_memory(converged, toys, monkeypatch):
    def broken(self, batch):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(cs.Training, "compute", broken)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        cs.train(converged, toys, progress=False)


def test_peak_memory_and_speed_are_on_file(converged, toys, tmp_path):
    run = cs.train(converged, toys, tmp_path, progress=False)
    there = cs.load_run(tmp_path).environment
    assert there == run.environment and 50 < there["peak_memory_mb"] < 50_000
    assert there["speed"] == "precision=float32, layout=channels_last, adam=fused, memory=keep, penalties=linear"


def test_speed_is_measured_by_training(converged, toys):
    assert 10 < cs.images_per_second(converged, toys, seconds=0.05) < 1e6
