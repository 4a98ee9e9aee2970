"""The fixtures of the rooms that a task passes through."""

from tests.fit.conftest import _own_cache, _unchecked_shapes, recipe, tiny_model  # noqa: F401
from tests.serve.conftest import start  # noqa: F401
