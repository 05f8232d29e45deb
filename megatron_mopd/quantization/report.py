"""What quantizing a checkpoint cost and saved, by kind of layer: counted from headers, measured while writing.

The relative error of a group is ||stored - source|| / ||source|| over all its elements, both read as fp32. Bits per
element are all stored bits, scales included, over the number of parameters; a tied output weight counts once.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from megatron_mopd.conversion.weights import Entry
from megatron_mopd.quantization import stored
from megatron_mopd.quantization.recipes import Format, Rule
from megatron_mopd.quantization.stored import Layout

Errors = Mapping[str, tuple[float, float]]
"""Squared norms of each tensor's error and of the tensor itself."""
_LAYER = re.compile(r"(?:backbone|mtp)\.layers\.(\d+)\.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """The tensors of one kind in one format. ``error`` and what follows are None or empty before anything is read."""

    what: str
    format: Format
    reason: str
    tensors: int
    parameters: int
    source_bytes: int
    stored_bytes: int
    error: float | None = None
    worst: str = ""  # the tensor of the largest error
    worst_error: float | None = None
    layers: dict[int, float] = field(default_factory=dict)  # error of the kind in each layer

    @property
    def bits(self) -> float:
        """Per element."""
        return 8 * self.stored_bytes / self.parameters


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """The groups in the order in which the checkpoint's tensors come."""

    groups: tuple[Group, ...]

    @property
    def parameters(self) -> int:
        return sum(group.parameters for group in self.groups)

    @property
    def source_bytes(self) -> int:
        return sum(group.source_bytes for group in self.groups)

    @property
    def stored_bytes(self) -> int:
        return sum(group.stored_bytes for group in self.groups)

    @property
    def bits(self) -> float:
        """Per element, over all tensors."""
        return 8 * self.stored_bytes / self.parameters

    def to_json(self) -> dict[str, Any]:
        groups = [asdict(group) | {"bits_per_element": group.bits} for group in self.groups]
        return {
            "bits_per_element": self.bits,
            "parameters": self.parameters,
            "source_bytes": self.source_bytes,
            "stored_bytes": self.stored_bytes,
            "groups": groups,
        }


def summarize(
    rules: Mapping[str, Rule], entries: Mapping[str, Entry], layout: Layout, errors: Errors | None = None
) -> Summary:
    """The summary of storing ``entries`` by ``rules``; with ``errors`` of all tensors, what it lost."""
    members: dict[tuple[str, Format], list[str]] = {}
    for name, rule in rules.items():
        members.setdefault((rule.what, rule.format), []).append(name)
    groups = []
    for (what, format), names in members.items():
        outputs = [out for name in names for out in stored.outputs(name, entries[name], format, layout)]
        measured = {name: errors[name] for name in names} if errors is not None else {}
        worst = max(measured, key=lambda name: _relative([measured[name]]), default="")
        groups.append(
            Group(
                what=what,
                format=format,
                reason=rules[names[0]].reason,
                tensors=len(names),
                parameters=sum(entries[name].elements for name in names),
                source_bytes=sum(entries[name].size for name in names),
                stored_bytes=sum(entry.size for _, entry in outputs),
                error=_relative(measured.values()) if measured else None,
                worst=worst,
                worst_error=_relative([measured[worst]]) if worst else None,
                layers=_layers(measured),
            )
        )
    return Summary(groups=tuple(groups))


def _layers(measured: Errors) -> dict[int, float]:
    found: dict[int, list[tuple[float, float]]] = {}
    for name, norms in measured.items():
        if layer := _LAYER.match(name):
            found.setdefault(int(layer[1]), []).append(norms)
    return {layer: _relative(found[layer]) for layer in sorted(found)}


def _relative(norms: Iterable[tuple[float, float]]) -> float:
    pairs = list(norms)
    lost, whole = math.fsum(pair[0] for pair in pairs), math.fsum(pair[1] for pair in pairs)
    return math.sqrt(lost / whole) if whole else 0.0
