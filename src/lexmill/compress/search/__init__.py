"""The search for a chain of methods and a runtime that reach a goal on this machine."""

from lexmill.compress.search.run import search

__all__ = ["search"]
