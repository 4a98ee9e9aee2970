"""What was compressed is read by a process that knows nothing of compressing."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.compress.material import material_of, texts
from tests.small_classifier import small_classifier, write_artifact

from lexmill.compress import Material, Step, check_order, known
from lexmill.engine import Loaded, TorchEngine
from lexmill.errors import UserError
from lexmill.evaluate import answered

_READ = """
import json, sys, torch
from lexmill.engine import TorchEngine
from lexmill.evaluate import answered
torch.set_num_threads(1)
asked = [{"question": text} for text in json.loads(sys.argv[1])]
told = [[one["label"].tolist() for one in answered(TorchEngine(path), asked)[1]] for path in sys.argv[2:]]
assert not any(name.startswith("lexmill.compress") for name in sys.modules)
print(json.dumps(told))
"""
_QUICK = {"epochs": 1, "learning_rate": 1e-3, "batch_size": 16}
_PRUNED = {"rows": 16, "recover": False}
CHAINS: Sequence[Sequence[Step]] = (
    [Step("distil", {"family": "gru", "hidden_size": 16, "recovery": _QUICK})],
    [Step("factorise", {"recover": False}), Step("exits", {"max_drop": 0.5, "epochs": 2})],
    [Step("distil", {"intermediate_size": 32, "recovery": _QUICK}), Step("factorise", {"recover": False})],
    [Step("int8", {"max_error": 1.0})],
    [Step("int8", {"max_error": 1.0, "train": True, "recovery": _QUICK})],
    [Step("weights", {"dtype": "int4", "rows": 16})],
    [Step("factorise", {"recover": False}), Step("weights", {"rounding": "awq", "rows": 16})],
    [Step("vocabulary"), Step("int8", {"max_error": 1.0})],
    [Step("distil", {"layers": 1, "recovery": _QUICK}), Step("vocabulary", {"size": 50})],
    [Step("sparsity", {"pattern": "2:4", "recovery": _QUICK}), Step("int8", {"max_error": 1.0})],
    [Step("vocabulary"), Step("sparsity", {"by": "wanda", "recover": False})],
    [Step("neurons", {**_PRUNED, "keep": 0.6}), Step("heads", {**_PRUNED, "keep": 0.7}), Step("layers", _PRUNED)],
    [Step("heads", {**_PRUNED, "scope": "layer"}), Step("factorise", {"recover": False})],
    [Step("neurons", {"rows": 16, "recovery": _QUICK}), Step("int8", {"max_error": 1.0})],
    [Step("width", _PRUNED), Step("heads", _PRUNED), Step("int8", {"max_error": 1.0})],
    [Step("neurons", _PRUNED), Step("width", {**_PRUNED, "keep": 0.7})],
    [Step("layers", _PRUNED), Step("neurons", _PRUNED), Step("weights", {"dtype": "int4", "rows": 16})],
    [Step("vocabulary"), Step("heads", _PRUNED), Step("exits", {"layers": [1], "max_drop": 0.5, "epochs": 2})],
    [Step("factorise", {"recover": False}), Step("int8", {"scheme": "token", "max_error": 1.0})],
)


SHORT: Mapping[str, Mapping[str, Any]] = {
    "distil": {"layers": 2, "recovery": _QUICK},
    "exits": {"layers": [1], "max_drop": 0.5, "epochs": 1},
    "factorise": {"recover": False},
    "heads": {**_PRUNED, "keep": 0.7},
    "int8": {"max_error": 2.0, "rows": 16},
    "layers": {**_PRUNED, "keep": 0.7},
    "neurons": {**_PRUNED, "keep": 0.7, "multiple": 8},
    "sparsity": {"by": "wanda", "recover": False},
    "vocabulary": {},
    "weights": {"rows": 16},
    "width": {**_PRUNED, "keep": 0.7},
}
"""A little of every method there is."""
FOR_DECODERS = ("kv_int8",)
"""Of which `test_kv_cache.py` tests the same."""
NOTHING_LEFT = (("distil", "distil"), ("vocabulary", "vocabulary"))
"""What the first of them has done to the full."""


def test_every_chain_answers_the_same_in_a_fresh_process(tmp_path: Path) -> None:
    material, made = material_of(small_classifier(), train=48), list[Loaded]()
    for steps in CHAINS:
        subject = small_classifier()
        for step in steps:
            subject = _after(step, subject, material)
        made.append(subject)
    _assert_read_alike(made, tmp_path)


def test_every_method_and_every_legal_pair_answers_the_same_in_a_fresh_process(tmp_path: Path) -> None:
    assert sorted([*SHORT, *FOR_DECODERS]) == known()
    teacher = small_classifier(layers=4)
    material, made = material_of(teacher, train=32), list[Loaded]()
    material = replace(material, validation=material.validation[:16])
    for first in SHORT:
        once = _after(Step(first, SHORT[first]), small_classifier(layers=4), material)
        made.append(once)
        for second in SHORT:
            if _is_legal(first, second) and (first, second) not in NOTHING_LEFT:
                copy = replace(once, model=deepcopy(once.model))
                made.append(_after(Step(second, SHORT[second]), copy, material))
    for first, second in NOTHING_LEFT:
        once = _after(Step(first, SHORT[first]), small_classifier(layers=4), material)
        with pytest.raises(UserError):
            _after(Step(second, SHORT[second]), once, material)
    _assert_read_alike(made, tmp_path)


def _is_legal(first: str, second: str) -> bool:
    try:
        check_order([Step(first), Step(second)])
    except UserError:
        return False
    return True


def _after(step: Step, subject: Loaded, material: Material) -> Loaded:
    method, options = step.read("steps")
    return method.apply(subject, material, options)[0]


def _assert_read_alike(made: Sequence[Loaded], folder: Path) -> None:
    """A new process, which imports nothing of compressing, reads each and has the same answers, to the bit."""
    asked = texts(6, seed=3)
    paths = [str(write_artifact(one, folder / str(number), probed=False).path) for number, one in enumerate(made)]
    answers = [answered(TorchEngine(one), [{"question": text} for text in asked])[1] for one in made]
    here = [[one["label"].tolist() for one in told] for told in answers]
    command = [sys.executable, "-c", _READ, json.dumps(asked), *paths]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert json.loads(done.stdout) == here
