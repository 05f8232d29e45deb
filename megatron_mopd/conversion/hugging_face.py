"""Hugging Face directories of ``nemotron_h``: their tensors in one view, and what lies beside them.

Read are one ``model.safetensors`` or an index with its shards, the prefixes ``backbone.`` and ``model.``, experts one
by one (as transformers saves them) or stacked in one tensor (as it holds them), heads of their own or tied.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

from megatron_mopd.config import ConfigurationError
from megatron_mopd.conversion import hugging_face_config, safetensors_file
from megatron_mopd.conversion.safetensors_file import Stored
from megatron_mopd.conversion.torch_dist_raw import Files
from megatron_mopd.conversion.weights import EMBEDDING, HEAD, Companion, Entry, Problems

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
FUSED = re.compile(r"(.+\.mixer\.experts)\.(up_proj|down_proj)")
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
_PREFIXES = ("backbone.", "model.")


class HuggingFaceWeights:
    """The view of a Hugging Face directory; only headers are read until elements are asked for.

    Raises :class:`ConfigurationError` for a directory without weights or configuration. Files that are missing or
    damaged, and tensors that are double or not where the index says, are gathered in ``problems``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.problems = Problems(path)
        self.aliases: dict[str, str] = {}
        self.entries: dict[str, Entry] = {}
        self._places: dict[str, tuple[Path, int]] = {}
        self._files = Files()
        config = hugging_face_config.read(path)
        stored = self._stored()
        prefix = next((p for p in _PREFIXES if any(name.startswith(p) for name in stored)), _PREFIXES[0])
        self.problems.excused = {_canonical(name, prefix) for name in self.problems.excused}
        fused = [self._enter(_canonical(name, prefix), tensor) for name, tensor in stored.items()]
        tied = bool(config.get("tie_word_embeddings")) and HEAD not in self.entries and EMBEDDING in self.entries
        if tied:
            self.entries[HEAD], self._places[HEAD] = self.entries[EMBEDDING], self._places[EMBEDDING]
            self.aliases[HEAD] = EMBEDDING
        self.companion = Companion(
            config=config,
            prefix=prefix,
            fused=tuple(sorted(name for name in fused if name)),
            tied=tied,
            files=carried_files(path),
        )

    def read(self, name: str, start: int, into: memoryview) -> None:
        file, position = self._places[name]
        self._files.read(file, position + start * self.entries[name].dtype.itemsize, into)

    def close(self) -> None:
        self._files.close()

    @property
    def files(self) -> list[Path]:
        """The files that hold the tensors."""
        return sorted({file for file, _ in self._places.values()})

    def _enter(self, name: str, tensor: Stored) -> str | None:
        """Add a tensor to the view; returns its name when it is a stack of experts."""
        match, shape = FUSED.fullmatch(name), tensor.entry.shape
        if not match or len(shape) != 3:
            self._put(name, tensor.file, tensor.start, tensor.entry)
            return None
        expert = Entry(shape[1:], tensor.entry.dtype)
        for number in range(shape[0]):
            start = tensor.start + number * expert.size
            self._put(f"{match[1]}.{number}.{match[2]}.weight", tensor.file, start, expert)
        return name

    def _put(self, name: str, file: Path, start: int, entry: Entry) -> None:
        if name in self.entries:
            self.problems.add("there twice", f"{name} ({self._places[name][0].name} and {file.name})")
            return
        self.entries[name], self._places[name] = entry, (file, start)

    def _stored(self) -> dict[str, Stored]:
        """Tensors by their names on disk, checked against the index where there is one."""
        index = self.path / INDEX
        listed = _weight_map(index) if index.is_file() else None
        present = {p.name for p in self.path.glob("model*.safetensors")}
        files = sorted({*listed.values()} if listed is not None else present)
        if not files:
            raise ConfigurationError(
                f"{self.path}: holds neither {INDEX} nor {SINGLE}; name a directory with safetensors weights"
            )
        if listed is not None:
            self.problems.add("in no line of the index", *(f"file {name}" for name in sorted(present - set(files))))
        stored: dict[str, Stored] = {}
        for name in files:
            expected = {n for n, file in listed.items() if file == name} if listed is not None else set()
            found = self._header(name, expected)
            for tensor, where in found.items():
                if tensor in stored:
                    self.problems.add("there twice", f"{tensor} ({stored[tensor].file.name} and {name})")
                    continue
                if listed is not None and tensor not in listed:
                    self.problems.add("in no line of the index", f"{tensor} ({name})")
                stored[tensor] = where
            if absent := sorted(expected - found.keys() - self.problems.excused):
                self.problems.add("not in the file that the index names", *(f"{n} ({name})" for n in absent))
                self.problems.excused.update(absent)
        return stored

    def _header(self, name: str, expected: set[str]) -> dict[str, Stored]:
        file = self.path / name
        if Path(name).name != name:
            raise ConfigurationError(f"{self.path / INDEX}: names a file outside its directory: {name!r}")
        try:
            return safetensors_file.read_header(file)
        except ConfigurationError as error:
            what = str(error).removeprefix(f"{file}: ") if file.is_file() else "missing"
            self.problems.add("files", f"{name}: {what}")
            self.problems.excused |= expected
            return {}


def _weight_map(index: Path) -> dict[str, str]:
    try:
        found = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {str(name): str(file) for name, file in found.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigurationError(f"{index}: cannot be read: {error!r}; copy it again") from None


def _canonical(name: str, prefix: str) -> str:
    return f"backbone.{name.removeprefix(prefix)}" if name.startswith(prefix) else name


def carried_files(path: Path) -> dict[str, Path]:
    """What lies beside the weights and goes along with them: tokenizer, templates, generation configuration, code."""
    found = {}
    for file in sorted(path.rglob("*")):
        name = file.relative_to(path)
        hidden = any(part.startswith(".") for part in name.parts)
        if hidden or not file.is_file() or file.name.endswith((*_WEIGHTS, ".safetensors.index.json")):
            continue
        if name.as_posix() != hugging_face_config.FILE:
            found[name.as_posix()] = file
    return found


def disk_tensors(entries: Mapping[str, Entry], companion: Companion) -> list[tuple[str, Entry, tuple[str, ...]]]:
    """The tensors to store, spelled as ``companion`` says: name on disk, shape and dtype, names in the view."""
    stacks: dict[str, list[str]] = {}
    for name in entries:
        stem = re.sub(r"\.experts\.\d+\.(up|down)_proj\.weight$", r".experts.\1_proj", name)
        stacks.setdefault(stem if stem in companion.fused else name, []).append(name)
    tensors = []
    for name, members in stacks.items():
        if name == HEAD and companion.tied:
            continue
        entry = entries[members[0]]
        if name in companion.fused:
            if len({entries[member] for member in members}) > 1:
                raise ConfigurationError(f"{name}: its experts differ in shape or dtype, so they make no one tensor")
            entry = Entry((len(members), *entry.shape), entry.dtype)
        disk = companion.prefix + name.removeprefix("backbone.") if name.startswith("backbone.") else name
        tensors.append((disk, entry, tuple(members)))
    return tensors
