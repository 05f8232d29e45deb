"""Programs of the repository: Python files outside any package as modules, and the recipe's command as a process."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 900.0
"""Seconds for a recipe of tests, which takes one minute on two cores of its own."""


def loaded(path: str) -> ModuleType:
    """The file at ``path``, absolute or from the repository's root, executed now under a name of its own."""
    spec = importlib.util.spec_from_file_location(f"loaded_{Path(path).stem}", ROOT / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up by name
    spec.loader.exec_module(module)
    return module


def recipe_command(path: Path, *words: str) -> subprocess.Popen[str]:
    """The recipe's command, started, with both its outputs in one; a signal to its group reaches all that it starts."""
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")} | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "megatron_mopd.recipe", str(path), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        start_new_session=True,
    )


def end_of(running: subprocess.Popen[str]) -> str:
    """What a command said, once it has ended."""
    try:
        return running.communicate(timeout=LIMIT)[0]
    finally:
        if running.poll() is None:
            running.terminate()  # and with it all that it started
            running.wait()


def finish(path: Path, *words: str) -> str:
    """What the recipe's command said, which must succeed."""
    running = recipe_command(path, *words)
    said = end_of(running)
    assert running.returncode == 0, said[-4000:]
    return said
