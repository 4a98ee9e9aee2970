"""Model families: per family one table that maps Hugging Face configs and tensor names to ours, and back.

A new family is a file with a `FAMILY` and a line in `_FAMILIES`. Nothing outside this folder asks for a family's name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lexmill.errors import UserError
from lexmill.models.families import (
    albert,
    bert,
    distilbert,
    ernie,
    glm,
    glm4,
    gpt2,
    gru,
    llama,
    lstm,
    mistral,
    modernbert,
    mt5,
    qwen2,
    qwen3,
    roberta,
    t5,
    xlm_roberta,
)
from lexmill.models.families.table import Family, Stored, Use

_ENCODERS = (bert, roberta, xlm_roberta, distilbert, ernie, albert, modernbert)
_DECODERS = (gpt2, llama, mistral, qwen2, qwen3, glm, glm4)
_BOTH = (t5, mt5)
_RECURRENT = (lstm, gru)
_FAMILIES = tuple(module.FAMILY for module in (*_ENCODERS, *_DECODERS, *_BOTH, *_RECURRENT))

__all__ = ["Family", "Stored", "Use", "find", "known", "recognise"]


def known() -> tuple[Family, ...]:
    """All families."""
    return _FAMILIES


def find(name: str, where: str | None = None) -> Family:
    """The family of this name, which is Hugging Face's `model_type`, or a `UserError` that lists the known ones."""
    for family in _FAMILIES:
        if family.name == name:
            return family
    raise UserError(f"unknown model family '{name}'", where=where, hint=f"known families: {_known()}")


def recognise(hf: Mapping[str, Any], where: str) -> Family:
    """The family of a Hugging Face config, by its `model_type`, or else by its architecture."""
    if "model_type" in hf:
        return find(str(hf["model_type"]), f"{where}: model_type")
    named = [str(name) for name in hf.get("architectures") or ()]
    for family in _FAMILIES:
        if any(name in family.architectures.values() for name in named):
            return family
    found = f"unknown architecture '{named[0]}'" if named else "neither 'model_type' nor 'architectures' is given"
    raise UserError(found, where=where, hint=f"known families: {_known()}")


def _known() -> str:
    return ", ".join(family.name for family in _FAMILIES)
