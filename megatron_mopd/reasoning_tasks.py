"""Prompts from reasoning-gym's procedural task families, judged by the families' own verifiers.

A family's task is a function of (seed, index), so a prompt keeps those instead of the task, which is generated anew
when a completion is judged. Tasks are drawn in blocks: some families spread their mixture over the size they are given.
"""

from __future__ import annotations

import difflib
import hashlib
import itertools
import json
import logging
import re
import string
import typing
from collections.abc import Iterator, Mapping
from dataclasses import fields
from enum import Enum
from functools import lru_cache
from typing import Any

from megatron_mopd.config import ConfigurationError
from megatron_mopd.data_config import ReasoningGymPrompts
from megatron_mopd.prompt_items import Item, Messages, side, text_key
from megatron_mopd.settings import nearest

logger = logging.getLogger(__name__)

VERIFIER_FIELDS = ("family", "options", "seed", "index", "answer")
_BLOCK = 10_000  # tasks per seed; word_ladder takes no size above 20,000
_MOST_DRAWS = 1_000  # tasks drawn per prompt found, before the family is given up

# Verifiers of these families run the answer as Python (eval, or sympy's parser on top of it). A model's text is never
# run: only the reference answer counts as right.
_RUNS_ANSWERS = frozenset(
    [
        "binary_matrix",
        "countdown",
        "intermediate_integration",
        "n_queens",
        "polynomial_multiplication",
        "puzzle24",
        "simple_integration",
        "spiral_matrix",
        "string_insertion",
    ]
)


def generate(source: ReasoningGymPrompts) -> Iterator[Item]:
    """``source.size`` items of distinct prompt texts on the wanted side of the split; a function of the settings alone.

    Raises :class:`ConfigurationError` for an unknown family or option (naming the nearest known one), a template field
    that the family does not have, and a family that cannot give that many distinct prompts (saying how many it could).
    """
    if source.family in _RUNS_ANSWERS:
        logger.warning("family %s is judged by its reference answer: its verifier runs answers as code", source.family)
    found = draws = since_new = 0
    seen: set[str] = set()
    for seed, index, task in _tasks(source):
        messages = ({"role": "user", "content": _fill(source, task)},)
        key = text_key(messages)
        draws += 1
        # A finite family is exhausted when even the rarest of its prompts would have turned up by now.
        since_new = since_new + 1 if key in seen else 0
        if since_new > 1_000 + 5 * len(seen) or draws > _MOST_DRAWS * (found + 10):
            raise ConfigurationError(_exhausted(source, found, draws))
        if key in seen:
            continue
        seen.add(key)
        wanted = source.matching is None or re.fullmatch(source.matching, messages[0]["content"])
        if not wanted or side(key, source.held_out_fraction) != source.split:
            continue
        found += 1
        yield _item(source, messages, task, seed, index)
        if found == source.size:
            return


def judge(verifier: Mapping[str, Any], text: str) -> float:
    """The family's own score of ``text`` for the task that the verifier names, in [0, 1]."""
    name, index = verifier["family"], verifier["index"]
    if name in _RUNS_ANSWERS:
        return float(text.strip() == verifier["answer"].strip())
    family = open_family(name, verifier["options"], verifier["seed"])
    task = family[index]
    if str(task["answer"]) != verifier["answer"]:
        raise ConfigurationError(
            f"reasoning-gym family {name!r}: task {index} of seed {verifier['seed']} is not what it was when its prompt"
            f" was made (answer {str(task['answer'])[:40]!r}, then {verifier['answer'][:40]!r}); use the same version"
            " of reasoning-gym, and a family whose tasks do not depend on the process"
        )
    try:
        return float(family.score_answer(text, task))
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        # Some families' parsers give way on text that is no answer at all.
        logger.debug("reasoning-gym family %s: %r cannot be judged: %s", name, text, error)
        return 0.0


def open_family(name: str, options: Mapping[str, Any], seed: int) -> Any:
    """A reasoning-gym dataset of one block. Errors as in :func:`generate`."""
    return _open(name, json.dumps(dict(options), sort_keys=True), seed)


@lru_cache(maxsize=64)
def _open(name: str, options: str, seed: int) -> Any:
    from reasoning_gym.factory import DATASETS, create_dataset

    if name not in DATASETS:
        near = difflib.get_close_matches(name, DATASETS, n=1, cutoff=0.0)
        raise ConfigurationError(f"family = {name!r}: reasoning-gym has no such task family; did you mean {near[0]!r}?")
    values = _options(name, DATASETS[name][1], json.loads(options))
    try:
        return create_dataset(name, **values, seed=seed, size=_BLOCK)
    except (AssertionError, ValueError, TypeError, IndexError) as error:
        raise ConfigurationError(f"family {name!r} refuses options {options}: {error}") from error


def _options(name: str, settings: type, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options checked against the family's own fields, texts turned into the enumerations it wants."""
    known = {f.name for f in fields(settings)} - {"seed", "size"}
    hints = typing.get_type_hints(settings)
    values = {}
    for key, value in options.items():
        if key not in known:
            near = nearest(key, sorted(known))
            raise ConfigurationError(f"options.{key}: unknown option of reasoning-gym family {name!r}{near}")
        hint = hints.get(key)
        if isinstance(hint, type) and issubclass(hint, Enum):
            try:
                value = hint(value)
            except ValueError:
                choices = ", ".join(str(choice.value) for choice in hint)
                raise ConfigurationError(f"options.{key} = {value!r}: family {name!r} knows {choices}") from None
        values[key] = value
    return values


def _block_seed(source: ReasoningGymPrompts, block: int) -> int:
    # Families draw task i from seed + i, so neighbouring seeds would share nearly all their tasks.
    digest = hashlib.sha256(f"{source.family}/{source.seed}/{block}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def _tasks(source: ReasoningGymPrompts) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """Endless (seed, index, task)."""
    for block in itertools.count():
        seed = _block_seed(source, block)
        family = open_family(source.family, source.options, seed)
        for index in range(_BLOCK):
            try:
                task = family[index]
            except (ValueError, IndexError) as error:
                raise ConfigurationError(
                    f"family {source.family!r} cannot make a task with options {source.options}: {error};"
                    " widen its options"
                ) from error
            yield seed, index, task


def _item(source: ReasoningGymPrompts, messages: Messages, task: dict[str, Any], seed: int, index: int) -> Item:
    origin = f"reasoning-gym {source.family}, seed {seed}, task {index}"
    if task["answer"] is None:  # families with many right answers may offer no reference
        completion, answer = None, "None"
    else:
        completion = answer = str(task["answer"])
    verifier = {
        "kind": "reasoning_gym",
        "family": source.family,
        "options": dict(source.options),
        "seed": seed,
        "index": index,
        "answer": answer,
    }
    return Item(messages=messages, domain=source.domain, origin=origin, completion=completion, verifier=verifier)


class _Filler(string.Formatter):
    """``{field}`` for text and numbers; lists are joined by a blank, by a format specification (``{words:, }``) or,
    with the conversion ``!c``, by nothing."""

    def convert_field(self, value: Any, conversion: Any) -> Any:
        return _join(value, "") if conversion == "c" else super().convert_field(value, conversion)

    def format_field(self, value: Any, format_spec: str) -> str:
        if isinstance(value, list | tuple):
            return _join(value, format_spec or " ")
        return super().format_field(value, format_spec)


_FILLER = _Filler()


def _join(value: Any, separator: str) -> str:
    if isinstance(value, list | tuple):
        return separator.join(_join(v, separator) for v in value)
    return str(value)


def _fill(source: ReasoningGymPrompts, task: dict[str, Any]) -> str:
    if source.template is None:
        return task["question"]
    values = task["metadata"] | {"question": task["question"]}
    try:
        return _FILLER.vformat(source.template, (), values)
    except KeyError as error:
        name = str(error.args[0])
        near = difflib.get_close_matches(name, values, n=1, cutoff=0.0)
        raise ConfigurationError(
            f"template = {source.template!r}: family {source.family!r} has no field {name!r}; did you mean {near[0]!r}?"
            f" It has {', '.join(sorted(map(str, values)))}"
        ) from None
    except (ValueError, IndexError) as error:
        raise ConfigurationError(f"template = {source.template!r}: {error}; write fields as {{name}}") from None


def _exhausted(source: ReasoningGymPrompts, found: int, draws: int) -> str:
    return (
        f"size = {source.size}: reasoning-gym family {source.family!r} with options {source.options} gave only {found}"
        f" distinct prompts for the {source.split} side in {draws} tasks; lower size, widen the family's options or"
        " loosen matching"
    )
