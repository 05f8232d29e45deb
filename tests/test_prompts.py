"""Prompt sources, their split and errors, the verifiers, and the resumable stream."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from megatron_mopd.config import ConfigurationError
from megatron_mopd.data_config import JsonlPrompts, ReasoningGymPrompts, Tokenizer
from megatron_mopd.prompt_items import text_key
from megatron_mopd.prompts import PromptStream, check_disjoint, load_examples, load_prompts, verify
from megatron_mopd.records import Prompt
from megatron_mopd.tokenizer import ChatTokenizer, build_tokenizer
from megatron_mopd.verifiers import check

CONTEXT = 64


@pytest.fixture(scope="module")
def tokenizer() -> ChatTokenizer:
    return build_tokenizer(Tokenizer())


def spell(**settings: Any) -> ReasoningGymPrompts:
    values = {"domain": "spell", "family": "spell_backward", "template": "back {word}", "size": 300}
    options = {"min_word_len": 3, "max_word_len": 4}
    return ReasoningGymPrompts(type="reasoning_gym", **({"options": options} | values | settings))


def write(path: Path, *rows: Any) -> JsonlPrompts:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return JsonlPrompts(type="jsonl", path=path)


def row(content: str = "hi", **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}], "domain": "chat"} | fields


# JSONL


def test_rows_become_prompts_and_examples(tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    verifier = {"kind": "exact", "answer": "4"}
    first = row("2+2", completion="4", verifier=verifier, note="ignored")
    source = write(tmp_path / "a.jsonl", first, "", row("2+2", completion="four"), first)
    prompts = load_prompts([source], tokenizer, CONTEXT)
    assert [p.messages[0]["content"] for p in prompts] == ["2+2"]
    assert prompts[0].tokens == tuple(tokenizer.render_prompt([{"role": "user", "content": "2+2"}]))
    assert (verify(prompts[0], " 4\n"), verify(prompts[0], "5")) == (1.0, 0.0)
    examples = load_examples([source], tokenizer, CONTEXT)
    assert [(e.sample, tokenizer.decode(e.completion.tolist())) for e in examples] == [(0, "4"), (1, "four")]
    assert all(e.completion[-1] == tokenizer.stop_tokens[0] and e.finish == "stop" for e in examples)


def test_equal_texts_of_two_domains_are_two_prompts(tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    prompts = load_prompts([write(tmp_path / "a.jsonl", row(), row(domain="other"))], tokenizer, CONTEXT)
    assert len({p.id for p in prompts}) == 2


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ('{"messages": [', "not valid JSON"),
        ("[1]", "expected a JSON object, got list"),
        ({"domain": "chat"}, "field 'messages' is missing"),
        ({"messages": row()["messages"]}, "field 'domain' is missing"),
        (row(domain=""), "domain = ''"),
        (row(completion=""), "completion = ''"),
        (row(completion=" \n"), "not empty"),
        (row(completion=3), "completion = 3"),
        (row(messages=[]), "messages"),
        (row(messages=[{"role": "user"}]), r"messages\[0\]"),
        (row(messages=[{"role": "assistant", "content": "x"}]), "move that text to the field completion"),
        (row(messages=[{"role": "robot", "content": "x"}], completion="x"), "unknown role robot"),
        (row("naïve", completion="x"), r"'ï' \(U\+00EF\)"),
        (row(completion="naïve"), r"'ï' \(U\+00EF\)"),
        (row(completion="x", verifier={"kind": "exakt", "answer": "1"}), "did you mean 'exact'"),
        (row(completion="x", verifier={"kind": "exact"}), "verifier.answer: missing"),
        (row(completion="x", verifier={"kind": "exact", "answer": 1}), "verifier.answer = 1"),
        (row(completion="x", verifier={"kind": "number", "answer": "1"}), "finite numbers"),
        (row(completion="x", verifier={"kind": "number", "answer": 1, "tolerence": 1}), "did you mean 'tolerance'"),
    ],
)
def test_a_bad_row_names_file_and_line(tokenizer: ChatTokenizer, tmp_path: Path, bad: Any, message: str) -> None:
    source = write(tmp_path / "bad.jsonl", row(completion="x"), bad)
    with pytest.raises(ConfigurationError, match=message) as error:
        load_examples([source], tokenizer, CONTEXT)
    assert str(error.value).startswith(f"{tmp_path / 'bad.jsonl'}:2: ")


def test_bytes_that_are_no_text_name_file_and_line(tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_bytes(json.dumps(row()).encode() + b"\n\xff\n")
    with pytest.raises(ConfigurationError, match=r"bad\.jsonl:2: not UTF-8"):
        load_prompts([JsonlPrompts(type="jsonl", path=tmp_path / "bad.jsonl")], tokenizer, CONTEXT)


def test_missing_and_empty_files_are_errors(tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"absent\.jsonl: cannot be read"):
        load_prompts([JsonlPrompts(type="jsonl", path=tmp_path / "absent.jsonl")], tokenizer, CONTEXT)
    with pytest.raises(ConfigurationError, match=r"empty\.jsonl: no rows"):
        load_prompts([write(tmp_path / "empty.jsonl")], tokenizer, CONTEXT)


def test_a_dataset_row_needs_a_completion(tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", row())
    with pytest.raises(ConfigurationError, match=r"a\.jsonl:1: no completion"):
        load_examples([source], tokenizer, CONTEXT)


def test_evaluation_needs_a_verifier(tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", row())
    with pytest.raises(ConfigurationError, match=r"a\.jsonl:1: no verifier"):
        load_prompts([source], tokenizer, CONTEXT, need_verifier=True)
    with pytest.raises(ConfigurationError, match="'chat' has no verifier"):
        verify(load_prompts([source], tokenizer, CONTEXT)[0], "x")


def test_length_errors_name_line_prompt_length_and_limit(tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    fits = write(tmp_path / "fits.jsonl", row("x" * 5, completion="y" * 2))  # 5 + 2 roles, 2 + stop
    assert len(load_examples([fits], tokenizer, 10)) == 1
    with pytest.raises(ConfigurationError, match=r"fits\.jsonl:1 \(prompt [0-9a-f]{12}\).*10 tokens, the context 9"):
        load_examples([fits], tokenizer, 9)
    assert len(load_prompts([fits], tokenizer, 8)) == 1
    with pytest.raises(ConfigurationError, match=r"fits\.jsonl:1 \(prompt [0-9a-f]{12}\).*7 tokens, the context 7"):
        load_prompts([fits], tokenizer, 7)


def test_number_verifier(tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", row(verifier={"kind": "number", "answer": 1200, "tolerance": 0.5}))
    prompt = load_prompts([source], tokenizer, CONTEXT)[0]
    assert [verify(prompt, text) for text in ("1,200.4", " 1199.5 ", "1201", "many", "nan")] == [1, 1, 0, 0, 0]


# reasoning-gym


def test_reference_answers_are_right_and_others_wrong(tokenizer: ChatTokenizer) -> None:
    for example in load_examples([spell(size=50)], tokenizer, CONTEXT):
        text = tokenizer.decode(example.completion.tolist())
        assert example.prompt.messages[0]["content"] == f"back {text[::-1]}"
        assert verify(example.prompt, text) == 1
        assert verify(example.prompt, text[:-1] + "#") < 1


def test_a_verifier_survives_json_and_accepts_every_right_answer(tokenizer: ChatTokenizer) -> None:
    source = ReasoningGymPrompts(
        type="reasoning_gym",
        domain="palindrome",
        family="palindrome_generation",
        options={"min_length": 4, "max_length": 4},
        template="pal {letters!c}",
        size=40,
    )
    for example in load_examples([source], tokenizer, CONTEXT):
        prompt = Prompt(
            id="x", domain="pal", messages=(), tokens=(), verifier=json.loads(json.dumps(example.prompt.verifier))
        )
        text = tokenizer.decode(example.completion.tolist())
        assert verify(prompt, text) == verify(prompt, text[1] + text[0] * 2 + text[1]) == 1
        assert verify(prompt, text[:2] * 2) == (1 if text[0] == text[1] else 0.02)


def test_templates_join_lists_three_ways(tokenizer: ChatTokenizer) -> None:
    def content(template: str) -> str:
        source = spell(
            family="palindrome_generation", options={"min_length": 3, "max_length": 3}, template=template, size=1
        )
        return load_prompts([source], tokenizer, CONTEXT)[0].messages[0]["content"]

    spaced = content("{letters} {length:02d}")
    letters = spaced.split()[:3]
    assert spaced.endswith(" 03")
    assert content("{letters:-}") == "-".join(letters)
    assert content("{letters!c}") == "".join(letters)


def test_enumerations_are_written_as_text(tokenizer: ChatTokenizer) -> None:
    options = {"min_words": 2, "max_words": 2, "min_word_length": 3, "max_word_length": 3}
    source = spell(
        family="word_sorting", template="{transformed_words}", options=options | {"transformation": "lowercase"}
    )
    prompts = load_prompts([source], tokenizer, CONTEXT)
    assert not [p for p in prompts if p.messages[0]["content"] != p.messages[0]["content"].lower()]
    bad = source.model_copy(update={"options": options | {"transformation": "lower"}})
    with pytest.raises(ConfigurationError, match=r"options\.transformation = 'lower': .*lowercase"):
        load_prompts([bad], tokenizer, CONTEXT)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"family": "spell_backwards"}, "did you mean 'spell_backward'"),
        ({"family": "zzz"}, "did you mean"),
        ({"options": {"min_word_length": 3}}, r"options\.min_word_length: .*did you mean 'min_word_len'"),
        ({"options": {"seed": 3}}, r"options\.seed: unknown option"),
        ({"options": {"min_word_len": 0}}, "min_word_len must be positive"),
        ({"options": {"min_word_len": 50, "max_word_len": 60}}, "cannot make a task"),
        ({"template": "{wrod}"}, "no field 'wrod'; did you mean 'word'"),
        ({"template": "{word"}, "template = '{word'"),
        ({"options": {"min_word_len": 3, "max_word_len": 3}, "size": 100_000}, r"gave only \d+ distinct prompts"),
        ({"matching": "never"}, "gave only 0 distinct prompts"),
    ],
)
def test_bad_task_settings_are_errors(tokenizer: ChatTokenizer, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        load_prompts([spell(**settings)], tokenizer, CONTEXT)


def test_an_exhausted_family_says_how_many_it_could(tokenizer: ChatTokenizer) -> None:
    small = {
        "family": "binary_alternation",
        "options": {"min_n": 4, "max_n": 4, "p_solvable": 1},
        "template": "{string}",
    }
    with pytest.raises(ConfigurationError, match=r"gave only \d+ distinct") as error:
        load_prompts([spell(**small, size=50)], tokenizer, CONTEXT)
    could = int(str(error.value).split("gave only ")[1].split()[0])
    assert 0 < could <= 6  # strings of two ones and two zeros, those of one side
    assert len(load_prompts([spell(**small, size=could)], tokenizer, CONTEXT)) == could


def test_matching_passes_over_the_other_tasks(tokenizer: ChatTokenizer) -> None:
    prompts = load_prompts([spell(size=20, matching="back [a-m]{3}")], tokenizer, CONTEXT)
    assert len(prompts) == 20
    assert all(set(p.messages[0]["content"][5:]) <= set("abcdefghijklm") for p in prompts)


def test_a_models_text_is_never_run(tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    """The family's own verifier hands the text to eval."""
    source = spell(family="string_insertion", options={}, template="{string}", size=1)
    prompt = load_prompts([source], tokenizer, CONTEXT)[0]
    assert verify(prompt, f"open({str(tmp_path / 'ran')!r}, 'w').name") == 0
    assert not (tmp_path / "ran").exists()
    assert verify(prompt, prompt.verifier["answer"]) == 1


def test_text_that_breaks_a_familys_parser_is_wrong(tokenizer: ChatTokenizer) -> None:
    prompt = load_prompts(
        [spell(family="prime_factorization", options={}, template="{number}", size=1)], tokenizer, 64
    )[0]
    assert verify(prompt, "A,B") == 0


def test_a_task_that_changed_since_is_an_error(tokenizer: ChatTokenizer) -> None:
    prompt = load_prompts([spell(size=1)], tokenizer, CONTEXT)[0]
    other = Prompt(
        id=prompt.id, domain="spell", messages=(), tokens=(), verifier={**prompt.verifier, "answer": "other"}
    )
    with pytest.raises(ConfigurationError, match="is not what it was"):
        verify(other, "other")
    check(prompt.verifier)


# Split


def test_no_held_out_prompt_is_ever_trained_on(tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    """Whatever seeds the two sides are drawn from: the side is a property of the text."""
    train = load_prompts([spell(size=1500), spell(size=1500, seed=1)], tokenizer, CONTEXT)
    held_out = load_prompts([spell(size=300, split="held_out", seed=s) for s in (0, 1, 2)], tokenizer, CONTEXT)
    assert not {text_key(p.messages) for p in train} & {text_key(p.messages) for p in held_out}
    assert len(held_out) > 300
    check_disjoint(train, held_out)
    share = len(load_prompts([spell(size=250, split="held_out", held_out_fraction=0.5)], tokenizer, CONTEXT))
    assert share == 250
    rows = write(tmp_path / "rows.jsonl", *[row(p.messages[0]["content"].upper()) for p in train + held_out])
    again = load_prompts([rows.model_copy(update={"split": "held_out"})], tokenizer, CONTEXT)
    assert {text_key(p.messages) for p in again} == {text_key(p.messages) for p in held_out}


def test_the_split_keeps_its_fraction(tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    rows = write(tmp_path / "rows.jsonl", *[row(f"prompt {i}") for i in range(2000)])
    sides = {
        side: load_prompts([rows.model_copy(update={"split": side})], tokenizer, CONTEXT)
        for side in ("train", "held_out")
    }
    assert sum(map(len, sides.values())) == 2000
    assert 340 < len(sides["held_out"]) < 460  # 400 expected, standard deviation 18


def test_an_overlap_is_found(tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    train = load_examples([write(tmp_path / "a.jsonl", row("Hi  there", completion="x"))], tokenizer, CONTEXT)
    held_out = load_prompts([write(tmp_path / "b.jsonl", row("hi there", domain="other"))], tokenizer, CONTEXT)
    with pytest.raises(ConfigurationError, match=r"also in data\.train"):
        check_disjoint(train, held_out)


# Stream


@pytest.fixture
def items(tokenizer: ChatTokenizer, tmp_path: Path) -> list[Prompt]:
    rows = [row(f"{domain} {i}", domain=domain) for domain, n in (("a", 7), ("b", 30), ("c", 11)) for i in range(n)]
    return load_prompts([write(tmp_path / "items.jsonl", *rows)], tokenizer, CONTEXT)


def ids(prompts: list[Prompt]) -> list[str]:
    return [p.id for p in prompts]


def test_the_stream_is_a_function_of_its_seed(items: list[Prompt]) -> None:
    first, same, other = (PromptStream(items, {}, seed) for seed in (3, 3, 4))
    batch = ids(first.take(40))
    assert batch == ids(same.take(40))
    assert batch != ids(other.take(40))


@pytest.mark.parametrize("before", [0, 1, 13, 200])
def test_resuming_anywhere_continues_exactly(items: list[Prompt], before: int) -> None:
    stream = PromptStream(items, {"a": 2}, 0)
    for _ in range(before):
        stream.take(5)
    state = json.loads(json.dumps(stream.state_dict()))
    resumed = PromptStream(items, {"a": 2}, 0)
    resumed.load_state_dict(state)
    for n in (5, 17, 1):
        assert ids(stream.take(n)) == ids(resumed.take(n))
    assert len(json.dumps(state)) < 300


def test_each_epoch_of_a_domain_sees_each_item_once_in_a_new_order(items: list[Prompt]) -> None:
    stream = PromptStream(items, {"b": 0, "c": 0}, 0)
    epochs = [ids([stream.take(1)[0] for _ in range(7)]) for _ in range(4)]
    assert all(sorted(epoch) == sorted(epochs[0]) and len(set(epoch)) == 7 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_domains_come_by_weight_in_every_batch_and_on_every_rank(items: list[Prompt]) -> None:
    stream = PromptStream(items, {"a": 1, "b": 2, "c": 1}, 0)
    total: Counter[str] = Counter()
    ranks: list[set[str]] = [set(), set()]
    for step in range(1, 51):
        batch = stream.take(8)
        total.update(p.domain for p in batch)
        for rank in (0, 1):
            ranks[rank] |= {p.domain for p in batch[rank::2]}
        assert all(abs(total[d] - 8 * step * w) <= 3 for d, w in (("a", 0.25), ("b", 0.5), ("c", 0.25)))
    assert ranks == [{"a", "b", "c"}] * 2


def test_stream_errors(items: list[Prompt]) -> None:
    with pytest.raises(ConfigurationError, match="no prompts"):
        PromptStream([], {}, 0)
    with pytest.raises(ConfigurationError, match=r"data\.weights\.d: "):
        PromptStream(items, {"d": 1}, 0)
    with pytest.raises(ConfigurationError, match="all weights are 0"):
        PromptStream(items, {"a": 0, "b": 0, "c": 0}, 0)
    state = PromptStream(items[1:], {}, 0).state_dict()
    with pytest.raises(ConfigurationError, match="not those of the checkpoint"):
        PromptStream(items, {}, 0).load_state_dict(state)


def test_a_stream_of_examples_notices_another_completion(tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    streams = [
        PromptStream(load_examples([write(tmp_path / "a.jsonl", row(completion=c))], tokenizer, CONTEXT), {}, 0)
        for c in ("x", "y")
    ]
    with pytest.raises(ConfigurationError, match="not those of the checkpoint"):
        streams[0].load_state_dict(streams[1].state_dict())


def test_prompts_are_the_same_in_another_process(tokenizer: ChatTokenizer) -> None:
    """Ranks draw their prompts each for itself; a set in a generator would differ with the process's hash seed."""
    program = (
        "import sys; from megatron_mopd.data_config import ReasoningGymPrompts, Tokenizer;"
        "from megatron_mopd.prompts import PromptStream, load_prompts;"
        "from megatron_mopd.tokenizer import build_tokenizer;"
        "sources = [ReasoningGymPrompts.model_validate_json(s) for s in sys.argv[1:]];"
        "prompts = load_prompts(sources, build_tokenizer(Tokenizer()), 64);"
        "sys.stdout.write(PromptStream(prompts, {}, 0).state_dict()['digest'])"
    )
    sort = {"min_words": 2, "max_words": 2, "min_word_length": 3, "max_word_length": 3, "transformation": "lowercase"}
    sources = [
        spell(size=100),
        spell(family="word_sorting", options=sort, template="{direction} {transformed_words}", size=100),
        spell(family="palindrome_generation", options={}, template="pal {letters!c}", size=100),
        spell(family="letter_counting", options={}, template="{target_letter}", size=5),
    ]
    digest = PromptStream(load_prompts(sources, tokenizer, CONTEXT), {}, 0).state_dict()["digest"]
    arguments = [s.model_dump_json() for s in sources]
    environment = os.environ | {"PYTHONHASHSEED": "11"}
    result = subprocess.run(
        [sys.executable, "-c", program, *arguments], env=environment, capture_output=True, text=True, check=True
    )
    assert result.stdout == digest
