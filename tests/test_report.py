"""Intervals, recovery, and the report's files."""

import dataclasses
import json
import os
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_mopd import intervals, plots, report, report_files
from megatron_mopd.files import WriteError
from megatron_mopd.intervals import Accuracy, gain_interval, recovery, wilson
from megatron_mopd.report import Divergence, Example, Report


def acc(correct: int, total: int = 500) -> Accuracy:
    return Accuracy(correct=correct, total=total)


@pytest.fixture
def merged() -> Report:
    """Two domains with a teacher each; the second teacher is no better than the student was."""
    domains = ("reverse", "sort")
    return Report(
        title="Two teachers",
        teacher_of={"reverse": "rita", "sort": "saul"},
        before={"reverse": acc(100), "sort": acc(400)},
        after={"reverse": acc(460), "sort": acc(410)},
        teachers={"rita": {"reverse": acc(480), "sort": acc(90)}, "saul": {"reverse": acc(50), "sort": acc(400)}},
        reverse_kl={t: {d: Divergence(before=0.8, after=0.02) for d in domains} for t in ("rita", "saul")},
        parallel={"tensor": 2, "expert": 1, "world": 2},
        versions={"torch": "2.13.0"},
        wall_s=61.5,
        accuracy_history={d: [(10, acc(60, 128)), (20, acc(90, 128))] for d in domains},
        kl_history={d: [(step, 0.8 / step) for step in range(1, 31)] for d in domains},
        advantages={d: [-2.0, -0.1, 0.0, 0.0, 0.1] for d in domains},
        examples=(Example(domain="sort", prompt="sort b|a", tokens=("a", " ", "b"), advantages=(0.1, -1.0, 0.0)),),
    )


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),  # Newcombe 1998 (Statistics in Medicine 17:857), table I, method 3
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (29, 29, 0.8830, 1.0000),
    ],
)
def test_wilson_interval_against_published_values(correct: int, total: int, low: float, high: float) -> None:
    assert wilson(correct, total) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize(
    ("after", "before", "low", "high"),
    [
        ((56, 70), (48, 80), 0.0524, 0.3339),  # Newcombe 1998 (Statistics in Medicine 17:873), table II, method 10
        ((9, 10), (3, 10), 0.1705, 0.8090),
        ((6, 7), (2, 7), 0.0582, 0.8062),
        ((5, 56), (0, 29), -0.0381, 0.1926),
        ((0, 10), (0, 20), -0.1611, 0.2775),
    ],
)
def test_gain_interval_against_published_values(after, before, low: float, high: float) -> None:
    assert gain_interval(acc(*before), acc(*after)) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(1, 2000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_interval_holds_the_rate_within_the_unit_interval(counts: tuple[int, int]) -> None:
    low, high = wilson(*counts)
    assert 0 <= low <= counts[0] / counts[1] <= high <= 1
    mirrored = wilson(counts[1] - counts[0], counts[1])
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=1e-12)


@pytest.mark.parametrize(("correct", "total"), [(0, 0), (3, 2), (-1, 2)])
def test_wilson_refuses_impossible_counts(correct: int, total: int) -> None:
    with pytest.raises(ValueError, match=f"correct = {correct} of total = {total}"):
        wilson(correct, total)


@pytest.mark.parametrize(
    ("before", "after", "teacher", "expected"),
    [
        (0.2, 0.8, 0.95, 0.8),
        (0.445, 0.54, 0.5, 1.727),
        (0.5, 0.4, 0.9, -0.25),
        (0.5, 0.9, 0.5, None),
        (0.5, 0.6, 0.4, None),
    ],
)
def test_recovery(before: float, after: float, teacher: float, expected: float | None) -> None:
    assert recovery(before, after, teacher) == (None if expected is None else pytest.approx(expected, abs=5e-4))


def test_json_has_the_agreed_fields(merged: Report) -> None:
    tree = json.loads(json.dumps(report.to_json(merged), allow_nan=False))
    assert {"domains", "parallel", "versions", "wall_s"} <= tree.keys()
    assert tree["domains"]["reverse"] == {
        "student_before": 0.2,
        "student_after": 0.92,
        "teacher": 0.96,
        "recovery": pytest.approx(0.72 / 0.76),
        "samples": 500,
        "reverse_kl_before": 0.8,
        "reverse_kl_after": 0.02,
    }
    assert tree["domains"]["sort"]["recovery"] is None
    assert tree["parallel"] == {"tensor": 2, "expert": 1, "world": 2} and tree["wall_s"] == 61.5
    assert tree["matrix"]["saul"] == {"reverse": 0.1, "sort": 0.8}
    assert tree["matrix"]["student after"]["reverse"] == 0.92 and tree["counts"]["rita"]["sort"] == [90, 500]
    assert tree["intervals"]["student before"]["reverse"] == pytest.approx(list(wilson(100, 500)))
    assert tree["intervals"]["gain"]["sort"][0] < 0 < tree["intervals"]["gain"]["sort"][1]
    assert tree["reverse_kl"]["saul"]["reverse"] == {"before": 0.8, "after": 0.02}
    assert "base" not in tree["matrix"]


def test_a_base_of_its_own_joins_the_matrix(merged: Report) -> None:
    based = dataclasses.replace(merged, base={"reverse": acc(5), "sort": acc(10)})
    assert report.to_json(based)["matrix"]["base"] == {"reverse": 0.01, "sort": 0.02}


@pytest.mark.parametrize("field", ["before", "after", "teachers", "reverse_kl", "base"])
def test_a_missing_domain_is_named(merged: Report, field: str) -> None:
    table = getattr(merged, field) or {}
    without = {k: v for k, v in table.items() if k not in ("sort", "saul")}
    with pytest.raises(ValueError, match=f"{field}.*lacks domain 'sort'"):
        dataclasses.replace(merged, **{field: without | ({"reverse": acc(1)} if field == "base" else {})})


def test_an_example_needs_an_advantage_for_each_token() -> None:
    with pytest.raises(ValueError, match="2 tokens with 1 advantages"):
        Example(domain="a", prompt="", tokens=("x", "y"), advantages=(0.0,))


def test_written_files_agree(merged: Report, tmp_path) -> None:
    paths = report_files.write(merged, tmp_path / "runs" / "demo")
    names = [path.name for path in paths]
    assert names == ["accuracy.png", "reverse_kl.png", "advantages.png", "rollouts.png", "report.md", "report.json"]
    assert sorted(os.listdir(tmp_path / "runs" / "demo")) == sorted(names)
    assert json.loads(paths[-1].read_text()) == json.loads(json.dumps(report.to_json(merged)))
    text = paths[-2].read_text()
    for expected in ["**94.7%**", "**n/a**", "20.0% [16.7, 23.7]", "0.8000 → 0.0200", "1 min 02 s", "| tensor | 2 |"]:
        assert expected in text
    for name in names[:4]:
        assert f"]({name})" in text


def test_tables_of_markdown_are_rectangular(merged: Report) -> None:
    awkward = dataclasses.replace(merged, parallel={"a|b": "c|d"})
    widths: dict[int, set[int]] = {}
    for block, text in enumerate(report.to_markdown(awkward, {}).split("\n\n")):
        for line in text.splitlines():
            if line.startswith("|"):
                widths.setdefault(block, set()).add(line.replace("\\|", "").count("|"))
    assert len(widths) == 3 and all(len(counts) == 1 for counts in widths.values())


def test_a_failed_write_leaves_the_old_report(merged: Report, tmp_path, monkeypatch) -> None:
    report_files.write(merged, tmp_path)
    old = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}

    def full_disk(figure, path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(plots, "save", full_disk)
    with pytest.raises(WriteError, match="No space"):
        report_files.write(dataclasses.replace(merged, wall_s=1.0), tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == old


@pytest.mark.parametrize(
    ("seconds", "text"), [(3.4, "3 s"), (61.5, "1 min 02 s"), (59.7, "1 min 00 s"), (3725, "1 h 02 min")]
)
def test_durations(seconds: float, text: str) -> None:
    assert report.duration(seconds) == text


def test_paired_interval_covers_the_change_it_is_about() -> None:
    """95 of 100 intervals hold the true change, also where hardly any prompt changes hands."""
    generator = random.Random(7)
    for up, down in ((0.02, 0.01), (0.002, 0.004), (0.2, 0.1)):
        held = 0
        for _ in range(400):
            draws = generator.choices((1, -1, 0), weights=(up, down, 1 - up - down), k=500)
            low, high = intervals.paired_interval(draws.count(1), draws.count(-1), 500)
            held += low <= up - down <= high
        assert 0.92 <= held / 400 <= 1.0, (up, down)


def test_paired_interval_is_never_a_point_and_grows_narrow() -> None:
    low, high = intervals.paired_interval(0, 0, 1000)
    assert -0.003 < low < 0 < high < 0.003
    few, many = intervals.paired_interval(3, 1, 100), intervals.paired_interval(30, 10, 1000)
    assert many[1] - many[0] < few[1] - few[0]
    with pytest.raises(ValueError, match="gained = 8, lost = 3 of total = 10"):
        intervals.paired_interval(8, 3, 10)
