"""What a divergence finds of rows of logits: the value, and what its gradient and by-products are made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Rows(NamedTuple):
    """What is found of some rows; ``[n]`` each."""

    value: Tensor
    student_lse: Tensor
    teacher_lse: Tensor | None  # None: a TopK, normalised already
    slope: Tensor  # sum over the support of the summand's derivative with respect to log p
    overlap: Tensor | None
    teacher_mass: Tensor | None
    student_mass: Tensor | None
    shared_teacher_mass: Tensor | None
    shared_student_mass: Tensor | None
    student_top_mass: Tensor | None

    @staticmethod
    def cat(chunks: Sequence[Rows]) -> Rows:
        whole: Any = (None if parts[0] is None else torch.cat(parts) for parts in zip(*chunks, strict=True))
        return Rows(*whole)

    def select(self, rows: slice) -> Rows:
        chosen: Any = (None if t is None else t[rows] for t in self)
        return Rows(*chosen)
