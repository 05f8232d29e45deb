"""The update and the output layer: forms of the objective, and the weight's gradient on its way to mcore's buffer."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from small_batches import learner_of, micro_batches

from megatron_mopd.config import Config, ConfigurationError, Mopd, build_config
from megatron_mopd.objectives.mopd import mopd_loss, mopd_objective, mopd_of_logits
from megatron_mopd.parallel import Groups
from megatron_mopd.predictions import Predictions
from megatron_mopd.records import Counts, MicroBatch, ObjectiveOutput
from megatron_mopd.settings import overlay
from megatron_mopd.update import Objective, of_logprobs
from mopd_kernels import reference
from mopd_kernels.testing import LargestTensor


def configuration(**changes: Any) -> Config:
    """Plain gradient descent: what a step adds to the weights is proportional to the gradient that it took."""
    common = {
        "run": {"dir": "unused", "steps": 2},
        "model": {"pattern": "M*E/*E", "max_sequence_length": 32},
        "teachers": {"t": {"checkpoint": "unused", "domains": ["d"]}},
        "optimizer": {
            "lr": 0.01,
            "warmup_steps": 0,
            "clip_grad": 1e9,
            "distributed": False,
            "options": {"optimizer": "sgd", "sgd_momentum": 0.0},
        },
        "objective": {"type": "mopd", "importance_low": 0.05, "importance_high": 20.0},
    }
    return build_config(overlay(common, changes))


def objective_of(config: Config, update: str) -> Objective:
    settings = config.objective
    assert isinstance(settings, Mopd)
    return {
        "objective": lambda p, mb, counts: mopd_objective(p, mb, settings, counts),
        "logits": lambda p, mb, counts: mopd_of_logits(p, mb, settings, counts),
        "logprob": of_logprobs(lambda logprobs, mb, counts: mopd_loss(logprobs, mb, settings, counts)),
    }[update]


# ------------------------------------------------------------------ forms

FORMS = [(update, impl) for update in ("objective", "logprob", "logits") for impl in ("reference", "triton")]
SETTINGS: dict[str, dict[str, Any]] = {
    "eq3": {},
    "released": {
        "preset": "ultra_released",
        "advantage_clip": 0.8,
    },  # a gate over sequences, needed before any gradient
}


def one_step(changes: dict[str, Any], update: str, impl: str) -> dict[str, Any]:
    config = configuration(**overlay(changes, {"kernels": {"impl": impl}}))
    learner = learner_of(config)
    start = {n: p.detach().clone() for n, p in learner.module.named_parameters()}
    out = learner.step(micro_batches(learner.groups, 5), objective_of(config, update))
    names = out.per_token[0][1].keys()
    return {
        "losses": (out.loss, out.mtp_loss, out.grad_norm, out.mtp_grad_norm),
        "per_token": {name: torch.cat([values[name] for _, values in out.per_token]) for name in names},
        "change": {n: p.detach() - start[n] for n, p in learner.module.named_parameters()},
    }


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize(("world", "layout"), [(1, {}), (2, {"tensor": 2})], ids=["one", "tp2"])
@pytest.mark.parametrize(("update", "impl"), FORMS[1:], ids=map("_".join, FORMS[1:]))
def test_every_form_takes_the_same_step(
    ranks: Any, update: str, impl: str, world: int, layout: dict[str, int], settings: str
) -> None:
    changes = {"parallel": layout, "objective": SETTINGS[settings]}
    expected = ranks(world, one_step, changes, *FORMS[0])
    for got, want in zip(ranks(world, one_step, changes, update, impl), expected, strict=True):
        assert got["losses"] == pytest.approx(want["losses"], rel=1e-5)
        assert want["per_token"].keys() - got["per_token"].keys() == ({"entropy"} if update == "logprob" else set())
        for name, values in got["per_token"].items():
            torch.testing.assert_close(values, want["per_token"][name], rtol=1e-4, atol=2e-5, msg=name)
        for name, change in want["change"].items():
            assert (got["change"][name] - change).norm() <= 1e-4 * change.norm() + 1e-7, name
        assert 0 < want["per_token"]["mask"].mean() < 1 and want["per_token"]["entropy"].min() > 4


@pytest.mark.parametrize("update", ["objective", "logprob", "logits"])
def test_logits_are_never_in_memory_unless_asked_for(update: str, groups: Groups, monkeypatch: Any) -> None:
    """Not in the update, not for the MTP heads, not for prox; a vocabulary so large that nothing else comes near."""
    monkeypatch.setattr(reference, "CHUNK_ELEMENTS", 1 << 16)
    config, vocab = configuration(), 4001
    learner = learner_of(config, vocab)
    (packed,) = micro_batches(groups, 240, count=240)
    logits = len(packed.targets) * vocab
    with LargestTensor() as prox:
        learner.with_prox([packed])
    with LargestTensor() as step:
        learner.step([packed], objective_of(config, update))
    assert prox.elements < logits / 2
    assert step.elements == logits if update == "logits" else step.elements < logits / 2


# ------------------------------------------------------------------ the weight's gradient and mcore's buffer


def by_autograd(objective: Objective) -> Objective:
    """The same over a weight that is no parameter, so that its gradient takes autograd's way to the buffer."""
    return lambda p, mb, counts: objective(dataclasses.replace(p, weight=1.0 * p.weight), mb, counts)


def two_steps(changes: dict[str, Any], update: str, direct: bool) -> tuple[dict[str, torch.Tensor], set[bool]]:
    """What two steps of several micro-batches, with a look at prox between them, add to this rank's weights; and
    whether a forward moved ``main_grad``."""
    config = configuration(**changes)
    learner = learner_of(config)
    packed = micro_batches(learner.groups, 3)
    inner = objective_of(config, update) if direct else by_autograd(objective_of(config, update))
    start = {n: p.detach().clone() for n, p in learner.module.named_parameters()}
    moved = set()

    def objective(predictions: Predictions, micro_batch: MicroBatch, counts: Counts) -> ObjectiveOutput:
        before = predictions.weight.main_grad.clone()
        output = inner(predictions, micro_batch, counts)
        moved.add(not torch.equal(before, predictions.weight.main_grad))
        return output

    for _ in range(2):
        assert learner.step(packed, objective).grad_norm > 0
        learner.with_prox(packed)
    return {n: p.detach() - start[n] for n, p in learner.module.named_parameters()}, moved


ADAM = {"lr": 1e4, "eps": 1e6, "distributed": True, "options": {"optimizer": "adam"}}  # so large an eps keeps it linear
OVERLAP = {"ddp": {"overlap_grad_reduce": True, "bucket_size": 5000}}
RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
ROUTES: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "mtp_off": (1, {"mtp": {"train": False}}),
    "recompute": (1, {"model": {"override": RECOMPUTE}}),
    "loss_scale": (1, {"optimizer": overlay(ADAM, {"options": {"loss_scale": 8.0}})}),
    "dropped_sequences": (1, {"objective": {"sequence_error_threshold": 2.0}}),
    "dp2": (2, {}),
    "dp2_overlap": (2, {"optimizer": OVERLAP}),
    "dp2_distributed": (2, {"optimizer": ADAM}),
    "dp2_distributed_overlap": (2, {"optimizer": ADAM | OVERLAP}),
    "dp2_bf16": (2, {"optimizer": ADAM | OVERLAP | {"lr": 5e4}, "run": {"precision": "bf16"}}),
    "triton": (1, {"kernels": {"impl": "triton"}}),
    "tp2": (2, {"parallel": {"tensor": 2}}),
    "tp2_triton": (2, {"parallel": {"tensor": 2}, "kernels": {"impl": "triton"}}),
    "tp2_recompute": (2, {"parallel": {"tensor": 2}, "model": {"override": RECOMPUTE}}),
    "tp2_overlap_dp2": (4, {"parallel": {"tensor": 2}, "optimizer": OVERLAP}),
}


def direct_and_by_autograd(changes: dict[str, Any]) -> tuple[Any, Any]:
    return two_steps(changes, "objective", direct=True), two_steps(changes, "logprob", direct=False)


@pytest.mark.parametrize("name", ROUTES)
def test_each_gradient_reaches_the_buffer_once(ranks: Any, name: str) -> None:
    """The fused objective adds the weight's gradient in forward; autograd's way over mcore's hook is the truth."""
    world, changes = ROUTES[name]
    tolerance = 0.1 if "bf16" in name else 1e-5  # weights and, by autograd, gradients are rounded to bf16
    for (fused, moved), (plain, unmoved) in ranks(world, direct_and_by_autograd, changes):
        assert True in moved and True not in unmoved
        for parameter, change in plain.items():
            error = (fused[parameter] - change).float().norm()
            assert error <= tolerance * change.float().norm() + 1e-6, f"{parameter}: {error:.1e}"
        assert plain["output_layer.weight"].any()


def two_terms(direct: bool, update: str) -> torch.Tensor:
    """What a step on the objective and a bonus on the logits' entropy adds to the output weight."""
    config = configuration()
    learner = learner_of(config)
    first = objective_of(config, update)

    def objective(predictions: Predictions, micro_batch: MicroBatch, counts: Counts) -> ObjectiveOutput:
        if not direct:
            predictions = dataclasses.replace(predictions, weight=1.0 * predictions.weight)
        output = first(predictions, micro_batch, counts)
        log_p = predictions.logits().log_softmax(-1)
        return dataclasses.replace(output, loss=output.loss + (log_p.exp() * log_p).sum() / counts.tokens)

    weight = learner.module.output_layer.weight
    start = weight.detach().clone()
    learner.step(micro_batches(learner.groups, 3), objective)
    return weight.detach() - start


@pytest.mark.parametrize("update", ["objective", "logprob", "logits"])
def test_terms_of_logits_and_of_log_probabilities_add_up(groups: Groups, update: str) -> None:
    """mcore's hook drops autograd's gradient of a weight once an operator has added to main_grad itself."""
    plain = two_terms(False, "logprob")
    assert (two_terms(True, update) - plain).norm() <= 1e-5 * plain.norm()


# ------------------------------------------------------------------ what cannot work


def test_triton_without_a_device_for_it_is_refused_at_start(groups: Groups, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mopd_kernels.dispatch.interpreting", lambda: False)
    with pytest.raises(ConfigurationError, match=r"kernels\.impl = triton for the student: tensors on cpu.*auto"):
        learner_of(configuration(kernels={"impl": "triton"}))
    learner_of(configuration(kernels={"impl": "auto"}))
