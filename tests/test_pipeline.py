"""Pipeline stages: where they begin, and that scoring, training, sampling and checkpoints do not notice them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_batches import SEQUENCES, VOCAB, learner_of, micro_batches
from small_stages import task

from megatron_mopd import checkpoint, parallel, student, torch_dist
from megatron_mopd.config import Config, ConfigurationError, Mopd, build_config
from megatron_mopd.metrics import read, untimed
from megatron_mopd.names import PREFIXES
from megatron_mopd.objectives.mopd import mopd_objective
from megatron_mopd.predictions import Predictions
from megatron_mopd.records import Counts, MicroBatch, ObjectiveOutput
from megatron_mopd.scoring import Scorer
from megatron_mopd.settings import overlay
from megatron_mopd.teachers import TeacherPool
from megatron_mopd.tokenizer import build_tokenizer
from megatron_mopd.train import run_stage
from megatron_mopd.trainer import Trainer

PATTERN = "ME*E/*E/*E"


def configuration(**changes: Any) -> Config:
    """One Adam step whose result is proportional to the gradient, by an eps beside which the gradient vanishes."""
    common = {
        "run": {"dir": "unused", "steps": 2},
        "model": {"pattern": PATTERN, "max_sequence_length": 32},
        "teachers": {"t": {"checkpoint": "unused", "domains": ["d"]}},
        "optimizer": {"lr": 1e4, "eps": 1e6, "warmup_steps": 0, "clip_grad": 1e9},
        "objective": {"type": "mopd", "importance_low": 0.05, "importance_high": 20.0},
    }
    return build_config(overlay(common, changes))


def one_step(changes: dict[str, Any], size: int, target: Path) -> dict[str, Any]:
    """One optimizer step over the global batch, a checkpoint of what it left, and log-probabilities on either side."""
    config = configuration(**changes)
    learner = learner_of(config)
    groups, settings = learner.groups, config.objective
    assert isinstance(settings, Mopd)
    packed = learner.with_prox(micro_batches(groups, size))

    def objective(predictions: Predictions, micro_batch: MicroBatch, counts: Counts) -> ObjectiveOutput:
        output = mopd_objective(predictions, micro_batch, settings, counts)
        return dataclasses.replace(output, loss=output.loss.view(()))  # as one's own objective may: mcore frees no view

    out = learner.step(packed, objective)
    assert learner.module.decoder.input_tensor is None  # nothing of the last micro-batch is held, nor met by another
    checkpoint.save(target, 1, learner.model, learner.optimizer, groups, state={}, manifest={"vocab_size": VOCAB})
    values = {name: torch.cat([v[name] for _, v in out.per_token]) for name in out.per_token[0][1]}
    values["prox"] = torch.cat([mb.prox_logprobs for mb in packed if mb.prox_logprobs is not None])
    values["after"] = torch.cat(learner.logprobs(packed))
    lengths = [n for mb in packed for n in mb.cu_seqlens.diff().tolist() if n]
    numbers = range(groups.dp_rank, SEQUENCES, groups.dp_size)
    return {
        "scalars": (out.loss, out.mtp_loss, out.grad_norm, out.mtp_grad_norm),
        "values": {n: dict(zip(numbers, v.split(lengths), strict=True)) for n, v in values.items()},
    }


def stored(target: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, whole; padding rows of the vocabulary cut off."""
    (path,) = target.glob("iter_*")
    index = torch_dist.open_index(path)
    tensors = {n: torch_dist.read(index, n) for n in index.tensors if n.startswith((*PREFIXES, "optimizer."))}
    vocabulary = ("word_embeddings.weight", "output_layer.weight")
    return {n: t[:VOCAB] if n.endswith(vocabulary) else t for n, t in tensors.items()}


@pytest.fixture(scope="module")
def one_stage(ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """The step of a single rank with the whole batch as one micro-batch; made once for each configuration."""
    made: dict[str, Any] = {}

    def of(changes: dict[str, Any]) -> Any:
        if (key := str(changes)) not in made:
            target = tmp_path_factory.mktemp("one_stage")
            made[key] = ranks(1, one_step, changes, SEQUENCES, target)[0], stored(target)
        return made[key]

    return of


LAYOUTS: dict[str, tuple[int, dict[str, int], int]] = {
    "pp2": (2, {"pipeline": 2}, 4),
    "pp2_one_micro_batch": (2, {"pipeline": 2}, SEQUENCES),
    "pp4": (4, {"pipeline": 4}, 3),
    "pp2_tp2": (4, {"pipeline": 2, "tensor": 2}, 5),
    "pp2_ep2": (4, {"pipeline": 2, "expert": 2}, 2),
    "pp2_dp2": (4, {"pipeline": 2}, 3),
}
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True, "bucket_size": 5000}
RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
VARIANTS: dict[str, tuple[str, dict[str, Any], bool]] = {  # layout, settings, whether they change the step itself
    "no_mtp": ("pp2", {"model": {"pattern": "ME*E"}}, True),
    "mtp_frozen": ("pp2", {"mtp": {"train": False}}, True),
    "whole_optimizer": ("pp2", {"optimizer": {"distributed": False}}, True),
    "bf16": ("pp2_one_micro_batch", {"run": {"precision": "bf16"}}, True),
    "borders": ("pp2", {"model": {"pattern": "M|E*E/*E/*E"}}, False),
    "recompute": ("pp2", {"model": {"override": RECOMPUTE}}, False),
    "loss_scale": ("pp2", {"optimizer": {"options": {"loss_scale": 8.0}}}, False),
    "overlap": ("pp2_dp2", {"optimizer": {"ddp": OVERLAP}}, False),
}


def check_step(
    ranks: Any, target: Path, name: str, changes: dict[str, Any], truth: tuple[Any, dict[str, torch.Tensor]]
) -> None:
    world, layout, size = LAYOUTS[name]
    expected, tensors = truth
    for result in ranks(world, one_step, overlay(changes, {"parallel": layout}), size, target):
        assert result["scalars"] == pytest.approx(expected["scalars"], rel=1e-5)
        assert result["values"].keys() == expected["values"].keys() >= {"advantage", "prox", "after"}
        for what, by_sequence in result["values"].items():
            for number, value in by_sequence.items():
                torch.testing.assert_close(value, expected["values"][what][number], rtol=1e-4, atol=2e-5, msg=what)
    found = stored(target)
    assert found.keys() == tensors.keys()
    for key, tensor in tensors.items():  # exp_avg is a tenth of the gradient
        frozen = "router" in key or (key.startswith("optimizer.state.exp_avg.mtp.") and "mtp" in changes)
        assert tensor.any() or frozen or "exp_avg_sq" in key, key
        error = (found[key] - tensor).float().norm() / tensor.float().norm().clamp(min=1e-12)
        assert error < 1e-4 or (found[key] - tensor).abs().max() < 1e-6, f"{key}: {error:.1e}"


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_step_is_that_of_one_stage(ranks: Any, one_stage: Any, tmp_path: Path, name: str) -> None:
    """Loss, values per token on all stages, gradients, the weights after them and what the optimizer keeps."""
    check_step(ranks, tmp_path, name, {}, one_stage({}))


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in ("recompute", "loss_scale") else n for n in VARIANTS]
)
def test_a_step_is_that_of_one_stage_under_other_settings(
    ranks: Any, one_stage: Any, tmp_path: Path, name: str
) -> None:
    layout, changes, another = VARIANTS[name]
    check_step(ranks, tmp_path, layout, changes, one_stage(changes if another else {}))


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("variant", ["no_mtp", "mtp_frozen"])
def test_a_step_without_heads_is_that_of_one_stage(
    ranks: Any, one_stage: Any, tmp_path: Path, variant: str, name: str
) -> None:
    changes = VARIANTS[variant][1]
    check_step(ranks, tmp_path, name, changes, one_stage(changes))


# ------------------------------------------------------------------ checkpoints

SPLITTABLE = {"pattern": "ME*E", "override": {"num_query_groups": 4, "mamba_num_groups": 4}}  # four ways by tensor


def save_model(layout: dict[str, int], target: Path) -> None:
    config = configuration(model=SPLITTABLE, parallel=layout)
    groups = parallel.initialize(config.parallel, 5)
    model = student.build_model(config.model, config.parallel, groups, VOCAB, mtp=False)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith("expert_bias"):
                buffer.copy_(torch.linspace(-0.1, 0.1, len(buffer)))
    checkpoint.save(target, 1, model, None, groups, state={}, manifest={"vocab_size": VOCAB})


def load_and_score(layout: dict[str, int], source: Path) -> tuple[str, torch.Tensor]:
    config = configuration(model=SPLITTABLE, parallel=layout)
    groups = parallel.initialize(config.parallel, 11)  # weights of another seed, all to be replaced
    scorer = Scorer(groups=groups, parallel=config.parallel, vocab_size=VOCAB, pad_token=0, micro_batch_size=3)
    model = scorer.build(config.model, "fp32", "the student")
    manifest = checkpoint.load_weights(source, model, groups)
    whole = dataclasses.replace(groups, dp_rank=0, dp_size=1)
    return manifest["checkpoint_id"], scorer.logprobs(model, scorer.even(micro_batches(whole, 3)))


SAVED = {"tp2_ep2": (4, {"tensor": 2, "expert": 2}), "pp2_tp2": (4, {"pipeline": 2, "tensor": 2})}
LOADED = {
    "tp1": (1, {}),
    "tp4": (4, {"tensor": 4}),
    "ep4": (4, {"expert": 4}),
    "pp2": (2, {"pipeline": 2}),
    "pp4": (4, {"pipeline": 4}),
    "pp2_tp2": (4, {"pipeline": 2, "tensor": 2}),
    "pp2_ep2": (4, {"pipeline": 2, "expert": 2}),
}


@pytest.mark.parametrize("written", ["tp2_ep2", pytest.param("pp2_tp2", marks=pytest.mark.slow)])
def test_a_checkpoint_scores_alike_on_any_layout(ranks: Any, tmp_path: Path, written: str) -> None:
    world, layout = SAVED[written]
    ranks(world, save_model, layout, tmp_path)
    results = {name: ranks(world, load_and_score, layout, tmp_path) for name, (world, layout) in LOADED.items()}
    ((identity, expected),) = results.pop("tp1")
    assert expected.std() > 0.1
    for name, per_rank in results.items():
        for found, logprobs in per_rank:
            assert found == identity
            torch.testing.assert_close(logprobs, expected, rtol=0, atol=1e-5, msg=name)


def another_model(layout: dict[str, int], source: Path, model: dict[str, Any]) -> str:
    config = configuration(model=model, parallel=layout)
    groups = parallel.initialize(config.parallel, 5)
    built = student.build_model(config.model, config.parallel, groups, VOCAB, mtp=False)
    with pytest.raises(ConfigurationError) as caught:
        checkpoint.load_weights(source, built, groups)
    return str(caught.value)


def test_what_a_checkpoint_lacks_is_found_over_all_stages(ranks: Any, tmp_path: Path) -> None:
    """All stages say the same, and a stage's tensors are not unknown because another stage has them."""
    ranks(1, save_model, {}, tmp_path)
    said = ranks(2, another_model, {"pipeline": 2}, tmp_path, SPLITTABLE | {"pattern": "ME*EM"})
    assert said[0] == said[1] and "missing from the file: decoder.layers.4." in said[0] and "unknown" not in said[0]
    narrower = overlay(SPLITTABLE, {"override": {"moe_shared_expert_intermediate_size": 64}})
    said = ranks(2, another_model, {"pipeline": 2}, tmp_path, narrower)
    assert said[0] == said[1] and "of another shape: decoder.layers.1.mlp.shared_experts" in said[0]
    assert "decoder.layers.3.mlp.shared_experts" in said[0] and "missing" not in said[0]


# ------------------------------------------------------------------ a whole stage


ANOTHER = {"pattern": "MEM*EEM", "override": {"hidden_size": 96}, "max_sequence_length": 32}


def stage(directory: Path, teachers: Path, layout: dict[str, int], steps: int = 3) -> Config:
    """A student and two teachers, one of another architecture; old rollouts and two optimizer steps a batch, so prox
    runs too."""
    tree = {
        "run": {"dir": str(directory), "steps": steps, "seed": 7, "id": "same"},
        "model": {"pattern": PATTERN, "max_sequence_length": 32},
        "parallel": layout,
        "data": {
            "train": [task("plain"), task("loud")],
            "held_out": [task("plain", "held_out", 4), task("loud", "held_out", 4)],
        },
        "rollout": {"prompts_per_step": 8, "max_new_tokens": 6, "batch_size": 8, "lag": 1},
        "objective": {"type": "mopd", "minibatches": 2},
        "batching": {"micro_batch_size": 2},
        "optimizer": {"lr": 1e-3, "warmup_steps": 0},
        "evaluation": {"final_samples": 4},
        "checkpoint": {"every": 2},
        "teachers": {
            "first": {"checkpoint": str(teachers / "first"), "domains": ["plain"]},
            "second": {"checkpoint": str(teachers / "second"), "domains": ["loud"], "model": ANOTHER},
        },
    }
    return build_config(tree)


def write_teachers(root: Path) -> None:
    for seed, name in enumerate(("first", "second")):
        config = stage(root, root, {})
        tokenizer = build_tokenizer(config.tokenizer)
        groups = parallel.initialize(config.parallel, seed)
        architecture = config.teachers[name].model or config.model
        model = student.build_model(architecture, config.parallel, groups, tokenizer.vocab_size, mtp=False)
        with torch.no_grad():
            model.output_layer.weight.mul_(3)  # teachers that differ from the student and from each other
        manifest = {
            "tokenizer_sha": tokenizer.tokenizer_sha,
            "template_sha": tokenizer.template_sha,
            "vocab_size": tokenizer.vocab_size,
        }
        checkpoint.save(root / name, 1, model, None, groups, state={}, manifest=manifest)


@pytest.fixture(scope="module")
def teachers(ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("teachers")
    ranks(1, write_teachers, root)
    return root


def _numbers(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in untimed(row).items() if name != "step"}


class Killed(Exception):
    """Stands for a process that is stopped at any moment."""


def run_and_resume(root: Path, teachers: Path, layout: dict[str, int]) -> tuple[list[Any], bool, bool]:
    """An uninterrupted stage beside one that dies in step 3 and goes on from the checkpoint of step 2."""
    config = stage(root / "whole", teachers, layout)
    run_stage(config, parallel.initialize(config.parallel, 7))
    whole = Trainer(config, parallel.initialize(config.parallel, 7))
    assert whole.resume() and whole.step_index == 3
    other = stage(root / "killed", teachers, layout)
    first = Trainer(other, parallel.initialize(other.parallel, 7))
    rows: list[Any] = []

    def die(step: int, row: Any) -> None:
        if step == 3:
            raise Killed
        rows.append(untimed(row))

    with pytest.raises(Killed):
        first.run(die)
    again = Trainer(other, parallel.initialize(other.parallel, 7))
    assert again.resume() and again.step_index == 2 and len(again.feed.in_flight) == 1
    again.run(lambda step, row: rows.append(untimed(row)))
    a, b = (dict(t.learner.module.named_parameters()) for t in (whole, again))
    masters = [[p for o in t.learner.optimizer.chained_optimizers for p in o.get_parameters()] for t in (whole, again)]
    same = all(torch.equal(a[n], b[n]) for n in a) and all(map(torch.equal, *masters))
    return rows, same, a.keys() == b.keys()


def held_of_a_teacher(teachers: Path, layout: dict[str, int]) -> dict[str, int]:
    config = stage(teachers, teachers, layout)
    pool = TeacherPool(config, parallel.initialize(config.parallel, 7), build_tokenizer(config.tokenizer))
    (weights,) = [w for key, w in pool._weights.items() if key == pool.ids["first"]]
    return {name: kept.numel() for name, kept in weights.items() if isinstance(kept, torch.Tensor)}


def test_a_stage_holds_its_own_part_of_a_teacher(ranks: Any, teachers: Path) -> None:
    (whole,) = ranks(1, held_of_a_teacher, teachers, {})
    first, last = ranks(2, held_of_a_teacher, teachers, {"pipeline": 2})
    assert sum(first.values()) + sum(last.values()) == sum(whole.values())
    assert {n for n in whole if n not in first} >= {"output_layer.weight", "decoder.final_norm.weight"}
    assert "embedding.word_embeddings.weight" in first and "embedding.word_embeddings.weight" not in last


def run_on_one_rank(root: Path, teachers: Path) -> None:
    config = stage(root, teachers, {})
    run_stage(config, parallel.initialize(config.parallel, 7))


@pytest.fixture(scope="module")
def on_one_rank(ranks: Any, teachers: Path) -> Path:
    root = teachers / "student"
    ranks(1, run_on_one_rank, root, teachers)
    return root


@pytest.mark.parametrize(
    ("world", "layout"),
    [
        pytest.param(2, {"pipeline": 2}, id="pp2"),
        pytest.param(4, {"pipeline": 2, "tensor": 2}, id="pp2_tp2", marks=pytest.mark.slow),
        pytest.param(4, {"pipeline": 2, "expert": 2}, id="pp2_ep2", marks=pytest.mark.slow),
        pytest.param(4, {"pipeline": 2}, id="pp2_dp2", marks=pytest.mark.slow),
        pytest.param(4, {"pipeline": 4}, id="pp4", marks=pytest.mark.slow),
    ],
)
def test_a_stage_trains_as_on_one_rank_and_resumes_bit_for_bit(
    ranks: Any, teachers: Path, on_one_rank: Path, tmp_path: Path, world: int, layout: dict[str, int]
) -> None:
    results = ranks(world, run_and_resume, tmp_path, teachers, layout)
    written, expected = ([_numbers(row) for row in read(root)] for root in (tmp_path / "whole", on_one_rank))
    for rows, same, named_alike in results:
        assert same and named_alike
        assert rows == written
    for row, truth in zip(written, expected, strict=True):
        assert row == pytest.approx(truth, rel=2e-3, abs=1e-4)
    result, truth = (json.loads((root / "result.json").read_text()) for root in (tmp_path / "whole", on_one_rank))
    assert result["accuracy"] == truth["accuracy"]
    for name, by_domain in truth["reverse_kl"].items():
        assert result["reverse_kl"][name] == pytest.approx(by_domain, rel=1e-3)
