"""Where two runs first differ: settings first, then the first step whose metrics, rollouts or weights are not equal.

    python tools/compare_runs.py A B

A and B are directories of runs, or of recipes, which are compared stage by stage. Times and memory do not count. Ends
with status 1 where results differ, 0 where they are equal to the last bit that was kept.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_mopd import display, run_comparison
from megatron_mopd.config import ConfigurationError
from megatron_mopd.run_comparison import Comparison

LISTED = 10  # settings shown


def show(found: Comparison, title: str) -> bool:
    """Print what one pair of directories gives; whether results differ."""
    for text in found.settings[:LISTED]:
        display.note(0, f"{title}{text}")
    if (more := len(found.settings) - LISTED) > 0:
        display.note(0, f"{title}and {more:,} more settings")
    if found.step is not None:
        display.note(0, f"{title}first differing step: {found.step}")
    for text in found.results:
        display.note(0, f"{title}{text}")
    if not found.results:
        display.note(0, f"{title}equal: {', '.join(found.compared) or 'nothing to compare'}")
    return bool(found.results)


def show_all(one: Path, other: Path) -> bool:
    """Runs, or all stages of recipes; whether anything differs. Raises :class:`ConfigurationError`."""
    if run_comparison.is_run(one) and run_comparison.is_run(other):
        return show(run_comparison.compare(one, other), "")
    names, theirs = run_comparison.stages(one), run_comparison.stages(other)
    alone = [name for name in names if name not in theirs] + [name for name in theirs if name not in names]
    if alone:
        display.note(0, f"stages on one side only: {', '.join(alone)}")
    common = [name for name in names if name in theirs]
    return any([show(run_comparison.compare(one / n, other / n), f"stage {n}: ") for n in common] + [bool(alone)])


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("one", type=Path, metavar="A")
    parser.add_argument("other", type=Path, metavar="B")
    arguments = parser.parse_args()
    try:
        return 1 if show_all(arguments.one, arguments.other) else 0
    except ConfigurationError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    sys.exit(main())
