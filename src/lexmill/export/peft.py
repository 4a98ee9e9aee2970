"""The format `peft`: what a run added to a pretrained model, and the heads, without that model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lexmill import models
from lexmill.adapt import ADAPTER, load_adapter
from lexmill.adapt.peft import BASE, CONFIG, WEIGHTS, load_heads, refuse_rounded
from lexmill.artifact import Artifact
from lexmill.data.tokenizer import load_tokenizer
from lexmill.engine import Loaded, probes
from lexmill.engine.loaded import ADAPTERS
from lexmill.errors import UserError
from lexmill.export.base import Evidence, Format, register
from lexmill.export.huggingface import write_tokenizer
from lexmill.nn.addition import describe_additions
from lexmill.tasks import Record

_FRONT = ("prefix", "prompt")
"""The additions that an adapter brings along."""


@dataclass(frozen=True)
class PeftOptions:
    """What may be set for `peft`.

    Args:
        base: the directory of the model that the adapter was trained on. Default: where the run found it.
    """

    base: str | None = None


@register
class Peft(Format):
    """`adapter_config.json`, `adapter_model.safetensors` with the heads, and the tokenizer."""

    name = "peft"
    about = "an adapter and its heads for PeftModel.from_pretrained, to go onto the model it was trained on"
    Options = PeftOptions

    def write(self, subject: Loaded, folder: Path, options: Any) -> Sequence[str]:
        source = None if subject.path is None else subject.path / ADAPTERS / ADAPTER
        if source is None or not (source / WEIGHTS).is_file():
            hint = "fit it with --set adapt.method=lora, adalora, prefix or prompt"
            raise UserError("there is no adapter that peft has a format for", where="export", hint=hint)
        assert subject.path is not None
        refuse_rounded(Artifact.open(subject.path, check=False).manifest, str(subject.path))
        _refuse_changed(subject)
        config = json.loads((source / CONFIG).read_text("utf-8"))
        base = Path(config[BASE] if options.base is None else options.base)
        config[BASE] = str(base.resolve())
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", "utf-8")
        shutil.copyfile(source / WEIGHTS, folder / WEIGHTS)
        write_tokenizer(subject, folder)
        return [WEIGHTS]

    def evidence(self, subject: Loaded, file: Path, records: Sequence[Record]) -> list[Evidence]:
        folder = file.parent
        base = Path(json.loads((folder / CONFIG).read_text("utf-8"))[BASE])
        if not base.is_dir():
            hint = "name its directory: --set base=DIR"
            raise UserError(f"the model of the adapter is not at '{base}'", where=str(folder / CONFIG), hint=hint)
        model = models.load(base)
        subject.task.attach(model)
        load_adapter(model, folder)
        load_heads(model, folder)
        return probes.evidence(replace(subject, model=model, tokenizer=load_tokenizer(folder)), records)


def _refuse_changed(subject: Loaded) -> None:
    """Raise a `UserError` where the model is more than what it began from and the adapter."""
    structure = subject.model.structure()
    strange = [one["kind"] for one in describe_additions(subject.model.trunk).values() if one["kind"] not in _FRONT]
    if strange or "layers" in structure:
        what = f"{strange[0]} matrices" if strange else "layers of other shapes"
        hint = "export the artefact that it was made from"
        raise UserError(f"an adapter cannot hold what was done to the model after: {what}", where="export", hint=hint)
    if subject.model.heads and models.head_tensors(subject.model)[0] is None:
        names = ", ".join(f"'{name}'" for name in subject.model.heads)
        raise UserError(f"peft's format has no place for the heads {names}", where="export", hint="export it as onnx")
