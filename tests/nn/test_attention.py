from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lexmill.nn import Attention, Dense, Packed, attend, attention_weights

RULES = [{}, {"causal": True}, {"window": 2}, {"causal": True, "window": 2}]
lengths = st.lists(st.integers(1, 6), min_size=1, max_size=6)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def by_hand(q, k, v, q_layout, k_layout, *, causal=False, window=None, bias=None, align="end"):
    """One query at a time."""
    out = torch.zeros_like(q)
    shared = q.shape[1] // k.shape[1]
    for s in range(q_layout.num_sequences):
        q0, q1 = q_layout.offsets[s : s + 2].tolist()
        k0, k1 = k_layout.offsets[s : s + 2].tolist()
        for i in range(q1 - q0):
            place = i if align == "start" else (k1 - k0) - (q1 - q0) + i
            for head in range(q.shape[1]):
                seen = [
                    j
                    for j in range(k1 - k0)
                    if (not causal or j <= place) and (window is None or abs(j - place) < window)
                ]
                keys = k[k0:k1, head // shared][seen]
                scores = keys @ q[q0 + i, head] / q.shape[2] ** 0.5
                if bias is not None:
                    scores = scores + bias[head, place, seen]
                out[q0 + i, head] = scores.softmax(0) @ v[k0:k1, head // shared][seen]
    return out


def pad(x, layout):
    return x[layout.padded.rows]


def dense(layout):
    return Dense(layout.padded.mask)


@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=15, deadline=None)
@given(lens=lengths, kv_heads=st.sampled_from([1, 2, 4]), biased=st.booleans())
def test_packed_and_dense_attention_equal_one_query_at_a_time(rule, lens, kv_heads, biased):
    torch.manual_seed(0)
    layout = Packed.of(lens)
    q, k, v = random(sum(lens), 4, 8), random(sum(lens), kv_heads, 8), random(sum(lens), kv_heads, 8)
    bias = random(4, 6, 6) if biased else None
    expected = by_hand(q, k, v, layout, layout, bias=bias, **rule)
    packed = attend(q, k, v, layout, layout, bias=bias, **rule)
    padded = attend(
        pad(q, layout), pad(k, layout), pad(v, layout), dense(layout), dense(layout), bias=bias, **rule
    ).flatten(0, 1)[layout.padded.cells]
    weight = torch.randn_like(q)
    grads = []
    for out in (expected, packed, padded):
        torch.testing.assert_close(out, expected, atol=1e-12, rtol=0)
        grads.append(torch.autograd.grad((out * weight).sum(), (q, k, v), retain_graph=True))
    for other in grads[1:]:
        torch.testing.assert_close(other, grads[0], atol=1e-10, rtol=0)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("align", ["start", "end"])
def test_one_query_a_sequence_sits_at_the_start_or_the_end(rule, align):
    keys = Packed.of([3, 5, 3, 1])
    queries = keys.single
    q, k, v = random(4, 2, 4), random(12, 2, 4), random(12, 2, 4)
    expected = by_hand(q, k, v, queries, keys, align=align, **rule)
    torch.testing.assert_close(attend(q, k, v, queries, keys, align=align, **rule), expected)
    side = attend(q[:, None], pad(k, keys), pad(v, keys), queries_dense(4), dense(keys), align=align, **rule)
    torch.testing.assert_close(side[:, 0], expected)
    mixed = attend(q, pad(k, keys), pad(v, keys), queries, dense(keys), align=align, **rule)
    torch.testing.assert_close(mixed, expected)


def queries_dense(count: int) -> Dense:
    return Dense(torch.ones(count, 1, dtype=torch.bool))


@settings(max_examples=20, deadline=None)
@given(pairs=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 5)), min_size=1, max_size=6))
def test_cross_attention_has_layouts_of_its_own_on_each_side(pairs):
    torch.manual_seed(0)
    queries, keys = Packed.of([a for a, _ in pairs]), Packed.of([b for _, b in pairs])
    q, k, v = random(queries.num_tokens, 2, 4), random(keys.num_tokens, 2, 4), random(keys.num_tokens, 2, 4)
    expected = by_hand(q, k, v, queries, keys)
    torch.testing.assert_close(attend(q, k, v, queries, keys), expected)
    mixed = attend(q, pad(k, keys), pad(v, keys), queries, dense(keys))
    torch.testing.assert_close(mixed, expected)


def test_a_plan_is_made_once_for_a_pair_of_layouts():
    layout, other = Packed.of([2, 3, 2]), Packed.of([1, 1, 4])
    made = []
    for _ in range(2):
        for keys in (layout, other):
            plan = layout.plan_for(keys, "kind", lambda keys=keys: made.append(keys) or len(made))
            assert plan == made.index(keys) + 1
    assert made == [layout, other]


def test_dropout_keeps_the_expected_value_and_drops():
    torch.manual_seed(0)
    layout = Packed.of([4, 3, 4])
    q, k, v = random(11, 2, 8), random(11, 1, 8), random(11, 1, 8)
    exact = attend(q, k, v, layout, layout, causal=True)
    drawn = [attend(q, k, v, layout, layout, causal=True, dropout=0.3) for _ in range(800)]
    assert not torch.equal(drawn[0], drawn[1])
    assert (torch.stack(drawn).mean(0) - exact).abs().max() < 0.2


@pytest.mark.parametrize("rule", RULES)
def test_attention_weights_sum_to_one_and_give_the_same_output(rule):
    layout = Packed.of([3, 5, 3])
    q, k, v = random(11, 4, 4), random(11, 2, 4), random(11, 2, 4)
    weights = attention_weights(q, k, layout, layout, **rule)
    out = attend(q, k, v, layout, layout, **rule).split([3, 5, 3])
    for seen, values, expected in zip(weights, v.split([3, 5, 3]), out, strict=True):
        torch.testing.assert_close(seen.sum(-1), torch.ones_like(seen[..., 0]))
        wide = values.repeat_interleave(2, 1).transpose(0, 1)
        torch.testing.assert_close((seen @ wide).transpose(0, 1), expected)


def test_dense_queries_over_packed_keys_are_refused():
    q = random(1, 2, 2, 4)
    with pytest.raises(TypeError, match="dense keys"):
        attend(q, q[0], q[0], Dense(torch.ones(1, 2, dtype=torch.bool)), Packed.of([2]))


def test_the_module_hands_out_what_it_computed_on_request():
    torch.manual_seed(0)
    layout = Packed.of([3, 2])
    attention = Attention(8, 2, 6, num_kv_heads=1).double()
    seen: dict[str, torch.Tensor] = {}
    hidden = random(5, 8)
    out = attention(hidden, layout, collect=seen)
    again = attend(seen["query"], seen["key"], seen["value"], layout, layout)
    torch.testing.assert_close(attention.output(again.flatten(1)), out)
    assert [seen[name].shape for name in ("query", "key", "value")] == [(5, 2, 6), (5, 1, 6), (5, 1, 6)]


@pytest.mark.parametrize("autocast", [False, True])
def test_short_sequences_in_bfloat16_are_computed_in_float32_and_rounded(autocast: bool) -> None:
    torch.manual_seed(0)
    layout = Packed.of(torch.tensor([5, 17, 17, 60]))
    q, k, v = (torch.randn(layout.num_tokens, 4, 8).bfloat16() for _ in range(3))
    with torch.no_grad():
        wide = attend(q.float(), k.float(), v.float(), layout, layout)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found = attend(q, k, v, layout, layout)
    assert torch.equal(found, wide.bfloat16())
