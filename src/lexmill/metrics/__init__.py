"""How good answers are, and how sure one can be of it. Numpy only."""

from lexmill.metrics.answers import answer_scores, mostly_chinese
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
from lexmill.metrics.compare import NORMAL, Difference, mcnemar, paired_bootstrap, paired_mean, tango
from lexmill.metrics.correlation import pearson, products, ranks, spearman
from lexmill.metrics.diversity import distinct
from lexmill.metrics.entities import count_entities, entity_scores
from lexmill.metrics.intervals import (
    Interval,
    accuracy_interval,
    bootstrap,
    f1_interval,
    mean_interval,
    multilabel_f1_interval,
)
from lexmill.metrics.ranking import (
    average_precision,
    by_group,
    ndcg,
    nearest,
    own_ranks,
    reciprocal_rank,
    roc_auc,
)

__all__ = [
    "NORMAL",
    "Average",
    "Counts",
    "Difference",
    "Interval",
    "accuracy",
    "accuracy_interval",
    "answer_scores",
    "average_precision",
    "bootstrap",
    "brier_score",
    "by_group",
    "confused",
    "confusion",
    "count",
    "count_entities",
    "count_multilabel",
    "distinct",
    "entity_scores",
    "exact_match",
    "expected_calibration_error",
    "f1",
    "f1_interval",
    "mcnemar",
    "mean_interval",
    "mostly_chinese",
    "multilabel_f1_interval",
    "ndcg",
    "nearest",
    "own_ranks",
    "paired_bootstrap",
    "paired_mean",
    "pearson",
    "per_class",
    "products",
    "ranks",
    "reciprocal_rank",
    "reliability",
    "roc_auc",
    "spearman",
    "tango",
]
