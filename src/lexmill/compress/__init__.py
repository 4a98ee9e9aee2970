"""Smaller and faster models, with proof: distil, prune, quantise, factorise, and the search under a budget."""

from lexmill.compress.base import Material, Method, Step, batches, check_order, find, known, register
from lexmill.compress.distil import Distil
from lexmill.compress.exits import EarlyExits
from lexmill.compress.factorise import Factorise

__all__ = [
    "Distil",
    "EarlyExits",
    "Factorise",
    "Material",
    "Method",
    "Step",
    "batches",
    "check_order",
    "find",
    "known",
    "register",
]
