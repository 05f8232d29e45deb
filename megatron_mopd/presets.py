"""Published dimensions of the Nemotron 3 family, a small relative for laptops, and what follows from dimensions alone.

``PRESETS[name]`` gives a :class:`Preset`; ``resolve(config.model)`` applies the user's pattern and overrides to it;
``parameter_count`` counts without allocating a weight; ``check`` refuses a configuration whose dimensions do not fit.
Imports neither torch nor megatron.core.

Sources of the three published columns: Megatron-LM's launch files
``examples/post_training/modelopt/conf/nvidia/NVIDIA-Nemotron-3-{Nano-30B-A3B,Super-120B-A12B,Ultra-550B-A55B}-BF16.sh``,
Table 1 of the Nemotron 3 Ultra report, and the Hugging Face configurations of the three checkpoints.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

from megatron_mopd.config import Config, ConfigurationError, Model, Parallel
from megatron_mopd.pattern import balanced, parse_pattern

if TYPE_CHECKING:  # building a table of dimensions needs no torch
    import torch

logger = logging.getLogger(__name__)

FAMILY: dict[str, Any] = {
    "normalization": "RMSNorm",
    "layernorm_epsilon": 1e-5,
    "add_bias_linear": False,
    "gated_linear_unit": False,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "is_hybrid_model": True,
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "moe_router_dtype": "fp32",
    "mtp_use_repeated_layer": True,
}
"""TransformerConfig values that every member shares; the student adds the squared ReLU, a function of mcore's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Preset:
    """Dimensions of one model; sizes in elements. Field names are TransformerConfig's where it has one."""

    pattern: str
    vocab_size: int
    hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int  # width of one attention head
    mamba_num_heads: int
    mamba_head_dim: int
    mamba_state_dim: int
    mamba_num_groups: int
    mamba_conv: int = 4  # taps of the causal convolution; an argument of mcore's mixer, not of its config
    mamba_chunk: int = 128  # tokens per chunk of the scan; likewise
    num_moe_experts: int
    moe_router_topk: int
    moe_ffn_hidden_size: int
    moe_shared_expert_intermediate_size: int
    moe_latent_size: int | None  # None: experts work at full width
    moe_router_topk_scaling_factor: float
    ffn_hidden_size: int  # of dense MLP layers
    init_method_std: float

    def transformer_fields(self) -> dict[str, Any]:
        """Keyword values of mcore's TransformerConfig that define the architecture; the rest is the student's."""
        parsed = parse_pattern(self.pattern)
        own = {name: getattr(self, name) for name in _DIMENSIONS}
        depths = {"mtp_num_layers": parsed.depths} if parsed.depths else {}
        return FAMILY | own | depths | {"num_layers": len(parsed.main)}


_NOT_MCORE = frozenset({"pattern", "vocab_size", "mamba_conv", "mamba_chunk"})
_DIMENSIONS = {f.name: str(f.type) for f in fields(Preset) if f.name not in _NOT_MCORE}

PRESETS: dict[str, Preset] = {
    "tiny": Preset(
        pattern="MEM*E-/*E/*E",
        vocab_size=128,
        hidden_size=128,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=32,
        mamba_num_heads=8,
        mamba_head_dim=32,
        mamba_state_dim=32,
        mamba_num_groups=2,
        mamba_chunk=32,
        num_moe_experts=8,
        moe_router_topk=2,
        moe_ffn_hidden_size=128,
        moe_shared_expert_intermediate_size=128,
        moe_latent_size=64,
        moe_router_topk_scaling_factor=2.5,
        ffn_hidden_size=256,
        init_method_std=0.079,  # the published ones follow sqrt(0.8 / hidden_size)
    ),
    "nano-30b-a3b": Preset(
        pattern="MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
        vocab_size=131_072,
        hidden_size=2688,
        num_attention_heads=32,
        num_query_groups=2,
        kv_channels=128,
        mamba_num_heads=64,
        mamba_head_dim=64,
        mamba_state_dim=128,
        mamba_num_groups=8,
        num_moe_experts=128,
        moe_router_topk=6,
        moe_ffn_hidden_size=1856,
        moe_shared_expert_intermediate_size=3712,
        moe_latent_size=None,
        moe_router_topk_scaling_factor=2.5,
        ffn_hidden_size=1856,
        init_method_std=0.0173,
    ),
    "super-120b-a12b": Preset(
        pattern="MEMEMEM*EMEMEMEM*EMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEM*EMEMEMEME/*E/*E",
        vocab_size=131_072,
        hidden_size=4096,
        num_attention_heads=32,
        num_query_groups=2,
        kv_channels=128,
        mamba_num_heads=128,
        mamba_head_dim=64,
        mamba_state_dim=128,
        mamba_num_groups=8,
        num_moe_experts=512,
        moe_router_topk=22,
        moe_ffn_hidden_size=2688,
        moe_shared_expert_intermediate_size=5376,
        moe_latent_size=1024,
        moe_router_topk_scaling_factor=5.0,
        ffn_hidden_size=2688,
        init_method_std=0.014,
    ),
    "ultra-550b-a55b": Preset(
        pattern=(
            "MEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"
            "/*E/*E"
        ),
        vocab_size=131_072,
        hidden_size=8192,
        num_attention_heads=64,
        num_query_groups=2,
        kv_channels=128,
        mamba_num_heads=256,
        mamba_head_dim=64,
        mamba_state_dim=128,
        mamba_num_groups=8,
        num_moe_experts=512,
        moe_router_topk=22,
        moe_ffn_hidden_size=5120,
        moe_shared_expert_intermediate_size=10240,
        moe_latent_size=2048,
        moe_router_topk_scaling_factor=5.0,
        ffn_hidden_size=5120,
        init_method_std=0.0099,
    ),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Count:
    """Parameters of one model. ``main`` is the trunk with embedding and output; ``mtp`` the block its depths share;
    ``active`` what one token passes through: the trunk with its top-k experts only and without the input embedding."""

    main: int
    mtp: int
    active: int


def resolve(model: Model) -> Preset:
    """The preset with the configuration's pattern, vocabulary and overridden dimensions.

    Raises :class:`ConfigurationError` for a bad pattern and for an override that the pattern decides.
    """
    preset = PRESETS[model.preset or "tiny"]
    pattern = model.pattern or preset.pattern
    parse_pattern(pattern)
    for name in ("num_layers", "mtp_num_layers"):
        if name in model.override:
            raise ConfigurationError(
                f"model.override.{name} = {model.override[name]!r}: the number of layers follows from"
                " model.pattern; change that"
            )
    changed = {name: value for name, value in model.override.items() if name in _DIMENSIONS}
    for name, value in changed.items():
        _check_dimension(name, value, _DIMENSIONS[name])
    return replace(
        preset,
        pattern=pattern,
        vocab_size=model.vocab_size or preset.vocab_size,
        mamba_conv=model.mamba_conv or preset.mamba_conv,
        mamba_chunk=model.mamba_chunk or preset.mamba_chunk,
        **changed,
    )


def _check_dimension(name: str, value: Any, kind: str) -> None:
    number = isinstance(value, (int, float) if kind == "float" else int) and not isinstance(value, bool)
    if not ((number and value > 0) or (value is None and "None" in kind)):
        kind = kind.replace(" | None", " or null")
        raise ConfigurationError(f"model.override.{name} = {value!r}: must be a positive {kind}")


def parameter_count(model: Preset | Model) -> Count:
    """Count parameters from the dimensions alone.

    Counted: weights, norm weights, convolution weight and bias, ``A_log``, ``D`` and ``dt_bias`` of Mamba layers, and
    the router's expert bias (a buffer in mcore, a stored tensor in every checkpoint). Not counted: vocabulary padding.
    For Ultra the sum times two bytes is the published BF16 checkpoint's size, less the expert biases' second two bytes.
    """
    p = resolve(model) if isinstance(model, Model) else model
    parsed = parse_pattern(p.pattern)
    embedding = p.vocab_size * p.hidden_size
    output = embedding + p.hidden_size  # output weight and final norm
    block = sum(_layer(p, symbol, p.num_moe_experts) for symbol in parsed.mtp)
    joint = 2 * p.hidden_size * p.hidden_size + 3 * p.hidden_size  # eh_proj, enorm, hnorm, final_layernorm
    return Count(
        main=embedding + sum(_layer(p, symbol, p.num_moe_experts) for symbol in parsed.main) + output,
        mtp=block + joint if parsed.mtp else 0,
        active=sum(_layer(p, symbol, p.moe_router_topk) for symbol in parsed.main) + output,
    )


def _layer(p: Preset, symbol: str, experts: int) -> int:
    """Parameters of one layer with its pre-norm, of whose experts ``experts`` are counted."""
    h = p.hidden_size
    if symbol == "M":
        inner = p.mamba_num_heads * p.mamba_head_dim
        bc = 2 * p.mamba_num_groups * p.mamba_state_dim
        in_proj = h * (2 * inner + bc + p.mamba_num_heads)  # rows z, x, B, C, dt
        convolution = (inner + bc) * (p.mamba_conv + 1)
        return h + in_proj + convolution + 3 * p.mamba_num_heads + inner + inner * h
    if symbol == "*":
        return h + 2 * h * p.kv_channels * (p.num_attention_heads + p.num_query_groups)
    if symbol == "-":
        return h + 2 * h * p.ffn_hidden_size
    width = p.moe_latent_size or h
    latent = 2 * h * p.moe_latent_size if p.moe_latent_size else 0
    router = p.num_moe_experts * (h + 1)
    shared = 2 * h * p.moe_shared_expert_intermediate_size
    return h + router + latent + shared + experts * 2 * width * p.moe_ffn_hidden_size


def check(config: Config) -> None:
    """Refuse a configuration whose dimensions, layout or lengths cannot work together; called before the first write.

    The number of ranks is checked where the process groups are built. Raises :class:`ConfigurationError`.
    """
    model, pattern = config.model, resolve(config.model).pattern
    _check_layout(model, config.parallel)
    for setting in ("expert", "expert_tensor"):
        if (ways := getattr(config.parallel, setting)) > 1 and "E" not in pattern:
            raise ConfigurationError(
                f"parallel.{setting} = {ways}: model.pattern = {pattern!r} has no E layer to split; set it to 1"
            )
    for name, teacher in config.teachers.items():
        try:
            _check_layout(teacher.model or model, config.parallel)
        except ConfigurationError as error:
            raise ConfigurationError(f"teachers.{name}: {error}") from None
    if config.source.type == "rollout" and config.rollout.max_new_tokens >= model.max_sequence_length:
        raise ConfigurationError(
            f"rollout.max_new_tokens = {config.rollout.max_new_tokens}: leaves no room for a prompt within"
            f" model.max_sequence_length = {model.max_sequence_length}; lower the one or raise the other"
        )


def _check_layout(model: Model, parallel: Parallel) -> None:
    p = resolve(model)
    _check_inside(p, model.preset or "tiny")
    staged(p, parallel)
    _check_split("tensor", parallel.tensor, _cut_by_tensor(p))
    if "E" in p.pattern:
        _check_split("expert", parallel.expert, {"num_moe_experts": p.num_moe_experts})
        _check_split("expert_tensor", parallel.expert_tensor, {"moe_ffn_hidden_size": p.moe_ffn_hidden_size})


def _check_inside(p: Preset, name: str) -> None:
    """Sizes of the model that must fit each other, whatever the layout."""
    for larger, smaller in (("num_attention_heads", "num_query_groups"), ("mamba_num_heads", "mamba_num_groups")):
        if getattr(p, larger) % getattr(p, smaller):
            raise ConfigurationError(
                f"model.override: {smaller} = {getattr(p, smaller)} does not divide {larger} = {getattr(p, larger)};"
                f" preset {name} has {getattr(PRESETS[name], smaller)} and {getattr(PRESETS[name], larger)}"
            )
    if p.moe_router_topk > p.num_moe_experts:
        raise ConfigurationError(
            f"model.override: moe_router_topk = {p.moe_router_topk} is more than num_moe_experts = {p.num_moe_experts};"
            f" preset {name} has {PRESETS[name].moe_router_topk} of {PRESETS[name].num_moe_experts}"
        )


def staged(p: Preset, parallel: Parallel) -> Preset:
    """The preset with its layers cut into ``parallel.pipeline`` stages: at the borders of its pattern if it has any.

    Without borders they stand where the stage that computes most computes least: a layer's cost is the parameters that
    one token passes through; the last stage also has the output weight and each MTP depth with an output of its own.

    Raises :class:`ConfigurationError` for more stages than layers, another number of borders, a stage without an expert
    layer where experts are split apart from the other layers (mcore then gives them an optimizer of their own, and
    every stage must have as many), and for mcore's allgather dispatcher, which refuses lengths that vary.
    """
    parsed, stages = parse_pattern(p.pattern), parallel.pipeline
    given = len(parsed.stages)
    if given not in (1, stages):
        raise ConfigurationError(
            f"model.pattern = {p.pattern!r} has {given} pipeline stages (parts between |), but parallel.pipeline ="
            f" {stages}; set parallel.pipeline to {given}, or leave out every |, so that borders are placed for you"
        )
    if stages == 1:
        return p
    if stages > len(parsed.main):
        raise ConfigurationError(
            f"parallel.pipeline = {stages}: model.pattern = {p.pattern!r} has {len(parsed.main)} layers and each stage"
            f" needs one; set it to {len(parsed.main)} or less"
        )
    if parallel.dispatcher == "allgather":
        raise ConfigurationError(
            f"parallel.pipeline = {stages}: micro-batches differ in length, which mcore refuses with"
            " parallel.dispatcher = 'allgather'; set that to alltoall"
        )
    apart = parallel.expert > 1 or parallel.expert_tensor != parallel.tensor
    needed = "E" if "E" in parsed.main and apart else ""
    cut = parsed.stages if given > 1 else _cut(p, stages, needed)
    if cut is None or not all(needed in stage for stage in cut):
        raise ConfigurationError(
            f"parallel.pipeline = {stages}: a stage of model.pattern = {p.pattern!r} has no E layer, but mcore keeps an"
            f" optimizer for experts alone with parallel.expert = {parallel.expert}, parallel.expert_tensor ="
            f" {parallel.expert_tensor}, parallel.tensor = {parallel.tensor}, which every stage must have; give each"
            " stage an E layer (fewer stages or other borders |), or set parallel.expert to 1 and"
            f" parallel.expert_tensor to {parallel.tensor}"
        )
    return replace(p, pattern=replace(parsed, stages=cut).text)


@lru_cache  # a search over layouts asks for the same ones again and again
def _cut(p: Preset, stages: int, needed: str) -> tuple[str, ...] | None:
    main = parse_pattern(p.pattern).main
    costs = [_layer(p, symbol, p.moe_router_topk) for symbol in main]
    return balanced(main, costs, stages, last=_after_the_trunk(p), needed=needed)


def _after_the_trunk(p: Preset) -> int:
    """Parameters that a token passes through behind the last layer: the output and, with their own, MTP's depths."""
    parsed, output = parse_pattern(p.pattern), p.vocab_size * p.hidden_size
    block = sum(_layer(p, symbol, p.moe_router_topk) for symbol in parsed.mtp) + 2 * p.hidden_size**2
    return output + parsed.depths * (block + output)


def _cut_by_tensor(p: Preset) -> dict[str, int]:
    """Name and size of what tensor parallelism cuts, for the layers the pattern has."""
    names = {
        "*": ("num_attention_heads", "num_query_groups"),
        "M": ("mamba_num_heads", "mamba_num_groups"),
        "E": ("moe_shared_expert_intermediate_size",),
        "-": ("ffn_hidden_size",),
    }
    cut = [name for symbol, sizes in names.items() if symbol in p.pattern for name in sizes]
    return {name: getattr(p, name) for name in ["hidden_size", *cut]}


def _check_split(setting: str, ways: int, cut: dict[str, int]) -> None:
    for name, size in cut.items():
        if not _divides(ways, name, size):
            largest = max(cut.values())
            fitting = [n for n in range(1, largest + 1) if all(_divides(n, *item) for item in cut.items())]
            raise ConfigurationError(
                f"parallel.{setting} = {ways}: does not divide {name} = {size}; this model can be split"
                f" {', '.join(map(str, fitting))} ways"
            )


def _divides(ways: int, name: str, size: int) -> bool:
    """Whether ``ways`` ranks can share ``size``; with more ranks than key-value groups mcore repeats the groups."""
    return size % ways == 0 or (name == "num_query_groups" and ways % size == 0)


def resolve_precision(precision: Literal["auto", "fp32", "bf16"], device: torch.device) -> Literal["fp32", "bf16"]:
    """``auto`` resolved and said: bf16 (with fp32 main parameters and gradients) on CUDA, fp32 on a CPU."""
    if precision != "auto":
        return precision
    resolved: Literal["fp32", "bf16"] = "bf16" if device.type == "cuda" else "fp32"
    logger.info("run.precision auto: %s on %s", resolved, device.type)
    return resolved
