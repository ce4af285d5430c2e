"""Colours and Vega-Lite configuration of the figures, for light and dark paper."""

from __future__ import annotations

from typing import Any

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"

# Ranks follow one ramp, which is ordered by lightness. A rank has the same hue on light and dark
# paper. Full fine-tuning has the opposite hue: blue and orange remain distinct under every common
# colour-vision deficiency.
_RAMPS = {
    "light": ["#35a07c", "#2a8fb8", "#3d63bd", "#4a2f9e", "#24124f"],
    "dark": ["#2f9e7c", "#3aa0c8", "#6f9df0", "#a99cff", "#e3dcff"],
}
_FULL = {"light": "#c8500a", "dark": "#ff9a57"}
_BASE = {"light": "#6b7280", "dark": "#9aa4b2"}
_INK = {"light": "#1f2530", "dark": "#e6e9ef"}
_MUTED = {"light": "#5b6472", "dark": "#a3acba"}
_GRID = {"light": "#e7eaee", "dark": "#2b313c"}
MODES = ("light", "dark")


def palette(kinds: list[str], mode: str) -> list[str]:
    """Return one colour per method, in their order, and the base's colour at the end.

    Args:
        kinds: `lora`, `hybrid` or `full` for each method.
        mode: `light` or `dark`.
    """
    adapters = [index for index, kind in enumerate(kinds) if kind != "full"]
    ramp = dict(zip(adapters, _ramp_colours(_RAMPS[mode], len(adapters)), strict=True))
    return [ramp.get(index, _FULL[mode]) for index in range(len(kinds))] + [_BASE[mode]]


def _ramp_colours(stops: list[str], count: int) -> list[str]:
    """Return `count` colours, evenly spaced along a ramp of stops."""
    if count == 1:
        return [stops[1]]
    positions = [index * (len(stops) - 1) / (count - 1) for index in range(count)]
    return [_mix(stops, position) for position in positions]


def _mix(stops: list[str], position: float) -> str:
    """Return the colour at a position on the ramp, in units of stops."""
    first = min(int(position), len(stops) - 2)
    weight = position - first
    channels = (
        round((1 - weight) * int(stops[first][at : at + 2], 16) + weight * int(second, 16))
        for at in (1, 3, 5)
        for second in [stops[first + 1][at : at + 2]]
    )
    return "#" + "".join(f"{channel:02x}" for channel in channels)


def theme(kinds: list[str], mode: str) -> dict[str, Any]:
    """Return the Vega-Lite configuration, with the methods' colours as its category range."""
    ink, quiet, grid = _INK[mode], _MUTED[mode], _GRID[mode]
    return {
        "background": "transparent" if mode == "dark" else "white",
        "font": FONT,
        "padding": 4,
        "range": {"category": palette(kinds, mode)},
        "view": {"stroke": None},
        "axis": {
            "labelColor": quiet,
            "titleColor": quiet,
            "labelFontSize": 11,
            "titleFontSize": 12,
            "titleFontWeight": "normal",
            "titlePadding": 8,
            "gridColor": grid,
            "domainColor": grid,
            "tickColor": grid,
            "tickSize": 4,
            "labelPadding": 4,
        },
        "legend": {
            "labelColor": ink,
            "titleColor": quiet,
            "labelFontSize": 12,
            "titleFontSize": 12,
            "titleFontWeight": "normal",
            "symbolStrokeWidth": 2.5,
            "labelLimit": 200,
            "title": None,
            "orient": "top",
            "columns": 6,
            "symbolType": "stroke",
            "symbolOpacity": 1,
        },
        "title": {
            "color": ink,
            "subtitleColor": quiet,
            "fontSize": 13,
            "subtitleFontSize": 11,
            "fontWeight": 600,
            "anchor": "start",
            "frame": "group",
            "offset": 8,
        },
        "concat": {"spacing": 28},
        "style": {
            "reference": {"color": quiet, "strokeDash": [4, 3], "strokeWidth": 1.2},
            "reference-label": {"color": quiet, "fontSize": 11},
            "base": {"color": _BASE[mode]},
            "ring": {"color": ink, "strokeWidth": 1.5},
            "absent": {"color": quiet, "fontSize": 11, "fontStyle": "italic"},
            "broken": {"color": ink, "strokeWidth": 1.6},
            "chance": {"color": quiet, "strokeDash": [1, 3], "strokeWidth": 1.6},
        },
    }
