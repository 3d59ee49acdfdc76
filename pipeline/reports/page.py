"""What our HTML pages have in common: one template environment, and figures that ask nothing of the network."""

from __future__ import annotations

import html
import io
import re
import warnings
from typing import Any

import jinja2
from markupsafe import Markup
from matplotlib.figure import Figure

from pipeline.printable import printable
from pipeline.reports.formatting import percent

PAGE_WIDTH = 1180
"""Pixels of a figure that is as wide as the page; what a laptop's screen of 1366 leaves."""
OPEN_UP_TO = 12
"""With more MTEB tasks, their details start folded."""

# Figures are drawn in these colours and then coloured by the page's style sheet, light or dark.
INK, FAINT, FROZEN, ADAPTED, PAPER, BAD = (f"#00000{number}" for number in range(1, 7))
SERIES = ("#000011", "#000012", "#000013", "#000014", "#000015")
"""Colours without a meaning of their own, to tell lines apart."""
_VARIABLES = {
    INK: "--ink",
    FAINT: "--faint",
    FROZEN: "--frozen",
    ADAPTED: "--adapted",
    PAPER: "--paper",
    BAD: "--bad",
} | {colour: f"--series-{number}" for number, colour in enumerate(SERIES, start=1)}
STYLE = {
    "axes.edgecolor": FAINT,
    "axes.facecolor": "none",
    "axes.labelcolor": INK,
    "axes.labelsize": 11,
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 12,
    "figure.dpi": 72,  # one unit of the figure is one pixel of the page
    "figure.facecolor": "none",
    "font.family": ["DejaVu Sans"],
    "font.size": 11,
    "grid.color": FAINT,
    "grid.linewidth": 0.4,
    "legend.frameon": False,
    "svg.fonttype": "none",  # the browser's fonts know scripts that matplotlib's do not
    "svg.hashsalt": "lorafleet",
    "text.color": INK,
    "text.parse_math": False,  # a $ in a name is a $
    "xtick.color": FAINT,
    "xtick.labelcolor": INK,
    "xtick.labelsize": 10,
    "ytick.color": FAINT,
    "ytick.labelcolor": INK,
    "ytick.labelsize": 10,
}
"""matplotlib's settings while a figure is drawn and ``inline_svg`` writes it."""


def render_page(template: str, **values: Any) -> str:
    """Fill a template of ours; every value is made printable and escaped, and a name that it does not know is an error."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pipeline.reports"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value,
    )
    environment.filters["percent"] = percent
    return environment.get_template(template).render(**values)


def inline_svg(figure: Figure, description: str) -> Markup:
    """The figure as an element of the page: no ids to collide, colours from the style sheet, scaled to its place."""
    file = io.StringIO()
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="Glyph .* missing from font"
        )  # only measured here; the browser draws it
        figure.savefig(
            file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None}, transparent=True
        )
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub("|".join(_VARIABLES), lambda match: f"var({_VARIABLES[match[0]]})", svg)
    width, height = 72 * figure.get_figwidth(), 72 * figure.get_figheight()
    size = f'viewBox="0 0 {width:g} {height:g}" style="max-width: {width:g}px"'
    head = f'<svg role="img" aria-label="{html.escape(printable(description))}" {size}'
    return Markup(head + re.sub(r"^<svg[^>]*", "", svg, count=1).strip())


def shorten(name: str, most: int = 44) -> str:
    """The name as a figure shows it, or its two ends."""
    name = printable(name)
    return name if len(name) <= most else f"{name[: most // 2]}…{name[-(most // 2 - 1) :]}"


def duration(seconds: float) -> str:
    """``93 s``, ``12 min``, ``2.5 h``."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
