"""Model families: per family one table that maps Hugging Face configs and tensor names to ours, and back.

A new family is a file with a `FAMILY` and a line in `_FAMILIES`. Nothing outside this folder asks for a family's name.
"""

from __future__ import annotations

import json
import re
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
from lexmill.models.families.table import HEADS, Family, Stored, Use

_ENCODERS = (bert, roberta, xlm_roberta, distilbert, ernie, albert, modernbert)
_DECODERS = (gpt2, llama, mistral, qwen2, qwen3, glm, glm4)
_BOTH = (t5, mt5)
_RECURRENT = (lstm, gru)
_FAMILIES = tuple(module.FAMILY for module in (*_ENCODERS, *_DECODERS, *_BOTH, *_RECURRENT))

__all__ = ["HEADS", "Family", "Stored", "Use", "find", "known", "recognise"]


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
    """The family of a Hugging Face config, by its `model_type`, or else by its architecture.

    The error about an unknown one names the family whose keys are most like these, and what that family does not know.
    """
    named = [str(name) for name in hf.get("architectures") or ()]
    for family in _FAMILIES:
        alike = family.name == hf["model_type"] if "model_type" in hf else named and named[0] in _classes(family)
        if alike:
            return family
    if "model_type" in hf:
        found, where = f"unknown model family '{hf['model_type']}'", f"{where}: model_type"
    else:
        found = f"unknown architecture '{named[0]}'" if named else "neither 'model_type' nor 'architectures' is given"
    raise UserError(found, where=where, hint="; ".join([f"known families: {_known()}", *_nearest(hf)]))


def _classes(family: Family) -> set[str]:
    return set(family.architectures.values())


_NOT_STRUCTURE = re.compile(
    r"model_type|architectures|auto_map|transformers_version|_name_or_path|(torch_)?dtype|use_cache|problem_type"
    r"|(id2label|label2id|num_labels)|.*_token_id|return_dict|output_\w+|initializer_\w+|.*(dropout|drop|pdrop).*"
)
"""Keys that say nothing about what a model computes, once it is trained."""
_MOST_KEYS = 12


def _nearest(hf: Mapping[str, Any]) -> list[str]:
    """What the family with the most keys in common is called, and which keys, with what value, it does not know."""
    keys = {name for name in hf if not _NOT_STRUCTURE.fullmatch(name)}
    family = max(_FAMILIES, key=lambda one: (len(keys & one.keys), -len(one.keys)))
    if not keys & family.keys:
        return []
    strange = [f"{name}={json.dumps(hf[name], default=str):.40}" for name in sorted(keys - family.keys)]
    more = [f"and {len(strange) - _MOST_KEYS} more"] if len(strange) > _MOST_KEYS else []
    lines = [f"nearest by its keys is '{family.name}'"]
    if strange:
        lines.append(f"which does not know {', '.join(strange[:_MOST_KEYS] + more)}")
    try:
        family.read_config(hf)
    except UserError as error:
        lines.append(f"and cannot represent {error.where}: {error.message}")
    return [", ".join(lines)]


def _known() -> str:
    return ", ".join(family.name for family in _FAMILIES)
