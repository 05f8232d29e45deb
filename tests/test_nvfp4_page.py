"""The page on NVFP4 is true: its example runs, its files exist, its errors are measured, its table is the code's."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from matplotlib.image import imread

from mopd_kernels.nvfp4.numerics import MODES

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "kernels" / "NVFP4.md"


def test_the_examples_run_one_after_the_other() -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) == 2
    done = subprocess.run(
        [sys.executable, "-c", "".join(blocks)], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0 and "4.50 bits an element" in done.stdout, done.stderr
    assert "[256, 64]" in done.stdout and "(1024, 256)" in done.stdout


def test_the_errors_told_are_measured_and_the_picture_is_drawn(tmp_path: Path) -> None:
    picture = tmp_path / "error.png"
    command = [sys.executable, str(ROOT / "tools" / "plot_nvfp4.py"), str(picture)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    told = PAGE.read_text(encoding="utf-8")
    assert len(lines) == 6 and not [line for line in lines if line not in told]
    drawn, committed = imread(picture), imread(ROOT / "kernels" / "results" / "nvfp4_error.png")
    assert drawn.shape == committed.shape and drawn[..., :3].min() < 0.1 < 0.9 < drawn[..., :3].mean()


def test_the_table_has_every_mode_and_the_files_named_exist() -> None:
    text = PAGE.read_text(encoding="utf-8")
    (header,) = re.findall(r"^\| \| (`.*`) \|$", text, flags=re.MULTILINE)
    assert sorted(re.findall(r"`(\w+)`", header)) == sorted(MODES)
    (four_over_six,) = re.findall(r"^\| four-over-six \| (.*) \|$", text, flags=re.MULTILINE)
    having = [name for name in re.findall(r"`(\w+)`", header) if MODES[name].pair is not None]
    cells = four_over_six.split(" | ")
    assert [n for n, cell in zip(re.findall(r"`(\w+)`", header), cells, strict=True) if cell == "yes"] == having
    paths = re.findall(r"(?<![\w/.])((?:tools|tests|kernels)/[\w./-]*\w)", text)
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)", text)
    assert paths and links and not [path for path in paths if not (ROOT / path).exists()]
    assert not [link for link in links if not (PAGE.parent / link).exists()]
