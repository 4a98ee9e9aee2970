"""Verifying says of a compression whether its loss was proved, and of every exported file whether it answers alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from tests.export.test_onnx import in_int8
from tests.small_classifier import small_classifier, write_artifact
from tests.verify.test_verify import edit, rehash

from lexmill.artifact import Artifact
from lexmill.engine import load
from lexmill.export import Parity, export, exported
from lexmill.verify import verify


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    write_artifact(small_classifier(), tmp_path / "source")
    return export(tmp_path / "source", tmp_path / "out").artifact.path


def found(path: Path) -> Any:
    [(file, parity)] = exported(Artifact.open(path, check=False), load(path))
    assert file == "onnx/model.onnx"
    return parity


def test_an_exported_file_is_asked_again(artifact: Path) -> None:
    parity = found(artifact)
    assert isinstance(parity, Parity)
    assert parity.holds
    assert parity.to_dict() == pytest.approx(
        json.loads((artifact / "manifest.json").read_text())["structure"]["export"]["onnx/model.onnx"], abs=1e-5
    )


def test_a_weight_changed_in_the_file_is_found_though_its_hash_is_right(artifact: Path) -> None:
    file = artifact / "onnx" / "model.onnx"
    model = onnx.load(file)
    [bias] = [one for one in model.graph.initializer if one.dims == [5]]
    bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) + np.float32(0.01), bias.name))
    onnx.save(model, file)
    rehash(artifact)
    assert "not the weights of the model" in str(found(artifact))


def test_a_code_changed_in_an_int8_file_is_found_though_rounding_would_hide_it(tmp_path: Path) -> None:
    subject = small_classifier()
    in_int8(subject, None, smooth=False)
    write_artifact(subject, tmp_path / "source")
    path = export(tmp_path / "source", tmp_path / "out").artifact.path
    assert found(path).holds
    file = path / "onnx" / "model.onnx"
    model = onnx.load(file)
    codes = next(one for one in model.graph.initializer if numpy_helper.to_array(one).dtype == np.int8)
    changed = numpy_helper.to_array(codes).copy()
    changed.flat[0] ^= 1
    codes.CopyFrom(numpy_helper.from_array(changed, codes.name))
    onnx.save(model, file)
    rehash(path)
    assert "not the weights of the model" in str(found(path))


def test_labels_changed_beside_the_file_are_found(artifact: Path) -> None:
    edit(artifact / "onnx" / "answers.json", lambda told: told["labels"]["label"].reverse())
    rehash(artifact)
    assert "'labels' is not what the task says" in str(found(artifact))


@pytest.mark.parametrize(
    "effect",
    [{"drop": 0.002, "drop_high": 0.03, "rows": 900.0}, {"drop": 0.0, "drop_high": 0.0, "rows": 0.0}, {}],
    ids=["lost too much", "on no rows", "never proved"],
)
def test_a_compression_whose_loss_is_not_within_its_limit_fails(effect: dict[str, float], artifact: Path) -> None:
    def compressed(manifest: dict[str, Any]) -> None:
        manifest["history"].append({"name": "compress", "parameters": {"max_drop": 0.01}, "effect": effect})

    edit(artifact / "manifest.json", compressed)
    verification = verify(artifact)
    assert not verification.ok
    assert verification.checks[-1].name == "trained = compressed, within what may be lost"


@pytest.mark.slow
def test_trained_compressed_exported_and_served_are_one(artifact: Path) -> None:
    def compressed(manifest: dict[str, Any]) -> None:
        effect = {"drop": 0.002, "drop_high": 0.008, "rows": 900.0}
        manifest["history"].append({"name": "compress", "parameters": {"max_drop": 0.01}, "effect": effect})

    edit(artifact / "manifest.json", compressed)
    verification = verify(artifact)
    assert verification.ok, verification.lines()
    names = [check.name for check in verification.checks]
    assert names[-1] == "trained = served"
    assert {"trained = compressed, within what may be lost", "trained = exported, onnx/model.onnx"} <= set(names)
