"""Quantization-aware training: forwards see the weights as a recipe would store them, the optimizer the originals.

The quantize-dequantized values stand in the parameters themselves, so that sampling, prox, update and evaluation see
them whatever class computes a layer, and whether or not it is recomputed. They are made once per optimizer step; the
originals come back for the step itself and for checkpoints. The gradient is that of the quantized values, passed
straight through to the originals (straight-through estimator, Bengio et al. 2013).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.utils import unwrap_model
from torch import Tensor, nn

from megatron_mopd import linear_weights
from megatron_mopd.config import Config, ConfigurationError, Quantization
from megatron_mopd.linear_weights import ROUTED_EXPERT, Matrix
from megatron_mopd.parallel import Groups
from megatron_mopd.quantization import recipes, stored
from mopd_kernels import nvfp4
from mopd_kernels.dispatch import Impl

log = logging.getLogger(__name__)

Assigned = list[tuple[Matrix, recipes.Format]]


class FakeQuantization:
    """The student's weights as a recipe stores them; from construction on, but within :meth:`originals`.

    Values are those that tools/quantize_checkpoint.py stores in ModelOpt's layout, from the same encoder; the maximum
    of a matrix is taken over all ranks that share it. Raises :class:`ConfigurationError` for a recipe that does not
    name every matrix and for a format that a layer cannot take.
    """

    def __init__(self, model: nn.Module, settings: Quantization, groups: Groups, impl: Impl) -> None:
        assert settings.train is not None
        self._four_over_six: stored.FourOverSix | None = settings.four_over_six
        self._assigned = _assigned(model, recipes.load(settings.train), groups)
        self._originals = {
            id(m.parameter): (m.parameter, torch.empty_like(m.parameter.data)) for m, _ in self._assigned
        }
        if settings.activations:
            _hook_experts(model, {m.parameter_name for m, f in self._assigned if f == "nvfp4"}, impl)
        self._keep()
        self._quantize()
        counts = {f: sum(1 for _, given in self._assigned if given == f) for f in recipes.QUANTIZED}
        log.info("quantization.train %s: %s matrices on this rank", settings.train, counts)

    @contextmanager
    def originals(self) -> Iterator[None]:
        """Within the block the parameters hold the high-precision weights, bit for bit, and may be changed; they still
        do after an exception."""
        for parameter, original in self._originals.values():
            parameter.data.copy_(original)
        try:
            yield
        finally:
            self._keep()
        self._quantize()

    def _keep(self) -> None:
        for parameter, original in self._originals.values():
            original.copy_(parameter.data)

    @torch.no_grad()
    def _quantize(self) -> None:
        amax = linear_weights.whole_amax([m for m, _ in self._assigned])
        for (matrix, form), peak in zip(self._assigned, amax, strict=True):
            encoder = stored.Encoder(matrix.name, form, "modelopt", self._four_over_six, peak)
            matrix.weight.copy_(encoder(matrix.weight).values)


def _check_layers(model: Any, settings: Quantization) -> None:
    """Refuse layers that quantize weights themselves, and those that call no linear whose input could be hooked."""
    for field in ("fp8", "fp4"):
        if value := getattr(model.config, field):
            raise ConfigurationError(
                f"model.override.{field} = {value!r} with quantization.train: both would quantize the weights of a"
                " layer; leave one of them out"
            )
    if settings.activations and model.config.use_transformer_engine_op_fuser:
        raise ConfigurationError(
            "model.override.use_transformer_engine_op_fuser = true with quantization.activations: fused experts never"
            " call the linears whose inputs are to be quantized; leave one of them out"
        )


def _assigned(model: nn.Module, recipe: recipes.Recipe, groups: Groups) -> Assigned:
    """The matrices on this rank that the recipe quantizes, with their formats."""
    found = linear_weights.matrices(model, groups)
    stages: list[Any] = [None] * groups.pp_size
    dist.all_gather_object(stages, [m.name for m in found], group=groups.pp)  # the recipe counts layers of all stages
    rules = recipe.assign(name for names in stages for name in names)
    chosen: Assigned = [(m, rules[m.name].format) for m in found if rules[m.name].format in recipes.QUANTIZED]
    if not any(rule.format in recipes.QUANTIZED for rule in rules.values()):
        raise ConfigurationError(
            f"quantization.train: recipe {recipe.name} quantizes no matrix of this model (model.pattern has none of"
            " the layers it is about); leave the setting out or name another recipe"
        )
    for matrix, form in chosen:
        _check(matrix, form, recipe.name)
    return chosen


def _check(matrix: Matrix, form: str, recipe: str) -> None:
    if matrix.interleaved:
        raise ConfigurationError(
            f"quantization.train: recipe {recipe} stores {matrix.name} in {form}, but its rows stand among those of"
            f" others in {matrix.parameter_name}; give attention projections bf16"
        )
    if form == "nvfp4" and (columns := matrix.weight.shape[1]) % stored.BLOCK:
        parts = matrix.group.size() if matrix.group is not None and matrix.axis == 1 else 1
        raise ConfigurationError(
            f"quantization.train: recipe {recipe} stores {matrix.name} in nvfp4, but each of {parts} ranks holds"
            f" {columns} of its columns, no multiple of {stored.BLOCK}; split it fewer ways (parallel.tensor,"
            " parallel.expert_tensor) or give it another format"
        )


# ------------------------------------------------------------------ activations


def _hook_experts(model: nn.Module, parameters: set[str], impl: Impl) -> None:
    """Quantize-dequantize what reaches the routed experts' linears whose weights are in NVFP4."""
    plain: Any = unwrap_model(model)
    for name, module in plain.named_modules():
        own = {f"{name}.{p}" for p, _ in module.named_parameters(recurse=False)}
        if any(ROUTED_EXPERT.search(p) for p in own & parameters):
            experts = plain.get_submodule(name.rpartition(".")[0])
            group = experts.tp_group if name.endswith("linear_fc2") else None  # only its input is split
            module.register_forward_pre_hook(
                lambda _, args, group=group: (quantized_rows(args[0], group, impl), *args[1:])
            )


def quantized_rows(x: Tensor, group: dist.ProcessGroup | None = None, impl: Impl = "auto") -> Tensor:
    """``x [T, K]`` quantize-dequantized to NVFP4, its gradient passed straight through.

    The global scale is a power of two of each row's own (at most twice its maximum), so that a token's value does not
    depend on the tokens it is computed with. ``group`` shares the columns.
    """
    return _StraightThrough.apply(x, group, impl)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup | None, impl: Impl) -> Tensor:
        if not len(x):
            return x.clone()
        peak = x.abs().amax(1, keepdim=True).float()
        if group is not None and group.size() > 1:
            dist.all_reduce(peak, op=dist.ReduceOp.MAX, group=group)
        exponent = torch.frexp(peak).exponent
        scaled = torch.ldexp(x.float(), -exponent)  # exact, magnitudes below 1
        one = torch.ones((), device=x.device)
        rounded = nvfp4.quantize_dequantize(scaled, nvfp4.Format(numerics="modelopt"), amax=one, impl=impl)
        return torch.ldexp(rounded, exponent).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0], None, None


def of(config: Config, model: Any, groups: Groups) -> FakeQuantization | None:
    """What ``config.quantization`` asks for; None where it asks for nothing."""
    if config.quantization.train is None:
        return None
    _check_layers(unwrap_model(model), config.quantization)
    return FakeQuantization(model, config.quantization, groups, config.kernels.impl)
