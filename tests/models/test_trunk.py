from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.models.oracle import Texts

from lexmill.errors import UserError
from lexmill.models import LayerOverride, ModelConfig, init
from lexmill.nn import Packed, RopeScaling
from lexmill.nn.matmul import fitting_rows
from lexmill.nn.pooling import select

ENCODER = ModelConfig(
    vocab_size=97,
    hidden_size=16,
    num_layers=2,
    num_heads=4,
    num_kv_heads=4,
    head_dim=4,
    intermediate_size=24,
    max_positions=32,
    type_vocab_size=2,
    initializer_range=0.3,
)
DECODER = replace(
    ENCODER,
    num_kv_heads=2,
    head_dim=6,
    type_vocab_size=0,
    norm="rms",
    norm_place="pre",
    norm_eps=1e-6,
    embedding_norm=False,
    final_norm=True,
    positions="rotary",
    rope_scaling=RopeScaling("llama3", 4.0, 1.0, 4.0, 16),
    activation="silu",
    gated=True,
    causal=True,
    attention_bias=False,
    mlp_bias=False,
)
CONFIGS = {
    "encoder": ENCODER,
    "decoder": DECODER,
    "windowed_encoder": replace(ENCODER, window=3),
    "windowed_decoder": replace(DECODER, layers=(LayerOverride(window=2), LayerOverride(num_heads=2, num_kv_heads=1))),
    "no_positions": replace(ENCODER, positions="none", activation="gelu_tanh"),
}
FAMILY = {"encoder": "bert", "decoder": "llama"}


def trunk(config: ModelConfig):
    made = init(config, "llama", seed=0).double().trunk
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return made


def gradients(model, out, weight) -> dict[str, torch.Tensor]:
    model.zero_grad()
    (out * weight).sum().backward()
    return {n: p.grad.to_dense().clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", CONFIGS)
@settings(max_examples=5, deadline=None)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_packed_equals_dense_in_values_and_gradients(name, lengths):
    torch.manual_seed(0)
    model, texts = trunk(CONFIGS[name]), Texts(lengths)
    typed = CONFIGS[name].type_vocab_size > 0
    packed = model(*texts.packed, types=texts.types if typed else None)
    dense = texts.rows(model(*texts.dense, types=texts.dense_types if typed else None))
    assert (packed - dense).abs().max() <= 1e-10
    weight = torch.randn_like(packed)
    ours, theirs = gradients(model, packed, weight), gradients(model, dense, weight)
    for parameter, grad in theirs.items():
        torch.testing.assert_close(ours[parameter], grad, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("only", ["first", "last"])
@pytest.mark.parametrize("arranged", ["packed", "dense"])
@pytest.mark.parametrize("name", CONFIGS)
def test_one_token_of_the_last_layer_equals_choosing_it_afterwards(name, arranged, only):
    torch.manual_seed(0)
    model, texts = trunk(CONFIGS[name]), Texts()
    inputs = getattr(texts, arranged)
    alone = model(*inputs, only=only)
    chosen = select(model(*inputs), inputs[2], only)
    assert (alone - chosen).abs().max() <= 1e-12
    weight = torch.randn_like(alone)
    ours, theirs = gradients(model, alone, weight), gradients(model, chosen, weight)
    for parameter, grad in theirs.items():
        torch.testing.assert_close(ours[parameter], grad, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("name", ["decoder", "windowed_decoder"])
@settings(max_examples=5, deadline=None)
@given(cuts=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=4))
def test_cached_equals_uncached(name, cuts):
    torch.manual_seed(0)
    model, lengths = trunk(CONFIGS[name]), [sum(cut) for cut in cuts]
    texts = Texts(lengths)
    whole = model(*texts.packed).split(lengths)
    ids = texts.ids.split(lengths)
    cache = model.new_cache(len(cuts), 3)
    done = [0] * len(cuts)
    with torch.no_grad():
        for step in range(3):
            layout = Packed.of([cut[step] for cut in cuts])
            spans = [slice(start, start + cut[step]) for start, cut in zip(done, cuts, strict=True)]
            part = torch.cat([one[span] for one, span in zip(ids, spans, strict=True)])
            positions = torch.cat([torch.arange(span.start, span.stop) for span in spans])
            out = model(part, positions, layout, cache=cache)
            expected = torch.cat([one[span] for one, span in zip(whole, spans, strict=True)])
            assert (out - expected).abs().max() <= 1e-10
            done = [span.stop for span in spans]


def test_collecting_gives_every_layer_and_changes_nothing():
    model, texts = trunk(DECODER), Texts()
    seen: list[dict[str, torch.Tensor]] = []
    out = model(*texts.packed, collect=seen)
    torch.testing.assert_close(out, model(*texts.packed), atol=1e-12, rtol=0)
    assert [sorted(one) for one in seen] == [["hidden"], *[["hidden", "key", "query", "value"]] * 2]
    torch.testing.assert_close(model.norm(seen[-1]["hidden"]), out)


def test_given_embeddings_stand_in_for_those_of_the_ids():
    model, texts = trunk(ENCODER), Texts()
    given_ = model.embeddings.token(texts.ids)
    torch.testing.assert_close(model(*texts.packed, inputs_embeds=given_), model(*texts.packed))


def test_dropout_acts_in_training_and_not_in_evaluation():
    config = replace(ENCODER, dropout=0.2, attention_dropout=0.2)
    model, texts = trunk(config), Texts()
    assert not torch.equal(model(*texts.packed), model(*texts.packed))
    model.eval()
    assert torch.equal(model(*texts.packed), model(*texts.packed))


def test_positions_computed_counts_no_padding_when_packed():
    model, texts = trunk(ENCODER), Texts()
    model(*texts.packed)
    packed = fitting_rows(texts.layout.num_tokens, texts.layout.device)
    assert model.positions_computed == packed
    model(*texts.dense)
    assert model.positions_computed == packed + texts.mask.numel()


def test_new_weights_depend_on_the_seed_alone():
    one, two, other = (init(ENCODER, "bert", seed).trunk.state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["embeddings.token.weight"], other["embeddings.token.weight"])


def test_config_survives_json():
    for config in CONFIGS.values():
        assert ModelConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hiden_size": 3}, "hidden_size"),
        ({"layers": [{"num_head": 2}, {}]}, "num_heads"),
        ({"layers": 3}, "list"),
        ({"rope_scaling": {"kind": "linear"}}, "factor"),
        ({"rope_scaling": 4}, "object"),
    ],
)
def test_a_config_with_a_wrong_key_says_which_is_right(change, message):
    with pytest.raises(UserError, match=message):
        ModelConfig.from_dict(DECODER.to_dict() | change)


@pytest.mark.parametrize(
    "change",
    [{"num_kv_heads": 3}, {"layers": (LayerOverride(),)}, {"vocab_size": 0}, {"head_dim": 5}, {"intermediate_size": 0}],
)
def test_an_impossible_structure_is_refused(change):
    with pytest.raises(UserError):
        replace(DECODER, **change)
