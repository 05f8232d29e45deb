"""A report as files: pictures, ``report.md`` and ``report.json``, each written whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_mopd import plots
from megatron_mopd.files import atomically
from megatron_mopd.report import Report, to_json, to_markdown


def write(report: Report, directory: Path | str) -> list[Path]:
    """Write pictures, ``report.md`` and last ``report.json``; returns their paths. Raises :class:`files.WriteError`."""
    directory = Path(directory)
    written, pictures = [], {}
    for caption, name, figure in plots.figures(report):
        written.append(atomically(directory / name, lambda path, figure=figure: plots.save(figure, path)))
        pictures[caption] = name
    markdown = to_markdown(report, pictures)
    text = json.dumps(to_json(report), indent=2, allow_nan=False) + "\n"
    written.append(atomically(directory / "report.md", lambda path: path.write_text(markdown, encoding="utf-8")))
    written.append(atomically(directory / "report.json", lambda path: path.write_text(text, encoding="utf-8")))
    return written
