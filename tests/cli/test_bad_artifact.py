"""Damaged artefacts and model directories: every verb that opens one names the file and what is wrong with it."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.cli.conftest import lexmill, process, refused, tree

from lexmill.artifact import tree as files

Damage = Callable[[Path], object]


def edit(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def rehash(path: Path) -> None:
    """Make the manifest's hashes those of the files as they are now."""
    found = {name: files.measure(path / name).model_dump() for name in files.names(path)}
    edit(path / "manifest.json", lambda manifest: manifest.update(files=found))


def manifest(change: Callable[[dict[str, Any]], object]) -> Damage:
    return lambda path: edit(path / "manifest.json", change)


def flip(path: Path) -> None:
    content = bytearray((path / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (path / "model.safetensors").write_bytes(content)


def cut(path: Path) -> None:
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def endless_header(path: Path) -> None:
    (path / "model.safetensors").write_bytes(struct.pack("<Q", 2**62) + b"{}")


def other_vocabulary(path: Path) -> None:
    def add(tokenizer: dict[str, Any]) -> None:
        tokenizer["model"]["vocab"]["zzz"] = len(tokenizer["model"]["vocab"])

    edit(path / "tokenizer.json", add)


def linked(path: Path) -> None:
    (path / "probes.json").rename(path.parent / "elsewhere.json")
    (path / "probes.json").symlink_to(path.parent / "elsewhere.json")


def pickled(path: Path) -> None:
    (path / "pytorch_model.bin").write_bytes(b"\x80\x04.")


def then_rehash(damage: Damage) -> Damage:
    def both(path: Path) -> None:
        damage(path)
        rehash(path)

    return both


ARTEFACT: dict[str, tuple[Damage, tuple[str, ...]]] = {
    "flipped bit": (flip, ("model.safetensors", "does not match its sha256", "copy the artefact again")),
    "truncated weights": (cut, ("model.safetensors", "bytes instead of", "truncated")),
    "missing file": (lambda path: (path / "tokenizer.json").unlink(), ("tokenizer.json", "the file is missing")),
    "extra file": (
        lambda path: (path / "notes.txt").write_text("x"),
        ("notes.txt", "manifest does not list", "remove it"),
    ),
    "pickle": (pickled, ("'pytorch_model.bin' may hold pickled code", ".safetensors")),
    "link": (linked, ("probes.json", "holds no links", "put the file itself there")),
    "manifest is no JSON": (
        lambda path: (path / "manifest.json").write_text("{"),
        ("manifest.json:1", "not valid JSON"),
    ),
    "manifest is a list": (
        lambda path: (path / "manifest.json").write_text("[]"),
        ("manifest.json", "not a Lexmill manifest"),
    ),
    "newer schema": (
        manifest(lambda m: m.update(schema_version=99)),
        ("manifest.json", "schema version 99", "pip install -U lexmill"),
    ),
    "unknown key in the manifest": (manifest(lambda m: m.update(extra=1)), ("manifest.json", "'extra' is wrong")),
    "path that leaves the artefact": (
        manifest(lambda m: m["files"].update({"../evil.json": next(iter(m["files"].values()))})),
        ("'../evil.json' is not a path inside the artefact",),
    ),
    "unknown task": (
        manifest(lambda m: m["task"].update(name="clasify")),
        ("manifest.json", "unknown task 'clasify'", "known tasks: ", "classify, "),
    ),
    "state of the task is wrong": (
        manifest(lambda m: m["task"].update(state={})),
        ("manifest.json", "state of the task 'classify' is wrong"),
    ),
    "tokenizer of another model": (
        then_rehash(other_vocabulary),
        ("topics", "'zzz'", "token embeddings", "the tokenizer the model was trained with"),
    ),
    "truncated weights, rehashed": (then_rehash(cut), ("model.safetensors", "not a readable safetensors file")),
    "unfinished": (lambda path: path.rename(path.with_name("topics.partial")), ("unfinished", "--resume")),
    "gone": (shutil.rmtree, ("topics", "no such")),
}


@pytest.mark.parametrize("name", ARTEFACT)
def test_a_damaged_artefact_is_refused_by_every_verb(name: str, work: Path, fitted: Path) -> None:
    damage, says = ARTEFACT[name]
    shutil.copytree(fitted, work / "topics")
    damage(work / "topics")
    before = tree(work)
    # `show` reads no weights and knows no task.
    verbs = (
        ["evaluate", "predict"]
        if {"task", "rehashed", "tokenizer"} & set(name.split())
        else ["show", "evaluate", "predict"]
    )
    for verb in verbs:
        refused(lexmill(verb, "topics", *(["train.jsonl"] if verb != "show" else [])), *says)
    assert tree(work) == before


def test_serve_refuses_a_missing_artefact_before_it_listens(work: Path) -> None:
    said = process("serve", "runs/none", "--port", "0")
    assert said.code == 2
    assert said.err.splitlines()[1:] == [
        "error: runs/none: there is no such directory",
        "  give the directory of an artefact",
    ]
    assert said.out == ""


def test_verify_says_which_file_is_damaged(work: Path, fitted: Path) -> None:
    shutil.copytree(fitted, work / "topics")
    flip(work / "topics")
    said = lexmill("verify", "topics", "--json")
    assert said.code == 1
    assert said.json["ok"] is False
    assert "model.safetensors" in said.json["checks"][0]["detail"]


def cut_config(path: Path) -> None:
    (path / "config.json").write_text("{")


MODEL: dict[str, tuple[Damage, tuple[str, ...]]] = {
    "no such directory": (shutil.rmtree, ("base", "does not exist", "Hugging Face directory")),
    "no config": (lambda path: (path / "config.json").unlink(), ("base", "no config.json")),
    "broken config": (cut_config, ("config.json", "not JSON")),
    "unknown architecture": (
        lambda path: edit(path / "config.json", lambda c: c.update(model_type="bart")),
        ("config.json", "unknown model family 'bart'", "bert, roberta, xlm-roberta"),
    ),
    "setting that cannot be": (
        lambda path: edit(path / "config.json", lambda c: c.update(hidden_act="relu6")),
        ("config.json", "hidden_act", "relu6"),
    ),
    "no heads": (
        lambda path: edit(path / "config.json", lambda c: c.update(num_attention_heads=0)),
        ("config.json", "heads and widths must be at least 1"),
    ),
    "list for a word": (
        lambda path: edit(path / "config.json", lambda c: c.update(hidden_act=[])),
        ("config.json", "hidden_act", "can be: gelu"),
    ),
    "no weights": (lambda path: (path / "model.safetensors").unlink(), ("base", "no weights to start from", "init")),
    "pickled weights": (
        lambda path: (path / "model.safetensors").rename(path / "pytorch_model.bin"),
        ("base", "pytorch_model.bin is a pickle", "convert it to safetensors"),
    ),
    "truncated weights": (cut, ("model.safetensors", "not a readable safetensors file", "fetch it again")),
    "endless header": (endless_header, ("model.safetensors", "not a readable safetensors file")),
    "weights of another size": (
        lambda path: edit(path / "config.json", lambda c: c.update(intermediate_size=65)),
        ("model.safetensors", "has shape", "config.json says it should be"),
    ),
    "no tokenizer": (
        lambda path: (path / "tokenizer.json").unlink(),
        ("base", "no tokenizer", "tokenizer.json or vocab.txt"),
    ),
    "broken tokenizer": (lambda path: (path / "tokenizer.json").write_text("{\n'"), ("tokenizer.json:2", "not JSON")),
    "tokenizer of another kind": (
        lambda path: (path / "tokenizer.json").write_text("{}"),
        ("tokenizer.json", "not a tokenizer"),
    ),
    "tokenizer of another model": (other_vocabulary, ("base", "'zzz'", "token embeddings")),
}


@pytest.mark.parametrize("name", MODEL)
def test_a_broken_model_directory_is_refused(name: str, work: Path, tiny: Path) -> None:
    damage, says = MODEL[name]
    shutil.copytree(tiny, work / "base")
    damage(work / "base")
    before = tree(work)
    refused(lexmill("fit", "train.jsonl", "--model", "base", "--out", "out", "-q"), *says)
    assert tree(work) == before
