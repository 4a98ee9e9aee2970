"""Artefacts: written whole or not at all, checked on load, passed on with their history."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lexmill.artifact import (
    Artifact,
    FileRecord,
    Manifest,
    Metric,
    TaskRecord,
    Transform,
    create,
    describe,
    is_huggingface,
    render_card,
    summary,
)
from lexmill.errors import UserError


def manifest() -> Manifest:
    return Manifest(
        task=TaskRecord(name="classify", state={"heads": {"intent": {"labels": ["card", "a|b`c"]}}}),
        data={"rows": 10, "sha256": "00"},
        metrics={"test": {"accuracy": Metric(value=0.925, interval=(0.91, 0.94)), "ece": Metric(value=0.02)}},
        history=(Transform(name="fit", parameters={"epochs": 3}, effect={"seconds": 12.5}),),
        weights={"w": "ab"},
    )


def write(out: Path) -> Artifact:
    with create(out) as writer:
        writer.path("config.json").write_text("{}")
        writer.path("model.safetensors").write_bytes(bytes(1000))
        writer.path("run/events.jsonl").write_text("{}\n")
        writer.path("card.md").write_text("old")
        (writer.checkpoints / "step-1.safetensors").write_bytes(b"x")
        writer.manifest = manifest()
    return Artifact.open(out)


def refusal(path: Path, *, check: bool = True) -> UserError:
    with pytest.raises(UserError) as caught:
        Artifact.open(path, check=check)
    return caught.value


def rewrite(artifact: Path, **changes: object) -> None:
    file = artifact / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    artifact = write(tmp_path / "deep" / "out")
    files = ["card.md", "config.json", "model.safetensors", "run/events.jsonl"]
    assert list(artifact.manifest.files) == files
    assert artifact.manifest == manifest().model_copy(
        update={
            "files": artifact.manifest.files,
            "created": artifact.manifest.created,
            "history": artifact.manifest.history,
        }
    )
    on_disk = {path.relative_to(artifact.path).as_posix() for path in artifact.path.rglob("*") if path.is_file()}
    assert on_disk == {*files, "manifest.json"}
    assert [path.name for path in artifact.path.parent.iterdir()] == ["out"]
    assert artifact.file("config.json").read_text() == "{}"
    with pytest.raises(UserError, match="no file 'nope'"):
        artifact.file("nope")


def test_an_existing_out_or_partial_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(out)
    with pytest.raises(UserError, match="already exists"), create(out):
        pytest.fail("the block must not run")
    (tmp_path / "b.partial").mkdir()
    with pytest.raises(UserError, match="--resume"), create(tmp_path / "b"):
        pytest.fail("the block must not run")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="already exists"), create(tmp_path / "link"):
        pytest.fail("the block must not run")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write there"), create(tmp_path / "file" / "out"):
        pytest.fail("the block must not run")


def test_a_failed_run_stays_partial_and_is_resumed(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def half(out: Path) -> None:
        with create(out) as writer:
            writer.path("a.txt").write_text("a")
            (writer.checkpoints / "c").write_text("c")
            raise RuntimeError("halfway")

    with pytest.raises(RuntimeError, match="halfway"):
        half(out)
    assert not out.exists()
    assert "unfinished" in refusal(out).message
    with create(out, resume=True) as writer:
        assert writer.manifest is None
        assert (writer.checkpoints / "c").read_text() == "c"
        writer.path("b.txt").write_text("b")
        writer.manifest = manifest()
    assert list(Artifact.open(out).manifest.files) == ["a.txt", "b.txt"]


def test_cheap_work_is_discarded_on_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), create(tmp_path / "out", discard_on_error=True):
        raise RuntimeError("gone")
    assert list(tmp_path.iterdir()) == []


def test_forgetting_the_manifest_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no manifest"), create(tmp_path / "out"):
        pass
    assert not (tmp_path / "out").exists()


def test_a_run_that_died_before_its_rename_needs_only_that(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(out).path.rename(tmp_path / "out.partial")
    with create(out, resume=True) as writer:
        assert writer.manifest is not None
    assert Artifact.open(out).manifest.task.name == "classify"
    out.rename(tmp_path / "out.partial")
    (tmp_path / "out.partial" / "config.json").write_text("other")
    with pytest.raises(ValueError, match="no manifest"), create(out, resume=True):
        pass


_HOLDER = """
import sys
from pathlib import Path
from lexmill.artifact import Manifest, TaskRecord, create

with create(Path(sys.argv[1])) as writer:
    writer.path("a.txt").write_text("a")
    print("ready", flush=True)
    sys.stdin.readline()
    writer.manifest = Manifest(task=TaskRecord(name="classify"))
"""


def test_two_processes_cannot_write_one_run(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _HOLDER, str(tmp_path / "out")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "ready\n"
        with pytest.raises(UserError, match="another process"), create(tmp_path / "out", resume=True):
            pytest.fail("the block must not run")
        other.communicate("go on\n", timeout=30)
    assert other.returncode == 0
    Artifact.open(tmp_path / "out")


@pytest.mark.parametrize(
    "name", ["../x", "/x", "a/../x", "", "a//b", "./a", "a\\b", "a\0b", "model.bin", "x.PT", "a.pkl"]
)
def test_a_writer_refuses_names_outside_and_pickles(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError), create(tmp_path / "out") as writer:
        writer.path(name)


@pytest.mark.parametrize("name", ["manifest.json", ".lock", "checkpoints/x"])
def test_the_writers_own_names_are_not_given_out(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="own"), create(tmp_path / "out") as writer:
        writer.path(name)


def test_links_and_pickles_are_never_committed(tmp_path: Path) -> None:
    def commit(out: Path, spoil: Callable[[Path], object]) -> None:
        with create(out) as writer:
            spoil(writer.path("x"))
            writer.manifest = manifest()

    with pytest.raises(UserError, match="no links"):
        commit(tmp_path / "a", lambda path: path.symlink_to("/etc/hostname"))
    with pytest.raises(UserError, match="pickled"):
        commit(tmp_path / "b", lambda path: path.with_name("x.pt").write_bytes(b""))
    assert not (tmp_path / "a").exists()
    assert not (tmp_path / "b").exists()


def test_damage_is_named_by_file(tmp_path: Path) -> None:
    original = write(tmp_path / "out").path

    def damaged(name: str) -> Path:
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        shutil.copytree(original, tmp_path / "copy")
        return tmp_path / "copy" / name

    weights = damaged("model.safetensors")
    flipped = bytearray(weights.read_bytes())
    flipped[500] ^= 1
    weights.write_bytes(flipped)
    assert "sha256" in refusal(tmp_path / "copy").message
    assert refusal(tmp_path / "copy").where == str(weights)
    Artifact.open(tmp_path / "copy", check=False)

    weights = damaged("model.safetensors")
    weights.write_bytes(bytes(999))
    assert "999 bytes instead of 1000" in refusal(tmp_path / "copy").message

    file = damaged("config.json")
    file.unlink()
    assert refusal(tmp_path / "copy").where == str(file)
    assert "missing" in refusal(tmp_path / "copy").message

    file = damaged("run/more.txt")
    file.write_text("")
    assert refusal(tmp_path / "copy").where == str(file)
    assert "does not list" in refusal(tmp_path / "copy").message

    file = damaged("config.json")
    file.unlink()
    file.symlink_to(original / "config.json")
    assert "no links" in refusal(tmp_path / "copy").message

    damaged("pytorch_model.bin").write_bytes(b"")
    assert "pickled" in refusal(tmp_path / "copy").message

    os.mkfifo(damaged("pipe"))
    assert "plain file" in refusal(tmp_path / "copy").message


def test_a_wrong_manifest_is_explained(tmp_path: Path) -> None:
    out = write(tmp_path / "out").path
    file = out / "manifest.json"
    good = file.read_text()

    rewrite(out, schema_version=2)
    assert "newer Lexmill: schema version 2" in refusal(out).message
    assert "pip install -U" in (refusal(out).hint or "")
    file.write_text(good)
    rewrite(out, surprise=1)
    assert "'surprise'" in refusal(out).message
    file.write_text(good)
    rewrite(out, task={"name": 3})
    assert "'task.name'" in refusal(out).message
    file.write_text(good)
    rewrite(out, files={"../../etc/passwd": {"sha256": "0" * 64, "bytes": 1}})
    assert "not a path inside" in refusal(out, check=False).message
    file.write_text(good[:100])
    assert "not valid JSON" in refusal(out).message
    assert (refusal(out).where or "").startswith(f"{file}:")
    file.write_bytes(b"\xff\xfe\x00")
    assert "not valid JSON" in refusal(out).message
    file.write_text("[" * 100_000)
    assert "not valid JSON" in refusal(out).message
    file.write_text("{}")
    assert "no schema_version" in refusal(out).message


def test_other_paths_are_explained(tmp_path: Path) -> None:
    assert "no such directory" in refusal(tmp_path / "nothing").message
    (tmp_path / "file").write_text("")
    assert "a file, not" in refusal(tmp_path / "file").message
    assert "not an artefact" in refusal(tmp_path).message
    (tmp_path / "config.json").write_text("{}")
    assert is_huggingface(tmp_path)
    assert "Hugging Face" in refusal(tmp_path).message
    assert not is_huggingface(write(tmp_path / "out").path)


def test_a_derived_artefact_carries_files_and_history_on(tmp_path: Path) -> None:
    source = write(tmp_path / "a")
    before = {name: source.file(name).read_bytes() for name in source.manifest.files}
    with source.derive(tmp_path / "b", Transform(name="prune", effect={"accuracy": -0.01})) as writer:
        assert writer.manifest is not None
        writer.path("model.safetensors").write_bytes(bytes(10))
        writer.manifest = writer.manifest.model_copy(update={"weights": {}})
    derived = Artifact.open(tmp_path / "b")
    assert [step.name for step in derived.manifest.history] == ["fit", "prune"]
    assert derived.manifest.metrics == source.manifest.metrics
    assert list(derived.manifest.files) == ["config.json", "model.safetensors"]
    assert derived.manifest.files["model.safetensors"].bytes == 10
    assert {name: Artifact.open(tmp_path / "a").file(name).read_bytes() for name in before} == before


def test_card_and_description_tell_the_main_things(tmp_path: Path) -> None:
    artifact = write(tmp_path / "out")
    card = render_card(artifact.manifest, "runs/out")
    assert card.startswith("# runs/out\n\nA model for the task **classify**")
    assert "## Labels of intent (2)\n\n`card`, `` a|b`c ``\n" in card
    assert "| accuracy | 0.9250 | 0.9100 to 0.9400 |\n| ece | 0.0200 |  |\n" in card
    assert "1. fit, " in card
    assert "lexmill predict runs/out DATA" in card
    assert "\n\n\n" not in card
    bare = render_card(Manifest(task=TaskRecord(name="generate")), "x")
    assert "Nothing was measured" in bare
    assert "\n\n\n" not in bare
    lines = "\n".join(describe(artifact))
    for part in ("classify", "intent: 2", "accuracy 0.9250 (95 %: 0.9100 to 0.9400)", "fit: seconds 12.5", "1.0 kB"):
        assert part in lines
    assert (
        json.loads(json.dumps(summary(artifact)))["files"]["config.json"]
        == FileRecord(sha256="44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a", bytes=2).model_dump()
    )


FULL_DISK = """
import sys
from collections.abc import Callable
from pathlib import Path
from lexmill.artifact import Manifest, TaskRecord, create
from lexmill.errors import Failure
import numpy as np
from safetensors.numpy import save_file

root = Path(sys.argv[1])

def attempt(name, fill):
    try:
        with create(root / name, discard_on_error=True) as writer:
            fill(writer)
            writer.manifest = Manifest(task=TaskRecord(name="classify", state={"x": "y" * 200_000}))
    except Failure as error:
        assert error.message == "disk full", error
        assert error.where == str(root / (name + ".partial")), error
    else:
        raise SystemExit(f"{name}: the disk was not full")
    assert not (root / name).exists()

attempt("bytes", lambda writer: writer.path("big").write_bytes(bytes(200_000)))
attempt("tensors", lambda writer: save_file({"a": np.zeros(200_000)}, writer.path("m.safetensors")))
attempt("manifest", lambda writer: writer.path("small").write_bytes(b"x"))
"""


def test_a_full_disk_is_named_and_leaves_no_artefact(tmp_path: Path) -> None:
    namespace = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    if not shutil.which("unshare") or subprocess.run([*namespace, "true"], capture_output=True).returncode:
        pytest.skip("needs a mount namespace for a small disk")
    mount = 'mount -t tmpfs -o size=128k tmpfs "$1" && exec "$0" -c "$2" "$1"'
    done = subprocess.run(
        [*namespace, mount, sys.executable, str(tmp_path), FULL_DISK], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_room_does_not_import_torch() -> None:
    code = "import sys, lexmill.artifact; assert not {'torch', 'jinja2'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
