"""What the NVFP4 kernels may use.

An H100 issues 29.7e12 instructions of a thread a second (132 SMs x 128 lanes x 1.755 GHz). Over the elements that its
target time moves a second, that is what a kernel may take for each: at 8192 x 8192, 32 in 72 us, 45 in 102 us, 51 in
115 us, 55 in 125 us. Counts hold the subroutine of divisions by odd numbers too, which is hardly ever called: about 2.
"""

from __future__ import annotations

from gates.judge import Budget, Most

TILE = ("A", "B")
THREE = "three or more blocks of 128 threads share an SM: 48 KiB in flight there hide the latency of HBM"
TWO = "two blocks of 128 threads share an SM"
WIDE = "narrower accesses need more instructions for the same bytes"
HARDWARE = "sm_100 converts two numbers to E2M1 in one instruction"
E2M1 = "F2FP.SATFINITE.E2M1"
RARE = "DMUL"  # an amax below 1e-30 or above 1e33 takes a branch of its own, in fp64
ROWS = "triton_kernels.quantize_kernel"

# Case, registers, why, instructions on sm_90 and on sm_100 (of which the conversion takes 10 fewer), why.
QUANTIZERS: tuple[tuple[str, int, str, float, float, str], ...] = (
    ("rows, bf16*", 132, THREE, 21, 11.5, "of 32 in 72 us; conversion by adding a power of two takes 8"),
    ("rows, fp32", 132, THREE, 21, 11.5, "that of bf16, less the unpacking"),
    ("rows, fp16", 132, THREE, 21, 11.5, "that of bf16"),
    ("rows, torchao", 132, THREE, 30, 30, "9 for the codes that torchao gives to NaN"),
    ("rows, modelopt", 132, THREE, 36, 26, "an exact division for each element"),
    ("rows, vllm", 132, THREE, 26, 17, "looks for numbers that it must refuse"),
    ("rows, compressed_tensors", 132, THREE, 42, 32, "looks for what it must refuse, and divides each element"),
    ("rows, 16x16", 144, THREE, 24, 14, "rows of a square meet in shared memory"),
    ("rows, stochastic", 168, THREE, 30, 28, "one Philox call and 16 bytes of it for 16 elements"),
    ("rows, four over six, m?e", 168, THREE, 55, 35, "of 51 in 115 us; three conversions and two errors"),
    ("rows, four over six, 16x16", 255, TWO, 62, 50, "errors of rows of a square meet in shared memory"),
    ("rows, four over six, modelopt", 224, TWO, 92, 77, "three exact divisions for each element"),
    ("columns, bf16", 132, THREE, 22, 12.5, "that of rows, and codes change threads in shared memory"),
    ("columns, gradient", 232, TWO, 38, 36, "Hadamard transform and stochastic rounding"),
    ("dequantize, *", 132, THREE, 21, 11.5, "that of rows"),
    ("RMS norm, two passes", 132, THREE, 27, 17, "that of rows and five for the norm, whose weight is in L1"),
    ("RMS norm, 16x16", 144, THREE, 30, 20, "that of squares and five for the norm"),
    ("squared ReLU, *", 132, THREE, 26, 16, "that of rows and four for the square, rounded to bf16"),
)
CONVERTS_BY_HAND = ("rows, torchao", "rows, stochastic", "columns, gradient")


def of_quantizers() -> list[Budget]:
    found = []
    for case, registers, sharing, ninety, hundred, reason in QUANTIZERS:
        for target, most in ((90, ninety), (100, hundred)):
            converts = target == 100 and case not in CONVERTS_BY_HAND
            budget = Budget(
                kernel=ROWS,
                cases=(f"NVFP4 {case}",),
                targets=(target,),
                registers=Most(registers, sharing),
                block=TILE,
                scale=16,
                rare=RARE if "four over six" in case else "",
                instructions={"tile": Most(most, reason)},
                opcodes={E2M1: HARDWARE} if converts else {},
            )
            found.append(budget)
    return found


NVFP4_BUDGETS: tuple[Budget, ...] = (
    *of_quantizers(),
    Budget(
        kernel=ROWS,
        cases=("NVFP4 rows, *", "NVFP4 RMS norm, *", "NVFP4 squared ReLU, *"),
        opcodes={"LDG.E.128": WIDE, "STG.E.64": "the codes of a block are eight bytes"},
    ),
    Budget(
        kernel="triton_kernels.quantize_both_kernel",
        cases=("NVFP4 both, bf16",),
        registers=Most(128, "two blocks of 256 threads share an SM"),
        block=("A", "A"),
        instructions={"tile": Most(40, "rows and columns, each within its own 21")},
        opcodes={"LDG.E.128": WIDE},
    ),
    Budget(
        kernel="triton_kernels.quantize_both_kernel",
        cases=("NVFP4 both, gradient",),
        registers=Most(128, "512 threads share an SM"),
        block=("A", "A"),
        instructions={"tile": Most(71, "of 55 in 125 us, so 160 us at best: rows take 30, transformed columns 38")},
        opcodes={"LDG.E.128": WIDE},
    ),
    Budget(
        kernel="triton_kernels.round_trip_kernel",
        cases=("NVFP4 round trip, bf16",),
        registers=Most(132, THREE),
        block=TILE,
        scale=16,
        instructions={"tile": Most(19, "of 45 in 102 us; no codes are formed")},
        opcodes={"LDG.E.128": WIDE, "STG.E.128": WIDE},
    ),
    Budget(
        kernel="triton_kernels.round_trip_kernel",
        cases=("NVFP4 round trip, modelopt",),
        registers=Most(132, THREE),
        block=TILE,
        scale=16,
        instructions={"tile": Most(34, "of 45 in 102 us; an exact division for each element")},
    ),
    Budget(
        kernel="triton_kernels.round_trip_kernel",
        cases=("NVFP4 round trip, four over six",),
        registers=Most(168, THREE),
        block=TILE,
        scale=16,
        rare=RARE,
        instructions={"tile": Most(54, "that of rows")},
    ),
    Budget(
        kernel="triton_kernels.dequantize_kernel",
        registers=Most(144, THREE),
        block=TILE,
        scale=16,
        instructions={"tile": Most(20, "of 39 for the 2.5625 bytes of a bf16 element")},
        opcodes={"LDG.E.64": "the codes of a block are eight bytes", "STG.E.128": WIDE},
    ),
    Budget(
        kernel="triton_kernels.tile_amax_kernel",
        registers=Most(80, "six blocks of 128 threads share an SM"),
        block=TILE,
        scale=16,
        instructions={"tile": Most(13, "of 19.8 for the 2 bytes of a bf16 element; the Hadamard transform takes 6")},
    ),
    Budget(
        kernel="triton_kernels.flat_amax_kernel",
        registers=Most(64, "64 registers let 1024 threads share an SM"),
        block=("BLOCK",),
        reads=("x",),
        instructions={"read": Most(7, "of 19.8 for the 2 bytes of a bf16 element")},
    ),
    Budget(
        kernel="triton_norm.norm_quantize_kernel",
        registers=Most(132, THREE),
        block=("B",),
        scale=16,
        instructions={"tile": Most(31, "that of rows, three for squares and their sum, four for the norm")},
        opcodes={"LDG.E.128": WIDE, "STG.E.64": "the codes of a block are eight bytes"},
    ),
    Budget(
        kernel="triton_norm.norm_quantize_kernel",
        targets=(100,),
        opcodes={E2M1: HARDWARE},
    ),
    Budget(
        kernel="triton_norm.norm_statistics_kernel",
        registers=Most(132, THREE),
        block=("B",),
        scale=16,
        instructions={"tile": Most(16, "of 19.8 for the 2 bytes of a bf16 element: statistics, norm, magnitude")},
        opcodes={"LDG.E.128": WIDE},
    ),
)
