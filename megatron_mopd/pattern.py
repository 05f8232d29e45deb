"""Layer patterns of hybrid models: one symbol a layer, pipeline stages and MTP depths marked between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_mopd.config import ConfigurationError

LAYERS = {"M": "Mamba-2", "*": "attention", "E": "mixture of experts", "-": "dense MLP"}
"""Layer symbols of a pattern; beside them ``|`` starts a pipeline stage and ``/`` an MTP depth."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pattern:
    """A parsed layer pattern: pipeline stages, then the layers of one MTP depth.

    Example: ``MEM*|E-/*E/*E`` is ``Pattern(stages=("MEM*", "E-"), mtp="*E", depths=2)``.
    """

    stages: tuple[str, ...]
    mtp: str = ""  # layers of the block that all depths share; empty without MTP
    depths: int = 0

    @property
    def main(self) -> str:
        """Layers of the trunk, first to last."""
        return "".join(self.stages)

    @property
    def text(self) -> str:
        """What :func:`parse_pattern` reads."""
        return "/".join(["|".join(self.stages), *[self.mtp] * self.depths])


def parse_pattern(text: str) -> Pattern:
    """Parse ``<stage>|<stage>/<mtp>/<mtp>``.

    Raises :class:`ConfigurationError` naming the character and its position, an empty part, or MTP depths that differ.
    """
    for position, symbol in enumerate(text):
        if symbol not in LAYERS and symbol not in "|/":
            known = ", ".join(f"{key} ({value})" for key, value in LAYERS.items())
            raise ConfigurationError(
                f"model.pattern = {text!r}: {symbol!r} at position {position} is no layer; use {known},"
                " | between pipeline stages, / before each MTP depth"
            )
    trunk, *depths = text.split("/")
    stages = tuple(trunk.split("|"))
    if not all(stages) or not all(depths):
        raise ConfigurationError(f"model.pattern = {text!r}: a pipeline stage or MTP depth is empty; give each a layer")
    if depths and "|" in "".join(depths):
        raise ConfigurationError(f"model.pattern = {text!r}: | stands in an MTP depth; the last stage holds all depths")
    if len(set(depths)) > 1:
        raise ConfigurationError(
            f"model.pattern = {text!r}: MTP depths {depths} differ; they share one block, so repeat the same layers"
        )
    return Pattern(stages=stages, mtp=depths[0] if depths else "", depths=len(depths))


def without_borders(text: str | None) -> str | None:
    """The same layers, whatever pipeline stages they are cut into: a matter of the layout, not of the model."""
    return text and text.replace("|", "")


def balanced(
    main: str, costs: Sequence[int], stages: int, *, last: int = 0, needed: str = ""
) -> tuple[str, ...] | None:
    """``main`` cut into ``stages`` parts such that the largest sum of a part's ``costs`` (one a layer) is least.

    ``last`` is what the last part costs beside its layers. Every part has a layer, and a ``needed`` one where one is
    named; None where that cannot be. Among equals the sum of squares decides, then the earlier border.
    """
    none = (float("inf"), 0.0)
    best = [[none] * (len(main) + 1) for _ in range(stages + 1)]  # [parts][layers before the next]
    start = [[0] * (len(main) + 1) for _ in range(stages + 1)]
    best[0][0] = (0.0, 0.0)
    for part in range(1, stages + 1):
        for end in range(part, len(main) + 1):
            cost, found = last if part == stages else 0, False
            for begin in range(end - 1, part - 2, -1):
                cost, found = cost + costs[begin], found or main[begin] == needed
                before = best[part - 1][begin]
                candidate = (max(before[0], cost), before[1] + cost**2)
                if (found or not needed) and candidate <= best[part][end]:
                    best[part][end], start[part][end] = candidate, begin
    if best[stages][len(main)][0] == none[0]:
        return None
    cut, end = [], len(main)
    for part in range(stages, 0, -1):
        cut.append(main[start[part][end] : end])
        end = start[part][end]
    return tuple(reversed(cut))
