"""Training towards a quantized student: what forwards see, what the optimizer steps, what a checkpoint holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from megatron_mopd import batch, checkpoint, fake_quantization, linear_weights, parallel, presets, student
from megatron_mopd.config import Config, ConfigurationError, Mopd, build_config
from megatron_mopd.conversion import model_settings
from megatron_mopd.objectives.mopd import mopd_objective
from megatron_mopd.parallel import Groups
from megatron_mopd.quantization import checkpoint as quantized
from megatron_mopd.quantization import planning, recipes
from megatron_mopd.quantization.view import QuantizedWeights
from megatron_mopd.records import Prompt, Rollout, Sampling, ScoredRollout
from megatron_mopd.rollout import Sampler
from megatron_mopd.settings import overlay
from megatron_mopd.update import Learner
from mopd_kernels import nvfp4

VOCAB = 101  # odd: padded under tensor parallelism
SGD = {"optimizer": "sgd", "sgd_momentum": 0.0}
RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


def configuration(**changes: Any) -> Config:
    common = {
        "run": {"dir": "unused", "steps": 2},
        "model": {"preset": "tiny", "pattern": "ME*-/*E", "max_sequence_length": 32},
        "teachers": {"t": {"checkpoint": "unused", "domains": ["d"]}},
        "optimizer": {"lr": 0.01, "warmup_steps": 0, "clip_grad": 1e9, "options": SGD, "distributed": False},
        "quantization": {"train": "ultra-ptq"},
    }
    return build_config(overlay(common, changes))


def build(config: Config) -> Learner:
    groups = parallel.initialize(config.parallel, 7)
    precision = presets.resolve_precision(config.run.precision, groups.device)
    model = student.build_model(config.model, config.parallel, groups, VOCAB, precision, mtp=True)
    return Learner(model, config, groups, VOCAB, pad_token=0)


def rollouts() -> list[ScoredRollout]:
    g = torch.Generator().manual_seed(3)
    scored = []
    for i in range(9):
        behav = -4.6 + 0.3 * torch.randn(1 + (3 * i) % 7, generator=g)
        rollout = Rollout(
            prompt=Prompt(
                id=str(i), domain="d", messages=(), tokens=tuple(torch.randint(0, VOCAB, (3 + i % 3,)).tolist())
            ),
            sample=0,
            completion=torch.randint(0, VOCAB, behav.shape, generator=g),
            finish="length",
            behav_logprobs=behav,
        )
        scored.append(ScoredRollout(rollout=rollout, teacher="t", teacher_logprobs=behav + 0.5))
    return scored


def step(learner: Learner) -> None:
    groups, settings = learner.groups, learner.config.objective
    assert isinstance(settings, Mopd)
    torch.manual_seed(0)
    packed = batch.pack(rollouts()[groups.dp_rank :: groups.dp_size], 3, 0, length_multiple=groups.tp_size)
    assert learner.step(packed, lambda p, mb, counts: mopd_objective(p, mb, settings, counts)).grad_norm > 0


def weights(learner: Learner) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in learner.module.named_parameters()}


def originals(learner: Learner) -> dict[str, torch.Tensor]:
    with learner.originals():
        return weights(learner)


def expected(name: str, original: torch.Tensor) -> torch.Tensor:
    """A parameter as ultra-ptq stores it, expert by expert."""
    if ".mlp.experts." in name and name.startswith("decoder."):
        form = nvfp4.Format(numerics="modelopt")
        return torch.stack([nvfp4.quantize(w, form).dequantize() for w in original])
    fp8 = ("shared_experts.linear_fc", ".in_proj.weight", ".out_proj.weight", ".mlp.linear_fc1.weight", "linear_fc2.w")
    if name.startswith("decoder.") and any(part in name for part in fp8):
        scale = original.abs().max() / 448
        return (original / scale).to(torch.float8_e4m3fn).float() * scale
    return original


def test_forwards_see_the_recipes_values_and_the_optimizer_the_originals(groups: Groups) -> None:
    learner, plain = build(configuration()), build(configuration(quantization={"train": None}))
    start = weights(plain)
    for name, seen in weights(learner).items():
        assert torch.equal(seen, expected(name, start[name])), name
        assert torch.equal(originals(learner)[name], start[name]), name
    changed = [n for n, w in weights(learner).items() if not torch.equal(w, start[n])]
    assert len(changed) == 8  # both of routed, shared and dense linears and of the Mamba layer
    # Straight-through: the step is that of a model that simply has the quantized weights.
    with torch.no_grad():
        for name, parameter in plain.module.named_parameters():
            parameter.copy_(expected(name, start[name]))
    before = weights(plain)
    step(learner)
    step(plain)
    after = originals(learner)
    for name, moved in weights(plain).items():
        torch.testing.assert_close(after[name] - start[name], moved - before[name], rtol=1e-4, atol=2e-8, msg=name)
        assert torch.equal(weights(learner)[name], expected(name, after[name])), name
    assert not torch.equal(after["decoder.layers.1.mlp.experts.linear_fc1.weight"], start[changed[0]])


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "dp2": (2, {}),
    "tp2": (2, {"tensor": 2}),
    "ep2": (2, {"expert": 2}),
    "tp2_ep2": (4, {"tensor": 2, "expert": 2}),
    "etp2": (2, {"tensor": 2, "expert_tensor": 2, "dispatcher": "allgather"}),
    "pp2": (2, {"pipeline": 2}),
}


def identity(root: str, layout: dict[str, Any], name: str) -> tuple[str, str]:
    """The checkpoint_id of what forwards see, which no layout changes, and of the originals."""
    learner = build(configuration(parallel=layout, quantization={"four_over_six": "mse"}))
    seen = save(Path(root) / name / "seen", learner)
    with learner.originals():
        return seen, save(Path(root) / name / "originals", learner)


def save(path: Path, learner: Learner) -> str:
    written = checkpoint.save(path, 1, learner.model, None, learner.groups, state={}, manifest={"vocab_size": VOCAB})
    return checkpoint.read_manifest(written)["checkpoint_id"]


def test_every_layout_quantizes_to_the_same_values(ranks: Any, tmp_path: Path) -> None:
    (one,) = ranks(1, identity, str(tmp_path), {}, "one")
    assert one[0] != one[1]
    for name, (world, layout) in LAYOUTS.items():
        assert ranks(world, identity, str(tmp_path), layout, name) == [one] * world, name


def still(changes: dict[str, Any]) -> dict[str, bool]:
    """Whether steps of learning rate 0 leave the originals and what is seen of them as they were, bit for bit."""
    learner = build(configuration(**changes))
    before, seen = originals(learner), weights(learner)
    for _ in range(2):
        step(learner)
    after, then = originals(learner), weights(learner)
    return {n: torch.equal(before[n], after[n]) and torch.equal(seen[n], then[n]) for n in before}


ADAM = {"lr": 0.0, "distributed": True, "options": {"optimizer": "adam"}}
STILL: dict[str, tuple[int, dict[str, Any]]] = {
    "sgd": (1, {"optimizer": {"lr": 0.0}}),
    "dp2_distributed": (2, {"optimizer": ADAM}),
    "dp2_bf16_overlap": (2, {"optimizer": ADAM | {"ddp": {"overlap_grad_reduce": True}}, "run": {"precision": "bf16"}}),
    "tp2_recompute": (2, {"optimizer": ADAM, "parallel": {"tensor": 2}, "model": {"override": RECOMPUTE}}),
    "ep2": (2, {"optimizer": ADAM, "parallel": {"expert": 2}, "quantization": {"activations": True}}),
}


@pytest.mark.parametrize("name", STILL)
def test_originals_come_back_bit_for_bit(ranks: Any, name: str) -> None:
    world, changes = STILL[name]
    for same in ranks(world, still, changes):
        assert same and all(same.values()), [n for n, equal in same.items() if not equal]


def two_steps(changes: dict[str, Any]) -> dict[str, torch.Tensor]:
    learner = build(configuration(**changes))
    for _ in range(2):
        step(learner)
    return originals(learner)


LINEAR = {"lr": 1e4, "eps": 1e6, "options": {"optimizer": "adam"}}  # so large an eps keeps Adam linear
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True, "bucket_size": 5000}


@pytest.mark.parametrize(
    ("world", "changes"),
    [
        (1, {"model": {"override": RECOMPUTE}}),
        (2, {"optimizer": {"distributed": True}}),
        (2, {"optimizer": {"distributed": True, "ddp": OVERLAP}}),
    ],
    ids=["recompute", "distributed", "overlap"],
)
def test_recomputation_and_overlap_change_nothing(ranks: Any, world: int, changes: dict[str, Any]) -> None:
    asked = {"quantization": {"activations": True}, "optimizer": LINEAR}
    (expected,) = ranks(1, two_steps, asked)
    for found in ranks(world, two_steps, overlay(asked, changes)):
        for name, weight in found.items():
            torch.testing.assert_close(weight, expected[name], rtol=1e-4, atol=1e-5, msg=name)


def test_a_checkpoint_holds_the_originals_and_is_gone_on_from(groups: Groups, tmp_path: Path) -> None:
    config = configuration(optimizer={"distributed": True, "options": {"optimizer": "adam"}})
    learner = build(config)
    step(learner)
    with learner.originals():
        manifest = {"vocab_size": VOCAB}
        checkpoint.save(tmp_path, 1, learner.model, learner.optimizer, groups, state={}, manifest=manifest)
    again = build(config)
    with again.originals():
        checkpoint.load(tmp_path, again.model, again.optimizer, groups)
    for one in (originals, weights):
        assert all(torch.equal(a, b) for a, b in zip(one(learner).values(), one(again).values(), strict=True))
    with pytest.raises(KeyboardInterrupt), again.originals():
        raise KeyboardInterrupt  # what goes wrong inside loses nothing
    assert all(torch.equal(a, b) for a, b in zip(originals(learner).values(), originals(again).values(), strict=True))
    for each in (learner, again):
        step(each)
    assert all(torch.equal(a, b) for a, b in zip(originals(learner).values(), originals(again).values(), strict=True))


@pytest.mark.parametrize("four_over_six", [None, "mse"])
def test_the_quantized_checkpoint_holds_what_training_saw(
    groups: Groups, tmp_path: Path, four_over_six: Literal["mse"] | None
) -> None:
    config = configuration(quantization={"four_over_six": four_over_six})
    learner = build(config)
    step(learner)
    with learner.originals():
        save(tmp_path / "student", learner)
    like = tmp_path / "like"
    like.mkdir()
    model = config.model.model_copy(update={"vocab_size": VOCAB})
    (like / "config.json").write_text(json.dumps(model_settings.config_of(model, {"dtype": "float32"})))
    options = planning.Options(recipe=recipes.RECIPES["ultra-ptq"], four_over_six=four_over_six)
    quantized.quantize(tmp_path / "student", tmp_path / "packed", options, like=like)
    packed, compared = QuantizedWeights(tmp_path / "packed", torch.float32), 0
    for matrix in linear_weights.matrices(learner.model, groups):
        if recipes.RECIPES["ultra-ptq"].assign([matrix.name])[matrix.name].format in recipes.QUANTIZED:
            back = torch.empty(packed.entries[matrix.name].shape)
            packed.read(matrix.name, 0, memoryview(back.numpy().reshape(-1)).cast("B"))
            assert torch.equal(back, matrix.weight), matrix.name
            compared += 1
    packed.close()
    assert compared == 2 * (8 + 1 + 1 + 1)  # experts, shared experts, dense, Mamba


# ------------------------------------------------------------------ activations


def test_rows_are_rounded_alone_and_their_gradient_passes(groups: Groups) -> None:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(37, 64, generator=g) * torch.logspace(-15, 15, 37)[:, None]
    x[5] = 0
    x[6, :16] = 0
    x.requires_grad_()
    rounded = fake_quantization.quantized_rows(x)
    assert torch.equal(rounded, torch.cat([fake_quantization.quantized_rows(row[None]) for row in x]))
    blocks, error = (t.detach().unflatten(1, (4, 16)) for t in (x, rounded - x))
    # Half the widest step of e2m1 is 1/6 of the block's maximum, and e4m3 moves a block's scale by up to 1/16.
    assert (error.abs().amax(-1) <= (1 / 6 + 1 / 16) * blocks.abs().amax(-1)).all()
    assert ((error.norm(dim=(1, 2)) / blocks.norm(dim=(1, 2))).nan_to_num(0.1) - 0.1).abs().max() < 0.05
    assert not rounded[5].any()
    up = torch.randn(37, 64, generator=g)
    rounded.backward(up)
    assert torch.equal(x.grad, up)
    assert fake_quantization.quantized_rows(torch.empty(0, 32)).shape == (0, 32)


def activations(layout: dict[str, Any], asked: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probabilities of a training forward, and of sampling beside those that the same forward gives its tokens."""
    learner = build(configuration(parallel=layout, quantization={"activations": asked}, mtp={"train": False}))
    groups = learner.groups
    torch.manual_seed(0)
    even = learner._even(batch.pack(rollouts(), 3, 0, length_multiple=groups.tp_size))
    forward = torch.cat(learner.logprobs(even))
    prompts = [(item.rollout.prompt, 0) for item in rollouts()]
    sampling = Sampling(temperature=1.0, max_new_tokens=5, stop_tokens=())
    drawn = Sampler(learner.module, groups, 32, valid_vocab=VOCAB).generate(prompts, sampling, 5, 0, 4)
    packed = learner._even(batch.pack(drawn, 3, 0, length_multiple=groups.tp_size))
    behav = torch.cat([r.behav_logprobs for r in drawn if r.behav_logprobs is not None])
    return forward, behav, torch.cat(learner.logprobs(packed))


def test_activations_are_quantized_alike_on_every_layout_and_while_sampling(ranks: Any) -> None:
    (one,), (without,) = ranks(1, activations, {}, True), ranks(1, activations, {}, False)
    assert 1e-3 < (one[0] - without[0]).abs().max() < 1
    for layout in ({"tensor": 2}, {"expert": 2}, LAYOUTS["etp2"][1]):
        for forward, behav, again in ranks(2, activations, layout, True):
            # A last bit of fp32 sends some elements to the next code.
            assert (forward - one[0]).abs().median() < 1e-4 and (forward - one[0]).abs().max() < 0.05
            assert (behav - again).abs().median() < 1e-4 and (behav - again).abs().max() < 0.05


# ------------------------------------------------------------------ refusals

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": ({"quantization": {"train": "ultra-qtp"}}, "recipe 'ultra-qtp': unknown; did you mean 'ultra-ptq'"),
    "nothing": (
        {"model": {"pattern": "*"}},
        "recipe ultra-ptq quantizes no matrix of this model .*leave the setting out",
    ),
    "block": (
        {"model": {"override": {"moe_latent_size": 40}}},
        r"experts.0.up_proj.weight in nvfp4, but each of 1 ranks holds 40 of its columns, no multiple of 16",
    ),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_trained_so_is_refused(changes: dict[str, Any], message: str, groups: Groups) -> None:
    with pytest.raises(ConfigurationError, match=message):
        build(configuration(**changes))


def test_interleaved_attention_and_settings_without_a_recipe_are_refused(groups: Groups, tmp_path: Path) -> None:
    table = tmp_path / "all.yaml"
    table.write_text(
        "name: all\nsource: none\nrules:\n  - {what: all, match: ['*'], format: nvfp4, reason: the smallest}\n"
    )
    with pytest.raises(ConfigurationError, match=r"k_proj.weight in nvfp4, but its rows stand among .*linear_qkv"):
        build(configuration(quantization={"train": str(table)}, model={"pattern": "*"}))
    with pytest.raises(ConfigurationError, match=r"quantization: four_over_six and activations .* name a recipe there"):
        configuration(quantization={"train": None, "activations": True})
    learner = build(configuration(quantization={"train": None}))
    learner.module.config.fp8 = "e4m3"  # mcore itself refuses it without transformer-engine
    with pytest.raises(ConfigurationError, match=r"fp8 = 'e4m3' with quantization.train: both .* leave one of them"):
        fake_quantization.of(configuration(), learner.model, groups)


def test_matrices_are_those_of_a_checkpoint(groups: Groups) -> None:
    learner = build(configuration())
    found = {m.name: m for m in linear_weights.matrices(learner.model, groups)}
    assert {
        "lm_head.weight",
        "backbone.layers.2.mixer.q_proj.weight",
        "mtp.layers.1.mixer.experts.7.up_proj.weight",
    } < (found.keys())
    expert = found["backbone.layers.1.mixer.experts.3.down_proj.weight"]
    whole = learner.module.get_parameter("decoder.layers.1.mlp.experts.linear_fc2.weight")
    assert expert.weight.data_ptr() == whole[3].data_ptr() and tuple(expert.weight.shape) == (64, 128)
    assert {m.parameter_name for m in found.values()} == {
        n for n, p in learner.module.named_parameters() if p.dim() > 1 and n.endswith(".weight")
    }
    assert recipes.RECIPES["ultra-ptq"].assign(found)["lm_head.weight"].format == "bf16"
