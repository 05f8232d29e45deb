"""The numbers of a recipe's report: the tree of ``report.json``, which tables, text and pictures show.

Accuracies and recoveries are fractions, divergences nats per token, times seconds, memory bytes. Intervals hold 95%:
Wilson's of an accuracy, Agresti and Min's of a change on the same prompts, a bootstrap over prompts of a recovery.
"""

from __future__ import annotations

from megatron_mopd import metrics
from megatron_mopd.recipe import cells, measurements
from megatron_mopd.recipe.cells import Tree
from megatron_mopd.recipe.outcomes import Outcome, Outcomes
from megatron_mopd.recipe.schema import is_skipped
from megatron_mopd.report import merged


def build(outcomes: Outcomes) -> Tree:
    """Everything but the promises; what is not there yet is None or left out, and named under ``missing``."""
    recipe, teachers = outcomes.recipe, dict.fromkeys(outcomes.teacher_of.values())
    count = len(outcomes.roles.iterations)
    iterations = "one iteration" if count == 1 else f"{count} iterations"
    known = [outcome for outcome in outcomes.finished.values() if "versions" in outcome.result]
    return {
        "title": f"{recipe.dir.name}: {merged(len(teachers))}, {iterations}",
        "students": {key: {"title": t, "stage": stage} for key, (t, stage) in outcomes.students.items()},
        "after": after(outcomes),
        "last": f"mopd_{count}",
        "distilled": {domain: _distilled(outcomes, domain) for domain in outcomes.teacher_of},
        "undistilled": {domain: _undistilled(outcomes, domain) for domain in outcomes.undistilled},
        "notes": dict(outcomes.roles.notes),
        "warm_up": measurements.warm_up(outcomes),
        "overlap": measurements.overlap(outcomes),
        "acceptance": measurements.acceptance(outcomes),
        "staleness": measurements.staleness(outcomes),
        "quantized": _quantized(outcomes),
        "curves": _curves(outcomes),
        "reverse_kl": _reverse_kl(outcomes),
        "stages": [_resources(outcomes, name) for name in recipe.names],
        "wall_s": sum(outcome.result.get("wall_s", 0.0) for outcome in outcomes.finished.values()),
        "parallel": known[-1].result["parallel"] if known else {},
        "versions": known[-1].result["versions"] if known else {},
        "seeds": sorted({config.run.seed for config in outcomes.configs.values()}),
        "missing": _missing(outcomes),
    }


def after(outcomes: Outcomes) -> str | None:
    """Key of the last MOPD iteration that is finished."""
    done = [key for key, (_, stage) in outcomes.students.items() if key.startswith("mopd_") and outcomes.of(stage)]
    return done[-1] if done else None


def _student(outcomes: Outcomes, key: str | None) -> Outcome | None:
    return None if key is None else outcomes.of(outcomes.students.get(key, ("", None))[1])


def _distilled(outcomes: Outcomes, domain: str) -> Tree:
    """One row of the paper's table (report section 3.3.2, Table 5)."""
    teacher, first = outcomes.teacher_of[domain], outcomes.first_teacher_of[domain]
    before, goal = _student(outcomes, "before"), outcomes.of_teacher(teacher)
    measured = {key: _student(outcomes, key) for key in outcomes.students}
    recovered = {
        key: cells.of_recovery(before, outcome, goal, domain)
        for key, outcome in measured.items()
        if key.startswith("mopd_")
    }
    measured |= {"teacher": goal, "first_teacher": outcomes.of_teacher(first)}
    return {
        "teacher": teacher,
        "first_teacher": first,
        "refreshed": teacher != first,
        "cells": {key: cells.of_accuracy(outcome, domain) for key, outcome in measured.items()},
        "change": cells.of_change(before, _student(outcomes, after(outcomes)), domain),
        "recovery": recovered.get(after(outcomes) or ""),
        "recoveries": recovered,
    }


def _undistilled(outcomes: Outcomes, domain: str) -> Tree:
    """What happened, while others were distilled, to a domain that was not."""
    before = _student(outcomes, "before")
    later = [key for key in outcomes.students if key not in ("sft", "before")]
    return {
        "cells": {key: cells.of_accuracy(_student(outcomes, key), domain) for key in outcomes.students},
        "changes": {key: cells.of_change(before, _student(outcomes, key), domain) for key in later},
    }


def _quantized(outcomes: Outcomes) -> Tree | None:
    """What storing the student in few bits cost and saved; None before it is done."""
    outcome = outcomes.of(outcomes.roles.quantized)
    if outcome is None:
        return None
    source = outcomes.recipe.stage(outcome.stage, "report.quantized").initial
    bf16 = outcomes.of(source)
    domains = [domain for domain in (*outcomes.teacher_of, *outcomes.undistilled) if domain in outcome.answers]
    return dict(outcome.result["quantized"]) | {
        "source": source,
        "cells": {
            domain: {"source": cells.of_accuracy(bf16, domain), "quantized": cells.of_accuracy(outcome, domain)}
            for domain in domains
        },
        "changes": {domain: cells.of_change(bf16, outcome, domain) for domain in domains},
    }


def _curves(outcomes: Outcomes) -> Tree:
    """Accuracy while training, all iterations on one axis of steps, and where each of them ends.

    The first point of an iteration is what it started from; between two of them a refreshed teacher may take over.
    """
    borders, accuracy, kl, start = [], {}, {}, 0
    for name in outcomes.roles.iterations:
        outcome = outcomes.of(name)
        if outcome is None:
            break
        steps = outcomes.configs[name].run.steps
        points = [
            (0, outcome.before.get("accuracy", {})),
            *((point["step"], point["accuracy"]) for point in outcome.result["history"] if 0 < point["step"] < steps),
            (steps, outcome.result.get("accuracy", {})),
        ]
        for step, counts in points:
            for domain, one in counts.items():
                accuracy.setdefault(domain, []).append([start + step, one["correct"], one["total"]])
        rows = metrics.read(outcomes.recipe.dir / name)
        for domain in outcomes.served(name):
            series = metrics.series(rows, f"reverse_kl_k1/{domain}")
            kl.setdefault(domain, []).extend([start + step, value] for step, value in series)
        borders.append({"stage": name, "from": start, "to": start + steps})
        start += steps
    return {"iterations": borders, "accuracy": accuracy, "reverse_kl_k1": kl}


def _reverse_kl(outcomes: Outcomes) -> Tree:
    """``{iteration: {domain: {teacher, before, after}}}``, exact, on held-out rollouts of the student at that time."""
    tree: Tree = {}
    for name in outcomes.roles.iterations:
        if (outcome := outcomes.of(name)) is None or "reverse_kl" not in outcome.before:
            continue
        first, last = outcome.before["reverse_kl"], outcome.result["reverse_kl"]
        tree[name] = {
            domain: {"teacher": teacher, "before": first[teacher][domain], "after": last[teacher][domain]}
            for domain, teacher in outcomes.served(name).items()
            if domain in last.get(teacher, {})
        }
    return tree


def _resources(outcomes: Outcomes, name: str) -> Tree:
    """Time and memory of a stage; ``evaluation_s`` is that part of ``wall_s`` in which held-out prompts were answered,
    by speculative decoding too, and scored."""
    stage, config, outcome = outcomes.recipe.stage(name, "report"), outcomes.configs[name], outcomes.of(name)
    state = "skipped" if is_skipped(outcomes.recipe, name) else "finished" if outcome else "missing"
    row: Tree = {"stage": name, "type": stage.type, "initial": stage.initial, "state": state}
    row["teachers"] = [*stage.teachers, *(t for t in config.teachers if t not in stage.teachers)]
    if outcome is None:
        return row
    directory = outcomes.recipe.dir / name
    rows = metrics.read(directory) if (directory / metrics.FILE_NAME).is_file() else []
    evaluated = sum(value for _, value in metrics.series(rows, "time/evaluate"))
    evaluated += sum(tree.get("measure_s", 0.0) for tree in (outcome.before, outcome.result))
    return row | {
        "steps": config.run.steps if stage.type == "train" else None,
        "wall_s": outcome.result.get("wall_s"),
        "evaluation_s": evaluated,
        "memory_bytes": outcome.result.get("memory_bytes"),
        "device_memory_bytes": outcome.result.get("device_memory_bytes"),
    }


def _missing(outcomes: Outcomes) -> list[str]:
    """What the report would show and could not, in words."""
    recipe = outcomes.recipe
    stages = [name for name in recipe.names if not outcomes.of(name) and not is_skipped(recipe, name)]
    found = [f"stage {name}: not finished" for name in stages]
    teachers = dict.fromkeys([*outcomes.first_teacher_of.values(), *outcomes.teacher_of.values()])
    found += [
        f"accuracy of teacher {name}: its stage has no held-out prompts"
        for name in teachers
        if (o := outcomes.of(name)) and not o.answers
    ]
    found += [
        f"accuracy of teacher {name}: it came as a checkpoint, and no finished iteration had it answer held-out prompts"
        for name in teachers
        if outcomes.is_external(name) and outcomes.of_teacher(name) is None
    ]
    measured = {*outcomes.teacher_of, *outcomes.undistilled}
    found += [
        f"report.notes.{d}: no stage is measured on this domain" for d in outcomes.roles.notes if d not in measured
    ]
    roles = outcomes.roles.model_dump()
    found += [f"report.{role}: no stage is named for it" for role, name in roles.items() if name is None]
    names = {"warm_up": "warm-up ablation", "staleness": "staleness", "mtp_boosting": "MTP boosting over seeds"}
    for name, text in names.items():
        if name in outcomes.foreign:
            why = f"is of another run ({outcomes.foreign[name]}); repeat it with make recipe-ablations"
            found.append(f"{text}: ablations/{name}.json {why}")
        elif name not in outcomes.ablations:
            found.append(f"{text}: ablations/{name}.json is not there; make recipe-ablations writes it")
    return found
