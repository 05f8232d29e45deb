"""Builds mcore's HybridModel from the configuration and walks it to hidden states, never to logits."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any, Literal

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.activations import quick_gelu, squared_relu
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.utils import unwrap_model
from torch import Tensor, nn

from megatron_mopd import host, local_spec, presets
from megatron_mopd.config import ConfigurationError, Model, Parallel
from megatron_mopd.initialization import initialize_weights
from megatron_mopd.parallel import Groups
from megatron_mopd.records import StudentOutput

logger = logging.getLogger(__name__)

Precision = Literal["fp32", "bf16"]

_ACTIVATIONS = {"squared_relu": squared_relu, "quick_gelu": quick_gelu, "gelu": F.gelu, "silu": F.silu, "relu": F.relu}
_FREE = {
    "moe_router_load_balancing_type",
    "moe_aux_loss_coeff",
    "moe_z_loss_coeff",
    "bias_dropout_fusion",
    "masked_softmax_fusion",
    "perform_initialization",
}
"""Fields set here that an override may still change."""
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def transformer_config(
    model: Model, parallel: Parallel, precision: Precision = "fp32", mtp: bool = True
) -> TransformerConfig:
    """mcore's configuration for a preset, a layout and the user's overrides; no process group is needed.

    Raises :class:`ConfigurationError` for an override that is no TransformerConfig field (naming the nearest one) and
    for values that mcore refuses.
    """
    preset = presets.staged(presets.resolve(model), parallel)
    values: dict[str, Any] = preset.transformer_fields() | {"activation_func": squared_relu}
    if not mtp:
        values["mtp_num_layers"] = None
    ours = _runtime_fields(model, parallel, precision)
    overrides = _overrides(model)
    for name in overrides.keys() & ours.keys() - _FREE:
        raise ConfigurationError(
            f"model.override.{name} = {overrides[name]!r}: follows other settings (parallel, run.precision) or keeps"
            f" the mathematics of the update right; it is {ours[name]!r} here, leave it out"
        )
    values |= ours | overrides
    try:
        return TransformerConfig(**values)
    except (AssertionError, ValueError) as error:
        raise ConfigurationError(f"model: Megatron-Core refuses this configuration: {error}") from error


def _runtime_fields(model: Model, parallel: Parallel, precision: Precision) -> dict[str, Any]:
    return {
        "params_dtype": _DTYPES[precision],
        "bf16": precision == "bf16",
        "tensor_model_parallel_size": parallel.tensor,
        "expert_model_parallel_size": parallel.expert,
        "expert_tensor_parallel_size": parallel.expert_tensor,
        # mcore refuses to train a mixture of experts under tensor parallelism without it.
        "sequence_parallel": parallel.tensor > 1,
        **_pipeline_fields(parallel, precision),
        "moe_token_dispatcher_type": parallel.dispatcher,
        "moe_grouped_gemm": True,
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "moe_z_loss_coeff": None,
        "moe_expert_capacity_factor": None,
        "mtp_detach_heads": True,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "gradient_accumulation_fusion": False,
        "calculate_per_token_loss": True,
        "perform_initialization": False,  # megatron_mopd.initialization draws the weights
    }


def _pipeline_fields(parallel: Parallel, precision: Precision) -> dict[str, Any]:
    several = parallel.pipeline > 1
    return {
        "pipeline_model_parallel_size": parallel.pipeline,
        # The borders of the pattern say where stages begin, and a rank holds one stage.
        "pipeline_model_parallel_layout": None,
        "virtual_pipeline_model_parallel_size": None,
        "num_layers_in_first_pipeline_stage": None,
        "num_layers_in_last_pipeline_stage": None,
        "pipeline_dtype": _DTYPES[precision] if several else None,
        "variable_seq_lengths": several,  # micro-batches are as long as their longest sequence
        "deallocate_pipeline_outputs": several,
        # What mcore's schedule would refuse in the first step, or ask of the forward of each micro-batch.
        "overlap_p2p_comm": False,
        "num_microbatches_with_partial_activation_checkpoints": None,
    }


def _overrides(model: Model) -> dict[str, Any]:
    known = {f.name for f in fields(TransformerConfig)}
    values: dict[str, Any] = {}
    for name, value in model.override.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigurationError(f"model.override.{name}: no field of Megatron-Core's TransformerConfig{hint}")
        values[name] = _named(name, value)
    return values


def _named(name: str, value: Any) -> Any:
    """Functions and dtypes, which YAML cannot hold, are given by name."""
    tables = {"activation_func": _ACTIVATIONS} | dict.fromkeys(
        ("params_dtype", "autocast_dtype", "pipeline_dtype", "mamba_training_ssm_states_dtype"), _DTYPES
    )
    if not isinstance(value, str) or name not in tables:
        return value
    table: dict[str, Any] = tables[name]
    if value not in table:
        raise ConfigurationError(f"model.override.{name} = {value!r}: expected one of {sorted(table)}")
    return table[value]


def _check_recomputation(config: TransformerConfig) -> None:
    needs_te = {"moe_act", "layernorm"} & set(config.recompute_modules or ())
    if needs_te and not local_spec.have_transformer_engine():
        raise ConfigurationError(
            f"model.override.recompute_modules = {config.recompute_modules}: {sorted(needs_te)} discard outputs, which"
            " in Megatron-Core needs transformer-engine; without it use core_attn, mlp, moe or shared_experts"
        )


def padded_vocab_size(vocab_size: int, tensor_parallel_size: int) -> int:
    """Rows of embedding and output weight: the next multiple of the tensor parallel size."""
    return -(-vocab_size // tensor_parallel_size) * tensor_parallel_size


def build_model(
    model: Model, parallel: Parallel, groups: Groups, vocab_size: int, precision: Precision = "fp32", mtp: bool = True
) -> HybridModel:
    """The plain model on its device, weights drawn from ``groups.seed`` alike on every layout; MTP heads on request.

    Of several pipeline stages this rank's alone. Routers are frozen unless ``model.train_router``. Raises
    :class:`ConfigurationError` as :func:`transformer_config`.
    """
    host.activate()
    preset = presets.staged(presets.resolve(model), parallel)
    config = transformer_config(model, parallel, precision, mtp)
    _check_recomputation(config)
    pattern = preset.pattern if mtp else preset.pattern.split("/")[0]
    hybrid = HybridModel(
        config,
        hybrid_stack_spec=local_spec.stack_spec(preset.mamba_conv, preset.mamba_chunk),
        vocab_size=padded_vocab_size(vocab_size, groups.tp_size),
        max_sequence_length=model.max_sequence_length,
        hybrid_layer_pattern=pattern,
        pre_process=groups.first_stage,
        post_process=groups.last_stage,
        position_embedding_type="none",
        share_embeddings_and_output_weights=False,
        pg_collection=groups.pg,
    ).to(groups.device)
    initialize_weights(hybrid, config, groups, groups.seed)
    for module in hybrid.modules():
        if isinstance(module, TopKRouter):
            module.weight.requires_grad_(model.train_router)
            module.frozen_expert_bias = not model.update_expert_bias
    return hybrid


def _plain(model: nn.Module) -> Any:
    return unwrap_model(model)


def has_mtp(model: nn.Module) -> bool:
    """Whether the (wrapped) model has MTP heads on this rank: of several pipeline stages only the last does."""
    return bool(_plain(model).mtp_process)


def trunk(model: nn.Module, tokens: Tensor) -> Tensor:
    """Hidden states ``[s, b, H]`` (``[s/tp, b, H]`` under sequence parallelism) behind this rank's layers.

    The first pipeline stage starts from ``tokens [b, s]``, each further one from what mcore's schedule has handed to
    the model; the last one, or the only one, ends with the final norm.
    """
    hybrid = _plain(model)
    embedded = None
    if hybrid.pre_process:
        # mcore reads position ids in no layer of this family.
        embedded = hybrid.embedding(input_ids=tokens, position_ids=torch.zeros_like(tokens))
        # A batch of one leaves strides by which torch picks another product for frozen weights than for trained ones,
        # and a teacher equal to the student would score a last bit apart.
        embedded = embedded.flatten(0, 1).unflatten(0, embedded.shape[:2])
    return hybrid.decoder(hidden_states=embedded, attention_mask=None)


def forward(model: nn.Module, tokens: Tensor, mtp: bool = False) -> StudentOutput:
    """Hidden states of ``tokens [b, s]`` (int64, right-padded) after the final norm, and of the MTP depths on request.

    ``s`` must be a multiple of the tensor parallel size under sequence parallelism. What the MTP depths take from the
    trunk is detached, so its gradient is the same with and without ``mtp``; their loss detaches ``output_weight``, too.
    Works on a wrapped model as well; of several pipeline stages on the last, within :mod:`megatron_mopd.pipeline`.
    """
    hybrid, hidden = _plain(model), trunk(model, tokens)
    weight = _output_weight(hybrid.output_layer)
    if not mtp:
        return StudentOutput(hidden=hidden, output_weight=weight)
    stacked = hybrid.mtp(
        input_ids=tokens,
        position_ids=torch.zeros_like(tokens),
        hidden_states=hidden,
        attention_mask=None,
        embedding=hybrid.embedding,
    )
    return StudentOutput(
        hidden=hidden, output_weight=weight, mtp_hidden=stacked.chunk(1 + hybrid.config.mtp_num_layers)[1:]
    )


def _output_weight(layer: nn.Module) -> Tensor:
    """The output layer's weight, whose forward is never called."""
    for hook in layer._forward_pre_hooks.values():  # by these, mcore's DDP waits for parameters still being gathered
        hook(layer, ())
    return layer.get_parameter("weight")


def gather_hidden(hidden: Tensor, groups: Groups, config: TransformerConfig) -> Tensor:
    """Hidden states ``[s/tp, b, H]`` or ``[s, b, H]`` as flat rows ``[s*b, H]``, the whole sequence on every rank.

    A consumer with a vocabulary-parallel weight hands back a partial gradient per rank; the backward pass sums it over
    the tensor parallel group: reduce-scattered under sequence parallelism, all-reduced without.
    """
    if groups.tp_size == 1:
        return hidden.flatten(0, 1)
    if config.sequence_parallel:
        whole = tensor_parallel.gather_from_sequence_parallel_region(
            hidden, tensor_parallel_output_grad=True, group=groups.tp
        )
    else:
        whole = tensor_parallel.copy_to_tensor_model_parallel_region(hidden, group=groups.tp)
    return whole.flatten(0, 1)


@contextmanager
def sequence_parallel_off(model: nn.Module) -> Iterator[None]:
    """Within the block the model keeps whole sequences on every tensor parallel rank, so that any length fits.

    For sampling in eval mode: mcore refuses to train experts in this state.
    """
    switched: list[tuple[Any, str]] = []
    for module in _plain(model).modules():
        for owner in (module, getattr(module, "config", None)):
            for name in ("sequence_parallel", "reduce_scatter_embeddings"):
                if getattr(owner, name, None) is True:
                    setattr(owner, name, False)
                    switched.append((owner, name))
    try:
        yield
    finally:
        for owner, name in switched:
            setattr(owner, name, True)
