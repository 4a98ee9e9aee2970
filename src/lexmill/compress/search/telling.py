"""A search in words: what was tried, what was chosen and why, and what came nearest where nothing reached the goal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from lexmill.compress.config import CompressConfig, Goal
from lexmill.compress.search.explore import Explorer
from lexmill.compress.search.trial import Trial, front, missed
from lexmill.compress.sensitivity import Sensitivity

WORDS = {
    "p50_ms": "p50 at most {:g} ms",
    "p99_ms": "p99 at most {:g} ms",
    "size_mb": "at most {:g} MB",
    "texts_per_second": "at least {:g} texts/s",
    "energy_mj": "at most {:g} mJ a text",
}
_BEST = {"accuracy": "that which loses the least", "speed": "the fastest", "size": "the smallest"}
_SLOWER = 1.05
"""Beyond this a time is longer, and not only measured so."""
_HEAD = ("loses", "95 % interval", "MB", "p50 ms", "p99 ms", "texts/s")


@dataclass(frozen=True)
class Story:
    """What a search has to tell.

    Args:
        ranked: the finalists, the best first.
    """

    config: CompressConfig
    explorer: Explorer
    sensitivity: Sensitivity
    chosen: Trial
    ranked: Sequence[Trial]
    seconds: float


def bounds(config: CompressConfig) -> str:
    """What is asked, in words."""
    found = [f"at most {config.max_drop:g} lost"]
    for one in fields(Goal):
        if one.name in WORDS and (value := getattr(config.goal, one.name)) is not None:
            found.append(WORDS[one.name].format(value))
    return ", ".join(found)


def tell(story: Story, opened: int) -> dict[str, Any]:
    """The record of a search, and `lines` for people.

    Args:
        opened: how often the rows of the proof have been asked by this search, this time included.
    """
    trials = list(story.explorer.trials.values())
    best = front(trials)
    held = [one for one in best if one.holds]
    reasons = _reasons(story, opened)
    lines = [
        f"tried {len(trials)} candidates in {story.seconds / 60:.1f} minutes: {_counted(story)}",
        "of those that lose little enough, none is beaten in loss, size, latency and throughput at once:",
        *rows(held, story.chosen.candidate.name),
        *reasons,
    ]
    return {
        "asked": {"max_drop": story.config.max_drop, **story.config.goal.given},
        "tried": len(trials),
        "seconds": story.seconds,
        "out_of_time": story.explorer.out_of_time,
        "chosen": story.chosen.to_dict(),
        "reasons": reasons,
        "front": [one.candidate.name for one in best],
        "trials": [one.to_dict() for one in trials],
        "dry": [one.to_dict() for one in story.explorer.dry.values()],
        "left_out": story.explorer.left_out,
        "sensitivity": story.sensitivity.to_dict(),
        "proofs_made": opened,
        "lines": lines,
    }


def _counted(story: Story) -> str:
    trials = story.explorer.trials.values()
    held = sum(one.holds for one in trials)
    return (
        f"{sum(one.candidate.shape is not None for one in trials)} of them trained, "
        f"{held} lose little enough, {sum(one.refused is not None for one in trials)} refused"
    )


def _reasons(story: Story, opened: int) -> list[str]:
    chosen, goal = story.chosen, story.config.goal
    meeting = len(story.explorer.meeting())
    lines = [
        f"chosen: {chosen.candidate.name}",
        f"  {_BEST[goal.preference]} of {meeting} that keep to what was asked: {bounds(story.config)}",
    ]
    for other in story.ranked[1:]:
        lines.append(f"  before {other.candidate.name}, {_against(other, chosen)}")
    lines += slower(chosen)
    if story.explorer.out_of_time:
        lines.append("  the budget was spent: --resume goes on, with --search to name this folder and another --out")
    lines += [f"  without {name}: {why}" for name, why in sorted(story.explorer.left_out.items())]
    if opened > 1:
        lines.append(
            f"  the rows of the proof have been asked {opened} times by now: each time makes them say a little less"
        )
    return lines


def slower(chosen: Trial) -> list[str]:
    """What of the chosen one takes longer than of the model as it was."""
    assert chosen.cost is not None
    assert chosen.reference is not None
    times = {
        "one text alone": chosen.cost.p50_ms / chosen.reference.p50_ms,
        "a stream": chosen.reference.texts_per_second / chosen.cost.texts_per_second,
    }
    slow = [f"{what} takes {ratio:.2f} times as long" for what, ratio in times.items() if ratio > _SLOWER]
    return [f"  slower than the model as it is: {', '.join(slow)}"] if slow else []


def _against(other: Trial, chosen: Trial) -> str:
    assert other.cost is not None
    assert chosen.cost is not None
    assert other.proof is not None
    assert chosen.proof is not None
    speed = other.cost.texts_per_second / chosen.cost.texts_per_second
    size = other.cost.bytes / chosen.cost.bytes
    lost = 100 * (other.proof.drop - chosen.proof.drop)
    return f"which is {speed:.2f} times as fast, {size:.2f} times as large and loses {lost:+.2f} points more"


def rows(trials: Sequence[Trial], marked: str = "") -> list[str]:
    """A table of trials; a star stands by the one that is marked."""
    widest = max((len(one.candidate.name) for one in trials), default=0)
    lines = [f"  {'':<{widest}}{_HEAD[0]:>10}{_HEAD[1]:>20}" + "".join(f"{one:>9}" for one in _HEAD[2:])]
    for one in trials:
        assert one.cost is not None
        assert one.proof is not None
        low, high = one.proof.interval
        star = "*" if one.candidate.name == marked else " "
        cost = one.cost
        lines.append(
            f"{star} {one.candidate.name:<{widest}}{one.proof.drop:>+10.4f}{f'{low:+.4f} to {high:+.4f}':>20}"
            f"{cost.bytes / 1e6:>9.1f}{cost.p50_ms:>9.2f}{cost.p99_ms:>9.2f}{cost.texts_per_second:>9,.0f}"
        )
    return lines


def nearest(trials: Sequence[Trial], left_out: Mapping[str, str], config: CompressConfig) -> str:
    """What to say where nothing reached the goal: what came nearest, and how far it was off."""
    tried = [one for one in trials if one.cost is not None and one.proof is not None]
    said = [f"none of {len(trials)} candidates reaches the goal ({bounds(config)})"]
    held = [one for one in tried if one.holds]
    if held:
        near = min(held, key=lambda one: sum(_missed(one, config.goal).values()))
        said.append(f"nearest of those that lose little enough: {near.candidate.name}, {off(near, config.goal)}")
    fitting = [one for one in tried if not _missed(one, config.goal) and one.proof and not one.holds]
    if fitting:
        near = min(fitting, key=lambda one: one.proof.interval[1] if one.proof else 1.0)
        assert near.proof is not None
        low, high = near.proof.interval
        lost = f"loses {near.proof.drop:+.4f} ({low:+.4f} to {high:+.4f})"
        why = f", and {near.refused}" if near.refused else ""
        said.append(f"nearest of those that keep the bounds: {near.candidate.name}, {lost}{why}")
        if near.proof.rows_needed is not None:
            said.append(f"about {near.proof.rows_needed:,} rows to choose on would show that loss to be within it")
    if left_out:
        said.append("; ".join(f"without {name}: {why}" for name, why in sorted(left_out.items())))
    return "\n".join(said)


def _missed(trial: Trial, goal: Goal) -> Mapping[str, float]:
    assert trial.cost is not None
    return missed(trial.cost, goal)


def off(trial: Trial, goal: Goal) -> str:
    """What a trial misses of the bounds, in words."""
    cost, before = trial.cost, trial.reference
    assert cost is not None
    assert before is not None
    got = {
        "p50_ms": f"p50 {cost.p50_ms:.2f} ms",
        "p99_ms": f"p99 {cost.p99_ms:.2f} ms",
        "size_mb": f"{cost.bytes / 1e6:.2f} MB",
        "texts_per_second": f"{cost.texts_per_second:,.0f} texts/s",
        "energy_mj": f"{cost.energy_mj or 0:.2f} mJ a text",
    }
    beyond = missed(cost, goal)
    if not beyond:
        speed, size = cost.texts_per_second / before.texts_per_second, cost.bytes / before.bytes
        return f"{speed:.2f} times as fast and {size:.2f} times as large as the model as it is"
    return ", ".join(f"{got[name]}, {times:.2f} times too much" for name, times in beyond.items())
