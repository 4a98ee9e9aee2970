"""Smaller and faster models, with proof: distil, prune, quantise, factorise, and the search under a budget."""

from lexmill.compress.base import Material, Method, Step, batches, check_order, find, known, register
from lexmill.compress.distil import Distil

__all__ = ["Distil", "Material", "Method", "Step", "batches", "check_order", "find", "known", "register"]
