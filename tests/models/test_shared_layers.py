"""Layers that share their weights: counted, trained, adapted and saved once, and run as often as they should."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.models.oracle import Texts, gap, reference, stored
from tests.models.test_trunk import ENCODER
from torch import nn

from lexmill.adapt import AdaptConfig, adapt, save_adapter
from lexmill.errors import UserError
from lexmill.models import LayerOverride, Model, init, load, save
from lexmill.nn.lora import LoraLinear

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:transformers"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
]

SHARED = replace(ENCODER, num_layers=6, num_groups=2, group_size=1, embedding_size=10)


def unshared(model: Model) -> Model:
    """The same function with every layer a module of its own."""
    config = replace(model.config, num_groups=None, group_size=1)
    apart = init(config, "albert", seed=1).to(model.dtype)
    state = model.trunk.state_dict()
    for index, layer in enumerate(model.trunk.layers):
        state |= {f"layers.{index}.{name}": tensor for name, tensor in layer.state_dict().items()}
    apart.trunk.load_state_dict(state, strict=True)
    return apart


def test_groups_run_as_the_config_says():
    assert replace(SHARED, num_layers=6).schedule == (0, 0, 0, 1, 1, 1)
    assert replace(SHARED, num_layers=10, num_groups=3, group_size=2).schedule == (0, 1, 0, 1, 2, 3, 2, 3, 4, 5)
    assert replace(SHARED, num_groups=None).schedule == (0, 1, 2, 3, 4, 5)


@pytest.mark.parametrize(("groups", "size"), [(1, 1), (2, 1), (2, 3), (1, 3), (3, 2)])
def test_values_and_gradients_are_those_of_layers_with_equal_weights(groups, size):
    torch.manual_seed(0)
    model = init(replace(SHARED, num_groups=groups, group_size=size), "albert", seed=0).double()
    apart, texts = unshared(model), Texts()
    one, other = (m.hidden(*texts.packed, types=texts.types) for m in (model, apart))
    assert torch.equal(one, other)
    weight = torch.randn_like(one)
    for out in (one, other):
        (out * weight).sum().backward()
    ours = dict(model.trunk.named_parameters())
    summed: dict[str, torch.Tensor] = {}
    for name, parameter in apart.trunk.named_parameters():
        part, number, *rest = name.split(".")
        theirs = ".".join([part, str(model.config.schedule[int(number)]), *rest]) if part == "layers" else name
        summed[theirs] = summed.get(theirs, 0) + parameter.grad.to_dense()
    assert summed.keys() == ours.keys()
    for name, grad in summed.items():
        torch.testing.assert_close(ours[name].grad.to_dense(), grad, atol=1e-12, rtol=1e-12)


def test_weights_are_counted_once_and_work_each_time():
    model = init(SHARED, "albert", seed=0)
    apart = unshared(model)
    layer = sum(p.numel() for p in model.trunk.layers[0].parameters())
    counted = [sum(p.numel() for p in m.parameters()) for m in (model, apart)]
    assert counted[1] - counted[0] == 4 * layer
    assert len(model.trunk.layers) == 6
    assert model.trunk_parameters() == apart.trunk_parameters()
    assert model.training_work() == apart.training_work()
    assert (10, 16) in model.matmul_shapes()


def test_recomputing_and_collecting_follow_the_layers_as_they_run():
    torch.manual_seed(0)
    model, texts = init(SHARED, "albert", seed=0).double().train(), Texts()
    seen: list[dict[str, torch.Tensor]] = []
    plain = model.trunk(*texts.packed, collect=seen)
    assert len(seen) == 7
    model.trunk.recompute = True
    again = model.trunk(*texts.packed)
    torch.testing.assert_close(again, plain, atol=1e-12, rtol=0)
    again.sum().backward()
    assert all(p.grad is not None for p in model.trunk.layers.parameters())


def test_a_saved_model_holds_each_weight_once_and_reloads(tmp_path):
    pruned = replace(SHARED, layers=(LayerOverride(intermediate_size=7), LayerOverride(num_heads=2, num_kv_heads=2)))
    model, texts = init(pruned, "albert", seed=0).eval(), Texts()
    save(model, tmp_path)
    again = load(tmp_path)
    assert again.config == pruned
    with torch.no_grad():
        assert torch.equal(again.hidden(*texts.packed), model.hidden(*texts.packed))


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"layers": (LayerOverride(),) * 6}, "layers"),
        ({"num_groups": 7}, "num_groups"),
        ({"group_size": 4}, "num_groups"),
        ({"num_groups": None, "group_size": 2}, "group_size"),
        ({"embedding_size": 0}, "embedding_size"),
    ],
)
def test_what_cannot_be_shared_is_an_error_at_its_field(change, where):
    with pytest.raises(UserError) as error:
        replace(SHARED, **change)
    assert error.value.where == where


@pytest.mark.parametrize("layers", [1, 4, [0, 1], [3]])
def test_a_part_of_the_layers_that_share_weights_cannot_be_adapted(layers):
    with pytest.raises(UserError, match="shares its weights") as error:
        adapt(init(SHARED, "albert", seed=0), AdaptConfig("bitfit", layers=layers))
    assert error.value.where == "adapt.layers"


def test_a_group_can_be_adapted_and_a_prefix_cannot():
    model = init(SHARED, "albert", seed=0)
    adapt(model, AdaptConfig("full", layers=3))
    trained = {name for name, p in model.trunk.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in model.trunk.named_parameters() if name.startswith("layers.1.")}
    assert [model.depths()[f"trunk.layers.{i}.mlp.up.weight"] for i in (0, 1)] == [3, 6]
    assert model.untrained_layers() == 3
    with pytest.raises(UserError, match="prefix"):
        adapt(init(SHARED, "albert", seed=0), AdaptConfig("prefix"))


def test_peft_says_the_same_with_the_one_adapter_of_all_layers(tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    theirs = reference("Albert", "ForSequenceClassification", num_labels=3, embedding_size=12, num_hidden_layers=4)
    base = stored(theirs, tmp_path / "base")
    model, texts = load(base), Texts()
    model.add_stored_classifier("topic")
    adapted = adapt(model, AdaptConfig("lora", rank=4))
    found = [m for m in model.modules() if isinstance(m, LoraLinear)]
    assert len(found) == 2
    for layer in found:
        nn.init.normal_(layer.adapter("default").b, std=0.3)
    (tmp_path / "adapter").mkdir()
    save_adapter(model, tmp_path / "adapter", str(base))
    judge = AutoModelForSequenceClassification.from_pretrained(base)
    judge = PeftModel.from_pretrained(judge, str(tmp_path / "adapter")).eval()
    with torch.no_grad():
        expected = judge(texts.dense_ids, attention_mask=texts.mask, token_type_ids=texts.dense_types).logits
        assert gap(model.eval()(*texts.packed, types=texts.types)["topic"], expected) <= 1e-5
        adapted.merge()
        assert gap(model(*texts.packed, types=texts.types)["topic"], expected) <= 1e-5
