"""Scores a file of token sequences: JSON lines ``{"id", "tokens"}`` in, ``{"id", "logprobs"}`` out, in the same order.

The first rank reads and writes; a window of lines is in memory at a time, dealt to the data-parallel ranks by length so
that all have about as much to do. What computes is :class:`megatron_mopd.scoring.Scorer`, as for teachers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.distributed as dist

from megatron_mopd.config import ConfigurationError
from megatron_mopd.files import atomically
from megatron_mopd.records import Prompt, Rollout
from megatron_mopd.scoring import Scorer, check_logprobs

WINDOW = 8
"""Micro-batches of each data-parallel rank that are read, dealt and written together."""


@dataclass(frozen=True, slots=True)
class Line:
    """One sequence of the input."""

    number: int  # of the line, from 1
    id: str | int
    tokens: list[int]


@dataclass(frozen=True, slots=True)
class Totals:
    """What a file holds."""

    lines: int
    tokens: int


def read(path: Path) -> Iterator[Line]:
    """The sequences of a file in order; blank lines and further fields are passed over.

    Raises :class:`ConfigurationError` naming file, line, rule and way out.
    """
    try:
        with path.open("rb") as file:
            for number, text in enumerate(file, start=1):
                if text.strip():
                    yield _line(text, number, f"{path}:{number}")
    except OSError as error:
        raise ConfigurationError(f"{path}: cannot be read: {error.strerror}; name a file of JSON lines") from None


def _line(text: bytes, number: int, origin: str) -> Line:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigurationError(f'{origin}: not valid JSON: {error}; write {{"id": ..., "tokens": [...]}}') from None
    if not isinstance(row, dict) or "id" not in row or "tokens" not in row:
        raise ConfigurationError(f'{origin}: an object with the fields "id" and "tokens" is needed on each line')
    if isinstance(row["id"], bool) or not isinstance(row["id"], str | int):
        raise ConfigurationError(f"{origin}: id = {row['id']!r}: must be text or a whole number")
    tokens = row["tokens"]
    if not isinstance(tokens, list) or not tokens:
        raise ConfigurationError(
            f"{origin}: tokens = {tokens!r}: must be a list with at least one token id; take the line out"
        )
    if wrong := [token for token in tokens if type(token) is not int]:
        raise ConfigurationError(f"{origin}: tokens holds {wrong[0]!r}: token ids are whole numbers")
    return Line(number, row["id"], tokens)


def check(path: Path, scorer: Scorer) -> Totals:
    """Read the whole file and refuse it for any line that cannot be scored.

    Beside the rules of :func:`read`: ids differ (which stay in memory), tokens are of the vocabulary, and a
    sequence fits into one micro-batch.
    """
    seen: dict[int | str, int] = {}
    lines = tokens = 0
    for line in read(path):
        origin = f"{path}:{line.number}"
        if (first := seen.setdefault(line.id, line.number)) != line.number:
            raise ConfigurationError(f"{origin}: id {line.id!r} is on line {first} already; give each line its own")
        low, high = min(line.tokens), max(line.tokens)
        if low < 0 or high >= scorer.vocab_size:
            raise ConfigurationError(
                f"{origin}: token id {low if low < 0 else high} is not in the vocabulary of {scorer.vocab_size} tokens;"
                " write the file with the tokenizer of this checkpoint"
            )
        if scorer.max_tokens is not None and scorer.padded(len(line.tokens)) > scorer.max_tokens:
            raise ConfigurationError(
                f"{origin}: {len(line.tokens):,} tokens are more than the {scorer.max_tokens:,} that go through the"
                " model together; raise --max-tokens or shorten the line"
            )
        lines, tokens = lines + 1, tokens + len(line.tokens)
    if not lines:
        raise ConfigurationError(f"{path}: holds no line; one JSON object a line is needed")
    return Totals(lines, tokens)


def score_file(
    path: Path, output: Path, model: Any, scorer: Scorer, show: Callable[[int], Any] = lambda tokens: None
) -> None:
    """Score every line of ``path`` into ``output``, which is there whole or not at all; all ranks call it.

    ``show`` is called on the first rank with the tokens done so far. Raises :class:`ScoringError` on the rank that
    finds a value that is no log-probability.
    """
    if scorer.groups.rank == 0:
        lines = read(path)

        def fill(temporary: Path) -> None:
            with temporary.open("w", encoding="utf-8") as file:
                _score(windows(lines, scorer), file, model, scorer, show)

        atomically(output, fill)
    else:
        _score(None, None, model, scorer, show)


def windows(lines: Iterable[Line], scorer: Scorer) -> Iterator[list[Line]]:
    """``lines`` in order, as many together as keep every data-parallel rank busy for :data:`WINDOW` micro-batches."""
    most = WINDOW * scorer.groups.dp_size
    window: list[Line] = []
    size = 0
    for line in lines:
        full = scorer.max_tokens is not None and size + len(line.tokens) > most * scorer.max_tokens
        if window and (full or len(window) == most * scorer.micro_batch_size):
            yield window
            window, size = [], 0
        window.append(line)
        size += len(line.tokens)
    if window:
        yield window


def _score(
    read: Iterator[list[Line]] | None, file: TextIO | None, model: Any, scorer: Scorer, show: Callable[[int], Any]
) -> None:
    groups, done = scorer.groups, 0
    while True:
        told: list[Any] = [next(read, None) if read is not None else None]
        dist.broadcast_object_list(told, src=0, group=groups.world)
        if (window := told[0]) is None:
            return
        # Longest first: micro-batches hold sequences of about one length, and ranks get one of each length in turn.
        order = sorted(range(len(window)), key=lambda i: -len(window[i].tokens))
        mine = order[groups.dp_rank :: groups.dp_size]
        shares: list[Any] = [None] * groups.dp_size
        dist.all_gather_object(shares, _own([window[i] for i in mine], model, scorer), group=groups.dp)
        done += sum(len(line.tokens) for line in window)
        if file is not None:
            texts: list[str] = [""] * len(window)
            for rank, share in enumerate(shares):
                for index, values in zip(order[rank :: groups.dp_size], share, strict=True):
                    texts[index] = values
            for line, values in zip(window, texts, strict=True):
                file.write(f'{{"id": {json.dumps(line.id)}, "logprobs": [{values}]}}\n')
            show(done)


def _own(lines: Sequence[Line], model: Any, scorer: Scorer) -> list[str]:
    """The log-probabilities of this rank's lines, nine digits each, which is all that fp32 has."""
    rollouts = [
        Rollout(
            prompt=Prompt(id=str(line.id), domain="", messages=(), tokens=(line.tokens[0],)),
            sample=0,
            completion=torch.tensor(line.tokens[1:], dtype=torch.int64),
            finish="length",
        )
        for line in lines
    ]
    flat = scorer.logprobs(model, scorer.even(scorer.pack(rollouts)))
    parts = flat.split([len(line.tokens) - 1 for line in lines]) if lines else ()
    for line, values in zip(lines, parts, strict=True):
        check_logprobs(values, "the checkpoint", f"id {line.id!r} after the first (line {line.number})")
    return [", ".join(f"{value:.9g}" for value in values.tolist()) for values in parts]
