"""Keys and values in bytes: near what they were, a quarter of the room, and stored with the model."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.compress.decoders import GPT2, LLAMA, small_decoder
from tests.compress.material import material_of, texts
from tests.small_classifier import small_classifier, small_tokenizer

from lexmill import models
from lexmill.compress import Material, Step
from lexmill.compress.base import check_order
from lexmill.engine import Loaded
from lexmill.errors import UserError
from lexmill.models import Model
from lexmill.models.generate import greedy
from lexmill.nn.cache import KVCache
from lexmill.nn.layout import Packed
from lexmill.tasks.generate import Generate, GenerateOptions

PROMPTS = [[3, 5, 7, 9, 20, 31], [11, 2, 90, 4, 1]]
_READ = """
import json, sys
import torch
from lexmill import models
from lexmill.models.generate import greedy
torch.set_num_threads(1)
told = [[one.ids for one in greedy(models.load(path), json.loads(sys.argv[1]), 12)] for path in sys.argv[2:]]
assert not any(name.startswith("lexmill.compress") for name in sys.modules)
print(json.dumps(told))
"""


def decoder(family: str = "llama", **changes: Any) -> Loaded:
    shape = {**(LLAMA if family == "llama" else GPT2), **changes}
    size = small_tokenizer().get_vocab_size()
    model = small_decoder(family, vocab_size=size, **shape)
    return Loaded(Generate({"text": "text"}, GenerateOptions(end_token="[SEP]")), model, small_tokenizer())


def material() -> Material:
    return Material([], [{"text": text} for text in texts(12)], [{"text": text} for text in texts(12, seed=1)])


def coded(subject: Loaded, *before: Step) -> tuple[Loaded, dict[str, float]]:
    effect: dict[str, float] = {}
    for step in (*before, Step("kv_int8", {"max_error": 0.2})):
        method, options = step.read("steps")
        subject, effect = method.apply(subject, material(), options)
    return subject, effect


def logits(model: Model, parts: list[list[list[int]]]) -> torch.Tensor:
    """The last logits of sequences whose tokens come part by part."""
    cache = model.trunk.new_cache(len(parts[0]), 4)
    hidden = torch.zeros(0)
    for part in parts:
        layout = Packed.of([len(ids) for ids in part])
        starts = torch.repeat_interleave(cache.lengths - layout.offsets[:-1], layout.lengths)
        ids = torch.tensor([token for one in part for token in one])
        positions = starts + torch.arange(layout.num_tokens)
        with torch.inference_mode():
            hidden = model.trunk(ids, positions, layout, cache=cache, only="last")
    with torch.inference_mode():
        return model.heads["lm"](hidden)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_bytes_say_nearly_the_same_in_a_quarter_of_the_room(family: str) -> None:
    plain, (small, effect) = decoder(family), coded(decoder(family))
    parts = [[[3, 5, 7], [11, 2, 90, 4]], [[9], [1]], [[20, 31], [8]], [[6], [6]]]
    wanted, got = logits(plain.model, parts), logits(small.model, parts)
    assert 0 < float((wanted - got).norm() / (wanted - wanted.mean()).norm()) < 0.05
    assert effect["bytes_per_token_before"] == 2 * 2 * 4 * 16 * 4  # keys and values, layers, heads, dimensions, bytes
    assert effect["bytes_per_token_after"] == 2 * 2 * 4 * (16 + 2)
    assert 0 < effect["output_error"] < 0.05
    assert abs(effect["nats_per_token_after"] - effect["nats_per_token_before"]) < 0.05
    assert effect["tokens_measured"] > 20


def test_codes_are_the_nearest_and_go_along_where_sequences_are_chosen_and_room_grows() -> None:
    torch.manual_seed(0)
    plain, small = (KVCache([(2, 8)], 3, 2, coded=one) for one in (False, True))
    told = [torch.randn(count, 2, 8) for count in (6, 3, 3, 3)]
    for number, keys in enumerate(told):
        for cache in (plain, small):
            cache.begin(Packed.of([len(keys) // 3] * 3))
            cache.layers[0].extend(keys, 3 * keys)
            cache.commit()
        if number == 1:
            for cache in (plain, small):
                cache.keep(torch.tensor([2, 0, 0]))
    for one, other in ((plain.layers[0].keys, small.layers[0].keys), (plain.layers[0].values, small.layers[0].values)):
        whole, near = one.first(5), other.first(5)
        step = whole.abs().amax(-1, keepdim=True) / 127
        assert bool(((whole - near).abs() <= 0.51 * step).all())


def test_a_coded_cache_is_read_again_alone_and_with_weights_in_bytes(tmp_path: Path) -> None:
    made = [coded(decoder())[0], coded(decoder("gpt2"))[0]]
    made += [
        coded(decoder(), Step("weights", {"dtype": dtype, "rounding": "nearest"}))[0] for dtype in ("int8", "int4")
    ]
    made.append(coded(decoder(tied_output=False), Step("int8", {"max_error": 2.0, "rows": 8, "embeddings": False}))[0])
    here = [[one.ids for one in greedy(each.model, PROMPTS, 12)] for each in made]
    for number, each in enumerate(made):
        (tmp_path / str(number)).mkdir()
        models.save(each.model, tmp_path / str(number))
    command = [sys.executable, "-c", _READ, json.dumps(PROMPTS), *(str(tmp_path / str(n)) for n in range(len(made)))]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert json.loads(done.stdout) == here


def test_what_has_no_cache_says_so() -> None:
    with pytest.raises(UserError, match="keeps no keys and values"):
        Step("kv_int8").read("step")[0].apply(small_classifier(), material_of(train=8), Step("kv_int8").read("step")[1])
    with pytest.raises(UserError, match="bytes already"):
        coded(coded(decoder())[0])
    with pytest.raises(UserError, match="'weights' cannot follow 'kv_int8'"):
        check_order([Step("kv_int8"), Step("weights")])


def test_a_change_that_is_too_large_is_refused_and_nothing_is_left_of_it() -> None:
    subject = decoder()
    method, options = Step("kv_int8", {"max_error": 1e-6}).read("step")
    with pytest.raises(UserError, match="bytes change what the model says"):
        method.apply(subject, replace(material(), validation=[]), options)
    assert subject.model.structure() == decoder().model.structure()
