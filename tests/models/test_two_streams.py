"""An encoder-decoder made from the parts, fed a batch of two streams: each side has its own layout."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from lexmill.data.batch import Example, Tokens, collate
from lexmill.nn import MLP, Attention, Dense, Embedding, LayerNorm, Packed


class EncoderDecoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.source, self.target = Embedding(50, 12), Embedding(50, 16)
        self.encoder = Attention(12, 3, 4)
        self.decoder = Attention(16, 4, 4, causal=True)
        self.cross = Attention(16, 4, 4, memory_dim=12)
        self.mlp, self.norm = MLP(16, 32, "relu"), LayerNorm(16)

    def forward(self, source, source_layout, target, target_layout):
        memory = self.source(source)
        memory = memory + self.encoder(memory, source_layout)
        x = self.target(target)
        x = x + self.decoder(x, target_layout)
        x = x + self.cross(x, target_layout, memory, source_layout)
        return self.norm(x + self.mlp(x))


def example(rng: np.random.Generator, source: int, target: int) -> Example:
    return Example({"source": (Tokens(rng.integers(0, 50, source)),), "target": (Tokens(rng.integers(0, 50, target)),)})


def test_a_two_stream_batch_goes_through_a_two_stream_model_packed_as_dense_as_alone():
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    model = EncoderDecoder().double()
    examples = [example(rng, *sizes) for sizes in [(5, 2), (3, 7), (5, 2), (1, 4)]]

    def run(batch, dense: bool):
        inputs = []
        for name in ("source", "target"):
            stream = batch.streams[name]
            layout = Packed(torch.from_numpy(stream.offsets))
            ids = torch.from_numpy(stream.ids)
            inputs += [ids[layout.padded.rows], Dense(layout.padded.mask)] if dense else [ids, layout]
        out = model(*inputs)
        return out.flatten(0, 1)[layout.padded.cells] if dense else out

    packed = run(collate(examples), dense=False)
    alone = torch.cat([run(collate([one]), dense=False) for one in examples])
    assert (packed - alone).abs().max() <= 1e-12
    assert (packed - run(collate(examples), dense=True)).abs().max() <= 1e-12
    packed.square().sum().backward()
    assert model.source.weight.grad is not None
    assert model.source.weight.grad.abs().sum() > 0
