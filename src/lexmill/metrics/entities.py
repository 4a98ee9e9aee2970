"""How many entities are found: precision, recall and F1, as `seqeval` (Nakayama 2018) counts in strict mode.

An entity is found where one of the same label begins and ends at the same places.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence

import numpy as np

from lexmill.metrics.classification import Counts

Place = tuple[Hashable, Hashable, str]
"""Where an entity begins, where it ends, and its label."""


def count_entities(truth: Collection[Place], predicted: Collection[Place], labels: Sequence[str]) -> Counts:
    """By label, how many entities of one text were found, there are, and were claimed. Labels beyond `labels` are
    a KeyError."""
    index = {label: i for i, label in enumerate(labels)}
    found = np.zeros((3, len(labels)), np.int64)
    for row, entities in enumerate((set(truth) & set(predicted), set(truth), set(predicted))):
        for _, _, label in entities:
            found[row, index[label]] += 1
    return Counts(*found)


def entity_scores(counts: Counts) -> dict[str, float]:
    """`precision`, `recall` and `f1` of all labels together; 0 where there is nothing to divide by."""
    hit, support, predicted = (float(each.sum()) for each in (counts.hit, counts.support, counts.predicted))
    return {
        "precision": hit / predicted if predicted else 0.0,
        "recall": hit / support if support else 0.0,
        "f1": 2 * hit / (support + predicted) if support + predicted else 0.0,
    }
