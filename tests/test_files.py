"""Files that cannot be written: the user reads which one, what the system said and what to do, not a traceback."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from matplotlib.figure import Figure

from megatron_mopd import checkpoint_directory, metrics, report_files, run_record, traces, train
from megatron_mopd.config import ConfigurationError
from megatron_mopd.files import WriteError, atomically, free
from megatron_mopd.preflight import stage as preflight
from megatron_mopd.recipe import graph, graph_plot, report


def full(*_: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_refused_write_names_file_cause_and_way_out_and_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = atomically(tmp_path / "a" / "b" / "result.json", lambda path: path.write_text("old"))
    with pytest.raises(ValueError, match="not the disk"):
        atomically(file, lambda path: (path.write_text("half"), int("not the disk")))
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(WriteError) as raised:
        atomically(file, lambda path: path.write_text("new"), "the table")
    text = str(raised.value)
    assert text.startswith(f"{file}: the table could not be written: No space left on device; ")
    assert " bytes are free there; make room, then start the same command again" in text
    assert raised.value.cause.errno == errno.ENOSPC
    assert file.read_text() == "old" and os.listdir(file.parent) == ["result.json"]
    monkeypatch.undo()
    with pytest.raises(WriteError, match=r"result.json/x: it could not be written: .*; see to it that this can be"):
        atomically(file / "x", lambda path: path.write_text("below a file"))


def test_room_is_that_of_the_nearest_directory_and_asking_never_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert free(tmp_path / "not" / "there").endswith(" bytes are free there")
    monkeypatch.chdir(tmp_path)
    assert free(Path("nowhere")).endswith(" bytes are free there")
    monkeypatch.setattr("shutil.disk_usage", full)
    assert free(tmp_path) == "how much is free there is unknown (No space left on device)"


FIRST: Any = SimpleNamespace(rank=0)


def write_preflight(root: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(preflight.plot, "preflight", lambda result: Figure())
    preflight._leave({}, root, FIRST, "pre-flight")


def write_recipe_report(root: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(report.pictures, "figures", lambda tree, examples: [("a picture", "a.png", Figure())])
    patch.setattr(report, "examples", lambda found: [])
    report.write({}, SimpleNamespace(), root)  # type: ignore[arg-type]


def write_stage_report(root: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(report_files.plots, "figures", lambda made: [("a picture", "a.png", Figure())])
    report_files.write(SimpleNamespace(), root)  # type: ignore[arg-type]


def write_graph(root: Path, patch: pytest.MonkeyPatch) -> None:
    graph.write(SimpleNamespace(stages=(), dir=root))  # type: ignore[arg-type]


def write_drawing(root: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(graph_plot, "figure", lambda tree: Figure())
    graph_plot.save({"nodes": [], "edges": []}, root / graph.PICTURE)


def write_record(root: Path, patch: pytest.MonkeyPatch) -> None:
    train.leave(root / run_record.FILE, {}, FIRST)


WRITERS: dict[str, tuple[str, Callable[[Path, pytest.MonkeyPatch], None]]] = {
    "preflight": (preflight.PICTURE, write_preflight),
    "recipe report": ("a.png", write_recipe_report),
    "stage report": ("a.png", write_stage_report),
    "graph": (graph.FILE, write_graph),
    "drawing": (graph.PICTURE, write_drawing),
    "record": (run_record.FILE, write_record),
}


@pytest.mark.parametrize("name", WRITERS)
def test_on_a_full_disk_every_writer_ends_the_program_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    file, write = WRITERS[name]
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SystemExit) as ended, train.reported():
        write(tmp_path / "new", monkeypatch)
    assert str(ended.value).startswith(f"error: {tmp_path / 'new' / file}: it could not be written: No space left")
    assert not list((tmp_path / "new").iterdir())


def test_a_damaged_file_is_named_with_what_restores_it(tmp_path: Path) -> None:
    for content in ("", "{", "[1]"):
        (tmp_path / "stage.json").write_text(content)
        with pytest.raises(ConfigurationError, match=r"stage.json: cannot be read: .*; put it back as it was written"):
            checkpoint_directory.read_json(tmp_path / "stage.json")
        with pytest.raises(ConfigurationError, match=f"stage.json: cannot be read: .*--from {tmp_path.name}"):
            graph._state(tmp_path)


def test_metrics_that_cannot_be_opened_are_said_so(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file in the place of a directory")
    with pytest.raises(WriteError, match=r"run/metrics\.jsonl: the rows of this run could not be written"):
        metrics.MetricsWriter(tmp_path / "run")


def test_what_one_rank_writes_for_all_is_refused_on_all(
    tmp_path: Path, groups: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConfigurationError, match=r"could not be written: No space left .*; make room") as raised:
        traces._write(tmp_path / "traces", "row\n", {}, groups)
    assert str(raised.value).startswith(str(tmp_path / "traces" / traces.ROWS))
