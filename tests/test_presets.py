"""Published dimensions, the counts that follow from them, patterns, and the checks before a run."""

from __future__ import annotations

import dataclasses
import logging
from itertools import combinations
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mopd import presets
from megatron_mopd.config import ConfigurationError, Model, Parallel, build_config
from megatron_mopd.pattern import Pattern, balanced, parse_pattern
from megatron_mopd.presets import PRESETS, parameter_count, resolve

MOPD: dict[str, Any] = {
    "run": {"dir": "runs/x", "steps": 1},
    "teachers": {"t": {"checkpoint": "c", "domains": ["d"]}},
    "rollout": {"max_new_tokens": 16},
}


def _config(**sections: Any) -> Any:
    return build_config(MOPD | sections)


# ------------------------------------------------------------------ counts

PRINTED = {  # billions: trunk, MTP block, active without the input embedding
    "nano-30b-a3b": ("31.578", "0.000", "3.228"),
    "super-120b-a12b": ("120.669", "2.942", "12.233"),
    "ultra-550b-a55b": ("549.309", "11.216", "54.985"),
}


@pytest.mark.parametrize("name", PRINTED)
def test_counts_agree_with_the_published_ones_to_the_printed_digit(name: str) -> None:
    count = parameter_count(PRESETS[name])
    assert tuple(f"{n / 1e9:.3f}" for n in (count.main, count.mtp, count.active)) == PRINTED[name]


def test_ultra_has_the_size_of_the_published_checkpoint() -> None:
    """Its index says 1,121,049,257,984 bytes: two a parameter, but four for each of 49 layers' 512 expert biases."""
    count = parameter_count(PRESETS["ultra-550b-a55b"])
    assert 2 * (count.main + count.mtp) + 2 * 49 * 512 == 1_121_049_257_984


@pytest.mark.parametrize(
    ("name", "layers"),
    [("nano-30b-a3b", (23, 23, 6)), ("super-120b-a12b", (40, 40, 8)), ("ultra-550b-a55b", (48, 48, 12))],
)
def test_patterns_have_the_published_layers(name: str, layers: tuple[int, int, int]) -> None:
    parsed = parse_pattern(PRESETS[name].pattern)
    assert tuple(parsed.main.count(symbol) for symbol in "ME*") == layers
    assert (parsed.mtp, parsed.depths) == (("", 0) if name.startswith("nano") else ("*E", 2))


def test_attention_of_ultra_stands_where_published() -> None:
    main = parse_pattern(PRESETS["ultra-550b-a55b"].pattern).main
    assert [i for i, symbol in enumerate(main) if symbol == "*"] == [7, 14, 23, 32, 39, 48, 57, 64, 73, 82, 89, 98]


def _parameters(model: torch.nn.Module) -> tuple[int, int]:
    """(trunk, MTP) of a built model, expert biases included as in a checkpoint."""
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    sizes |= {name: b.numel() for name, b in model.named_buffers() if name.endswith("expert_bias")}
    mtp = sum(size for name, size in sizes.items() if name.startswith("mtp."))
    return sum(sizes.values()) - mtp, mtp


@pytest.mark.parametrize(
    ("pattern", "override"),
    [
        (None, {}),
        ("M", {}),
        ("*M", {"num_query_groups": 4}),
        ("E-", {"moe_latent_size": None}),
        ("ME/*E", {"num_moe_experts": 4}),
        ("M*/M-/M-/M-", {"mamba_num_groups": 4}),
    ],
)
def test_count_of_tiny_is_the_built_models(groups: Any, pattern: str | None, override: dict[str, Any]) -> None:
    from megatron_mopd import student
    from megatron_mopd.config import Parallel

    model = Model(pattern=pattern, override=override)
    built = student.build_model(model, Parallel(), groups, PRESETS["tiny"].vocab_size, "fp32", mtp=True)
    count = parameter_count(model)
    assert _parameters(built) == (count.main, count.mtp)


def test_count_of_nano_is_the_built_models_on_the_meta_device(groups: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_mopd import student
    from megatron_mopd.config import Parallel

    meta = torch.device("meta")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: meta)
    model = Model(preset="nano-30b-a3b", override={"perform_initialization": False})
    elsewhere = dataclasses.replace(groups, device=meta)
    with meta:
        built = student.build_model(model, Parallel(), elsewhere, PRESETS["nano-30b-a3b"].vocab_size, "bf16", mtp=True)
    assert all(p.is_meta for p in built.parameters())
    assert _parameters(built) == (parameter_count(model).main, 0)


def test_tiny_is_tiny_and_has_every_kind_of_layer() -> None:
    count = parameter_count(PRESETS["tiny"])
    assert 0.5e6 < count.main < 1e6
    assert set(parse_pattern(PRESETS["tiny"].pattern).main) == set("M*E-")


@pytest.mark.parametrize("name", PRESETS)
def test_fields_are_mcores(name: str) -> None:
    from megatron.core.transformer import TransformerConfig

    known = {f.name for f in dataclasses.fields(TransformerConfig)}
    fields = PRESETS[name].transformer_fields()
    assert fields.keys() <= known
    assert fields["num_layers"] == len(parse_pattern(PRESETS[name].pattern).main)


def test_initialisation_follows_the_familys_rule() -> None:
    for preset in PRESETS.values():
        assert preset.init_method_std == pytest.approx((0.8 / preset.hidden_size) ** 0.5, rel=0.01)


# ------------------------------------------------------------------ patterns


def test_pattern_with_stages_and_depths() -> None:
    assert parse_pattern("MEM*|E-/*E/*E") == Pattern(stages=("MEM*", "E-"), mtp="*E", depths=2)
    assert parse_pattern("MEM*|E-/*E/*E").main == "MEM*E-"


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.text("ME*-", min_size=1, max_size=6), min_size=1, max_size=4),
    st.text("ME*-", min_size=1, max_size=3),
    st.integers(0, 3),
)
def test_patterns_are_read_back(stages: list[str], mtp: str, depths: int) -> None:
    parsed = parse_pattern("|".join(stages) + f"/{mtp}" * depths)
    assert parsed == Pattern(stages=tuple(stages), mtp=mtp if depths else "", depths=depths)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("MEX*", "'X' at position 2 is no layer; use M (Mamba-2)"),
        ("ME ME", "' ' at position 2"),
        ("", "is empty"),
        ("M||E", "is empty"),
        ("ME/", "is empty"),
        ("/*E", "is empty"),
        ("ME/*E/E*", "MTP depths ['*E', 'E*'] differ"),
        ("ME/*|E", "| stands in an MTP depth"),
    ],
)
def test_bad_patterns_are_explained(text: str, said: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        parse_pattern(text)
    assert said in str(caught.value) and repr(text) in str(caught.value)


# ------------------------------------------------------------------ resolve


def test_resolve_applies_pattern_vocabulary_and_dimensions() -> None:
    preset = resolve(Model(pattern="M*", vocab_size=99, override={"hidden_size": 64, "recompute_granularity": "full"}))
    assert (preset.pattern, preset.vocab_size, preset.hidden_size) == ("M*", 99, 64)
    assert preset.transformer_fields()["num_layers"] == 2
    assert "recompute_granularity" not in preset.transformer_fields()  # the student's to pass on


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ({"num_layers": 4}, "model.override.num_layers = 4"),
        ({"mtp_num_layers": 1}, "model.override.mtp_num_layers = 1"),
        ({"hidden_size": "64"}, "model.override.hidden_size = '64': must be a positive int"),
        ({"hidden_size": 0}, "must be a positive int"),
        ({"num_moe_experts": None}, "must be a positive int"),
        ({"num_moe_experts": True}, "must be a positive int"),
        ({"moe_latent_size": -1}, "must be a positive int or null"),
        ({"init_method_std": "small"}, "must be a positive float"),
    ],
)
def test_bad_overrides_of_dimensions_are_explained(override: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        resolve(Model(override=override))
    assert said in str(caught.value)


# ------------------------------------------------------------------ check


@pytest.mark.parametrize(
    ("model", "parallel", "said"),
    [
        ({}, {"tensor": 3}, ["parallel.tensor = 3", "hidden_size = 128", "1, 2 ways"]),
        ({"pattern": "*"}, {"tensor": 8}, ["parallel.tensor = 8", "num_attention_heads = 4"]),
        (
            {"pattern": "*", "override": {"num_attention_heads": 12, "num_query_groups": 3}},
            {"tensor": 4},
            ["parallel.tensor = 4", "num_query_groups = 3"],
        ),
        ({"pattern": "M"}, {"tensor": 16}, ["parallel.tensor = 16", "mamba_num_heads = 8"]),
        ({"pattern": "M"}, {"tensor": 4}, ["parallel.tensor = 4", "mamba_num_groups = 2"]),
        (
            {"pattern": "E", "override": {"moe_shared_expert_intermediate_size": 126}},
            {"tensor": 4},
            ["parallel.tensor = 4", "moe_shared_expert_intermediate_size = 126", "1, 2 ways"],
        ),
        ({"pattern": "-", "override": {"ffn_hidden_size": 130}}, {"tensor": 4}, ["ffn_hidden_size = 130", "1, 2 ways"]),
        ({}, {"expert": 3}, ["parallel.expert = 3", "num_moe_experts = 8", "1, 2, 4, 8 ways"]),
        ({"pattern": "M*"}, {"expert": 2}, ["parallel.expert = 2", "no E layer"]),
        ({}, {"expert_tensor": 3}, ["parallel.expert_tensor = 3", "moe_ffn_hidden_size = 128"]),
        ({"pattern": "M*|E"}, {}, ["model.pattern = 'M*|E'", "2 pipeline stages", "set parallel.pipeline to 2"]),
        (
            {"pattern": "M|*|E/*E"},
            {"pipeline": 2},
            ["3 pipeline stages", "parallel.pipeline = 2;", "leave out every |"],
        ),
        ({}, {"pipeline": 7}, ["parallel.pipeline = 7", "6 layers", "6 or less"]),
        ({}, {"pipeline": 2, "dispatcher": "allgather"}, ["parallel.dispatcher = 'allgather'", "alltoall"]),
        ({"pattern": "M*-"}, {"pipeline": 2, "dispatcher": "allgather"}, ["parallel.dispatcher = 'allgather'"]),
        ({"pattern": "MEE|M*"}, {"pipeline": 2, "expert": 2}, ["no E layer", "parallel.expert = 2"]),
        ({}, {"pipeline": 3, "tensor": 2}, ["no E layer", "parallel.expert_tensor to 2"]),
        ({"override": {"num_query_groups": 3}}, {}, ["num_query_groups = 3", "num_attention_heads = 4", "tiny has 2"]),
        ({"override": {"mamba_num_groups": 3}}, {}, ["mamba_num_groups = 3", "mamba_num_heads = 8"]),
        ({"override": {"moe_router_topk": 9}}, {}, ["moe_router_topk = 9", "num_moe_experts = 8"]),
        ({"pattern": "MQ"}, {}, ["'Q' at position 1"]),
        ({"max_sequence_length": 16}, {}, ["rollout.max_new_tokens = 16", "model.max_sequence_length = 16"]),
    ],
)
def test_check_explains(model: dict[str, Any], parallel: dict[str, Any], said: list[str]) -> None:
    with pytest.raises(ConfigurationError) as caught:
        presets.check(_config(model=model, parallel=parallel))
    for text in said:
        assert text in str(caught.value)


@pytest.mark.parametrize(
    ("model", "parallel", "said"),
    [
        ({"pattern": "M|*|E"}, {"pipeline": 2}, "model.pattern = 'M|*|E' has 3 pipeline stages"),
        ({"override": {"hidden_size": 130}}, {"tensor": 4}, "parallel.tensor = 4: does not divide hidden_size = 130"),
        ({"override": {"num_moe_experts": 6}}, {"expert": 4}, "parallel.expert = 4: does not divide num_moe_experts"),
    ],
)
def test_check_looks_at_teachers_too(model: dict[str, Any], parallel: dict[str, Any], said: str) -> None:
    teachers = {"t": {"checkpoint": "c", "domains": ["d"], "model": model}}
    student = {"override": {"num_query_groups": 4, "mamba_num_groups": 4}}
    with pytest.raises(ConfigurationError) as caught:
        presets.check(_config(model=student, parallel=parallel, teachers=teachers))
    assert str(caught.value).startswith(f"teachers.t: {said}")
    presets.check(_config(model=student, parallel=parallel))


@pytest.mark.parametrize(
    ("model", "parallel"),
    [
        ({}, {}),
        ({}, {"tensor": 2, "expert": 8}),
        ({"pattern": "*"}, {"tensor": 4}),  # more ranks than key-value groups: mcore repeats the groups
        ({"preset": "ultra-550b-a55b"}, {"tensor": 8, "expert": 64}),
        ({"preset": "nano-30b-a3b"}, {"tensor": 4, "expert": 32, "expert_tensor": 2}),
        ({"preset": "ultra-550b-a55b"}, {"pipeline": 4, "tensor": 8, "expert": 16}),
        ({"pattern": "M*|E"}, {"pipeline": 2}),
    ],
)
def test_check_accepts(model: dict[str, Any], parallel: dict[str, Any]) -> None:
    presets.check(_config(model=model, parallel=parallel))


# ------------------------------------------------------------------ pipeline stages


@given(
    layers=st.lists(st.tuples(st.sampled_from("ME"), st.integers(1, 9)), min_size=1, max_size=8),
    stages=st.integers(1, 5),
    last=st.integers(0, 12),
    needed=st.sampled_from(["", "E"]),
)
def test_borders_stand_where_the_largest_stage_is_least(
    layers: list[tuple[str, int]], stages: int, last: int, needed: str
) -> None:
    main, costs = "".join(symbol for symbol, _ in layers), [cost for _, cost in layers]
    possible = []
    for borders in combinations(range(1, len(main)), stages - 1):
        ends = list(zip((0, *borders), (*borders, len(main)), strict=True))
        if all(needed in main[a:b] for a, b in ends):
            possible.append(max([sum(costs[a:b]) for a, b in ends[:-1]] + [sum(costs[ends[-1][0] :]) + last]))
    found = balanced(main, costs, stages, last=last, needed=needed)
    assert (found is None) == (not possible)
    if found is not None:
        assert "".join(found) == main and len(found) == stages and all(found) and all(needed in f for f in found)
        starts = [sum(map(len, found[:k])) for k in range(stages)]
        sums = [sum(costs[a : a + len(f)]) for a, f in zip(starts, found, strict=True)]
        assert max([*sums[:-1], sums[-1] + last]) == min(possible)


@pytest.mark.parametrize(
    ("name", "parallel", "pattern"),
    [
        ("tiny", {}, "MEM*E-/*E/*E"),
        ("tiny", {"pipeline": 2}, "MEM*E|-/*E/*E"),  # two depths with their outputs weigh as much as the trunk
        ("tiny", {"pipeline": 2, "expert": 2}, "MEM*|E-/*E/*E"),
        ("nano-30b-a3b", {"pipeline": 2}, "MEMEM*EMEMEM*EMEMEM*EMEMEM*EME|MEM*EMEMEMEM*EMEMEMEME"),
    ],
)
def test_stages_are_placed_by_what_a_token_passes_through(name: str, parallel: dict[str, int], pattern: str) -> None:
    assert presets.staged(presets.PRESETS[name], Parallel.model_validate(parallel)).pattern == pattern


# ------------------------------------------------------------------ precision


def test_auto_precision_follows_the_device_and_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "megatron_mopd"):
        assert presets.resolve_precision("auto", torch.device("cpu")) == "fp32"
        assert presets.resolve_precision("auto", torch.device("cuda")) == "bf16"
    said = [record.message for record in caplog.records]
    assert said == ["run.precision auto: fp32 on cpu", "run.precision auto: bf16 on cuda"]
    assert presets.resolve_precision("bf16", torch.device("cpu")) == "bf16"
