"""``report.md`` of a recipe: the table and the promises first, then what stands behind them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from megatron_mopd.recipe.cells import Tree
from megatron_mopd.report import duration, percent, table

MARKS = {"held": "✔ held", "missed": "✘ **missed**", "not measured": "– not measured"}
MEANING = (
    "Greedy accuracy on {tasks} held-out tasks a domain with Wilson's 95% intervals. Recovery is the share of the way"
    " from before to the teacher, (after − before) / (teacher − before), with the 2.5% and 97.5% points of a bootstrap"
    " over tasks; the change is paired task by task."
)


def to_markdown(tree: Mapping[str, Any], pictures: Mapping[str, str]) -> str:
    """The text; ``pictures`` maps a caption to a file name beside it."""
    parts = [f"# {tree['title']}", *_recovery(tree), *_promises(tree)]
    parts += [*_regressions(tree), *_warm_up(tree), *_overlap(tree), *_acceptance(tree)]
    parts += [*_quantized(tree), *_staleness(tree)]
    parts += [f"## {caption}\n\n![{caption}]({name})" for caption, name in pictures.items()]
    parts += [*_stages(tree), *_run(tree)]
    if tree["missing"]:
        parts += ["## Not in this report", "\n".join(f"- {line}" for line in tree["missing"])]
    return "\n\n".join(parts) + "\n"


def tasks(tree: Mapping[str, Any]) -> str:
    """How many held-out tasks stand behind the accuracies, such as ``1,000``."""
    rows = [*tree["distilled"].values(), *tree["undistilled"].values()]
    sizes = sorted({cell["total"] for row in rows for cell in row["cells"].values() if cell is not None})
    if not sizes:
        return "no"
    return f"{sizes[0]:,}" if len(sizes) == 1 else f"{sizes[0]:,} to {sizes[-1]:,}"


def columns(tree: Mapping[str, Any]) -> dict[str, str]:
    """``{key: title}`` of the students in the paper's table."""
    students = {key: student["title"] for key, student in tree["students"].items()}
    return {key: title for key, title in students.items() if key not in ("boosted", "quantized")}


def taught_by(row: Mapping[str, Any]) -> str:
    """The teacher of a row, and the one it took over from where it was refreshed."""
    return f"{row['teacher']}, refreshed from {row['first_teacher']}" if row["refreshed"] else row["teacher"]


def refreshed(sides: Mapping[str, Any]) -> list[str]:
    """``["orderer → orderer2"]`` of a domain whose teacher is another after than before; nothing else."""
    names = [found["teacher"] for found in (sides["before"], sides["after"]) if found is not None]
    return [" → ".join(names)] if len(set(names)) > 1 else []


def goal(row: Mapping[str, Any]) -> str:
    """The accuracy of a row's teacher, where it is known, and its name."""
    return f"{accuracy(row['cells']['teacher'])} ({row['teacher']})".strip()


def notes(tree: Mapping[str, Any], part: str) -> list[str]:
    """What the recipe says of the domains of a part of the tree."""
    return [f"{domain}: {text}" for domain, text in tree["notes"].items() if domain in tree[part]]


def accuracy(cell: Tree | None) -> str:
    """``94.2% [91.8, 95.9]``, or nothing."""
    return "" if cell is None else f"{percent(cell['rate'])} {bounds(cell)}"


def points(change: Tree | None) -> str:
    """``+31.2 [+28.1, +34.0]`` in points, or nothing."""
    return "" if change is None else f"{100 * change['rate']:+.1f} {bounds(change, form='+.1f')}"


def share(found: Tree | None) -> str:
    """``94.9% [91.2, 98.1]``; ``n/a`` where it is undefined, nothing where it was not measured."""
    if found is None:
        return ""
    return percent(found["value"]) + (f" {bounds(found)}" if found["low"] is not None else "")


def valued(found: Tree, form: str = ".3f", scale: float = 1) -> str:
    """A value with its interval if it has one."""
    if found["value"] is None:
        return "n/a"
    value = f"{scale * found['value']:{form}}"
    return value if found["low"] is None else f"{value} {bounds(found, scale, form)}"


def bounds(found: Mapping[str, Any], scale: float = 100, form: str = ".1f") -> str:
    """``[91.2, 98.1]``."""
    return f"[{scale * found['low']:{form}}, {scale * found['high']:{form}}]"


def memory(row: Mapping[str, Any]) -> str:
    """``1.20 GB``, with ``, device 40.10 GB`` on CUDA; nothing where it is not known."""
    sizes = {"": row.get("memory_bytes"), "device ": row.get("device_memory_bytes")}
    return ", ".join(f"{where}{size / 1e9:.2f} GB" for where, size in sizes.items() if size is not None)


def _recovery(tree: Mapping[str, Any]) -> list[str]:
    titles = columns(tree)
    headings = ["domain", *titles.values(), "teacher", "recovery", f"change, before to {_last_title(tree)}"]
    rows = [
        [
            domain,
            *(accuracy(row["cells"][key]) for key in titles),
            goal(row),
            f"**{share(row['recovery'])}**" if row["recovery"] else "",
            points(row["change"]),
        ]
        for domain, row in tree["distilled"].items()
    ]
    refreshed = [
        f"{domain}: {taught_by(row)}, which had {accuracy(row['cells']['first_teacher'])}"
        for domain, row in tree["distilled"].items()
        if row["refreshed"] and row["cells"]["first_teacher"]
    ]
    below = [f"Teachers refreshed between the iterations: {'; '.join(refreshed)}."] if refreshed else []
    return [MEANING.format(tasks=tasks(tree)), table(headings, rows), *below, *notes(tree, "distilled")]


def _last_title(tree: Mapping[str, Any]) -> str:
    return tree["students"][tree["after"] or tree["last"]]["title"]


def _promises(tree: Mapping[str, Any]) -> list[str]:
    lines = []
    for promise in tree["promises"]:
        cases = [
            f"{case['what']} {case['text']}" + ("" if case["held"] else " **(missed)**") for case in promise["cases"]
        ]
        said = "; ".join([*cases, *([promise["absent"]] if promise["absent"] else [])])
        lines.append(f"- {MARKS[promise['status']]}: {promise['rule']}" + (f" — {said}" if said else ""))
    return ["## Promises", "\n".join(lines)]


def _regressions(tree: Mapping[str, Any]) -> list[str]:
    if not tree["undistilled"]:
        return []
    later = [key for key in tree["students"] if key not in ("sft", "before")]
    headings = ["domain", "before", *(f"{tree['students'][key]['title']}, change" for key in later)]
    rows = [
        [domain, accuracy(row["cells"]["before"]), *(points(row["changes"][key]) for key in later)]
        for domain, row in tree["undistilled"].items()
    ]
    text = "Change of accuracy against before, in points, on the same tasks."
    return ["## Domains that were not distilled", text, table(headings, rows), *notes(tree, "undistilled")]


def _warm_up(tree: Mapping[str, Any]) -> list[str]:
    if not tree["warm_up"]:
        return []
    headings = ["domain", "before", "without warm-up", "with warm-up", "teacher", "recovery without", "with", "gain"]
    rows = [
        [
            domain,
            *(accuracy(row["cells"][arm]) for arm in ("before", "without", "with")),
            f"{accuracy(row['cells']['teacher'])} ({row['teacher']})",
            *(share(row["recovery"][arm]) for arm in ("without", "with")),
            f"**{valued(row['gain'], '+.1f', 100)}**",
        ]
        for domain, row in tree["warm_up"].items()
    ]
    return ["## Warm-up, with and without", table(headings, rows)]


def _overlap(tree: Mapping[str, Any]) -> list[str]:
    if not tree["overlap"]:
        return []
    headings = ["domain", "when", "student", "teacher", "decision", "top-k overlap", "teacher mass", "student mass"]
    headings += ["implausible prefixes", "reverse KL"]
    rows = [
        [domain, side, found["student"], found["teacher"], found["decision"].replace("_", " ")]
        + [percent(found[name]) for name in ("overlap", "teacher_mass", "student_mass", "implausible")]
        + ["n/a" if found["reverse_kl"] is None else f"{found['reverse_kl']:.4f}"]
        for domain, sides in tree["overlap"].items()
        for side, found in sides.items()
        if found is not None
    ]
    text = (
        "On the student's own rollouts; masses are those of tokens that are among the likeliest of both, reverse KL in"
        " nats per token."
    )
    return ["## Support overlap before and after", text, table(headings, rows)]


def _acceptance(tree: Mapping[str, Any]) -> list[str]:
    if not tree["acceptance"]:
        return []
    headings = ["draft", "decoding", "before", "after", "gain", "gain over seeds"]
    rows = [
        [
            draft.replace("_", " "),
            mode.replace("_", " "),
            *(valued(row[name]) if name in row else "" for name in ("before", "after")),
            valued(row["gain"], "+.3f") if "gain" in row else "",
            valued(row["seeds"], "+.3f") if "seeds" in row else "",
        ]
        for draft, modes in tree["acceptance"].items()
        for mode, row in modes.items()
    ]
    text = "Accepted tokens per verification, the verifier's own token included, before and after MTP boosting."
    return ["## Acceptance length", text, table(headings, rows)]


def _quantized(tree: Mapping[str, Any]) -> list[str]:
    found = tree["quantized"]
    if not found:
        return []
    rows = [
        [domain, *(accuracy(found["cells"][domain][side]) for side in ("source", "quantized")), points(change)]
        for domain, change in found["changes"].items()
    ]
    size = f"{found['source_bytes']:,} bytes become {found['stored_bytes']:,}"
    text = f"{size}: {found['bits_per_element']:.3f} bits per parameter, recipe {found['recipe']}."
    return ["## What NVFP4 costs", text, table(["domain", found["source"], "NVFP4", "change, points"], rows)]


def _staleness(tree: Mapping[str, Any]) -> list[str]:
    if not tree["staleness"]:
        return []
    settings, rows = tree["staleness"]["settings"], tree["staleness"]["rows"]
    said = (
        f"Runs of {short_runs(settings)}; cosines of gradients from {settings['probe']:,} sequences, with their range"
        " over seeds. *corrected* is Eq. 3; *recomputed* takes from it the advantage alone; *uncorrected* learns from"
        " every rollout as if it were new. The forms of a lag are compared at the same weights, those of different lags"
        " at different ones; at lag 0 the cosine is that of two on-policy gradients."
    )
    headings = ["lag, steps", "form", "recovery, %", "cosine to the on-policy gradient", "seeds"]
    return ["## Staleness", said, table(headings, [stale(row) for row in rows])]


def short_runs(settings: Mapping[str, Any]) -> str:
    """What the runs on staleness were."""
    return (
        f"{settings['steps']} steps of {settings['stage']} with {settings['prompts']} prompts each at the constant"
        f" learning rate {settings['lr']:g}"
    )


def stale(row: Mapping[str, Any]) -> list[str]:
    """Lag, form, recovery, cosine and number of seeds."""
    recovery = "not trained" if row["recovery"] is None else valued(row["recovery"], ".1f", 100)
    form = row["form"] if row["lag"] else "on-policy"
    cosines = row["cosine"]["values"]
    cosine = f"{row['cosine']['value']:.2f} ({min(cosines):.2f} to {max(cosines):.2f})"
    return [str(row["lag"]), form, recovery, cosine, str(len(row["seeds"]))]


def _stages(tree: Mapping[str, Any]) -> list[str]:
    rows = [
        [
            row["stage"],
            row["type"],
            row["initial"] or "",
            ", ".join(row["teachers"]),
            "" if row.get("steps") is None else str(row["steps"]),
            *(_times(row) if row["state"] == "finished" else (row["state"], "")),
            memory(row),
        ]
        for row in tree["stages"]
    ]
    headings = ["stage", "type", "starts from", "teachers", "steps", "time", "of it evaluation", "memory"]
    text = f"All stages together: {duration(tree['wall_s'])}. Memory is the peak resident set of the largest process."
    return ["## Time and memory", text, table(headings, rows)]


def _times(row: Mapping[str, Any]) -> Iterator[str]:
    for name in ("wall_s", "evaluation_s"):
        yield "" if row[name] is None else duration(row[name])


def _run(tree: Mapping[str, Any]) -> list[str]:
    rows: list[Sequence[str]] = [["seeds", ", ".join(str(seed) for seed in tree["seeds"])]]
    rows += [[key, str(value)] for part in ("parallel", "versions") for key, value in tree[part].items()]
    return ["## The run", table(["", ""], rows)]
