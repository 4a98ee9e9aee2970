"""T5 and mT5 against `transformers`: encoder, decoder, loss, files; and packed against dense."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.models.oracle import Texts, gap, stored
from torch.nn import functional as F

from lexmill.errors import UserError
from lexmill.models import ModelConfig, families, init, load, save
from lexmill.nn import Packed

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:transformers")

MODELS: dict[str, tuple[str, dict[str, Any], bool]] = {
    "t5": ("T5", {}, False),
    "t5_narrow_reach": ("T5", {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 9}, False),
    "t5_v1_1": ("T5", {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}, True),
    "t5_uneven": ("T5", {"num_decoder_layers": 3, "feed_forward_proj": "gated-silu", "d_kv": 12}, False),
    "mt5": ("MT5", {}, True),
}
"""The class, its config, and whether its output matrix is its own."""
SOURCES, TARGETS = [7, 3, 12, 3, 7, 1], [4, 9, 1, 2, 11, 5]


def reference(name: str) -> Any:
    import transformers

    kind, changes, untied = MODELS[name]
    sizes = {"vocab_size": 97, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    config = getattr(transformers, f"{kind}Config")(**{**sizes, **changes}, decoder_start_token_id=0)
    model = getattr(transformers, f"{kind}ForConditionalGeneration")(config).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "norm" in parameter_name or "relative" in parameter_name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    if untied:
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    return model


@pytest.fixture(params=MODELS)
def pair(request, tmp_path):
    """A random model of `transformers`, and the same one as we load it."""
    torch.manual_seed(1)
    theirs = reference(request.param)
    return theirs, load(stored(theirs, tmp_path / "in"))


def test_encoder_decoder_and_loss_equal_those_of_transformers(pair):
    theirs, ours = pair
    head = ours.add_language_head("lm").eval()
    sources, targets = Texts(SOURCES), Texts(TARGETS)
    labels = targets.dense_ids.masked_fill(~targets.mask, -100)
    with torch.no_grad():
        expected = theirs(sources.dense_ids, attention_mask=sources.mask, labels=labels)
        assert gap(ours.hidden(*sources.packed), sources.rows(expected.encoder_last_hidden_state)) <= 1e-5
        logits = head(ours.decoded(*targets.packed, ours.memory(*sources.packed)))
        assert gap(logits, targets.rows(expected.logits)) <= 1e-5
        assert float(F.cross_entropy(logits, targets.ids)) == pytest.approx(float(expected.loss), rel=1e-5)
        dense = head(ours.decoded(*targets.dense, ours.memory(*sources.dense)))
        assert gap(targets.rows(dense), targets.rows(expected.logits)) <= 1e-5


def test_a_round_trip_keeps_every_tensor_and_transformers_reads_it(pair, tmp_path):
    theirs, ours = pair
    ours.add_language_head("lm")
    (tmp_path / "out").mkdir()
    save(ours, tmp_path / "out")
    before, after = (load_file(tmp_path / side / "model.safetensors") for side in ("in", "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    again, report = type(theirs).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    sources, targets = Texts(SOURCES), Texts(TARGETS)
    with torch.no_grad():
        told = {"attention_mask": sources.mask, "labels": targets.dense_ids}
        assert torch.equal(again.eval()(sources.dense_ids, **told).logits, theirs(sources.dense_ids, **told).logits)


def test_a_config_keeps_its_meaning(pair, tmp_path):
    theirs, ours = pair
    family = families.find(ours.family)
    assert family.read_config(family.write_config(ours.config, {})) == ours.config
    assert ModelConfig.from_dict(ours.config.to_dict()) == ours.config
    before = json.loads((tmp_path / "in" / "config.json").read_text())
    after = family.write_config(ours.config, before)
    assert after | {"tie_word_embeddings": True} == before
    assert after["tie_word_embeddings"] == ours.config.tied_output == (theirs.lm_head.weight is theirs.shared.weight)


def test_new_weights_are_read_by_transformers(tmp_path):
    import transformers

    config = load(stored(reference("t5_v1_1"), tmp_path)).config
    model = init(config, "t5", 0)
    torch.manual_seed(0)
    model.add_language_head("lm")
    save(model, tmp_path)
    again, report = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert torch.equal(again.lm_head.weight, model.heads["lm"].output.weight)


def test_packed_equals_dense_in_values_and_gradients():
    torch.manual_seed(0)
    config = families.find("t5").read_config({"vocab_size": 97, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2})
    model = init(config, "t5", 0).double()
    sources, targets = Texts(SOURCES), Texts(TARGETS)
    with torch.no_grad():
        for side in (model.trunk.relative, model.trunk.decoder.relative):
            side.table.weight.normal_()
    model.set_dropout(0.0)

    def run(arranged: str) -> torch.Tensor:
        memory = model.memory(*getattr(sources, arranged))
        out = model.decoded(*getattr(targets, arranged), memory)
        return out if arranged == "packed" else targets.rows(out)

    packed, dense = run("packed"), run("dense")
    assert gap(packed.detach(), dense.detach()) <= 1e-10
    weight = torch.randn_like(packed)

    def gradients(out: torch.Tensor) -> dict[str, torch.Tensor]:
        model.zero_grad()
        (out * weight).sum().backward()
        return {name: p.grad.to_dense().clone() for name, p in model.named_parameters()}

    ours, theirs = gradients(packed), gradients(dense)
    for name, grad in theirs.items():
        torch.testing.assert_close(ours[name], grad, atol=1e-9, rtol=1e-9)


def test_a_source_may_have_several_targets():
    torch.manual_seed(0)
    config = families.find("t5").read_config({"vocab_size": 97, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2})
    model = init(config, "t5", 0).double().eval()
    sources, targets = Texts([5, 3]), Texts([4, 2, 6])
    owners = torch.tensor([0, 0, 1])
    together = model.decoded(*targets.packed, model.memory(*sources.packed).of(owners))
    parts, starts = [], sources.layout.offsets
    for i, owner in enumerate(owners.tolist()):
        ids = sources.ids[starts[owner] : starts[owner + 1]]
        memory = model.memory(ids, torch.arange(len(ids)), Packed.of([len(ids)]))
        said = targets.ids[targets.layout.offsets[i] : targets.layout.offsets[i + 1]]
        parts.append(model.decoded(said, torch.arange(len(said)), Packed.of([len(said)]), memory))
    assert gap(together.detach(), torch.cat(parts).detach()) <= 1e-10


def test_a_classifier_on_the_encoder_survives_its_files(tmp_path):
    config = families.find("t5").read_config({"vocab_size": 97, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2})
    model, texts = init(config, "t5", 0), Texts(SOURCES)
    model.add_classifier("label", 3)
    save(model.eval(), tmp_path)
    with torch.no_grad():
        logits = model(*texts.packed)["label"]
        assert logits.shape == (len(SOURCES), 3)
        assert torch.equal(load(tmp_path)(*texts.packed)["label"], logits)


def test_what_is_no_encoder_decoder_says_so():
    with pytest.raises(UserError, match="is_encoder_decoder"):
        families.find("t5").read_config({"is_encoder_decoder": False})
    config = ModelConfig(20, 8, 1, 2, 2, 4, 8, 16)
    with pytest.raises(UserError, match="no decoder"):
        _ = init(config, "bert", 0).decoding_trunk
