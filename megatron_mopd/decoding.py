"""Cached forward over mcore's own modules: ragged prompts in, then one token a step for the whole batch.

mcore 0.19 has no such path that runs without CUDA. Linears, norms, experts and residual adds are the model's own
modules; only the two mixers that look back in time are walked here: attention keeps keys and values, Mamba the last
inputs of its convolution and its state, each taken at a row's own length. Several further tokens of a row may be read
at once, tentatively: what was kept for them is cut back to as many as turn out to stand.

Each pipeline stage walks its layers and hands the hidden states on. A step's rows go through the stages as one piece,
so that all stages but one wait; only prompts that are read in parts follow one another closely.

Axis letters: ``b`` rows, ``s`` padded prompt tokens, ``H`` hidden size, ``q`` query groups and ``d`` head width of
attention; ``h``, ``p``, ``g``, ``n`` of Mamba as in ssd.py, ``k`` channels of its convolution.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.ssm.mamba_layer import MambaLayer
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megatron_mopd import ssd
from megatron_mopd.config import ConfigurationError


@dataclass(frozen=True, slots=True)
class Room:
    """A batch of ``total`` rows with room for ``capacity`` tokens each, of which ``rows`` are read now."""

    total: int
    capacity: int
    rows: slice

    def kept(self, whole: Tensor, part: Tensor) -> Tensor:
        """``whole`` (all rows; made afresh with the first ones) with ``part`` in the place of these rows."""
        if len(part) == self.total:
            return part
        if self.rows.start == 0:
            whole = part.new_empty(self.total, *part.shape[1:])
        whole[self.rows] = part
        return whole


class CachedLayer(Protocol):
    """One layer with its memory of the rows."""

    def prefill(self, hidden: Tensor, lengths: Tensor, room: Room) -> Tensor:
        """``[s, b, H]`` -> ``[s, b, H]`` of the rows whose turn it is; remembers each row at its own length."""
        ...

    def step(self, hidden: Tensor) -> Tensor:
        """``[1, b, H]`` -> ``[1, b, H]``; remembers the token."""
        ...

    def extend(self, hidden: Tensor) -> Tensor:
        """``[n, b, H]`` -> ``[n, b, H]``: n further tokens a row, tentatively; may be called again to go on."""
        ...

    def settle(self, counts: Tensor) -> None:
        """Of the tokens read tentatively each row remembers its first ``counts [b]`` and no other."""
        ...

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows only (int64 indices)."""
        ...

    def reread(self) -> None:
        """The weights have changed; what is remembered of the rows stays."""
        ...


class Decoder:
    """The trunk of a model with the memory of one batch; all ranks that share the model call it with the same tokens.

    The model must be in eval mode with sequence parallelism off. Raises :class:`ConfigurationError` for position
    embeddings and layers that the cached forward does not know.
    """

    def __init__(self, model: HybridModel, prefill_tokens: int | None = None) -> None:
        """``prefill_tokens`` of prompts, padding included, are read at once, a longer one alone; None reads all."""
        if model.position_embedding_type != "none":
            raise ConfigurationError(
                f"position_embedding_type = {model.position_embedding_type!r}: cached decoding knows models without"
                " positional embedding only; build the model with 'none'"
            )
        self.model, self.prefill_tokens = model, prefill_tokens
        self.pipeline, self.stage = model.pp_group, model.pp_group.rank()
        self.layers: list[CachedLayer] = [cached(layer) for layer in model.decoder.layers]

    def prefill(self, tokens: Tensor, lengths: Tensor, new_tokens: int) -> Tensor | None:
        """Read right-padded prompts ``tokens [b, s]`` of ``lengths [b]`` and make room for ``new_tokens`` each.

        Returns the hidden state ``[b, H]`` of each row's last token, after the final norm; None before the last
        pipeline stage.
        """
        parts = [
            hidden[lengths[rows] - 1, torch.arange(hidden.shape[1], device=hidden.device)]
            for rows, hidden in self._read(tokens, lengths, new_tokens)
        ]
        return self.model.decoder.final_norm(torch.cat(parts)) if parts else None

    def prefill_whole(self, tokens: Tensor, lengths: Tensor, new_tokens: int) -> Tensor | None:
        """:meth:`prefill` that returns the hidden states ``[s, b, H]`` of all tokens, padding included."""
        parts = [hidden for _, hidden in self._read(tokens, lengths, new_tokens)]
        return self.model.decoder.final_norm(torch.cat(parts, dim=1)) if parts else None

    def _read(self, tokens: Tensor, lengths: Tensor, new_tokens: int) -> Iterator[tuple[slice, Tensor]]:
        """Rows and their hidden states ``[s, b, H]`` behind the last layer, on the last stage alone."""
        total, width = tokens.shape
        for rows in portions(total, width, self.prefill_tokens):
            hidden = self._enter(tokens[rows])
            for layer in self.layers:
                hidden = layer.prefill(hidden, lengths[rows], Room(total, width + new_tokens, rows))
            if not self._leave(hidden):
                yield rows, hidden

    def step(self, tokens: Tensor) -> Tensor | None:
        """Read one further token ``[b]`` a row and return its hidden state ``[b, H]``, as :meth:`prefill`."""
        hidden = self._enter(tokens.unsqueeze(1))
        for layer in self.layers:
            hidden = layer.step(hidden)
        return None if self._leave(hidden) else self.model.decoder.final_norm(hidden.squeeze(0))

    def extend(self, tokens: Tensor) -> Tensor | None:
        """Read ``tokens [b, n]`` of each row tentatively and return their hidden states ``[n, b, H]``, as
        :meth:`prefill`; :meth:`settle` says how many of them stand. :meth:`step` is not for rows read so."""
        hidden = self._enter(tokens)
        for layer in self.layers:
            hidden = layer.extend(hidden)
        return None if self._leave(hidden) else self.model.decoder.final_norm(hidden)

    def settle(self, counts: Tensor) -> None:
        """Of the tokens last read by :meth:`extend`, each row goes on from its first ``counts`` (int64 ``[b]``)."""
        for layer in self.layers:
            layer.settle(counts)

    def keep(self, rows: Tensor) -> None:
        """Drop all rows but these (int64 indices, in their new order)."""
        for layer in self.layers:
            layer.keep(rows)

    def reread(self) -> None:
        """Go on under the weights that the model holds now, with the memory that others have left."""
        for layer in self.layers:
            layer.reread()

    def _enter(self, tokens: Tensor) -> Tensor:
        """Hidden states ``[s, b, H]`` before this stage's layers."""
        if self.stage == 0:
            return self.model.embedding(input_ids=tokens, position_ids=torch.zeros_like(tokens))
        config, (b, s) = self.model.config, tokens.shape
        hidden = torch.empty(s, b, config.hidden_size, dtype=config.pipeline_dtype, device=tokens.device)
        dist.recv(hidden, group=self.pipeline, group_src=self.stage - 1)
        return hidden

    def _leave(self, hidden: Tensor) -> bool:
        """Whether there is a next stage; it has then been sent ``hidden``."""
        more = self.stage < self.pipeline.size() - 1
        if more:
            dist.send(hidden.contiguous(), group=self.pipeline, group_dst=self.stage + 1)
        return more


def portions(rows: int, width: int, tokens: int | None) -> Iterator[slice]:
    """``rows`` prompts of ``width`` in portions of at most ``tokens`` (None: all at once), a longer one alone."""
    size = rows if tokens is None else max(1, tokens // width)
    return (slice(start, start + size) for start in range(0, rows, size))


def cached(layer: Any) -> CachedLayer:
    """The layer with a memory; raises :class:`ConfigurationError` for one that is not known."""
    if isinstance(layer, MambaLayer):
        return _MambaMemory(layer)
    if not isinstance(layer, TransformerLayer):
        raise ConfigurationError(
            "model.pattern: cached decoding knows Mamba (M), attention (*), dense (-) and expert (E) layers, not"
            f" {type(layer).__name__}"
        )
    return _Tokenwise(layer) if isinstance(layer.self_attention, IdentityOp) else _AttentionMemory(layer)


class _Tokenwise:
    """A dense or expert layer: no token sees another, so mcore's forward serves as it is."""

    def __init__(self, layer: TransformerLayer) -> None:
        self.layer = layer

    def prefill(self, hidden: Tensor, lengths: Tensor, room: Room) -> Tensor:
        return self.step(hidden)

    def step(self, hidden: Tensor) -> Tensor:
        return self.layer(hidden_states=hidden, attention_mask=None)[0]

    def extend(self, hidden: Tensor) -> Tensor:
        return self.step(hidden)

    def settle(self, counts: Tensor) -> None:
        """Nothing is remembered."""

    def keep(self, rows: Tensor) -> None:
        """Nothing is remembered."""

    def reread(self) -> None:
        """The layer's own forward reads its weights each time."""


class _AttentionMemory:
    """Keys and values; new tokens of all rows share a column, and a mask hides the padding between.

    Columns need not be positions: the model has no positional embedding. Tokens read tentatively follow their own row's
    last one, so that dropping some is a matter of the row's length.
    """

    def __init__(self, layer: Any) -> None:  # a TransformerLayer, whose submodules mcore types loosely
        self.layer, self.attention = layer, layer.self_attention
        self.scale = layer.config.softmax_scale or self.attention.hidden_size_per_attention_head**-0.5
        self.keys: Tensor  # [b, q, capacity, d]
        self.values: Tensor
        self.mask: Tensor  # [b, 1, 1, capacity], 0 or -inf
        self.filled = 0
        self.lengths = torch.empty(0)  # int64 [b], of each row as settled
        self.ahead = 0  # tokens beyond them, the same number in each row

    def prefill(self, hidden: Tensor, lengths: Tensor, room: Room) -> Tensor:
        query, key, value = self._project(hidden)  # [b, heads, s, d]
        _, groups, self.filled, width = key.shape
        if room.rows.start == 0:
            self.keys = key.new_zeros(room.total, groups, room.capacity, width)
            self.values = torch.zeros_like(self.keys)
            self.mask = key.new_zeros(room.total, 1, 1, room.capacity)
        self.lengths, self.ahead = room.kept(self.lengths, lengths), 0
        self.keys[room.rows, :, : self.filled] = key
        self.values[room.rows, :, : self.filled] = value
        padding = torch.arange(self.filled, device=key.device) >= lengths.unsqueeze(1)
        self.mask[room.rows, 0, 0, : self.filled].masked_fill_(padding, float("-inf"))
        context = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=self.scale, enable_gqa=query.shape[1] != groups
        )
        return self._finish(context.permute(2, 0, 1, 3).flatten(2), hidden)

    def step(self, hidden: Tensor) -> Tensor:
        query, key, value = self._project(hidden)
        rows, heads, _, width = query.shape
        groups = key.shape[1]
        self.keys[:, :, self.filled] = key.squeeze(2)
        self.values[:, :, self.filled] = value.squeeze(2)
        self.filled += 1
        keys, values = self.keys[:, :, : self.filled], self.values[:, :, : self.filled]
        scores = (query.reshape(rows, groups, heads // groups, width) * self.scale) @ keys.transpose(-1, -2)
        weights = (scores + self.mask[..., : self.filled]).softmax(-1, dtype=torch.float32).to(values.dtype)
        return self._finish((weights @ values).view(1, rows, heads * width), hidden)

    def extend(self, hidden: Tensor) -> Tensor:
        query, key, value = self._project(hidden)
        groups, count = key.shape[1:3]
        columns = (self.lengths + self.ahead).unsqueeze(1) + torch.arange(count, device=key.device)  # [b, n]
        index = columns[:, None, :, None].expand_as(key)
        self.keys.scatter_(2, index, key)
        self.values.scatter_(2, index, value)
        self.ahead += count
        width = int(columns.max()) + 1
        before = torch.arange(width, device=key.device) <= columns.unsqueeze(-1)
        context = F.scaled_dot_product_attention(
            query,
            self.keys[:, :, :width],
            self.values[:, :, :width],
            attn_mask=before.unsqueeze(1),
            scale=self.scale,
            enable_gqa=query.shape[1] != groups,
        )
        return self._finish(context.permute(2, 0, 1, 3).flatten(2), hidden)

    def settle(self, counts: Tensor) -> None:
        self.lengths, self.ahead = self.lengths + counts, 0

    def keep(self, rows: Tensor) -> None:
        self.keys, self.values, self.mask = self.keys[rows], self.values[rows], self.mask[rows]
        self.lengths = self.lengths[rows]

    def reread(self) -> None:
        """The layer's own modules read their weights each time."""

    def _project(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        normed = self.layer.input_layernorm(hidden)
        query, key, value = self.attention.get_query_key_value_tensors(normed, None)
        return query.permute(1, 2, 0, 3), key.permute(1, 2, 0, 3), value.permute(1, 2, 0, 3)

    def _finish(self, context: Tensor, residual: Tensor) -> Tensor:
        out = self.attention.linear_proj(context)
        return self.layer.self_attn_bda(self.layer.training, False)(out, residual, self.layer.hidden_dropout)


class _MambaMemory:
    """The last inputs of the convolution and the state of the scan, the latter in fp32; for tokens read tentatively the
    inputs and states behind each."""

    def __init__(self, layer: Any) -> None:  # a MambaLayer
        mixer = layer.mixer
        self.layer, self.mixer = layer, mixer
        self.groups, self.heads, self.width = mixer.ngroups_local_tp, mixer.nheads_local_tp, mixer.headdim
        self.inner, self.shared = self.heads * self.width, self.groups * mixer.d_state
        self.splits = [self.inner, self.inner + 2 * self.shared, self.heads]
        self.reread()
        self.recent = [torch.empty(0)] * (len(self.taps) - 1)  # last inputs of the convolution, oldest first, [b, k]
        self.state = torch.empty(0)  # [b, h, p, n]
        self.states: list[Tensor] = []  # that and the state behind each token read tentatively
        self.inputs = torch.empty(0)  # [b, k] for the recent and each such token: [b, taps - 1 + tokens, k]

    def reread(self) -> None:
        mixer = self.mixer
        self.A = -mixer.A_log.float().exp()
        self.D = mixer.D.unflatten(0, (self.heads, self.width)) if mixer.D_has_hdim else mixer.D
        self.taps = mixer.conv1d_weight.squeeze(1).t().contiguous().unbind()  # oldest first, [k] each

    def prefill(self, hidden: Tensor, lengths: Tensor, room: Room) -> Tensor:
        z, xbc, dt = self._project(hidden.transpose(0, 1))
        pairs = zip(self.recent, self._last_inputs(xbc, lengths), strict=True)
        self.recent = [room.kept(whole, part) for whole, part in pairs]
        xbc = ssd.causal_conv(xbc, self.mixer.conv1d_weight.squeeze(1), self.mixer.conv1d_bias)
        x, B, C = self._parts(xbc)
        inside = torch.arange(xbc.shape[1], device=xbc.device) < lengths.unsqueeze(1)
        steps = ssd.step_sizes(dt, self.mixer.dt_bias) * inside.unsqueeze(-1)
        y, state = ssd.scan(x, steps, self.A, B, C, self.D, self.mixer.chunk_size, want_state=True)
        assert state is not None
        self.state = room.kept(self.state, state.contiguous())
        return self._finish(y.flatten(2).to(z.dtype).transpose(0, 1), z.transpose(0, 1), hidden)

    def step(self, hidden: Tensor) -> Tensor:
        z, xbc, dt = self._project(hidden.squeeze(0))
        window = [*self.recent, xbc]
        self.recent = window[1:]
        xbc = self.mixer.conv1d_bias
        for tap, past in zip(self.taps, window, strict=True):
            xbc = torch.addcmul(xbc, past, tap)
        x, B, C = self._parts(F.silu(xbc))
        y = ssd.step(self.state, x, ssd.step_sizes(dt, self.mixer.dt_bias), self.A, B, C, self.D)
        return self._finish(y.flatten(1).to(z.dtype).unsqueeze(0), z.unsqueeze(0), hidden)

    def extend(self, hidden: Tensor) -> Tensor:
        z, xbc, dt = self._project(hidden.transpose(0, 1))
        if not self.states:
            self.states, self.inputs = [self.state], torch.stack(self.recent, dim=1)
        count, past = xbc.shape[1], len(self.recent)
        self.inputs = torch.cat([self.inputs, xbc], dim=1)
        window = self.inputs[:, -(past + count) :]
        xbc = self.mixer.conv1d_bias
        for i, tap in enumerate(self.taps):
            xbc = torch.addcmul(xbc, window[:, i : i + count], tap)
        x, B, C = self._parts(F.silu(xbc))
        dt, outputs = ssd.step_sizes(dt, self.mixer.dt_bias), []
        for t in range(count):  # one by one, as in step: the state behind each is kept, and the digits are the same
            self.states.append(self.states[-1].clone())
            outputs.append(ssd.step(self.states[-1], x[:, t], dt[:, t], self.A, B[:, t], C[:, t], self.D))
        y = torch.stack(outputs, dim=1).flatten(2).to(z.dtype)
        return self._finish(y.transpose(0, 1), z.transpose(0, 1), hidden)

    def settle(self, counts: Tensor) -> None:
        rows = torch.arange(len(counts), device=counts.device)
        self.state = torch.stack(self.states)[counts, rows]
        self.recent = [self.inputs[rows, counts + i] for i in range(len(self.recent))]
        self.states = []

    def keep(self, rows: Tensor) -> None:
        self.state = self.state[rows]
        self.recent = [past[rows] for past in self.recent]

    def _project(self, hidden: Tensor) -> tuple[Tensor, ...]:
        mixed, _ = self.mixer.in_proj(self.layer.norm(hidden.to(self.layer.config.params_dtype)))
        return mixed.split(self.splits, dim=-1)

    def _parts(self, xbc: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``x [..., h, p]``, ``B`` and ``C [..., g, n]``."""
        x, B, C = xbc.split([self.inner, self.shared, self.shared], dim=-1)
        return x.unflatten(-1, (self.heads, -1)), B.unflatten(-1, (self.groups, -1)), C.unflatten(-1, (self.groups, -1))

    def _last_inputs(self, xbc: Tensor, lengths: Tensor) -> list[Tensor]:
        """Each row's last convolution inputs before ``lengths``; zeros where a row is shorter than the window."""
        past = len(self.taps) - 1
        padded = F.pad(xbc, (0, 0, past, 0))  # token t lies at t + past
        rows = torch.arange(len(lengths), device=lengths.device)
        return [padded[rows, lengths + i] for i in range(past)]

    def _finish(self, y: Tensor, z: Tensor, residual: Tensor) -> Tensor:
        y = self.mixer.norm(y, z) if self.mixer.rmsnorm else y * F.silu(z)
        out = self.mixer.out_proj(y)
        return self.layer.mamba_bda(self.layer.training, False)(out, residual, self.layer.hidden_dropout)
