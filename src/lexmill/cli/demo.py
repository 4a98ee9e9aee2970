"""`lexmill demo`: the main job on bundled data, told in plain words."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from lexmill.data.bundled import banking77
from lexmill.errors import Failure
from lexmill.fit import DataConfig, FitConfig, FitResult, Watch, fit
from lexmill.train import TrainConfig

QUESTIONS = (
    "My card still has not arrived, it has been two weeks!",
    "why was i charged a fee for taking out cash abroad?",
    "How do I change the PIN of my card?",
)


def demo(out: Path, *, epochs: int, watch: Watch) -> None:
    """Fit, verify, serve and ask. Raises `Failure` where the served answers could not be had or do not verify."""
    say = Console(highlight=False, soft_wrap=True).print
    started = time.perf_counter()
    train, test = banking77()
    say("[bold]1. Fine-tune[/] MiniLM-L6 (22.7 M parameters) on BANKING77: 10,003 questions to a bank, 77 intents.")
    # Batches by length: some seconds faster, which is what a first look is short of.
    config = FitConfig(DataConfig(train, test=test), train=TrainConfig(epochs=epochs, length_window=50))
    result = fit(config, out, watch=watch)
    _tell_quality(say, result)
    say("\n[bold]3. Verify[/]: is what was trained what is stored, and what is served?")
    from lexmill.verify import verify

    found = verify(out)
    for line in found.lines():
        say(f"   {line}", markup=False)
    if not found.ok:
        raise Failure("the artefact does not verify", where=str(out))
    say("\n[bold]4. Serve it[/] on 127.0.0.1 and ask three questions over HTTP:")
    _ask(say, out)
    report = out / "run" / "report.html"
    say(f"\n[bold]Done[/] in {time.perf_counter() - started:.0f} s. The report with plots: {report}")
    say("\nWhat to type next:", markup=False)
    for line in (
        f"lexmill show {out}                      what it is, was made from and can do",
        f'echo "I lost my phone" | lexmill predict {out}',
        f"lexmill serve {out}                     then POST texts to http://127.0.0.1:8100/v1/classify",
        "lexmill check YOUR.csv                      what is in your own data",
        "lexmill fit YOUR.csv --out runs/yours       your own model",
    ):
        say(f"   {line}", markup=False)


def _tell_quality(say: Callable[..., Any], result: FitResult) -> None:
    test = result.test
    assert test is not None, "the demo gives test rows"
    low, high = test["intervals"]["accuracy"]
    say(
        f"\n[bold]2. Evaluate[/] on {test['rows']:,} test questions it has not seen: {test['accuracy']:.1%} right "
        f"(95 % confidence interval {low:.1%} to {high:.1%}), macro-F1 {test['macro_f1']:.3f}."
    )
    speed = result.training
    say(
        f"   Training ran at {speed['examples_per_second']:.0f} questions/s, {speed['ceiling_share']:.0%} of what this "
        f"machine's matrix multiplication can do, and computed {speed['positions_per_token']:.2f} positions a token."
    )


def _ask(say: Callable[..., Any], out: Path) -> None:
    from lexmill.verify.processes import ask, served

    with served(out, timeout=60) as url:
        answers = ask(f"{url}/v1/classify", {"texts": list(QUESTIONS)}, timeout=60)
    for question, answer in zip(QUESTIONS, answers, strict=True):
        say(f"   {question!r} → {answer['label']} ({answer['score']:.0%})", markup=False)
