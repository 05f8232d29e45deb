"""The student under training: mcore's DDP, optimizer, learning-rate schedule and forward-backward schedule."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor

from megatron_mopd import batch as batches_of
from megatron_mopd import fake_quantization, identity, pipeline, student
from megatron_mopd.boosting import Boosting
from megatron_mopd.config import Config, ConfigurationError, MtpBoosting
from megatron_mopd.objectives.mtp import mtp_cross_entropy
from megatron_mopd.parallel import Groups
from megatron_mopd.predictions import Predictions, check_impl
from megatron_mopd.records import Counts, MicroBatch, ObjectiveOutput

log = logging.getLogger(__name__)

Objective = Callable[[Predictions, MicroBatch, Counts], ObjectiveOutput]
"""A share of the loss from hidden states and output weight, in whatever form suits it."""
LogprobLoss = Callable[[Tensor, MicroBatch, Counts], ObjectiveOutput]
"""The same from log-probabilities, fp32 ``[T]``, that carry the gradient."""


def of_logprobs(loss: LogprobLoss) -> Objective:
    """The objective that takes ``loss`` of log-probabilities made without logits in memory."""
    return lambda predictions, micro_batch, counts: loss(predictions.logprobs(micro_batch.targets), micro_batch, counts)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepOutput:
    """What one optimizer step leaves behind."""

    loss: float  # global; all fields are the same on every pipeline stage
    mtp_loss: float  # global, before its weight; 0 without MTP
    grad_norm: float  # the trunk's, before clipping
    mtp_grad_norm: float  # 0 without MTP
    lr: float
    per_token: Sequence[tuple[MicroBatch, Mapping[str, Tensor]]]  # this rank's micro-batches


class Learner:
    """Owns the training state of the student; one call of :meth:`step` is one optimizer step."""

    def __init__(self, model: Any, config: Config, groups: Groups, vocab_size: int, pad_token: int) -> None:
        self.config, self.groups, self.vocab_size, self.pad_token = config, groups, vocab_size, pad_token
        boosted = isinstance(config.objective, MtpBoosting)
        self.boosting = Boosting(model, config, groups, vocab_size) if boosted else None
        self.train_mtp = config.mtp.train and student.has_mtp(model) and not boosted
        if not (self.train_mtp or boosted) and student.has_mtp(model):
            model.mtp.requires_grad_(False)
        if groups.last_stage:
            check_impl(config.kernels.impl, model.output_layer.weight, "the student")
        self.model = _wrap(model, config, groups)
        self.model.broadcast_params()
        self.optimizer = _optimizer(self.model, config, groups)
        self.schedule = _schedule(self.optimizer, config)
        model.config.finalize_model_grads_func = _finalize
        model.config.grad_scale_func = self.optimizer.scale_loss
        model.config.no_sync_func = self.model.no_sync
        # From here on the parameters hold what a quantized checkpoint would give, where that is asked for.
        self.quantization = fake_quantization.of(config, self.model, groups)

    @property
    def module(self) -> Any:
        """The plain model inside DDP."""
        return self.model.module

    def originals(self) -> AbstractContextManager[None]:
        """Within the block the model holds the high-precision weights, which are what is stepped, saved and loaded."""
        return nullcontext() if self.quantization is None else self.quantization.originals()

    def weights_sha(self) -> str:
        """sha256 hex of the high-precision weights and buffers of all ranks; equal on all, comparable on one layout."""
        with self.originals():
            named = sorted([*self.module.named_parameters(), *self.module.named_buffers()], key=lambda pair: pair[0])
            own = identity.combine(identity.digest(name, tensor) for name, tensor in named)
        shares: list[Any] = [None] * self.groups.world_size
        torch.distributed.all_gather_object(shares, own, group=self.groups.world)
        return hashlib.sha256(" ".join(shares).encode()).hexdigest()

    def logprobs(self, micro_batches: Sequence[MicroBatch]) -> list[Tensor]:
        """fp32 ``[T]`` of each: its completion tokens' log-probabilities at the sampling temperature, under the current
        weights and without gradient. Every rank calls it with as many micro-batches."""
        return pipeline.read_tokens(
            self.model,
            micro_batches,
            lambda mb: self._forward(mb, mtp=False)[0].logprobs(mb.targets),
            self.groups,
        )

    def with_prox(self, micro_batches: Sequence[MicroBatch]) -> list[MicroBatch]:
        """The same micro-batches with ``prox_logprobs``: log pi_prox of Eq. 2, the policy before the updates."""
        even = self._even(micro_batches)
        pairs = zip(even, self.logprobs(even), strict=True)
        return [dataclasses.replace(mb, prox_logprobs=logprobs) for mb, logprobs in pairs]

    def counts(self, micro_batches: Sequence[MicroBatch]) -> Counts:
        """Global completion tokens and sequences of one optimizer step, before any mask of the objective."""
        local = [
            sum(len(mb.targets) for mb in micro_batches),
            sum(int((mb.cu_seqlens.diff() > 0).sum()) for mb in micro_batches),
        ]
        total = torch.tensor(local, dtype=torch.int64, device=self.groups.device)
        torch.distributed.all_reduce(total, group=self.groups.dp)
        return Counts(tokens=int(total[0]), sequences=int(total[1]))

    def step(self, micro_batches: Sequence[MicroBatch], objective: Objective | None) -> StepOutput:
        """Forward, backward and optimizer step over this rank's micro-batches; every rank calls it together.

        ``objective`` is None in MTP boosting alone, whose loss needs more of the model than predictions."""
        micro_batches = self._even(micro_batches)
        counts = self.counts(micro_batches)
        # What mcore's schedule multiplies the loss by: 1, unless optimizer.options set a loss scale.
        grad_scale = float(self.optimizer.get_loss_scale())
        self.model.train()
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        outputs = self._passes(micro_batches, objective, counts, grad_scale)
        lr = float(self.optimizer.param_groups[0]["lr"])
        with self.originals():
            success, grad_norm, _ = self.optimizer.step()
            if self.model.ddp_config.overlap_param_gather:  # sampling and checkpoints read weights past mcore's hooks
                self.model.start_param_sync(force_sync=True)
            self._check_norms(grad_norm)
        if not success:  # mcore leaves the weights alone beyond optimizer.options.grad_norm_skip_threshold
            log.warning("gradient norm %.3g is above the threshold: this optimizer step is skipped", grad_norm)
        self.schedule.step(increment=1)
        totals = [{"losses": torch.stack([losses for losses, _ in outputs]).sum(0)}] if outputs else []
        total, *per_token = pipeline.tell([*totals, *(values for _, values in outputs)], self.groups)
        losses = total["losses"]
        torch.distributed.all_reduce(losses, group=self.groups.dp)
        return StepOutput(
            loss=float(losses[0]),
            mtp_loss=float(losses[1]),
            grad_norm=float(grad_norm),
            mtp_grad_norm=float(self.optimizer.grad_norms_by_group.get("mtp", 0.0)),
            lr=lr,
            per_token=list(zip(micro_batches, per_token, strict=True)),
        )

    def _passes(
        self, micro_batches: Sequence[MicroBatch], objective: Objective | None, counts: Counts, grad_scale: float
    ) -> list[tuple[Tensor, Mapping[str, Tensor]]]:
        """Forward and backward of all micro-batches; the reports of :meth:`_loss`, on the last stage."""
        if (objective is None) != (self.boosting is not None):
            raise ValueError("Learner.step takes an objective, or None where objective.type is mtp_boosting")
        if objective is not None:
            return pipeline.train(
                self.model, micro_batches, lambda mb: self._loss(mb, objective, counts, grad_scale), self.groups
            )
        assert self.boosting is not None
        boost, done = self.boosting.loss, int(self.schedule.num_steps)
        return pipeline.train_last(
            self.model, micro_batches, lambda mb: boost(self.model, mb, counts, done), self.groups, grad_scale
        )

    def _even(self, micro_batches: Sequence[MicroBatch]) -> list[MicroBatch]:
        return batches_of.even(micro_batches, self.pad_token, self.groups, self.config.parallel.dispatcher)

    def _check_norms(self, grad_norm: float) -> None:
        """Norms are global, so all ranks raise together, and before anything could be saved."""
        norms = {"the trunk": grad_norm, **self.optimizer.grad_norms_by_group}
        for name, norm in norms.items():
            if not math.isfinite(float(norm)):
                raise FloatingPointError(
                    f"the gradient norm of {name} is {float(norm)}: the weights in memory are spoilt, those of the last"
                    " checkpoint are good. Start the same command again with a lower optimizer.lr or an"
                    " objective.advantage_clip"
                )

    def _forward(
        self, micro_batch: MicroBatch, mtp: bool, grad_scale: float = 1.0
    ) -> tuple[Predictions, tuple[Tensor, ...]]:
        """The predictions of the completion tokens, and each MTP depth's hidden states ``[s*b, H]`` on request."""
        device = self.groups.device
        out = student.forward(self.model, micro_batch.tokens.to(device), mtp=mtp)
        hidden, *mtp_hidden = (
            student.gather_hidden(h, self.groups, self.module.config) for h in (out.hidden, *out.mtp_hidden)
        )
        predictions = Predictions(
            hidden[micro_batch.rows.to(device)],
            out.output_weight,
            temperature=self.temperature,
            group=self.groups.tp,
            valid_vocab=self.vocab_size,
            impl=self.config.kernels.impl,
            grad_scale=grad_scale,
        )
        return predictions, tuple(mtp_hidden)

    @property
    def temperature(self) -> float:
        """Log-probabilities are taken at the temperature the tokens were sampled at; a dataset has none."""
        return self.config.rollout.temperature if self.config.source.type == "rollout" else 1.0

    def _loss(
        self, micro_batch: MicroBatch, objective: Objective, counts: Counts, grad_scale: float
    ) -> tuple[Tensor, tuple[Tensor, Mapping[str, Tensor]]]:
        """What to minimise; the objective's loss and that of the MTP heads ``[2]``, and the values per token."""
        predictions, mtp_hidden = self._forward(micro_batch, self.train_mtp, grad_scale)
        output = objective(predictions, micro_batch, counts)
        loss, mtp_loss = output.loss, output.loss.new_zeros(())
        if mtp_hidden:
            mtp_loss = mtp_cross_entropy(
                mtp_hidden,
                predictions.weight.detach(),
                micro_batch,
                counts,
                group=self.groups.tp,
                valid_vocab=self.vocab_size,
                impl=self.config.kernels.impl,
            ).loss
            loss = loss + self.config.mtp.weight * mtp_loss
        return loss, (torch.stack([output.loss.detach(), mtp_loss.detach()]), output.per_token)


def _finalize(models: list[Any], num_tokens: Tensor | None, **options: Any) -> None:
    """mcore's gradient finalisation without its division by the token count: denominators are in the loss already."""
    finalize_model_grads(models, None, **options)


def _wrap(model: Any, config: Config, groups: Groups) -> DistributedDataParallel:
    fields: dict[str, Any] = {
        "grad_reduce_in_fp32": True,
        "use_distributed_optimizer": config.optimizer.distributed,
        "check_for_nan_in_grad": False,  # Learner.step reports it with a way out
    }
    ddp_config = _fields(DistributedDataParallelConfig, fields, config.optimizer.ddp, "optimizer.ddp")
    return DistributedDataParallel(model.config, ddp_config, model, pg_collection=groups.pg)


def _optimizer(model: DistributedDataParallel, config: Config, groups: Groups) -> Any:
    settings, bf16 = config.optimizer, next(model.parameters()).dtype == torch.bfloat16
    if bf16 and not settings.distributed:
        raise ConfigurationError(
            "optimizer.distributed = false with bf16 parameters: mcore cannot checkpoint this pair; set it to true, or"
            " run.precision to fp32"
        )
    fields = {
        "lr": settings.lr,
        "min_lr": settings.lr * settings.decay_to,
        "weight_decay": settings.weight_decay,
        "adam_beta1": settings.betas[0],
        "adam_beta2": settings.betas[1],
        "adam_eps": settings.eps,
        "clip_grad": settings.clip_grad,
        "use_distributed_optimizer": settings.distributed,
        "bf16": bf16,
        "params_dtype": torch.bfloat16 if bf16 else torch.float32,
    }
    return get_megatron_optimizer(
        _fields(OptimizerConfig, fields, settings.options, "optimizer.options"),
        [model],
        use_gloo_process_groups=False,
        pg_collection=groups.pg,
    )


def _schedule(optimizer: Any, config: Config) -> OptimizerParamScheduler:
    settings = config.optimizer
    steps = config.run.steps * config.objective.minibatches
    return OptimizerParamScheduler(
        optimizer,
        init_lr=settings.lr * settings.warmup_from,
        max_lr=settings.lr,
        min_lr=settings.lr * settings.decay_to,
        lr_warmup_steps=min(settings.warmup_steps, steps - 1),
        lr_decay_steps=steps,
        lr_decay_style=settings.decay,
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=steps,
        wd_incr_style="constant",
        # A resumed run follows its configuration, not the rates of the checkpoint; the position is restored either way.
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )


def _fields(kind: type, ours: Mapping[str, Any], given: Mapping[str, Any], where: str) -> Any:
    """An mcore config from our values and the user's; refuses names mcore does not know and those with a setting."""
    known = {f.name for f in dataclasses.fields(kind)}
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise ConfigurationError(
                f"{where}.{name}: mcore's {kind.__name__} has no such field"
                + (f"; did you mean {near[0]!r}?" if near else "")
            )
        if name in ours and name != "check_for_nan_in_grad":
            raise ConfigurationError(
                f"{where}.{name}: has a setting of its own under optimizer (or follows run.precision); set it there"
            )
    try:
        return kind(**{**ours, **given})
    except (AssertionError, ValueError) as error:
        raise ConfigurationError(f"{where}: mcore's {kind.__name__} refuses these values: {error}") from error
