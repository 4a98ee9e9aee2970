"""Training a tokenizer on text: byte-level BPE, WordPiece or Unigram, with the special tokens that families expect."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers.models import BPE, Unigram, WordPiece

from lexmill.data.columns import TEXTS, Role, find_columns
from lexmill.data.sources import open_source
from lexmill.errors import UserError

Kind = Literal["bpe", "wordpiece", "unigram"]
Special = Literal["bert", "gpt2", "roberta", "t5"]
_LONGEST_ROW = 1 << 28
"""Bytes: a row may be a book."""
_PIECE = 1 << 16
"""Characters of a text that are given to the library at once."""


@dataclass(frozen=True)
class TokenizerConfig:
    """What a tokenizer is made of.

    Args:
        kind: `bpe`, of bytes (Radford et al. 2019), `wordpiece` (Devlin et al. 2019), or `unigram` (Kudo 2018). The
            library gives the same BPE for the same text; ids of a WordPiece differ from run to run.
        vocab_size: tokens, special ones included.
        special: whose special tokens. Default: `gpt2` for BPE, `bert` for WordPiece, `t5` for Unigram.
        lowercase: whether upper case and accents are dropped. Default: for WordPiece only.
    """

    kind: Kind = "bpe"
    vocab_size: Annotated[int, Ge(1)] = 8000
    special: Special | None = None
    lowercase: bool | None = None


@dataclass(frozen=True)
class Style:
    """Special tokens by role, in the order of their ids, and where they stand around a text or a pair of texts."""

    roles: Mapping[str, str]
    single: str = ""
    pair: str = ""
    extra: tuple[str, ...] = ()

    @property
    def tokens(self) -> list[str]:
        return list(dict.fromkeys([*self.roles.values(), *self.extra]))


STYLES: dict[Special, Style] = {
    "bert": Style(
        {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"},
        "[CLS] $A [SEP]",
        "[CLS] $A [SEP] $B:1 [SEP]:1",
    ),
    "gpt2": Style({"bos": "<|endoftext|>", "eos": "<|endoftext|>"}),
    "roberta": Style(
        {"bos": "<s>", "pad": "<pad>", "eos": "</s>", "unk": "<unk>", "mask": "<mask>", "cls": "<s>", "sep": "</s>"},
        "<s> $A </s>",
        "<s> $A </s> </s> $B </s>",
    ),
    "t5": Style(
        {"pad": "<pad>", "eos": "</s>", "unk": "<unk>"},
        "$A </s>",
        "$A </s> $B </s>",
        tuple(f"<extra_id_{i}>" for i in range(100)),
    ),
}
_USUAL: dict[Kind, Special] = {"bpe": "gpt2", "wordpiece": "bert", "unigram": "t5"}


def train_tokenizer(texts: Iterable[str], config: TokenizerConfig, *, fewer: bool = False) -> Tokenizer:
    """A tokenizer learnt from texts, which are read once, as a stream.

    Args:
        fewer: take fewer tokens than `vocab_size` where the texts do not give as many.

    Raises:
        UserError: there is no text, or too little of it; `vocab_size` is less than the characters need; or the special
            tokens lack the unknown one that this kind needs.
    """
    style = STYLES[config.special or _USUAL[config.kind]]
    unknown = style.roles.get("unk")
    if config.kind != "bpe" and unknown is None:
        hint = "its characters may be new to it: take bert, roberta or t5"
        raise UserError(f"{config.kind} needs a token for the unknown", where="special", hint=hint)
    least = len(style.tokens) + (len(pre_tokenizers.ByteLevel.alphabet()) if config.kind == "bpe" else 1)
    if config.vocab_size < least:
        raise UserError(f"{config.vocab_size} tokens are too few", where="vocab_size", hint=f"give at least {least}")
    tokenizer = _untrained(config, unknown)
    trainer = _trainer(config, style, unknown)
    pieces = _Pieces(texts)
    try:
        tokenizer.train_from_iterator(pieces, trainer)
    except UserError:
        raise
    except Exception as error:  # the library raises nothing narrower
        small = "not large enough" in str(error)
        hint = "give a larger vocab_size: every character needs a token" if small else "give more text"
        raise UserError(f"no tokenizer can be made of this text: {error}", where="vocab_size", hint=hint) from error
    if not pieces.characters:
        raise UserError("there is no text to learn a tokenizer from", hint="name the text column")
    found = tokenizer.get_vocab_size()
    if found > config.vocab_size:
        hint = f"give a vocab_size of at least {found}"
        raise UserError(f"the characters of this text alone need {found} tokens", where="vocab_size", hint=hint)
    if found < config.vocab_size and not fewer:
        hint = f"give a vocab_size of at most {found}, or more text"
        raise UserError(f"the text gives no more than {found} tokens", where="vocab_size", hint=hint)
    _finish(tokenizer, style)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, config: TokenizerConfig, directory: Path) -> None:
    """Write `tokenizer.json` and the `tokenizer_config.json` that tells Hugging Face of the special tokens."""
    style = STYLES[config.special or _USUAL[config.kind]]
    tokenizer.save(str(directory / "tokenizer.json"))
    told = {f"{role}_token": token for role, token in style.roles.items()}
    content = {"tokenizer_class": "PreTrainedTokenizerFast", **told, "clean_up_tokenization_spaces": False}
    (directory / "tokenizer_config.json").write_text(json.dumps(content, indent=2) + "\n", "utf-8")


@dataclass(frozen=True)
class TrainedTokenizer:
    """A tokenizer that was written.

    Args:
        bytes: of the text in UTF-8.
        bytes_per_token: of the beginning of the text.
    """

    path: Path
    config: TokenizerConfig
    texts: int
    bytes: int
    seconds: float
    bytes_per_token: float

    def to_dict(self) -> dict[str, Any]:
        found = {name: value for name, value in vars(self).items() if name != "config"}
        return {**asdict(self.config), **found, "path": str(self.path)}

    def lines(self) -> list[str]:
        return [
            f"learnt {self.config.vocab_size:,} tokens ({self.config.kind}) from {self.texts:,} texts, "
            f"{self.bytes / 1e6:,.1f} MB, in {self.seconds:.0f} s",
            f"{self.bytes_per_token:.2f} bytes a token at the beginning of the text",
            f"wrote {self.path}",
        ]


def write_tokenizer(
    data: Path | str,
    out: Path,
    config: TokenizerConfig,
    *,
    text: Sequence[str] = (),
    encoding: str = "utf-8",
    skip_bad: bool = False,
    progress: Callable[[int], None] | None = None,
) -> TrainedTokenizer:
    """Train a tokenizer on a file of rows and write it into the new directory `out`; see `train_tokenizer`.

    Args:
        text: the columns to read; one is guessed where none is named. A value may be a list of texts.
        progress: is told how many texts were read so far.
    """
    if out.exists():
        raise UserError("exists already", where=str(out), hint="name another directory, or remove it")
    started = time.perf_counter()
    source = open_source(data, encoding=encoding, skip_bad=skip_bad, max_line_bytes=_LONGEST_ROW)
    role = Role("text", TEXTS, shape="text")
    columns = [find_columns(source, {"text": name}, (role,))["text"] for name in text or (None,)]
    seen = _Seen()
    values = (row.values.get(column) for row in source for column in columns)
    texts = (one for value in values for one in (value if isinstance(value, list) else (value,)))
    tokenizer = train_tokenizer(seen.count(texts, progress), config)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{out.name}.", dir=out.parent) as folder:
        whole = Path(folder) / "tokenizer"
        whole.mkdir()
        save_tokenizer(tokenizer, config, whole)
        whole.rename(out)
    sample = "".join(seen.sample)
    tokens = len(tokenizer.encode(sample, add_special_tokens=False).ids)
    size = len(sample.encode()) / max(tokens, 1)
    return TrainedTokenizer(out, config, seen.texts, seen.bytes, time.perf_counter() - started, size)


@dataclass
class _Seen:
    """What went by of the texts: how many, their bytes, and the beginning."""

    texts: int = 0
    bytes: int = 0
    sample: list[str] = field(default_factory=list[str])

    def count(self, values: Iterable[Any], progress: Callable[[int], None] | None) -> Iterator[str]:
        room = _PIECE
        for value in values:
            text = "" if value is None else str(value)
            self.texts += 1
            self.bytes += len(text.encode())
            if room > 0:
                self.sample.append(text[:room])
                room -= len(text)
            if progress is not None:
                progress(self.texts)
            yield text


def _untrained(config: TokenizerConfig, unknown: str | None) -> Tokenizer:
    lower = config.kind == "wordpiece" if config.lowercase is None else config.lowercase
    if config.kind == "wordpiece":
        tokenizer = Tokenizer(WordPiece(unk_token=str(unknown)))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lower)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        return tokenizer
    dropped = [normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase()] if lower else []
    if config.kind == "bpe":
        tokenizer = Tokenizer(BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    else:
        tokenizer = Tokenizer(Unigram())
        dropped = [normalizers.NFKC(), *dropped]
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
    if dropped:
        tokenizer.normalizer = normalizers.Sequence(dropped)
    return tokenizer


def _trainer(config: TokenizerConfig, style: Style, unknown: str | None) -> trainers.Trainer:
    size, special = config.vocab_size, style.tokens
    if config.kind == "bpe":
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        return trainers.BpeTrainer(
            vocab_size=size, special_tokens=special, initial_alphabet=alphabet, min_frequency=2, show_progress=False
        )
    if config.kind == "wordpiece":
        return trainers.WordPieceTrainer(
            vocab_size=size,
            special_tokens=special,
            min_frequency=2,
            limit_alphabet=size - len(special),
            show_progress=False,
        )
    return trainers.UnigramTrainer(vocab_size=size, special_tokens=special, unk_token=unknown, show_progress=False)


def _finish(tokenizer: Tokenizer, style: Style) -> None:
    if style.single:
        used = [token for token in style.tokens if token in style.pair]
        ids = [(token, tokenizer.token_to_id(token)) for token in used]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=style.single, pair=style.pair, special_tokens=ids
        )


class _Pieces:
    """Texts in pieces of bounded size, cut at line ends where there are some; counts what went by."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._texts = texts
        self.characters = 0

    def __iter__(self) -> Iterator[str]:
        for text in self._texts:
            start = 0
            while start < len(text):
                stop = min(start + _PIECE, len(text))
                line = text.rfind("\n", start, stop) + 1
                if line and stop < len(text):
                    stop = line
                yield text[start:stop]
                self.characters += stop - start
                start = stop
