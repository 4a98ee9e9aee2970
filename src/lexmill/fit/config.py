"""All that may be set for `fit`: one frozen tree, from TOML, flags and `--set`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Lt

from lexmill.adapt.config import AdaptConfig
from lexmill.data.lines import MAX_LINE_BYTES
from lexmill.data.tokenizer_training import TokenizerConfig
from lexmill.errors import UserError
from lexmill.monitor.trackers import Tracker
from lexmill.train.config import TrainConfig

TRAINED_TOKENIZER = TokenizerConfig(special="roberta")
"""Its special tokens serve every task: texts are never empty, and can be masked."""


@dataclass(frozen=True)
class DataConfig:
    """Where the data is, and what its columns mean.

    Args:
        train, validation, test: files of labelled rows; CSV, TSV, JSONL (also .gz, .xz), Parquet.
        validation_fraction: share of the training rows held out for validation, where no file is given.
        text, text_pair, label: columns; guessed from names and values where not given.
        columns: by role, where a task has other ones, e.g. `question`.
        encoding: of text files.
        delimiter: of CSV files; by the file's suffix where not given.
        skip_bad: pass over broken rows and count them, in place of stopping at the first.
        max_line_bytes: a longer row is broken: raise it where a row is a book.
    """

    train: Path
    validation: Path | None = None
    test: Path | None = None
    validation_fraction: Annotated[float, Ge(0), Lt(1)] = 0.0
    text: str | None = None
    text_pair: str | None = None
    label: str | None = None
    columns: dict[str, str] = field(default_factory=dict[str, str])
    encoding: str = "utf-8"
    delimiter: str | None = None
    skip_bad: bool = False
    max_line_bytes: Annotated[int, Ge(1)] = MAX_LINE_BYTES

    def named(self) -> dict[str, str]:
        """The columns that were given, by role. One given twice is a `UserError`."""
        plain = {"text": self.text, "text_pair": self.text_pair, "label": self.label}
        given = {role: column for role, column in plain.items() if column is not None}
        for role in given:
            if role in self.columns:
                raise UserError("is given twice", where=f"data.columns.{role}", hint=f"data.{role} says it too")
        return given | self.columns


@dataclass(frozen=True)
class TrackConfig:
    """Where a run's events go besides its own `events.jsonl`; needs the extra `track`.

    Args:
        to: `tensorboard`, `mlflow`, `wandb` (offline); several are possible.
        folder: where all of them write; `tracking` beside the artefact where not given.
    """

    to: tuple[Tracker, ...] = ()
    folder: Path | None = None


@dataclass(frozen=True)
class FitConfig:
    """One `fit`.

    Args:
        data: see `DataConfig`.
        model: a Hugging Face directory, an artefact, `minilm` for the one in the extra `starter`, or, to train from
            scratch, `lstm` or `gru`.
        init: where the weights come from: `pretrained`, the model's files; `random`, new ones drawn from `train.seed`
            for the structure that the model's config.json describes. Default: as the model has weights or not.
        tokenizer: the one to train on the training text, where the model has none.
        task: the name of a task.
        options: what that task lets one set, such as `max_length`.
        adapt: see `AdaptConfig`.
        train: see `TrainConfig`.
        track: see `TrackConfig`.
    """

    data: DataConfig
    model: str = "minilm"
    init: Literal["pretrained", "random"] | None = None
    tokenizer: TokenizerConfig = TRAINED_TOKENIZER
    task: str = "classify"
    options: dict[str, Any] = field(default_factory=dict[str, Any])
    adapt: AdaptConfig = field(default_factory=AdaptConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    track: TrackConfig = field(default_factory=TrackConfig)
