"""Rollouts that wait for their update, kept in a checkpoint: tensors as safetensors, the rest as JSON.

They are kept in the order of the global batch, whatever the layout: data-parallel rank ``r`` of ``n`` holds the prompts
``r, r + n, ...`` of a batch with all their samples. Another number of ranks takes its own share of the same order.
"""

from __future__ import annotations

import dataclasses
import hashlib
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
from megatron_mopd.records import Policy, Prompt, Provenance, Rollout, Sampling, ScoredRollout, UpdatedRollout
from mopd_kernels.nvfp4 import NVFP4Tensor

if TYPE_CHECKING:
    from megatron_mopd.parallel import Groups

Item = ScoredRollout | Rollout
Kept = ScoredRollout | Rollout | UpdatedRollout
TENSORS, RECORDS = "mopd_rollouts.safetensors", "mopd_rollouts.json"
UPDATE = "update/"  # before the name of a value that the objective gave to each token


def gather[T: Kept](batches: Sequence[Sequence[T]], groups: Groups) -> list[list[T]]:
    """The global batches on rank 0, from each rank's share of them; empty on other ranks."""
    # Of the pipeline stages only the last one has hidden states of teachers. Their float8 scales survive no pickle.
    own = pack(batches) if groups.tp_rank == 0 and groups.last_stage else None
    received: list[Any] | None = [None] * groups.world_size if groups.rank == 0 else None
    dist.gather_object((groups.dp_rank, own), received, dst=0, group=groups.world)
    shares = {rank: unpacked(*packed) for rank, packed in received or () if packed is not None}
    ordered = [shares[rank] for rank in sorted(shares)]
    return [interleave(parts) for parts in zip(*ordered, strict=True)]


def interleave[T: Kept](parts: Sequence[Sequence[T]]) -> list[T]:
    """A global batch from the shares of data-parallel ranks 0, 1, ..."""
    rounds = zip_longest(*map(_by_prompt, parts), fillvalue=())
    return list(chain.from_iterable(chain.from_iterable(rounds)))


def share[T: Kept](batch: Sequence[T], rank: int, size: int) -> list[T]:
    """The part of a global batch that data-parallel rank ``rank`` of ``size`` holds."""
    return list(chain.from_iterable(_by_prompt(batch)[rank::size]))


def _by_prompt[T: Kept](items: Sequence[T]) -> list[list[T]]:
    found: list[list[T]] = []
    for item in items:
        if _rollout(item).sample == 0 or not found:
            found.append([])
        found[-1].append(item)
    return found


def pack(batches: Sequence[Sequence[Kept]]) -> tuple[bytes, bytes]:
    """Content of the safetensors and of the JSON file."""
    records: list[list[dict[str, Any]]] = []
    parts: dict[str, list[Tensor]] = {}
    for batch in batches:
        records.append([_record(item) for item in batch])
        for item in batch:
            for name, tensor in _tensors(item).items():
                parts.setdefault(name, []).append(tensor.flatten())
    tensors = {name: torch.cat(values).contiguous() for name, values in parts.items()}
    return save(tensors), json.dumps({"batches": records}).encode()


def seal(tensors: bytes, records: bytes) -> bytes:
    """The JSON file with the sha256 of both, which :func:`unpack` holds against what it finds."""
    content = json.loads(records)
    return json.dumps({"sha256": _sums(tensors, content), **content}).encode()


def _sums(tensors: bytes, content: Any) -> dict[str, str]:
    records = json.dumps(content, sort_keys=True).encode()
    return {TENSORS: hashlib.sha256(tensors).hexdigest(), RECORDS: hashlib.sha256(records).hexdigest()}


def unpack(path: Path, way_out: str | None = None) -> list[list[Item]]:
    """The global batches in directory ``path``; raises :class:`ConfigurationError` for a damaged file.

    ``way_out`` ends its message; that of a checkpoint when left out.
    """
    if way_out is None:
        way_out = f"Copy {path.name} again from its source, or remove it and resume an older checkpoint"
    try:
        tensors, content = (path / TENSORS).read_bytes(), json.loads((path / RECORDS).read_bytes())
        expected = content.pop("sha256")
        for name, found in _sums(tensors, content).items():
            if found != expected[name]:
                raise ConfigurationError(
                    f"{path / name}: its sha256 is {found[:12]}, it was written with {expected[name][:12]}: the file"
                    f" was damaged or changed. {way_out}"
                )
        return unpacked(tensors, json.dumps(content).encode())
    except ConfigurationError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise ConfigurationError(f"{path / RECORDS}: rollouts cannot be read: {error!r}. {way_out}") from None


def unpacked(tensors: bytes, records: bytes) -> list[list[Any]]:
    """What was given to :func:`pack`; damaged content raises ValueError, KeyError, TypeError or SafetensorError."""
    flat = load(tensors)
    position = dict.fromkeys(flat, 0)

    def take(name: str, shape: Sequence[int]) -> Tensor:
        position[name] += math.prod(shape)
        return flat[name][position[name] - math.prod(shape) : position[name]].clone().view(*shape)

    return [
        [_item({name: take(name, shape) for name, shape in r["tensors"].items()}, r) for r in batch]
        for batch in json.loads(records)["batches"]
    ]


def _rollout(item: Kept) -> Rollout:
    inner = item.item if isinstance(item, UpdatedRollout) else item
    return inner.rollout if isinstance(inner, ScoredRollout) else inner


def _tensors(item: Kept) -> dict[str, Tensor]:
    if isinstance(item, UpdatedRollout):
        values = {f"{UPDATE}{name}": value.detach().cpu() for name, value in item.per_token.items()}
        return _tensors(item.item) | values
    rollout = _rollout(item)
    found = {
        "completion": rollout.completion,
        "behav_logprobs": rollout.behav_logprobs,
        "policy_steps": rollout.policy_steps,
    }
    if isinstance(item, ScoredRollout):
        found["teacher_logprobs"] = item.teacher_logprobs
        if (hidden := item.teacher_hidden) is not None:
            found |= {"teacher_hidden_codes": hidden.codes, "teacher_hidden_scales": hidden.scales}
    return {name: tensor.detach().cpu() for name, tensor in found.items() if tensor is not None}


def _shapes(item: Kept) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in _tensors(item).items()}


def _record(item: Kept) -> dict[str, Any]:
    if isinstance(item, UpdatedRollout):
        return _record(item.item) | {"tensors": _shapes(item), "update": {"dropped": item.dropped}}
    rollout = _rollout(item)
    return {
        "tensors": _shapes(item),
        "teacher": item.teacher if isinstance(item, ScoredRollout) else None,
        "teacher_hidden": _hidden_record(item.teacher_hidden) if isinstance(item, ScoredRollout) else None,
        "prompt": dataclasses.asdict(rollout.prompt),
        "sample": rollout.sample,
        "finish": rollout.finish,
        "reward": rollout.reward,
        "dropped": rollout.dropped,
        "provenance": None if rollout.provenance is None else dataclasses.asdict(rollout.provenance),
    }


def _item(tensors: dict[str, Tensor], record: dict[str, Any]) -> Kept:
    if "update" in record:
        own = {name.removeprefix(UPDATE): value for name, value in tensors.items() if name.startswith(UPDATE)}
        inner = _item(tensors, {key: value for key, value in record.items() if key != "update"})
        assert not isinstance(inner, UpdatedRollout)
        return UpdatedRollout(item=inner, per_token=own, dropped=record["update"]["dropped"])
    prompt = record["prompt"]
    rollout = Rollout(
        prompt=Prompt(**prompt | {"messages": tuple(prompt["messages"]), "tokens": tuple(prompt["tokens"])}),
        sample=record["sample"],
        completion=tensors["completion"],
        finish=record["finish"],
        behav_logprobs=tensors.get("behav_logprobs"),
        policy_steps=tensors.get("policy_steps"),
        provenance=None if record["provenance"] is None else provenance_of(record["provenance"]),
        reward=record["reward"],
        dropped=record["dropped"],
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


def provenance_of(record: dict[str, Any]) -> Provenance:
    """From the JSON values that ``dataclasses.asdict`` gave."""
    sampling = record["sampling"] | {"stop_tokens": tuple(record["sampling"]["stop_tokens"])}
    changed = {
        "policy": Policy(**record["policy"]),
        "sampling": Sampling(**sampling),
        "teacher_nvfp4": tuple(record["teacher_nvfp4"]),
    }
    return Provenance(**record | changed)
