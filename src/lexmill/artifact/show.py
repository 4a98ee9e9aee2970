"""What `lexmill show PATH` says of an artefact: lines for people, a table of JSON for machines."""

from __future__ import annotations

from typing import Any

from lexmill.artifact.card import labels
from lexmill.artifact.manifest import Metric
from lexmill.artifact.read import Artifact


def summary(artifact: Artifact) -> dict[str, Any]:
    """The manifest as JSON, with the path and the size of all files."""
    manifest = artifact.manifest
    size = sum(record.bytes for record in manifest.files.values())
    return {"path": str(artifact.path), "bytes": size, **manifest.model_dump(mode="json")}


def describe(artifact: Artifact) -> list[str]:
    """An artefact in lines of plain text, most important first."""
    manifest = artifact.manifest
    lines = [str(artifact.path), f"  task         {manifest.task.name}"]
    for head, names in labels(manifest):
        shown = ", ".join(names[:6]) + (", …" if len(names) > 6 else "")
        lines.append(f"  labels       {f'{head}: ' if head else ''}{len(names)} ({shown})")
    for split, metrics in manifest.metrics.items():
        lines += [f"  {split:<12} {_metric(name, metric)}" for name, metric in metrics.items()]
    for key, value in manifest.data.items():
        if not isinstance(value, (dict, list)):
            lines.append(f"  data         {key} {value}")
    for step in manifest.history:
        effect = ", ".join(f"{name} {value:.4g}" for name, value in step.effect.items())
        lines.append(f"  history      {step.when} {step.name}{f': {effect}' if effect else ''}")
    environment = manifest.environment
    torch = f", torch {environment.torch}" if environment.torch else ""
    lines.append(f"  made with    lexmill {environment.lexmill}{torch}, python {environment.python}")
    lines.append(f"  created      {manifest.created}")
    width = max(map(len, manifest.files), default=0)
    lines += [f"  file         {name:<{width}}  {_size(record.bytes):>9}" for name, record in manifest.files.items()]
    return lines


def _metric(name: str, metric: Metric) -> str:
    interval = f" (95 %: {metric.interval[0]:.4f} to {metric.interval[1]:.4f})" if metric.interval else ""
    return f"{name} {metric.value:.4f}{interval}"


def _size(count: int) -> str:
    size = float(count)
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"
