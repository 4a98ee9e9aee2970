"""Greedy and beam search with a decoder that reads a source: the encoder runs once, the decoder over a cache."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lexmill.errors import UserError
from lexmill.models.encoder_decoder import EncoderDecoder, Memory
from lexmill.models.model import Model
from lexmill.nn.cache import KVCache
from lexmill.nn.layout import Packed

EarlyStopping = bool | Literal["never"]


@dataclass(frozen=True)
class Said:
    """What was found for one source.

    Args:
        ids: the tokens, the end token included.
        logprobs: of each token, in nats.
        score: their sum over the number of tokens to the power of the length penalty.
    """

    ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    score: float = 0.0


@dataclass(frozen=True)
class Beams:
    """How to search.

    Args:
        num_beams: hypotheses that go on at each step; 1 is greedy search.
        length_penalty: the power of the length that a score is divided by: larger ones favour longer texts, 0 none.
        early_stopping: a source is done once `num_beams` of its hypotheses have ended and, where False, the likeliest
            running one scores no better, as long as it is now, than the worst of them; where "never", nor would it at
            its greatest length; where True, at once. Greedy search ends with its first end token.
    """

    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: EarlyStopping = False


class _Source:
    """The search for one source: hypotheses that run, likeliest first, and the best that have ended, best first."""

    def __init__(self, index: int, limit: int, beams: Beams, end_ids: Collection[int]) -> None:
        self.index, self.limit, self.beams, self.end_ids = index, limit, beams, end_ids
        self.running = [Said()]
        self.ended: list[Said] = []

    def advance(
        self, totals: Sequence[float], scores: Sequence[float], parents: Sequence[int], ids: Sequence[int],
        logprobs: Sequence[float],
    ) -> list[int]:  # fmt: skip
        """Take the likeliest continuations, likeliest first; gives the places of those that go on, none at the end.

        Args:
            totals: summed log-probabilities; `scores` the same under the length penalty.
            parents: the running hypotheses that they continue, by `ids` of these `logprobs`.
        """
        width, kept, running = self.beams.num_beams, list[int](), list[Said]()
        for place, (parent, token, logprob) in enumerate(zip(parents, ids, logprobs, strict=True)):
            before = self.running[parent]
            said = Said((*before.ids, token), (*before.logprobs, logprob), scores[place])
            if token in self.end_ids or len(said.ids) == self.limit:
                if place < width:
                    self.ended = sorted([*self.ended, said], key=lambda one: -one.score)[:width]
            elif len(kept) < width:
                kept.append(place)
                running.append(said)
        self.running = running
        return kept if kept and not self._is_done(totals[kept[0]], len(running[0].ids)) else []

    def _is_done(self, best_total: float, length: int) -> bool:
        if len(self.ended) < self.beams.num_beams:
            return False
        if self.beams.early_stopping is True or self.beams.num_beams == 1:
            return True
        penalty = self.beams.length_penalty
        reach = self.limit if self.beams.early_stopping == "never" and penalty > 0 else length
        return best_total / reach**penalty <= self.ended[-1].score


@torch.inference_mode()
def search(
    model: Model,
    memory: Memory,
    max_new_tokens: int | Sequence[int],
    end_ids: Collection[int],
    beams: Beams | None = None,
    *,
    head: str = "lm",
) -> list[Said]:
    """The best target of each source, all together; a source that is done leaves the batch.

    Args:
        memory: of the sources (`Model.memory`).
        max_new_tokens: the most that a target may hold, end token included; one number, or one a source.
        end_ids: tokens that end a target.

    Raises:
        UserError: the model has no decoder that reads a source, or too few tokens for so many beams.
    """
    beams, trunk, count = beams or Beams(), model.decoding_trunk, memory.layout.num_sequences
    keep = (1 + max(1, len(end_ids))) * beams.num_beams
    if keep > model.config.vocab_size:
        hint = f"at most {model.config.vocab_size // (1 + max(1, len(end_ids)))} for this vocabulary"
        raise UserError(f"{beams.num_beams} beams are too many", where="num_beams", hint=hint)
    limits = [max_new_tokens] * count if isinstance(max_new_tokens, int) else list(max_new_tokens)
    found = [Said()] * count
    live = [_Source(i, limit, beams, end_ids) for i, limit in enumerate(limits) if limit > 0]
    if not live:
        return found
    memory = trunk.recall(memory)
    if len(live) < count:
        memory = memory.of(torch.tensor([source.index for source in live]))
    cache = trunk.new_cache(len(live), min(max(limits), 64))
    start = trunk.config.start_token
    assert start is not None
    ids, totals = torch.full((len(live), 1), start), torch.zeros(len(live), 1, device=model.device)
    while live:
        logprobs = _next(model, trunk, head, ids, memory, cache)
        top = (logprobs + totals.unsqueeze(-1)).flatten(1).topk(keep)
        scores = top.values / (int(cache.lengths[0]) ** beams.length_penalty)
        vocab = logprobs.shape[-1]
        own = logprobs.flatten(1).gather(1, top.indices)
        told = (top.values, scores, top.indices // vocab, top.indices % vocab, own)
        by_source = zip(*(one.tolist() for one in told), strict=True)
        places = [source.advance(*one) for source, one in zip(live, by_source, strict=True)]
        for source, going in zip(live, places, strict=True):
            if not going:
                found[source.index] = source.ended[0]
        on = [i for i, going in enumerate(places) if going]
        if not on:
            break
        kept = torch.tensor([places[i] for i in on])
        order = (top.indices[on] // vocab).cpu().gather(1, kept) + torch.tensor(on).unsqueeze(1) * ids.shape[1]
        if order.numel() != ids.numel() or not torch.equal(order.flatten(), torch.arange(ids.numel())):
            cache.keep(order.flatten())
        if len(on) < len(live):
            memory = memory.of(torch.tensor(on))
        ids = (top.indices[on] % vocab).cpu().gather(1, kept)
        totals = top.values[on].gather(1, kept.to(totals.device))
        live = [live[i] for i in on]
    return found


def _next(
    model: Model, trunk: EncoderDecoder, head: str, ids: Int[Tensor, "source beam"], memory: Memory, cache: KVCache
) -> Float[Tensor, "source beam vocab"]:
    """The log-probability of each next token after these, which are the last of each hypothesis.

    The hypotheses of a source ask its one memory together, as the queries of one sequence.
    """
    device = model.device
    layout = Packed.of([1] * ids.numel(), device)
    asking = Packed.of([ids.shape[1]] * len(ids), device)
    hidden = trunk.decode(
        ids.flatten().to(device), cache.lengths.to(device), layout, memory, asking=asking, cache=cache
    )
    logits: Tensor = model.heads[head](hidden)
    return logits.float().log_softmax(-1).unflatten(0, ids.shape)
