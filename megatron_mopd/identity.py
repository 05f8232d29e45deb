"""``checkpoint_id``: what a checkpoint holds, whatever layout wrote it.

sha256 over the lines ``name dtype shape sha256`` of its tensors, sorted by Hugging Face name; a tensor's sha256 is over
its bytes, row-major and little-endian. Experts count one by one, QKV as q, k and v, Mamba projections whole, padding
rows of the vocabulary not at all, MTP with the rest; an output weight that equals the embedding is tied and counts
once, stored or not. Needs no model: tensors are read one after another.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_mopd import checkpoint_directory, names, torch_dist


@dataclass(frozen=True, order=True, slots=True)
class Digest:
    """One tensor's line of the identity."""

    name: str  # Hugging Face
    dtype: str  # such as "bfloat16"
    shape: tuple[int, ...]
    sha256: str  # hex


def digest(name: str, tensor: Tensor) -> Digest:
    """The line of one Hugging Face tensor."""
    content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    dtype = str(tensor.dtype).removeprefix("torch.")
    return Digest(name, dtype, tuple(tensor.shape), hashlib.sha256(content).hexdigest())


def combine(digests: Iterable[Digest]) -> str:
    """The checkpoint_id (sha256 hex) of all its tensors' lines, in any order."""
    found = {d.name: d for d in digests}
    head, embedding = found.get("lm_head.weight"), found.get("backbone.embeddings.weight")
    if (
        head
        and embedding
        and (head.dtype, head.shape, head.sha256)
        == (
            embedding.dtype,
            embedding.shape,
            embedding.sha256,
        )
    ):
        del found["lm_head.weight"]
    lines = (f"{d.name} {d.dtype} {'x'.join(map(str, d.shape))} {d.sha256}\n" for d in sorted(found.values()))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def checkpoint_id(path: Path, *, query_groups: int | None = None, vocab_size: int | None = None) -> str:
    """Read the newest checkpoint under ``path`` and compute its id afresh.

    ``query_groups`` and ``vocab_size`` (rows before padding) come from its manifest when left out; a checkpoint without
    a manifest needs the first given. Raises :class:`ConfigurationError` for a checkpoint that is missing, damaged or of
    another family.
    """
    path = checkpoint_directory.resolve(path)
    manifest = checkpoint_directory.read_manifest(path)
    groups = query_groups or manifest.get("query_groups")
    return combine(tensor_digests(torch_dist.open_index(path), groups, vocab_size or manifest.get("vocab_size")))


def tensor_digests(
    index: torch_dist.Index, query_groups: int | None, vocab_size: int | None, part: int = 0, parts: int = 1
) -> list[Digest]:
    """The lines of share ``part`` of ``parts``, so that ranks can divide the reading; a source is read once a share."""
    shapes = {name: stored.shape for name, stored in index.tensors.items() if name.startswith(names.PREFIXES)}
    by_source: dict[tuple[str, ...], list[names.Piece]] = {}
    for piece in names.hugging_face_pieces(shapes):
        by_source.setdefault(piece.sources, []).append(piece)
    lines = []
    for sources, pieces in list(by_source.items())[part::parts]:
        tensors = [torch_dist.read(index, source) for source in sources]
        lines += [digest(p.name, names.assemble(p, tensors, query_groups, vocab_size)) for p in pieces]
    return lines
