"""A teacher, and rows that it answers: real parts, small."""

from __future__ import annotations

import numpy as np
from tests.small_classifier import LABELS, small_classifier, small_tokenizer

from lexmill.compress import Material
from lexmill.engine import Loaded, TorchEngine
from lexmill.evaluate import answered


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
