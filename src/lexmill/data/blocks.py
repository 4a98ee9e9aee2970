"""Documents in blocks of equal length, as language models are trained on: run together, or each a sequence."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from lexmill.data.batch import IGNORE, Example, Tokens


def run_together(examples: Iterable[Example], size: int, first: Sequence[int] = ()) -> Iterator[Example]:
    """Lay the `source` sequences of examples end to end and cut them every `size` tokens; the last block is shorter.

    Token labels are cut alike; other labels, segment types and weights are left behind. At most one example and one
    block are held.

    Args:
        size: tokens a block, `first` among them.
        first: tokens that every block begins with, which have no labels.
    """
    room = size - len(first)
    if room < 1:
        raise ValueError(f"blocks of {size} tokens have no room after the first {len(first)}")
    held: dict[str, np.ndarray] = {}
    for example in examples:
        ids = np.concatenate([tokens.ids for tokens in example.streams["source"]])
        new = {"": ids, **example.token_labels}
        held = {name: np.concatenate([held[name], flat]) for name, flat in new.items()} if held else new
        whole = len(held[""]) // room * room
        for start in range(0, whole, room):
            yield _block({name: flat[start : start + room] for name, flat in held.items()}, first)
        held = {name: flat[whole:] for name, flat in held.items()}
    if held and len(held[""]):
        yield _block(held, first)


def side_by_side(examples: Iterable[Example], size: int, first: Sequence[int] = ()) -> Iterator[Example]:
    """Fill blocks of at most `size` tokens with documents that do not see each other: a sequence each, or several
    where one goes on in the next block.

    Args:
        size: tokens a block, the `first` of every sequence among them.
        first: tokens that every sequence begins with, which have no labels.
    """
    if size <= len(first):
        raise ValueError(f"blocks of {size} tokens have no room after the first {len(first)}")
    held: list[Example] = []
    room = size
    for example in examples:
        ids = np.concatenate([tokens.ids for tokens in example.streams["source"]])
        flat, start = {"": ids, **example.token_labels}, 0
        while start < len(ids):
            if room <= len(first):
                yield _joined(held)
                held, room = [], size
            stop = min(start + room - len(first), len(ids))
            held.append(_block({name: values[start:stop] for name, values in flat.items()}, first))
            room -= stop - start + len(first)
            start = stop
    if held:
        yield _joined(held)


def _joined(sequences: Sequence[Example]) -> Example:
    names = sequences[0].token_labels
    labels = {name: np.concatenate([one.token_labels[name] for one in sequences]) for name in names}
    return Example({"source": tuple(one.streams["source"][0] for one in sequences)}, token_labels=labels)


def _block(part: dict[str, np.ndarray], first: Sequence[int]) -> Example:
    ids = np.concatenate([np.array(first, np.int64), part[""]])
    blank = np.full(len(first), IGNORE, np.int64)
    labels = {name: np.concatenate([blank, flat]) for name, flat in part.items() if name}
    return Example({"source": (Tokens(ids),)}, token_labels=labels)
