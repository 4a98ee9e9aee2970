from __future__ import annotations

import pytest
import torch

from lexmill.nn.relative import RelativeBias, distance_buckets


@pytest.mark.parametrize("both_ways", [True, False])
@pytest.mark.parametrize(("buckets", "reach"), [(32, 128), (8, 20), (16, 1000)])
def test_buckets_are_those_of_transformers(both_ways, buckets, reach):
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    ahead = torch.arange(-1500, 1501)
    theirs = t5.T5Attention._relative_position_bucket(ahead, both_ways, buckets, reach)
    assert torch.equal(distance_buckets(ahead, buckets, reach, both_ways=both_ways), theirs)


@pytest.mark.parametrize("both_ways", [True, False])
def test_the_bias_of_a_pair_is_that_of_its_distance(both_ways):
    torch.manual_seed(0)
    layer = RelativeBias(3, 8, 20, both_ways=both_ways).double()
    bias = layer(13)
    ahead = torch.arange(13) - torch.arange(13)[:, None]
    slow = layer.table.weight[distance_buckets(ahead, 8, 20, both_ways=both_ways)].permute(2, 0, 1)
    assert torch.equal(bias, slow)
    weight = torch.randn_like(slow)
    [fast] = torch.autograd.grad((bias * weight).sum(), layer.table.weight)
    torch.testing.assert_close(fast, torch.autograd.grad((slow * weight).sum(), layer.table.weight)[0])
    assert layer(1).shape == (3, 1, 1)
