"""Teachers in NVFP4: what they score, what rollouts carry, what it costs and saves."""

from __future__ import annotations

import dataclasses
import math
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_mopd import (
    checkpoint,
    in_flight,
    linear_weights,
    parallel,
    quantized_teachers,
    student,
    teacher_precision,
)
from megatron_mopd.config import Config, ConfigurationError, Model, Parallel, build_config
from megatron_mopd.parallel import Groups
from megatron_mopd.provenance import ProvenanceError, check
from megatron_mopd.records import Policy, Prompt, Provenance, Rollout, Sampling, ScoredRollout
from megatron_mopd.teachers import TeacherPool
from mopd_kernels import nvfp4

VOCAB = 53  # odd: padded under tensor parallelism
TOKENIZER: Any = SimpleNamespace(pad_token=0, tokenizer_sha="tok", template_sha="tem", vocab_size=VOCAB)
MODEL = {"preset": "tiny", "pattern": "ME*-"}
ALL = ["output_weight", "experts", "hidden"]
EXPERTS = "decoder.layers.1.mlp.experts.linear_fc1.weight"
TEMPERATURE = 0.8


def write_checkpoints(root: str) -> None:
    for seed, name in enumerate("ab"):
        groups = parallel.initialize(Parallel(), seed=seed)
        built = student.build_model(Model(**MODEL), Parallel(), groups, VOCAB)
        with torch.no_grad():
            built.output_layer.weight.mul_(5)  # far from uniform, so that teachers differ
            built.decoder.final_norm.weight.uniform_(0.5, 2)
        manifest = {"tokenizer_sha": "tok", "template_sha": "tem", "vocab_size": VOCAB}
        manifest["model"] = Model(**MODEL).model_dump(mode="json")
        checkpoint.save(Path(root) / name, 1, built, None, groups, state={}, manifest=manifest)


@pytest.fixture(scope="module")
def root(ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantized")
    ranks(1, write_checkpoints, str(folder))
    return folder


def configuration(root: Path | str, a: list[str], b: list[str], **sections: Any) -> Config:
    teachers = {
        "wordy": {"checkpoint": str(Path(root) / "a"), "domains": ["spell", "rhyme"], "nvfp4": a},
        "exact": {"checkpoint": str(Path(root) / "b"), "domains": ["count"], "nvfp4": b},
    }
    tree = {"run": {"dir": "unused", "steps": 1}, "teachers": teachers, "batching": {"micro_batch_size": 3}}
    return build_config(tree | {"model": MODEL, "rollout": {"temperature": TEMPERATURE}} | sections)


def rollouts(count: int = 11) -> list[Rollout]:
    g = torch.Generator().manual_seed(5)
    made = []
    for i in range(count):
        domain = ("count", "spell", "rhyme")[i % 3]
        tokens = torch.randint(1, VOCAB, (3 + i % 4,), generator=g)
        record = Provenance(
            policy=Policy(run_id="run", step=0),
            teacher_id=None,
            tokenizer_sha="tok",
            template_sha="tem",
            sampling=Sampling(temperature=TEMPERATURE, max_new_tokens=8, stop_tokens=()),
            domain=domain,
            seed=42,
        )
        rollout = Rollout(
            prompt=Prompt(id=f"p{i}", domain=domain, messages=(), tokens=tuple(tokens.tolist())),
            sample=0,
            completion=torch.randint(1, VOCAB, (2 + (5 * i) % 7,), generator=g),
            finish="stop",
            provenance=record,
        )
        made.append(rollout)
    return made


def loaded(path: Path, groups: Groups) -> Any:
    model = student.build_model(Model(**MODEL), Parallel(), groups, VOCAB, mtp=False)
    checkpoint.load_weights(path, model, groups)
    return model


@torch.no_grad()
def quantized_model(path: Path, groups: Groups, parts: list[str]) -> Any:
    """The teacher as a plain model whose weights were quantized and dequantized one matrix at a time."""
    model, form = loaded(path, groups), nvfp4.Format(numerics="modelopt", four_over_six="mse")
    chosen = []
    if "output_weight" in parts:
        chosen.append(model.output_layer.weight)
    if "experts" in parts:
        chosen += [w for n, p in model.named_parameters() if ".mlp.experts." in n for w in p]
    for weight in chosen:
        weight.copy_(nvfp4.quantize(weight, form).dequantize())
    return model


@torch.no_grad()
def predicted(model: Any, rollout: Rollout) -> tuple[torch.Tensor, torch.Tensor]:
    """fp64 hidden states ``[n, H]`` and log-probabilities ``[n, V]`` of one rollout alone, from whole logits."""
    out = student.forward(model, rollout.tokens[None])
    start = len(rollout.prompt.tokens) - 1
    hidden = out.hidden[start : start + len(rollout.completion), 0].double()
    return hidden, log_softmax(hidden, out.output_weight)


def log_softmax(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return (hidden @ weight[:VOCAB].double().T / TEMPERATURE).log_softmax(-1)


@pytest.mark.parametrize("part", ["output_weight", "hidden"])
def test_kernels_that_cannot_take_the_parts_are_refused_at_start(root: Path, groups: Groups, part: str) -> None:
    """The kernels multiply packed operands with bf16 and fp16, and on CPU a teacher is fp32."""
    config = configuration(root, [part], [], kernels={"impl": "triton"})
    rule = r"kernels\.impl = triton for teachers\.wordy\.nvfp4: torch\.float32 beside NVFP4.*set it to auto"
    with pytest.raises(ConfigurationError, match=rule):
        TeacherPool(config, groups, TOKENIZER)


@pytest.mark.parametrize("parts", [["experts"], ["output_weight"], ["hidden"], ALL], ids="+".join)
def test_scores_are_those_of_the_dequantized_weights(root: Path, groups: Groups, parts: list[str]) -> None:
    pool = TeacherPool(configuration(root, parts, []), groups, TOKENIZER)
    plain, exact = quantized_model(root / "a", groups, parts), loaded(root / "b", groups)
    original = loaded(root / "a", groups)
    errors = []
    for item, rollout in zip(pool.score(rollouts()), rollouts(), strict=True):
        own = item.teacher == "wordy"
        hidden, logprobs = predicted(plain if own else exact, rollout)
        truth = logprobs.gather(1, rollout.completion[:, None])[:, 0]
        torch.testing.assert_close(item.teacher_logprobs.double(), truth, rtol=0, atol=3e-5)
        assert item.rollout.provenance is not None
        assert item.rollout.provenance.teacher_nvfp4 == (tuple(sorted(parts)) if own else ())
        assert (item.teacher_hidden is not None) == (own and "hidden" in parts)
        if item.teacher_hidden is not None:
            assert item.teacher_hidden.shape == (len(rollout.completion), 128)
            kept = item.teacher_hidden.dequantize().double()
            assert (kept - hidden).norm() < 0.12 * hidden.norm()
        errors.append((truth - predicted(original, rollout)[1].gather(1, rollout.completion[:, None])[:, 0]).abs())
    if own_error := [e for e, r in zip(errors, rollouts(), strict=True) if r.prompt.domain != "count"]:
        worst = float(torch.cat(own_error).max())
        assert worst == 0 if parts == ["hidden"] else 1e-3 < worst < 4, worst


def test_memory_holds_packed_numbers_only(root: Path, groups: Groups) -> None:
    dense = TeacherPool(configuration(root, [], []), groups, TOKENIZER)
    pool = TeacherPool(configuration(root, ALL, ALL), groups, TOKENIZER)
    mixed = TeacherPool(configuration(root, ALL, []), groups, TOKENIZER)
    for each in (dense, mixed, pool):
        rows = len(each.resident("wordy").output_layer.weight)
        assert rows == (0 if each is pool else VOCAB)
    for name, whole in dense.stored("wordy").items():
        packed = pool.stored("wordy")[name]
        assert isinstance(whole, torch.Tensor)
        if name == "output_layer.weight" or ".mlp.experts." in name:
            assert quantized_teachers.nbytes(packed) < whole.numel() * 4.6 / 8
        else:
            assert isinstance(packed, torch.Tensor) and torch.equal(packed, whole)
    assert isinstance(mixed.stored("exact")["output_layer.weight"], torch.Tensor)


def test_equal_checkpoints_are_stored_once_for_each_way_of_packing(root: Path, groups: Groups) -> None:
    tree = configuration(root, ["experts", "hidden"], ["experts"]).model_dump(mode="json")
    tree["teachers"]["exact"]["checkpoint"] = tree["teachers"]["wordy"]["checkpoint"]
    assert len(TeacherPool(build_config(tree), groups, TOKENIZER)._weights) == 1
    tree["teachers"]["exact"]["nvfp4"] = []
    pool = TeacherPool(build_config(tree), groups, TOKENIZER)
    assert len(pool._weights) == 2 and pool.ids["wordy"] == pool.ids["exact"]
    by_domain = {item.teacher: item.teacher_logprobs for item in pool.score(rollouts())}
    again = {item.teacher: item.teacher_logprobs for item in pool.score(rollouts())}
    assert all(torch.equal(by_domain[name], again[name]) for name in by_domain)


def on_a_rank(root: str, layout: dict[str, Any]) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
    config = configuration(root, ALL, ALL, parallel=layout)
    groups = parallel.initialize(config.parallel, 3)
    pool = TeacherPool(config, groups, TOKENIZER)
    found = []
    for item in pool.score(rollouts()[groups.dp_rank :: groups.dp_size]):
        assert (item.teacher_hidden is not None) == groups.last_stage
        hidden = torch.empty(0) if item.teacher_hidden is None else item.teacher_hidden.dequantize()
        found.append((item.rollout.prompt.id, item.teacher_logprobs, hidden))
    return found


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "dp2": (2, {}),
    "tp2": (2, {"tensor": 2}),
    "ep2": (2, {"expert": 2}),
    "tp2_ep2": (4, {"tensor": 2, "expert": 2}),
    "pp2": (2, {"pipeline": 2}),  # the experts in the first stage, the output weight in the last
}


def test_no_layout_changes_what_a_packed_teacher_is(ranks: Any, root: Path) -> None:
    truth = {name: rest for name, *rest in ranks(1, on_a_rank, str(root), {})[0]}
    for layout, (world, settings) in LAYOUTS.items():
        for name, logprobs, hidden in chain.from_iterable(ranks(world, on_a_rank, str(root), settings)):
            torch.testing.assert_close(logprobs, truth[name][0], rtol=0, atol=3e-5, msg=f"{layout} {name}")
            # Another last bit sends few elements to the next code.
            assert not len(hidden) or (hidden != truth[name][1]).float().mean() < 0.01, f"{layout} {name}"


# ------------------------------------------------------------------ hidden states that rollouts carry


def test_reverse_kl_from_kept_hidden_states_runs_no_teacher(root: Path, groups: Groups, monkeypatch: Any) -> None:
    pool = TeacherPool(configuration(root, ALL, ["hidden"]), groups, TOKENIZER)
    scored = pool.score(rollouts())
    model = loaded(root / "b", groups).train()
    heads = {
        "wordy": quantized_model(root / "a", groups, ["output_weight"]).output_layer.weight,
        "exact": model.output_layer.weight,
    }
    expected: dict[str, list[torch.Tensor]] = {}
    for item in scored:
        log_p = predicted(model, item.rollout)[1]
        assert item.teacher_hidden is not None
        log_q = log_softmax(item.teacher_hidden.dequantize().double(), heads[item.teacher])
        expected.setdefault(item.rollout.prompt.domain, []).append((log_p.exp() * (log_p - log_q)).sum(-1))
    forwards, forward = [], student.forward
    monkeypatch.setattr(student, "forward", lambda m, tokens, **kw: forwards.append(m) or forward(m, tokens, **kw))
    found = pool.reverse_kl(model, scored)
    assert forwards and all(m is model for m in forwards) and model.training
    for domain, values in expected.items():
        assert found[pool.route(domain)][domain] == pytest.approx(float(torch.cat(values).mean()), rel=1e-4)
    # Held against the other teacher, whose hidden states nobody kept, each runs once; and the result is near exact.
    crossed = pool.reverse_kl(model, scored, all_pairs=True)
    assert crossed["wordy"].keys() == {"count", "spell", "rhyme"} and any(m is not model for m in forwards)
    plain = pool.reverse_kl(model, rollouts())
    for name, row in plain.items():
        assert found[name] == pytest.approx(row, rel=0.1, abs=0.1)


def crossed_on_a_rank(root: str, layout: dict[str, Any]) -> dict[str, dict[str, float]]:
    config = configuration(root, ALL, [], parallel=layout)
    groups = parallel.initialize(config.parallel, 3)
    pool = TeacherPool(config, groups, TOKENIZER)
    model = student.build_model(config.model, config.parallel, groups, VOCAB, mtp=False)
    checkpoint.load_weights(Path(root) / "b", model, groups)
    # One rank of two has no rollout of either teacher.
    own = rollouts() if groups.dp_rank == 0 else []
    return pool.reverse_kl(model, pool.score(own), all_pairs=True)


def test_reverse_kl_does_not_depend_on_the_layout(ranks: Any, root: Path) -> None:
    (one,) = ranks(1, crossed_on_a_rank, str(root), {})
    for world, layout in LAYOUTS.values():
        for found in ranks(world, crossed_on_a_rank, str(root), layout):
            assert found.keys() == one.keys()
            for name, row in one.items():
                assert found[name] == pytest.approx(row, rel=2e-3, abs=2e-4), (layout, name)


def test_kept_hidden_states_wait_in_a_checkpoint(root: Path, groups: Groups, tmp_path: Path) -> None:
    pool = TeacherPool(configuration(root, ALL, []), groups, TOKENIZER)
    batch = pool.score(rollouts())
    tensors, records = in_flight.pack([batch, batch[:2]])
    (tmp_path / in_flight.TENSORS).write_bytes(tensors)
    (tmp_path / in_flight.RECORDS).write_bytes(in_flight.seal(tensors, records))
    for before, after in zip([*batch, *batch[:2]], chain.from_iterable(in_flight.unpack(tmp_path)), strict=True):
        assert isinstance(after, ScoredRollout)
        assert after.rollout.provenance == before.rollout.provenance
        assert torch.equal(after.teacher_logprobs, before.teacher_logprobs)
        ours, theirs = before.teacher_hidden, after.teacher_hidden
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            for field in dataclasses.fields(ours):
                a, b = getattr(ours, field.name), getattr(theirs, field.name)
                assert torch.equal(a.float(), b.float()) if isinstance(a, torch.Tensor) else a == b, field.name


def test_a_rollout_of_the_same_teacher_in_another_precision_is_refused(root: Path, groups: Groups) -> None:
    now, tokenizer = Policy(run_id="run", step=0), TOKENIZER
    packed = TeacherPool(configuration(root, ["experts"], []), groups, TOKENIZER)
    dense = TeacherPool(configuration(root, [], []), groups, TOKENIZER)
    assert packed.ids == dense.ids
    check(packed.score(rollouts()), now, 0, tokenizer, packed)
    for scored, pool in ((packed, dense), (dense, packed)):
        with pytest.raises(ProvenanceError, match=r"what teacher 'wordy' keeps in NVFP4 is \(.*, this run expects \("):
            check(scored.score(rollouts()), now, 0, tokenizer, pool)


# ------------------------------------------------------------------ cost and savings


def measured(root: str, layout: dict[str, Any]) -> dict[str, dict[str, Any]]:
    config = configuration(root, ALL, ["experts"], parallel=layout)
    groups = parallel.initialize(config.parallel, 3)
    pool = TeacherPool(config, groups, TOKENIZER)
    before = pool.score(rollouts())
    found = teacher_precision.measure(pool, rollouts()[groups.dp_rank :: groups.dp_size])
    # Reading the checkpoints again leaves the pool as it was.
    for item, again in zip(before, pool.score(rollouts()), strict=True):
        assert torch.equal(item.teacher_logprobs, again.teacher_logprobs)
    return found


def test_the_cost_is_measured_against_the_checkpoint(ranks: Any, root: Path, groups: Groups) -> None:
    found = teacher_precision.measure(TeacherPool(configuration(root, ALL, ["experts"]), groups, TOKENIZER), rollouts())
    for name, source, parts in (("wordy", "a", ALL), ("exact", "b", ["experts"])):
        original, packed = loaded(root / source, groups), quantized_model(root / source, groups, parts)
        error, kl = [], []
        for rollout in (r for r in rollouts() if (r.prompt.domain == "count") == (name == "exact")):
            log_p, log_q = (predicted(m, rollout)[1] for m in (original, packed))
            error.append((log_p - log_q).gather(1, rollout.completion[:, None])[:, 0].abs())
            kl.append((log_p.exp() * (log_p - log_q)).sum(-1))
        row = found[name]
        assert row["parts"] == sorted(parts) and row["tokens"] == len(torch.cat(error))
        assert row["logprob_error_mean"] == pytest.approx(float(torch.cat(error).mean()), rel=1e-3)
        assert row["logprob_error_max"] == pytest.approx(float(torch.cat(error).max()), rel=1e-3)
        assert row["kl"] == pytest.approx(float(torch.cat(kl).mean()), rel=1e-3)
        assert 4.5 < row["bits_per_number"] < 4.6
        numbers = 8 * 2 * 64 * 128
        saved = row["host_bytes"]["before"] - row["host_bytes"]["after"]
        assert saved == pytest.approx((numbers + (VOCAB * 128 if name == "wordy" else 0)) * (4 - 4.5 / 8), rel=1e-3)
    assert found["wordy"]["hidden_kl"] > found["wordy"]["kl"] and found["exact"]["hidden_kl"] is None
    assert found["wordy"]["hidden_bytes_per_token"] == {"before": 512, "after": 72}
    # One of the two teachers needs the dense output weight on the device.
    assert found["wordy"]["device_bytes"]["after"] > found["wordy"]["device_bytes"]["before"]
    assert not math.isnan(found["exact"]["kl"])
    for world, layout in LAYOUTS.values():
        for other in ranks(world, measured, str(root), layout):
            for name, row in found.items():
                for key in ("tokens", "logprob_error_mean", "logprob_error_max", "kl"):
                    assert other[name][key] == pytest.approx(row[key], rel=5e-3), (layout, name, key)


# ------------------------------------------------------------------ refusals


def test_what_a_teacher_cannot_pack_is_refused(root: Path, groups: Groups) -> None:
    with pytest.raises(ConfigurationError, match=r"teachers.wordy.nvfp4.0: 'heads': Input should be"):
        configuration(root, ["heads"], [])
    with pytest.raises(ConfigurationError, match="names a part twice"):
        configuration(root, ["experts", "experts"], [])
    model = student.build_model(Model(preset="tiny", pattern="M*"), Parallel(), groups, VOCAB, mtp=False)
    with pytest.raises(ConfigurationError, match=r"nvfp4 = \[experts\]: its model has no routed experts; leave"):
        quantized_teachers.store(model, ["experts"], groups, VOCAB)
    model = student.build_model(Model(**MODEL), Parallel(), groups, VOCAB, mtp=False)
    first, second = model.decoder.layers[1].mlp.experts.linear_fc1.weight.data[:2]
    first.zero_()
    zeros, _ = quantized_teachers.store(model, ["experts"], groups, VOCAB)[EXPERTS][:2]  # type: ignore[index]
    assert not zeros.dequantize().any()
    second[0, 0] = float("nan")
    with pytest.raises(ConfigurationError, match=r"nvfp4 = \[experts\]: a matrix of its checkpoint holds NaN"):
        quantized_teachers.store(model, ["experts"], groups, VOCAB)
    narrow = {"moe_ffn_hidden_size": 40}
    model = student.build_model(Model(**MODEL, override=narrow), Parallel(), groups, VOCAB, mtp=False)
    with pytest.raises(ConfigurationError, match=r"nvfp4 = \[experts\]: each rank holds 40 columns of a matrix, no"):
        quantized_teachers.store(model, ["experts"], groups, VOCAB)


def test_experts_of_numbered_parameters_are_packed_alike(groups: Groups) -> None:
    """transformer-engine numbers the experts of a layer instead of stacking them."""
    model = student.build_model(Model(**MODEL), Parallel(), groups, VOCAB, mtp=False)
    stacked = quantized_teachers.store(model, ["experts"], groups, VOCAB)
    linear = model.decoder.layers[1].mlp.experts.linear_fc1
    whole = linear.weight
    del linear.weight
    for number, weight in enumerate(whole):
        setattr(linear, f"weight{number}", torch.nn.Parameter(weight.detach().clone()))
    numbered = quantized_teachers.store(model, ["experts"], groups, VOCAB)
    name = EXPERTS
    found = [m for m in linear_weights.matrices(model, groups) if m.parameter_name.startswith(name)]
    assert [m.name.split(".")[5] for m in found] == [str(i) for i in range(8)] and found[3].row is None
    for number, expert in enumerate(stacked[name]):
        (other,) = numbered[f"{name}{number}"]
        assert torch.equal(expert.codes, other.codes) and torch.equal(expert.global_scale, other.global_scale)
    before = {n: t.clone() for n, t in quantized_teachers.tensors(model)}
    quantized_teachers.fill(model, numbered)
    after = dict(quantized_teachers.tensors(model))
    assert {n for n in before if not torch.equal(before[n], after[n])} == {
        *(f"{name}{i}" for i in range(8)),
        name.replace("fc1", "fc2"),
    }
