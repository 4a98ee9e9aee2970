"""A GGUF file: its settings and tensors. The PyPI package `gguf` reads and dequantises, one tensor at a time."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from lexmill.errors import MissingExtra, UserError

_BROKEN = "the file is broken or incomplete: fetch it again"


class Source:
    """An open GGUF file. Tensors stay on disk until they are read.

    Raises:
        UserError: no such file, not GGUF, truncated, of the other byte order, or one part of several.
        MissingExtra: the package `gguf` is not installed.
    """

    def __init__(self, path: Path) -> None:
        try:
            import gguf
        except ModuleNotFoundError as error:
            raise MissingExtra("gguf", "reading a GGUF file") from error
        if not path.is_file():
            raise UserError("no such file", where=str(path), hint="give a .gguf file")
        self.path = path
        try:
            self._reader = gguf.GGUFReader(path)
        except (ValueError, KeyError, IndexError, OverflowError, TypeError) as error:
            raise UserError(f"not a readable GGUF file: {error}", where=str(path), hint=_BROKEN) from error
        self._dequantise = gguf.quants.dequantize
        if self._reader.byte_order != "I":
            raise UserError("has the byte order of another machine", where=str(path), hint="convert it there")
        if self.get("split.count", int, 1) > 1:
            raise UserError("is one part of several", where=str(path), hint="merge them with `gguf-split --merge`")
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}

    @property
    def keys(self) -> list[str]:
        """The names of all settings."""
        return list(self._reader.fields)

    @property
    def names(self) -> list[str]:
        """The names of all tensors."""
        return list(self._tensors)

    @property
    def kinds(self) -> dict[str, int]:
        """How many tensors are stored in which kind of number, e.g. `Q4_1`."""
        return dict(Counter(tensor.tensor_type.name for tensor in self._reader.tensors))

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """A setting of this type, or `default`; without one a missing setting is a `UserError`, as is a wrong type."""
        field = self._reader.fields.get(key)
        if field is None:
            if default is None:
                raise UserError(f"lacks the setting '{key}'", where=str(self.path), hint=_BROKEN)
            return default
        value = field.contents()
        if kind is float and isinstance(value, (float, int)):
            return float(str(np.float32(value)))  # the number that was meant: 1e-05, not 9.999999747378752e-06
        if not isinstance(value, kind):
            found = type(value).__name__
            raise UserError(f"'{key}' is {found}, must be {kind.__name__}", where=str(self.path), hint=_BROKEN)
        return value

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, outermost axis first."""
        return tuple(int(size) for size in reversed(self._tensors[name].shape))

    def read(self, name: str) -> Float[np.ndarray, "*shape"]:
        """One tensor, dequantised to float32. A kind of number that cannot be is a `UserError`."""
        tensor = self._tensors[name]
        try:
            values = self._dequantise(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise UserError(
                f"the tensor '{name}' is quantised as {tensor.tensor_type.name}, which cannot be read",
                where=str(self.path),
                hint="take another quantisation of the model, e.g. Q8_0 or Q4_K_M",
            ) from error
        return np.ascontiguousarray(values, np.float32).reshape(self.shape(name))
