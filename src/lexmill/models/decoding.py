"""How the next token is chosen from its logits: pure functions of one row, and of nothing else in the batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

_COLDEST = 1e-6


@dataclass(frozen=True)
class Sampling:
    """How one request wants its tokens chosen.

    Args:
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: only so many likeliest tokens may be drawn; 0 for all.
        top_p: only the likeliest tokens that together have this probability (Holtzman et al. 2020).
        repetition_penalty: divides positive and multiplies negative logits of tokens that stand in the prompt or the
            answer already (Keskar et al. 2019); 1 for none.
        seed: of the draws; one at random where None.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    @property
    def greedy(self) -> bool:
        """Whether nothing is drawn: logits divided by so little would not be finite."""
        return self.temperature < _COLDEST


GREEDY = Sampling()


def penalised(logits: Float[Tensor, "vocab"], seen: Sequence[int], penalty: float) -> Float[Tensor, "vocab"]:
    """Logits with those of tokens seen before made smaller."""
    if penalty == 1.0 or not seen:
        return logits
    ids = torch.tensor(sorted(set(seen)), device=logits.device)
    chosen = logits[ids]
    return logits.index_copy(0, ids, torch.where(chosen > 0, chosen / penalty, chosen * penalty))


def keep_top_k(logits: Float[Tensor, "vocab"], k: int) -> Float[Tensor, "vocab"]:
    """All but the `k` largest set to -inf; those equal to the smallest of them stay too. 0 keeps all."""
    if not 0 < k < len(logits):
        return logits
    return logits.masked_fill(logits < logits.topk(k).values[-1], -math.inf)


def keep_top_p(logits: Float[Tensor, "vocab"], p: float) -> Float[Tensor, "vocab"]:
    """The fewest likeliest tokens whose probabilities reach `p`, the others set to -inf. The likeliest always stays."""
    if p >= 1.0:
        return logits
    ordered, order = logits.sort(descending=True)
    probabilities = ordered.softmax(0)
    before = probabilities.cumsum(0) - probabilities
    ordered = ordered.masked_fill((before >= p) & (torch.arange(len(logits), device=logits.device) > 0), -math.inf)
    return torch.empty_like(logits).scatter(0, order, ordered)


def distribution(logits: Float[Tensor, "vocab"], sampling: Sampling, seen: Sequence[int]) -> Float[Tensor, "vocab"]:
    """The logits that a token is drawn from: repetition, temperature, top-k and top-p, in this order."""
    logits = penalised(logits, seen, sampling.repetition_penalty)
    if sampling.greedy:
        return logits
    return keep_top_p(keep_top_k(logits / sampling.temperature, sampling.top_k), sampling.top_p)


class Chooser:
    """Chooses the tokens of one sequence, with a random generator of its own.

    Args:
        prompt: its tokens count as seen.
    """

    def __init__(self, sampling: Sampling, prompt: Sequence[int]) -> None:
        self.sampling = sampling
        self._seen = list(prompt)
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed)

    @property
    def plain(self) -> bool:
        """Whether this is the likeliest token, nothing else asked for."""
        return self.sampling.greedy and self.sampling.repetition_penalty == 1.0

    def __call__(self, logits: Float[Tensor, "vocab"]) -> int:
        shaped = distribution(logits, self.sampling, self._seen)
        if self.sampling.greedy:
            token = int(shaped.argmax())
        else:
            token = int(torch.multinomial(shaped.softmax(0).cpu(), 1, generator=self._generator))
        self._seen.append(token)
        return token
