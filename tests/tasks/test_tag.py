"""Entities: schemes and decoding, units and offsets in raw text, windows, the loss, real rows, whole runs."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.fit.conftest import Recipe
from tests.serve.conftest import Start
from tests.train.parts import distance, gradients, tiny_bert, tokenizer, write_rows

from lexmill import load
from lexmill.data import open_source
from lexmill.data.batch import IGNORE, collate
from lexmill.engine import TorchEngine
from lexmill.errors import UserError
from lexmill.fit import fit
from lexmill.fit.prepare import prepare
from lexmill.metrics import Counts, count_entities, entity_scores
from lexmill.tasks import Tag, bio
from lexmill.tasks.inputs import dense
from lexmill.tasks.tag import Tagged, TagOptions
from lexmill.tasks.units import join, units_of
from lexmill.tasks.windows import windows_of_units
from lexmill.train import accumulate
from lexmill.train.step import Manner
from lexmill.verify import verify

COLUMNS = {"text": "text", "tags": "tags"}
SCHEMES: tuple[bio.Scheme, ...] = ("BIO", "BIOES")
LABELS = ("place", "who")
OPTIONS = {"max_length": 100, "stride": 40}


def tags_for(scheme: bio.Scheme) -> list[str]:
    return ["O", *(f"{sign}-{label}" for label in LABELS for sign in ("BI" if scheme == "BIO" else "BIES"))]


def row(text: str, *entities: tuple[str, str]) -> dict[str, Any]:
    places = [(text.index(part), part, label) for part, label in entities]
    return {"text": text, "tags": [{"start": s, "end": s + len(part), "label": label} for s, part, label in places]}


DATA = [
    row("Zoë  lives in São  Paulo, she said.", ("Zoë", "who"), ("São  Paulo", "place")),
    row(
        "彭小军在ＢＥＩＪＩＮＧ说：Öztürk去了台湾。",
        ("彭小军", "who"),
        ("ＢＥＩＪＩＮＧ", "place"),
        ("Öztürk", "who"),
        ("台湾", "place"),
    ),
    row("She said (in STRASSE): nothing!", ("STRASSE", "place")),
    row("Nothing  here."),
    row("e\u0301tienne went to New-York 🎉", ("e\u0301tienne", "who"), ("New-York", "place")),
]


def task_of(rows: list[dict[str, Any]] = DATA, **options: Any) -> Tag:
    return Tag.from_records(rows, COLUMNS, TagOptions(**{"max_length": 64, "stride": 8, **options}))


def spoken(task: Tag, answer: Tagged) -> list[tuple[int, int, str]]:
    return [(one.start, one.end, one.label) for one in task.entities(answer)]


def wanted(record: dict[str, Any]) -> list[tuple[int, int, str]]:
    return [(one["start"], one["end"], one["label"]) for one in record["tags"]]


# --- schemes ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("scheme", SCHEMES)
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_the_best_path_is_that_of_the_slow_loop_over_all(scheme: bio.Scheme, data: st.DataObject) -> None:
    tags = tags_for(scheme)
    count = data.draw(st.integers(1, 4 if scheme == "BIO" else 3))
    seed = data.draw(st.integers(0, 10_000))
    scores = np.random.default_rng(seed).normal(size=(count, len(tags))) * 3
    formed = [
        path
        for path in itertools.product(range(len(tags)), repeat=count)
        if bio.entities_in([tags[i] for i in path], scheme)[1] == []
    ]
    best = max(formed, key=lambda path: sum(scores[unit, tag] for unit, tag in enumerate(path)))
    assert tuple(bio.viterbi(scores, bio.transitions(tags, scheme)).tolist()) == best


@pytest.mark.parametrize("scheme", SCHEMES)
@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_entities_are_those_of_seqeval_in_strict_mode(scheme: bio.Scheme, data: st.DataObject) -> None:
    from seqeval.scheme import IOB2, IOBES, Entities

    tags = data.draw(st.lists(st.sampled_from(tags_for(scheme)), min_size=1, max_size=9))
    theirs = Entities([tags], IOB2 if scheme == "BIO" else IOBES).entities[0]
    ours, loose = bio.entities_in(tags, scheme)
    assert [(one.first, one.last + 1, one.label) for one in ours] == [(one.start, one.end, one.tag) for one in theirs]
    again = bio.tags_of(ours, len(tags), scheme)
    assert again == [("O" if at in loose else tag) for at, tag in enumerate(tags)]


@pytest.mark.filterwarnings("ignore")
def test_scores_are_those_of_seqeval_in_strict_mode() -> None:
    from seqeval.metrics import f1_score, precision_score, recall_score
    from seqeval.scheme import IOB2

    generator = np.random.default_rng(0)
    truth, given = ([generator.choice(tags_for("BIO"), 12).tolist() for _ in range(60)] for _ in range(2))
    given = [
        [a if keep else b for a, b, keep in zip(*two, generator.random(12) < 0.8, strict=True)]
        for two in zip(truth, given, strict=True)
    ]
    places = [[bio.entities_in(tags, "BIO")[0] for tags in side] for side in (truth, given)]
    each = [count_entities(a, b, LABELS) for a, b in zip(*places, strict=True)]
    table = np.sum([(one.hit, one.support, one.predicted) for one in each], axis=0)
    found = entity_scores(Counts(*table))
    for name, theirs in [("precision", precision_score), ("recall", recall_score), ("f1", f1_score)]:
        assert found[name] == pytest.approx(theirs(truth, given, mode="strict", scheme=IOB2))


def test_schemes_are_told_apart_by_their_tags() -> None:
    assert bio.scheme_of(sign for sign, _ in map(bio.split_tag, ["O", "B-x", "I-x-y"])) == "BIO"
    assert bio.scheme_of(sign for sign, _ in map(bio.split_tag, ["B-x", "L-x", "U-x", "O"])) == "BIOES"
    assert bio.scheme_of(sign for sign, _ in map(bio.split_tag, ["B-x", "M-x", "E-x", "S-x", "O"])) == "BIOES"
    for tag in ("X-place", "place", "B-", "", "O-x"):
        with pytest.raises(UserError, match="no tag of a known scheme"):
            bio.split_tag(tag)
    with pytest.raises(UserError, match="no tag begins an entity"):
        bio.scheme_of({"O", "I"})


# --- units ------------------------------------------------------------------------------------------------------
def test_units_are_words_signs_and_single_chinese_characters() -> None:
    text = "e\u0301tude, don't  说ＡＢ２了 naïve_x\u3000か🎉\ufe0f"
    parts = [text[start:end] for start, end in units_of(text).tolist()]
    assert parts == ["e\u0301tude", ",", "don", "'", "t", "说", "ＡＢ２", "了", "naïve", "_", "x", "か", "🎉\ufe0f"]
    assert units_of(" \n").shape == (0, 2)


@settings(deadline=None)
@given(text=st.text(max_size=40))
def test_units_hold_every_character_that_is_no_blank_and_do_not_overlap(text: str) -> None:
    spans = units_of(text)
    assert (spans[:, 0] < spans[:, 1]).all()
    assert (spans[1:, 0] >= spans[:-1, 1]).all()
    rest = "".join(c for at, c in enumerate(text) if not any(start <= at < end for start, end in spans.tolist()))
    assert not rest.strip("".join(map(chr, range(33))) + "\x7f" + "".join(map(chr, range(128, 161)))).strip()


def test_given_tokens_are_joined_as_they_are_written() -> None:
    for tokens, text in [
        (["Redondo", "Beach", "."], "Redondo Beach ."),
        (["用", "C", "S", "2", "打", "，", "好"], "用CS2打，好"),
        (["我", "有", "iPhone", "4s", "和", "i", "P", "a", "d"], "我有iPhone 4s和iPad"),
        (["A", "I"], "A I"),
    ]:
        joined, spans = join(tokens)
        assert joined == text
        assert [joined[start:end] for start, end in spans.tolist()] == tokens


def test_characters_of_cluener_join_to_its_texts(shared_data: Path) -> None:
    for one in open_source(shared_data / "cluener2020" / "dev.jsonl.xz").peek(400):
        assert join(one.values["tokens"])[0] == one.values["text"]


# --- what a row says ----------------------------------------------------------------------------------------------
def perfect(task: Tag, record: dict[str, Any]) -> Tagged:
    """What is decoded where the logits say exactly what the labels say."""
    (example,) = task.encode([record], tokenizer(), labelled=True)
    ((text, joined, spans, windows),) = task._cut([record], tokenizer())
    marks = example.token_labels["tags"]
    tables = np.eye(len(task.tags))[np.where(marks == IGNORE, 0, marks)] * 9
    parts = np.split(tables, np.cumsum([len(one.tokens.ids) for one in windows])[:-1])
    return task._gathered(text, joined, spans, windows, parts)


def test_offsets_are_those_of_the_raw_text() -> None:
    task = task_of()
    for record in DATA:
        assert spoken(task, perfect(task, record)) == wanted(record)


@pytest.mark.parametrize("name", ["wnut17", "cluener2020", "weibo_ner"])
def test_real_entities_are_found_again_from_their_tags(shared_data: Path, name: str) -> None:
    from seqeval.metrics import f1_score
    from seqeval.scheme import IOB2

    rows = [one.values for one in open_source(shared_data / name / "dev.jsonl.xz").peek(150)]
    task = Tag.from_records(rows, {"text": "tokens", "tags": "tags"}, TagOptions())
    answers = [perfect(task, one) for one in rows]
    found = task.evaluate(answers, rows)
    assert found.values["f1"] >= 0.99
    assert found.values["token_accuracy"] == 1.0
    seen = {finding.code: finding.count for finding in task.inspect((str(i), one) for i, one in enumerate(rows))}
    assert found.values["recall"] == pytest.approx(1 - seen.get("unreachable_entities", 0) / seen["entities"])
    if name == "wnut17":  # given by words, which are the units
        tags = [one["tags"] for one in rows]
        assert f1_score(tags, tags, mode="strict", scheme=IOB2) == found.values["f1"]


# --- windows ----------------------------------------------------------------------------------------------------
def test_a_short_text_is_one_window_as_if_there_were_none() -> None:
    words = ["Zoë", "lives", "unbelievably", "well", "."]
    ((one,),) = windows_of_units([words], tokenizer(), 64, 8)
    whole = tokenizer().encode(words, is_pretokenized=True)
    assert one.tokens.ids.tolist() == whole.ids
    assert one.units.tolist() == [0, 1, 2, 3, 4]
    assert one.rows.tolist() == [whole.word_ids.index(unit) for unit in range(5)]


def test_each_unit_of_a_long_text_stands_where_it_has_the_most_context() -> None:
    words = [
        "unbelievably",
        "long",
        "words",
        "stand",
        "in",
        "antidisestablishmentarian",
        "windows",
        ",",
        "你",
        "好",
    ] * 6
    (windows,) = windows_of_units([words], tokenizer(), 20, 7)
    whole = tokenizer().encode(words, is_pretokenized=True, add_special_tokens=False)
    assert len(windows) > 5
    assert sorted(np.concatenate([one.units for one in windows]).tolist()) == list(range(len(words)))
    begins = [place * 11 for place in range(len(windows))]
    ends = [min(begin + 18, len(whole.ids)) for begin in begins]
    for index, one in enumerate(windows):
        assert one.tokens.ids[1:-1].tolist() == whole.ids[begins[index] : ends[index]]
        for unit, at in zip(one.units.tolist(), one.rows.tolist(), strict=True):
            place = whole.word_ids.index(unit)
            assert begins[index] + at - 1 == place
            context = [
                min(place - b, e - 1 - place) if b <= place < e else -1 for b, e in zip(begins, ends, strict=True)
            ]
            assert context[index] == max(context)
    with pytest.raises(UserError, match="cannot share 18"):
        windows_of_units([words], tokenizer(), 20, 18)


# --- training -----------------------------------------------------------------------------------------------------
def test_the_loss_is_that_of_first_tokens_packed_padded_and_cut() -> None:
    model, task = tiny_bert().double(), task_of(max_length=12, stride=4)
    task.attach(model)
    items = task.encode([*DATA, {"text": "No tags."}], tokenizer(), labelled=True)

    def run(parts: list[Any], **how: Any) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
        found, _ = accumulate(model, task, [collate(part) for part in parts], seed=0, manner=Manner(**how))
        return found, gradients(model)

    whole, padded, cut = run([items]), run([items], arrange=dense), run([items[:1], items[1:3], items[3:]])
    batch = collate(items)
    logits = task.forward(model, batch)["tags"]
    marks = torch.from_numpy(np.where(batch.masks["tags"], batch.labels["tags"], IGNORE))
    assert int((marks != IGNORE).sum()) == sum(len(units_of(one["text"])) for one in DATA)
    slow = torch.nn.functional.cross_entropy(logits, marks, ignore_index=IGNORE)
    assert whole[0]["tags"] == pytest.approx(float(slow.detach()), rel=1e-10)
    for other in (padded, cut):
        assert other[0]["tags"] == pytest.approx(whole[0]["tags"], rel=1e-10)
        assert distance(other[1], whole[1]) <= 1e-10


@pytest.mark.parametrize("max_length", [64, 12])
def test_a_small_model_learns_its_entities_by_heart(max_length: int) -> None:
    model, task = tiny_bert(), task_of(max_length=max_length, stride=4)
    torch.manual_seed(0)
    task.attach(model)
    batch = collate(task.encode(DATA, tokenizer(), labelled=True))
    model.trunk.embeddings.token.sparse = False
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(60):
        accumulate(model, task, [batch], seed=0, manner=Manner())
        optimiser.step()
        optimiser.zero_grad()
    model.eval()
    with torch.inference_mode():
        answers = task.answer(model, batch, DATA, tokenizer())
    for record, answer in zip(DATA, answers, strict=True):
        assert spoken(task, answer) == wanted(record)
        assert all(0.5 < one.score <= 1 for one in task.entities(answer))
    found = task.evaluate(answers, DATA)
    assert found.values == {"precision": 1.0, "recall": 1.0, "f1": 1.0, "token_accuracy": 1.0}
    assert task.item_scores(answers, [*DATA[:4], {"text": "?"}])[:4].tolist() == [1.0] * 4
    one = task.render(task.combine([answers[0], answers[0]]))
    assert [entity["text"] for entity in one["entities"]] == ["Zoë", "São  Paulo"]


# --- what is wrong ------------------------------------------------------------------------------------------------
def test_what_cannot_be_used_says_why() -> None:
    tokens = {"text": ["Zoë", "left"], "tags": ["B-who", "O"]}
    task = task_of([tokens])
    for record, message in [
        ({**tokens, "tags": ["O"]}, "1 tags for 2 tokens"),
        ({"text": "Zoë left", "tags": ["B-who", "O"]}, "a text that is not cut into tokens"),
        ({"text": [], "tags": []}, "holds no tokens"),
        ({"text": ["a", ""], "tags": ["O", "O"]}, "an empty or strange token"),
        ({**tokens, "tags": ["B-moon", "O"]}, "'moon' was not in the training data"),
        ({**tokens, "tags": ["Q-who", "O"]}, "no tag of a known scheme"),
        ({**tokens, "tags": "B-who"}, "holds no list"),
        ({"text": "Zoë", "tags": [{"start": 0, "end": 9, "label": "who"}]}, "does not lie in its text"),
        ({"text": "Zoë", "tags": [{"start": 0}]}, "lacks its"),
        ({"text": "Zoë", "tags": [{"start": a, "end": 3, "label": "who"} for a in (0, 1)]}, "overlap"),
    ]:
        with pytest.raises(UserError, match=message):
            task.encode([record], tokenizer(), labelled=True)
    with pytest.raises(UserError, match="names no entity"):
        task_of([{"text": ["a"], "tags": ["O"]}])
    with pytest.raises(UserError, match="no column holds the tags"):
        Tag.from_records([], {"text": "text"}, TagOptions())
    assert Tag.from_state(json.loads(json.dumps(task.state()))).state() == task.state()


def test_given_tokens_are_units_but_not_where_they_are_characters() -> None:
    rows = [
        {"text": ["@zoë's", " in", "the", "U.S."], "tags": ["B-who", "O", "O", "B-where"]},
        {"text": ["她", "说", "C", "P", "I"], "tags": ["B-who", "O", "O", "O", "O"]},
    ]
    task = task_of(rows)
    (_, words), (text, characters) = (task._read(row) for row in rows)
    assert words.tolist() == [[0, 6], [8, 10], [11, 14], [15, 19]]
    assert characters.tolist() == units_of(text).tolist() == [[0, 1], [1, 2], [2, 5]]
    (example, _) = task.encode(rows, tokenizer(), labelled=True)
    assert int((example.token_labels["tags"] != IGNORE).sum()) == 4


def test_what_is_not_learnt_is_counted_with_its_place() -> None:
    rows = [
        {"text": ["她", "说", "C", "P", "I"], "tags": ["O", "O", "B-who", "I-who", "O"]},  # within the word CPI
        {"text": ["Zoë", "left"], "tags": ["B-who", "I-place"]},
        {"text": ["no", "tags"]},
    ]
    task = task_of([*rows, {"text": ["x"], "tags": ["B-place"]}])
    found = list(task.inspect((f"rows.jsonl:{i}", one) for i, one in enumerate(rows, 1)))
    assert [(one.code, one.count) for one in found] == [
        ("entities", 2),
        ("unreachable_entities", 1),
        ("ill_formed_tags", 1),
    ]
    assert "1 of 2 entities (50.00%)" in found[1].message
    assert found[1].examples == ("rows.jsonl:1: 'CP'",)
    assert found[2].examples == ("rows.jsonl:2: 'left' as place",)
    marks = [task.encode([one], tokenizer(), labelled=True)[0].token_labels.get("tags") for one in rows]
    who = task.tags.index("B-who")
    assert [None if one is None else one[one != IGNORE].tolist() for one in marks] == [[0, 0], [who], None]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"tokens": ["a", "b"], "tags": ["O"]}, "1 tags for 2 tokens"),
        ({"tokens": ["a"], "tags": ["?-x"]}, "no tag of a known scheme"),
        ({"tokens": [], "tags": []}, "holds no tokens"),
        ({"tokens": ["a"], "tags": ["B-moon"]}, "'moon' was not in the training data"),
    ],
)
def test_a_bad_test_row_is_named_before_training(
    bad: dict[str, Any], message: str, recipe: Recipe, tmp_path: Path
) -> None:
    good = {"tokens": ["Zoë", "left"], "tags": ["B-who", "O"]}
    train, test = write_rows(tmp_path / "train.jsonl", [good] * 4), write_rows(tmp_path / "test.jsonl", [good, bad])
    with pytest.raises(UserError, match=message) as caught:
        prepare(recipe(data_={"train": train, "test": test}, task="tag"))
    assert str(caught.value.where).endswith("test.jsonl:2")


# --- whole runs -----------------------------------------------------------------------------------------------------
def test_real_rows_are_fitted_answered_served_and_verified(
    recipe: Recipe, start: Start, shared_data: Path, tmp_path: Path
) -> None:
    data = [one.values for one in open_source(shared_data / "wnut17" / "dev.jsonl.xz").peek(48)]
    train = write_rows(tmp_path / "train.jsonl", data)
    made = fit(recipe(data_={"train": train, "test": train}, task="tag", options=OPTIONS), tmp_path / "out")
    artifact = made.artifact
    assert set(artifact.manifest.metrics["test"]) == {"precision", "recall", "f1", "token_accuracy"}
    assert made.training["entities"] == sum(tag[0] == "B" for one in data for tag in one["tags"])
    assert "per_class" in json.loads((artifact.path / "run" / "evaluation.json").read_text())["tables"]
    opened = load(artifact.path)
    text = "Zoë lives on Redondo  Beach Blvd."
    (found,) = opened.predict([text], raw=True)
    assert all(one["text"] == text[one["start"] : one["end"]] for one in found["entities"])
    assert len(found["logits"]) == len(units_of(text)) * len(artifact.manifest.task.state["types"] * 2 + ["O"])
    (given,) = opened.predict([["Redondo", "Beach"]])
    assert given["text"] == "Redondo Beach"
    reply = start({"tags": TorchEngine(artifact)}).post("/v1/tag", json={"texts": [text]}).json()
    assert reply["answers"][0]["entities"] == found["entities"]
    assert verify(artifact.path).ok


def test_verify_fails_where_labels_are_permuted(recipe: Recipe, tmp_path: Path) -> None:
    train = write_rows(tmp_path / "train.jsonl", DATA * 4)
    path = fit(recipe(data_={"train": train}, task="tag", options=OPTIONS), tmp_path / "out").artifact.path
    manifest = path / "manifest.json"
    record = json.loads(manifest.read_text("utf-8"))
    record["task"]["state"]["types"].reverse()
    manifest.write_text(json.dumps(record), "utf-8")
    found = verify(path)
    assert [check.name for check in found.checks if not check.ok] == ["trained = reloaded"]
