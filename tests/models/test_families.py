"""The harness that every family passes: parity with `transformers` on small models, and the way there and back."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.models.oracle import DECODERS, ENCODERS, Texts, gap, reference, stored

from lexmill.errors import UserError
from lexmill.models import families, load, save

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:transformers")
ALL = ENCODERS | DECODERS


def texts_for(theirs) -> tuple[Texts, dict[str, torch.Tensor], torch.Tensor | None]:
    """Texts without the padding id, what `transformers` is told of segment types, and what we are."""
    texts = Texts(types=getattr(theirs.config, "type_vocab_size", 1))
    pad = theirs.config.pad_token_id or 0
    texts.ids[texts.ids == pad] = pad + 1
    texts.dense_ids = torch.where(texts.mask, texts.ids[texts.layout.padded.rows], pad)
    typed = "token_type_ids" in inspect.signature(theirs.forward).parameters and hasattr(
        theirs.config, "type_vocab_size"
    )
    return texts, {"token_type_ids": texts.dense_types} if typed else {}, texts.types if typed else None


@pytest.mark.parametrize("name", ALL)
def test_hidden_states_equal_those_of_transformers(name, tmp_path):
    torch.manual_seed(1)
    theirs = reference(ALL[name][0], **ALL[name][1])
    ours = load(stored(theirs, tmp_path))
    texts, told, types = texts_for(theirs)
    with torch.no_grad():
        expected = texts.rows(theirs(texts.dense_ids, attention_mask=texts.mask, **told).last_hidden_state)
        assert gap(ours.hidden(*texts.packed, types=types), expected) <= 1e-5
        dense_types = None if types is None else texts.dense_types
        assert gap(texts.rows(ours.hidden(*texts.dense, types=dense_types)), expected) <= 1e-5


@pytest.mark.parametrize("name", DECODERS)
def test_language_model_logits_equal_those_of_transformers(name, tmp_path):
    torch.manual_seed(2)
    kind, changes = DECODERS[name]
    theirs = reference(kind, "LMHeadModel" if kind == "GPT2" else "ForCausalLM", **changes)
    ours = load(stored(theirs, tmp_path))
    assert ours.add_language_head("lm").tied == theirs.config.tie_word_embeddings
    texts = Texts()
    with torch.no_grad():
        expected = texts.rows(theirs(texts.dense_ids, attention_mask=texts.mask).logits)
        assert gap(ours.eval()(*texts.packed)["lm"], expected) <= 1e-5


@pytest.mark.parametrize("name", ENCODERS)
def test_masked_model_logits_equal_those_of_transformers_and_go_back(name, tmp_path):
    torch.manual_seed(2)
    theirs = reference(ENCODERS[name][0], "ForMaskedLM", **ENCODERS[name][1])
    ours = load(stored(theirs, tmp_path / "in"))
    if "lm" not in families.find(ours.family).heads:
        pytest.skip("the family's table names no language head")
    assert ours.add_language_head("lm").tied
    texts, told, types = texts_for(theirs)
    with torch.no_grad():
        expected = theirs(texts.dense_ids, attention_mask=texts.mask, **told).logits
        assert gap(ours.eval()(*texts.packed, types=types)["lm"], texts.rows(expected)) <= 1e-5
    (tmp_path / "out").mkdir()
    save(ours, tmp_path / "out")
    assert (
        load_file(tmp_path / "out" / "model.safetensors").keys()
        == load_file(tmp_path / "in" / "model.safetensors").keys()
    )
    again, report = type(theirs).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    with torch.no_grad():
        assert torch.equal(again.eval()(texts.dense_ids, attention_mask=texts.mask, **told).logits, expected)
        assert gap(load(tmp_path / "out")(*texts.packed, types=types)["lm"], texts.rows(expected)) <= 1e-5


@pytest.mark.parametrize("name", ALL)
def test_a_stored_classifier_gives_the_logits_of_transformers_and_goes_back(name, tmp_path):
    torch.manual_seed(3)
    theirs = reference(ALL[name][0], "ForSequenceClassification", num_labels=5, **ALL[name][1])
    ours = load(stored(theirs, tmp_path / "in"))
    ours.add_stored_classifier("topic")
    texts, told, types = texts_for(theirs)
    with torch.no_grad():
        expected = theirs(texts.dense_ids, attention_mask=texts.mask, **told).logits
        assert gap(ours.eval()(*texts.packed, types=types)["topic"], expected) <= 1e-5
    (tmp_path / "out").mkdir()
    save(ours, tmp_path / "out")
    again, report = type(theirs).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    with torch.no_grad():
        assert torch.equal(again.eval()(texts.dense_ids, attention_mask=texts.mask, **told).logits, expected)


@pytest.mark.parametrize("name", ALL)
def test_a_token_classifier_we_saved_loads_in_transformers_with_the_same_logits(name, tmp_path):
    from transformers import AutoModelForTokenClassification

    torch.manual_seed(5)
    ours = load(stored(reference(ALL[name][0], **ALL[name][1]), tmp_path / "in"))
    ours.add_token_classifier("tags", 3)
    (tmp_path / "out").mkdir()
    save(ours, tmp_path / "out", labels=["O", "B-x", "I-x"])
    theirs, report = AutoModelForTokenClassification.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"]
    assert all("pooler" in spare for spare in report["unexpected_keys"])  # the source's own, kept
    assert theirs.config.id2label == {0: "O", 1: "B-x", 2: "I-x"}
    texts, told, types = texts_for(theirs)
    with torch.no_grad():
        expected = texts.rows(theirs.eval()(texts.dense_ids, attention_mask=texts.mask, **told).logits)
        assert gap(ours.eval()(*texts.packed, types=types)["tags"], expected) <= 1e-5
        again = load(tmp_path / "out")
        assert torch.equal(again(*texts.packed, types=types)["tags"], ours(*texts.packed, types=types)["tags"])


@pytest.mark.parametrize("name", ALL)
def test_training_gradients_of_packed_equal_those_of_dense(name, tmp_path):
    torch.manual_seed(4)
    theirs = reference(ALL[name][0], **ALL[name][1])
    ours = load(stored(theirs, tmp_path), dtype=torch.float64).train()
    ours.set_dropout(0.0)
    texts, _, types = texts_for(theirs)
    packed = ours.hidden(*texts.packed, types=types)
    weight = torch.randn_like(packed)
    grads = []
    for rows in (packed, texts.rows(ours.hidden(*texts.dense, types=None if types is None else texts.dense_types))):
        ours.zero_grad()
        (rows * weight).sum().backward()
        grads.append({n: p.grad.to_dense().clone() for n, p in ours.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for parameter, grad in grads[1].items():
        torch.testing.assert_close(grads[0][parameter], grad, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_round_trip_keeps_every_name_type_bit_and_config_key(name, dtype, tmp_path):
    kind, changes = ALL[name]
    source = stored(reference(kind, "ForSequenceClassification", **changes).to(dtype), tmp_path / "in")
    (tmp_path / "out").mkdir()
    save(load(source), tmp_path / "out")
    before, after = (load_file(tmp_path / side / "model.safetensors") for side in ("in", "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) and before[key].dtype == after[key].dtype for key in before)
    before, after = (json.loads((tmp_path / side / "config.json").read_text()) for side in ("in", "out"))
    assert before == after


@pytest.mark.parametrize("name", ALL)
def test_a_config_written_without_a_source_reads_back_the_same(name, tmp_path):
    kind, changes = ALL[name]
    model = load(stored(reference(kind, **changes), tmp_path))
    family = families.find(model.family)
    assert family.read_config(family.write_config(model.config, {})) == model.config


def test_tables_name_every_tensor_of_their_trunk_once():
    for family in families.known():
        config = family.read_config({})
        places = family.stored(config)
        assert len({place.name for place in places}) == len(places), family.name
        ours = [name for place in places for name in place.ours]
        assert len(set(ours)) == len(ours), family.name
        with torch.device("meta"):
            assert family.trunk(config).state_dict().keys() <= set(ours), family.name


def test_the_page_on_families_lists_all_of_them():
    page = (Path(__file__).parents[2] / "docs" / "adding-a-family.md").read_text("utf-8")
    rows = [
        line.split("|")[1]
        for line in page.split("## The families there are")[1].split("##")[0].splitlines()
        if "`" in line[:4]
    ]
    assert sorted(name for row in rows for name in re.findall("`(.+?)`", row)) == sorted(
        f.name for f in families.known()
    )


@pytest.mark.parametrize("known", [{"model_type": "mamba"}, {"architectures": ["MambaModel"]}, {}])
def test_an_unknown_architecture_is_an_error_that_lists_the_families(known):
    with pytest.raises(UserError) as error:
        families.recognise(known, "config.json")
    assert all(family.name in str(error.value.hint) for family in families.known())
    assert "nearest" not in str(error.value.hint)


def test_an_unknown_architecture_is_told_the_nearest_family_and_what_that_does_not_know():
    import transformers

    config = transformers.Gemma2Config(num_hidden_layers=2, attn_logit_softcapping=30.0).to_dict()
    with pytest.raises(UserError) as error:
        families.recognise(config, "config.json")
    hint = str(error.value.hint)
    assert "nearest by its keys is 'mistral'" in hint
    assert "attn_logit_softcapping=30.0" in hint
    assert "query_pre_attn_scalar=256" in hint
    assert "vocab_size" not in hint
    assert "use_cache" not in hint


def test_an_unknown_architecture_is_told_of_a_value_that_the_nearest_family_cannot_represent():
    hf = {"model_type": "strange", "n_embd": 32, "n_layer": 2, "n_head": 2, "activation_function": "mish"}
    with pytest.raises(UserError, match="'strange'") as error:
        families.recognise(hf, "config.json")
    assert "'gpt2'" in str(error.value.hint)
    assert "activation_function: 'mish'" in str(error.value.hint)


@pytest.mark.parametrize(
    ("name", "changes", "where"),
    [
        ("roberta", {"max_position_embeddings": "many"}, "max_position_embeddings"),
        ("mistral", {"sliding_window": 1.5}, "sliding_window"),
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window"),
        ("distilbert", {"activation": "mish"}, "activation"),
    ],
)
def test_what_cannot_be_represented_is_an_error_at_its_key(name, changes, where):
    with pytest.raises(UserError) as error:
        families.find(name).read_config(changes)
    assert error.value.where == where
