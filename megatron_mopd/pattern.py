"""Layer patterns of hybrid models: one symbol a layer, pipeline stages and MTP depths marked between them."""

from __future__ import annotations

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
