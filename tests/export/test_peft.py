"""An adapter that was exported answers in `peft`, on the model it was trained on, as the artefact does."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.train.parts import rows, stored, tiny_bert, write_rows

from lexmill.adapt import AdaptConfig
from lexmill.artifact import Artifact
from lexmill.engine import load
from lexmill.errors import Failure, UserError
from lexmill.export import export, find
from lexmill.fit import DataConfig, FitConfig, fit
from lexmill.nn.int8 import Int8Linear
from lexmill.train import TrainConfig

peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:transformers"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys:RuntimeWarning"),
]
TRAIN = TrainConfig(epochs=1, batch_size=8, learning_rate=2e-2)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stored(tiny_bert(num_layers=2), tmp_path_factory.mktemp("models") / "bert")


@pytest.fixture(scope="module")
def fitted(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("fitted")
    train = write_rows(folder / "train.jsonl", rows(24))

    def make(method: Any, **changes: Any) -> Path:
        out = folder / method
        if not out.exists():
            adapt = AdaptConfig(method, **changes)
            options = {"max_length": 96}
            fit(FitConfig(DataConfig(train), model=str(base), adapt=adapt, train=TRAIN, options=options), out)
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LEXMILL_CACHE", str(folder / "cache"))
        yield make


METHODS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 2},
    "adalora": {"rank": 1},
    "prefix": {"tokens": 3},
    "prompt": {"tokens": 3},
}


@pytest.mark.parametrize("method", ["lora", *(pytest.param(name, marks=pytest.mark.slow) for name in [*METHODS][1:])])
def test_peft_answers_as_the_artefact(fitted: Any, base: Path, method: str, tmp_path: Path) -> None:
    source = fitted(method, **METHODS[method])
    found = export(source, tmp_path / "out", "peft")
    [(name, parity)] = found.parity.items()
    assert (name, parity.label_agreement) == ("peft/adapter_model.safetensors", 1.0)
    folder = tmp_path / "out" / "peft"
    kept = json.loads((source / "probes.json").read_text("utf-8"))["probes"][:6]
    count = len(kept[0]["evidence"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=count)
        theirs = peft.PeftModel.from_pretrained(plain, str(folder)).eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        for probe in kept:
            with torch.inference_mode():
                got = theirs(**tokenizer(probe["record"]["text"], truncation=True, return_tensors="pt")).logits[0]
            want = np.array(list(probe["evidence"].values()))
            np.testing.assert_allclose(got.numpy(), want, atol=1e-5 * np.abs(want).max())


def test_the_adapter_says_what_it_goes_onto(fitted: Any, base: Path, tmp_path: Path) -> None:
    source = fitted("lora", **METHODS["lora"])
    shutil.copytree(base, tmp_path / "moved")
    out = export(source, tmp_path / "out", "peft", {"base": str(tmp_path / "moved")}).artifact
    told = json.loads(out.file("peft/adapter_config.json").read_text("utf-8"))
    assert told["base_model_name_or_path"] == str(tmp_path / "moved")
    assert not (out.path / "peft" / "model.safetensors").exists()
    with pytest.raises(UserError, match="is not at"):
        export(source, tmp_path / "none", "peft", {"base": str(tmp_path / "nowhere")})
    other = stored(tiny_bert(num_layers=2, initializer_range=0.5), tmp_path / "other")
    with pytest.raises(Failure, match="does not answer as its source does"):
        export(source, tmp_path / "wrong", "peft", {"base": str(other)})
    assert not (tmp_path / "wrong").exists()


def test_what_is_no_adapter_is_refused(fitted: Any, tmp_path: Path) -> None:
    form = find("peft")
    whole, changed = load(Artifact.open(fitted("bottleneck"))), load(Artifact.open(fitted("lora", **METHODS["lora"])))
    attention = changed.model.trunk.layers[0].attention
    attention.query = Int8Linear.of(attention.query, None)
    for subject, told in ((whole, "no adapter that peft has a format for"), (changed, "int8 matrices")):
        with pytest.raises(UserError, match=told):
            form.write(subject, tmp_path, form.Options())
    assert not list(tmp_path.iterdir())
