"""MTP boosting: Eq. 4 against full fp64 logits, what mixing draws, a backbone that stays, and all layouts alike."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from small_stages import task

from megatron_mopd import batch, boosting, checkpoint, parallel, student, train
from megatron_mopd.config import ConfigurationError, MtpBoosting, Parallel, build_config
from megatron_mopd.drawing import uniforms
from megatron_mopd.metrics import untimed
from megatron_mopd.objectives.mtp_boosting import mixing_index, mtp_boosting_loss
from megatron_mopd.parallel import Groups
from megatron_mopd.recipe.schema import load_recipe, stage_config
from megatron_mopd.records import Counts, MicroBatch, Prompt, Rollout
from megatron_mopd.settings import overlay
from megatron_mopd.speculative import acceptance
from megatron_mopd.trainer import Trainer
from megatron_mopd.update import Learner

VOCAB = 101
SEQUENCES = 13
# Adam's first step is lr * g / (|g| + eps): with an eps far above any gradient, plain descent by lr / eps. The
# distributed optimizer knows no other.
PLAIN_DESCENT = {"lr": 1e6, "eps": 1e6, "clip_grad": 1e9}


def tree(**changes: Any) -> dict[str, Any]:
    """A boosting stage small enough to run in seconds: a pattern of two MTP segments, boosted to four depths."""
    common = {
        "run": {"dir": "unused", "steps": 2, "seed": 7},
        "model": {"pattern": "M*E/*E/*E", "max_sequence_length": 32},
        "objective": {"type": "mtp_boosting", "depths": 4},
        "data": {"train": [task()], "held_out": [task("plain", "held_out", 6)]},
        "rollout": {"prompts_per_step": 6, "max_new_tokens": 9, "batch_size": 8},
        "batching": {"micro_batch_size": 4},
        "optimizer": {"lr": 1e-3, "warmup_steps": 0},
        "evaluation": {"final_samples": 4},
    }
    return overlay(common, changes)


def learner_of(**changes: Any) -> Learner:
    config = build_config(tree(**changes))
    groups = parallel.initialize(config.parallel, 7)
    model = student.build_model(config.model, config.parallel, groups, VOCAB, mtp=True)
    return Learner(model, config, groups, VOCAB, pad_token=0)


def micro_batches(groups: Groups, size: int, weights: dict[str, float] | None = None) -> list[MicroBatch]:
    """A global batch with ragged prompts and completions of 1 to 9 tokens."""
    g = torch.Generator().manual_seed(3)
    rollouts = []
    for i in range(SEQUENCES):
        prompt = tuple(torch.randint(0, VOCAB, (1 + i % 5,), generator=g).tolist())
        rollouts.append(
            Rollout(
                prompt=Prompt(id=str(i), domain=("plain", "loud")[i % 2], messages=(), tokens=prompt),
                sample=0,
                completion=torch.randint(0, VOCAB, (1 + (4 * i) % 9,), generator=g),
                finish="length",
            )
        )
    share = rollouts[groups.dp_rank :: groups.dp_size]
    return batch.pack(share, size, 0, domain_weights=weights, length_multiple=groups.tp_size)


# ------------------------------------------------------------------ the formula


def by_the_formula(
    states: list[torch.Tensor], hidden: torch.Tensor, weight: torch.Tensor, mb: MicroBatch, size: int, valid: int
) -> torch.Tensor:
    """Eq. 4 with T = 2, term by term from full logits in fp64; states and hidden are ``[s, b, H]``."""
    total = torch.zeros((), dtype=torch.float64)
    for row in range(mb.tokens.shape[0]):
        first, last = mb.cu_seqlens[row : row + 2].tolist()
        positions = [int(mb.rows[t]) // mb.tokens.shape[0] for t in range(first, last)]  # A, in this row
        for k, state in enumerate(states, start=1):
            for t in positions:
                if t + k > positions[-1]:
                    continue
                p, q = (
                    (h[at, row].double() @ weight[:valid].double().T / 2.0).log_softmax(-1)
                    for h, at in ((hidden, t + k), (state, t))
                )
                total = total + (p.exp() * (p - q)).sum() * float(mb.domain_weight[first])
    return 4.0 / (len(states) * size) * total


def test_loss_and_gradient_are_those_of_the_formula_in_fp64(groups: Groups) -> None:
    (mb,) = micro_batches(groups, SEQUENCES, {"loud": 0.25})
    b, s = mb.tokens.shape
    g = torch.Generator().manual_seed(0)
    hidden, *states = (torch.randn(s, b, 16, generator=g, dtype=torch.float64) for _ in range(8))
    weight = torch.randn(VOCAB + 3, 16, generator=g, dtype=torch.float64)
    states = [state.requires_grad_() for state in states]
    size = len(mb.targets)
    wanted = by_the_formula(states, hidden, weight, mb, size, VOCAB)
    wanted_grads = torch.autograd.grad(wanted, states)
    found = mtp_boosting_loss(
        [state.flatten(0, 1) for state in states],
        hidden.flatten(0, 1),
        weight,
        mb,
        MtpBoosting(),
        Counts(tokens=size, sequences=b),
        valid_vocab=VOCAB,
    )
    torch.testing.assert_close(found.loss, wanted.detach(), rtol=1e-9, atol=0, check_dtype=False)
    for k, (got, want) in enumerate(zip(torch.autograd.grad(found.loss, states), wanted_grads, strict=True), 1):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-12)
        counted = (found.per_token[f"mtp_kl_{k}"] > 0).sum()
        assert counted == sum(max(0, n - k) for n in mb.cu_seqlens.diff().tolist())  # none beyond a completion's end
    assert wanted_grads[-1].abs().sum() > 0


def test_completions_too_short_for_any_depth_give_zero_and_a_gradient_of_zero(groups: Groups) -> None:
    rollout = Rollout(
        prompt=Prompt(id="0", domain="plain", messages=(), tokens=(1, 2)),
        sample=0,
        completion=torch.tensor([5]),
        finish="stop",
    )
    (mb,) = batch.pack([rollout], 1, 0)
    states = [torch.randn(3, 8, requires_grad=True) for _ in range(2)]
    counts = Counts(tokens=1, sequences=1)
    found = mtp_boosting_loss(states, torch.randn(3, 8), torch.randn(VOCAB, 8), mb, MtpBoosting(depths=2), counts)
    grads = torch.autograd.grad(found.loss, states)
    assert found.loss == 0 and all(not grad.any() for grad in grads)


# ------------------------------------------------------------------ hidden-state mixing


@pytest.mark.parametrize("step", [2, 3, 7])
def test_a_step_takes_each_earlier_step_alike_and_aligned_on_the_same_token(step: int) -> None:
    s, b = 40, 60
    keys = torch.arange(b) * 7919
    index = mixing_index(uniforms(keys, torch.arange(s).unsqueeze(1)), step).view(s, b)
    taken, rest = index // (s * b) + 1, index % (s * b)
    position, row = rest // b, rest % b
    here = torch.arange(s).unsqueeze(1).expand(s, b)
    assert torch.equal(row, torch.arange(b).expand(s, b))
    assert taken.min() == 1 and taken.max() == step - 1
    inside = here < s - step
    assert torch.equal((position + taken)[inside], (here + step - 1)[inside])  # all have read the same tokens
    behind = position + taken != here + step - 1
    assert torch.equal(behind, torch.zeros_like(behind))  # the newest state serves at the end: aligned as well
    shares = torch.bincount(taken[inside], minlength=step)[1:] / inside.sum()
    assert (shares - 1 / (step - 1)).abs().max() < 0.03


def test_a_row_draws_the_same_in_any_micro_batch_and_anew_in_each_step_and_depth(groups: Groups) -> None:
    (whole,), parts = micro_batches(groups, SEQUENCES), micro_batches(groups, 3)
    keys = boosting.row_keys(7, 5, 3, whole)
    assert torch.equal(keys, torch.cat([boosting.row_keys(7, 5, 3, mb) for mb in parts]))
    others = [boosting.row_keys(*changed, whole) for changed in ((8, 5, 3), (7, 6, 3), (7, 5, 4))]
    assert all((keys != other).all() for other in others) and len(keys.unique()) == len(keys)


def step_by_step(model: Any, tokens: torch.Tensor, hidden: torch.Tensor, keys: list[torch.Tensor]) -> list[Any]:
    """The block's steps with every mixed input put together position by position."""
    block, states = model.mtp.layers[0], [hidden.detach()]
    s = tokens.shape[1]
    for step in range(1, len(keys) + 1):
        given = states[-1]
        if step > 2:
            noise = uniforms(keys[step - 1], torch.arange(s).unsqueeze(1))
            rows = []
            for i in range(s):
                columns = []
                for r in range(tokens.shape[0]):
                    j = 1 + int(noise[i, r] * (step - 1))
                    at = i + step - 1 - j
                    columns.append(states[j][at, r] if at < s else states[step - 1][i, r])
                rows.append(torch.stack(columns))
            given = torch.stack(rows)
        ahead = torch.cat([tokens[:, step:], tokens.new_zeros(len(tokens), step)], dim=1)
        embedded = model.embedding(input_ids=ahead, position_ids=torch.zeros_like(ahead)).detach()
        states.append(block._proj_and_transformer_layer(given, embedded))
    return states[1:]


def test_an_update_is_that_of_the_formula_on_states_put_together_one_by_one(groups: Groups) -> None:
    """The whole of it: the recursion, mixing, loss, its gradient through all steps, one plain step of descent."""
    learner = learner_of(objective={"depths": 4}, optimizer=PLAIN_DESCENT)
    (mb,), model = micro_batches(learner.groups, SEQUENCES), learner.module
    trained = [p for p in model.mtp.parameters() if p.requires_grad]
    hidden = student.forward(model, mb.tokens).hidden.detach()
    keys = [boosting.row_keys(7, 0, depth, mb) for depth in (1, 2, 3, 4)]
    states = step_by_step(model, mb.tokens, hidden, keys)
    wanted = by_the_formula(states, hidden, model.output_layer.weight.detach(), mb, len(mb.targets), VOCAB)
    grads, before = torch.autograd.grad(wanted, trained), [p.detach().clone() for p in trained]
    out = learner.step([mb], None)
    assert out.loss == pytest.approx(float(wanted), rel=1e-5) and out.mtp_loss == 0
    assert out.grad_norm == 0 and out.mtp_grad_norm > 0
    for parameter, start, grad in zip(trained, before, grads, strict=True):
        error = (start - parameter.detach() - grad).norm() / grad.norm().clamp(min=1e-12)
        assert error < 1e-3 or (start - parameter.detach() - grad).abs().max() < 1e-6


def test_two_depths_are_those_of_the_model_itself(groups: Groups) -> None:
    """Step 2 can only take step 1's state, so up to there the recursion is mcore's own, bit for bit."""
    learner = learner_of()
    (mb,), model = micro_batches(learner.groups, SEQUENCES), learner.module
    out = student.forward(model, mb.tokens, mtp=True)
    keys = [boosting.row_keys(7, 0, depth, mb) for depth in range(1, 4)]
    found = boosting.depths(model, mb.tokens, out.hidden, keys, learner.groups)
    assert len(found) == 3 and len(out.mtp_hidden) == 2
    for got, want in zip(found, out.mtp_hidden, strict=False):
        assert torch.equal(got, want)


# ------------------------------------------------------------------ a backbone that stays


def everything(model: Any) -> dict[str, torch.Tensor]:
    return {n: t.detach().clone() for n, t in [*model.named_parameters(), *model.named_buffers()]}


def test_the_backbone_does_not_change_by_one_bit(groups: Groups) -> None:
    """Weight decay, a router that is trained and moving router biases reach the MTP block alone."""
    changes = {
        "model": {
            "train_router": True,
            "update_expert_bias": True,
            "override": {"moe_router_bias_update_rate": 0.1},
        },
        "optimizer": {"weight_decay": 0.5, "lr": 1e-2},
    }
    learner = learner_of(**changes)
    start, names = everything(learner.module), [n for n, _ in learner.module.named_parameters()]
    losses = [learner.step(micro_batches(learner.groups, 5), None).loss for _ in range(8)]
    after = everything(learner.module)
    backbone = [n for n in start if not n.startswith("mtp.")]
    assert any("expert_bias" in n for n in backbone) and "output_layer.weight" in backbone
    for name in backbone:
        assert torch.equal(start[name], after[name]), name
    for name in names:
        assert name in backbone or not torch.equal(start[name], after[name]), name
    bias = next(n for n in start if n.startswith("mtp.") and n.endswith("expert_bias"))
    assert not torch.equal(start[bias], after[bias])  # as configured
    assert losses[-1] < 0.8 * losses[0]
    owned = {id(p) for group in learner.optimizer.param_groups for p in group["params"]}
    assert len(owned) == sum(p.requires_grad for p in learner.module.parameters()) > 0
    assert not any(p.requires_grad for n, p in learner.module.named_parameters() if not n.startswith("mtp."))


# ------------------------------------------------------------------ layouts


def one_update(target: Path, layout: dict[str, Any], size: int) -> dict[str, Any]:
    borders = {"pattern": "ME|*E/*E/*E"} if layout.get("pipeline") else {"pattern": "ME*E/*E/*E"}
    learner = learner_of(
        parallel=layout, optimizer=PLAIN_DESCENT, model=borders, objective={"domain_weights": {"plain": 0.5}}
    )
    out = learner.step(micro_batches(learner.groups, size, {"plain": 0.5}), None)
    checkpoint.save(target, 1, learner.model, None, learner.groups, state={}, manifest={"vocab_size": VOCAB})
    return {"loss": out.loss, "norms": (out.grad_norm, out.mtp_grad_norm), "lr": out.lr}


def deltas(targets: list[Path]) -> list[dict[str, torch.Tensor]]:
    """What each update added to the starting weights, on one rank whatever layout made it."""
    config = build_config(tree(model={"pattern": "ME*E/*E/*E"}))
    groups = parallel.initialize(Parallel(), 7)
    model = student.build_model(config.model, Parallel(), groups, VOCAB, mtp=True)
    start, result = everything(model), []
    for target in targets:
        checkpoint.load_weights(target, model, groups)
        result.append({n: p.detach() - start[n] for n, p in model.named_parameters()})
    return result


def test_loss_and_update_do_not_depend_on_the_layout(ranks: Any, tmp_path: Path) -> None:
    splits: list[tuple[int, dict[str, Any], int]] = [
        (1, {}, SEQUENCES),
        (1, {}, 3),
        (2, {}, 4),
        (2, {"tensor": 2}, 5),
        (2, {"expert": 2}, 4),
        (2, {"pipeline": 2}, 5),
        (4, {"tensor": 2, "expert": 2}, 3),
        (4, {}, 2),  # 13 sequences on 4 ranks: unequal numbers of micro-batches
    ]
    targets = [tmp_path / str(i) for i in range(len(splits))]
    results = [
        ranks(world, one_update, at, layout, size) for at, (world, layout, size) in zip(targets, splits, strict=True)
    ]
    for per_rank, split in zip(results, splits, strict=True):
        for result in per_rank:
            assert result["loss"] == pytest.approx(results[0][0]["loss"], rel=1e-5), split
            assert result["norms"] == pytest.approx(results[0][0]["norms"], rel=1e-4), split
            assert result["lr"] == results[0][0]["lr"]
    reference, *others = ranks(1, deltas, targets)[0]
    assert all(
        bool(change.norm() > 0) == name.startswith("mtp.") for name, change in reference.items() if "router" not in name
    )
    for other, split in zip(others, splits[1:], strict=True):
        for name, change in reference.items():
            error = (other[name] - change).norm() / change.norm().clamp(min=1e-12)
            assert error < 1e-4 or (other[name] - change).abs().max() < 1e-6, f"{split} {name}: {error:.1e}"


# ------------------------------------------------------------------ a whole stage


class Killed(Exception):
    """Stands for a process that is stopped at any moment."""


def run_and_resume(root: Path, layout: dict[str, Any], distributed: bool) -> list[bool]:
    """From a checkpoint of another objective, 4 steps in one go beside 4 with a stop after the 3rd; equal, and the
    backbone is that of the start."""
    pattern = "M|*E/*E/*E" if layout.get("pipeline") else "M*E/*E/*E"
    start = build_config(tree(model={"pattern": pattern}, parallel=layout))
    groups = parallel.initialize(start.parallel, 3)
    model = student.build_model(start.model, start.parallel, groups, VOCAB, mtp=True)
    sft = build_config(tree(model={"pattern": pattern}, parallel=layout))
    trainer = Trainer(sft, groups)
    checkpoint.save(root / "start", 1, model, None, groups, state={}, manifest={"vocab_size": trainer.vocab_size})

    def stage(name: str) -> Trainer:
        config = build_config(
            tree(
                run={"dir": str(root / name), "steps": 4, "id": "boosted"},
                model={"pattern": pattern, "initial": str(root / "start")},
                parallel=layout,
                checkpoint={"every": 2},
                optimizer={"distributed": distributed},
            )
        )
        return Trainer(config, parallel.initialize(config.parallel, 7))

    rows: list[list[Any]] = [[], []]
    whole = stage("whole")
    backbone = everything(whole.learner.module)
    whole.run(lambda step, row: rows[0].append(untimed(row)))

    def die(step: int, row: Any) -> None:
        if step == 3:
            raise Killed
        rows[1].append(untimed(row))

    with pytest.raises(Killed):
        stage("stopped").run(die)
    again = stage("stopped")
    assert again.resume() and again.step_index == 2
    again.run(lambda step, row: rows[1].append(untimed(row)))
    a, b = everything(whole.learner.module), everything(again.learner.module)
    return [
        all(torch.equal(a[n], b[n]) for n in a),
        rows[0] == rows[1],
        all(torch.equal(backbone[n], a[n]) for n in a if not n.startswith("mtp.")),
        all(row["mtp_grad_norm"] > 0 and row["per_token/mtp_kl_4"] > 0 for row in rows[0]),
    ]


@pytest.mark.parametrize(
    ("world", "layout", "distributed"),
    [
        (1, {}, True),
        pytest.param(2, {"tensor": 2}, True, marks=pytest.mark.slow),
        (2, {"pipeline": 2}, True),
        (2, {"pipeline": 2}, False),
    ],
    ids=["one", "tp2", "pp2", "pp2-plain"],
)
def test_a_resumed_stage_equals_the_uninterrupted_one(
    ranks: Any, tmp_path: Path, world: int, layout: Any, distributed: bool
) -> None:
    for verdicts in ranks(world, run_and_resume, tmp_path, layout, distributed):
        assert verdicts == [True] * 4


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": {"pattern": "M*E"}}, "mtp_boosting trains MTP heads, but model.pattern = 'M[*]E' has none"),
        ({"model": {"override": {"mtp_use_repeated_layer": False}}}, "mtp_use_repeated_layer = false"),
    ],
)
def test_a_model_that_cannot_be_boosted_is_refused(groups: Groups, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        learner_of(**changes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"source": {"type": "dataset"}, "batching": {"sequences_per_step": 4}}, "set source.type to rollout"),
        ({"teachers": {"t": {"checkpoint": "x", "domains": ["plain"]}}}, "name none"),
        ({"objective": {"depths": 0}}, "objective.depths: 0"),
        ({"objective": {"temperature": 0}}, "objective.temperature: 0"),
        ({"objective": {"minibatches": 0}}, "objective.minibatches: 0"),
        ({"objective": {"domain_weights": {"plain": -1}}}, "objective.domain_weights.plain: -1"),
    ],
)
def test_settings_that_contradict_boosting_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        build_config(tree(**changes))


# ------------------------------------------------------------------ what is measured


def boosted_stage(root: Path) -> dict[str, Any]:
    """A whole stage from a saved checkpoint, then the tool on both ends of it."""
    recipe = {
        "dir": str(root),
        "common": tree(
            model={"max_sequence_length": 64}, rollout={"max_new_tokens": 44}, optimizer={"lr": 5e-3}, run={"steps": 3}
        ),
        "stages": [{"name": "boosted"}],
    }
    recipe["common"]["run"].pop("dir")
    path = root / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    config = stage_config(load_recipe(path, []), load_recipe(path, []).stages[0])
    groups = parallel.initialize(config.parallel, 7)
    trainer = Trainer(config, groups)
    trainer.save()
    start = root / "start"
    (root / "boosted" / "checkpoints").rename(start)
    changed = config.model_copy(update={"model": config.model.model_copy(update={"initial": start})})
    train.run_stage(changed, groups)
    left = {name: json.loads((root / "boosted" / f"{name}.json").read_text()) for name in ("before", "result")}
    tool = runpy.run_path(str(Path(__file__).parent.parent / "tools" / "acceptance.py"))
    found = [tool["of_checkpoint"](at, config, 128, groups) for at in (start, root / "boosted" / "checkpoints")]
    tool["show"](found[1], acceptance.gains(*found))
    return left | {"tool": found}


def test_a_stage_leaves_acceptance_before_and_after_and_the_tool_finds_the_same(ranks: Any, tmp_path: Path) -> None:
    (left,) = ranks(1, boosted_stage, tmp_path)
    before, after = left["before"]["acceptance"], left["result"]["acceptance"]
    assert [before, after] == left["tool"] and before != after
    for draft in ("draft_2", "draft_7"):
        for mode in ("greedy", "temperature_1"):
            known = [value for value in after[draft][mode]["by_prompt"] if value is not None]
            assert len(after[draft][mode]["by_prompt"]) == 6 and all(1 <= value <= 8 for value in known)
    # A drawn model hardly ever stops by itself, so some completions are long enough; nothing of the backbone moved.
    assert before["draft_2"]["greedy"]["length"] is not None
    assert "answers" in left["result"] and "acceptance" in left["result"]
