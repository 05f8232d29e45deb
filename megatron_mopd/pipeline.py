"""Micro-batches through mcore's forward-backward schedule, whatever the number of pipeline stages.

All ranks of a pipeline hold the same micro-batches. Losses and log-probabilities come to be on the last stage alone;
what the others need of them is broadcast. With one stage the schedule is mcore's loop without pipelining and nothing
is sent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.utils import get_model_config, unwrap_model
from torch import Tensor

from megatron_mopd import student
from megatron_mopd.parallel import Groups
from megatron_mopd.records import MicroBatch


def train[T](
    model: Any, micro_batches: Sequence[MicroBatch], loss: Callable[[MicroBatch], tuple[Tensor, T]], groups: Groups
) -> list[T]:
    """Forward and backward of each micro-batch, then mcore's finalisation of the gradients.

    ``loss`` is called on the last stage: it runs :func:`megatron_mopd.student.forward` and gives a scalar, this rank's
    share of the global loss, and a report. Returns the reports, none on other stages.
    """

    def step(micro_batch: MicroBatch) -> tuple[Tensor, Callable[[Tensor], Any] | None]:
        if not groups.last_stage:
            return student.trunk(model, micro_batch.tokens.to(groups.device)), None
        value, report = loss(micro_batch)
        value = value.clone()  # several stages free it before backward, which mcore refuses to do to a view
        # The loss is already a share of the global mean. mcore's three-value form under calculate_per_token_loss scales
        # neither by micro-batches nor by data-parallel ranks; the token count it wants stays unused by the student.
        return value, lambda value: (value, torch.zeros((), dtype=torch.int, device=value.device), report)

    return _run(model, micro_batches, step, groups)


def train_last[T](
    model: Any,
    micro_batches: Sequence[MicroBatch],
    loss: Callable[[MicroBatch], tuple[Tensor, T]],
    groups: Groups,
    grad_scale: float = 1.0,
) -> list[T]:
    """:func:`train` where only layers of the last stage are trained, from inputs that need no gradient: the stages run
    forward alone, and backward stays within the last, which multiplies the loss by ``grad_scale``."""
    done = iter(range(1, len(micro_batches) + 1))

    def look(micro_batch: MicroBatch) -> T:
        # As in mcore's schedule, only the last backward may start the reduction of gradients.
        with nullcontext() if next(done) == len(micro_batches) else model.no_sync(), torch.enable_grad():
            value, report = loss(micro_batch)
            (value * grad_scale).backward()
        return report

    reports = read(model, micro_batches, look, groups)
    get_model_config(model).finalize_model_grads_func([model], None, pg_collection=groups.pg)
    return reports


@torch.no_grad()
def read[T](
    model: Any, micro_batches: Sequence[MicroBatch], look: Callable[[MicroBatch], T], groups: Groups
) -> list[T]:
    """Forward of each micro-batch without gradient, as many in flight as there are stages.

    ``look`` is called on the last stage: it runs :func:`megatron_mopd.student.forward` and gives what to keep. Returns
    that, nothing on other stages.
    """
    found: list[T] = []

    def step(micro_batch: MicroBatch) -> tuple[Tensor, None]:
        if not groups.last_stage:
            return student.trunk(model, micro_batch.tokens.to(groups.device)), None
        found.append(look(micro_batch))
        return torch.zeros((), device=groups.device), None

    _run(model, micro_batches, step, groups, forward_only=True)
    return found


def read_tokens(
    model: Any, micro_batches: Sequence[MicroBatch], look: Callable[[MicroBatch], Tensor], groups: Groups
) -> list[Tensor]:
    """:func:`read` of one fp32 value per completion token, ``[T]`` for each micro-batch, known to all stages."""
    found = read(model, micro_batches, look, groups)
    return _told(found, [len(mb.targets) for mb in micro_batches], groups)


def tell(values: Sequence[Mapping[str, Tensor]], groups: Groups) -> list[dict[str, Tensor]]:
    """The last stage's ``values`` (fp32) on all stages; what other stages pass is not looked at."""
    if groups.pp_size == 1:
        return [dict(mapping) for mapping in values]
    header: list[Any] = [[[(name, tuple(v.shape)) for name, v in mapping.items()] for mapping in values]]
    dist.broadcast_object_list(header, group=groups.pp, group_src=groups.pp_size - 1)
    shapes = [shape for mapping in header[0] for _, shape in mapping]
    flat = [v.float().flatten() for mapping in values for v in mapping.values()] if groups.last_stage else []
    parts = iter(_told(flat, [torch.Size(shape).numel() for shape in shapes], groups))
    return [{name: next(parts).view(shape) for name, shape in mapping} for mapping in header[0]]


def _told(found: Sequence[Tensor], sizes: Sequence[int], groups: Groups) -> list[Tensor]:
    """Flat fp32 tensors of ``sizes``, ``found`` on the last stage, on all stages."""
    if groups.pp_size == 1:
        return list(found)
    flat = torch.cat([*found]) if groups.last_stage and found else torch.empty(sum(sizes), device=groups.device)
    if len(flat):
        dist.broadcast(flat, group=groups.pp, group_src=groups.pp_size - 1)
    return list(flat.split(list(sizes)))


def _run(
    model: Any,
    micro_batches: Sequence[MicroBatch],
    step: Callable[[MicroBatch], tuple[Tensor, Callable[[Tensor], Any] | None]],
    groups: Groups,
    forward_only: bool = False,
) -> list[Any]:
    if not micro_batches:
        return []
    outputs = get_forward_backward_func(pp_size=groups.pp_size, vp_size=None)(
        forward_step_func=lambda iterator, _: step(next(iterator)),
        data_iterator=iter(micro_batches),
        model=[model],
        num_microbatches=len(micro_batches),
        seq_length=0,  # each stage is told the shape of what comes
        micro_batch_size=0,
        p2p_communicator=P2PCommunicator(groups.pp, get_model_config(model)),
        pg_collection=groups.pg,
        forward_only=forward_only,
    )
    plain: Any = unwrap_model(model)
    plain.set_input_tensor(None)  # or the last micro-batch's stays in memory, and its gradient
    return outputs
