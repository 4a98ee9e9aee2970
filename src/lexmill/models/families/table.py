"""What a family's table is made of."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
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
Use = Literal["base", "classifier", "token_classifier", "lm"]
HEADS: tuple[Use, ...] = ("classifier", "token_classifier", "lm")
"""The uses that have a head."""


@dataclass(frozen=True)
class Setting:
    """One field of `ModelConfig` and where a Hugging Face config keeps it.

    `read` takes the whole config, since some defaults depend on other keys, and raises `UserError` with the key as its
    place; `write` changes the config. `keys` are those that either looks at.
    """

    ours: str
    read: Callable[[Mapping[str, Any]], Any]
    write: Callable[[Json, Any], None]
    keys: tuple[str, ...]


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

    return Setting(ours, read, write, (theirs,))


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

    return Setting(ours, read, write, (theirs,))


def choice(ours: str, theirs: str, names: Mapping[str, str], default: str) -> Setting:
    """A field whose values have other names there; of several names for one value the first is written."""

    def read(hf: Mapping[str, Any]) -> str:
        value = hf.get(theirs, default)
        if not isinstance(value, str) or value not in names:
            raise UserError(f"'{value}' cannot be represented", where=theirs, hint=f"can be: {', '.join(names)}")
        return names[value]

    def write(hf: Json, value: Any) -> None:
        hf[theirs] = next(name for name, meaning in names.items() if meaning == value)

    return Setting(ours, read, write, (theirs,))


def head_size(hidden_size: int, num_heads: int) -> Derived:
    """The usual size of a head, given what stands for a width or a number of heads that the config does not say."""
    return lambda hf: (hf.get("hidden_size") or hidden_size) // (hf.get("num_attention_heads") or num_heads)


def fixed_ratio(ours: str, theirs: str, value: Derived) -> Setting:
    """A field without a key of its own, which follows from others; `theirs` is the key to name where it cannot."""

    def write(hf: Json, wanted: Any) -> None:
        if value(hf) != wanted:
            raise UserError(f"a config of this family cannot say {ours} = {wanted!r}", where=theirs)

    return Setting(ours, value, write, (theirs,))


def rope_settings(head_dim: Derived | None = None, part: float = 1.0) -> tuple[Setting, ...]:
    """Rotary base and scaling: `rope_theta` and `rope_scaling`, or both in `rope_parameters` (transformers 5).

    Args:
        head_dim: of a family that may rotate a part of each head: how many dimensions a head has.
        part: the share of them that such a family rotates where its config does not say.
    """

    def read_theta(hf: Mapping[str, Any]) -> float:
        return float(_rope(hf).get("rope_theta", hf.get("rope_theta", 10_000.0)))

    def write_theta(hf: Json, value: Any) -> None:
        hf["rope_parameters"] = {"rope_type": "default", **_rope(hf), "rope_theta": value}
        hf.pop("rope_theta", None)
        hf.pop("rope_scaling", None)

    def read_scaling(hf: Mapping[str, Any]) -> RopeScaling | None:
        where = "rope_parameters" if hf.get("rope_parameters") else "rope_scaling"
        if head_dim is None and _rope(hf).get("partial_rotary_factor", hf.get("partial_rotary_factor", 1.0)) != 1.0:
            raise UserError("rotary positions on part of a head cannot be represented", where=where)
        return _read_scaling(_rope(hf), where)

    def write_scaling(hf: Json, value: Any) -> None:
        kept = {name: value for name, value in _rope(hf).items() if name == "partial_rotary_factor"}
        rope: Json = {"rope_type": "default", "rope_theta": read_theta(hf), **kept}
        if isinstance(value, RopeScaling):
            rope |= {"rope_type": value.kind, "factor": value.factor}
            if value.kind == "llama3":
                rope |= {theirs: getattr(value, ours) for ours, theirs in _LLAMA3.items()}
        hf["rope_parameters"] = rope
        hf.pop("rope_scaling", None)

    def read_dim(hf: Mapping[str, Any]) -> int:
        assert head_dim is not None
        return int(head_dim(hf) * _rope(hf).get("partial_rotary_factor", hf.get("partial_rotary_factor", part)))

    def write_dim(hf: Json, value: Any) -> None:
        assert head_dim is not None
        hf["rope_parameters"] = {**_rope(hf), "partial_rotary_factor": value / head_dim(hf)}
        hf.pop("partial_rotary_factor", None)

    keys = ("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor")
    whole = (
        Setting("rope_theta", read_theta, write_theta, keys),
        Setting("rope_scaling", read_scaling, write_scaling, keys),
    )
    return whole if head_dim is None else (*whole, Setting("rope_dim", read_dim, write_dim, keys))


_LLAMA3 = {
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_positions": "original_max_position_embeddings",
}


def _rope(hf: Mapping[str, Any]) -> dict[str, Any]:
    return dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})


def _read_scaling(rope: Mapping[str, Any], where: str) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
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
    """A tensor of a file and which of ours it holds.

    Args:
        name: in the file.
        ours: one of our tensors, or several, of any sizes, one after another along the first axis.
        transposed: the file has the matrix as `[in, out]`.
        only: fields of the config that must have these values for the entry to count.
    """

    name: str
    ours: tuple[str, ...]
    transposed: bool = False
    only: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def of_layer(self, index: int, group_size: int) -> Stored:
        """With one layer's number in place of `{i}` or `{j}`, its group and place there of `{group}` and `{inner}`."""
        at = {"i": index, "j": index, "group": index // group_size, "inner": index % group_size}
        return replace(self, name=self.name.format(**at), ours=tuple(ours.format(**at) for ours in self.ours))

    def shape(self, parts: Sequence[Sequence[int]]) -> list[int]:
        """The shape in the file, given those of ours."""
        whole = [sum(part[0] for part in parts), *parts[0][1:]]
        return whole[::-1] if self._turned(len(whole)) else whole

    def split(self, stored: Tensor, parts: Sequence[Sequence[int]]) -> list[Tensor]:
        """Ours, of these shapes, out of the one in the file; none shares memory with another."""
        whole = stored.t().contiguous() if self._turned(stored.dim()) else stored
        return [whole] if len(parts) == 1 else [part.clone() for part in whole.split([part[0] for part in parts])]

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The tensor in the file out of ours."""
        whole = parts[0] if len(parts) == 1 else torch.cat(list(parts))
        return whole.t() if self._turned(whole.dim()) else whole

    def _turned(self, dim: int) -> bool:
        return self.transposed and dim == 2


Weight = tuple[str, str] | Stored
"""Our tensor and theirs, or how theirs holds ours."""


def _stored(weight: Weight) -> Stored:
    return weight if isinstance(weight, Stored) else Stored(weight[1], (weight[0],))


_LINEAR = ClassifierShape(num_labels=2, transform=None, pooling=None)


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
        weights: our tensor names (below `trunk.`) and theirs; `{i}` stands for the layer, `{j}` for that of a decoder
            (see `Stored.of_layer`). A `Stored` where theirs is not simply ours under another name.
        namespaces: what names of trunk tensors start with, to tell a strange trunk tensor from an unused head.
        spare: patterns of tensors in these namespaces that the trunk does not use.
        aliases: other endings of names that old files have, and what they mean.
        classifier: the classification head that its Hugging Face class has; `num_labels` is a placeholder.
        token_classifier: likewise, of every token.
        language: the language head that its Hugging Face class has, for a config of its trunk.
        classifier_settings, token_settings, language_settings: what of these heads stands in the config.
        heads: our names of head tensors by use, and theirs; `{prefix}` stands for the prefix.
        copies: names in old files that repeat a tensor, and that tensor's own; without prefix.
        trunk: what its models are made of; `fixed` and `settings` are fields of this one's config.
    """

    name: str
    architectures: Mapping[Use, str]
    prefix: str
    fixed: Mapping[str, Any]
    settings: tuple[Setting, ...]
    weights: tuple[Weight, ...]
    namespaces: tuple[str, ...]
    classifier: ClassifierShape
    heads: Mapping[Use, Mapping[str, str]]
    token_classifier: ClassifierShape = _LINEAR
    classifier_settings: tuple[Setting, ...] = ()
    token_settings: tuple[Setting, ...] = ()
    language_settings: tuple[Setting, ...] = ()
    requires: Mapping[str, tuple[Any, ...]] = field(default_factory=dict[str, tuple[Any, ...]])
    spare: tuple[str, ...] = ()
    aliases: Mapping[str, str] = field(default_factory=dict[str, str])
    language: Callable[[Any], LanguageShape] = lambda config: LanguageShape()
    copies: Mapping[str, str] = field(default_factory=dict[str, str])
    trunk: type[Trunk] = Transformer

    def variant(
        self,
        *,
        fixed: Mapping[str, Any] | None = None,
        settings: tuple[Setting, ...] = (),
        weights: tuple[Weight, ...] = (),
        **changes: Any,
    ) -> Family:
        """A family like this one: a field that is given, fixed or not, stands in place of the one of that name, and so
        does the place of one of our tensors."""
        fixed = fixed or {}
        own = {*fixed, *(setting.ours for setting in settings)}
        placed = {ours for entry in weights for ours in _stored(entry).ours}
        return replace(
            self,
            fixed={**{name: value for name, value in self.fixed.items() if name not in own}, **fixed},
            settings=(*(setting for setting in self.settings if setting.ours not in own), *settings),
            weights=(*(entry for entry in self.weights if not placed.intersection(_stored(entry).ours)), *weights),
            **changes,
        )

    def read_config(self, hf: Mapping[str, Any], layers: tuple[LayerOverride, ...] | None = None) -> Structure:
        """Our config from theirs, with `layers` in place of the per-layer overrides that their keys say, if any. A
        setting that we cannot represent is a `UserError` that names its key."""
        for name, allowed in self.requires.items():
            if name in hf and hf[name] not in allowed:
                right = " or ".join(repr(value) for value in allowed)
                raise UserError(f"{hf[name]!r} cannot be represented", where=name, hint=f"can be: {right}")
        read = {setting.ours: setting.read(hf) for setting in self.settings}
        return self.trunk.Config(**self.fixed, **read | ({} if layers is None else {"layers": layers}))

    def write_config(self, config: Structure, source: Mapping[str, Any]) -> Json:
        """Their config from ours: `source` with only those keys changed that no longer mean the same.

        A `UserError` where their config has no way to say what ours says, `layers` aside.
        """
        said = {"layers", *(setting.ours for setting in self.settings)}
        for known in fields(self.trunk.Config):
            value = self.fixed.get(known.name, known.default)
            if known.name not in said and getattr(config, known.name) != value:
                raise UserError(f"models of the family '{self.name}' have {value!r}", where=known.name)
        hf: Json = {**source, "model_type": self.name}
        for setting in self.settings:
            value = getattr(config, setting.ours)
            if not source or setting.read(hf) != value:
                setting.write(hf, value)
        return hf

    def classifier_shape(self, config: Structure, source: Mapping[str, Any]) -> ClassifierShape:
        """The classification head of a model with this config, read from `source`; `num_labels` is a placeholder."""
        return replace(self.classifier, **self._head_settings(self.classifier_settings, config, source))

    def token_shape(self, config: Structure, source: Mapping[str, Any]) -> ClassifierShape:
        """The head that classifies every token of a model with this config; `num_labels` is a placeholder."""
        return replace(self.token_classifier, **self._head_settings(self.token_settings, config, source))

    def language_shape(self, config: Structure, source: Mapping[str, Any]) -> LanguageShape:
        """The language head of a model with this config, read from `source`."""
        return replace(self.language(config), **self._head_settings(self.language_settings, config, source))

    def _head_settings(self, settings: tuple[Setting, ...], config: Structure, source: Mapping[str, Any]) -> Json:
        hf = self.write_config(config, source) if settings else {}
        return {setting.ours: setting.read(hf) for setting in settings}

    @property
    def keys(self) -> frozenset[str]:
        """Every key of a config that this family looks at."""
        settings = (*self.settings, *self.classifier_settings, *self.token_settings, *self.language_settings)
        return frozenset(self.requires) | {name for setting in settings for name in setting.keys}

    def stored(self, config: Structure) -> list[Stored]:
        """Every tensor of a trunk's files, without prefix, that a model with this config may have."""
        found: list[Stored] = []
        counts = {"{i}": config.num_stored_layers, "{j}": int(getattr(config, "decoder_layers", 0))}
        for entry in self.weights:
            place = _stored(entry)
            if all(getattr(config, name) == value for name, value in place.only.items()):
                layers = next((count for sign, count in counts.items() if sign in place.ours[0]), 1)
                found += [place.of_layer(i, config.group_size) for i in range(layers)]
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
