"""Presets against the tables they come from, labels, and what happens on a wrong value."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch

import cspgan as cs
from cspgan import BASELINE, PRESETS, Config

# Written out independently of the module: the assignment, and each preset's difference from it.
ASSIGNMENT = (
    "Config(image_size=128, head='sigmoid', flip=False, generator='cspup', z_dim=100, width=1024, "
    "ladder='cspup_first', deconv_kernel=4, block_act='relu', block_norm='none', d_norm=True, "
    "d_wider=1, d_fewer=0, init='dcgan', loss='bce', label_smoothing=0.0, r1=0.0, r2=0.0, "
    "batch_size=128, epochs=5, epoch_images=0, lr_g=0.0002, lr_d=0.0002, lr_width=0, lr_end=1.0, "
    "beta1=0.5, beta2=0.999, weight_decay=0.0, ema_images=0, d_every=1, seed=0)"
)
H1 = "block_act=leaky_relu, block_norm=both"
TANH = "ladder=cspup_last, block_act=tanh, block_norm={}, d_wider=2, batch_size=256, epochs=20"
TANH_BN = "head=tanh, " + TANH.format("right")
TABLE = f"""
baseline: no change
h0_more_epochs: epochs=20
h1_bn_leaky: {H1}
h2_l2_big_batch: {H1}, batch_size=256, weight_decay=0.0001
h3_smooth_tanh: head=tanh, {H1}, label_smoothing=0.1, lr_g=0.0008, lr_d=0.0003
tanh_bn: {TANH_BN}, lr_g=0.0001, lr_d=0.0001
low_lr: {TANH_BN}, lr_g=1e-05, lr_d=1e-05
fast_d: head=tanh, {TANH.format("both")}, lr_d=0.002
slow_d: {TANH_BN}, lr_d=2e-05
slow_d_equal_rates: {TANH_BN}
unit_range: {TANH.format("right")}, lr_d=2e-05
dcgan: generator=dcgan, lr_g=0.0001, lr_d=0.0001
dcgan_paper: head=tanh, generator=dcgan, loss=bce_logits
bce_logits: loss=bce_logits
lazy_d: d_every=2
shallow_d: d_fewer=1
leaky_block: block_act=leaky_relu
batch_64: batch_size=64
no_bn_d: head=relu, ladder=deconv_first, deconv_kernel=2, block_act=leaky_relu, d_norm=False
two_to_one: head=tanh, block_norm=both, lr_d=0.0001
adam_default: beta1=0.9
smooth_labels: {H1}, label_smoothing=0.1
tanh_head: head=tanh, {H1}
h3_rates: {H1}, lr_g=0.0008, lr_d=0.0003
converged: head=tanh, flip=True, {H1}, d_norm=False, d_wider=2, init=he, loss=relativistic, \
r1=2.0, r2=2.0, lr_g=0.002, lr_d=0.002, lr_width=64, lr_end=0.1, beta1=0.0, beta2=0.9, \
ema_images=20000
"""


def test_presets_are_the_tables_and_nothing_else():
    assert repr(Config()) == ASSIGNMENT
    assert PRESETS["baseline"] == Config()
    found = [f"{name}: {config.label()}" for name, config in PRESETS.items()]
    assert found == TABLE.strip().splitlines()


def test_label_is_the_difference():
    assert BASELINE.label() == "no change"
    assert BASELINE.but(lr_d=3e-4, head="tanh").label() == "head=tanh, lr_d=0.0003"
    found = BASELINE.label(BASELINE.but(lr_d=3e-4, seed=1))
    assert found == "lr_d=0.0002, seed=0"


def test_config_is_frozen_and_but_leaves_the_first_alone():
    with pytest.raises(dataclasses.FrozenInstanceError):
        BASELINE.seed = 1
    changed = BASELINE.but(seed=1).but(head="tanh")
    assert changed == Config(seed=1, head="tanh") != BASELINE
    assert BASELINE.pixel_range == (0, 1)
    assert changed.pixel_range == (-1, 1)


WRONG = f"""
image_size=100: expected one of [16, 32, 64, 128, 256]
loss='hinge': expected one of ['bce', 'bce_logits', 'relativistic']
ladder='first': expected one of ['cspup_first', 'deconv_first', 'cspup_last']
block_act='gelu': expected one of ['relu', 'leaky_relu', 'tanh']
flip='yes': expected one of [False, True]
batch_size='64': expected int from 2 to {10**12}
epochs=2.5: expected int from 1 to {10**12}
lr_width=True: expected int from 0 to {10**12}
d_every=0: expected int from 1 to {10**12}
lr_g=nan: expected float from 0 to {10**12}
lr_d=inf: expected float from 0 to {10**12}
r1=-1: expected float from 0 to {10**12}
lr_end=2.0: expected float from 0 to 1
beta1=1.0: expected float from 0 to 0.9999
label_smoothing=1.0: expected float from 0 to 0.99
seed=16384: expected int from 0 to 16383
d_fewer=5: expected int from 0 to 4
epoch_images=127: expected 0, or batch_size at least
"""


@pytest.mark.parametrize("message", WRONG.strip().splitlines())
def test_wrong_values_are_named_with_the_legal_ones(message):
    change = message.split(":")[0]
    changes = eval(f"dict({change})", {**vars(math)})  # which has nan and inf
    with pytest.raises(ValueError) as error:
        BASELINE.but(**changes)
    assert str(error.value) == message


def test_fields_that_do_not_exist_are_named_with_those_that_do():
    with pytest.raises(ValueError, match="no field .*lr_gg.*image_size.*seed"):
        BASELINE.but(lr_gg=1)


@pytest.mark.parametrize("name", vars(BASELINE))
def test_every_field_refuses_words_and_lists_and_nothing(name):
    for value in ("nonsense", [1], None):
        with pytest.raises(ValueError) as error:
            BASELINE.but(**{name: value})
        assert str(error.value).startswith(f"{name}={value!r}: expected ")


def test_numpys_values_are_taken_and_stored_as_plain_ones():
    as_numpy = {bool: np.bool_, int: np.int64, float: np.float64, str: np.str_}
    plain = dataclasses.asdict(BASELINE)
    config = Config(**{name: as_numpy[type(value)](value) for name, value in plain.items()})
    assert config == BASELINE
    for name, value in vars(config).items():
        assert type(value) is type(plain[name]), name
    there_and_back = json.loads(json.dumps(vars(config)))
    assert Config(**there_and_back) == BASELINE
    assert BASELINE.but(r1=2).label() == "r1=2.0"  # a label does not tell 2 from 2.0


def test_gpu_that_is_listed_but_cannot_be_used_is_named_at_once(monkeypatch, capsys):
    """As a P100 under a PyTorch without kernels for it: the first operation fails."""

    def no_kernel(*args, **options):
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "ones", no_kernel)
    assert cs.best_device.__wrapped__() == torch.device("cpu")
    said = capsys.readouterr().out
    assert "cannot be used" in said
    assert "no kernel image" in said
    assert "T4" in said
