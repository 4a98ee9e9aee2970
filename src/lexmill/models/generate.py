"""Decoding over a key-value cache, a token a step for all sequences together."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lexmill.errors import UserError
from lexmill.models.decoding import GREEDY, Chooser, Sampling
from lexmill.models.model import Model
from lexmill.models.steps import Steps
from lexmill.nn.cache import Cache, KVCache
from lexmill.nn.layout import Packed


@dataclass
class Generated:
    """The continuation of one prompt: token ids, the end token included, and the log-probability of each."""

    ids: list[int] = field(default_factory=list[int])
    logprobs: list[float] = field(default_factory=list[float])


Ended = Callable[[int, Generated], bool]
"""Whether the sequence of this index is to end with what it now holds."""


def greedy(
    model: Model,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int | Sequence[int],
    end_ids: Collection[int] = (),
    *,
    head: str = "lm",
) -> list[Generated]:
    """Continue prompts by the likeliest token. See `generate`."""
    return generate(model, prompts, max_new_tokens, end_ids, head=head)


@torch.inference_mode()
def generate(
    model: Model,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int | Sequence[int],
    end_ids: Collection[int] = (),
    *,
    sampling: Sequence[Sampling] | None = None,
    ended: Ended = lambda index, so_far: False,
    head: str = "lm",
) -> list[Generated]:
    """Continue prompts all together; a finished one leaves the batch.

    A continuation stops after an id of `end_ids`, after `max_new_tokens` (one number, or one a prompt), where the
    model has no more positions, or where `ended` says so, which is asked after every token. An empty or over-long
    prompt is a `UserError`. The model should be in `eval` mode.

    Args:
        sampling: one a prompt; the likeliest token where None. A sequence's draws do not depend on its neighbours.
            Log-probabilities are the model's own, before any of it.
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
    wanted = [GREEDY] * len(prompts) if sampling is None else sampling
    choosers = [Chooser(one, prompt) for one, prompt in zip(wanted, prompts, strict=True)]
    cache = model.trunk.new_cache(len(live), max(len(prompts[i]) + min(limits[i], 64) for i in live))
    step: list[Sequence[int]] = [prompts[i] for i in live]
    steps = Steps.of(model.trunk)
    while live:
        if steps is None or not isinstance(cache, KVCache) or cache.is_empty:
            logits = _next(model, head, step, cache)
        else:
            ids = torch.tensor([token for [token] in step], device=model.device)
            logits = model.heads[head](steps(ids, cache)).float()
        chosen, scores = _choose(logits, [choosers[i] for i in live])
        kept: list[int] = []
        for place, (index, token, score) in enumerate(zip(live, chosen, scores, strict=True)):
            result = results[index]
            result.ids.append(token)
            result.logprobs.append(score)
            over = token in end_ids or len(result.ids) >= limits[index]
            if not ended(index, result) and not over:
                kept.append(place)
        if len(kept) < len(live):
            cache.keep(torch.tensor(kept, dtype=torch.int64))
        live = [live[place] for place in kept]
        step = [[chosen[place]] for place in kept]
    return results


def _next(model: Model, head: str, step: Sequence[Sequence[int]], cache: Cache) -> Tensor:
    """The logits `[seq, vocab]` of each sequence's next token after these new ones."""
    device = model.device
    layout = Packed.of([len(ids) for ids in step], device)
    ids = torch.tensor([token for ids in step for token in ids], device=device)
    starts = torch.repeat_interleave(cache.lengths - layout.offsets[:-1], layout.lengths)
    positions = (starts + torch.arange(layout.num_tokens)).to(device)
    hidden = model.trunk(ids, positions, layout, cache=cache, only="last")
    return model.heads[head](hidden).float()


def _choose(logits: Tensor, choosers: Sequence[Chooser]) -> tuple[list[int], list[float]]:
    """A token for each row, and its log-probability."""
    likeliest = logits.argmax(-1)
    if not all(one.plain for one in choosers):
        pairs = zip(likeliest.tolist(), logits, choosers, strict=True)
        picked = [best if one.plain else one(row) for best, row, one in pairs]
        likeliest = torch.tensor(picked, device=logits.device)
    scores = logits.gather(1, likeliest[:, None]).squeeze(1) - logits.logsumexp(-1)
    return likeliest.tolist(), scores.tolist()
