"""Nothing lost: one file a run, resuming, signals, damage; many runs side by side."""
import contextlib, math, multiprocessing, os, pickle, signal, threading, time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import cspgan as cs

def same_run(a, b, watched=False):
    """Whether two runs agree in every weight, record and snapshot; watched: b has more to a record."""
    skip = {"seconds"} | ({"swd", "coverage"} if watched else set())
    records = [[{k: v for k, v in r.items() if k not in skip} for r in run.history] for run in (a, b)]
    weights = [run.generator.state_dict().values() for run in (a, b)]
    shots = [[(n, x.tolist()) for n, x in run.snapshots] for run in (a, b)]
    return records[0] == records[1] and all(map(torch.equal, *weights)) and shots[0] == shots[1]

@pytest.fixture(params=["bce", "converged"])
def config(request, tiny):
    """Two epochs of four steps with everything that has a state: EMA, BatchNorm, lazy D, cosine."""
    if request.param == "bce":
        return tiny.but(block_norm="both", d_every=2, epochs=2, epoch_images=64, weight_decay=0.1)
    return cs.CONVERGED.but(image_size=16, width=16, z_dim=8, batch_size=16, epochs=2, epoch_images=64)

def test_run_stopped_after_every_step_equals_one_that_was_not(config, toys, tmp_path, capsys):
    whole = cs.train(config, toys, progress=False)
    for step in range(1, 8):
        run = cs.train(config, toys, tmp_path / "run", progress=False, time_budget=0)
        assert not run.finished and run.stopped == "time"
        assert f"stopped at step {step} of 8" in capsys.readouterr().out
    run = cs.train(config, toys, tmp_path / "run", progress=False, time_budget=0)
    assert run.finished and not run.stopped and same_run(whole, run)
    assert same_run(whole, cs.load_run(tmp_path / "run"))
    again = cs.run_or_load(config, toys, tmp_path / "run", progress=False)
    said = capsys.readouterr().out
    assert same_run(whole, again) and again.finished and "loaded at step 8 of 8" in said
    assert all(str(run.environment[key]) in said for key in ("code", "date")) and config.label() in said

def test_every_part_of_the_state_is_needed(config, toys):
    """A checkpoint without one of its parts would not give the same run: none is saved in vain."""
    def finished(skip):
        first, second = (cs.Training(config, toys, torch.device("cpu")) for _ in range(2))
        for _ in range(3):
            first.advance()
        fresh, state = second.state_dict(), first.state_dict()
        second.load_state_dict({k: fresh[k] if k in skip else v for k, v in state.items()})
        for _ in range(3):
            second.advance()
        record = {k: v for k, v in second.record().items() if k != "seconds"}
        networks = second.kept, second.discriminator
        return record, [x.sum().item() for net in networks for x in net.state_dict().values()]
    whole = finished(())
    assert whole == finished(())
    parts = set(cs.Training(config, toys, torch.device("cpu")).state_dict())
    parts -= {"history", "snapshots", "seconds", "identity", "environment", "epoch_steps"}
    parts -= {"scale_g", "scale_d"} | ({"d_stats"} if config.d_every == 1 else set())
    twins = set() if config.ema_images else {"generator", "kept"}  # one network under two names
    for skip in [{part} for part in parts - twins] + [twins] * bool(twins):
        assert whole != finished(skip), skip

def test_run_that_crashes_or_is_killed_goes_on(config, toys, tmp_path):
    def crash(images):
        crash.seen += 1
        if crash.seen % 3 == 0:
            raise RuntimeError("power cut")
    crash.seen, run, whole = 0, None, cs.train(config, toys, progress=False)
    while not run:
        with contextlib.suppress(RuntimeError):
            run = cs.train(config, toys, tmp_path / "a", progress=crash, save_every=0)
    assert crash.seen > 9 and same_run(whole, run)
    spawn = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
    steps, told = spawn.Pipe()
    child = spawn.Process(target=cs.train, args=(config, toys, tmp_path / "b", told.send),
                          kwargs={"save_every": 0})
    child.start()
    assert all(steps.poll(120) and steps.recv() is not None for _ in range(4))
    child.kill(), child.join()
    assert 0 < steps_of(tmp_path / "b")[0] < 8
    assert same_run(whole, cs.train(config, toys, tmp_path / "b", progress=False))

def steps_of(*folders):
    return [torch.load(folder / "run.pt", weights_only=True)["step"] for folder in folders]

@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_save_and_return_the_run_so_far(config, toys, tmp_path, number):
    before = signal.getsignal(number)
    run = cs.train(config, toys, tmp_path, progress=lambda n: n and signal.raise_signal(number))
    assert run.stopped == number.name and not run.finished and signal.getsignal(number) == before
    assert same_run(cs.train(config, toys, progress=False), cs.train(config, toys, tmp_path, progress=False))
    with cs.stop_signals():
        [signal.raise_signal(which) for which in (number, signal.SIGTERM)]  # a scheduler's comes twice
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)

class Malicious:
    __reduce__ = lambda self: (os.mkdir, ("executed",))  # noqa: E731

@pytest.mark.parametrize("damage", [
    lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"text", lambda b: pickle.dumps(Malicious())])
def test_damaged_file_is_named_and_put_aside(tiny, toys, tmp_path, capsys, damage, monkeypatch):
    monkeypatch.chdir(tmp_path)
    whole = cs.train(tiny, toys, "run", progress=False)
    bad = damage(Path("run/run.pt").read_bytes())
    Path("run/run.pt").write_bytes(bad)
    assert same_run(whole, cs.train(tiny, toys, "run", progress=False))
    assert "damaged" in capsys.readouterr().out and Path("run.old1/run.pt").read_bytes() == bad
    assert not Path("executed").exists()

def test_a_good_file_goes_on_elsewhere_and_is_never_called_damaged(tiny, toys, tmp_path, capsys, monkeypatch):
    cs.train(tiny.but(epochs=2), toys, tmp_path / "run", progress=False, time_budget=0)
    file = tmp_path / "run/run.pt"  # of a GPU, whose random numbers have a short state
    torch.save({**torch.load(file), "noise": torch.zeros(16, dtype=torch.uint8)}, file)
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):  # as out of memory
        patch.setattr(cs, "half_for", lambda *_: 1 / 0)
        cs.train(tiny.but(epochs=2), toys, tmp_path / "run", progress=False)
    assert cs.train(tiny.but(epochs=2), toys, tmp_path / "run", progress=False).finished
    assert "loaded at step 1 of" in capsys.readouterr().out

def test_another_run_in_the_folder_is_kept_under_another_name(tiny, toys, tmp_path, capsys):
    first = cs.train(tiny, toys, tmp_path / "run", progress=False)
    cs.train(tiny.but(lr_d=1e-3), toys, tmp_path / "run", progress=False)
    assert "lr_d=0.0002 there, 0.001 here" in capsys.readouterr().out
    cs.train(tiny.but(lr_d=1e-3), toys.flip(3), tmp_path / "run", progress=False)
    assert "data=" in capsys.readouterr().out
    assert same_run(first, cs.load_run(tmp_path / "run.old1"))
    assert cs.load_run(tmp_path / "run.old2").config.lr_d == 1e-3

def test_more_epochs_go_on_where_the_rates_do_not_fall(tiny, toys, tmp_path, capsys):  # case 9
    tiny = tiny.but(block_norm="both")
    cs.train(tiny.but(epochs=2), toys, tmp_path / "run", progress=False)
    for _ in range(2):  # also when the second half is interrupted
        run = cs.train(tiny.but(epochs=4), toys, tmp_path / "run", progress=False, time_budget=0)
    run = cs.train(tiny.but(epochs=4), toys, tmp_path / "run", progress=False)
    whole = cs.train(tiny.but(epochs=4), toys, progress=False)
    assert run.finished and not (tmp_path / "run.old1").exists()
    assert all(map(torch.equal, whole.generator.state_dict().values(), run.generator.state_dict().values()))
    cs.train(tiny, toys, tmp_path / "run", progress=False)  # fewer than there are
    assert "epochs=4 there, 1 here" in capsys.readouterr().out
    falling = tiny.but(lr_end=0.1)
    cs.train(falling, toys, tmp_path / "falls", progress=False)
    cs.train(falling.but(epochs=2), toys, tmp_path / "falls", progress=lambda n: print("begins"))
    said = capsys.readouterr().out
    assert said.index("epochs=1 there, 2 here") < said.index("begins")

@pytest.mark.parametrize("images, words", [
    ("photos/", "'photos/'"), (torch.zeros(99, 3, 16, 16), "float32"), (cs.toy_faces(99, 32), "32, 32"),
    (cs.toy_faces(9, 16), "batch_size=16"), (None, "None")])
def test_wrong_images_are_named_with_what_was_expected(tiny, images, words):  # case 10
    with pytest.raises(ValueError, match=words) as error:
        cs.train(tiny, images)
    assert "expected a torch.uint8 tensor (N, 3, 16, 16)" in str(error.value)
    assert tiny.but(epoch_images=np.int64(64)).epoch_images == 64

def test_loss_that_is_not_finite_ends_in_its_message(tiny, toys, tmp_path, capsys, monkeypatch):  # case 13
    tiny, step = tiny.but(epochs=3), cs.g_step
    cs.train(tiny, toys, tmp_path / "run", progress=False, time_budget=0)
    good = (tmp_path / "run" / "run.pt").read_bytes()
    def broken(discriminator, *rest):
        with torch.no_grad():
            discriminator.to_logit.weight.fill_(math.nan)
        return step(discriminator, *rest)
    monkeypatch.setattr(cs, "g_step", broken)
    run = cs.train(tiny, toys, tmp_path / "run", progress=False, save_every=0)
    assert "not finite" in run.stopped and not run.finished
    assert "not finite" in capsys.readouterr().out and (tmp_path / "run" / "run.pt").read_bytes() == good

def test_full_disk_is_said_and_the_run_goes_on(tiny, toys, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch, "save", lambda *args: (_ for _ in ()).throw(OSError(28, "No space left")))
    run = cs.train(tiny, toys, tmp_path / "run", progress=False, save_every=0)
    assert run.finished and "No space left" in capsys.readouterr().out
    assert not [*(tmp_path / "run").iterdir()]
    with pytest.raises(FileNotFoundError, match="Train one"):
        cs.load_run(tmp_path / "run")

# ---- many runs side by side
@pytest.fixture
def photos(tmp_path, monkeypatch, toys):
    """A folder of pictures, whose cache will not lie in the home of whoever runs the tests."""
    monkeypatch.setenv("HOME", str(tmp_path))  # of the workers
    monkeypatch.setattr(cs.load_faces, "__defaults__", (tmp_path / ".cache/cspgan",))
    (tmp_path / "photos").mkdir()
    for k, image in enumerate(toys[:200]):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / f"photos/{k}.png")
    return tmp_path / "photos"

def meanwhile(condition, action):
    """In a thread: the action, as soon as the condition holds."""
    def follow():
        while not condition():
            time.sleep(0.1)
        action()
    threading.Thread(target=follow, daemon=True).start()

def test_many_runs_one_of_which_fails_and_one_of_which_dies(tiny, tmp_path, photos, capsys):
    good, dies, bad = [tmp_path / f"good{k}" for k in range(3)], tmp_path / "dies", tmp_path / "bad"
    jobs = [(tiny.but(seed=k, epochs=6), folder) for k, folder in enumerate(good)]
    jobs = [jobs[0], (tiny.but(epochs=99999), dies), *jobs[1:],  # dies: in the second process
            (tiny.but(batch_size=500, epoch_images=None), bad)]
    meanwhile(lambda: dies.exists() and (good[0] / "run.pt").exists(), lambda: os.kill(
        max(multiprocessing.active_children(), key=lambda p: p._identity).pid, signal.SIGKILL))
    reasons = cs.train_all(jobs, photos, measured_on=16, workers=2)
    assert reasons.keys() == {str(dies), str(bad)} and "terminated" in reasons[str(dies)]
    assert "expected a torch.uint8 tensor" in reasons[str(bad)]
    said = capsys.readouterr().out
    assert said.count("Decoding") == 1 and f"{bad}: ValueError" in said
    runs = [cs.load_run(folder) for folder in good]
    assert all(run.finished and "swd" in run.history[-1] for run in runs)
    assert all(run.environment["hardware"] == "1 CPU core" for run in runs)
    faces = cs.hold_out(cs.load_faces(photos, 16, tmp_path / "cache"))[0]
    assert same_run(cs.train(jobs[0][0], faces, progress=False), runs[0], watched=True)

def test_interrupting_saves_all_runs_and_the_next_call_goes_on(tiny, tmp_path, photos, capsys):
    jobs = [(tiny.but(seed=k, epochs=99999), tmp_path / f"{k}") for k in range(2)]
    folders = [folder for _, folder in jobs]
    meanwhile(lambda: all(folder.exists() for folder in folders), lambda: (
        time.sleep(1), os.kill(os.getpid(), signal.SIGINT)))
    with pytest.raises(KeyboardInterrupt, match="SIGINT"):
        cs.train_all(jobs, photos, measured_on=16, workers=2)
    steps = steps_of(*folders)
    assert all(0 < step < 199998 for step in steps)
    assert cs.train_all(jobs[:1], photos, time_budget=0, workers=1) == {str(folders[0]): "time"}
    assert steps_of(folders[0])[0] > steps[0] and "loaded at" not in capsys.readouterr().out

def test_workers_end_with_a_parent_that_is_killed(tiny, tmp_path, photos):
    folder, spawn = tmp_path / "run", multiprocessing.get_context("spawn")
    parent = spawn.Process(target=cs.train_all, args=([(tiny.but(epochs=99999), folder)], photos),
                           kwargs={"measured_on": 16, "workers": 1})
    parent.start()
    while not folder.exists():
        time.sleep(0.1)
    time.sleep(1)
    parent.kill()
    for _ in range(100):
        if (folder / "run.pt").exists():
            break
        time.sleep(0.2)
    assert steps_of(folder)[0] > 0  # saved, and ended
