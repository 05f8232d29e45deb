"""Global means by domain and teacher, and the writer's files."""

import json
import logging
import math
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from megatron_mopd import metrics
from megatron_mopd.metrics import MetricsWriter, of_step
from megatron_mopd.records import MicroBatch, Prompt, Rollout, ScoredRollout
from megatron_mopd.token_sums import QUANTITIES, TokenSums

SOURCES = ("advantage", "log_ratio", "ratio", "importance", "mask", "clipped", "k1", "k2", "k3")


def per_token(values: list[float]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(values) for name in SOURCES}


def rollout(domain: str, length: int, finish: str = "stop", reward: float | None = None) -> Rollout:
    prompt = Prompt(id="0", domain=domain, messages=(), tokens=(1,))
    return Rollout(
        prompt=prompt, sample=0, completion=torch.zeros(length, dtype=torch.int64), finish=finish, reward=reward
    )


def micro_batch(domains: tuple[str, ...], lengths: list[int]) -> MicroBatch:
    total = sum(lengths)
    return MicroBatch(
        tokens=torch.zeros(len(lengths), max(lengths, default=1), dtype=torch.int64),
        lengths=torch.tensor(lengths),
        rows=torch.zeros(total, dtype=torch.int64),
        targets=torch.zeros(total, dtype=torch.int64),
        cu_seqlens=torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()]),
        domains=domains,
        domain_weight=torch.ones(total),
    )


def test_means_by_domain_and_teacher() -> None:
    sums = TokenSums.zeros(["a", "b", "c"], SOURCES, teachers={"t": ["a", "c"], "u": ["b"]})
    sums = sums.add(per_token([1.0, 3.0, -2.0]), torch.tensor([0, 2, 3]), ["a", "b"])
    sums = sums.add(per_token([5.0]), torch.tensor([0, 1]), ["c"])
    result = sums.reduce()
    assert result["on_policy_distillation/adv_mean"] == 7 / 4
    assert result["on_policy_distillation/adv_mean/a"] == 2
    assert result["on_policy_distillation/adv_mean/b"] == -2
    assert result["on_policy_distillation/adv_mean/teacher/t"] == 3
    assert result["on_policy_distillation/teacher_student_logprob_gap_mean/c"] == 5
    assert result["on_policy_distillation/adv_std"] == pytest.approx(torch.tensor([1.0, 3, -2, 5]).std(correction=0))
    assert result["reverse_kl_k1/teacher/u"] == -2


def test_masked_clipped_and_mismatch_fractions() -> None:
    sums = TokenSums.zeros(["a"], SOURCES).add(
        per_token([0.0] * 4)
        | {"mask": torch.tensor([1.0, 0, 1, 1]), "clipped": torch.tensor([1.0, 1, 0, 0])}
        | {"importance": torch.tensor([0.5, 2.0, 1.0, 4.0])},
        torch.tensor([0, 4]),
        ["a"],
    )
    result = sums.reduce()
    assert result["importance/masked_frac"] == result["importance/masked_frac/a"] == 0.25
    assert result["ratio/clipped_frac"] == 0.5
    assert result["importance/mean"] == 7.5 / 4
    assert result["token_mult_prob_error"] == (2 + 2 + 1 + 4) / 4


def test_adding_leaves_the_old_sums_alone_and_order_is_free() -> None:
    start = TokenSums.zeros(["a", "b"], SOURCES)
    first, second = per_token([1.0, 2.0]), per_token([7.0])
    one = start.add(first, torch.tensor([0, 1, 2]), ["a", "b"])
    two = one.add(second, torch.tensor([0, 1]), ["b"])
    other = start.add(second, torch.tensor([0, 1]), ["b"]).add(first, torch.tensor([0, 1, 2]), ["a", "b"])
    assert start.reduce() == {}
    assert one.reduce()["reverse_kl_k1/b"] == 2
    assert two.reduce() == other.reduce()


def test_an_infinite_value_stays_in_its_domain() -> None:
    sums = TokenSums.zeros(["a", "b"], ["k3"]).add({"k3": torch.tensor([math.inf, 1.0])}, torch.arange(3), ["a", "b"])
    result = sums.reduce()
    assert result["reverse_kl_k3/a"] == math.inf and result["reverse_kl_k3/b"] == 1


def test_an_empty_micro_batch_adds_nothing() -> None:
    sums = TokenSums.zeros(["a"], SOURCES)
    assert sums.add(per_token([]), torch.tensor([0, 0]), [""]).reduce() == {}


@pytest.mark.parametrize(
    ("values", "domains", "message"),
    [
        ({"k1": torch.zeros(2)}, ["nowhere"], "'nowhere'"),
        ({"k1": torch.zeros(3)}, ["a"], r"\[3\].*\[2\]"),
        ({"k9": torch.zeros(2)}, ["a"], "k9"),
    ],
)
def test_what_was_not_announced_is_refused(values: dict, domains: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokenSums.zeros(["a"], ["k1"]).add(values, torch.tensor([0, 2]), domains)


def test_rollouts_by_sequence() -> None:
    sums = TokenSums.zeros(["a", "b"], ["length", "truncated", "reward"])
    rollouts = [rollout("a", 4, "length", 0.0), rollout("a", 2, reward=1.0), rollout("b", 6)]
    scored = ScoredRollout(rollout=rollouts[2], teacher="t", teacher_logprobs=torch.zeros(6))
    result = sums.add_rollouts([*rollouts[:2], scored]).reduce()
    assert result["rollout/len"] == 4 and result["rollout/len/b"] == 6
    assert result["rollout/truncated_frac/a"] == 0.5 and result["rollout/truncated_frac/b"] == 0
    assert result["rollout/reward"] == 0.5 and "rollout/reward/b" not in result
    assert result["rollout/tokens"] == 12 and result["rollout/sequences"] == 3


def test_every_metric_name_is_made_once() -> None:
    names = [q.metric for q in QUANTITIES] + [q.std for q in QUANTITIES if q.std]
    assert len(names) == len(set(names))


def config(teachers: dict[str, list[str]], sources: list[str]) -> SimpleNamespace:
    train = [SimpleNamespace(type="jsonl" if s == "jsonl" else "reasoning_gym", domain=s) for s in sources]
    return SimpleNamespace(
        source=SimpleNamespace(type="rollout"),
        teachers={name: SimpleNamespace(domains=domains) for name, domains in teachers.items()},
        data=SimpleNamespace(train=train),
    )


def step_of_rank(settings: SimpleNamespace) -> dict[str, float]:
    """Rank 0 holds two tokens of domain a, rank 1 one token of b and an empty micro-batch."""
    rank = torch.distributed.get_rank()
    domain, values = ("a", [1.0, 3.0]) if rank == 0 else ("b", [8.0])
    batches = [(micro_batch((domain,), [len(values)]), {"k1": torch.tensor(values)})]
    if rank == 1:
        batches.append((micro_batch(("",), [0]), {"k1": torch.zeros(0)}))
    outputs = [SimpleNamespace(per_token=batches)]
    return of_step([rollout(domain, len(values))], outputs, settings, torch.distributed.group.WORLD)


@pytest.mark.parametrize("settings", [config({"t": ["a", "b", "c"]}, ["a", "b"]), config({}, ["jsonl"])])
def test_ranks_agree_where_each_lacks_a_domain(ranks, settings) -> None:
    first, second = ranks(2, step_of_rank, settings)
    assert first == second and list(first) == list(second)
    assert first["reverse_kl_k1"] == 4
    assert first["reverse_kl_k1/a"] == 2 and first["reverse_kl_k1/b"] == 8
    assert "reverse_kl_k1/c" not in first
    assert first["rollout/len"] == 1.5


def test_values_of_a_custom_objective_are_logged_under_their_name() -> None:
    outputs = [SimpleNamespace(per_token=[(micro_batch(("a",), [2]), {"surprise": torch.tensor([1.0, 2.0])})])]
    result = of_step([rollout("a", 2)], outputs, config({}, ["a"]), None)
    assert result["per_token/surprise"] == 1.5 and result["per_token/surprise/a"] == 1.5


# ---------------------------------------------------------------------- the writer


def rows_of(directory) -> list[dict]:
    return [metrics.untimed(row) for row in metrics.read(directory)]


def write_steps(directory, steps: range, resume_step: int = 0) -> None:
    with MetricsWriter(directory, resume_step=resume_step) as writer:
        for step in steps:
            writer.write(step, {"loss": 1 / 3 / step, "time/update": 0.1, "accuracy/a": float(step)})


def test_a_resumed_file_equals_the_uninterrupted_one(tmp_path) -> None:
    write_steps(tmp_path / "whole", range(1, 8))
    write_steps(tmp_path / "cut", range(1, 6))
    write_steps(tmp_path / "cut", range(4, 8), resume_step=3)  # killed after step 5, last checkpoint at step 3
    assert rows_of(tmp_path / "cut") == rows_of(tmp_path / "whole")
    assert [row["step"] for row in rows_of(tmp_path / "cut")] == [1, 2, 3, 4, 5, 6, 7]


def test_a_half_written_last_line_is_dropped(tmp_path) -> None:
    write_steps(tmp_path, range(1, 4))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    assert [row["step"] for row in metrics.read(tmp_path)] == [1, 2, 3]
    write_steps(tmp_path, range(4, 5), resume_step=3)
    assert [row["step"] for row in metrics.read(tmp_path)] == [1, 2, 3, 4]


def test_a_fresh_start_drops_every_row(tmp_path) -> None:
    write_steps(tmp_path, range(1, 4))
    write_steps(tmp_path, range(1, 2))
    assert [row["step"] for row in metrics.read(tmp_path)] == [1]


def test_a_malformed_line_inside_is_named(tmp_path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nnonsense\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2"):
        metrics.read(tmp_path)


def test_rows_are_strict_json_and_there_at_once(tmp_path) -> None:
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"loss": math.nan, "grad_norm": 2.0})
        (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
        row = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert row["loss"] is None and row["grad_norm"] == 2.0 and row["time/unix"] > 1e9
    assert metrics.series([row], "grad_norm") == [(1, 2.0)] and metrics.series([row], "loss") == []


def test_tensorboard_hides_what_is_written_again(tmp_path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write_steps(tmp_path, range(1, 6))
    write_steps(tmp_path, range(4, 8), resume_step=3)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("accuracy/a")] == [1, 2, 3, 4, 5, 6, 7]


def test_other_ranks_write_nothing(tmp_path) -> None:
    with MetricsWriter(tmp_path / "run", enabled=False) as writer:
        writer.write(1, {"loss": 1.0})
    assert not (tmp_path / "run").exists()


def test_wandb_is_used_when_asked_for(tmp_path, monkeypatch, caplog) -> None:
    logged = []
    fake = SimpleNamespace(
        init=lambda **options: SimpleNamespace(
            log=lambda row, step: logged.append((step, row)), finish=lambda: logged.append(options["id"])
        )
    )
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(metrics, "find_spec", lambda name: object())
    write_steps(tmp_path, range(1, 2))
    assert logged == []
    monkeypatch.setenv("WANDB_MODE", "offline")
    with MetricsWriter(tmp_path, run_id="merge") as writer:
        writer.write(1, {"loss": 0.5})
    assert logged == [(1, {"loss": 0.5}), "merge"]
    monkeypatch.setattr(metrics, "find_spec", lambda name: None if name == "wandb" else object())
    with caplog.at_level(logging.WARNING), MetricsWriter(tmp_path):
        assert "WANDB_MODE is set but wandb is not installed" in caplog.text


def test_import_needs_torch_alone() -> None:
    heavy = ("megatron.core", "matplotlib", "rich", "tensorboard", "pydantic", "transformers")
    program = (
        f"import sys, megatron_mopd.metrics, megatron_mopd.report; print([m for m in {heavy} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
