from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lexmill.nn import Packed, attend, bucketed
from lexmill.nn.bucketed import Plan, bucketed_attention
from lexmill.nn.rule import Rule

RULES = [Rule(), Rule(causal=True), Rule(window=2), Rule(causal=True, window=3), Rule(causal=True, align="start")]
COSTS = [0, 1_000, 10**9]


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("bucket_cost", COSTS)
@settings(max_examples=10, deadline=None)
@given(
    lens=st.lists(st.integers(1, 9), min_size=1, max_size=12), fewer=st.integers(0, 3), tile=st.sampled_from([1, 2, 64])
)
def test_values_and_gradients_are_those_of_one_group_a_length(rule, bucket_cost, lens, fewer, tile):
    """`attend` without gradients takes a kernel a length; its double-precision derivatives come from autograd."""
    torch.manual_seed(0)
    keys, queries = Packed.of(lens), Packed.of([max(1, n - fewer) for n in lens])
    q, k, v = random(queries.num_tokens, 3, 4), random(keys.num_tokens, 3, 4), random(keys.num_tokens, 3, 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bucketed, "_BUCKET_COST", bucket_cost)
        patch.setattr(bucketed, "_TILE", tile)
        plan = Plan.of(queries, keys, 3, rule)
    fast = bucketed_attention(q, k, v, plan)
    slow = _one_by_one(q, k, v, queries, keys, rule)
    torch.testing.assert_close(fast, slow, rtol=0, atol=1e-12)
    weight = torch.randn_like(slow)
    for a, b in zip(
        torch.autograd.grad((fast * weight).sum(), (q, k, v)),
        torch.autograd.grad((slow * weight).sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    with torch.no_grad():
        grouped = attend(q, k, v, queries, keys, causal=rule.causal, window=rule.window, align=rule.align)
    torch.testing.assert_close(grouped, slow, rtol=0, atol=1e-12)


def _one_by_one(q, k, v, queries, keys, rule, bias=None):
    outs = []
    for s in range(keys.num_sequences):
        qs, ks, vs = (
            x[layout.offsets[s] : layout.offsets[s + 1]].transpose(0, 1)
            for x, layout in ((q, queries), (k, keys), (v, keys))
        )
        start = ks.shape[1] - qs.shape[1] if rule.align == "end" else 0
        seen = rule.visible(torch.arange(start, start + qs.shape[1]), torch.arange(ks.shape[1]))
        scores = qs @ ks.transpose(1, 2) / 2
        if bias is not None:
            scores = scores + bias[:, start : start + qs.shape[1], : ks.shape[1]]
        scores = scores.masked_fill(~seen, -torch.inf)
        outs.append((scores.softmax(-1) @ vs).transpose(0, 1))
    return torch.cat(outs)


@pytest.mark.parametrize("tile", [2, 64])
@pytest.mark.parametrize("bucket_cost", COSTS)
def test_a_bias_by_position_and_its_gradient_are_those_of_the_slow_way(bucket_cost, tile, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(bucketed, "_TILE", tile)
    monkeypatch.setattr(bucketed, "_BUCKET_COST", bucket_cost)
    layout = Packed.of([4, 1, 7, 4, 2])
    q, k, v, bias = random(18, 3, 4), random(18, 3, 4), random(18, 3, 4), random(3, 9, 9)
    fast = attend(q, k, v, layout, layout, causal=True, bias=bias)
    slow = _one_by_one(q, k, v, layout, layout, Rule(causal=True), bias)
    torch.testing.assert_close(fast, slow, rtol=0, atol=1e-12)
    weight = torch.randn_like(slow)
    fast_grads = torch.autograd.grad((fast * weight).sum(), (q, k, v, bias))
    slow_grads = torch.autograd.grad((slow * weight).sum(), (q, k, v, bias))
    for a, b in zip(fast_grads, slow_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rule", RULES[:3])
def test_gradients_with_dropout_are_those_of_the_masks_that_were_drawn(rule):
    layout = Packed.of([3, 5, 4, 3])
    q, k, v = random(15, 2, 4), random(15, 2, 4), random(15, 2, 4)
    plan = Plan.of(layout, layout, 2, rule)

    def seeded(*x):
        torch.manual_seed(1)
        return bucketed_attention(*x, plan, 0.4)

    assert not torch.equal(seeded(q, k, v), bucketed_attention(q, k, v, plan))
    assert torch.autograd.gradcheck(seeded, (q, k, v))


@pytest.mark.parametrize("rule", RULES[:3])
def test_in_bfloat16_it_is_as_near_to_the_truth_as_rounding_what_goes_in_and_comes_out_allows(rule):
    torch.manual_seed(0)
    layout = Packed.of([3, 40, 17, 17, 16, 31])
    q, k, v = (random(layout.num_tokens, 4, 32).bfloat16().detach().requires_grad_() for _ in range(3))
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    plan, weight = Plan.of(layout, layout, 4, rule), torch.randn(layout.num_tokens, 4, 32).bfloat16()
    found, wanted = bucketed_attention(q, k, v, plan), bucketed_attention(*exact, plan)
    assert found.dtype == torch.bfloat16
    grads = torch.autograd.grad(found, (q, k, v), weight)
    wanted_grads = torch.autograd.grad(wanted, exact, weight.double())
    pairs = [(found, wanted), *zip(grads, wanted_grads, strict=True)]
    for a, b in pairs:
        assert (a.double() - b).norm() <= 2**-7 * b.norm()


def test_no_gradient_is_made_for_keys_that_ask_for_none():
    torch.manual_seed(0)
    layout = Packed.of([3, 5, 4])
    q, k, v = random(12, 2, 4), random(12, 2, 4), random(12, 2, 4)
    plan, weight = Plan.of(layout, layout, 2, Rule()), torch.randn(12, 2, 4, dtype=torch.float64)
    whole = torch.autograd.grad(bucketed_attention(q, k, v, plan), (q, k, v), weight)
    fixed = bucketed_attention(q, k.detach(), v, plan)
    assert fixed.grad_fn.next_functions[1][0] is None
    for a, b in zip(torch.autograd.grad(fixed, (q, v), weight), (whole[0], whole[2]), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_neighbouring_lengths_share_a_bucket_and_distant_ones_do_not():
    layout = Packed.of([5, 6, 5, 7, 60, 61, 62, 6])
    plan = Plan.of(layout, layout, 12, Rule())
    assert [(b.sequences, b.q_len, b.k_len) for b in plan.buckets] == [(5, 7, 7), (3, 62, 62)]
    assert len(plan.queries.padding) == 12 * (2 + 2 + 1 + 1 + 2 + 1)


def test_training_takes_it_and_what_it_cannot_do_goes_elsewhere(monkeypatch):
    taken = []
    monkeypatch.setattr(bucketed, "bucketed_attention", lambda q, *rest: taken.append(q) or q)
    layout, long = Packed.of([3, 4]), Packed.of([bucketed.MAX_LENGTH + 1])
    q = random(7, 2, 4)
    attend(q, q, q, layout, layout)
    assert len(taken) == 1
    attend(q.detach(), q.detach(), q.detach(), layout, layout)
    bias = torch.zeros(2, 4, 4, dtype=torch.float64)
    attend(q, q, q, layout, layout, bias=bias)
    assert len(taken) == 2
    attend(q, q, q, layout, Packed.of([3, 4]), bias=bias)
    q = random(long.num_tokens, 2, 4)
    attend(q, q, q, long, long)
    attend(q, q, q, long, long, causal=True)
    attend(q, q, q, long, long, dropout=0.1)
    assert len(taken) == 2
    attend(q, q, q, long, long, causal=True, dropout=0.1)
    assert len(taken) == 3
    half = q.detach().bfloat16().requires_grad_()
    attend(half, half, half, long, long, causal=True, dropout=0.1)
    assert len(taken) == 3


def test_what_a_causal_query_cannot_see_is_not_computed():
    layout = Packed.of([256, 256])
    [bucket] = Plan.of(layout, layout, 2, Rule(causal=True)).buckets
    assert [(tile.first, tile.last, tile.keys) for tile in bucket.tiles] == [
        (192, 256, 256), (128, 192, 192), (64, 128, 128), (0, 64, 64)
    ]  # fmt: skip
    [whole] = Plan.of(layout, layout, 2, Rule()).buckets
    assert [(tile.first, tile.last, tile.keys) for tile in whole.tiles] == [(0, 256, 256)]
