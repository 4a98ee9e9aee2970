"""What a run may add to the plain step: each against its definition, and each shown to have acted."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.train.parts import (
    VOCABULARY,
    InMemory,
    batch_of,
    classifier,
    distance,
    generator,
    gradients,
    rows,
    tiny_bert,
    tokenizer,
)

from lexmill import models
from lexmill.adapt import AdaptConfig, adapt
from lexmill.data.order import BalancedOrder
from lexmill.errors import UserError
from lexmill.models import Model
from lexmill.models.recurrent import RecurrentConfig
from lexmill.tasks import Task
from lexmill.train import Manner, Optimizer, Store, TrainConfig, Trainer, TrainResult, accumulate
from lexmill.train.adversarial import FGM, FreeLB
from lexmill.train.average import Average
from lexmill.train.passes import Losses, RDrop


def silent(event: Mapping[str, Any]) -> None:
    pass


def trainer(store: Path | None = None, *, count: int = 24, **changes: Any) -> Trainer:
    model, data = tiny_bert(), rows(count)
    task = classifier(data, model)
    model.set_dropout(changes.get("dropout", 0.0))
    examples = InMemory(task, task.encode(data, tokenizer(), labelled=True))
    config = TrainConfig(**{"epochs": 2, "batch_size": 8, "learning_rate": 1e-3, **changes})
    return Trainer(model, task, examples, config, store=None if store is None else Store(store, 2))


def trained(**changes: Any) -> tuple[Trainer, TrainResult, list[dict[str, Any]]]:
    events: list[dict[str, Any]] = []
    run = trainer(**changes)
    return run, run.run(lambda event: events.append(dict(event))), events


# --- optimisers -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("name", "rate"), [("sgd", 0.05), ("adafactor", 3e-2), ("muon", 1e-2)])
def test_every_optimiser_learns(name: str, rate: float) -> None:
    _, result, events = trained(optimizer=name, learning_rate=rate, epochs=60, dropout=0.0)
    assert result.final_loss < 0.5 * events[0]["loss"]


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("sgd", lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)),
        ("adafactor", lambda p: torch.optim.Adafactor(p, lr=0.1)),
    ],
)
def test_an_optimiser_is_torchs_own(name: str, reference: Any) -> None:
    model, twin = tiny_bert(), tiny_bert()
    task = classifier(rows(8), model)
    classifier(rows(8), twin)
    twin.load_state_dict(model.state_dict())
    twin.trunk.embeddings.token.sparse = False
    ours = Optimizer(model, TrainConfig(optimizer=name, max_grad_norm=0.0))
    theirs = reference(list(twin.parameters()))
    batch = batch_of(task, task.encode(rows(8), tokenizer(), labelled=True))
    for step in range(3):
        accumulate(model, task, [batch], seed=step)
        ours.step(0.1)
        accumulate(twin, task, [batch], seed=step)
        theirs.step()
        theirs.zero_grad()
    for (found_name, found), wanted in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(found, wanted, msg=lambda text, n=found_name: f"{n}: {text}")


def test_muon_makes_updates_of_hidden_matrices_orthogonal_and_leaves_the_rest_to_adamw() -> None:
    model = tiny_bert()
    task = classifier(rows(8), model)
    optimizer = Optimizer(model, TrainConfig(optimizer="muon", max_grad_norm=0.0))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    accumulate(model, task, [batch_of(task, task.encode(rows(8), tokenizer(), labelled=True))], seed=0)
    optimizer.step(1e-2)
    query = "trunk.layers.0.attention.query.weight"
    singular = torch.linalg.svdvals(dict(model.named_parameters())[query].detach() - before[query])
    assert singular.max() / singular.median() < 3
    assert len(optimizer.sparse) == 1
    assert f"{query}.momentum_buffer" in optimizer.state()
    assert "heads.label.output.weight.exp_avg" in optimizer.state()


def test_muon_without_a_trained_matrix_is_an_error() -> None:
    model = tiny_bert()
    classifier(rows(8), model)
    model.trunk.requires_grad_(False)
    with pytest.raises(UserError, match="no matrix of a layer is trained"):
        Optimizer(model, TrainConfig(optimizer="muon"))


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "sgd"},
        {"optimizer": "adafactor", "learning_rate": 1e-2},
        {"optimizer": "muon"},
        {"ema": 0.9, "weight_decay": 0.1},
        {"r_drop": 1.0, "adversarial": "freelb"},
        {"precision": "fp16"},
        {"balanced": True, "recompute": True},
    ],
    ids=lambda changes: ",".join(changes),
)
def test_a_run_resumed_ends_in_the_bits_of_a_whole_one(changes: dict[str, Any], tmp_path: Path) -> None:
    whole = trainer(dropout=0.1, **changes)
    result = whole.run(silent)

    class Enough(Exception):
        pass

    def stop(event: Mapping[str, Any]) -> None:
        if event["step"] == 4:
            raise Enough

    first = trainer(tmp_path, dropout=0.1, checkpoint_every=2, **changes)
    with pytest.raises(Enough):
        first.run(stop)
    second = trainer(tmp_path, dropout=0.1, checkpoint_every=2, **changes)
    assert second.resume()
    assert second.progress.step == 4
    again = second.run(silent)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(second.model.state_dict()[name], value), name
    assert again.acted == pytest.approx(result.acted)


# --- R-Drop -----------------------------------------------------------------------------------------------------
def prepared(**options: Any) -> tuple[Model, Task, Any]:
    model, data = tiny_bert(), rows(12)
    if options.get("multi_label"):
        data = [{**row, "label": [row["label"], "any"]} for row in data]
    task = classifier(data, model, **options)
    return model, task, batch_of(task, task.encode(data, tokenizer(), labelled=True))


@pytest.mark.parametrize("multi_label", [False, True])
def test_r_drop_adds_the_divergence_of_two_passes(multi_label: bool) -> None:
    model, task, batch = prepared(multi_label=multi_label)
    model.train().set_dropout(0.3)
    losses, acted = accumulate(model, task, [batch], seed=3, manner=Manner(losses=RDrop(2.0)))
    model.zero_grad(set_to_none=True)
    # The same two passes, the divergence as the paper has it.
    one, _ = accumulate(model, task, [batch], seed=3, manner=Manner(losses=_Recording(seen := [])))
    first, second = seen
    a, b = first["label"].double(), second["label"].double()
    if multi_label:
        p, q = (torch.distributions.Bernoulli(logits=x) for x in (a, b))
    else:
        p, q = (torch.distributions.Categorical(logits=x) for x in (a, b))
    kl = torch.distributions.kl_divergence(p, q) + torch.distributions.kl_divergence(q, p)
    wanted = float(kl.detach().mean()) / 2
    assert wanted > 1e-4
    assert acted["r_drop"] == pytest.approx(wanted, rel=1e-4)
    assert losses["label"] == pytest.approx(one["label"] + 2.0 * wanted, rel=1e-4)


class _Recording(Losses):
    """Two passes whose mean loss counts, and whose outputs are kept."""

    def __init__(self, seen: list[Any]) -> None:
        self.seen = seen

    def __call__(self, task: Task, forward: Any, batch: Any) -> Any:
        self.seen += [forward(), forward()]
        a, b = (task.item_losses(one, batch) for one in self.seen)
        return {head: (a[head] + b[head]) / 2 for head in a}, {}


def test_r_drop_without_dropout_is_the_plain_loss() -> None:
    model, task, batch = prepared()
    model.train().set_dropout(0.0)
    plain, _ = accumulate(model, task, [batch], seed=0)
    wanted = gradients(model)
    losses, acted = accumulate(model, task, [batch], seed=0, manner=Manner(losses=RDrop(2.0)))
    assert acted == {"r_drop": 0.0}
    assert losses == pytest.approx(plain)
    assert distance(gradients(model), wanted) < 1e-6


# --- adversarial ------------------------------------------------------------------------------------------------
def test_fgm_moves_each_sequence_along_its_gradient_by_a_share_of_its_length() -> None:
    model, task, batch = prepared()
    model.double().train().set_dropout(0.0)
    table = model.trunk.embeddings.token
    lengths = batch.streams["source"].lengths
    losses, acted = accumulate(model, task, [batch], seed=0, manner=Manner(passes=FGM(0.1)))
    found = gradients(model)
    # The slow way: the vectors by hand, one sequence at a time.
    vectors = torch.nn.functional.embedding(torch.from_numpy(batch.streams["source"].ids), table.weight.detach())
    delta = torch.zeros_like(vectors, requires_grad=True)
    clean = _loss(model, task, batch, vectors + delta)
    (grad,) = torch.autograd.grad(clean, delta)
    moved = torch.cat(
        [
            g / g.norm() * 0.1 * x.norm()
            for g, x in zip(grad.split(lengths.tolist()), vectors.split(lengths.tolist()), strict=True)
        ]
    )
    worse = _loss(model, task, batch, vectors + moved)
    assert losses["label"] == pytest.approx(clean.item(), rel=1e-6)
    assert acted["adversarial_gain"] == pytest.approx((worse - clean).item(), rel=1e-5)
    assert acted["adversarial_gain"] > 0
    model.zero_grad(set_to_none=True)
    (_loss(model, task, batch, vectors) + worse).backward()
    wanted = {n: p.grad for n, p in model.named_parameters() if p.grad is not None and "embeddings.token" not in n}
    assert distance({name: found[name] for name in wanted}, wanted) < 1e-6


def _loss(model: Model, task: Task, batch: Any, vectors: torch.Tensor) -> torch.Tensor:
    """The mean loss of a batch, given its word vectors in the order of the batch."""
    from lexmill.tasks.inputs import packed

    ids, positions, types, layout = packed(batch.streams["source"], model.device)
    hidden = model.trunk(ids, positions, layout, types=types, inputs_embeds=vectors, only="first")
    return task.item_losses({"label": model.heads["label"](hidden)}, batch)["label"].mean()


def test_freelb_stays_within_its_reach_and_climbs() -> None:
    model, task, batch = prepared()
    model.train().set_dropout(0.0)
    before = model.trunk.positions_computed
    plain, _ = accumulate(model, task, [batch], seed=0)
    once = model.trunk.positions_computed - before
    model.zero_grad(set_to_none=True)
    losses, acted = accumulate(model, task, [batch], seed=0, manner=Manner(passes=FreeLB(0.1, 4)))
    assert model.trunk.positions_computed - before == 5 * once
    assert acted["adversarial_gain"] > 0
    assert plain["label"] < losses["label"] < plain["label"] + acted["adversarial_gain"] + 1e-6
    assert not model.trunk.embeddings.token._forward_hooks


def test_a_prefix_in_front_does_not_hide_where_sequences_begin() -> None:
    model, task, batch = prepared()
    adapt(model, AdaptConfig("prefix", tokens=3))
    model.train().set_dropout(0.0)
    losses, acted = accumulate(model, task, [batch], seed=0, manner=Manner(passes=FGM(0.1)))
    assert math.isfinite(losses["label"])
    assert acted["adversarial_gain"] > 0


def test_what_passes_and_losses_say_does_not_depend_on_how_a_batch_is_cut() -> None:
    model, task, _ = prepared()
    model.double().train().set_dropout(0.0)
    examples = task.encode(rows(7), tokenizer(), labelled=True)
    whole, cut = [batch_of(task, examples)], [batch_of(task, examples[:2]), batch_of(task, examples[2:])]
    gains = [
        accumulate(model, task, batches, seed=0, manner=Manner(passes=FGM(0.1)))[1]["adversarial_gain"]
        for batches in (whole, cut)
    ]
    assert gains[0] == pytest.approx(gains[1], rel=1e-6)

    class Lengths(Losses):
        def __call__(self, task: Task, forward: Any, batch: Any) -> Any:
            found = task.item_losses(forward(), batch)
            return found, {"length": torch.from_numpy(batch.streams["source"].lengths).float()}

    lengths = [
        accumulate(model, task, batches, seed=0, manner=Manner(losses=Lengths()))[1]["length"]
        for batches in (whole, cut)
    ]
    assert lengths[0] == pytest.approx(lengths[1])


# --- averaged weights -------------------------------------------------------------------------------------------
def test_the_average_is_that_of_its_definition() -> None:
    model = torch.nn.Linear(3, 2)
    average = Average(model, 0.9)
    wanted = model.weight.detach().clone()
    for step in range(1, 4):
        with torch.no_grad():
            model.weight += step
        average.update()
        decay = min(0.9, (1 + step) / (10 + step))
        wanted = decay * wanted + (1 - decay) * model.weight.detach()
    live = model.weight.detach().clone()
    with average.applied():
        torch.testing.assert_close(model.weight.detach(), wanted)
    assert torch.equal(model.weight, live)
    assert average.put() > 0
    torch.testing.assert_close(model.weight.detach(), wanted)


def test_a_run_with_an_average_validates_and_keeps_it() -> None:
    model, data = tiny_bert(), rows(24)
    task = classifier(data, model)
    examples = InMemory(task, task.encode(data, tokenizer(), labelled=True))
    seen: list[torch.Tensor] = []

    def validate() -> dict[str, float]:
        seen.append(model.trunk.layers[0].attention.query.weight.detach().clone())
        return {"accuracy": float(len(seen))}

    config = TrainConfig(epochs=3, batch_size=8, learning_rate=1e-3, ema=0.99, weight_decay=0.1)
    run = Trainer(model, task, examples, config, validate=validate)
    result = run.run(silent)
    assert result.acted["ema_distance"] > 0
    assert torch.equal(model.trunk.layers[0].attention.query.weight, seen[-1])
    plain, _, _ = trained(epochs=3, weight_decay=0.1)
    assert not torch.equal(plain.model.trunk.layers[0].attention.query.weight, seen[-1])


# --- class balance ----------------------------------------------------------------------------------------------
def test_a_balanced_order_draws_every_class_equally_often_and_its_members_in_turn() -> None:
    classes = np.array([0] * 90 + [1] * 7 + [2] * 3)
    order = BalancedOrder(classes, 10, seed=4)
    drawn = np.concatenate([order.batch(step) for step in range(3 * order.steps_per_epoch)])
    assert len(drawn) == 300
    assert Counter(classes[drawn].tolist()) == {0: 100, 1: 100, 2: 100}
    frequent = Counter(drawn[classes[drawn] == 0].tolist())
    assert len(frequent) == 90
    assert max(frequent.values()) == 2
    rare = Counter(drawn[classes[drawn] == 1].tolist())
    assert max(rare.values()) - min(rare.values()) <= 1
    assert np.array_equal(order.batch(7), BalancedOrder(classes, 10, seed=4).batch(7))
    assert not np.array_equal(order.batch(7), BalancedOrder(classes, 10, seed=5).batch(7))


def test_a_balanced_run_says_so_and_one_that_cannot_be_is_an_error() -> None:
    _, result, _ = trained(balanced=True)
    assert result.acted["balanced_classes"] == 4
    with pytest.raises(UserError, match="batches by length cannot be balanced"):
        trainer(balanced=True, length_window=4)


# --- precision and memory ---------------------------------------------------------------------------------------
def test_fp16_scales_its_loss_and_stays_close_to_fp32() -> None:
    _, exact, _ = trained(dropout=0.0)
    _, half, _ = trained(dropout=0.0, precision="fp16")
    assert half.final_loss == pytest.approx(exact.final_loss, rel=0.02)
    assert half.acted["loss_scale"] > 1


def test_fp16_passes_over_a_step_that_overflows_and_lowers_its_scale() -> None:
    run = trainer(precision="fp16")
    run.progress.scaling.value = 2.0**40
    before = {name: t.clone() for name, t in run.model.state_dict().items()}
    run.model.train()
    run.step()
    assert run.progress.scaling.value == 2.0**39
    assert run.progress.scaling.skipped == 1
    for name, value in run.model.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("adversarial", ["fgm", "freelb"])
def test_an_overflow_in_adversarial_training_is_passed_over_too(adversarial: str) -> None:
    run = trainer(precision="fp16", adversarial=adversarial)
    run.progress.scaling.value = 2.0**40
    run.model.train()
    said = run.step()
    assert (run.progress.scaling.skipped, said.acted, run.progress.acted) == (1, {}, {})
    run.progress.scaling.value = 256.0
    run.progress.step += 1
    run.step()
    assert run.progress.acted["adversarial_gain"] > 0


def test_a_scaled_loss_gives_the_update_of_the_plain_one() -> None:
    found: list[dict[str, torch.Tensor]] = []
    for scale in (1.0, 1024.0):
        model, task, batch = prepared()
        optimizer = Optimizer(model, TrainConfig(max_grad_norm=0.1))
        accumulate(model, task, [batch], seed=0, manner=Manner(scale=scale))
        norm = optimizer.step(1e-3, scale)
        assert math.isfinite(norm)
        found.append({name: t.clone() for name, t in model.state_dict().items()})
    assert distance(found[1], found[0]) < 1e-6


def kept_bytes(model: Model, task: Task, batch: Any) -> tuple[int, dict[str, torch.Tensor]]:
    """Bytes of distinct tensors that autograd keeps between the two passes, and the gradients."""
    sizes: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_sparse:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        accumulate(model, task, [batch], seed=5)
    return sum(size for place, size in sizes.items() if place not in parameters), gradients(model)


def test_recomputing_keeps_less_and_changes_no_gradient() -> None:
    model, task, batch = prepared()
    model.train().set_dropout(0.1)
    plain, wanted = kept_bytes(model, task, batch)
    model.trunk.recompute = True
    lean, found = kept_bytes(model, task, batch)
    assert lean < 0.5 * plain
    assert distance(found, wanted) < 1e-6


def test_what_cannot_be_recomputed_or_agree_with_itself_is_an_error_at_its_key() -> None:
    data = rows(8)
    model = tiny_bert()
    task = classifier(data, model)
    examples = InMemory(task, task.encode(data, tokenizer(), labelled=True))
    model.set_dropout(0.0)
    with pytest.raises(UserError, match="without dropout two passes") as error:
        Trainer(model, task, examples, TrainConfig(r_drop=1.0))
    assert error.value.where == "train.r_drop"
    adapt(model, AdaptConfig("frozen"))
    with pytest.raises(UserError, match="no layer is trained") as error:
        Trainer(model, task, examples, TrainConfig(recompute=True))
    assert error.value.where == "train.recompute"


def test_only_layers_that_are_trained_count_as_recomputed() -> None:
    data = rows(16)
    model = tiny_bert(num_layers=3)
    task = classifier(data, model)
    adapt(model, AdaptConfig("lora", layers=1))
    examples = InMemory(task, task.encode(data, tokenizer(), labelled=True))
    run = Trainer(model, task, examples, TrainConfig(epochs=1, recompute=True))
    assert run.run(silent).acted["recomputed_layers"] == 1


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"momentum": 0.5}, "momentum"),
        ({"optimizer": "sgd", "beta1": 0.5}, "beta1"),
        ({"decay": 0.5}, "decay"),
        ({"adversarial_size": 0.5}, "adversarial_size"),
        ({"adversarial": "fgm", "adversarial_steps": 5}, "adversarial_steps"),
    ],
)
def test_a_key_that_does_nothing_is_an_error_that_says_when_it_would(changes: dict[str, Any], key: str) -> None:
    with pytest.raises(UserError, match="it does nothing where train") as error:
        trainer(**changes)
    assert error.value.where == f"train.{key}"
    assert "leave it out, or set train." in str(error.value)


def test_the_record_says_which_rule_updated_how_many_weights_and_how_often_gradients_were_clipped() -> None:
    run, result, _ = trained(optimizer="muon", max_grad_norm=1e-3)
    hidden = sum(p.numel() for n, p in run.model.named_parameters() if ".layers." in n and p.dim() == 2)
    assert result.acted["muon_weights"] == hidden
    assert result.acted["adamw_weights"] > 0
    assert result.acted["clipped_share"] == 1
    _, calm, _ = trained(max_grad_norm=1e6)
    assert calm.acted["clipped_share"] == 0
    assert "muon_weights" not in calm.acted


def test_generate_has_a_divergence_too() -> None:
    from tests.train.parts import tiny_llama

    model = tiny_llama()
    task = generator(model)
    batch = batch_of(task, task.encode(rows(6), tokenizer(), labelled=True))
    model.train().set_dropout(0.2)
    _, acted = accumulate(model, task, [batch], seed=0, manner=Manner(losses=RDrop(1.0)))
    assert acted["r_drop"] > 0


@pytest.mark.parametrize("kind", ["recurrent", "prompt"])
def test_word_vectors_that_cannot_be_moved_are_refused(kind: str) -> None:
    data = rows(8)
    model = tiny_bert() if kind == "prompt" else models.init(RecurrentConfig(VOCABULARY, state_size=16), "lstm", 0)
    task = classifier(data, model)
    if kind == "prompt":
        adapt(model, AdaptConfig("prompt", tokens=2))
    examples = InMemory(task, task.encode(data, tokenizer(), labelled=True))
    with pytest.raises(UserError, match="word vectors of this model cannot be moved"):
        Trainer(model, task, examples, TrainConfig(adversarial="fgm"))
