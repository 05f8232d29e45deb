"""Chat tokenizers: a built-in one with a token per printable character, or a Hugging Face directory read offline.

Two hashes travel with every checkpoint and rollout: of the tokenizer and of its chat template. Both are taken over
content, never over files, so that they agree between processes and between a saved directory and its source.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_mopd.config import ConfigurationError
from megatron_mopd.data_config import Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PAD, _END = "⟨pad⟩", "⟨end⟩"
_ROLES = ("system", "user", "assistant")
# The brackets are outside printable ASCII, so no text that the tokenizer accepts can spell a control token.
_SPECIAL = (_PAD, _END, *(f"⟨{role}⟩" for role in _ROLES))
_CHARACTERS = ("\n", *(chr(code) for code in range(0x20, 0x7F)))

# One token opens each turn; only the assistant's turn is closed, because only that one is generated.
_TEMPLATE = """\
{%- for message in messages -%}
{%- if message.role not in ('system', 'user', 'assistant') -%}
{{- raise_exception('unknown role ' ~ message.role ~ '; known: system, user, assistant') -}}
{%- endif -%}
{{- '⟨' ~ message.role ~ '⟩' ~ message.content -}}
{%- if message.role == 'assistant' -%}{{- eos_token -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '⟨assistant⟩' -}}{%- endif -%}
"""


class ChatTokenizer:
    """A tokenizer with a chat template, a stop token and stable hashes.

    Attributes: ``vocab_size`` (ids are below it), ``pad_token`` (filler that no loss ever sees; the end token where the
    tokenizer has no pad token), ``stop_tokens`` (the first closes a completion), ``tokenizer_sha`` and ``template_sha``
    (sha256 hex). ``tokenizer`` is a ``transformers.PreTrainedTokenizerBase``, whose own annotations allow for every
    kind of call at once and so for none.
    """

    def __init__(self, tokenizer: Any, origin: str, stop_tokens: Sequence[int] = ()):
        if not isinstance(tokenizer.chat_template, str):
            raise ConfigurationError(
                f"{origin}: the tokenizer has no (single) chat template, with which prompts are rendered; put the one"
                " of the model's chat release there as chat_template.jinja"
            )
        ends = [t for t in (tokenizer.eos_token_id, *stop_tokens) if t is not None]
        if not ends:
            raise ConfigurationError(
                f"{origin}: the tokenizer has no end token, so no completion could stop; set eos_token in its"
                " tokenizer_config.json"
            )
        self._tokenizer = tokenizer
        self.vocab_size = len(tokenizer)
        self.stop_tokens: tuple[int, ...] = tuple(dict.fromkeys(ends))
        pad = tokenizer.pad_token_id
        self.pad_token: int = self.stop_tokens[0] if pad is None else int(pad)
        content = _content(tokenizer)
        self._alphabet = _closed_alphabet(content)
        self.tokenizer_sha = _sha({"tokenizer": content, "stop_tokens": sorted(self.stop_tokens)})
        self.template_sha = _sha(tokenizer.chat_template.replace("\r\n", "\n"))

    def render_prompt(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a conversation through the chat template, generation prompt included.

        Raises :class:`ConfigurationError` for a conversation the template refuses and for a character without a token.
        """
        from jinja2 import TemplateError

        for message in messages:
            self._check_characters(message["content"])
        conversation = [dict(message) for message in messages]
        try:
            ids = self._tokenizer.apply_chat_template(conversation, add_generation_prompt=True, return_dict=False)
        except TemplateError as error:
            raise ConfigurationError(f"the chat template refuses these messages: {error}") from None
        return [int(i) for i in ids]

    def encode_completion(self, text: str) -> list[int]:
        """Token ids of an assistant's answer, the stop token at the end. Errors as in :meth:`render_prompt`."""
        self._check_characters(text)
        return [*self._tokenizer.encode(text, add_special_tokens=False), self.stop_tokens[0]]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids without special and stop tokens."""
        kept = [i for i in ids if i not in self.stop_tokens]
        text = self._tokenizer.decode(kept, skip_special_tokens=True)
        assert isinstance(text, str)
        return text

    def save_pretrained(self, directory: Path | str) -> None:
        """Write a Hugging Face tokenizer directory, chat template included; AutoTokenizer loads it to equal hashes."""
        self._tokenizer.save_pretrained(str(directory))

    def _check_characters(self, text: str) -> None:
        if self._alphabet is None or self._alphabet.issuperset(text):
            return
        unknown = next(character for character in text if character not in self._alphabet)
        raise ConfigurationError(
            f"character {unknown!r} (U+{ord(unknown):04X}) in {_excerpt(text)!r} has no token: this tokenizer knows"
            f" {len(self._alphabet)} characters only; take it out of the data or use tokenizer.type huggingface"
        )


def build_tokenizer(settings: Tokenizer) -> ChatTokenizer:
    """The tokenizer that the configuration names; never touches the network.

    Raises :class:`ConfigurationError` for a directory that is missing, holds no tokenizer or no chat template.
    """
    if settings.type == "characters":
        return ChatTokenizer(_characters(), "tokenizer.type characters")
    assert settings.path is not None  # config.Tokenizer sees to it
    return ChatTokenizer(_from_directory(settings.path), f"tokenizer.path {settings.path}", _stop_tokens(settings.path))


def _characters() -> PreTrainedTokenizerBase:
    from tokenizers import Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: index for index, token in enumerate((*_SPECIAL, *_CHARACTERS))}
    backend = Backend(models.WordLevel(vocabulary))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=_PAD,
        eos_token=_END,
        extra_special_tokens=list(_SPECIAL[2:]),
        chat_template=_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def _from_directory(path: Path) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    if not path.is_dir():
        raise ConfigurationError(f"tokenizer.path {path}: no such directory; give one with tokenizer.json or its like")
    try:
        return AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigurationError(
            f"tokenizer.path {path}: no Hugging Face tokenizer could be read from it: {error}"
        ) from error


def _stop_tokens(path: Path) -> list[int]:
    """End tokens of the directory's generation_config.json, where chat models list more than the tokenizer does."""
    file = path / "generation_config.json"
    if not file.is_file():
        return []
    try:
        ends = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
    except (ValueError, AttributeError) as error:
        raise ConfigurationError(f"{file}: no JSON object: {error}; take it from its source again") from None
    return [] if ends is None else [int(e) for e in (ends if isinstance(ends, list) else [ends])]


def _content(tokenizer: Any) -> dict[str, Any]:
    """What decides how text becomes ids: the backend's own description, or the vocabulary of one without a backend."""
    if tokenizer.is_fast:
        backend = json.loads(tokenizer.backend_tokenizer.to_str())
        # Padding and truncation are states of the last call, not of the tokenizer.
        content = {key: value for key, value in backend.items() if key not in ("padding", "truncation", "version")}
    else:
        content = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    return content | {"bos": tokenizer.bos_token, "eos": tokenizer.eos_token}


def _closed_alphabet(content: Mapping[str, Any]) -> frozenset[str] | None:
    """The characters that a one-token-per-character vocabulary without an unknown token takes; None for any other."""
    model = content.get("model", {})
    if model.get("type") != "WordLevel" or model.get("unk_token") in model["vocab"]:
        return None
    special = {token["content"] for token in content["added_tokens"]}
    words = frozenset(model["vocab"]) - special
    return words if all(len(word) == 1 for word in words) else None


def _sha(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _excerpt(text: str, length: int = 40) -> str:
    return text if len(text) <= length else text[:length] + "..."
