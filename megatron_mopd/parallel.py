"""Process groups of a run: the only reader of mcore's ``parallel_state``; the rest is handed a :class:`Groups`."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.distributed import HashStore, ProcessGroup  # pyright: ignore[reportPrivateImportUsage]

from megatron_mopd import host
from megatron_mopd.config import ConfigurationError, Parallel

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Groups:
    """The process groups of this rank, as values."""

    pg: ProcessGroupCollection
    device: torch.device
    seed: int  # of initial weights and mcore's random states
    tp: ProcessGroup
    dp: ProcessGroup  # ranks that hold the same dense weights and see other data
    ep: ProcessGroup
    pp: ProcessGroup
    expt_dp: ProcessGroup  # ranks that hold the same experts
    world: ProcessGroup
    rank: int
    world_size: int
    tp_rank: int
    tp_size: int
    dp_rank: int
    dp_size: int
    ep_rank: int
    ep_size: int
    pp_rank: int
    pp_size: int

    @property
    def first_stage(self) -> bool:
        """Whether this rank has the embedding."""
        return self.pp_rank == 0

    @property
    def last_stage(self) -> bool:
        """Whether this rank has the output layer and the MTP heads."""
        return self.pp_rank == self.pp_size - 1


def initialize(parallel: Parallel, seed: int) -> Groups:
    """Join the process group that torchrun announces (or make a world of one); build mcore's groups and random states.

    A process group that exists already is used as it is, so that a training loop of one's own can call this.
    Raises :class:`ConfigurationError` when the layout does not fit the number of ranks.
    """
    host.activate()
    device = _device()
    backend = _backend(parallel, device)
    if parallel.expert_tensor > 1 and parallel.dispatcher == "alltoall" and backend == "gloo":
        raise ConfigurationError(
            f"parallel.expert_tensor = {parallel.expert_tensor} with parallel.dispatcher = 'alltoall' gathers ragged"
            " tensors, which gloo cannot; set parallel.dispatcher to allgather or parallel.expert_tensor to 1"
        )
    if not dist.is_initialized():
        _join(backend, device)
    check_world(parallel, dist.get_world_size())
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.expert_tensor,
        # Groups handed over as values come without gloo twins in mcore, so none are made.
        create_gloo_process_groups=False,
    )
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    return _groups(device, seed)


def destroy() -> None:
    """Take down mcore's groups and the process group."""
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def check_world(parallel: Parallel, world_size: int) -> None:
    """Refuse a number of ranks that the layout cannot carry; raises :class:`ConfigurationError`."""
    stages = " x parallel.pipeline" if parallel.pipeline > 1 else ""
    for name, size in (
        (f"parallel.tensor{stages}", parallel.tensor * parallel.pipeline),
        (
            f"parallel.expert x parallel.expert_tensor{stages}",
            parallel.expert * parallel.expert_tensor * parallel.pipeline,
        ),
    ):
        if world_size % size:
            raise ConfigurationError(
                f"{name} = {size} does not divide the {world_size} running processes;"
                f" start a multiple of {size} (torchrun --nproc_per_node) or lower it"
            )


def _device() -> torch.device:
    if not torch.cuda.is_available():
        return host.HOST
    local_rank, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local_rank >= gpus:
        raise ConfigurationError(
            f"this machine has {gpus} GPUs, but {local_rank + 1} or more processes were started on it; start at most"
            f" {gpus} (torchrun --nproc_per_node={gpus})"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _backend(parallel: Parallel, device: torch.device) -> str:
    if parallel.backend == "auto":
        backend = "nccl" if device.type == "cuda" else "gloo"
        logger.info("parallel.backend auto: %s on %s", backend, device.type)
        return backend
    if parallel.backend == "nccl" and device.type != "cuda":
        raise ConfigurationError(
            "parallel.backend = 'nccl' needs CUDA, which this machine lacks; set it to auto or gloo"
        )
    return parallel.backend


def _join(backend: str, device: torch.device) -> None:
    if backend == "nccl":  # objects and host tensors (metrics, checkpoints' metadata) still travel by gloo
        backend = "cpu:gloo,cuda:nccl"
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group(backend, timeout=timedelta(minutes=30))
    else:
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)


def _groups(device: torch.device, seed: int) -> Groups:
    pg = ProcessGroupCollection.use_mpu_process_groups()
    assert dist.group.WORLD is not None
    return Groups(
        pg=pg,
        device=device,
        seed=seed,
        tp=pg.tp,
        dp=pg.dp,
        ep=pg.ep,
        pp=pg.pp,
        expt_dp=pg.expt_dp,
        world=dist.group.WORLD,
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        tp_rank=pg.tp.rank(),
        tp_size=pg.tp.size(),
        dp_rank=pg.dp.rank(),
        dp_size=pg.dp.size(),
        ep_rank=pg.ep.rank(),
        ep_size=pg.ep.size(),
        pp_rank=pg.pp.rank(),
        pp_size=pg.pp.size(),
    )
