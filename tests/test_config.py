"""Presets, labels, and what happens on a wrong value."""

import dataclasses

import pytest
import torch

import cspgan as cs
from cspgan import BASELINE, PRESETS, Config

H1 = {"block_norm": "both", "block_act": "leaky_relu"}
SLOW_D = {"lr_d": 2e-5, "head": "tanh", "block_norm": "right", "block_act": "tanh", "batch_size": 256}
CHANGES = {  # the assignment's sections and the other students' experiments, written out independently of the module
    "baseline": {},
    "h0_more_epochs": {"epochs": 20},
    "h1_bn_leaky": H1,
    "h2_l2_big_batch": {**H1, "batch_size": 256, "weight_decay": 1e-4},
    "h3_smooth_tanh": {**H1, "label_smoothing": 0.1, "lr_d": 3e-4, "lr_g": 8e-4, "head": "tanh"},
    "slow_d": SLOW_D,
    "slow_d_equal_rates": {key: value for key, value in SLOW_D.items() if key != "lr_d"},
    "unit_range": {key: value for key, value in SLOW_D.items() if key != "head"},
    "fast_d": {"lr_d": 2e-3, "block_norm": "both"},
    "low_lr": {"lr_g": 1e-5, "lr_d": 1e-5},
    "tanh_block": {"block_act": "tanh", "block_norm": "right", "lr_g": 1e-4, "lr_d": 1e-4},
    "bce_logits": {"loss": "bce_logits"},
    "lazy_d": {"d_every": 2},
    "shallow_d": {"d_fewer": 1},
    "no_bn_d": {"d_norm": False, "stem": "deconv", "deconv_kernel": 2},
    "batch_64": {"batch_size": 64},
    "leaky_block": {"block_act": "leaky_relu"},
    "dcgan": {"generator": "dcgan", "lr_g": 1e-4, "lr_d": 1e-4},
    "adam_default": {"beta1": 0.9},
    "smooth_labels": {**H1, "label_smoothing": 0.1},
    "tanh_head": {**H1, "head": "tanh"},
    "h3_rates": {**H1, "lr_d": 3e-4, "lr_g": 8e-4},
    "converged": {**H1, "loss": "relativistic", "r1": 2.0, "r2": 2.0, "d_norm": False, "d_wider": 2, "init": "he", "head": "tanh",
                  "flip": True, "beta1": 0.0, "beta2": 0.9, "lr_g": 2e-3, "lr_d": 2e-3, "lr_end": 0.1, "ema_images": 20_000},
}


def test_baseline_is_the_assignment():
    assert Config() == BASELINE
    expected = {"image_size": 128, "width": 1024, "z_dim": 100, "head": "sigmoid", "block_act": "relu", "block_norm": "none",
                "loss": "bce", "lr_g": 2e-4, "lr_d": 2e-4, "beta1": 0.5, "beta2": 0.999, "batch_size": 128, "epochs": 5,
                "weight_decay": 0.0, "label_smoothing": 0.0, "d_every": 1, "generator": "cspup", "stem": "cspup"}
    assert {key: getattr(BASELINE, key) for key in expected} == expected


@pytest.mark.parametrize("name", CHANGES)
def test_preset_changes_exactly_what_it_names(name):
    assert {key: new for key, (_, new) in PRESETS[name].differences(BASELINE).items()} == CHANGES[name]


def test_every_preset_is_listed_here_and_has_a_reference_that_ran_before_it():
    assert list(PRESETS) == list(CHANGES)
    names = list(cs.RUNS)
    assert all(names.index(reference) < names.index(name) for name, (_, reference) in cs.RUNS.items() if name != "baseline")


def test_ablations_change_one_part():
    changed = {name: set(config.differences(PRESETS[base])) for name, (config, base) in cs.ABLATIONS.items()}
    assert all(changed.values()) and len(set(cs.ABLATIONS.values())) == len(cs.ABLATIONS)
    assert {name: fields for name, fields in changed.items() if len(fields) > 1} == {"without_penalties": {"r1", "r2"}}


def test_long_runs_are_as_long_as_h0_or_a_tenth_of_it_and_nothing_else():
    for name, (config, base) in cs.LONG.items():
        assert set(config.differences(PRESETS[base])) == {"epochs"}
        assert config.epochs == (2 if name == "converged_2" else PRESETS["h0_more_epochs"].epochs)


@pytest.mark.parametrize("name", [*CHANGES, *cs.ABLATIONS])
def test_preset_trains_two_steps(name, toys, tiny):
    preset, _ = cs.RUNS[name]
    small = preset.but(image_size=16, width=16, z_dim=8, epochs=1, batch_size=preset.batch_size // 8,
                       epoch_images=2 * preset.batch_size // 8)
    run = cs.train(small, toys, progress=False)
    assert [record["step"] for record in run.history] == [1, 2]
    assert all(torch.tensor([*record.values()]).isfinite().all() for record in run.history)
    fresh = cs.GENERATORS[small.generator](small).state_dict()
    state = run.generator.state_dict()
    assert state.keys() == cs.GENERATORS[small.generator](small).state_dict().keys()
    assert any(not torch.equal(fresh[key], value) for key, value in state.items())


def test_label_is_the_difference():
    assert BASELINE.label() == "no change"
    assert BASELINE.but(lr_d=3e-4, head="tanh").label() == "head=tanh, lr_d=0.0003"
    assert PRESETS["h3_smooth_tanh"].label(PRESETS["h1_bn_leaky"]) == "head=tanh, label_smoothing=0.1, lr_g=0.0008, lr_d=0.0003"


def test_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        BASELINE.seed = 1


@pytest.mark.parametrize("changes, words", [
    ({"lr_gg": 1}, ["lr_gg", "lr_g"]),
    ({"colour": 1}, ["colour", "image_size"]),
    ({"image_size": 100}, ["image_size=100", "128"]),
    ({"head": "softmax"}, ["'softmax'", "'tanh'"]),
    ({"batch_size": 0}, ["batch_size=0", "at least 2"]),
    ({"batch_size": "64"}, ["batch_size='64'", "whole number"]),
    ({"epochs": 2.5}, ["epochs=2.5", "whole number"]),
    ({"image_size": 64.0}, ["image_size=64.0"]),
    ({"lr_g": float("inf")}, ["lr_g=inf"]),
    ({"epoch_images": 4000.5}, ["epoch_images=4000.5"]),
    ({"width": 0}, ["width=0"]),
    ({"lr_g": -1e-4}, ["lr_g=-0.0001"]),
    ({"lr_g": float("nan")}, ["lr_g=nan"]),
    ({"label_smoothing": 1.5}, ["label_smoothing=1.5", "below 1"]),
    ({"d_fewer": 5}, ["d_fewer=5", "has 5"]),
    ({"init": "xavier"}, ["'xavier'", "'he'"]),
    ({"loss": "hinge"}, ["'hinge'", "'relativistic'"]),
    ({"augment": 1}, ["augment=1"]),
    ({"flip": "yes"}, ["flip='yes'"]),
    ({"d_wider": 0}, ["d_wider=0", "at least 1"]),
    ({"lr_end": 2.0}, ["lr_end=2.0", "0 to 1"]),
    ({"r1": -1}, ["r1=-1"]),
    ({"epoch_images": 5}, ["epoch_images=5", "128"]),
])
def test_wrong_values_are_named_with_the_legal_ones(changes, words):
    with pytest.raises(ValueError) as error:
        BASELINE.but(**changes)
    for word in words:
        assert word in str(error.value)


def test_gpu_that_is_listed_but_cannot_be_used_is_named_at_once(monkeypatch, capsys):
    """As a P100 under a PyTorch without kernels for it: the first operation fails, not is_available()."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *args: "Tesla P100")
    monkeypatch.setattr(cs.F, "conv2d", lambda *args: (_ for _ in ()).throw(RuntimeError("no kernel image is available")))
    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda *args, device=None: ones(*args))
    assert cs.best_device.__wrapped__() == torch.device("cpu")
    said = capsys.readouterr().out
    assert "Tesla P100 is listed but cannot be used" in said and "no kernel image" in said and "T4" in said
