"""The shell commands, and that their errors are one line."""

import json

import pytest

import cspgan as cs

TINY = ["image_size=16", "width=16", "z_dim=8", "batch_size=16", "epochs=1", "epoch_images=64"]


def shell(arguments):
    with pytest.raises(SystemExit) as stop:
        cs.main(arguments)
    assert not stop.value.code


@pytest.fixture
def images(toys, tmp_path):
    from PIL import Image

    folder = tmp_path / "photos"
    folder.mkdir()
    for k, face in enumerate(toys[:200]):
        Image.fromarray(face.permute(1, 2, 0).numpy()).save(folder / f"{k:03}.png")
    return folder


def test_train_sample_evaluate_on_a_folder(images, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cs, "CACHE_DIR", tmp_path / "cache")
    shell(["train", "h1_bn_leaky", *TINY, "--images", str(images), "head=tanh", "lr_d=1e-3"])
    run = cs.load_run("results/latest/shell/h1_bn_leaky")
    assert run.config.head == "tanh" and run.config.lr_d == 1e-3 and run.config.block_norm == "both"
    cs.main(["sample", "results/latest/shell/h1_bn_leaky", "--n", "9"])
    assert (tmp_path / "results/latest/shell/h1_bn_leaky/samples.png").stat().st_size > 1000
    capsys.readouterr()
    cs.main(["evaluate", "results/latest/shell/h1_bn_leaky", "--images", str(images)])
    record = json.loads(capsys.readouterr().out)
    assert record["measured_on"] == 10 and record["swd"]["avg"] > 0


def test_interrupted_command_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cs, "find_faces", lambda: None)
    for _ in range(4):
        shell(["train", "baseline", *TINY, "--time-budget", "0", "--run", "mine"])
    assert "at step 3 of 4" in capsys.readouterr().out and cs.load_run("mine").finished


@pytest.mark.parametrize("arguments, words", [
    (["train", "baseline", "lr_gg=1"], "did you mean 'lr_g'"),
    (["train", "baseline", "lr_g"], "'lr_g': expected field=value"),
    (["train", "baseline", "head=sofmax"], "'tanh'"),
    (["train", "baseline", "--images", "nowhere"], "nowhere: no such folder"),
    (["sample", "nowhere"], "no finished run"),
    (["evaluate", "nowhere"], "no finished run"),
])
def test_errors_are_one_line(arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        cs.main(arguments)
    assert words in str(stop.value) and "\n" not in str(stop.value) and str(stop.value).startswith(f"cspgan.py {arguments[0]}: ")


def test_unknown_option_is_named(capsys):
    with pytest.raises(SystemExit):
        cs.main(["train", "baseline", "--imges", "x"])
    assert "unknown argument '--imges'" in capsys.readouterr().err
