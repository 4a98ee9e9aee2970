"""The structure of a model: what must be known to build its layers, and nothing of how it is trained or used."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from difflib import get_close_matches
from typing import Any, Literal, TypeVar, cast

from lexmill.errors import UserError
from lexmill.nn.activation import Activation
from lexmill.nn.norm import NormKind
from lexmill.nn.rotary import RopeScaling

D = TypeVar("D")


@dataclass(frozen=True)
class LayerShape:
    """What one layer looks like, overrides applied."""

    num_heads: int
    num_kv_heads: int
    intermediate_size: int
    window: int | None
    rope_theta: float
    rope_scaling: RopeScaling | None
    attention_norm: bool


@dataclass(frozen=True)
class LayerOverride:
    """Where one layer differs from the rest of its model, by design or as pruning leaves it; None where it does not.

    Args:
        rope_theta: of its rotary positions, whose frequencies are then not scaled.
    """

    num_heads: int | None = None
    num_kv_heads: int | None = None
    intermediate_size: int | None = None
    window: int | None = None
    rope_theta: float | None = None


@dataclass(frozen=True)
class ModelConfig:
    """A transformer's structure.

    Args:
        num_layers: how many layers a token goes through.
        num_groups, group_size: layers share weights (Lan et al. 2020): there are `num_groups` groups of `group_size`
            layers, and each group runs several times in a row. None where every layer has weights of its own.
        embedding_size: the width of the embedding tables, projected to `hidden_size`; None where they have that width
            and no projection.
        decoder_layers: layers of a decoder that reads the last hidden state; 0 for none.
        start_token: the token that a decoder is given first.
        num_kv_heads: heads of keys and values, which divide `num_heads`.
        max_positions: the longest sequence, in tokens.
        position_offset: rows of a `learned` position table before that of the first token (RoBERTa).
        type_vocab_size: segment types of pairs; 0 for none.
        task_type_vocab_size: kinds of task, of which text is the first; 0 for none (ERNIE).
        norm_place: `post` normalises after each residual sum (BERT), `pre` before each sub-layer (LLaMA), `around`
            before and after it (GLM-4).
        norm_bias: whether layer norms have one.
        embedding_norm, final_norm: whether the sum of embeddings, and the last hidden state, is normalised.
        first_norm: whether the first layer has a norm before its attention, where all others do.
        rope_theta, rope_scaling: of `rotary` positions.
        rope_dim: how many dimensions of each head are rotated, the first ones; all where None.
        rope_interleaved: whether dimension `2i` is rotated with `2i + 1`, not `i` with `i + rope_dim / 2`.
        relative_buckets, relative_max_distance: of `relative` positions, see `nn.relative`.
        gated: whether the feed-forward layer has a gate.
        window: a token sees only those fewer than this many positions away; None for all.
        attention_bias: of queries, keys, values and output; `mlp_bias` of the feed-forward layers.
        attention_output_bias: of the output, where it is not as `attention_bias` says.
        attention_scaled: whether scores are divided by the square root of `head_dim`.
        qk_norm: whether each head's queries and keys are normalised, before rotation.
        tied_output: whether an output head shares the token embedding.
        output_scale: what a language head multiplies hidden states by.
        dropout: of embeddings and sub-layer outputs; `attention_dropout` of attention weights.
        initializer_range: the standard deviation of new weights; with `initializer_fan_in` that of matrices is divided
            by the square root of their inputs.
        layers: one override for each layer with weights of its own, those of a decoder last, or none at all.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    max_positions: int
    num_groups: int | None = None
    group_size: int = 1
    embedding_size: int | None = None
    position_offset: int = 0
    type_vocab_size: int = 0
    task_type_vocab_size: int = 0
    norm: NormKind = "layer"
    norm_place: Literal["pre", "post", "around"] = "post"
    norm_eps: float = 1e-12
    norm_bias: bool = True
    embedding_norm: bool = True
    final_norm: bool = False
    first_norm: bool = True
    positions: Literal["learned", "rotary", "relative", "none"] = "learned"
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    rope_dim: int | None = None
    rope_interleaved: bool = False
    relative_buckets: int = 32
    relative_max_distance: int = 128
    activation: Activation = "gelu"
    gated: bool = False
    causal: bool = False
    window: int | None = None
    attention_bias: bool = True
    attention_output_bias: bool | None = None
    attention_scaled: bool = True
    qk_norm: bool = False
    mlp_bias: bool = True
    tied_output: bool = True
    output_scale: float = 1.0
    dropout: float = 0.0
    attention_dropout: float = 0.0
    initializer_range: float = 0.02
    initializer_fan_in: bool = False
    decoder_layers: int = 0
    start_token: int | None = None
    layers: tuple[LayerOverride, ...] = ()

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "hidden_size", "num_layers", "head_dim", "max_positions", "group_size")
        for name in sizes:
            if getattr(self, name) < 1:
                raise UserError(f"must be at least 1, is {getattr(self, name)}", where=name)
        for name in (
            "type_vocab_size",
            "task_type_vocab_size",
            "position_offset",
            "initializer_range",
            "decoder_layers",
        ):
            if getattr(self, name) < 0:
                raise UserError(f"must be at least 0, is {getattr(self, name)}", where=name)
        if self.embedding_size is not None and self.embedding_size < 1:
            raise UserError(f"must be at least 1, is {self.embedding_size}", where="embedding_size")
        rotated = self.head_dim if self.rope_dim is None else self.rope_dim
        if self.positions == "rotary" and (rotated % 2 or not 0 < rotated <= self.head_dim):
            raise UserError(
                f"rotary positions need an even dimension up to {self.head_dim}, not {rotated}",
                where="head_dim" if self.rope_dim is None else "rope_dim",
            )
        if self.positions == "relative" and self.relative_max_distance <= self.relative_buckets // 2:
            hint = "it must be more than half of relative_buckets"
            raise UserError(f"is {self.relative_max_distance}", where="relative_max_distance", hint=hint)
        self._check_sharing()
        self._check_layers()

    def _check_sharing(self) -> None:
        repeats = self.num_layers // self.group_size
        if self.num_layers % self.group_size or not 0 < (self.num_groups or repeats) <= repeats:
            raise UserError(
                f"{self.num_layers} layers cannot be made of {self.num_groups} groups of {self.group_size}",
                where="num_groups",
                hint="group_size must divide num_layers, and every group must run",
            )
        if self.num_groups is None and self.group_size > 1:
            raise UserError("layers that share no weights have no groups", where="group_size", hint="give num_groups")
        if self.decoder_layers and self.norm_place == "around":
            raise UserError("a decoder beside an encoder has norms 'pre' or 'post'", where="norm_place")

    def _check_layers(self) -> None:
        count = self.num_stored_layers + self.decoder_layers
        if self.layers and len(self.layers) != count:
            shared = self.num_stored_layers < self.num_layers
            raise UserError(
                f"{len(self.layers)} per-layer overrides for {count} layers",
                where="layers",
                hint="layers that share their weights share one override" if shared else "give one a layer, or none",
            )
        for index in range(self.num_layers + self.decoder_layers):
            shape = self.layer(index)
            if min(shape.num_heads, shape.num_kv_heads, shape.intermediate_size) < 1:
                raise UserError("heads and widths must be at least 1", where=f"layers[{index}]")
            if self.positions == "relative" and shape.num_heads != self.num_heads:
                raise UserError(
                    f"{shape.num_heads} heads cannot share the biases of {self.num_heads}",
                    where=f"layers[{index}].num_heads",
                    hint="with relative positions all layers have the same number of heads",
                )
            if shape.num_heads % shape.num_kv_heads:
                raise UserError(
                    f"{shape.num_kv_heads} key-value heads cannot be shared by {shape.num_heads} heads",
                    where=f"layers[{index}].num_kv_heads",
                    hint="num_kv_heads must divide num_heads",
                )

    @property
    def num_stored_layers(self) -> int:
        """How many layers have weights of their own."""
        return self.num_layers if self.num_groups is None else self.num_groups * self.group_size

    @property
    def schedule(self) -> tuple[int, ...]:
        """For each layer in the order they run, which one of those with weights of their own it is."""
        if self.num_groups is None:
            return tuple(range(self.num_layers))
        repeats = self.num_layers // self.group_size
        groups = (run * self.num_groups // repeats for run in range(repeats))
        return tuple(group * self.group_size + inner for group in groups for inner in range(self.group_size))

    def layer(self, index: int) -> LayerShape:
        """The shape of one layer, by its number in the order they run; those of a decoder come last."""
        stored = [*self.schedule, *range(self.num_stored_layers, self.num_stored_layers + self.decoder_layers)]
        own = self.layers[stored[index]] if self.layers else LayerOverride()
        return LayerShape(
            self.num_heads if own.num_heads is None else own.num_heads,
            self.num_kv_heads if own.num_kv_heads is None else own.num_kv_heads,
            self.intermediate_size if own.intermediate_size is None else own.intermediate_size,
            self.window if own.window is None else own.window,
            self.rope_theta if own.rope_theta is None else own.rope_theta,
            self.rope_scaling if own.rope_theta is None else None,
            self.first_norm or index > 0,
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON; the inverse of `from_dict`."""
        return asdict(self) | {"layers": [asdict(layer) for layer in self.layers]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str = "config") -> ModelConfig:
        """Read what `to_dict` wrote. An unknown or missing key is a `UserError`."""
        values = dict(data)
        if values.get("rope_scaling") is not None:
            values["rope_scaling"] = strict(RopeScaling, values["rope_scaling"], f"{where}.rope_scaling")
        values["layers"] = read_overrides(values.get("layers", ()), f"{where}.layers")
        return strict(cls, values, where)


def read_overrides(data: Any, where: str) -> tuple[LayerOverride, ...]:
    """Per-layer overrides from JSON."""
    if not isinstance(data, (list, tuple)):
        raise UserError("must be a list with one entry a layer", where=where)
    entries = cast("list[Any]", data)
    return tuple(strict(LayerOverride, entry, f"{where}[{i}]") for i, entry in enumerate(entries))


def strict(kind: type[D], data: Any, where: str) -> D:
    """A dataclass from JSON: unknown and missing keys are errors that name the nearest right one."""
    if not isinstance(data, Mapping):
        raise UserError(f"must be an object, is {type(data).__name__}", where=where)
    values = cast("Mapping[str, Any]", data)
    known = [field.name for field in fields(cast("type[ModelConfig]", kind))]
    for key in values:
        if key not in known:
            near = get_close_matches(key, known, 1)
            raise UserError(f"unknown key '{key}'", where=where, hint=f"did you mean '{near[0]}'?" if near else None)
    try:
        return kind(**values)
    except TypeError as error:
        raise UserError(str(error).replace(f"{kind.__name__}.__init__()", "it"), where=where) from error
