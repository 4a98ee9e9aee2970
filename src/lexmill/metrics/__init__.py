"""How good answers are, and how sure one can be of it. Numpy only."""

from lexmill.metrics.calibration import brier_score, expected_calibration_error, reliability
from lexmill.metrics.classification import (
    Average,
    Counts,
    accuracy,
    confused,
    confusion,
    count,
    count_multilabel,
    exact_match,
    f1,
    per_class,
)
from lexmill.metrics.compare import Difference, mcnemar, paired_bootstrap
from lexmill.metrics.intervals import Interval, accuracy_interval, bootstrap, f1_interval, multilabel_f1_interval

__all__ = [
    "Average",
    "Counts",
    "Difference",
    "Interval",
    "accuracy",
    "accuracy_interval",
    "bootstrap",
    "brier_score",
    "confused",
    "confusion",
    "count",
    "count_multilabel",
    "exact_match",
    "expected_calibration_error",
    "f1",
    "f1_interval",
    "mcnemar",
    "multilabel_f1_interval",
    "paired_bootstrap",
    "per_class",
    "reliability",
]
