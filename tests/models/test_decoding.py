"""Choosing tokens: each rule against its slow definition and against `transformers`' processor of that name."""

from __future__ import annotations

import math

import pytest
import torch
from tests.train.parts import tiny_llama

from lexmill.models import Sampling, generate, greedy
from lexmill.models.decoding import Chooser, distribution, keep_top_k, keep_top_p, penalised

LOGITS = [torch.randn(50, generator=torch.Generator().manual_seed(i)) * 3 for i in range(4)]
SEEN = [3, 17, 3, 49, 0]


@pytest.mark.parametrize("logits", LOGITS)
@pytest.mark.parametrize("k", [0, 1, 7, 50, 80])
def test_top_k_keeps_the_k_largest(logits: torch.Tensor, k: int) -> None:
    kept = {i for i, value in enumerate(keep_top_k(logits, k).tolist()) if value > -math.inf}
    ranked = sorted(range(50), key=lambda i: -float(logits[i]))
    assert kept == set(ranked[: k or 50])


@pytest.mark.parametrize("logits", LOGITS)
@pytest.mark.parametrize("p", [1e-6, 0.3, 0.9, 0.999])
def test_top_p_keeps_the_fewest_likeliest_that_reach_p(logits: torch.Tensor, p: float) -> None:
    found = keep_top_p(logits, p)
    probabilities = logits.softmax(0).tolist()
    wanted: set[int] = set()
    for i in sorted(range(50), key=lambda i: -probabilities[i]):
        if wanted and sum(probabilities[j] for j in wanted) >= p:
            break
        wanted.add(i)
    assert {i for i in range(50) if found[i] > -math.inf} == wanted
    assert all(found[i] == logits[i] for i in wanted)


@pytest.mark.parametrize("logits", LOGITS)
def test_every_rule_is_that_of_transformers(logits: torch.Tensor) -> None:
    from transformers.generation import logits_process as theirs

    ids = torch.tensor([SEEN])
    rows = [
        (keep_top_k(logits, 9), theirs.TopKLogitsWarper(9)),
        (keep_top_p(logits, 0.7), theirs.TopPLogitsWarper(0.7)),
        (penalised(logits, SEEN, 1.3), theirs.RepetitionPenaltyLogitsProcessor(1.3)),
        (distribution(logits, Sampling(temperature=0.6), []), theirs.TemperatureLogitsWarper(0.6)),
    ]
    for ours, process in rows:
        torch.testing.assert_close(ours, process(ids, logits[None].clone())[0])


def test_draws_have_the_frequencies_of_the_distribution() -> None:
    sampling = Sampling(temperature=1.5, top_k=5, seed=7)
    choose = Chooser(sampling, [])
    counts = torch.zeros(50)
    for _ in range(4000):
        counts[choose(LOGITS[0])] += 1
    wanted = distribution(LOGITS[0], sampling, []).softmax(0)
    assert (counts[wanted == 0] == 0).all()
    # Four standard deviations of a binomial share.
    assert ((counts / 4000 - wanted).abs() <= 4 * (wanted * (1 - wanted) / 4000).sqrt()).all()


def test_a_sequence_is_drawn_alike_whatever_stands_beside_it() -> None:
    model = tiny_llama().eval()
    model.add_language_head("lm")
    prompts = [[5, 6, 7], [900, 12], [5, 6, 7], [44] * 9]
    sampling = [Sampling(1.0, seed=3), Sampling(2.0, top_k=4, seed=5), Sampling(1.0, seed=3), Sampling()]
    together = generate(model, prompts, [8, 5, 8, 6], sampling=sampling)
    for prompt, own, found in zip(prompts, sampling, together, strict=True):
        [alone] = generate(model, [prompt], len(found.ids), sampling=[own])
        assert alone.ids == found.ids
    assert together[0].ids == together[2].ids
    [other] = generate(model, prompts[:1], 8, sampling=[Sampling(1.0, seed=4)])
    assert other.ids != together[0].ids
    assert together[3].ids == greedy(model, prompts[3:], 6)[0].ids


def test_log_probabilities_are_the_models_own_whatever_was_asked() -> None:
    model = tiny_llama().eval()
    model.add_language_head("lm")
    [found] = generate(model, [[5, 6]], 3, sampling=[Sampling(3.0, top_k=3, repetition_penalty=2.0, seed=1)])
    from lexmill.nn import Packed

    ids = [5, 6, *found.ids]
    with torch.inference_mode():
        hidden = model.hidden(torch.tensor(ids), torch.arange(5), Packed.of([5]))
        logprobs = model.heads["lm"](hidden).log_softmax(-1)
    for i, (token, score) in enumerate(zip(found.ids, found.logprobs, strict=True)):
        assert score == pytest.approx(float(logprobs[i + 1, token]), rel=1e-4)


def test_an_answer_ends_where_it_is_told_to() -> None:
    model = tiny_llama().eval()
    model.add_language_head("lm")
    found = generate(model, [[5], [6]], 9, ended=lambda index, so_far: index == 1 and len(so_far.ids) == 2)
    assert [len(one.ids) for one in found] == [9, 2]


@pytest.mark.parametrize("temperature", [0.0, 1e-39, 1e-9])
def test_so_low_a_temperature_takes_the_likeliest(temperature: float) -> None:
    chooser = Chooser(Sampling(temperature=temperature, seed=1), SEEN)
    assert [chooser(logits) for logits in LOGITS] == [int(logits.argmax()) for logits in LOGITS]
