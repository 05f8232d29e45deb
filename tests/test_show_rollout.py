"""Rollouts on the terminal and as a page: every token with its numbers, nothing that needs the network, all escaped."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from scripts import loaded

from megatron_mopd import palette, rollout_html, rollout_view, run_record, shards
from megatron_mopd.config import ConfigurationError, build_config
from megatron_mopd.data_config import Tokenizer
from megatron_mopd.records import Policy, Prompt, Provenance, Rollout, Sampling, ScoredRollout, UpdatedRollout
from megatron_mopd.rollout_view import View
from megatron_mopd.tokenizer import ChatTokenizer, build_tokenizer


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return loaded("tools/show_rollout.py")


@pytest.fixture(scope="module")
def tokenizer() -> ChatTokenizer:
    return build_tokenizer(Tokenizer())


HOSTILE = """<script>alert("1")</script> & 'x'"""


def kept(
    tokenizer: ChatTokenizer,
    text: str,
    advantage: list[float],
    domain: str = "plain",
    mask: int = 1,
    dropped: str | None = None,
) -> UpdatedRollout:
    completion = torch.tensor(tokenizer.encode_completion(text))
    n = len(completion)
    record = Provenance(
        policy=Policy(run_id="run", step=6, initial_id="f" * 64),
        teacher_id="a" * 64,
        tokenizer_sha=tokenizer.tokenizer_sha,
        template_sha=tokenizer.template_sha,
        sampling=Sampling(temperature=1.0, max_new_tokens=9, stop_tokens=(1,)),
        domain=domain,
        seed=3,
    )
    rollout = Rollout(
        prompt=Prompt(id=f"{domain}-id", domain=domain, messages=({"role": "user", "content": HOSTILE},), tokens=(1,)),
        sample=2,
        completion=completion,
        finish="stop",
        behav_logprobs=torch.full((n,), -1.0),
        provenance=record,
        reward=0.5,
        dropped=dropped,
    )
    gaps = torch.tensor(advantage)
    values = {"advantage": gaps, "log_ratio": gaps, "importance": torch.full((n,), 1.25), "ratio": torch.ones(n)}
    values |= {"mask": torch.tensor([float(mask)] + [1.0] * (n - 1)), "entropy": torch.full((n,), 0.5)}
    item = ScoredRollout(rollout=rollout, teacher="first", teacher_logprobs=torch.full((n,), -2.0))
    return UpdatedRollout(item=item, per_token={} if dropped else values, dropped=dropped)


@pytest.fixture
def run(tmp_path: Path, tokenizer: ChatTokenizer) -> Path:
    """The directory of a run with shards of two steps, made without training."""
    sft = {"source": {"type": "dataset"}, "objective": {"type": "cross_entropy"}, "batching": {"sequences_per_step": 1}}
    config = build_config({"run": {"dir": str(tmp_path), "steps": 7}, **sft})
    (tmp_path / run_record.FILE).write_text(json.dumps(run_record.of(config, {})))
    header = {
        "format": shards.FORMAT,
        "policy": {"run_id": "run <1>", "step": 6, "initial_id": "f" * 64},
        "teachers": {"first": {"checkpoint_id": "a" * 64, "domains": ["plain", "loud"]}},
        "routing": {"plain": "first", "loud": "first"},
        "tokenizer_sha": tokenizer.tokenizer_sha,
        "template_sha": tokenizer.template_sha,
        "objective": {"type": "mopd"},
        "layout": {"tensor": 1},
        "metrics": {"loss": 0.25},
        "weights_sha": None,
    }
    rollouts = [
        kept(tokenizer, "a<b", [0.0, 3.0, -3.0, 0.5]),
        kept(tokenizer, "& \n", [-4.0, -4.0, 0.0, 0.0], domain="loud", mask=0),
        kept(tokenizer, "zz", [0.0, 0.0, 0.0], domain="loud", dropped="repetition"),
    ]
    for step in (6, 7):
        shards.save(tmp_path / shards.FOLDER, step, header | {"step": step}, rollouts if step == 7 else rollouts[:1])
    return tmp_path


class Reader(HTMLParser):
    """What a browser would see: tags in order, and the numbers behind each token."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.tips: list[tuple[str, str]] = []
        self.text: list[str] = []
        self.foreign: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        known = dict(attrs)
        self.tags.append(tag)
        self.open += [tag] if tag not in ("meta", "br") else []
        self.foreign += [f"{tag} {name}" for name in known if name in ("src", "href") or name.startswith("on")]
        if "data-tip" in known:
            self.tips.append((known["class"], known["data-tip"]))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_the_page_is_whole_escaped_and_needs_nothing(run: Path, tool: ModuleType) -> None:
    shard, tokenizer = tool.load(run, None)
    views = tool.chosen(shard, tokenizer, None, None, None)
    text = rollout_html.page(shard.header, views, rollout_view.scale(views))
    reader = Reader()
    reader.feed(text)
    assert not reader.open and not reader.foreign
    assert not {"script", "link", "img", "iframe"} & set(reader.tags)
    assert "http" not in text and "url(" not in text and "@import" not in text
    seen = "".join(reader.text)
    assert "run <1>, step 7" in seen and seen.count(HOSTILE) == 3  # as text
    for word in ("a" * 64, "f" * 64, tokenizer.tokenizer_sha, tokenizer.template_sha, "plain → first", "temperature 1"):
        assert word in seen
    assert len(reader.tips) == 4 + 4 + 3
    kind, tip = reader.tips[1]
    assert kind == "t" and tip.splitlines() == [
        f"token 1: '<' (id {tokenizer.encode_completion('<')[0]})   teacher first   counted",
        "advantage 3   log p(teacher) -2   log p(student, at the update) -5   log p(student, as drawn) -1"
        "   importance c_t 1.25   ratio r_t 1   mask m_t 1   entropy 0.5",
    ]
    kinds = [kind for kind, _ in reader.tips]
    assert kinds == ["t"] * 4 + ["t u"] + ["t"] * 3 + ["t u"] * 3
    assert "importance c_t out of bounds" in reader.tips[4][1] and "dropped by guard repetition" in reader.tips[8][1]
    assert "background: #ffffff" in text and "color: #1a1a1a" in text


def test_a_token_is_readable_on_its_colour() -> None:
    for value in (-9.0, -0.5, 0.0, 0.5, 9.0):
        style = rollout_html._style(value, 3.0)
        ground = palette.advantage_colour(value, 3.0)
        assert style == f"background:{palette.hexadecimal(ground)};color:{palette.readable_on(ground)}"


def test_the_terminal_shows_colours_and_strikes_what_did_not_count(run: Path, tool: ModuleType) -> None:
    shard, tokenizer = tool.load(run, 7)
    views = tool.chosen(shard, tokenizer, "loud", None, None)
    text = rollout_view.text(views[0], 4.0)
    heading, line = text.plain.split("\n")
    assert heading == (
        "prompt loud-id sample 2, teacher first, policy of step 6, reward 0.5, mean advantage -2.000, ended by stop,"
        " 3 of 4 tokens counted (importance c_t out of bounds)"
    )
    assert line.endswith("→ &·↵⏎")
    spans = {
        text.plain[s.start : s.end]: s for s in text.spans if s.start >= len(text.plain) - 4 and s.style == "strike"
    }
    assert list(spans) == ["&"]
    coloured = [s for s in text.spans if s.start >= len(text.plain) - 4 and "on " in str(s.style)]
    assert len(coloured) == 2  # the other two are at zero
    dropped = rollout_view.text(views[1], 4.0)
    assert "0 of 3 tokens counted (whole rollout dropped by guard repetition)" in dropped.plain


def test_rollouts_are_chosen_by_domain_prompt_and_worst(run: Path, tool: ModuleType, tokenizer: ChatTokenizer) -> None:
    shard, _ = tool.load(run, 7)

    def chosen(**options: Any) -> list[str]:
        views: list[View] = tool.chosen(shard, tokenizer, **{"domain": None, "prompt": None, "worst": None, **options})
        return ["".join(view.tokens) for view in views]

    assert chosen() == ["a<b⏎", "& \n⏎", "zz⏎"]
    assert chosen(domain="loud") == ["& \n⏎", "zz⏎"] and chosen(prompt="pl") == ["a<b⏎"]
    assert chosen(worst=2) == ["& \n⏎", "zz⏎"] and chosen(worst=1, domain="plain") == ["a<b⏎"]
    with pytest.raises(ConfigurationError, match=r"none of its 3 rollouts .* domain quiet .* are loud, plain"):
        chosen(domain="quiet")


def test_the_tool_prints_and_writes(run: Path, tool: ModuleType, monkeypatch: Any, capsys: Any) -> None:
    page = run / "pages" / "out.html"
    monkeypatch.setattr("sys.argv", ["show_rollout.py", str(run), "--worst", "1", "--html", str(page)])
    assert tool.main() == 0
    out = capsys.readouterr().out
    assert "step_0000007.json: student run <1> at step 6, teachers first aaaaaaaaaaaa" in out.replace("\n", "")
    assert "1 rollouts in" in out and page.read_text().startswith("<!DOCTYPE html>")
    monkeypatch.setattr("sys.argv", ["show_rollout.py", str(run / "pages")])
    with pytest.raises(SystemExit, match=r"error: .*no shards; set rollout.shards"):
        tool.main()


def test_another_tokenizer_is_refused(run: Path, tool: ModuleType) -> None:
    shard = shards.read(run / shards.FOLDER, 7)
    shards.save(run / shards.FOLDER, 8, dict(shard.header) | {"tokenizer_sha": "0" * 64}, shard.rollouts)
    with pytest.raises(ConfigurationError, match="written with tokenizer 000000000000, but characters is"):
        tool.load(run, None)
