"""Nothing lost: checkpoints, resuming, signals, damage, saved runs."""

import json
import math
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import cspgan as cs


def same_run(a, b):
    """Whether two runs agree in every weight, record and snapshot."""
    records = [[{k: v for k, v in record.items() if k != "seconds"} for record in run.history] for run in (a, b)]
    weights = [run.generator.state_dict().values() for run in (a, b)]
    return (records[0] == records[1] and all(map(torch.equal, *weights))
            and [n for n, _ in a.snapshots] == [n for n, _ in b.snapshots]
            and all(torch.equal(x, y) for (_, x), (_, y) in zip(a.snapshots, b.snapshots)))


@pytest.fixture(params=["bce", "converged"])
def config(request, tiny):
    """Two epochs of four steps with everything that has a state: EMA, BatchNorm, lazy D, cosine, augmentation."""
    if request.param == "bce":
        return tiny.but(block_norm="both", d_every=2, epochs=2, epoch_images=64, weight_decay=0.1)
    return cs.CONVERGED.but(image_size=16, width=16, z_dim=8, batch_size=16, epochs=2, epoch_images=64, augment=True)


# ---- interruptions


def test_run_interrupted_after_every_step_equals_one_that_was_not(config, toys, tmp_path, capsys):
    whole = cs.train(config, toys, progress=False)
    for step in range(1, 8):
        run = cs.train(config, toys, tmp_path / "run", progress=False, time_budget=0)
        assert not run.finished and run.stopped == "time" and f"stopped at step {step} of 8" in capsys.readouterr().out
    run = cs.train(config, toys, tmp_path / "run", progress=False, time_budget=0)
    assert run.finished and not run.stopped and same_run(whole, run) and same_run(whole, cs.load_run(tmp_path / "run"))
    assert run.seconds >= run.history[0]["seconds"] > 0
    assert not list((tmp_path / "run").glob("checkpoint*"))


def test_every_part_of_the_state_is_needed(config, toys):
    """A checkpoint without one of its parts would not give the same run: none is saved in vain, and the test above can fail."""
    def finished(skip):
        first, second = (cs.Training(config, toys, torch.device("cpu")) for _ in range(2))
        for _ in range(3):
            first.advance()
        fresh = second.state_dict()
        second.load_state_dict({k: fresh[k] if k in skip else v for k, v in first.state_dict().items()})
        for _ in range(3):
            second.advance()
        second.record()
        networks = second.kept, second.discriminator
        return second.history[-1], [value for network in networks for value in network.state_dict().values()]

    def equal(a, b):
        return all(a[0][k] == b[0][k] for k in a[0] if k != "seconds") and all(map(torch.equal, a[1], b[1]))

    whole = finished(())
    assert equal(whole, finished(()))
    parts = set(cs.Training(config, toys, torch.device("cpu")).state_dict()) - {"history", "snapshots", "seconds", "recorded"}
    parts -= {"d_stats"} if config.d_every == 1 else set()
    parts -= {"scale_g", "scale_d"}  # empty without float16: see test_speed.py
    twins = {"generator", "kept"} if not config.ema_images else set()  # one network under two names
    for skip in [{part} for part in parts - twins] + [twins] * bool(twins):
        assert not equal(whole, finished(skip)), skip


KILL = """
import os, random, signal, sys, time
import torch
import cspgan as cs
torch.set_num_threads(1)
images = cs.toy_faces(256, 16, seed=3)
config = cs.CONVERGED.but(image_size=16, width=16, z_dim=8, batch_size=16, epochs=4, epoch_images=1600)
random.seed(0)
killed = 0
while True:
    if not (child := os.fork()):
        cs.train(config, images, sys.argv[1], progress=False, save_every=0)
        os._exit(0)
    if killed < 20:
        time.sleep(random.uniform(0.02, 0.4))
        os.kill(child, signal.SIGKILL)
    code = os.waitpid(child, 0)[1]
    killed += code == signal.SIGKILL
    if code == 0:
        break
    assert code == signal.SIGKILL, code
print("killed", killed)
"""


def test_run_killed_twenty_times_equals_one_that_was_not(toys, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(Path(cs.__file__).parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", KILL, str(tmp_path / "run")],
                          env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "killed 20" in done.stdout and done.stdout.count("Resumed") >= 10
    run = cs.load_run(tmp_path / "run")
    assert same_run(cs.train(run.config, toys, progress=False), run)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_save_and_return_the_run_so_far(config, toys, tmp_path, capsys, monkeypatch, number):
    before, step, calls = signal.getsignal(number), cs.g_step, []

    def g_step(*args):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), number)
        return step(*args)

    monkeypatch.setattr(cs, "g_step", g_step)
    run = cs.train(config, toys, tmp_path / "run", progress=False)
    assert len(calls) == 3 and not run.finished and run.stopped == number.name and run.history[-1]["step"] == 3
    assert f"{number.name}: stopped at step 3 of 8" in capsys.readouterr().out and signal.getsignal(number) is before
    assert same_run(cs.train(config, toys, progress=False), cs.run_or_load(config, toys, tmp_path / "run"))


def test_second_signal_stops_at_once():
    with pytest.raises(KeyboardInterrupt), cs.stop_signals() as names:
        os.kill(os.getpid(), signal.SIGINT)
        assert names == ["SIGINT"]
        os.kill(os.getpid(), signal.SIGINT)


def test_training_works_in_a_thread(tiny, toys):
    runs = []
    thread = threading.Thread(target=lambda: runs.append(cs.train(tiny, toys, progress=False)))
    thread.start()
    thread.join()
    assert runs[0].finished


# ---- checkpoints


@pytest.fixture
def stopped(tiny, toys, tmp_path, capsys):
    """A folder with a run stopped at step 2 of 8, its checkpoint of step 1 still there."""
    config = tiny.but(epochs=2, epoch_images=64)
    for _ in range(2):
        cs.train(config, toys, tmp_path / "run", progress=False, time_budget=0)
    capsys.readouterr()
    return config, tmp_path / "run"


def damage(path, kind):
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    if kind == "empty":
        path.write_bytes(b"")
    if kind == "foreign":
        torch.save({"weights": torch.ones(3)}, path)
    if kind == "pickle":
        torch.save(Path("x"), path)
    if kind == "newer":
        torch.save({**torch.load(path, weights_only=True), "format": cs.FORMAT + 1}, path)


@pytest.mark.parametrize("kind", ["truncated", "empty", "foreign", "pickle", "newer"])
def test_bad_checkpoint_is_refused_by_name_and_the_one_before_is_used(stopped, toys, capsys, kind):
    config, folder = stopped
    damage(folder / "checkpoint.pt", kind)
    run = cs.train(config, toys, folder, progress=False)
    said = capsys.readouterr().out
    assert f"{folder / 'checkpoint.pt'} is refused" in said and "at step 1 of 8" in said and (
        "format 2" in said) == (kind == "newer")
    assert same_run(run, cs.train(config, toys, progress=False))


def test_refused_checkpoint_is_kept_and_does_not_push_the_good_one_out(stopped, toys):
    config, folder = stopped
    damage(folder / "checkpoint.pt", "newer")
    refused, good = (folder / "checkpoint.pt").read_bytes(), (folder / "checkpoint.old.pt").read_bytes()
    assert not cs.train(config, toys, folder, progress=False, time_budget=0).finished
    assert (folder / "checkpoint.refused").read_bytes() == refused and (folder / "checkpoint.old.pt").read_bytes() == good


def test_checkpoint_whose_parts_do_not_fit_leaves_nothing_behind(stopped, toys, capsys):
    """The networks fit, something after them does not: what was loaded before must not be trained on."""
    config, folder = stopped
    (folder / "checkpoint.old.pt").unlink()
    saved = torch.load(folder / "checkpoint.pt", weights_only=True)
    del saved["training"]["history"]
    torch.save(saved, folder / "checkpoint.pt")
    run = cs.train(config, toys, folder, progress=False)
    assert "is refused" in capsys.readouterr().out and same_run(run, cs.train(config, toys, progress=False))


def test_checkpoint_that_was_whole_but_not_yet_in_its_place_is_used(stopped, toys, capsys):
    config, folder = stopped
    (folder / "checkpoint.pt").rename(folder / "checkpoint.new.pt")  # killed between the two renames
    run = cs.train(config, toys, folder, progress=False)
    assert "at step 2 of 8" in capsys.readouterr().out and same_run(run, cs.train(config, toys, progress=False))


def test_checkpoint_of_another_kind_of_device_goes_on_with_new_noise(stopped, toys, capsys):
    config, folder = stopped
    saved = torch.load(folder / "checkpoint.pt", weights_only=True)
    saved["training"]["noise"] = torch.zeros(16, dtype=torch.uint8)  # as a GPU's
    torch.save(saved, folder / "checkpoint.pt")
    run = cs.train(config, toys, folder, progress=False)
    said = capsys.readouterr().out
    assert "another kind of device" in said and "at step 2 of 8" in said and run.finished


def test_checkpoint_by_other_code_says_so(stopped, toys, capsys, monkeypatch):
    config, folder = stopped
    monkeypatch.setattr(cs, "CODE", "another1")
    cs.train(config, toys, folder, progress=False)
    assert "(the code is another1 now)" in capsys.readouterr().out


def test_with_no_good_checkpoint_it_starts_anew(stopped, toys, capsys):
    config, folder = stopped
    for name in ("checkpoint.pt", "checkpoint.old.pt"):
        damage(folder / name, "truncated")
    run = cs.train(config, toys, folder, progress=False)
    assert capsys.readouterr().out.count("is refused") == 2 and same_run(run, cs.train(config, toys, progress=False))


@pytest.mark.parametrize("change", ["config", "data"])
def test_checkpoint_of_another_run_is_refused_with_the_difference_and_kept(stopped, toys, capsys, change):
    config, folder = stopped
    other, images = (config.but(lr_g=1e-3), toys) if change == "config" else (config, toys.flip(3))
    run = cs.train(other, images, folder, progress=False)
    said = capsys.readouterr().out
    assert ("lr_g=0.0002 there, 0.001 here" if change == "config" else "data=256x3") in said and "kept as run.old1" in said
    assert same_run(run, cs.train(other, images, progress=False))
    cs.train(config, toys, folder.with_name("run.old1"), progress=False)
    assert "at step 2 of 8" in capsys.readouterr().out


def test_checkpoints_come_by_time(tiny, toys, tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(cs, "save_checkpoint", lambda training, *rest: saved.append(training.step))
    for seconds, expected in ((1e9, []), (0, [1, 2])):
        cs.train(tiny, toys, tmp_path / str(seconds), progress=False, save_every=seconds)
        assert saved == expected


def full_disk(*args, **options):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("how", ["no space", "read-only"])
def test_checkpoint_that_cannot_be_written_leaves_the_old_one_and_the_training_goes_on(stopped, toys, capsys, monkeypatch, how):
    config, folder = stopped
    before = (folder / "checkpoint.pt").read_bytes()
    if how == "no space":
        monkeypatch.setattr(cs.torch, "save", full_disk)
    else:
        monkeypatch.setattr(cs, "write_aside", lambda *args: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    run = cs.train(config, toys, folder, progress=False, save_every=0)
    said = capsys.readouterr().out
    assert run.finished and said.count("no checkpoint") == 6 and "in memory only" in said
    assert (folder / "checkpoint.pt").read_bytes() == before
    assert {path.name for path in folder.iterdir()} == {"checkpoint.pt", "checkpoint.old.pt"}
    monkeypatch.undo()
    assert same_run(run, cs.train(config, toys, folder, progress=False))


# ---- losses that are not finite


def explode_at(monkeypatch, step):
    calls, d_step = [], cs.d_step

    def exploding(discriminator, *args):
        calls.append(1)
        if len(calls) == step:
            next(discriminator.parameters()).data.fill_(math.nan)
        return d_step(discriminator, *args)

    monkeypatch.setattr(cs, "d_step", exploding)


def test_loss_that_is_not_finite_stops_at_the_last_good_checkpoint(tiny, toys, tmp_path, capsys, monkeypatch):
    config = tiny.but(epochs=2, epoch_images=64, lr_d=3e-3)
    explode_at(monkeypatch, 5)
    run = cs.train(config, toys, tmp_path / "run", progress=False, save_every=0)
    said = capsys.readouterr().out
    assert "step 5: D loss nan" in said and "lr_d=0.003" in said and "at step 4 of 8" in said
    assert run.history[-1]["step"] == 4 and not run.finished and run.stopped == "not finite"
    assert all(p.isfinite().all() for p in run.generator.parameters())
    monkeypatch.undo()
    assert same_run(cs.train(config, toys, progress=False), cs.train(config, toys, tmp_path / "run", progress=False))


def test_loss_that_is_not_finite_before_any_checkpoint_is_an_error(tiny, toys, tmp_path, monkeypatch):
    explode_at(monkeypatch, 1)
    with pytest.raises(FloatingPointError, match="step 1: D loss nan.*lr_d=0.003.*no checkpoint"):
        cs.train(tiny.but(lr_d=3e-3), toys, tmp_path / "run", progress=False)


def test_weights_that_are_not_finite_are_not_saved(tiny, toys, tmp_path):
    training = cs.Training(tiny, toys, torch.device("cpu"))
    next(training.generator.parameters()).data[0, 0, 0, 0] = math.inf
    cs.save_checkpoint(training, tmp_path, "data")
    assert not list(tmp_path.iterdir())


# ---- callbacks


def test_callback_sees_every_epoch_and_adds_to_the_history_without_changing_the_run(config, toys):
    seen = []

    def on_epoch(run):
        seen.append(run.history[-1]["epoch"])
        cs.sample(run, 8, seed=5)
        return {"score": 2.5 * seen[-1]}

    run = cs.train(config, toys, progress=False, on_epoch=on_epoch)
    assert seen == [1, 2] and [r["score"] for r in run.history if "score" in r] == [2.5, 5.0]
    plain = cs.train(config, toys, progress=False, on_epoch=lambda run: None)
    for record in run.history:
        record.pop("score", None)
    assert same_run(run, plain)


def test_run_or_load_passes_options_on(tiny, toys, tmp_path):
    seen = []
    run = cs.run_or_load(tiny, toys, tmp_path / "run", on_epoch=seen.append, progress=False)
    assert seen == [run]


def test_time_in_a_callback_is_no_training_time(tiny, toys):
    import time

    run = cs.train(tiny.but(epochs=2), toys, progress=False, on_epoch=lambda run: time.sleep(2))
    assert run.seconds < 2


# ---- saved runs


def test_saved_run_is_loaded_and_says_so(tiny, toys, tmp_path, capsys):
    made = cs.run_or_load(tiny, toys, tmp_path / "run")
    assert "Loaded" not in capsys.readouterr().out
    loaded = cs.run_or_load(tiny, toys, tmp_path / "run")
    said = capsys.readouterr().out
    assert "Loaded, not trained" in said and made.environment["date"] in said and cs.CODE in said
    assert loaded.history == made.history and loaded.config == made.config
    assert torch.equal(cs.sample(loaded, 4), cs.sample(made, 4))
    assert json.loads((tmp_path / "run/history.json").read_text())["history"] == made.history


def test_run_made_by_other_code_says_so(tiny, toys, tmp_path, capsys, monkeypatch):
    cs.run_or_load(tiny, toys, tmp_path / "run")
    monkeypatch.setattr(cs, "CODE", "another1")
    cs.run_or_load(tiny, toys, tmp_path / "run")
    assert "the code is another1 now" in capsys.readouterr().out


def test_run_from_before_a_field_existed_had_the_default_of_it(tiny, toys, tmp_path, capsys):
    cs.run_or_load(tiny, toys, tmp_path / "run")
    about = json.loads((tmp_path / "run/history.json").read_text())
    del about["config"]["d_every"]
    (tmp_path / "run/history.json").write_text(json.dumps(about))
    cs.run_or_load(tiny.but(d_every=2), toys, tmp_path / "run")
    assert "d_every=1 there, 2 here" in capsys.readouterr().out
    assert "Loaded" not in capsys.readouterr().out


def test_folder_that_cannot_be_made_is_found_out_before_training(tiny, toys, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(cs, "d_step", lambda *args: pytest.fail("it trained"))
    with pytest.raises(OSError):
        cs.train(tiny, toys, tmp_path / "file" / "run", progress=False)


@pytest.mark.parametrize("change", ["config", "data"])
def test_another_run_in_the_folder_is_kept_aside(tiny, toys, tmp_path, capsys, change):
    first = cs.run_or_load(tiny, toys, tmp_path / "run")
    other_config, other_data = (tiny.but(lr_g=1e-3), toys) if change == "config" else (tiny, toys.flip(3))
    cs.run_or_load(other_config, other_data, tmp_path / "run")
    said = capsys.readouterr().out
    assert ("lr_g=0.0002 there, 0.001 here" if change == "config" else "data=") in said and "kept as run.old1" in said
    kept = cs.run_or_load(tiny, toys, tmp_path / "run.old1")
    assert same_run(kept, first)


def test_generator_is_a_plain_state_dict_that_loads_in_three_lines(config, toys, tmp_path):
    run = cs.train(config, toys, tmp_path, progress=False)
    same = cs.Config(**json.loads((tmp_path / "history.json").read_text())["config"])
    generator = cs.Generator(same)
    generator.load_state_dict(torch.load(tmp_path / "generator.pt", weights_only=True))
    assert torch.equal(cs.draw(generator, same, 5, seed=2), cs.sample(run, 5, seed=2))


@pytest.mark.parametrize("where", ["train", "run_or_load"])
def test_training_anew_keeps_the_old_run_and_the_runs_inside_it(tiny, toys, tmp_path, where):
    for name in ("run", "run/seed1"):
        cs.train(tiny, toys, tmp_path / name, progress=False)
    old = (tmp_path / "run/generator.pt").read_bytes()
    again = cs.train(tiny, toys, tmp_path / "run", progress=False) if where == "train" else cs.run_or_load(
        tiny.but(seed=2), toys, tmp_path / "run", progress=False)
    assert same_run(cs.load_run(tmp_path / "run"), again) and (tmp_path / "run.old1/generator.pt").read_bytes() == old
    assert cs.load_run(tmp_path / "run/seed1").finished and not (tmp_path / "run.old1/seed1").exists()


def test_numpy_numbers_are_saved_as_plain_ones(tiny, toys, tmp_path, capsys):
    import numpy as np

    config = tiny.but(lr_g=np.float64(1e-3), epochs=2)
    for _ in range(3):
        cs.train(config, toys, tmp_path / "run", progress=False, time_budget=0,
                 on_epoch=lambda run: {"x": np.float64(2), "y": torch.ones(1)})
    assert same_run(cs.train(config, toys, tmp_path / "run", progress=False, on_epoch=lambda run: {"x": 2, "y": 1}),
                    cs.load_run(tmp_path / "run"))
    assert "refused" not in capsys.readouterr().out


def test_run_without_snapshots_gets_its_last_one_back(config, toys, tmp_path):
    run = cs.train(config, toys, tmp_path, progress=False)
    (tmp_path / "snapshots.pt").unlink()
    ((images, snapshot),) = cs.load_run(tmp_path).snapshots
    assert images == run.snapshots[-1][0]  # drawn in another layout, which rounds otherwise
    assert (snapshot.int() - run.snapshots[-1][1].int()).abs().max() <= 1


@pytest.mark.parametrize("name", ["generator.pt", "history.json"])
def test_damaged_run_is_an_error_of_one_line(tiny, toys, tmp_path, name):
    cs.train(tiny, toys, tmp_path, progress=False)
    damage(tmp_path / name, "truncated")
    with pytest.raises(ValueError, match="damaged run") as error:
        cs.load_run(tmp_path)
    assert "\n" not in str(error.value)


def test_signal_in_the_last_step_is_not_forgotten(tiny, toys, tmp_path):
    run = cs.train(tiny, toys, tmp_path / "run", progress=False, on_epoch=lambda run: os.kill(os.getpid(), signal.SIGINT))
    assert run.finished and run.stopped == "SIGINT" and cs.load_run(tmp_path / "run").finished


def test_folder_without_a_run_says_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="generator.pt.*train"):
        cs.load_run(tmp_path)
