"""A teacher, and rows that it answers: real parts, small."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from tests.small_classifier import LABELS, small_classifier, small_tokenizer, write_artifact

from lexmill.compress import Material
from lexmill.engine import Loaded, TorchEngine
from lexmill.engine.loaded import load
from lexmill.evaluate import answered
from lexmill.models import weights_digest


def texts(count: int, seed: int = 0) -> list[str]:
    """Short texts of words of the small tokenizer."""
    words = [word for word in small_tokenizer().get_vocab() if word.isalpha() and len(word) > 3]
    random = np.random.default_rng(seed)
    return [" ".join(random.choice(sorted(words), random.integers(2, 9))) for _ in range(count)]


def rows_of(teacher: Loaded, count: int, seed: int = 0) -> list[dict[str, str]]:
    """Texts with the labels that the teacher gives them."""
    asked = [{"question": text} for text in texts(count, seed)]
    _, answers = answered(TorchEngine(teacher), asked)
    return [{**row, "intent": LABELS[int(one["label"].argmax())]} for row, one in zip(asked, answers, strict=True)]


def material_of(*teachers: Loaded, train: int = 96, unlabelled: int = 0) -> Material:
    first = teachers[0] if teachers else small_classifier()
    return Material(
        teachers=teachers,
        train=rows_of(first, train),
        validation=rows_of(first, 64, seed=1),
        unlabelled=[{"question": text} for text in texts(unlabelled, seed=2)],
    )


def assert_reloads(loaded: Loaded, folder: Path) -> None:
    """What is written and read again has the same weights, bit for bit, and gives the same answers in an engine."""
    again = load(write_artifact(loaded, folder / "out"))
    assert weights_digest(again.model) == weights_digest(loaded.model)
    asked = [{"question": text} for text in texts(12, seed=3)]
    found = [[one["label"] for one in answered(TorchEngine(each), asked)[1]] for each in (again, loaded)]
    np.testing.assert_array_equal(*found)
