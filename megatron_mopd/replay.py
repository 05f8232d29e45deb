"""An update made again: from the checkpoint before a step and the step's shard, compared bit for bit with what was.

What a run learned can then be questioned after the fact: which rollouts, scores and masks moved the weights how. On
the layout that the run had, everything is equal to the last bit; a difference says that the shard, the checkpoint, a
setting or the program has changed since.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_mopd import checkpoint, checkpoint_directory, in_flight, provenance, shards
from megatron_mopd.asynchrony_config import Asynchrony
from megatron_mopd.config import Config, ConfigurationError
from megatron_mopd.metrics import untimed
from megatron_mopd.parallel import Groups
from megatron_mopd.records import UpdatedRollout
from megatron_mopd.trainer import Trainer


@dataclass(frozen=True, kw_only=True, slots=True)
class Replay:
    """What a replayed step gave; equal on all ranks."""

    step: int
    tokens: int  # completion tokens of the global batch
    metrics: Mapping[str, float]
    weights: str | None  # checkpoint_id of the run's checkpoint of this step, to which the weights were compared
    compared: tuple[str, ...]  # what was compared
    differences: tuple[str, ...]  # empty where the update is identical


def replay(config: Config, groups: Groups, step: int) -> Replay:
    """Run the update of ``step`` of the run in ``config.run.dir`` again; nothing is written there.

    Every rank calls it alike, on the layout of the run. Raises :class:`ConfigurationError` for a shard or checkpoint
    that is missing or damaged and for another layout, :class:`provenance.ProvenanceError` where run and shard
    contradict.
    """
    root = config.run.dir / "checkpoints"
    directory = config.run.dir / shards.FOLDER
    shard = shards.read(directory, step)
    if (why := shard.header.get("stopped")) is not None:
        raise ConfigurationError(
            f"{shard.path}: a guard stopped the run before the update of step {step}, so there is nothing to repeat;"
            f" look at the rollouts with python tools/show_rollout.py {config.run.dir} --step {step}. The guard said:"
            f" {why}"
        )
    _check_layout(shard, config, groups)
    if step > 1 and step - 1 not in checkpoint_directory.steps(root):
        raise ConfigurationError(_no_checkpoint(root, directory, step))
    quiet = {
        "rollout": config.rollout.model_copy(update={"shards": 0}),
        "asynchrony": Asynchrony(),  # nothing is collected
    }
    trainer = Trainer(config.model_copy(update=quiet), groups)
    if step > 1:
        trainer.resume(step - 1)
    own = in_flight.share(shard.rollouts, groups.dp_rank, groups.dp_size)
    rollouts = [kept.item for kept in own]
    provenance.check(rollouts, trainer.policy, config.rollout.lag, trainer.tokenizer, trainer.teachers)
    row, outputs = trainer.learn(rollouts)
    provenance.check_manifest(shard.header, trainer.header(step), where=str(shard.path))
    again = shards.updated(rollouts, outputs, shards.threshold(config))
    found = [*_metrics(shard.header["metrics"], row), *_everywhere(_tokens(own, again), groups)]
    weights, different = _weights(trainer, shard, root)
    known = weights is not None or shard.header["weights_sha"] is not None
    return Replay(
        step=step,
        tokens=sum(len(shards.rollout(kept).completion) for kept in shard.rollouts),
        metrics=untimed(row),
        weights=weights,
        compared=("metrics", "values per token", *(("weights",) if known else ())),
        differences=(*found, *different),
    )


def _check_layout(shard: shards.Shard, config: Config, groups: Groups) -> None:
    wanted, found = shard.header["layout"], shards.layout(config, groups)
    if changed := [f"{name} = {found[name]}, not {wanted[name]}" for name in wanted if wanted[name] != found[name]]:
        raise ConfigurationError(
            f"{shard.path}: written on another layout (here {', '.join(changed)}), and only the same one repeats an"
            f" update bit for bit; start with torchrun --nproc_per_node={wanted['world_size']} and the run's settings"
            " under parallel"
        )


def _no_checkpoint(root: Path, directory: Path, step: int) -> str:
    saved = checkpoint_directory.steps(root)
    can = [s for s in shards.steps(directory) if s == 1 or s - 1 in saved]
    return (
        f"{root}: the weights before step {step} are those of checkpoint {step - 1}, which is not there; it holds steps"
        f" {shards.ranges(saved) or 'none'}, and {directory} shards of steps {shards.ranges(shards.steps(directory))}."
        f" Steps that can be replayed: {shards.ranges(can) or 'none'}; checkpoint.every and checkpoint.keep decide"
    )


def _metrics(recorded: Mapping[str, float | None], row: Mapping[str, float]) -> list[str]:
    now = {name: value if math.isfinite(value) else None for name, value in untimed(row).items()}
    names = sorted(recorded.keys() | now.keys(), key=lambda name: (name != "loss", name != "grad_norm", name))
    return [
        f"{name} was {recorded.get(name)!r} and is {now.get(name)!r}"
        for name in names
        if recorded.get(name) != now.get(name)
    ]


def _tokens(before: Sequence[UpdatedRollout], now: Sequence[UpdatedRollout]) -> list[str]:
    """The first differing token of each rollout that differs."""
    found: list[str] = []
    for one, other in zip(before, now, strict=True):
        if (difference := shards.first_difference(one, other)) is not None:
            found.append(difference)
    return found


def _everywhere(own: list[str], groups: Groups) -> list[str]:
    """All ranks' findings, those of several ranks once."""
    shares: list[Any] = [None] * groups.world_size
    dist.all_gather_object(shares, own, group=groups.world)
    return list(dict.fromkeys(text for share in shares for text in share))


def _weights(trainer: Trainer, shard: shards.Shard, root: Path) -> tuple[str | None, list[str]]:
    """The checkpoint_id that the run wrote after the step, and what is wrong with the weights made again."""
    found, step = trainer.learner.weights_sha(), shard.header["step"]
    recorded = shard.header["weights_sha"]
    wrong = [] if recorded in (None, found) else [f"the weights have sha256 {found[:12]}, recorded is {recorded[:12]}"]
    if step not in checkpoint_directory.steps(root):
        return None, wrong
    path = checkpoint_directory.place(root, step)
    with trainer.learner.originals():
        written = checkpoint.load_weights(path, trainer.learner.model, trainer.groups)["checkpoint_id"]
    if trainer.learner.weights_sha() != found:
        wrong.append(f"the weights are not those of {path} (checkpoint {written[:12]})")
    return written, wrong
