"""Fixtures of every test: one thread, fixed seeds, and the optional data folder."""

from __future__ import annotations

import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Small tensors gain nothing from threads, and sums in one order are repeatable."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder with data/ and checkpoints/ that $PARETOPRUNE_DATA names."""
    root = os.environ.get("PARETOPRUNE_DATA")
    if not root:
        pytest.skip(
            "needs real data: set PARETOPRUNE_DATA to a folder with data/ and checkpoints/"
        )
    return Path(root)
