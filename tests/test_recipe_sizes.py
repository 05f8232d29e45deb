"""One recipe in three sizes: what examples/RECIPE.md says builds its groups and every stage's configuration there."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_mopd import presets
from megatron_mopd.config import Config
from megatron_mopd.memory import layouts
from megatron_mopd.memory.plan import GIB, Machine, plan
from megatron_mopd.objective_presets import OBJECTIVE_PRESETS
from megatron_mopd.presets import PRESETS
from megatron_mopd.recipe import __main__ as command
from megatron_mopd.recipe import beside
from megatron_mopd.recipe.schema import Recipe, Worlds, load_recipe, stage_config

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "examples" / "recipe.yaml"
PAGE = (ROOT / "examples" / "RECIPE.md").read_text(encoding="utf-8")
SIZES = {8: "recipe_8_gpus.txt", 512: "recipe_512_gpus.txt"}
GPU_GIB = {8: 139, 512: 178}  # of GPUs of 141 and 180 GB
MODELS = {8: "nano-30b-a3b", 512: "ultra-550b-a55b"}


def load(size: int) -> Recipe:
    arguments = command.parser().parse_intermixed_args([str(RECIPE), f"@{ROOT / 'examples' / SIZES[size]}"])
    return load_recipe(arguments.recipe, arguments.overrides)


def configs(recipe: Recipe) -> dict[str, Config]:
    return {stage.name: stage_config(recipe, stage) for stage in recipe.stages}


@pytest.mark.parametrize("last", [False, True], ids=["first_rank", "last_rank"])
@pytest.mark.parametrize("size", SIZES)
def test_groups_and_every_stage_at_its_world_size(
    size: int, last: bool, fake_world: Callable[[int, int], None]
) -> None:
    from megatron_mopd import parallel, student

    made = configs(load(size))
    sizes = next(iter(made.values())).parallel
    assert all(config.parallel == sizes for config in made.values())
    fake_world(size, size - 1 if last else 0)
    groups = parallel.initialize(sizes, 42)
    assert (groups.world_size, groups.tp_size, groups.ep_size) == (size, sizes.tensor, sizes.expert)
    assert (groups.dp_size, groups.expt_dp.size()) == (size // sizes.tensor, size // sizes.expert)
    assert groups.rank == (size - 1 if last else 0) and groups.tp_rank == groups.rank % sizes.tensor
    for config in made.values():
        presets.check(config)
        built = student.transformer_config(config.model, sizes, "bf16", mtp=True)
        assert built.hidden_size == PRESETS[MODELS[size]].hidden_size and config.model.preset == MODELS[size]
        assert built.sequence_parallel and built.expert_model_parallel_size == sizes.expert


@pytest.mark.parametrize("size", SIZES)
def test_every_stage_fits_the_gpus_it_names(size: int) -> None:
    machine, largest = Machine(world=size, gpu=GPU_GIB[size] * GIB), 0.0
    for name, config in configs(load(size)).items():
        layouts.check(config, machine)
        made = plan(config, machine)
        assert made.fits, f"{name}: {made.peak / GIB:.0f} GiB in {made.phase}"
        largest = max(largest, made.peak)
    (line,) = re.findall(rf"^\| \*\*{size}\*\* \|.*$", PAGE, flags=re.MULTILINE)
    assert f"| {largest / GIB:.0f} of {machine.usable / GIB:.0f} GiB |" in line


@pytest.mark.parametrize("size", SIZES)
def test_it_is_the_same_recipe(size: int) -> None:
    """Stages, starts, teachers, data and roles are those of the small one; numbers that belong to a model's size are
    not."""
    small, large = load_recipe(RECIPE, []), load(size)
    lost = {stage.name for stage in small.stages} - {stage.name for stage in large.stages}
    assert lost == ({"boosted"} if size == 8 else set())  # Nano has no MTP heads
    for stage in large.stages:
        ours = small.stage(stage.name, "")
        expected = "mopd2" if ours.initial in lost else ours.initial
        assert (stage.initial, stage.teachers, stage.after, stage.type) == (
            expected,
            ours.teachers,
            ours.after,
            ours.type,
        )
        if stage.type == "train":
            config, before = stage_config(large, stage), stage_config(small, ours)
            assert (config.data, config.source, config.run.steps) == (before.data, before.source, before.run.steps)
            assert config.optimizer.lr == {8: 4e-6, 512: 2e-6}[size], stage.name
    assert large.report is not None and large.report.boosted == (None if lost else "boosted")


def test_ultra_has_the_released_objective() -> None:
    released = OBJECTIVE_PRESETS["ultra_released"]
    for name in ("mopd1", "mopd2"):
        objective = configs(load(512))[name].objective.model_dump()
        assert {key: objective[key] for key in released} == released


def test_the_commands_of_the_page_are_understood(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    for name in ("RANK", "WORLD_SIZE", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "MAX_RESTARTS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DRY_RUN", "1")
    seen = 0
    for words in commands_of_the_page():
        if "megatron_mopd.recipe" not in words or "torchrun" in words:
            continue
        before = words[: words.index("python")]
        with monkeypatch.context() as patch:
            for variable, _, value in (word.partition("=") for word in before):
                patch.setenv(variable, "0" if value.startswith("$") else value)
            assert command.main(words[words.index("megatron_mopd.recipe") + 1 :]) == 0
            line, *worlds = capsys.readouterr().out.splitlines()
            assert len(worlds) == (2 if any(word.startswith(("worlds=", "worlds.")) for word in words) else 0)
            assert ("--standalone" in line) is ("NNODES" not in " ".join(before))
        seen += 1
    assert seen >= 4


def commands_of_the_page() -> list[list[str]]:
    blocks = re.findall(r"```bash\n(.*?)```", PAGE, flags=re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]
    return [shlex.split(line, comments=True) for line in lines]


def sections_of_the_page() -> list[dict[str, Any]]:
    """What the page says under ``worlds``, in its order: of one node, then of many."""
    blocks = [yaml.safe_load(text) for text in re.findall(r"```yaml\n(.*?)```", PAGE, flags=re.DOTALL)]
    return [block for block in blocks if "worlds" in block]


def check_worlds(recipe: Recipe, ranks: dict[str, int]) -> None:
    """That each world's own ranks carry its layout, in every stage that it serves."""
    from megatron_mopd import parallel, student

    beside.check(recipe)
    for world, count in ranks.items():
        assert [stage.name for stage in beside.served(recipe, world)] == ["mopd1"]
        config = beside.config_of(recipe, recipe.stage("mopd1", ""), world)
        presets.check(config)
        parallel.check_world(config.parallel, count)
        student.transformer_config(config.model, config.parallel, "bf16")


def test_worlds_on_one_node_have_gpus_and_layouts_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    (words,) = [words for words in commands_of_the_page() if any(word.startswith("worlds.rollout=") for word in words)]
    arguments = command.parser().parse_intermixed_args(words[words.index("megatron_mopd.recipe") + 1 :])
    recipe, section = load_recipe(arguments.recipe, arguments.overrides), sections_of_the_page()[0]
    assert recipe.worlds is not None and recipe.worlds == Worlds.model_validate(section["worlds"])
    worlds = {"rollout": recipe.worlds.rollout, "scoring": recipe.worlds.scoring}
    check_worlds(recipe, {name: world.processes for name, world in worlds.items() if world is not None})
    taken = list(range(section["processes"]))
    for world in worlds.values():
        assert world is not None and world.devices is not None and len(world.devices) == world.processes
        taken += world.devices
    assert recipe.processes == section["processes"] and sorted(taken) == list(range(8))
    machine = Machine(world=section["processes"], gpu=GPU_GIB[512] * GIB)  # GPUs of 180 GB
    for name, config in configs(recipe).items():
        layouts.check(config, machine)
        assert plan(config, machine).fits, name


def test_worlds_on_many_nodes_have_layouts_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    ranks = {}
    for words in (words for words in commands_of_the_page() if "megatron_mopd.worlds" in words):
        world, _, *given = words[words.index("megatron_mopd.worlds") + 1 :]
        option = {key: int(value) for key, _, value in (word.partition("=") for word in words) if value.isdecimal()}
        ranks[world] = option["--nnodes"] * option["--nproc_per_node"]
        overrides = command.parser().parse_intermixed_args([str(RECIPE), *given]).overrides
        section = json.dumps(sections_of_the_page()[1]["worlds"])  # what the copy of the recipe has
        recipe = load_recipe(RECIPE, [f"worlds={section}", *overrides])
        assert recipe.worlds is not None and recipe.worlds.rollout.processes == option["--nproc_per_node"]
        check_worlds(recipe, {world: ranks[world]})
        assert configs(recipe)["mopd1"].parallel == configs(load(512))["mopd1"].parallel  # the training keeps its own
    assert ranks.keys() == {"rollout", "scoring"}


def test_what_the_page_names_exists() -> None:
    named = re.findall(r"(?<![\w/.])(?:examples|tools)/[\w./-]+\w", PAGE)
    assert {f"examples/{name}" for name in SIZES.values()} <= {*named}
    assert not [name for name in named if not (ROOT / name).exists()]
    for line in re.findall(r"^\| \*\*(\d+)\*\* \|.*$", PAGE, flags=re.MULTILINE):
        assert int(line) in (2, *SIZES)
