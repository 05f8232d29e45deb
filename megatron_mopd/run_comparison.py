"""Where two runs, or two recipes stage by stage, first differ: settings, metrics, rollouts, weights, results.

What depends on the clock or on the machine's memory does not count, nor does where a run lies. Settings that a result
repeats, such as the layout, count as settings.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_mopd import checkpoint_directory, metrics, provenance, run_record, shards
from megatron_mopd.config import ConfigurationError

GRAPH = "graph.json"
RESULTS = ("before.json", "preflight.json", "result.json")
_PASSED_OVER = ("wall_s", "measure_s", "memory_bytes", "device_memory_bytes", "ended.run_id")
"""Values of a result that depend on the clock, on the machine or on the run's name, by their full names: deeper in the
tree the same words may be names of domains."""
_SETTINGS = {"parallel": "parallel", "seed": "run.seed"}
"""What results repeat of the settings, and the setting's name."""
_SHOWN = 4  # metrics of a step, values of a result


@dataclass(kw_only=True, slots=True)
class Comparison:
    """What two runs make of each other, in the order in which it is to be read."""

    settings: list[str] = field(default_factory=list)  # before anything was computed
    results: list[str] = field(default_factory=list)  # of what was
    step: int | None = None  # the first that differs
    compared: list[str] = field(default_factory=list)  # what there was on both sides

    def differs_at(self, step: int, text: str) -> None:
        """Note a difference at a step."""
        self.step = step if self.step is None else min(self.step, step)
        self.results.append(text)


def is_run(directory: Path) -> bool:
    """Whether a directory is one run's, or one stage's, and not a recipe's."""
    return any((directory / name).is_file() for name in (metrics.FILE_NAME, run_record.FILE, *RESULTS))


def stages(directory: Path) -> list[str]:
    """The stages of a recipe's directory, in the order of the recipe; raises :class:`ConfigurationError` when it is
    none."""
    file = directory / GRAPH
    if file.is_file():
        way_out = "remove it: the directory's runs are then compared in alphabetical order"
        nodes = checkpoint_directory.read_json(file, way_out)["nodes"]
        return [node["name"] for node in nodes if is_run(directory / node["name"])]
    found = sorted(path.name for path in directory.iterdir() if is_run(path)) if directory.is_dir() else []
    if not found:
        raise ConfigurationError(
            f"{directory}: neither the directory of a run (metrics.jsonl) nor that of a recipe ({GRAPH}); name one"
        )
    return found


def compare(one: Path, other: Path) -> Comparison:
    """Two runs' directories. Raises :class:`ConfigurationError` for a damaged file in them."""
    found = Comparison()
    _settings(one, other, found)
    _metrics(one, other, found)
    _shards(one / shards.FOLDER, other / shards.FOLDER, found)
    _checkpoints(one / "checkpoints", other / "checkpoints", found)
    for name in RESULTS:
        _result(one / name, other / name, found)
    return found


def _settings(one: Path, other: Path, found: Comparison) -> None:
    if not all((directory / run_record.FILE).is_file() for directory in (one, other)):
        return
    a, b = run_record.read(one), run_record.read(other)
    found.compared.append("settings")
    for name, mine, theirs in run_record.differences(a["settings"], b["settings"]):
        found.settings.append(f"setting {name}: {mine!r} and {theirs!r}")
    before, after = a["manifest"], b["manifest"]
    found.settings += provenance.teacher_differences(before.get("teachers") or {}, after.get("teachers") or {})
    for name in ("initial_id", "tokenizer_sha", "template_sha"):
        if before.get(name) != after.get(name):
            found.settings.append(f"{name}: {before.get(name)} and {after.get(name)}")


def _metrics(one: Path, other: Path, found: Comparison) -> None:
    if not all((directory / metrics.FILE_NAME).is_file() for directory in (one, other)):
        return
    try:
        a, b = ({row["step"]: metrics.untimed(row) for row in metrics.read(path)} for path in (one, other))
    except ValueError as error:
        raise ConfigurationError(str(error)) from None
    found.compared.append(f"metrics of {len(a.keys() & b.keys()):,} steps")
    for step in sorted(a.keys() | b.keys()):
        if step not in a or step not in b:
            there = one if step in a else other
            found.differs_at(step, f"step {step} is in {there / metrics.FILE_NAME} only")
            return
        if texts := _unequal(a[step], b[step]):
            found.differs_at(step, f"step {step}, metrics: {_listed(texts)}")
            return


def _shards(one: Path, other: Path, found: Comparison) -> None:
    common = sorted(set(shards.steps(one)) & set(shards.steps(other)))
    if common:
        found.compared.append(f"rollouts of {len(common):,} steps")
    for step in common:
        a, b = shards.read(one, step), shards.read(other, step)
        text = None
        if len(a.rollouts) != len(b.rollouts):
            text = f"{len(a.rollouts)} and {len(b.rollouts)} rollouts"
        for mine, theirs in zip(a.rollouts, b.rollouts, strict=False):
            text = text or shards.first_difference(mine, theirs)
        sums = a.header["weights_sha"], b.header["weights_sha"]
        if text is None and None not in sums and sums[0] != sums[1]:
            text = f"equal rollouts, but the weights after the update have sha256 {sums[0][:12]} and {sums[1][:12]}"
        if text is not None:
            found.differs_at(step, f"step {step}, rollouts: {text}")
            return


def _checkpoints(one: Path, other: Path, found: Comparison) -> None:
    common = sorted(set(checkpoint_directory.steps(one)) & set(checkpoint_directory.steps(other)))
    if common:
        found.compared.append(f"weights of {len(common):,} checkpoints")
    for step in common:
        a, b = (
            checkpoint_directory.read_manifest(checkpoint_directory.place(root, step)).get("checkpoint_id")
            for root in (one, other)
        )
        if a != b:
            found.differs_at(step, f"step {step}, checkpoint_id: {a} and {b}")
            return


def _result(one: Path, other: Path, found: Comparison) -> None:
    present = [path.is_file() for path in (one, other)]
    if not all(present):
        if any(present):
            found.results.append(f"{one.name} is in {(one if present[0] else other).parent} only")
        return
    a, b = (checkpoint_directory.read_json(path, "copy the run's directory again") for path in (one, other))
    found.compared.append(one.name)
    beside = {"versions", *_SETTINGS}
    mine, theirs = (dict(_flat({k: v for k, v in tree.items() if k not in beside})) for tree in (a, b))
    if texts := _unequal(mine, theirs):
        found.results.append(f"{one.name}: {_listed(texts)}")
    before, after = (dict(_flat({s: tree[k] for k, s in _SETTINGS.items() if k in tree})) for tree in (a, b))
    for name in [*before, *(name for name in after if name not in before)]:
        text = f"setting {name}: {before.get(name)!r} and {after.get(name)!r}"
        if before.get(name) != after.get(name) and text not in found.settings:  # run.json has said so already
            found.settings.append(text)
    packages = _unequal(a.get("versions", {}), b.get("versions", {}))
    found.settings += [f"version of {text}" for text in packages if f"version of {text}" not in found.settings]


def _unequal(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    names = [*one, *(name for name in other if name not in one)]
    missing = object()
    pairs = ((name, one.get(name, missing), other.get(name, missing)) for name in names if name not in _PASSED_OVER)
    return [
        f"{name} {'missing' if a is missing else json.dumps(a)} and {'missing' if b is missing else json.dumps(b)}"
        for name, a, b in pairs
        if a != b
    ]


def _listed(texts: list[str]) -> str:
    more = len(texts) - _SHOWN
    return "; ".join(texts[:_SHOWN]) + (f"; and {more:,} more" if more > 0 else "")


def _flat(tree: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, Mapping) and tree:
        for key, value in tree.items():
            yield from _flat(value, f"{name}.{key}" if name else str(key))
    elif isinstance(tree, list) and tree:
        for index, value in enumerate(tree):
            yield from _flat(value, f"{name}.{index}")
    else:
        yield name, tree
