"""The report of a run as one HTML file: what was made, how good it is, what it confuses, how it was trained."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup

from lexmill.evaluate import page, plots
from lexmill.evaluate.page import PERCENT, Plot, number, percent

if TYPE_CHECKING:
    from lexmill.tasks.base import Metrics

MAX_BARS = 12
MAX_CLASSES = 30
MAX_ROWS = 50

_HEADLINE = ("accuracy", "macro_f1", "ece", "f1", "perplexity", "loss")
_VALIDATION = ("accuracy", "f1", "perplexity", "loss")
_SHARES = {
    "accuracy": ("Accuracy", "the share of examples whose answer is right"),
    "macro_f1": ("Macro-F1", "the mean of the F1 of all classes, a rare class counting as much as a frequent one"),
    "f1": ("F1", "precision and recall in one number, frequent classes counting more"),
    "precision": ("Precision", "of what it claimed, the share that is right"),
    "recall": ("Recall", "of what there was to find, the share that it found"),
    "exact_match": ("Exact match", "the share of examples whose answer is right in every part"),
    "ece": ("Calibration error", "how far its confidence lies from the share that is right, on average (0 is best)"),
}
_NUMBERS = {
    "loss": ("Loss", "the mean negative log-likelihood (lower is better)"),
    "brier": ("Brier score", "the squared error of its probabilities (0 is best)"),
    "perplexity": ("Perplexity", "among how many equally likely tokens it chose, so to speak (lower is better)"),
    "tokens": ("Tokens", "how many tokens were scored"),
}
_TABLES = ("per_class", "confused", "calibration")


@dataclass(frozen=True)
class Report:
    """What a report shows. What is missing is said to be missing.

    Args:
        summary: facts, in the order in which they are shown.
        events: of the run: `phase` is `train` or `validate`; others are ignored. Where a resumed run repeats a step,
            the last event counts.
        metrics: what the evaluation found; with several heads, names carry the prefix `head/`.
        data: the data check as JSON: `findings`, and `train` and `test` or `rows` and `label_counts`.
    """

    title: str
    summary: Mapping[str, str]
    events: Sequence[Mapping[str, Any]]
    metrics: Metrics | None
    data: Mapping[str, Any] | None


@dataclass(frozen=True)
class Measure:
    """One metric in words and numbers."""

    title: str
    value: str
    interval: str | None
    meaning: str


@dataclass
class HeadView:
    """The quality of one head: what there is of it."""

    name: str
    measures: list[Measure]
    sentences: list[str] = field(default_factory=list[str])
    classes: list[Mapping[str, Any]] = field(default_factory=list[Mapping[str, Any]])
    confused: list[Mapping[str, Any]] = field(default_factory=list[Mapping[str, Any]])
    confused_plot: Plot | None = None
    calibration: list[Mapping[str, Any]] = field(default_factory=list[Mapping[str, Any]])
    calibration_plot: Plot | None = None
    others: dict[str, list[Mapping[str, Any]]] = field(default_factory=dict[str, list[Mapping[str, Any]]])


def write_report(path: Path, content: Report) -> None:
    """Write the report to `path`: one file that needs no network and runs no script.

    Raises:
        MissingExtra: there is something to plot and matplotlib is not installed.
    """
    path.write_text(render(content), encoding="utf-8", errors="replace")


def render(content: Report) -> str:
    """The page as text. See `write_report`."""
    return page.render(
        files("lexmill.evaluate").joinpath("report.html.j2").read_text("utf-8"),
        title=content.title,
        summary=content.summary,
        heads=[] if content.metrics is None else head_views(content.metrics),
        learning=_learning(content.events),
        speed=_speed(content.events),
        data=None if content.data is None else _data(content.data),
        max_classes=MAX_CLASSES,
        max_rows=MAX_ROWS,
    )


# --- numbers for people -----------------------------------------------------------------------------------------
def _bytes(value: float) -> str:
    return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


# --- quality ----------------------------------------------------------------------------------------------------
def head_views(metrics: Metrics) -> list[HeadView]:
    """The metrics, one view a head; what belongs to no head comes first under an empty name."""
    names = [*metrics.values, *metrics.tables]
    prefixes = dict.fromkeys(["", *(name.rpartition("/")[0] for name in names)])
    views: list[HeadView] = []
    for prefix in prefixes:
        own = f"{prefix}/" if prefix else ""
        values = {n.removeprefix(own): v for n, v in metrics.values.items() if n.rpartition("/")[0] == prefix}
        spans = {n.removeprefix(own): v for n, v in metrics.intervals.items() if n.rpartition("/")[0] == prefix}
        tables = {n.removeprefix(own): v for n, v in metrics.tables.items() if n.rpartition("/")[0] == prefix}
        if values or tables:
            views.append(_head(prefix, values, spans, tables, f"head{len(views)}"))
    return views


def _head(
    name: str,
    values: Mapping[str, float],
    spans: Mapping[str, tuple[float, float]],
    tables: Mapping[str, list[dict[str, Any]]],
    key: str,
) -> HeadView:
    order = sorted(values, key=lambda n: _HEADLINE.index(n) if n in _HEADLINE else len(_HEADLINE))
    view = HeadView(name, [_measure(n, values[n], spans.get(n)) for n in order])
    view.classes = sorted(tables.get("per_class", []), key=lambda row: (row["f1"], str(row["label"])))
    view.confused = sorted(tables.get("confused", []), key=lambda row: -row["count"])
    view.calibration = list(tables.get("calibration", []))
    view.others = {n: list(rows) for n, rows in tables.items() if n not in _TABLES and rows}
    if view.confused:
        shown = view.confused[:MAX_BARS]
        alt = "Most frequent mistakes: " + "; ".join(
            f"{r['truth']} taken for {r['predicted']}, {r['count']}" for r in shown[:3]
        )
        caption = "True class → what the model said instead. The bar is the number of such mistakes" + (
            ", beside it their share of all examples of the true class." if "share" in shown[0] else "."
        )
        view.confused_plot = Plot(Markup(plots.confusion_bars(shown, name=f"{key}-confused", alt=alt)), caption)
    if any(row["count"] for row in view.calibration):
        alt = "Share of right answers and number of answers at each level of confidence; the numbers are in the table."
        caption = (
            "Above: of the answers given with this confidence, the share that is right, with its 95 % interval. On the"
            " dashed line confidence is exact; points below it mean that the model is too sure. Below: how many answers"
            " were given with this confidence."
        )
        view.calibration_plot = Plot(
            Markup(plots.reliability(view.calibration, name=f"{key}-calibration", alt=alt)), caption
        )
    view.sentences = _findings(view, values, spans)
    return view


def _measure(name: str, value: float, span: tuple[float, float] | None) -> Measure:
    title, meaning = _SHARES.get(name) or _NUMBERS.get(name) or (name, "")
    show: Callable[[float], str] = percent if name in _SHARES else number
    interval = None if span is None else f"{show(span[0]).removesuffix(PERCENT)} to {show(span[1])}"
    return Measure(title, show(value), interval, meaning)


def _findings(view: HeadView, values: Mapping[str, float], spans: Mapping[str, tuple[float, float]]) -> list[str]:
    said: list[str] = []
    total = sum(row["support"] for row in view.classes)
    scored = sum(row["count"] for row in view.calibration)
    accuracy = values.get("accuracy")
    if accuracy is not None:
        # With several labels an example the supports add up to more than the examples, and the count would be wrong.
        of = (
            f"{round(accuracy * total):,} of {total:,} test examples"
            if total and total == scored
            else percent(accuracy)
        )
        tail = ""
        if "accuracy" in spans:
            low, high = spans["accuracy"]
            tail = (
                f" With other test examples of the same kind, expect between {percent(low)} and {percent(high)}"
                " (95 % interval)."
            )
        said.append(f"It answers {of} right{'' if of == percent(accuracy) else f': {percent(accuracy)}'}.{tail}")
    if view.classes:
        good = sum(row["f1"] >= 0.9 for row in view.classes)
        worst = view.classes[0]
        said.append(
            f"{good} of {len(view.classes)} classes reach an F1 of 90 %. The weakest is “{worst['label']}” with"
            f" {percent(worst['f1'])} on {worst['support']:,} examples."
        )
    if view.confused:
        row = view.confused[0]
        share = f", {percent(row['share'])} of that class" if "share" in row else ""
        said.append(
            f"Its most frequent mistake is to take “{row['truth']}” for “{row['predicted']}”:"
            f" {row['count']:,} times{share}."
        )
    said += _calibration_sentence(view.calibration)
    return said


def _calibration_sentence(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    filled = [row for row in rows if row["count"]]
    if not filled:
        return []
    count = np.array([row["count"] for row in filled], np.float64)
    right, sure = (
        float(np.dot(count, [row[key] for row in filled]) / count.sum()) for key in ("accuracy", "confidence")
    )
    gap = 100 * (sure - right)
    verdict = "about right" if abs(gap) < 1 else f"{abs(gap):.1f} points too {'high' if gap > 0 else 'low'}"
    return [f"Its confidence is {percent(sure)} on average while {percent(right)} of its answers are right: {verdict}."]


# --- the run ----------------------------------------------------------------------------------------------------
def _series(events: Sequence[Mapping[str, Any]], phase: str, key: str) -> plots.Series:
    found: dict[int, float] = {}
    for event in events:
        value = event.get(key)
        if event.get("phase") == phase and isinstance(value, (int, float)) and math.isfinite(value):
            found[int(event["step"])] = float(value)
    steps = sorted(found)
    return np.array(steps, np.int64), np.array([found[step] for step in steps], np.float64)


def _learning(events: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    loss, rate = _series(events, "train", "loss"), _series(events, "train", "learning_rate")
    if len(loss[0]) < 2:
        return None
    metric = _validation_metric(events)
    validation = _series(events, "validate", metric) if metric else (loss[0][:0], loss[1][:0])
    title, _ = _SHARES.get(metric) or _NUMBERS.get(metric) or (metric, "")
    show: Callable[[float], str] = percent if metric in _SHARES else number
    _, course = plots.smoothed(loss)
    sentences = [
        f"Over {int(loss[0][-1] - loss[0][0]) + 1:,} steps the loss went from {number(float(course[0]))}"
        f" to {number(float(course[-1]))}."
    ]
    if len(validation[0]):
        best = int(np.argmin(validation[1]) if metric in _NUMBERS else np.argmax(validation[1]))
        sentences.append(
            f"{title} on the validation data was {show(float(validation[1][best]))} at its best, after step"
            f" {validation[0][best]:,} ({len(validation[0])} validation{'s' if len(validation[0]) > 1 else ''})."
        )
    else:
        sentences.append("There was no validation data, so nothing shows when the model was at its best.")
    epochs = _epoch_ends(events)
    caption = (
        "The faint line is the loss of each step, the strong one its running mean; the horizontal axis counts steps"
        f" and upright lines mark the ends of epochs{'' if epochs else ', where they are few enough'}."
    )
    drawings = [Plot(Markup(plots.loss_curve(loss, epochs=epochs, alt=sentences[0])), caption)]
    if len(validation[0]) or len(rate[0]):
        name = f"{title} on validation data"
        alt = " ".join([*sentences[1:], "The learning rate is drawn over the same steps."][: 2 if len(rate[0]) else 1])
        svg = plots.course_curves(validation, rate, metric=name, percent=metric in _SHARES, epochs=epochs, alt=alt)
        shown = [what for what, series in ((name, validation), ("the learning rate", rate)) if len(series[0])]
        caption = " and ".join(shown) + ", over the same steps."
        drawings.append(Plot(Markup(svg), caption[0].upper() + caption[1:]))
    return {"sentences": sentences, "plots": drawings}


def _validation_metric(events: Sequence[Mapping[str, Any]]) -> str:
    """What the validation events measure: the best known of their metrics, else their first; empty without any."""
    names = [
        key
        for event in events
        if event.get("phase") == "validate"
        for key, value in event.items()
        if key not in ("step", "epoch", "seconds", "total_steps") and isinstance(value, (int, float))
    ]
    return next((name for name in _VALIDATION if name in names), names[0] if names else "")


def _epoch_ends(events: Sequence[Mapping[str, Any]]) -> list[float]:
    """The steps at which an epoch ended, unless they are too many to be told apart."""
    steps, epochs = _series(events, "train", "epoch")
    ends = steps[1:][np.diff(np.floor(epochs)) > 0]
    return ends.tolist() if len(ends) <= 20 else []


_CEILING = "of the rate at which this machine multiplies matrices of the model's shapes; median of the steps"
_POSITIONS = "1.000 means that no pad token was computed; mean of the steps"
_RATES: tuple[tuple[str, str, Callable[[np.ndarray], Any], Callable[[float], str], str], ...] = (
    ("examples_per_second", "Examples a second", np.median, lambda rate: f"{rate:,.1f}", "median of the steps"),
    ("ceiling_share", "Share of the ceiling", np.median, percent, _CEILING),
    ("positions_per_token", "Positions per real token", np.mean, lambda share: f"{share:.3f}", _POSITIONS),
    ("peak_memory", "Peak memory", np.max, _bytes, "the highest over the run"),
)


def _speed(events: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    tokens, seconds = _series(events, "train", "tokens_per_second"), _series(events, "train", "seconds")
    facts: dict[str, tuple[str, str]] = {}
    if len(tokens[1]):
        low, middle, high = np.quantile(tokens[1], [0.1, 0.5, 0.9])
        facts["Tokens a second"] = (
            number(round(middle)),
            f"median; 80 % of the steps ran at {low:,.0f} to {high:,.0f}",
        )
    for key, title, of_run, show, meaning in _RATES:
        _, values = _series(events, "train", key)
        if len(values):
            facts[title] = (show(float(of_run(values))), meaning)
    if len(seconds[1]):
        facts["Time in training steps"] = (
            _duration(float(seconds[1].sum())),
            f"{len(seconds[1]):,} steps, validation not counted",
        )
    if not facts:
        return None
    plot = None
    if len(tokens[1]) > 1:
        alt = f"Speed over the run: {facts['Tokens a second'][0]} tokens a second in the median."
        caption = "Real tokens a second of each step (faint) and their running mean, over steps."
        plot = Plot(Markup(plots.speed_curve(tokens, alt=alt)), caption)
    return {"facts": facts, "plot": plot}


# --- the data ---------------------------------------------------------------------------------------------------
def _data(data: Mapping[str, Any]) -> dict[str, Any]:
    facts: dict[str, str] = {}
    parts = {"Training data": "train", "Validation data": "validation", "Test data": "test"}
    for role, part in ((role, data.get(name)) for role, name in parts.items()):
        if part is not None:
            facts[role] = f"{part['rows']:,} rows" + (f", {part['skipped']:,} skipped" if part.get("skipped") else "")
            for column, counts in part["labels"].items():
                facts[f"{role}, labels in “{column}”"] = _label_counts(counts)
    rows = data.get("rows")
    if rows is not None:
        given = rows.items() if isinstance(rows, Mapping) else [("", rows)]
        facts |= {f"Rows {name}".strip(): number(count) for name, count in given}
    if data.get("label_counts"):
        facts["Labels"] = _label_counts(data["label_counts"])
    return {"facts": facts, "findings": data.get("findings", [])}


def _label_counts(counts: Mapping[str, int]) -> str:
    if not counts:
        return "none"
    least, most = (pick(counts, key=lambda label: counts[label]) for pick in (min, max))
    return (
        f"{len(counts):,} labels; the most frequent is “{most}” ({counts[most]:,}),"
        f" the rarest “{least}” ({counts[least]:,})"
    )
