"""Checkpoints through mcore's distributed checkpointing: written whole or not at all, loadable on another layout.

``iter_0000123/`` holds what Megatron-LM writes (``.metadata``, ``*.distcp``, ``metadata.json``, ``common.pt``) and
beside it ``mopd_manifest.json`` (whose weights these are), ``mopd_state.json`` (where the run stands) and the rollouts
in flight. Learning rates are not restored: they belong to the schedule, whose state is the caller's. Loading reads no
pickle but ``.metadata``, and that through an allow-list (:mod:`megatron_mopd.torch_dist`).
"""

from __future__ import annotations

import io
import json
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingConfig, CheckpointingException, save_config
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies import torch as mcore_torch
from megatron.core.utils import unwrap_model
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save as torch_save

from megatron_mopd import checkpoint_directory as directory
from megatron_mopd import identity, in_flight, names, sharded_state, torch_dist
from megatron_mopd.checkpoint_directory import COMPANIONS, latest, read_manifest
from megatron_mopd.config import ConfigurationError
from megatron_mopd.files import free
from megatron_mopd.parallel import Groups

__all__ = ["COMPANIONS", "CheckpointError", "Resume", "latest", "load", "load_weights", "read_manifest", "save"]

logger = logging.getLogger(__name__)

STATE = "mopd_state.json"
_FAILURES = (OSError, RuntimeError, ValueError, CheckpointingException)


class CheckpointError(RuntimeError):
    """A checkpoint could not be written; the previous one is as it was."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Resume:
    """What :func:`load` gives back beside the weights and the optimizer's state."""

    step: int
    state: dict[str, Any]
    rollouts: list[list[in_flight.Item]]  # this data-parallel rank's share of each batch in flight
    manifest: dict[str, Any]


def save(
    root: Path,
    step: int,
    model: Any,
    optimizer: Any | None,
    groups: Groups,
    *,
    state: Mapping[str, Any],
    manifest: Mapping[str, Any],
    rollouts: Sequence[Sequence[in_flight.Item]] = (),
    companions: Mapping[str, bytes] | None = None,
    keep: int = 2,
    room: str = "lower checkpoint.keep",
) -> Path:
    """Write the checkpoint of ``step`` under ``root``; every rank calls it with its own ``rollouts``, batch by batch.

    ``state`` and ``manifest`` are JSON; ``manifest["vocab_size"]`` is rows before padding, which the identity skips.
    ``companions`` are the files of a Hugging Face directory beside its weights, by relative name; the first rank's are
    kept. The manifest gains ``checkpoint_id``, ``step``, ``query_groups``, ``architecture`` and ``source_dtypes``. The
    newest ``keep`` checkpoints stay. Raises :class:`CheckpointError` on all ranks when any rank fails, which ends with
    ``room``, how less of a full disk would be needed; the previous checkpoint is then untouched and what was written is
    removed.
    """
    module: Any = unwrap_model(model)
    target = directory.partial(root, step)
    try:
        tensors = {"iteration": step, "checkpoint_version": 3.0} | sharded_state.of(module, optimizer, groups)
        _on_first(groups, lambda: directory.prepare(root, step))
        sharded, common = _together(groups, lambda: _preprocess(tensors))
        sharded["common_state"] = ShardedObject("common_state", common, (1,), (0,), replica_id=groups.rank)
        _together(groups, lambda: _SynchronousSave().save(sharded, target))
        index = _together(groups, lambda: torch_dist.open_index(target))
        manifest = _manifest(index, manifest, step, module, groups)
        batches = in_flight.gather(rollouts, groups)
        state = {"step": step, "optimizer_step": _optimizer_step(optimizer, groups), "state": state}
        _on_first(groups, lambda: _write_rest(target, common, state, manifest, batches, companions or {}))
        _on_first(groups, lambda: directory.publish(root, step, keep))
    except _Failed as failed:
        raise CheckpointError(_explain(root, step, target, groups, str(failed), room)) from failed
    return directory.place(root, step)


def load(root: Path, model: Any, optimizer: Any | None, groups: Groups) -> Resume:
    """Restore weights, optimizer state and rollouts from the newest complete checkpoint under ``root``, on any layout.

    Bit-identical on the layout that wrote it. Raises :class:`ConfigurationError` on all ranks, before anything is
    changed, for a missing, truncated or damaged checkpoint, another architecture, or a directory without
    ``mopd_state.json``.
    """
    try:
        path = _together(groups, lambda: directory.resolve(root))
        saved = _together(groups, lambda: _read_state(path))
        manifest = _together(groups, lambda: read_manifest(path))
        batches = _together(groups, lambda: in_flight.unpack(path))
        index = _together(groups, lambda: torch_dist.open_index(path))
        tensors = sharded_state.of(unwrap_model(model), optimizer, groups, loading=True)
        request = _together(groups, lambda: sharded_state.Request(tensors, index, manifest.get("vocab_size"), groups))
        _together(groups, lambda: request.fill(unwrap_model(model), optimizer, saved["optimizer_step"]))
    except _Failed as failed:
        raise ConfigurationError(str(failed)) from None
    rollouts = [in_flight.share(batch, groups.dp_rank, groups.dp_size) for batch in batches]
    return Resume(step=saved["step"], state=saved["state"], rollouts=rollouts, manifest=manifest)


def load_weights(path: Path, model: Any, groups: Groups, vocab_size: int | None = None) -> dict[str, Any]:
    """Restore the weights alone, from the newest checkpoint under ``path`` (or ``path`` itself); returns its manifest.

    MTP tensors are passed over when the model has no MTP; every other name and shape must match. A checkpoint that
    another Megatron program wrote works too; its manifest then holds ``checkpoint_id`` alone, and ``vocab_size`` tells
    rows of the vocabulary from padding. The identity is computed from the tensors and must be the manifest's. Raises
    :class:`ConfigurationError` as :func:`load`.
    """
    module: Any = unwrap_model(model)
    try:
        path = _together(groups, lambda: directory.resolve(path))
        manifest: dict[str, Any] = _together(groups, lambda: read_manifest(path))
        rows = manifest.get("vocab_size", vocab_size)
        index = _together(groups, lambda: torch_dist.open_index(path))
        tensors = sharded_state.of(module, None, groups, loading=True)
        request = _together(groups, lambda: sharded_state.Request(tensors, index, rows, groups))
        _together(groups, lambda: request.fill(module, None, None))
        found = _identify(index, module.config.num_query_groups, rows, groups)
    except _Failed as failed:
        raise ConfigurationError(str(failed)) from None
    if manifest.get("checkpoint_id", found) != found:
        raise ConfigurationError(
            f"{path}: {directory.MANIFEST} says checkpoint_id {manifest['checkpoint_id'][:12]}, the tensors beside it"
            f" give {found[:12]}; one of the two was exchanged or damaged: take the directory from its source again"
        )
    return manifest | {"checkpoint_id": found}


class _SynchronousSave(mcore_torch.TorchDistSaveShardedStrategy):
    """mcore's ``torch_dist`` format written by torch's own writer in this process.

    mcore's writer starts a helper process for its results even when it saves synchronously, and a failing rank leaves
    the others hanging; torch's collects failures and raises them everywhere.
    """

    def save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: Path) -> None:
        shards, _, _ = mcore_torch._replace_state_dict_keys_with_sharded_keys(
            sharded_state_dict, self.keep_only_main_replica
        )
        torch_save(
            mcore_torch.mcore_to_pyt_state_dict(shards),  # type: ignore[arg-type]
            storage_writer=FileSystemWriter(checkpoint_dir, thread_count=self.thread_count),
            planner=mcore_torch.MCoreSavePlanner(
                dedup_replicated_tensors=not self.keep_only_main_replica,
                flatten_state_dict=False,
                flatten_sharded_tensors=False,
            ),
        )


def _preprocess(tensors: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    """What mcore shards and what all ranks have in common; checks that the shards cover each tensor once."""
    sharded, common = save_preprocess(tensors)
    assert isinstance(sharded, dict)
    return sharded, common


def _write_rest(
    target: Path,
    common: Any,
    state: Mapping[str, Any],
    manifest: Mapping[str, Any],
    batches: list[list[in_flight.Item]],
    companions: Mapping[str, bytes],
) -> None:
    save_config(CheckpointingConfig("torch_dist", 1), str(target))
    legacy = io.BytesIO()
    torch.save(common, legacy)  # mcore before 0.19 reads it from here, later ones from the shards or from here
    tensors, records = in_flight.pack(batches)
    directory.write(target / "common.pt", legacy.getvalue())
    directory.write(target / in_flight.TENSORS, tensors)
    directory.write(target / in_flight.RECORDS, in_flight.seal(tensors, records))
    for name, content in companions.items():
        file = target / COMPANIONS / name
        file.parent.mkdir(parents=True, exist_ok=True)
        directory.write(file, content)
    directory.write(target / STATE, json.dumps(state).encode())
    directory.write(target / directory.MANIFEST, json.dumps(manifest, indent=1, sort_keys=True).encode())


def _manifest(
    index: torch_dist.Index, given: Mapping[str, Any], step: int, module: Any, groups: Groups
) -> dict[str, Any]:
    config = module.config
    return {
        **given,
        "format": 1,
        "step": step,
        "checkpoint_id": _identify(index, config.num_query_groups, given.get("vocab_size"), groups),
        "query_groups": config.num_query_groups,
        "architecture": {
            "hidden_size": config.hidden_size,
            "num_layers": config.num_layers,
            "num_attention_heads": config.num_attention_heads,
            "kv_channels": config.kv_channels,
            "num_moe_experts": config.num_moe_experts,
            "mtp_num_layers": config.mtp_num_layers,
        },
        "source_dtypes": {
            name: str(stored.dtype).removeprefix("torch.")
            for name, stored in index.tensors.items()
            if name.startswith(names.PREFIXES)
        },
    }


def _optimizer_step(optimizer: Any | None, groups: Groups) -> float | None:
    """Updates that the optimizer has counted; on a pipeline stage where nothing is trained it has counted none."""
    steps: list[Any] = [None] * groups.pp_size
    dist.all_gather_object(steps, sharded_state.optimizer_step(optimizer), group=groups.pp)
    return max((step for step in steps if step is not None), default=None)


def _identify(index: torch_dist.Index, query_groups: int, vocab_size: int | None, groups: Groups) -> str:
    """The checkpoint_id, each rank hashing its share of the tensors."""
    share = _together(
        groups, lambda: identity.tensor_digests(index, query_groups, vocab_size, groups.rank, groups.world_size)
    )
    shares: list[Any] = [None] * groups.world_size
    dist.all_gather_object(shares, share, group=groups.world)
    return identity.combine(line for lines in shares for line in lines)


def _read_state(path: Path) -> dict[str, Any]:
    if not (path / STATE).is_file():
        raise ConfigurationError(
            f"{path}: holds weights but nothing to resume from ({STATE}); name it as model.initial"
        )
    return directory.read_json(path / STATE, "copy the checkpoint again, or remove it and resume an older one")


class _Failed(Exception):
    """Some rank failed; the same text on all ranks."""


def _together[T](groups: Groups, action: Callable[[], T]) -> T:
    """Run ``action`` on every rank; when it fails on any, all raise together instead of waiting for one another."""
    result, problem = None, None
    try:
        result = action()
    except CheckpointException as error:  # torch's, which all ranks see alike
        problem = ", ".join(f"rank {rank}: {cause!r}" for rank, (cause, _) in sorted(error.failures.items()))
    except _FAILURES as error:
        problem = str(error) if isinstance(error, ConfigurationError) else f"{type(error).__name__}: {error}"
    problems: list[str | None] = [None] * groups.world_size
    dist.all_gather_object(problems, problem, group=groups.world)
    if found := {rank: text for rank, text in enumerate(problems) if text is not None}:
        first = min(found)
        raise _Failed(found[first] if len(found) == groups.world_size else f"rank {first}: {found[first]}")
    return result  # type: ignore[return-value]


def _on_first(groups: Groups, action: Callable[[], Any]) -> None:
    _together(groups, action if groups.rank == 0 else lambda: None)


def _explain(root: Path, step: int, target: Path, groups: Groups, problem: str, room: str) -> str:
    """Remove the half-written checkpoint and say what is left."""
    if groups.rank == 0:
        shutil.rmtree(target, ignore_errors=True)
    previous = latest(root)
    left = f"{previous} is untouched" if previous else "there is no earlier one"
    return (
        f"{root}: the checkpoint of step {step} could not be written: {problem}; {left}."
        f" {free(root)}; make room or {room}, then start the same command again"
    )
