"""One recipe in three sizes: what examples/RECIPE.md says builds its groups and every stage's configuration there."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_mopd import presets
from megatron_mopd.config import Config
from megatron_mopd.memory import layouts
from megatron_mopd.memory.plan import GIB, Machine, plan
from megatron_mopd.objective_presets import OBJECTIVE_PRESETS
from megatron_mopd.presets import PRESETS
from megatron_mopd.recipe import __main__ as command
from megatron_mopd.recipe.schema import Recipe, load_recipe, stage_config

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
    blocks = re.findall(r"```bash\n(.*?)```", PAGE, flags=re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]
    seen = 0
    for words in (shlex.split(line, comments=True) for line in lines):
        if "megatron_mopd.recipe" not in words or "torchrun" in words:
            continue
        before = words[: words.index("python")]
        with monkeypatch.context() as patch:
            for variable, _, value in (word.partition("=") for word in before):
                patch.setenv(variable, "0" if value.startswith("$") else value)
            assert command.main(words[words.index("megatron_mopd.recipe") + 1 :]) == 0
            line, *worlds = capsys.readouterr().out.splitlines()
            assert len(worlds) == (2 if any(word.startswith("worlds=") for word in words) else 0)
            assert ("--standalone" in line) is ("NNODES" not in " ".join(before))
        seen += 1
    assert seen >= 4


def test_what_the_page_names_exists() -> None:
    named = re.findall(r"(?<![\w/.])(?:examples|tools)/[\w./-]+\w", PAGE)
    assert {f"examples/{name}" for name in SIZES.values()} <= {*named}
    assert not [name for name in named if not (ROOT / name).exists()]
    for line in re.findall(r"^\| \*\*(\d+)\*\* \|.*$", PAGE, flags=re.MULTILINE):
        assert int(line) in (2, *SIZES)
