"""What a model can be asked. Each task is one file; importing this room registers them."""

from lexmill.tasks.answer import Answer
from lexmill.tasks.base import Metrics, Record, Task, Wants, find, register
from lexmill.tasks.classify import Classify
from lexmill.tasks.embed import Embed
from lexmill.tasks.generate import Generate
from lexmill.tasks.pretrain import Pretrain
from lexmill.tasks.rank import Rank
from lexmill.tasks.seq2seq import Seq2Seq
from lexmill.tasks.tag import Tag

__all__ = [
    "Answer",
    "Classify",
    "Embed",
    "Generate",
    "Metrics",
    "Pretrain",
    "Rank",
    "Record",
    "Seq2Seq",
    "Tag",
    "Task",
    "Wants",
    "find",
    "register",
]
