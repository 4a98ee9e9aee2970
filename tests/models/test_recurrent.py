"""LSTM and GRU: packed is what torch's own layers give text by text, and files hold torch's own names."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from tests.models.oracle import Texts, gap
from torch import nn

from lexmill import models
from lexmill.errors import UserError
from lexmill.models import Model, RecurrentConfig, greedy
from lexmill.nn import Packed

CELLS = {"lstm": nn.LSTM, "gru": nn.GRU}
SHAPES = [
    ("lstm", {"bidirectional": True, "num_layers": 2}),
    ("lstm", {"bidirectional": False}),
    ("gru", {"bidirectional": True}),
    ("gru", {"bidirectional": False, "num_layers": 2}),
]


def tiny(cell: str, seed: int = 0, **changes) -> Model:
    config = RecurrentConfig(97, cell, 12, 16, dropout=0.3, **changes)
    return models.init(config, cell, seed).eval()


def torch_layers(model: Model, cell: str, directory) -> nn.LSTM | nn.GRU:
    """Torch's own layers with the weights of the saved file, under the names they have there."""
    models.save(model, directory)
    stored = load_file(directory / "model.safetensors")
    config = model.trunk.config
    layers = CELLS[cell](12, 16, config.num_layers, bidirectional=not config.causal, batch_first=True)
    found = {name.removeprefix("rnn."): tensor for name, tensor in stored.items() if name.startswith("rnn.")}
    layers.load_state_dict(found, strict=True)
    return layers.eval()


@pytest.mark.parametrize(("cell", "changes"), SHAPES)
def test_packed_and_dense_equal_a_loop_over_single_texts_through_torch(cell, changes, tmp_path):
    model, texts = tiny(cell, **changes), Texts()
    layers = torch_layers(model, cell, tmp_path)
    table = model.trunk.embeddings.token
    with torch.no_grad():
        loop = [layers(table(ids).unsqueeze(0))[0][0] for ids in texts.ids.split(texts.layout.lengths.tolist())]
        expected = torch.cat(loop)
        assert gap(model.hidden(*texts.packed), expected) <= 1e-6
        assert gap(texts.rows(model.hidden(*texts.dense)), expected) <= 1e-6
        last = torch.stack([one[-1] for one in loop])
        assert gap(model.hidden(*texts.packed, only="last"), last) <= 1e-6
    assert model.trunk.positions_computed == 2 * len(texts.ids) + texts.layout.num_tokens


@pytest.mark.parametrize(("cell", "changes"), SHAPES)
def test_gradients_of_packed_equal_those_of_single_texts(cell, changes):
    model, texts = tiny(cell, **changes).double(), Texts()
    asked = torch.randn(len(texts.ids), model.config.hidden_size, dtype=torch.float64)
    (model.hidden(*texts.packed) * asked).sum().backward()
    packed = {name: p.grad.to_dense().clone() for name, p in model.named_parameters()}
    model.zero_grad()
    lengths = texts.layout.lengths.tolist()
    parts = (each.split(lengths) for each in (texts.ids, texts.positions, asked))
    for ids, positions, wanted in zip(*parts, strict=True):
        (model.hidden(ids, positions, Packed.of([len(ids)])) * wanted).sum().backward()
    for name, p in model.named_parameters():
        assert gap(packed[name], p.grad.to_dense()) <= 1e-10, name


@pytest.mark.parametrize(("cell", "changes"), SHAPES)
def test_a_saved_model_loads_with_the_same_config_and_bits(cell, changes, tmp_path):
    model, texts = tiny(cell, **changes), Texts()
    torch.manual_seed(0)
    model.add_classifier("label", 3)
    models.save(model, tmp_path)
    again = models.load(tmp_path)
    assert again.config == model.config
    assert models.weights_digest(again) == models.weights_digest(model)
    assert torch.equal(again(*texts.packed)["label"], model(*texts.packed)["label"])


@pytest.mark.parametrize("cell", CELLS)
def test_decoding_over_the_kept_state_equals_reading_everything_again(cell):
    model = tiny(cell, bidirectional=False, num_layers=2)
    torch.manual_seed(3)
    model.add_language_head("lm")
    prompts = [[5, 9, 2], [7], [1, 2, 3, 4]]
    found = greedy(model, prompts, [6, 3, 5])
    for prompt, one in zip(prompts, found, strict=True):
        ids = list(prompt)
        for token, logprob in zip(one.ids, one.logprobs, strict=True):
            with torch.no_grad():
                logits = model(torch.tensor(ids), torch.arange(len(ids)), Packed.of([len(ids)]))["lm"][-1]
            best = logits.log_softmax(-1).max(-1)
            assert int(best.indices) == token
            assert logprob == pytest.approx(float(best.values), rel=1e-5)
            ids.append(token)


def test_a_model_that_reads_both_ways_cannot_continue_a_text():
    model = tiny("lstm")
    model.add_language_head("lm")
    with pytest.raises(UserError, match="both ways"):
        greedy(model, [[1, 2]], 3)


def test_new_weights_depend_on_the_seed_alone_and_forget_gates_start_open():
    one, two, other = tiny("lstm"), tiny("lstm"), tiny("lstm", seed=1)
    assert models.weights_digest(one) == models.weights_digest(two) != models.weights_digest(other)
    bias = one.trunk.layers[0].get_parameter("bias_ih_l0").detach()
    assert float(bias[16:32].mean()) > 0.8 > 0.3 > float(bias[:16].abs().max())


def test_the_work_a_token_counts_every_matrix_of_the_recurrence():
    model = tiny("lstm", num_layers=2)
    both_ways = 2 * 4 * 16
    assert model.trunk_parameters() == both_ways * (12 + 16) + both_ways * (32 + 16)
    assert model.training_work() == 6 * model.trunk_parameters()


def test_what_cannot_be_is_refused():
    with pytest.raises(UserError, match="tied"):
        RecurrentConfig(97, tied_output=True)
    with pytest.raises(UserError, match="at least 1"):
        RecurrentConfig(97, num_layers=0)
