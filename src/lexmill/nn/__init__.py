"""Single-device layers. They know shapes and layouts, no model family and no data."""

from lexmill.nn.attention import Attention, attend, attention_weights
from lexmill.nn.cache import KVCache
from lexmill.nn.dropout import Dropout
from lexmill.nn.embedding import Embedding
from lexmill.nn.layout import Dense, Layout, Packed
from lexmill.nn.linear import Linear
from lexmill.nn.low_rank import LowRankLinear
from lexmill.nn.mlp import MLP
from lexmill.nn.norm import LayerNorm, RMSNorm
from lexmill.nn.pooling import pool
from lexmill.nn.relative import RelativeBias
from lexmill.nn.rotary import RopeScaling, Rotary

__all__ = [
    "MLP",
    "Attention",
    "Dense",
    "Dropout",
    "Embedding",
    "KVCache",
    "LayerNorm",
    "Layout",
    "Linear",
    "LowRankLinear",
    "Packed",
    "RMSNorm",
    "RelativeBias",
    "RopeScaling",
    "Rotary",
    "attend",
    "attention_weights",
    "pool",
]
