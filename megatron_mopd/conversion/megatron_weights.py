"""Megatron directories (``torch_dist``): their tensors in the view of :mod:`megatron_mopd.conversion.weights`.

Read are directories that this project, Megatron-LM or Megatron-Bridge wrote, at any layout. Optimizer state and objects
(transformer-engine's ``_extra_state``, random number states, arguments) are counted and passed over.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_mopd import checkpoint_directory, names, torch_dist
from megatron_mopd.checkpoint_directory import COMPANIONS
from megatron_mopd.config import ConfigurationError
from megatron_mopd.conversion import hugging_face, hugging_face_config
from megatron_mopd.conversion.torch_dist_raw import RawReader
from megatron_mopd.conversion.weights import EMBEDDING, HEAD, Companion, Entry, Problems
from megatron_mopd.torch_dist import Stored

_EMBEDDING, _OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"
_OPTIMIZER = ("optimizer.", "chained_")
_OBJECTS = ("optimizer", "chained_", "common_state", "rng_state", "rerun_state_machine_state", "opt_param_scheduler")


class MegatronWeights:
    """The view of the newest checkpoint under ``path``; only metadata is read until elements are asked for.

    ``like`` is a Hugging Face directory whose configuration and companion files stand in for those of a checkpoint that
    came without; ``other`` is the manifest of a checkpoint of the same model, by which one without is read.
    ``query_groups`` is None where nothing tells their number; q, k and v then hold the right elements in another order,
    good for counting and for comparing with a directory read the same way. Raises :class:`ConfigurationError` for a
    directory without a readable checkpoint; unknown, double and incomplete tensors are gathered in ``problems``.
    """

    def __init__(self, path: Path, like: Path | None = None, other: Mapping[str, Any] | None = None) -> None:
        self.path = checkpoint_directory.resolve(path)
        self.problems = Problems(self.path)
        self.manifest = checkpoint_directory.read_manifest(self.path)
        self.companion = companion_of(self.path, self.manifest, like)
        self.index = torch_dist.open_index(self.path)
        self._reader = RawReader(self.index)
        config = self.companion.config if self.companion else {}
        told = {**(other or {}), **self.manifest}
        self.query_groups = told.get("query_groups") or config.get("num_key_value_heads")
        vocab_size = told.get("vocab_size") or config.get("vocab_size")
        tensors = self._select()
        shapes = {name: stored.shape for name, stored in tensors.items()}
        pieces, problems = names.find_pieces(shapes)
        for kind, found in problems.items():
            self.problems.add(kind, *found)
        self.entries: dict[str, Entry] = {}
        self.aliases: dict[str, str] = {}
        self._layouts: dict[str, names.Layout] = {}
        for piece in pieces:
            if all(source in tensors for source in piece.sources):
                self._enter(piece, shapes, tensors, vocab_size)
        self._tie(tensors, bool(config.get("tie_word_embeddings")))

    def read(self, name: str, start: int, into: memoryview) -> None:
        layout, size = self._layouts[name], self.entries[name].dtype.itemsize
        position, end, done = 0, start + len(into) // size, 0
        for segment in layout.segments:
            first, last = max(start, position), min(end, position + segment.count)
            if first < last:
                part = into[done : done + (last - first) * size]
                self._reader.read(segment.source, segment.start + first - position, part)
                done += len(part)
            position += segment.count

    def close(self) -> None:
        self._reader.__exit__(None, None, None)

    @property
    def files(self) -> list[Path]:
        """The files that hold the tensors."""
        found = {chunk.file for stored in self.index.tensors.values() for chunk in stored.chunks}
        return sorted(self.path / name for name in found)

    def _select(self) -> dict[str, Stored]:
        """The model's tensors; the rest is counted, and anything that is neither is a problem."""
        tensors = {n: s for n, s in self.index.tensors.items() if n.startswith(names.PREFIXES)}
        rest = self.index.tensors.keys() - tensors.keys()
        self.optimizer_tensors = sum(name.startswith(_OPTIMIZER) for name in rest)
        self.problems.add(names.UNMAPPED, *(repr(n) for n in rest if not n.startswith(_OPTIMIZER)))
        objects = self.index.objects
        self.objects = len(objects)
        known = (n for n in objects if n.split("/")[0].endswith("_extra_state") or n.startswith(_OBJECTS))
        self.problems.add("no tensor and no known object", *(repr(n) for n in {*objects} - {*known}))
        return tensors

    def _enter(
        self,
        piece: names.Piece,
        shapes: Mapping[str, tuple[int, ...]],
        tensors: Mapping[str, Stored],
        vocab_size: int | None,
    ) -> None:
        dtypes = {source: tensors[source].dtype for source in piece.sources}
        if piece.part in ("q", "k", "v"):
            dtypes = {piece.sources[0]: dtypes[piece.sources[0]]}  # the projection only tells the widths
        if len(set(dtypes.values())) > 1:
            self.problems.add("parts of different dtypes", f"{piece.name} ({dtypes})")
            return
        try:
            layout = names.layout(piece, shapes, self.query_groups or 1, vocab_size)
        except ConfigurationError as error:
            self.problems.add("of a shape that does not divide", str(error))
            self.problems.excused.add(piece.name)
            return
        self._layouts[piece.name] = layout
        self.entries[piece.name] = Entry(layout.shape, dtypes[piece.sources[0]])

    def _tie(self, tensors: Mapping[str, Stored], tied: bool) -> None:
        """A head that is not stored, or is stored in the embedding's own bytes, is the embedding."""
        shared = {*(tensors[n].chunks for n in (_EMBEDDING, _OUTPUT) if n in tensors)}
        if EMBEDDING in self.entries and (
            (tied and HEAD not in self.entries) or (_OUTPUT in tensors and len(shared) == 1)
        ):
            self.entries[HEAD], self._layouts[HEAD] = self.entries[EMBEDDING], self._layouts[EMBEDDING]
            self.aliases[HEAD] = EMBEDDING


def companion_of(path: Path, manifest: Mapping[str, Any], like: Path | None = None) -> Companion | None:
    """What the Hugging Face directory ``like`` or else the checkpoint at ``path`` holds beside weights; None for a
    checkpoint that came without. Raises :class:`ConfigurationError` for files that its manifest names in vain."""
    if like is not None:
        return Companion(config=hugging_face_config.read(like), files=hugging_face.carried_files(like))
    if not isinstance(found := manifest.get(COMPANIONS), dict):
        return None
    folder = path / COMPANIONS
    files = {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if p.is_file()}
    if absent := sorted(set(found["files"]) - files.keys()):
        raise ConfigurationError(
            f"{folder}: {absent[0]} is missing; copy the checkpoint again, or convert it with --like HF_DIR"
        )
    return Companion(
        config=found["config"],
        prefix=found["prefix"],
        fused=tuple(found["fused_experts"]),
        tied=found["tied"],
        blocks=found["mtp_blocks"],
        files=files,
    )


def describe(companion: Companion, blocks: int) -> dict[str, Any]:
    """The manifest's entry from which :class:`MegatronWeights` makes ``companion`` again."""
    return {
        "config": companion.config,
        "prefix": companion.prefix,
        "fused_experts": list(companion.fused),
        "tied": companion.tied,
        "mtp_blocks": blocks,
        "files": sorted(companion.files),
    }
