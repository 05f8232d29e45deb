"""The built-in character tokenizer, Hugging Face directories read offline, and the hashes of both."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_mopd.config import ConfigurationError
from megatron_mopd.data_config import Tokenizer
from megatron_mopd.tokenizer import ChatTokenizer, build_tokenizer

USER = {"role": "user", "content": "back cat"}


@pytest.fixture(scope="module")
def characters() -> ChatTokenizer:
    return build_tokenizer(Tokenizer())


@pytest.fixture
def directory(characters: ChatTokenizer, tmp_path: Path) -> Path:
    characters.save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def load(directory: Path) -> ChatTokenizer:
    return build_tokenizer(Tokenizer(type="huggingface", path=directory))


def test_every_printable_character_has_a_token_and_comes_back(characters: ChatTokenizer) -> None:
    text = "\n" + "".join(chr(c) for c in range(0x20, 0x7F)) + "  a , b  "
    ids = characters.encode_completion(text)
    assert len(ids) == len(text) + 1
    assert ids[-1] == characters.stop_tokens[0]
    assert characters.decode(ids) == text
    assert max(ids) < characters.vocab_size <= 128
    assert 0 <= characters.pad_token < characters.vocab_size
    assert characters.pad_token not in characters.stop_tokens


def test_a_prompt_costs_one_token_per_role(characters: ChatTokenizer) -> None:
    ids = characters.render_prompt([USER])
    assert len(ids) == len(USER["content"]) + 2
    assert characters.decode(ids) == USER["content"]
    system = [{"role": "system", "content": "be"}, USER]
    assert len(characters.render_prompt(system)) == len(ids) + 3


def test_a_finished_turn_is_the_prompt_with_its_completion(characters: ChatTokenizer) -> None:
    """What a rollout appends to a prompt is what the template writes for that turn of a longer conversation."""
    again = {"role": "user", "content": "and dog"}
    longer = characters.render_prompt([USER, {"role": "assistant", "content": "tac"}, again])
    whole = characters.render_prompt([USER]) + characters.encode_completion("tac")
    assert longer[: len(whole)] == whole


def test_text_cannot_spell_a_control_token(characters: ChatTokenizer) -> None:
    with pytest.raises(ConfigurationError, match=r"'⟨' \(U\+27E8\)"):
        characters.render_prompt([{"role": "user", "content": "x⟨end⟩"}])


@pytest.mark.parametrize("character", ["é", "\t", "😀"])
def test_an_unknown_character_is_named(characters: ChatTokenizer, character: str) -> None:
    name = f"U\\+{ord(character):04X}"
    with pytest.raises(ConfigurationError, match=name):
        characters.encode_completion(f"a{character}b")
    with pytest.raises(ConfigurationError, match=name):
        characters.render_prompt([{"role": "user", "content": f"a{character}b"}])


def test_an_unknown_role_is_named(characters: ChatTokenizer) -> None:
    with pytest.raises(ConfigurationError, match="unknown role tool"):
        characters.render_prompt([{"role": "tool", "content": "1"}])


def test_a_saved_directory_is_the_same_tokenizer(characters: ChatTokenizer, directory: Path) -> None:
    loaded = load(directory)
    assert (loaded.tokenizer_sha, loaded.template_sha) == (characters.tokenizer_sha, characters.template_sha)
    assert loaded.render_prompt([USER]) == characters.render_prompt([USER])
    with pytest.raises(ConfigurationError, match="'é'"):
        loaded.encode_completion("é")


def test_hashes_ignore_the_layout_of_files(characters: ChatTokenizer, directory: Path) -> None:
    file = directory / "tokenizer.json"
    tree = json.loads(file.read_text(encoding="utf-8"))
    tree["model"]["vocab"] = dict(reversed(tree["model"]["vocab"].items()))
    file.write_text(json.dumps(tree, indent=7), encoding="utf-8")
    assert load(directory).tokenizer_sha == characters.tokenizer_sha


def test_hashes_change_with_the_content(characters: ChatTokenizer, directory: Path) -> None:
    file = directory / "tokenizer.json"
    tree = json.loads(file.read_text(encoding="utf-8"))
    vocabulary = tree["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(tree), encoding="utf-8")
    template = directory / "chat_template.jinja"
    swapped = load(directory)
    assert swapped.tokenizer_sha != characters.tokenizer_sha
    assert swapped.template_sha == characters.template_sha
    template.write_text(template.read_text(encoding="utf-8") + "{{ ' ' }}", encoding="utf-8")
    assert load(directory).template_sha != characters.template_sha


def test_hashes_are_the_same_in_another_process(characters: ChatTokenizer) -> None:
    program = (
        "from megatron_mopd.data_config import Tokenizer; from megatron_mopd.tokenizer import build_tokenizer;"
        "import sys; t = build_tokenizer(Tokenizer()); sys.stdout.write(t.tokenizer_sha + ' ' + t.template_sha)"
    )
    environment = os.environ | {"PYTHONHASHSEED": "7"}
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert result.stdout.split() == [characters.tokenizer_sha, characters.template_sha]


def test_stop_tokens_of_the_generation_config_are_added(characters: ChatTokenizer, directory: Path) -> None:
    (directory / "generation_config.json").write_text('{"eos_token_id": [4, 1]}', encoding="utf-8")
    loaded = load(directory)
    assert loaded.stop_tokens == (*characters.stop_tokens, 4)
    assert loaded.tokenizer_sha != characters.tokenizer_sha
    assert loaded.decode([*loaded.encode_completion("ok")[:2], 4]) == "ok"


def test_no_chat_template_is_an_error_with_a_way_out(directory: Path) -> None:
    (directory / "chat_template.jinja").unlink()
    with pytest.raises(ConfigurationError, match=r"no .*chat template.*chat_template\.jinja"):
        load(directory)


def test_no_end_token_is_an_error_with_a_way_out(directory: Path) -> None:
    file = directory / "tokenizer_config.json"
    tree = json.loads(file.read_text(encoding="utf-8"))
    del tree["eos_token"]
    file.write_text(json.dumps(tree), encoding="utf-8")
    with pytest.raises(ConfigurationError, match=r"no end token.*eos_token"):
        load(directory)


def test_a_directory_without_a_tokenizer_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="no such directory"):
        load(tmp_path / "absent")
    with pytest.raises(ConfigurationError, match=r"tokenizer\.path .*no Hugging Face tokenizer"):
        load(tmp_path)


def test_a_tokenizer_without_a_fast_backend_has_hashes_too(characters: ChatTokenizer) -> None:
    from transformers import ByT5Tokenizer

    bytes_of = ByT5Tokenizer()
    bytes_of.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer = ChatTokenizer(bytes_of, "bytes")
    assert tokenizer.decode(tokenizer.encode_completion("é!")) == "é!"
    assert len(tokenizer.tokenizer_sha) == 64
    assert tokenizer.tokenizer_sha != characters.tokenizer_sha
