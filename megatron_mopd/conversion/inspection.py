"""Looks at checkpoints of either kind without loading a model: what is in one, and where two differ."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_mopd import checkpoint_directory
from megatron_mopd.config import ConfigurationError
from megatron_mopd.conversion import hugging_face_config, plans
from megatron_mopd.conversion import weights as views
from megatron_mopd.conversion.hugging_face import HuggingFaceWeights
from megatron_mopd.conversion.megatron_weights import MegatronWeights
from megatron_mopd.conversion.weights import BLOCK, EMBEDDING, HEAD, Entry, natural

Report = Callable[[int, int], Any]
_LAYER = re.compile(r"(backbone|mtp)\.layers\.(\d+)\.(.+)")
_TELLING = {
    "mixer.in_proj.weight": "M",
    "mixer.q_proj.weight": "*",
    "mixer.gate.weight": "E",
    "mixer.up_proj.weight": "-",
}
GROUPS = {"M": "Mamba", "*": "attention", "E": "mixture of experts", "-": "dense MLP"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Inspection:
    """What a checkpoint holds. Counts are parameters."""

    path: Path
    kind: str  # "Hugging Face" or "Megatron (torch_dist)"
    pattern: str  # with one /part per stored MTP block
    hidden_size: int
    vocab_size: int
    query_groups: int | None
    tied: bool
    tensors: int
    size: int  # bytes of weights
    groups: dict[str, int]
    dtypes: dict[str, int]
    checkpoint_id: str | None  # None: not computed, or nothing tells the number of query groups
    promised_id: str | None  # of the manifest
    skipped: dict[str, int]
    problems: dict[str, list[str]]


def open_weights(
    path: Path, like: Path | None = None, other: Mapping[str, Any] | None = None
) -> HuggingFaceWeights | MegatronWeights:
    """The view of a directory of either kind; raises :class:`ConfigurationError` for one of neither."""
    if checkpoint_directory.latest(path) is not None:
        return MegatronWeights(path, like, other)
    if (path / hugging_face_config.FILE).is_file():
        return HuggingFaceWeights(path)
    raise neither(path)


def neither(path: Path) -> ConfigurationError:
    """The error for a ``path`` that is a checkpoint directory of neither kind."""
    what = "no such directory"
    if path.exists():
        what = f"holds neither a complete Megatron checkpoint nor a {hugging_face_config.FILE}"
    return ConfigurationError(
        f"{path}: {what}; name a Megatron directory (iter_*/ inside, or one of those) or a Hugging Face one"
        f" ({hugging_face_config.FILE} and safetensors)"
    )


def inspect(path: Path, *, identify: bool = True, report: Report | None = None) -> Inspection:
    """Describe the checkpoint in ``path``; ``identify`` reads all of it and computes its checkpoint_id."""
    with closing(open_weights(path)) as weights:
        entries = weights.entries
        if EMBEDDING not in entries:
            raise ConfigurationError(f"{path}: has no {EMBEDDING}, so it is no model of this family; name another")
        megatron = weights if isinstance(weights, MegatronWeights) else None
        config = weights.companion.config if weights.companion else {}
        groups = megatron.query_groups if megatron else config.get("num_key_value_heads")
        known = identify and not weights.problems.found and (groups is not None or "*" not in _pattern(entries))
        if weights.companion is not None:
            _, _, expected = plans.expected_layouts(weights, weights.companion, str(weights.path))
            plans.examine(weights, expected)
        return Inspection(
            path=weights.path,
            kind="Megatron (torch_dist)" if megatron else "Hugging Face",
            pattern=_pattern(entries),
            hidden_size=entries[EMBEDDING].shape[1],
            vocab_size=entries[EMBEDDING].shape[0],
            query_groups=groups,
            tied=weights.aliases.get(HEAD) == EMBEDDING,
            tensors=len(entries),
            size=sum(entry.size for name, entry in entries.items() if name not in weights.aliases),
            groups=_groups(weights),
            dtypes=_dtypes(weights),
            checkpoint_id=_identify(weights, report) if known else None,
            promised_id=megatron.manifest.get("checkpoint_id") if megatron else None,
            skipped={"optimizer tensors": megatron.optimizer_tensors, "objects": megatron.objects} if megatron else {},
            problems=weights.problems.found,
        )


def differences(a: Path, b: Path, report: Report | None = None) -> list[str]:
    """Where two directories of either kind differ, tensor by tensor: names, dtypes, shapes, bytes; empty when nowhere.

    A Megatron directory that came without a manifest is read by what the other one says of query groups and vocabulary.
    """
    one, two = _open_pair(a, b)
    with closing(one), closing(two):
        found = [
            f"{item}: {kind} in {weights.path}"
            for weights in (one, two)
            for kind, items in weights.problems.found.items()
            for item in items
        ]
        found += [f"{name}: only in {one.path}" for name in one.entries.keys() - two.entries.keys()]
        found += [f"{name}: only in {two.path}" for name in two.entries.keys() - one.entries.keys()]
        shared = [name for name in one.entries if name in two.entries]
        total, done = sum(one.entries[name].size for name in shared), 0
        for name in shared:
            x, y = one.entries[name], two.entries[name]
            if x != y:
                found.append(f"{name}: {_text(x)} in {one.path}, {_text(y)} in {two.path}")
            elif not views.equal(one, name, two, name):
                found.append(f"{name}: other values")
            done += x.size
            if report is not None:
                report(done, total)
    return sorted(found, key=natural)


def _open_pair(a: Path, b: Path) -> tuple[HuggingFaceWeights | MegatronWeights, HuggingFaceWeights | MegatronWeights]:
    pair = []
    for path, other in ((a, b), (b, a)):
        like, told = None, None
        if checkpoint_directory.latest(other) is not None:
            told = checkpoint_directory.read_manifest(other)
        elif (other / hugging_face_config.FILE).is_file() and checkpoint_directory.latest(path) is not None:
            like = other
        pair.append(open_weights(path, like, told))
    return pair[0], pair[1]


def _identify(weights: HuggingFaceWeights | MegatronWeights, report: Report | None) -> str:
    own = {name: entry for name, entry in weights.entries.items() if name not in weights.aliases}
    total, done, digests = sum(entry.size for entry in own.values()), 0, {}
    buffer = memoryview(bytearray(BLOCK))
    for name, entry in own.items():
        digests[name] = views.digest(weights, name, buffer).sha256
        done += entry.size
        if report is not None:
            report(done, total)
    return views.identify(weights, digests)


def _layers(entries: Mapping[str, Entry]) -> dict[tuple[str, int], str]:
    """Symbol of each layer of the trunk and of the MTP blocks, told by a tensor that only its kind has."""
    found = {}
    for name in entries:
        if (match := _LAYER.fullmatch(name)) and match[3] in _TELLING:
            found[match[1], int(match[2])] = _TELLING[match[3]]
    return found


def _pattern(entries: Mapping[str, Entry]) -> str:
    layers = _layers(entries)
    trunk = "".join(layers[key] for key in sorted(layers) if key[0] == "backbone")
    starts = {int(m[2]) for name in entries if (m := _LAYER.fullmatch(name)) and m[3] == "enorm.weight"}
    mtp = "".join(("/" if n in starts else "") + layers[part, n] for part, n in sorted(layers) if part == "mtp")
    return trunk + mtp


def _groups(weights: HuggingFaceWeights | MegatronWeights) -> dict[str, int]:
    layers = _layers(weights.entries)
    counts: Counter[str] = Counter()
    for name, entry in weights.entries.items():
        if name in weights.aliases:
            continue
        match = _LAYER.fullmatch(name)
        if name.startswith("mtp."):
            group = "MTP"
        elif match:
            group = GROUPS.get(layers.get((match[1], int(match[2])), ""), "unknown layers")
        else:
            group = {EMBEDDING: "embedding", HEAD: "output weight"}.get(name, "final norm")
        counts[group] += entry.elements
    return dict(counts)


def _dtypes(weights: HuggingFaceWeights | MegatronWeights) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for name, entry in weights.entries.items():
        if name not in weights.aliases:
            counts[str(entry.dtype).removeprefix("torch.")] += entry.elements
    return dict(counts)


def _text(entry: Entry) -> str:
    return f"{str(entry.dtype).removeprefix('torch.')} {list(entry.shape)}"
