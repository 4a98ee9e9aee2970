"""Smaller and faster models, with proof: distil, prune, quantise, factorise, and the search under a budget."""

from lexmill.compress.base import Material, Method, Step, batches, check_order, find, known, register

__all__ = ["Material", "Method", "Step", "batches", "check_order", "find", "known", "register"]
