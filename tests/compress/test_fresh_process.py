"""What was compressed is read by a process that knows nothing of compressing."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.compress.material import material_of, texts
from tests.small_classifier import small_classifier, write_artifact

from lexmill.compress import Step
from lexmill.engine import Loaded, TorchEngine
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


def test_every_chain_answers_the_same_in_a_fresh_process(tmp_path: Path) -> None:
    material, asked, paths, here = material_of(small_classifier(), train=48), texts(10, seed=3), [], []
    for number, steps in enumerate(CHAINS):
        subject: Loaded = small_classifier()
        for step in steps:
            method, options = step.read("steps")
            subject, _ = method.apply(subject, material, options)
        paths.append(str(write_artifact(subject, tmp_path / str(number)).path))
        _, told = answered(TorchEngine(subject), [{"question": text} for text in asked])
        here.append([one["label"].tolist() for one in told])
    command = [sys.executable, "-c", _READ, json.dumps(asked), *paths]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert json.loads(done.stdout) == here
