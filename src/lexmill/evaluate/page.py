"""What the pages share: one look, one file without network or script, and how numbers are written for people."""

from __future__ import annotations

import math
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import numpy as np
from jinja2 import DictLoader, Environment, StrictUndefined
from markupsafe import Markup, escape

PERCENT = "\N{NO-BREAK SPACE}%"


@dataclass(frozen=True)
class Plot:
    """A drawing and what it shows."""

    svg: Markup
    caption: str


def render(template: str, **content: Any) -> str:
    """A page as text.

    Args:
        template: in Jinja's language; extends `page`, and may import from `macros`.
        content: by the names that the template has for it; `title` in any case.
    """
    own = files("lexmill.evaluate")
    shared = {name: own.joinpath(f"{name}.html.j2").read_text("utf-8") for name in ("page", "macros")}
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=DictLoader(shared),
    )
    environment.filters.update(percent=percent, number=number, breakable=breakable)
    return environment.from_string(template).render(**content)


def percent(value: float | None, digits: int = 1) -> str:
    """A share of 1, e.g. `92.6 %`; a dash where there is none."""
    return "–" if value is None or not math.isfinite(value) else f"{100 * value:.{digits}f}{PERCENT}"


def number(value: Any) -> str:
    """A number with four significant digits, a count with its thousands apart; anything else as it is."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        return str(value)
    return f"{value:,.0f}" if float(value).is_integer() or abs(value) >= 1e4 else f"{value:.4g}"


def breakable(text: Any) -> Markup:
    """Escaped, and allowed to break after an underscore, as the long names of labels need."""
    return escape(text).replace("_", Markup("_<wbr>"))
