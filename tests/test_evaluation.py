"""What a stage leaves of its greedy answers: one character a prompt, the same on any number of ranks."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_mopd import evaluation, parallel, peak_memory, train
from megatron_mopd.config import Evaluation, Parallel, build_config
from megatron_mopd.data_config import Tokenizer
from megatron_mopd.parallel import Groups
from megatron_mopd.records import Prompt, Rollout, Sampling
from megatron_mopd.tokenizer import build_tokenizer
from megatron_mopd.train import run_stage

TOKENIZER = build_tokenizer(Tokenizer())


def prompts(count: int = 11) -> list[Prompt]:
    """Domains in turn, so that ranks' shares mix them; the answer to every prompt is ``yes``."""
    return [
        Prompt(
            id=f"{i:064x}",
            domain=("b", "a", "c")[i % 3],
            messages=({"role": "user", "content": str(i)},),
            tokens=(1, 2, 3),
            verifier={"kind": "exact", "answer": "yes"},
        )
        for i in range(count)
    ]


class Knowing:
    """Stands for a sampler: right on prompts of an even number, but the last never ends its completion."""

    def generate(self, requests: Sequence[Any], sampling: Sampling, *_: Any) -> list[Rollout]:
        assert sampling.temperature == 0.0
        rollouts = []
        for prompt, sample in requests:
            number = int(prompt.id, 16)
            tokens = TOKENIZER.encode_completion("yes" if number % 2 == 0 else "no")
            finish = "length" if number == 10 else "stop"
            rollouts.append(
                Rollout(prompt=prompt, sample=sample, completion=torch.tensor(tokens), finish=finish)  # type: ignore[arg-type]
            )
        return rollouts


def answers_on_a_rank(count: int) -> dict[str, Any]:
    groups = parallel.initialize(Parallel(), 0)
    chosen = prompts(count)
    sampler: Any = Knowing()
    found = evaluation.answers(sampler, chosen, TOKENIZER, groups, max_new_tokens=8, batch_size=4)
    return evaluation.result(found, chosen)


@pytest.mark.parametrize(("world", "count"), [(1, 11), (2, 11), (4, 3)])
def test_answers_stand_in_the_order_of_the_prompts_on_every_rank(ranks: Any, world: int, count: int) -> None:
    results = ranks(world, answers_on_a_rank, count)
    assert all(result == results[0] for result in results)
    # numbers 1, 4, 7, 10 are of domain a, 0, 3, 6, 9 of b and 2, 5, 8 of c; the completion of 10 was cut off
    expected = {"a": "0100", "b": "1010", "c": "101"} if count == 11 else {"a": "0", "b": "1", "c": "1"}
    assert results[0]["answers"] == expected and list(results[0]["answers"]) == ["a", "b", "c"]
    assert results[0]["accuracy"]["b"] == {"correct": expected["b"].count("1"), "total": len(expected["b"])}


def test_prompts_are_named_by_their_ids_in_order() -> None:
    some = prompts(6)
    named = evaluation.result({"a": "01", "b": "10"}, some)["prompts"]
    ids = [prompt.id for prompt in some if prompt.domain == "a"]
    assert named["a"] == hashlib.sha256("\n".join(ids).encode()).hexdigest()
    turned = evaluation.result({"a": "01", "b": "10"}, some[::-1])["prompts"]
    fewer = evaluation.result({"a": "0", "b": "10"}, some[:3])["prompts"]
    assert len({named["a"], turned["a"], fewer["a"]}) == 3


def task(domain: str, split: str, template: str) -> dict[str, Any]:
    options = {"min_word_len": 3, "max_word_len": 4}
    source = {"type": "reasoning_gym", "domain": domain, "family": "spell_backward", "template": template}
    return source | {"split": split, "size": 4 if split == "held_out" else 20, "options": options}


def test_a_held_out_domain_without_a_teacher_is_measured_for_accuracy(groups: Groups, tmp_path: Path) -> None:
    common = {
        "model": {"pattern": "M*E", "max_sequence_length": 24},
        "rollout": {"prompts_per_step": 4, "max_new_tokens": 5},
        "batching": {"micro_batch_size": 4, "sequences_per_step": 4},
        "evaluation": {"every": 1, "samples": 2, "final_samples": 3},
        "data": {
            "train": [task("taught", "train", "{word}")],
            "held_out": [task("other", "held_out", "! {word}"), task("taught", "held_out", "{word}")],
        },
    }
    base = {"source": {"type": "dataset"}, "objective": {"type": "cross_entropy"}}
    run_stage(build_config(common | base | {"run": {"dir": str(tmp_path / "base"), "steps": 1}}), groups)
    teacher = {"checkpoint": str(tmp_path / "base" / "checkpoints"), "domains": ["taught"]}
    stage = {"run": {"dir": str(tmp_path / "mopd"), "steps": 2}, "teachers": {"base": teacher}}
    run_stage(build_config(common | stage), groups)
    before, after = (json.loads((tmp_path / "mopd" / f).read_text()) for f in ("before.json", "result.json"))
    for tree in (before, after):
        assert set(tree["accuracy"]) == set(tree["answers"]) == set(tree["prompts"]) == {"taught", "other"}
        assert {d: len(marks) for d, marks in tree["answers"].items()} == {"taught": 3, "other": 3}
        assert set(tree["reverse_kl"]["base"]) == set(tree["advantages"]) == {"taught"}
        assert {example["domain"] for example in tree["examples"]} == {"taught"} and tree["measure_s"] > 0
    assert set(after["history"][0]["accuracy"]) == {"taught", "other"}
    base_result = json.loads((tmp_path / "base" / "result.json").read_text())
    assert base_result["prompts"] == after["prompts"] and after["seed"] == 42
    resident = 1024 * int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[1])  # type: ignore[index]
    assert 0.5 * resident < after["memory_bytes"] and "device_memory_bytes" not in after


def peaks_on_a_rank() -> tuple[int, int, int]:
    groups = parallel.initialize(Parallel(), 0)
    size = 100_000_000 * (1 + 5 * groups.rank)
    peak_memory.restart(groups.device)
    start = peak_memory.peak(groups)["memory_bytes"]
    held = np.ones(size, dtype=np.uint8)
    high = peak_memory.peak(groups)["memory_bytes"]
    del held
    peak_memory.restart(groups.device)
    return start, high, peak_memory.peak(groups)["memory_bytes"]


def test_the_peak_is_the_largest_ranks_and_starts_anew_with_a_stage(ranks: Any) -> None:
    """600 MB on one rank beside 100 on the other, and gone when the next stage begins."""
    results = ranks(2, peaks_on_a_rank)
    assert results[0] == results[1]
    start, high, later = results[0]
    assert 400e6 < high - start < 620e6  # ranks start from different sizes, up to 100 MB apart
    assert later - start < 30e6


@pytest.mark.parametrize(("taught", "before"), [(False, {"acceptance"}), (True, {"answers"})])
def test_the_time_of_speculative_decoding_counts_as_measuring(taught: bool, before: set[str]) -> None:
    """Of a stage that boosts MTP heads, before its first step as after its last; others have none to measure."""

    class Measuring:
        config = SimpleNamespace(evaluation=Evaluation())
        teachers = "some" if taught else None

        def measure(self, samples: int) -> dict[str, Any]:
            return {"answers": {}}

        def measure_acceptance(self) -> dict[str, Any]:
            time.sleep(0.05)
            return {} if taught else {"acceptance": {}}

        def measure_goals(self, samples: int) -> dict[str, Any]:
            return {}

        measure_teachers = measure_goals

    trainer: Any = Measuring()
    first, last = train._measured(trainer, before=True), train._measured(trainer)
    assert first.keys() == before | {"measure_s"} and last.keys() == before | {"answers", "measure_s"}
    assert min(first["measure_s"], last["measure_s"]) >= 0.05
