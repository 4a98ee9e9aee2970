"""In which order candidates are tried, and what is not worth trying.

What needs no training comes first: kinds of numbers in torch, then those that lose little enough in the other
runtimes. The best of these are the finishes of what is trained. What a trained step would cost is measured before it
is trained; it is trained only where that would help.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

from lexmill.compress.base import Step
from lexmill.compress.config import Goal
from lexmill.compress.measure import Cost
from lexmill.compress.search.space import AS_IT_IS, Candidate, ladders
from lexmill.compress.search.trial import Trial, missed
from lexmill.compress.search.workshop import OutOfTime, Workshop
from lexmill.compress.sensitivity import Sensitivity
from lexmill.engine import Loaded
from lexmill.errors import UserError
from lexmill.metrics import NORMAL

FINISHES = 3
"""Of what needs no training, how many ways to finish are tried after a trained step."""
SLACK = 1.1
"""How far beyond a bound a time may be when it was measured before training."""
GAIN = 1.05
"""How much faster or smaller than the best so far a step must promise to be before it is trained."""


def merit(cost: Cost, goal: Goal) -> float:
    """What is preferred of costs as a number, less being better; of `accuracy`, what decides among equals."""
    return float(cost.bytes) if goal.preference == "size" else 1 / cost.texts_per_second


def order(goal: Goal) -> Callable[[Trial], tuple[float, ...]]:
    """The key by which the best of those that keep all bounds comes first."""

    def key(trial: Trial) -> tuple[float, ...]:
        assert trial.proof is not None
        assert trial.cost is not None
        own = merit(trial.cost, goal)
        return (trial.proof.drop, own) if goal.preference == "accuracy" else (own, trial.proof.drop)

    return key


def ranked(trials: Iterable[Trial], goal: Goal) -> list[Trial]:
    """The best first. Where accuracy is preferred, those within a standard error of the one that loses least come
    before the rest, the cheapest of them first: rows cannot tell them apart."""
    found = sorted(trials, key=order(goal))
    if goal.preference != "accuracy" or not found:
        return found
    best = found[0].proof
    assert best is not None
    reach = best.drop + (best.interval[1] - best.interval[0]) / (2 * NORMAL)
    alike = [one for one in found if one.proof is not None and one.proof.drop <= reach]
    return sorted(alike, key=lambda one: merit(one.cost, goal) if one.cost else math.inf) + found[len(alike) :]


class Explorer:
    """Tries candidates until there is nothing left that could be better, or no time.

    Args:
        subject: the model as it is, to see what can be done to it.
        runtimes: beside torch.

    Attributes:
        trials: all that was tried.
        left_out: by name of a method, why it was not tried.
        out_of_time: whether the budget ended it.
    """

    def __init__(
        self, workshop: Workshop, subject: Loaded, runtimes: Sequence[str], goal: Goal, max_drop: float
    ) -> None:
        self._workshop, self._subject, self._goal, self._max_drop = workshop, subject, goal, max_drop
        self._runtimes = runtimes
        self.trials: dict[str, Trial] = {}
        self.dry: dict[str, Trial] = {}
        self.left_out: dict[str, str] = dict.fromkeys(goal.without, "it was to be done without")
        self.out_of_time = False

    def run(self, finishes: Sequence[tuple[Step, ...]], sensitivity: Sensitivity) -> None:
        """Try what there is to be tried, in order. A `UserError` where the model as it is keeps all bounds, and nothing
        else is asked for."""
        try:
            as_it_is = self._try(AS_IT_IS)
            if self._goal.preference == "accuracy" and as_it_is.cost and not missed(as_it_is.cost, self._goal):
                hint = "ask for less time or room, or prefer speed or size"
                raise UserError("the model as it is keeps to all that", where="goal", hint=hint)
            self._untrained(finishes)
            if self._goal.preference == "accuracy" and self.best() is not None:
                self.left_out["what is trained"] = "what needs no training reaches the goal"
                return
            self._trained(ladders(self._subject, sensitivity, self._goal, self._max_drop))
        except OutOfTime:
            self.out_of_time = True

    def meeting(self) -> list[Trial]:
        """Those that lose little enough, keep all bounds, and are better than the model as it is in what is preferred;
        the best first."""
        return ranked((one for one in self.trials.values() if self.meets(one)), self._goal)

    def meets(self, trial: Trial) -> bool:
        """Whether a trial could be chosen."""
        if not trial.holds or trial.cost is None or trial.reference is None or missed(trial.cost, self._goal):
            return False
        better = merit(trial.cost, self._goal) < merit(trial.reference, self._goal)
        return trial.candidate != AS_IT_IS and (better or self._goal.preference == "accuracy")

    def best(self) -> Trial | None:
        return next(iter(self.meeting()), None)

    def _try(self, candidate: Candidate) -> Trial:
        trial = self._workshop.attempt(candidate)
        self.trials[candidate.name] = trial
        return trial

    # --- what needs no training -----------------------------------------------------------------------------------
    def _untrained(self, finishes: Sequence[tuple[Step, ...]]) -> None:
        tried = [self._try(Candidate(None, steps)) for steps in finishes]
        for runtime in self._runtimes:
            for one in self._worth_finishing(tried):
                self._try(Candidate(None, one.candidate.finish, runtime))

    def _worth_finishing(self, tried: Sequence[Trial]) -> list[Trial]:
        """Those that lose little enough and that no other beats in all costs; the nearest to the bounds first."""
        held = [one for one in tried if one.holds and one.cost is not None]
        costs = {one.candidate.name: _costs(one) for one in held}
        best = [one for one in held if not any(_beats(other, costs[one.candidate.name]) for other in costs.values())]
        return sorted(best, key=self._distance)[:FINISHES]

    def _distance(self, trial: Trial) -> tuple[float, float]:
        assert trial.cost is not None
        beyond = sum(math.log(times) for times in missed(trial.cost, self._goal).values())
        return beyond, merit(trial.cost, self._goal)

    # --- what is trained ------------------------------------------------------------------------------------------
    def _trained(self, methods: Mapping[str, Sequence[Step]]) -> None:
        finishes = self._worth_finishing(list(self.trials.values()))
        promising = {name: self._promising(name, steps, finishes) for name, steps in methods.items()}
        strongest = self._goal.preference != "accuracy"
        for name in sorted(promising, key=lambda name: self._promise(promising[name], strongest=strongest)):
            steps = promising[name]
            if strongest:
                self._bisect(steps, finishes)
            else:
                self._climb(steps, finishes)

    def _promising(self, name: str, steps: Sequence[Step], finishes: Sequence[Trial]) -> list[tuple[Step, Cost | None]]:
        """The steps of a method that this model takes and that would keep the bounds, and what they would cost."""
        found: list[tuple[Step, Cost | None]] = []
        for step in steps:
            method, options = step.read(name)
            try:
                method.check(self._subject, options)
            except UserError as error:
                self.left_out[name] = error.message
                continue
            if step.method == "exits":  # what they cost depends on what they learn, which takes moments
                found.append((step, None))
                continue
            trial = self._unlearnt(step, finishes)
            if trial.cost is None:
                self.left_out.setdefault(name, trial.refused or "")
            elif all(
                times <= (1 if name == "size_mb" else SLACK) for name, times in missed(trial.cost, self._goal).items()
            ):
                found.append((step, trial.cost))
        if steps and not found:
            self.left_out.setdefault(name, "it would not keep the bounds")
        return found

    def _unlearnt(self, step: Step, finishes: Sequence[Trial]) -> Trial:
        """A step before it is trained, with the first finish that its model takes; the last refusal where it takes
        none."""
        found: list[Trial] = []
        for one in finishes:
            candidate = Candidate(step, one.candidate.finish, one.candidate.runtime)
            found.append(self._workshop.attempt(candidate, "dry"))
            self.dry[candidate.name] = found[-1]
            if found[-1].cost is not None:
                break
        return found[-1]

    def _promise(self, steps: Sequence[tuple[Step, Cost | None]], *, strongest: bool) -> float:
        """What comes first: of the strongest steps the best, of the mildest those that change the model least."""
        costs = [merit(cost, self._goal) for _, cost in steps if cost is not None]
        if not costs:
            return math.inf
        return costs[-1] if strongest else -costs[0]

    def _climb(self, steps: Sequence[tuple[Step, Cost | None]], finishes: Sequence[Trial]) -> None:
        """From the mildest step on, until one is within all that was asked, or has lost too much: what is beyond it
        loses more."""
        for step, _ in steps:
            held = self._finished(step, finishes)
            if not held or any(self.meets(one) for one in self.trials.values() if one.candidate.shape == step):
                return

    def _bisect(self, steps: Sequence[tuple[Step, Cost | None]], finishes: Sequence[Trial]) -> None:
        """The strongest step that still holds, begun in the middle."""
        low, high = 0, len(steps)
        while low < high:
            middle = (low + high) // 2
            step, cost = steps[middle]
            if not self._helps(cost):
                low = middle + 1
                continue
            if self._finished(step, finishes):
                low = middle + 1
            else:
                high = middle

    def _helps(self, cost: Cost | None) -> bool:
        """Whether what a step would cost is better than the best so far."""
        best = self.best()
        if cost is None or best is None or best.cost is None:
            return True
        return merit(cost, self._goal) * GAIN < merit(best.cost, self._goal)

    def _finished(self, step: Step, finishes: Sequence[Trial]) -> bool:
        """Train a step and finish it in each way, until it has lost more than its finish can be to blame for. Whether
        one loses little enough."""
        held = False
        for one in finishes:
            trial = self._try(Candidate(step, one.candidate.finish, one.candidate.runtime))
            held = held or trial.holds
            if trial.proof is not None and one.proof is not None:
                own = trial.proof.interval[0] - one.proof.interval[1]
                if own > self._max_drop:
                    break
        return held


def _costs(trial: Trial) -> tuple[float, ...]:
    assert trial.cost is not None
    return trial.cost.bytes, trial.cost.p50_ms, 1 / trial.cost.texts_per_second


def _beats(other: tuple[float, ...], own: tuple[float, ...]) -> bool:
    return other != own and all(a <= b for a, b in zip(other, own, strict=True))
