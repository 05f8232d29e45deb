"""mcore's sharded state of a model and its optimizer: made, checked against a checkpoint, and filled from one."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace, merge, nested_values
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedTensor, apply_factory_merges
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess
from megatron.core.dist_checkpointing.utils import extract_sharded_base
from torch import Tensor

from megatron_mopd import names, torch_dist
from megatron_mopd.config import ConfigurationError
from megatron_mopd.parallel import Groups


def of(module: Any, optimizer: Any | None, groups: Groups, *, loading: bool = False) -> dict[str, Any]:
    """``{"model": ..., "optimizer": ...}`` as mcore shards it on this rank; a collective call with an optimizer.

    Optimizer state is that of whole parameters (mcore's ``fully_reshardable`` form), so any layout can read it; a
    pipeline stage on which nothing is trained has none.
    """
    metadata = {
        "dp_cp_group": groups.pg.dp_cp,
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
    }
    model = module.sharded_state_dict(metadata=metadata)
    if optimizer is None or not _trained(module):
        return {"model": model}
    for part in _parts(optimizer):
        _check_dtypes(part)
        _mend_order(part)
        _initialise(part)
    with _whole_buckets(optimizer):
        state = optimizer.sharded_state_dict(model, is_loading=loading, metadata=metadata)
    return {"model": model, "optimizer": state}


def optimizer_step(optimizer: Any | None) -> float | None:
    """Updates that Adam has counted so far; None without an optimizer."""
    if optimizer is None:
        return None
    inner = [part.optimizer for part in _parts(optimizer)]
    by_parameter = {float(state["step"]) for o in inner for state in o.state.values() if "step" in state}
    by_group = {float(group["step"]) for o in inner for group in o.param_groups if "step" in group}
    return max(by_parameter or by_group, default=0.0)


class Request:
    """The tensors that a model and an optimizer want from a checkpoint, checked by name and shape before any is read.

    A collective: the pipeline stages' wishes are checked together, since only together they are the whole model.
    Raises :class:`ConfigurationError` listing what is missing, what is left over and what has another shape. Rows of
    the padded vocabulary may differ between layouts as long as both sides have the ``vocab_size`` real ones.
    """

    def __init__(
        self, tensors: dict[str, Any], index: torch_dist.Index, vocab_size: int | None, groups: Groups
    ) -> None:
        prepared, constants, self.factories = load_preprocess(tensors)
        self.index = index
        self.sharded, self.plain = extract_sharded_base(prepared)
        merge(self.plain, constants)
        shards = [s for s in nested_values(self.sharded) if isinstance(s, ShardedTensor)]
        wanted: list[Any] = [None] * groups.pp_size
        mine = {s.key: (tuple(s.global_shape), s.allow_shape_mismatch) for s in shards}
        dist.all_gather_object(wanted, mine, group=groups.pp)
        _compare(dict(ChainMap(*wanted)), index, vocab_size, with_optimizer="optimizer" in tensors)

    @torch.no_grad()
    def fill(self, module: Any, optimizer: Any | None, step: float | None) -> None:
        """Read the tensors and hand them to the model and the optimizer; ``step`` is Adam's count of updates."""
        dict_list_map_inplace(self._read, self.sharded)
        merge(self.plain, self.sharded)
        state = apply_factory_merges(self.plain, self.factories)  # type: ignore[arg-type]
        weights = {name: value for name, value in state["model"].items() if isinstance(value, Tensor)}
        outcome = module.load_state_dict(weights, strict=False)
        absent = [name for name in outcome.missing_keys if not name.endswith("_extra_state")]
        if absent or outcome.unexpected_keys:
            raise RuntimeError(f"mcore's sharded names differ from the module's: {absent} {outcome.unexpected_keys}")
        if optimizer is not None and _trained(module):
            assert step is not None
            _restore(optimizer, state["optimizer"], step)

    def _read(self, shard: Any) -> Tensor | None:
        if not isinstance(shard, ShardedTensor):
            assert isinstance(shard, ShardedBase)
            return None  # objects, such as transformer-engine's fp8 state, are pickles: never read
        if shard.data is None:
            shard.init_data(torch.device("cpu"))
        assert shard.data is not None
        target = shard.data.detach()
        boxed = target.view((1,) * shard.prepend_axis_num + tuple(target.shape))
        torch_dist.read_into(self.index, shard.key, boxed, shard.global_offset)
        return target


def _compare(
    wanted: Mapping[str, tuple[tuple[int, ...], bool]],  # global shape, and whether padding may differ
    index: torch_dist.Index,
    vocab_size: int | None,
    *,
    with_optimizer: bool,
) -> None:
    stored = index.tensors
    mtp = any(key.startswith("mtp.") for key in wanted)
    prefixes = (*names.PREFIXES, "optimizer.") if with_optimizer else names.PREFIXES
    ours = {key for key in stored if key.startswith(prefixes) and (mtp or not key.startswith("mtp."))}
    misshapen = [
        f"{key} {list(stored[key].shape)} in the file, {list(shape)} in the model"
        for key, (shape, padded) in sorted(wanted.items())
        if key in stored and not _fits(stored[key].shape, shape, vocab_size if padded else None)
    ]
    problems = [
        f"{what}: {_listed(items)}"
        for what, items in (
            ("missing from the file", sorted(wanted.keys() - stored.keys())),
            ("unknown to the model", sorted(ours - wanted.keys())),
            ("of another shape", misshapen),
        )
        if items
    ]
    if problems:
        raise ConfigurationError(
            f"{index.path}: not a checkpoint of this architecture; {'; '.join(problems)}."
            " Set model (preset, pattern, override, vocab_size) to what wrote it, or name another checkpoint"
        )


def _fits(shape: tuple[int, ...], wanted: tuple[int, ...], vocab_size: int | None) -> bool:
    if shape == wanted:
        return True
    if vocab_size is None or shape[1:] != wanted[1:]:
        return False
    return min(shape[0], wanted[0]) >= vocab_size


def _listed(items: list[str], limit: int = 5) -> str:
    return ", ".join(items[:limit]) + (f" and {len(items) - limit} more" if len(items) > limit else "")


def _trained(module: Any) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _parts(optimizer: Any) -> list[Any]:
    """The single optimizers behind mcore's chain, stubs without parameters left out."""
    chained = getattr(optimizer, "chained_optimizers", [optimizer])
    return [part for part in chained if not getattr(part, "is_stub_optimizer", False)]


def _check_dtypes(part: Any) -> None:
    if any(getattr(part, "fp32_from_fp32_groups", ())) and any(part.float16_groups):
        raise ConfigurationError(
            "optimizer.distributed = false: mcore cannot checkpoint that optimizer for a bf16 model with fp32"
            " parameters (Mamba's A_log, D and dt_bias); set optimizer.distributed to true"
        )


def _mend_order(part: Any) -> None:
    """Say where the distributed optimizer keeps each parameter's shard: fp32 parameters first, then the others.

    mcore's own map numbers them in buffer order (megatron-core 0.19), which is another one as soon as a model mixes
    dtypes, as bf16 models with Mamba layers do.
    """
    if not hasattr(part, "model_param_group_index_map"):
        return
    for group, (fp32, float16) in enumerate(zip(part.model_fp32_groups, part.model_float16_groups, strict=True)):
        for order, parameter in enumerate([*fp32, *float16]):
            part.model_param_group_index_map[parameter] = (group, order)


@contextmanager
def _whole_buckets(optimizer: Any) -> Iterator[None]:
    """Within the block the distributed optimizer's buckets count their padding as their own.

    mcore gathers the state of a buffer without the padding behind each bucket and then looks parameters up at offsets
    with it (megatron-core 0.19), so that all behind the first padded bucket are saved shifted. A pipeline stage that
    shares the embedding with another has a bucket for it; with overlap_grad_reduce there are more.
    """
    owners = [b for part in _parts(optimizer) for b in getattr(part, "buffers", ())]
    owners += [bucket for buffer in owners for bucket in buffer.buckets]
    sizes = [owner.numel_unpadded for owner in owners]
    for owner in owners:
        owner.numel_unpadded = owner.numel if hasattr(owner, "buckets") else owner.grad_data.numel()
    try:
        yield
    finally:
        for owner, size in zip(owners, sizes, strict=True):
            owner.numel_unpadded = size


def _initialise(part: Any) -> None:
    """Give an optimizer that has not stepped yet the state it would start from; mcore shards only what exists."""
    inner = part.optimizer
    if not inner.state and part.init_state_fn is not None:
        part.init_state_fn(inner, part.config)
        _count(inner, 0.0)


def _count(inner: Any, step: float) -> None:
    """Set Adam's count of updates: torch keeps one tensor per parameter, transformer-engine a number per group."""
    if isinstance(inner, torch.optim.Adam | torch.optim.AdamW):
        for state in inner.state.values():
            state["step"] = torch.tensor(step)
        return
    for group in inner.param_groups:
        if "step" in group:
            group["step"] = type(group["step"])(step)


def _restore(optimizer: Any, loaded: dict[Any, Any], step: float) -> None:
    """Hand ``loaded``, in the form of mcore's ``sharded_state_dict``, to the optimizer.

    mcore's distributed optimizer copies every tensor of torch's Adam state from the loaded one, which lacks ``step``
    (megatron-core 0.19), and leaves all parameters one shared ``step`` tensor; so its parameters' state goes in apart.
    """
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    states = [loaded] if len(parts) == 1 else [loaded[i] for i in range(len(parts))]
    sharded = [state.pop("param_state", None) for state in states]
    for state in states:
        plain = state.get("optimizer", state)  # of an optimizer that is not distributed
        if "state" in plain:
            plain["state"]["common_step"] = torch.tensor(step)
    optimizer.load_state_dict(loaded)
    for part, param_state in zip(parts, sharded, strict=True):
        if param_state is not None:
            for state in part.optimizer.state.values():
                state.pop("step", None)
            part.load_parameter_state_from_fully_reshardable(param_state)
        if not getattr(part, "is_stub_optimizer", False):
            _count(part.optimizer, step)
