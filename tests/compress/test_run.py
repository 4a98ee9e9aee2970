"""A chain on an artefact: what is written, what is proved, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.compress.material import rows_of
from tests.small_classifier import small_classifier, write_artifact

import lexmill as lm
from lexmill.compress import CompressConfig, Files, check_order, compress, read_step
from lexmill.compress.base import Step
from lexmill.compress.proof import prove
from lexmill.engine import TorchEngine
from lexmill.engine.loaded import load
from lexmill.errors import Failure, UserError
from lexmill.verify import verify

QUICK = {"epochs": 2, "learning_rate": 1e-3, "batch_size": 16}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_artifact(small_classifier(), tmp_path_factory.mktemp("artefacts") / "source").path


@pytest.fixture
def files(tmp_path: Path) -> Files:
    teacher, paths = small_classifier(), {}
    for seed, (part, count) in enumerate({"train": 96, "validation": 40, "test": 80}.items()):
        paths[part] = tmp_path / f"{part}.jsonl"
        paths[part].write_text("".join(json.dumps(row) + "\n" for row in rows_of(teacher, count, seed)))
    return Files(**paths)


def test_a_chain_is_written_measured_and_proved(source: Path, files: Files, tmp_path: Path) -> None:
    steps = ({"method": "factorise", "keep": 0.9, "recover": False}, {"method": "exits", "epochs": 1, "max_drop": 0.5})
    found = compress(source, tmp_path / "out", CompressConfig(steps, data=files))
    history = found.artifact.manifest.history
    assert [step.name for step in history] == ["factorise", "exits", "compress"]
    assert history[0].effect["layers_factorised"] > 0
    assert history[0].effect["bytes_after"] < history[0].effect["bytes_before"]
    assert found.proof is not None
    assert found.proof.rows == 80
    assert history[-1].effect["drop"] == found.proof.drop
    assert found.after.bytes < found.before.bytes + 10_000
    assert found.after.p50_ms > 0
    assert found.artifact.manifest.metrics["test"]["accuracy"].value <= 1
    assert "opened once" in "\n".join(found.lines())


@pytest.mark.slow
def test_what_was_compressed_verifies(source: Path, files: Files, tmp_path: Path) -> None:
    config = CompressConfig(({"method": "factorise", "keep": 0.9, "recover": False},), data=files)
    found = verify(compress(source, tmp_path / "out", config).artifact.path)
    assert found.ok, found.lines()


def test_a_loss_that_is_not_proved_small_writes_nothing(source: Path, files: Files, tmp_path: Path) -> None:
    distil = {"method": "distil", "layers": 1, "recovery": {**QUICK, "epochs": 1, "learning_rate": 1e-6}}
    with pytest.raises(Failure, match="not proved to be within"):
        compress(source, tmp_path / "out", CompressConfig((distil,), max_drop=0.01, data=files))
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


def test_a_model_is_no_worse_than_itself_as_far_as_so_many_rows_can_tell(source: Path) -> None:
    engine, rows = TorchEngine(load(source)), rows_of(small_classifier(), 30)
    wide, _ = prove(engine, engine, rows, where="rows", allowed=0.12)
    close, _ = prove(engine, engine, rows, where="rows", allowed=0.01)
    assert wide is not None
    assert close is not None
    assert (wide.drop, wide.holds) == (0.0, True)
    assert not close.holds
    assert close.rows_needed == 381
    again, _ = prove(engine, engine, [*rows] * 13, where="rows", allowed=0.01)
    assert again is not None
    assert again.holds


def test_rows_that_the_model_has_seen_prove_nothing(source: Path, files: Files, tmp_path: Path) -> None:
    chain = ({"method": "factorise", "recover": False},)
    for known in ("train", "validation"):
        given = replace(files, test=getattr(files, known) or files.train, validation=files.validation or files.test)
        if known == "validation":
            given = replace(given, test=given.validation)
        with pytest.raises(UserError, match="they prove nothing"):
            compress(source, tmp_path / "out", CompressConfig(chain, data=given))
    assert files.train is not None
    assert files.test is not None
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text(files.test.read_text() + "".join(files.train.read_text().splitlines(keepends=True)[:7]))
    found = compress(source, tmp_path / "out", CompressConfig(chain, data=replace(files, test=mixed)))
    assert found.proof is not None
    assert "without 7 that are among the others too" in found.proof.where


def test_what_a_killed_run_left_does_not_stand_in_the_way(source: Path, files: Files, tmp_path: Path) -> None:
    program = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom lexmill.artifact import create\n"
        "with create(Path(sys.argv[1]), discard_on_error=True) as writer:\n"
        "    writer.path('model.safetensors').write_text('half')\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "out")], check=False)
    assert (tmp_path / "out.partial" / "model.safetensors").exists()
    chain = ({"method": "factorise", "recover": False},)
    assert compress(source, tmp_path / "out", CompressConfig(chain, data=files)).artifact.path == tmp_path / "out"
    assert not (tmp_path / "out.partial").exists()


def test_a_wrong_setting_says_of_which_step(source: Path, files: Files, tmp_path: Path) -> None:
    chain = ({"method": "factorise", "recover": False}, {"method": "distil", "layers": 9})
    with pytest.raises(UserError) as error:
        compress(source, tmp_path / "out", CompressConfig(chain[1:], data=files))
    assert error.value.where == "steps[0] (distil): layers"
    assert "give fewer than" in str(error.value)


def test_too_few_rows_say_how_many_would_do(source: Path) -> None:
    engine, rows = TorchEngine(load(source)), rows_of(small_classifier(), 40)
    other = small_classifier()
    for parameter in other.model.heads.parameters():
        parameter.data += 0.15 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    proof, _ = prove(engine, TorchEngine(other), rows, where="rows", allowed=None)
    assert proof is not None
    assert 0 < proof.drop < proof.interval[1]
    allowed = (proof.drop + proof.interval[1]) / 2
    judged, _ = prove(engine, TorchEngine(other), rows, where="rows", allowed=allowed)
    assert judged is not None
    assert not judged.holds
    assert judged.rows_needed is not None
    assert judged.rows_needed > 40


def test_rows_for_a_proof_are_never_those_of_training(source: Path, files: Files, tmp_path: Path) -> None:
    config = CompressConfig(({"method": "factorise", "recover": False},), data=Files(train=files.train))
    with pytest.raises(UserError, match="no rows for a proof"):
        compress(source, tmp_path / "out", config)


def test_changed_data_is_refused(tmp_path: Path, tiny_fit: Path) -> None:
    rows = tmp_path / "train.jsonl"
    rows.write_text(rows.read_text() + rows.read_text().splitlines()[0] + "\n")
    with pytest.raises(UserError, match="has changed since"):
        lm.compress(tiny_fit, out=tmp_path / "out", steps=["factorise,recover=false"])


def test_an_illegal_order_says_why() -> None:
    with pytest.raises(UserError, match="'distil' cannot follow 'exits': since heads stand on layers"):
        check_order([Step("exits"), Step("distil")])


def test_steps_are_read_from_the_command_line() -> None:
    found = read_step("distil,layers=3,recovery.epochs=8,exits=[1,2]")
    assert found == {"method": "distil", "layers": 3, "recovery": {"epochs": 8}, "exits": [1, 2]}
    with pytest.raises(UserError, match="names no method"):
        read_step("layers=3")


@pytest.fixture
def tiny_fit(source: Path, tmp_path: Path) -> Path:
    rows, test = tmp_path / "train.jsonl", tmp_path / "test.jsonl"
    for seed, file in enumerate((rows, test)):
        file.write_text("".join(json.dumps(row) + "\n" for row in rows_of(small_classifier(), 48, seed)))
    lm.fit(rows, model=source, out=tmp_path / "fitted", test=test, text="question", label="intent", epochs=1)
    return tmp_path / "fitted"
