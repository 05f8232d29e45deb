"""What the weights in a directory answer greedily to held-out prompts, without a trainer around them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_mopd import checkpoint, display, evaluation, exchange, origins, presets, provenance, student
from megatron_mopd.config import Config
from megatron_mopd.parallel import Groups
from megatron_mopd.records import Prompt
from megatron_mopd.rollout import Sampler
from megatron_mopd.tokenizer import ChatTokenizer


def of_checkpoint(
    path: Path, config: Config, prompts: Sequence[Prompt], tokenizer: ChatTokenizer, groups: Groups
) -> dict[str, str]:
    """The greedy answers of the Hugging Face or Megatron directory ``path``; see :func:`evaluation.answers` and
    :func:`sampler_of`. MTP heads are not built."""
    sampler, one = sampler_of(path, config, tokenizer, groups)
    return evaluation.answers(
        sampler, prompts, tokenizer, groups, one.rollout.max_new_tokens, one.evaluation.batch_size
    )


def sampler_of(
    path: Path, config: Config, tokenizer: ChatTokenizer, groups: Groups, mtp: bool = False
) -> tuple[Sampler, Config]:
    """A sampler on the weights of the Hugging Face or Megatron directory ``path``, and ``config`` with its model.

    The model is the one that ``path`` says, whatever ``config.model`` has; MTP heads on request. A Hugging Face
    directory is converted as :func:`exchange.prepare` does. Raises :class:`ConfigurationError` for a directory that
    cannot be loaded, :class:`ProvenanceError` for weights that read another tokenizer's text. All ranks call it.
    """
    model = config.model.model_copy(
        update=dict.fromkeys(("preset", "pattern", "mamba_conv", "mamba_chunk")) | {"override": {}, "initial": path}
    )
    one = exchange.prepare(config.model_copy(update={"model": model, "teachers": {}}), groups)
    precision = presets.resolve_precision(one.run.precision, groups.device)
    built = student.build_model(one.model, one.parallel, groups, tokenizer.vocab_size, precision, mtp=mtp)
    assert one.model.initial is not None
    manifest = checkpoint.load_weights(one.model.initial, built, groups, tokenizer.vocab_size)
    reads = {"tokenizer_sha": tokenizer.tokenizer_sha, "template_sha": tokenizer.template_sha}
    provenance.check_manifest(manifest, {k: v for k, v in reads.items() if k in manifest}, where=str(path))
    display.note(groups.rank, f"{path}: {origins.summary(one.model)}")
    context, portion = one.model.max_sequence_length, one.rollout.prefill_tokens
    return Sampler(built, groups, context, tokenizer.vocab_size, portion), one
