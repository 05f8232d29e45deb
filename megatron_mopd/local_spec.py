"""The spec of the hybrid stack on machines without transformer-engine or mamba-ssm, on any device.

``stack_spec()`` gives mcore's own ``hybrid_stack_spec`` where transformer-engine is present and one of the layers in
``STAND_INS`` where it is not; ``install()`` fills what mcore names outside its specs. Where both packages are present
nothing is replaced. Names in checkpoints are the same either way.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import cache, partial
from typing import Any, cast

from megatron.core.fusions import fused_bias_dropout
from megatron.core.models.hybrid import hybrid_block
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.ssm import mamba_mixer
from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
from megatron.core.ssm.mamba_mixer import MambaMixer, MambaMixerSubmodules
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe import moe_layer
from megatron.core.transformer.moe.experts import GroupedMLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlock,
    MultiTokenPredictionBlockSubmodules,
    MultiTokenPredictionLayer,
    MultiTokenPredictionLayerSubmodules,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import (
    MoETransformerLayer,
    TransformerLayer,
    TransformerLayerSubmodules,
)
from torch import nn

from megatron_mopd import local_layers as local
from megatron_mopd import ssd

logger = logging.getLogger(__name__)

# mcore's own specs do not meet its protocols' annotations either
_BIAS_DROPOUT_ADD: Any = fused_bias_dropout.get_bias_dropout_add

STAND_INS: dict[type[nn.Module], str] = {
    local.RMSNorm: "TENorm; torch's norm, as mcore wraps it, refuses sequence parallelism",
    local.ColumnLinear: "TEColumnParallelLinear",
    local.LayerNormColumnLinear: "TELayerNormColumnParallelLinear",
    local.RowLinear: "TERowParallelLinear",
    local.DuplicatedLinear: "TELinear in duplicated mode, which LatentMoE insists on",
    local.CausalAttention: "TEDotProductAttention",
    local.ColumnGroupedLinear: "TEColumnParallelGroupedLinear",
    local.RowGroupedLinear: "TERowParallelGroupedLinear",
    local.GroupedMLP: "TEGroupedMLP, whose forward wraps each product for transformer-engine's offloading and fp8",
    local.GatedRMSNorm: "mamba-ssm's RMSNormGated, on which mcore builds ExtendedRMSNorm",
}
"""What each local class stands in for; every other module of a student is mcore's or torch's own."""


@cache
def have_transformer_engine() -> bool:
    """Whether mcore could import transformer-engine."""
    return moe_layer.HAVE_TE


@cache
def have_mamba_ssm() -> bool:
    """Whether mcore could import mamba-ssm with its CUDA part."""
    return mamba_mixer.HAVE_MAMBA_SSM


@cache
def install() -> None:
    """Put stand-ins where mcore names an absent package outside its specs, and say so; leave a present one alone."""
    if not have_mamba_ssm():
        mamba_mixer.mamba_split_conv1d_scan_combined = ssd.mamba_split_conv1d_scan_combined
        mamba_mixer.mamba_chunk_scan_combined = ssd.mamba_chunk_scan_combined
        mamba_mixer.ExtendedRMSNorm = local.GatedRMSNorm
        mamba_mixer.HAVE_MAMBA_SSM = True
        logger.info("mamba-ssm is absent: Mamba layers run the scan of megatron_mopd.ssd")
    if not have_transformer_engine():
        hybrid_block.TENorm = local.RMSNorm
        moe_layer.TELinear = local.DuplicatedLinear
        moe_layer.HAVE_TE = True
        logger.info("transformer-engine is absent: its layers are those of megatron_mopd.local_layers")


def stack_spec(conv: int = 4, chunk: int = 128) -> ModuleSpec:
    """The hybrid stack's spec for a convolution of ``conv`` taps and scans of ``chunk`` tokens at a time."""
    install()
    if not have_transformer_engine():
        return _local_stack_spec({"d_conv": conv, "chunk_size": chunk})
    from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec

    if (conv, chunk) == (4, 128):  # the mixer's own defaults
        return hybrid_stack_spec
    stack: Any = hybrid_stack_spec.submodules
    mamba = stack.mamba_layer
    mixer = replace(mamba.submodules.mixer, params={"d_conv": conv, "chunk_size": chunk})
    mamba = replace(mamba, submodules=replace(mamba.submodules, mixer=mixer))
    return replace(hybrid_stack_spec, submodules=replace(stack, mamba_layer=mamba))


def _local_stack_spec(mixer: dict[str, int]) -> ModuleSpec:
    return ModuleSpec(
        module=HybridStack,
        submodules=HybridStackSubmodules(
            mamba_layer=_mamba(mixer),
            attention_layer=_attention(),
            mlp_layer=_mlp(),
            moe_layer=_moe(),
            mtp_block_spec=_mtp(),
        ),
    )


def _mamba(mixer: dict[str, int]) -> ModuleSpec:
    projections = MambaMixerSubmodules(in_proj=local.LayerNormColumnLinear, out_proj=local.RowLinear)
    return ModuleSpec(
        module=MambaLayer,
        submodules=MambaLayerSubmodules(
            mixer=ModuleSpec(module=MambaMixer, params=mixer, submodules=projections), mamba_bda=_BIAS_DROPOUT_ADD
        ),
    )


def _attention() -> ModuleSpec:
    parts = SelfAttentionSubmodules(
        linear_qkv=local.LayerNormColumnLinear, core_attention=local.CausalAttention, linear_proj=local.RowLinear
    )
    attention = ModuleSpec(module=SelfAttention, params={"attn_mask_type": AttnMaskType.causal}, submodules=parts)
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(self_attention=attention, self_attn_bda=_BIAS_DROPOUT_ADD),
    )


def _mlp() -> ModuleSpec:
    parts = MLPSubmodules(linear_fc1=local.LayerNormColumnLinear, linear_fc2=local.RowLinear)
    return ModuleSpec(
        module=MLPLayer,
        submodules=TransformerLayerSubmodules(
            mlp=partial(MLP.as_mlp_submodule, submodules=parts), mlp_bda=_BIAS_DROPOUT_ADD
        ),
    )


def _moe() -> ModuleSpec:
    first, second, shared = cast(Any, (local.ColumnGroupedLinear, local.RowGroupedLinear, _shared_experts))
    grouped = GroupedMLPSubmodules(linear_fc1=first, linear_fc2=second)
    parts = MoESubmodules(experts=partial(local.GroupedMLP, submodules=grouped), shared_experts=shared)
    return ModuleSpec(
        module=MoETransformerLayer,
        submodules=TransformerLayerSubmodules(
            pre_mlp_layernorm=local.RMSNorm, mlp=partial(MoELayer, submodules=parts), mlp_bda=_BIAS_DROPOUT_ADD
        ),
    )


def _shared_experts(*, config: TransformerConfig, pg_collection: Any, gate: bool, name: str | None = None) -> nn.Module:
    parts = MLPSubmodules(linear_fc1=local.ColumnLinear, linear_fc2=local.RowLinear)
    return SharedExpertMLP(config=config, submodules=parts, gate=gate, pg_collection=pg_collection, name=name)


def _mtp() -> ModuleSpec:
    parts = MultiTokenPredictionLayerSubmodules(
        enorm=local.RMSNorm,
        hnorm=local.RMSNorm,
        eh_proj=local.ColumnLinear,
        mtp_model_layer=cast(Any, None),  # built from the pattern
        layer_norm=local.RMSNorm,
    )
    depth = ModuleSpec(module=MultiTokenPredictionLayer, submodules=parts)
    return ModuleSpec(
        module=MultiTokenPredictionBlock, submodules=MultiTokenPredictionBlockSubmodules(layer_specs=[depth])
    )
