"""The search: what it chooses for which model and goal, what it says, what it keeps, and what it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.compress.material import rows_of, texts
from tests.small_classifier import small_classifier, write_artifact
from typer.testing import CliRunner

from lexmill.cli import app
from lexmill.cli.compress import SIZES, SPANS, TIMES, quantity
from lexmill.compress import CompressConfig, CompressResult, Files, Goal, Step, compress, measure
from lexmill.compress.chain import own_steps
from lexmill.compress.measure import Cost
from lexmill.compress.proof import judge
from lexmill.compress.search.explore import ranked
from lexmill.compress.search.space import Candidate
from lexmill.compress.search.telling import nearest, slower
from lexmill.compress.search.trial import PROOFS, TRIALS, Trial, front
from lexmill.compress.sensitivity import Sensitivity, measure_sensitivity
from lexmill.engine import RUNTIMES, Loaded, TorchEngine, open_engine
from lexmill.engine.loaded import load
from lexmill.errors import Failure, UserError
from lexmill.evaluate import answered
from lexmill.hardware import EnergyMeter
from lexmill.models import weights_digest

TRAINED = ("distil", "neurons", "heads", "layers", "width", "factorise", "exits")


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """One thread, and fewer texts to be timed: nothing here depends on times."""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "ALONE", 4)
        patch.setattr(measure, "TOGETHER", 32)
        yield


def with_idle_layers() -> Loaded:
    """Of its four layers, those after the first say next to nothing."""
    found = small_classifier(layers=4)
    with torch.no_grad():
        for layer in found.model.trunk.layers[1:]:
            for name, parameter in layer.named_parameters():
                if name.startswith(("attention.output", "mlp.down")):
                    parameter *= 1e-3
    return found


def search(
    folder: Path, subject: Loaded, goal: Goal, *, max_drop: float = 0.15, rows: int = 300, resume: bool = False
) -> CompressResult:
    """Search with rows that the model itself has labelled."""
    source, paths = folder / "source", dict[str, Path]()
    if not source.exists():
        write_artifact(subject, source)
    for seed, (part, count) in enumerate({"train": 300, "test": rows}.items()):
        paths[part] = folder / f"{part}.jsonl"
        paths[part].write_text("".join(json.dumps(row) + "\n" for row in rows_of(subject, count, seed)))
    config = CompressConfig(max_drop=max_drop, goal=replace(goal, epochs=1), data=Files(**paths))
    return compress(source, folder / "out", config, resume=resume)


def methods(found: CompressResult) -> list[str]:
    return [one.name for one in found.artifact.manifest.history if one.name not in ("compress", "export")]


SMALL = Goal(size_mb=0.3, without=TRAINED, runtimes=("torch",))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> CompressResult:
    return search(tmp_path_factory.mktemp("search"), small_classifier(), SMALL)


def test_a_size_is_kept_by_what_loses_least(found: CompressResult) -> None:
    assert found.after.bytes <= 300_000 < found.before.bytes
    assert found.proof is not None
    assert found.proof.holds
    assert found.proof.rows == 150
    told = json.loads(found.artifact.file("run/search.json").read_text())
    assert found.search is not None
    assert told["chosen"]["name"] == found.search["chosen"]["name"]
    assert told["tried"] == len(told["trials"]) >= 10
    assert {one["name"] for one in told["trials"]} >= {"as it is in torch", "int8 in torch", *told["front"]}
    within = [one for one in told["trials"] if one["cost"]["bytes"] <= 300_000]
    best = min((one["proof"] for one in within), key=lambda proof: proof["drop"])
    reach = (best["interval"][1] - best["interval"][0]) / 3.9
    assert told["chosen"]["proof"]["drop"] <= best["drop"] + reach
    assert found.artifact.manifest.history[-1].parameters["tried"] == told["tried"]
    same = [{"question": text} for text in texts(8, seed=5)]
    assert len(answered(TorchEngine(load(found.artifact)), same)[1]) == 8


def test_a_search_tells_people(found: CompressResult) -> None:
    said = "\n".join(found.lines())
    assert "chosen: " in said
    assert "that which loses the least of" in said
    assert "without distil: it was to be done without" in said
    page = found.artifact.file("run/search.html").read_text()
    assert "<script" not in page
    assert "vocabulary + int8 in torch" in page


def test_taking_the_winner_away_changes_the_choice_and_uses_what_is_known(found: CompressResult) -> None:
    folder = found.artifact.path.parent
    known = (folder / "out.search" / TRIALS).read_text()
    first = methods(found)
    shutil.move(found.artifact.path, folder / "first")
    try:
        goal = replace(SMALL, without=(*TRAINED, *first))
        again = search(folder, small_classifier(), goal, resume=True)
    finally:
        shutil.rmtree(folder / "out", ignore_errors=True)
        shutil.move(folder / "first", found.artifact.path)
    assert methods(again)
    assert not set(methods(again)) & set(first)
    assert again.after.bytes <= 300_000
    assert (folder / "out.search" / TRIALS).read_text() == known
    assert len((folder / "out.search" / PROOFS).read_text().splitlines()) == 2
    assert "have been asked 2 times" in "\n".join(again.lines())


def test_only_what_nothing_beats_is_in_front(found: CompressResult) -> None:
    assert found.search is not None
    trials = [Trial.from_dict(one) for one in found.search["trials"]]
    assert [one.to_dict() for one in trials] == found.search["trials"]
    best = front(trials)
    assert best[0].cost is not None
    worse = replace(best[0].cost, bytes=10**9, p50_ms=1e9, texts_per_second=1e-9)
    worst = replace(best[0], cost=worse, candidate=replace(best[0].candidate, runtime="another"))
    assert [one.candidate.name for one in front([*trials, worst])] == [one.candidate.name for one in best]


def test_a_search_of_another_model_is_not_gone_on_with(found: CompressResult, tmp_path: Path) -> None:
    shutil.copytree(found.artifact.path.parent / "out.search", tmp_path / "out.search")
    with pytest.raises(UserError, match="the search was of another model"):
        search(tmp_path, small_classifier(seed=1), SMALL, resume=True)


def test_a_search_goes_on_under_another_name(found: CompressResult, tmp_path: Path) -> None:
    folder = found.artifact.path.parent
    known = (folder / "out.search" / TRIALS).read_text()
    files = Files(train=folder / "train.jsonl", test=folder / "test.jsonl")
    config = CompressConfig(max_drop=0.15, goal=replace(SMALL, epochs=1), data=files)
    with pytest.raises(UserError, match="no search to go on with"):
        compress(folder / "source", tmp_path / "other", config, resume=True)
    again = compress(folder / "source", tmp_path / "other", replace(config, search=folder / "out.search"), resume=True)
    assert methods(again) == methods(found)
    assert (folder / "out.search" / TRIALS).read_text() == known
    shutil.copytree(folder / "out.search", tmp_path / "broken.search")
    (tmp_path / "broken.search" / "asked.json").write_text('{"mod')
    with pytest.raises(UserError, match="does not say what was searched"):
        compress(folder / "source", tmp_path / "broken", config, resume=True)


def test_those_that_rows_cannot_tell_apart_are_alike() -> None:
    before = np.ones(200)
    trials: list[Trial] = []
    for lost, (name, rate) in zip((1, 2, 30), (("int8", 50.0), ("weights", 90.0), ("heads", 900.0)), strict=True):
        proof = judge(before, np.repeat([0.0, 1.0], [lost, 200 - lost]), where="rows", allowed=0.5)
        cost = Cost(bytes=1_000_000, p50_ms=1.0, p99_ms=2.0, texts_per_second=rate, spread=1.0)
        trials.append(Trial(Candidate(None, (Step(name),)), "tried", 1.0, proof, cost, replace(cost, p50_ms=0.5)))
    names = [one.candidate.name for one in ranked(trials, Goal(size_mb=2))]
    assert names == ["weights in torch", "int8 in torch", "heads in torch"]
    assert next(iter(ranked(trials, Goal()))).candidate.name == "heads in torch"
    assert "one text alone takes 2.00 times as long" in slower(trials[0])[0]


def test_the_verb_searches_under_a_bound_of_time(found: CompressResult, tmp_path: Path) -> None:
    folder = found.artifact.path.parent
    command = ["compress", str(folder / "source"), "--out", str(tmp_path / "out"), "--max-drop", "0.3", "--json"]
    command += ["--p99", "10s", "--rate", "0.1", "--prefer", "size", "--epochs", "1", "--runtime", "torch"]
    command += ["--data", str(folder / "train.jsonl"), "--test", str(folder / "test.jsonl")]
    command += [part for name in (*TRAINED, "vocabulary") for part in ("--without", name)]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["after"]["bytes"] < told["before"]["bytes"]
    assert told["after"]["p99_ms"] < 10_000
    assert told["search"]["asked"]["p99_ms"] == 10_000


def test_idle_layers_are_taken_out(tmp_path: Path) -> None:
    without = ("vocabulary", "int8", "weights", "width", "factorise", "exits", "heads", "neurons")
    found = search(tmp_path, with_idle_layers(), Goal(prefer="size", without=without, runtimes=("torch",)))
    assert methods(found)[0] in ("distil", "layers")
    assert len(load(found.artifact).model.trunk.layers) < 4
    assert found.search is not None
    assert {one["stage"] for one in found.search["dry"]} == {"dry"}
    assert found.search["left_out"]["int8"] == "it was to be done without"


@pytest.mark.slow
def test_all_that_helps_is_put_together_where_little_room_is_given(tmp_path: Path) -> None:
    without = ("distil", "neurons", "heads", "width", "factorise", "exits")
    goal = Goal(size_mb=0.085, without=without, runtimes=("torch",))
    found = search(tmp_path, with_idle_layers(), goal, max_drop=0.2)
    assert methods(found)[:2] == ["layers", "vocabulary"]
    assert len(methods(found)) == 3
    assert found.after.bytes <= 85_000


def test_another_runtime_is_chosen_and_written_down(tmp_path: Path) -> None:
    goal = Goal(size_mb=0.3, without=(*TRAINED, "vocabulary", "weights"), runtimes=("onnx", "openvino"))
    again = search(tmp_path, small_classifier(), goal)
    assert again.search is not None
    names = {one["name"]: one for one in again.search["trials"]}
    assert sum(names["int8 in openvino"]["ran"]["products"].values()) > 0
    assert names["int8 in torch"]["ran"]["products"]
    assert names["int8 in onnx"]["batch_error"] < 1e-3
    chosen = again.search["chosen"]["candidate"]["runtime"]
    assert (again.artifact.manifest.runtime or "torch") == chosen
    if RUNTIMES[chosen].form is not None:
        assert again.artifact.file("onnx/model.onnx").is_file()
    assert [one.name for one in own_steps(again.artifact.manifest)] == ["int8"]
    asked = [{"question": text} for text in texts(8, seed=5)]
    assert len(answered(open_engine(again.artifact), asked)[1]) == 8


def test_what_is_out_of_reach_says_what_came_nearest(tmp_path: Path) -> None:
    goal = Goal(size_mb=0.001, without=("vocabulary", "weights", *TRAINED), runtimes=("torch",))
    with pytest.raises(Failure, match="none of 3 candidates reaches the goal") as caught:
        search(tmp_path, small_classifier(), goal)
    assert "nearest of those that lose little enough" in caught.value.message
    assert "times too much" in caught.value.message
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()
    assert (tmp_path / "out.search" / TRIALS).is_file()


def test_too_few_rows_say_how_many_would_do() -> None:
    before = np.repeat([1.0, 0.0], [90, 10])
    after = np.repeat([1.0, 0.0, 1.0], [87, 11, 2])  # three lost, two won
    proof = judge(before, after, where="rows", allowed=0.02)
    cost = Cost(bytes=1_000_000, p50_ms=1.0, p99_ms=2.0, texts_per_second=100.0, spread=1.0)
    trial = Trial(Candidate(None, (Step("int8"),)), "tried", 1.0, proof, cost, cost)
    assert proof.rows_needed is not None
    assert proof.rows_needed > 100
    said = nearest([trial], {"distil": "no time"}, CompressConfig(max_drop=0.02, goal=Goal(size_mb=2)))
    assert "nearest of those that keep the bounds: int8 in torch, loses +0.0100" in said
    assert f"about {proof.rows_needed:,} rows to choose on would show" in said
    assert "without distil: no time" in said


def test_a_spent_budget_is_gone_on_with(tmp_path: Path) -> None:
    goal = Goal(size_mb=0.2, without=("vocabulary", "weights", *TRAINED), runtimes=("torch",))
    with pytest.raises(Failure, match="none of 0 candidates") as caught:
        search(tmp_path, small_classifier(), replace(goal, budget_minutes=1e-9))
    assert caught.value.hint is not None
    assert "--resume" in caught.value.hint
    with pytest.raises(UserError, match="there is a search already"):
        search(tmp_path, small_classifier(), goal)
    trials = tmp_path / "out.search" / TRIALS
    trials.write_text('{"candidate": {"shape": nu')  # as a killed process leaves it
    assert methods(search(tmp_path, small_classifier(), goal, resume=True)) == ["int8"]


def test_a_model_that_is_small_enough_is_left_alone(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the model as it is keeps to all that"):
        search(tmp_path, small_classifier(), Goal(size_mb=100))


@pytest.mark.skipif(EnergyMeter.find() is not None, reason="this machine says how much energy it uses")
def test_energy_that_is_not_measured_is_not_promised(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not say how much energy"):
        search(tmp_path, small_classifier(), Goal(energy_mj=5))


@pytest.mark.parametrize(
    ("goal", "said"),
    [
        (Goal(size_mb=1, without=("magic",)), "unknown method 'magic'"),
        (Goal(size_mb=1, runtimes=("abacus",)), "no runtime 'abacus'"),
        (Goal(prefer="accuracy"), "nothing loses less than the model as it is"),
    ],
)
def test_goals_that_make_no_sense(tmp_path: Path, goal: Goal, said: str) -> None:
    with pytest.raises(UserError, match=said):
        search(tmp_path, small_classifier(), goal)
    assert not (tmp_path / "out.search").exists()


def test_a_goal_is_for_a_search() -> None:
    with pytest.raises(UserError, match="steps are given"):
        CompressConfig(({"method": "int8"},), goal=Goal(p99_ms=1)).check()
    with pytest.raises(UserError, match="how much may be lost"):
        CompressConfig(goal=Goal(p99_ms=1)).check()
    with pytest.raises(UserError, match="nothing to do"):
        CompressConfig().check()


def test_layers_that_say_nothing_and_parts_that_stand_out_are_seen() -> None:
    subject = with_idle_layers()
    before, rows = weights_digest(subject.model), rows_of(subject, 48)
    found = measure_sensitivity(subject, rows)
    assert weights_digest(subject.model) == before
    assert len(subject.model.trunk.layers) == 4
    assert min(found.without) < 0.01 < found.without[0]
    subject = small_classifier()
    with torch.no_grad():  # one neuron that int8 has to make room for
        up, down = subject.model.trunk.layers[0].mlp.up, subject.model.trunk.layers[0].mlp.down
        up.weight[0] *= 300
        down.weight[:, 0] /= 300
    assert measure_sensitivity(subject, rows).to_skip == ("layers.0.mlp.down",)
    assert Sensitivity(without=[1, 1, 0.01, 0.01]).best_choice(2) == "first"
    assert Sensitivity(without=[1, 0.9, 1, 0.9]).best_choice(2) == "spaced"


@pytest.mark.parametrize(
    ("text", "units", "value"),
    [("10ms", TIMES, 10), ("0.5 s", TIMES, 500), ("20MB", SIZES, 20), ("900kB", SIZES, 0.9), ("20min", SPANS, 20)],
)
def test_quantities_have_units(text: str, units: Mapping[str, float], value: float) -> None:
    assert quantity(text, units, "--flag", "1ms") == pytest.approx(value)


@pytest.mark.parametrize("text", ["10", "ms", "10 parsecs", "-3ms", "1e3ms"])
def test_quantities_without_units_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="is not a number and a unit"):
        quantity(text, TIMES, "--p99", "10ms")
