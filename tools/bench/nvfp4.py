"""The NVFP4 suite: its cases, what its kernels must equal on the device, and the bytes that differ from others' (Q6).

Errors are the largest difference of a decoded element from the number that was quantized, of normal numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from bench import nvfp4_peers as peers
from bench.nvfp4_problem import EPS, Matrix, MatrixProblem, NormProblem, PackProblem
from bench.peer import Peer
from bench.suite import Case, Row, Suite
from torch import Tensor

from mopd_kernels import nvfp4
from mopd_kernels.nvfp4 import TE_SIGNS, Format, NVFP4Tensor
from mopd_kernels.nvfp4.numerics import MODES
from mopd_kernels.nvfp4.testing import samples

LARGE = Matrix(8192, 8192)
SMALL = Matrix(1024, 4096)
TOLERANCE = (
    2.0  # a step between 4 and 6 of a block with 5.9, the largest of 6.7e7 normal numbers, rounded stochastically
)
PLAIN = Format(swizzled=True)
ROWS = Format(swizzled=True, rounding="stochastic", seed=1)
COLUMNS = Format(swizzled=True, rounding="stochastic", seed=2, signs=TE_SIGNS)
FORMATS = (PLAIN, ROWS, COLUMNS, Format(four_over_six="mae"), Format(four_over_six="mse", block="16x16"))


def _quantize(problem: MatrixProblem) -> NVFP4Tensor:
    return nvfp4.quantize(problem.x, PLAIN, amax=problem.amax, impl=problem.impl)


def _round_trip(problem: MatrixProblem) -> Tensor:
    return nvfp4.quantize_dequantize(problem.x, Format(), amax=problem.amax, impl=problem.impl)


def _four_over_six(problem: MatrixProblem) -> NVFP4Tensor:
    format = Format(swizzled=True, four_over_six="mse")
    return nvfp4.quantize(problem.x, format, amax=problem.amax, impl=problem.impl)


def _gradient(problem: MatrixProblem) -> NVFP4Tensor:
    """The amax of normal numbers is much the same after the transform, which keeps them normal."""
    both = nvfp4.quantize_both(
        problem.x, ROWS, COLUMNS, amax=problem.amax, columns_amax=problem.amax, impl=problem.impl
    )
    return both[0]


def _gradient_apart(problem: MatrixProblem) -> NVFP4Tensor:
    nvfp4.quantize_columns(problem.x, COLUMNS, amax=problem.amax, impl=problem.impl)
    return nvfp4.quantize(problem.x, ROWS, amax=problem.amax, impl=problem.impl)


def _norm(problem: NormProblem) -> NVFP4Tensor:
    return nvfp4.rms_norm_quantize(problem.x, problem.weight, EPS, PLAIN, amax=problem.amax, impl=problem.impl)


def _copy(problem: MatrixProblem) -> None:
    problem.x.clone()


COPY = Peer("copy of the matrix", _copy, "torch.clone", devices=("cuda",))
APART = Peer("ours, rows and columns apart", _gradient_apart, "mopd_kernels")


def _case(
    name: str, what: str, ours: Callable[[Any], Any], moved: float, against: tuple[Peer, ...], problem: Any = None
) -> Case:
    """A case whose limit is ``moved`` bytes an element at the speed of a copy, which moves four."""
    return Case(
        name=name,
        what=what,
        problem=problem or MatrixProblem,
        ours=ours,
        shapes=(LARGE,),
        cpu_shape=SMALL,
        cpu_dtype=torch.bfloat16,
        yardstick=COPY,
        share=moved / 4,
        peers=against,
    )


CASES = (
    _case(
        "Q1",
        "quantize, swizzled scales",
        _quantize,
        2.5625,
        (peers.TORCHAO, peers.TORCHAO_COMPILED, peers.MODELOPT, peers.COMPRESSED),
        PackProblem,
    ),
    _case(
        "Q2",
        "quantize and dequantize",
        _round_trip,
        4.0,
        (peers.TORCHAO_ROUND_TRIP, peers.MODELOPT_ROUND_TRIP, peers.MODELOPT_TRITON),
    ),
    _case("Q3", "four-over-six, mse", _four_over_six, 2.5625, (peers.FOUR_OVER_SIX, peers.PLAIN)),
    _case("Q4", "stochastic rows and transformed columns", _gradient, 3.125, (APART,)),
    _case("Q5", "RMS norm", _norm, 2.5625, (peers.NORM_THEN_OURS, peers.NORM_ON_TORCHAO), NormProblem),
)


def wrong_on_device(device: torch.device) -> str | None:
    """How the kernels' bytes differ on the device from those of plain torch there, or None."""
    for name in MODES:
        for format in (Format(name), *(FORMATS if name == "te" else ())):
            for label, x in samples(torch.bfloat16).items():
                found = [outcome(nvfp4.quantize, x.to(device), format, impl) for impl in ("triton", "reference")]
                if (count := differing(*found)) != 0:
                    return f"{format}, {label}: {count} bytes differ from those of plain torch"
    return None


def outcome(operator: Callable[..., NVFP4Tensor], x: Tensor, format: Format, impl: str) -> NVFP4Tensor | str:
    """The result, or what is said of a refusal."""
    try:
        return operator(x, format, impl=impl)
    except ValueError as refusal:
        return str(refusal)


def differing(ours: NVFP4Tensor | str, theirs: NVFP4Tensor | str) -> int:
    """Bytes of codes and scales, or 1 where only one refuses."""
    if isinstance(ours, str) or isinstance(theirs, str):
        return int(ours != theirs)
    pairs = ((ours.codes, theirs.codes), (ours.scales.view(torch.uint8), theirs.scales.view(torch.uint8)))
    return sum(int((mine != other).sum()) for mine, other in pairs)


def _of_torchao(x: Tensor) -> NVFP4Tensor:
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor as Packed
    from torchao.prototype.mx_formats.nvfp4_tensor import per_tensor_amax_to_scale

    scale = per_tensor_amax_to_scale(x.abs().max())
    packed = Packed.to_nvfp4(x, per_tensor_scale=scale)
    return NVFP4Tensor(packed.qdata, packed.scale, scale, (x.shape[0], x.shape[1]), "torchao")


def _of_modelopt(x: Tensor) -> NVFP4Tensor:
    from modelopt.torch.quantization.qtensor.nvfp4_tensor import NVFP4QTensor

    packed, scales, scale = NVFP4QTensor.quantize(x.clone(), 16)
    return NVFP4Tensor(packed._quantized_data, scales, scale, (x.shape[0], x.shape[1]), "modelopt")


def _of_compressed_tensors(x: Tensor) -> NVFP4Tensor:
    from compressed_tensors.compressors.nvfp4 import NVFP4PackedCompressor
    from compressed_tensors.quantization import QuantizationScheme
    from compressed_tensors.quantization.quant_scheme import NVFP4 as PRESET
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    scale, runs = generate_gparam(x.min(), x.max()), x.unflatten(-1, (-1, 16))
    scales, _ = calculate_qparams(runs.amin(-1), runs.amax(-1), PRESET["weights"], global_scale=scale)
    state = {"weight": x, "weight_scale": scales, "weight_global_scale": scale}
    packed = NVFP4PackedCompressor.compress(state, QuantizationScheme(targets=["Linear"], weights=PRESET["weights"]))
    shape = (x.shape[0], x.shape[1])
    return NVFP4Tensor(packed["weight_packed"], packed["weight_scale"], scale[0], shape, "compressed_tensors")


ECOSYSTEMS = (
    (peers.TORCHAO, "torchao", _of_torchao),
    (peers.MODELOPT, "modelopt", _of_modelopt),
    (peers.COMPRESSED, "compressed_tensors", _of_compressed_tensors),
)


def bytes_that_differ(rows: Sequence[Row], device: torch.device) -> Iterator[Row]:
    """Q6: of ours from the ecosystems' own on a CPU, where their arithmetic is IEEE's, over inputs that are hard."""
    found: dict[str, Any] = {}
    for peer, name, theirs in ECOSYSTEMS:
        if (reason := peer.missing("cpu")) is not None:
            found[name] = {"unavailable": reason}
            continue
        count = total = 0
        for x in samples(torch.bfloat16).values():
            other = theirs(x)
            count += differing(nvfp4.quantize(x, Format(name), impl="reference"), other)
            total += other.codes.numel() + other.scales.numel()
        found[name] = {"differing_bytes": count, "bytes": total, "source": f"measured: {peer.source}"}
    counts = [entry["differing_bytes"] for entry in found.values() if "differing_bytes" in entry]
    nothing = dict.fromkeys(("ours_ms", "limit_ms", "fraction_of_limit", "workspace_bytes"))
    row = {"case": "Q6", "shape": {}, "dtype": "bfloat16", "peers": found, "max_abs_err": max(counts, default=None)}
    yield row | nothing


NVFP4 = Suite(
    tests=(
        *("test_nvfp4_grids.py", "test_nvfp4_numerics.py", "test_nvfp4_rounding.py", "test_nvfp4_four_over_six.py"),
        *("test_nvfp4_tensor.py", "test_nvfp4_triton.py", "test_nvfp4_producers.py", "test_bench_nvfp4.py"),
    ),
    cases=CASES,
    tolerance=TOLERANCE,
    wrong_on_device=wrong_on_device,
    after=bytes_that_differ,
    untimed={"Q6": None},
)
