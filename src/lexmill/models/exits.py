"""Early exits: texts whose class is clear after some of the layers leave the batch there."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, ClassVar, Literal, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lexmill.models.config import strict
from lexmill.models.heads import ClassifierHead, ClassifierShape
from lexmill.models.trunk import Trunk
from lexmill.nn.addition import Addition, register_addition
from lexmill.nn.layout import Known, Packed
from lexmill.nn.pooling import pool

Certainty = Literal["probability", "entropy"]


def certainty(logits: Float[Tensor, "*rows label"], by: Certainty) -> Float[Tensor, "*rows"]:
    """How sure logits are, from 0 to 1: their largest probability, or one less the entropy as a share of its most."""
    p = logits.float().softmax(-1)
    if by == "probability":
        return p.amax(-1)
    return 1 + torch.special.xlogy(p, p).sum(-1) / math.log(p.shape[-1])


@register_addition
class Exits(nn.Module, Addition):
    """Heads after inner layers, each of the labels of the head named `head` (Xin et al. 2020, DeeBERT).

    Args:
        layers: how many layers a text has been through at each, ascending.
        threshold: a text leaves where its certainty is at least this; never where None.
    """

    addition: ClassVar[str] = "exits"

    def __init__(
        self,
        width: int,
        head: str,
        layers: Sequence[int],
        shape: ClassifierShape,
        by: Certainty = "probability",
        threshold: float | None = None,
    ) -> None:
        super().__init__()
        self.width, self.head, self.layers, self.shape = width, head, tuple(layers), shape
        self.by: Certainty = by
        self.threshold = threshold
        self.heads = nn.ModuleList(ClassifierHead(width, shape) for _ in layers)

    def describe(self) -> dict[str, Any]:
        own = {"width": self.width, "head": self.head, "layers": list(self.layers), "shape": asdict(self.shape)}
        return {**own, "by": self.by, "threshold": self.threshold}

    @classmethod
    def build(cls, place: nn.Module | None, described: Mapping[str, Any]) -> Exits:
        entry: dict[str, Any] = {**described, "shape": strict(ClassifierShape, described["shape"], "exits.shape")}
        return cls(**entry)

    def acts_on(self, heads: Sequence[str]) -> bool:
        """Whether texts may leave where these heads are asked."""
        return self.threshold is not None and list(heads) == [self.head]

    def run(
        self,
        trunk: Trunk,
        last: ClassifierHead,
        ids: Int[Tensor, "tok"],
        positions: Int[Tensor, "tok"],
        layout: Packed,
        types: Int[Tensor, "tok"] | None,
    ) -> Float[Tensor, "seq label"]:
        """Logits of every text: of the first exit that is sure, or of the last head. Layers are computed for those
        texts alone that have not left; the trunk counts the others' rows in `exited_rows`."""
        depth, reached = len(trunk.layers), torch.arange(layout.num_sequences)
        found = cast("ClassifierHead", self.heads[0]).output.weight.new_empty(
            layout.num_sequences, self.shape.num_labels
        )
        for layer, head in zip(self.layers, self.heads, strict=True):
            hidden = trunk(ids, positions, layout, types=types, until=layer)
            logits = head(pool(hidden, layout, cast("Any", self.shape.pooling)))
            leaves = (certainty(logits, self.by) >= cast("float", self.threshold)).cpu()
            found[reached[leaves].to(found.device)] = logits[leaves.to(logits.device)].to(found)
            stay = (~leaves).nonzero().squeeze(1)
            reached = reached[stay]
            rows = layout.rows_of(stay).to(ids.device)
            trunk.exited_rows += (len(ids) - len(rows)) * (depth - layer)
            if not len(stay):
                return found
            ids, positions = ids[rows], positions[rows]
            types = None if types is None else types[rows]
            lengths = layout.lengths[stay]
            offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
            layout = Packed(offsets, layout.device, Known(layer, ids, hidden.index_select(0, rows)))
        how = cast("Any", last.pooling)
        if how == "mean":
            vectors = pool(trunk(ids, positions, layout, types=types), layout, how)
        else:
            vectors = trunk(ids, positions, layout, types=types, only=how)
        found[reached.to(found.device)] = last(vectors).to(found)
        return found
