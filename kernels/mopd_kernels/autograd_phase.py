"""When an operator that forms its gradient in forward should do so."""

from __future__ import annotations

import enum

import torch


class Phase(enum.Enum):
    """Of one forward call, as seen from autograd."""

    NO_GRADIENT = enum.auto()  # torch.no_grad, mcore's and torch's reentrant checkpoint before recomputation
    BEFORE_RECOMPUTATION = enum.auto()  # inside torch's non-reentrant checkpoint: what is saved now will be replaced
    FINAL = enum.auto()  # an ordinary forward, or a recomputation

    @property
    def gradient(self) -> bool:
        return self is not Phase.NO_GRADIENT


def current_phase() -> Phase:
    """Asked before ``Function.apply``, inside which gradients are always off.

    ``torch.utils.checkpoint(use_reentrant=False)`` runs forward twice with gradients on and tells the two apart by the
    saved-tensor hooks it sets: ``_checkpoint_hook`` keeps nothing, ``_recomputation_hook`` keeps what is saved
    (torch/utils/checkpoint.py).
    """
    if not torch.is_grad_enabled():
        return Phase.NO_GRADIENT
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)  # pyright: ignore[reportAttributeAccessIssue]
    if hooks is not None and "_checkpoint_hook" in getattr(hooks[0], "__qualname__", ""):
        return Phase.BEFORE_RECOMPUTATION
    return Phase.FINAL
