"""The pictures: their size, and that they show the data."""

import dataclasses
import io
import itertools
import math

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from megatron_mopd import palette, plot_parts, plots, rollout_plot
from megatron_mopd.intervals import Accuracy
from megatron_mopd.report import Divergence, Example, Report

DOMAINS = ("reverse", "count", "sort")


def make(level: float = 0.9, domains: tuple[str, ...] = DOMAINS, seed: int = 0) -> Report:
    generator = np.random.default_rng(seed)

    def acc(rate: float) -> Accuracy:
        return Accuracy(correct=round(500 * rate), total=500)

    return Report(
        title="Synthetic",
        teacher_of={d: f"{d} teacher" for d in domains},
        before={d: acc(0.2) for d in domains},
        after={d: acc(level) for d in domains},
        teachers={f"{d} teacher": {d: acc(0.96)} for d in domains},
        reverse_kl={f"{d} teacher": {d: Divergence(before=0.9, after=1 - level)} for d in domains},
        parallel={},
        versions={},
        wall_s=1.0,
        accuracy_history={d: [(s, acc(level * s / 30)) for s in (10, 20)] for d in domains},
        kl_history={d: [(s, 0.9 * math.exp(-s / 9)) for s in range(1, 31)] for d in domains},
        advantages={d: generator.normal(level, 1, 300).tolist() for d in domains},
        examples=tuple(
            Example(domain=d, prompt="$x_1$", tokens=tuple("ab c\n"), advantages=(0.0, level, -level, 2.0, -3.0))
            for d in domains
        ),
    )


def pixels(figure: Figure) -> np.ndarray:
    """uint8-like RGBA ``[height, width, 4]`` of the saved PNG."""
    buffer = io.BytesIO()
    plots.save(figure, buffer)
    buffer.seek(0)
    return imread(buffer)


PICTURES = ["accuracy.png", "reverse_kl.png", "advantages.png", "rollouts.png"]


@pytest.fixture(scope="module")
def drawn() -> dict[str, list[np.ndarray]]:
    """Each picture for one report twice and for another one."""
    result: dict[str, list[np.ndarray]] = {name: [] for name in PICTURES}
    for report in (make(0.9), make(0.9), make(0.5, seed=1)):
        for _, name, figure in plots.figures(report):
            result[name].append(pixels(figure))
    return result


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_show_the_data(drawn: dict[str, list[np.ndarray]], name: str) -> None:
    first, again, other = drawn[name]
    height, width, _ = first.shape
    assert height > 300 and width > 1000
    ink = (first[..., :3] < 0.98).any(-1)
    assert ink.mean() > 0.01, "nearly nothing is drawn"
    assert ink[:, : width // 2].any() and ink[:, width // 2 :].any()
    assert not ink[0].all() and not ink[:, 0].all()
    assert np.array_equal(first, again), "the same report must give the same picture"
    assert first.shape != other.shape or (np.abs(first - other) > 0.1).any(-1).sum() > 500


@pytest.mark.parametrize("name", PICTURES[:3])
def test_each_domain_has_its_colour_in_every_picture(drawn: dict[str, list[np.ndarray]], name: str) -> None:
    flat = np.round(drawn[name][0][..., :3] * 255).astype(int).reshape(-1, 3)
    for colour in palette.domain_colours(DOMAINS).values():
        wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        assert (np.abs(flat - wanted).max(-1) <= 2).sum() > 30


def test_teachers_are_lines_and_ends_are_the_full_measurements() -> None:
    figure = plots.accuracy(make(0.9))
    assert len(figure.axes) == 3
    lines = figure.axes[0].get_lines()
    student = lines[0]
    assert student.get_xdata().tolist() == [0, 10, 20, 30]
    assert student.get_ydata().tolist() == pytest.approx([0.2, 0.3, 0.6, 0.9])
    assert [0.96, 0.96] in [list(line.get_ydata()) for line in lines]
    assert "reverse teacher 96.0%" in " ".join(text.get_text() for text in figure.axes[0].texts)


def test_without_any_history_the_axis_says_before_and_after() -> None:
    bare = dataclasses.replace(make(), accuracy_history={}, kl_history={}, examples=(), advantages={})
    names = [name for _, name, _ in plots.figures(bare)]
    assert names == ["accuracy.png", "reverse_kl.png"]
    figure = plots.reverse_kl(bare)
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["before", "after"]


def test_a_divergence_of_zero_fits_a_log_axis() -> None:
    zero = make()
    zero = dataclasses.replace(
        zero, reverse_kl={t: {d: Divergence(before=0, after=0)} for d, t in zero.teacher_of.items()}
    )
    assert np.isfinite(pixels(plots.reverse_kl(zero))).all()


@pytest.mark.parametrize("count", [1, 2, 7])
def test_any_number_of_domains(count: int) -> None:
    domains = tuple(f"domain {i}" for i in range(count))
    figure = plots.accuracy(make(domains=domains))
    assert sum(axes.axison for axes in figure.axes) == count


@pytest.mark.parametrize("spots", [[0.5], [0.1, 0.11, 0.12], [0.97, 0.98, 0.99], [0.0, 0.9, 0.95, 1.0]])
def test_labels_keep_their_distance(spots: list[float]) -> None:
    moved = plot_parts.apart(spots, gap=0.075)
    assert all(b - a >= 0.075 - 1e-12 for a, b in itertools.pairwise(moved))
    assert moved[-1] <= 1.0


def test_bins_put_zero_in_the_middle_of_one() -> None:
    for values in (np.array([-3.0, 0.0, 0.1]), np.array([2.0, 5.0]), np.zeros(4)):
        edges = plots._bins(values)
        centre = edges[:-1][edges[:-1] <= 0][-1] + (edges[1] - edges[0]) / 2
        assert abs(centre) < 1e-9 and edges[0] < 0 < edges[-1]


def test_rollouts_wrap_at_whole_tokens_and_stop() -> None:
    tokens = tuple(["word "] * 400)
    example = Example(domain="a", prompt="p", tokens=tokens, advantages=tuple([0.1] * 400))
    placed, last = rollout_plot._lay_out(example, 3, scale=1.0)
    assert all(column + len(text) <= rollout_plot.WIDTH for _, column, text, _ in placed)
    assert {text for _, _, text, ground in placed if ground} == {"word·"}
    assert placed[-1][2] == "…" and last == 3 + rollout_plot.MAX_LINES


def test_a_token_longer_than_a_line_is_cut() -> None:
    example = Example(domain="a", prompt="p", tokens=("x" * 200,), advantages=(0.1,))
    placed, last = rollout_plot._lay_out(example, 0, scale=1.0)
    assert "".join(text for _, _, text, _ in placed) == "x" * 200 and last == 2


def test_colours_run_from_orange_over_white_to_blue() -> None:
    assert palette.advantage_colour(0.0, 2.0) == (255, 255, 255)
    low, high = palette.advantage_colour(-9.0, 2.0), palette.advantage_colour(9.0, 2.0)
    assert low == palette.advantage_colour(-2.0, 2.0) and low[0] > low[2] and high[2] > high[0]
    assert palette.readable_on(high) == "#ffffff" and palette.readable_on((255, 255, 255)) == "#000000"


def test_one_outlier_does_not_bleach_the_scale() -> None:
    assert palette.advantage_scale([0.1] * 99 + [50.0]) == pytest.approx(0.1)
    assert palette.advantage_scale([]) > 0 and palette.advantage_scale([0.0]) > 0
