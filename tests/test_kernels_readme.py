"""The page of the kernels is true: its example runs, its files exist, its ratios are those of the committed run."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "kernels" / "README.md"


def test_the_example_runs() -> None:
    (block,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    done = subprocess.run([sys.executable, "-c", block], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0 and done.stdout.strip(), done.stderr


def test_the_files_named_exist() -> None:
    text = README.read_text(encoding="utf-8")
    paths = re.findall(r"(?<![\w/.])((?:tools|tests|kernels)/[\w./-]*\w)", text)
    assert "tools/bench_kernels.py" in paths and not [path for path in paths if not (ROOT / path).exists()]
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)", text)
    assert not [link for link in links if not (README.parent / link).exists()]


def test_the_ratios_told_are_those_of_the_committed_run(tmp_path: Path) -> None:
    page, report = tmp_path / "README.md", str(ROOT / "tools" / "bench" / "report.py")
    told = README.read_text(encoding="utf-8")
    rows = [line for line in told.splitlines() if re.match(r"\| L\d+ \| [^|]+ \| \d", line)]
    assert len(rows) > 10
    page.write_text("\n".join(line for line in told.splitlines() if line not in rows[1:]) + "\n", encoding="utf-8")
    command = [sys.executable, report, str(ROOT / "kernels" / "results" / "cpu_log_ratio.json"), str(page)]
    subprocess.run(command, check=True)
    assert page.read_text(encoding="utf-8") == told
