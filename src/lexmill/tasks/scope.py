"""Which texts are none of what a classifier knows: a threshold on how sure it is, chosen on validation rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float

from lexmill import metrics

Certainty = Literal["probability", "energy"]
Objective = Literal["balanced", "accuracy", "f1"]


@dataclass(frozen=True)
class Threshold:
    """Texts of less certainty than `value` are out of scope; `objective` is what that gave on the validation rows."""

    value: float
    objective: float


def certainty(logits: Float[np.ndarray, "*item label"], how: Certainty) -> Float[np.ndarray, "*item"]:
    """How sure a classifier is that a text is one of its labels: the largest probability (Hendrycks and Gimpel 2017),
    or log Σ exp of the logits, its negative free energy (Liu et al. 2020)."""
    logits = logits.astype(np.float64)
    top = logits.max(-1)
    energy = top + np.log(np.exp(logits - top[..., None]).sum(-1))
    return np.exp(top - energy) if how == "probability" else energy


def choose(
    sure: Float[np.ndarray, "item"], right: Bool[np.ndarray, "item"], inside: Bool[np.ndarray, "item"], goal: Objective
) -> Threshold:
    """The threshold that serves the goal best; of equally good ones the lowest, which refuses least.

    Args:
        sure: the certainty of each text.
        right: whether its best label is its own; of no account for texts out of scope.
        inside: whether it is in scope; there are both kinds.
        goal: `balanced`, the mean of the share of texts in scope that are answered rightly and of those out of scope
            that are found; `accuracy`, the share of all texts treated rightly; `f1`, that of out of scope.
    """
    order = np.argsort(sure, kind="stable")
    ordered, inner, good = sure[order], inside[order], (right & inside)[order]
    # After the first k texts are refused: k from 0 to all of them, where the next is surer than the last one refused.
    cuts = np.concatenate([[0], np.flatnonzero(np.diff(ordered)) + 1, [len(ordered)]])
    found = np.concatenate([[0], np.cumsum(~inner)])[cuts]
    kept = good.sum() - np.concatenate([[0], np.cumsum(good)])[cuts]
    num_inside, num_outside = int(inside.sum()), int((~inside).sum())
    values = {
        "balanced": (kept / num_inside + found / num_outside) / 2,
        "accuracy": (kept + found) / len(sure),
        "f1": 2 * found / (cuts + num_outside),
    }[goal]
    best = int(values.argmax())
    at = int(cuts[best])
    if at == 0:
        return Threshold(float(ordered[0]), float(values[best]))
    above = ordered[at] if at < len(ordered) else np.nextafter(ordered[-1], np.inf)
    return Threshold(float((ordered[at - 1] + above) / 2) if at < len(ordered) else float(above), float(values[best]))


def measure(
    sure: Float[np.ndarray, "item"],
    right: Bool[np.ndarray, "item"],
    inside: Bool[np.ndarray, "item"],
    threshold: float | None,
) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    """Values and intervals of how texts in and out of scope are told apart. Without a threshold that is the order they
    come in. Where there are no texts of one kind, what needs them is left out."""
    values: dict[str, float] = {}
    intervals: dict[str, tuple[float, float]] = {}

    def share(name: str, good: Bool[np.ndarray, "some"]) -> None:
        if len(good):
            values[name], intervals[name] = float(good.mean()), metrics.accuracy_interval(good)

    if inside.any() and not inside.all():
        values["out_of_scope_auroc"] = metrics.roc_auc(~inside, -sure)
    if threshold is not None:
        refused = sure < threshold
        answered = right & ~refused
        share("in_scope_accuracy", answered[inside])
        share("out_of_scope_recall", refused[~inside])
        share("out_of_scope_precision", ~inside[refused])
        share("joint_accuracy", np.where(inside, answered, refused))
        if not inside.all():
            hits = int((refused & ~inside).sum())
            values["out_of_scope_f1"] = 2 * hits / int(refused.sum() + (~inside).sum())
    return values, intervals
