import os
import signal
import sys
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the same tests everywhere: bit for bit holds on a CPU
os.environ["OMP_NUM_THREADS"] = "1"  # tiny networks: a second thread costs more than it brings
os.environ.pop("CSPGAN_DATA", None)  # a developer's own faces are none of the tests' business

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

import cspgan as cs

signal.signal(signal.SIGINT, signal.default_int_handler)  # a script's background job ignores it


@pytest.fixture(scope="session")
def toys():
    """256 procedural faces of 16 px."""
    return cs.toy_faces(256, 16, seed=3)


@pytest.fixture
def tiny():
    """The smallest config that has every part: 16 px, CSPup stem, one block, two steps an epoch."""
    return cs.BASELINE.but(
        image_size=16, width=16, z_dim=8, batch_size=16, epochs=1, epoch_images=32
    )
