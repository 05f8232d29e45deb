"""The comparison of two checkpoints on the same prompts, without training any."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
from scripts import loaded

from megatron_mopd.config import ConfigurationError
from megatron_mopd.runner import load_recipe, stage_config

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return loaded("tools/compare_students.py")


def test_counts_what_changed_hands_domain_by_domain(tool: ModuleType) -> None:
    tree = tool.compare({"a": "1100", "b": "1111"}, {"a": "1011", "b": "1111"})
    assert {key: tree["a"][key] for key in ("total", "before", "after", "gained", "lost")} == {
        "total": 4,
        "before": 2,
        "after": 3,
        "gained": 2,
        "lost": 1,
    }
    assert tree["a"]["low"] < tree["a"]["change"] == 0.25 < tree["a"]["high"]
    assert tree["b"]["change"] == 0 and tree["b"]["low"] < 0 < tree["b"]["high"]


def test_more_held_out_tasks_are_drawn_where_they_can_be(tool: ModuleType) -> None:
    recipe = load_recipe(ROOT / "examples" / "demo.yaml", [])
    config = stage_config(recipe, recipe.stages[-1])
    assert {s.size for s in tool.with_samples(config, 700).data.held_out} == {700}
    assert {s.size for s in tool.with_samples(config, 7).data.held_out} == {500}
    empty = config.model_copy(update={"data": config.data.model_copy(update={"held_out": []})})
    with pytest.raises(ConfigurationError, match=r"data\.held_out is empty"):
        tool.with_samples(empty, 7)
