"""Learning beyond one run: the search for good settings, labels and hard negatives from models."""

from lexmill.learn.search import SearchResult, search
from lexmill.learn.space import Range, Space, parse_space

__all__ = ["Range", "SearchResult", "Space", "parse_space", "search"]
