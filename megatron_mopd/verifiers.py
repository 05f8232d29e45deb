"""Verifiers: how a completion's text is judged, as plain JSON data on the prompt, so that it survives a checkpoint.

Kinds: ``exact`` (``answer``), ``number`` (``answer``, optional absolute ``tolerance``), ``reasoning_gym`` (made by
:mod:`megatron_mopd.reasoning_tasks`; it names a task, which is generated anew when a text is judged).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from megatron_mopd import reasoning_tasks
from megatron_mopd.config import ConfigurationError
from megatron_mopd.settings import nearest

Judge = Callable[[Mapping[str, Any], str], float]


def verify(verifier: Mapping[str, Any], text: str) -> float:
    """Score of ``text`` in [0, 1]; 1 is right. Errors as in :func:`check`."""
    check(verifier)
    return _KINDS[verifier["kind"]][0](verifier, text)


def check(verifier: Mapping[str, Any]) -> None:
    """Raise :class:`ConfigurationError` unless ``verifier`` is of a known kind and has exactly that kind's fields."""
    kind = verifier.get("kind")
    if kind not in _KINDS:
        raise ConfigurationError(f"verifier.kind = {kind!r}: unknown kind{nearest(str(kind), list(_KINDS))}")
    _, needed, optional = _KINDS[kind]
    if missing := [name for name in needed if name not in verifier]:
        raise ConfigurationError(
            f"verifier.{missing[0]}: missing; a verifier of kind {kind!r} needs {', '.join(needed)}"
        )
    if extra := sorted(verifier.keys() - {"kind"} - set(needed) - set(optional)):
        hint = nearest(extra[0], needed + optional)
        raise ConfigurationError(f"verifier.{extra[0]}: unknown field of kind {kind!r}{hint}")
    if kind == "exact" and not isinstance(verifier["answer"], str):
        raise ConfigurationError(
            f"verifier.answer = {verifier['answer']!r}: kind 'exact' compares text; write a string"
        )
    if kind == "number" and not all(_is_number(verifier[k]) for k in ("answer", "tolerance") if k in verifier):
        raise ConfigurationError(
            "verifier: kind 'number' compares finite numbers; write answer and tolerance as numbers"
        )


def _exact(verifier: Mapping[str, Any], text: str) -> float:
    return float(text.strip() == verifier["answer"].strip())


def _number(verifier: Mapping[str, Any], text: str) -> float:
    try:
        value = float(text.strip().replace(",", ""))
    except ValueError:
        return 0.0
    return float(abs(value - verifier["answer"]) <= verifier.get("tolerance", 0.0))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


_KINDS: dict[str, tuple[Judge, tuple[str, ...], tuple[str, ...]]] = {
    "exact": (_exact, ("answer",), ()),
    "number": (_number, ("answer",), ("tolerance",)),
    "reasoning_gym": (reasoning_tasks.judge, reasoning_tasks.VERIFIER_FIELDS, ()),
}
