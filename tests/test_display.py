"""What rank 0 shows, on a terminal and elsewhere."""

import io
import logging
from types import SimpleNamespace

import pytest
from rich.console import Console

from megatron_mopd import display, palette, screen
from megatron_mopd.display import StageProgress
from megatron_mopd.intervals import Accuracy
from megatron_mopd.report import Divergence, Example, Report


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    """Time that passes when told to."""
    time = SimpleNamespace(now=100.0)
    monkeypatch.setattr(display, "perf_counter", lambda: time.now)
    return time


@pytest.fixture
def plain(monkeypatch) -> io.StringIO:
    """The shared console, written to a file."""
    return _console(monkeypatch, force_terminal=False)


@pytest.fixture
def terminal(monkeypatch) -> io.StringIO:
    return _console(monkeypatch, force_terminal=True)


def _console(monkeypatch, force_terminal: bool) -> io.StringIO:
    out = io.StringIO()
    made = Console(file=out, width=140, force_terminal=force_terminal, highlight=False, _environ={})
    monkeypatch.setattr(display, "console", lambda: made)
    return out


ROW = {
    "loss": 0.5,
    "reverse_kl_k1": 0.31,
    "reverse_kl_k1/sort": 0.4,
    "reverse_kl_k1/teacher/saul": 0.4,
    "rollout/tokens": 2000.0,
}


def test_plain_lines_come_every_few_seconds(clock, plain) -> None:
    with StageProgress("merge", 100) as progress:
        for step in range(1, 101):
            clock.now += 1
            progress.update(step, ROW | ({"accuracy/sort": 0.875} if step == 50 else {}))
    lines = [line for line in plain.getvalue().splitlines() if line.startswith("merge ") and "/100" in line]
    steps = [line.split()[1] for line in lines]
    assert steps[0] == "1/100" and steps[-1] == "100/100" and 8 <= len(steps) <= 13
    assert "loss 0.5000" in lines[0] and "KL 0.310" in lines[0] and "2,000 tokens/s" in lines[0]
    assert "1 min 39 s left" in lines[0] and "left" not in lines[-1]
    assert "accuracy" not in lines[0] and "accuracy sort 87.5%" in lines[-1]


def test_a_summary_closes_the_stage(clock, plain) -> None:
    with StageProgress("merge", 2) as progress:
        clock.now += 30
        progress.update(1, ROW | {"accuracy/sort": 0.25})
        clock.now += 35
        progress.update(2, ROW | {"accuracy/sort": 0.75, "loss": 0.125})
    summary = plain.getvalue().split("first")[1]
    for expected in ["0.5000", "0.1250", "accuracy sort", "25.0%", "75.0%", "2 steps in 1 min 05 s, 4,000 tokens"]:
        assert expected in summary
    assert "saul" not in summary


def test_a_resumed_stage_is_timed_from_where_it_resumed(clock, plain) -> None:
    progress = StageProgress("merge", 100)
    with progress:
        clock.now += 10
        progress.update(91, ROW)
        assert progress.eta() == 90
    assert "1 steps in 10 s" in plain.getvalue()


def test_no_summary_after_an_error_and_the_error_goes_on(clock, plain) -> None:
    with pytest.raises(RuntimeError, match="boom"), StageProgress("merge", 2) as progress:
        progress.update(1, ROW)
        raise RuntimeError("boom")
    assert "first" not in plain.getvalue()


def test_other_ranks_show_nothing(plain) -> None:
    with StageProgress("merge", 1, enabled=False) as progress:
        progress.update(1, ROW)
        progress.note("hello")
    display.note(1, "hello")
    assert plain.getvalue() == ""


def test_notes_are_shown_as_they_are(plain) -> None:
    with StageProgress("merge", 1) as progress:
        progress.note("kept [sort] as it is")
    assert "kept [sort] as it is" in plain.getvalue()


def test_a_terminal_gets_a_live_bar_with_domains(terminal) -> None:
    with StageProgress("merge", 3) as progress:
        for step in (1, 2, 3):
            progress.update(step, ROW | {"accuracy/sort": 0.5, "accuracy/count": 0.25})
    shown = terminal.getvalue()
    assert "2/3" in shown and "━" in shown and "accuracy 50.0%" in shown and "\x1b[" in shown
    assert "first" in shown.rsplit("3/3", 1)[1]


def test_logging_says_the_rank_and_does_not_pile_up(capsys, plain) -> None:
    log = logging.getLogger("megatron_mopd.test")
    root = logging.getLogger()
    before = list(root.handlers)
    try:
        display.setup_logging(3)
        display.setup_logging(3)
        assert len(root.handlers) == len(before) + 1
        log.info("quiet")
        log.warning("loud")
        err = capsys.readouterr().err
        assert "rank 3" in err and err.count("loud") == 1 and "quiet" not in err
        display.setup_logging(0)
        log.info("spoken")
        assert "spoken" in capsys.readouterr().err
    finally:
        for handler in [h for h in root.handlers if h not in before]:
            root.removeHandler(handler)
        for package in ("megatron_mopd", "mopd_kernels"):
            logging.getLogger(package).setLevel(logging.NOTSET)


# ---------------------------------------------------------------------- a report on the screen


@pytest.fixture
def merged() -> Report:
    def acc(correct: int) -> Accuracy:
        return Accuracy(correct=correct, total=500)

    return Report(
        title="Two teachers",
        teacher_of={"spell_backward": "rita", "number_sorting": "saul"},
        before={"spell_backward": acc(100), "number_sorting": acc(450)},
        after={"spell_backward": acc(460), "number_sorting": acc(440)},
        teachers={
            "rita": {"spell_backward": acc(480), "number_sorting": acc(90)},
            "saul": {"spell_backward": acc(50), "number_sorting": acc(400)},
        },
        reverse_kl={
            "rita": {"spell_backward": Divergence(before=0.8, after=0.02)},
            "saul": {"number_sorting": Divergence(before=0.7, after=0.01)},
        },
        parallel={},
        versions={},
        wall_s=61.5,
        examples=(
            Example(
                domain="sort", prompt="[b] a", tokens=("a", " ", "[b]"), advantages=(0.0, -3.0, 2.0), note="step 1"
            ),
        ),
    )


@pytest.mark.parametrize("width", [80, 200])
def test_the_table_fits_and_is_whole(merged: Report, width: int) -> None:
    out = io.StringIO()
    screen.show(merged, Console(file=out, width=width, _environ={}))
    shown = out.getvalue()
    assert all(len(line) <= width for line in shown.splitlines())
    for expected in ["spell_backward", "20.0%", "[16.7, 23.7]", "96.0%", "94.7%", "n/a", "→ 0.020", "1 min 02 s"]:
        assert expected in shown
    assert "…" not in shown
    assert ("+72.0 [+67.4, +75.9]" in shown) == (width == 200)
    assert "500 held-out tasks" in shown


def test_a_rollout_shows_every_token_on_its_colour(merged: Report) -> None:
    text = screen.rollout_text(merged.examples[0], scale=3.0)
    assert text.plain == "sort (step 1) [b] a → a·[b]"
    grounds = {text.plain[span.start : span.end]: span.style.bgcolor.name for span in text.spans if _has_ground(span)}
    assert grounds["·"] == palette.hexadecimal(palette.advantage_colour(-3.0, 3.0))
    assert grounds["[b]"] == palette.hexadecimal(palette.advantage_colour(2.0, 3.0))
    assert "a" not in grounds


def _has_ground(span) -> bool:
    return not isinstance(span.style, str) and span.style.bgcolor is not None
