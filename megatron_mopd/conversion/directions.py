"""Converts ``nemotron_h`` checkpoints between Hugging Face and Megatron directories, byte for byte, without a model.

Weights are streamed (:mod:`megatron_mopd.conversion.jobs` states the memory they take), and each tensor's sha256 is
taken on the way, so the ``checkpoint_id`` costs no second reading.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_mopd import checkpoint_directory, names
from megatron_mopd.checkpoint_directory import COMPANIONS
from megatron_mopd.config import ConfigurationError
from megatron_mopd.conversion import hugging_face_config, plans, torch_dist_writer
from megatron_mopd.conversion import weights as views
from megatron_mopd.conversion.hugging_face import INDEX, HuggingFaceWeights
from megatron_mopd.conversion.hugging_face_config import Architecture
from megatron_mopd.conversion.jobs import Conversion, Job, Report, write_chunk, write_tensor
from megatron_mopd.conversion.megatron_weights import MegatronWeights, describe
from megatron_mopd.conversion.partial_directory import PartialDirectory, refuse_existing
from megatron_mopd.conversion.plans import Shard
from megatron_mopd.conversion.weights import EMBEDDING, HEAD, Companion
from megatron_mopd.data_config import Tokenizer
from megatron_mopd.torch_dist import Chunk, Stored

logger = logging.getLogger(__name__)

RELEASE = "release"
"""Megatron-LM's name for a checkpoint that belongs to no iteration; its pointer file must not say 0."""


def hugging_face_to_megatron(
    source: Path,
    target: Path,
    *,
    shards: int | None = None,
    allow_nan: bool = False,
    without_mtp: bool = False,
    report: Report | None = None,
) -> Conversion:
    """Write the Hugging Face directory ``source`` as the Megatron directory ``target``.

    ``target/release`` is what Megatron-LM starts from and :func:`megatron_mopd.checkpoint.load_weights` loads at any
    layout; ``shards`` sets the number of ``.distcp`` files. Raises :class:`ConfigurationError` before anything is
    written, naming every tensor that is missing, unknown, double, misshapen or damaged; later, for NaN and for a full
    disk, what is whole is kept and the same call goes on with it.
    """
    refuse(target, source)
    with closing(HuggingFaceWeights(source)) as weights:
        if weights.companion.config.get("quantization_config"):
            raise ConfigurationError(
                f"{source}: is quantized, and a model computes with its values; write those with"
                f" python tools/quantize_checkpoint.py {source} OUT --dequantize and convert OUT"
            )
        origin = str(source / hugging_face_config.FILE)
        model, shapes, expected = plans.expected_layouts(weights, weights.companion, origin, without_mtp=without_mtp)
        plans.check(weights, expected, without_mtp=without_mtp)
        plan = plans.megatron_shards(weights, shapes, expected, shards)
        _select(weights, expected)
        files = [f"{RELEASE}/{shard.file}" for shard in plan]
        plan = [Shard(name, shard.items) for name, shard in zip(files, plan, strict=True)]

        def finish(partial: PartialDirectory, checkpoint_id: str) -> None:
            tensors = _stored(plan, partial.done, shapes, weights)
            where = partial.path / RELEASE
            common = {"iteration": 0, "checkpoint_version": 3.0}
            states = names.extra_states(shapes)
            torch_dist_writer.write_rest(where, tensors, common, f"__{len(plan)}_0.distcp", states)
            copy_files(weights.companion.files, where / COMPANIONS)
            manifest = _manifest(checkpoint_id, model, tensors, weights.companion) | _text_format(source)
            (where / checkpoint_directory.MANIFEST).write_text(json.dumps(manifest, indent=1))
            (partial.path / checkpoint_directory.POINTER).write_text(RELEASE)

        job = Job(weights, plan, write_chunk, allow_nan, report)
        return job.run(target, finish, weights.companion)


def megatron_to_hugging_face(
    source: Path,
    target: Path,
    *,
    like: Path | None = None,
    largest_shard: int = plans.HUGGING_FACE_SHARD,
    allow_nan: bool = False,
    without_mtp: bool = False,
    report: Report | None = None,
) -> Conversion:
    """Write the newest checkpoint of the Megatron directory ``source`` as the Hugging Face directory ``target``.

    Configuration, tokenizer and spelling come from the checkpoint's manifest, or from the Hugging Face directory
    ``like`` for one that came without. Errors as in :func:`hugging_face_to_megatron`; tensors that are not what the
    manifest's ``checkpoint_id`` says are an error, too.
    """
    refuse(target, like)
    with closing(MegatronWeights(source, like)) as weights:
        if weights.companion is None:
            raise ConfigurationError(
                f"{weights.path}: says nothing of a Hugging Face configuration (no {checkpoint_directory.MANIFEST} of a"
                " converted checkpoint); name a Hugging Face directory of the same model with --like"
            )
        origin = str(like or weights.path)
        _, _, expected = plans.expected_layouts(weights, weights.companion, origin, without_mtp=without_mtp)
        plans.check(weights, expected, without_mtp=without_mtp)
        companion = tie(weights, weights.companion)
        dropped = _select(weights, expected)
        plan = plans.hugging_face_shards(weights, expected, companion, largest_shard)
        promised = None if dropped else weights.manifest.get("checkpoint_id")

        def finish(partial: PartialDirectory, checkpoint_id: str) -> None:
            check_promise(weights, promised, checkpoint_id)
            if len(plan) > 1:
                (partial.path / INDEX).write_text(json.dumps(_index(plan), indent=2) + "\n")
            text = json.dumps(companion.config, indent=2, ensure_ascii=False)
            (partial.path / hugging_face_config.FILE).write_text(text + "\n", encoding="utf-8")
            copy_files(companion.files, partial.path)

        job = Job(weights, plan, write_tensor, allow_nan, report)
        skipped = {"optimizer tensors": weights.optimizer_tensors, "objects": weights.objects}
        return job.run(target, finish, companion, skipped)


def refuse(target: Path, source: Path | None) -> None:
    """Refuse a target that exists, or that lies in the directory whose files it would take along."""
    refuse_existing(target)
    if source is not None and source.resolve() in target.resolve().parents:
        raise ConfigurationError(f"{target}: lies inside {source}, whose files go along; name a directory outside")


def _select(weights: HuggingFaceWeights | MegatronWeights, expected: Mapping[str, Any]) -> bool:
    """Leave in the view what is converted (all but MTP, on request); whether anything went."""
    gone = weights.entries.keys() - expected.keys()
    for name in gone:
        del weights.entries[name]
    return bool(gone)


def _stored(
    plan: Sequence[Shard],
    done: Mapping[str, Mapping[str, Any]],
    shapes: Mapping[str, tuple[int, ...]],
    weights: HuggingFaceWeights,
) -> dict[str, Stored]:
    """What ``.metadata`` says of the chunks that were written."""
    chunks: dict[str, list[Chunk]] = {}
    dtypes = {}
    for shard in plan:
        for item, (start, length) in zip(shard.items, done[shard.file]["places"], strict=True):
            chunk = Chunk(item.offset, item.entry.shape, Path(shard.file).name, start, length)
            chunks.setdefault(item.name, []).append(chunk)
            dtypes[item.name] = item.entry.dtype
    tensors = {name: Stored(shapes[name], dtypes[name], tuple(found)) for name, found in chunks.items()}
    if weights.aliases.get(HEAD) == EMBEDDING:
        tensors["output_layer.weight"] = tensors["embedding.word_embeddings.weight"]
    return tensors


def _manifest(
    checkpoint_id: str, model: Architecture, tensors: Mapping[str, Stored], companion: Companion
) -> dict[str, Any]:
    preset = model.preset
    return {
        "format": 1,
        "step": 0,
        "checkpoint_id": checkpoint_id,
        "vocab_size": preset.vocab_size,
        "query_groups": preset.num_query_groups,
        "architecture": {
            "hidden_size": preset.hidden_size,
            "num_layers": len(model.main),
            "num_attention_heads": preset.num_attention_heads,
            "kv_channels": preset.kv_channels,
            "num_moe_experts": preset.num_moe_experts,
            "mtp_num_layers": preset.pattern.count("/") or None,
        },
        "source_dtypes": {name: str(stored.dtype).removeprefix("torch.") for name, stored in tensors.items()},
        COMPANIONS: describe(companion, model.blocks),
    }


def _text_format(source: Path) -> dict[str, str]:
    """The hashes of tokenizer and chat template, by which the trainer tells whether a teacher reads the same text."""
    if not any((source / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        return {}
    from megatron_mopd.tokenizer import build_tokenizer

    try:
        tokenizer = build_tokenizer(Tokenizer(type="huggingface", path=source))
    except ConfigurationError as error:
        logger.warning("the manifest will name no tokenizer: %s", error)
        return {}
    return {"tokenizer_sha": tokenizer.tokenizer_sha, "template_sha": tokenizer.template_sha}


def check_promise(weights: MegatronWeights, promised: str | None, checkpoint_id: str) -> None:
    """Refuse tensors that are not what the manifest's ``checkpoint_id``, where there is one, says."""
    if promised not in (None, checkpoint_id):
        raise ConfigurationError(
            f"{weights.path}: {checkpoint_directory.MANIFEST} says checkpoint_id {promised[:12]}, the tensors"
            f" give {checkpoint_id[:12]}; one of the two was exchanged or damaged: take them from their source"
        )


def tie(weights: MegatronWeights, companion: Companion) -> Companion:
    """``companion`` with the head tied as the weights have it.

    A head that is no longer the embedding, trained apart by a program that knows no tying, is stored, and the
    configuration says so. One that its Hugging Face directory stored although it says tied stays as it was.
    """
    if not companion.config.get("tie_word_embeddings") or HEAD not in weights.entries:
        return companion
    if weights.aliases.get(HEAD) == EMBEDDING:
        return replace(companion, tied=True)
    if COMPANIONS in weights.manifest and not companion.tied:
        return companion
    if weights.entries[HEAD] == weights.entries[EMBEDDING] and views.equal(weights, HEAD, weights, EMBEDDING):
        weights.aliases[HEAD] = EMBEDDING
        return replace(companion, tied=True)
    logger.warning("%s: the output weight is not the embedding; tie_word_embeddings is now false", weights.path)
    return replace(companion, tied=False, config=companion.config | {"tie_word_embeddings": False})


def _index(plan: Sequence[Shard]) -> dict[str, Any]:
    placed = {item.name: shard.file for shard in plan for item in shard.items}
    total = sum(item.entry.size for shard in plan for item in shard.items)
    return {"metadata": {"total_size": total}, "weight_map": {name: placed[name] for name in sorted(placed)}}


def copy_files(files: Mapping[str, Path], target: Path) -> None:
    """Copy what lies beside a checkpoint's weights into the directory ``target``, by relative name."""
    for name, file in files.items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target / name)
