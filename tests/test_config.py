"""Presets against the tables they come from, labels, and what happens on a wrong value."""
import dataclasses, json

import numpy as np
import pytest
import torch

import cspgan as cs
from cspgan import BASELINE, PRESETS, Config

PLAIN = {  # the assignment, every field, written out independently of the module
    "image_size": 128, "head": "sigmoid", "flip": False, "generator": "cspup", "z_dim": 100,
    "width": 1024, "ladder": "cspup_first", "deconv_kernel": 4, "block_act": "relu",
    "block_norm": "none", "d_norm": True, "d_wider": 1, "d_fewer": 0, "init": "dcgan", "loss": "bce",
    "label_smoothing": 0.0, "r1": 0.0, "r2": 0.0, "batch_size": 128, "epochs": 5,
    "epoch_images": None, "lr_g": 2e-4, "lr_d": 2e-4, "lr_width": 0, "lr_end": 1.0, "beta1": 0.5,
    "beta2": 0.999, "weight_decay": 0.0, "ema_images": 0, "d_every": 1, "seed": 0}
H1 = {"block_norm": "both", "block_act": "leaky_relu"}
TANH_BN = {"ladder": "cspup_last", "block_act": "tanh", "block_norm": "right", "head": "tanh",
           "d_wider": 2, "batch_size": 256, "epochs": 20}
CONVERGED = {**H1, "loss": "relativistic", "r1": 2.0, "r2": 2.0, "d_norm": False, "d_wider": 2,
             "init": "he", "head": "tanh", "flip": True, "beta1": 0.0, "beta2": 0.9, "lr_g": 2e-3,
             "lr_d": 2e-3, "lr_width": 64, "lr_end": 0.1, "ema_images": 20_000}
CHANGES = {
    "baseline": {}, "h0_more_epochs": {"epochs": 20}, "h1_bn_leaky": H1,
    "h2_l2_big_batch": {**H1, "batch_size": 256, "weight_decay": 1e-4},
    "h3_smooth_tanh": {**H1, "label_smoothing": 0.1, "lr_d": 3e-4, "lr_g": 8e-4, "head": "tanh"},
    "tanh_bn": {**TANH_BN, "lr_g": 1e-4, "lr_d": 1e-4},
    "low_lr": {**TANH_BN, "lr_g": 1e-5, "lr_d": 1e-5},
    "fast_d": {**TANH_BN, "block_norm": "both", "lr_g": 2e-4, "lr_d": 2e-3},
    "slow_d": {**TANH_BN, "lr_g": 2e-4, "lr_d": 2e-5},
    "slow_d_equal_rates": {**TANH_BN, "lr_g": 2e-4, "lr_d": 2e-4},
    "unit_range": {**TANH_BN, "lr_g": 2e-4, "lr_d": 2e-5, "head": "sigmoid"},
    "dcgan": {"generator": "dcgan", "lr_g": 1e-4, "lr_d": 1e-4},
    "bce_logits": {"loss": "bce_logits"}, "lazy_d": {"d_every": 2}, "shallow_d": {"d_fewer": 1},
    "leaky_block": {"block_act": "leaky_relu"}, "batch_64": {"batch_size": 64},
    "no_bn_d": {"ladder": "deconv_first", "deconv_kernel": 2, "block_act": "leaky_relu",
                "head": "relu", "d_norm": False},
    "two_to_one": {"block_norm": "both", "head": "tanh", "lr_g": 2e-4, "lr_d": 1e-4},
    "adam_default": {"beta1": 0.9}, "smooth_labels": {**H1, "label_smoothing": 0.1},
    "tanh_head": {**H1, "head": "tanh"},
    "h3_rates": {**H1, "lr_d": 3e-4, "lr_g": 8e-4},
    "converged": CONVERGED}

def test_presets_are_the_tables_and_nothing_else():
    assert list(PRESETS) == list(CHANGES) and PRESETS["baseline"] == BASELINE == Config()
    for name, change in CHANGES.items():
        assert dataclasses.asdict(PRESETS[name]) == {**PLAIN, **change}, name

def test_ablations_take_one_part_out_of_converged():
    parts = {"without_pairs": {"loss": "bce_logits"}, "without_penalties": {"r1": 0.0, "r2": 0.0},
             "without_bn_in_g": {"block_norm": "none"}, "without_he": {"init": "dcgan"},
             "without_wide_d": {"d_wider": 1}, "without_flip": {"flip": False},
             "without_ema": {"ema_images": 0}, "without_cspup": {"generator": "dcgan"}}
    whole = {**PLAIN, **CONVERGED}
    assert cs.ABLATIONS.keys() == parts.keys()
    for name, change in parts.items():
        assert dataclasses.asdict(cs.ABLATIONS[name]) == {**whole, **change} != whole, name

def test_label_is_the_difference():
    assert BASELINE.label() == "no change"
    assert BASELINE.but(lr_d=3e-4, head="tanh").label() == "head=tanh, lr_d=0.0003"
    assert PRESETS["h3_smooth_tanh"].label(PRESETS["h1_bn_leaky"]) == (
        "head=tanh, label_smoothing=0.1, lr_g=0.0008, lr_d=0.0003")

def test_config_is_frozen_and_but_leaves_the_first_alone():
    with pytest.raises(dataclasses.FrozenInstanceError):
        BASELINE.seed = 1
    assert BASELINE.but(seed=1).but(head="tanh") == Config(seed=1, head="tanh") != BASELINE
    assert BASELINE.pixel_range == (0, 1) and BASELINE.but(head="tanh").pixel_range == (-1, 1)

@pytest.mark.parametrize("changes, words", [
    ({"lr_gg": 1}, ["lr_gg", "expected one of ['lr_g']"]),
    ({"colour": 1}, ["colour", "image_size", "seed"]),
    ({"image_size": 100}, ["image_size=100", "16, 32, 64, 128, 256"]),
    ({"loss": "hinge"}, ["loss='hinge'", "'bce', 'bce_logits', 'relativistic'"]),
    ({"ladder": "first"}, ["ladder='first'", "'cspup_first', 'deconv_first', 'cspup_last'"]),
    ({"flip": "yes"}, ["flip='yes'", "True, False"]),
    ({"batch_size": "64"}, ["batch_size='64'", "whole number from 2"]),
    ({"epochs": 2.5}, ["epochs=2.5", "whole number from 1"]),
    ({"d_fewer": 5}, ["d_fewer=5", "from 0 to 4"]),
    ({"d_fewer": 2, "image_size": 16}, ["d_fewer=2", "from 0 to 1"]),
    ({"epoch_images": 127}, ["epoch_images=127", "from 128"]),
    ({"lr_g": float("nan")}, ["lr_g=nan", "a number from 0"]),
    ({"lr_d": float("inf")}, ["lr_d=inf", "a number from 0"]),
    ({"lr_width": -1}, ["lr_width=-1", "from 0"]), ({"r1": -1}, ["r1=-1", "from 0"]),
    ({"lr_end": 2.0}, ["lr_end=2.0", "from 0 to 1"]), ({"beta1": 1.0}, ["from 0 to 0.9"]),
    ({"label_smoothing": 1.0}, ["label_smoothing=1.0", "from 0 to 0.99"]),
    ({"seed": 2**62}, [f"seed={2**62}", "from 0 to"])])
def test_wrong_values_are_named_with_the_legal_ones(changes, words):
    with pytest.raises(ValueError) as error:
        BASELINE.but(**changes)
    assert all(word in str(error.value) for word in words), error.value

@pytest.mark.parametrize("name", PLAIN)
def test_every_field_refuses_words_and_truth_values_and_nothing(name):
    wrong = ["nonsense", [1]] + [None] * (name != "epoch_images")
    wrong += [True, False] * (type(PLAIN[name]) is not bool)  # Python takes them for 1 and 0
    for value in wrong:
        with pytest.raises(ValueError) as error:
            BASELINE.but(**{name: value})
        assert str(error.value).startswith(f"{name}={value!r}: expected "), value

def test_numpys_values_are_taken_and_stored_as_plain_ones():
    as_numpy = {bool: np.bool_, int: np.int64, float: np.float64, str: np.str_, type(None): np.int32}
    config = Config(**{name: as_numpy[type(value)](640 if value is None else value)
                       for name, value in PLAIN.items()})
    assert config == BASELINE.but(epoch_images=640)
    for name, value in dataclasses.asdict(config).items():
        assert type(value) is (int if name == "epoch_images" else type(PLAIN[name])), name
    assert Config(**json.loads(json.dumps(dataclasses.asdict(config)))) == config
    assert type(BASELINE.but(r1=2).r1) is float  # else a label would tell 2 from 2.0

def test_gpu_that_is_listed_but_cannot_be_used_is_named_at_once(monkeypatch, capsys):
    """As a P100 under a PyTorch without kernels for it: the first operation fails."""
    def no_kernel(*args, **options):
        raise RuntimeError("no kernel image is available")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "ones", no_kernel)
    assert cs.best_device.__wrapped__() == torch.device("cpu")
    assert all(map(capsys.readouterr().out.__contains__, ("cannot be used", "no kernel image", "T4")))

@pytest.mark.parametrize("capability, half", [((9, 0), torch.bfloat16), ((8, 0), torch.bfloat16),
                                              ((7, 5), torch.float16)])
def test_half_precision_is_asked_of_the_card_and_never_where_there_are_penalties(
        monkeypatch, capability, half, tiny, toys):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    gpu, cpu, real = torch.device("cuda"), torch.device("cpu"), cs.Training  # which runs on the CPU
    monkeypatch.setattr(cs, "Training", lambda config, images, _, half: real(config, images, cpu, half))
    assert cs.half_for(tiny, toys, gpu) is half and cs.half_for(tiny, toys, cpu) is None
    assert cs.half_for(tiny.but(r1=1.0), toys, gpu) is None
    assert cs.half_for(tiny.but(r2=1.0), toys, gpu) is None
