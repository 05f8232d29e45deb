"""A memory plan as a table, as JSON and as a picture; the arguments of ``python -m megatron_mopd.doctor``."""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from megatron_mopd import origins
from megatron_mopd.config import Config, ConfigurationError, build_config
from megatron_mopd.memory import layouts
from megatron_mopd.memory.activations import Stack
from megatron_mopd.memory.plan import FIELDS, GIB, PHASES, Item, Machine, Plan, gib, plan, settings
from megatron_mopd.presets import PRESETS
from megatron_mopd.settings import merge, read_yaml

SEQUENCE, PROMPT, ROWS = 8192, 1024, 16
"""Without a configuration file: tokens of the context and of the longest prompt, sequences decoded together."""


def main(arguments: Sequence[str]) -> int:
    """Print the plan that the command line asks for; 1 when it cannot be or does not fit, else 0."""
    given = _parser().parse_intermixed_args(arguments)  # overrides may stand anywhere
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # a plan needs no GPU here
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Megatron-Core warns of absent packages; a plan needs none
            chosen, plans, automatic = _plan(given)
    except ConfigurationError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    refused = "" if chosen.fits else layouts.refusal(chosen, plans)
    beside = _alternatives(chosen, plans)
    if given.json:
        sys.stdout.write(json.dumps(to_json(chosen, beside, refused), indent=2) + "\n")
    else:
        show(chosen, beside, refused, automatic)
    try:
        if given.png:
            figure = picture(chosen, beside)
            figure.savefig(given.png, format="png", dpi=160, facecolor="white", metadata={"Software": None})
    except OSError as error:
        sys.stderr.write(f"--png {given.png}: cannot be written ({error.strerror}); name another file\n")
        return 1
    return 0 if chosen.fits else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m megatron_mopd.doctor",
        description="The memory that a run needs on each GPU. Without arguments: what this machine will use, and why.",
    )
    add, usual = parser.add_argument, Machine(world=1)
    add("overrides", nargs="*", metavar="key=value", help="settings of the configuration, as in training")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--preset", choices=tuple(PRESETS), help="published dimensions")
    what.add_argument("--config", type=Path, metavar="FILE", help="take everything from a training configuration")
    add("--world", type=int, required=True, help="GPUs of the run")
    add("--gpus-per-node", type=int, default=usual.gpus_per_node, help="default %(default)s")
    add("--gpu-memory", type=_number, default=usual.gpu / GIB, metavar="GIB", help="of one GPU; default %(default)g")
    add("--reserve", type=_number, default=usual.reserve / GIB, metavar="GIB", help="for no item; default %(default)g")
    for name in FIELDS:
        add(f"--{name.replace('_', '-')}", type=int, metavar="N", help=f"parallel.{name}")
    add("--sequence-length", type=int, metavar="S", help=f"model.max_sequence_length; with --preset {SEQUENCE}")
    add("--prompt-length", type=int, metavar="P", help=f"tokens of the longest prompts; with --preset {PROMPT}")
    add("--micro-batch", type=int, metavar="B", help="batching.micro_batch_size")
    add("--rollout-batch", type=int, metavar="B", help=f"rollout.batch_size; with --preset {ROWS}")
    add("--teachers", type=int, metavar="K", help="teachers in host memory, 0 for a stage without; with --preset 1")
    add("--precision", choices=("bf16", "fp32"), help="run.precision")
    add("--recompute", choices=("full", "none"), help="activations; with --preset full")
    add("--balance", type=_number, default=usual.balance, help="busiest experts' tokens over the mean; %(default)g")
    add("--stack", choices=get_args(Stack), default=usual.stack, help="fused: transformer-engine and mamba-ssm")
    add("--json", action="store_true", help="print JSON instead of a table")
    add("--png", type=Path, metavar="FILE", help="draw the layout beside its neighbours")
    return parser


def _number(text: str) -> float:
    try:
        if math.isfinite(value := float(text)):
            return value
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r}: expected a finite number")


def _plan(given: argparse.Namespace) -> tuple[Plan, list[Plan], bool]:
    """The plan asked for, those of all layouts, and whether the layout was chosen here."""
    config = _config(given)
    machine = Machine(
        world=given.world,
        gpus_per_node=given.gpus_per_node,
        gpu=round(given.gpu_memory * GIB),
        reserve=round(given.reserve * GIB),
        balance=given.balance,
        stack=given.stack,
        prompt=given.prompt_length,
    )
    named = any(value.startswith("parallel.") for value in given.overrides)
    free = given.config is None and not named and all(vars(given)[name] is None for name in FIELDS)
    layouts.check(config, machine)
    plans = layouts.every_plan(config, machine)
    if free:
        best = layouts.least_split(plans) or min(plans, key=lambda p: p.peak)
        layouts.check(best.config, machine)
        return best, plans, True
    return plan(config, machine), plans, False


def _config(given: argparse.Namespace) -> Config:
    """The configuration file or a preset's, changed by the options that were given."""
    if given.config is None:
        length = given.sequence_length or SEQUENCE
        layouts.check_prompt(given.prompt_length, length)
        given.prompt_length = given.prompt_length or min(PROMPT, length // 2)
        teachers = 1 if given.teachers is None else given.teachers
        if teachers < 0:
            raise ConfigurationError(f"--teachers {teachers}: must be 0 or more; 0 plans a stage without")
        tree = _tree(given.preset, length, given.prompt_length, teachers)
        given.recompute = given.recompute or "full"
    else:
        tree = read_yaml(given.config)
        if given.teachers is not None:
            raise ConfigurationError(f"--teachers {given.teachers}: {given.config} names its teachers; leave it out")
    changed = {
        "model.max_sequence_length": given.sequence_length,
        "batching.micro_batch_size": given.micro_batch,
        "rollout.batch_size": given.rollout_batch,
        "run.precision": given.precision,
        **{f"parallel.{name}": vars(given)[name] for name in FIELDS},
    }
    if given.recompute == "full":
        method = {"granularity": "full", "method": "uniform", "num_layers": 1}
        changed |= {f"model.override.recompute_{name}": value for name, value in method.items()}
    elif given.recompute == "none":
        changed["model.override.recompute_granularity"] = "null"
    options = [f"{name}={value}" for name, value in changed.items() if value is not None]
    config = build_config(merge(tree, [*options, *given.overrides]), origin=str(given.config or "command line"))
    return origins.resolved(config)


def _tree(preset: str, length: int, prompt: int, teachers: int) -> dict[str, Any]:
    tree: dict[str, Any] = {
        "run": {"dir": "runs/plan", "steps": 1, "precision": "bf16"},
        "model": {"preset": preset, "max_sequence_length": length},
        "rollout": {"batch_size": ROWS, "max_new_tokens": length - prompt},
    }
    if teachers:
        tree["teachers"] = {f"teacher{i}": {"checkpoint": "checkpoint", "domains": [f"d{i}"]} for i in range(teachers)}
    else:
        tree |= {"source": {"type": "dataset"}, "objective": {"type": "cross_entropy"}}
        tree["batching"] = {"sequences_per_step": 1}
    return tree


def _alternatives(chosen: Plan, plans: Sequence[Plan]) -> list[Plan]:
    """Neighbouring layouts, and the nearest that fits among them in any case."""
    beside = layouts.neighbours(chosen, plans)
    near = None if chosen.fits else layouts.nearest_fit(chosen, plans)
    return beside if near is None or near in beside else [*beside[:-1], near]


def to_json(chosen: Plan, beside: Sequence[Plan], refused: str) -> dict[str, Any]:
    """The plan as JSON values; memory in bytes."""
    machine = chosen.machine
    return {
        "preset": chosen.config.model.preset,
        "world": machine.world,
        "gpus_per_node": machine.gpus_per_node,
        "gpu_bytes": machine.gpu,
        "reserve_bytes": machine.reserve,
        "layout": chosen.layout,
        "stage": {"number": chosen.stage, "layers": chosen.layers, "peak_bytes": list(chosen.stage_peaks)},
        "fits": chosen.fits,
        "refusal": refused,
        "peak_bytes": chosen.peak,
        "peak_phase": chosen.phase,
        "parameters_per_rank": chosen.parameters,
        "items": [
            {"name": i.name, "bytes": i.nbytes, "phase": i.phase, "exact": i.exact, "what": i.what}
            for i in chosen.items
        ],
        "host": {
            "teachers": chosen.teachers,
            "bytes_per_node": chosen.host,
            "pinned_bytes_per_node": chosen.host_pinned,
        },
        "alternatives": [
            {"layout": p.layout, "peak_bytes": p.peak, "peak_phase": p.phase, "fits": p.fits} for p in beside
        ],
    }


def show(chosen: Plan, beside: Sequence[Plan], refused: str, automatic: bool) -> None:
    """Print the plan as a table, its neighbours as another, and the verdict."""
    from rich.console import Console
    from rich.text import Text

    console, machine = Console(), chosen.machine
    nodes = -(-machine.world // machine.gpus_per_node)
    console.print(Text(f"{chosen.config.model.preset} on {_many(machine.world, 'GPU')}, {_many(nodes, 'node')}"))
    best = "the least split that fits" if chosen.fits else "none fits, it needs the least"
    how = f"; chosen here: {best}" if automatic else ""
    console.print(Text(f"{settings(chosen)}{how}", style="bold"))
    console.print(Text(_assumptions(chosen), style="dim"))
    if len(chosen.stage_peaks) > 1:
        console.print(Text(_stages(chosen)))
    console.print(_items_table(chosen))
    if chosen.teachers:
        host = f"Host memory of a node: {gib(chosen.host)} for its GPUs' shares of {_many(chosen.teachers, 'teacher')}"
        console.print(
            Text(f"{host}; as pinned memory {gib(chosen.host_pinned)}, for torch takes powers of two a tensor.")
        )
    console.print(_beside_table(beside))
    room = machine.usable - chosen.peak
    fit = f"Fits: {gib(chosen.peak)} at the peak ({chosen.phase}), {gib(room)} of {gib(machine.usable)} stay free."
    console.print(Text(refused or fit, style="bold red" if refused else "green"))


def _many(count: int, word: str) -> str:
    return f"{count} {word}" + ("" if count == 1 else "s")


def _assumptions(chosen: Plan) -> str:
    config, machine = chosen.config, chosen.machine
    again = config.model.override.get("recompute_granularity") or "none"
    return (
        f"Context {config.model.max_sequence_length:,} tokens, micro-batch {config.batching.micro_batch_size},"
        f" recompute {again}, {machine.stack} stack, balance of experts {machine.balance:g}. Lines marked ~ are"
        f" estimates, the others exact. {gib(machine.reserve)} of {gib(machine.gpu)} are reserved for CUDA, NCCL and"
        " fragmentation."
    )


def _stages(chosen: Plan) -> str:
    peaks = ", ".join(gib(peak) for peak in chosen.stage_peaks)
    return (
        f"Shown is pipeline stage {chosen.stage} of 0 to {len(chosen.stage_peaks) - 1}, which needs the most: layers"
        f" {chosen.layers}. Peaks of the stages: {peaks}."
    )


def _items_table(chosen: Plan) -> Any:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, title_justify="left")
    table.add_column("on each GPU", no_wrap=True)
    table.add_column("GiB", justify="right")
    table.add_column("", no_wrap=True)
    table.add_column("", overflow="fold")
    widest = max(item.nbytes for item in chosen.items)
    for phase in ("always", *PHASES):
        items = [item for item in chosen.items if item.phase == phase]
        if not items:
            continue
        total = sum(item.nbytes for item in items)
        word = "held throughout" if phase == "always" else f"during {phase}"
        mark = "  ← peak" if phase == chosen.phase else ""
        table.add_row(Text(word + mark, style="bold"), Text(f"{total / GIB:.2f}", style="bold"))
        for item in items:
            bar = "█" * max(1, round(16 * item.nbytes / widest)) if item.nbytes else ""
            what = item.what if item.exact else f"~ {item.what}"
            table.add_row(Text(f"  {item.name}"), f"{item.nbytes / GIB:.2f}", Text(bar, style="blue"), Text(what))
        table.add_section()
    return table


def _beside_table(beside: Sequence[Plan]) -> Any:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    for name in (*FIELDS, "GiB at peak", "peak", ""):
        table.add_column(name, justify="left" if name in ("peak", "") else "right")
    for p in beside:
        verdict = Text("fits", style="green") if p.fits else Text("too much", style="red")
        table.add_row(*map(str, p.layout.values()), f"{p.peak / GIB:.1f}", p.phase, verdict)
    return table


def picture(chosen: Plan, beside: Sequence[Plan]) -> Any:
    """A matplotlib figure: memory at the peak by item, the plan's layout above its neighbours, against the GPU's."""
    from matplotlib.figure import Figure

    from megatron_mopd.palette import domain_colours

    plans, machine = [chosen, *beside], chosen.machine
    figure = Figure(figsize=(10.4, 1.7 + 0.42 * len(plans)), layout="constrained")
    axes = figure.subplots()
    edge = min(1.12 * max(p.peak for p in plans), 1.9 * machine.gpu) / GIB  # a hopeless layout must not dwarf the rest
    edge = max(edge, 1.05 * machine.gpu / GIB)
    parts = [_parts(p) for p in plans]
    colours = domain_colours(list(parts[0]))
    left = [0.0] * len(plans)
    for name in parts[0]:
        widths = [part[name] / GIB for part in parts]
        axes.barh(range(len(plans)), widths, left=left, height=0.68, color=colours[name], label=name, linewidth=0)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for row, p in enumerate(plans):
        text = f"{p.peak / GIB:.0f} GiB in {p.phase}: " + ("fits" if p.fits else "too much")
        beyond = " →" if p.peak / GIB > edge else ""
        colour = "#007a58" if p.fits else "#b04a00"
        axes.text(
            1.01, row, text + beyond, transform=axes.get_yaxis_transform(), va="center", fontsize=8.5, color=colour
        )
    for value, style in ((machine.usable / GIB, (0, (4, 2))), (machine.gpu / GIB, "solid")):
        axes.axvline(value, color="#222222", linewidth=1.1, linestyle=style)
    axes.set_yticks(range(len(plans)), [_label(p) for p in plans], fontsize=8.5)
    axes.get_yticklabels()[0].set_fontweight("bold")
    axes.invert_yaxis()
    axes.set_xlim(0, edge)
    axes.set_xlabel(f"GiB on each GPU; solid: {gib(machine.gpu)} a GPU, dashed: less the reserve", fontsize=9)
    axes.set_title(f"{chosen.config.model.preset} on {machine.world} GPUs", loc="left", fontsize=11, pad=24)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=5, frameon=False, fontsize=8.5, borderaxespad=0.2)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8.5, length=3)
    return figure


def _parts(p: Plan) -> dict[str, int]:
    """What is always held, item by item, and the peak phase as one."""
    always = {item.name: item.nbytes for item in p.items if item.phase == "always"}
    return always | {"peak phase": sum(_sizes(p.items, p.phase))}


def _sizes(items: Sequence[Item], phase: str) -> list[int]:
    return [item.nbytes for item in items if item.phase == phase]


def _label(p: Plan) -> str:
    stages = ", pipeline {pipeline}" if p.layout["pipeline"] > 1 else ""
    return f"tensor {{tensor}}, expert {{expert}}, expert_tensor {{expert_tensor}}{stages}".format(**p.layout)
