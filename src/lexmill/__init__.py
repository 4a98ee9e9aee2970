"""Lexmill: from text to a small, fast, monitored language service on the hardware people own.

`lm.fit`, `lm.load`, `lm.check`, `lm.tokenizer`, `lm.evaluate`, `lm.verify`, `lm.serve` and others mirror the verbs of
the command line. They are imported when first asked for, so that `import lexmill` costs nothing.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lexmill.api import (
        OpenArtifact,
        augment,
        check,
        combine,
        compare,
        compress,
        evaluate,
        export,
        fit,
        import_gguf,
        import_pretrained,
        label,
        load,
        mine,
        search,
        serve,
        tokenizer,
        verify,
    )
    from lexmill.errors import Failure, MissingExtra, UserError

__all__ = [
    "Failure",
    "MissingExtra",
    "OpenArtifact",
    "UserError",
    "augment",
    "check",
    "combine",
    "compare",
    "compress",
    "evaluate",
    "export",
    "fit",
    "import_gguf",
    "import_pretrained",
    "label",
    "load",
    "mine",
    "search",
    "serve",
    "tokenizer",
    "verify",
]

_ERRORS = ("Failure", "MissingExtra", "UserError")


class _Package(ModuleType):
    """Some rooms are called like a verb. The import system sets a room as an attribute of its package; the verb must
    stay what `lexmill.fit` means, whatever was imported before. `from lexmill.fit import …` is not concerned."""

    def __setattr__(self, name: str, value: object) -> None:
        if name in __all__ and isinstance(value, ModuleType):
            return
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    found = getattr(importlib.import_module("lexmill.errors" if name in _ERRORS else "lexmill.api"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
