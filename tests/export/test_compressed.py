"""What methods of compression make is exported too, and answers as it did before; or is refused in words."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto
from tests.compress.material import material_of
from tests.small_classifier import small_classifier, write_artifact

from lexmill.artifact import Artifact
from lexmill.compress.base import Material, Step
from lexmill.engine import Loaded, probes
from lexmill.errors import UserError
from lexmill.export import export, find
from lexmill.export.parity import measure

BRIEF = {"epochs": 1}
CHAINS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "fewer layers": [("distil", {"layers": 1, "recovery": BRIEF})],
    "narrower": [("distil", {"hidden_size": 16, "num_heads": 2, "intermediate_size": 32, "recovery": BRIEF})],
    "lstm": [("distil", {"family": "lstm", "hidden_size": 16, "embedding_size": 16, "recovery": BRIEF})],
    "low rank": [("factorise", {"keep": 0.8, "recover": False})],
    "static": [("int8", {"max_error": 1.0})],
    "smooth": [("int8", {"smooth": 0.5, "clip": "mse", "max_error": 1.0})],
    "token": [("int8", {"scheme": "token", "max_error": 1.0})],
    "partly": [("int8", {"skip": ("layers.0.mlp",), "embeddings": False, "max_error": 1.0})],
    "all": [
        ("vocabulary", {}),
        ("distil", {"hidden_size": 16, "num_heads": 2, "intermediate_size": 32, "recovery": BRIEF}),
        ("factorise", {"keep": 0.8, "recover": False}),
        ("int8", {"max_error": 1.0}),
    ],
}


@cache
def material() -> Material:
    return material_of(small_classifier())


def compressed(*chain: tuple[str, dict[str, Any]]) -> Loaded:
    subject = small_classifier()
    for name, options in chain:
        method, read = Step(name, options).read("step")
        subject, _ = method.apply(subject, material(), read)
    return subject


def written(subject: Loaded, folder: Path) -> Artifact:
    write_artifact(subject, folder / "source")
    return export(folder / "source", folder / "out").artifact


@pytest.mark.parametrize("chain", CHAINS)
def test_what_was_compressed_answers_alike_in_onnx(chain: str, tmp_path: Path) -> None:
    subject, form = compressed(*CHAINS[chain]), find("onnx")
    options, records = form.Options(), material().validation[::2]
    [name] = form.write(subject, tmp_path, options)
    got = form.evidence(subject, tmp_path / name, records)
    parity = measure(probes.evidence(subject, records), got, form.tolerance(subject, options), labelled=True)
    int8 = CHAINS[chain][-1][0] == "int8"
    assert parity.holds, parity
    assert parity.tolerance == (0.25 if int8 else 1e-5)
    stored = onnx.load(tmp_path / name).graph.initializer
    assert int8 == any(one.data_type == TensorProto.INT8 for one in stored)


def test_a_trimmed_vocabulary_goes_with_its_tokenizer(tmp_path: Path) -> None:
    artifact = written(compressed(("vocabulary", {}), ("int8", {"smooth": 0.5, "max_error": 1.0})), tmp_path)
    pieces = json.loads((artifact.path / "onnx" / "tokenizer.json").read_text("utf-8"))["model"]["vocab"]
    tables = onnx.load(artifact.path / "onnx" / "model.onnx").graph.initializer
    assert len(pieces) in {one.dims[0] for one in tables if len(one.dims) == 2}
    assert len(pieces) < small_classifier().tokenizer.get_vocab_size()


@pytest.mark.parametrize(
    ("chain", "told"),
    [
        (("exits", {"epochs": 1, "max_drop": 0.5}), "early exits"),
        (("weights", {"group": 32, "rounding": "nearest", "embeddings": False}), "WeightOnlyLinear"),
    ],
    ids=["exits", "weights"],
)
def test_what_onnx_cannot_hold_is_refused_and_leaves_nothing(
    chain: tuple[str, dict[str, Any]], told: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=told):
        written(compressed(chain), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
