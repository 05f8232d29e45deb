"""Colours shared by plots and terminal, readable with any kind of colour vision."""

from __future__ import annotations

from collections.abc import Sequence

RGB = tuple[int, int, int]

# Okabe and Ito's qualitative palette without black and yellow, which drown on dark and on light ground.
_DOMAIN_COLOURS: tuple[RGB, ...] = (
    (0, 114, 178),
    (213, 94, 0),
    (0, 158, 115),
    (204, 121, 167),
    (86, 180, 233),
    (230, 159, 0),
)
_NEGATIVE: RGB = (213, 94, 0)
_POSITIVE: RGB = (0, 114, 178)
_NEUTRAL: RGB = (255, 255, 255)


def domain_colours(domains: Sequence[str]) -> dict[str, str]:
    """``#rrggbb`` of each domain by its place in the list; from the seventh on colours repeat."""
    return {name: hexadecimal(_DOMAIN_COLOURS[i % len(_DOMAIN_COLOURS)]) for i, name in enumerate(domains)}


def advantage_colour(value: float, scale: float) -> RGB:
    """Orange below zero, white at zero, blue above; full colour from ``scale`` on."""
    end = _POSITIVE if value >= 0 else _NEGATIVE
    share = min(1.0, abs(value) / scale) ** 0.7 if scale > 0 else 0.0  # the root lifts small advantages off white
    red, green, blue = (round(n + share * (e - n)) for n, e in zip(_NEUTRAL, end, strict=True))
    return red, green, blue


def readable_on(ground: RGB) -> str:
    """Black or white text, whichever stands out more (relative luminance of WCAG 2)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in ground)]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#000000" if luminance > 0.179 else "#ffffff"


def hexadecimal(colour: RGB) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)


def advantage_scale(values: Sequence[float]) -> float:
    """The advantage shown in full colour: the 98th percentile of the magnitudes, so that one outlier hides nothing."""
    if not values:
        return 1.0
    ordered = sorted(abs(v) for v in values)
    return max(ordered[min(len(ordered) - 1, int(0.98 * len(ordered)))], 1e-6)


def visible(token: str) -> str:
    """A token's text with white space that can be seen."""
    return token.replace(" ", "·").replace("\n", "↵").replace("\t", "→") or "∅"
