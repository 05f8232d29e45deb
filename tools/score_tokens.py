"""Log-probabilities that a checkpoint gives to token sequences, on any layout.

    torchrun --nproc_per_node=$((N*M*K)) tools/score_tokens.py --checkpoint DIR --input tokens.jsonl
        --output scores.jsonl --tensor-parallel N --expert-parallel M --pipeline-parallel K

Input lines are {"id", "tokens"}, output lines {"id", "logprobs"} in the same order: natural logarithms in fp32, one for
each token after the first. DIR is a Megatron or a Hugging Face directory; the latter is converted once and kept beside
the output. Processes beyond N*M*K share the lines. Every line is checked before the first is scored, and an output that
exists is not overwritten.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from megatron_mopd import checkpoint, display, exchange, origins, parallel, presets, together, token_scores
from megatron_mopd.config import ConfigurationError, Model, Parallel, build_config
from megatron_mopd.conversion import hugging_face_config
from megatron_mopd.conversion.model_settings import model_settings
from megatron_mopd.parallel import Groups
from megatron_mopd.scoring import Scorer
from megatron_mopd.token_scores import Totals
from megatron_mopd.train import reported

MAX_TOKENS, MICRO_BATCH = 16384, 16
SEED = 0
"""Of weights that the checkpoint's take the place of."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    lines = (__doc__ or "").splitlines()
    top = argparse.ArgumentParser(description=lines[0], epilog=" ".join(lines[5:]))
    add = top.add_argument
    add("--checkpoint", type=Path, required=True, metavar="DIR", help="Megatron or Hugging Face directory")
    add("--input", type=Path, required=True, metavar="FILE", help='JSON lines {"id", "tokens"}')
    add("--output", type=Path, required=True, metavar="FILE", help='JSON lines {"id", "logprobs"}')
    for name in ("tensor", "expert", "pipeline"):
        add(f"--{name}-parallel", type=_positive, default=1, metavar="N", help=f"{name} parallel size; default 1")
    add("--micro-batch-size", type=_positive, default=MICRO_BATCH, metavar="N", help="sequences; default %(default)s")
    add(
        "--max-tokens",
        type=_positive,
        default=MAX_TOKENS,
        metavar="N",
        help="tokens that go through the model together, padding included, and the longest line; default %(default)s",
    )
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="auto: bf16 on a GPU, fp32 without")
    add("--impl", choices=("auto", "triton", "reference"), default="auto", help="form of the output layer's kernels")
    add("--cache", type=Path, metavar="DIR", help="converted Hugging Face directories; default beside the output")
    which = top.add_mutually_exclusive_group()
    which.add_argument(
        "--like", type=Path, metavar="HF_DIR", help="its config.json describes a checkpoint that does not"
    )
    which.add_argument("--preset", choices=tuple(presets.PRESETS), help="likewise, of published dimensions")
    return top


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: must be a whole number of at least 1")
    return int(text)


def model_of(path: Path, like: Path | None, preset: str | None) -> Model:
    """The model that the checkpoint at ``path`` holds."""
    found = origins.model_of(path)
    if found is not None:
        if like or preset:
            raise ConfigurationError(f"{path}: says itself which model it holds; leave --like and --preset out")
        return found
    if like is not None:
        return model_settings(hugging_face_config.read(like), str(like / hugging_face_config.FILE), blocks=0)
    if preset is not None:
        return Model.model_validate({"preset": preset, "vocab_size": presets.PRESETS[preset].vocab_size})
    raise ConfigurationError(
        f"{path}: was written by another program and does not say which model it holds; name a Hugging Face directory"
        f" of the same model with --like, or one of {', '.join(presets.PRESETS)} with --preset"
    )


def load(arguments: argparse.Namespace) -> tuple[Any, Scorer, Totals]:
    """The model with its weights on this rank's device, how it scores, and what is to be scored."""
    layout = Parallel(
        tensor=arguments.tensor_parallel, expert=arguments.expert_parallel, pipeline=arguments.pipeline_parallel
    )
    model = model_of(arguments.checkpoint, arguments.like, arguments.preset)
    stage = {"source": {"type": "dataset"}, "objective": {"type": "cross_entropy"}}
    stage |= {"run": {"dir": str(arguments.output.parent), "steps": 1}, "batching": {"sequences_per_step": 1}}
    config = build_config(stage).model_copy(update={"model": model, "parallel": layout})
    presets.check(config)  # whether this layout can hold this model
    groups = parallel.initialize(layout, SEED)
    scorer = Scorer(
        groups=groups,
        parallel=layout,
        vocab_size=presets.resolve(model).vocab_size,
        pad_token=0,
        micro_batch_size=arguments.micro_batch_size,
        max_tokens=arguments.max_tokens,
        impl=arguments.impl,
    )
    totals = check_files(arguments, scorer)
    path = arguments.checkpoint
    if origins.is_hugging_face(path):
        path = exchange.converted(path, arguments.cache or arguments.output.parent / "converted", groups)
    built = scorer.build(model, arguments.precision, "this checkpoint")
    manifest = checkpoint.load_weights(path, built, groups, scorer.vocab_size)
    display.note(groups.rank, f"{arguments.checkpoint}: {origins.summary(model)}")
    display.note(groups.rank, f"checkpoint_id {manifest['checkpoint_id']}")
    return built, scorer, totals


def check_files(arguments: argparse.Namespace, scorer: Scorer) -> Totals:
    """Refuse files on all ranks, before weights are converted or loaded; what there is to score."""
    found: list[Any] = [None]

    def look(report: together.Report) -> None:
        if arguments.output.exists():
            raise ConfigurationError(
                f"{arguments.output}: exists already and is not overwritten; name another or remove it first"
            )
        if not os.access(arguments.output.parent, os.W_OK):
            raise ConfigurationError(f"{arguments.output.parent}: no directory that can be written; name another")
        found[0] = token_scores.check(arguments.input, scorer)

    together.work(scorer.groups, scorer.groups.rank == 0, look)
    dist.broadcast_object_list(found, src=0, group=scorer.groups.world)
    return found[0]


@contextmanager
def bar(groups: Groups, total: int) -> Iterator[Callable[[int], Any]]:
    """A progress bar in tokens, on standard error of the first rank."""
    if groups.rank != 0:
        yield lambda tokens: None
        return
    columns = (TextColumn("tokens"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[speed]}"))
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        begin, task = time.perf_counter(), progress.add_task("", total=total, speed="")

        def show(tokens: int) -> None:
            speed = tokens / (time.perf_counter() - begin)
            progress.update(task, completed=tokens, speed=f"{speed:,.0f} tokens/s")

        yield show


def main() -> None:
    arguments = parser().parse_args()
    display.setup_logging(int(os.environ.get("RANK", "0")))
    with reported():
        model, scorer, totals = load(arguments)
        begin = time.perf_counter()
        with bar(scorer.groups, totals.tokens) as show:
            token_scores.score_file(arguments.input, arguments.output, model, scorer, show)
        seconds = time.perf_counter() - begin
        display.note(
            scorer.groups.rank,
            f"{arguments.output}: {totals.lines:,} sequences, {totals.tokens:,} tokens in {seconds:.1f} s,"
            f" {totals.tokens / seconds:,.0f} tokens/s",
        )


if __name__ == "__main__":
    main()
