"""The loop as a whole: sampling, scoring, updating, stopping and resuming, on one rank and on several."""

from __future__ import annotations

import json
import multiprocessing
import signal
import time
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from small_stages import SFT, stage, task, taught, teach

from megatron_mopd import batch, checkpoint, parallel, student
from megatron_mopd.config import Config, ConfigurationError, Parallel, build_config
from megatron_mopd.metrics import read, untimed
from megatron_mopd.objectives import mopd as objectives_mopd
from megatron_mopd.objectives.mopd import mopd_loss, mopd_objective
from megatron_mopd.predictions import Predictions
from megatron_mopd.provenance import ProvenanceError
from megatron_mopd.records import Counts, MicroBatch, Policy, Prompt, Provenance, Rollout, Sampling, ScoredRollout
from megatron_mopd.settings import overlay
from megatron_mopd.train import run_stage
from megatron_mopd.trainer import Trainer
from megatron_mopd.update import Learner, of_logprobs

VOCAB = 101


def tree(directory: Path, **changes: Any) -> dict[str, Any]:
    """A stage with held-out prompts, of a student of two layers and one MTP depth."""
    own = {
        "model": {"pattern": "M*E/*E", "max_sequence_length": 32},
        "data": {"held_out": [task("plain", "held_out", 6), task("loud", "held_out", 6)]},
        "rollout": {"prompts_per_step": 8, "max_new_tokens": 6},
        "evaluation": {"final_samples": 6},
    }
    return stage(directory, own, changes)


@pytest.fixture(scope="module")
def school(ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    root = tmp_path_factory.mktemp("school")
    return root, ranks(1, teach_on_a_rank, root)[0]


def teach_on_a_rank(root: Path) -> dict[str, Any]:
    """A student's start and two teachers; what a stage of MOPD on them adds to :func:`tree`."""
    teach(root, tree, base=1, first=3, second=5)
    return taught(root, "base", first=["plain"], second=["loud"])


class Killed(Exception):
    """Stands for a process that is stopped at any moment."""


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in trainer.learner.module.named_parameters()}


def run_and_resume(root: Path, mopd: dict[str, Any], name: str, layout: dict[str, Any]) -> tuple[bool, bool, list[Any]]:
    """An uninterrupted run of 4 steps beside one that dies in step 4 and starts again from the checkpoint of step 2."""
    settings = {
        "checkpoint": {"every": 2},
        "parallel": layout,
        "rollout": {"lag": 1},
        "objective": {"type": "mopd", "minibatches": 2},
    }
    configs = [
        build_config(
            tree(
                root / f"{name}{i}",
                **overlay(mopd, settings),
                run={"dir": str(root / f"{name}{i}"), "steps": 4, "id": name},
            )
        )
        for i in range(2)
    ]
    whole = Trainer(configs[0], parallel.initialize(configs[0].parallel, 7))
    rows: list[list[Any]] = [[], []]
    whole.run(lambda step, row: rows[0].append(untimed(row)))

    first = Trainer(configs[1], parallel.initialize(configs[1].parallel, 7))

    def die(step: int, row: Any) -> None:
        if step == 4:
            raise Killed
        if step <= 2:
            rows[1].append(untimed(row))

    with pytest.raises(Killed):
        first.run(die)
    again = Trainer(configs[1], parallel.initialize(configs[1].parallel, 7))
    assert again.resume() and again.step_index == 2 and len(again.feed.in_flight) == 1
    again.run(lambda step, row: rows[1].append(untimed(row)))
    a, b = weights(whole), weights(again)
    return all(torch.equal(a[n], b[n]) for n in a), rows[0] == rows[1], rows[0]


@pytest.mark.parametrize(
    ("world", "layout"), [(1, {}), (2, {}), (2, {"tensor": 2}), (2, {"expert": 2})], ids=["one", "dp2", "tp2", "ep2"]
)
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(
    ranks: Any, school: Any, world: int, layout: dict[str, Any]
) -> None:
    root, mopd = school
    name = f"resume{world}{''.join(layout)}"
    for same_weights, same_rows, rows in ranks(world, run_and_resume, root, mopd, name, layout):
        assert same_weights and same_rows
        assert len(rows) == 4 and any(row["grad_norm"] > 0 for row in rows)


def test_a_quantized_run_resumes_bit_for_bit(ranks: Any, school: Any) -> None:
    """Teachers in NVFP4, whose hidden states wait in the checkpoint, and a student that is trained towards it."""
    root, mopd = school
    quantized = {
        "teachers": {"first": {"nvfp4": ["output_weight", "experts", "hidden"]}, "second": {"nvfp4": ["hidden"]}},
        "quantization": {"train": "ultra-ptq", "activations": True},
    }
    for same_weights, same_rows, rows in ranks(2, run_and_resume, root, overlay(mopd, quantized), "quantized", {}):
        assert same_weights and same_rows and all(row["grad_norm"] > 0 for row in rows)


def go_on_elsewhere(root: Path, mopd: dict[str, Any], layout: dict[str, Any], steps: int) -> tuple[int, float, str]:
    config = build_config(
        tree(
            root,
            **overlay(mopd, {"parallel": layout, "rollout": {"lag": 1}}),
            run={"dir": str(root / "moving"), "steps": steps},
        )
    )
    trainer = Trainer(config, parallel.initialize(config.parallel, 7))
    trainer.resume()
    start = trainer.step_index
    last: list[Any] = []
    trainer.run(lambda step, row: last.append(row))
    return start, last[-1]["loss"], checkpoint.read_manifest(root / "moving" / "checkpoints")["checkpoint_id"]


def test_a_run_moves_to_another_layout_and_back(ranks: Any, school: Any) -> None:
    root, mopd = school
    steps = [(1, {}), (2, {"tensor": 2}), (2, {"pipeline": 2}), (2, {"expert": 2}), (1, {})]
    for index, (world, layout) in enumerate(steps):
        borders = {"model": {"pattern": "M|*E/*E"}} if "pipeline" in layout else {}
        results = ranks(world, go_on_elsewhere, root, overlay(mopd, borders), layout, index + 1)
        assert {start for start, _, _ in results} == {index}  # each went on where the last stopped
        assert len({result[1:] for result in results}) == 1  # and all ranks agree on loss and weights


def scored(count: int) -> list[ScoredRollout]:
    """A global batch with ragged prompts and completions, and log-probabilities as a lagging engine would give."""
    g = torch.Generator().manual_seed(3)
    result = []
    for i in range(count):
        prompt = tuple(torch.randint(0, VOCAB, (1 + i % 5,), generator=g).tolist())
        n = 1 + (3 * i) % 7
        completion = torch.randint(0, VOCAB, (n,), generator=g)
        behav = -4.6 + torch.randn(n, generator=g)
        domain = ("plain", "loud")[i % 2]
        sampling = Sampling(temperature=1.0, max_new_tokens=7, stop_tokens=(1,))
        record = Provenance(
            policy=Policy(run_id="r", step=0),
            teacher_id="t",
            tokenizer_sha="",
            template_sha="",
            sampling=sampling,
            domain=domain,
            seed=0,
        )
        rollout = Rollout(
            prompt=Prompt(id=str(i), domain=domain, messages=(), tokens=prompt),
            sample=0,
            completion=completion,
            finish="length",
            behav_logprobs=behav,
            provenance=record,
        )
        result.append(ScoredRollout(rollout=rollout, teacher="t", teacher_logprobs=behav + torch.randn(n, generator=g)))
    return result


PLAIN_DESCENT = {
    "lr": 1.0,
    "clip_grad": 1e9,
    "distributed": False,
    "options": {"optimizer": "sgd", "sgd_momentum": 0.0},
}


def one_update(root: Path, mopd: dict[str, Any], layout: dict[str, Any], micro_batch_size: int) -> dict[str, Any]:
    """One plain gradient step of size 1 on the global batch; the weights that come out are left in a checkpoint."""
    settings = {
        "parallel": layout,
        "optimizer": PLAIN_DESCENT,
        "objective": {"type": "mopd", "domain_weights": {"loud": 0.5}, "importance_low": 0.05, "importance_high": 20.0},
    }
    config = build_config(tree(root, **overlay(mopd, settings)))
    groups = parallel.initialize(config.parallel, 7)
    model = student.build_model(config.model, config.parallel, groups, VOCAB, mtp=True)
    learner = Learner(model, config, groups, VOCAB, pad_token=0)
    share = scored(13)[groups.dp_rank :: groups.dp_size]
    packed = batch.pack(
        share, micro_batch_size, 0, domain_weights=config.objective.domain_weights, length_multiple=groups.tp_size
    )
    d_hidden: list[torch.Tensor] = []

    def objective(predictions: Predictions, micro_batch: MicroBatch, counts: Counts) -> Any:
        predictions.hidden.register_hook(lambda grad: d_hidden.append(grad.clone()))
        return mopd_objective(predictions, micro_batch, config.objective, counts)  # type: ignore[arg-type]

    out = learner.step(packed, objective)
    for partial in d_hidden:
        torch.distributed.all_reduce(partial, group=groups.tp)
    label = f"{'-'.join(f'{k}{v}' for k, v in layout.items())}{groups.world_size}{micro_batch_size}"
    target = root / "invariance" / label
    checkpoint.save(target, 1, learner.model, None, groups, state={}, manifest={"vocab_size": VOCAB})
    lengths = [len(s.rollout.completion) for s in share]
    by_prompt = dict(zip((s.rollout.prompt.id for s in share), torch.cat(d_hidden).split(lengths), strict=True))
    return {"loss": (out.loss, out.mtp_loss), "norm": (out.grad_norm, out.mtp_grad_norm), "d": by_prompt, "at": target}


def delta(root: Path, targets: list[Path]) -> list[dict[str, torch.Tensor]]:
    """What each update added to the starting weights, on one rank whatever layout made it."""
    config = build_config(tree(root, **SFT))
    groups = parallel.initialize(Parallel(), 7)
    model = student.build_model(config.model, Parallel(), groups, VOCAB, mtp=True)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    result = []
    for target in targets:
        checkpoint.load_weights(target, model, groups)
        result.append({n: p.detach() - start[n] for n, p in model.named_parameters()})
    return result


def test_loss_and_gradients_do_not_depend_on_how_a_batch_is_split(ranks: Any, school: Any) -> None:
    root, mopd = school
    splits: list[tuple[int, dict[str, Any], int]] = [
        (1, {}, 13),
        (1, {}, 3),
        (2, {}, 4),
        (2, {"tensor": 2}, 5),
        (2, {"expert": 2}, 4),
        (2, {"expert": 2, "dispatcher": "allgather"}, 13),
        (4, {"tensor": 2, "expert": 2}, 3),
        (4, {}, 2),  # 13 sequences on 4 ranks: unequal numbers of micro-batches
    ]
    results = [ranks(world, one_update, root, mopd, layout, size) for world, layout, size in splits]
    for per_rank in results:
        for result in per_rank:
            assert result["loss"] == pytest.approx(results[0][0]["loss"], rel=1e-5)
            assert result["norm"] == pytest.approx(results[0][0]["norm"], rel=1e-4)
            for prompt, d in result["d"].items():
                torch.testing.assert_close(d, results[0][0]["d"][prompt], atol=1e-5, rtol=1e-5)
    reference, *others = ranks(1, delta, root, [per_rank[0]["at"] for per_rank in results])[0]
    assert all(change.norm() > 0 for name, change in reference.items() if "router" not in name)
    for other, split in zip(others, splits[1:], strict=True):
        for name, change in reference.items():
            error = (other[name] - change).norm() / change.norm().clamp(min=1e-12)
            assert error < 1e-4 or (other[name] - change).abs().max() < 1e-6, f"{split} {name}: {error:.1e}"


def step_by(root: Path, mopd: dict[str, Any], layout: dict[str, Any], kernels: dict[str, str]) -> tuple[Any, Any]:
    """One whole step of sampling, scoring and updating: its metrics and the weights after it."""
    changes = {"parallel": layout, "kernels": kernels, "optimizer": PLAIN_DESCENT}
    config = build_config(tree(root, **overlay(mopd, changes)))
    trainer = Trainer(config, parallel.initialize(config.parallel, 7))
    return untimed(trainer.step()), weights(trainer)


@pytest.mark.parametrize(("world", "layout"), [(1, {}), (2, {"tensor": 2})], ids=["one", "tp2"])
@pytest.mark.parametrize(
    "kernels",
    [
        {"impl": "triton"},
        {"impl": "reference", "update": "logprob"},
        {"impl": "reference", "update": "logits"},
        {"impl": "triton", "update": "logits"},
    ],
    ids=lambda k: "_".join(k.values()),
)
def test_a_whole_step_is_the_same_by_every_kernel(
    ranks: Any, school: Any, world: int, layout: dict[str, Any], kernels: dict[str, str]
) -> None:
    """Triton in its interpreter: scoring, objective and MTP heads' cross-entropy; the plain form is the truth."""
    expected = ranks(world, step_by, *school, layout, {"impl": "reference"})
    for (row, after), (truth, wanted) in zip(ranks(world, step_by, *school, layout, kernels), expected, strict=True):
        gone = {"entropy", "entropy/plain", "entropy/loud"} if kernels.get("update") == "logprob" else set()
        assert truth.keys() - row.keys() == gone and truth["entropy/loud"] > 0 and truth["grad_norm"] > 0
        for name, value in row.items():
            assert value == pytest.approx(truth[name], rel=1e-4, abs=1e-5), name
        for name, value in wanted.items():
            torch.testing.assert_close(after[name], value, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    ("update", "operator"),
    [("objective", "linear_objective"), ("logits", "logit_objective"), ("logprob", "surrogate")],
)
def test_the_configured_form_is_the_one_that_runs(
    school: Any, groups: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, update: str, operator: str
) -> None:
    _, mopd = school
    trainer = Trainer(build_config(tree(tmp_path / "run", **overlay(mopd, {"kernels": {"update": update}}))), groups)
    ran = []
    for name in ("linear_objective", "logit_objective", "surrogate"):
        plain = getattr(objectives_mopd, name)
        monkeypatch.setattr(
            objectives_mopd, name, lambda *a, name=name, plain=plain, **k: ran.append(name) or plain(*a, **k)
        )
    trainer.step()
    assert set(ran) == {operator}


def test_a_rollout_of_another_run_stops_the_step_before_the_update(school: Any, groups: Any, tmp_path: Path) -> None:
    _, mopd = school
    trainer = Trainer(build_config(tree(tmp_path / "run", **mopd)), groups)
    before = weights(trainer)
    trainer.feed.in_flight.append(trainer._score(trainer.source.draw(Policy(run_id="another", step=0))))
    with pytest.raises(ProvenanceError, match="'another'"):
        trainer.step()
    assert all(torch.equal(before[n], p) for n, p in weights(trainer).items())


def test_a_stage_leaves_metrics_results_and_a_checkpoint(school: Any, groups: Any, tmp_path: Path) -> None:
    _, mopd = school
    config = build_config(tree(tmp_path / "run", **mopd))
    run_stage(config, groups)
    assert [row["step"] for row in read(tmp_path / "run")] == [1, 2]
    before, after = (json.loads((tmp_path / "run" / f).read_text()) for f in ("before.json", "result.json"))
    assert before["accuracy"]["plain"]["total"] == after["accuracy"]["loud"]["total"] == 6
    assert set(after["reverse_kl"]) == {"first", "second"}
    assert before["reverse_kl"]["first"]["plain"] > 0
    assert checkpoint.latest(tmp_path / "run" / "checkpoints").name == "iter_0000002"  # type: ignore[union-attr]
    assert (tmp_path / "run" / "checkpoints" / "latest_checkpointed_iteration.txt").read_text().strip() == "2"
    assert "teacher_nvfp4" not in after


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (
            {
                "teachers": {
                    "first": {"domains": ["plain", "loud"]},
                    "second": {"checkpoint": "nowhere", "domains": ["x"]},
                }
            },
            "nowhere",
        ),
        ({"data": {"train": [task("third", size=4)]}}, "third"),
        ({"model": {"max_sequence_length": 4}}, "model.max_sequence_length"),
        ({"model": {"initial": "nowhere"}}, "nowhere"),
        ({"data": {"held_out": [task("plain", size=6)]}}, "also in data.train"),
    ],
    ids=["missing teacher", "domain without teacher", "long prompt", "missing start", "held-out prompt trained on"],
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    school: Any, groups: Any, tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    _, mopd = school
    with pytest.raises(ConfigurationError, match=named):
        run_stage(build_config(tree(tmp_path / "run", **overlay(mopd, change))), groups)
    assert not (tmp_path / "run").exists()


def test_resuming_under_another_teacher_is_refused(school: Any, groups: Any, tmp_path: Path) -> None:
    _, mopd = school
    config = build_config(tree(tmp_path / "run", **mopd))
    Trainer(config, groups).save()
    swapped: Config = build_config(
        tree(
            tmp_path / "run",
            **overlay(mopd, {"teachers": {"first": {"domains": ["loud"]}, "second": {"domains": ["plain"]}}}),
        )
    )
    renamed = overlay(mopd, {})
    renamed["teachers"] = {
        "first": mopd["teachers"]["second"] | {"domains": ["plain"]},
        "second": mopd["teachers"]["first"] | {"domains": ["loud"]},
    }
    assert Trainer(config, groups).resume()
    for other in (swapped, build_config(tree(tmp_path / "run", **renamed))):
        with pytest.raises(ProvenanceError, match="teachers"):
            Trainer(other, groups).resume()


def test_a_gradient_that_is_not_finite_stops_the_run(school: Any, groups: Any, tmp_path: Path) -> None:
    _, mopd = school
    trainer = Trainer(build_config(tree(tmp_path / "run", **mopd)), groups)

    def poisoned(logprobs: torch.Tensor, micro_batch: MicroBatch, counts: Counts) -> Any:
        output = mopd_loss(logprobs, micro_batch, trainer.config.objective, counts)  # type: ignore[arg-type]
        return replace(output, loss=output.loss * float("nan"))

    trainer.objective = of_logprobs(poisoned)
    with pytest.raises(FloatingPointError, match=r"gradient norm.*nan.*checkpoint are good"):
        trainer.run()
    assert checkpoint.latest(tmp_path / "run" / "checkpoints") is None


def test_a_resumed_run_follows_the_learning_rate_it_is_given(school: Any, groups: Any, tmp_path: Path) -> None:
    _, mopd = school
    first = Trainer(build_config(tree(tmp_path / "run", **mopd)), groups)
    first.run()
    again = Trainer(
        build_config(
            tree(
                tmp_path / "run",
                **overlay(mopd, {"optimizer": {"lr": 0.5}}),
                run={"dir": str(tmp_path / "run"), "steps": 3},
            )
        ),
        groups,
    )
    assert again.resume() and again.step_index == 2
    assert again.step()["lr"] == pytest.approx(0.5)


@pytest.mark.parametrize("minibatches", [1, 2])
def test_prox_forwards_run_only_for_several_optimizer_steps(
    school: Any, groups: Any, tmp_path: Path, minibatches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, mopd = school
    settings = {"objective": {"type": "mopd", "minibatches": minibatches}, "rollout": {"lag": 1}}
    trainer = Trainer(build_config(tree(tmp_path / "run", **overlay(mopd, settings))), groups)
    forwards: list[int] = []
    plain = trainer.learner.logprobs
    monkeypatch.setattr(trainer.learner, "logprobs", lambda mb: forwards.append(1) or plain(mb))
    trainer.step()
    trainer.step()
    assert len(forwards) == (0 if minibatches == 1 else 4)


def gradients(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {n: p.main_grad.clone() for n, p in trainer.learner.module.named_parameters() if hasattr(p, "main_grad")}


def test_one_forward_gives_the_gradient_of_the_two_forward_form_at_any_lag(
    school: Any, groups: Any, tmp_path: Path
) -> None:
    _, mopd = school
    plain = {"optimizer": {"distributed": False, "lr": 0.0, "clip_grad": 1e9}, "rollout": {"lag": 1}}
    trainer = Trainer(build_config(tree(tmp_path / "run", **overlay(mopd, plain))), groups)
    trainer.step()
    (packed,) = trainer._minibatches(trainer.feed.in_flight[0])
    trainer.learner.step(packed, trainer.objective)
    one = gradients(trainer)
    trainer.learner.step(trainer.learner.with_prox(packed), trainer.objective)
    two = gradients(trainer)
    assert any(g.norm() > 0 for g in one.values())
    for name, gradient in one.items():
        assert (gradient - two[name]).norm() <= 1e-5 * gradient.norm().clamp(min=1e-12), name


def test_training_mtp_heads_changes_no_bit_of_the_trunks_update(school: Any, groups: Any, tmp_path: Path) -> None:
    _, mopd = school
    after = []
    for train in (True, False):
        directory = tmp_path / str(train)
        trainer = Trainer(
            build_config(
                tree(
                    directory,
                    **overlay(mopd, {"mtp": {"train": train}}),
                    run={"dir": str(directory), "steps": 2, "id": "same"},
                )
            ),
            groups,
        )
        row = trainer.step()
        assert (row["mtp_loss"] > 0 and row["mtp_grad_norm"] > 0) == train
        after.append((row["grad_norm"], weights(trainer)))
    (norm_with, with_mtp), (norm_without, without) = after
    assert norm_with == norm_without
    for name, value in with_mtp.items():
        assert name.startswith("mtp.") or torch.equal(value, without[name]), name
    assert any(not torch.equal(value, without[name]) for name, value in with_mtp.items() if name.startswith("mtp."))


def student_against_itself(root: Path, mopd: dict[str, Any], layout: dict[str, Any]) -> tuple[float, float]:
    start = mopd["model"]["initial"]
    own = {name: {"checkpoint": start, "domains": t["domains"]} for name, t in mopd["teachers"].items()}
    config = build_config(tree(root, **overlay(mopd, {"teachers": own, "parallel": layout, "mtp": {"train": False}})))
    row = Trainer(config, parallel.initialize(config.parallel, 7)).step()
    return row["on_policy_distillation/adv_std"], row["grad_norm"]


@pytest.mark.parametrize(
    ("world", "layout"), [(1, {}), (2, {"tensor": 2}), (2, {"expert": 2})], ids=["one", "tp2", "ep2"]
)
def test_a_student_that_is_its_own_teacher_has_nothing_to_learn(
    ranks: Any, school: Any, world: int, layout: dict[str, Any]
) -> None:
    """Scoring sorts rollouts by teacher, so the shapes differ from the update's and rounding is all that is left."""
    root, mopd = school
    for spread, norm in ranks(world, student_against_itself, root, mopd, layout):
        assert spread <= 1e-5 and norm <= 1e-5


def test_a_weight_for_a_domain_that_is_not_there_is_refused(groups: Any, tmp_path: Path) -> None:
    weighted = overlay(SFT, {"objective": {"domain_weights": {"plian": 2.0}}})
    with pytest.raises(ConfigurationError, match=r"domain_weights\.plian"):
        Trainer(build_config(tree(tmp_path / "run", **weighted)), groups)


def start_training(file: Path) -> BaseProcess:
    """``python -m megatron_mopd.train FILE`` in a process of its own, forked from one that has done the imports."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["megatron_mopd.train"])
    program = (
        f"import gc, runpy, sys; gc.freeze(); sys.argv = ['train', {str(file)!r}]\n"
        "runpy.run_module('megatron_mopd.train', run_name='__main__', alter_sys=True)"
    )
    process = context.Process(target=exec, args=(program, {}))
    process.start()
    return process


def test_a_run_killed_at_any_moment_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    """Processes killed with SIGKILL, mostly while they save, and started again by the same command."""
    ids = []
    for name in ("whole", "killed"):
        run = {"dir": str(tmp_path / name), "steps": 8, "id": "same", "seed": 3}
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump(tree(tmp_path / name, **overlay(SFT, {"checkpoint": {"every": 1}}), run=run)))
        for kill_at in (2, 4) if name == "killed" else ():
            process = start_training(file)
            wanted = tmp_path / name / "checkpoints" / f"iter_{kill_at:07d}"
            while not wanted.exists() and process.is_alive():
                time.sleep(0.005)
            process.kill()
            process.join()
            assert process.exitcode == -signal.SIGKILL
            assert wanted.exists() and not (tmp_path / name / "result.json").exists()
        process = start_training(file)
        process.join(timeout=120)
        assert process.exitcode == 0
        ids.append(checkpoint.read_manifest(tmp_path / name / "checkpoints")["checkpoint_id"])
        assert [row["step"] for row in read(tmp_path / name)] == list(range(1, 9))
    assert ids[0] == ids[1]
