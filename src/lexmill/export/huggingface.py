"""The format `huggingface`: a folder that `transformers` loads by itself, with nothing in it that is Lexmill's own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lexmill import models
from lexmill.data.tokenizer import load_tokenizer, special_ids
from lexmill.engine import Loaded, probes
from lexmill.engine.files import with_ids
from lexmill.errors import UserError
from lexmill.export.base import Evidence, Format, register
from lexmill.models import Model, RecurrentConfig, families
from lexmill.tasks import Record

CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "tokenizer_config.json"
_HINT = "export it as onnx, or export the artefact that it was made from"


@dataclass(frozen=True)
class HuggingFaceOptions:
    """There is nothing to set."""


@register
class HuggingFace(Format):
    """`config.json` with the labels, `model.safetensors`, `tokenizer.json`, `tokenizer_config.json`; of embeddings also
    what sentence-transformers reads."""

    name = "huggingface"
    about = "a folder for from_pretrained of transformers: weights, config with labels, tokenizer"
    Options = HuggingFaceOptions

    def write(self, subject: Loaded, folder: Path, options: Any) -> Sequence[str]:
        write_plain(subject, folder)
        return [WEIGHTS]

    def evidence(self, subject: Loaded, file: Path, records: Sequence[Record]) -> list[Evidence]:
        return plain_evidence(subject, file.parent, records)


def write_plain(subject: Loaded, folder: Path) -> None:
    """Write the model, its tokenizer and what its task adds as `transformers` has them.

    Raises:
        UserError: the model has what the family's class there has not.
    """
    _refuse_own(subject.model)
    named = [names for names in subject.task.labels().values() if names]
    models.save(subject.model, folder, labels=named[0] if named else None)
    config = json.loads((folder / CONFIG).read_text("utf-8"))
    config.pop("lexmill", None)
    if config.get("pad_token_id") is None:  # without it, a decoder's class there cannot classify two texts at once
        config["pad_token_id"] = special_ids(subject.tokenizer, subject.path).get("pad")
    told = subject.task.reading()
    if told.get("labels"):
        several = told.get("activation") == "sigmoid"
        config["problem_type"] = f"{'multi' if several else 'single'}_label_classification"
    _write_json(folder / CONFIG, config)
    write_tokenizer(subject, folder)
    for name, content in subject.task.files(subject.model).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content, "utf-8")


def write_tokenizer(subject: Loaded, folder: Path) -> None:
    """`tokenizer.json` and `tokenizer_config.json`."""
    subject.tokenizer.no_truncation()
    subject.tokenizer.no_padding()
    subject.tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(folder / TOKENIZER, _tokenizer_config(subject))


def _refuse_own(model: Model) -> None:
    """Raise a `UserError` for what no config of Hugging Face's can say."""
    family, structure = families.find(model.family), model.structure()
    what = f"a folder of transformers' class for '{family.name}' cannot hold"
    if isinstance(model.config, RecurrentConfig):
        raise UserError(f"transformers has no class for the family '{family.name}'", where="export", hint=_HINT)
    if additions := structure.get("additions"):
        place, entry = next(iter(additions.items()))
        raise UserError(f"{what} the {entry['kind']} at '{place}'", where="export", hint=_HINT)
    if "layers" in structure:
        raise UserError(f"{what} layers that differ from one another", where="export", hint=_HINT)
    use, _ = models.head_tensors(model)
    if len(model.heads) > 1 or (model.heads and use is None):
        heads = ", ".join(f"'{name}'" for name in model.heads)
        told = f"more than one head: {heads}" if len(model.heads) > 1 else f"a head of the form that {heads} has"
        raise UserError(f"{what} {told}", where="export", hint=_HINT)


def _tokenizer_config(subject: Loaded) -> dict[str, Any]:
    """What the source says, but read from `tokenizer.json` as it stands, cut as the task cuts, and for this model."""
    found: dict[str, Any] = {}
    source = None if subject.path is None else subject.path / TOKENIZER
    if source is not None and source.is_file():
        found = json.loads(with_ids(subject.tokenizer, source.read_text("utf-8")))
    for role, index in special_ids(subject.tokenizer, subject.path).items():
        found[f"{role}_token"] = subject.tokenizer.id_to_token(index)
    typed = getattr(subject.model.config, "type_vocab_size", 0) > 1
    inputs = ["input_ids", *(["token_type_ids"] if typed else []), "attention_mask"]
    longest = subject.task.reading().get("max_length", subject.model.trunk.max_tokens)
    own = {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": inputs, "model_max_length": longest}
    return found | own


def read_plain(folder: Path, head: str | None, dtype: torch.dtype | None = None) -> Model:
    """The model of a folder as its `config.json` alone describes it.

    Args:
        head: what to call the head of the class that the config names; None where it shall have none.
    """
    model = models.load(folder, dtype=dtype)
    if head is None:
        return model
    [named] = model.origin.config["architectures"]
    known = families.find(model.family).architectures
    match next(use for use, theirs in known.items() if theirs == named):
        case "classifier" | "token_classifier" as use:
            model.add_stored_classifier(head, use)
        case "lm":
            model.add_language_head(head)
        case _:
            raise UserError(f"{named} has no head", where=str(folder / CONFIG))
    return model.eval()


def plain_evidence(
    subject: Loaded, folder: Path, records: Sequence[Record], dtype: torch.dtype | None = None
) -> list[Evidence]:
    """What a folder answers, its own tokenizer and config taken."""
    head = next(iter(subject.model.heads), None)
    model = read_plain(folder, head, dtype)
    return probes.evidence(replace(subject, model=model, tokenizer=load_tokenizer(folder)), records)


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")
