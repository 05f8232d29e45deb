"""The words of command lines on a recipe, which may stand in a file, and of those that it starts."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True, slots=True)
class Command:
    """A program to start."""

    words: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)  # over that of this process

    @property
    def line(self) -> str:
        """As one would type it."""
        return " ".join([*(f"{name}={value}" for name, value in self.environment.items()), shlex.join(self.words)])


class Parser(argparse.ArgumentParser):
    """Takes @FILE in place of a word for the words in a file, one a line; empty lines and those of # are passed over.

    Options are written out, so that a mistyped one is an error.
    """

    def __init__(self, prog: str | None = None, description: str | None = None, epilog: str | None = None) -> None:
        super().__init__(
            prog=prog, description=description, epilog=epilog, fromfile_prefix_chars="@", allow_abbrev=False
        )

    def convert_arg_line_to_args(self, arg_line: str) -> list[str]:
        """The word on a line of an @FILE."""
        return [] if arg_line.lstrip().startswith("#") or not arg_line.strip() else [arg_line.strip()]
