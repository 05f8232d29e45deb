"""The MTP-boosting stage's update: every step of the shared block from mixed states, on a backbone that stays as it is.

Only the MTP block's parameters are trained; embedding, trunk and output weight take part without gradient and are in no
optimizer, so neither a gradient nor weight decay reaches them, and the trunk's router biases are not moved. The block
is applied as often as ``objective.depths`` says, however many MTP segments the layer pattern names.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.utils import unwrap_model
from torch import Tensor

from megatron_mopd import student
from megatron_mopd.config import Config, ConfigurationError, MtpBoosting
from megatron_mopd.drawing import uniforms
from megatron_mopd.objectives.mtp_boosting import mixing_index, mtp_boosting_loss
from megatron_mopd.parallel import Groups
from megatron_mopd.records import Counts, MicroBatch


class Boosting:
    """Eq. 4 on micro-batches of the student's own rollouts; built before the model is wrapped, which it freezes.

    Raises :class:`ConfigurationError` for a model without MTP heads and for heads that share no block.
    """

    def __init__(self, model: Any, config: Config, groups: Groups, vocab_size: int) -> None:
        assert isinstance(config.objective, MtpBoosting)
        self.settings, self.config, self.groups, self.vocab_size = config.objective, config, groups, vocab_size
        _check(model.config, config)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and name.startswith("mtp."))
        for name, module in model.named_modules():
            if isinstance(module, TopKRouter) and not name.startswith("mtp."):
                module.frozen_expert_bias = True

    def loss(
        self, model: Any, micro_batch: MicroBatch, counts: Counts, step: int
    ) -> tuple[Tensor, tuple[Tensor, Mapping[str, Tensor]]]:
        """What to minimise; for the report the loss ``[2]`` (no cross-entropy beside it) and the values per token.

        For the last pipeline stage, within :func:`megatron_mopd.pipeline.train_last`. ``step`` is the number of
        optimizer steps before this one; with run.seed and a row's tokens it fixes what is mixed.
        """
        tokens = micro_batch.tokens.to(self.groups.device)
        plain: Any = unwrap_model(model)
        with torch.no_grad():
            out = student.forward(model, tokens)
        keys = [
            row_keys(self.config.run.seed, step, depth, micro_batch) for depth in range(1, self.settings.depths + 1)
        ]
        states = depths(plain, tokens, out.hidden, keys, self.groups)
        hidden, *mtp_hidden = (student.gather_hidden(h, self.groups, plain.config) for h in (out.hidden, *states))
        output = mtp_boosting_loss(
            mtp_hidden,
            hidden,
            out.output_weight,
            micro_batch,
            self.settings,
            counts,
            group=self.groups.tp,
            valid_vocab=self.vocab_size,
            impl=self.config.kernels.impl,
        )
        return output.loss, (torch.stack([output.loss.detach(), torch.zeros_like(output.loss)]), output.per_token)


def row_keys(seed: int, step: int, depth: int, micro_batch: MicroBatch) -> Tensor:
    """One 64-bit key a row, int64 ``[b]``: a function of seed, step, depth and the row's own tokens, so that a row
    draws the same whatever micro-batch and rank it comes to."""
    keys = []
    for tokens, length in zip(micro_batch.tokens, micro_batch.lengths.tolist(), strict=True):
        text = f"{seed}/{step}/{depth}/".encode() + tokens[:length].numpy().tobytes()
        keys.append(int.from_bytes(hashlib.sha256(text).digest()[:8], "little", signed=True))
    return torch.tensor(keys, dtype=torch.int64)


def depths(model: Any, tokens: Tensor, hidden: Tensor, keys: list[Tensor], groups: Groups) -> list[Tensor]:
    """The outputs of as many steps of the shared MTP block as there are ``keys``, each shaped as ``hidden``.

    ``hidden [s, b, H]`` (``[s/tp, b, H]`` under sequence parallelism) are the backbone's states after its final norm,
    ``tokens [b, s]``; ``keys[k] [b]`` fix what step k + 1 mixes. Row i of step k has read the backbone's state at
    position i, or a later one through mixing, and the embeddings up to token i + k; it predicts token i + k + 1.
    """
    block, positions = model.mtp.layers[0], torch.zeros_like(tokens)
    ids, states = tokens, [hidden.detach()]
    whole: list[Tensor] = []  # of the earlier steps, every position on every rank
    for step, key in enumerate(keys, start=1):
        given = states[0] if step == 1 else _mixed(whole, key.to(tokens.device), tokens.shape, model.config, groups)
        state, ids, positions, _ = block(
            input_ids=ids,
            position_ids=positions,
            hidden_states=given,
            attention_mask=None,
            embedding=model.embedding,
        )
        states.append(state)
        if step < len(keys):
            whole.append(_everywhere(state, model.config, groups))
    return states[1:]


def _mixed(whole: list[Tensor], keys: Tensor, shape: torch.Size, config: Any, groups: Groups) -> Tensor:
    """The input of the next step: each position's draw among the states of all earlier steps."""
    if len(whole) == 1:
        mixed = whole[0]
    else:
        b, s = shape
        noise = uniforms(keys, torch.arange(s, device=keys.device).unsqueeze(1))
        candidates = torch.cat([state.flatten(0, 1) for state in whole])
        mixed = candidates[mixing_index(noise, len(whole) + 1)].unflatten(0, (s, b))
    if config.sequence_parallel:
        mixed = tensor_parallel.scatter_to_sequence_parallel_region(mixed, group=groups.tp)
    return mixed


def _everywhere(state: Tensor, config: Any, groups: Groups) -> Tensor:
    """``[s, b, H]`` on every rank of the tensor parallel group, each of which uses it alike."""
    if not config.sequence_parallel:
        return state
    return tensor_parallel.gather_from_sequence_parallel_region(
        state, tensor_parallel_output_grad=False, group=groups.tp
    )


def _check(built: Any, config: Config) -> None:
    if not built.mtp_num_layers:
        raise ConfigurationError(
            f"objective.type mtp_boosting trains MTP heads, but model.pattern = {config.model.pattern!r} has none; add"
            " an MTP segment such as /*E and start from a checkpoint that was trained with it"
        )
    if built.mtp_num_layers > 1 and not built.mtp_use_repeated_layer:
        raise ConfigurationError(
            "model.override.mtp_use_repeated_layer = false: each MTP depth has a block of its own, but objective.type"
            " mtp_boosting applies one shared block recursively; leave the override out"
        )
