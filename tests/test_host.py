"""The CUDA surface redirected to the host: only where there is no CUDA, only on request, and to the same effect."""

from __future__ import annotations

from types import CodeType
from typing import Any

import pytest
import torch

from megatron_mopd import host

without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="the remedies are for machines without CUDA")


def test_each_remedy_says_what_and_why() -> None:
    assert len({r.name for r in host.REMEDIES}) == len(host.REMEDIES) >= 5
    assert all(r.where and len(r.reason.split()) > 5 for r in host.REMEDIES)


@pytest.mark.parametrize("cuda", [True, False])
def test_remedies_are_applied_once_and_only_without_cuda(monkeypatch: pytest.MonkeyPatch, cuda: bool) -> None:
    applied: list[str] = []
    remedy = host.Remedy("test", "nowhere", "counts its applications", lambda: applied.append("test"))
    monkeypatch.setattr(host, "REMEDIES", (remedy,))
    monkeypatch.setattr(host, "_active", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    host.activate()
    host.activate()
    assert applied == ([] if cuda else ["test"])


def strings(code: CodeType) -> set[str]:
    found: set[str] = set()
    pending: list[Any] = list(code.co_consts)
    while pending:
        constant = pending.pop()
        if isinstance(constant, CodeType):
            pending.extend(constant.co_consts)
        elif isinstance(constant, tuple):
            pending.extend(constant)
        elif isinstance(constant, str):
            found.add(constant)
    return found


@without_cuda
def test_no_cuda_literal_is_left_where_mcore_optimizes() -> None:
    host.activate()
    from megatron.core.optimizer import clip_grads, distrib_optimizer, optimizer

    literals = {"cuda", "torch.cuda.FloatTensor", "torch.cuda.BFloat16Tensor"}
    for function in (
        clip_grads.clip_grad_by_total_norm_fp32,
        distrib_optimizer.DistributedOptimizer._build_model_and_main_param_groups.__func__,
        optimizer.Float16OptimizerWithFloat16Params.__init__,
        optimizer.MixedPrecisionOptimizer.__init__,
    ):
        assert not strings(function.__code__) & literals, function.__qualname__


@without_cuda
def test_the_last_stages_copy_of_the_embedding_stays_on_the_host() -> None:
    host.activate()
    from megatron.core.models.common.language_module.language_module import LanguageModule

    names = LanguageModule.setup_embeddings_and_output_layer.__code__.co_names
    assert "cuda" not in names and "cpu" in names


@without_cuda
def test_clipping_scales_host_gradients() -> None:
    host.activate()
    from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

    parameter = torch.nn.Parameter(torch.zeros(4))
    parameter.grad = torch.full((4,), 3.0)  # norm 6
    clip_grad_by_total_norm_fp32([parameter], max_norm=1.5, total_norm=6.0)
    torch.testing.assert_close(parameter.grad, torch.full((4,), 0.75))


@pytest.fixture
def tracker() -> Any:
    host.activate()
    from megatron.core.tensor_parallel import random

    fresh = random.CudaRNGStatesTracker()
    fresh.add("a", 1)
    fresh.add("b", 2)
    return fresh


@without_cuda
def test_forked_states_run_on_and_leave_the_outer_one_alone(tracker: Any) -> None:
    torch.manual_seed(0)
    expected = torch.rand(4)
    torch.manual_seed(0)
    first = torch.rand(2)
    with tracker.fork("a"):
        inside = torch.rand(2)
        with tracker.fork("b"):
            torch.rand(3)
        inside = torch.cat([inside, torch.rand(2)])
    assert torch.equal(torch.cat([first, torch.rand(2)]), expected)
    with tracker.fork("a"):
        later = torch.rand(2)
    assert torch.equal(torch.cat([inside, later]), torch.rand(6, generator=torch.Generator().manual_seed(1)))


@without_cuda
def test_states_can_be_taken_and_given_back(tracker: Any) -> None:
    states = tracker.get_states()
    with tracker.fork("a"):
        drawn = torch.rand(3)
    tracker.set_states(states)
    with tracker.fork("a"):
        assert torch.equal(torch.rand(3), drawn)


@without_cuda
def test_state_names_are_checked(tracker: Any) -> None:
    with pytest.raises(ValueError, match=r"'a' .*exists"):
        tracker.add("a", 3)
    with pytest.raises(KeyError, match="'c' was not added; known"), tracker.fork("c"):
        pass


def test_mcores_own_spec_is_used_with_both_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec

    from megatron_mopd import local_spec

    monkeypatch.setattr(local_spec, "have_transformer_engine", lambda: True)
    monkeypatch.setattr(local_spec, "install", lambda: None)
    assert local_spec.stack_spec() is hybrid_stack_spec
    changed = local_spec.stack_spec(conv=4, chunk=32)
    mixer = changed.submodules.mamba_layer.submodules.mixer
    assert mixer.params == {"d_conv": 4, "chunk_size": 32}
    assert mixer.submodules == hybrid_stack_spec.submodules.mamba_layer.submodules.mixer.submodules
    assert hybrid_stack_spec.submodules.mamba_layer.submodules.mixer.params == {}


def test_present_packages_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core.models.hybrid import hybrid_block
    from megatron.core.ssm import mamba_mixer
    from megatron.core.transformer.moe import moe_layer

    from megatron_mopd import local_spec

    sentinel = object()
    names = [(hybrid_block, "TENorm"), (moe_layer, "TELinear"), (mamba_mixer, "ExtendedRMSNorm")]
    for module, name in names:
        monkeypatch.setattr(module, name, sentinel)
    monkeypatch.setattr(local_spec, "have_transformer_engine", lambda: True)
    monkeypatch.setattr(local_spec, "have_mamba_ssm", lambda: True)
    local_spec.install.__wrapped__()
    assert all(getattr(module, name) is sentinel for module, name in names)


@pytest.mark.parametrize("counts", [(3, 0, 4), (0, 0, 0), (7, 0, 0)])
def test_grouped_linear_is_each_experts_product(counts: tuple[int, ...]) -> None:
    from megatron_mopd.local_layers import grouped_linear

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(sum(counts), 5, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 6, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    expected = torch.cat([rows @ w.T for rows, w in zip(x.split(counts), weight, strict=True)])
    actual = grouped_linear(x, weight, counts)
    torch.testing.assert_close(actual, expected)
    direction = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    wanted = torch.autograd.grad(expected, (x, weight), direction)
    for got, want in zip(torch.autograd.grad(actual, (x, weight), direction), wanted, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_multiplies_its_weight_in_fp32(dtype: torch.dtype) -> None:
    from megatron_mopd.local_layers import rms_norm

    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight = (1 + torch.rand(64, generator=torch.Generator().manual_seed(1))).to(dtype)
    wide = x.double()
    expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    torch.testing.assert_close(rms_norm(x, weight, 1e-5), expected.to(dtype))


def test_attention_is_mcores(groups: Any) -> None:
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    from megatron_mopd import student
    from megatron_mopd.config import Model, Parallel
    from megatron_mopd.local_layers import CausalAttention

    plain = student.build_model(Model(pattern="*"), Parallel(), groups, 64)
    core = next(m for m in plain.modules() if isinstance(m, CausalAttention))
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(9, 2, heads, 32, generator=generator) for heads in (4, 2, 2))
    torch.testing.assert_close(core(q, k, v, None), DotProductAttention.forward(core, q, k, v, None))
