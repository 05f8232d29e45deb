"""Mamba-2's state space duality in plain torch: products within chunks, a short loop over chunks, none over tokens.

Stands in for mamba-ssm where that package is absent and serves cached decoding everywhere. Per head, with decay
``a_t = exp(dt_t A)``: ``state_t = a_t state_{t-1} + dt_t x_t B_t^T`` and ``y_t = state_t C_t + D x_t`` (Dao and Gu,
"Transformers are SSMs", arXiv 2405.21060, sections 6 and 7). Computed in fp32 whatever the inputs' dtype.

Axis letters: ``b`` rows, ``s`` tokens, ``l`` tokens of one chunk, ``h`` heads, ``p`` head width, ``g`` groups of heads
that share B and C, ``n`` state width, ``N`` chunks of all rows.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

UNBOUNDED = (0.0, float("inf"))


class RMSNormGated(nn.Module):
    """``norm(x * silu(z)) * weight``, the root mean square taken over groups of channels; eps inside the root.

    Arguments and parameter name are those of mamba-ssm's layer; statistics in fp32, result in ``x``'s dtype.
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.group_size = group_size or hidden_size
        if hidden_size % self.group_size:
            raise ValueError(f"group_size = {group_size} must divide hidden_size = {hidden_size}")
        self.eps = eps
        self.norm_before_gate = norm_before_gate
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        """``x [..., H]``, gate ``z [..., H]`` or None -> ``[..., H]``."""
        y = x.float()
        if z is not None and not self.norm_before_gate:
            y = y * F.silu(z.float())
        y = F.rms_norm(y.unflatten(-1, (-1, self.group_size)), (self.group_size,), eps=self.eps).flatten(-2)
        y = y * self.weight.float()
        if z is not None and self.norm_before_gate:
            y = y * F.silu(z.float())
        return y.to(x.dtype)


def mamba_split_conv1d_scan_combined(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor | None,
    chunk_size: int,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    dt_limit: tuple[float, float] = UNBOUNDED,
    return_final_states: bool = False,
    activation: str | None = "silu",
    rmsnorm_weight: Tensor | None = None,
    rmsnorm_eps: float = 1e-6,
    outproj_weight: Tensor | None = None,
    outproj_bias: Tensor | None = None,
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:
    """The middle of a Mamba-2 layer: split, convolution, scan and gate; mamba-ssm's signature.

    ``zxbcdt [b, s, 2 h p + 2 g n + h]`` in the order z, x, B, C, dt; ``conv1d_weight [h p + 2 g n, w]``;
    ``dt_bias [h]``; ``A [h]`` negative; ``D [h]`` or ``[h, p]``, whose width is taken without ``headdim``. Returns
    ``[b, s, h p]`` in the input's dtype, with ``return_final_states`` the fp32 state ``[b, h, p, n]`` too. Raises
    ValueError for the norm, output projection and packed sequences that mamba-ssm can fuse in: mcore applies the first
    two itself and packs none here.
    """
    fused = {"rmsnorm_weight": rmsnorm_weight, "outproj_weight": outproj_weight, "outproj_bias": outproj_bias}
    _refuse(seq_idx=seq_idx, **fused)
    heads = len(A)
    if headdim is None and (D is None or D.dim() != 2):
        raise ValueError("headdim is needed unless D has shape [h, p]")
    width = D.shape[1] if headdim is None and D is not None else int(headdim or 0)
    inner, state_width = heads * width, (conv1d_weight.shape[0] - heads * width) // (2 * ngroups)
    z, xbc, dt = zxbcdt.split([inner, conv1d_weight.shape[0], heads], dim=-1)
    xbc = causal_conv(xbc, conv1d_weight, conv1d_bias, activation)
    x, B, C = xbc.split([inner, ngroups * state_width, ngroups * state_width], dim=-1)
    y, state = scan(
        x.unflatten(-1, (heads, width)),
        step_sizes(dt, dt_bias, dt_limit),
        A,
        B.unflatten(-1, (ngroups, state_width)),
        C.unflatten(-1, (ngroups, state_width)),
        D,
        chunk_size,
        initial_states,
        want_state=return_final_states,
    )
    y = (y.flatten(-2) * F.silu(z.float())).to(zxbcdt.dtype)
    return (y, state) if state is not None else y


def mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = UNBOUNDED,
    return_final_states: bool = False,
    return_varlen_states: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The scan alone; mamba-ssm's signature.

    ``x [b, s, h, p]``, ``dt [b, s, h]``, ``A [h]`` negative, ``B`` and ``C [b, s, g, n]``, ``D [h]`` or ``[h, p]``,
    gate ``z`` as ``x``. Returns ``[b, s, h, p]`` in ``x``'s dtype and, with ``return_final_states``, the fp32 state
    ``[b, h, p, n]`` after the last token. Raises ValueError for packed sequences.
    """
    _refuse(seq_idx=seq_idx, cu_seqlens=cu_seqlens, return_varlen_states=return_varlen_states or None)
    steps = step_sizes(dt, dt_bias, dt_limit, dt_softplus)
    y, state = scan(x, steps, A, B, C, D, chunk_size, initial_states, want_state=return_final_states)
    y = (y if z is None else y * F.silu(z.float())).to(x.dtype)
    return (y, state) if state is not None else y


def step_sizes(
    dt: Tensor, bias: Tensor | None, limit: tuple[float, float] = UNBOUNDED, softplus: bool = True
) -> Tensor:
    """``softplus(dt + bias)`` in fp32, clamped to ``limit``; ``dt [..., h]``, ``bias [h]``."""
    dt = dt.float() if bias is None else dt.float() + bias.float()
    if softplus:
        dt = F.softplus(dt)
    return dt if tuple(limit) == UNBOUNDED else dt.clamp(*limit)


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None = "silu") -> Tensor:
    """Depthwise convolution over the last ``w`` tokens, then the activation (silu, swish or None).

    ``x [b, s, k]``, ``weight [k, w]`` (the last tap meets the current token), ``bias [k]`` -> ``[b, s, k]``.
    """
    if activation not in (None, "silu", "swish"):
        raise ValueError(f"activation = {activation!r}: the convolution knows 'silu', 'swish' and None")
    padded = F.pad(x, (0, 0, weight.shape[1] - 1, 0))
    # Channels are innermost in memory, which is torch's fast layout for a 2-D depthwise convolution of height 1.
    y = _DepthwiseConv.apply(padded, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    return y if activation is None else F.silu(y)


class _DepthwiseConv(torch.autograd.Function):
    """Own backward: torch's takes several times longer on a CPU at few channels."""

    @staticmethod
    def forward(ctx: Any, padded: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(padded, weight)
        ctx.biased = bias is not None
        return _correlate(padded, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        padded, weight = ctx.saved_tensors
        dy = grads[0].contiguous()
        taps, length = weight.shape[1], dy.shape[1]
        d_padded = _correlate(F.pad(dy, (0, 0, taps - 1, taps - 1)), weight.flip(1), None)
        d_weight = torch.stack([(padded[:, t : t + length] * dy).sum((0, 1)) for t in range(taps)], dim=1)
        return d_padded, d_weight, dy.sum((0, 1)) if ctx.biased else None


def _correlate(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``y[:, t, k] = bias_k + sum_i weight[k, i] x[:, t + i, k]``: ``[b, s + w - 1, k]`` -> ``[b, s, k]``."""
    y = F.conv2d(x.transpose(1, 2).unsqueeze(2), weight[:, None, None], bias, groups=len(weight))
    return y.squeeze(2).transpose(1, 2)


def scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    chunk_size: int,
    initial_state: Tensor | None = None,
    *,
    want_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The recurrence over whole sequences; shapes as in :func:`mamba_chunk_scan_combined`, ``dt`` ready to use.

    A token with ``dt == 0`` leaves the state as it is, so masking ``dt`` beyond a row's length gives the state at that
    length. Returns fp32 ``y [b, s, h, p]`` and, if wanted, the state ``[b, h, p, n]``. Sequences within one chunk do no
    work between chunks. Raises ValueError when the groups do not divide the heads.
    """
    x, dt, B, C = x.float(), dt.float(), B.float(), C.float()
    rows, length, heads, _ = x.shape
    if heads % B.shape[2]:
        raise ValueError(f"{B.shape[2]} groups do not divide {heads} heads")
    chunk = min(chunk_size, max(length, 1))
    chunks = -(-length // chunk)
    u = x * dt.unsqueeze(-1)
    if chunks * chunk > length:
        tail = chunks * chunk - length
        dt, u, B, C = (F.pad(t, (0, 0) * (t.dim() - 2) + (0, tail)) for t in (dt, u, B, C))
    # Chunks become rows, and tokens move next to the axes that are multiplied.
    u, B, C = (t.unflatten(1, (chunks, chunk)).flatten(0, 1).transpose(1, 2) for t in (u, B, C))
    log_decay = (dt * A.float()).unflatten(1, (chunks, chunk)).flatten(0, 1).transpose(1, 2).cumsum(-1)
    y = _within_chunks(u, log_decay, B, C)
    state = None
    if chunks > 1 or want_state or initial_state is not None:
        gained = _gained(u, log_decay, B)
        before, state = _between_chunks(gained, log_decay[..., -1], rows, initial_state)
        if before is not None:
            y = y + _carried(before, log_decay, C)
    y = y.transpose(1, 2).unflatten(0, (rows, chunks)).flatten(1, 2)[:, :length]
    if D is not None:
        y = torch.addcmul(y, x, D.float() if D.dim() == 2 else D.float().unsqueeze(-1))
    return y, state if want_state else None


def _within_chunks(u: Tensor, log_decay: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """What tokens of one chunk give to later ones: ``[N, h, l, p]``, from ``u`` of that shape.

    ``log_decay [N, h, l]`` falls with time; B and C are ``[N, g, l, n]``.
    """
    between = log_decay.unsqueeze(-1) - log_decay.unsqueeze(-2)
    # Exponents of future tokens are positive and might overflow: clamped here, their similarity is zero below.
    decay = between.clamp(max=0.0).exp()
    similarity = (C @ B.transpose(-1, -2)).tril()
    weights = similarity.unsqueeze(2) * decay.unflatten(1, (B.shape[1], -1))
    return weights.flatten(1, 2) @ u


def _gained(u: Tensor, log_decay: Tensor, B: Tensor) -> Tensor:
    """State that each chunk's own tokens leave at its end: ``[N, h, p, n]``."""
    left = u * (log_decay[..., -1:] - log_decay).exp().unsqueeze(-1)
    return (left.unflatten(1, (B.shape[1], -1)).transpose(-1, -2) @ B.unsqueeze(2)).flatten(1, 2)


def _between_chunks(
    gained: Tensor, total: Tensor, rows: int, initial_state: Tensor | None
) -> tuple[Tensor | None, Tensor]:
    """States before each chunk ``[N, h, p, n]`` (None where nothing precedes) and after the last ``[b, h, p, n]``."""
    gains = gained.unflatten(0, (rows, -1)).unbind(1)
    decays = total.exp()[..., None, None].unflatten(0, (rows, -1)).unbind(1)
    if len(gains) == 1 and initial_state is None:
        return None, gains[0]
    state = torch.zeros_like(gains[0]) if initial_state is None else initial_state.float()
    before = []
    for gain, decay in zip(gains, decays, strict=True):
        before.append(state)
        state = torch.addcmul(gain, state, decay)
    return torch.stack(before, dim=1).flatten(0, 1), state


def _carried(before: Tensor, log_decay: Tensor, C: Tensor) -> Tensor:
    """What the state before a chunk gives to its tokens: ``[N, h, l, p]``."""
    read = (C.unsqueeze(2) @ before.unflatten(1, (C.shape[1], -1)).transpose(-1, -2)).flatten(1, 2)
    return read * log_decay.exp().unsqueeze(-1)


def step(state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None) -> Tensor:
    """One token for each row; ``state [b, h, p, n]`` (fp32) is updated in place.

    ``x [b, h, p]``, ``dt [b, h]`` ready to use, ``B`` and ``C [b, g, n]`` -> fp32 ``y [b, h, p]``. Not differentiable.
    """
    x, dt, A = x.float(), dt.float(), A.float()
    groups = B.shape[1]
    state.mul_((dt * A).exp()[..., None, None])
    by_group = state.unflatten(1, (groups, -1))  # a view: [b, g, h/g, p, n]
    by_group.addcmul_((x * dt.unsqueeze(-1)).unflatten(1, (groups, -1)).unsqueeze(-1), B.float()[:, :, None, None])
    # A row times a matrix: the same product as a matrix times a column runs six times slower on a CPU.
    y = (C.float().unsqueeze(-2) @ by_group.flatten(2, 3).transpose(-1, -2)).view(x.shape)
    return y if D is None else torch.addcmul(y, x, D.float() if D.dim() == 2 else D.float().unsqueeze(-1))


def _refuse(**arguments: Any) -> None:
    for name, value in arguments.items():
        if value is not None:
            raise ValueError(f"{name} is given; the torch scan takes right-padded rows and fuses no norm or projection")
