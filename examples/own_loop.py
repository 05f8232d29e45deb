"""A plain Megatron-Core training loop that gains MOPD: the statements between the marks are all it takes.

    torchrun --nproc_per_node=2 examples/own_loop.py CONFIG.yaml

Everything outside the marks is what such a loop has anyway: model, DDP, optimizer, schedule. No trainer of this
package runs.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel.schedules import forward_backward_no_pipelining

from megatron_mopd import batch, parallel, provenance, student
from megatron_mopd.config import Config, ConfigurationError, load_config
from megatron_mopd.objectives.mopd import mopd_objective
from megatron_mopd.predictions import Predictions
from megatron_mopd.prompts import PromptStream, load_prompts
from megatron_mopd.records import Counts, MicroBatch, Policy, Sampling
from megatron_mopd.rollout import Sampler
from megatron_mopd.teachers import TeacherPool
from megatron_mopd.tokenizer import build_tokenizer


def train(config: Config) -> list[float]:
    """Run ``config.run.steps`` steps and return the mean log-ratio teacher - student of each (0 when they agree)."""
    if config.parallel.pipeline > 1:
        raise ConfigurationError(
            f"parallel.pipeline = {config.parallel.pipeline}: this loop has one stage; set it to 1, or run the schedule"
            " by megatron_mopd.pipeline.train"
        )
    groups = parallel.initialize(config.parallel, config.run.seed)
    tokenizer = build_tokenizer(config.tokenizer)
    vocab = tokenizer.vocab_size
    model = student.build_model(config.model, config.parallel, groups, vocab, mtp=False)
    ddp_config = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True)
    model = DistributedDataParallel(model.config, ddp_config, model, pg_collection=groups.pg)
    settings = OptimizerConfig(lr=config.optimizer.lr, weight_decay=0.0, use_distributed_optimizer=True)
    optimizer = get_megatron_optimizer(settings, [model], use_gloo_process_groups=False, pg_collection=groups.pg)
    model.module.config.finalize_model_grads_func = lambda models, _, **options: finalize_model_grads(models, **options)
    gaps: list[float] = []

    # >>> MOPD: what to sample, who scores it
    prompts = PromptStream(load_prompts(config.data.train, tokenizer, config.model.max_sequence_length), {}, seed=0)
    sampler = Sampler(model, groups, config.model.max_sequence_length, vocab)
    sampling = Sampling(
        temperature=config.rollout.temperature,
        max_new_tokens=config.rollout.max_new_tokens,
        stop_tokens=tokenizer.stop_tokens,
    )
    teachers = TeacherPool(config, groups, tokenizer)
    # <<<

    for step in range(config.run.steps):
        # >>> MOPD: sample, sign, score, pack, with every rank's share of one global batch
        wanted = [(p, 0) for p in prompts.take(config.rollout.prompts_per_step)[groups.dp_rank :: groups.dp_size]]
        rollouts = sampler.generate(wanted, sampling, config.run.seed, step, config.rollout.batch_size)
        policy, seed = Policy(run_id="own", step=step), config.run.seed
        signed = [provenance.sign(r, policy, tokenizer, sampling, seed, step) for r in rollouts]
        scored = teachers.score(signed)
        provenance.check(scored, policy, 0, tokenizer, teachers)
        packed = batch.pack(
            scored, config.batching.micro_batch_size, tokenizer.pad_token, length_multiple=groups.tp_size
        )
        packed = batch.even(packed, tokenizer.pad_token, groups, config.parallel.dispatcher)
        counts = _global_counts(packed, groups)
        # <<<

        def forward_step(data: Iterator[MicroBatch], ddp: DistributedDataParallel, counts: Counts = counts):
            micro_batch = next(data)
            out = student.forward(ddp, micro_batch.tokens.to(groups.device))
            hidden = student.gather_hidden(out.hidden, groups, ddp.module.config)[micro_batch.rows.to(groups.device)]
            # >>> MOPD: the loss of Eq. 3 in place of logits and cross-entropy, its gradient formed in the same pass
            predictions = Predictions(hidden, out.output_weight, sampling.temperature, groups.tp, valid_vocab=vocab)
            output = mopd_objective(predictions, micro_batch, config.objective, counts)
            # <<<
            return output.loss, lambda loss: (loss, torch.zeros((), dtype=torch.int), output.per_token["log_ratio"])

        model.zero_grad_buffer()
        optimizer.zero_grad()
        log_ratios = forward_backward_no_pipelining(
            forward_step_func=forward_step,
            data_iterator=iter(packed),
            model=[model],
            num_microbatches=len(packed),
            seq_length=0,
            micro_batch_size=0,
            pg_collection=groups.pg,
        )
        optimizer.step()
        total = torch.cat(log_ratios).sum()
        torch.distributed.all_reduce(total, group=groups.dp)
        gaps.append(float(total) / counts.tokens)
    return gaps


def _global_counts(packed: list[MicroBatch], groups: parallel.Groups) -> Counts:
    local = [sum(len(mb.targets) for mb in packed), sum(int((mb.lengths > 0).sum()) for mb in packed)]
    total = torch.tensor(local, device=groups.device)
    torch.distributed.all_reduce(total, group=groups.dp)
    return Counts(tokens=int(total[0]), sequences=int(total[1]))


def main() -> None:
    for step, gap in enumerate(train(load_config(sys.argv[1], sys.argv[2:]))):
        if torch.distributed.get_rank() == 0:
            sys.stdout.write(f"step {step}: log p_teacher - log p_student = {gap:+.4f}\n")
    parallel.destroy()


if __name__ == "__main__":
    main()
