"""A plain Hugging Face directory, or an adapter that `peft` wrote for one, as what its head does."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from tokenizers import Tokenizer

from lexmill import models
from lexmill.adapt import load_adapter, refuse_unplaced, take_heads, task_of
from lexmill.config import load as read_config
from lexmill.data.tokenizer import check_vocabulary, load_tokenizer
from lexmill.engine.loaded import Loaded
from lexmill.errors import UserError
from lexmill.models import Model
from lexmill.models.heads import Head as ModelHead
from lexmill.tasks import Task, find
from lexmill.tasks.classify import Classify, ClassifyOptions, Head
from lexmill.tasks.rank import HEAD as RANK
from lexmill.tasks.rank import Rank, RankOptions

LONGEST = 512
"""Tokens that texts are cut to for a head of a plain directory, which does not say how many it learnt from."""
_CLASSIFIES = ("ForSequenceClassification", "SEQ_CLS")
_UNSAID = {
    "TokenClassification": ("how its tokens make words", "tag"),
    "TOKEN_CLS": ("how its tokens make words", "tag"),
    "QuestionAnswering": ("how its windows overlap", "answer"),
    "QUESTION_ANS": ("how its windows overlap", "answer"),
    "MultipleChoice": ("how choices are laid out", "rank"),
}
"""By the end of a class of `transformers`, or the task of an adapter of `peft`: what the files leave open, and the task
that a new head would learn."""


def load_pretrained(
    directory: Path, *, adapter: Path | None = None, labels: Sequence[str] = (), pairs: bool = False
) -> Loaded:
    """A plain Hugging Face directory, taken for what its head does: it classifies, ranks where the head has one output,
    goes on with texts where it is causal, and embeds where it has no head.

    Args:
        adapter: a directory that `peft` wrote; its matrices are added beside those of the model, and its heads take the
            place of the model's.
        labels: names of the classes in the order of the head's outputs; by default those of `config.json`, or
            `LABEL_0` and so on.
        pairs: the classes are those of two texts together, which the files do not say.

    Raises:
        UserError: files are missing or broken or do not fit each other, or do not say enough to answer anybody.
    """
    model, tokenizer = models.load(directory), load_tokenizer(directory)
    where, adapted = str(adapter or directory), None if adapter is None else task_of(adapter)
    classes = model.origin.config.get("architectures")
    called = [adapted] if adapted else list(map(str, classes)) if isinstance(classes, list) else []
    if model.heads:
        raise UserError("the model of an artefact, without its manifest", where=where, hint="copy all of it")
    _refuse_unsaid(called, where)
    check_vocabulary(tokenizer, model.config.vocab_size, where=str(directory))
    taken: Collection[str] = ()
    if adapter is not None:
        load_adapter(model, adapter)
        taken = take_heads(model, adapter)
    headed = "output.weight" in model.spare("classifier") and adapted != "FEATURE_EXTRACTION"
    if not headed and any(name.endswith(_CLASSIFIES) for name in called):
        raise UserError("the classification head is missing", where=where, hint="copy all files again")
    if (labels or pairs) and not headed:
        what = "there is no classification head" + (" to name the labels of" if labels else " for pairs")
        raise UserError(what, where=where)
    task = _headed(model, directory, labels, pairs=pairs) if headed else _headless(model, directory, tokenizer)
    if adapter is not None:
        refuse_unplaced(model, taken, adapter)
        if model.trunk.has_prompt and any(cast("ModelHead", head).pooling == "mean" for head in model.heads.values()):
            raise UserError("peft takes the mean over a prompt too, and here only texts are", where=where)
    return Loaded(task, model.eval(), tokenizer, directory.resolve().name, path=directory)


def _refuse_unsaid(called: Sequence[str], where: str) -> None:
    """Raise a `UserError` where a head does what nobody can do without knowing more than the files say.

    Args:
        called: what the files call what the model does: the task of an adapter, else the classes of `transformers`.
    """
    for name in called:
        for end, (unsaid, task) in _UNSAID.items():
            if name.endswith(end):
                hint = f"make an artefact of it with: lexmill fit DATA --task {task} --model DIR"
                raise UserError(f"the directory does not say {unsaid}", where=where, hint=hint)


def _headed(model: Model, directory: Path, labels: Sequence[str], *, pairs: bool) -> Task:
    """The task of the classification head that the files hold, which the model gets."""
    config = model.origin.config
    longest = min(model.trunk.max_tokens, LONGEST)
    if len(model.spare("classifier")["output.weight"]) == 1:
        if labels:
            raise UserError("a head of one output gives a score, and no label", where="--labels")
        model.add_stored_classifier(RANK)
        columns = {"text": "text", "text_pair": "text_pair", "label": "label"}
        return Rank(columns, 0.0, 1.0, graded=True, options=RankOptions(max_length=longest))
    outputs = model.add_stored_classifier("label").shape.num_labels
    if config.get("problem_type") == "regression":
        raise UserError(f"a head of {outputs} numbers, which are no classes", where=str(directory / "config.json"))
    said = config.get("id2label")
    named = _named(said if isinstance(said, dict) else {}, outputs, labels)
    several = config.get("problem_type") == "multi_label_classification"
    head = Head("label", "label", named, (1.0,) * outputs)
    options = ClassifyOptions(max_length=longest, multi_label=several)
    texts = ("text", "text_pair") if pairs else ("text",)
    return Classify({name: name for name in (*texts, "label")}, [head], options)


def _named(stored: Mapping[str, Any], outputs: int, given: Sequence[str]) -> tuple[str, ...]:
    """What the classes are called."""
    if given and len(given) != outputs:
        raise UserError(f"{len(given)} labels for a head of {outputs} outputs", where="--labels")
    known = stored if len(stored) == outputs else {}
    names = tuple(given) or tuple(str(known.get(str(index), f"LABEL_{index}")) for index in range(outputs))
    if len(set(names)) < outputs:
        where = "--labels" if given else "id2label of config.json"
        raise UserError("two classes have one name", where=where, hint="give each a name of its own by --labels")
    return names


def _headless(model: Model, directory: Path, tokenizer: Tokenizer) -> Task:
    """A task that needs nothing beyond what pretraining leaves."""
    if model.trunk.sides > 1:
        hint = "make an artefact of it with: lexmill fit DATA --task seq2seq --model DIR"
        raise UserError("the directory does not say what its decoder is to write", where=str(directory), hint=hint)
    task = find("generate" if model.config.causal else "embed")
    options = read_config(task.Options, stored=dict(task.defaults(directory))).value
    changes: dict[str, Any] = {"max_length": min(options.max_length, model.trunk.max_tokens)}
    if model.config.causal and (end := _end_token(model, directory)) is not None:
        changes["end_token"] = tokenizer.id_to_token(end)
    found = task.from_records([], {"text": "text"}, replace(options, **changes))
    found.attach(model)
    return found


def _end_token(model: Model, directory: Path) -> int | None:
    """The token that ends what the model says, as its files have it; the first of several."""
    try:
        generation = json.loads((directory / "generation_config.json").read_text("utf-8"))
    except (OSError, ValueError):
        generation = None
    for config in (generation, model.origin.config):
        said = config.get("eos_token_id") if isinstance(config, dict) else None
        first = said[0] if isinstance(said, list) and said else said
        if isinstance(first, int):
            return first
    return None
