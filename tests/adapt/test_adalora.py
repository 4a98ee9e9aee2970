"""AdaLoRA's choice of singular values: that of `peft`, under the paper's schedule; and the penalty's gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lexmill.adapt import AdaptConfig
from lexmill.adapt.adalora import RankAllocator
from lexmill.nn import Linear
from lexmill.nn.svd import Svd, SvdLinear

CONFIG = AdaptConfig("adalora", rank=2, initial_rank=5, tinit=0.1, tfinal=0.2, delta_t=0.1, orthogonality=0.0)
STEPS = 20


def trunk(count: int = 4) -> nn.Module:
    return nn.Sequential(*(SvdLinear.around(Linear(6, 7 + i), CONFIG.start_rank, 1.0) for i in range(count)))


def fill_gradients(adapters: list[Svd], generator: torch.Generator) -> None:
    for index, adapter in enumerate(adapters):
        for p in adapter.parameters():
            p.grad = torch.randn(p.shape, generator=generator) * (index + 1)


class Theirs(nn.Module):
    """The parameters of our adapters under `peft`'s names."""

    def __init__(self, adapters: list[Svd]) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        for adapter in adapters:
            layer = nn.Module()
            layer.lora_A = nn.ParameterDict({"default": adapter.q.detach().clone()})
            layer.lora_E = nn.ParameterDict({"default": adapter.values.detach().clone()[:, None]})
            layer.lora_B = nn.ParameterDict({"default": adapter.p.detach().clone()})
            self.layers.append(layer)

    def pairs(self, adapters: list[Svd]) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """Theirs and ours."""
        found: list[tuple[nn.Parameter, nn.Parameter]] = []
        for layer, adapter in zip(self.layers, adapters, strict=True):
            named: Any = layer
            found += [(named.lora_A["default"], adapter.q), (named.lora_B["default"], adapter.p)]
            found.append((named.lora_E["default"], adapter.values))
        return found


def test_the_values_kept_are_those_that_peft_keeps() -> None:
    from peft import AdaLoraConfig
    from peft.tuners.adalora.layer import RankAllocator as Peer

    torch.manual_seed(0)
    module, generator = trunk(), torch.Generator().manual_seed(1)
    ours = RankAllocator(module, CONFIG)
    adapters = list(ours.adapters.values())
    for adapter in adapters:
        nn.init.normal_(adapter.values)
    theirs = Theirs(adapters)
    asked = AdaLoraConfig(init_r=5, target_r=2, tinit=2, tfinal=4, deltaT=2, total_step=STEPS)
    peer = Peer(theirs, asked, "default")
    choices: list[list[int]] = []
    for step in range(STEPS):
        fill_gradients(adapters, generator)
        for one, other in theirs.pairs(adapters):
            assert other.grad is not None
            one.data = other.detach().reshape(one.shape).clone()
            one.grad = other.grad.reshape(one.shape).clone()
        ours.before_update(step, STEPS)
        if step <= STEPS - 4:
            peer.update_ipt(theirs)
        said = ours.after_update(step, STEPS)
        if "rank/0" in said:
            pattern = peer.mask_to_budget(theirs, ours.budget(step, STEPS)) if said["rank_budget"] < 20 else {}
            for index, (path, kept) in enumerate(ours.kept.items()):
                expected = pattern.get(f"layers.{index}.lora_E.default", [True] * 5)
                assert kept.tolist() == expected
                assert adapters[index].values.ne(0).tolist() == kept.tolist()
                assert said[f"rank/{path}"] == sum(expected)
            choices.append([int(kept.sum()) for kept in ours.kept.values()])
        with torch.no_grad():
            for adapter in adapters:
                adapter.values.add_(torch.randn(5, generator=generator) * 0.1)
    assert len(choices) == 8
    assert [sum(one) for one in choices] == sorted((sum(one) for one in choices), reverse=True)
    assert sum(choices[-1]) == 2 * len(adapters)
    assert len(set(map(tuple, choices))) > 3


def test_the_budget_falls_by_a_cubic_and_then_stays() -> None:
    allocator = RankAllocator(trunk(), CONFIG)
    budgets = [allocator.budget(step, STEPS) for step in range(STEPS)]
    assert budgets[:3] == [20, 20, 20]
    assert budgets[3:16] == [8 + round(12 * (1 - (step - 2) / 14) ** 3) for step in range(3, 16)]
    assert budgets[16:] == [8] * 4


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_very_short_run_still_meets_its_budget(steps: int) -> None:
    module = trunk()
    allocator = RankAllocator(module, CONFIG)
    adapters = list(allocator.adapters.values())
    for step in range(steps):
        for adapter in adapters:
            nn.init.normal_(adapter.values)
        fill_gradients(adapters, torch.Generator().manual_seed(step))
        allocator.before_update(step, steps)
        allocator.after_update(step, steps)
    assert allocator.effect()["rank_total"] == 2 * len(adapters)


def test_the_penalty_pulls_vectors_towards_orthonormal_ones_and_is_scaled_as_the_loss_is() -> None:
    module = trunk(1)
    allocator = RankAllocator(module, AdaptConfig("adalora", rank=2, initial_rank=5, orthogonality=0.5))
    [adapter] = allocator.adapters.values()
    allocator.before_update(0, STEPS, 8.0)
    assert adapter.p.grad is not None
    eye = torch.eye(5)
    expected = 8.0 * 0.5 * 4 * adapter.p @ (adapter.p.t() @ adapter.p - eye)
    assert torch.allclose(adapter.p.grad, expected, atol=1e-6)
    with torch.no_grad():
        adapter.p.copy_(torch.linalg.qr(torch.randn(7, 5))[0])
        adapter.q.copy_(torch.linalg.qr(torch.randn(6, 5))[0].t())
        assert float(adapter.penalty()) < 1e-6


def test_state_goes_to_another_allocator_and_back() -> None:
    torch.manual_seed(0)
    module = trunk()
    one, other = RankAllocator(module, CONFIG), RankAllocator(module, CONFIG)
    fill_gradients(list(one.adapters.values()), torch.Generator().manual_seed(0))
    one.before_update(3, STEPS)
    one.after_update(4, STEPS)
    other.load({name: tensor.clone() for name, tensor in one.state().items()})
    assert one.state().keys() == other.state().keys()
    assert all(torch.equal(tensor, other.state()[name]) for name, tensor in one.state().items())
