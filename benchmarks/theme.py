"""How pictures look: sizes for a telephone, colours that follow the reader's light or dark theme, text that stays text."""

from __future__ import annotations

import re
import textwrap
from html import escape
from pathlib import Path
from typing import Any

__all__ = ["WIDTH", "make_figure", "save"]

WIDTH = 390 / 96
"""The width of pictures in inches: 390 pixels of a browser, so that a telephone shows them without shrinking text."""

_FONTS = "DejaVu Sans, Verdana, Arial, Helvetica, sans-serif"  # the first is the widest, and the one that is measured

# What is drawn in the left colour has the right one in a dark theme; the paper is the picture's own in both.
_DARK = {
    "#ffffff": "#15181c",
    "#000000": "#e4e6e8",
    "#222222": "#d0d3d6",  # not black: that is what SVG fills with where no colour is written
    "#555555": "#a3a9b0",
    "#777777": "#9aa0a6",
    "#999999": "#8a9097",
    "#b0b0b0": "#5a6169",
    "#bbbbbb": "#5a6169",
    "#0072b2": "#3f9fe0",
    "#56b4e9": "#9ad7ff",
    "#d55e00": "#f0803c",
    "#cc79a7": "#dd94bb",
    "#009e73": "#2fbf97",
}


def make_figure(title: str, height: float, panels: int = 1) -> tuple[Any, Any]:
    """Make a figure, its height in inches, and its axes: a list, one below another, where there are several panels."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.hashsalt"] = "aioecho"  # the same rows give the same file
    matplotlib.rcParams["svg.fonttype"] = "none"
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    figure.suptitle(textwrap.fill(title, 50), x=0.015, ha="left", fontsize=10)
    every = figure.subplots(panels, squeeze=False)[:, 0]
    for axes in every:
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    return figure, every if panels > 1 else every[0]


def save(figure: Any, path: Path) -> None:
    """Write a figure as an SVG that has a background of its own, and other colours in a dark theme."""
    figure.savefig(path, metadata={"Date": None})
    text = path.read_text()
    title = escape(" ".join(figure.get_suptitle().split()))
    rules = "".join(
        f'[style*="{name}: {light}"]{{{name}:{dark}!important}}'
        for light, dark in _DARK.items()
        for name in ("fill", "stroke")
        if f"{name}: {light}" in text
    )
    style = f"<style>text{{fill:#000}}@media(prefers-color-scheme:dark){{text{{fill:#e4e6e8}}{rules}}}</style>"
    text = re.sub(r"(font: [^;\"']*?)'DejaVu Sans'[^;\"]*", rf"\1{_FONTS}", text)
    path.write_text(re.sub(r"(<svg [^>]*>)", rf"\1\n <title>{title}</title>\n {style}", text, count=1))
