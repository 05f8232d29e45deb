"""Which form of an operator runs: resolved once, said once, never changed silently.

``impl="reference"`` is plain torch on any device, ``"triton"`` the fused kernels, ``"auto"`` Triton where the tensors
are on CUDA and the kernels take them. Triton's interpreter (``TRITON_INTERPRET=1``, set before the first call) runs
the kernels on CPU for tests; ``auto`` never picks it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache, wraps
from typing import Any, Literal

import torch
from torch import Tensor

Impl = Literal["auto", "triton", "reference"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TILED_ON = (9, 10)
"""Major compute capabilities, Hopper and Blackwell, whose shared memory the tiles of linear_tiles.py are cut for."""

log = logging.getLogger(__name__)


def untraced[**P, R](operator: Callable[P, R]) -> Callable[P, R]:
    """Under torch.compile the operator runs as it is between two graphs: tracing it would meet its gradient formed in
    forward and products (``addmm`` with an ``out_dtype``) that fake tensors do not know."""

    @wraps(operator)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            disabled: Any = torch.compiler.disable(operator)  # imports torch._dynamo, which takes a second
            return disabled(*args, **kwargs)
        return operator(*args, **kwargs)

    return call


def resolve(operator: str, impl: Impl, *tensors: Tensor, tiled: bool = True) -> Literal["triton", "reference"]:
    """The form that runs ``operator`` on ``tensors``, given as to :func:`unsupported_reason`.

    Raises ValueError for an unknown ``impl`` and for ``impl="triton"`` where :func:`unsupported_reason` has one.
    """
    return choose(operator, impl, tensors[0].is_cuda, lambda: unsupported_reason(*tensors, tiled=tiled))


def choose(
    operator: str, impl: Impl, cuda: bool, unsupported: Callable[[], str | None]
) -> Literal["triton", "reference"]:
    """What :func:`resolve` answers for tensors on CUDA or not, and ``unsupported()``, why the kernels cannot run."""
    if impl not in ("auto", "triton", "reference"):
        raise ValueError(f"impl = {impl!r}: expected auto, triton or reference")
    if impl == "reference":
        return "reference"
    reason = unsupported()
    if impl == "triton":
        if reason is not None:
            raise ValueError(f"{operator}: impl = 'triton' cannot run: {reason}; use impl='auto' or 'reference'")
        return "triton"
    if not cuda:
        _say(logging.INFO, operator, "reference", "the tensors are not on CUDA")
        return "reference"
    if reason is not None:
        _say(logging.WARNING, operator, "reference", reason)
        return "reference"
    _say(logging.INFO, operator, "triton", "CUDA")
    return "triton"


def unsupported_reason(*tensors: Tensor, tiled: bool = True) -> str | None:
    """Why the Triton kernels do not take these tensors (shapes, dtypes, device), or None where they do.

    One tensor is logits ``[T, V/tp]``; two or more are pairs of hidden states ``[T, H]`` and weight ``[V/tp, H]``.
    ``tiled`` false: the operator leaves their products to cuBLAS, as divergence does, and takes any H and device.
    """
    for tensor in tensors:
        if tensor.dtype not in DTYPES:
            return f"dtype {tensor.dtype}; the kernels take {', '.join(str(d) for d in DTYPES)}"
        if not tensor.is_cuda and not interpreting():
            return f"tensors on {tensor.device}; the kernels need CUDA, or TRITON_INTERPRET=1 for tests on CPU"
    if len(tensors) == 1:
        return None if tensors[0].stride(-1) == 1 else f"logits of strides {tensors[0].stride()}; rows must be dense"
    return next(filter(None, map(_untiled_reason, tensors)), None) if tiled else None


def _untiled_reason(tensor: Tensor) -> str | None:
    """Why its rows cannot be multiplied in tiles; without the address, so that a reason is said once."""
    if tensor.is_cuda:
        major, minor = torch.cuda.get_device_capability(tensor.device)
        if major not in TILED_ON:
            return (
                f"compute capability {major}.{minor}; the tiles of the products need one of"
                f" {', '.join(f'{major}.x' for major in TILED_ON)} (Hopper, Blackwell)"
            )
    if not tensor.numel():
        return None
    item, width = tensor.element_size(), tensor.shape[1]
    if width * item % 16:
        return f"rows of {width} {tensor.dtype}; the kernels' bulk loads need H to be a multiple of {16 // item}"
    if tensor.data_ptr() % 16:
        return (
            f"{tensor.dtype} {list(tensor.shape)} off a 16-byte boundary, which the kernels' bulk loads need; clone it"
        )
    return None


def interpreting() -> bool:
    """Whether Triton runs kernels in its interpreter."""
    from triton import knobs

    return bool(knobs.runtime.interpret)


@cache
def _say(level: int, operator: str, chosen: str, reason: str) -> None:
    log.log(level, "%s: %s (%s)", operator, chosen, reason)
