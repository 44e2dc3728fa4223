"""Nothing lost: one file a run, resuming, signals, damage; many runs side by side."""

import errno
import functools
import itertools
import math
import multiprocessing
import os
import pickle
import random
import runpy
import signal
import sys
import tempfile
import threading
import time
from concurrent import futures
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image

import cspgan as cs

CPU = torch.device("cpu")
train = functools.partial(cs.train, progress=False)
server = multiprocessing.get_context("forkserver")  # imports PyTorch once, not in every process
server.set_forkserver_preload(["cspgan"])


def same_run(*runs):
    """Whether runs agree in every weight, record and snapshot."""
    contents = []
    for run in runs:
        records = [{**record, "seconds": 0} for record in run.history]
        snapshots = [(n, images.tolist()) for n, images in run.snapshots]
        weights = [weight.tolist() for weight in run.generator.state_dict().values()]
        contents.append([records, snapshots, weights])
    return contents[0] == contents[1]


def step_of(folder):
    return torch.load(Path(folder, "run.pt"), weights_only=True)["step"]


def wait_for(condition):
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture(params=["bce", "converged"])
def config(request, tiny):
    """Two epochs of four steps with everything that has a state: EMA, BatchNorm, lazy D, cosine."""
    if request.param == "bce":
        tiny = tiny.but(block_norm="both", d_every=2, weight_decay=0.1)
    else:
        tiny = cs.PRESETS["converged"].but(image_size=16, width=16, z_dim=8, batch_size=16)
    return tiny.but(epochs=2, epoch_images=64)


# ---- going on
def test_run_interrupted_in_every_step_equals_one_that_was_not(
    config, toys, tmp_path, monkeypatch, capsys
):
    whole = train(config, toys)
    advance = cs.Training.advance

    def advance_and_interrupt(training):
        advance(training)
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(cs.Training, "advance", advance_and_interrupt)
        for step in range(1, 9):
            with pytest.raises(KeyboardInterrupt):
                train(config, toys, tmp_path)
            assert step_of(tmp_path) == step
    assert "stopped at step 7 of 8 (SIGINT)" in capsys.readouterr().out
    run = train(config, toys, tmp_path)
    assert run.finished and same_run(whole, run)
    assert same_run(whole, cs.load_run(tmp_path))
    assert "loaded at step 8" in capsys.readouterr().out


def test_time_budget_returns_the_run_so_far(tiny, toys, tmp_path, monkeypatch):
    run = train(tiny.but(epochs=4), toys, tmp_path, time_budget=0)
    assert run.stopped == "time" and not run.history
    clock = itertools.count().__next__  # a second passes whenever somebody looks
    monkeypatch.setattr(cs, "time", SimpleNamespace(monotonic=clock, strftime=time.strftime))
    steps = []
    while not run.finished:
        run = train(tiny.but(epochs=4), toys, tmp_path, time_budget=9 / 3600)
        steps.append(step_of(tmp_path))
    assert len(steps) > 1 and 0 < steps[0] < steps[-1] == 8
    assert same_run(train(tiny.but(epochs=4), toys), run)


def test_run_killed_twenty_times_goes_on_bit_for_bit(tiny, toys, tmp_path):
    config = tiny.but(block_norm="both", d_every=2, epochs=15, epoch_images=64, ema_images=64)
    args = config, toys, tmp_path, False, None, math.inf, 0
    file = tmp_path / "run.pt"
    moments = random.Random(0)
    times = [0]
    for _ in range(20):
        child = server.Process(target=cs.train, args=args)
        child.start()
        wait_for(lambda: file.exists() and file.stat().st_mtime_ns > times[-1])
        time.sleep(moments.uniform(0, 0.03))
        child.kill()
        child.join()
        times.append(file.stat().st_mtime_ns)
    assert step_of(tmp_path) >= 20
    assert same_run(train(config, toys), train(config, toys, tmp_path))
    assert not Path(tmp_path, "run.pt.damaged").exists()


def finish(config, toys, skipped=()):
    """What comes of a step, a checkpoint without some of its parts, and two more steps."""
    first = cs.Training(config, toys, CPU)
    second = cs.Training(config, toys, CPU)
    fresh = second.state_dict()
    first.advance()
    second.load_state_dict(first.state_dict() | {part: fresh[part] for part in skipped})
    for _ in range(2):
        second.advance()
    second.record()
    weights = (*second.kept.state_dict().values(), *second.discriminator.state_dict().values())
    return {**second.run.history[0], "seconds": 0}, [weight.sum().item() for weight in weights]


def test_every_part_of_a_checkpoint_is_needed(config, toys):
    whole = finish(config, toys)
    assert whole == finish(config, toys)
    parts = set(cs.Training(config, toys, CPU).state_dict())
    parts -= {"identity", "environment", "seconds", "history", "snapshots", "scaler_g", "scaler_d"}
    if not config.ema_images:  # one network under two names
        parts -= {"generator", "kept"}
        assert whole != finish(config, toys, ["generator", "kept"])
    if config.d_every == 1:
        parts -= {"d_stats"}
    for part in parts:
        assert whole != finish(config, toys, [part]), part


def test_precision_is_a_part_of_the_run(tiny, toys, tmp_path, monkeypatch):
    longer = tiny.but(epochs=2)
    with monkeypatch.context() as patch:
        patch.setattr(cs, "choose_precision", lambda *_: "float16")
        whole = train(longer, toys)
        train(tiny, toys, tmp_path)
    state = torch.load(tmp_path / "run.pt", weights_only=True)
    assert state["environment"]["precision"] == "float16"
    assert same_run(whole, train(longer, toys, tmp_path))
    assert not same_run(whole, train(longer, toys))
    state["scaler_d"]["scale"] = 128.0
    training = cs.Training(tiny, toys, CPU, "float16")
    training.load_state_dict(state)
    assert training.precision_d.scaler.get_scale() == 128


def test_more_epochs_go_on_where_the_rates_do_not_fall(tiny, toys, tmp_path):  # case 8
    train(tiny.but(epochs=2), toys, tmp_path / "run")
    train(tiny.but(epochs=4), toys, tmp_path / "run", time_budget=0)
    run = train(tiny.but(epochs=4), toys, tmp_path / "run")
    whole = train(tiny.but(epochs=4), toys)
    assert run.finished and same_run(whole, run)
    with pytest.raises(ValueError, match="epochs: 4 there, 2 here"):
        train(tiny.but(epochs=2), toys, tmp_path / "run")
    train(tiny.but(lr_end=0.1), toys, tmp_path / "falls")
    with pytest.raises(ValueError, match="epochs: 1 there, 2 here"):
        train(tiny.but(lr_end=0.1, epochs=2), toys, tmp_path / "falls")


# ---- what can go wrong
def leave_mark(folder, run):
    Path(folder, "trains").touch()


@pytest.mark.parametrize(
    "number, code", [(signal.SIGINT, 1), (signal.SIGTERM, -15), (signal.SIGHUP, -1)]
)
def test_signals_save_and_then_do_what_they_always_do(tiny, toys, tmp_path, number, code):
    args = tiny.but(epochs=2000), toys, tmp_path, False, functools.partial(leave_mark, tmp_path)
    child = server.Process(target=cs.train, args=args)
    child.start()
    wait_for((tmp_path / "trains").exists)
    os.kill(child.pid, number)
    child.join()
    assert child.exitcode == code and step_of(tmp_path) >= 2


def test_another_run_in_the_folder_is_refused_and_stays(tiny, toys, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))  # case 21
    run = train(tiny, toys, "~/gan/run")
    file = tmp_path / "gan/run/run.pt"
    before = file.read_bytes()
    with pytest.raises(ValueError, match="lr_d: 0.0002 there, 0.001 here"):
        train(tiny.but(lr_d=1e-3), toys, "~/gan/run")
    with pytest.raises(ValueError, match="data: "):
        train(tiny, toys.flip(3), "~/gan/run")
    assert os.listdir(file.parent) == ["run.pt"] and file.read_bytes() == before
    assert same_run(run, cs.load_run("~/gan/run"))
    state = torch.load(file, weights_only=True)
    del state["identity"]["lr_width"]
    torch.save(state, file)
    with pytest.raises(ValueError, match="another version's run, without {'lr_width'}"):
        cs.load_run("~/gan/run")
    torch.save({"model": 1}, file)
    with pytest.raises(ValueError, match="holds another run .*loss: None there, bce here"):
        train(tiny, toys, "~/gan/run")
    with pytest.raises(ValueError, match="another version's run"):
        cs.load_run("~/gan/run")


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize(
    "damage",
    [lambda b: b[:9999], lambda b: b"", lambda b: b"text", lambda b: pickle.dumps(Malicious(), 2)],
)
def test_damaged_file_is_named_and_set_aside(tiny, toys, tmp_path, capsys, monkeypatch, damage):
    monkeypatch.chdir(tmp_path)
    whole = train(tiny, toys, "run")
    damaged = damage(Path("run/run.pt").read_bytes())
    Path("run/run.pt").write_bytes(damaged)
    with pytest.raises(ValueError, match="run: its run cannot be read"):
        cs.load_run("run")
    assert same_run(whole, train(tiny, toys, "run"))
    assert "run.pt.damaged: set aside" in capsys.readouterr().out
    assert Path("run/run.pt.damaged").read_bytes() == damaged and not Path("executed").exists()


def test_file_that_cannot_be_read_now_is_not_set_aside(tiny, toys, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(errno.EIO, "Input/output error")

    train(tiny, toys, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", fail)
        with pytest.raises(OSError, match="Input/output"):
            train(tiny, toys, tmp_path)
    assert step_of(tmp_path) == 2


def test_signal_is_not_lost_where_on_epoch_fails(tiny, toys):
    arrived = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: arrived.append(number))

    def on_epoch(run):
        signal.raise_signal(signal.SIGTERM)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train(tiny, toys, on_epoch=on_epoch)
    signal.signal(signal.SIGTERM, before)
    assert arrived == [signal.SIGTERM]


def test_signal_that_is_ignored_stays_ignored(tiny, toys):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in `python train.py &`
    run = train(tiny.but(epochs=2), toys, on_epoch=lambda run: signal.raise_signal(signal.SIGINT))
    signal.signal(signal.SIGINT, before)
    assert run.finished


def test_finished_run_is_loaded_where_nothing_can_be_written(tiny, toys, tmp_path, monkeypatch):
    train(tiny, toys, tmp_path)
    monkeypatch.setattr(tempfile, "TemporaryFile", Mock(side_effect=PermissionError))
    assert train(tiny, toys, tmp_path).finished
    for config, folder in ((tiny, tmp_path / "new"), (tiny.but(epochs=2), tmp_path)):
        with pytest.raises(PermissionError):
            train(config, toys, folder)


def test_what_was_trained_is_saved_before_a_wrong_answer_raises(tiny, toys, tmp_path):  # case 17
    for answer, error in (
        (lambda run: 1 / 0, ZeroDivisionError),
        (lambda run: 7, AttributeError),
        (lambda run: {"swd": "low"}, ValueError),
        (lambda run: sys.exit(), SystemExit),
    ):
        with pytest.raises(error):
            train(tiny, toys, tmp_path / error.__name__, on_epoch=answer)
        assert step_of(tmp_path / error.__name__) == 2

    def on_epoch(run):
        return {"swd": np.float32(7), "images": 1e9}

    run = train(tiny, toys, tmp_path / "ValueError", on_epoch=on_epoch)
    assert run.history[-1]["images"] == 32  # what `train` records itself stays
    saved = cs.load_run(tmp_path / "ValueError")
    assert run.finished and same_run(run, saved)
    assert type(saved.history[-1]["swd"]) is float
    assert train(tiny, toys, on_epoch=print).finished


def test_wrong_arguments_are_named_with_what_was_expected(tiny, toys):  # case 9
    with pytest.raises(ValueError, match="config='converged': expected a Config"):
        train("converged", toys)
    with pytest.raises(ValueError, match="progress=.*on_epoch is the next one"):
        cs.train(tiny, toys, None, print)
    run = train(tiny, toys, time_budget="0")
    assert run.stopped == "time"
    assert torch.equal(cs.sample(run, 4, np.int64(3)), cs.sample(run, 4, 3))


def test_wrong_images_are_named_with_what_was_expected(tiny, toys):  # case 9
    for images, words in (
        ("photos/", "a <class .str.>"),
        (None, "NoneType"),
        (toys.float(), "float32"),
        (toys.numpy(), "a <class .numpy.ndarray.>"),
        (toys[:, :, 1:], "3, 15, 16"),
        (toys[:9], "9, 3, 16, 16.* batch_size=16"),
    ):
        with pytest.raises(ValueError, match=words) as error:
            train(tiny, images)
        assert "expected torch.uint8 (N, 3, 16, 16)" in str(error.value)


def test_loss_that_is_not_finite_ends_in_its_message(tiny, toys, tmp_path, capsys, monkeypatch):
    train(tiny, toys, tmp_path)  # case 12
    good = (tmp_path / "run.pt").read_bytes()
    step = cs.g_step

    def break_down(discriminator, *rest):
        discriminator.to_logit.weight.data.fill_(math.nan)
        return step(discriminator, *rest)

    monkeypatch.setattr(cs, "g_step", break_down)
    run = train(tiny.but(epochs=2), toys, tmp_path, save_every=0)
    assert not run.finished and "not finite" in run.stopped
    assert "stopped at step 3 of 4" in capsys.readouterr().out
    assert (tmp_path / "run.pt").read_bytes() == good
    look = Mock()
    run = train(tiny.but(epoch_images=16), toys, on_epoch=look)  # each step ends an epoch
    assert "not finite" in run.stopped and not look.called


def test_lost_statistics_end_the_run_although_its_losses_are_finite(tiny, toys, tmp_path):
    def lose(run):
        run.generator.blocks[0].left[1].running_mean.fill_(math.nan)

    run = train(tiny.but(block_norm="both", epochs=2), toys, tmp_path, on_epoch=lose)
    assert "statistics not finite" in run.stopped and not run.finished
    assert run.history[-1]["step"] == 2 and math.isfinite(run.history[-1]["g_loss"])


def test_full_disk_is_said_and_the_run_goes_on(tiny, toys, tmp_path, capsys, monkeypatch):
    def fill_up(state, path):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left")

    monkeypatch.setattr(torch, "save", fill_up)
    run = train(tiny, toys, tmp_path, save_every=0)
    assert run.history[-1]["epoch"] == 1 and "No space left" in run.stopped
    assert "step 1 is not saved" in capsys.readouterr().out and not os.listdir(tmp_path)
    with monkeypatch.context() as patch:  # a failing disk may become read-only
        patch.setattr(Path, "unlink", Mock(side_effect=OSError(30, "Read-only file system")))
        assert train(tiny, toys, tmp_path).history
    answer = iter([False, True])  # is the time up?
    monkeypatch.setattr(cs, "reason_to_stop", lambda *args: "time" if next(answer) else "")
    run = train(tiny, toys, tmp_path)
    assert run.stopped.startswith("time; step 1 is not saved")


def test_committed_generator_makes_faces():
    run = cs.load_run(Path(__file__).parents[1] / "results/generators/converged")
    images = cs.sample(run, 4)
    red, green, blue = images.float().mean(dim=(0, 2, 3))  # of skin
    assert images.shape == (4, 3, 128, 128) and images.float().std() > 20
    assert red > green > blue


# ---- many runs side by side
@pytest.fixture
def photos(tmp_path, monkeypatch, toys):
    """A folder of pictures, whose cache will not lie in the home of whoever runs the tests."""
    monkeypatch.setenv("HOME", str(tmp_path))  # of the workers
    monkeypatch.setattr(cs.load_faces, "__defaults__", (tmp_path / ".cache/cspgan",))
    folder = tmp_path / "photos"
    folder.mkdir()
    for k, image in enumerate(toys[:200]):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{k}.png")
    return folder


def once_there(paths, action):
    """In a thread: the action, as soon as all paths exist."""

    def follow():
        wait_for(lambda: all(map(os.path.exists, paths)))
        action()

    threading.Thread(target=follow, daemon=True).start()


def are_as_trained_alone(jobs, photos):
    faces, held_out = cs.load_faces(photos, 16)
    for config, folder in jobs:
        alone = train(config, faces, on_epoch=cs.watch(held_out, 16))
        assert same_run(alone, cs.load_run(folder))


def kill_workers():
    for child in multiprocessing.active_children():
        child.kill()


def test_one_run_fails_and_one_is_killed(tiny, tmp_path, photos, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    bad, first, killed, last = (str(tmp_path / name) for name in ("bad", "1st", "killed", "last"))
    jobs = [(tiny, first), (tiny.but(epochs=9), killed), (tiny.but(seed=2), last)]
    all_jobs = [(tiny.but(batch_size=500, epoch_images=0), bad), *jobs]
    once_there([killed], kill_workers)
    reasons = cs.train_all(all_jobs, photos, measured_on=16)
    assert reasons.keys() == {bad, killed, last}
    assert "batch_size=500" in reasons[bad] and "a worker died" in reasons[killed]
    with futures.ThreadPoolExecutor(1) as executor:
        reasons = cs.train_all(all_jobs, photos, executor, measured_on=16)
    assert reasons.keys() == {bad}
    are_as_trained_alone(jobs, photos)


def marked_job(config, folder, source, *about):
    """As `train_job`, and it shows that it trains."""
    faces, _ = cs.load_faces(source, 16)
    return train(config, faces, folder, on_epoch=functools.partial(leave_mark, folder)).stopped


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


def test_interrupting_saves_all_runs_and_the_next_call_goes_on(tiny, tmp_path, photos, monkeypatch):
    folders = [str(tmp_path / name) for name in ("a", "b")]
    jobs = [(tiny.but(epochs=2000), folder) for folder in folders]
    once_there([f"{folder}/trains" for folder in folders], interrupt)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: 2)
        patch.setattr(cs, "train_job", marked_job)
        patch.setattr(multiprocessing, "get_context", lambda kind: server)
        with pytest.raises(KeyboardInterrupt):
            cs.train_all(jobs, photos)
    steps = [step_of(folder) for folder in folders]
    assert min(steps) >= 2
    late = tmp_path / "late"
    with futures.ThreadPoolExecutor(1) as executor:
        reasons = cs.train_all([*jobs, (tiny, late)], photos, executor, 16, time_budget=0)
    assert reasons == dict.fromkeys([*folders, str(late)], "time")
    assert steps == [step_of(folder) for folder in folders] and not late.exists()
    with pytest.raises(ValueError, match="folder of 2 runs"):  # case 18
        cs.train_all([(tiny, folders[0]), (tiny, f"{folders[0]}/")], photos)


def train_marked(jobs, photos):
    cs.train_job = marked_job
    cs.train_all(jobs, photos)


def test_worker_whose_parent_is_killed_saves_its_run(tiny, tmp_path, photos):
    folder = tmp_path / "run"
    jobs = [(tiny.but(epochs=2000), str(folder))]
    parent = server.Process(target=train_marked, args=(jobs, photos))
    parent.start()
    wait_for((folder / "trains").exists)
    parent.kill()
    wait_for((folder / "run.pt").exists)
    assert step_of(folder) >= 2


def test_dask_is_an_executor_too(tiny, tmp_path, photos):
    distributed = pytest.importorskip("distributed")
    jobs = [(tiny.but(seed=k), tmp_path / str(k)) for k in range(3)]
    bad = tiny.but(batch_size=500, epoch_images=0)
    all_jobs = [(bad, str(tmp_path / "bad")), *jobs]
    with distributed.Client(n_workers=2, threads_per_worker=1, dashboard_address=None) as client:
        reasons = cs.train_all(all_jobs, photos, client.get_executor(), measured_on=16)
    assert list(reasons) == [str(tmp_path / "bad")] and "batch_size=500" in str(reasons)
    are_as_trained_alone(jobs, photos)


SCRIPT = """
from pathlib import Path
import cspgan as cs
config = cs.BASELINE.but(image_size=16, width=16)
reasons = cs.train_all([(config, "run")], None)
Path(__file__).with_name("said").write_text(str(reasons))
"""


def test_script_without_the_guard_is_told_so(tmp_path):  # case 30
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    child = server.Process(target=runpy.run_path, args=(str(script), None, "__main__"))
    child.start()
    child.join()
    said = (tmp_path / "said").read_text()
    assert "'run': 'a worker died" in said and "without `if __name__ ==" in said
