"""What a family's table is made of."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from lexmill.errors import UserError
from lexmill.models.backbone import Transformer
from lexmill.models.config import LayerOverride
from lexmill.models.heads import ClassifierShape, LanguageShape
from lexmill.models.trunk import Structure, Trunk
from lexmill.nn.rotary import RopeScaling

Json = dict[str, Any]
Derived = Callable[[Mapping[str, Any]], int]
Use = Literal["base", "classifier", "lm"]


@dataclass(frozen=True)
class Setting:
    """One field of `ModelConfig` and where a Hugging Face config keeps it.

    `read` takes the whole config, since some defaults depend on other keys, and raises `UserError` with the key as its
    place; `write` changes the config.
    """

    ours: str
    read: Callable[[Mapping[str, Any]], Any]
    write: Callable[[Json, Any], None]


def key(ours: str, theirs: str, kind: type, default: int | float | Derived) -> Setting:
    """A field under one key of type `kind`; `default` is a value, or a function of the config. Null is absent."""

    def read(hf: Mapping[str, Any]) -> Any:
        value = hf.get(theirs)
        if value is None:
            return default(hf) if callable(default) else default
        if kind is float and type(value) is int:
            return float(value)
        if type(value) is not kind:
            raise UserError(f"must be {kind.__name__}, is {value!r}", where=theirs)
        return value

    def write(hf: Json, value: Any) -> None:
        hf[theirs] = value

    return Setting(ours, read, write)


def shifted(ours: str, theirs: str, default: int, by: Derived) -> Setting:
    """A number that they store larger by `by`; `default` is ours."""

    def read(hf: Mapping[str, Any]) -> int:
        value = hf.get(theirs)
        if value is None:
            return default
        if type(value) is not int:
            raise UserError(f"must be int, is {value!r}", where=theirs)
        return value - by(hf)

    def write(hf: Json, value: Any) -> None:
        hf[theirs] = value + by(hf)

    return Setting(ours, read, write)


def choice(ours: str, theirs: str, names: Mapping[str, str], default: str) -> Setting:
    """A field whose values have other names there; of several names for one value the first is written."""

    def read(hf: Mapping[str, Any]) -> str:
        value = hf.get(theirs, default)
        if not isinstance(value, str) or value not in names:
            raise UserError(f"'{value}' cannot be represented", where=theirs, hint=f"can be: {', '.join(names)}")
        return names[value]

    def write(hf: Json, value: Any) -> None:
        hf[theirs] = next(name for name, meaning in names.items() if meaning == value)

    return Setting(ours, read, write)


def head_size(hidden_size: int, num_heads: int) -> Derived:
    """The usual size of a head, given what stands for a width or a number of heads that the config does not say."""
    return lambda hf: (hf.get("hidden_size") or hidden_size) // (hf.get("num_attention_heads") or num_heads)


def fixed_ratio(ours: str, theirs: str, value: Derived) -> Setting:
    """A field without a key of its own, which follows from others; `theirs` is the key to name where it cannot."""

    def write(hf: Json, wanted: Any) -> None:
        if value(hf) != wanted:
            raise UserError(f"a config of this family cannot say {ours} = {wanted!r}", where=theirs)

    return Setting(ours, value, write)


def rope_settings() -> tuple[Setting, Setting]:
    """Rotary base and scaling: `rope_theta` and `rope_scaling`, or both in `rope_parameters` (transformers 5)."""

    def read_theta(hf: Mapping[str, Any]) -> float:
        return float(_rope(hf).get("rope_theta", hf.get("rope_theta", 10_000.0)))

    def write_theta(hf: Json, value: Any) -> None:
        hf["rope_parameters"] = {"rope_type": "default", **_rope(hf), "rope_theta": value}
        hf.pop("rope_theta", None)
        hf.pop("rope_scaling", None)

    def read_scaling(hf: Mapping[str, Any]) -> RopeScaling | None:
        return _read_scaling(_rope(hf), "rope_parameters" if hf.get("rope_parameters") else "rope_scaling")

    def write_scaling(hf: Json, value: Any) -> None:
        rope: Json = {"rope_type": "default", "rope_theta": read_theta(hf)}
        if isinstance(value, RopeScaling):
            rope |= {"rope_type": value.kind, "factor": value.factor}
            if value.kind == "llama3":
                rope |= {theirs: getattr(value, ours) for ours, theirs in _LLAMA3.items()}
        hf["rope_parameters"] = rope
        hf.pop("rope_scaling", None)

    return Setting("rope_theta", read_theta, write_theta), Setting("rope_scaling", read_scaling, write_scaling)


_LLAMA3 = {
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_positions": "original_max_position_embeddings",
}


def _rope(hf: Mapping[str, Any]) -> dict[str, Any]:
    return dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})


def _read_scaling(rope: Mapping[str, Any], where: str) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError("rotary positions on part of a head cannot be represented", where=where)
    if kind == "default":
        return None
    if kind not in ("linear", "llama3"):
        raise UserError(f"the rope type '{kind}' cannot be represented", where=where, hint="can be: linear, llama3")
    keys = {"factor": "factor", **(_LLAMA3 if kind == "llama3" else {})}
    for theirs in keys.values():
        if not isinstance(rope.get(theirs), (int, float)):
            raise UserError(f"the rope type '{kind}' needs a number '{theirs}'", where=where)
    numbers = {ours: float(rope[theirs]) for ours, theirs in keys.items()}
    original = int(numbers.pop("original_max_positions", RopeScaling.original_max_positions))
    return RopeScaling(kind, **numbers, original_max_positions=original)


@dataclass(frozen=True)
class Stored:
    """How a file keeps one of our tensors, where that is not simply under another name.

    Args:
        name: of the tensor in the file; `{i}` stands for the layer.
        part, parts: ours is this one of so many equal parts along the first axis, after transposing.
        transposed: the file has the matrix as `[in, out]`.
        only: fields of the config that must have these values for the entry to count.
    """

    name: str
    part: int = 0
    parts: int = 1
    transposed: bool = False
    only: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def plain(self) -> bool:
        return self.parts == 1 and not self.transposed

    def shape(self, ours: Sequence[int]) -> list[int]:
        """The shape in the file, given ours."""
        whole = [ours[0] * self.parts, *ours[1:]]
        return whole[::-1] if self._turned(len(whole)) else whole

    def take(self, stored: Tensor) -> Tensor:
        """Our tensor out of the one in the file."""
        whole = stored.t() if self._turned(stored.dim()) else stored
        return whole.chunk(self.parts)[self.part].contiguous()

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The tensor in the file out of ours, in order of `part`."""
        whole = parts[0] if len(parts) == 1 else torch.cat(list(parts))
        return whole.t() if self._turned(whole.dim()) else whole

    def _turned(self, dim: int) -> bool:
        return self.transposed and dim == 2


@dataclass(frozen=True)
class Family:
    """One family of models as data.

    Args:
        name: Hugging Face's `model_type`.
        architectures: Hugging Face's class name for each use.
        prefix: of trunk tensors in a file that has a head too.
        fixed: fields of the trunk's config that are the same for all its members.
        settings: the other fields.
        requires: keys that must have one of these values, or be absent.
        weights: our tensor names (below `trunk.`) and theirs, or how theirs holds ours; `{i}` stands for the layer,
            `{j}` for that of a decoder.
        namespaces: what names of trunk tensors start with, to tell a strange trunk tensor from an unused head.
        spare: patterns of tensors in these namespaces that the trunk does not use.
        aliases: other endings of names that old files have, and what they mean.
        classifier: the classification head that its Hugging Face class has; `num_labels` is a placeholder.
        language: the language head that its Hugging Face class has, for a config of its trunk.
        heads: our names of head tensors by use, and theirs; `{prefix}` stands for the prefix.
        copies: names in old files that repeat a tensor, and that tensor's own; without prefix.
        trunk: what its models are made of; `fixed` and `settings` are fields of this one's config.
    """

    name: str
    architectures: Mapping[Use, str]
    prefix: str
    fixed: Mapping[str, Any]
    settings: tuple[Setting, ...]
    weights: tuple[tuple[str, str | Stored], ...]
    namespaces: tuple[str, ...]
    classifier: ClassifierShape
    heads: Mapping[Use, Mapping[str, str]]
    requires: Mapping[str, tuple[Any, ...]] = field(default_factory=dict[str, tuple[Any, ...]])
    spare: tuple[str, ...] = ()
    aliases: Mapping[str, str] = field(default_factory=dict[str, str])
    language: Callable[[Any], LanguageShape] = lambda config: LanguageShape()
    copies: Mapping[str, str] = field(default_factory=dict[str, str])
    trunk: type[Trunk] = Transformer

    def variant(
        self, *, fixed: Mapping[str, Any] | None = None, settings: tuple[Setting, ...] = (), **changes: Any
    ) -> Family:
        """A family like this one: a field that is given, fixed or not, stands in place of the one of that name."""
        fixed = fixed or {}
        own = {*fixed, *(setting.ours for setting in settings)}
        return replace(
            self,
            fixed={**{name: value for name, value in self.fixed.items() if name not in own}, **fixed},
            settings=(*(setting for setting in self.settings if setting.ours not in own), *settings),
            **changes,
        )

    def read_config(self, hf: Mapping[str, Any], layers: tuple[LayerOverride, ...] = ()) -> Structure:
        """Our config from theirs, with per-layer overrides, which they have no key for. A setting that we cannot
        represent is a `UserError` that names its key."""
        for name, allowed in self.requires.items():
            if name in hf and hf[name] not in allowed:
                right = " or ".join(repr(value) for value in allowed)
                raise UserError(f"{hf[name]!r} cannot be represented", where=name, hint=f"can be: {right}")
        read = {setting.ours: setting.read(hf) for setting in self.settings}
        return self.trunk.Config(**self.fixed, **read, layers=layers)

    def write_config(self, config: Structure, source: Mapping[str, Any]) -> Json:
        """Their config from ours: `source` with only those keys changed that no longer mean the same."""
        for name, value in self.fixed.items():
            if getattr(config, name) != value:
                raise UserError(f"models of the family '{self.name}' have {value!r}", where=name)
        hf: Json = {**source, "model_type": self.name}
        for setting in self.settings:
            value = getattr(config, setting.ours)
            if not source or setting.read(hf) != value:
                setting.write(hf, value)
        return hf

    def stored(self, config: Structure) -> dict[str, Stored]:
        """Our trunk tensor names and where files keep them, without prefix."""
        found: dict[str, Stored] = {}
        counts = {"{i}": config.num_layers, "{j}": int(getattr(config, "decoder_layers", 0))}
        for ours, theirs in self.weights:
            place = theirs if isinstance(theirs, Stored) else Stored(theirs)
            if any(getattr(config, name) != value for name, value in place.only.items()):
                continue
            sign = next((sign for sign in counts if sign in ours), None)
            for i in range(counts[sign]) if sign else (0,):
                at = sign or "{i}"
                found[ours.replace(at, str(i))] = replace(place, name=place.name.replace(at, str(i)))
        return found

    def canonical(self, name: str) -> str:
        """The present name of a tensor that an old file may name otherwise."""
        for old, new in self.aliases.items():
            if name.endswith(old):
                return name.removesuffix(old) + new
        return name

    def in_trunk(self, name: str) -> bool:
        """Whether a name without prefix must be one of `names`."""
        spare = any(re.fullmatch(pattern, name) for pattern in self.spare)
        return name.startswith(self.namespaces) and not spare
