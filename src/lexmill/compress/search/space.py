"""What a search may try: one method that is trained, what follows it untrained, and a runtime."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lexmill.compress.base import Step, find, known
from lexmill.compress.config import Goal, read_chain
from lexmill.compress.sensitivity import Sensitivity
from lexmill.engine import Loaded
from lexmill.errors import UserError

MOST_EXITS_LOSE = 0.5
"""Of what may be lost, the share that is given to early exits, since they choose on the same rows."""


@dataclass(frozen=True)
class Candidate:
    """One thing that a search may try.

    Args:
        shape: the one step that is trained, and takes long; None for the model as it is.
        finish: the steps after it, which take moments.
        runtime: what it runs in.
    """

    shape: Step | None
    finish: tuple[Step, ...]
    runtime: str = "torch"

    @property
    def chain(self) -> tuple[Step, ...]:
        return self.finish if self.shape is None else (self.shape, *self.finish)

    @property
    def methods(self) -> frozenset[str]:
        return frozenset(step.method for step in self.chain)

    @property
    def name(self) -> str:
        """For people and as a key, e.g. `distil,layers=3 + int8 in onnx`; how long is trained is left out."""
        steps = " + ".join(spelled(step) for step in self.chain) or "as it is"
        return f"{steps} in {self.runtime}"

    def to_dict(self) -> dict[str, Any]:
        tables = [_table(step) for step in self.finish]
        return {"shape": self.shape and _table(self.shape), "finish": tables, "runtime": self.runtime}

    @classmethod
    def from_dict(cls, stated: Mapping[str, Any]) -> Candidate:
        shape = stated["shape"]
        return cls(read_chain([shape])[0] if shape else None, tuple(read_chain(stated["finish"])), stated["runtime"])


AS_IT_IS = Candidate(None, ())


def _table(step: Step) -> dict[str, Any]:
    return {"method": step.method, **step.options}


def spelled(step: Step) -> str:
    """A step as `--step` takes it, without how it is trained."""
    shown = {key: value for key, value in step.options.items() if key not in ("recovery", "epochs", "recover")}
    return ",".join([step.method, *(f"{key}={_value(value)}" for key, value in shown.items())])


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))


def ladders(subject: Loaded, sensitivity: Sensitivity, goal: Goal, max_drop: float) -> dict[str, list[Step]]:
    """By name the steps of one trained method, from mild to strong."""
    layers = len(subject.model.trunk.layers)
    depths = sorted({math.ceil(share * layers) for share in (2 / 3, 1 / 2, 1 / 3)} - {layers, 0}, reverse=True)
    found = {
        "distil": [_trained("distil", goal, layers=n, **_choice(sensitivity, n)) for n in depths],
        "neurons": [_trained("neurons", goal, keep=keep) for keep in (0.5, 0.25)],
        "heads": [_trained("heads", goal, keep=0.5)],
        "layers": [_trained("layers", goal, keep=round(n / layers, 2)) for n in depths],
        "width": [_trained("width", goal, keep=0.5)],
        "factorise": [_trained("factorise", goal, keep=keep) for keep in (0.6, 0.4, 0.25)],
        "lstm": [_trained("distil", goal, family="lstm")],
        "exits": [Step("exits", {"max_drop": MOST_EXITS_LOSE * max_drop, **_epochs("exits", goal)})],
    }
    return {name: steps for name, steps in found.items() if steps and steps[0].method not in goal.without}


def _trained(method: str, goal: Goal, **options: Any) -> Step:
    return Step(method, {**options, **_epochs(method, goal)})


def _epochs(method: str, goal: Goal) -> dict[str, Any]:
    if goal.epochs is None:
        return {}
    return {"epochs": goal.epochs} if method == "exits" else {"recovery": {"epochs": goal.epochs}}


def _choice(sensitivity: Sensitivity, layers: int) -> dict[str, str]:
    """Which of the teacher's layers a student begins with: those without which its answers change least."""
    best = sensitivity.best_choice(layers)
    return {} if best == "spaced" else {"choose": best}


def finishes(goal: Goal, sensitivity: Sensitivity) -> list[tuple[Step, ...]]:
    """What needs no training: from nothing to all that makes a model smaller."""
    numbers = [(), (Step("int8"),), (Step("int8", {"scheme": "token"}),)]
    if sensitivity.to_skip:
        numbers.append((Step("int8", {"skip": list(sensitivity.to_skip)}),))
    small = goal.size_mb is not None or goal.preference == "size"
    if small:
        numbers += [(Step("weights", {"dtype": dtype}),) for dtype in ("int8", "int4")]
        numbers += [(Step("vocabulary"), *steps) for steps in numbers]
    return [steps for steps in numbers if not any(step.method in goal.without for step in steps)]


def check_names(goal: Goal, runtimes: Sequence[str]) -> None:
    """Raise a `UserError` for a method to do without, or a runtime, that there is not."""
    for name in goal.without:
        try:
            find(name)
        except UserError as error:
            hint = f"known methods: {', '.join(known())}"
            raise UserError(error.message, where="goal.without", hint=hint) from error
    for name in goal.runtimes:
        if name not in runtimes:
            what = f"there is no runtime '{name}' here for this model"
            raise UserError(what, where="goal.runtimes", hint=f"there are {', '.join(runtimes)}")
