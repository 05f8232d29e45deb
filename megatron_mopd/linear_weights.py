"""The weights of a model's linears on this rank, one Hugging Face matrix at a time, as views that can be written to.

Quantization scales belong to the matrices of a released checkpoint: one per expert, whichever way experts are stacked,
and one per projection, however many ranks share it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from megatron.core.utils import unwrap_model
from torch import Tensor, nn

from megatron_mopd import names
from megatron_mopd.parallel import Groups

ROUTED_EXPERT = re.compile(r"\.mlp\.experts\.linear_fc[12]\.weight(\d*)$")
"""Parameters of routed experts: stacked ``[experts, out, in]``, or numbered from this rank's first expert."""
_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Matrix:
    """One matrix of a Hugging Face checkpoint, or this rank's part of it."""

    name: str  # Hugging Face's
    parameter_name: str
    parameter: nn.Parameter
    row: int | None  # place of the expert in a stacked parameter
    interleaved: bool  # the parameter holds rows of other matrices in between, so that there is no view
    group: dist.ProcessGroup | None  # the ranks that hold the other parts; None where this rank holds all
    axis: Literal[0, 1]  # that the group splits

    @property
    def weight(self) -> Tensor:
        """``[out, in]``, detached; writing to it changes the parameter."""
        assert not self.interleaved
        whole = self.parameter.data
        return whole if self.row is None else whole[self.row]


def matrices(model: nn.Module, groups: Groups) -> list[Matrix]:
    """Every matrix that a linear, the embedding or the output layer of the (wrapped) model has on this rank."""
    plain: Any = unwrap_model(model)
    parameters = dict(_stored_names(plain, groups))
    first = _first_expert(plain, groups)
    # Only the number of experts is read from a shape; a rank that holds some of them looks for all of them.
    shapes = {
        stored: (len(p) * groups.ep_size, *p.shape[1:]) if p.dim() == 3 else tuple(p.shape)
        for stored, (_, p) in parameters.items()
    }
    pieces, _ = names.find_pieces(shapes)
    found = []
    for piece in pieces:
        live, parameter = next(parameters[source] for source in piece.sources if source in parameters)
        row = piece.expert - first if parameter.dim() == 3 else None
        if row is None or 0 <= row < len(parameter):
            found.append(
                Matrix(
                    name=piece.name,
                    parameter_name=live,
                    parameter=parameter,
                    row=row,
                    interleaved=piece.part in ("q", "k", "v"),
                    **_split(live, parameter, groups),
                )
            )
    return found


def whole_amax(weights: Sequence[Matrix]) -> list[Tensor]:
    """fp32 ``[]`` each: the largest magnitude of the whole matrix, over the ranks that share it.

    Ranks that share matrices pass them in the same order, and meet in one collective per group.
    """
    amax = [m.weight.abs().amax().float() for m in weights]
    for group in {id(m.group): m.group for m in weights if m.group is not None}.values():
        chosen = [i for i, m in enumerate(weights) if m.group is group]
        shared = torch.stack([amax[i] for i in chosen])
        dist.all_reduce(shared, op=dist.ReduceOp.MAX, group=group)
        for i, value in zip(chosen, shared.unbind(), strict=True):
            amax[i] = value
    return amax


def _stored_names(model: Any, groups: Groups) -> Iterator[tuple[str, tuple[str, nn.Parameter]]]:
    """``(name in a checkpoint, (name in the model, parameter))`` of everything with rows and columns.

    Names in a pipeline stage count its own layers, those in a checkpoint all of them.
    """
    numbers = [layer.layer_number - 1 for layer in model.decoder.layers]
    for live, parameter in model.named_parameters():
        if parameter.dim() < 2 or not re.search(r"\.weight\d*$", live):
            continue
        stored = _LAYER.sub(lambda match: f"decoder.layers.{numbers[int(match[1])]}.", live)
        if expert := ROUTED_EXPERT.search(live):
            if parameter.dim() == 3:
                stored = stored.replace(".mlp.experts.", ".mlp.experts.experts.")
            else:
                stored = f"{stored.rstrip('0123456789')}{_first_expert(model, groups) + int(expert[1])}"
        elif stored.endswith("mixer.in_proj.weight"):
            stored += ".z"  # the first of the parts that checkpoints keep apart
        yield stored, (live, parameter)


def _first_expert(model: Any, groups: Groups) -> int:
    """Number of this rank's first expert among all of a layer's."""
    return groups.ep_rank * ((model.config.num_moe_experts or 0) // groups.ep_size)


def _split(live: str, parameter: Any, groups: Groups) -> dict[str, Any]:
    """Who holds the other parts of a matrix, and along which of its axes they were cut."""
    if ROUTED_EXPERT.search(live):
        group, axis = groups.pg.expt_tp, 0 if "linear_fc1" in live else 1
    elif getattr(parameter, "tensor_model_parallel", False):
        group, axis = groups.tp, parameter.partition_dim
    else:
        group, axis = None, 0
    return {"group": group if group is not None and group.size() > 1 else None, "axis": axis}
