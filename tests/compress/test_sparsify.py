"""Single weights set to 0: where they lie, what is lost by them, and that training leaves them at 0."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.compress.material import assert_reloads, material_of
from tests.small_classifier import small_classifier

from lexmill.compress import Step, check_order
from lexmill.compress.calibrate import groups_of
from lexmill.compress.sparsify_weights import Pattern, sparse
from lexmill.compress.weights_rounding import lost
from lexmill.engine import Loaded
from lexmill.errors import UserError
from lexmill.nn.int8 import Int8Linear

QUICK = {"epochs": 2, "learning_rate": 1e-3, "batch_size": 16, "task_weight": 0.0}
CORRELATED = torch.randn(400, 64, generator=torch.Generator().manual_seed(1)) @ torch.randn(
    64, 64, generator=torch.Generator().manual_seed(2)
)
MOMENTS = (CORRELATED.double().t() @ CORRELATED.double()) / len(CORRELATED)


def sparsified(**options: Any) -> tuple[Loaded, dict[str, float]]:
    method, read = Step("sparsity", {"rows": 48, "recover": False, **options}).read("steps[0]")
    return method.apply(small_classifier(), material_of(small_classifier()), read)


def matrices(loaded: Loaded) -> dict[str, torch.Tensor]:
    trunk = loaded.model.trunk
    places = [place for group in groups_of(trunk) for place in group.places]
    return {place: trunk.get_parameter(f"{place}.weight").detach().clone() for place in places}


def by_groups(weight: torch.Tensor, of: int) -> torch.Tensor:
    return (weight.unflatten(1, (-1, of)) != 0).sum(-1)


@pytest.mark.parametrize("by", ["magnitude", "wanda", "sparsegpt"])
def test_every_group_keeps_as_many_as_the_pattern_says(by: Any) -> None:
    weight = torch.randn(12, 64, generator=torch.Generator().manual_seed(0))
    for text, keep, of in (("2:4", 2, 4), ("4:8", 4, 8), ("1:16", 1, 16)):
        assert (by_groups(sparse(weight, MOMENTS, Pattern.read(text), by), of) == keep).all()
    assert int((sparse(weight, MOMENTS, Pattern(0.7), by) == 0).sum()) == pytest.approx(0.7 * 12 * 64, abs=8)


def test_wanda_weighs_by_what_goes_in_and_magnitude_does_not() -> None:
    weight, moments = torch.tensor([[3.0, 2.0], [1.0, -0.5]]), torch.diag(torch.tensor([0.01, 4.0]))
    by_rows = sparse(weight, moments, Pattern(0.5), "wanda")
    assert by_rows.tolist() == [[0.0, 2.0], [0.0, -0.5]]
    assert sparse(weight, moments, Pattern(0.5), "magnitude").tolist() == [[3.0, 2.0], [0.0, 0.0]]


@pytest.mark.parametrize("pattern", [Pattern(0.5), Pattern.read("2:4")])
def test_weights_that_make_up_for_others_lose_least(pattern: Pattern) -> None:
    drawn = torch.Generator().manual_seed(0)
    turned = torch.linalg.qr(torch.randn(256, 256, generator=drawn))[0]
    x = (torch.randn(1000, 256, generator=drawn) * torch.logspace(0, -2, 256)) @ turned
    weight, moments = torch.randn(48, 256, generator=drawn), (x.double().t() @ x.double()) / len(x)
    plain, wanda, made_up = (
        lost(weight, sparse(weight, moments, pattern, by), moments) for by in ("magnitude", "wanda", "sparsegpt")
    )
    assert made_up < 0.7 * min(plain, wanda)


def test_one_weight_made_up_for_is_the_best_there_is() -> None:
    """Against the slow way: least squares over the columns that stay and are to come."""
    weight = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    found = sparse(weight, MOMENTS, Pattern(0.001 + 1 / (5 * 64)), "sparsegpt", damp=1e-9)
    [[row, at]] = (found == 0).nonzero().tolist()
    rest = torch.arange(at + 1, 64)
    a = MOMENTS[rest][:, rest]
    moved = weight[row].double().clone()
    moved[rest] += torch.linalg.solve(a, MOMENTS[rest, at]) * moved[at]
    moved[at] = 0
    torch.testing.assert_close(found[row].double(), moved, rtol=1e-3, atol=1e-3)


def test_zeros_are_counted_and_read_again(tmp_path: Path) -> None:
    loaded, effect = sparsified(share=0.6, skip=["layers.0.mlp"])
    before, after = matrices(small_classifier()), matrices(loaded)
    sparse_ones = [place for place in after if not place.startswith("layers.0.mlp")]
    assert effect["layers_sparse"] == len(sparse_ones)
    assert effect["layers_dense"] == 2
    assert effect["zeros"] == sum(int((after[place] == 0).sum()) for place in sparse_ones)
    assert effect["zeros"] / effect["weights"] == pytest.approx(0.6, abs=0.01)
    assert effect["share_zero_least"] == pytest.approx(0.6, abs=0.01)
    assert all(torch.equal(after[place], before[place]) for place in after if place not in sparse_ones)
    assert_reloads(loaded, tmp_path)


def test_training_brings_the_answers_nearer_and_leaves_zeros_at_0() -> None:
    start, _ = sparsified(pattern="2:4")
    loaded, effect = sparsified(pattern="2:4", recover=True, recovery=QUICK)
    assert effect["divergence_after"] < effect["divergence_before"]
    zeros = matrices(start)
    for place, weight in matrices(loaded).items():
        assert torch.equal(weight == 0, zeros[place] == 0)
        assert not torch.equal(weight, zeros[place])
        assert (by_groups(weight, 4) == 2).all()


def test_int8_keeps_zeros_and_other_methods_cannot_follow() -> None:
    loaded, _ = sparsified(pattern="2:4")
    zeros = {place: weight == 0 for place, weight in matrices(loaded).items()}
    method, read = Step("int8", {"max_error": 1.0, "smooth": 0.5}).read("steps[0]")
    after, effect = method.apply(loaded, material_of(small_classifier()), read)
    assert effect["layers_int8"] == len(zeros)
    for place, where in zeros.items():
        layer = after.model.trunk.get_submodule(place)
        assert isinstance(layer, Int8Linear)
        assert (layer.codes.reshape(where.shape)[where] == 0).all()
    for other in ("factorise", "distil", "exits", "sparsity"):
        with pytest.raises(UserError, match=f"'{other}' cannot follow 'sparsity'"):
            check_order([Step("sparsity"), Step(other)])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"pattern": "4:2"}, "no pattern"),
        ({"pattern": "half"}, "no pattern"),
        ({"pattern": "2:5"}, "no groups of 5"),
        ({"pattern": "2:4", "share": 0.3}, "says what share"),
        ({"share": 0.001}, "none of a row"),
        ({"skip": ["layers.9"]}, "no linear layer at"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        sparsified(**options)
