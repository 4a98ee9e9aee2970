"""The plots of the report, as SVG to be put inline into a page.

Drawn 400 units wide, so that their text stays readable on a phone. Colours are variables of the page (`--ink`,
`--main`, …), so that one drawing serves light, dark and print. Text stays text: the page's fonts draw it, and text from
data never passes through matplotlib, which would look for its glyphs and read `$` as mathematics.
"""

from __future__ import annotations

import io
import re
import unicodedata
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import numpy as np
from jaxtyping import Float, Int

from lexmill.errors import MissingExtra

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Series = tuple[Int[np.ndarray, "point"], Float[np.ndarray, "point"]]
"""Steps, ascending, and the value at each."""

WIDTH = 400
FONT = 10.5
LABEL_COLUMNS = 30
MAX_POINTS = 600

# Colours that matplotlib carries through unchanged and that stand for a variable of the page.
INK, MUTED, GRID, MAIN, SOFT, SECOND = (f"#0000{i:02x}" for i in range(1, 7))
_VARIABLES = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    GRID: "var(--line)",
    MAIN: "var(--main)",
    SOFT: "var(--soft)",
    SECOND: "var(--second)",
}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",
    "font.size": FONT,
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.labelsize": FONT,
    "axes.titlesize": FONT,
    "axes.titlelocation": "left",
    "axes.titlepad": 5,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.unicode_minus": False,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": GRID,
    "xtick.labelcolor": MUTED,
    "xtick.labelsize": FONT - 1.2,
    "ytick.labelcolor": MUTED,
    "ytick.labelsize": FONT - 1.2,
    "ytick.major.size": 0,
    "figure.facecolor": "none",
    "lines.solid_capstyle": "round",
}


def loss_curve(loss: Series, *, epochs: Sequence[float], alt: str) -> str:
    """Loss of each step and its smoothed course, over steps.

    Args:
        epochs: the steps at which an epoch ended, drawn as faint upright lines.
    """
    with _canvas(_height(169)) as figure:
        (panel,) = _stack(figure, [169])
        raw = thinned(loss)
        panel.plot(*raw, color=SOFT, linewidth=0.9)
        panel.plot(*smoothed(raw), color=MAIN, linewidth=1.8)
        panel.set_title("Loss")
        panel.locator_params(axis="y", nbins=5)
        panel.set_ylim(bottom=0 if raw[1].min() >= 0 else None)
        _mark(panel, epochs)
        return _svg(figure, "loss", alt, {})


def course_curves(
    validation: Series, rate: Series, *, metric: str, percent: bool, epochs: Sequence[float], alt: str
) -> str:
    """The validation metric and the learning rate over steps, each where there is one.

    Args:
        metric: the title of the validation panel.
        percent: whether `validation` is a share of 1.
        epochs: as in `loss_curve`.
    """
    heights = [80 if series is validation else 55 for series in (validation, rate) if len(series[0])]
    with _canvas(_height(*heights)) as figure:
        panels = _stack(figure, heights)
        if len(validation[0]):
            panels[0].plot(*validation, color=SECOND, linewidth=1.6, marker="o", markersize=4, clip_on=False)
            panels[0].set_title("@metric")
            panels[0].margins(y=0.2)
            if percent:
                panels[0].yaxis.set_major_formatter(lambda value, _: f"{100 * value:.4g} %")
        if len(rate[0]):
            panels[-1].plot(*thinned(rate), color=MUTED, linewidth=1.4)
            panels[-1].set_title("Learning rate")
            panels[-1].set_ylim(bottom=0)
            panels[-1].yaxis.set_major_formatter(lambda value, _: f"{value:.2g}")
        for panel in panels:
            panel.locator_params(axis="y", nbins=3)
            _mark(panel, epochs)
        return _svg(figure, "course", alt, {"@metric": metric})


def speed_curve(tokens_per_s: Series, *, alt: str) -> str:
    """Real tokens a second, of each step and smoothed."""
    with _canvas(_height(110)) as figure:
        (panel,) = _stack(figure, [110])
        series = thinned(tokens_per_s)
        panel.plot(*series, color=SOFT, linewidth=0.9)
        panel.plot(*smoothed(series), color=MAIN, linewidth=1.8)
        panel.set_ylim(0, float(np.quantile(series[1], 0.99)) * 1.15)
        panel.yaxis.set_major_formatter(lambda value, _: f"{value / 1000:g} k" if value >= 1000 else f"{value:g}")
        panel.locator_params(axis="y", nbins=4)
        panel.set_title("Tokens a second")
        return _svg(figure, "speed", alt, {})


def confusion_bars(rows: Sequence[Mapping[str, Any]], *, name: str, alt: str) -> str:
    """One bar a pair of classes, its length the number of mistakes.

    Args:
        rows: `truth`, `predicted`, `count`, and `share` of the true class (0 to 1).
        name: distinguishes this plot from others on the page.
    """
    most = max(row["count"] for row in rows)
    texts: dict[str, str] = {}
    with _canvas(31 * len(rows) + 4) as figure:
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        axes.set_xlim(0, WIDTH)
        axes.set_ylim(len(rows), 0)
        for i, row in enumerate(rows):
            length = 270 * row["count"] / most
            axes.barh(i + 0.72, length, height=0.34, color=MAIN, align="center")
            axes.text(0, i + 0.43, f"@pair{i}", color=INK, fontsize=FONT, va="baseline")
            axes.text(length + 6, i + 0.74, f"@count{i}", color=MUTED, fontsize=FONT - 0.5, va="center_baseline")
            texts[f"@pair{i}"] = (
                f"{shortened(row['truth'], LABEL_COLUMNS)} → {shortened(row['predicted'], LABEL_COLUMNS)}"
            )
            share = f" ({100 * row['share']:.1f} % of class)" if "share" in row else ""
            texts[f"@count{i}"] = f"{row['count']:,}{share}"
        return _svg(figure, name, alt, texts)


def reliability(rows: Sequence[Mapping[str, Any]], *, name: str, alt: str) -> str:
    """Accuracy at each level of confidence against the diagonal of perfect calibration, and its histogram.

    The thin upright lines are 95 % intervals (Wilson, 1927).

    Args:
        rows: bins of confidence: `low`, `high`, `count`, `accuracy`.
        name: distinguishes this plot from others on the page.
    """
    count = np.array([row["count"] for row in rows], np.float64)
    low, high = (np.array([row[side] for row in rows], np.float64) for side in ("low", "high"))
    accuracy = np.array([row["accuracy"] if row["count"] else np.nan for row in rows], np.float64)
    middle, width = (low + high) / 2, (high - low) * 0.86
    with _canvas(_height(150, 80)) as figure:
        top, bottom = _stack(figure, [150, 80])
        top.bar(middle, accuracy, width, color=SOFT)
        filled = count > 0
        below, above = wilson(accuracy[filled], count[filled])
        top.vlines(middle[filled], below, above, color=MAIN, linewidth=1.2, clip_on=False)
        top.plot(middle[filled], accuracy[filled], "o", color=MAIN, markersize=3.6, clip_on=False)
        top.plot([0, 1], [0, 1], color=SECOND, linewidth=1.2, linestyle=(0, (4, 3)))
        top.set_title("Share that is right")
        top.set_ylim(0, 1)
        bottom.bar(middle, count, width, color=MAIN)
        bottom.set_title("Number of answers")
        bottom.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        bottom.locator_params(axis="y", nbins=3)
        top.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
        bottom.set_xlim(0, 1)
        bottom.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
        return _svg(figure, name, alt, {})


def wilson(
    share: Float[np.ndarray, "bin"], count: Float[np.ndarray, "bin"]
) -> tuple[Float[np.ndarray, "bin"], Float[np.ndarray, "bin"]]:
    """95 % interval of a share seen in `count` trials (Wilson, 1927)."""
    z = 1.959964
    centre = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * np.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    return np.clip(centre - half, 0, 1), np.clip(centre + half, 0, 1)


def smoothed(series: Series) -> Series:
    """The running mean over a twentieth of the course; narrower towards the start, which is steep; cut at the end."""
    steps, values = series
    at = np.arange(len(values))
    reach = np.minimum(at, max(1, len(at) // 40))
    low, high = at - reach, np.minimum(at + reach + 1, len(at))
    total = np.concatenate([[0.0], np.cumsum(values)])
    return steps, (total[high] - total[low]) / (high - low)


def thinned(series: Series) -> Series:
    """At most `MAX_POINTS` points, each the mean of the steps it stands for."""
    steps, values = series
    group = -(-len(steps) // MAX_POINTS)
    starts = np.arange(0, len(steps), group)
    return steps[starts], np.add.reduceat(values, starts) / np.diff(np.append(starts, len(steps)))


def shortened(text: str, columns: int) -> str:
    """`text` in at most `columns` columns, a Chinese character taking two.

    Its middle gives way, since labels differ at their ends.
    """
    wide = [2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text]
    if sum(wide) <= columns:
        return text
    reach = np.cumsum(wide)
    head = int(np.searchsorted(reach, (columns - 1) // 2, side="right"))
    tail = int(np.searchsorted(np.cumsum(wide[::-1]), columns // 2, side="right"))
    return f"{text[:head]}…{text[len(text) - tail :]}"


def trade_off(points: Sequence[Mapping[str, Any]], *, allowed: float, name: str, alt: str) -> str:
    """What models lose against how many texts they answer in a second, those that no other beats with their numbers.

    Args:
        points: `drop`, `low` and `high` (its interval) as shares of 1, `speed`, `chosen`, and `number`, None for those
            that another beats.
        allowed: the largest drop that was allowed, drawn as a dashed line.
    """
    texts: dict[str, str] = {}
    with _canvas(_height(230)) as figure:
        (panel,) = _stack(figure, [230])
        panel.set_title("Points lost, over texts a second")
        panel.set_xscale("log")
        panel.axhline(100 * allowed, color=SECOND, linewidth=1, linestyle=(0, (4, 3)))
        for point in points:
            color = MUTED if point["number"] is None else SECOND if point["chosen"] else MAIN
            x, y = point["speed"], 100 * point["drop"]
            wide = 1.6 if point["number"] is not None else 0.8
            panel.plot([x, x], [100 * point["low"], 100 * point["high"]], color=color, linewidth=wide, alpha=0.55)
            panel.plot([x], [y], color=color, marker="o", markersize=3 + 2 * wide, clip_on=False)
            if point["number"] is not None:
                texts[f"@n{point['number']}"] = str(point["number"])
                panel.annotate(f"@n{point['number']}", (x, y), (5, 4), textcoords="offset points", color=INK)
        most = max([100 * allowed, *(100 * one["high"] for one in points if one["number"] is not None)])
        least = min(0.0, *(100 * one["low"] for one in points))
        panel.set_ylim(least - 0.2, min(most, 100 * max(6 * allowed, 0.06)) + 0.4)
        speeds = [one["speed"] for one in points]
        panel.set_xlim(min(speeds) / 1.3, max(speeds) * 1.3)
        panel.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        panel.xaxis.set_minor_formatter(lambda value, _: f"{value:,.0f}" if f"{value:.0e}"[0] in "25" else "")
        panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        return _svg(figure, name, alt, texts)


@contextmanager
def _canvas(height: float) -> Generator[Figure]:
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtra("report", "the HTML report") from None
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(_STYLE)
        yield Figure(figsize=(WIDTH / 72, height / 72), dpi=72)


def _height(*panels: float) -> float:
    """Of a canvas that holds panels of these heights, with room for a title above each and ticks below the last."""
    return sum(panels) + 34 * len(panels) + 8


def _mark(panel: Axes, epochs: Sequence[float]) -> None:
    for epoch in epochs:
        panel.axvline(epoch, color=GRID, linewidth=0.7, zorder=0.5)


def _stack(figure: Figure, heights: Sequence[float]) -> list[Axes]:
    """Panels one above the other with one horizontal axis, placed without measuring any text."""
    total = figure.get_figheight() * 72
    panels: list[Axes] = []
    top = total
    for height in heights:
        top -= 20
        box = (42 / WIDTH, (top - height) / total, (WIDTH - 54) / WIDTH, height / total)
        panels.append(figure.add_axes(box, sharex=panels[0] if panels else None))
        top -= height + 14
    for panel in panels[:-1]:
        panel.tick_params(labelbottom=False)
    return panels


def _svg(figure: Figure, name: str, alt: str, texts: Mapping[str, str]) -> str:
    """As an element of a page: no metadata or style sheet, ids that no other plot has, `texts` put in their places."""
    import matplotlib as mpl

    buffer = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    root = ElementTree.fromstring(buffer.getvalue())
    used = set(re.findall(rb"(?:url\(|href=\")#([^)\"]+)", buffer.getvalue()))
    for parent in root.iter():
        for child in [c for c in parent if _local(c.tag) in ("metadata", "style")]:
            parent.remove(child)
    for element in root.iter():
        element.tag = _local(element.tag)
        element.attrib = {_local(k): _attribute(_local(k), v, name) for k, v in element.attrib.items()}
        if element.get("id", "").removeprefix(f"{name}-").encode() not in used:
            element.attrib.pop("id", None)
        if element.tag == "text" and element.text is not None and element.text in texts:
            element.text = texts[element.text]
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": alt}
    return ElementTree.tostring(root, encoding="unicode")


def _attribute(key: str, value: str, name: str) -> str:
    if key == "style":
        value = re.sub(r"font(-size)?: ([\d.]+px)[^;]*", r"font-size: \2", value)
        value = re.sub(r"font-family:[^;]*;? ?", "", value)
        value = re.sub(r"#[0-9a-f]{6}", lambda match: _VARIABLES.get(match[0], match[0]), value)
    if key == "id":
        return f"{name}-{value}"
    return re.sub(r"^#|(?<=url\()#", f"#{name}-", value) if key in ("href", "clip-path", "style") else value


def _local(name: str) -> str:
    return name.rsplit("}", 1)[-1]
