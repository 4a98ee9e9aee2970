"""Every runtime by its name, and the one seam that opens an artefact in one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from lexmill.artifact import Artifact
from lexmill.engine.compiled_engine import CompiledEngine
from lexmill.engine.loaded import Loaded
from lexmill.engine.onnx_engine import OnnxEngine
from lexmill.engine.openvino_engine import OpenVinoEngine
from lexmill.engine.runtime import Runtime
from lexmill.engine.torch_engine import TorchEngine
from lexmill.errors import UserError


class Kind(Protocol):
    """What each class of a runtime offers."""

    @property
    def runtime(self) -> str: ...

    @property
    def form(self) -> str | None: ...

    @property
    def slow_to_open(self) -> bool: ...

    def __call__(
        self,
        source: Artifact | Path | str | Loaded,
        *,
        file: Path | None = None,
        device: str = "cpu",
        token_budget: int | None = None,
        threads: int | None = None,
    ) -> Runtime: ...

    def is_installed(self) -> bool: ...

    def takes(self, artifact: Artifact) -> bool: ...


RUNTIMES: Mapping[str, Kind] = {one.runtime: one for one in (TorchEngine, CompiledEngine, OnnxEngine, OpenVinoEngine)}
DEFAULT = TorchEngine.runtime


def find_runtime(name: str, where: str | None = None) -> Kind:
    """The runtime of this name. A `UserError` for an unknown one lists the known ones."""
    if name not in RUNTIMES:
        raise UserError(f"unknown runtime '{name}'", where=where, hint=f"known runtimes: {', '.join(RUNTIMES)}")
    return RUNTIMES[name]


def runtime_of(artifact: Artifact, runtime: str | None = None) -> str:
    """The name of what answers for an artefact: the runtime given, or the one its manifest names, or torch."""
    if runtime is not None:
        return find_runtime(runtime).runtime
    stated = artifact.manifest.runtime
    return DEFAULT if stated is None else find_runtime(stated, str(artifact.path / "manifest.json")).runtime


def open_engine(source: Artifact | Path | str | Loaded, runtime: str | None = None, **options: Any) -> Runtime:
    """The engine that answers for an artefact.

    Args:
        source: an artefact, its path, or what is in memory, which torch answers for where nothing is named.
        runtime: by name; what the manifest names where None, torch where it names none.
        options: `file`, `device`, `token_budget`, `threads`, as the engine of the runtime takes them.

    Raises:
        MissingExtra: what it needs is not installed.
        UserError: the runtime is unknown or cannot run this artefact, or that cannot be read.
    """
    if isinstance(source, Loaded):
        return find_runtime(runtime or DEFAULT)(source, **options)
    if runtime is not None:
        find_runtime(runtime)
    artifact = source if isinstance(source, Artifact) else Artifact.open(Path(source))
    return find_runtime(runtime_of(artifact, runtime))(artifact, **options)


def available_runtimes(artifact: Artifact | None = None) -> list[str]:
    """The names of the runtimes whose packages are installed, and which take this artefact where one is given."""
    installed = [one for one in RUNTIMES.values() if one.is_installed()]
    return [one.runtime for one in installed if artifact is None or one.takes(artifact)]
