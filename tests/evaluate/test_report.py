from __future__ import annotations

import html
import json
import lzma
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lexmill.data.bundled import banking77
from lexmill.errors import MissingExtra
from lexmill.evaluate import plots
from lexmill.evaluate.report import Report, render, write_report
from lexmill.tasks.base import Metrics
from lexmill.tasks.scoring import single_label

CHROMIUM = Path("/usr/bin/chromium")
HOSTILE = (
    "<script>window.hit = 1</script>",
    '"><img src=x onerror="window.hit = 1">',
    "</title></style></svg><script>window.hit = 1</script>",
    "javascript:window.hit=1//{{ 7 * 7 }}$\\frac{a}{",
    "退款没有到账怎么办" * 4,
)


def rows(path: Path) -> list[dict[str, str]]:
    with lzma.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def train(epochs: int, size: int = 1 << 11, batch: int = 64) -> tuple[list[dict[str, Any]], Metrics]:
    """A linear classifier on hashed words of banking77: quick, with real losses, mistakes and confidences."""
    learn, test = map(rows, banking77())
    labels = sorted({row["label"] for row in learn})

    def features(data: list[dict[str, str]]) -> np.ndarray:
        found = np.zeros((len(data), size), np.float32)
        for row, record in zip(found, data, strict=True):
            words = re.findall(r"\w+", record["text"].lower())
            for word in [*words, *map(" ".join, pairwise(words))]:
                row[hash_of(word) % size] = 1
        return found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-6)

    x, x_test = features(learn), features(test)
    y, y_test = (np.array([labels.index(row["label"]) for row in data]) for data in (learn, test))
    weight = np.zeros((size, len(labels)), np.float32)
    rng = np.random.default_rng(0)
    events: list[dict[str, Any]] = []
    per_epoch = -(-len(x) // batch)
    total = epochs * per_epoch
    for step in range(total):
        if step % per_epoch == 0:
            order = rng.permutation(len(x))
        start = time.perf_counter()
        pick = order[step % per_epoch * batch :][:batch]
        p = softmax(x[pick] @ weight)
        loss = float(-np.log(p[np.arange(len(pick)), y[pick]]).mean())
        p[np.arange(len(pick)), y[pick]] -= 1
        rate = 40 * (1 - step / total)
        weight -= rate / len(pick) * (x[pick].T @ p)
        seconds = time.perf_counter() - start
        events.append({
            "phase": "train", "step": step, "total_steps": total, "epoch": step / per_epoch, "loss": loss,
            "grad_norm": float(np.linalg.norm(p)), "learning_rate": rate, "seconds": seconds,
            "examples_per_second": batch / seconds, "tokens_per_second": 16.2 * batch / seconds, "ceiling_share": 0.61,
            "positions_per_token": 1.0, "peak_memory": 812 * 2**20,
        })  # fmt: skip
        if (step + 1) % per_epoch == 0:
            accuracy = float((softmax(x_test @ weight).argmax(-1) == y_test).mean())
            epoch = (step + 1) // per_epoch
            events.append({"phase": "validate", "step": step + 1, "epoch": epoch, "accuracy": accuracy})
    return events, single_label(softmax(x_test @ weight), y_test, labels)


def hash_of(word: str) -> int:
    return int.from_bytes(word.encode(), "little") % 1_000_003


def softmax(logits: np.ndarray) -> np.ndarray:
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)


@pytest.fixture(scope="module")
def trained() -> tuple[list[dict[str, Any]], Metrics]:
    return train(epochs=2)


@pytest.fixture(scope="module")
def report(trained: tuple[list[dict[str, Any]], Metrics]) -> Report:
    events, metrics = trained
    learn, test = banking77()
    counts: dict[str, int] = {}
    for row in rows(learn):
        counts[row["label"]] = counts.get(row["label"], 0) + 1
    part = {"path": str(learn), "rows": 10003, "skipped": 0, "labels": {"label": counts}}
    finding = {
        "severity": "warning", "code": "overlap", "count": 7,
        "message": f"7 texts of {test.name} stand in {learn.name} too",
        "examples": ("test.jsonl.xz:12 repeats train.jsonl.xz:4411",),
    }  # fmt: skip
    facts = {
        "Model": "MiniLM-L6, 22.7 M parameters",
        "Task": "classify",
        "Accuracy": f"{metrics.values['accuracy']:.1%}",
    }
    return Report(
        "Questions to a bank",
        facts,
        events,
        metrics,
        {"train": part, "test": {**part, "rows": 3080}, "columns": {}, "findings": [finding]},
    )


@pytest.fixture(scope="module")
def hostile(report: Report) -> Report:
    """The report with every text that comes from data turned against the page."""
    assert report.metrics is not None
    tables = {name: [dict(row) for row in table] for name, table in report.metrics.tables.items()}
    for i, row in enumerate(tables["per_class"]):
        row["label"] = HOSTILE[i % len(HOSTILE)]
    for i, row in enumerate(tables["confused"]):
        row["truth"], row["predicted"] = HOSTILE[i % len(HOSTILE)], HOSTILE[(i + 1) % len(HOSTILE)]
    tables[HOSTILE[0].replace("/", "|")] = [{HOSTILE[1]: HOSTILE[2]}]
    finding = {"severity": HOSTILE[1], "code": "x", "message": HOSTILE[0], "count": 1, "examples": list(HOSTILE)}
    validation = {"phase": "validate", "step": 9, "epoch": 1, HOSTILE[0]: 0.5}
    return Report(
        HOSTILE[2],
        {text: text for text in HOSTILE},
        [*(e for e in report.events if e["phase"] == "train"), validation],
        Metrics({**report.metrics.values, HOSTILE[1]: 0.5}, report.metrics.intervals, tables),
        {"rows": 7, "label_counts": {HOSTILE[0]: 3, HOSTILE[1]: 4}, "findings": [finding]},
    )


def text_of(page: str) -> str:
    """What a reader sees of a page, without its style sheet."""
    body = re.sub(r"<[^>]*>", "", re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL))
    return re.sub(r"\s+", " ", html.unescape(body))


def test_report_says_how_good_the_model_is(report: Report, tmp_path: Path) -> None:
    write_report(tmp_path / "report.html", report)
    text = text_of((tmp_path / "report.html").read_text("utf-8"))
    assert report.metrics is not None
    accuracy, (low, high) = report.metrics.values["accuracy"], report.metrics.intervals["accuracy"]
    assert accuracy > 0.75
    assert f"{round(accuracy * 3080):,} of 3,080 test examples right: {100 * accuracy:.1f} %" in text
    assert f"95 % interval {100 * low:.1f} to {100 * high:.1f}" in text
    assert "10,003 rows" in text
    assert "7 texts of test.jsonl.xz stand in train.jsonl.xz too" in text
    assert "test.jsonl.xz:12 repeats train.jsonl.xz:4411" in text
    assert "812 MiB" in text
    assert "61.0 %" in text


def test_classes_stand_weakest_first_and_all_of_them(report: Report) -> None:
    assert report.metrics is not None
    page = render(report)
    classes = page[page.index('id="classes"') : page.index('id="speed"')]
    shown = re.findall(r'<th scope="row"><bdi>(.*?)</bdi>', classes)
    worst = sorted(report.metrics.tables["per_class"], key=lambda row: (row["f1"], row["label"]))
    assert [html.unescape(name).replace("<wbr>", "") for name in shown] == [row["label"] for row in worst]
    assert "The other 47 classes" in classes


def test_plots_name_the_mistakes_and_carry_a_description(report: Report) -> None:
    assert report.metrics is not None
    page = render(report)
    drawings = re.findall(r'<svg [^>]*role="img"[^>]*aria-label="([^"]+)"', page)
    assert len(drawings) == 5
    first = report.metrics.tables["confused"][0]
    assert " → ".join(plots.shortened(first[side], plots.LABEL_COLUMNS) for side in ("truth", "predicted")) in page
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="|url\()#([^")]+)', page)) <= set(ids)
    assert "#00000" not in page


def test_page_loads_nothing_and_is_the_same_twice(report: Report) -> None:
    page = render(report)
    assert not re.search(r'(?:src|href)="(?!#|data:,)|https?:|@import|<script|\son\w+=', page)
    assert page == render(report)


def test_missing_parts_are_said_to_be_missing() -> None:
    text = text_of(render(Report("Nothing", {}, [], None, None)))
    for reason in (
        "No summary was given", "No test data was evaluated", "fewer than two training steps",
        "No pairs of confused classes", "No confidences", "No classes", "neither speed nor memory", "No data check",
    ):  # fmt: skip
        assert reason in text


def test_generation_shows_loss_and_perplexity() -> None:
    metrics = Metrics({"loss": 3.2, "perplexity": 24.53, "tokens": 81234.0}, {"perplexity": (23.1, 26.0)}, {})
    text = text_of(render(Report("Novels", {}, [], metrics, {"rows": {"train": 1200}, "findings": []})))
    assert "24.53" in text
    assert "23.1 to 26" in text
    assert "81,234" in text
    assert "Rows train1,200" in text
    assert "The check found nothing to report." in text
    assert "No classes are in the metrics" in text


def test_heads_are_told_apart(report: Report) -> None:
    assert report.metrics is not None
    values, tables = report.metrics.values, report.metrics.tables
    both = Metrics(
        {"accuracy": 0.5} | {f"{head}/{name}": value for head in ("intent", "mood") for name, value in values.items()},
        {},
        {f"{head}/{name}": table for head in ("intent", "mood") for name, table in tables.items()},
    )
    page = render(replace(report, metrics=both))
    assert page.count("Head “<bdi>intent</bdi>”") == page.count("Head “<bdi>mood</bdi>”") == 4
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_a_resumed_step_counts_once() -> None:
    train = {"phase": "train", "learning_rate": 1e-3, "seconds": 1.0, "tokens_per_second": 100.0}
    events = [{**train, "step": step, "loss": loss} for step, loss in ((0, 4.0), (1, 9.0), (1, 3.0), (2, 2.0))]
    text = text_of(render(Report("Resumed", {}, events, None, None)))
    assert "Over 3 steps the loss went from 4 to 2.5." in text
    assert "3.0 s3 steps" in text


def test_thinning_and_smoothing_keep_the_mean() -> None:
    steps, values = np.arange(5000), np.random.default_rng(1).normal(2, 1, 5000)
    at, thin = plots.thinned((steps, values))
    assert len(at) <= plots.MAX_POINTS
    assert np.isclose(np.average(thin, weights=np.diff([*at, 5000])), values.mean())
    flat = plots.smoothed((steps, np.full(5000, 3.0)))[1]
    assert np.allclose(flat, 3)


def test_shortened_labels_keep_both_ends_and_fit() -> None:
    assert plots.shortened("short", 34) == "short"
    cut = plots.shortened("balance_not_updated_after_cheque_or_cash_deposit", 34)
    assert len(cut) == 34
    assert cut.startswith("balance_not_")
    assert cut.endswith("cash_deposit")
    chinese = plots.shortened("我" * 40, 34)
    assert 2 * (len(chinese) - 1) + 1 <= 34


def test_without_matplotlib_the_error_names_the_extra(report: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtra, match="report"):
        render(report)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if not CHROMIUM.exists():
        pytest.skip(f"needs a browser: {CHROMIUM} (apt-get install chromium)")
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.mark.parametrize("width", [390, 1100])
def test_page_shows_in_a_browser_without_errors_or_overflow(
    browser: Any, report: Report, tmp_path: Path, width: int
) -> None:
    page, faults = opened(browser, render(report), tmp_path, width)
    assert page.locator("h1").inner_text() == report.title
    assert page.locator("figure svg").count() == 5
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    boxes = [page.locator("figure svg").nth(i).bounding_box() for i in range(5)]
    assert all(box["width"] > 200 and box["height"] > 80 for box in boxes)
    assert faults == []
    page.close()


def test_hostile_text_is_inert_in_a_browser(browser: Any, hostile: Report, tmp_path: Path) -> None:
    guarded = render(hostile)
    unguarded = re.sub(r"<meta http-equiv=[^>]*>", "", guarded)
    assert unguarded != guarded
    for source in (guarded, unguarded):
        page, faults = opened(browser, source, tmp_path, 390)
        assert page.evaluate("window.hit") is None
        assert (
            page.evaluate("document.querySelectorAll('script, img, iframe, object, a:not([href^=\"#\"])').length") == 0
        )
        assert page.evaluate(
            "[...document.querySelectorAll('*')].every(e => [...e.attributes].every(a => !a.name.startsWith('on')))"
        )
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        assert page.locator("h1").inner_text() == hostile.title
        assert page.locator("figure svg text", has_text="<script>window").count() > 0
        assert faults == []
        page.close()


def opened(browser: Any, source: str, folder: Path, width: int) -> tuple[Any, list[str]]:
    """The page, and what it complained of or asked the network for."""
    path = folder / "page.html"
    path.write_text(source, encoding="utf-8")
    page = browser.new_page(viewport={"width": width, "height": 900})
    faults: list[str] = []
    page.on("console", lambda message: faults.append(message.text))
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("dialog", lambda dialog: (faults.append("dialog"), dialog.dismiss()))
    page.on("request", lambda request: faults.append(request.url) if request.url.startswith("http") else None)
    page.goto(path.as_uri())
    return page, faults
