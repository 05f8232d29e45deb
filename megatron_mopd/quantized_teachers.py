"""Parts of a teacher in NVFP4: its output weight and routed experts in host memory, its hidden states on rollouts.

Every matrix is quantized when the teacher is loaded, as tools/quantize_checkpoint.py --four-over-six mse would: with
one global scale for each expert and one for the output weight, from the maximum over all ranks that share it, so that a
teacher is the same on any layout. Hidden states get a global scale that is known before the first of them, since the
output of the final norm is bounded by sqrt(H) times its largest weight; so a token's do not depend on what it is scored
with.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_mopd import linear_weights, pipeline
from megatron_mopd.config import ConfigurationError
from megatron_mopd.linear_weights import ROUTED_EXPERT
from megatron_mopd.parallel import Groups
from megatron_mopd.predictions import OutputWeight
from megatron_mopd.records import MicroBatch
from megatron_mopd.scoring import Scorer
from mopd_kernels import nvfp4
from mopd_kernels.dispatch import Impl
from mopd_kernels.nvfp4 import NVFP4Tensor

WEIGHTS = nvfp4.Format(numerics="modelopt", four_over_six="mse")
"""Of output weights and experts."""
HIDDEN = nvfp4.Format(numerics="modelopt")
"""Of hidden states."""
BLOCK = 16
OUTPUT_WEIGHT = "output_layer.weight"

Stored = Tensor | NVFP4Tensor | tuple[NVFP4Tensor, ...]
"""A parameter or buffer in host memory: as it is, or packed, experts one by one."""


def tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers by name; the routers' expert bias is a buffer."""
    yield from model.named_parameters()
    yield from model.named_buffers()


@torch.no_grad()
def store(
    model: nn.Module, parts: Collection[str], groups: Groups, vocab_size: int, impl: Impl = "auto"
) -> dict[str, Stored]:
    """Host copies of everything in ``model``, those of ``parts`` packed; all ranks call it together.

    ``vocab_size`` counts rows of the output weight before padding. Raises :class:`ConfigurationError` for a part that
    the model lacks or that does not divide into blocks of 16.
    """
    packed: dict[str, Any] = {}
    if "output_weight" in parts and OUTPUT_WEIGHT in dict(model.named_parameters()):
        weight = model.get_parameter(OUTPUT_WEIGHT)
        packed[OUTPUT_WEIGHT] = _pack(weight, _vocabulary_amax(weight, groups, vocab_size), "output_weight", impl)
    if "experts" in parts:
        found = [m for m in linear_weights.matrices(model, groups) if ROUTED_EXPERT.search(m.parameter_name)]
        found.sort(key=lambda m: (m.parameter_name, m.row or 0))
        _need_experts(found, groups)
        for matrix, amax in zip(found, linear_weights.whole_amax(found), strict=True):
            so_far = packed.get(matrix.parameter_name, ())
            packed[matrix.parameter_name] = (*so_far, _pack(matrix.weight, amax, "experts", impl))
    return {name: packed.get(name) or _host(tensor) for name, tensor in tensors(model)}


@torch.no_grad()
def fill(model: nn.Module, stored: Mapping[str, Stored], impl: Impl = "auto") -> None:
    """Give ``model`` the stored values, experts decoded; a packed output weight is not the model's and stays out."""
    for name, tensor in tensors(model):
        source = stored[name]
        if isinstance(source, Tensor):
            tensor.copy_(source, non_blocking=True)
        elif isinstance(source, tuple):
            for target, matrix in zip(tensor if tensor.dim() == 3 else (tensor,), source, strict=True):
                target.copy_(nvfp4.dequantize(moved(matrix, tensor.device), tensor.dtype, impl=impl))


def nbytes(stored: Stored) -> int:
    """Bytes in host memory."""
    return sum(part.nbytes for part in (stored if isinstance(stored, tuple) else (stored,)))


def moved(stored: Tensor | NVFP4Tensor, device: torch.device) -> Any:
    """The same on ``device``."""
    if isinstance(stored, Tensor):
        return stored.to(device, non_blocking=True)
    return _each(stored, lambda tensor: tensor.to(device, non_blocking=True))


def give_output_weight(model: Any, rows: int) -> None:
    """Give the output layer, where the model has it, a weight of so many rows, undrawn. Where packed ones replace it
    there are none, by which nothing can be scored by mistake."""
    parameters = dict(model.named_parameters())
    if OUTPUT_WEIGHT in parameters:
        old = parameters[OUTPUT_WEIGHT]
        new = nn.Parameter(old.new_empty(rows, old.shape[1]), requires_grad=False)
        for name, value in vars(old).items():  # by which mcore knows how it is split
            setattr(new, name, value)
        model.output_layer.weight = new


# ------------------------------------------------------------------ hidden states


def score(
    scorer: Scorer, model: Any, micro_batches: Sequence[MicroBatch], weight: OutputWeight | None
) -> tuple[Tensor, NVFP4Tensor | None]:
    """:meth:`Scorer.logprobs` and, from the same pass, the hidden states ``[T, H]`` that they were made of, on the
    host and on the last pipeline stage only."""
    kept: list[NVFP4Tensor] = []

    def look(micro_batch: MicroBatch) -> Tensor:
        predictions = scorer.predictions(model, micro_batch, weight)
        logprobs, hidden = predictions.logprobs_and_hidden(micro_batch.targets, HIDDEN, hidden_amax(model))
        kept.append(_each(hidden, _host))
        return logprobs

    with torch.no_grad():
        parts = pipeline.read_tokens(model, micro_batches, look, scorer.groups)
    return torch.cat(parts).cpu(), joined(kept, kept[0].shape[1]) if kept else None


def hidden_amax(model: Any) -> Tensor:
    """fp32 []: what no element of the final norm's output exceeds, but for rounding; on the last pipeline stage."""
    weight = model.decoder.final_norm.weight
    return weight.detach().abs().amax().float() * math.sqrt(len(weight))


def rows(hidden: NVFP4Tensor, start: int, stop: int) -> NVFP4Tensor:
    """Rows ``start:stop``, as a copy; scales are linear."""
    assert not hidden.swizzled
    return dataclasses.replace(
        hidden,
        codes=hidden.codes[start:stop].clone(),
        scales=hidden.scales[start:stop].clone(),
        shape=(stop - start, hidden.shape[1]),
    )


def joined(parts: Sequence[NVFP4Tensor], width: int) -> NVFP4Tensor:
    """The rows ``[n, width]`` of any number of tensors one after another; all of one teacher, and so of one global
    scale."""
    if not parts:
        return nvfp4.quantize(torch.empty(0, width), HIDDEN, amax=torch.ones(()), impl="reference")
    first = parts[0]
    assert all(part.shape[1] == first.shape[1] and part.global_scale == first.global_scale for part in parts)
    return dataclasses.replace(
        first,
        codes=torch.cat([part.codes for part in parts]),
        scales=torch.cat([part.scales.view(torch.uint8) for part in parts]).view(torch.float8_e4m3fn),
        shape=(sum(part.shape[0] for part in parts), first.shape[1]),
    )


# ------------------------------------------------------------------ inside


def _pack(weight: Tensor, amax: Tensor, part: str, impl: Impl) -> NVFP4Tensor:
    if weight.shape[1] % BLOCK:
        raise ConfigurationError(
            f"nvfp4 = [{part}]: each rank holds {weight.shape[1]} columns of a matrix, no multiple of {BLOCK}; split"
            f" experts fewer ways (parallel.expert_tensor) or leave {part} out"
        )
    if not amax.isfinite():
        raise ConfigurationError(
            f"nvfp4 = [{part}]: a matrix of its checkpoint holds NaN or infinity, which has no code; take the"
            " checkpoint from its source again"
        )
    amax = torch.where(amax > 0, amax, 1.0)  # a matrix of zeros has no scale of its own
    return _each(nvfp4.quantize(weight, WEIGHTS, amax=amax, impl=impl), _host)


def _need_experts(found: Sequence[linear_weights.Matrix], groups: Groups) -> None:
    """Another pipeline stage may have some."""
    count = torch.tensor(len(found), device=groups.device)
    dist.all_reduce(count, op=dist.ReduceOp.MAX, group=groups.pp)
    if not count:
        raise ConfigurationError("nvfp4 = [experts]: its model has no routed experts; leave experts out")


def _vocabulary_amax(weight: Tensor, groups: Groups, vocab_size: int) -> Tensor:
    """Over the ranks that share the vocabulary; rows of padding are not looked at."""
    real = weight[: max(0, vocab_size - groups.tp_rank * len(weight))]
    amax = real.abs().amax().float() if len(real) else torch.zeros((), device=weight.device)
    dist.all_reduce(amax, op=dist.ReduceOp.MAX, group=groups.tp)
    return amax


def _each(packed: NVFP4Tensor, change: Any) -> NVFP4Tensor:
    changed = {name: change(getattr(packed, name)) for name in ("codes", "scales", "global_scale")}
    return dataclasses.replace(packed, **changed)


def _host(tensor: Tensor) -> Tensor:
    copy = tensor.detach().to("cpu", copy=True)
    return copy.pin_memory() if tensor.is_cuda else copy
