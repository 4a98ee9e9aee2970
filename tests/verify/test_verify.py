from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tests.small_classifier import small_classifier, write_artifact
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from lexmill import models
from lexmill.artifact import Artifact, tree
from lexmill.engine import probes
from lexmill.errors import UserError
from lexmill.verify import Verification, verify

Tamper = Callable[[Path], None]


def rehash(path: Path) -> None:
    """Make the manifest's hashes those of the files as they are now."""
    file = path / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["files"] = {name: tree.measure(path / name).model_dump() for name in tree.names(path)}
    file.write_text(json.dumps(manifest))


def edit(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(file.read_text(encoding="utf-8"))
    change(content)
    file.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def change_state(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    edit(path / "manifest.json", lambda manifest: change(manifest["task"]["state"]))


def permuted_labels(path: Path) -> None:
    def rotate(state: dict[str, Any]) -> None:
        labels = state["heads"][0]["labels"]
        state["heads"][0]["labels"] = [*labels[1:], labels[0]]

    change_state(path, rotate)


def another_truncation(path: Path) -> None:
    change_state(path, lambda state: state["options"].update(max_length=95))


def longer_truncation(path: Path) -> None:
    change_state(path, lambda state: state["options"].update(max_length=128))


def another_case(path: Path) -> None:
    edit(path / "tokenizer.json", lambda tokenizer: tokenizer["normalizer"].update(lowercase=False))


def swapped_columns(path: Path) -> None:
    def swap(state: dict[str, Any]) -> None:
        columns = state["columns"]
        columns["text"], columns["text_pair"] = columns["text_pair"], columns["text"]

    change_state(path, swap)


def swapped_template(path: Path) -> None:
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    special = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = TemplateProcessing("[CLS] $0 [SEP]", "[CLS] $B:0 [SEP] $A:1 [SEP]:1", special)
    tokenizer.save(str(path / "tokenizer.json"))


def _flip(path: Path, tensor: str, bit: int) -> None:
    """Flip one bit of the first number of a float32 tensor."""
    file = path / "model.safetensors"
    content = bytearray(file.read_bytes())
    (header,) = struct.unpack("<Q", content[:8])
    start = json.loads(content[8 : 8 + header])[tensor]["data_offsets"][0]
    content[8 + header + start + bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)


def flipped_weight(path: Path) -> None:
    _flip(path, "bert.encoder.layer.0.attention.self.query.weight", bit=0)


def flipped_weight_with_digests_rewritten(path: Path) -> None:
    _flip(path, "classifier.weight", bit=31)
    digests = models.weights_digest(models.load(path))
    edit(path / "manifest.json", lambda manifest: manifest.update(weights=digests))


SINGLE: dict[Tamper, str] = {
    permuted_labels: "trained = reloaded",
    another_truncation: "trained = reloaded",
    another_case: "trained = reloaded",
    flipped_weight: "trained weights = loaded weights",
}
PAIR: dict[Tamper, str] = {swapped_columns: "trained = reloaded"}
SLOW: dict[Tamper, str] = {
    longer_truncation: "trained = reloaded",
    flipped_weight_with_digests_rewritten: "trained = reloaded",
}


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_artifact(small_classifier(), tmp_path_factory.mktemp("single") / "tickets").path


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_artifact(small_classifier(pair=True), tmp_path_factory.mktemp("pair") / "pairs").path


def tampered_copy(source: Path, tamper: Tamper, base: Path) -> Path:
    """A copy that was tampered with, and whose hashes were made to match."""
    path = base / tamper.__name__
    shutil.copytree(source, path)
    tamper(path)
    rehash(path)
    return path


@pytest.fixture(scope="module")
def verified(single: Path, pair: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Verification]:
    """What `verify` says of a sound artefact, and of each tampered one."""
    base = tmp_path_factory.mktemp("tampered")
    tampered = [(single, tamper) for tamper in SINGLE] + [(pair, tamper) for tamper in PAIR]
    paths = {tamper.__name__: tampered_copy(source, tamper, base) for source, tamper in tampered}
    paths["single"] = single
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(paths, pool.map(verify, paths.values()), strict=True))


def test_a_sound_artefact_is_verified_to_the_end(verified: dict[str, Verification]) -> None:
    assert_sound(verified["single"])


@pytest.mark.slow
def test_sound_pairs_are_verified_to_the_end(pair: Path) -> None:
    assert_sound(verify(pair))


def assert_sound(found: Verification) -> None:
    assert found.ok, found.lines()
    assert [check.name for check in found.checks] == [
        "files",
        "trained weights = loaded weights",
        "trained = reloaded",
        "requests are read as in training",
        "trained = served",
    ]
    assert found.checks[4].compared == len(probes.probe_texts())
    assert all((check.max_error or 0) <= 1e-5 for check in found.checks)
    assert json.loads(json.dumps(found.to_dict()))["ok"]


@pytest.mark.parametrize("tamper", [*SINGLE, *PAIR], ids=lambda tamper: tamper.__name__)
def test_tampering_is_caught_although_the_hashes_match(verified: dict[str, Verification], tamper: Tamper) -> None:
    assert_caught(verified[tamper.__name__], (SINGLE | PAIR)[tamper])


@pytest.mark.slow
@pytest.mark.parametrize("tamper", [*SLOW], ids=lambda tamper: tamper.__name__)
def test_subtler_tampering_is_caught(single: Path, tmp_path: Path, tamper: Tamper) -> None:
    assert_caught(verify(tampered_copy(single, tamper, tmp_path)), SLOW[tamper])


@pytest.mark.slow
def test_a_swapped_pair_template_is_caught(pair: Path, tmp_path: Path) -> None:
    assert_caught(verify(tampered_copy(pair, swapped_template, tmp_path)), "trained = reloaded")


def assert_caught(found: Verification, by: str) -> None:
    assert not found.ok
    assert found.checks[0].ok
    failed = next(check for check in found.checks if not check.ok)
    assert failed.name == by
    assert "NOT verified" in found.lines()[-1]
    if failed.name == "trained = reloaded":
        assert failed.difference is not None
        assert failed.difference.name.startswith("label/")
        assert repr(failed.difference.expected) in failed.detail


def test_a_changed_file_is_caught_by_its_hash(single: Path, tmp_path: Path) -> None:
    shutil.copytree(single, tmp_path / "changed")
    flipped_weight(tmp_path / "changed")
    found = verify(tmp_path / "changed")
    assert not found.ok
    assert [check.name for check in found.checks] == ["files"]
    assert "model.safetensors" in found.checks[0].detail


def test_an_artefact_without_probes_cannot_be_verified(single: Path, tmp_path: Path) -> None:
    shutil.copytree(single, tmp_path / "bare")
    (tmp_path / "bare" / probes.FILE).unlink()
    rehash(tmp_path / "bare")
    with pytest.raises(UserError, match="no probes"):
        verify(tmp_path / "bare")


def test_what_is_no_artefact_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError):
        verify(tmp_path / "nothing")


def test_a_model_that_does_not_load_fails_with_the_reason(single: Path, tmp_path: Path) -> None:
    path = tmp_path / "unknown"
    shutil.copytree(single, path)
    edit(path / "manifest.json", lambda manifest: manifest["task"].update(name="divine"))
    found = verify(path)
    assert not found.ok
    assert "divine" in found.checks[-1].detail


def test_the_probes_are_many_varied_and_public() -> None:
    texts = probes.probe_texts()
    assert len(set(texts)) == len(texts) >= 64
    words = [len(text.split()) for text in texts]
    assert min(words) == 1
    assert sum(count > 600 for count in words) >= 5
    assert any(text.isupper() for text in texts)
    assert any("é" in text for text in texts)
    assert any("\N{GRINNING FACE}" in text for text in texts)
    assert sum(any("\u4e00" <= letter <= "\u9fff" for letter in text) for text in texts) >= 8


def test_recording_leaves_the_model_in_training_mode_and_its_floats_are_exact(single: Path) -> None:
    loaded = small_classifier()
    loaded.model.train()
    recorded = probes.record(loaded.task, loaded.model, loaded.tokenizer)
    assert loaded.model.training
    assert json.loads(json.dumps(recorded)) == recorded
    stored = json.loads((Artifact.open(single).path / probes.FILE).read_text(encoding="utf-8"))
    assert stored["probes"] == recorded["probes"]
