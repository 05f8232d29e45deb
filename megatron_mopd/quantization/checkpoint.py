"""Quantizes a checkpoint into a Hugging Face directory, and turns such a directory back into one in bfloat16.

Tensors are streamed as in a conversion (:mod:`megatron_mopd.conversion.jobs`): a matrix that is quantized is read
twice, once for its largest magnitude and once, some rows at a time, to be encoded; all others pass in blocks.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megatron_mopd.config import ConfigurationError
from megatron_mopd.conversion import directions, hugging_face_config, inspection, plans
from megatron_mopd.conversion.hugging_face import INDEX, HuggingFaceWeights
from megatron_mopd.conversion.jobs import Conversion, Job, Report, write_tensor
from megatron_mopd.conversion.megatron_weights import MegatronWeights
from megatron_mopd.conversion.partial_directory import PartialDirectory
from megatron_mopd.quantization import display
from megatron_mopd.quantization.planning import Options, Plan, plan
from megatron_mopd.quantization.report import Summary
from megatron_mopd.quantization.view import QuantizedWeights
from megatron_mopd.quantization.writing import Writer

MANIFEST = "mopd_quantization.json"
"""In a quantized directory: what it was made of, how, and what that cost."""
PICTURE = "quantization.png"


@dataclass(frozen=True, kw_only=True, slots=True)
class Quantized:
    """What was written. ``conversion.checkpoint_id`` is the source's."""

    conversion: Conversion
    summary: Summary


def preview(source: Path, options: Options, *, like: Path | None = None) -> Summary:
    """What :func:`quantize` would store, from headers alone. Errors as there."""
    with closing(_open(source, like)) as weights:
        return plan(weights, options, plans.HUGGING_FACE_SHARD).summary()


def quantize(
    source: Path,
    target: Path,
    options: Options,
    *,
    like: Path | None = None,
    largest_shard: int = plans.HUGGING_FACE_SHARD,
    device: torch.device | None = None,
    report: Report | None = None,
) -> Quantized:
    """Write the checkpoint in ``source``, Hugging Face or Megatron, as the quantized Hugging Face directory ``target``.

    ``like`` names a Hugging Face directory of the same model for a Megatron checkpoint that came without one;
    ``device`` is where matrices are encoded, the same bytes everywhere. Raises :class:`ConfigurationError` before
    anything is written for a target that exists, a checkpoint that is incomplete and a tensor that the recipe does not
    name or cannot store; later for NaN and infinity, and :class:`DiskFullError` for a full disk. What is whole by then
    is kept, and the same call goes on with it.
    """
    directions.refuse(target, source)
    with closing(_open(source, like)) as weights:
        made = plan(weights, options, largest_shard)
        place = device or torch.device("cpu")
        writer = Writer(weights, made.formats, options.layout, options.four_over_six, place)
        found: list[Summary] = []

        def finish(partial: PartialDirectory, checkpoint_id: str) -> None:
            if isinstance(weights, MegatronWeights):
                directions.check_promise(weights, weights.manifest.get("checkpoint_id"), checkpoint_id)
            found.append(_finish(made, partial, checkpoint_id))

        # The job's fingerprint covers the configuration it is given, and so every option.
        covered = {"config": made.companion.config, "rules": _rules(made), **options.to_json()}
        job = Job(weights, made.shards, writer, False, report)
        done = job.run(target, finish, replace(made.companion, config=covered))
        return Quantized(conversion=done, summary=found[0])


def dequantize(
    source: Path,
    target: Path,
    *,
    largest_shard: int = plans.HUGGING_FACE_SHARD,
    report: Report | None = None,
) -> Conversion:
    """Write the quantized directory ``source``, of either layout, as a Hugging Face directory that is not quantized.

    Matrices get the values of their codes and scales, computed in fp32 and rounded once to bf16; all other tensors
    are passed on. The result's checkpoint_id is of these values. Errors as of :func:`quantize`.
    """
    directions.refuse(target, source)
    with closing(QuantizedWeights(source)) as weights:
        companion = weights.companion
        _, _, expected = plans.expected_layouts(weights, companion, str(source))
        plans.check(weights, expected)
        shards = plans.hugging_face_shards(weights, expected, companion, largest_shard)
        files = {name: file for name, file in companion.files.items() if name not in (MANIFEST, PICTURE)}

        def finish(partial: PartialDirectory, checkpoint_id: str) -> None:
            sizes = {shard.file: [(item.name, item.entry.size) for item in shard.items] for shard in shards}
            _write_json(partial.path, companion.config, sizes)
            directions.copy_files(files, partial.path)

        return Job(weights, shards, write_tensor, False, report).run(target, finish, replace(companion, files=files))


def _open(source: Path, like: Path | None) -> HuggingFaceWeights | MegatronWeights:
    weights = inspection.open_weights(source, like)
    if like is not None and isinstance(weights, HuggingFaceWeights):
        raise ConfigurationError(
            f"--like {like}: {source} is a Hugging Face directory itself and has a configuration; leave the option out"
        )
    return weights


def _finish(made: Plan, partial: PartialDirectory, checkpoint_id: str) -> Summary:
    norms = {
        item.name: (norm[0], norm[1])
        for shard in made.shards
        for item, norm in zip(shard.items, partial.done[shard.file]["places"], strict=True)
    }
    summary = made.summary(norms)
    tensors = {s.file: [(name, entry.size) for outs in s.outputs for name, entry in outs] for s in made.shards}
    _write_json(partial.path, made.companion.config, tensors)
    directions.copy_files(made.companion.files, partial.path)
    manifest = {
        "format": 1,
        "source_checkpoint_id": checkpoint_id,
        **made.options.to_json(),
        "rules": _rules(made),
        "activations": "not calibrated; no input scales are stored",
        **summary.to_json(),
    }
    for name, tree in {**made.json_files, MANIFEST: manifest}.items():
        (partial.path / name).write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
    display.save(display.figure(summary, made.options.title), partial.path / PICTURE)
    return summary


def _rules(made: Plan) -> list[dict[str, Any]]:
    """The rows of the table that some tensor met."""
    return [asdict(rule) for rule in dict.fromkeys(made.rules.values())]


def _write_json(where: Path, tree: Mapping[str, Any], tensors: Mapping[str, list[tuple[str, int]]]) -> None:
    """``config.json`` and, for several files, the index of ``tensors``: name and bytes by file."""
    text = json.dumps(tree, indent=2, ensure_ascii=False) + "\n"
    (where / hugging_face_config.FILE).write_text(text, encoding="utf-8")
    if len(tensors) == 1:
        return
    placed = {name: file for file, found in tensors.items() for name, _ in found}
    total = sum(size for found in tensors.values() for _, size in found)
    index = {"metadata": {"total_size": total}, "weight_map": {name: placed[name] for name in sorted(placed)}}
    (where / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
