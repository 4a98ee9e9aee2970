"""`card.md`: what a person should know before using a model (after Mitchell et al. 2019, "Model Cards")."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

from lexmill.artifact.manifest import Manifest

_TEMPLATE = """\
# {{ name }}

A model for the task **{{ manifest.task.name }}**, made with Lexmill {{ manifest.environment.lexmill }} \
on {{ manifest.created[:10] }}.
{% for head, labels in heads %}

## Labels{% if head %} of {{ head }}{% endif %} ({{ labels | length }})

{{ labels[:100] | map("code") | join(", ") }}{% if labels | length > 100 %}, …{% endif %}
{% endfor %}
{% if manifest.data %}

## Data

| what | value |
| --- | --- |
{% for key, value in manifest.data.items() %}
| {{ key | cell }} | {{ value | cell }} |
{% endfor %}
{% endif %}
{% for split, metrics in manifest.metrics.items() %}

## Measured on: {{ split }}

| metric | value | 95 % interval |
| --- | ---: | :---: |
{% for key, metric in metrics.items() %}
| {{ key | cell }} | {{ "%.4f" | format(metric.value) }} | \
{% if metric.interval %}{{ "%.4f to %.4f" | format(*metric.interval) }}{% endif %} |
{% endfor %}
{% endfor %}

## How to use it

```
lexmill predict {{ name }} DATA
lexmill serve {{ name }}
```
{% if manifest.history %}

## How it was made

{% for step in manifest.history %}
{{ loop.index }}. {{ step.name }}, {{ step.when[:10] }}, Lexmill {{ step.version }}\
{% if step.effect %}: {% for key, value in step.effect.items() %}\
{{ key }} {{ "%.4g" | format(value) }}{{ ", " if not loop.last }}{% endfor %}{% endif %}

{% endfor %}
{% endif %}

## Limits

{% if additions %}
- It has modules that Hugging Face's classes do not know ({{ additions | join(", ") }}): \
with `transformers` it answers as if it were without them. Load it with Lexmill.
{% endif %}
- It answers only in the terms above{% if heads %}: a text that fits no label still gets one{% endif %}.
{% if manifest.metrics %}
- The numbers hold for texts like those they were measured on; measure again on your own with `lexmill evaluate`.
{% else %}
- Nothing was measured on held-out data; do so with `lexmill evaluate` before relying on it.
{% endif %}
- Differences between groups of people in the texts were not examined unless a metric above says so.
"""


def render_card(manifest: Manifest, name: str) -> str:
    """The card as Markdown. `name` is the artefact's directory, as a person would type it."""
    from jinja2 import Environment, StrictUndefined

    # The result is Markdown for a file, not HTML: escaping for HTML would spoil it.
    environment = Environment(trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined, autoescape=False)
    environment.filters.update(code=_code, cell=_cell)
    template, heads = environment.from_string(_TEMPLATE), list(labels(manifest))
    text = template.render(manifest=manifest, name=name, heads=heads, additions=_additions(manifest))
    return text.rstrip() + "\n"


def _additions(manifest: Manifest) -> list[str]:
    """The kinds of modules that a trunk has beyond its config."""
    found = cast("dict[str, dict[str, Any]]", manifest.structure.get("additions", {}))
    return sorted({str(one.get("kind")) for one in found.values()})


def labels(manifest: Manifest) -> Iterator[tuple[str, list[str]]]:
    """Each list of labels in the task's state, with the head it belongs to (empty where it stands at the top)."""
    yield from _labels(manifest.task.state, "")


def _labels(state: dict[str, Any], head: str) -> Iterator[tuple[str, list[str]]]:
    for key, value in state.items():
        if key == "labels":
            heads = cast("dict[str, list[Any]]", value if isinstance(value, dict) else {head: value})
            yield from ((name, [str(label) for label in names]) for name, names in heads.items())
        elif isinstance(value, dict):
            yield from _labels(cast("dict[str, Any]", value), head if key == "heads" else key)
        elif isinstance(value, list):
            for entry in cast("list[Any]", value):
                if isinstance(entry, dict):
                    yield from _labels(cast("dict[str, Any]", entry), str(entry.get("name", head)))


def _code(label: str) -> str:
    return f"`` {label} ``" if "`" in label else f"`{label}`"


def _cell(value: object) -> str:
    if isinstance(value, dict):
        value = "; ".join(f"{key} {_cell(inner)}" for key, inner in cast("dict[str, object]", value).items())
    elif isinstance(value, list):
        value = ", ".join(map(_cell, cast("list[object]", value)))
    return str(value).replace("|", "\\|").replace("\n", " ")
