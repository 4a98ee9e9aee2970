"""Direct preference optimisation (Rafailov et al. 2023): which of two replies is the better one, as a loss."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from lexmill import metrics
from lexmill.data.batch import Example
from lexmill.tasks.base import Metrics


@dataclass(frozen=True)
class Preference:
    """The log-probabilities (nats) of the chosen and the rejected reply; `reference` those under the starting model,
    None where that was not asked about this row."""

    chosen: float
    rejected: float
    reference: tuple[float, float] | None = None

    def margin(self, beta: float) -> float:
        """By how much the chosen reply's implicit reward is the larger; NaN without a reference."""
        before = np.nan if self.reference is None else self.reference[0] - self.reference[1]
        return beta * (self.chosen - self.rejected - before)


def losses(
    logprobs: Float[Tensor, "pair 2"], reference: Float[Tensor, "pair 2"], beta: float, label_smoothing: float
) -> Float[Tensor, "pair"]:
    """-log σ(β (Δ - Δ_ref)), Δ the log-ratio of chosen to rejected (equation 7); with `label_smoothing` the share of
    pairs that are taken to be the other way round (Mitchell 2023, conservative DPO)."""
    margin = beta * ((logprobs[:, 0] - logprobs[:, 1]) - (reference[:, 0] - reference[:, 1]))
    return -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)


def evaluate(answers: list[Preference], beta: float, label_smoothing: float) -> Metrics:
    """`accuracy`, the share of pairs whose chosen reply is the likelier one; and against the starting model, where it
    is known, `reward_accuracy`, `reward_margin` and the loss."""
    likelier = np.array([one.chosen > one.rejected for one in answers])
    values = {"accuracy": float(likelier.mean())}
    intervals = {"accuracy": metrics.accuracy_interval(likelier)}
    known = [one for one in answers if one.reference is not None]
    if known:
        margins = np.array([one.margin(beta) for one in known])
        values |= {"reward_accuracy": float((margins > 0).mean()), "reward_margin": float(margins.mean())}
        intervals["reward_accuracy"] = metrics.accuracy_interval(margins > 0)
        intervals["reward_margin"] = metrics.bootstrap(lambda rows: float(margins[rows].mean()), len(margins))
        pairs = torch.tensor([[one.chosen, one.rejected] for one in known], dtype=torch.float64)
        before = torch.tensor([one.reference for one in known], dtype=torch.float64)
        values["loss"] = float(losses(pairs, before, beta, label_smoothing).mean())
    return Metrics(values, intervals, {})


def digest(example: Example) -> bytes:
    """What tells a pair from others: its tokens, and which of them are learnt."""
    found = hashlib.blake2b(digest_size=16)
    for tokens in example.streams["source"]:
        found.update(len(tokens.ids).to_bytes(8, "little") + tokens.ids.tobytes())
    found.update(example.token_labels["lm"].tobytes())
    return found.digest()
