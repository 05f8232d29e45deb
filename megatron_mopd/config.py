"""The one typed configuration: every setting, its default and its rule live here and in *_config.py files beside it.

``load_config(path, overrides)`` reads YAML, applies ``key=value`` overrides, refuses unknown keys (naming the nearest
known one) and values out of range, and returns a frozen :class:`Config`. Imports neither torch nor megatron.core.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from megatron_mopd.asynchrony_config import Asynchrony
from megatron_mopd.data_config import Data, ReasoningGymPrompts, Tokenizer
from megatron_mopd.guard_config import Guards
from megatron_mopd.objective_config import CrossEntropy as CrossEntropy
from megatron_mopd.objective_config import Mopd, Mtp, Objective
from megatron_mopd.objective_config import MtpBoosting as MtpBoosting
from megatron_mopd.preflight_config import Preflight
from megatron_mopd.quantization import recipes
from megatron_mopd.settings import ConfigurationError, Section, explain, merge, nearest, read_yaml
from megatron_mopd.source_config import Dataset as Dataset
from megatron_mopd.source_config import Rollouts, Source
from megatron_mopd.source_config import Traces as Traces


class Model(Section):
    preset: Literal["tiny", "nano-30b-a3b", "super-120b-a12b", "ultra-550b-a55b"] | None = None
    """Published dimensions to build; see megatron_mopd.presets. Left out: those of the checkpoint that initial names,
    or tiny where nothing says them."""
    pattern: str | None = None
    """Layer pattern with MTP segments, such as ``M*E-/*E/*E``; the preset's when left out. ``|`` between layers of the
    trunk begins a pipeline stage."""
    override: dict[str, Any] = {}
    """Fields of mcore's TransformerConfig by name, checked against mcore's own; recompute options go here."""
    mamba_conv: int | None = Field(default=None, gt=1)
    """Taps of Mamba's causal convolution; the preset's when left out."""
    mamba_chunk: int | None = Field(default=None, gt=0)
    """Tokens per chunk of Mamba's scan, which decides speed and the last digits only; the preset's when left out."""
    vocab_size: int | None = Field(default=None, gt=0)
    """Rows of the embedding before padding to a multiple for tensor parallelism; the tokenizer's when left out."""
    max_sequence_length: int = Field(default=256, gt=1)
    """Context length in tokens; a longer prompt is an error."""
    initial: Path | None = None
    """Checkpoint directory the weights start from, Hugging Face's (config.json and safetensors) or Megatron's; random
    (from run.seed) when left out."""
    train_router: bool = False
    """Whether router weights are trained. False in MOPD (the released recipe freezes the router)."""
    update_expert_bias: bool = False
    """Whether mcore moves the router's expert bias after each optimizer step."""


class Parallel(Section):
    tensor: int = Field(default=1, ge=1)
    expert: int = Field(default=1, ge=1)
    expert_tensor: int = Field(default=1, ge=1)
    """Tensor parallel size inside experts; explicit because mcore's own default is the tensor size."""
    pipeline: int = Field(default=1, ge=1)
    """Stages that the trunk's layers are cut into: at the borders ``|`` of ``model.pattern``, or where stages compute
    about as much (megatron_mopd.presets.staged). The first has the embedding, the last the output layer and all MTP."""
    dispatcher: Literal["alltoall", "allgather"] = "alltoall"
    backend: Literal["auto", "gloo", "nccl"] = "auto"
    """auto: nccl with CUDA, gloo without; resolved once and said once."""


class RolloutSettings(Section):
    prompts_per_step: int = Field(default=1024, gt=0)
    """Prompts per step over all ranks (report section 3.3.1: 1,024)."""
    samples_per_prompt: int = Field(default=1, gt=0)
    temperature: float = Field(default=1.0, gt=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    max_new_tokens: int = Field(default=128, gt=0)
    batch_size: int = Field(default=256, gt=0)
    """Sequences decoded together on one data-parallel rank."""
    prefill_tokens: int = Field(default=16384, gt=0)
    """Tokens of prompts, padding included, that such a rank reads at once; a longer prompt is read alone. Fewer need
    less memory, and the result is the same."""
    lag: int = Field(default=0, ge=0)
    """Age in steps of the rollouts an update sees; 0 is on-policy."""
    shards: int = Field(default=0, ge=0)
    """Steps, the newest, whose scored rollouts stay under ``rollouts`` in run.dir with what the update made of them,
    and beside them every step that can be replayed: the first, and those after a checkpoint that is kept. 0: none."""

    @model_validator(mode="after")
    def _top_p(self) -> RolloutSettings:
        if self.top_p < 1:
            raise ValueError(
                f"top_p = {self.top_p}: training rollouts must be drawn from the whole distribution, or behaviour"
                " log-probabilities would not be the student's; set it to 1"
            )
        return self


class Teacher(Section):
    checkpoint: Path
    """Checkpoint directory: Hugging Face's (config.json and safetensors) or Megatron's (``iter_*`` inside, or one such
    directory)."""
    domains: list[str]
    """Domains this teacher scores; each domain has exactly one teacher. Empty for a candidate of the pre-flight that
    is measured only."""
    model: Model | None = None
    """Architecture (preset, pattern, override); what the checkpoint says when left out, or the student's where it says
    nothing. Its MTP heads are never built."""
    nvfp4: list[Literal["output_weight", "experts", "hidden"]] = []
    """What is kept in NVFP4, 4.5 bits a number, instead of as it was loaded. output_weight: the output layer, in host
    and device memory, decoded inside the kernels; experts: routed experts in host memory, decoded when the teacher's
    turn comes; hidden: scored rollouts carry their final hidden states, so that a divergence over the whole vocabulary
    needs the teacher's output layer and no second forward. The run's result says what it cost and saved."""

    @model_validator(mode="after")
    def _each_part_once(self) -> Teacher:
        if len(set(self.nvfp4)) < len(self.nvfp4):
            raise ValueError(f"nvfp4 = {self.nvfp4}: names a part twice; name each once")
        return self


class Kernels(Section):
    """Which forms of mopd_kernels run; loss and gradient are the same in all."""

    impl: Literal["auto", "triton", "reference"] = "auto"
    """auto: Triton on CUDA tensors that the kernels take, plain torch elsewhere; resolved once and said once."""
    update: Literal["objective", "logprob", "logits"] = "objective"
    """How MOPD meets the output layer. objective: loss, metrics and gradient in one pass over hidden states and output
    weight, without logits in memory; logprob: log-probabilities without logits in memory, which are made again in
    backward; logits: torch makes a micro-batch's logits in the model's precision (bf16 moves a log-probability by
    hundredths of a nat), their gradient replaces them. Other objectives always take logprob."""


class Quantization(Section):
    """Training for a student that is quantized afterwards; see megatron_mopd.fake_quantization."""

    train: str | None = None
    """Recipe (a name of megatron_mopd.quantization.recipes or a YAML file) after which the student's weights are
    quantize-dequantized in every forward: routed experts in NVFP4 and others in FP8 for ultra-ptq. Gradients go
    straight through to the high-precision weights, which are what checkpoints hold."""
    four_over_six: Literal["mae", "mse", "max"] | None = None
    """Error by which each NVFP4 block of a weight chooses between the scales of 6 and 4; tools/quantize_checkpoint.py
    must be given the same."""
    activations: bool = False
    """Whether what enters the linears of routed experts in NVFP4 is quantize-dequantized too."""

    @model_validator(mode="after")
    def _of_training(self) -> Quantization:
        if self.train is None and (self.four_over_six or self.activations):
            raise ValueError("four_over_six and activations say how quantization.train is done; name a recipe there")
        if self.train is not None:
            recipes.load(self.train)
        return self


class Optimizer(Section):
    lr: float = Field(default=2.0e-6, ge=0)
    warmup_steps: int = Field(default=10, ge=0)
    warmup_from: float = Field(default=0.15, ge=0, le=1)
    """First learning rate as a fraction of lr (3e-7 of 2e-6 in the released configuration)."""
    decay: Literal["constant", "cosine", "linear"] = "constant"
    decay_to: float = Field(default=0.0, ge=0, le=1)
    """Last learning rate as a fraction of lr."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    clip_grad: float = Field(default=1.0, gt=0)
    distributed: bool = True
    """mcore's distributed optimizer (states sharded over data-parallel ranks)."""
    options: dict[str, Any] = {}
    """Further fields of mcore's OptimizerConfig by name."""
    ddp: dict[str, Any] = {}
    """Further fields of mcore's DistributedDataParallelConfig by name."""


class Batching(Section):
    micro_batch_size: int = Field(default=1, gt=0)
    """Sequences per micro-batch."""
    sequences_per_step: int | None = Field(default=None, gt=0)
    """Sequences per step of a dataset stage, over all ranks; a rollout stage takes what the rollout gives."""


class Evaluation(Section):
    every: int = Field(default=0, ge=0)
    """Steps between greedy evaluations; 0: none while training."""
    samples: int = Field(default=128, gt=0)
    """Held-out prompts per domain in evaluations while training."""
    final_samples: int = Field(default=500, gt=0)
    """Held-out prompts per domain before and after training."""
    batch_size: int = Field(default=256, gt=0)


class Checkpoint(Section):
    every: int = Field(default=0, ge=0)
    """Steps between checkpoints; 0: only at the end."""
    keep: int = Field(default=2, ge=1)
    """Complete checkpoints kept."""
    cache: Path | None = None
    """Where Hugging Face directories are kept in Megatron's format, converted once; ``converted`` beside run.dir when
    left out. A directory in it may be removed whenever no run reads it."""
    export: Literal["none", "hugging_face"] = "none"
    """hugging_face: the last weights are also left as a Hugging Face directory, ``hugging_face`` in run.dir."""


class Run(Section):
    dir: Path
    """Where checkpoints, metrics.jsonl and TensorBoard events go."""
    id: str | None = None
    """Identity of this run's policies; the directory's name when left out."""
    steps: int = Field(gt=0)
    seed: int = 42
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 with fp32 main parameters on CUDA, fp32 on CPU; resolved once and said once."""


class Config(Section):
    run: Run
    model: Model = Model()
    parallel: Parallel = Parallel()
    tokenizer: Tokenizer = Tokenizer()
    data: Data = Data()
    source: Source = Rollouts()
    rollout: RolloutSettings = RolloutSettings()
    asynchrony: Asynchrony = Asynchrony()
    teachers: dict[str, Teacher] = {}
    preflight: Preflight = Preflight()
    objective: Objective = Mopd()
    mtp: Mtp = Mtp()
    kernels: Kernels = Kernels()
    quantization: Quantization = Quantization()
    optimizer: Optimizer = Optimizer()
    batching: Batching = Batching()
    guards: Guards = Guards()
    evaluation: Evaluation = Evaluation()
    checkpoint: Checkpoint = Checkpoint()

    @property
    def run_id(self) -> str:
        return self.run.id or self.run.dir.name

    @model_validator(mode="after")
    def _stage(self) -> Config:
        if self.objective.type == "mopd" and self.source.type != "rollout":
            raise ValueError("objective.type mopd scores the student's own rollouts; set source.type to rollout")
        if self.objective.type == "mopd" and not self.teachers:
            raise ValueError("objective.type mopd needs teachers; name at least one under teachers")
        if self.objective.type == "mtp_boosting" and self.source.type != "rollout":
            raise ValueError(
                "objective.type mtp_boosting learns on the student's own rollouts; set source.type to rollout"
            )
        if self.objective.type == "mtp_boosting" and self.teachers:
            raise ValueError(
                f"teachers = {sorted(self.teachers)}: the teacher of objective.type mtp_boosting is the student's own"
                " backbone; name none"
            )
        if self.objective.type == "cross_entropy" and self.source.type == "rollout":
            raise ValueError("objective.type cross_entropy trains on a dataset's completions; set source.type: dataset")
        if self.source.type == "traces" and not self.teachers:
            raise ValueError("source.type traces trains on what teachers write; name at least one under teachers")
        if self.evaluation.every and not self.data.held_out:
            raise ValueError(
                f"evaluation.every = {self.evaluation.every} needs prompts to evaluate on under data.held_out"
            )
        if self.asynchrony.mode != "inline" and self.source.type != "rollout":
            raise ValueError(f"asynchrony.mode = {self.asynchrony.mode} is for rollouts; set source.type to rollout")
        size = self.rollout.prompts_per_step if self.source.type == "rollout" else self.batching.sequences_per_step
        if size is not None and self.objective.minibatches > size:
            raise ValueError(
                f"objective.minibatches = {self.objective.minibatches} would leave optimizer steps without any of the"
                f" {size} prompts of a batch; lower it, or raise rollout.prompts_per_step (batching.sequences_per_step)"
            )
        if self.objective.type == "cross_entropy" and self.batching.sequences_per_step is None:
            raise ValueError(f"batching.sequences_per_step is needed by a {self.source.type} stage")
        if isinstance(self.objective, Mopd) and self.objective.outcome_weight and self.rollout.samples_per_prompt < 2:
            raise ValueError(
                f"objective.outcome_weight = {self.objective.outcome_weight} compares rollouts of one prompt;"
                f" rollout.samples_per_prompt = {self.rollout.samples_per_prompt} must be at least 2"
            )
        return self

    @model_validator(mode="after")
    def _one_teacher_per_domain(self) -> Config:
        owner: dict[str, str] = {}
        for name, teacher in self.teachers.items():
            for domain in teacher.domains:
                if domain in owner:
                    raise ValueError(
                        f"teachers.{name}.domains: {domain!r} is already served by teachers.{owner[domain]};"
                        " each domain needs exactly one teacher"
                    )
                owner[domain] = name
        candidates = self.preflight.candidates
        if unknown := sorted(candidates.keys() - self.teachers.keys()):
            hint = nearest(unknown[0], sorted(self.teachers))
            raise ValueError(f"preflight.candidates.{unknown[0]}: no teacher of this name{hint}")
        for name, teacher in self.teachers.items():
            if not teacher.domains and not candidates.get(name):
                raise ValueError(
                    f"teachers.{name}.domains is empty: nothing would be asked of it; name what it teaches, or under"
                    f" preflight.candidates.{name} what it is measured on"
                )
        named = {s.domain for s in self.data.train if isinstance(s, ReasoningGymPrompts)}
        if self.objective.type == "mopd" and (missing := sorted(named - owner.keys())):
            raise ValueError(
                f"data.train: domain {missing[0]!r} has no teacher; add it to the domains of one of"
                f" {sorted(self.teachers)}"
            )
        if self.objective.type == "mopd":
            for setting, weights in (
                ("objective.domain_weights", self.objective.domain_weights),
                ("data.weights", self.data.weights),
            ):
                if unknown := sorted(weights.keys() - owner.keys()):
                    hint = nearest(unknown[0], sorted(owner))
                    raise ValueError(f"{setting}: no teacher serves domain {unknown[0]!r}{hint}")
        return self


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply ``a.b=value`` overrides (value parsed as YAML) and validate.

    Raises :class:`ConfigurationError` naming the setting, its value, the rule and, for an unknown key, the nearest one.
    """
    return build_config(merge(read_yaml(path), overrides), origin=str(path))


def build_config(tree: Mapping[str, Any], origin: str = "configuration") -> Config:
    """Validate a tree of plain values; errors as in :func:`load_config`."""
    try:
        return Config.model_validate(dict(tree))
    except ValidationError as error:
        raise ConfigurationError("\n".join(explain(e, origin, Config) for e in error.errors())) from None
