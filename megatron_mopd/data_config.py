"""The settings of what is read: tokenizer, prompts and their domains. Imports neither torch nor megatron.core."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from megatron_mopd.settings import Section

Weight = Annotated[float, Field(ge=0)]


class Tokenizer(Section):
    type: Literal["characters", "huggingface"] = "characters"
    """characters: printable ASCII, one token each, with a built-in chat template; needs no files."""
    path: Path | None = None
    """Directory of a Hugging Face tokenizer with a chat template (type huggingface)."""

    @model_validator(mode="after")
    def _path(self) -> Tokenizer:
        if (self.type == "huggingface") != (self.path is not None):
            raise ValueError("path is needed with type huggingface and only there")
        return self


class JsonlPrompts(Section):
    type: Literal["jsonl"]
    path: Path
    """One JSON object a line: ``messages`` (chat), ``domain``, optional ``completion`` and ``verifier``."""
    split: Literal["all", "train", "held_out"] = "all"
    """Rows to take: all, or one side of the split by a hash of the prompt's text."""
    held_out_fraction: float = Field(default=0.2, gt=0, lt=1)


class ReasoningGymPrompts(Section):
    type: Literal["reasoning_gym"]
    domain: str
    """Name of the domain in routing, metrics and reports."""
    family: str
    """Name of a reasoning-gym task family, such as ``spell_backward``."""
    options: dict[str, Any] = {}
    """The family's own settings."""
    template: str | None = None
    """User message; ``{field}`` is filled from the family's metadata, ``{question}`` from its question; the question
    when left out. Lists are joined by a blank, by what follows a colon (``{words:, }``) or by nothing
    (``{letters!c}``)."""
    matching: str | None = None
    """Regular expression that the whole user message must match; other tasks are passed over."""
    size: int = Field(gt=0)
    """Distinct prompts wanted; de-duplicated by prompt text."""
    seed: int = 0
    split: Literal["train", "held_out"] = "train"
    """Prompts belong to one side by a hash of their text, so the two sides never share one."""
    held_out_fraction: float = Field(default=0.2, gt=0, lt=1)

    @model_validator(mode="after")
    def _matching(self) -> ReasoningGymPrompts:
        try:
            re.compile(self.matching or "")
        except re.error as error:
            raise ValueError(f"matching = {self.matching!r} is no regular expression: {error}") from None
        return self


PromptSource = Annotated[JsonlPrompts | ReasoningGymPrompts, Field(discriminator="type")]


class Data(Section):
    train: list[PromptSource] = []
    held_out: list[PromptSource] = []
    """Prompts for evaluation; never trained on."""
    shuffle_seed: int = 0
    weights: dict[str, Weight] = {}
    """Sampling weight of each domain; equal when left out."""
