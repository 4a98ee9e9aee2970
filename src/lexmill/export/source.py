"""What is exported: an artefact, or a plain Hugging Face directory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lexmill import models
from lexmill.artifact import Artifact, is_huggingface
from lexmill.config import load as read_config
from lexmill.data.tokenizer import check_vocabulary, load_tokenizer
from lexmill.engine import Loaded, load, probes
from lexmill.errors import UserError
from lexmill.models import Model
from lexmill.tasks import Record, Task, find
from lexmill.tasks.classify import Classify, ClassifyOptions, Head
from lexmill.tasks.rank import Rank, RankOptions

LONGEST = 512
"""Tokens that texts are cut to for a head of a plain directory, which does not say how many it learnt from."""


@dataclass(frozen=True)
class Source:
    """A model to export, and the answers it must keep.

    Args:
        artifact: None where it is a plain Hugging Face directory.
        stored: what `probes.record` gave of it.
    """

    path: Path
    loaded: Loaded
    artifact: Artifact | None
    stored: Mapping[str, Any]

    @property
    def records(self) -> list[Record]:
        return [probe["record"] for probe in self.stored["probes"]]

    @property
    def evidence(self) -> list[dict[str, float]]:
        return [probe["evidence"] for probe in self.stored["probes"]]


def open_source(path: Path) -> Source:
    """What stands at a path, its hashes checked.

    A plain Hugging Face directory is taken for what its head does: it classifies, ranks where the head has one output,
    goes on with texts where it is causal, and embeds where it has no head.

    Raises:
        UserError: there is neither, or it cannot be exported as a whole.
    """
    if is_huggingface(path):
        loaded = load_pretrained(path)
        return Source(path, loaded, None, probes.record(loaded.task, loaded.model, loaded.tokenizer))
    artifact = Artifact.open(path)
    loaded = load(artifact)
    if loaded.adapters:
        hint = "fit it again with this adapter alone, and export that"
        raise UserError("an artefact with several adapters cannot be exported", where=str(path), hint=hint)
    return Source(path, loaded, artifact, json.loads(artifact.file(probes.FILE).read_text("utf-8")))


def load_pretrained(directory: Path) -> Loaded:
    """A plain Hugging Face directory with the task that its head does; see `open_source`."""
    model, tokenizer = models.load(directory), load_tokenizer(directory)
    check_vocabulary(tokenizer, model.config.vocab_size, where=str(directory))
    task = _headed(model, directory) if "output.weight" in model.spare("classifier") else _headless(model, directory)
    return Loaded(task, model.eval(), tokenizer, directory.resolve().name, path=directory)


def _headed(model: Model, directory: Path) -> Task:
    """The task of the classification head that the files hold, which the model gets."""
    config = model.origin.config
    if any(name.endswith("ForTokenClassification") for name in config.get("architectures") or ()):
        hint = "make an artefact of it with: lexmill fit DATA --task tag --model DIR"
        raise UserError("the directory does not say how its tokens make words", where=str(directory), hint=hint)
    longest = min(model.trunk.max_tokens, LONGEST)
    if len(model.spare("classifier")["output.weight"]) == 1:
        model.add_stored_classifier("score")
        columns = {"text": "text", "text_pair": "text_pair", "label": "label"}
        return Rank(columns, 0.0, 1.0, graded=True, options=RankOptions(max_length=longest))
    outputs = model.add_stored_classifier("label").shape.num_labels
    named = config.get("id2label") or {}
    labels = tuple(str(named.get(str(index), f"LABEL_{index}")) for index in range(outputs))
    several = config.get("problem_type") == "multi_label_classification"
    head = Head("label", "label", labels, (1.0,) * outputs)
    options = ClassifyOptions(max_length=longest, multi_label=several)
    return Classify({"text": "text", "label": "label"}, [head], options)


def _headless(model: Model, directory: Path) -> Task:
    """A task that needs nothing beyond what pretraining leaves."""
    if model.trunk.sides > 1:
        hint = "make an artefact of it with: lexmill fit DATA --task seq2seq --model DIR"
        raise UserError("the directory does not say what its decoder is to write", where=str(directory), hint=hint)
    task = find("generate" if model.config.causal else "embed")
    options = read_config(task.Options, stored=dict(task.defaults(directory))).value
    found = task.from_records([], {"text": "text"}, options)
    found.attach(model)
    return found
