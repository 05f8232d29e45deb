"""What every prompt source yields, and the identity of a prompt: its id and the side of the split it belongs to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Messages = tuple[Mapping[str, str], ...]
Side = Literal["train", "held_out"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """One row of a source before it is tokenized.

    Example: ``Item(messages=({"role": "user", "content": "spell cat"},), domain="spell", completion="tac",
    verifier={"kind": "exact", "answer": "tac"}, origin="data.jsonl:3")``
    """

    messages: Messages
    domain: str
    origin: str  # where an error message points: file and line, or family and index
    completion: str | None = None
    verifier: Mapping[str, Any] = field(default_factory=dict)


def prompt_id(domain: str, messages: Sequence[Mapping[str, str]]) -> str:
    """sha256 hex of the domain and the messages; the same in every process."""
    return _sha([domain, [[m["role"], m["content"]] for m in messages]])


def text_key(messages: Sequence[Mapping[str, str]]) -> str:
    """sha256 hex of the prompt's text, case and white space aside: what de-duplication and the split compare."""
    return _sha([[m["role"], " ".join(m["content"].casefold().split())] for m in messages])


def side(key: str, held_out_fraction: float) -> Side:
    """The side of the split that the prompt with this :func:`text_key` is on, whatever source or seed produced it."""
    return "held_out" if int(key[:16], 16) < held_out_fraction * 2**64 else "train"


def _sha(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, ensure_ascii=True, separators=(",", ":")).encode()).hexdigest()
