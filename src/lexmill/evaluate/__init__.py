"""How good a model is: a task's metrics over an engine, and the report that shows them."""

from lexmill.evaluate.compare import Comparison, compare
from lexmill.evaluate.run import Evaluation, answered, evaluate, metrics_of

__all__ = ["Comparison", "Evaluation", "answered", "compare", "evaluate", "metrics_of"]
