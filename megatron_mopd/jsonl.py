"""Prompts from JSON lines: chat ``messages``, ``domain``, optional ``completion`` and ``verifier``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from megatron_mopd import verifiers
from megatron_mopd.config import ConfigurationError
from megatron_mopd.data_config import JsonlPrompts
from megatron_mopd.prompt_items import Item, Messages, side, text_key


def read(source: JsonlPrompts) -> Iterator[Item]:
    """The rows of a file in order, those of the wanted side of the split; blank lines and further fields are ignored.

    Raises :class:`ConfigurationError` naming file and line for anything that is not such a row.
    """
    try:
        lines = source.path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise ConfigurationError(f"{source.path}: cannot be read: {error.strerror}") from None
    rows = 0
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        rows += 1
        item = _row(line, f"{source.path}:{number}")
        if source.split == "all" or side(text_key(item.messages), source.held_out_fraction) == source.split:
            yield item
    if not rows:
        raise ConfigurationError(f"{source.path}: no rows; one JSON object a line is expected")


def _row(line: bytes, origin: str) -> Item:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{origin}: not UTF-8: {error.reason} at byte {error.start}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigurationError(f"{origin}: not valid JSON: {error}") from None
    if not isinstance(row, dict):
        raise ConfigurationError(f"{origin}: expected a JSON object, got {type(row).__name__}")
    domain = _field(row, "domain", origin)
    if not isinstance(domain, str) or not domain:
        raise ConfigurationError(f"{origin}: domain = {domain!r}: expected a name; routing picks the teacher by it")
    completion = row.get("completion")
    if completion is not None and (not isinstance(completion, str) or not completion.strip()):
        raise ConfigurationError(
            f"{origin}: completion = {completion!r}: a completion is text and not empty;"
            " leave the field out of a row that is only a prompt"
        )
    return Item(
        messages=_messages(_field(row, "messages", origin), origin),
        domain=domain,
        origin=origin,
        completion=completion,
        verifier=_verifier(row.get("verifier"), origin),
    )


def _field(row: dict[str, Any], name: str, origin: str) -> Any:
    if name not in row:
        raise ConfigurationError(f"{origin}: field {name!r} is missing; the row has {', '.join(sorted(row)) or 'none'}")
    return row[name]


def _messages(messages: Any, origin: str) -> Messages:
    if not isinstance(messages, list) or not messages:
        raise ConfigurationError(f"{origin}: messages: expected a list of role and content, not empty")
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise ConfigurationError(
                f"{origin}: messages[{index}]: expected an object whose role and content are strings"
            )
    if messages[-1]["role"] == "assistant":
        raise ConfigurationError(
            f"{origin}: messages end with the assistant, whose turn is what the student writes;"
            " move that text to the field completion"
        )
    return tuple({"role": m["role"], "content": m["content"]} for m in messages)


def _verifier(verifier: Any, origin: str) -> dict[str, Any]:
    if verifier is None:
        return {}
    if not isinstance(verifier, dict):
        raise ConfigurationError(f"{origin}: verifier: expected an object such as {{'kind': 'exact', 'answer': ...}}")
    try:
        verifiers.check(verifier)
    except ConfigurationError as error:
        raise ConfigurationError(f"{origin}: {error}") from None
    return verifier
