from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.models.oracle import LLAMAS, Texts, reference, stored
from tests.models.test_trunk import DECODER, ENCODER

from lexmill.errors import UserError
from lexmill.models import LayerOverride, greedy, init, load, save, weights_digest
from lexmill.nn import RopeScaling
from lexmill.nn.matmul import fitting_rows


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    return stored(reference("Bert"), tmp_path / "bert")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def same_files(one: Path, other: Path) -> None:
    ours, theirs = load_file(other / "model.safetensors"), load_file(one / "model.safetensors")
    assert sorted(ours) == sorted(theirs)
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype
        assert torch.equal(ours[name], tensor), name
    assert json.loads((other / "config.json").read_text()) == json.loads((one / "config.json").read_text())


@pytest.mark.parametrize(
    ("kind", "head"),
    [
        ("Bert", "Model"),
        ("Bert", "ForPreTraining"),
        ("Bert", "ForSequenceClassification"),
        ("Bert", "ForQuestionAnswering"),
        ("Llama", "Model"),
        ("Llama", "ForCausalLM"),
        ("Llama", "ForSequenceClassification"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_round_trip_keeps_every_name_type_bit_and_config_key(kind, head, dtype, tmp_path, out):
    source = stored(reference(kind, head).to(dtype), tmp_path / "source")
    save(load(source), out)
    same_files(source, out)


def test_real_minilm_survives_a_round_trip(minilm, out):
    model = load(minilm)
    assert sorted(model.extras) == ["embeddings.position_ids", "pooler.dense.bias", "pooler.dense.weight"]
    save(model, out)
    same_files(minilm, out)


def test_unknown_config_keys_and_old_tensor_names_are_kept(bert, tmp_path, out):
    tensors = load_file(bert / "model.safetensors")
    old = {name.replace("LayerNorm.weight", "LayerNorm.gamma"): tensor for name, tensor in tensors.items()}
    old = {name.replace("LayerNorm.bias", "LayerNorm.beta"): tensor for name, tensor in old.items()}
    save_file(old, bert / "model.safetensors")
    config = json.loads((bert / "config.json").read_text()) | {"my_note": {"a": [1]}}
    (bert / "config.json").write_text(json.dumps(config))
    save(load(bert), out)
    same_files(bert, out)


def test_sharded_and_single_files_load_alike(tmp_path):
    theirs = reference("Llama", "ForCausalLM")
    theirs.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    theirs.save_pretrained(tmp_path / "single")
    assert len(list((tmp_path / "sharded").glob("model-*.safetensors"))) > 2
    assert weights_digest(load(tmp_path / "sharded")) == weights_digest(load(tmp_path / "single"))


def test_a_wanted_precision_converts_parameters_and_leaves_extras(bert):
    model = load(bert, dtype=torch.float64)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert model.extras["pooler.dense.weight"].dtype == torch.float32


def test_a_changed_precision_is_written_down(bert, out):
    save(load(bert, dtype=torch.bfloat16), out)
    assert load(out).dtype == torch.bfloat16
    assert "bfloat16" in (out / "config.json").read_text()


@pytest.mark.parametrize(("config", "family"), [(ENCODER, "bert"), (DECODER, "llama")])
def test_per_layer_widths_are_saved_and_reloaded(config, family, out):
    pruned = replace(
        config,
        layers=(LayerOverride(num_heads=2, num_kv_heads=2, intermediate_size=7), LayerOverride(intermediate_size=20)),
    )
    model = init(pruned, family, seed=0).eval()
    save(model, out)
    again = load(out)
    assert again.config == pruned
    texts = Texts()
    with torch.no_grad():
        assert torch.equal(again.hidden(*texts.packed), model.hidden(*texts.packed))


def test_several_heads_are_saved_under_their_names_and_reloaded(bert, out):
    model = load(bert)
    model.add_classifier("topic", 3)
    model.add_classifier("mood", 2, transform=None, pooling="mean")
    save(model, out)
    names = set(load_file(out / "model.safetensors"))
    assert {"heads.topic.transform.weight", "heads.mood.output.bias", "pooler.dense.weight"} <= names
    again, texts = load(out), Texts()
    with torch.no_grad():
        ours, theirs = again(*texts.packed), model(*texts.packed)
    assert all(torch.equal(ours[name], theirs[name]) for name in ("topic", "mood"))
    assert weights_digest(again) == weights_digest(model)


def test_a_classifier_beside_an_untied_language_head_reloads_with_both(tmp_path, out):
    model = load(stored(reference("Llama", "ForCausalLM"), tmp_path / "source"))
    model.add_language_head("lm")
    model.add_classifier("topic", 3)
    save(model, out)
    again = load(out)
    assert list(again.heads) == ["lm", "topic"]
    assert weights_digest(again) == weights_digest(model)
    assert greedy(again, [[3, 4]], 5) == greedy(model, [[3, 4]], 5)


def test_heads_of_different_pooling_share_one_run_of_the_trunk(bert):
    model, texts = load(bert), Texts()
    model.add_classifier("first", 2)
    model.add_classifier("mean", 2, pooling="mean")
    with torch.no_grad():
        both = model(*texts.packed)
        assert model.trunk.positions_computed == fitting_rows(texts.layout.num_tokens, texts.layout.device)
        for name, logits in both.items():
            torch.testing.assert_close(logits, model(*texts.packed, heads=[name])[name])


def test_a_tied_language_head_turns_row_sparse_gradients_off(out):
    model = init(DECODER, "llama", seed=0)
    assert model.trunk.embeddings.token.sparse
    model.add_language_head("lm")
    assert not model.trunk.embeddings.token.sparse
    assert model.has_tied_output
    save(model, out)
    again = load(out)
    assert not again.trunk.embeddings.token.sparse
    assert again.heads["lm"].output.weight is again.trunk.embeddings.token.weight


def test_digest_changes_with_one_bit_and_names_the_tensor(bert):
    model = load(bert)
    before = weights_digest(model)
    with torch.no_grad():
        model.trunk.layers[1].mlp.up.bias.view(torch.int32)[3] ^= 1
    after = weights_digest(model)
    assert [name for name in before if before[name] != after[name]] == ["encoder.layer.1.intermediate.dense.bias"]


def edit(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rewrite(directory: Path, change) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


BIAS = "encoder.layer.0.output.dense.bias"
BROKEN = {
    "no config": (lambda d: (d / "config.json").unlink(), "config.json: no such file"),
    "config not JSON": (lambda d: (d / "config.json").write_text("{"), "not JSON"),
    "config a list": (lambda d: (d / "config.json").write_text("[]"), "JSON object"),
    "unknown family": (lambda d: edit(d, model_type="bort"), "unknown model family 'bort'(.|\n)*bert, roberta"),
    "relative positions": (lambda d: edit(d, position_embedding_type="relative_key"), "position_embedding_type"),
    "decoder": (lambda d: edit(d, is_decoder=True), "is_decoder"),
    "activation": (lambda d: edit(d, hidden_act="mish"), "hidden_act: 'mish'"),
    "type of a key": (lambda d: edit(d, hidden_size="big"), "hidden_size: must be int, is 'big'"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "no model.safetensors"),
    "pickle only": (
        lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"),
        "pytorch_model.bin is a pickle",
    ),
    "truncated": (
        lambda d: (d / "model.safetensors").write_bytes((d / "model.safetensors").read_bytes()[:-100]),
        "model.safetensors: not a readable safetensors file",
    ),
    "tensor missing": (lambda d: rewrite(d, lambda t: t.pop(BIAS)), f"'{BIAS}' is missing"),
    "tensor unexpected": (
        lambda d: rewrite(d, lambda t: t.update({BIAS.replace("bias", "scale"): torch.ones(2)})),
        "unexpected tensor 'encoder.layer.0.output.dense.scale'",
    ),
    "more layers than the config says": (lambda d: edit(d, num_hidden_layers=1), "unexpected tensor 'encoder.layer.1"),
    "tensor of another shape": (
        lambda d: rewrite(d, lambda t: t.update({BIAS: torch.ones(5)})),
        rf"model.safetensors: the tensor '{BIAS}' has shape \[5\](.|\n)*\[32\]",
    ),
    "override of another number of layers": (lambda d: edit(d, lexmill={"layers": [{}]}), "1 per-layer overrides"),
    "unknown override": (lambda d: edit(d, lexmill={"layers": [{"heads": 2}, {}]}), "unknown key 'heads'"),
    "unknown kind of head": (lambda d: edit(d, lexmill={"heads": {"x": {"kind": "y"}}}), "unknown kind of head 'y'"),
    "head without tensors": (
        lambda d: edit(d, lexmill={"heads": {"x": {"kind": "classifier", "num_labels": 3}}}),
        "pooler.dense.weight' of the head 'x' is missing",
    ),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_directory_is_an_error_that_names_the_place(fault, bert):
    spoil, message = BROKEN[fault]
    spoil(bert)
    with pytest.raises(UserError, match=message):
        load(bert)


def test_a_missing_shard_is_named(tmp_path):
    reference("Llama").save_pretrained(tmp_path, max_shard_size="20KB")
    lost = sorted(tmp_path.glob("model-*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(UserError, match=f"'{lost.name}' is missing"):
        load(tmp_path)


def test_rope_settings_of_both_ages_mean_the_same(tmp_path, out):
    source = stored(reference("Llama", **LLAMAS["llama3_rope"]), tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    rope = config.pop("rope_parameters")
    expected = load(source).config
    theta = rope.pop("rope_theta")
    (source / "config.json").write_text(json.dumps(config | {"rope_theta": theta, "rope_scaling": rope}))
    assert load(source).config == expected
    assert expected.rope_scaling == RopeScaling("llama3", 4.0, 1.0, 4.0, 16)
    (source / "config.json").write_text(json.dumps(config | {"rope_scaling": {"type": "yarn", "factor": 2.0}}))
    with pytest.raises(UserError, match="rope_scaling: the rope type 'yarn'"):
        load(source)


def test_a_structure_that_a_family_cannot_say_is_refused(out):
    with pytest.raises(UserError, match="norm: models of the family 'bert'"):
        save(init(DECODER, "bert", seed=0), out)


def test_heads_have_one_owner_of_a_name(bert):
    model = load(bert)
    model.add_classifier("topic", 3)
    with pytest.raises(UserError, match="head 'topic' already"):
        model.add_classifier("topic", 3)
    with pytest.raises(UserError, match="no classification head"):
        model.add_stored_classifier("other")


@pytest.mark.parametrize("prompt", [[], [1] * 33])
def test_a_prompt_without_room_is_refused(prompt):
    model = init(DECODER, "llama", seed=0)
    model.add_language_head("lm")
    with pytest.raises(UserError, match="prompt 1"):
        greedy(model, [[1], prompt], 3)


def test_decoding_ends_where_positions_end():
    model = init(DECODER, "llama", seed=0).eval()
    model.add_language_head("lm")
    assert [len(one.ids) for one in greedy(model, [[1] * 30, [1] * 32, [1]], 5)] == [2, 0, 5]
