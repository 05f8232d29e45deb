"""Random initial weights that depend on the seed and on each parameter's name, and on nothing else.

mcore draws from states that differ between layouts. Here each parameter's whole tensor is drawn from a generator of its
own and every rank keeps its part, so that a seed means one model on any layout, with or without MTP, and copies of a
duplicated weight start equal. The distributions are mcore's.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

from megatron_mopd.parallel import Groups

Draw = Callable[[tuple[int, ...], torch.Generator], Tensor]

_KEEP = re.compile(r"(norm\.weight|layer_norm_weight|layernorm\.weight|\.D|bias)$")  # ones and zeros, as constructed
_OUTPUT = re.compile(r"(out_proj|linear_proj|linear_fc2|fc2_latent_proj)\.weight\d*$")
_INPUT = re.compile(r"(in_proj|linear_qkv|linear_fc1|fc1_latent_proj|router|eh_proj|output_layer)\.weight\d*$")
_TRUNK_LAYER = re.compile(r"^(decoder\.layers\.)(\d+)\.")
_EXPERT = re.compile(r"\.experts\.linear_fc[12]\.weight(\d*)$")


@torch.no_grad()
def initialize_weights(model: nn.Module, config: TransformerConfig, groups: Groups, seed: int) -> None:
    """Fill the parameters of a freshly built model in place; drawn in fp32, stored in each parameter's dtype."""
    for name, parameter in named_parameters(model):
        if draw := _distribution(name, config):
            if expert := _EXPERT.search(name):
                _fill_experts(name, expert, parameter, draw, config, groups, seed)
            else:
                full = draw(_full_shape(parameter, groups.tp_size), _generator(seed, name))
                parameter.copy_(_local_part(full, parameter, groups.tp_rank, groups.tp_size))


def named_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """A plain model's parameters, the trunk's layers numbered through all pipeline stages as in checkpoints."""
    first: Any = model.get_submodule("decoder.layers.0")
    offset = first.layer_number - 1  # mcore counts from 1
    for name, parameter in model.named_parameters():
        yield _TRUNK_LAYER.sub(lambda match: f"{match[1]}{int(match[2]) + offset}.", name), parameter


def _distribution(name: str, config: TransformerConfig) -> Draw | None:
    """How a parameter is drawn; None where the constructor's constant stays."""
    if name.endswith("conv1d_weight") or name.endswith("conv1d_bias"):
        return _convolution
    if name.endswith("dt_bias"):
        return _time_step_bias
    if name.endswith("A_log"):
        return lambda shape, g: torch.empty(shape).uniform_(1, 16, generator=g).log_()
    if _KEEP.search(name):
        return None
    if name.endswith("word_embeddings.weight"):
        return _normal(config.embedding_init_method_std)
    if _OUTPUT.search(name):
        return _normal(config.init_method_std / math.sqrt(2 * config.num_layers))
    if _INPUT.search(name):
        return _normal(config.init_method_std)
    raise AssertionError(f"no initial distribution is known for parameter {name}")


def _normal(std: float | None) -> Draw:
    assert std is not None
    return lambda shape, g: torch.empty(shape).normal_(0.0, std, generator=g)


def _convolution(shape: tuple[int, ...], generator: torch.Generator, taps: int = 4) -> Tensor:
    """Uniform within 1/sqrt(fan in), as torch's Conv1d; the fan in of a depthwise convolution is its number of taps."""
    bound = 1 / math.sqrt(shape[-1] if len(shape) == 3 else taps)
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def _time_step_bias(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """softplus(dt_bias) is log-uniform in [0.001, 0.1]: Mamba's own start."""
    low, high = math.log(0.001), math.log(0.1)
    step = torch.empty(shape).uniform_(low, high, generator=generator).exp_().clamp_(min=1e-4)
    return step + torch.log(-torch.expm1(-step))


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=False) >> 1)


def _split_axis(parameter: Tensor) -> int | None:
    return parameter.partition_dim if getattr(parameter, "tensor_model_parallel", False) else None  # type: ignore[attr-defined]


def _full_shape(parameter: Tensor, parts: int) -> tuple[int, ...]:
    shape, axis = list(parameter.shape), _split_axis(parameter)
    if axis is not None:
        shape[axis] *= parts
    return tuple(shape)


def _local_part(full: Tensor, parameter: Tensor, rank: int, parts: int) -> Tensor:
    """This rank's part; packed rows such as Mamba's [z, x, B, C, dt] are split block by block."""
    axis = _split_axis(parameter)
    if axis is None or parts == 1:
        return full
    sizes = getattr(parameter, "partition_sizes", [parameter.shape[axis]])
    blocks = full.split([size * parts for size in sizes], axis)
    return torch.cat([block.chunk(parts, axis)[rank] for block in blocks], axis)


def _fill_experts(
    name: str,
    match: re.Match[str],
    parameter: Tensor,
    draw: Draw,
    config: TransformerConfig,
    groups: Groups,
    seed: int,
) -> None:
    """Draw each expert under its global index, whether they are stacked (ours) or numbered (transformer-engine's)."""
    stacked = parameter.dim() == 3
    assert config.num_moe_experts is not None
    first = groups.ep_rank * (config.num_moe_experts // groups.ep_size)
    expert_tp = groups.pg.expt_tp
    axis = 0 if "linear_fc1" in match.group() else 1
    stem = name.rstrip("0123456789")
    for index, weight in enumerate(parameter if stacked else parameter[None]):
        number = first + (index if stacked else int(match.group(1)))
        shape = [n * (expert_tp.size() if d == axis else 1) for d, n in enumerate(weight.shape)]
        full = draw(tuple(shape), _generator(seed, f"{stem}{number}"))
        weight.copy_(full.chunk(expert_tp.size(), axis)[expert_tp.rank()])
