"""Lets Megatron-Core run on a machine without CUDA by redirecting its CUDA surface to the host, in this one place.

``activate()`` does nothing where CUDA is available. Elsewhere it applies each entry of ``REMEDIES`` once: mcore's
modules, process groups, data-parallel wrapper, optimizer, schedule and distributed checkpoint then run over gloo.
Importing this module changes nothing.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import CodeType, FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

HOST = torch.device("cpu")


@dataclass(frozen=True)
class Remedy:
    """One redirection: what it is called, which of mcore's names it touches, and why mcore needs it."""

    name: str
    where: str
    reason: str
    apply: Callable[[], None]


_LITERALS = {
    "cuda": "cpu",
    "torch.cuda.FloatTensor": "torch.FloatTensor",
    "torch.cuda.HalfTensor": "torch.HalfTensor",
    "torch.cuda.BFloat16Tensor": "torch.BFloat16Tensor",
}
_WITH_LITERALS = (
    "megatron.core.distributed.param_and_grad_buffer",
    "megatron.core.dist_checkpointing.exchange_utils",
    "megatron.core.dist_checkpointing.strategies.state_dict_saver",
    "megatron.core.optimizer.clip_grads",
    "megatron.core.optimizer.distrib_optimizer",
    "megatron.core.optimizer.grad_scaler",
    "megatron.core.optimizer.optimizer",
    "megatron.core.pipeline_parallel.schedules",
    "megatron.core.tensor_parallel.data",
    "megatron.core.transformer.utils",
    "megatron.core.utils",
)


def _redirect_literals() -> None:
    for name in _WITH_LITERALS:
        for function in _functions(importlib.import_module(name)):
            function.__code__ = _translated(function.__code__)


def _functions(module: ModuleType) -> Iterator[FunctionType]:
    """Functions and methods that a module defines, seen through decorators."""
    classes = [c for c in vars(module).values() if isinstance(c, type)]
    for value in [v for owner in (module, *classes) for v in vars(owner).values()]:
        function = inspect.unwrap(getattr(value, "__func__", value))
        if isinstance(function, FunctionType) and function.__module__ == module.__name__:
            yield function


def _translated(code: CodeType) -> CodeType:
    """The same code with its CUDA literals replaced, in nested functions and tuples too."""

    def translate(constant: Any) -> Any:
        if isinstance(constant, CodeType):
            return _translated(constant)
        if isinstance(constant, tuple):
            return tuple(translate(c) for c in constant)
        return _LITERALS.get(constant, constant) if isinstance(constant, str) else constant

    return code.replace(co_consts=tuple(translate(c) for c in code.co_consts))


class HostStream:
    """The one stream of a host: work is done when the call returns, so there is never anything to wait for."""

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...


def _report_host_device() -> None:
    torch.cuda.current_device = lambda: HOST  # type: ignore[assignment, return-value]


def _report_host_stream() -> None:
    stream = HostStream()
    torch.cuda.current_stream = lambda device=None: stream  # type: ignore[assignment, return-value, misc]
    torch.cuda.synchronize = lambda device=None: None  # type: ignore[assignment, misc]


def _get_rng_state(device: Any = None, clone: bool = False, graph_safe: bool = False) -> Tensor:
    return torch.get_rng_state()


def _set_rng_state(new_state: Tensor, device: Any = None, graph_safe: bool = False) -> None:
    torch.set_rng_state(new_state)


def _track_host_generator() -> None:
    from megatron.core.tensor_parallel import random

    class HostRNGStatesTracker(random.CudaRNGStatesTracker):
        """mcore's tracker over states of the host's default generator."""

        def add(self, name: str, seed: int) -> None:
            if seed in self.seeds_ or name in self.states_:
                raise ValueError(f"random state {name!r} with seed {seed} exists already")
            self._is_initialized = True
            self.seeds_.add(seed)
            self.states_[name] = torch.Generator().manual_seed(seed).get_state()

        @contextlib.contextmanager
        def fork(self, name: str = "model-parallel-rng") -> Iterator[None]:
            if name not in self.states_:
                raise KeyError(f"random state {name!r} was not added; known: {sorted(self.states_)}")
            outer, outer_name = torch.get_rng_state(), self._current_state_name
            torch.set_rng_state(self.states_[name])
            self._current_state_name = name
            try:
                yield
            finally:
                self.states_[name] = torch.get_rng_state()
                torch.set_rng_state(outer)
                self._current_state_name = outer_name

    random.CudaRNGStatesTracker = HostRNGStatesTracker  # type: ignore[misc]
    random._get_cuda_rng_state = _get_rng_state
    random._set_cuda_rng_state = _set_rng_state
    random.initialize_rng_tracker(force_reset=True)


def _dispatch_without_streams() -> None:
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

    def split_sizes_as_ints(self: Any, point: str, tokens_per_expert: Tensor | None = None) -> Tensor | None:
        if point == self.cuda_dtoh_point and not self.drop_and_pad:
            for name in ("input_splits", "output_splits"):
                if isinstance(splits := getattr(self, name), Tensor):
                    setattr(self, name, splits.tolist())
        return tokens_per_expert

    MoEAlltoAllTokenDispatcher.cuda_dtoh_stream = "host"  # type: ignore[assignment]  # anything but None: no stream is made
    MoEAlltoAllTokenDispatcher._maybe_dtoh_and_synchronize = split_sizes_as_ints  # type: ignore[method-assign]


def _gather_optimizer_state_by_gloo() -> None:
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    by_device = DistributedOptimizer.get_parameter_state_dp_zero

    def by_gloo(self: Any, use_gloo_comm: bool = True, **options: Any) -> Any:
        self.data_parallel_group_gloo = self.data_parallel_group  # without CUDA it is a gloo group already
        return by_device(self, use_gloo_comm=True, **options)

    DistributedOptimizer.get_parameter_state_dp_zero = by_gloo  # type: ignore[method-assign]


def _share_equal_groups() -> None:
    from megatron.core import parallel_state

    create = parallel_state.create_group
    made: dict[Any, Any] = {}

    def create_or_share(ranks: Any = None, *args: Any, **options: Any) -> Any:
        world = torch.distributed.group.WORLD
        if made.get("world") is not world:  # the groups of an earlier world went with it
            made.clear()
            made["world"] = world
        key = tuple(ranks)
        if key not in made:
            made[key] = create(ranks, *args, **options)
        return made[key]

    parallel_state.create_group = create_or_share


def _copy_embedding_on_host() -> None:
    from megatron.core.models.common.language_module.language_module import LanguageModule

    function: Any = LanguageModule.setup_embeddings_and_output_layer
    names = tuple("cpu" if name == "cuda" else name for name in function.__code__.co_names)
    function.__code__ = function.__code__.replace(co_names=names)


def _run_uncompiled() -> None:
    torch.compiler.set_stance("force_eager")


REMEDIES: tuple[Remedy, ...] = (
    Remedy(
        "device",
        "torch.cuda.current_device",
        "mcore allocates parameters and buffers on the current CUDA device; it is told the host's",
        _report_host_device,
    ),
    Remedy(
        "stream",
        "torch.cuda.current_stream, torch.cuda.synchronize",
        "gradient reduction and checkpointing wait for streams; the host's single stream never has work left",
        _report_host_stream,
    ),
    Remedy(
        "literals",
        "functions of " + ", ".join(_WITH_LITERALS),
        "they spell out device='cuda' and tensor types such as 'torch.cuda.FloatTensor'; in their code the host's names"
        " stand instead, and nothing outside these modules sees a difference",
        _redirect_literals,
    ),
    Remedy(
        "random states",
        "megatron.core.tensor_parallel.random",
        "mcore keeps CUDA generator states for initialisation, dropout and recomputation; here they are states of the"
        " host's generator",
        _track_host_generator,
    ),
    Remedy(
        "alltoall dispatcher",
        "MoEAlltoAllTokenDispatcher._maybe_dtoh_and_synchronize",
        "it copies split sizes on a CUDA stream and leaves them tensors, while gloo's all-to-all takes integers",
        _dispatch_without_streams,
    ),
    Remedy(
        "optimizer state",
        "DistributedOptimizer.get_parameter_state_dp_zero",
        "for a checkpoint it moves its shards to the current CUDA device to gather them over NCCL",
        _gather_optimizer_state_by_gloo,
    ),
    Remedy(
        "process groups",
        "megatron.core.parallel_state.create_group",
        "mcore makes some sixty groups, many of the same ranks; each gloo group costs a polling thread and a set-up"
        " round, so groups of equal ranks share one",
        _share_equal_groups,
    ),
    Remedy(
        "embedding of the last stage",
        "LanguageModule.setup_embeddings_and_output_layer",
        "with MTP heads the last pipeline stage has a copy of the embedding, which it moves by Tensor.cuda before it"
        " is made equal; here by Tensor.cpu, in the code of this one method",
        _copy_embedding_on_host,
    ),
    Remedy(
        "compiled functions",
        "torch.compiler.set_stance",
        "mcore compiles activations and the router's counting when first called, which on a host needs a C++ compiler"
        " and many seconds a process, for functions that are as fast without",
        _run_uncompiled,
    ),
)

_active = False


def activate() -> None:
    """Apply every remedy where there is no CUDA; idempotent. With CUDA nothing is touched."""
    global _active
    if _active or torch.cuda.is_available():
        return
    for remedy in REMEDIES:
        remedy.apply()
    _active = True
    logger.info("no CUDA device: %s of Megatron-Core redirected to the host", ", ".join(r.name for r in REMEDIES))
