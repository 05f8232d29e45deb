"""Error of each block of a matrix under the ways to quantize it to NVFP4, as a picture and lines of Markdown.

``python tools/plot_nvfp4.py`` draws kernels/results/nvfp4_error.png and prints the table of kernels/NVFP4.md.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from mopd_kernels.nvfp4 import TE_SIGNS, Format, quantize
from mopd_kernels.nvfp4.hadamard import inverse

PICTURE = Path(__file__).resolve().parent.parent / "kernels" / "results" / "nvfp4_error.png"
SHAPE = (1024, 2048)
WEIGHTS = ("Gaussian", "heavy-tailed")
# Colours of Okabe and Ito's palette, readable with any kind of colour vision.
WAYS: dict[str, tuple[Format, str, str]] = {
    "nearest": (Format(), "#000000", "-"),
    "four-over-six, mse": (Format(four_over_six="mse"), "#0072b2", "-"),
    "four-over-six, mae": (Format(four_over_six="mae"), "#56b4e9", "-"),
    "16 x 16 blocks": (Format(block="16x16"), "#d55e00", "-"),
    "Hadamard": (Format(signs=TE_SIGNS), "#009e73", "--"),  # on Gaussian weights it lies on nearest
    "stochastic": (Format(rounding="stochastic", seed=0), "#cc79a7", "-"),
}


def weights(name: str, shape: Sequence[int] = SHAPE) -> Tensor:
    """bf16 ``[R, K]``: N(0, 0.02^2), or Student's t with 3 degrees of freedom times 0.02."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(*shape, generator=generator)
    if name == "heavy-tailed":
        normal /= (torch.randn(3, *shape, generator=generator).square().mean(0)).sqrt()
    return (normal * 0.02).bfloat16()


def block_errors(x: Tensor, format: Format) -> Tensor:
    """fp64 ``[R, K / 16]``: squared error of each run of 16 over the squared norm of the run."""
    ours = quantize(x, format)
    values = ours.dequantize() if ours.transformed is None else inverse(ours.dequantize(), ours.transformed)
    runs = x.double().unflatten(1, (-1, 16))
    return (values.double().unflatten(1, (-1, 16)) - runs).square().sum(-1) / runs.square().sum(-1)


def changes(x: Tensor, errors: dict[str, Tensor]) -> dict[str, float]:
    """Mean squared error of each way over that of rounding to nearest, minus 1, in percent, from its block errors."""
    energy = x.double().unflatten(1, (-1, 16)).square().sum(-1)
    total = {way: float((error * energy).sum()) for way, error in errors.items()}
    return {way: round(100 * (value / total["nearest"] - 1), 1) + 0.0 for way, value in total.items()}  # no -0.0


def measure() -> dict[str, tuple[dict[str, Tensor], dict[str, float]]]:
    """For each kind of weights the block errors of each way and its change of the mean squared error."""
    measured = {}
    for name in WEIGHTS:
        x = weights(name)
        errors = {way: block_errors(x, format) for way, (format, _, _) in WAYS.items()}
        measured[name] = errors, changes(x, errors)
    return measured


def markdown(measured: dict[str, tuple[dict[str, Tensor], dict[str, float]]]) -> Iterator[str]:
    """A line for each way: percent by which it changes the mean squared error, for each kind of weights."""
    for way in WAYS:
        yield f"| {way} | {' | '.join(f'{change[way]:+.1f} %' for _, change in measured.values())} |"


def plot(path: Path, measured: dict[str, tuple[dict[str, Tensor], dict[str, float]]]) -> None:
    """Root of the relative squared error against the share of blocks that have at most it, a panel for each kind."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(WEIGHTS), sharey=True, figsize=(11, 4.6), layout="constrained")
    for panel, (name, (errors, change)) in zip(panels, measured.items(), strict=True):
        for way, (_, colour, dashes) in WAYS.items():
            error = 100 * errors[way].sqrt().flatten().sort().values
            shown = error[torch.linspace(0, len(error) - 1, 1001).long()]
            label = way if way == "nearest" else f"{way}: {change[way]:+.1f} %"
            panel.plot(torch.linspace(0, 100, 1001), shown, color=colour, linestyle=dashes, linewidth=1.6, label=label)
        panel.set_title(f"{name} weights")
        panel.set_xlabel("blocks in order of their error, %")
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
        panel.set_xlim(0, 100)
        panel.legend(title="mean squared error\nagainst nearest", frameon=False, fontsize=9, title_fontsize=9)
    panels[0].set_ylabel("error of a block over its norm, %")
    panels[0].set_ylim(0, 32)
    figure.suptitle(f"NVFP4 error of each run of 16 elements, {SHAPE[0]} x {SHAPE[1]}, numerics = te")
    figure.savefig(path, dpi=120, metadata={"Software": None})
    pyplot.close(figure)


def main(words: Sequence[str]) -> None:
    """Draws into the file named, or the one of the page, and prints the table's lines."""
    measured = measure()
    plot(Path(words[0]) if words else PICTURE, measured)
    sys.stdout.writelines(f"{line}\n" for line in markdown(measured))


if __name__ == "__main__":
    main(sys.argv[1:])
