"""Template environment, figures and style that all HTML pages share. The pages load nothing from the network."""

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
"""Width of a figure as wide as the page, in pixels. It fits a laptop screen of 1366 pixels."""

OPEN_UP_TO = 12
"""Largest number of MTEB tasks whose details are open at first."""

# Figures are drawn in these colours, which are then replaced by variables of the page's style sheet, light or dark.
INK, FAINT, FROZEN, ADAPTED, PAPER, BAD = (f"#00000{number}" for number in range(1, 7))
SERIES = ("#000011", "#000012", "#000013", "#000014", "#000015")
"""Colours that only distinguish lines."""

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
    "svg.fonttype": "none",  # the browser's fonts have scripts that matplotlib's lack
    "svg.hashsalt": "lorafleet",
    "text.color": INK,
    "text.parse_math": False,  # a $ in a name is no formula
    "xtick.color": FAINT,
    "xtick.labelcolor": INK,
    "xtick.labelsize": 10,
    "ytick.color": FAINT,
    "ytick.labelcolor": INK,
    "ytick.labelsize": 10,
}
"""Settings of matplotlib for drawing a figure and writing it with ``inline_svg``."""


def render_page(template: str, **values: Any) -> str:
    """Render a template. Every value is made printable and escaped. A missing value is an error."""
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
    """Convert a figure to an SVG element: without ids that could clash, coloured by the style sheet, scalable."""
    file = io.StringIO()
    with warnings.catch_warnings():
        # Fonts are only measured here. The browser draws the text.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
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
    """Shorten a name to at most ``most`` characters by omitting its middle."""
    name = printable(name)
    return name if len(name) <= most else f"{name[: most // 2]}…{name[-(most // 2 - 1) :]}"


def duration(seconds: float) -> str:
    """A duration in the form ``93 s``, ``12 min`` or ``2.5 h``."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
