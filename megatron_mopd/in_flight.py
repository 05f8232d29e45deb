"""Rollouts that wait for their update, kept in a checkpoint: tensors as safetensors, the rest as JSON.

They are kept in the order of the global batch, whatever the layout: data-parallel rank ``r`` of ``n`` holds the prompts
``r, r + n, ...`` of a batch with all their samples. Another number of ranks takes its own share of the same order.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from itertools import chain, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from megatron_mopd.config import ConfigurationError
from megatron_mopd.records import Policy, Prompt, Provenance, Rollout, Sampling, ScoredRollout
from mopd_kernels.nvfp4 import NVFP4Tensor

if TYPE_CHECKING:
    from megatron_mopd.parallel import Groups

Item = ScoredRollout | Rollout
TENSORS, RECORDS = "mopd_rollouts.safetensors", "mopd_rollouts.json"
_FIELDS = ("completion", "behav_logprobs", "teacher_logprobs", "teacher_hidden_codes", "teacher_hidden_scales")


def gather(batches: Sequence[Sequence[Item]], groups: Groups) -> list[list[Item]]:
    """The global batches on rank 0, from each rank's share of them; empty on other ranks."""
    # Of the pipeline stages only the last one has hidden states of teachers. Their float8 scales survive no pickle.
    own = pack(batches) if groups.tp_rank == 0 and groups.last_stage else None
    received: list[Any] | None = [None] * groups.world_size if groups.rank == 0 else None
    dist.gather_object((groups.dp_rank, own), received, dst=0, group=groups.world)
    shares = {rank: _unpacked(*packed) for rank, packed in received or () if packed is not None}
    ordered = [shares[rank] for rank in sorted(shares)]
    return [interleave(parts) for parts in zip(*ordered, strict=True)]


def interleave(parts: Sequence[Sequence[Item]]) -> list[Item]:
    """A global batch from the shares of data-parallel ranks 0, 1, ..."""
    rounds = zip_longest(*map(_by_prompt, parts), fillvalue=())
    return list(chain.from_iterable(chain.from_iterable(rounds)))


def share(batch: Sequence[Item], rank: int, size: int) -> list[Item]:
    """The part of a global batch that data-parallel rank ``rank`` of ``size`` holds."""
    return list(chain.from_iterable(_by_prompt(batch)[rank::size]))


def _by_prompt(items: Sequence[Item]) -> list[list[Item]]:
    found: list[list[Item]] = []
    for item in items:
        if _rollout(item).sample == 0 or not found:
            found.append([])
        found[-1].append(item)
    return found


def pack(batches: Sequence[Sequence[Item]]) -> tuple[bytes, bytes]:
    """Content of the safetensors and of the JSON file."""
    records, parts = [], {name: [] for name in _FIELDS}
    for batch in batches:
        records.append([_record(item) for item in batch])
        for item in batch:
            for name, tensor in _tensors(item).items():
                parts[name].append(tensor.flatten())
    tensors = {name: torch.cat(values).contiguous() for name, values in parts.items() if values}
    return save(tensors), json.dumps({"batches": records}).encode()


def unpack(path: Path) -> list[list[Item]]:
    """The global batches in checkpoint directory ``path``; raises :class:`ConfigurationError` for a damaged file."""
    try:
        return _unpacked((path / TENSORS).read_bytes(), (path / RECORDS).read_bytes())
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ConfigurationError(
            f"{path / RECORDS}: rollouts cannot be read: {error!r}; resume an older checkpoint"
        ) from None


def _unpacked(tensors: bytes, records: bytes) -> list[list[Item]]:
    flat = load(tensors)
    position: dict[str, int] = dict.fromkeys(_FIELDS, 0)

    def take(name: str, shape: Sequence[int]) -> Tensor:
        position[name] += math.prod(shape)
        return flat[name][position[name] - math.prod(shape) : position[name]].clone().view(*shape)

    return [
        [_item({name: take(name, shape) for name, shape in r["tensors"].items()}, r) for r in batch]
        for batch in json.loads(records)["batches"]
    ]


def _rollout(item: Item) -> Rollout:
    return item.rollout if isinstance(item, ScoredRollout) else item


def _tensors(item: Item) -> dict[str, Tensor]:
    rollout = _rollout(item)
    found = {"completion": rollout.completion, "behav_logprobs": rollout.behav_logprobs}
    if isinstance(item, ScoredRollout):
        found["teacher_logprobs"] = item.teacher_logprobs
        if (hidden := item.teacher_hidden) is not None:
            found |= {"teacher_hidden_codes": hidden.codes, "teacher_hidden_scales": hidden.scales}
    return {name: tensor.detach().cpu() for name, tensor in found.items() if tensor is not None}


def _record(item: Item) -> dict[str, Any]:
    rollout = _rollout(item)
    return {
        "tensors": {name: list(tensor.shape) for name, tensor in _tensors(item).items()},
        "teacher": item.teacher if isinstance(item, ScoredRollout) else None,
        "teacher_hidden": _hidden_record(item.teacher_hidden) if isinstance(item, ScoredRollout) else None,
        "prompt": dataclasses.asdict(rollout.prompt),
        "sample": rollout.sample,
        "finish": rollout.finish,
        "reward": rollout.reward,
        "provenance": None if rollout.provenance is None else dataclasses.asdict(rollout.provenance),
    }


def _item(tensors: dict[str, Tensor], record: dict[str, Any]) -> Item:
    prompt = record["prompt"]
    rollout = Rollout(
        prompt=Prompt(**prompt | {"messages": tuple(prompt["messages"]), "tokens": tuple(prompt["tokens"])}),
        sample=record["sample"],
        completion=tensors["completion"],
        finish=record["finish"],
        behav_logprobs=tensors.get("behav_logprobs"),
        provenance=None if record["provenance"] is None else _provenance(record["provenance"]),
        reward=record["reward"],
    )
    if record["teacher"] is None:
        return rollout
    return ScoredRollout(
        rollout=rollout,
        teacher=record["teacher"],
        teacher_logprobs=tensors["teacher_logprobs"],
        teacher_hidden=None if record["teacher_hidden"] is None else _hidden(tensors, record["teacher_hidden"]),
    )


def _hidden_record(hidden: NVFP4Tensor | None) -> dict[str, Any] | None:
    """All of it but codes and scales; a double holds the fp32 global scale exactly."""
    if hidden is None:
        return None
    return {
        "global_scale": float(hidden.global_scale),
        "shape": list(hidden.shape),
        "numerics": hidden.numerics,
        "swizzled": hidden.swizzled,
        "bound": hidden.bound,
        "transformed": None if hidden.transformed is None else list(hidden.transformed),
    }


def _hidden(tensors: dict[str, Tensor], record: dict[str, Any]) -> NVFP4Tensor:
    return NVFP4Tensor(
        codes=tensors["teacher_hidden_codes"],
        scales=tensors["teacher_hidden_scales"],
        **record
        | {
            "global_scale": torch.tensor(record["global_scale"]),
            "shape": tuple(record["shape"]),
            "transformed": None if record["transformed"] is None else tuple(record["transformed"]),
        },
    )


def _provenance(record: dict[str, Any]) -> Provenance:
    sampling = record["sampling"] | {"stop_tokens": tuple(record["sampling"]["stop_tokens"])}
    changed = {
        "policy": Policy(**record["policy"]),
        "sampling": Sampling(**sampling),
        "teacher_nvfp4": tuple(record["teacher_nvfp4"]),
    }
    return Provenance(**record | changed)
