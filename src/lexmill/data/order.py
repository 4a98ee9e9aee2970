"""The order of the data, as a function of (seed, epoch, index) alone."""

from __future__ import annotations

import hashlib

import numpy as np
from jaxtyping import Int, UInt64

from lexmill.data.draws import mix

_ROUNDS = 8
_AHEAD = 64
"""Batches that are found together at least: permuting a few positions costs as much as permuting thousands."""


def _keys(*parts: int | str) -> UInt64[np.ndarray, "round"]:
    text = ":".join(map(str, parts)).encode()
    return np.frombuffer(hashlib.blake2b(text, digest_size=8 * _ROUNDS).digest(), dtype="<u8")


def permute(positions: Int[np.ndarray, "n"], size: int, *key: int | str) -> Int[np.ndarray, "n"]:
    """Where a keyed pseudo-random permutation of `range(size)` takes `positions`.

    A Feistel network (Luby and Rackoff, 1988) over the next power of two, walked along its cycle until it lands in
    the range (Black and Rogaway, 2002): no array of `size` is ever made.
    """
    bits = max(2, (size - 1).bit_length())
    low = np.uint64(bits // 2)
    low_mask = np.uint64((1 << (bits // 2)) - 1)
    high_mask = np.uint64((1 << (bits - bits // 2)) - 1)
    keys = _keys(*key)
    out = np.asarray(positions).astype(np.uint64)
    outside = np.arange(len(out))
    while len(outside):
        left, right = out[outside] >> low, out[outside] & low_mask
        for turn, round_key in enumerate(keys):
            if turn % 2:
                right ^= mix(left ^ round_key) & low_mask
            else:
                left ^= mix(right ^ round_key) & high_mask
        out[outside] = (left << low) | right
        outside = outside[out[outside] >= size]
    return out.astype(np.int64)


class Order:
    """Which examples each optimiser step sees. Every epoch is a permutation of all examples.

    With `lengths`, an epoch's permutation is taken in windows of `window * batch_size` examples; each is sorted by
    length and cut into batches, which come in random order, so that the texts of a batch are nearly equal in length.
    Finding a batch costs a few windows at most, whatever the number of examples.

    Args:
        num_examples: how many there are, at least 1.
        batch_size: examples a step; an epoch has one smaller batch where it does not divide `num_examples`.
        seed: orders of different seeds are unrelated.
        lengths: tokens of each example.
        window: batches a window.
    """

    def __init__(
        self,
        num_examples: int,
        batch_size: int,
        seed: int,
        lengths: Int[np.ndarray, "example"] | None = None,
        window: int = 50,
    ) -> None:
        if num_examples < 1 or batch_size < 1 or window < 1:
            raise ValueError("num_examples, batch_size and window must be at least 1")
        if lengths is not None and len(lengths) != num_examples:
            raise ValueError(f"{len(lengths)} lengths for {num_examples} examples")
        self.num_examples = num_examples
        self.batch_size = batch_size
        self.seed = seed
        self.steps_per_epoch = -(-num_examples // batch_size)
        self._lengths = lengths
        self._window = 1 if lengths is None else window
        self._span = -(-_AHEAD // self._window) * self._window
        self._last: tuple[tuple[int, int], list[np.ndarray]] = ((-1, -1), [])

    def batch(self, step: int) -> Int[np.ndarray, "example"]:
        """The examples of global optimiser step `step`, counted from 0 over all epochs."""
        if step < 0:
            raise ValueError(f"step {step} is negative")
        epoch, index = divmod(step, self.steps_per_epoch)
        span, place = divmod(index, self._span)
        if self._last[0] != (epoch, span):
            self._last = ((epoch, span), self._cut(epoch, span))
        return self._last[1][place].copy()

    def _cut(self, epoch: int, span: int) -> list[np.ndarray]:
        """The batches of some windows that follow each other."""
        size, window_size = self._span * self.batch_size, self._window * self.batch_size
        positions = np.arange(span * size, min((span + 1) * size, self.num_examples))
        examples = permute(positions, self.num_examples, self.seed, epoch, "examples")
        first = span * (self._span // self._window)
        windows = (examples[at : at + window_size] for at in range(0, len(examples), window_size))
        return [batch for at, of in enumerate(windows) for batch in self._batches(epoch, first + at, of)]

    def _batches(self, epoch: int, window: int, examples: Int[np.ndarray, "example"]) -> list[np.ndarray]:
        if self._lengths is not None:
            examples = examples[np.argsort(self._lengths[examples], kind="stable")]
        batches = [examples[at : at + self.batch_size] for at in range(0, len(examples), self.batch_size)]
        if len(batches) == 1:
            return batches
        turns = permute(np.arange(len(batches)), len(batches), self.seed, epoch, "batches", window)
        return [batches[turn] for turn in turns]


class BalancedOrder:
    """As `Order`, with every class drawn equally often: rare ones many times over, frequent ones in part.

    Slots go round the classes in an order permuted each round; a class's examples come in permutations of their own,
    each whole before the next begins.

    Args:
        classes: the class of each example, from 0.
        batch_size, seed: see `Order`.
    """

    def __init__(self, classes: Int[np.ndarray, "example"], batch_size: int, seed: int) -> None:
        if not len(classes) or batch_size < 1:
            raise ValueError("there must be examples, and a batch_size of at least 1")
        self.num_examples = len(classes)
        self.batch_size = batch_size
        self.seed = seed
        self.steps_per_epoch = -(-self.num_examples // batch_size)
        by_class = np.argsort(classes, kind="stable")
        cuts = np.flatnonzero(np.diff(classes[by_class])) + 1
        self._members = np.split(by_class, cuts)

    @property
    def num_classes(self) -> int:
        return len(self._members)

    def batch(self, step: int) -> Int[np.ndarray, "example"]:
        """The examples of global optimiser step `step`, counted from 0 over all epochs."""
        if step < 0:
            raise ValueError(f"step {step} is negative")
        epoch, index = divmod(step, self.steps_per_epoch)
        start = epoch * self.num_examples + index * self.batch_size
        stop = min(start + self.batch_size, (epoch + 1) * self.num_examples)
        return np.array([self._draw(slot) for slot in range(start, stop)], dtype=np.int64)

    def _draw(self, slot: int) -> int:
        turn, place = divmod(slot, self.num_classes)
        chosen = int(permute(np.array([place]), self.num_classes, self.seed, "classes", turn)[0])
        members = self._members[chosen]
        again, at = divmod(turn, len(members))
        return int(members[permute(np.array([at]), len(members), self.seed, "members", chosen, again)[0]])
