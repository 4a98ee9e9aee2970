"""What a compression is asked: the chain that is to be run, or the goal that one is searched for."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Lt

from lexmill.compress.base import Step
from lexmill.compress.rows import Files
from lexmill.errors import UserError

Prefer = Literal["accuracy", "speed", "size"]


@dataclass(frozen=True)
class Goal:
    """What a search is to reach beside `max_drop`, measured on this machine, and how it goes about it.

    Args:
        p50_ms, p99_ms: the most that one text alone may take, in milliseconds, tokenizing included.
        size_mb: the most bytes that are loaded, in millions: weights, or the graph, and the tokenizer.
        texts_per_second: the least, as a stream.
        energy_mj: the most energy that a text of a stream may take, in millijoules.
        prefer: among what meets all that, that which loses the least (`accuracy`), answers a stream the fastest
            (`speed`) or is the smallest (`size`). Where None, `accuracy` where a cost is bounded and `speed` otherwise.
        without: methods that are not to be used.
        runtimes: what candidates may be run in; all that are installed and quick to open where empty. One that is
            named is used even where its answers depend on the batch.
        epochs: of training, in place of each method's own.
        budget_minutes: the most that is spent on candidates; all of them where None.
    """

    p50_ms: Annotated[float, Gt(0)] | None = None
    p99_ms: Annotated[float, Gt(0)] | None = None
    size_mb: Annotated[float, Gt(0)] | None = None
    texts_per_second: Annotated[float, Gt(0)] | None = None
    energy_mj: Annotated[float, Gt(0)] | None = None
    prefer: Prefer | None = None
    without: tuple[str, ...] = ()
    runtimes: tuple[str, ...] = ()
    epochs: Annotated[int, Ge(1)] | None = None
    budget_minutes: Annotated[float, Gt(0)] | None = None

    @property
    def bounded(self) -> bool:
        """Whether a cost has a bound."""
        bounds = (self.p50_ms, self.p99_ms, self.size_mb, self.texts_per_second, self.energy_mj)
        return any(one is not None for one in bounds)

    @property
    def given(self) -> dict[str, Any]:
        """What is set, as JSON has it."""
        found = {one.name: getattr(self, one.name) for one in fields(self)}
        return {name: list(v) if isinstance(v, tuple) else v for name, v in found.items() if v not in (None, ())}

    @property
    def preference(self) -> Prefer:
        """`prefer`, or what it stands for where it is None."""
        return self.prefer or ("accuracy" if self.bounded else "speed")


@dataclass(frozen=True)
class CompressConfig:
    """One compression.

    Args:
        steps: one table a method: `method`, and its options. Where there are none, they are searched for.
        max_drop: the largest drop of the mean score a row that may be lost; nothing is written where the paired 95 %
            interval goes beyond it. A search needs it.
        goal: of a search.
        search: the folder that keeps what a search tries, for `resume`; `OUT.search` where not given.
        data: see `Files`.
        seed: fixes which rows are held out, and all that methods draw.
    """

    steps: tuple[dict[str, Any], ...] = ()
    max_drop: Annotated[float, Ge(0), Lt(1)] | None = None
    goal: Goal = field(default_factory=Goal)
    search: Path | None = None
    data: Files = field(default_factory=Files)
    seed: Annotated[int, Ge(0), Lt(2**32)] = 0

    def check(self) -> None:
        """Raise a `UserError` where there is nothing to do, or two things."""
        asked = [one.name for one in fields(Goal) if getattr(self.goal, one.name) != one.default]
        if self.search is not None:
            asked.append("search")
        if self.steps and asked:
            hint = "leave out the steps to search for them, or the goal"
            raise UserError(f"steps are given, and '{asked[0]}' is for a search", where="goal", hint=hint)
        if not self.steps and self.max_drop is None:
            hint = "give --max-drop 0.01 to search, or name a method, e.g. --step int8"
            raise UserError("nothing to do" if not asked else "how much may be lost?", where="max_drop", hint=hint)
        if self.goal.prefer == "accuracy" and not self.goal.bounded:
            hint = "bound the time or the size too, or prefer speed or size"
            raise UserError("nothing loses less than the model as it is", where="goal.prefer", hint=hint)

    def chain(self) -> list[Step]:
        """The steps. A `UserError` for one without a method."""
        return read_chain(self.steps)


def read_chain(steps: tuple[dict[str, Any], ...] | list[dict[str, Any]]) -> list[Step]:
    """Tables as steps. A `UserError` for one without a method."""
    for index, step in enumerate(steps):
        if not isinstance(step.get("method"), str):
            raise UserError("names no method", where=f"steps[{index}]", hint="give it method = 'int8', for example")
    return [Step(step["method"], {k: v for k, v in step.items() if k != "method"}) for step in steps]
