"""The runtime `compiled`: the model in torch, as kernels that torch.compile makes of it."""

from __future__ import annotations

import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lexmill.artifact import Artifact
from lexmill.data.batch import collate
from lexmill.engine.base import Work
from lexmill.engine.loaded import Loaded, described_adapters, load
from lexmill.engine.probes import probe_records
from lexmill.engine.runtime import Item, Runtime
from lexmill.engine.torch_engine import budget_for, products_of
from lexmill.errors import Failure, UserError
from lexmill.models import Model
from lexmill.models.exits import Exits
from lexmill.nn.layout import Layout, Packed
from lexmill.nn.pooling import Pooling

_WARM = 4
"""Texts of different lengths that a model is compiled for, then for one of them alone."""
_INSTEAD = "run it in torch: --engine torch"


class CompiledModel:
    """A model whose forward pass is compiled once for one sequence and once for several, packed, of any lengths.

    Weights are taken as they are: a change of them later is not seen.
    """

    def __init__(self, model: Model) -> None:
        self._model = model
        self.sizes: list[int] = []
        """Operators of every graph that has run."""
        self.calls = 0
        options: dict[str, Any] = {"backend": self._backend, "dynamic": True}
        if "isolate_recompiles" in signature(torch.compile).parameters:  # not before torch 2.13
            options["isolate_recompiles"] = True
        self._run: Callable[..., dict[str, Tensor]] = torch.compile(model.__call__, **options)
        self._pool: Callable[..., Tensor] = torch.compile(model.pooled, **options)

    @property
    def device(self) -> torch.device:
        return self._model.device

    def __call__(
        self,
        ids: Int[Tensor, "tok"],
        positions: Int[Tensor, "tok"],
        layout: Layout,
        *,
        types: Int[Tensor, "tok"] | None = None,
        heads: Sequence[str] | None = None,
    ) -> dict[str, Float[Tensor, "*some_rows out"]]:
        """As `Model.forward`, for packed sequences."""
        return self._run(ids, positions, _settled(layout), types=types, heads=heads)

    def pooled(
        self,
        ids: Int[Tensor, "tok"],
        positions: Int[Tensor, "tok"],
        layout: Layout,
        *,
        types: Int[Tensor, "tok"] | None = None,
        how: Pooling | None = None,
    ) -> Float[Tensor, "seq dim"]:
        """As `Model.pooled`."""
        return self._pool(ids, positions, _settled(layout), types=types, how=how)

    def __getattr__(self, name: str) -> Any:
        hint = "classify, tag, rank, embed and answer can be; run this one in torch"
        raise UserError("what this task asks of its model is more than one pass", where="compiled", hint=hint)

    def _backend(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        from torch._inductor.compile_fx import compile_fx

        size = sum(node.op.startswith("call_") for node in graph.graph.nodes)
        run = cast("Callable[..., Any]", compile_fx(graph, inputs))
        seen = False

        def counted(*given: Any) -> Any:
            nonlocal seen
            self.calls += 1
            if not seen:  # of what torch traced twice only one runs
                self.sizes.append(size)
                seen = True
            return run(*given)

        return counted if size else graph.forward


def _settled(layout: Layout) -> Packed:
    """The layout with all worked out beforehand that depends on its lengths as numbers, which a graph leaves open."""
    assert isinstance(layout, Packed)
    for one in (layout, layout.single):
        _ = one.max_length, one.first, one.last, one.padded, one.sequence, one.side_by_side.lengths
    return layout


class CompiledEngine(Runtime):
    """An `Engine` on a compiled model, which opening it takes half a minute or more to make. What is compiled knows
    nothing of the number of texts or their lengths; attention alone is padded, to the longest of a micro-batch.

    Args:
        source: an artefact, its path, or what is in memory (which is set to evaluation mode).
        file: None; the model is where the source says.
        device: where the model runs.
        token_budget: as of `TorchEngine`.
        threads: threads of torch in this process; as torch has them where None.

    Raises:
        UserError: the task asks for more than one pass, or the model has several adapters or early exits; there is no
            C++ compiler.
        Failure: torch could compile no part of the model.
    """

    runtime: ClassVar[str] = "compiled"
    slow_to_open: ClassVar[bool] = True

    def __init__(
        self,
        source: Artifact | Path | str | Loaded,
        *,
        file: Path | None = None,
        device: str = "cpu",
        token_budget: int | None = None,
        threads: int | None = None,
    ) -> None:
        if file is not None:
            raise ValueError("this runtime reads the model of an artefact, and no other file")
        if threads is not None:
            torch.set_num_threads(threads)
        loaded = source if isinstance(source, Loaded) else load(source)
        if loaded.adapters or isinstance(loaded.model.trunk.exits, Exits):
            what = "a model with several adapters" if loaded.adapters else "a model with early exits"
            raise UserError(f"{what} is not compiled", where=loaded.name, hint="run it in torch")
        budget = budget_for(torch.device(device)) if token_budget is None else token_budget
        super().__init__(loaded, budget)
        loaded.model.to(device).eval()
        self._compiled = CompiledModel(loaded.model)
        self._work, self._eager = Work(), 0
        self._breaks: dict[str, int] = {}
        began = time.perf_counter()
        self._warm_up()
        self._seconds = time.perf_counter() - began

    @classmethod
    def is_installed(cls) -> bool:
        """Whether there is a C++ compiler, which torch needs for it."""
        return _compiler() is None

    @classmethod
    def takes(cls, artifact: Artifact) -> bool:
        structure = cast("Mapping[str, Mapping[str, Any]]", artifact.manifest.structure)
        kinds = [one["kind"] for key in ("additions", "heads") for one in structure.get(key, {}).values()]
        return not described_adapters(artifact) and not {"exits", "lm"} & set(kinds)

    @property
    def work(self) -> Work:
        return self._work

    @property
    def record(self) -> Mapping[str, Any]:
        """`graphs` that have run and their `operators`; `breaks`, why torch left parts between graphs uncompiled, and
        how often; `eager`, forward passes in which no graph ran; `seconds` that opening took for compiling."""
        return {
            "runtime": self.runtime,
            "version": torch.__version__,
            "device": str(self._loaded.model.device),
            "graphs": len(self._compiled.sizes),
            "operators": sum(self._compiled.sizes),
            "breaks": self._breaks,
            "eager": self._eager,
            "seconds": self._seconds,
            "products": products_of(self._loaded.model),
        }

    @torch.inference_mode()
    def _warm_up(self) -> None:
        import torch._dynamo.utils as dynamo
        import torch._inductor.config as inductor
        from torch._dynamo.exc import TorchDynamoException

        if (fault := _compiler()) is not None:
            raise UserError("there is no C++ compiler, which torch.compile needs", where=fault, hint="install g++")
        loaded, records = self._loaded, probe_records(self._loaded.task)
        examples = loaded.task.encode(records, loaded.tokenizer, labelled=False)
        lengths = {sum(len(t.ids) for s in one.streams.values() for t in s): i for i, one in enumerate(examples)}
        chosen = [lengths[n] for n in sorted(lengths)[1 : _WARM + 1]]
        before = Counter(dynamo.counters["graph_break"])
        try:
            with inductor.patch(freezing=True):
                for rows in (chosen, chosen[-1:]):
                    batch, some = collate([examples[i] for i in rows]), [records[i] for i in rows]
                    # First as it is: layers in bytes then have their matrices ready, which graphs are to hold.
                    loaded.task.answer(loaded.model, batch, some, loaded.tokenizer)
                    loaded.task.answer(cast("Model", self._compiled), batch, some, loaded.tokenizer)
        except TorchDynamoException as fault:
            said = str(fault).strip().splitlines()[0]
            raise Failure(f"torch cannot compile this model: {said}", where=loaded.name, hint=_INSTEAD) from fault
        reasons = Counter(dynamo.counters["graph_break"]) - before
        self._breaks = {str(reason).splitlines()[0]: number for reason, number in reasons.items()}
        if not sum(self._compiled.sizes):
            raise Failure("torch could compile no part of this model", where=loaded.name, hint=_INSTEAD)

    def _forward(self, items: Sequence[Item]) -> list[Any]:
        loaded, records = self._loaded, [item.record for item in items]
        batch, hear = collate([item.example for item in items]), [item.hear for item in items]
        model, calls = cast("Model", self._compiled), self._compiled.calls
        if any(hear):
            found = loaded.task.speak(model, batch, records, loaded.tokenizer, hear)
        else:
            found = loaded.task.answer(model, batch, records, loaded.tokenizer)
        self._eager += self._compiled.calls == calls
        self._work = Work(self._work.tokens + batch.num_tokens, self._work.positions + batch.num_tokens)
        return found


def _compiler() -> str | None:
    """Where none is found, what was looked for."""
    asked = os.environ.get("CXX", "g++")
    return None if shutil.which(asked) or shutil.which("clang++") else asked
