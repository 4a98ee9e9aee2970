"""Runs in processes of their own, killed without warning and resumed, end in the bits of a run left alone."""

from __future__ import annotations

import multiprocessing
import os
import random
import time
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.fit.conftest import Recipe

from lexmill.artifact import Artifact
from lexmill.errors import UserError
from lexmill.fit import FitConfig, Watch, fit
from lexmill.monitor import read_events

Moment = Callable[[Path], bool]


@pytest.fixture(scope="module")
def processes() -> Iterator[ForkServerContext]:
    """Starts processes that have imported what a run needs already, with one thread each."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lexmill.fit.fit", "lexmill.evaluate.report", "matplotlib.figure"])
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    first = context.Process(target=int)
    first.start()
    first.join()
    yield context
    if before is None:
        del os.environ["OMP_NUM_THREADS"]
    else:
        os.environ["OMP_NUM_THREADS"] = before


def begin(processes: ForkServerContext, config: FitConfig, out: Path) -> ForkServerProcess:
    process = processes.Process(target=fit, args=(config, out), kwargs={"resume": True})
    process.start()
    return process


def finish(processes: ForkServerContext, config: FitConfig, out: Path) -> Artifact:
    process = begin(processes, config, out)
    process.join(120)
    assert process.exitcode == 0
    return Artifact.open(out)


def kill_at(processes: ForkServerContext, config: FitConfig, out: Path, moment: Moment) -> bool:
    """Start or resume a run and kill it at the moment. False where it had ended before."""
    process = begin(processes, config, out)
    partial = out.with_name(out.name + ".partial")
    while process.is_alive() and not moment(partial):
        time.sleep(0.0005)
    process.kill()
    process.join()
    return process.exitcode == -9


def steps(partial: Path) -> int:
    """How many training steps the run has recorded."""
    file = partial / "run" / "events.jsonl"
    return sum('"phase": "train"' in line for line in file.read_text().splitlines()) if file.exists() else 0


def after_steps(count: int, delay: float = 0.0) -> Moment:
    """When the run has taken `count` steps more than at its start, and `delay` seconds have passed."""
    begun: list[int] = []
    due: list[float] = []

    def reached(partial: Path) -> bool:
        if not begun:
            begun.append(steps(partial))
        # A resumed run first drops the steps since its checkpoint: count from where it really stands.
        begun[0] = min(begun[0], steps(partial))
        if not due and steps(partial) >= begun[0] + count:
            due.append(time.monotonic() + delay)
        return bool(due) and time.monotonic() >= due[0]

    return reached


def writing_a_checkpoint(partial: Path) -> bool:
    return any((partial / "checkpoints").glob("*.partial"))


def writing_the_artefact(partial: Path) -> bool:
    return (partial / "model.safetensors").exists()


def assert_the_same_run(killed: Artifact, whole: Artifact) -> None:
    a, b = load_file(killed.path / "model.safetensors"), load_file(whole.path / "model.safetensors")
    assert a.keys() == b.keys()
    assert [name for name in b if not torch.equal(a[name], b[name])] == []
    assert killed.manifest.weights == whole.manifest.weights
    found = [read_events(one.path / "run" / "events.jsonl") for one in (killed, whole)]
    named = [[(e["phase"], e["step"], e.get("loss"), e.get("accuracy")) for e in events] for events in found]
    assert named[0] == named[1]
    numbers = [one.manifest.history[-1].effect for one in (killed, whole)]
    for name in ("steps", "epochs", "final_loss", "best_epoch", "stopped_early", "positions_per_token"):
        assert numbers[0].get(name) == numbers[1].get(name)
    assert numbers[0]["examples_per_second"] > 0


def test_a_run_killed_twice_ends_in_the_bits_of_a_whole_one(
    processes: ForkServerContext, recipe: Recipe, tmp_path: Path
) -> None:
    config = recipe(train_={"epochs": 6, "checkpoint_every": 4, "weight_decay": 0.1})
    assert kill_at(processes, config, tmp_path / "killed", after_steps(6))
    assert kill_at(processes, config, tmp_path / "killed", writing_the_artefact)
    killed = finish(processes, config, tmp_path / "killed")
    assert_the_same_run(killed, fit(config, tmp_path / "whole").artifact)
    assert [e["step"] for e in read_events(killed.path / "run" / "events.jsonl")] == list(range(36))


@pytest.mark.slow
def test_a_run_killed_ten_times_at_random_ends_in_the_bits_of_a_whole_one(
    processes: ForkServerContext, recipe: Recipe, tmp_path: Path
) -> None:
    config = recipe(
        train_={"epochs": 16, "checkpoint_every": 3, "weight_decay": 0.1, "dropout": 0.1, "patience": 15},
        data_={"validation_fraction": 0.2},
    )
    chance = random.Random(0)
    moments: list[Moment] = [after_steps(chance.randint(3, 6), chance.random() * 0.05) for _ in range(6)]
    moments += [writing_a_checkpoint] * 3
    chance.shuffle(moments)
    # Before anything is written, and after all is trained.
    moments = [lambda partial: partial.exists(), *moments, writing_the_artefact]
    out = tmp_path / "killed"
    kills: list[bool] = []
    torn = 0
    for moment in moments:
        kills.append(kill_at(processes, config, out, moment))
        torn += writing_a_checkpoint(tmp_path / "killed.partial")
    assert sum(kills) >= 10
    assert torn >= 1
    assert_the_same_run(finish(processes, config, out), finish(processes, config, tmp_path / "whole"))


# --- what may be resumed ----------------------------------------------------------------------------------------
class _Pulled(Exception):
    """The plug."""


class _PlugAt:
    """A sink that ends the run at a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def emit(self, event: object) -> None:
        if isinstance(event, dict) and event["step"] == self.step:
            raise _Pulled

    def close(self) -> None:
        return


def interrupted(config: FitConfig, out: Path, step: int = 4) -> None:
    with pytest.raises(_Pulled):
        fit(config, out, watch=Watch(sinks=[_PlugAt(step)]))
    assert out.with_name(out.name + ".partial").is_dir()


def test_nothing_to_resume_starts_anew(recipe: Recipe, tmp_path: Path) -> None:
    assert fit(recipe(), tmp_path / "out", resume=True).training["steps"] == 6


def test_an_interrupted_run_is_not_overwritten_without_resume(recipe: Recipe, tmp_path: Path) -> None:
    config = recipe(train_={"checkpoint_every": 2})
    interrupted(config, tmp_path / "out")
    with pytest.raises(UserError, match="unfinished run") as raised:
        fit(config, tmp_path / "out")
    assert "--resume" in (raised.value.hint or "")


def test_a_run_with_another_config_is_refused_and_the_first_can_still_go_on(recipe: Recipe, tmp_path: Path) -> None:
    config = recipe(train_={"checkpoint_every": 2})
    interrupted(config, tmp_path / "out")
    other = recipe(train_={"checkpoint_every": 2, "learning_rate": 0.5})
    with pytest.raises(UserError, match=r"another config: was learning_rate = 0\.001, is learning_rate = 0\.5"):
        fit(other, tmp_path / "out", resume=True)
    notes: list[str] = []
    fit(config, tmp_path / "out", resume=True, watch=Watch(notes.append))
    assert "going on from step 4 of 6" in notes
    assert not any("bit-identically" in note for note in notes)


def test_a_run_on_changed_data_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    data = tmp_path / "train.jsonl"
    original = recipe().data.train.read_bytes()
    data.write_bytes(original)
    config = recipe(train_={"checkpoint_every": 2}, data_={"train": data})
    interrupted(config, tmp_path / "out")
    data.write_bytes(original.replace(b"card", b"cord", 1))
    with pytest.raises(UserError, match="the train data has changed"):
        fit(config, tmp_path / "out", resume=True)


def test_another_machine_is_told_to_go_on_not_bit_identically(recipe: Recipe, tmp_path: Path) -> None:
    config = recipe(train_={"checkpoint_every": 2})
    interrupted(config, tmp_path / "out")
    notes: list[str] = []
    inputs = tmp_path / "out.partial" / "run" / "inputs.json"
    inputs.write_text(inputs.read_text().replace('"threads": 1', '"threads": 8'))
    fit(config, tmp_path / "out", resume=True, watch=Watch(notes.append))
    assert "goes on, but not bit-identically: threads was 8, is 1" in notes
