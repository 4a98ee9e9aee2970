"""The special tokens that learning from running text needs, under the names that tokenizers have for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from tokenizers import Tokenizer

from lexmill.errors import UserError

_ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "[SEP]")
_MASKS = ("[MASK]", "<mask>")
_FIRSTS = ("[CLS]", "<s>")


@dataclass(frozen=True)
class Known:
    """What must be known of a tokenizer.

    Args:
        end, mask: ids of the token that ends a text, and of that which hides one; -1 for none.
        first: ids of what every block begins with.
        special: ids of all special tokens.
        size: how many tokens there are.
        sentinels: ids of what stands for the first span of a text, the second, and so on.
    """

    end: int
    mask: int
    first: tuple[int, ...]
    special: tuple[int, ...]
    size: int
    sentinels: tuple[int, ...] = ()

    @classmethod
    def of(cls, tokenizer: Tokenizer, *, end_token: str | None, masks: bool, spans: int) -> Self:
        """What this tokenizer has.

        Args:
            end_token: the first of the usual ones where None.
            masks: whether it must have a mask token, and may have one that texts begin with.
            spans: how many sentinels it must have.

        Raises:
            UserError: it lacks one of these.
        """
        end = _first_known(tokenizer, (end_token,) if end_token else _ENDS)
        if end is None:
            hint = "set options.end_token to a token of its own"
            raise UserError("the tokenizer knows no token that ends a text", where="options.end_token", hint=hint)
        mask = _first_known(tokenizer, _MASKS)
        if masks and mask is None:
            hint = f"train one that has it, with --special bert, or give a model that has {' or '.join(_MASKS)}"
            raise UserError("the tokenizer has no mask token", where="tokenizer", hint=hint)
        first = _first_known(tokenizer, _FIRSTS) if masks else None
        special = {index for index, token in tokenizer.get_added_tokens_decoder().items() if token.special} | {end}
        return cls(
            end,
            -1 if mask is None else mask,
            () if first is None else (first,),
            tuple(sorted(special)),
            tokenizer.get_vocab_size(),
            _sentinels(tokenizer, spans) if spans else (),
        )


def _first_known(tokenizer: Tokenizer, names: Sequence[str]) -> int | None:
    return next((found for name in names if (found := tokenizer.token_to_id(name)) is not None), None)


def _sentinels(tokenizer: Tokenizer, wanted: int) -> tuple[int, ...]:
    """At least as many as are wanted, named as in T5's or mT5's vocabulary."""
    found: list[int] = []
    while (name := f"<extra_id_{len(found)}>") and (known := _first_known(tokenizer, (name, f"▁{name}"))) is not None:
        found.append(known)
    if not found:
        hint = "train one that has them, with --special t5, or give the tokenizer of a T5"
        raise UserError("the tokenizer has no sentinels, such as <extra_id_0>", where="tokenizer", hint=hint)
    if len(found) < wanted:
        hint = "give a smaller options.max_length, or a larger options.mean_span"
        raise UserError(f"{len(found)} sentinels cannot stand for {wanted} spans", where="tokenizer", hint=hint)
    return tuple(found)
