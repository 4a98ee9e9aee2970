"""Training a model on by what teachers say."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.compress.material import material_of, rows_of
from tests.small_classifier import small_classifier

from lexmill.compress.recover import Recovery, recover
from lexmill.compress.states import collecting, relations_apart
from lexmill.compress.teaching import TAUGHT, answers, lessons
from lexmill.data.batch import collate
from lexmill.data.tokenizer import fingerprint
from lexmill.errors import UserError
from lexmill.nn.layout import Packed

ONLY_ANSWERS = Recovery(epochs=3, learning_rate=2e-3, batch_size=16, task_weight=0.0)


def test_a_student_comes_nearer_to_its_teacher() -> None:
    student = small_classifier(seed=1)
    effect = recover(student, material_of(small_classifier(), unlabelled=32), ONLY_ANSWERS)
    assert effect["divergence_after"] < 0.6 * effect["divergence_before"]
    assert effect["validation_after"] > effect["validation_before"]
    assert effect["taught_rows"] == 128
    assert effect["epochs"] == 3
    assert not student.model.training


def test_rows_without_labels_are_learnt_from_alone() -> None:
    material = replace(material_of(small_classifier(), unlabelled=64), train=[], validation=[])
    student = small_classifier(seed=1)
    before = {name: tensor.clone() for name, tensor in student.model.state_dict().items()}
    with pytest.raises(UserError, match="no rows"):
        recover(student, replace(material, unlabelled=[]), ONLY_ANSWERS)
    recover(student, replace(material, validation=rows_of(small_classifier(), 8)), replace(ONLY_ANSWERS, epochs=1))
    assert not all(tensor.equal(before[name]) for name, tensor in student.model.state_dict().items())


@pytest.mark.parametrize("name", ["hidden_weight", "relations_weight"])
def test_states_alone_can_be_learnt_from_and_leave_nothing_behind(name: str) -> None:
    student = small_classifier(seed=1)
    names = set(student.model.state_dict())
    material = material_of(small_classifier())
    weights = {"task_weight": 0.0, "logits_weight": 0.0, name: 1.0}
    first = recover(student, material, replace(ONLY_ANSWERS, epochs=1, **weights))["final_loss"]
    last = recover(student, material, replace(ONLY_ANSWERS, epochs=2, **weights))["final_loss"]
    assert last < first
    assert set(student.model.state_dict()) == names


def test_the_same_model_is_not_apart_from_itself() -> None:
    one = small_classifier()
    batch = collate(one.task.encode(rows_of(one, 6), one.tokenizer, labelled=True))
    with torch.no_grad(), collecting(one.model.trunk) as seen:
        plain = one.task.forward(one.model, batch)
    layout = Packed.of(torch.from_numpy(batch.streams["source"].lengths))
    torch.testing.assert_close(relations_apart(seen[-1], seen[-1], layout), torch.zeros(6))
    torch.testing.assert_close(plain, one.task.forward(one.model, batch))


def test_relations_are_those_of_each_text_alone() -> None:
    one, other = small_classifier(), small_classifier(seed=1)
    examples = one.task.encode(rows_of(one, 5), one.tokenizer, labelled=True)

    def apart(chosen: list[int]) -> torch.Tensor:
        batch = collate([examples[i] for i in chosen])
        told = []
        for each in (one, other):
            with torch.no_grad(), collecting(each.model.trunk) as seen:
                each.task.forward(each.model, batch)
            told.append(seen[-1])
        return relations_apart(told[0], told[1], Packed.of(torch.from_numpy(batch.streams["source"].lengths)))

    torch.testing.assert_close(apart([0, 1, 2, 3, 4]), torch.cat([apart([i]) for i in range(5)]))


def test_answers_of_several_teachers_are_their_mean_by_row() -> None:
    one, other, student = small_classifier(), small_classifier(seed=1), small_classifier(seed=2)
    rows = rows_of(one, 7)
    batch = lessons(student, rows[:4], rows[4:], [one, other]).batch(np.array([5, 0]))
    wanted = [(answers(one, rows)[i]["label"] + answers(other, rows)[i]["label"]) / 2 for i in (5, 0)]
    np.testing.assert_allclose(batch.labels[TAUGHT + "label"], np.concatenate(wanted), rtol=1e-5)
    assert batch.masks["label"].tolist() == [False, True]


def test_what_cannot_be_learnt_from_is_an_error() -> None:
    student, teacher = small_classifier(seed=1), small_classifier()
    material = material_of(teacher)
    with pytest.raises(UserError, match="nothing to learn from"):
        recover(student, material, Recovery(task_weight=0.0, logits_weight=0.0))
    with pytest.raises(UserError, match="no teacher"):
        recover(student, replace(material, teachers=()), Recovery())
    strange = small_classifier(labels=("a", "b"))
    with pytest.raises(UserError, match="does not answer what"):
        recover(student, replace(material, teachers=[strange]), Recovery())
    lower = small_classifier()
    lower.tokenizer.normalizer = None
    assert fingerprint(lower.tokenizer) != fingerprint(student.tokenizer)
    with pytest.raises(UserError, match="other tokens"):
        recover(student, replace(material, teachers=[lower]), Recovery(hidden_weight=1.0))
