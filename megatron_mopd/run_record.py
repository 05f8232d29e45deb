"""``run.json`` in a run's directory: what the run was started with, and what its checkpoints must therefore say.

Another program that reads the directory (a comparison, a replay, a run that takes its checkpoints as a teacher) learns
from it the settings, in full, and whose weights are meant to be there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_mopd import checkpoint_directory, provenance
from megatron_mopd.config import Config, ConfigurationError

FILE = "run.json"
RESULT = "result.json"
_PLACES = ("run.dir", "run.id")


def of(config: Config, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What ``run.json`` holds; ``manifest`` is what the run's checkpoints will say."""
    return {"settings": config.model_dump(mode="json"), "manifest": dict(manifest)}


def read(directory: Path) -> dict[str, Any]:
    """``{"settings": ..., "manifest": ...}`` of the run in ``directory``.

    Raises :class:`ConfigurationError` where there is none or it is no JSON.
    """
    file = directory / FILE
    try:
        found = json.loads(file.read_text())
        return {"settings": dict(found["settings"]), "manifest": dict(found["manifest"])}
    except FileNotFoundError:
        raise ConfigurationError(f"{file}: no such file; name the directory of a run (run.dir)") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigurationError(
            f"{file}: cannot be read: {error!r}; start the run again to have it rewritten"
        ) from None


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """``(setting, value, other value)`` wherever two runs' settings differ; None where one does not have it.

    Where a run lies does not count: ``run.dir`` and ``run.id`` are passed over, and paths are compared as seen from
    the directory that holds the run's.
    """
    a, b = (dict(_flat(_relative(tree))) for tree in (one, other))
    names = [*a, *(name for name in b if name not in a)]
    return [(n, a.get(n), b.get(n)) for n in names if n not in _PLACES and a.get(n) != b.get(n)]


def check_place(checkpoint: Path, manifest: Mapping[str, Any], where: str) -> None:
    """Refuse a checkpoint that lies where another run left its own: directories that were swapped or refilled.

    ``checkpoint`` is ``checkpoints`` in the directory of a finished run, whose ``result.json`` says the checkpoint_id
    of its last weights; anything else passes. Raises :class:`ConfigurationError` naming both.
    """
    file = checkpoint.parent / RESULT
    if checkpoint.name != "checkpoints" or not file.is_file() or "run_id" not in manifest:
        return
    ended = checkpoint_directory.read_json(file, "copy the run's directory again").get("ended")
    if ended is None:
        return
    same_run, same_step = manifest["run_id"] == ended["run_id"], manifest.get("step") == ended["step"]
    if same_run and (not same_step or manifest.get("checkpoint_id") == ended["checkpoint_id"]):
        return
    raise ConfigurationError(
        f"{where}: holds step {manifest.get('step')} of run {manifest['run_id']!r} (checkpoint"
        f" {str(manifest.get('checkpoint_id'))[:12]}), but {file} says that run {ended['run_id']!r} ended there with"
        f" checkpoint {ended['checkpoint_id'][:12]} at step {ended['step']}: it looks as if the directories of two runs"
        f" were swapped, or the checkpoint replaced; put the checkpoint of {ended['run_id']!r} back, or name the"
        " directory that is meant"
    )


def check_start(config: Config, where: str = "") -> None:
    """:func:`check_place` of the checkpoints that a run starts from and learns from, in Megatron's format."""
    for setting, path in _starts(config).items():
        check_place(path, checkpoint_directory.read_manifest(path), f"{where}{setting} = {path}")


def explained(config: Config, most: int = 4) -> str:
    """How the run recorded in ``config.run.dir`` differs from ``config``, as part of a message; "" where unknown."""
    if not (config.run.dir / FILE).is_file():
        return ""
    recorded = read(config.run.dir)
    ids = {s: checkpoint_directory.read_manifest(path).get("checkpoint_id") for s, path in _starts(config).items()}
    now = {
        name: {"checkpoint_id": ids[f"teachers.{name}.checkpoint"], "domains": sorted(teacher.domains)}
        | ({"nvfp4": sorted(teacher.nvfp4)} if teacher.nvfp4 else {})
        for name, teacher in config.teachers.items()
    }
    texts = provenance.teacher_differences(recorded["manifest"].get("teachers") or {}, now)
    before, start = recorded["manifest"].get("initial_id"), ids.get("model.initial")
    if before != start:
        texts.append(f"model.initial was checkpoint {str(before)[:12]} and is {str(start)[:12]} now")
    texts += [
        f"{name} was {mine!r} and is {theirs!r} now"
        for name, mine, theirs in differences(recorded["settings"], config.model_dump(mode="json"))
        if not name.startswith("teachers.")
    ]
    more = f"; and {len(texts) - most} more" if len(texts) > most else ""
    return f": {'; '.join(texts[:most])}{more}" if texts else ""


def _starts(config: Config) -> dict[str, Path]:
    found = {f"teachers.{name}.checkpoint": teacher.checkpoint for name, teacher in config.teachers.items()}
    return found | ({"model.initial": config.model.initial} if config.model.initial is not None else {})


def _relative(settings: Mapping[str, Any]) -> Any:
    root = str(Path(settings["run"]["dir"]).parent)

    def mend(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: mend(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [mend(inner) for inner in value]
        inside = isinstance(value, str) and value.startswith(root + "/")
        return "…" + value.removeprefix(root) if inside else value

    return mend(settings)


def _flat(tree: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, Mapping) and tree:
        for key, value in tree.items():
            yield from _flat(value, f"{name}.{key}" if name else str(key))
    elif isinstance(tree, Sequence) and not isinstance(tree, str) and tree:
        for index, value in enumerate(tree):
            yield from _flat(value, f"{name}[{index}]")
    else:
        yield name, tree
