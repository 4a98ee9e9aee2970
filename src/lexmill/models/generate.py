"""Greedy decoding over a key-value cache."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lexmill.errors import UserError
from lexmill.models.model import Model
from lexmill.nn.cache import Cache
from lexmill.nn.layout import Packed


@dataclass
class Generated:
    """The continuation of one prompt: token ids, the end token included, and the log-probability of each."""

    ids: list[int] = field(default_factory=list[int])
    logprobs: list[float] = field(default_factory=list[float])


@torch.inference_mode()
def greedy(
    model: Model,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int | Sequence[int],
    end_ids: Collection[int] = (),
    *,
    head: str = "lm",
) -> list[Generated]:
    """Continue prompts by the likeliest token, all together; a finished one leaves the batch.

    A continuation stops after an id of `end_ids`, after `max_new_tokens` (one number, or one a prompt), or where the
    model has no more positions. An empty or over-long prompt is a `UserError`. The model should be in `eval` mode.
    """
    limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else list(max_new_tokens)
    longest = model.trunk.max_tokens
    for index, prompt in enumerate(prompts):
        if not 0 < len(prompt) <= longest:
            hint = f"give at least one and at most {longest} tokens"
            raise UserError(f"has {len(prompt)} tokens", where=f"prompt {index}", hint=hint)
    results = [Generated() for _ in prompts]
    limits = [min(limit, longest - len(prompt)) for limit, prompt in zip(limits, prompts, strict=True)]
    live = [index for index, limit in enumerate(limits) if limit > 0]
    if not live:
        return results
    cache = model.trunk.new_cache(len(live), max(len(prompts[i]) + min(limits[i], 64) for i in live))
    step: list[Sequence[int]] = [prompts[i] for i in live]
    while live:
        chosen, scores = _next(model, head, step, cache)
        kept: list[int] = []
        for place, (index, token, score) in enumerate(zip(live, chosen, scores, strict=True)):
            results[index].ids.append(token)
            results[index].logprobs.append(score)
            if token not in end_ids and len(results[index].ids) < limits[index]:
                kept.append(place)
        if len(kept) < len(live):
            cache.keep(torch.tensor(kept, dtype=torch.int64))
        live = [live[place] for place in kept]
        step = [[chosen[place]] for place in kept]
    return results


def _next(model: Model, head: str, step: Sequence[Sequence[int]], cache: Cache) -> tuple[list[int], list[float]]:
    """The likeliest next token of each sequence after these new ones, and its log-probability."""
    device = model.device
    layout = Packed.of([len(ids) for ids in step], device)
    ids = torch.tensor([token for ids in step for token in ids], device=device)
    starts = torch.repeat_interleave(cache.lengths - layout.offsets[:-1], layout.lengths)
    positions = (starts + torch.arange(layout.num_tokens)).to(device)
    hidden = model.trunk(ids, positions, layout, cache=cache, only="last")
    logits: Tensor = model.heads[head](hidden)
    best = logits.float().log_softmax(-1).max(-1)
    return best.indices.tolist(), best.values.tolist()
