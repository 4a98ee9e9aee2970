"""The format `executorch`: the forward pass as an ExecuTorch program, which phones and small boards run."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from lexmill.engine import Loaded, probes
from lexmill.engine.graph_model import MASK
from lexmill.errors import MissingExtra, UserError
from lexmill.export.base import Evidence, Format, register
from lexmill.export.graphs import ANSWERS, check_beside, write_beside
from lexmill.export.traced import Program, traced
from lexmill.models import Model
from lexmill.tasks import Record

FILE = "model.pte"


@dataclass(frozen=True)
class ExecuTorchOptions:
    """There is nothing to set."""


@register
class ExecuTorch(Format):
    """`model.pte` for one text of free length, `tokenizer.json`, `answers.json`. Room is set aside for the `longest`
    text that the task reads. Products and the like run in XNNPACK, the rest in portable kernels; `answers.json` counts
    both."""

    name = "executorch"
    about = "an ExecuTorch program from token ids to outputs, for phones and small boards"
    Options = ExecuTorchOptions

    def write(self, subject: Loaded, folder: Path, options: Any) -> Sequence[str]:
        with _tools():
            from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
            from executorch.devtools.backend_debug import get_delegation_info
            from executorch.exir import to_edge_transform_and_lower

            most, read = subject.model.trunk.max_tokens, subject.task.reading().get("max_length")
            longest = min(most, read or most)
            program, inputs = traced(subject, "an ExecuTorch program", batch=1, longest=longest)
            program = program.run_decompositions({torch.ops.aten.gelu.default: _tanh_gelu})
            lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
            spread = get_delegation_info(lowered.exported_program().graph_module)
            (folder / FILE).write_bytes(lowered.to_executorch().buffer)
        if not spread.num_delegated_nodes:
            raise UserError("XNNPACK takes nothing of this model", where="export", hint="export it in another format")
        spec = program.call_spec.out_spec
        assert spec is not None
        names = list(spec.unflatten(range(spec.num_leaves)))
        operators = {"xnnpack": spread.num_delegated_nodes, "portable": spread.num_non_delegated_nodes}
        write_beside(subject, folder, inputs=inputs, outputs=names, longest=longest, operators=operators)
        return [FILE]

    def evidence(self, subject: Loaded, file: Path, records: Sequence[Record]) -> list[Evidence]:
        check_beside(subject, file.parent)
        told = json.loads((file.parent / ANSWERS).read_text("utf-8"))
        stand_in = cast("Model", Program(_opened(file, told["inputs"], told["outputs"]), told["inputs"]))
        return probes.evidence(replace(subject, model=stand_in), records)


def _tanh_gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    """XNNPACK computes every GELU by the error function; one by tanh is written out for it, another left as it is."""
    if approximate == "none":
        return NotImplemented
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))


def _opened(file: Path, inputs: Sequence[str], outputs: Sequence[str]) -> Callable[..., Mapping[str, Tensor]]:
    """The program, for sequences side by side, of which it runs one after the other."""
    with _tools():
        from executorch.runtime import Runtime

        # The method holds what it needs of the program's memory, but not of the runtime's.
        program = Runtime.get().load_program(file)
        method = program.load_method("forward")
    if method is None:
        raise UserError("it has no method 'forward'", where=str(file), hint="export it again")

    def run(**given: Tensor) -> dict[str, Tensor]:
        mask, rows = given[MASK], list[Sequence[Tensor]]()
        for row, length in enumerate(mask.sum(1).tolist()):
            found = method.execute([given[name][row : row + 1, :length].contiguous() for name in inputs])
            # What it returns lies in memory that its next call writes to.
            rows.append([_padded(one.clone(), mask.shape[1]) if one.dim() == 3 else one.clone() for one in found])
        return {name: torch.cat(parts) for name, parts in zip(outputs, zip(*rows, strict=True), strict=True)}

    return run


def _padded(out: Tensor, length: int) -> Tensor:
    return F.pad(out, (0, 0, 0, length - out.shape[1]))


@contextmanager
def _tools() -> Generator[None]:
    """Their imports and passes warn of what they do themselves.

    Raises:
        MissingExtra: ExecuTorch is not installed.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            import_module("executorch.exir")
        except ImportError as error:
            raise MissingExtra("executorch", "exporting to ExecuTorch") from error
        yield
