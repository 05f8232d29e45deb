"""Quantization recipes as tables: which kind of tensor is stored in which format, and why.

A table is read from top to bottom and the first rule whose pattern fits a tensor's Hugging Face name decides. Names
have the prefix ``backbone.`` (:mod:`megatron_mopd.conversion.weights`), experts count one by one, and ``*`` stands for
any run of characters, dots included. A tensor that no rule names is an error: nothing is decided by default.
``RECIPES`` holds the published tables; :func:`load` also reads another one from a YAML file. Imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import translate
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from megatron_mopd.settings import ConfigurationError, Section, explain, nearest, read_yaml

Format = Literal["nvfp4", "fp8", "bf16", "keep"]
FORMATS: dict[Format, str] = {
    "nvfp4": "e2m1 codes, an e4m3 scale per 16 elements of a row, one fp32 scale per tensor",
    "fp8": "e4m3 with one fp32 scale per tensor (maximum / 448)",
    "bf16": "bfloat16; a wider source is rounded",
    "keep": "as the source has it",
}
"""What each format of a rule stores."""
QUANTIZED: tuple[Format, ...] = ("nvfp4", "fp8")
_LAYER = re.compile(r"backbone\.layers\.(\d+)\.")
_SHOWN = 20  # names in a message


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """One row of a table."""

    what: str  # the kind of tensors, as a report names it
    match: tuple[str, ...]  # patterns of Hugging Face names, any of which may fit
    format: Format
    reason: str
    last_layers: float | None = None  # only in this share of the trunk's layers, rounded, counted from the end

    def first_of(self, layers: int) -> int:
        """The first of a trunk's ``layers`` that the rule is about; -1: it is about tensors outside the trunk, too."""
        return -1 if self.last_layers is None else layers - round(self.last_layers * layers)


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """A table and where it comes from.

    Example: ``RECIPES["ultra-ptq"].assign(names)["backbone.layers.1.mixer.experts.0.up_proj.weight"].format`` is
    ``"nvfp4"``.
    """

    name: str
    source: str
    rules: tuple[Rule, ...]

    def assign(self, names: Iterable[str]) -> dict[str, Rule]:
        """The rule of each tensor. ``names`` are all tensors of a model: the depth of its trunk is read off them.

        Raises :class:`ConfigurationError` listing the tensors that no rule names.
        """
        known = list(names)
        layers = 1 + max((int(m[1]) for name in known if (m := _LAYER.match(name))), default=-1)
        tests = [(rule, re.compile("|".join(map(translate, rule.match))), rule.first_of(layers)) for rule in self.rules]

        def decide(name: str) -> Rule | None:
            layer = _LAYER.match(name)
            number = int(layer[1]) if layer else -1
            return next((rule for rule, fits, first in tests if number >= first and fits.match(name)), None)

        found = {name: decide(name) for name in known}
        if lost := [name for name, rule in found.items() if rule is None]:
            more = f" and {len(lost) - _SHOWN} more" if len(lost) > _SHOWN else ""
            kinds = "; ".join(f"{rule.what}: {' '.join(rule.match)}" for rule in self.rules)
            raise ConfigurationError(
                f"recipe {self.name}: no rule names {', '.join(lost[:_SHOWN])}{more}. Its rules are about {kinds}."
                f" Add a rule with a pattern that fits and one of the formats {', '.join(FORMATS)}"
            )
        return {name: rule for name, rule in found.items() if rule is not None}


_VECTORS = Rule(
    what="norms, biases, Mamba scalars",
    match=("*norm*.weight", "*.bias", "*.dt_bias", "*.A_log", "*.D", "*.e_score_correction_bias"),
    format="keep",
    reason="vectors: no bytes to save, and every token depends on them",
)
_MTP = Rule(
    what="MTP",
    match=("mtp.*",),
    format="bf16",
    reason="quantized drafts agree less often with the trunk",
)
_ROUTED = Rule(
    what="routed experts",
    match=("backbone.layers.*.mixer.experts.*.weight",),
    format="nvfp4",
    reason="nine tenths of the parameters, and each token reads few of them",
)
_SHARED = Rule(
    what="shared experts",
    match=("backbone.layers.*.mixer.shared_experts.*.weight",),
    format="fp8",
    reason="read by every token, a hundredth of the parameters",
)
_DENSE = Rule(
    what="dense MLP",
    match=("backbone.layers.*.mixer.up_proj.weight", "backbone.layers.*.mixer.down_proj.weight"),
    format="fp8",
    reason="Ultra has none; read by every token like the shared experts",
)
_MAMBA = Rule(
    what="Mamba projections",
    match=("backbone.layers.*.mixer.in_proj.weight", "backbone.layers.*.mixer.out_proj.weight"),
    format="fp8",
    reason="their errors stay in the recurrent state",
)
_ATTENTION = Rule(
    what="attention projections",
    match=tuple(f"backbone.layers.*.mixer.{part}_proj.weight" for part in "qkvo"),
    format="bf16",
    reason="few layers, and long contexts depend on them",
)
_LATENT = Rule(
    what="latent projections",
    match=("backbone.layers.*.mixer.fc1_latent_proj.weight", "backbone.layers.*.mixer.fc2_latent_proj.weight"),
    format="bf16",
    reason="every routed expert works behind them",
)
_CONVOLUTION = Rule(
    what="Mamba convolution",
    match=("backbone.layers.*.mixer.conv1d.weight",),
    format="bf16",
    reason="four taps a channel: no matrix product to speed up",
)
_ROUTER = Rule(
    what="router",
    match=("backbone.layers.*.mixer.gate.weight",),
    format="bf16",
    reason="a small error sends a token to another expert",
)
_EMBEDDING = Rule(
    what="embedding", match=("backbone.embeddings.weight",), format="bf16", reason="looked up, not multiplied"
)
_OUTPUT = Rule(
    what="output weight", match=("lm_head.weight",), format="bf16", reason="its errors go straight to the logits"
)
_KEPT = (_ATTENTION, _LATENT, _CONVOLUTION, _ROUTER, _EMBEDDING, _OUTPUT)


def _nvfp4(rule: Rule, reason: str) -> Rule:
    return replace(rule, format="nvfp4", reason=reason)


_PTQ = Recipe(
    name="ultra-ptq",
    source="Nemotron 3 Ultra report, Table 12; 5.03 bits per element in Table 13",
    rules=(_VECTORS, _MTP, _ROUTED, _SHARED, _DENSE, _MAMBA, *_KEPT),
)
_SMALLER = "the smaller variant of Table 13: 0.18 bits per element less, for accuracy on long contexts"
_UNQUANTIZED = "the larger variant of Table 13: only routed experts are quantized"
RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        _PTQ,
        Recipe(
            name="ultra-ptq-nvfp4",
            source="Nemotron 3 Ultra report, Table 13, 4.85 bits per element",
            rules=(_VECTORS, _MTP, _ROUTED, *(_nvfp4(rule, _SMALLER) for rule in (_SHARED, _DENSE, _MAMBA)), *_KEPT),
        ),
        Recipe(
            name="ultra-ptq-experts",
            source="Nemotron 3 Ultra report, Table 13, 5.43 bits per element",
            rules=(
                *(_VECTORS, _MTP, _ROUTED),
                *(replace(rule, format="bf16", reason=_UNQUANTIZED) for rule in (_SHARED, _DENSE, _MAMBA)),
                *_KEPT,
            ),
        ),
        Recipe(
            name="ultra-pretrain",
            source="Nemotron 3 Super and Ultra, layer table of NVFP4 pretraining; 16 of Ultra's 108 layers stay BF16",
            rules=(
                _VECTORS,
                replace(_MTP, reason="kept in BF16 from the start of pretraining"),
                Rule(
                    what="last layers",
                    match=("backbone.layers.*",),
                    format="bf16",
                    reason="keeps pretraining stable",
                    last_layers=0.15,  # 16 of Ultra's 108; 13 of Super's 88, of which its recipe keeps 14
                ),
                _ROUTED,
                *(_nvfp4(rule, "a linear layer like any other in pretraining") for rule in (_SHARED, _DENSE)),
                Rule(
                    what="Mamba output projection",
                    match=("backbone.layers.*.mixer.out_proj.weight",),
                    format="fp8",
                    reason="MXFP8 in pretraining; stored with one scale per tensor",
                ),
                Rule(
                    what="Mamba input projection",
                    match=("backbone.layers.*.mixer.in_proj.weight",),
                    format="nvfp4",
                    reason="a linear layer like any other in pretraining",
                ),
                *_KEPT,
            ),
        ),
    )
}
"""The published tables by name."""


class _RuleSection(Section):
    what: str = Field(min_length=1)
    match: tuple[str, ...] = Field(min_length=1)
    format: Format
    reason: str = Field(min_length=1)
    last_layers: float | None = Field(default=None, gt=0, le=1)


class _RecipeSection(Section):
    name: str = Field(min_length=1)
    source: str = Field(min_length=1)
    rules: tuple[_RuleSection, ...] = Field(min_length=1)


def load(recipe: str) -> Recipe:
    """The published table of this name, or the one in the YAML file of this path (ends in .yaml or .yml).

    A file has ``name``, ``source`` and ``rules``, a list of ``what``, ``match`` (patterns), ``format``, ``reason`` and,
    if wanted, ``last_layers``. Raises :class:`ConfigurationError` for a name that is unknown and for a file that is
    missing or has a key that is unknown, missing or of a value that is not accepted.
    """
    if Path(recipe).suffix in (".yaml", ".yml"):
        return _read(recipe)
    if recipe not in RECIPES:
        raise ConfigurationError(f"recipe {recipe!r}: unknown{nearest(recipe, list(RECIPES))}; or name a .yaml file")
    return RECIPES[recipe]


def _read(path: str) -> Recipe:
    try:
        section = _RecipeSection.model_validate(read_yaml(path))
    except ValidationError as error:
        raise ConfigurationError(explain(error.errors()[0], path, _RecipeSection)) from None
    rules = tuple(Rule(**rule.model_dump()) for rule in section.rules)
    _check_kinds(rules, path)
    return Recipe(name=section.name, source=section.source, rules=rules)


def _check_kinds(rules: Sequence[Rule], origin: str) -> None:
    """One row of a report is one kind in one format."""
    formats: dict[str, Format] = {}
    for rule in rules:
        if formats.setdefault(rule.what, rule.format) != rule.format:
            raise ConfigurationError(
                f"{origin}: rules: {rule.what!r} is {formats[rule.what]} in one rule and {rule.format} in another; give"
                " the two kinds names of their own"
            )
