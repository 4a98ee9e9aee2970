"""From files to batches. Numpy only; `tokenizer` and `check` are imported from their own modules."""

from lexmill.data.batch import IGNORE, Batch, Example, Stream, Tokens, collate, pack
from lexmill.data.bundled import banking77
from lexmill.data.cache import TokenCache, build_cache, cache_key, encode_chunks
from lexmill.data.columns import Columns, find_columns, guess
from lexmill.data.fingerprint import content_sha256, data_fingerprint
from lexmill.data.order import Order
from lexmill.data.packing import micro_batches
from lexmill.data.sources import Row, Source, open_source, read_lines

__all__ = [
    "IGNORE",
    "Batch",
    "Columns",
    "Example",
    "Order",
    "Row",
    "Source",
    "Stream",
    "TokenCache",
    "Tokens",
    "banking77",
    "build_cache",
    "cache_key",
    "collate",
    "content_sha256",
    "data_fingerprint",
    "encode_chunks",
    "find_columns",
    "guess",
    "micro_batches",
    "open_source",
    "pack",
    "read_lines",
]
