"""What quantizing a checkpoint will write, decided from headers alone: each tensor has a rule and a place, or none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from megatron_mopd.config import ConfigurationError
from megatron_mopd.conversion import directions, hugging_face_config, plans
from megatron_mopd.conversion.hugging_face import SINGLE, HuggingFaceWeights, disk_tensors
from megatron_mopd.conversion.megatron_weights import MegatronWeights
from megatron_mopd.conversion.plans import Item
from megatron_mopd.conversion.weights import HEAD, Companion, Entry
from megatron_mopd.names import Segment
from megatron_mopd.quantization import config, report, stored
from megatron_mopd.quantization.recipes import QUANTIZED, Format, Recipe, Rule
from megatron_mopd.quantization.report import Errors, Summary
from megatron_mopd.quantization.stored import FourOverSix, Layout
from megatron_mopd.quantization.writing import OutputShard


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What decides the bytes of a quantized checkpoint."""

    recipe: Recipe
    layout: Layout = "modelopt"
    four_over_six: FourOverSix | None = None  # the error by which a block chooses its scale

    @property
    def title(self) -> str:
        way = f", four over six by {self.four_over_six}" if self.four_over_six else ""
        return f"{self.recipe.name} in {self.layout} layout{way}"

    def to_json(self) -> dict[str, Any]:
        return {
            "recipe": {"name": self.recipe.name, "source": self.recipe.source},
            "layout": self.layout,
            "four_over_six": self.four_over_six,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """The quantized checkpoint of one source."""

    options: Options
    entries: Mapping[str, Entry]  # of the source, by name on disk
    rules: Mapping[str, Rule]  # likewise
    companion: Companion  # of the target
    json_files: Mapping[str, Any]  # beside the weights, by name
    shards: tuple[OutputShard, ...]

    @property
    def formats(self) -> dict[str, Format]:
        return {name: rule.format for name, rule in self.rules.items()}

    def summary(self, errors: Errors | None = None) -> Summary:
        """Sizes, and with the ``errors`` of every tensor what they lost."""
        return report.summarize(self.rules, self.entries, self.options.layout, errors)


def plan(weights: HuggingFaceWeights | MegatronWeights, options: Options, largest_shard: int) -> Plan:
    """What quantizing ``weights`` writes, in files of at most ``largest_shard`` bytes.

    Raises :class:`ConfigurationError` for a checkpoint that is incomplete or quantized already, for tensors that no
    rule names and for those that their rule's format cannot hold.
    """
    companion = _companion(weights)
    _, _, expected = plans.expected_layouts(weights, companion, str(weights.path))
    plans.check(weights, expected)
    if isinstance(weights, MegatronWeights):
        companion = directions.tie(weights, companion)
    companion = replace(companion, fused=())  # codes and scales are kept expert by expert
    own = {name: weights.entries[name] for name in expected if name not in weights.aliases}
    rules = options.recipe.assign(own)
    disk = {name: members[0] for name, _, members in disk_tensors(own, companion)}
    entries = {name: own[source] for name, source in disk.items()}
    found = {name: rules[source] for name, source in disk.items()}
    quantized: dict[str, Format] = {
        stored.module_of(n): rule.format for n, rule in found.items() if rule.format in QUANTIZED
    }
    plain = [name for name, rule in found.items() if rule.format not in QUANTIZED and len(entries[name].shape) > 1]
    kept = [name.removesuffix(".weight") for name in plain]
    if HEAD in weights.aliases and rules[weights.aliases[HEAD]].format not in QUANTIZED:
        kept.append(HEAD.removesuffix(".weight"))  # a server has the module although the file has no tensor for it
    entry, json_files = config.quantization_files(quantized, kept, options.layout)
    tree = {**companion.config, config.ENTRY: entry}
    tree |= {key: "bfloat16" for key in ("dtype", "torch_dtype") if key in tree}
    return Plan(
        options=options,
        entries=entries,
        rules=found,
        companion=replace(companion, config=tree),
        json_files=json_files,
        shards=_shards(disk, entries, found, options.layout, largest_shard),
    )


def _companion(weights: HuggingFaceWeights | MegatronWeights) -> Companion:
    if weights.companion is None:
        raise ConfigurationError(
            f"{weights.path}: says nothing of a Hugging Face configuration; name a Hugging Face directory of the same"
            " model with --like"
        )
    if config.ENTRY in weights.companion.config:
        raise ConfigurationError(
            f"{weights.path}: is quantized already, its {hugging_face_config.FILE} has a {config.ENTRY}; name the"
            " checkpoint that it was made of"
        )
    return weights.companion


def _shards(
    disk: Mapping[str, str],
    entries: Mapping[str, Entry],
    rules: Mapping[str, Rule],
    layout: Layout,
    largest: int,
) -> tuple[OutputShard, ...]:
    groups: list[list[str]] = [[]]
    outputs = {name: stored.outputs(name, entry, rules[name].format, layout) for name, entry in entries.items()}
    size = 0
    for name, tensors in outputs.items():
        length = sum(entry.size for _, entry in tensors)
        if groups[-1] and size + length > largest:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += length
    shards = []
    for number, names in enumerate(groups, start=1):
        items = tuple(Item(n, entries[n], (Segment(disk[n], 0, entries[n].elements),)) for n in names)
        file = SINGLE if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        shards.append(OutputShard(file, items, tuple(tuple(outputs[n]) for n in names)))
    return tuple(shards)
