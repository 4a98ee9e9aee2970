"""Every method: it trains little, the loss falls, what it added survives saving, and work not needed is not done."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tests.models.oracle import Texts, gap, reference, stored
from torch import nn
from torch.nn import functional as F

from lexmill.adapt import AdaptConfig, Adapted, adapt
from lexmill.errors import UserError
from lexmill.models import Model, families, init, load, save
from lexmill.nn.lora import LoraLinear
from lexmill.train import Optimizer, TrainConfig

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:transformers"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
]

ALL = ("query", "key", "value", "output", "up", "down")
METHODS = {
    "lora": AdaptConfig("lora", rank=3, targets=ALL),
    "lora over 4 bits": AdaptConfig("lora", rank=3, targets=ALL, base_bits=4),
    "lora over 8 bits": AdaptConfig("lora", rank=3, targets=ALL, base_bits=8, double_quant=False),
    "adalora": AdaptConfig("adalora", rank=2, targets=ALL),
    "bottleneck": AdaptConfig("bottleneck", width=8),
    "bottleneck over 4 bits": AdaptConfig("bottleneck", width=8, base_bits=4),
    "prefix": AdaptConfig("prefix", tokens=5),
    "prompt": AdaptConfig("prompt", tokens=5),
    "bitfit": AdaptConfig("bitfit"),
    "some layers": AdaptConfig("full", layers=(0,)),
}
STAY = ("bottleneck", "prefix", "prompt")


@dataclass
class Base:
    """A model on disk, with a classifier that is trained."""

    path: Path
    texts: Texts

    def model(self) -> Model:
        model = load(self.path)
        model.add_stored_classifier("topic")
        return model

    def logits(self, model: Model, *, dense: bool = False) -> torch.Tensor:
        texts = self.texts
        inputs, types = (texts.dense, texts.dense_types) if dense else (texts.packed, texts.types)
        with torch.no_grad():
            return model.eval()(*inputs, types=types if model.config.type_vocab_size else None)["topic"]

    def train(self, adapted: Adapted, steps: int = 12) -> list[float]:
        """Full-batch Adam on whatever is trained; the losses."""
        model = adapted.model.train()
        labels = torch.arange(self.texts.layout.num_sequences) % 3
        model.trunk.embeddings.token.sparse = False
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        losses: list[float] = []
        for step in range(steps):
            types = self.texts.types if model.config.type_vocab_size else None
            loss = F.cross_entropy(model(*self.texts.packed, types=types)["topic"], labels)
            loss.backward()
            if adapted.companion is not None:
                adapted.companion.before_update(step, steps)
            optimizer.step()
            if adapted.companion is not None:
                adapted.companion.after_update(step, steps)
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        return losses


@pytest.fixture(params=["Bert", "Llama"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Base:
    torch.manual_seed(0)
    kind: str = request.param
    grouped = {"num_key_value_heads": 2} if kind == "Llama" else {}
    model = reference(kind, "ForSequenceClassification", num_labels=3, **grouped)
    return Base(stored(model, tmp_path / "base"), Texts())


@pytest.mark.parametrize("name", METHODS)
def test_a_method_learns_and_its_model_comes_back_from_disk(base: Base, name: str, tmp_path: Path) -> None:
    config, model = METHODS[name], base.model()
    if name == "bitfit" and model.config.causal:
        pytest.skip("a LLaMA has no biases")
    adapted = adapt(model, config)
    losses = base.train(adapted)
    assert min(losses[-3:]) < losses[0] - 0.05
    effect = adapted.effect()
    assert effect["trunk_moved"] >= 0.8
    assert effect["trained_weights"] == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert effect["trained_weights"] < effect["weights"]
    trained = base.logits(model)
    adapted.merge()
    assert gap(base.logits(model), trained) <= 1e-5
    (tmp_path / "saved").mkdir()
    save(model, tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert gap(base.logits(again), trained) <= 1e-5
    assert gap(base.logits(base.model()), trained) > 1e-2
    assert ("additions" in again.structure()) == (config.method in STAY)
    assert gap(base.logits(again, dense=True), trained) <= 1e-5


@pytest.mark.parametrize("name", METHODS)
def test_what_is_not_trained_stays_and_costs_no_gradient(base: Base, name: str) -> None:
    model = base.model()
    if name == "bitfit" and model.config.causal:
        pytest.skip("a LLaMA has no biases")
    model.trunk.embeddings.token.sparse = False
    before = model.training_work()
    adapted = adapt(model, METHODS[name])
    frozen = {n: t.clone() for n, t in model.state_dict().items() if not _trained(model, n)}
    labels = torch.arange(6) % 3
    types = base.texts.types if model.config.type_vocab_size else None
    F.cross_entropy(model.train()(*base.texts.packed, types=types)["topic"], labels).backward()
    for parameter_name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, parameter_name
    assert model.training_work() < before
    state = Optimizer(model, TrainConfig()).state()
    assert {name.rpartition(".")[0] for name in state} == {n for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    base.train(adapted, steps=2)
    now = model.state_dict()
    assert [n for n, t in frozen.items() if not torch.equal(now[n], t)] == []


def _trained(model: Model, name: str) -> bool:
    return dict(model.named_parameters()).get(name, torch.empty(0)).requires_grad


def test_the_backward_stops_at_the_lowest_trained_layer(base: Base) -> None:
    reached: list[int] = []

    def watch(out: torch.Tensor, index: int) -> None:
        if out.requires_grad:
            out.register_hook(lambda grad: reached.append(index))

    for layers in (None, (1,)):
        model = base.model()
        adapt(model, AdaptConfig("lora", layers=layers))
        for index, layer in enumerate(model.trunk.layers):
            layer.register_forward_hook(lambda module, inputs, out, index=index: watch(out, index))
        types = base.texts.types if model.config.type_vocab_size else None
        model.train()(*base.texts.packed, types=types)["topic"].sum().backward()
        reached.append(-1)
    assert reached == [1, 0, -1, 1, -1]


@pytest.mark.parametrize("name", ["bottleneck", "prefix", "prompt"])
def test_an_addition_goes_on_with_another_method_and_is_refused_twice(base: Base, name: str, tmp_path: Path) -> None:
    model = base.model()
    adapt(model, METHODS[name]).merge()
    (tmp_path / "first").mkdir()
    save(model, tmp_path / "first")
    with pytest.raises(UserError, match="already"):
        adapt(load(tmp_path / "first"), METHODS[name])
    again = Base(tmp_path / "first", base.texts)
    second = load(again.path)
    adapted = adapt(second, AdaptConfig("lora", targets=("query", "up")))
    losses = again.train(adapted)
    assert losses[-1] < losses[0]
    trained = again.logits(second)
    adapted.merge()
    assert gap(again.logits(second), trained) <= 1e-5
    assert second.structure()["additions"] == model.structure()["additions"]


@pytest.mark.parametrize("name", ["lora", "adalora", "bottleneck over 4 bits"])
def test_what_is_not_merged_is_not_written_where_nothing_would_read_it(base: Base, name: str, tmp_path: Path) -> None:
    model = base.model()
    adapt(model, METHODS[name])
    with pytest.raises(ValueError, match="merge what was put beside"):
        save(model, tmp_path)


def test_merging_and_unmerging_leaves_the_matrix_as_it_was(base: Base) -> None:
    model = base.model()
    adapted = adapt(model, METHODS["lora"])
    base.train(adapted)
    trained, layers = base.logits(model), [m for m in model.modules() if isinstance(m, LoraLinear)]
    original = [layer.weight.detach().clone() for layer in layers]
    copies = [layer.merged() for layer in layers]
    assert all(torch.equal(layer.weight, weight) for layer, weight in zip(layers, original, strict=True))
    for layer in layers:
        layer.merge()
    assert all(torch.equal(one.weight, layer.weight) for one, layer in zip(copies, layers, strict=True))
    assert gap(base.logits(model), trained) <= 1e-5
    with pytest.raises(ValueError, match="inside already"):
        layers[0].merge()
    for layer in layers:
        layer.unmerge()
    rounding = torch.finfo(torch.float32).eps
    for layer, weight in zip(layers, original, strict=True):
        largest = torch.maximum(weight.abs(), (weight + layer.adapter("default").delta()).abs())
        assert bool(((layer.weight - weight).abs() <= rounding * largest).all())
    assert gap(base.logits(model), trained) <= 1e-5


@pytest.mark.parametrize(("bits", "share"), [(4, 0.14), (8, 0.27)])
def test_a_quantised_trunk_takes_the_bytes_that_the_record_says(tmp_path: Path, bits: int, share: float) -> None:
    torch.manual_seed(0)
    wide = reference("Bert", "ForSequenceClassification", num_labels=3, hidden_size=128, intermediate_size=256)
    base = Base(stored(wide, tmp_path / "base"), Texts())
    model = base.model()
    plain, before = base.logits(model), _bytes(model)
    adapted = adapt(model, AdaptConfig("lora", base_bits=bits))  # pyright: ignore[reportArgumentType]
    assert adapted.stored is not None
    assert adapted.stored[1] < adapted.stored[0] * share
    assert _bytes(model) - _added(model) == before - adapted.stored[0] + adapted.stored[1]
    assert not torch.equal(base.logits(model), plain)


def _bytes(module: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))


def _added(model: Model) -> int:
    return sum(_bytes(m.adapters) for m in model.modules() if isinstance(m, LoraLinear))


@pytest.mark.parametrize(
    ("config", "where"),
    [
        (AdaptConfig("bottleneck", layers=(0, 0)), "adapt.layers"),
        (AdaptConfig("bottleneck", layers=(2,)), "adapt.layers"),
        (AdaptConfig("prompt", layers=1), "adapt.layers"),
        (AdaptConfig("frozen", layers=1), "adapt.layers"),
        (AdaptConfig("prompt", tokens=64), "adapt.tokens"),
        (AdaptConfig("prefix", tokens=64), "adapt.tokens"),
        (AdaptConfig("adalora", initial_rank=8), "adapt.initial_rank"),
        (AdaptConfig("adalora", tinit=0.5, tfinal=0.5), "adapt.tinit"),
        (AdaptConfig("full", base_bits=4), "adapt.base_bits"),
        (AdaptConfig("full", layers=2, base_bits=4), "adapt.base_bits"),
        (AdaptConfig("full", rank=4), "adapt.rank"),
        (AdaptConfig("lora", width=3), "adapt.width"),
        (AdaptConfig("lora", double_quant=False), "adapt.double_quant"),
        (AdaptConfig("lora", tinit=0.2), "adapt.tinit"),
        (AdaptConfig("bitfit", targets=("key",)), "adapt.targets"),
    ],
)
def test_what_would_do_nothing_is_an_error_at_its_key(base: Base, config: AdaptConfig, where: str) -> None:
    with pytest.raises(UserError) as error:
        adapt(base.model(), config)
    assert error.value.where == where


def test_a_text_without_room_beside_the_prefix_is_an_error_where_positions_are_learned(tmp_path: Path) -> None:
    model = load(stored(reference("Bert"), tmp_path / "base"))
    adapt(model, AdaptConfig("prefix", tokens=20)).merge()
    texts = Texts([45])
    with pytest.raises(UserError, match="45 tokens, and room for 44"):
        model.hidden(*texts.packed)


@pytest.mark.parametrize("name", ["lora over 4 bits", "adalora", "bottleneck", "prefix", "prompt"])
@pytest.mark.parametrize("base", ["Bert"], indirect=True)
def test_half_precision_and_recomputing_give_nearly_and_exactly_the_same_gradients(base: Base, name: str) -> None:
    model = base.model()
    adapted = adapt(model, METHODS[name])
    base.train(adapted, steps=3)
    model.eval()

    def gradients(*, half: bool = False, recompute: bool = False) -> dict[str, torch.Tensor]:
        model.zero_grad()
        model.trunk.train()
        model.trunk.recompute = recompute
        model.set_dropout(0.0)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            out = model(*base.texts.packed, types=base.texts.types)["topic"]
        F.cross_entropy(out.float(), torch.arange(6) % 3).backward()
        model.trunk.recompute = False
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    whole, again, rounded = gradients(), gradients(recompute=True), gradients(half=True)
    assert whole.keys() == again.keys() == rounded.keys()
    assert all(torch.equal(again[n], grad) for n, grad in whole.items())
    flat, near = (torch.cat([one[n].float().flatten() for n in whole]) for one in (whole, rounded))
    assert float(torch.cosine_similarity(flat, near, 0)) > 0.98


def test_both_sides_of_an_encoder_and_decoder_are_adapted_and_come_back(tmp_path: Path) -> None:
    sizes = {"vocab_size": 97, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    config = families.find("t5").read_config(sizes)
    model = init(config, "t5", 0)
    assert model.depths()["trunk.decoder.layers.1.mlp.up.weight"] == 4
    adapt(model, AdaptConfig("bottleneck", width=4)).merge()
    places = model.structure()["additions"]
    # Attention, attention to the source, and the feed-forward layers: 2 in a layer of the encoder, 3 of the decoder.
    assert len(places) == 2 * 2 + 2 * 3
    save(model, tmp_path)
    again = load(tmp_path)
    assert all(torch.equal(t, again.trunk.state_dict()[n]) for n, t in model.trunk.state_dict().items())
    adapted = adapt(init(config, "t5", 0), AdaptConfig("lora", layers=(1, 3)))
    touched = {n.split(".attention")[0].split(".cross")[0] for n in adapted.before}
    assert touched == {"trunk.layers.1", "trunk.decoder.layers.1"}
    for method in ("prefix", "prompt"):
        with pytest.raises(UserError, match="an encoder or a decoder"):
            adapt(init(config, "t5", 0), AdaptConfig(method))  # pyright: ignore[reportArgumentType]
