"""Text metrics against the libraries' own corpus scores, and what intervals mean."""

from __future__ import annotations

import pytest

from lexmill.metrics.texts import bleu_tokenizer, text_metrics

sacrebleu = pytest.importorskip("sacrebleu")

TEXTS = ["A man rides a horse.", "Two dogs run on grass.", "The red car is parked", "nothing of it", "A cat sleeps."]
REFERENCES = [
    ["A man is riding a horse.", "Someone rides a horse."],
    ["Two dogs run across the grass."],
    ["The red car is parked.", "A car, red, stands there.", "red car"],
    ["People wait for a train at night."],
    ["A cat sleeps."],
]


def test_values_are_those_of_the_libraries() -> None:
    found = text_metrics(TEXTS, REFERENCES)
    streams = [[r[i] if i < len(r) else None for r in REFERENCES] for i in range(3)]
    assert found["bleu"][0] == pytest.approx(sacrebleu.corpus_bleu(TEXTS, streams).score)
    assert found["chrf"][0] == pytest.approx(sacrebleu.corpus_chrf(TEXTS, streams).score)
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rouge1", "rougeL"], use_stemmer=False)
    for name in ("rouge1", "rougeL"):
        each = [scorer.score_multi(r, t)[name].fmeasure for t, r in zip(TEXTS, REFERENCES, strict=True)]
        assert found[name][0] == pytest.approx(100 * sum(each) / len(each))
    for value, (low, high) in found.values():
        assert low <= value <= high


def test_perfect_texts_have_no_doubt_and_chinese_is_split_by_character() -> None:
    texts = ["猫坐在垫子上。", "两只狗在草地上跑。", "今天天气很好,我们去公园。"]
    found = text_metrics(texts, [[text] for text in texts])
    for name, (value, interval) in found.items():
        assert value == pytest.approx(100), name
        assert interval == pytest.approx((100, 100))
    assert bleu_tokenizer([[text] for text in texts], "auto") == "zh"
    assert bleu_tokenizer([["A cat."]], "auto") == "13a"
    half = text_metrics([text[: len(text) // 2] for text in texts], [[text] for text in texts])
    assert 0 < half["rougeL"][0] < 100


def test_intervals_narrow_with_more_items() -> None:
    few = text_metrics(TEXTS, REFERENCES)["chrf"][1]
    many = text_metrics(TEXTS * 20, REFERENCES * 20)["chrf"][1]
    assert many[1] - many[0] < (few[1] - few[0]) / 2
