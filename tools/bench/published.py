"""Times that peers published themselves, quoted where a peer cannot be run; they take part in no ratio."""

from __future__ import annotations

_CSV = "Liger-Kernel, benchmark/data/all_benchmark_data.csv, H100 80GB HBM3"
_README = "Liger-Kernel, README of its CuTe-DSL kernels, H100"
_PR = "Liger-Kernel PR #1356, H200, V=128256"

# (case, T, V, H of 0 where logits are given, peer) -> (milliseconds, where from)
PUBLISHED: dict[tuple[str, int, int, int, str], tuple[float, str]] = {
    ("L1", 8192, 131072, 0, "Liger vocab-parallel"): (2.97, _CSV),
    ("L1", 8192, 131072, 0, "mcore fused"): (11.81, _CSV),
    **{
        (case, 8192, width, 0, peer): (time, _CSV)
        for case, width, times in (
            ("L2", 131072, (7.96, 18.23, 21.25)),
            ("L3", 131072, (7.96, 18.23, 21.25)),
            ("L3_tp4", 32768, (2.06, 4.45, 5.41)),
        )
        for peer, time in zip(("Liger vocab-parallel", "mcore fused", "mcore vocab-parallel"), times, strict=True)
    },
    ("L4", 8192, 131072, 4096, "Liger FSLCE"): (12.25, _README),
    ("L5", 8192, 131072, 4096, "Liger FSLCE"): (50.39, _README),
    ("L5", 8192, 131072, 4096, "verl fused linear"): (128.8, _README + ", verl's torch fallback; 165.6 with entropy"),
    ("L5", 8192, 131072, 4096, "quack chunked"): (35.47, _PR),
    ("L6", 16384, 131072, 4096, "Liger FSLCE"): (104.77, _README),
    ("L6", 16384, 131072, 4096, "quack chunked"): (73.71, _PR),
}
