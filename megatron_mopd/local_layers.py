"""Layers that stand in for transformer-engine's and mamba-ssm's in mcore's hybrid stack, on any device.

Parameter and checkpoint names are those of the layers they stand in for. Weights are left undrawn, as mcore leaves them
with ``perform_initialization`` off: :mod:`megatron_mopd.initialization` draws them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.moe.experts import TEGroupedMLP
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megatron_mopd import ssd


def _parameter(config: TransformerConfig, *shape: int) -> nn.Parameter:
    return nn.Parameter(torch.ones(shape, dtype=config.params_dtype, device=torch.cuda.current_device()))


def _mark(parameter: nn.Parameter, **attributes: Any) -> None:
    """Attributes by which mcore's gradient reduction and clipping tell parameters apart."""
    for name, value in attributes.items():
        setattr(parameter, name, value)


class RMSNorm(nn.Module):
    """``x / rms(x) * weight`` over the last axis; statistics and product in fp32, result in the input's dtype."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = _parameter(config, hidden_size)
        _mark(self.weight, sequence_parallel=config.sequence_parallel)

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm of ``x [..., H]``; computed in fp32, returned in ``x``'s dtype."""
    if x.dtype == torch.float32:
        return F.rms_norm(x, weight.shape, weight, eps)
    return F.rms_norm(x.float(), weight.shape, weight.float(), eps).to(x.dtype)


class ColumnLinear(tensor_parallel.ColumnParallelLinear):
    """mcore's column-parallel linear; at tensor parallel size 1, with nothing to communicate, a plain product."""

    tp_group: ProcessGroup

    def forward(
        self, input_: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[Tensor, Tensor | None]:
        if self.tp_group.size() > 1:
            return super().forward(input_, weight, runtime_gather_output)
        weight = self.weight if weight is None else weight
        assert weight is not None
        if self.skip_bias_add:
            return F.linear(input_, weight), self.bias
        return F.linear(input_, weight, self.bias), None


class LayerNormColumnLinear(ColumnLinear):
    """A column-parallel linear that norms its input first; the norm's weight has transformer-engine's fused name."""

    def __init__(self, input_size: int, output_size: int, *, config: TransformerConfig, **kwargs: Any) -> None:
        super().__init__(input_size, output_size, config=config, **kwargs)
        self.eps = config.layernorm_epsilon
        self.layer_norm_weight = _parameter(config, input_size)
        _mark(self.layer_norm_weight, sequence_parallel=config.sequence_parallel)

    def forward(
        self, input_: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[Tensor, Tensor | None]:
        return super().forward(rms_norm(input_, self.layer_norm_weight, self.eps), weight, runtime_gather_output)


class RowLinear(tensor_parallel.RowParallelLinear):
    """mcore's row-parallel linear; a plain product at tensor parallel size 1."""

    tp_group: ProcessGroup

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.tp_group.size() > 1:
            return super().forward(input_)
        if self.skip_bias_add:
            return F.linear(input_, self.weight), self.bias
        return F.linear(input_, self.weight, self.bias), None


class DuplicatedLinear(nn.Module):
    """A linear whose whole weight every tensor and expert parallel rank holds: LatentMoE's projections."""

    def __init__(
        self, input_size: int, output_size: int, *, config: TransformerConfig, bias: bool, parallel_mode: str, **_: Any
    ) -> None:
        super().__init__()
        assert parallel_mode == "duplicated" and not bias
        self.weight = _parameter(config, output_size, input_size)
        # Each rank sees its share of the sequence, so the gradient is summed over tensor parallel ranks.
        _mark(self.weight, tensor_model_parallel=False, allreduce=True, sequence_parallel=config.sequence_parallel)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return F.linear(x, self.weight), None

    def backward_dw(self) -> None:
        """mcore's hook for delayed weight gradients; nothing is delayed here."""


class CausalAttention(DotProductAttention):
    """mcore's attention core computed by torch's fused kernel."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        dropout = self.training and self.attention_dropout.p > 0
        if attention_mask is not None or packed_seq_params is not None or dropout:
            return super().forward(query, key, value, attention_mask, attn_mask_type, attention_bias, packed_seq_params)
        q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))  # [s, b, heads, d] -> [b, heads, s, d]
        context = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=self.softmax_scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        return context.permute(2, 0, 1, 3).reshape(*query.shape[:2], -1)


class GroupedLinear(nn.Module):
    """The same linear of all local experts as one weight ``[experts, out, in]``.

    The layout is that of transformer-engine's single grouped weight. In checkpoints experts are stacked under one name
    whichever layout a rank holds.
    """

    tp_axis: int  # axis of one expert's weight that tensor parallelism inside experts splits

    def __init__(
        self,
        num_gemms: int,
        input_size: int,
        output_size: int,
        *,
        config: TransformerConfig,
        bias: bool,
        pg_collection: ProcessGroupCollection,
        **_: Any,
    ) -> None:
        super().__init__()
        assert not bias
        self.num_gemms, self.pg = num_gemms, pg_collection
        shape = [output_size, input_size]
        shape[self.tp_axis] //= pg_collection.expt_tp.size()
        self.weight = _parameter(config, num_gemms, *shape)
        set_tensor_model_parallel_attributes(self.weight, is_parallel=True, dim=self.tp_axis + 1, stride=1)
        own_groups = config.expert_model_parallel_size > 1 or (
            config.expert_tensor_parallel_size != config.tensor_model_parallel_size
        )
        _mark(self.weight, allreduce=not own_groups)  # False: gradients are reduced over expert_dp, not over dp

    def forward(self, x: Tensor, tokens_per_expert: Sequence[int]) -> tuple[Tensor, None]:
        return grouped_linear(x, self.weight, tokens_per_expert), None

    def backward_dw(self) -> None:
        """mcore's hook for delayed weight gradients; nothing is delayed here."""

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> ShardedStateDict:
        """One tensor ``[experts, out, in]`` over expert parallel and expert tensor parallel ranks."""
        key, before = f"{prefix}weight", len(sharded_offsets)
        sharded = ShardedTensor.from_rank_offsets(
            key,
            self.weight,
            *sharded_offsets,
            (before, self.pg.ep.rank(), self.pg.ep.size()),
            (before + 1 + self.tp_axis, self.pg.expt_tp.rank(), self.pg.expt_tp.size()),
            replica_id=(0, 0, self.pg.expt_dp.rank()),
            prepend_axis_num=before,
        )
        return {key: sharded}


class ColumnGroupedLinear(GroupedLinear):
    """First linear of the experts: outputs are split over expert tensor parallel ranks."""

    tp_axis = 0


class RowGroupedLinear(GroupedLinear):
    """Second linear of the experts: inputs are split; the dispatcher sums the partial outputs."""

    tp_axis = 1


def grouped_linear(x: Tensor, weight: Tensor, tokens_per_expert: Sequence[int]) -> Tensor:
    """``x [T, in]`` sorted by expert times ``weight [experts, out, in]``, each row its own expert's: ``[T, out]``."""
    return _GroupedLinear.apply(x, weight, tuple(tokens_per_expert))


class _GroupedLinear(torch.autograd.Function):
    """One graph node instead of one per expert: at small sizes the nodes cost more than the products."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, tokens_per_expert: tuple[int, ...]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.tokens_per_expert = tokens_per_expert
        y = x.new_empty(x.shape[0], weight.shape[1])
        for w, rows_x, rows_y in zip(weight, x.split(tokens_per_expert), y.split(tokens_per_expert), strict=True):
            if len(rows_x):
                torch.mm(rows_x, w.t(), out=rows_y)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        dy, dx = grads[0].contiguous(), torch.empty_like(x)
        dw = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        rows = (t.split(ctx.tokens_per_expert) for t in (x, dx, dy))
        for expert, (rows_x, rows_dx, rows_dy) in enumerate(zip(*rows, strict=True)):
            if len(rows_dy):
                torch.mm(rows_dy, weight[expert], out=rows_dx)
            if dw is not None:
                torch.mm(rows_dy.t(), rows_x, out=dw[expert])
        return dx, dw, None


class GroupedMLP(TEGroupedMLP):
    """mcore's grouped experts over :class:`GroupedLinear`."""

    linear_fc1: Any
    linear_fc2: Any

    def forward(
        self,
        permuted_local_hidden_states: Tensor,
        tokens_per_expert: Tensor,
        permuted_probs: Tensor,
        output_buffer: Tensor | None = None,
        grad_input_buffer: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        counts = tokens_per_expert.tolist()
        inner, _ = self.linear_fc1(permuted_local_hidden_states, counts)
        inner = (self.activation_func(inner) * permuted_probs.unsqueeze(-1)).to(inner.dtype)
        return self.linear_fc2(inner, counts)


class GatedRMSNorm(ssd.RMSNormGated):
    """mcore's ``ExtendedRMSNorm`` over the stand-in of mamba-ssm's gated norm."""

    tp_group: Any  # set by mcore's mixer

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> ShardedStateDict:
        """The weight, split along axis 0 over tensor parallel ranks."""
        assert metadata is not None
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"weight": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )
