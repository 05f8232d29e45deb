"""Drafts from the shared MTP block, applied recursively over a cache of its own.

Entry i of a row's cache joins the backbone's state at position i with the embedding of token i + 1. The first token of
a draft comes from the entry of the last settled token; each further one from an entry made of the block's own last
state and the token just drafted, which is forgotten once the draft is complete: when the backbone has verified it, its
states take their place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from torch import Tensor

from megatron_mopd.config import ConfigurationError
from megatron_mopd.decoding import Room, cached, portions

Pick = Callable[[Tensor, int], Tensor]
"""The next token of each row, int64 ``[b]``, from the block's state ``[b, H]`` and the token's place in the draft."""


class Drafter:
    """The MTP block of a model (of its last pipeline stage) with the memory of one batch.

    All ranks that share the stage call it with the same tokens; the model is in the state that
    :class:`megatron_mopd.decoding.Decoder` asks for. Raises :class:`ConfigurationError` for heads that share no block.
    """

    def __init__(self, model: Any, prefill_tokens: int | None = None) -> None:
        if not model.mtp_process or len(model.mtp.layers) != 1:
            blocks = len(model.mtp.layers) if model.mtp_process else 0
            raise ConfigurationError(
                f"the model has {blocks} MTP blocks: drafts come from one block that all depths share; name a"
                " checkpoint whose pattern has MTP segments, with mtp_use_repeated_layer"
            )
        self.embedding, self.block, self.prefill_tokens = model.embedding, model.mtp.layers[0], prefill_tokens
        self.layers = [cached(layer) for layer in self.block.mtp_model_layer.layers]

    def prefill(self, tokens: Tensor, hidden: Tensor, lengths: Tensor, new_tokens: int) -> None:
        """Read right-padded prompts ``tokens [b, s]`` of ``lengths [b]`` with the backbone's states ``hidden [s, b,
        H]``; make room for ``new_tokens`` each. The entry of a prompt's last token waits for what follows it."""
        ahead = torch.cat([tokens[:, 1:], tokens[:, -1:]], dim=1)  # what stands at the end is behind every length
        total, width = tokens.shape
        for rows in portions(total, width, self.prefill_tokens):
            states = self._enter(hidden[:, rows], ahead[rows])
            for layer in self.layers:
                states = layer.prefill(states, lengths[rows] - 1, Room(total, width + new_tokens, rows))

    def draft(self, hidden: Tensor, tokens: Tensor, counts: Tensor, length: int, pick: Pick) -> Tensor:
        """``length`` further tokens of each row, int64 ``[b, length]``.

        ``hidden [n, b, H]`` are backbone states and ``tokens [b, n]`` the tokens that follow them; of these entries
        each row's first ``counts [b]`` are settled, and its draft continues the last of them.
        """
        states = self._extend(hidden, tokens)
        for layer in self.layers:
            layer.settle(counts)
        rows = torch.arange(len(counts), device=counts.device)
        state = states[
            (counts - 1).clamp(min=0), rows
        ]  # rows that are done settle nothing, and nobody reads their draft
        drafted = [pick(state, 0)]
        for place in range(1, length):
            state = self._extend(state.unsqueeze(0), drafted[-1].unsqueeze(1)).squeeze(0)
            drafted.append(pick(state, place))
        if length > 1:
            for layer in self.layers:
                layer.settle(torch.zeros_like(counts))
        return torch.stack(drafted, dim=1)

    def keep(self, rows: Tensor) -> None:
        """Drop all rows but these (int64 indices, in their new order)."""
        for layer in self.layers:
            layer.keep(rows)

    def _extend(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """The block's states ``[n, b, H]`` of further entries, read tentatively."""
        states = self._enter(hidden, tokens)
        for layer in self.layers:
            states = layer.extend(states)
        return self.block.final_layernorm(states)

    def _enter(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """What the block's layers start from, as in mcore's ``MultiTokenPredictionLayer``: both sides normed and
        projected together, the shares of the tensor parallel ranks gathered."""
        embedded = self.embedding(input_ids=tokens, position_ids=torch.zeros_like(tokens))
        joined = torch.cat((self.block.enorm(embedded), self.block.hnorm(hidden)), dim=-1)
        projected, _ = self.block.eh_proj(joined)
        return gather_from_tensor_model_parallel_region(projected, group=self.block.tp_group)
