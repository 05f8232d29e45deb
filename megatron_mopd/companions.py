"""What a run's checkpoints carry so that they become Hugging Face directories without a source: configuration, spelling
of the tensors, tokenizer and the other files beside the weights, from stage to stage.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch.distributed as dist

from megatron_mopd import checkpoint_directory, together
from megatron_mopd.config import Model
from megatron_mopd.conversion.megatron_weights import companion_of, describe
from megatron_mopd.conversion.model_settings import config_of, stored_blocks
from megatron_mopd.conversion.weights import Companion
from megatron_mopd.parallel import Groups
from megatron_mopd.tokenizer import ChatTokenizer

logger = logging.getLogger(__name__)

DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
_GENERATION = "generation_config.json"
_TEXT = ("tokenizer", "chat_template", "special_tokens_map", "vocab.", "merges.", "added_tokens")
"""Beginnings of the names of a tokenizer's files."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Companions:
    """The manifest's entry and the files it names; neither for a model that Hugging Face's format cannot hold."""

    entry: dict[str, Any] | None = None
    files: Mapping[str, bytes] = field(default_factory=dict)  # content by relative name; on the first rank

    @property
    def manifest(self) -> dict[str, Any]:
        """The manifest's lines."""
        return {} if self.entry is None else {checkpoint_directory.COMPANIONS: self.entry}


def of_run(
    model: Model, initial: Mapping[str, Any], tokenizer: ChatTokenizer, precision: str, groups: Groups
) -> Companions:
    """What the checkpoints of a run carry that starts from ``model.initial``, whose manifest is ``initial``.

    Configuration and files come from there; for weights that came from no Hugging Face directory the configuration is
    made of ``model``. ``dtype`` becomes the run's where that is another than the source's, the tokenizer is the run's.
    The first rank reads for all.
    """
    found = Companions()

    def read(report: together.Report) -> None:
        nonlocal found
        found = _read(model, initial, tokenizer, precision)

    together.work(groups, groups.rank == 0, read)
    entry: list[Any] = [found.entry]
    dist.broadcast_object_list(entry, src=0, group=groups.world)
    return Companions(entry=entry[0], files=found.files)


def _read(model: Model, initial: Mapping[str, Any], tokenizer: ChatTokenizer, precision: str) -> Companions:
    source = None
    if model.initial is not None:
        source = companion_of(checkpoint_directory.resolve(model.initial), initial)
    if source is None:
        tokens = {"pad_token_id": tokenizer.pad_token, "bos_token_id": None, "eos_token_id": _ends(tokenizer)}
        drawn = model.model_copy(update={"vocab_size": tokenizer.vocab_size})
        made = config_of(drawn, tokens | {"dtype": DTYPES[precision]})
        if made is None:
            logger.warning(
                "model.override changes what the layers compute, which config.json of nemotron_h cannot say:"
                " checkpoints become Hugging Face directories with --like only"
            )
            return Companions()
        source = Companion(config=made)
    config = source.config
    stored = initial.get("source_dtypes", {}).get("embedding.word_embeddings.weight")
    if stored is not None and stored != DTYPES[precision]:
        keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]
        config = config | dict.fromkeys(keys, DTYPES[precision])
        logger.info("weights came in %s and are kept in %s; config.json will say so", stored, DTYPES[precision])
    if config.get("tie_word_embeddings") and not source.tied:
        config = config | {"tie_word_embeddings": False}
        logger.warning("the output weight is trained apart from the embedding: tie_word_embeddings is now false")
    blocks = stored_blocks(model)
    if blocks == 0 and config.get("num_nextn_predict_layers"):
        logger.warning(
            "trained without MTP heads: an export holds no MTP weights although its config.json promises some"
        )
    files = {name: file.read_bytes() for name, file in source.files.items()}
    if initial.get("tokenizer_sha") != tokenizer.tokenizer_sha or not any(n.startswith("tokenizer") for n in files):
        if model.initial is not None:
            logger.info("%s came without a tokenizer: checkpoints carry the run's", model.initial)
        files = _with_tokenizer(files, tokenizer)
    companion = Companion(
        config=config,
        prefix=source.prefix,
        fused=source.fused,
        tied=source.tied,
        files=dict.fromkeys(files, Path()),
    )
    return Companions(entry=describe(companion, blocks), files=files)


def _with_tokenizer(files: Mapping[str, bytes], tokenizer: ChatTokenizer) -> dict[str, bytes]:
    """``files`` with the run's tokenizer, chat template and stop tokens in place of any other."""
    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        own = {p.relative_to(folder).as_posix(): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}
    generation = json.loads(files.get(_GENERATION, b"{}"))
    generation |= {"eos_token_id": _ends(tokenizer), "pad_token_id": tokenizer.pad_token}
    others = {name: content for name, content in files.items() if not name.startswith(_TEXT)}
    return others | own | {_GENERATION: (json.dumps(generation, indent=2) + "\n").encode()}


def _ends(tokenizer: ChatTokenizer) -> int | list[int]:
    ends = list(tokenizer.stop_tokens)
    return ends[0] if len(ends) == 1 else ends
