"""What a model leaves in an artefact, whichever verb made it."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer

from lexmill import models
from lexmill.artifact import Environment, Writer
from lexmill.engine import probes
from lexmill.engine.loaded import Loaded
from lexmill.hardware import describe

TOKENIZER_FILES = ("tokenizer_config.json", "special_tokens_map.json")
"""What stands beside `tokenizer.json` for other programs."""


def write_model(writer: Writer, loaded: Loaded, source: Path) -> None:
    """The model, its tokenizer, what its task adds, and the probes as it answers them in memory.

    Args:
        source: the directory that the tokenizer is from.
    """
    named = {name: names for name, names in loaded.task.labels().items() if names}
    only = next(iter(named.values())) if len(named) == 1 else None
    models.save(loaded.model, writer.path("config.json").parent, labels=only)
    for name, content in loaded.task.files(loaded.model).items():
        writer.path(name).write_text(content, "utf-8")
    loaded.tokenizer.no_truncation()
    loaded.tokenizer.save(str(writer.path("tokenizer.json")), pretty=False)
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            writer.path(name).write_text(with_ids(loaded.tokenizer, (source / name).read_text("utf-8")), "utf-8")
    recorded = probes.record(loaded.task, loaded.model, loaded.tokenizer)
    writer.path(probes.FILE).write_text(json.dumps(recorded, ensure_ascii=False), "utf-8")


def with_ids(tokenizer: Tokenizer, text: str) -> str:
    """A file about a tokenizer, with the ids that this one has for its special tokens."""
    described = json.loads(text)
    if "added_tokens_decoder" not in described:
        return text
    named = {one["content"]: one for one in described["added_tokens_decoder"].values()}
    ids = {name: tokenizer.token_to_id(name) for name in named}
    described["added_tokens_decoder"] = {str(ids[name]): one for name, one in named.items() if ids[name] is not None}
    return json.dumps(described, indent=2, ensure_ascii=False) + "\n"


def environment() -> Environment:
    """This machine, as a manifest has it."""
    machine = describe()
    return Environment(
        torch=str(machine["torch"]),
        cpu_capability=str(machine["cpu_capability"]),
        threads=int(machine["threads"]),
    )
