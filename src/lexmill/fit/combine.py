"""Several adapters over one trunk, in one artefact."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lexmill import models
from lexmill.adapt import ADAPTER, adapter_tensors, add_adapter, save_heads
from lexmill.adapt.peft import CONFIG, WEIGHTS, refuse_rounded
from lexmill.artifact import Artifact, Manifest, Transform, Writer, create, render_card
from lexmill.data.tokenizer import fingerprint, load_tokenizer
from lexmill.engine import probes
from lexmill.engine.files import TOKENIZER_FILES, environment
from lexmill.engine.loaded import ADAPTERS
from lexmill.errors import UserError
from lexmill.fit.model import model_directory
from lexmill.models import Model
from lexmill.nn.lora import LoraLinear

TOLERANCE = 1e-5
"""How far a matrix with its adapter added may be from the one that was trained: max |a - b| / max |b|."""


def combine(base: str, adapted: Mapping[str, Path], out: Path | str) -> Artifact:
    """Write an artefact with one trunk and the adapters of several that were fitted from it by LoRA.

    Args:
        base: what they were all fitted from, as `--model` named it. The heads it has answer where no adapter is named.
        adapted: artefacts by the name that their adapter shall have.

    Raises:
        UserError: an artefact has no adapter, another task or tokenizer, or was fitted from something else.
    """
    out, began = Path(out), time.perf_counter()
    sources = {_checked(name): Artifact.open(Path(path)) for name, path in adapted.items()}
    if not sources:
        raise UserError("there is nothing to combine", hint="give NAME=ARTEFACT for each adapter")
    directory = model_directory(base)
    own = Artifact.open(directory) if (directory / "manifest.json").is_file() else None
    _refuse_strangers(directory, own, sources)
    model = models.load(directory)
    with create(out, discard_on_error=True) as writer:
        models.save(model, writer.path("config.json").parent)
        for file in ("tokenizer.json", *TOKENIZER_FILES):
            if (directory / file).is_file():
                shutil.copyfile(directory / file, writer.path(file))
        if own is not None:
            shutil.copyfile(own.file(probes.FILE), writer.path(probes.FILE))
        structure, weights = model.structure(), models.weights_digest(model)
        entries, combined = {}, {}
        for name, source in sources.items():
            combined[name] = _take_over(model, name, source, writer)
            task = {"name": source.manifest.task.name, "state": source.manifest.task.state}
            entries[name] = {"task": task, "heads": combined[name].structure()["heads"]}
        first = next(iter(sources.values()))
        effect = {"adapters": float(len(sources)), "seconds": time.perf_counter() - began}
        parameters: dict[str, Any] = {"base": base, ADAPTERS: {name: str(path) for name, path in adapted.items()}}
        writer.manifest = Manifest(
            task=first.manifest.task if own is None else own.manifest.task,
            structure={**structure, ADAPTERS: entries},
            history=(
                *(() if own is None else own.manifest.history),
                Transform(name="combine", parameters=parameters, effect=effect),
            ),
            environment=environment(),
            weights=weights | models.digest(adapter_tensors(combined)),
        )
        writer.path("card.md").write_text(render_card(writer.manifest, out.name), "utf-8")
    return Artifact.open(out)


def _checked(name: str) -> str:
    if not name.replace("-", "_").isidentifier():
        raise UserError(f"'{name}' cannot name an adapter", hint="use letters, digits, - and _")
    return name


def _refuse_strangers(directory: Path, own: Artifact | None, sources: Mapping[str, Artifact]) -> None:
    known = fingerprint(load_tokenizer(directory))
    tasks = {source.manifest.task.name for source in sources.values()} | ({own.manifest.task.name} if own else set())
    if len(tasks) > 1:
        hint = "combine artefacts of one task, and serve others beside them"
        raise UserError(f"the tasks differ: {', '.join(sorted(tasks))}", hint=hint)
    for source in sources.values():
        if f"{ADAPTERS}/{ADAPTER}/{WEIGHTS}" not in source.manifest.files:
            hint = "fit it with --set adapt.method=lora"
            raise UserError("this artefact has no adapter", where=str(source.path), hint=hint)
        refuse_rounded(source.manifest, str(source.path))
        if fingerprint(load_tokenizer(source.path)) != known:
            raise UserError("its tokenizer is not that of the base", where=str(source.path))


def _take_over(model: Model, name: str, source: Artifact, writer: Writer) -> Model:
    """Write the adapter, heads and probes of an artefact under this name, and give the model with that adapter."""
    folder = writer.path(f"{ADAPTERS}/{name}/{CONFIG}").parent
    for file in (CONFIG, WEIGHTS):
        shutil.copyfile(source.file(f"{ADAPTERS}/{ADAPTER}/{file}"), folder / file)
    shutil.copyfile(source.file(probes.FILE), folder / probes.FILE)
    trained = models.load(source.path)
    save_heads(trained, folder)
    own = add_adapter(model, name, folder, trained.structure()["heads"])
    _refuse_another_base(own, trained, name, source)
    return own


def _refuse_another_base(own: Model, trained: Model, name: str, source: Artifact) -> None:
    """The trunk must be that of the trained model bit for bit, and with the adapter's sums where there are some."""
    adapted = {
        f"{path}.weight": layer
        for path, layer in own.trunk.named_modules()
        if isinstance(layer, LoraLinear) and name in layer.adapters
    }
    now = own.trunk.state_dict()
    for key, tensor in trained.trunk.state_dict().items():
        if key in adapted:
            whole = now[key] + adapted[key].adapter(name).delta().detach()
            same = bool((whole - tensor).abs().max() <= TOLERANCE * tensor.abs().max())
        else:
            same = key in now and torch.equal(now[key], tensor)
        if not same:
            hint = "name the model that it was fitted from, or fit it from this one"
            raise UserError(f"it was fitted from another model: '{key}' differs", where=str(source.path), hint=hint)
