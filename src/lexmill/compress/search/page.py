"""A search as a page: what was chosen, what it was chosen from, and what every layer matters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from markupsafe import Markup

from lexmill.evaluate import page, plots


def write_page(path: Path, record: Mapping[str, Any], title: str) -> None:
    """Write the page of a search to `path`, one file that needs no network and runs no script.

    Args:
        record: what `telling.tell` gave, and the `proof`.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    template = files("lexmill.compress.search").joinpath("page.html.j2").read_text("utf-8")
    path.write_text(render(template, record, title), "utf-8")


def render(template: str, record: Mapping[str, Any], title: str) -> str:
    tried = [one for one in record["trials"] if one["cost"] is not None and one["proof"] is not None]
    best = {name: number for number, name in enumerate(record["front"], start=1)}
    chosen, shown = record["chosen"]["name"], [_row(one, best, record["chosen"]["name"]) for one in tried]
    alt = f"{len(shown)} candidates by the points they lose and the texts they answer in a second; the table has all."
    drawing = plots.trade_off(shown, allowed=record["asked"]["max_drop"], name="trade-off", alt=alt)
    caption = (
        "One point a candidate, upright lines the paired 95 % intervals. Those with a number, theirs in the table, are"
        " beaten by none in loss, size, latency and throughput at once. The dashed line is what may be lost."
    )
    ordered = sorted(shown, key=lambda one: (one["number"] is None, one["number"] or 0, -one["speed"]))
    return page.render(
        template,
        title=title,
        record=record,
        proof=record["proof"],
        chosen=chosen,
        rows=ordered,
        refused=[one for one in record["trials"] if one["refused"] is not None],
        plot=page.Plot(Markup(drawing), caption),
        layers=_layers(record["sensitivity"]),
    )


def _row(trial: Mapping[str, Any], best: Mapping[str, int], chosen: str) -> dict[str, Any]:
    low, high = trial["proof"]["interval"]
    return {
        "name": trial["name"],
        "number": None if trial["refused"] is not None else best.get(trial["name"]),
        "chosen": trial["name"] == chosen,
        "drop": trial["proof"]["drop"],
        "low": low,
        "high": high,
        "speed": trial["cost"]["texts_per_second"],
        "gain": trial["cost"]["texts_per_second"] / trial["reference"]["texts_per_second"],
        **{name: trial["cost"][name] for name in ("bytes", "p50_ms", "p99_ms")},
    }


def _layers(sensitivity: Mapping[str, Any]) -> list[dict[str, Any]]:
    """By layer how much answers change without it, and where the parts of it are int8."""
    parts: Mapping[str, float] = sensitivity["int8"]
    without: Sequence[float] = sensitivity["without"]
    found = [{"name": f"layer {index} taken out", "change": change} for index, change in enumerate(without)]
    return [
        *found,
        *({"name": f"{place} and those beside it in int8", "change": change} for place, change in parts.items()),
    ]
