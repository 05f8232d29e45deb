"""Hugging Face directories in and out of a run: converted once when it starts, written when it has ended."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_mopd import conversion, origins, together
from megatron_mopd.companions import Companions
from megatron_mopd.config import Config, ConfigurationError
from megatron_mopd.conversion import cache, hugging_face_config, inspection
from megatron_mopd.conversion.partial_directory import BusyError, refuse_existing
from megatron_mopd.display import TransferProgress
from megatron_mopd.parallel import Groups

logger = logging.getLogger(__name__)

FOLDER = "hugging_face"
"""Of a run's directory, with the export."""


def prepare(config: Config, groups: Groups) -> Config:
    """``config`` with its architectures spelled out and every checkpoint a Megatron directory; all ranks call it.

    Hugging Face directories are converted into ``checkpoint.cache``, where earlier starts with the same files have not:
    by the first rank, then by one rank of each machine that does not see what the first one wrote; what another run is
    at work on is waited for. A prepared
    configuration comes back as it is. Raises :class:`ConfigurationError` on all ranks.
    """
    config = resolved(config, groups)
    checkpoints = {teacher.checkpoint for teacher in config.teachers.values()} | {config.model.initial}
    found = sorted(str(path) for path in checkpoints if path is not None and origins.is_hugging_face(path))
    seen: list[Any] = [None] * groups.world_size
    dist.all_gather_object(seen, found, group=groups.world)
    if unlike := [rank for rank, paths in enumerate(seen) if paths != seen[0]]:
        raise ConfigurationError(
            f"rank {unlike[0]} finds the Hugging Face directories {seen[unlike[0]]}, rank 0 {seen[0]}; every machine"
            " must see the same ones under the same paths"
        )
    if not found:
        return config
    where = converted_beside(config)
    moved = {Path(path): converted(Path(path), where, groups) for path in found}
    teachers = {
        name: teacher.model_copy(update={"checkpoint": moved.get(teacher.checkpoint, teacher.checkpoint)})
        for name, teacher in config.teachers.items()
    }
    initial = config.model.initial
    model = config.model.model_copy(update={"initial": initial and moved.get(initial, initial)})
    return config.model_copy(update={"model": model, "teachers": teachers})


def resolved(config: Config, groups: Groups) -> Config:
    """:func:`origins.resolved` on every rank; where one fails, all raise :class:`ConfigurationError`."""

    def read(report: together.Report) -> None:
        nonlocal config
        config = origins.resolved(config)

    together.work(groups, True, read)
    return config


def converted_beside(config: Config) -> Path:
    """Where the run keeps converted directories."""
    return config.checkpoint.cache or config.run.dir.parent / "converted"


def converted(source: Path, where: Path, groups: Groups) -> Path:
    """The Megatron directory of the Hugging Face directory ``source`` in the cache ``where``, on every rank."""
    named: list[Any] = [None]

    def name(report: together.Report) -> None:
        named[0] = str(cache.place(source, where))
        promised = hugging_face_config.read(source).get("num_nextn_predict_layers")
        if promised and not origins.stored_mtp_blocks(source):
            logger.warning(
                "%s: config.json promises %d MTP depths and no MTP weights are stored (transformers saves none): the"
                " model has no MTP heads here",
                source,
                promised,
            )

    together.work(groups, groups.rank == 0, name)
    dist.broadcast_object_list(named, src=0, group=groups.world)
    target = Path(named[0])
    for everywhere in (False, True):
        lacking = _lacking(target, groups)
        if not lacking:
            logger.info("%s: read as %s", source, target)
            return target
        first = {host: min(r for r, h in lacking.items() if h == host) for host in lacking.values()}
        chosen = set(first.values()) if everywhere else {min(lacking)}
        with TransferProgress(f"converting {source}", enabled=groups.rank == min(chosen)) as progress:
            together.work(groups, groups.rank in chosen, _conversion(source, target), progress.update)
    if lacking := _lacking(target, groups):
        raise ConfigurationError(
            f"{target}: was written and cannot be seen by ranks {sorted(lacking)}; set checkpoint.cache to a directory"
            " that every process of a machine sees"
        )
    return target


def _conversion(source: Path, target: Path) -> Callable[[together.Report], None]:
    def action(report: together.Report) -> None:
        said = False
        while not cache.is_converted(target):
            try:
                cache.convert(source, target, without_mtp=not origins.stored_mtp_blocks(source), report=report)
            except BusyError as error:  # of another run, or of another machine that shares the disk
                if not said:
                    logger.info("%s", error)
                said = True
                time.sleep(together.PERIOD)
            except ConfigurationError:
                if not cache.is_converted(target):  # another machine's may just have come into sight
                    raise

    return action


def _lacking(target: Path, groups: Groups) -> dict[int, str]:
    """The ranks that do not see the converted directory, and their machines."""
    states: list[Any] = [None] * groups.world_size
    dist.all_gather_object(states, (cache.is_converted(target), socket.gethostname()), group=groups.world)
    return {rank: host for rank, (there, host) in enumerate(states) if not there}


# --------------------------------------------------------------------------- out


def check_export(config: Config, carried: Companions) -> None:
    """Refuse a run whose export would fail, from all that can be known before the first step."""
    if config.checkpoint.export == "none":
        return
    if carried.entry is None:
        raise ConfigurationError(
            f"checkpoint.export = {config.checkpoint.export}: config.json of nemotron_h cannot say what"
            f" model.override = {config.model.override} makes of the layers; take the override out, or export none"
        )
    try:
        refuse_existing(config.run.dir / FOLDER)
    except ConfigurationError:
        raise ConfigurationError(
            f"checkpoint.export = {config.checkpoint.export}: {config.run.dir / FOLDER} is there already and is not"
            " overwritten; move it away, or choose another run.dir"
        ) from None


def export(config: Config, groups: Groups) -> Path | None:
    """Leave the run's newest checkpoint as a Hugging Face directory, where the configuration asks for it.

    The first rank writes, whole or not at all; the same call goes on behind the last file of an interrupted one. A
    directory with these very weights is kept. Raises :class:`ConfigurationError` on all ranks for another one.
    """
    if config.checkpoint.export == "none":
        return None
    source, target = config.run.dir / "checkpoints", config.run.dir / FOLDER

    def action(report: together.Report) -> None:
        if not target.is_dir() or not any(target.iterdir()):
            conversion.megatron_to_hugging_face(source, target, report=report)
        elif differences := inspection.differences(source, target, report):
            raise ConfigurationError(
                f"{target}: holds other weights than {source} ({differences[0]}); remove it or choose another run.dir"
            )

    with TransferProgress(f"writing {target}", enabled=groups.rank == 0) as progress:
        together.work(groups, groups.rank == 0, action, progress.update)
    logger.info("%s: the final weights, for transformers", target)
    return target
