"""A quantize stage: the student stored in few bits, turned back and measured on the prompts of every other stage."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

from megatron_mopd import answering, checkpoint_directory, evaluation, peak_memory, together
from megatron_mopd.config import Config, ConfigurationError
from megatron_mopd.display import TransferProgress, note
from megatron_mopd.parallel import Groups
from megatron_mopd.prompts import load_prompts
from megatron_mopd.quantization import checkpoint as quantized_checkpoint
from megatron_mopd.quantization import recipes
from megatron_mopd.quantization.planning import Options
from megatron_mopd.recipe.schema import QuantizeSettings
from megatron_mopd.tokenizer import build_tokenizer
from megatron_mopd.train import leave, versions

FOLDER = "quantized"
"""Of the stage's directory, with what is kept: a Hugging Face directory for vLLM, SGLang or TensorRT-LLM."""
_BACK = "dequantized"
_CACHE = "converted"
_ANEW = "move that directory away and start the same command again, which writes it anew"


def run_stage(config: Config, settings: QuantizeSettings, groups: Groups, title: str) -> None:
    """Store ``config.model.initial``, a Megatron directory, as ``quantized`` in ``run.dir``; measure its answers.

    ``result.json`` has the keys of every stage that is measured and ``quantized``: the settings and what
    ``mopd_quantization.json`` says of bytes, bits and errors. The values that the codes stand for are written in
    bfloat16 beside it, measured and removed again. The same call goes on with what a killed one left. Raises
    :class:`ConfigurationError` on all ranks for weights that cannot be stored so, a full disk included.
    """
    peak_memory.restart(groups.device)
    start = time.perf_counter()
    directory = config.run.dir
    if not (directory / "result.json").is_file():
        assert config.model.initial is not None, "a quantize stage has an initial"
        _write(config.model.initial, directory, settings, groups)
        manifest = checkpoint_directory.read_json(directory / FOLDER / quantized_checkpoint.MANIFEST, _ANEW)
        result = _measure(config, groups) if config.data.held_out else {}
        kept = ("bits_per_element", "parameters", "source_bytes", "stored_bytes", "groups")
        result["quantized"] = settings.model_dump(mode="json") | {name: manifest[name] for name in kept}
        result["quantized"]["source_checkpoint_id"] = manifest["source_checkpoint_id"]
        result |= {"history": [], "parallel": config.parallel.model_dump(), "seed": config.run.seed}
        result |= {"wall_s": time.perf_counter() - start, "versions": versions()} | peak_memory.peak(groups)
        leave(directory / "result.json", result, groups)
        size = f"{manifest['source_bytes']:,} bytes become {manifest['stored_bytes']:,}"
        note(groups.rank, f"{title}: {size}, {manifest['bits_per_element']:.3f} bits per element")

    def clear(report: together.Report) -> None:
        for name in (_BACK, _CACHE):
            shutil.rmtree(directory / name, ignore_errors=True)

    together.work(groups, groups.rank == 0, clear)


def _write(source: Path, directory: Path, settings: QuantizeSettings, groups: Groups) -> None:
    """``quantized`` and ``dequantized`` in ``directory``, each whole or not at all, by the first rank."""
    options = Options(
        recipe=recipes.load(settings.recipe), layout=settings.layout, four_over_six=settings.four_over_six
    )
    target, back = directory / FOLDER, directory / _BACK

    def quantize(report: together.Report) -> None:
        if not target.is_dir():
            quantized_checkpoint.quantize(source, target, options, device=groups.device, report=report)
        written = checkpoint_directory.read_json(target / quantized_checkpoint.MANIFEST, _ANEW)
        ours = checkpoint_directory.read_manifest(source).get("checkpoint_id", written["source_checkpoint_id"])
        if written["source_checkpoint_id"] != ours:
            raise ConfigurationError(
                f"{target}: was made of the weights {written['source_checkpoint_id'][:12]}, {source} holds {ours[:12]};"
                " move it away"
            )

    def dequantize(report: together.Report) -> None:
        if not back.is_dir():
            quantized_checkpoint.dequantize(target, back, report=report)

    for action, what in ((quantize, target), (dequantize, back)):
        with TransferProgress(f"writing {what}", enabled=groups.rank == 0) as progress:
            together.work(groups, groups.rank == 0, action, progress.update)


def _measure(config: Config, groups: Groups) -> dict[str, Any]:
    """Greedy answers of the stored values, as :meth:`Trainer.measure` leaves them for other stages."""
    tokenizer = build_tokenizer(config.tokenizer)
    loaded = load_prompts(config.data.held_out, tokenizer, config.model.max_sequence_length, need_verifier=True)
    prompts = evaluation.held_out(loaded, config.evaluation.final_samples)
    start = time.perf_counter()
    cached = config.checkpoint.model_copy(update={"cache": config.run.dir / _CACHE})
    config = config.model_copy(update={"checkpoint": cached})
    answers = answering.of_checkpoint(config.run.dir / _BACK, config, prompts, tokenizer, groups)
    return evaluation.result(answers, prompts) | {"measure_s": time.perf_counter() - start}
