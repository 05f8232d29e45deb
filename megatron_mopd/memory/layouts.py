"""Which layouts can be, which of them fit, and what to change where one does not.

The rules are those of presets, parallel and Megatron-Core itself; whoever asks needs Megatron-Core installed, but no
GPU and no process group.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import product

from megatron_mopd import presets
from megatron_mopd.config import Config, ConfigurationError
from megatron_mopd.memory.activations import LOGPROB_WORKSPACE
from megatron_mopd.memory.plan import FIELDS, GIB, Machine, Plan, element_bytes, gib, plan, rollout_rows, settings


def check(config: Config, machine: Machine) -> None:
    """Refuse a layout that cannot be, by the rules of presets, parallel and Megatron-Core itself.

    Raises :class:`ConfigurationError` for dimensions that a layout does not divide, a number of GPUs it does not fill,
    stages without what they need, a sequence length that sequence parallelism cannot cut, and where Megatron-Core is
    missing.
    """
    try:
        from megatron_mopd import student
    except ImportError as error:
        raise ConfigurationError(
            f"a layout is checked by Megatron-Core's own rules, but it does not import ({error});"
            " run: pip install -e '.[train]'"
        ) from error
    _check_numbers(config, machine)
    student.transformer_config(config.model, config.parallel, "bf16" if element_bytes(config) == 2 else "fp32")


def _check_numbers(config: Config, machine: Machine) -> None:
    """All of :func:`check` but Megatron-Core's own rules, which a search need not ask again and again."""
    from megatron_mopd import parallel  # imports Megatron-Core, so not with this module

    presets.check(config)
    parallel.check_world(config.parallel, machine.world)
    length, tensor = config.model.max_sequence_length, config.parallel.tensor
    if length % tensor:
        raise ConfigurationError(
            f"model.max_sequence_length = {length}: parallel.tensor = {tensor} ranks cut it among themselves;"
            f" set it to {length // tensor * tensor} or {(length // tensor + 1) * tensor}"
        )
    check_prompt(machine.prompt, length)
    if machine.world < 1 or machine.gpus_per_node < 1 or machine.usable <= 0 or not machine.balance >= 1:
        raise ConfigurationError(
            f"{machine.world} GPUs, {machine.gpus_per_node} a node, {machine.gpu / GIB:g} GiB each with"
            f" {machine.reserve / GIB:g} GiB reserved, balance {machine.balance:g}: needs at least one GPU, memory"
            " beyond the reserve and a balance of 1 or more"
        )


def check_prompt(prompt: int | None, length: int) -> None:
    """Refuse prompts that leave no room for an answer within ``length`` tokens, or have none themselves."""
    if prompt is not None and not 0 < prompt < length:
        raise ConfigurationError(
            f"prompts of {prompt} tokens: must be of 1 to {length - 1}, shorter than model.max_sequence_length ="
            f" {length}; plan for such prompts, or raise it"
        )


def layouts(config: Config, machine: Machine) -> Iterator[Config]:
    """The configuration in every layout its dimensions and the machine allow.

    Tensor parallelism, inside experts too, stays within a node, where the links are fast. Besides the configuration's
    own number of pipeline stages, which leave GPUs idle while one of them samples, 1, 2, 4 and 8 are tried.
    """
    within, p = range(1, min(machine.gpus_per_node, machine.world) + 1), presets.resolve(config.model)
    sizes: dict[str, Iterable[int]] = {
        "tensor": within,
        "expert": range(1, p.num_moe_experts + 1),
        "expert_tensor": within,
        "pipeline": sorted({1, 2, 4, 8, config.parallel.pipeline}),
    }
    alone = dict.fromkeys(FIELDS, 1)
    if "|" in p.pattern:  # its borders fix the number of stages
        sizes["pipeline"], alone["pipeline"] = [config.parallel.pipeline], config.parallel.pipeline
    possible = [[n for n in sizes[f] if _allowed(with_layout(config, alone | {f: n}), machine)] for f in FIELDS]
    for chosen in product(*possible):
        other = with_layout(config, dict(zip(FIELDS, chosen, strict=True)))
        if _allowed(other, machine):
            yield other


def _allowed(config: Config, machine: Machine) -> bool:
    try:
        _check_numbers(config, machine)
    except ConfigurationError:
        return False
    return True


def with_layout(config: Config, sizes: dict[str, int]) -> Config:
    """The configuration with other sizes under ``parallel``."""
    return config.model_copy(update={"parallel": config.parallel.model_copy(update=sizes)})


def every_plan(config: Config, machine: Machine) -> list[Plan]:
    """A plan of each possible layout."""
    return [plan(other, machine) for other in layouts(config, machine)]


def nearest_fit(given: Plan, plans: Sequence[Plan]) -> Plan | None:
    """The layout that fits with the fewest doublings and halvings away from the given one; of several, the one with
    the fewest pipeline stages, the smallest tensor parallel size, then the least memory. None when no layout fits."""
    fitting = [p for p in plans if p.fits]
    key = lambda p: (distance(given, p), p.layout["pipeline"], p.layout["tensor"], p.peak)  # noqa: E731
    return min(fitting, key=key, default=None)


def least_split(plans: Sequence[Plan]) -> Plan | None:
    """Of the layouts that fit, the one with the fewest pipeline stages, then with experts over the fewest ranks, then
    with tensors over the fewest; whole experts before parts of them. None when no layout fits."""
    return min((p for p in plans if p.fits), key=_split, default=None)


def _split(p: Plan) -> tuple[int, ...]:
    layout = p.layout
    return layout["pipeline"], layout["expert"] * layout["expert_tensor"], layout["tensor"], layout["expert_tensor"]


def distance(one: Plan, other: Plan) -> float:
    """Doublings and halvings between two layouts."""
    return sum(abs(math.log2(other.layout[f] / one.layout[f])) for f in FIELDS)


def neighbours(given: Plan, plans: Sequence[Plan], count: int = 6) -> list[Plan]:
    """Other layouts by distance from the given one, those that fit first among equals."""
    others = [p for p in plans if p.layout != given.layout]
    return sorted(others, key=lambda p: (distance(given, p), not p.fits, p.peak))[:count]


def fewer_rows(given: Plan) -> Plan | None:
    """The same layout with fewer sequences decoded together, halved until it fits; None if one alone does not fit."""
    config, rows = given.config, rollout_rows(given.config, given.machine)
    while rows > 1:
        rows //= 2
        sampling = config.rollout.model_copy(update={"batch_size": rows})
        evaluation = config.evaluation.model_copy(update={"batch_size": rows})
        other = plan(config.model_copy(update={"rollout": sampling, "evaluation": evaluation}), given.machine)
        if other.fits:
            return other
    return None


def fewer_at_once(given: Plan) -> Plan | None:
    """The same layout with fewer tokens of prompts read at once, halved until it fits; None if one alone does not."""
    config = given.config
    tokens = min(config.rollout.prefill_tokens, rollout_rows(config, given.machine) * config.model.max_sequence_length)
    while tokens > 1:
        tokens //= 2
        sampling = config.rollout.model_copy(update={"prefill_tokens": tokens})
        other = plan(config.model_copy(update={"rollout": sampling}), given.machine)
        if other.fits:
            return other
    return None


def refusal(given: Plan, plans: Sequence[Plan]) -> str:
    """Why a plan does not fit, its largest items, and the nearest ways out."""
    machine = given.machine
    largest = ", ".join(f"{item.name} {gib(item.nbytes)}" for item in given.largest())
    said = (
        f"{settings(given)} needs {gib(given.peak)} on each GPU at its peak ({given.phase}), but {gib(machine.gpu)}"
        f" less {gib(machine.reserve)} reserve leave {gib(machine.usable)}; the largest items: {largest}."
    )
    ways = []
    if near := nearest_fit(given, plans):
        ways.append(f"{_changes(given, near)} ({gib(near.peak)})")
    if parts := fewer_at_once(given):
        ways.append(f"lower rollout.prefill_tokens to {parts.config.rollout.prefill_tokens} ({gib(parts.peak)})")
    if rows := fewer_rows(given):
        ways.append(f"lower {_batches(given, rows)} ({gib(rows.peak)})")
    if ways:
        return f"{said} Nearest that fits: {'; or '.join(ways)}."
    least = min(plans, key=lambda p: p.peak, default=given)
    if rows := fewer_rows(least):
        return (
            f"{said} No layout fits as it stands. {settings(least)} does ({gib(rows.peak)}); also lower"
            f" {_batches(least, rows)}."
        )
    return (
        f"{said} No layout of {machine.world} GPUs with tensor parallelism within {machine.gpus_per_node} fits;"
        f" the least is {gib(least.peak)} with {settings(least)}: {_hint(least)}."
    )


def _batches(given: Plan, fewer: Plan) -> str:
    """The settings that let a rank decode more sequences together than fit, and their new value."""
    rows, sizes = fewer.config.rollout.batch_size, {}
    if given.config.source.type != "dataset":
        sizes["rollout.batch_size"] = given.config.rollout.batch_size
    if given.config.data.held_out:
        sizes["evaluation.batch_size"] = given.config.evaluation.batch_size
    return f"{' and '.join(name for name, size in sizes.items() if size > rows)} to {rows}"


def _changes(given: Plan, other: Plan) -> str:
    return ", ".join(
        f"{'raise' if size > given.layout[name] else 'lower'} parallel.{name} to {size}"
        for name, size in other.layout.items()
        if size != given.layout[name]
    )


def _hint(least: Plan) -> str:
    """What makes the largest item smaller; the workspace of the kernels cannot be."""
    (largest,) = least.largest(1)
    return _MORE_GPUS if largest.nbytes == LOGPROB_WORKSPACE else _HINTS[largest.name]


_MORE_GPUS = "take more GPUs or larger ones"
_SHORTER = "lower batching.micro_batch_size or model.max_sequence_length, or recompute fully"
_HINTS = {
    "parameters": _MORE_GPUS,
    "parameters twice": _MORE_GPUS,
    "Adam's roots": "install transformer-engine, whose Adam needs none",
    "gradients": _MORE_GPUS,
    "optimizer": _MORE_GPUS,
    "resident teacher": _MORE_GPUS,
    "activations": _SHORTER,
    "teacher's activations": _SHORTER,
    "weight gradient": _MORE_GPUS,
    "log-probabilities": "set kernels.update to objective",
    "keys and values": "lower rollout.batch_size or rollout.max_new_tokens",
    "Mamba states": "lower rollout.batch_size",
    "layer's caches twice": "lower rollout.batch_size or rollout.max_new_tokens",
    "prefill": (
        "lower rollout.prefill_tokens or, where one prompt alone has as many, shorten the prompts: raise"
        " rollout.max_new_tokens or lower model.max_sequence_length"
    ),
}
