"""What an import and `--help` cost, and what the package shows."""

from __future__ import annotations

import subprocess
import sys

import pytest

import lexmill
from lexmill.cli import VERBS, function_of

HEAVY = {"torch", "numpy", "pydantic", "rich", "tokenizers", "pyarrow", "safetensors", "jinja2"}


def imported(code: str) -> set[str]:
    """The top-level modules that a fresh process has imported after this code."""
    ending = "import sys; print('|' + ' '.join({name.partition('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", f"{code}\n{ending}"], capture_output=True, text=True, check=True)
    return set(done.stdout.rpartition("|")[2].split())


def test_importing_the_package_imports_nothing_heavy() -> None:
    assert not HEAVY & imported("import lexmill; lexmill.UserError")


def test_help_imports_nothing_heavy() -> None:
    code = "import sys; sys.argv = ['lexmill', '--help']\nfrom lexmill.cli import main"
    assert not HEAVY & imported(f"{code}\ntry: main()\nexcept SystemExit: pass")


def test_looking_at_data_imports_no_torch() -> None:
    assert "torch" not in imported("import lexmill as lm\nfrom lexmill.data import banking77\nlm.check(banking77()[1])")


@pytest.mark.parametrize("verb", ["fit", "check", "combine", "show", "evaluate", "predict", "verify", "serve", "demo"])
def test_help_lists_every_verb(verb: str) -> None:
    from tests.cli.conftest import lexmill as cli

    assert verb in cli("--help").out
    assert "Usage" in cli(verb, "--help").out


def test_the_public_surface() -> None:
    assert lexmill.__all__ == [
        "Failure", "MissingExtra", "OpenArtifact", "UserError", "augment", "check", "combine", "compare", "compress",
        "evaluate", "export", "fit", "import_gguf", "import_pretrained", "label", "load", "mine", "search", "serve",
        "tokenizer", "verify",
    ]  # fmt: skip
    assert set(lexmill.__all__) <= set(dir(lexmill))
    for name in lexmill.__all__:
        assert callable(getattr(lexmill, name))
        assert getattr(lexmill, name).__doc__


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'predikt'"):
        lexmill.predikt  # noqa: B018


def test_a_verb_stays_a_function_whatever_was_imported_before() -> None:
    verbs = ("fit", "evaluate", "serve", "verify")
    lines = [f"import lexmill.{verb}; from lexmill.{verb} import {verb} as room_{verb}" for verb in verbs]
    lines += [f"assert lexmill.{verb}.__module__ == 'lexmill.api'" for verb in verbs]
    subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True)


@pytest.mark.parametrize("verb", VERBS)
def test_help_lists_each_verb_with_the_start_of_its_docstring(verb: str) -> None:
    _, line = VERBS[verb]
    documented = function_of(verb).__doc__
    assert documented is not None
    assert documented.strip().startswith(line)
