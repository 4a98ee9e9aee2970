"""Hugging Face directories: reading a model from one, writing it as one. Safetensors only, never pickle."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lexmill.errors import UserError
from lexmill.models import families
from lexmill.models.config import read_overrides
from lexmill.models.families import Family, Stored
from lexmill.models.heads import ClassifierHead, Head, LMHead, build_head
from lexmill.models.model import Model, Origin
from lexmill.models.trunk import Structure, Trunk
from lexmill.nn.addition import additions, restore_additions
from lexmill.nn.embedding import Embedding

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
OWN_KEY = "lexmill"
"""The key of config.json under which the structure stands that Hugging Face has no key for."""
_ADDED = "added."
"""What names begin with of trunk tensors that no table has: those of additions."""


def init(config: Structure, family: str, seed: int) -> Model:
    """A model with new weights, which depend on `config` and `seed` alone."""
    found = families.find(family)
    trunk = found.trunk(config)
    trunk.initialise(torch.Generator().manual_seed(seed))
    return Model(trunk, found.name)


def init_like(directory: Path | str, seed: int, *, vocab_size: int) -> Model:
    """A model with new weights, of the structure that a directory's `config.json` describes.

    Args:
        vocab_size: token embeddings, where the config does not say how many.

    Raises:
        UserError: there is no such file, or it says what cannot be represented.
    """
    path = Path(directory) / CONFIG
    hf = {"vocab_size": vocab_size, **_read_json(path)}
    family, config = _read_config(hf, str(path))
    model = init(config, family.name, seed)
    model.origin.config = hf
    return model.eval()


def load(directory: Path | str, *, dtype: torch.dtype | None = None) -> Model:
    """Read a model from a Hugging Face directory, one file or sharded. It comes in `eval` mode.

    Heads are attached as `save` recorded them; a plain Hugging Face directory gives a trunk, and `extras` from which
    `add_language_head` and `add_stored_classifier` make its heads.

    Args:
        dtype: of the parameters; each as stored where None. `extras` stay as stored.

    Raises:
        UserError: a file is missing, broken or pickled; a setting cannot be represented; a tensor is missing, strange
            or of the wrong shape.
    """
    directory = Path(directory)
    hf, where = _read_json(directory / CONFIG), str(directory / CONFIG)
    own: Mapping[str, Any] = hf.get(OWN_KEY, {})
    family, config = _read_config(hf, where)
    files = _Files(directory)
    with torch.device("meta"):
        trunk = family.trunk(config)
        restore_additions(trunk, own.get("additions", {}), f"{where}: {OWN_KEY}.additions")
    state, origin = _trunk_tensors(files, family, trunk, dtype)
    trunk.load_state_dict(state, strict=True, assign=True)
    origin.config = hf
    rest = [name for name in files.names if name not in files.taken]
    model = Model(trunk, family.name, extras={name: files.read(name) for name in rest}, origin=origin).eval()
    output = model.spare("lm").get("output.weight")
    table = cast("nn.Module", trunk.embeddings.token)
    if output is not None and not (isinstance(table, Embedding) and torch.equal(output.to(model.dtype), table.weight)):
        trunk.config = replace(cast("Any", config), tied_output=False)  # whatever the config says
    _attach_heads(model, own.get("heads", {}), files, f"{where}: {OWN_KEY}.heads")
    return model


def save(model: Model, directory: Path | str, *, labels: Sequence[str] | None = None) -> None:
    """Write `config.json` and `model.safetensors` with Hugging Face names into an existing directory.

    One classification head of the family's own form gets its Hugging Face names, so that
    `AutoModelForSequenceClassification` loads it; one that classifies tokens, and a language head, likewise. Other
    heads stand under `heads.{name}.`.

    Args:
        labels: names of the classes, for Hugging Face's `id2label`.
    """
    directory = Path(directory)
    (directory / CONFIG).write_text(json.dumps(_config(model, labels), indent=2, ensure_ascii=False) + "\n", "utf-8")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in named_tensors(model).items()}
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})


def named_tensors(model: Model) -> dict[str, Tensor]:
    """All tensors of a model by the names they have in a file; tied ones once."""
    family, prefix = families.find(model.family), trunk_prefix(model)
    old = model.origin.prefix
    moved = {name: _moved(name, family, old, prefix) for name in model.extras}
    tensors = {moved[name]: tensor for name, tensor in model.extras.items()}
    state = model.trunk.state_dict()
    for place in _places(family, model.trunk):
        theirs = _file_name(prefix, model.origin.names.get(place.name, place.name))
        tensors[theirs] = place.join([state[ours] for ours in place.ours])
    for name, head in model.heads.items():
        for ours, theirs in _head_names(model, name).items():
            tied = isinstance(head, LMHead) and head.tied and ours == "output.weight"
            if not tied or theirs in tensors:
                tensors[theirs] = head.get_parameter(ours)
    for copy, original in family.copies.items():
        if prefix + copy in tensors:
            tensors[prefix + copy] = tensors[prefix + original]
    return tensors


def _places(family: Family, trunk: Trunk) -> list[Stored]:
    """Where files keep trunk tensors: as the family's table has it, or, of additions, under names of their own."""
    names = trunk.state_dict()
    table = [place for place in family.stored(trunk.config) if place.ours[0] in names]
    placed = {ours for place in table for ours in place.ours}
    rest = [name for name in names if name not in placed]
    added = tuple(f"{path}." for path, _ in additions(trunk))
    if strange := [name for name in rest if not name.startswith(added)]:
        raise ValueError(f"no file can hold '{strange[0]}': merge what was put beside the matrices")
    return [*table, *(Stored(_ADDED + ours, (ours,)) for ours in rest)]


def _file_name(prefix: str, theirs: str) -> str:
    return theirs if theirs.startswith(_ADDED) else prefix + theirs


def module_names(model: Model) -> dict[str, str]:
    """The layers of the trunk that have a weight, and what the family's files call them below its prefix."""
    family = families.find(model.family)
    found: dict[str, str] = {}
    for place in family.stored(model.config):
        [ours, *others] = place.ours
        if ours.endswith(".weight") and not others and not place.transposed:
            stored = model.origin.names.get(place.name, place.name)
            found[ours.removesuffix(".weight")] = stored.removesuffix(".weight")
    return found


def head_tensors(model: Model) -> tuple[families.Use | None, dict[str, Tensor]]:
    """The use and the tensors, as named in a file, of the head that the family's Hugging Face class has; shared ones
    are left out. None and nothing where no head has its form."""
    for use in families.HEADS:
        if name := _hf_head(model, use):
            head = cast("Head", model.heads[name])
            names = _head_names(model, name)
            if isinstance(head, LMHead) and head.tied:
                names.pop("output.weight", None)
            return use, {theirs: head.get_parameter(ours) for ours, theirs in names.items()}
    return None, {}


def weights_digest(model: Model) -> dict[str, str]:
    """The sha256 of each tensor's bytes, by the name it has in a file."""
    return digest(named_tensors(model))


def digest(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The sha256 of each tensor's bytes."""
    return {name: _sha256(tensor) for name, tensor in tensors.items()}


def _sha256(tensor: Tensor) -> str:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy()).hexdigest()  # pyright: ignore[reportArgumentType]


# --- reading ----------------------------------------------------------------------------------------------------


class _Files:
    """The tensors of a directory's safetensors files."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.taken: set[str] = set()
        self._file: dict[str, Path] = {}
        index = directory / INDEX
        if (directory / WEIGHTS).exists():
            self._file = dict.fromkeys(_keys(directory / WEIGHTS), directory / WEIGHTS)
        elif index.exists():
            self._read_index(index)
        else:
            pickled = sorted(path.name for path in directory.glob("*.bin"))
            hint = f"{pickled[0]} is a pickle, which is never read: convert it to safetensors" if pickled else None
            raise UserError(f"no {WEIGHTS} and no {INDEX}", where=str(directory), hint=hint)

    def _read_index(self, index: Path) -> None:
        placed = _read_json(index).get("weight_map")
        if not isinstance(placed, dict):
            raise UserError("has no 'weight_map'", where=str(index))
        self._file = {name: index.parent / str(file) for name, file in cast("dict[str, Any]", placed).items()}
        for path in dict.fromkeys(self._file.values()):
            if path.parent != index.parent or not path.exists():
                raise UserError(f"the shard '{path.name}' is missing", where=str(index))
            held = set(_keys(path))
            lost = [name for name, file in self._file.items() if file == path and name not in held]
            if lost:
                raise UserError(f"the tensor '{lost[0]}' is missing", where=str(path), hint=f"{INDEX} says it is here")

    @property
    def names(self) -> list[str]:
        return list(self._file)

    def where(self, name: str) -> str:
        return str(self._file.get(name, self.directory))

    def read(self, name: str, shape: Sequence[int] | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """A copy of one tensor; its shape is checked where given."""
        path = self._file[name]
        self.taken.add(name)
        try:
            with safe_open(path, "pt") as file:
                found = cast("list[int]", file.get_slice(name).get_shape())
                if shape is not None and list(shape) != found:
                    raise UserError(
                        f"the tensor '{name}' has shape {found}",
                        where=str(path),
                        hint=f"{CONFIG} says it should be {list(shape)}",
                    )
                tensor = cast("Tensor", file.get_tensor(name))
        except (SafetensorError, OSError) as error:
            raise UserError(f"cannot read the tensor '{name}': {error}", where=str(path)) from error
        return tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor.clone()


def _keys(path: Path) -> list[str]:
    try:
        with safe_open(path, "pt") as file:
            return list(file.keys())
    except (SafetensorError, OSError) as error:
        hint = "the file is broken or incomplete: fetch it again"
        raise UserError(f"not a readable safetensors file: {error}", where=str(path), hint=hint) from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise UserError("no such file", where=str(path), hint="give a Hugging Face model directory") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"not JSON: {error}", where=str(path)) from error
    if not isinstance(data, dict):
        raise UserError("must hold a JSON object", where=str(path))
    return cast("dict[str, Any]", data)


def _read_config(hf: dict[str, Any], where: str) -> tuple[Family, Structure]:
    """The family and structure that a config describes; our own key is taken out of it."""
    own: Mapping[str, Any] = hf.pop(OWN_KEY, {})
    family = families.recognise(hf, where)
    try:
        layers = read_overrides(own["layers"], f"{OWN_KEY}.layers") if "layers" in own else None
        return family, family.read_config(hf, layers)
    except UserError as error:
        raise UserError(error.message, where=f"{where}: {error.where}", hint=error.hint) from error


def _trunk_tensors(
    files: _Files, family: Family, trunk: Trunk, dtype: torch.dtype | None
) -> tuple[dict[str, Tensor], Origin]:
    """The trunk's state, and under which names it stood."""
    shapes = {ours: list(tensor.shape) for ours, tensor in trunk.state_dict().items()}
    places = _places(family, trunk)
    found = {family.canonical(name): name for name in files.names}
    prefix = max(("", family.prefix), key=lambda start: sum(_file_name(start, place.name) in found for place in places))
    wanted = {_file_name(prefix, place.name): place for place in places}
    missing = [theirs for theirs in wanted if theirs not in found]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"the tensor '{missing[0]}'{more} is missing", where=files.where(missing[0]))
    for name, stored in found.items():
        inside = name.startswith(prefix) and family.in_trunk(name.removeprefix(prefix))
        if inside and name not in wanted:
            hint = f"{CONFIG} describes a model without it"
            raise UserError(f"unexpected tensor '{stored}'", where=files.where(stored), hint=hint)
    loaded: dict[str, Tensor] = {}
    origin = Origin(prefix=prefix)
    for theirs, place in wanted.items():
        stored = found[theirs]
        parts = [shapes[ours] for ours in place.ours]
        loaded |= zip(place.ours, place.split(files.read(stored, place.shape(parts), dtype), parts), strict=True)
        if stored != theirs:
            origin.names[place.name] = stored.removeprefix(prefix)
    return loaded, origin


def _attach_heads(model: Model, recorded: Mapping[str, Mapping[str, Any]], files: _Files, where: str) -> None:
    for name, entry in recorded.items():
        model.add_head(name, build_head(model.trunk, entry, f"{where}.{name}"))
    for name in recorded:
        head = cast("Head", model.heads[name])
        for ours, theirs in _head_names(model, name).items():
            if isinstance(head, LMHead) and head.tied and ours == "output.weight":
                continue
            if theirs not in model.extras:
                raise UserError(f"the tensor '{theirs}' of the head '{name}' is missing", where=files.where(theirs))
            own = head.get_parameter(ours)
            stored = files.read(theirs, own.shape, model.dtype)
            owner, _, leaf = ours.rpartition(".")
            setattr(head.get_submodule(owner), leaf, nn.Parameter(stored))
            model.extras.pop(theirs)


# --- names and config ------------------------------------------------------------------------------------------


def _hf_head(model: Model, use: families.Use) -> str | None:
    """The name of the only head of this kind, where its form is that of the family's Hugging Face class."""
    family = families.find(model.family)
    heads = {name: head for name, head in model.heads.items() if _use(cast("Head", head)) == use}
    if use not in family.heads or len(heads) != 1:
        return None
    [(name, head)] = heads.items()
    if isinstance(head, ClassifierHead):
        shape = family.classifier_shape if use == "classifier" else family.token_shape
        usual = shape(model.config, model.origin.config)
        form = replace(usual, num_labels=head.shape.num_labels, dropout=head.shape.dropout)
        return name if head.shape == form else None
    return name if cast("LMHead", head).shape == family.language_shape(model.config, model.origin.config) else None


def _use(head: Head) -> str:
    """What a head is used for, where Hugging Face has a class for that."""
    return "token_classifier" if isinstance(head, ClassifierHead) and head.pooling is None else head.kind


def trunk_prefix(model: Model) -> str:
    """What the names of trunk tensors begin with in a file of this model."""
    standard = any(_hf_head(model, use) for use in families.HEADS)
    return families.find(model.family).prefix if standard else model.origin.prefix


def _moved(name: str, family: Family, old: str, new: str) -> str:
    """The name of an unused tensor when the trunk's prefix changes."""
    inside = name.startswith(old) and name.removeprefix(old).startswith(family.namespaces)
    return new + name.removeprefix(old) if inside else name


def _head_names(model: Model, name: str) -> dict[str, str]:
    """A head's tensor names, ours and those in a file."""
    head = cast("Head", model.heads[name])
    own = [ours for ours, _ in head.named_parameters()]
    for use in families.HEADS:
        if _hf_head(model, use) == name:
            table = families.find(model.family).heads[use]
            return {ours: table[ours].format(prefix=trunk_prefix(model)) for ours in own}
    return {ours: f"heads.{name}.{ours}" for ours in own}


def _config(model: Model, labels: Sequence[str] | None) -> dict[str, Any]:
    family, source = families.find(model.family), model.origin.config
    hf = family.write_config(model.config, source)
    use, _ = head_tensors(model)
    if use or not hf.get("architectures"):
        hf["architectures"] = [family.architectures[use or "base"]]
    if use in ("classifier", "token_classifier"):
        head = cast("ClassifierHead", model.heads[str(_hf_head(model, use))])
        _write_labels(hf, head.shape.num_labels, labels)
    dtype_key = "torch_dtype" if "torch_dtype" in hf else "dtype"
    stored = str(model.dtype).removeprefix("torch.")
    if hf.get(dtype_key, "float32") != stored or not source:
        hf[dtype_key] = stored
    own = model.structure()
    return {**hf, OWN_KEY: own} if own else hf


def _write_labels(hf: dict[str, Any], count: int, labels: Sequence[str] | None) -> None:
    if labels is None:
        if len(hf.get("id2label", ())) == count:
            return
        labels = [f"LABEL_{i}" for i in range(count)]
    if len(labels) != count:
        raise ValueError(f"{len(labels)} labels for a head of {count}")
    hf.pop("num_labels", None)
    hf["id2label"] = {str(i): label for i, label in enumerate(labels)}
    hf["label2id"] = {label: i for i, label in enumerate(labels)}
