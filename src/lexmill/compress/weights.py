"""Weights alone in 8 or 4 bits: smaller models, and faster where few rows are multiplied, as in decoding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, cast

import torch
from annotated_types import Ge, Gt
from torch import Tensor, nn

from lexmill.compress.base import Material, Method, Stage, register
from lexmill.compress.calibrate import Group, groups_of, groups_without
from lexmill.compress.factorise import second_moments
from lexmill.compress.weights_rounding import awq, decoded, gptq, lost
from lexmill.engine import Loaded
from lexmill.errors import UserError
from lexmill.models import LMHead, Model
from lexmill.nn.embedding import Embedding, Int8Embedding
from lexmill.nn.linear import Linear
from lexmill.nn.weight_only import Coded, Dtype, Form, WeightOnlyLinear, has_fp8, nearest

Rounding = Literal["nearest", "gptq", "awq"]


@dataclass(frozen=True)
class WeightsOptions:
    """What may be set for `weights`.

    Args:
        dtype: of a weight: `int8`, `int4`, or `fp8` (e4m3), which needs a GPU that multiplies it.
        group: columns of a row that share a scale: 32, 64 or 128. Where None, the whole row at 8 bits and 32 columns
            at 4, which are what CPUs have products for.
        symmetric: whether a code of 0 stands for 0; otherwise groups reach from their least weight to their largest.
            Where None, at 8 bits but not at 4.
        rounding: to the `nearest` code; by `gptq`, which makes up for what was lost; or `awq`, nearest after columns of
            large inputs were enlarged. The last two measure inputs on training rows.
        rows: so many training rows.
        damp: `gptq`: what is added to the diagonal of second moments, as a share of its mean.
        act_order: `gptq`: columns of the largest inputs first.
        skip: places of layers, such as `layers.0.mlp`, that stay as they are.
        embeddings: whether the table of tokens becomes bytes, with an output that shares it.
    """

    dtype: Dtype = "int8"
    group: Literal[32, 64, 128] | None = None
    symmetric: bool | None = None
    rounding: Rounding = "gptq"
    rows: Annotated[int, Ge(1)] = 128
    damp: Annotated[float, Gt(0)] = 0.01
    act_order: bool = False
    skip: tuple[str, ...] = ()
    embeddings: bool = True

    @property
    def form(self) -> Form:
        """How matrices are kept."""
        four = self.dtype == "int4"
        group = 32 if four and self.group is None else self.group
        return Form(self.dtype, group, not four if self.symmetric is None else self.symmetric)


@register
class Weights(Method):
    """Weight-only quantisation: GPTQ (Frantar et al. 2023) or AWQ (Lin et al. 2024)."""

    name: ClassVar[str] = "weights"
    stage: ClassVar[Stage] = "quantise"
    Options: ClassVar[type] = WeightsOptions
    after: ClassVar[Mapping[Stage, str]] = {"quantise": "since the matrices are not whole any more"}

    def check(self, subject: Loaded, options: WeightsOptions) -> None:
        model, form = subject.model, options.form
        if form.dtype == "fp8" and not has_fp8(model.device):
            hint = "set dtype = 'int8'; fp8 needs a GPU of compute capability 8.9 or more"
            raise UserError(f"'{model.device}' does not multiply fp8", where="dtype", hint=hint)
        if form.dtype == "fp8" and (form.group is not None or not form.symmetric):
            raise UserError("fp8 has a scale a row and no zeros", where="group", hint="leave group and symmetric out")
        if options.act_order and options.rounding != "gptq":
            raise UserError(f"'{options.rounding}' has no order of columns", where="act_order", hint="set it to false")
        for place in (one for group in groups_without(model.trunk, options.skip) for one in group.places):
            columns = cast("Linear", model.trunk.get_submodule(place)).in_features
            if columns % (form.group or columns) or (form.dtype == "int4" and columns % 2):
                fits = [str(size) for size in (32, 64, 128) if columns % size == 0]
                hint = f"set group = {' or '.join(fits)}, or skip it" if fits else "skip it, or take dtype = 'int8'"
                raise UserError(f"'{place}' has {columns} columns: no groups of {form.group}", where="group", hint=hint)

    def apply(self, subject: Loaded, material: Material, options: WeightsOptions) -> tuple[Loaded, dict[str, float]]:
        self.check(subject, options)
        trunk, form = subject.model.trunk, options.form
        groups = groups_without(trunk, options.skip)
        moments: Mapping[str, Tensor] = {}
        if options.rounding != "nearest":
            rows = material.sample(options.rows)
            if not rows:
                raise UserError("there are no rows to measure on", where="train", hint="set rounding = 'nearest'")
            moments = second_moments(subject, rows, [group.places[0] for group in groups], exact=False)
        errors: list[float] = []
        layers: list[WeightOnlyLinear] = []
        for number, group in enumerate(groups, start=1):
            dense = [cast("Linear", trunk.get_submodule(place)) for place in group.places]
            errors += _put(trunk, group, dense, form, options, moments.get(group.places[0]))
            layers += [cast("WeightOnlyLinear", trunk.get_submodule(place)) for place in group.places]
            material.progress(number / len(groups))
        tables = put_tables(subject.model) if options.embeddings else 0
        return subject, _effect(layers, errors, tables, sum(len(group.places) for group in groups_of(trunk)))


def _effect(layers: Sequence[WeightOnlyLinear], errors: Sequence[float], tables: int, dense: int) -> dict[str, float]:
    with torch.no_grad():
        for layer in layers:  # which kernel runs shows when one does
            layer(torch.zeros(1, layer.in_features, device=layer.codes.device))
    stored = sum(one.nbytes for layer in layers for one in layer.buffers())
    numbers = {
        "layers_weight_only": len(layers),
        "layers_dense": dense,
        "kernels_int8": sum(layer.ran == "int8" for layer in layers),
        "kernels_int4": sum(layer.ran == "int4" for layer in layers),
        "kernels_fp8": sum(layer.ran == "fp8" for layer in layers),
        "layers_dequantised": sum(layer.ran == "dequantised" for layer in layers),
        "tables_int8": tables,
        "bits_per_weight": 8 * stored / sum(layer.in_features * layer.out_features for layer in layers),
        "layer_error": sum(errors) / len(errors),
        "layer_error_largest": max(errors),
    }
    return {name: float(value) for name, value in numbers.items()}


def _put(
    trunk: nn.Module,
    group: Group,
    dense: Sequence[Linear],
    form: Form,
    options: WeightsOptions,
    moments: Tensor | None,
) -> list[float]:
    """Put layers in codes in the place of dense ones. What their outputs, or where inputs were not measured their
    matrices, are off by: the root mean square, as a share of their own."""
    weights = [layer.weight.detach().float() for layer in dense]
    if moments is None:
        coded = [nearest(weight, form) for weight in weights]
        moments = torch.eye(weights[0].shape[1], device=weights[0].device)
    elif options.rounding == "awq":
        coded, _ = awq(weights, moments, form)
    else:
        coded = [gptq(one, moments, form, damp=options.damp, act_order=options.act_order) for one in weights]
    for place, layer, one in zip(group.places, dense, coded, strict=True):
        parent, _, name = place.rpartition(".")
        setattr(trunk.get_submodule(parent), name, WeightOnlyLinear.of(layer, form, one))
    return [_apart(weight, one, form, moments) for weight, one in zip(weights, coded, strict=True)]


def _apart(weight: Tensor, coded: Coded, form: Form, moments: Tensor) -> float:
    whole = lost(weight, torch.zeros_like(weight), moments)
    return (lost(weight, decoded(coded, form), moments) / max(whole, 1e-30)) ** 0.5


def put_tables(model: Model) -> int:
    """Make bytes of the table of tokens, and of the outputs that share it. How many tables."""
    table = cast("nn.Module", model.trunk.embeddings.token)
    if not isinstance(table, Embedding):
        return 0
    made = Int8Embedding.of(table)
    setattr(model.trunk.embeddings, "token", made)  # noqa: B010 - the declared type is that of dense tables
    tied = [head for head in model.heads.values() if isinstance(head, LMHead) and head.tied]
    for head in tied:
        head.tie(made)
    if tied:  # files may hold the shared matrix a second time, under the output's name
        twice = model.spare("lm").get("output.weight")
        model.extras = {name: tensor for name, tensor in model.extras.items() if tensor is not twice}
    return 1
