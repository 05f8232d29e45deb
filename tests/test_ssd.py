"""The chunked scan against a sequential recurrence in fp64 and against transformers' NemotronH mixer."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_mopd import ssd


def _recurrence(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The definition, token by token: y [b, s, h, p] and the last state [b, h, p, n]."""
    share = x.shape[2] // B.shape[2]
    B, C = B.repeat_interleave(share, 2), C.repeat_interleave(share, 2)
    outputs = []
    for t in range(x.shape[1]):
        decay = (dt[:, t] * A).exp()[..., None, None]
        state = decay * state + torch.einsum("bh,bhp,bhn->bhpn", dt[:, t], x[:, t], B[:, t])
        outputs.append(torch.einsum("bhpn,bhn->bhp", state, C[:, t]) + (D if D.dim() == 2 else D[:, None]) * x[:, t])
    return torch.stack(outputs, 1), state


def _inputs(b: int, s: int, h: int, p: int, g: int, n: int, wide_d: bool = False) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(b * 1000 + s)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    return {
        "x": normal(b, s, h, p),
        "dt": F.softplus(normal(b, s, h)),
        "A": -normal(h).exp() * 3,
        "B": normal(b, s, g, n),
        "C": normal(b, s, g, n),
        "D": normal(h, p) if wide_d else normal(h),
        "state": normal(b, h, p, n),
    }


# Lengths below, at, just above and far above one chunk, a ragged last chunk, one group, many groups, odd widths.
SHAPES = [
    (2, 7, 4, 5, 2, 3, 16),
    (1, 16, 3, 4, 1, 5, 16),
    (3, 17, 6, 2, 3, 7, 16),
    (2, 61, 4, 8, 4, 4, 8),
    (2, 1, 2, 3, 1, 2, 8),
    (1, 130, 2, 5, 1, 3, 32),
]


def _id(shape: tuple[int, ...]) -> str:
    return "b{}-s{}-h{}-p{}-g{}-n{}-chunk{}".format(*shape)


@pytest.mark.parametrize("shape", SHAPES, ids=_id)
@pytest.mark.parametrize("wide_d", [False, True], ids=["D-per-head", "D-per-channel"])
def test_scan_equals_the_recurrence_with_gradients(shape: tuple[int, ...], wide_d: bool) -> None:
    *dims, chunk = shape
    wide = _inputs(*dims, wide_d=wide_d)
    truth = {k: v.clone().requires_grad_() for k, v in wide.items()}
    ours = {k: v.float().requires_grad_() for k, v in wide.items()}
    y_true, last_true = _recurrence(**truth)
    state = ours.pop("state")
    y, last = ssd.scan(**ours, chunk_size=chunk, initial_state=state, want_state=True)
    assert last is not None
    torch.testing.assert_close(y.double(), y_true, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(last.double(), last_true, rtol=1e-4, atol=1e-4)
    weight_y = torch.sin(torch.arange(y.numel())).view_as(y)
    weight_last = torch.cos(torch.arange(last.numel())).view_as(last)
    names = [*truth]
    expected = torch.autograd.grad((y_true * weight_y).sum() + (last_true * weight_last).sum(), [*truth.values()])
    leaves = ours | {"state": state}
    got = torch.autograd.grad((y * weight_y).sum() + (last * weight_last).sum(), [leaves[k] for k in names])
    for name, e, g in zip(names, expected, got, strict=True):
        tolerance = 2e-4 * max(1.0, e.abs().max().item())
        torch.testing.assert_close(g.double(), e, rtol=1e-3, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def test_strong_decay_stays_finite() -> None:
    """Decays of e^-2000 within one chunk: no overflow above the diagonal, no NaN in a gradient."""
    inputs = {k: v.float().requires_grad_() for k, v in _inputs(2, 40, 2, 3, 1, 4).items()}
    state = inputs.pop("state")
    inputs["A"] = torch.full((2,), -80.0, requires_grad=True)
    y, last = ssd.scan(**inputs, chunk_size=64, initial_state=state, want_state=True)
    assert last is not None
    gradients = torch.autograd.grad(y.sum() + last.sum(), [*inputs.values(), state])
    assert all(t.isfinite().all() for t in (y, last, *gradients))


def test_masked_steps_give_each_row_its_own_state() -> None:
    inputs = {k: v.float() for k, v in _inputs(3, 20, 4, 4, 2, 5).items()}
    inputs.pop("state")
    lengths = [1, 13, 20]
    masked = inputs | {"dt": inputs["dt"] * (torch.arange(20) < torch.tensor(lengths)[:, None])[..., None]}
    _, states = ssd.scan(**masked, chunk_size=8, want_state=True)
    assert states is not None
    for row, length in enumerate(lengths):
        alone = {k: v[row : row + 1, :length] if k not in "AD" else v for k, v in inputs.items()}
        _, state = ssd.scan(**alone, chunk_size=8, want_state=True)
        assert state is not None
        torch.testing.assert_close(states[row], state[0], rtol=1e-5, atol=1e-5)


def test_step_continues_the_scan() -> None:
    inputs = {k: v.float() for k, v in _inputs(3, 9, 6, 4, 3, 5).items()}
    inputs.pop("state")
    y, last = ssd.scan(**inputs, chunk_size=16, want_state=True)
    first = {k: v[:, :5] if v.dim() > 2 else v for k, v in inputs.items()}
    _, state = ssd.scan(**first, chunk_size=16, want_state=True)
    assert state is not None and last is not None
    for t in range(5, 9):
        x, dt, B, C = (inputs[k][:, t] for k in ("x", "dt", "B", "C"))
        stepped = ssd.step(state, x, dt, inputs["A"], B, C, inputs["D"])
        torch.testing.assert_close(stepped, y[:, t], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(state, last, rtol=1e-4, atol=1e-4)


def test_convolution_and_its_gradients() -> None:
    x = torch.randn(3, 11, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(6, dtype=torch.float64, requires_grad=True)
    expected = F.silu(F.conv1d(x.transpose(1, 2), weight[:, None], bias, padding=3, groups=6)[..., :11].transpose(1, 2))
    torch.testing.assert_close(ssd.causal_conv(x, weight, bias), expected)
    assert torch.autograd.gradcheck(ssd.causal_conv, (x, weight, bias))
    assert torch.autograd.gradcheck(lambda a, w: ssd.causal_conv(a, w, None, None), (x, weight))


@pytest.mark.parametrize("chunk", [8, 64], ids=["chunks", "one-chunk"])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_layer_equals_transformers_nemotron_h(chunk: int, groups: int) -> None:
    """The whole layer from projection to projection against transformers' torch path; forward and gradients, fp32."""
    from transformers import NemotronHConfig
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMamba2Mixer

    torch.manual_seed(groups)
    heads, width, state = 4, 8, 16
    # time_step_min 0: mcore does not clamp step sizes, transformers does.
    config = NemotronHConfig(
        hidden_size=24,
        mamba_num_heads=heads,
        mamba_head_dim=width,
        ssm_state_size=state,
        n_groups=groups,
        conv_kernel=4,
        chunk_size=chunk,
        layers_block_type=["mamba"],
        time_step_min=0.0,
        use_conv_bias=True,
        layer_norm_epsilon=1e-5,
    )
    mixer = NemotronHMamba2Mixer(config, layer_idx=0)
    with torch.no_grad():
        mixer.dt_bias.normal_()
        mixer.D.normal_()
        mixer.norm.weight.normal_()
    norm = ssd.RMSNormGated(heads * width, eps=1e-5, group_size=heads * width // groups, norm_before_gate=False)
    norm.weight = mixer.norm.weight

    def ours(hidden: Tensor) -> Tensor:
        y = ssd.mamba_split_conv1d_scan_combined(
            mixer.in_proj(hidden),
            mixer.conv1d.weight.squeeze(1),
            mixer.conv1d.bias,
            mixer.dt_bias,
            -mixer.A_log.exp(),
            mixer.D,
            chunk,
            headdim=width,
            ngroups=groups,
            norm_before_gate=False,
        )
        assert isinstance(y, Tensor)
        return mixer.out_proj(norm(y))

    hidden = torch.randn(3, 29, 24, requires_grad=True)
    theirs, mine = mixer(hidden), ours(hidden)
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    inputs = [hidden, *mixer.parameters()]
    cotangent = torch.randn_like(theirs)
    expected, got = torch.autograd.grad(theirs, inputs, cotangent), torch.autograd.grad(mine, inputs, cotangent)
    for e, g in zip(expected, got, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-3, atol=1e-4 * max(1.0, e.abs().max().item()))


def test_the_two_entries_agree() -> None:
    """Training calls the fused entry, mcore's prefill the scan alone followed by the gated norm."""
    torch.manual_seed(3)
    b, s, h, p, g, n = 2, 13, 4, 3, 2, 5
    channels = h * p + 2 * g * n
    zxbcdt, weight, bias = torch.randn(b, s, h * p + channels + h), torch.randn(channels, 4), torch.randn(channels)
    dt_bias, A, D = torch.randn(h), -torch.rand(h), torch.randn(h, p)
    fused, last = ssd.mamba_split_conv1d_scan_combined(
        zxbcdt, weight, bias, dt_bias, A, D, 4, ngroups=g, return_final_states=True
    )
    z, xbc, dt = zxbcdt.split([h * p, channels, h], -1)
    x, B, C = ssd.causal_conv(xbc, weight, bias).split([h * p, g * n, g * n], -1)
    alone, state = ssd.mamba_chunk_scan_combined(
        x.view(b, s, h, p),
        dt,
        A,
        B.view(b, s, g, n),
        C.view(b, s, g, n),
        4,
        D=D,
        z=z.view(b, s, h, p),
        dt_bias=dt_bias,
        dt_softplus=True,
        return_final_states=True,
    )
    torch.testing.assert_close(fused, alone.flatten(2))
    torch.testing.assert_close(last, state)


def test_bf16_is_no_worse_than_its_rounding() -> None:
    """Inputs in bf16, everything inside in fp32: the error is that of rounding the result."""
    rounded = {k: v.bfloat16().double() for k, v in _inputs(2, 40, 4, 8, 2, 16).items()}
    state = rounded.pop("state")
    truth, _ = _recurrence(**rounded, state=torch.zeros_like(state))
    low = {k: v.bfloat16() for k, v in rounded.items()}
    y = ssd.mamba_chunk_scan_combined(low["x"], low["dt"], low["A"], low["B"], low["C"], 16, D=low["D"])
    assert isinstance(y, Tensor) and y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), truth, rtol=2**-8, atol=1e-3)


def test_norm_gate_orders() -> None:
    x, z = torch.randn(5, 12), torch.randn(5, 12)
    for first in (False, True):
        norm = ssd.RMSNormGated(12, eps=1e-5, group_size=4, norm_before_gate=first)
        norm.weight.data.normal_()
        gate = F.silu(z)
        inner = x if first else x * gate
        grouped = inner.view(5, 3, 4)
        expected = (grouped * (grouped.square().mean(-1, keepdim=True) + 1e-5).rsqrt()).view(5, 12) * norm.weight
        torch.testing.assert_close(norm(x, z), expected * gate if first else expected)
    assert [*norm.state_dict()] == ["weight"]  # the name in mamba-ssm's checkpoints


@pytest.mark.parametrize("argument", ["seq_idx", "rmsnorm_weight", "outproj_weight"])
def test_what_the_torch_scan_cannot_do_is_refused(argument: str) -> None:
    inputs = (torch.zeros(1, 2, 13), torch.zeros(7, 4), None, torch.zeros(1), -torch.ones(1), torch.ones(1), 4)
    with pytest.raises(ValueError, match=argument):
        ssd.mamba_split_conv1d_scan_combined(*inputs, headdim=5, **{argument: torch.zeros(1)})
    with pytest.raises(ValueError, match="group_size"):
        ssd.RMSNormGated(10, group_size=4)
