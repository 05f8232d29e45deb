"""The configuration: every rule refuses what it should and says so, and defaults are what they claim to be."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import annotated_types
import pytest
from pydantic import BaseModel, ValidationError

from megatron_mopd.config import Config, ConfigurationError, Mopd, Section, build_config, load_config
from megatron_mopd.settings import merge, overlay, read_yaml

MINIMAL: dict[str, Any] = {
    "run": {"dir": "runs/x", "steps": 1},
    "teachers": {"math": {"checkpoint": "c", "domains": ["d"]}},
}
GYM = {"type": "reasoning_gym", "domain": "d", "family": "spell_backward", "size": 10}
DATASET = {"objective": {"type": "cross_entropy"}, "source": {"type": "dataset"}}


def _refusal(*overrides: str) -> str:
    with pytest.raises(ConfigurationError) as caught:
        build_config(merge(MINIMAL, overrides))
    return str(caught.value)


# ------------------------------------------------------------------ rules of single settings


def _sections(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [m for arg in get_args(annotation) for m in _sections(arg)]


def _all_sections() -> list[tuple[str, type[BaseModel]]]:
    """(prefix, section) of every section that is reached by names alone."""
    found: list[tuple[str, type[BaseModel]]] = [("", Config)]
    for name, field in Config.model_fields.items():
        for section in _sections(field.annotation):
            if section.__name__ in ("JsonlPrompts", "ReasoningGymPrompts", "CrossEntropy"):
                continue
            found.append((f"{name}.math." if name == "teachers" else f"{name}.", section))
    return found


def _outside(constraint: Any) -> Any:
    """A value just outside of a pydantic constraint, or None for one that has no outside of its own."""
    match constraint:
        case annotated_types.Gt(gt=bound):
            return bound
        case annotated_types.Ge(ge=bound):
            return bound - 1
        case annotated_types.Lt(lt=bound):
            return bound
        case annotated_types.Le(le=bound):
            return bound + 1
        case annotated_types.MinLen():
            return "[]"
    return None


def _rules() -> list[tuple[str, Any, str]]:
    """(setting, refused value, override that makes its section the one in place) for every bound and every closed list
    of values in the configuration."""
    rules: list[tuple[str, Any, str]] = []
    for prefix, section in _all_sections():
        for name, field in section.model_fields.items():
            refused = [bad for c in field.metadata if (bad := _outside(c)) is not None]
            if Literal in map(get_origin, (field.annotation, *get_args(field.annotation))):
                refused.append("nonsense")
            tag = "" if name == "type" or "type" not in section.model_fields else section.model_fields["type"].default
            rules += [(prefix + name, bad, f"{prefix}type={tag}" if tag else "") for bad in refused]
    return rules


RULES = _rules()


def test_the_list_of_rules_is_not_empty() -> None:
    names = {name for name, _, _ in RULES}
    assert len(RULES) > 40
    assert {"run.steps", "objective.clip_low", "parallel.tensor", "model.preset", "source.per_domain"} <= names


@pytest.mark.parametrize(("setting", "bad", "place"), RULES, ids=[f"{name}={bad}" for name, bad, _ in RULES])
def test_every_bound_refuses_and_names_setting_and_value(setting: str, bad: Any, place: str) -> None:
    said = _refusal(*([place] if place else []), f"{setting}={bad}")
    assert f"{setting}: " in said
    assert str(bad) in said


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("run.steps=1.5", "run.steps: 1.5"),
        ("run.steps=many", "run.steps: 'many'"),
        ("run.steps=true", "run: steps = true: a number is needed"),
        ("mtp.weight=yes", "mtp: weight = true: a number is needed"),
        ("model.vocab_size=on", "model: vocab_size = true: a number is needed"),
        ("optimizer.lr=.nan", "optimizer.lr: nan"),
        ("optimizer.lr=.inf", "optimizer.lr: inf"),
        ("optimizer.betas=[0.9]", "optimizer.betas.1: missing"),
        ("objective.type=mopdd", "objective.type: 'mopdd': unknown; did you mean 'mopd'?"),
        ("objective.clip_low=0.1", "objective.type: missing; one of cross_entropy, mopd"),
        ("data.train=[{type: json, path: x}]", "data.train.0.type: 'json': unknown; did you mean 'jsonl'?"),
        ("data.weights={d: -1}", "data.weights.d: -1"),
        ("data.train=[{type: reasoning_gym, domain: d, family: f, size: 0}]", "data.train.0.size: 0"),
        ("run={steps: 1}", "run.dir: missing; it has no default"),
        ("teachers.math={domains: [d]}", "teachers.math.checkpoint: missing"),
        ("model=", "model: None"),
    ],
)
def test_wrong_values_are_explained(override: str, said: str) -> None:
    assert said in _refusal(override)


def test_all_errors_are_told_at_once() -> None:
    said = _refusal("run.steps=0", "optimizer.lr=-1", "models.preset=tiny").splitlines()
    assert len(said) == 3


# ------------------------------------------------------------------ rules across settings


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["tokenizer.type=huggingface"], "tokenizer: path is needed with type huggingface"),
        (["tokenizer.path=somewhere"], "tokenizer: path is needed with type huggingface and only there"),
        (["rollout.top_p=0.9"], "rollout: top_p = 0.9: training rollouts must be drawn from the whole distribution"),
        (
            ["objective.type=mopd", "objective.importance_low=5.0"],
            "importance_low = 5.0 must be below importance_high = 5.0",
        ),
        (["source.type=dataset"], "objective.type mopd scores the student's own rollouts; set source.type to rollout"),
        (["teachers={}"], "objective.type mopd needs teachers"),
        (["objective.type=cross_entropy"], "cross_entropy trains on a dataset's completions"),
        (
            ["objective.type=cross_entropy", "source.type=dataset"],
            "batching.sequences_per_step is needed by a dataset stage",
        ),
        (
            ["objective.type=mopd", "objective.outcome_weight=0.5"],
            "objective.outcome_weight = 0.5 compares rollouts of one prompt; rollout.samples_per_prompt = 1",
        ),
        (
            ["teachers.code.checkpoint=e", "teachers.code.domains=[x, d]"],
            "teachers.code.domains: 'd' is already served by teachers.math; each domain needs exactly one teacher",
        ),
        (["teachers.math.domains=[d, d]"], "teachers.math.domains: 'd' is already served by teachers.math"),
        (
            ["data.train=[{type: reasoning_gym, domain: e, family: f, size: 1}]"],
            "data.train: domain 'e' has no teacher; add it to the domains of one of ['math']",
        ),
        (
            ["objective.type=mopd", "objective.domain_weights={dd: 1}"],
            "objective.domain_weights: no teacher serves domain 'dd'; did you mean 'd'?",
        ),
        (["data.weights={other: 1}"], "data.weights: no teacher serves domain 'other'; known here: d"),
    ],
)
def test_settings_that_cannot_stand_together_are_explained(overrides: list[str], said: str) -> None:
    assert said in _refusal(*overrides)


def test_a_dataset_stage_needs_no_teacher_and_may_weigh_its_own_domains() -> None:
    tree = {"run": MINIMAL["run"], "batching": {"sequences_per_step": 8}, "data": {"weights": {"x": 2.0}}, **DATASET}
    assert build_config(tree).teachers == {}


def test_every_cross_field_rule_has_an_accepting_side() -> None:
    tree = overlay(
        MINIMAL,
        {
            "data": {"train": [GYM], "weights": {"d": 1}},
            "objective": {"type": "mopd", "outcome_weight": 0.5, "domain_weights": {"d": 2}},
            "rollout": {"samples_per_prompt": 2},
            "tokenizer": {"type": "huggingface", "path": "t"},
        },
    )
    config = build_config(tree)
    assert isinstance(config.objective, Mopd) and config.objective.outcome_weight == 0.5


# ------------------------------------------------------------------ unknown keys


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("models={}", "models: unknown key; did you mean 'model'?"),
        ("optimizer.learning_rate=1", "optimizer.learning_rate: unknown key; known here: "),
        ("rollout.temperatures=1", "rollout.temperatures: unknown key; did you mean 'temperature'?"),
        ("objective={type: mopd, clip_lo: 0.1}", "objective.clip_lo: unknown key; did you mean 'clip_low'?"),
        ("teachers.math.checkpoints=x", "teachers.math.checkpoints: unknown key; did you mean 'checkpoint'?"),
        ("teachers.mopd={checkpoint: x, domains: [y], domain: z}", "teachers.mopd.domain: unknown key"),
        ("data.train=[{type: jsonl, path: x, paths: y}]", "data.train.0.paths: unknown key; did you mean 'path'?"),
        ("parallel.tensor_size=2", "parallel.tensor_size: unknown key; did you mean 'tensor'?"),
    ],
)
def test_unknown_keys_name_the_nearest_known_one(override: str, said: str) -> None:
    assert said in _refusal(override)


def test_a_key_of_another_objective_is_unknown() -> None:
    assert "objective.clip_low: unknown key" in _refusal("objective={type: cross_entropy, clip_low: 0.1}")


# ------------------------------------------------------------------ reading


def test_load_applies_overrides_and_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("run: {dir: r, steps: 3}\nteachers: {a: {checkpoint: c, domains: [d]}}\n")
    config = load_config(path, ["optimizer.lr=1e-4", "run.steps=5", "model.pattern=M*/*E", "parallel.tensor=2"])
    assert (config.optimizer.lr, config.run.steps, config.model.pattern) == (1e-4, 5, "M*/*E")
    assert config.parallel.tensor == 2 and config.run_id == "r"
    with pytest.raises(ConfigurationError, match=r"c\.yaml: run\.step: unknown key"):
        load_config(path, ["run.step=5"])


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "1.0e-4", "+1e-4", ".1e-3", "0.0001"])
def test_numbers_with_an_exponent_are_numbers_everywhere(tmp_path: Path, text: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(f"model: {{override: {{layernorm_epsilon: {text}}}}}\n")
    assert read_yaml(path) == {"model": {"override": {"layernorm_epsilon": 1e-4}}}
    assert merge({}, [f"a.b={text}"]) == {"a": {"b": 1e-4}}


@pytest.mark.parametrize("text", ["e4", "1e", "12e-", "a1e4", "1e4b"])
def test_words_with_an_e_stay_words(text: str) -> None:
    assert merge({}, [f"a={text}"]) == {"a": text}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"[1, 2]", "a configuration is a mapping of sections, got list"),
        (b"", "a configuration is a mapping of sections, got NoneType"),
        (b"a: [", "not valid YAML"),
        (b"\xff\xfe\x00", "cannot be read"),
        (b"run: {dir: r}\nrun: {steps: 3}\n", "key 'run' is given twice"),
        (b"run: {dir: r, steps: 3, steps: 4}\n", "key 'steps' is given twice"),
        (b"run: !!python/object/apply:os.getcwd []\n", "not valid YAML"),
    ],
)
def test_unreadable_files_are_explained(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigurationError) as caught:
        load_config(path)
    assert said in str(caught.value) and str(path) in str(caught.value)


def test_a_missing_file_is_explained(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="No such file"):
        load_config(tmp_path / "none.yaml")


@pytest.mark.parametrize("override", ["steps", "=3", "run.dir.x=1", "run.steps.x=1", "a=["])
def test_overrides_that_cannot_be_applied_are_explained(override: str) -> None:
    with pytest.raises(ConfigurationError, match="override"):
        merge(MINIMAL, [override])


def test_merge_and_overlay_leave_their_inputs_alone() -> None:
    before = copy.deepcopy(MINIMAL)
    assert merge(MINIMAL, ["run.steps=2", "teachers.math.domains=[x]"]) != before
    assert overlay(MINIMAL, {"run": {"steps": 7}}) == merge(MINIMAL, ["run.steps=7"])
    assert overlay({"a": [1]}, {"a": [2]}) == {"a": [2]}
    assert before == MINIMAL


# ------------------------------------------------------------------ defaults


def test_defaults_that_claim_to_be_the_released_ones_are() -> None:
    """Released configuration: NeMo-RL's examples/nemo_gym/nemotron-3-ultra/mopd.yaml."""
    config = build_config(MINIMAL)
    optimizer, rollout, objective = config.optimizer, config.rollout, config.objective
    assert (optimizer.lr, optimizer.warmup_steps, optimizer.decay) == (2e-6, 10, "constant")
    assert optimizer.lr * optimizer.warmup_from == pytest.approx(3e-7)
    assert (optimizer.betas, optimizer.eps, optimizer.weight_decay) == ((0.9, 0.999), 1e-8, 0.0)
    assert optimizer.clip_grad == 1.0
    assert (rollout.prompts_per_step, rollout.samples_per_prompt) == (1024, 1)
    assert (rollout.temperature, rollout.top_p) == (1.0, 1.0)
    assert (config.run.seed, config.batching.micro_batch_size, config.mtp.weight) == (42, 1, 0.3)
    assert config.model.train_router is False
    assert isinstance(objective, Mopd)
    assert (objective.importance_low, objective.importance_high, objective.minibatches) == (0.2, 5.0, 1)


def test_the_default_objective_is_the_papers_not_the_released_variant() -> None:
    objective = Mopd()
    assert (objective.importance, objective.force_on_policy_ratio) == ("icepop", False)
    assert (objective.advantage_clip, objective.sequence_error_threshold) == (None, None)
    assert (objective.clip_low, objective.clip_high, objective.normalization) == (0.2, 0.2, "token")
    assert objective.outcome_weight == 0.0


def test_a_configuration_cannot_be_changed() -> None:
    config = build_config(MINIMAL)
    with pytest.raises(ValidationError, match="frozen"):
        config.run.steps = 2
    for _, section in _all_sections():
        assert issubclass(section, Section)
        assert section.model_config.get("frozen") and section.model_config.get("extra") == "forbid"


def test_defaults_are_not_shared_between_configurations() -> None:
    first, second = build_config(MINIMAL), build_config(MINIMAL)
    first.model.override["hidden_size"] = 1
    assert second.model.override == {} and Config.model_fields["model"].default.override == {}


def test_the_configuration_reads_back_from_its_own_dump() -> None:
    config = build_config(overlay(MINIMAL, {"data": {"train": [GYM]}}))
    assert build_config(config.model_dump(mode="json")) == config


def test_importing_the_configuration_imports_neither_torch_nor_megatron() -> None:
    code = "import sys, megatron_mopd.config, megatron_mopd.presets; print({'torch', 'megatron'} & sys.modules.keys())"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"
