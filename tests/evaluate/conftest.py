"""The fixtures of whole runs."""

from tests.fit.conftest import _own_cache, _unchecked_shapes, recipe, tiny_model  # noqa: F401
