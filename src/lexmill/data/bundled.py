"""Public data that ships with the package."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path


def banking77() -> tuple[Path, Path]:
    """Train and test files of BANKING77 (Casanueva et al., 2020): 10,003 and 3,080 questions to a bank, 77 intents.

    Columns `text` and `label`; CC BY 4.0, see `LICENSE.md` beside the files.
    """
    folder = Path(str(files("lexmill"))) / "bundled" / "banking77"
    return folder / "train.jsonl.xz", folder / "test.jsonl.xz"


def structure(name: str) -> Path:
    """The directory of a model that is trained from scratch: its `config.json`, and neither weights nor tokenizer."""
    return Path(str(files("lexmill"))) / "bundled" / "models" / name
