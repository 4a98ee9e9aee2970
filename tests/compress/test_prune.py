"""Neurons, heads, layers and hidden width that are really taken out."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from tests.compress.material import assert_reloads, material_of, rows_of
from tests.small_classifier import small_classifier
from tests.train.parts import generator, rows, tiny_llama, tokenizer
from torch import Tensor

from lexmill import models
from lexmill.compress import Material, Step, check_order, find
from lexmill.compress.prune import Prune
from lexmill.compress.prune_importance import Kind, Order, blocks_of, choose, importance, sizes_of
from lexmill.data.batch import collate
from lexmill.engine import Loaded
from lexmill.errors import UserError
from lexmill.models import Model, ModelConfig, Transformer
from lexmill.nn import Packed
from lexmill.nn.norm import LayerNorm, RMSNorm

DEEP = ModelConfig(
    vocab_size=60,
    hidden_size=32,
    num_layers=3,
    num_heads=4,
    num_kv_heads=4,
    head_dim=8,
    intermediate_size=24,
    max_positions=64,
    initializer_range=0.3,
)
ROTARY: dict[str, Any] = {
    "norm": "rms",
    "norm_place": "pre",
    "embedding_norm": False,
    "final_norm": True,
    "positions": "rotary",
    "activation": "silu",
    "gated": True,
    "causal": True,
    "attention_bias": False,
    "mlp_bias": False,
    "norm_eps": 1e-6,
}
GPT2: dict[str, Any] = {"norm_place": "pre", "embedding_norm": False, "final_norm": True, "causal": True}
FAMILIES: dict[str, ModelConfig] = {
    "bert": replace(DEEP, type_vocab_size=2),
    "llama": replace(DEEP, **ROTARY, num_kv_heads=2),
    "gpt2": replace(DEEP, **GPT2, activation="gelu_tanh"),
    "qwen3": replace(DEEP, **ROTARY, num_kv_heads=2, qk_norm=True),
}
KEPT: dict[Kind, list[list[int]]] = {
    "neurons": [[0, 3, 9], [1, 2, 5, 23], [7]],
    "heads": [[0, 1], [1], [0]],
    "layers": [[0, 2]],
    "width": [[*range(3, 12), *range(20, 27)]],
}


def trunk_of(model: Model) -> Transformer:
    return cast("Transformer", model.trunk)


def states(model: Model) -> Tensor:
    ids = torch.randint(60, (19,), generator=torch.Generator().manual_seed(0))
    layout = Packed.of(torch.tensor([7, 4, 8]))
    with torch.no_grad():
        return model.trunk(ids, torch.cat([torch.arange(n) for n in (7, 4, 8)]), layout)


def normed_alone(units: Tensor, module: Any, given: tuple[Tensor], result: Tensor) -> Tensor:
    """As if the state had these units alone; 0 for the others."""
    x = given[0][..., units]
    bias = getattr(module, "bias", None)
    x = x - x.mean(-1, keepdim=True) if isinstance(module, LayerNorm) else x
    x = x / (x.square().mean(-1, keepdim=True) + module.eps).sqrt() * module.weight[units]
    return torch.zeros_like(result).index_copy(-1, units, x if bias is None else x + bias[units])


@torch.no_grad()
def silence(model: Model, kind: Kind, kept: list[list[int]]) -> None:
    """What pruning must equal: all matrices as they were, what the units write set to 0, layers passed by."""
    blocks = blocks_of(trunk_of(model))
    if kind == "width":
        for module in trunk_of(model).modules():
            if isinstance(module, (LayerNorm, RMSNorm)) and len(module.weight) == DEEP.hidden_size:
                module.register_forward_hook(partial(normed_alone, torch.tensor(kept[0])))
        return
    if kind == "layers":
        for index in set(range(len(blocks))) - set(kept[0]):
            blocks[index].register_forward_hook(lambda module, given, result: given[0])
        return
    for block, units, size in zip(blocks, kept, sizes_of(trunk_of(model), kind), strict=True):
        weight = block.mlp.down.weight if kind == "neurons" else block.attention.output.weight
        apart = weight.reshape(len(weight), size, -1)
        apart[:, [unit for unit in range(size) if unit not in units]] = 0.0


def pruned(model: Model, kind: Kind, kept: list[list[int]]) -> Model:
    method = find(kind)
    assert isinstance(method, Prune)
    return method.remove(replace(small_classifier(), model=model), [torch.tensor(units) for units in kept]).model


@pytest.mark.parametrize("kind", KEPT)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_pruned_model_is_the_whole_one_with_its_units_silent(family: str, kind: Kind, tmp_path: Path) -> None:
    whole, cut = (models.init(FAMILIES[family], family, 0).eval() for _ in range(2))
    before = states(whole)
    silence(whole, kind, KEPT[kind])
    wanted = states(whole)
    assert not torch.allclose(wanted, before, atol=1e-2)
    small_classifier().task.attach(cut)
    cut = pruned(cut, kind, KEPT[kind])
    if kind == "width":
        wanted = wanted[:, KEPT[kind][0]]
    torch.testing.assert_close(states(cut), wanted, rtol=1e-5, atol=1e-5)
    models.save(cut, tmp_path)
    again = models.load(tmp_path)
    assert again.config == cut.config
    assert torch.equal(states(again), states(cut))
    assert sum(p.numel() for p in cut.parameters()) < sum(p.numel() for p in whole.parameters())


def test_equal_widths_are_read_by_transformers_too(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    cut = pruned(models.init(FAMILIES["llama"], "llama", 0).eval(), "neurons", [[0, 3, 9], [1, 2, 5], [7, 8, 20]])
    models.save(cut, tmp_path)
    theirs = transformers.AutoModel.from_pretrained(tmp_path).eval()
    ids = torch.arange(1, 8)
    with torch.no_grad():
        wanted = theirs(ids[None]).last_hidden_state[0]
        torch.testing.assert_close(
            cut.trunk(ids, torch.arange(7), Packed.of(torch.tensor([7]))), wanted, rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("order", ["first", "second"])
@pytest.mark.parametrize("kind", KEPT)
def test_units_that_do_nothing_are_the_ones_taken_out(kind: Kind, order: Order) -> None:
    one, material = small_classifier(), material_of(small_classifier(), train=24)
    blocks = blocks_of(trunk_of(one.model))
    with torch.no_grad():
        if kind == "neurons":
            useless = [[5, 40], [0, 63, 17]]
            for block, units in zip(blocks, useless, strict=True):
                block.mlp.down.weight[:, units] = 0.0
        elif kind == "heads":
            useless = [[2], [0, 3]]
            for block, units in zip(blocks, useless, strict=True):
                block.attention.output.weight.reshape(32, 4, 8)[:, units] = 0.0
        elif kind == "width":
            useless = [[1, 2, 3, 5, 8, 13, 21, 31]]
            norms = [part for block in blocks for part in (block.attention_norm, block.mlp_norm)]
            for module in (trunk_of(one.model).embeddings.norm, *norms):
                cast("LayerNorm", module).weight[useless[0]] = 0.0
                cast("Any", module).bias[useless[0]] = 0.0
        else:
            useless = [[1]]
            for matrix in (blocks[1].attention.output, blocks[1].mlp.down):
                matrix.weight.zero_()
                matrix.bias.zero_()
    sizes = sizes_of(trunk_of(one.model), kind)
    scores = importance(one, material.train, kind, order, lambda share: None)
    for score, units in zip(scores, useless, strict=True):
        assert (score[units] < 1e-6 * score.max()).all()
    keep = 1 - sum(map(len, useless)) / sum(sizes)
    kept = [units.tolist() for units in choose(scores, keep, "layer" if kind == "width" else "model")]
    assert kept == [[i for i in range(n) if i not in gone] for n, gone in zip(sizes, useless, strict=True)]


def test_importance_is_the_gradient_by_each_weight_times_that_weight() -> None:
    one = small_classifier()
    asked = rows_of(one, 5)
    first, second = (importance(one, asked, "neurons", order, lambda share: None) for order in ("first", "second"))
    downs = [block.mlp.down for block in blocks_of(trunk_of(one.model))]
    slow = [torch.zeros(2, 64, dtype=torch.float64) for _ in downs]
    for example in one.task.encode(asked, one.tokenizer, labelled=True):
        batch = collate([example])
        one.model.zero_grad()
        one.task.item_losses(one.task.forward(one.model, batch), batch)["label"].sum().backward()
        for total, down in zip(slow, downs, strict=True):
            assert down.weight.grad is not None
            change = (down.weight * down.weight.grad).sum(0).double().detach()
            total += torch.stack([change.abs(), change.square()])
    for total, a, b in zip(slow, first, second, strict=True):
        torch.testing.assert_close(torch.stack([a, b]), total / 5, rtol=1e-4, atol=1e-7)


def test_units_compete_over_the_model_or_within_their_layer() -> None:
    scores = [torch.tensor([0.1, 0.2, 0.3, 0.25]), torch.tensor([5.0, 4.0, 7.0, 6.0])]
    assert [one.tolist() for one in choose(scores, 0.5, "layer")] == [[2, 3], [2, 3]]
    assert [one.tolist() for one in choose(scores, 0.5, "model")] == [[2], [0, 2, 3]]
    assert [one.tolist() for one in choose(scores, 0.01, "model")] == [[2], [2]]
    assert [one.tolist() for one in choose(scores, 0.3, "layer", 2)] == [[2, 3], [2, 3]]
    assert [one.tolist() for one in choose(scores, 0.5, "model", 2)] == [[2, 3], [0, 1, 2, 3]]


@pytest.mark.parametrize("name", KEPT)
def test_recovery_brings_a_pruned_model_back_and_it_is_read_as_it_was(name: str, tmp_path: Path) -> None:
    # Without neurons a model this small differs little: there is less to bring back, in more steps.
    epochs = 12 if name == "neurons" else 3
    recovery = {"epochs": epochs, "learning_rate": 1e-3, "batch_size": 16, "task_weight": 0.0}
    keep = {"neurons": 0.25, "heads": 0.25, "layers": 0.5, "width": 0.5}[name]
    method, options = Step(name, {"keep": keep, "rows": 24, "recovery": recovery}).read("steps[0]")
    teacher = small_classifier()
    found, effect = method.apply(small_classifier(), material_of(teacher), options)
    assert effect[f"{name}_removed"] == effect[f"{name}_before"] - effect[f"{name}_after"] > 0
    assert sum(sizes_of(trunk_of(found.model), cast("Any", name))) == effect[f"{name}_after"]
    assert sum(p.numel() for p in found.model.parameters()) == effect["weights_after"] < effect["weights_before"]
    assert 0 < effect["importance_kept"] < 1
    assert effect["divergence_after"] < effect["divergence_before"]
    assert_reloads(found, tmp_path)


def llama_generator() -> Loaded:
    model = tiny_llama()
    return Loaded(generator(model), model.eval(), tokenizer())


@pytest.mark.parametrize("name", ["neurons", "heads", "width"])
def test_a_decoder_with_shared_keys_decodes_over_its_cache_as_without(name: str) -> None:
    subject, data = llama_generator(), rows(8)
    shape = trunk_of(subject.model).config
    method, options = Step(name, {"recover": False, "rows": 8}).read("steps[0]")
    found, _ = method.apply(subject, Material([subject], data, data), options)
    config = trunk_of(found.model).config
    if name == "heads":
        shared = shape.num_heads // shape.num_kv_heads
        layers = [config.layer(i) for i in range(config.num_layers)]
        assert all(one.num_heads == shared * one.num_kv_heads for one in layers)
    ids, cache = torch.arange(5, 11), found.model.trunk.new_cache(1, 8)
    with torch.no_grad():
        whole = found.model.trunk(ids, torch.arange(6), Packed.of(torch.tensor([6])))
        parts = [
            found.model.trunk(ids[i : i + 1], torch.tensor([i]), Packed.of(torch.tensor([1])), cache=cache)
            for i in range(6)
        ]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-5, atol=1e-5)


def test_what_cannot_be_pruned_is_an_error_that_says_why() -> None:
    material = material_of(small_classifier(), train=24)

    def apply(name: str, subject: Loaded, data: Material = material, **options: Any) -> None:
        method, read = Step(name, {"recover": False, "rows": 8, **options}).read("steps[0]")
        method.apply(subject, data, read)

    with pytest.raises(UserError, match="keeps all of 8 heads"):
        apply("heads", small_classifier(), keep=0.99)
    with pytest.raises(UserError, match="keeps all of 128 neurons"):
        apply("neurons", small_classifier(), keep=0.9, multiple=64)
    with pytest.raises(UserError, match="keeps all of 2 layers"):
        apply("layers", small_classifier(), keep=0.9)
    with pytest.raises(UserError, match="no row has a label"):
        apply("neurons", small_classifier(), replace(material, train=[]))
    gru, _ = (
        Step("distil", {"family": "gru", "hidden_size": 16, "recovery": {"epochs": 1}})
        .read("s")[0]
        .apply(
            small_classifier(),
            material,
            Step("distil", {"family": "gru", "hidden_size": 16, "recovery": {"epochs": 1}}).read("s")[1],
        )
    )
    with pytest.raises(UserError, match="'gru' cannot be cut"):
        apply("neurons", gru)
    coded = small_classifier()
    cast("Any", blocks_of(trunk_of(coded.model))[1].mlp.up).quantise(8)
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.up"):
        apply("neurons", coded)
    model = models.init(replace(DEEP, positions="relative", relative_max_distance=32), "bert", 0)
    with pytest.raises(UserError, match="share the biases"):
        apply("heads", replace(small_classifier(), model=model))


@pytest.mark.parametrize("earlier", ["int8", "factorise", "exits", "weights"])
def test_pruning_cannot_follow_what_it_would_break(earlier: str) -> None:
    with pytest.raises(UserError, match="cannot follow"):
        check_order([Step(earlier), Step("neurons")])
    check_order([Step("vocabulary"), Step("distil"), Step("layers"), Step("heads"), Step("neurons"), Step(earlier)])
