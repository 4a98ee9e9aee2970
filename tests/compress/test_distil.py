"""Students of fewer layers, less width and another family."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.compress.material import assert_reloads, material_of, texts
from tests.small_classifier import small_classifier, write_artifact

from lexmill.compress import Step, find
from lexmill.compress.distil import projected
from lexmill.compress.narrow import Width, chosen_layers, keep_layers, narrow
from lexmill.engine import Loaded, probes
from lexmill.errors import UserError

QUICK = {"epochs": 2, "learning_rate": 2e-3, "batch_size": 16}


def distilled(*teachers: Loaded, **options: Any) -> tuple[Loaded, dict[str, float]]:
    method, read = Step("distil", {"recovery": QUICK, **options}).read("steps[0]")
    return method.apply(small_classifier(), material_of(*(teachers or (small_classifier(),))), read)


def test_layers_are_chosen_by_place() -> None:
    assert chosen_layers(6, 3, "spaced") == [0, 2, 5]
    assert chosen_layers(6, 3, "first") == [0, 1, 2]
    assert chosen_layers(6, 3, "last") == [3, 4, 5]
    assert chosen_layers(6, 1, "spaced") == [0]


def test_a_student_of_fewer_layers_begins_as_its_teachers_layers() -> None:
    teacher, student = small_classifier(), small_classifier()
    keep_layers(student.model, [1])
    theirs = teacher.model.trunk.layers[1].state_dict()
    assert all(tensor.equal(theirs[name]) for name, tensor in student.model.trunk.layers[0].state_dict().items())


@pytest.mark.parametrize(
    "options",
    [
        {"layers": 1},
        {"hidden_size": 16, "intermediate_size": 32, "layers": 1},
        {"family": "lstm", "hidden_size": 32, "embedding_size": 16},
        {"family": "gru", "hidden_size": 32, "embedding_size": 48},
    ],
    ids=["layers", "narrow", "lstm", "gru"],
)
def test_students_learn_and_are_read_again_as_they_were(options: dict[str, Any], tmp_path: Path) -> None:
    student, effect = distilled(**options)
    assert effect["weights_after"] < effect["weights_before"]
    assert effect["weights_after"] == sum(p.numel() for p in student.model.parameters())
    assert effect["divergence_after"] < effect["divergence_before"]
    assert_reloads(student, tmp_path)


def test_units_that_nothing_goes_through_are_the_ones_cut() -> None:
    teacher = small_classifier()
    trunk = teacher.model.trunk
    with torch.no_grad():
        for block in trunk.layers:
            block.mlp.up.weight[32:], block.mlp.down.weight[:, 32:] = 0, 0
            block.attention.value.weight[16:], block.attention.output.weight[:, 16:] = 0, 0
            block.mlp.up.bias[32:], block.attention.value.bias[16:] = 0, 0
    # Heads cannot be fewer than fill the width, so neurons alone are cut here.
    student = replace(teacher, model=narrow(teacher, Width(intermediate_size=32), seed=0, cut=True))
    asked = [{"question": text} for text in texts(5)]
    for one, other in zip(probes.evidence(teacher, asked), probes.evidence(student, asked), strict=True):
        assert one == pytest.approx(other, rel=1e-5, abs=1e-6)


def test_embeddings_keep_as_much_as_so_few_directions_can() -> None:
    table = torch.randn(300, 4) @ torch.randn(4, 20)
    made = projected(table, 4)
    exact = "donot_use_mm_for_euclid_dist"
    between, kept = (torch.cdist(one, one, compute_mode=exact) for one in (table, made))
    torch.testing.assert_close(kept, between, rtol=1e-3, atol=1e-2)


def test_further_teachers_and_changed_texts_take_part(tmp_path: Path) -> None:
    write_artifact(small_classifier(seed=1, name="other"), tmp_path / "other")
    _, effect = distilled(layers=1, teachers=[str(tmp_path / "other")], augment={"copies": 1, "edits": ["swap"]})
    assert effect["teachers"] == 2
    assert 0 < effect["augmented_rows"] <= 96
    assert effect["taught_rows"] == 96 + effect["augmented_rows"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "as large as its teacher"),
        ({"layers": 2}, "as large as its teacher"),
        ({"layers": 3}, "the teacher has 2"),
        ({"hidden_size": 20}, "do not fill"),
        ({"intermediate_size": 65}, "the teacher has 64"),
        ({"family": "lstm", "hidden_size": 33}, "both directions"),
        ({"family": "lstm", "num_heads": 2}, "has neither"),
    ],
)
def test_what_would_do_nothing_or_does_not_fit_is_an_error(options: dict[str, Any], message: str) -> None:
    method, read = Step("distil", options).read("steps[0]")
    with pytest.raises(UserError, match=message):
        method.check(small_classifier(), read)


def test_what_has_recurrent_layers_is_not_cut() -> None:
    student, _ = distilled(family="gru", hidden_size=16, embedding_size=8)
    with pytest.raises(UserError, match="cannot be cut"):
        find("distil").check(student, Step("distil", {"layers": 1}).read("steps[0]")[1])
