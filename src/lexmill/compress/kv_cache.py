"""Keys and values in bytes: what a decoder keeps of tokens already seen takes a quarter of the room."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, cast

import torch
from annotated_types import Ge, Gt
from jaxtyping import Float, Int
from torch import Tensor

from lexmill.compress.base import Material, Method, Stage, register
from lexmill.compress.calibrate import apart
from lexmill.engine import Loaded
from lexmill.errors import UserError
from lexmill.models import LMHead, Transformer
from lexmill.nn.cache import CodedCache
from lexmill.nn.layout import Packed


@dataclass(frozen=True)
class CodedCacheOptions:
    """What may be set for `kv_int8`.

    Args:
        rows: validation rows, or training rows where there are none, that the change is measured on.
        max_error: how far outputs may be from those before: the root mean square, as a share of what they vary.
    """

    rows: Annotated[int, Ge(1)] = 32
    max_error: Annotated[float, Gt(0)] = 0.05


@register
class KVInt8(Method):
    """Keep keys and values with a scale for each head of each token (Sheng et al. 2023, FlexGen, section 4)."""

    name: ClassVar[str] = "kv_int8"
    stage: ClassVar[Stage] = "quantise"
    Options: ClassVar[type] = CodedCacheOptions
    after: ClassVar[Mapping[Stage, str]] = {}

    def check(self, subject: Loaded, options: CodedCacheOptions) -> None:
        trunk = subject.model.trunk
        speaks = any(isinstance(head, LMHead) for head in subject.model.heads.values())
        if not isinstance(trunk, Transformer) or trunk.sides > 1 or not trunk.config.causal or not speaks:
            what = f"'{subject.model.family}' for '{subject.task.name}' keeps no keys and values"
            raise UserError(what, where="kv_int8", hint="leave it out: it is for decoders that write text")
        if trunk.coded_cache is not None:
            raise UserError("keys and values are bytes already", where="kv_int8", hint="leave it out")

    def apply(self, subject: Loaded, material: Material, options: CodedCacheOptions) -> tuple[Loaded, dict[str, float]]:
        self.check(subject, options)
        trunk = cast("Transformer", subject.model.trunk)
        texts = _texts(subject, material, options.rows)
        before = trunk.new_cache(1, 1).bytes_per_token
        wanted = [_continued(subject, ids) for ids in texts]
        trunk.coded_cache = CodedCache()
        got = [_continued(subject, ids) for ids in texts]
        after, found = trunk.new_cache(1, 1).bytes_per_token, apart(got, wanted)
        if not found <= options.max_error:
            trunk.coded_cache = None
            off = f"outputs are off by {found:.1%}, and at most {options.max_error:.1%} was asked"
            raise UserError(f"bytes change what the model says: {off}", where="max_error", hint="leave kv_int8 out")
        numbers = {
            "bytes_per_token_before": before,
            "bytes_per_token_after": after,
            "output_error": found,
            "nats_per_token_before": _nats(texts, wanted),
            "nats_per_token_after": _nats(texts, got),
            "tokens_measured": sum(len(ids) - len(ids) // 2 for ids in texts),
        }
        return subject, {name: float(value) for name, value in numbers.items()}


def _texts(subject: Loaded, material: Material, rows: int) -> list[Int[Tensor, "tok"]]:
    shown = list(material.validation)[:rows] or material.sample(rows)
    found: list[Tensor] = []
    for example in subject.task.encode(shown, subject.tokenizer, labelled=True):
        found += [torch.as_tensor(one.ids, dtype=torch.int64) for one in example.streams["source"] if len(one.ids) > 3]
    if not found:
        raise UserError("there are no texts to measure on", where="train", hint="name some with --data")
    return found


@torch.inference_mode()
def _continued(subject: Loaded, ids: Int[Tensor, "tok"]) -> Float[Tensor, "half vocab"]:
    """The logits of the second half of a text, whose first half is in the cache."""
    model, half = subject.model.eval(), len(ids) // 2
    head = next(one for one in model.heads.values() if isinstance(one, LMHead))
    cache = model.trunk.new_cache(1, len(ids))
    hidden = ids.new_zeros(0)
    for part, start in ((ids[:half], 0), (ids[half:], half)):
        positions = torch.arange(start, start + len(part))
        layout = Packed.of([len(part)], model.device)
        hidden = model.trunk(part.to(model.device), positions.to(model.device), layout, cache=cache)
    return head(hidden).float()


def _nats(texts: Sequence[Int[Tensor, "tok"]], told: Sequence[Float[Tensor, "half vocab"]]) -> float:
    """The mean negative log-likelihood of the tokens after the first of each second half."""
    lost = [
        torch.nn.functional.cross_entropy(logits[:-1].cpu(), ids[len(ids) // 2 + 1 :], reduction="none")
        for ids, logits in zip(texts, told, strict=True)
    ]
    return float(torch.cat(lost).mean())
