"""What a run tells other programs, read back by those programs."""

from __future__ import annotations

import json
import struct
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.fit.conftest import Recipe

from lexmill.fit import fit
from lexmill.fit.config import TrackConfig
from lexmill.monitor import open_trackers, read_events


def test_a_run_is_found_in_each_program_with_its_losses_and_settings(recipe: Recipe, tmp_path: Path) -> None:
    asked = recipe()
    asked = replace(
        asked, data=replace(asked.data, test=asked.data.train), track=TrackConfig(("tensorboard", "mlflow", "wandb"))
    )
    artifact = fit(asked, tmp_path / "runs" / "a").artifact
    events = read_events(artifact.path / "run" / "events.jsonl")
    wanted = [event["loss"] for event in events if event["phase"] == "train"]
    folder = tmp_path / "runs" / "tracking"
    assert _tensorboard(folder / "tensorboard" / "a", "train/loss") == pytest.approx(wanted)
    run, losses = _mlflow(folder / "mlflow.db")
    assert losses == pytest.approx(wanted)
    assert run.data.params["train.epochs"] == str(asked.train.epochs)
    assert run.data.metrics["test/accuracy"] == artifact.manifest.metrics["test"]["accuracy"].value
    assert run.info.status == "FINISHED"
    assert _wandb(folder / "wandb", "train/loss") == pytest.approx(wanted)


def test_a_resumed_run_goes_on_in_the_same_place(tmp_path: Path) -> None:
    for last_step in (-1, 1):
        for sink in open_trackers(["tensorboard", "mlflow"], tmp_path, "a", {"seed": 0}, last_step=last_step):
            for step in range(last_step + 1, last_step + 4):
                sink.emit({"phase": "train", "step": step, "loss": float(step)})
            sink.close()
    assert _tensorboard(tmp_path / "tensorboard" / "a", "train/loss") == [0, 1, 2, 3, 4]
    assert [round(loss) for loss in _mlflow(tmp_path / "mlflow.db")[1]][-3:] == [2, 3, 4]


def _tensorboard(folder: Path, name: str) -> list[float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder))
    found.Reload()
    return [point.value for point in found.Scalars(name)]


def _mlflow(database: Path) -> tuple[Any, list[float]]:
    from mlflow import MlflowClient

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        client = MlflowClient(tracking_uri=f"sqlite:///{database}")
        (run,) = client.search_runs([client.get_experiment_by_name("lexmill").experiment_id])
        points = client.get_metric_history(run.info.run_id, "train/loss")
    return run, [point.value for point in sorted(points, key=lambda point: (point.step, point.timestamp))]


def _wandb(folder: Path, name: str) -> list[float]:
    from wandb.proto import wandb_internal_pb2

    (file,) = folder.glob("offline-run-*/run-*.wandb")
    losses: list[float] = []
    for data in _records(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        for item in record.history.item:
            if name in (item.key, "/".join(item.nested_key)):
                losses.append(json.loads(item.value_json))
    return losses


def _records(stored: bytes) -> Iterator[bytes]:
    """The records of LevelDB's log format: blocks of 32 KiB, each record whole or as first, middle and last part."""
    at, parts = 7, b""
    while at + 7 <= len(stored):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
        length, kind = struct.unpack_from("<HB", stored, at + 4)
        parts += stored[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield parts
            parts = b""
