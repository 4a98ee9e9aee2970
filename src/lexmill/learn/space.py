"""What a search may choose from: per config key a list of values, or a range of numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lexmill.config.toml import scalar
from lexmill.errors import UserError


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both included; whole ones where both are; evenly in their logarithm where `log`."""

    low: float
    high: float
    log: bool = False

    @property
    def whole(self) -> bool:
        return isinstance(self.low, int) and isinstance(self.high, int)


Space = Mapping[str, Range | Sequence[Any]]


def parse_space(given: Sequence[str]) -> Space:
    """The space of `--try KEY=VALUES` flags: `1e-5..1e-3:log`, `2..6` or `linear,cosine`. A `UserError` for others."""
    space: dict[str, Range | Sequence[Any]] = {}
    for one in given:
        key, sign, values = one.partition("=")
        hint = "for example --try train.learning_rate=1e-5..1e-3:log or --try train.batch_size=16,32"
        if not (key and sign and values):
            raise UserError(f"'{one}' is not KEY=VALUES", where="--try", hint=hint)
        if key in space:
            raise UserError(f"'{key}' is given twice", where="--try", hint="give all its values at once")
        ends, scaled, scale = values.partition(":")
        below, dots, above = ends.partition("..")
        if not dots:
            space[key] = [scalar(value.strip()) for value in values.split(",")]
            continue
        low: Any = scalar(below.strip())
        high: Any = scalar(above.strip())
        for end in (low, high):
            if isinstance(end, bool) or not isinstance(end, (int, float)):
                raise UserError(f"'{end}' is not a number", where=f"--try {key}", hint=hint)
        log = scale == "log"
        if scaled and not log:
            raise UserError(f"a range has no scale '{scale}'", where=f"--try {key}", hint=hint)
        if low >= high or (log and low <= 0):
            need = "0 < LOW < HIGH" if log else "LOW < HIGH"
            raise UserError(f"{low}..{high} holds nothing", where=f"--try {key}", hint=f"a range needs {need}")
        space[key] = Range(low, high, log)
    if not space:
        raise UserError("there is nothing to choose from", where="--try", hint="give --try KEY=VALUES")
    return space
