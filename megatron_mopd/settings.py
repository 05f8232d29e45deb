"""How settings are read, merged and refused, whatever they mean: YAML, ``key=value`` overrides, errors.

Imports neither torch nor megatron.core.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ConfigDict, model_validator


class ConfigurationError(ValueError):
    """A setting that cannot work: names the setting, its value, the rule and the way out."""


class Section(BaseModel):
    """A group of settings: frozen, unknown keys refused, field docstrings kept."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _no_switch_for_a_number(cls, tree: Any) -> Any:
        """pydantic would read true as 1, and YAML reads yes and on as true."""
        for name, value in tree.items() if isinstance(tree, dict) else ():
            if isinstance(value, bool) and name in cls.model_fields:
                types = get_args(cls.model_fields[name].annotation) or (cls.model_fields[name].annotation,)
                if bool not in types and not {int, float}.isdisjoint(types):
                    raise ValueError(f"{name} = {str(value).lower()}: a number is needed, not a switch")
        return tree


class _Loader(yaml.SafeLoader):
    """YAML 1.1 with two surprises less: 1e-4 is a number, and a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        # Read before yaml unfolds "<<: *other", whose keys may well be given again.
        keys = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        if len(set(keys)) < len(keys):
            twice = next(key for key in keys if keys.count(key) > 1)
            raise yaml.constructor.ConstructorError(None, None, f"key {twice!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read_yaml(path: Path | str) -> dict[str, Any]:
    """The mapping a YAML file holds, without validation; raises :class:`ConfigurationError` when there is none."""
    try:
        tree = yaml.load(Path(path).read_text(), _Loader)  # a SafeLoader: builds plain values only
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path}: cannot be read as a configuration file: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigurationError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigurationError(f"{path}: a configuration is a mapping of sections, got {type(tree).__name__}")
    return tree


def merge(tree: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """A copy of ``tree`` with each ``a.b=value`` set; missing sections are made on the way."""
    result = _copy(tree)
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise ConfigurationError(f"override {override!r}: expected key=value, such as optimizer.lr=1e-4")
        node = result
        *parents, leaf = key.split(".")
        for depth, parent in enumerate(parents):
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise ConfigurationError(f"override {override!r}: {'.'.join(parents[: depth + 1])} is not a section")
        node[leaf] = _scalar(value, override)
    return result


def overlay(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """``above`` over ``below``, section by section; lists and scalars are replaced whole."""
    result = _copy(below)
    for key, value in above.items():
        both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = overlay(result[key], value) if both else _copy(value)
    return result


def _scalar(text: str, override: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ConfigurationError(f"override {override!r}: the value is not valid YAML: {error}") from None


def _copy(tree: Any) -> Any:
    if isinstance(tree, Mapping):
        return {k: _copy(v) for k, v in tree.items()}
    return [_copy(v) for v in tree] if isinstance(tree, list) else tree


def explain(error: Any, origin: str, root: type[BaseModel]) -> str:
    """One line for one pydantic error under ``root``: where, what was given, the rule, the nearest known key."""
    path, models = _walk(error["loc"], root)
    where = ".".join(path)
    if error["type"] == "extra_forbidden":
        known = sorted({name for model in models for name in model.model_fields})
        return f"{origin}: {where}: unknown key{nearest(path[-1], known)}"
    if error["type"] == "missing":
        return f"{origin}: {where}: missing; it has no default"
    if error["type"] in ("union_tag_invalid", "union_tag_not_found"):
        tags = sorted(tag for model in models for tag in get_args(model.model_fields["type"].annotation))
        if error["type"] == "union_tag_not_found":
            return f"{origin}: {where}.type: missing; one of {', '.join(tags)}"
        return f"{origin}: {where}.type: {error['ctx']['tag']!r}: unknown{nearest(error['ctx']['tag'], tags)}"
    message = error["msg"].removeprefix("Value error, ")
    prefix = f"{origin}: {where}: " if where else f"{origin}: "
    return prefix + (message if error["type"] == "value_error" else f"{error['input']!r}: {message}")


def nearest(name: str, known: Sequence[str]) -> str:
    """The end of a message about an unknown name: the nearest known one, or all of them."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; known here: {', '.join(known)}"


def _walk(loc: Sequence[Any], root: type[BaseModel]) -> tuple[list[str], list[type[BaseModel]]]:
    """A pydantic location as the user wrote it, without the tags of unions, and the sections found there."""
    path: list[str] = []
    here: list[type[BaseModel]] = [root]
    for part in loc:
        fields = [m.model_fields[part].annotation for m in here if part in m.model_fields]
        tagged = [m for m in here if "type" in m.model_fields and part in get_args(m.model_fields["type"].annotation)]
        if tagged and not fields:
            here = tagged
            continue
        path.append(str(part))
        here = [m for f in fields for m in _sections(f)] if fields else here
    return path, here


def _sections(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [m for arg in get_args(annotation) for m in _sections(arg)]
