"""What an answer says while it is being written: its text so far, told piece by piece, until a stop string comes."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer

from lexmill.models import Generated
from lexmill.tasks.base import Hear

_HALF = "�"
"""What the bytes of an unfinished character decode to."""


class Speaker:
    """Follows one answer as its tokens come; called after each, it says whether the answer is to end.

    Args:
        end: the token that ends an answer; not part of its text.
        stop: strings that end an answer; neither they nor what follows is part of its text.
        hear: is told the text in pieces, never more of it than is sure to stay.
    """

    def __init__(self, tokenizer: Tokenizer, end: int, stop: Sequence[str] = (), hear: Hear | None = None) -> None:
        self._tokenizer = tokenizer
        self._end = end
        self._stop = tuple(stop)
        self._hear = hear
        self._told = 0
        self.stopped = False

    def __call__(self, so_far: Generated) -> bool:
        if not self._stop and self._hear is None:
            return False
        text = self.text(so_far)
        return self.stopped or not self._tell(text[: len(text) - self._unsure(text)])

    def text(self, so_far: Generated) -> str:
        """The text of these tokens, cut before the first stop string."""
        text = self._tokenizer.decode([token for token in so_far.ids if token != self._end])
        places = [place for stop in self._stop if (place := text.find(stop)) >= 0]
        self.stopped = bool(places)
        return text[: min(places)] if places else text

    def finish(self, so_far: Generated) -> str:
        """The whole text; what was not told yet is told now."""
        text = self.text(so_far)
        self._tell(text)
        return text

    def _tell(self, text: str) -> bool:
        """Whether anybody still listens, or nobody was meant to."""
        piece, self._told = text[self._told :], max(self._told, len(text))
        return self._hear is None or not piece or self._hear(piece)

    def _unsure(self, text: str) -> int:
        """How many characters at the end may still change, or begin a stop string."""
        if self.stopped:
            return 0
        if text.endswith(_HALF):
            return len(text) - len(text.rstrip(_HALF))
        begun = (n for stop in self._stop for n in range(1, len(stop)) if text.endswith(stop[:n]))
        return max(begun, default=0)
