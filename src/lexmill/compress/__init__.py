"""Smaller and faster models, with proof: distil, prune, quantise, factorise, and the search under a budget."""

from lexmill.compress.base import Material, Method, Step, batches, check_order, find, known, read_step, register
from lexmill.compress.chain import CompressResult
from lexmill.compress.config import CompressConfig, Goal
from lexmill.compress.distil import Distil
from lexmill.compress.exits import EarlyExits
from lexmill.compress.factorise import Factorise
from lexmill.compress.kv_cache import KVInt8
from lexmill.compress.prune import Heads, HiddenWidth, Layers, Neurons
from lexmill.compress.quantise import Int8
from lexmill.compress.rows import Files
from lexmill.compress.run import compress
from lexmill.compress.sparsify import Sparsity
from lexmill.compress.vocabulary import Vocabulary
from lexmill.compress.weights import Weights

__all__ = [
    "CompressConfig",
    "CompressResult",
    "Distil",
    "EarlyExits",
    "Factorise",
    "Files",
    "Goal",
    "Heads",
    "HiddenWidth",
    "Int8",
    "KVInt8",
    "Layers",
    "Material",
    "Method",
    "Neurons",
    "Sparsity",
    "Step",
    "Vocabulary",
    "Weights",
    "batches",
    "check_order",
    "compress",
    "find",
    "known",
    "read_step",
    "register",
]
