"""What a recipe's YAML says: stages over common settings, who starts from whom, who teaches whom, roles in the report.

Which warm-ups were skipped and which teachers they were for is read from what earlier stages left on disk. Imports
neither torch nor megatron.core.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from megatron_mopd.config import Config, ConfigurationError, Section, build_config
from megatron_mopd.preflight import decide
from megatron_mopd.quantization import recipes
from megatron_mopd.settings import explain, merge, nearest, overlay, read_yaml

SET_ASIDE = "set_aside"
"""Folder of a recipe's directory with the stages that were run anew, one numbered folder for each time."""
SKIPPED = "skipped.json"
"""In the directory of a warm-up that no teacher needed: why, and whose weights later stages start from instead."""
PREFLIGHT = decide.FILE
_OTHER_FOLDERS = (SET_ASIDE, "converted", "ablations")
_MEASURED = ("run", "model", "parallel", "tokenizer", "data", "rollout", "kernels", "batching", "evaluation")


class Stage(Section):
    """One stage: common settings plus its own, from another stage's weights, with other stages as teachers."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    type: Literal["train", "preflight", "quantize"] = "train"
    """train: any source and objective; preflight: measures the teachers on the student's own rollouts and decides for
    each (megatron_mopd.preflight); quantize: stores the student in few bits and measures what that costs."""
    initial: str | None = None
    """Stage whose final weights this one starts from; random weights when left out."""
    teachers: dict[str, list[str]] = {}
    """Stage name -> domains it teaches. A teacher that came as a checkpoint stands under ``teachers`` in ``settings``,
    with its ``checkpoint`` and ``domains``."""
    after: str | None = None
    """Of a warm-up: the preflight stage that says which of its teachers need it. The stage is skipped where none does,
    and those that start from it start from its ``initial``."""
    settings: dict[str, Any] = {}
    """Settings over the common ones; of a quantize stage those of :class:`QuantizeSettings`."""


class QuantizeSettings(Section):
    """How a quantize stage stores the weights; see megatron_mopd.quantization."""

    recipe: str
    """Name of megatron_mopd.quantization.recipes, or a YAML file: which tensor gets which format."""
    four_over_six: Literal["mae", "mse", "max"] | None = None
    """Error by which each NVFP4 block chooses between the scales of 6 and 4."""
    layout: Literal["modelopt", "compressed-tensors"] = "modelopt"


class Roles(Section):
    """Which stages the report's columns are."""

    before: str
    """The student that recovery and changes are measured against, before any warm-up and MOPD."""
    iterations: list[str] = Field(min_length=1)
    """MOPD stages in the order of their columns; recovery is that of the last."""
    sft: str | None = None
    boosted: str | None = None
    quantized: str | None = None
    preflight: str | None = None
    preflight_after: str | None = None
    notes: dict[str, str] = {}
    """Domain -> what a reader has to know of it, printed beside its numbers."""


_ROLE_TYPES = {"quantized": "quantize", "preflight": "preflight", "preflight_after": "preflight"}


class World(Section):
    """A torchrun of its own beside the training."""

    processes: int = Field(default=1, gt=0)
    devices: list[int] | None = None
    """GPUs that it sees, by their index on the machine; all of them, as the training, when left out."""
    settings: dict[str, Any] = {}
    """Settings over those of every stage that it serves: ``parallel``, sizes of batches."""


class Worlds(Section):
    """What draws and scores for stages with ``asynchrony.mode: worlds``, started beside the training on its machine."""

    rollout: World
    scoring: World | None = None
    """Left out where no such stage has teachers."""


class Recipe(Section):
    """Stages over common settings; without roles the last one is reported on when earlier ones are its teachers."""

    dir: Path
    processes: int | None = Field(default=None, gt=0)
    """Ranks that ``python -m megatron_mopd.recipe`` starts on this machine; left out: one for each GPU, or one."""
    common: dict[str, Any] = {}
    stages: list[Stage] = Field(min_length=1)
    worlds: Worlds | None = None
    report: Roles | None = None

    def stage(self, name: str, where: str) -> Stage:
        """The stage of that name; the error about an unknown one begins with ``where`` and names the nearest."""
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise ConfigurationError(f"{where}: no stage is named {name!r}{nearest(name, self.names)}")

    @property
    def names(self) -> list[str]:
        return [stage.name for stage in self.stages]


def load_recipe(path: Path, overrides: Sequence[str]) -> Recipe:
    """Read a recipe; overrides apply to the common settings, to one stage as ``STAGE:key=value``, or are ``dir=PATH``,
    ``processes=N``, ``worlds.rollout.processes=N`` and ``STAGE=skip``, which leaves a stage out: those that start from
    it start from its initial."""
    own = [o for o in overrides if o.startswith(("dir=", "processes=", "worlds.", "worlds="))]
    tree = merge(read_yaml(path), [o for o in own if not o.startswith("dir=")])
    if places := [o.removeprefix("dir=") for o in own if o.startswith("dir=")]:
        tree["dir"] = places[-1]
    try:
        recipe = Recipe.model_validate(tree)
    except ValidationError as error:
        raise ConfigurationError("\n".join(explain(e, str(path), Recipe) for e in error.errors())) from None
    left_out = [
        o.removesuffix("=skip") for o in overrides if o.endswith("=skip") and o[: -len("=skip")] in recipe.names
    ]
    for override in overrides:
        if override in own or override.removesuffix("=skip") in left_out:
            continue
        stage, colon, _ = override.partition("=")[0].partition(":")
        if not colon:
            recipe = recipe.model_copy(update={"common": merge(recipe.common, [override])})
            continue
        recipe.stage(stage, f"override {override!r}")
        rest = override[len(stage) + 1 :]
        stages = [
            s.model_copy(update={"settings": merge(s.settings, [rest])}) if s.name == stage else s
            for s in recipe.stages
        ]
        recipe = recipe.model_copy(update={"stages": stages})
    for name in left_out:
        recipe = _without(recipe, name)
    _check_order(recipe, path)
    for stage in recipe.stages:
        _check_stage(recipe, stage, f"{path}: stage {stage.name!r}")
    if recipe.report is not None:
        _check_roles(recipe, recipe.report, f"{path}: report")
    return recipe


def stage_config(recipe: Recipe, stage: Stage, over: Mapping[str, Any] | None = None) -> Config:
    """The full configuration of one stage, with the start and the teachers that earlier stages' results leave it, and
    with the settings ``over`` its own.

    Before those have run it is that of a recipe whose warm-ups are all needed. A preflight stage has no objective of
    its own and a quantize stage no training, so their ``run.steps`` mean nothing.
    """
    ours: dict[str, Any] = {"run": {"dir": str(recipe.dir / stage.name)}}
    if stage.initial is not None:
        ours["model"] = {"initial": str(_weights(recipe, stage.initial))}
    if stage.teachers:
        ours["teachers"] = {
            name: {"checkpoint": str(_weights(recipe, name)), "domains": domains}
            for name, domains in stage.teachers.items()
        }
    common, settings = recipe.common, stage.settings
    if stage.type == "preflight":
        without = {name: tree for name, tree in common.items() if name not in ("objective", "source")}
        common = overlay(without, {"run": {"steps": 1}})
    elif stage.type == "quantize":
        kept = {name: tree for name, tree in common.items() if name in _MEASURED}
        supervised = {"source": {"type": "dataset"}, "objective": {"type": "cross_entropy"}}
        common = overlay({"batching": {"sequences_per_step": 1}}, overlay(kept, {"run": {"steps": 1}})) | supervised
        settings = {}
    tree = overlay(overlay(overlay(common, settings), over or {}), ours)
    if needed := in_need(recipe, stage):
        tree["teachers"] = {name: teacher for name, teacher in tree["teachers"].items() if name in needed}
    return build_config(tree, origin=f"stage {stage.name!r}")


def quantize_settings(stage: Stage) -> QuantizeSettings:
    """The settings of a quantize stage; raises :class:`ConfigurationError`."""
    try:
        made = QuantizeSettings.model_validate(stage.settings)
    except ValidationError as error:
        lines = [explain(e, f"stage {stage.name!r}", QuantizeSettings) for e in error.errors()]
        raise ConfigurationError("\n".join(lines)) from None
    recipes.load(made.recipe)
    return made


def in_need(recipe: Recipe, stage: Stage) -> list[str] | None:
    """The teachers a warm-up is for, by the decisions of its preflight; None for no warm-up, or before these.

    A preflight that did not meet all of the teachers was another one, which its own fingerprint will say.
    """
    found = None if stage.after is None else decisions(recipe, stage.after)
    names = teachers_of(recipe, stage)
    if found is None or not set(names) <= found.keys():
        return None
    return [name for name in names if found[name] == "warm_up"]


def teachers_of(recipe: Recipe, stage: Stage) -> list[str]:
    """Every teacher that is planned for a stage: other stages, then those that its settings name as checkpoints."""
    return list(dict.fromkeys([*stage.teachers, *_in_settings(recipe, stage)]))


def _in_settings(recipe: Recipe, stage: Stage) -> Mapping[str, Any]:
    """``teachers`` of a stage's settings as they are written; what is no mapping is left for :func:`build_config`."""
    if stage.type == "quantize":
        return {}
    found = overlay(recipe.common, stage.settings).get("teachers")
    return found if isinstance(found, Mapping) else {}


def _checkpoint(recipe: Recipe, stage: Stage, teacher: str) -> str | None:
    """Where the settings of ``stage`` say that ``teacher`` lies; None for a stage of the recipe."""
    entry = {} if teacher in stage.teachers else _in_settings(recipe, stage).get(teacher)
    return str(entry["checkpoint"]) if isinstance(entry, Mapping) and "checkpoint" in entry else None


def decisions(recipe: Recipe, preflight: str) -> Mapping[str, str] | None:
    """``go``, ``warm_up`` or ``refuse`` for each teacher of a preflight stage; None before it has run."""
    directory = recipe.dir / preflight
    return decide.decisions(directory) if (directory / PREFLIGHT).is_file() else None


def is_skipped(recipe: Recipe, name: str) -> bool:
    """Whether a stage was left out because no teacher needed it."""
    return (recipe.dir / name / SKIPPED).is_file()


def starts_from(recipe: Recipe, name: str) -> str:
    """The stage whose weights stand for those of ``name``: its own, or those a skipped one would have started from."""
    while is_skipped(recipe, name):
        initial = recipe.stage(name, f"{recipe.dir / name / SKIPPED}").initial
        assert initial is not None, "a stage with `after` starts from another"
        name = initial
    return name


def _without(recipe: Recipe, name: str) -> Recipe:
    """``recipe`` whose stage ``name`` is left out; roles that it had and that may be missing are."""
    gone = recipe.stage(name, "skip")
    stages = [
        s.model_copy(update={"initial": gone.initial}) if s.initial == name else s for s in recipe.stages if s != gone
    ]
    roles = recipe.report
    if roles is not None:
        changes: dict[str, Any] = {r: None for r, n in roles.model_dump().items() if n == name and r != "before"}
        left = [iteration for iteration in roles.iterations if iteration != name]
        roles = roles.model_copy(update=changes | {"iterations": left or roles.iterations})
    return recipe.model_copy(update={"stages": stages, "report": roles})


def _weights(recipe: Recipe, name: str) -> Path:
    return recipe.dir / starts_from(recipe, name) / "checkpoints"


def _check_order(recipe: Recipe, path: Path) -> None:
    seen: dict[str, Stage] = {}
    for stage in recipe.stages:
        needed = [*([stage.initial] if stage.initial else []), *stage.teachers]
        for name in [*needed, *([stage.after] if stage.after else [])]:
            if name not in seen:
                raise ConfigurationError(
                    f"{path}: stage {stage.name!r} needs {name!r}, which is no earlier stage; earlier: {sorted(seen)}"
                )
            if name in needed and seen[name].type != "train":
                raise ConfigurationError(
                    f"{path}: stage {stage.name!r} needs the weights of {name!r}, but a {seen[name].type} stage trains"
                    " none; name the stage that one started from"
                )
        if stage.name in seen:
            raise ConfigurationError(f"{path}: two stages are named {stage.name!r}; rename one")
        if stage.name in _OTHER_FOLDERS:
            raise ConfigurationError(f"{path}: stage {stage.name!r}: dir has another folder of that name; rename it")
        for teacher, entry in _in_settings(recipe, stage).items():
            if teacher in recipe.names and isinstance(entry, Mapping) and "checkpoint" in entry:
                raise ConfigurationError(
                    f"{path}: stage {stage.name!r}: settings.teachers.{teacher}.checkpoint = {entry['checkpoint']}, but"
                    f" {teacher!r} is a stage of this recipe; give the checkpoint another name, or take its stage out"
                )
        seen[stage.name] = stage


def _check_stage(recipe: Recipe, stage: Stage, where: str) -> None:
    """What a stage of its type needs and cannot have."""
    if stage.type != "train" and stage.initial is None:
        raise ConfigurationError(f"{where}: a {stage.type} stage works on another stage's weights; name it as initial")
    planned = teachers_of(recipe, stage)
    if stage.type == "preflight" and not planned:
        raise ConfigurationError(
            f"{where}: a preflight stage measures teachers; name at least one under teachers, or as a checkpoint under"
            " teachers in its settings"
        )
    if stage.type == "quantize":
        if stage.teachers:
            raise ConfigurationError(f"{where}: a quantize stage has no teachers; take {list(stage.teachers)} out")
        quantize_settings(stage)
    if stage.after is None:
        return
    if stage.type != "train" or stage.initial is None or not planned:
        raise ConfigurationError(
            f"{where}: after = {stage.after!r} makes it a warm-up, which trains, has an initial to fall back to and"
            " teachers; give it these, or take after out"
        )
    preflight = recipe.stage(stage.after, where)
    if preflight.type != "preflight" or preflight.initial != stage.initial:
        raise ConfigurationError(
            f"{where}: after = {stage.after!r} must be a preflight stage of the same student, initial ="
            f" {stage.initial!r}; it is a {preflight.type} stage with initial = {preflight.initial!r}"
        )
    measured = teachers_of(recipe, preflight)
    for name in planned:
        if name not in measured:
            raise ConfigurationError(f"{where}: {stage.after!r} decides nothing on the teacher {name!r}; add it there")
        ours, theirs = (_checkpoint(recipe, one, name) for one in (stage, preflight))
        if ours != theirs:
            raise ConfigurationError(
                f"{where}: its teacher {name!r} is {ours or 'a stage'}, and that of {stage.after!r}, which decides on"
                f" it, is {theirs or 'a stage'}; name one checkpoint in both"
            )


def _check_roles(recipe: Recipe, roles: Roles, where: str) -> None:
    """Every role names a stage of the right kind."""
    named = [(role, name) for role, name in roles.model_dump().items() if isinstance(name, str)]
    for role, name in [*named, *(("iterations", name) for name in roles.iterations)]:
        stage = recipe.stage(name, f"{where}.{role}")
        wanted = _ROLE_TYPES.get(role, "train")
        if stage.type != wanted:
            raise ConfigurationError(f"{where}.{role} = {name!r}: is a {stage.type} stage; name a {wanted} stage")
        if role == "iterations" and not teachers_of(recipe, stage):
            raise ConfigurationError(f"{where}.iterations: stage {name!r} has no teachers; name those that distil")
