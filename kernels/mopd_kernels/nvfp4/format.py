"""What is to be made of a matrix: everything that decides the bytes, as one value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mopd_kernels.nvfp4 import numerics as modes
from mopd_kernels.nvfp4.four_over_six import ERRORS
from mopd_kernels.nvfp4.grids import BLOCK, E4M3_MAX
from mopd_kernels.nvfp4.numerics import Name


@dataclass(frozen=True)
class Format:
    """What a quantized matrix is to be; blocks lie along its rows.

    ``numerics``: whose bytes. ``block``: "1x16", or "16x16", one scale for a square (repeated in each of its rows; the
    last square of a matrix whose rows are no multiple of 16 is shorter). ``swizzled``: scales in cuBLAS's 128x4 layout.
    ``rounding``: "nearest" (ties to even) or "stochastic", which alone takes, and needs, a ``seed`` of 0..2^63 - 1.
    ``signs``: 16 of 1 and -1 for the random Hadamard transform, or None. ``four_over_six``: the error that chooses
    between a block's two scales, or None. ``pad``: fill K with zeros to a multiple of 16 instead of refusing.

    Raises ValueError for a value or a combination that has no meaning.
    """

    numerics: Name = "te"
    block: Literal["1x16", "16x16"] = "1x16"
    swizzled: bool = False
    rounding: Literal["nearest", "stochastic"] = "nearest"
    seed: int | None = None
    signs: tuple[int, ...] | None = None
    four_over_six: Literal["mae", "mse", "max"] | None = None
    pad: bool = False

    def __post_init__(self) -> None:
        mode = modes.named(self.numerics)
        for field, allowed in (
            ("block", ("1x16", "16x16")),
            ("rounding", ("nearest", "stochastic")),
            ("four_over_six", (None, *ERRORS)),
        ):
            if (value := self.__dict__[field]) not in allowed:
                raise ValueError(f"{field} = {value!r}: expected one of {', '.join(map(str, allowed))}")
        if self.rounding == "stochastic" and not (isinstance(self.seed, int) and 0 <= self.seed < 2**63):
            raise ValueError(f"seed = {self.seed!r}: rounding = 'stochastic' needs an integer of 0..2^63 - 1")
        if self.rounding == "nearest" and self.seed is not None:
            raise ValueError(f"seed = {self.seed!r}: rounding = 'nearest' draws nothing; set rounding = 'stochastic'")
        if self.signs is not None and (len(self.signs) != BLOCK or set(self.signs) - {1, -1}):
            raise ValueError(f"signs = {self.signs!r}: the Hadamard transform takes {BLOCK} of 1 and -1")
        if self.four_over_six is None:
            return
        if not mode.pair:
            having = ", ".join(name for name, other in modes.MODES.items() if other.pair)
            raise ValueError(f"four_over_six = {self.four_over_six!r}: numerics = {self.numerics!r} has none; {having}")
        for other, value in (
            ("signs", self.signs),
            ("rounding", None if self.rounding == "nearest" else self.rounding),
        ):
            if value is not None:
                raise ValueError(
                    f"four_over_six = {self.four_over_six!r} with {other} = {value!r}: Transformer Engine has no such"
                    f" combination; leave one of them out"
                )

    @property
    def bound(self) -> float:
        """The E4M3 value that the block of the tensor's largest element is to get: 448, or 256 with four-over-six."""
        return E4M3_MAX if self.four_over_six is None else modes.FOUR_OVER_SIX_BOUND


DEFAULT = Format()
