"""Every example parses, fits its model, and builds process groups and mcore's configuration at its real world size."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_mopd import presets
from megatron_mopd.config import Config, Mopd, load_config
from megatron_mopd.memory.plan import GIB, Machine, plan
from megatron_mopd.presets import PRESETS
from megatron_mopd.settings import read_yaml

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = sorted(p for p in EXAMPLES.glob("*.sh") if p.name != "launch.sh")
NODES = {"nano_one_node": 1, "super_many_nodes": 8, "ultra_many_nodes": 64}
GPU_GIB = {"nano_one_node": 139, "super_many_nodes": 79, "ultra_many_nodes": 178}  # of GPUs of 141, 80 and 180 GB


def _dry_run(script: Path, *arguments: str, **environment: str) -> list[str]:
    """The words of the line that a launch script would run."""
    clean = {k: v for k, v in os.environ.items() if k not in ("NNODES", "NODE_RANK", "MASTER_ADDR", "GPUS_PER_NODE")}
    settings = {"DRY_RUN": "1", "NODE_RANK": "1", "MASTER_ADDR": "node0"} | environment
    line = subprocess.run(
        [str(script), *arguments], env=clean | settings, capture_output=True, text=True, check=True, cwd="/"
    ).stdout
    assert line.count("\n") == 1
    return shlex.split(line)


def _option(words: list[str], name: str) -> str:
    return next(word.partition("=")[2] for word in words if word.startswith(f"--{name}="))


def _config_of(words: list[str]) -> Path:
    return Path(words[words.index("-m") + 2])


def test_every_script_has_its_configuration_and_is_listed() -> None:
    assert {script.stem for script in SCRIPTS} == NODES.keys()
    for script in SCRIPTS:
        assert script.with_suffix(".yaml").is_file()


@pytest.mark.parametrize("script", sorted(EXAMPLES.glob("*.sh")), ids=lambda p: p.name)
def test_scripts_are_strict_and_executable(script: Path) -> None:
    text = script.read_text()
    assert text.startswith("#!/usr/bin/env bash\n") and "\nset -euo pipefail\n" in text
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", str(script)], check=True)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.stem)
def test_dry_run_names_what_exists(script: Path) -> None:
    words = _dry_run(script, "optimizer.lr=1e-6", "run.id=a b")
    assert words[0] == "torchrun"
    assert importlib.util.find_spec(words[words.index("-m") + 1]) is not None
    assert _config_of(words) == script.with_suffix(".yaml")
    assert words[-2:] == ["optimizer.lr=1e-6", "run.id=a b"]
    assert int(_option(words, "nnodes")) == NODES[script.stem]
    assert int(_option(words, "nproc_per_node")) == 8
    load_config(_config_of(words), words[-2:])


def test_dry_run_follows_the_environment() -> None:
    script = EXAMPLES / "ultra_many_nodes.sh"
    words = _dry_run(script, NNODES="32", NODE_RANK="0", MASTER_PORT="1234", GPUS_PER_NODE="4", MAX_RESTARTS="0")
    assert (_option(words, "nnodes"), _option(words, "nproc_per_node"), _option(words, "max_restarts")) == (
        "32",
        "4",
        "0",
    )
    assert _option(words, "rdzv_endpoint") == "node0:1234" and "--rdzv_conf=is_host=1" in words
    assert "--rdzv_conf=is_host=0" in _dry_run(script)
    assert "--standalone" in _dry_run(EXAMPLES / "nano_one_node.sh") and "--standalone" not in words


@pytest.mark.parametrize("unset", ["NODE_RANK", "MASTER_ADDR"])
def test_many_nodes_need_to_know_their_place(unset: str) -> None:
    environment = {"PATH": os.environ["PATH"], "DRY_RUN": "1", "NODE_RANK": "1", "MASTER_ADDR": "node0"}
    del environment[unset]
    result = subprocess.run([EXAMPLES / "ultra_many_nodes.sh"], env=environment, capture_output=True, text=True)
    assert result.returncode != 0 and f"{unset}: is not set" in result.stderr and result.stdout == ""


def test_launch_without_a_configuration_says_how() -> None:
    result = subprocess.run([EXAMPLES / "launch.sh"], capture_output=True, text=True)
    assert result.returncode == 2 and "CONFIG.yaml" in result.stderr


# ------------------------------------------------------------------ at the real world size


def _start(script: Path, fake_world: Callable[[int, int], None], last: bool = False) -> tuple[Config, Any]:
    """The configuration of a launch script and the groups of its first or last rank."""
    from megatron_mopd import parallel

    words = _dry_run(script)
    world = int(_option(words, "nnodes")) * int(_option(words, "nproc_per_node"))
    config = load_config(_config_of(words))
    presets.check(config)
    fake_world(world, world - 1 if last else 0)
    return config, parallel.initialize(config.parallel, config.run.seed)


@pytest.mark.parametrize("last", [False, True], ids=["first_rank", "last_rank"])
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.stem)
def test_groups_and_model_configuration_at_the_real_world_size(
    script: Path, last: bool, fake_world: Callable[[int, int], None]
) -> None:
    from megatron_mopd import student

    config, groups = _start(script, fake_world, last)
    sizes, world = config.parallel, NODES[script.stem] * 8
    assert (groups.world_size, groups.rank) == (world, world - 1 if last else 0)
    assert (groups.tp_size, groups.ep_size, groups.pp_size) == (sizes.tensor, sizes.expert, 1)
    assert groups.dp_size == world // sizes.tensor
    assert groups.expt_dp.size() == world // (sizes.expert * sizes.expert_tensor)
    assert groups.tp_rank == (sizes.tensor - 1 if last else 0)
    built = student.transformer_config(config.model, sizes, "bf16", mtp=True)
    preset = PRESETS[config.model.preset]
    assert (built.hidden_size, built.num_moe_experts) == (preset.hidden_size, preset.num_moe_experts)
    assert (built.tensor_model_parallel_size, built.expert_model_parallel_size) == (sizes.tensor, sizes.expert)
    assert built.sequence_parallel is (sizes.tensor > 1) and built.recompute_granularity == "full"


@pytest.fixture
def build_on_meta(monkeypatch: pytest.MonkeyPatch) -> Callable[[Config, Any], torch.nn.Module]:
    """``build_on_meta(config, groups)``: one rank's share of the student, without memory."""
    from megatron_mopd import host, student

    def build(config: Config, groups: Any) -> torch.nn.Module:
        host.activate()
        meta = torch.device("meta")
        monkeypatch.setattr(torch.cuda, "current_device", lambda: meta)
        override = config.model.override | {"perform_initialization": False}
        model = config.model.model_copy(update={"override": override})
        on_meta = dataclasses.replace(groups, device=meta)
        with meta:
            return student.build_model(model, config.parallel, on_meta, model.vocab_size or 0, "bf16", mtp=True)

    return build


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.stem)
def test_the_shares_of_all_ranks_make_up_the_published_parameters(
    script: Path, fake_world: Callable[[int, int], None], build_on_meta: Callable[[Config, Any], torch.nn.Module]
) -> None:
    config, groups = _start(script, fake_world)
    built = build_on_meta(config, groups)
    total = {"main": 0, "mtp": 0}
    for name, p in built.named_parameters():
        split = (
            config.parallel.expert * config.parallel.expert_tensor if ".experts." in name else config.parallel.tensor
        )
        shares = split if getattr(p, "tensor_model_parallel", False) else 1
        total["mtp" if name.startswith("mtp.") else "main"] += p.numel() * shares
    for name, buffer in built.named_buffers():
        if name.endswith("expert_bias"):
            total["mtp" if name.startswith("mtp.") else "main"] += buffer.numel()
    count = presets.parameter_count(config.model)
    assert total == {"main": count.main, "mtp": count.mtp}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.stem)
def test_the_memory_a_header_promises_is_what_the_built_model_takes(
    script: Path, fake_world: Callable[[int, int], None], build_on_meta: Callable[[Config, Any], torch.nn.Module]
) -> None:
    """On each rank weights take 2 bytes, gradients 4, optimizer state 12 sharded; a teacher 2, without MTP."""
    config, groups = _start(script, fake_world)
    parameters = dict(build_on_meta(config, groups).named_parameters())
    sizes = {name: p.numel() for name, p in parameters.items()}
    replicas = {name: groups.expt_dp.size() if ".experts." in name else groups.dp_size for name in sizes}
    trained = sum((4 + 12 / replicas[n]) * size for n, size in sizes.items() if parameters[n].requires_grad)
    student = (trained + sum(2 * size for size in sizes.values())) / 2**30
    teacher = sum(2 * size for name, size in sizes.items() if not name.startswith("mtp.")) / 2**30
    header = script.with_suffix(".yaml").read_text().partition("\nrun:")[0]
    assert f"{student:.0f} GiB student" in header
    assert f"{teacher:.0f} GiB for the one" in header and f"{8 * teacher:.0f} GiB a teacher" in header


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.stem)
def test_every_example_fits_the_gpus_it_names_and_says_what_it_needs(script: Path) -> None:
    from megatron_mopd.memory import layouts

    config, world = load_config(script.with_suffix(".yaml")), 8 * NODES[script.stem]
    machine = Machine(world=world, gpu=GPU_GIB[script.stem] * GIB)
    layouts.check(config, machine)
    made, header = plan(config, machine), script.with_suffix(".yaml").read_text().partition("\nrun:")[0]
    assert made.fits, f"{made.peak / GIB:.1f} GiB in {made.phase}"
    assert f"--config examples/{script.stem}.yaml --world {world} --gpu-memory {GPU_GIB[script.stem]}:" in header
    said = " ".join(header.replace("\n#", " ").split())
    assert f"{made.peak / GIB:.0f} GiB at the peak ({made.phase}) of the {machine.usable / GIB:.0f} GiB usable" in said
    held = {item.name: item.nbytes / GIB for item in made.items if item.phase == "always"}
    assert f"{held.pop('resident teacher'):.0f} GiB for the one resident" in said
    assert f"{sum(held.values()):.0f} GiB student" in said


PAGE = (EXAMPLES / "README.md").read_text(encoding="utf-8")


def test_the_page_shows_what_the_doctor_prints(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_mopd.memory import report

    command, printed = re.findall(r"```bash\n(COLUMNS=110 .*)\n```\n\n```text\n(.*?)```", PAGE, flags=re.DOTALL)[0]
    words = shlex.split(command)
    monkeypatch.setenv("COLUMNS", "110")
    monkeypatch.chdir(EXAMPLES.parent)
    assert report.main(words[words.index("megatron_mopd.doctor") + 1 :]) == 0
    assert [line.rstrip() for line in capsys.readouterr().out.splitlines()] == printed.splitlines()


def test_the_page_has_a_row_that_fits_for_each_machine() -> None:
    memory = {"80": 79, "141": 139, "180": 178}
    rows = re.findall(r"^\| (\d+) of (\d+) GB \| (.*) \| (.*) \|$", PAGE, flags=re.MULTILINE)
    assert len(rows) == 4
    for gpus, size, change, said in rows:
        config = load_config(EXAMPLES / "nano_one_node.yaml", change.strip("`").split() if "`" in change else [])
        machine = Machine(world=int(gpus), gpu=memory[size] * GIB)
        made = plan(config, machine)
        assert made.fits and said == f"{made.peak / GIB:.0f} of {machine.usable / GIB:.0f} GiB"


def test_what_the_page_names_exists() -> None:
    named = re.findall(r"(?<![\w/.])(?:examples|tools)/[\w./-]+", PAGE) + re.findall(r"`(\w+\.(?:sh|yaml|py))`", PAGE)
    assert len(named) > 10
    assert not [n for n in named if not ((EXAMPLES.parent / n).exists() or (EXAMPLES / n).exists())]
    files = {p.name for p in EXAMPLES.glob("*.yaml")} | {p.name for p in EXAMPLES.glob("*.py")} | {"launch.sh"}
    assert not [name for name in files if f"`{name}`" not in PAGE]
    count = presets.parameter_count(PRESETS["nano-30b-a3b"]).main
    assert f"{count / 1e9:.2f} B parameters: {2 * count / 1e9:.0f} GB" in " ".join(PAGE.split())
    assert f"{14 * count / 1e9:.0f} GB for a checkpoint" in " ".join(PAGE.split())


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.stem)
def test_another_number_of_ranks_is_refused(script: Path, fake_world: Callable[[int, int], None]) -> None:
    from megatron_mopd import parallel
    from megatron_mopd.config import ConfigurationError

    config = load_config(script.with_suffix(".yaml"))
    fake_world(NODES[script.stem] * 8 + 1, 0)
    with pytest.raises(ConfigurationError, match="does not divide"):
        parallel.initialize(config.parallel, config.run.seed)


# ------------------------------------------------------------------ recipes of several stages

RECIPES = [path for path in sorted(EXAMPLES.glob("*.yaml")) if "stages" in read_yaml(path)]
LAYOUTS = {
    "data": (),
    "tensor": ("parallel.tensor=2",),
    "expert": ("parallel.expert=2",),
    "both": ("parallel.tensor=2", "parallel.expert=2"),
}


def test_every_configuration_is_launched_by_a_script_or_is_a_recipe() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.yaml")} == NODES.keys() | {path.stem for path in RECIPES}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_stages_of_a_recipe_fit_every_layout_of_two_ranks(
    path: Path, layout: str, fake_world: Callable[[int, int], None]
) -> None:
    from megatron_mopd import parallel, runner, student

    recipe = runner.load_recipe(path, list(LAYOUTS[layout]))
    configs = [runner.stage_config(recipe, stage) for stage in recipe.stages]
    fake_world(2, 1)
    for config in configs:
        presets.check(config)
        groups = parallel.initialize(config.parallel, config.run.seed)
        assert (groups.tp_size, groups.ep_size) == (config.parallel.tensor, config.parallel.expert)
        student.transformer_config(config.model, config.parallel, "fp32", mtp=True)


# ------------------------------------------------------------------ what the examples claim


def _mopd(config: Config) -> Mopd:
    assert isinstance(config.objective, Mopd)
    return config.objective


def test_ultra_is_the_released_configuration_where_it_says_so() -> None:
    config = load_config(EXAMPLES / "ultra_many_nodes.yaml")
    released: dict[str, Any] = {
        "importance": "clamp",  # truncated_importance_sampling_type: tis
        "importance_low": 0.2,
        "importance_high": 5.0,
        "force_on_policy_ratio": True,
        "advantage_clip": 20.0,
        "sequence_error_threshold": 2.0,
        "normalization": "token",
        "outcome_weight": 0.0,
        "minibatches": 1,
    }
    objective = _mopd(config).model_dump()
    assert {name: objective[name] for name in released} == released
    optimizer, rollout = config.optimizer, config.rollout
    assert (optimizer.lr, optimizer.warmup_steps, optimizer.decay, optimizer.clip_grad) == (2e-6, 10, "constant", 1.0)
    assert optimizer.lr * optimizer.warmup_from == pytest.approx(3e-7)
    assert (optimizer.betas, optimizer.eps, optimizer.weight_decay) == ((0.9, 0.999), 1e-8, 0.0)
    assert (rollout.prompts_per_step, rollout.samples_per_prompt, rollout.lag) == (1024, 1, 1)
    assert (rollout.temperature, rollout.top_p) == (1.0, 1.0)
    assert (config.parallel.tensor, config.parallel.expert, config.parallel.pipeline) == (8, 64, 1)
    assert (config.model.train_router, config.model.update_expert_bias) == (False, True)
    assert (config.mtp.train, config.mtp.weight) == (True, 0.3)
    assert (config.run.seed, config.checkpoint.every, config.batching.micro_batch_size) == (42, 6, 1)
    assert len(config.teachers) == 5


def test_nano_has_the_released_learning_rate_and_the_papers_objective() -> None:
    config = load_config(EXAMPLES / "nano_one_node.yaml")
    assert config.optimizer.lr == 4e-6
    assert config.optimizer.lr * config.optimizer.warmup_from == pytest.approx(4e-7)
    assert _mopd(config) == Mopd()


def test_nano_starts_from_a_download_and_ends_in_an_export() -> None:
    config = load_config(EXAMPLES / "nano_one_node.yaml")
    assert config.model.initial == config.tokenizer.path and config.checkpoint.export == "hugging_face"
    assert f"--local-dir {config.model.initial}\n" in PAGE and f"`{config.run.dir}/hugging_face`" in PAGE
    assert all(t.model is None and t.checkpoint.parent == config.model.initial.parent for t in config.teachers.values())
