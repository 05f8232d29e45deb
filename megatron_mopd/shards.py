"""What a step learned from, kept for inspection and replay: its scored rollouts and what the update made of them.

``run.dir/rollouts/step_0000012.safetensors`` holds the tensors and ``step_0000012.json`` the rest, both as
:mod:`megatron_mopd.in_flight` packs rollouts, all data-parallel ranks' in the order of the global batch. The JSON file
is written last and holds the sha256 of both, so a shard is there whole or not at all, and a damaged one is refused.
Teachers' hidden states, which no update reads, are left out.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError

from megatron_mopd import checkpoint_directory, in_flight
from megatron_mopd.config import Config, ConfigurationError
from megatron_mopd.files import WriteError, atomically, free
from megatron_mopd.metrics import untimed
from megatron_mopd.records import Rollout, ScoredRollout, UpdatedRollout

if TYPE_CHECKING:
    from megatron_mopd.parallel import Groups
    from megatron_mopd.update import StepOutput

FORMAT = 1
FOLDER = "rollouts"
SEQUENCE_ERROR = "sequence_error"
"""Reason of a rollout dropped by objective.sequence_error_threshold."""
STOPPED = "stopped"
"""Reason of all rollouts of a step that a guard stopped before its update; its header says why under the same name."""
_HEADER = re.compile(r"step_(\d{7,})\.json")


class ShardError(RuntimeError):
    """A shard could not be written; the step's update exists in memory alone and is repeated after a restart."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """One step's shard, read back."""

    path: Path
    header: Mapping[str, Any]
    """``step``; ``policy`` (whose weights met the update), ``teachers``, ``routing``, tokenizer and template hashes as
    in a checkpoint's manifest; ``layout``, ``objective`` and ``metrics`` of the step; ``weights_sha`` after it. Where a
    guard stopped the run before the update, ``stopped`` says why and ``metrics`` is empty."""
    rollouts: list[UpdatedRollout]  # the global batch


class Shards:
    """Writes a shard per step where ``rollout.shards`` asks for it; every rank makes one and calls it alike."""

    def __init__(self, config: Config, groups: Groups) -> None:
        self.config, self.groups = config, groups
        self.directory = config.run.dir / FOLDER
        self.keep = config.rollout.shards if config.source.type == "rollout" else 0
        self._step: int | None = None  # the last whose shard this process wrote, or whose place it cleared

    def write(
        self,
        describe: Callable[[], Mapping[str, Any]],
        rollouts: Sequence[in_flight.Item],
        outputs: Sequence[StepOutput],
        row: Mapping[str, float],
        weights_sha: Callable[[], str],
    ) -> None:
        """The shard of the step whose update has just been made; none where no shards are kept.

        ``describe()`` gives the header, with ``step``. ``rollouts`` are this data-parallel rank's, ``outputs`` what the
        update gave for those that no guard dropped, ``row`` the step's metrics. Shards of this step and later ones, of
        a future that was abandoned, go first, whether shards are kept now or not; then those that ``rollout.shards``
        does not keep. Raises :class:`ShardError` on all ranks.
        """
        if not self.keep:
            if self._step is None:  # what this process has not written itself can only be there once
                step = describe()["step"]
                self._on_first(step, self._clear)
                self._step = step
            return
        values = {name: float(value) for name, value in untimed(row).items()}
        header = describe()
        wanted = replayable(header["step"], self.config.checkpoint.every)
        left = {
            "metrics": {name: value if math.isfinite(value) else None for name, value in values.items()},
            "weights_sha": weights_sha() if wanted else None,
        }
        self._write({**header, **left}, updated(rollouts, outputs, threshold(self.config)))

    def of_stop(self, describe: Callable[[], Mapping[str, Any]], rollouts: Sequence[in_flight.Item], why: str) -> str:
        """Where the rollouts of a step that a guard stopped can be looked at, as a sentence equal on all ranks.

        Where the guard spoke before the update, and the step has no shard yet, one without values per token is written
        that says ``why``. What cannot be written becomes part of the sentence: the guard's own words matter more.
        """
        if not self.keep:
            return "With rollout.shards = 1 or more the rollouts of such a step are kept to be looked at"
        header = {**describe(), "metrics": {}, "weights_sha": None, STOPPED: why}
        step = header["step"]
        if self._step != step:
            try:
                self._write(header, [UpdatedRollout(item=_bare(item), dropped=STOPPED) for item in rollouts])
            except ShardError as error:
                return str(error)
        run = self.config.run.dir
        return f"Its rollouts are in {self.directory}: python tools/show_rollout.py {run} --step {step} shows them"

    def _write(self, header: Mapping[str, Any], items: Sequence[UpdatedRollout]) -> None:
        """One shard in place of what is there of its step and later ones."""
        full = {
            "format": FORMAT,
            **header,
            "objective": self.config.objective.model_dump(mode="json"),
            "layout": layout(self.config, self.groups),
        }
        batches = in_flight.gather([items], self.groups)

        def replace(step: int) -> None:
            self._clear(step)
            save(self.directory, step, full, batches[0])
            self._prune(step)

        self._on_first(header["step"], replace)
        self._step = header["step"]

    def _on_first(self, step: int, action: Callable[[int], None]) -> None:
        """``action(step)`` by the first rank; raises :class:`ShardError` on all where the disk refuses."""
        problem: list[str | None] = [None]
        if self.groups.rank == 0:
            try:
                action(step)
            except (OSError, WriteError) as error:
                problem = [self._explain(step, error.cause if isinstance(error, WriteError) else error)]
        dist.broadcast_object_list(problem, src=0, group=self.groups.world)
        if problem[0] is not None:
            raise ShardError(problem[0])

    def _clear(self, step: int) -> None:
        for other in steps(self.directory):
            if other >= step:
                remove(self.directory, other)

    def _prune(self, step: int) -> None:
        kept = {saved + 1 for saved in [0, *checkpoint_directory.steps(self.config.run.dir / "checkpoints")]}
        for other in steps(self.directory):
            if other <= step - self.keep and other not in kept:
                remove(self.directory, other)

    def _explain(self, step: int, error: OSError) -> str:
        if not self.keep:
            return (
                f"{self.directory}: the rollouts of steps from {step} on, which this run makes anew, could not be"
                f" removed: {type(error).__name__}: {error}; remove them, then start the same command again"
            )
        with suppress(OSError):  # the message must reach all ranks, whatever else the disk refuses
            for file in files(self.directory, step):
                file.unlink(missing_ok=True)
        saved = checkpoint_directory.latest(self.config.run.dir / "checkpoints")
        left = f"{saved} is untouched" if saved else "there is no checkpoint yet"
        return (
            f"{self.directory}: the rollouts of step {step} could not be written: {type(error).__name__}: {error};"
            f" {left}, earlier steps' rollouts are whole. {free(self.directory)}; make room, or lower"
            f" rollout.shards = {self.keep} (0 keeps none), then start the same command again: it goes on from the"
            " checkpoint and repeats the steps after it"
        )


def updated(
    rollouts: Sequence[in_flight.Item], outputs: Sequence[StepOutput], threshold: float | None = None
) -> list[UpdatedRollout]:
    """``rollouts`` with the values that the update gave to the tokens of those that no guard dropped, in order.

    ``threshold`` is objective.sequence_error_threshold: a rollout none of whose tokens counted and whose mean
    exp|log c_t| is above it was dropped for that.
    """
    pairs = [pair for output in outputs for pair in output.per_token]
    names = sorted({name for _, per_token in pairs for name in per_token})
    flat = {name: torch.cat([per_token[name].detach().cpu() for _, per_token in pairs]) for name in names}
    result: list[UpdatedRollout] = []
    start = 0
    for item in rollouts:
        bare = _bare(item)
        plain = rollout(item)
        if plain.dropped is not None:
            result.append(UpdatedRollout(item=bare, dropped=plain.dropped))
            continue
        stop = start + len(plain.completion)
        own = {name: values[start:stop].clone() for name, values in flat.items()}
        reason = SEQUENCE_ERROR if threshold is not None and _disagrees(own, threshold) else None
        result.append(UpdatedRollout(item=bare, per_token=own, dropped=reason))
        start = stop
    if any(len(values) != start for values in flat.values()):
        raise ValueError(
            f"the update gave values for {len(next(iter(flat.values())))} tokens, the rollouts have {start}"
        )
    return result


def _bare(item: in_flight.Item) -> in_flight.Item:
    return dataclasses.replace(item, teacher_hidden=None) if isinstance(item, ScoredRollout) else item


def threshold(config: Config) -> float | None:
    """objective.sequence_error_threshold, which other objectives than MOPD do not have."""
    return config.objective.sequence_error_threshold if config.objective.type == "mopd" else None


def _disagrees(per_token: Mapping[str, torch.Tensor], threshold: float) -> bool:
    c = per_token["importance"]
    return not bool(per_token["mask"].any()) and float(torch.maximum(c, 1 / c).mean()) > threshold


def rollout(item: in_flight.Kept) -> Rollout:
    """The sampled rollout inside."""
    inner = item.item if isinstance(item, UpdatedRollout) else item
    return inner.rollout if isinstance(inner, ScoredRollout) else inner


def values(kept: UpdatedRollout) -> dict[str, torch.Tensor]:
    """Everything known of each token, by name, ``[n]`` each."""
    plain = rollout(kept)
    found = {"completion": plain.completion, "behav_logprobs": plain.behav_logprobs, "policy_steps": plain.policy_steps}
    if isinstance(kept.item, ScoredRollout):
        found["teacher_logprobs"] = kept.item.teacher_logprobs
    return {name: tensor for name, tensor in found.items() if tensor is not None} | dict(kept.per_token)


def first_difference(one: UpdatedRollout, other: UpdatedRollout) -> str | None:
    """Which rollout, token and value differ first between two of the same place; None where nothing does.

    A NaN equals a NaN. Runs' names do not count.
    """
    a, b = rollout(one), rollout(other)
    where = f"rollout {a.sample} of prompt {a.prompt.id[:12]} ({a.prompt.domain})"
    if a.prompt.id != b.prompt.id or a.sample != b.sample:
        return f"{where}: the other is rollout {b.sample} of prompt {b.prompt.id[:12]} ({b.prompt.domain})"
    mine, theirs = values(one), values(other)
    if mine.keys() != theirs.keys():
        return f"{where}: {sorted(mine.keys() ^ theirs.keys())} is there on one side only"
    if len(a.completion) != len(b.completion):
        same = [bool(x == y) for x, y in zip(a.completion.tolist(), b.completion.tolist(), strict=False)]
        token = same.index(False) if False in same else len(same)
        return f"{where}: {len(a.completion)} and {len(b.completion)} tokens, different from token {token} on"
    unequal = {
        name: ((mine[name] != theirs[name]) & ~(mine[name].isnan() & theirs[name].isnan())).nonzero() for name in mine
    }
    if firsts := sorted((int(rows[0]), i, name) for i, (name, rows) in enumerate(unequal.items()) if len(rows)):
        token, _, name = firsts[0]
        return f"{where}, token {token}: {name} is {mine[name][token].item()!r} and {theirs[name][token].item()!r}"
    for name, x, y in _facts(one, other):
        if x != y:
            return f"{where}: {name} is {x!r} and {y!r}"
    return None


def _facts(one: UpdatedRollout, other: UpdatedRollout) -> Iterator[tuple[str, Any, Any]]:
    a, b = rollout(one), rollout(other)
    yield "dropped", one.dropped, other.dropped
    yield "finish", a.finish, b.finish
    yield "reward", a.reward, b.reward
    mine, theirs = (x.item.teacher if isinstance(x.item, ScoredRollout) else None for x in (one, other))
    yield "teacher", mine, theirs
    if a.provenance is not None and b.provenance is not None:
        here, there = dataclasses.asdict(a.provenance), dataclasses.asdict(b.provenance)
        for record in (here, there):
            record["policy"].pop("run_id")
        yield from ((f"provenance.{name}", here[name], there[name]) for name in here)


def replayable(step: int, every: int) -> bool:
    """Whether the weights before ``step`` are the run's first or those of a checkpoint, ``every`` so many steps."""
    return step == 1 or (every > 0 and (step - 1) % every == 0)


def layout(config: Config, groups: Groups) -> dict[str, Any]:
    """How the run is cut over ranks; the same layout repeats an update bit for bit."""
    return config.parallel.model_dump(mode="json") | {"world_size": groups.world_size}


def steps(directory: Path) -> list[int]:
    """The steps of the whole shards in ``directory``, in order."""
    found = (_HEADER.fullmatch(file.name) for file in directory.iterdir()) if directory.is_dir() else ()
    return sorted(int(match[1]) for match in found if match)


def files(directory: Path, step: int) -> tuple[Path, Path]:
    """Header and tensors of a step's shard."""
    return directory / f"step_{step:07d}.json", directory / f"step_{step:07d}.safetensors"


def remove(directory: Path, step: int) -> None:
    """Header first, without which the rest is no shard."""
    for file in files(directory, step):
        file.unlink(missing_ok=True)


def save(directory: Path, step: int, header: Mapping[str, Any], rollouts: Sequence[in_flight.Kept]) -> Path:
    """Write one shard; its header's path. Raises OSError or :class:`files.WriteError`."""
    tensors, records = in_flight.pack([rollouts])
    content = {"header": dict(header), **json.loads(records)}
    sums = {"tensors": hashlib.sha256(tensors).hexdigest(), "content": _sha(content)}
    first, second = files(directory, step)
    atomically(second, lambda file: file.write_bytes(tensors))
    atomically(first, lambda file: file.write_text(json.dumps({"sha256": sums, **content}) + "\n"))
    checkpoint_directory.sync(directory)
    return first


def read(directory: Path, step: int) -> Shard:
    """The shard of ``step``; raises :class:`ConfigurationError` for one that is missing or damaged."""
    first, second = files(directory, step)
    if not first.is_file():
        there = steps(directory)
        listed = f"steps {ranges(there)}" if there else "none; set rollout.shards to keep some"
        raise ConfigurationError(f"{first}: no such shard; {directory} holds {listed}")
    try:
        content = json.loads(first.read_text())
        sums = content.pop("sha256")
        tensors = second.read_bytes()
        for file, found, expected in (
            (first, _sha(content), sums["content"]),
            (second, hashlib.sha256(tensors).hexdigest(), sums["tensors"]),
        ):
            if found != expected:
                raise ConfigurationError(_damaged(file, step, f"its sha256 is {found[:12]}, not {expected[:12]}"))
        header = content.pop("header")
        if header["format"] != FORMAT:
            raise ConfigurationError(f"{first}: format {header['format']}; this program reads format {FORMAT}")
        (rollouts,) = in_flight.unpacked(tensors, json.dumps(content).encode())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        if isinstance(error, ConfigurationError):
            raise
        raise ConfigurationError(_damaged(first, step, repr(error))) from None
    return Shard(path=first, header=header, rollouts=rollouts)


def _damaged(file: Path, step: int, what: str) -> str:
    return (
        f"{file}: damaged: {what}; copy both files of step {step} again from their source, or remove them: the run goes"
        " on from its checkpoints without them, only this step can then be neither looked at nor replayed"
    )


def _sha(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def ranges(numbers: Sequence[int]) -> str:
    """``1, 3 to 5`` of sorted numbers."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][-1] == number - 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(str(p[0]) if len(p) == 1 else f"{p[0]} to {p[-1]}" for p in parts)
