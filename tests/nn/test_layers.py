from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from lexmill.errors import UserError
from lexmill.nn import MLP, Dense, Embedding, KVCache, LayerNorm, Linear, Packed, RMSNorm, RopeScaling, Rotary, pool
from lexmill.nn import linear as kinds
from lexmill.nn.activation import ACTIVATIONS
from lexmill.nn.matmul import fitting_rows
from lexmill.nn.rotary import frequencies, rotate


@given(lens=st.lists(st.integers(1, 5), min_size=1, max_size=8))
def test_grouping_puts_equal_lengths_side_by_side_and_goes_back(lens):
    layout = Packed.of(lens)
    rows = torch.arange(layout.num_tokens)
    near = layout.grouped
    if near is None:
        runs = torch.unique_consecutive(layout.lengths)
        assert len(runs) == len(set(lens))
        return
    filler = fitting_rows(layout.num_tokens, layout.device) - layout.num_tokens
    assert near.layout.lengths.tolist() == sorted([*lens, filler] if filler else lens)
    assert torch.equal(rows[near.rows][near.restore_rows], rows)
    assert torch.equal(near.layout.lengths[near.restore_sequences], layout.lengths)


def test_numbers_of_rows_are_few_and_hardly_larger(monkeypatch):
    monkeypatch.setattr("lexmill.nn.matmul._onednn_is_faster", lambda: True)
    fitted = [fitting_rows(rows, torch.device("cpu")) for rows in range(1, 4097)]
    assert all(0 <= new - rows <= max(7, rows // 64) for rows, new in enumerate(fitted, 1))
    assert len(set(fitted)) < 400
    assert fitting_rows(517, torch.device("meta")) == 517


@given(lens=st.lists(st.integers(1, 5), min_size=1, max_size=8))
def test_padding_and_back_is_the_identity(lens):
    layout = Packed.of(lens)
    rows = torch.arange(layout.num_tokens)
    assert torch.equal(rows[layout.padded.rows].flatten()[layout.padded.cells], rows)
    assert layout.padded.mask.sum(1).tolist() == lens


@pytest.mark.parametrize("how", ["first", "last", "mean"])
def test_pooling_packed_equals_pooling_dense(how):
    layout = Packed.of([3, 1, 4])
    hidden = torch.randn(8, 5, dtype=torch.float64, requires_grad=True)
    packed = pool(hidden, layout, how)
    dense = pool(hidden[layout.padded.rows], Dense(layout.padded.mask), how)
    expected = [{"first": x[0], "last": x[-1], "mean": x.mean(0)}[how] for x in hidden.split([3, 1, 4])]
    torch.testing.assert_close(packed, torch.stack(expected))
    torch.testing.assert_close(dense, packed)
    [a] = torch.autograd.grad(packed.square().sum(), hidden)
    [b] = torch.autograd.grad(dense.square().sum(), hidden)
    torch.testing.assert_close(a, b)


def test_norms_equal_those_of_torch():
    x = torch.randn(7, 12, dtype=torch.float64)
    layer, rms = LayerNorm(12, 1e-5).double(), RMSNorm(12, 1e-5).double()
    torch.testing.assert_close(layer(x), F.layer_norm(x, (12,), eps=1e-5))
    torch.testing.assert_close(rms(x), F.rms_norm(x, (12,), eps=1e-5))
    assert rms.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu", "relu"])
def test_gated_mlp_multiplies_by_its_gate(activation):
    x = torch.randn(3, 4)
    plain, gated = MLP(4, 6, activation), MLP(4, 6, activation, gated=True, bias=False)
    acts = {"gelu": F.gelu, "gelu_tanh": lambda t: F.gelu(t, approximate="tanh"), "silu": F.silu, "relu": F.relu}
    act = acts[activation]
    torch.testing.assert_close(plain(x), plain.down(act(plain.up(x))))
    assert gated.gate is not None
    torch.testing.assert_close(gated(x), gated.down(act(gated.gate(x)) * gated.up(x)))
    assert gated.up.bias is None


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
@pytest.mark.parametrize("gated", [False, True])
def test_the_feed_forward_layer_says_the_same_with_and_without_gradients(activation, gated):
    mlp = MLP(24, 40, activation, gated=gated)
    x = torch.randn(32, 24)
    wanted = mlp(x)
    with torch.no_grad():
        found = mlp(x)
        seen = []
        layer = mlp.up if mlp.gate is None else mlp.gate
        layer.register_forward_hook(lambda module, args, out: seen.append(out))
        again = mlp(x)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(again, wanted, rtol=1e-5, atol=1e-6)
    assert len(seen) == 1


def test_sparse_embedding_gradient_has_only_the_rows_seen():
    table = Embedding(10, 3, sparse=True)
    table(torch.tensor([2, 7, 2])).sum().backward()
    grad = table.weight.grad
    assert grad is not None
    assert grad.is_sparse
    assert sorted(set(grad.coalesce().indices()[0].tolist())) == [2, 7]
    assert torch.equal(grad.to_dense()[2], torch.full((3,), 2.0))


def test_rotation_keeps_lengths_and_depends_on_distance_alone():
    rotary = Rotary(8)
    q, k = torch.randn(1, 1, 8, dtype=torch.float64), torch.randn(1, 1, 8, dtype=torch.float64)

    def turned(x, position):
        return rotate(x, rotary(torch.tensor([position]), position + 1, torch.float64))

    torch.testing.assert_close(turned(q, 33).norm(), q.norm())
    near, far = (turned(q, 5) * turned(k, 2)).sum(), (turned(q, 105) * turned(k, 102)).sum()
    torch.testing.assert_close(near, far, atol=1e-5, rtol=0)


def test_rotary_tables_grow_and_serve_training_after_inference():
    rotary = Rotary(4)
    with torch.inference_mode():
        short = rotary(torch.arange(10), 10, torch.float32)
    x = torch.randn(200, 1, 4, requires_grad=True)
    long = rotary(torch.arange(200), 200, torch.float32)
    rotate(x, long).sum().backward()
    rotate(x[:10], rotary(torch.arange(10), 10, torch.float32)).sum().backward()
    torch.testing.assert_close(long.cos[:10], short.cos.clone())


def test_llama3_scaling_keeps_short_wavelengths_and_divides_long_ones():
    scaling = RopeScaling("llama3", 8.0, 1.0, 4.0, 64)
    base, scaled = frequencies(64, 10_000.0, None), frequencies(64, 10_000.0, scaling)
    wavelength = 2 * torch.pi / base
    torch.testing.assert_close(scaled[wavelength < 16], base[wavelength < 16])
    torch.testing.assert_close(scaled[wavelength > 64], base[wavelength > 64] / 8)
    assert (scaled.diff() <= 0).all()
    torch.testing.assert_close(frequencies(8, 10.0, RopeScaling("linear", 4.0)), frequencies(8, 10.0, None) / 4)


@settings(max_examples=20, deadline=None)
@given(steps=st.lists(st.lists(st.integers(1, 4), min_size=3, max_size=3), min_size=1, max_size=4))
def test_cache_holds_every_sequence_in_order_and_grows(steps):
    cache = KVCache([(1, 2)], 3, capacity=2)
    told: list[list[float]] = [[], [], []]
    count = 0.0
    for lens in steps:
        layout = Packed.of(lens)
        fresh = []
        for sequence, length in enumerate(lens):
            for _ in range(length):
                count += 1
                fresh.append(count)
                told[sequence].append(count)
        keys = torch.tensor(fresh)[:, None, None].expand(-1, 1, 2)
        cache.begin(layout)
        found, _, key_layout = cache.layers[0].extend(keys, -keys)
        cache.commit()
    rows = found if isinstance(key_layout, Packed) else found[key_layout.mask]
    assert rows[:, 0, 0].tolist() == [x for one in told for x in one]
    cache.keep(torch.tensor([2, 0]))
    assert cache.lengths.tolist() == [len(told[2]), len(told[0])]
    assert cache.layers[0].values.first(len(told[2]))[0, :, 0, 0].tolist() == [-x for x in told[2]]


def test_cache_refuses_tokens_of_another_number_of_sequences():
    with pytest.raises(ValueError, match="holds 2 sequences"):
        KVCache([(1, 2)], 2, 4).begin(Packed.of([1, 1, 1]))


def test_kinds_of_linear_layers_are_found_by_name():
    assert kinds.find("dense") is Linear
    assert kinds.register("dense", Linear) is Linear
    with pytest.raises(UserError, match="dense"):
        kinds.find("dens")
    with pytest.raises(ValueError, match="already"):
        kinds.register("dense", torch.nn.Linear)
