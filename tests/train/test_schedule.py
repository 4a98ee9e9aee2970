"""Learning rates against the formulas of `transformers`, and what they do at the ends."""

from __future__ import annotations

import math

import pytest

from lexmill.train.schedule import learning_rate

TOTAL = 40


def rates(schedule: str, warmup: float, total: int = TOTAL) -> list[float]:
    return [learning_rate(i, total, peak=2.0, schedule=schedule, warmup=warmup) for i in range(total)]  # pyright: ignore


@pytest.mark.parametrize(
    ("schedule", "shape"),
    [
        ("linear", lambda x: 1 - x),
        ("cosine", lambda x: 0.5 * (1 + math.cos(math.pi * x))),
        ("constant", lambda x: 1.0),
        ("exponential", lambda x: 0.01**x),
        ("wsd", lambda x: min(1.0, 5 * (1 - x))),
    ],
)
def test_after_the_warm_up_the_rate_follows_its_formula(schedule: str, shape) -> None:
    assert rates(schedule, 0) == pytest.approx([2 * shape(i / TOTAL) for i in range(TOTAL)])
    warmed = rates(schedule, 0.25)
    assert warmed[10:] == pytest.approx([2 * shape(i / 30) for i in range(30)])
    assert warmed[10] == 2.0


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant", "exponential", "wsd"])
def test_the_warm_up_rises_evenly_from_above_zero_to_the_peak(schedule: str) -> None:
    rising = rates(schedule, 0.25)[:11]
    assert rising == pytest.approx([2 * (i + 1) / 11 for i in range(11)])


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant", "exponential", "wsd"])
@pytest.mark.parametrize("total", [1, 2, 3])
@pytest.mark.parametrize("warmup", [0.0, 0.3, 0.9])
def test_no_step_of_the_shortest_run_is_idle(schedule: str, total: int, warmup: float) -> None:
    assert all(0 < rate <= 2.0 for rate in rates(schedule, warmup, total))


def test_linear_equals_transformers() -> None:
    torch = pytest.importorskip("torch")
    optimization = pytest.importorskip("transformers.optimization")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    theirs: list[float] = []
    schedule = optimization.get_linear_schedule_with_warmup(optimizer, 0, TOTAL)
    for _ in range(TOTAL):
        theirs.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates("linear", 0) == pytest.approx(theirs)
