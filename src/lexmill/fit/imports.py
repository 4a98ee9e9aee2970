"""An artefact of a model that another program trained: a Hugging Face directory, or an adapter that `peft` wrote."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from lexmill import models
from lexmill.adapt import ADAPTER, merge
from lexmill.adapt.peft import BASE, CONFIG, PROMPTS, PROMPTS_ROOT, ROOT, WEIGHTS, settings
from lexmill.artifact import Artifact, Manifest, TaskRecord, Transform, create, is_huggingface, render_card
from lexmill.engine import load_pretrained
from lexmill.engine.files import environment, write_model
from lexmill.engine.loaded import ADAPTERS
from lexmill.errors import UserError
from lexmill.fit.model import model_directory
from lexmill.models import Model, head_tensors

NAME = "import"
"""What the history of an artefact calls this."""


def import_pretrained(
    source: Path, out: Path | str, *, base: str | None = None, labels: Sequence[str] = (), pairs: bool = False
) -> Artifact:
    """Write an artefact of a model as it stands; nothing is trained.

    Args:
        source: a plain Hugging Face directory with safetensors, or one of `peft` with an adapter, which is merged, and
            kept beside the model as `combine` wants it.
        out: must not exist.
        base: what the adapter was trained on, a directory or `minilm`; by default where the adapter says it is.
        labels, pairs: see `load_pretrained`.

    Raises:
        UserError: it is neither; or its parts are missing, broken, do not fit each other, or cannot be represented.
    """
    out, began = Path(out), time.perf_counter()
    adapter = source if (source / CONFIG).is_file() else None
    directory = source if adapter is None else _base_of(adapter, base)
    if not is_huggingface(directory):
        raise _nothing_to_import(directory)
    if adapter is None and base is not None:
        raise UserError("a model that is whole has no base", where="--base", hint=f"there is no {CONFIG} in {source}")
    loaded = load_pretrained(directory, adapter=adapter, labels=labels, pairs=pairs)
    if loaded.model.dtype == torch.bfloat16:
        loaded.model.float()  # what is served is computed in float32, and verified against this
    with create(out, discard_on_error=True) as writer:
        if adapter is not None:
            _keep(adapter, directory, loaded.model, writer.path(f"{ADAPTERS}/{ADAPTER}/{CONFIG}").parent)
        merged = merge(loaded.model)
        write_model(writer, loaded, directory)
        effect = {
            "weights": float(sum(one.numel() for one in loaded.model.parameters())),
            "merged_matrices": float(merged),
            "seconds": time.perf_counter() - began,
        }
        parameters: dict[str, Any] = {"source": str(source), "base": None if adapter is None else str(directory)}
        writer.manifest = Manifest(
            task=TaskRecord(name=loaded.task.name, state=loaded.task.state()),
            structure=loaded.model.structure(),
            history=(Transform(name=NAME, parameters=parameters, effect=effect),),
            environment=environment(),
            weights=models.weights_digest(loaded.model),
        )
        writer.path("card.md").write_text(render_card(writer.manifest, out.name), "utf-8")
    return Artifact.open(out)


def _base_of(adapter: Path, base: str | None) -> Path:
    if base is not None:
        return model_directory(base)
    said = settings(adapter).get(BASE)
    if not isinstance(said, str) or not Path(said).is_dir():
        hint = "name the directory of the model that it was trained on: --base DIR"
        raise UserError(f"the model of the adapter is not at '{said}'", where=str(adapter / CONFIG), hint=hint)
    return Path(said)


def _keep(adapter: Path, base: Path, model: Model, folder: Path) -> None:
    """Copy an adapter's files, with where its model is now, and all of the heads."""
    config, tensors = settings(adapter), load_file(adapter / WEIGHTS)
    root, heads = PROMPTS_ROOT if config["peft_type"] in PROMPTS else ROOT, head_tensors(model)[1]
    for name, tensor in heads.items():
        tensors.setdefault(root + name, tensor.detach().contiguous())
    kept = {*(config.get("modules_to_save") or ()), *(name.rpartition(".")[0] for name in heads)}
    config |= {BASE: str(base.resolve()), "modules_to_save": sorted(kept) or None}
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def _nothing_to_import(path: Path) -> UserError:
    if (path / "manifest.json").exists():
        hint = "every verb takes it; to begin from it, name it as a model: lexmill fit DATA --model DIR"
        return UserError("an artefact already", where=str(path), hint=hint)
    hint = f"give a GGUF file, a directory with a config.json, or one with peft's {CONFIG}"
    what = "there is no model" if path.exists() else "there is no such file or directory"
    return UserError(what, where=str(path), hint=hint)
