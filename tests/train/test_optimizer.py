"""Row-sparse AdamW against torch's dense one, on the same gradients."""

from __future__ import annotations

import pytest
import torch
from tests.models.oracle import Texts
from tests.train.parts import tiny_bert
from torch import Tensor, nn

from lexmill.errors import UserError
from lexmill.nn import Embedding, Linear
from lexmill.train import Optimizer, TrainConfig


class Bag(nn.Module):
    """A small model with one embedding table."""

    def __init__(self, *, sparse: bool) -> None:
        super().__init__()
        self.table = Embedding(50, 8, sparse=sparse)
        self.out = Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.table(ids).mean(1))


def twins() -> tuple[Bag, Bag]:
    torch.manual_seed(0)
    sparse, dense = Bag(sparse=True), Bag(sparse=False)
    dense.load_state_dict(sparse.state_dict())
    return sparse.double(), dense.double()


def batches(count: int) -> list[Tensor]:
    """Batches that meet new rows as they go, leave some for long, and never use rows 40 to 49."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(min(5 + 4 * i, 40), (4, 6), generator=generator) for i in range(count)]


def torch_adamw(model: Bag, config: TrainConfig) -> torch.optim.AdamW:
    decayed = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(config.beta1, config.beta2), eps=config.epsilon, fused=True)


def dense_step(model: Bag, optimizer: torch.optim.AdamW, ids: Tensor, rate: float, clip: float) -> float:
    optimizer.zero_grad()
    model(ids).square().sum().backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    if clip:
        # The factor is rounded as the fused kernel takes it, in float32; what is tested is all the rest.
        factor = ((norm + 1e-6) / clip).clamp(min=1.0).float().double()
        for p in model.parameters():
            assert p.grad is not None
            p.grad.div_(factor)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    return float(norm)


def sparse_step(model: Bag, optimizer: Optimizer, ids: Tensor, rate: float) -> float:
    model(ids).square().sum().backward()
    return optimizer.step(rate)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_row_sparse_updates_equal_dense_adamw(weight_decay: float, clip: float) -> None:
    config = TrainConfig(weight_decay=weight_decay, max_grad_norm=clip)
    sparse, dense = twins()
    ours, theirs = Optimizer(sparse, config), torch_adamw(dense, config)
    for i, ids in enumerate(batches(12)):
        rate = 0.01 / (i + 1)
        norm = sparse_step(sparse, ours, ids, rate)
        assert norm == pytest.approx(dense_step(dense, theirs, ids, rate, clip), rel=1e-12)
    ours.close()
    for mine, other in zip(sparse.parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-14)


def test_without_weight_decay_unused_rows_keep_their_bits_and_have_no_state() -> None:
    sparse, _ = twins()
    before = sparse.table.weight.detach().clone()
    optimizer = Optimizer(sparse, TrainConfig())
    for ids in batches(5):
        sparse_step(sparse, optimizer, ids, 0.01)
    used = torch.cat([ids.flatten() for ids in batches(5)]).unique()
    unused = torch.ones(50, dtype=torch.bool)
    unused[used] = False
    assert torch.equal(sparse.table.weight[unused], before[unused])
    assert len(optimizer.state()["table.weight.rows"]) == len(used)


def test_evaluation_sees_deferred_decay() -> None:
    config = TrainConfig(weight_decay=0.1)
    sparse, dense = twins()
    ours, theirs = Optimizer(sparse, config), torch_adamw(dense, config)
    for ids in batches(3):
        sparse_step(sparse, ours, ids, 0.1)
        dense_step(dense, theirs, ids, 0.1, config.max_grad_norm)
    never_used = torch.tensor([[45, 49]])
    sparse.eval()
    torch.testing.assert_close(sparse(never_used), dense(never_used), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_resumed_state_continues_bit_for_bit(weight_decay: float) -> None:
    config = TrainConfig(weight_decay=weight_decay)
    whole, _ = twins()
    optimizer = Optimizer(whole, config)
    for ids in batches(6)[:3]:
        sparse_step(whole, optimizer, ids, 0.01)
    state = {name: tensor.clone() for name, tensor in optimizer.state().items()}
    weights = {name: tensor.clone() for name, tensor in whole.state_dict().items()}
    for ids in batches(6)[3:]:
        sparse_step(whole, optimizer, ids, 0.01)
    optimizer.close()

    resumed, _ = twins()
    resumed.load_state_dict(weights)
    again = Optimizer(resumed, config)
    again.load(state)
    for ids in batches(6)[3:]:
        sparse_step(resumed, again, ids, 0.01)
    again.close()
    for mine, other in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_gradients_over_micro_batches_add_up() -> None:
    sparse, dense = twins()
    ours, theirs = Optimizer(sparse, TrainConfig()), torch_adamw(dense, TrainConfig())
    ids = batches(1)[0]
    for row in ids.split(1):
        sparse(row).square().sum().backward()
    ours.step(0.01)
    dense_step(dense, theirs, ids, 0.01, TrainConfig().max_grad_norm)
    torch.testing.assert_close(sparse.table.weight, dense.table.weight, rtol=1e-12, atol=1e-14)


def test_vectors_are_not_decayed() -> None:
    sparse, _ = twins()
    with torch.no_grad():
        sparse.out.bias.fill_(1.0)
    optimizer = Optimizer(sparse, TrainConfig(weight_decay=0.5))
    (sparse(batches(1)[0]) * 0).sum().backward()
    optimizer.step(0.1)
    assert torch.equal(sparse.out.bias, torch.ones(3, dtype=torch.float64))
    assert float(sparse.out.weight.detach().norm()) > 0


@pytest.mark.parametrize("kind", ["adamw", "sgd", "muon"])
def test_each_layer_learns_at_a_share_of_the_rate_of_the_one_above(kind: str) -> None:
    """AdamW's first step is as large as its rate, whatever the gradient; so it tells the rate of each parameter."""
    model = tiny_bert(num_layers=3)
    model.add_classifier("label", 2)
    config = TrainConfig(layer_decay=0.5, optimizer=kind, max_grad_norm=0.0)  # pyright: ignore[reportArgumentType]
    optimizer = Optimizer(model, config)
    assert optimizer.shares == [0.5**4, 0.5**3, 0.5**2, 0.5, 1.0]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    texts = Texts()
    model.train()(*texts.packed, types=texts.types)["label"].square().sum().backward()
    grads = {name: p.grad.to_dense().abs().max() for name, p in model.named_parameters() if p.grad is not None}
    optimizer.step(0.01)
    for name, p in model.named_parameters():
        share = {"trunk.embeddings": 0.5**4, "heads.label": 1.0}.get(".".join(name.split(".")[:2]))
        rate = 0.01 * (0.5 ** (3 - int(name.split(".")[2])) if share is None else share)
        moved = float((p - before[name]).detach().abs().max())
        if kind == "sgd":
            assert moved == pytest.approx(rate * float(grads[name]), rel=1e-3, abs=1e-7)
        elif kind == "adamw" and "key.bias" not in name:
            assert moved == pytest.approx(rate, rel=1e-2)
        elif kind == "muon":
            assert 0 <= moved <= 1.01 * rate


def test_a_model_whose_heads_alone_are_trained_has_no_layers_to_slow_down() -> None:
    model = tiny_bert()
    model.add_classifier("label", 2, transform=None)
    model.trunk.requires_grad_(False)
    with pytest.raises(UserError, match="at one height"):
        Optimizer(model, TrainConfig(layer_decay=0.9))
