"""Scores of token files: transformers' log-probabilities on any layout; every line is checked before one is scored."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from scripts import loaded

from megatron_mopd import token_scores
from megatron_mopd.config import ConfigurationError, Parallel
from megatron_mopd.files import atomically
from megatron_mopd.scoring import Scorer, ScoringError

TOOL = Path(__file__).resolve().parent.parent / "tools" / "score_tokens.py"
VOCAB = 101
SIZES = {
    "vocab_size": VOCAB, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "intermediate_size": 96, "ssm_state_size": 16, "mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 2,
    "chunk_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    "moe_latent_size": 32, "moe_shared_expert_intermediate_size": 48, "routed_scaling_factor": 2.5,
}  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``hf``, a random model as transformers saves it, ``tokens.jsonl`` and ``expected.json``, its own scores."""
    from transformers import NemotronHConfig, NemotronHForCausalLM

    folder = tmp_path_factory.mktemp("score")
    torch.manual_seed(3)
    kinds = ["linear_attention", "moe", "full_attention", "mlp", "linear_attention", "moe"]
    config = NemotronHConfig(**SIZES, layers_block_type=kinds, time_step_min=1e-6, initializer_range=0.1)
    model: Any = NemotronHForCausalLM(config).eval()
    model.save_pretrained(folder / "hf")
    generator = torch.Generator().manual_seed(1)
    lengths = [1 + (7 * i) % 23 for i in range(40)]
    rows = [torch.randint(0, VOCAB, (n,), generator=generator) for n in lengths]
    expected = {}
    with (folder / "tokens.jsonl").open("w") as file, torch.no_grad():
        for i, row in enumerate(rows):
            name: str | int = i if i % 2 else f"row {i} ü"
            file.write(json.dumps({"id": name, "tokens": row.tolist()}) + "\n" * (1 + i % 2))
            logits = model(row[None], use_cache=False).logits[0, :-1].log_softmax(-1)
            expected[str(name)] = logits.gather(-1, row[1:, None])[:, 0].tolist()
    (folder / "expected.json").write_text(json.dumps(expected))
    return folder


def score(root: Path, output: Path, checkpoint: Path, *options: str) -> None:
    """The tool's own steps, in a process group that is there already."""
    tool: Any = loaded("tools/score_tokens.py")
    given = ["--checkpoint", checkpoint, "--input", root / "tokens.jsonl", "--output", output, *options]
    arguments = tool.parser().parse_args([str(value) for value in given])
    model, scorer, totals = tool.load(arguments)
    with tool.bar(scorer.groups, totals.tokens) as show:
        token_scores.score_file(arguments.input, arguments.output, model, scorer, show)


def assert_scores(root: Path, output: Path) -> None:
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    asked = [json.loads(line)["id"] for line in (root / "tokens.jsonl").read_text().split("\n") if line]
    assert [line["id"] for line in lines] == asked
    expected = json.loads((root / "expected.json").read_text())
    for line in lines:
        truth = torch.tensor(expected[str(line["id"])])
        torch.testing.assert_close(torch.tensor(line["logprobs"]), truth, rtol=0, atol=1e-5)
        assert set(line) == {"id", "logprobs"}


LAYOUTS = {
    "one": (1, []),
    "data-parallel": (2, ["--micro-batch-size", "3"]),
    "ep2": (2, ["--expert-parallel", "2", "--max-tokens", "23"]),
    "tp2-ep2": (4, ["--tensor-parallel", "2", "--expert-parallel", "2", "--max-tokens", "50"]),
    "pp2": (2, ["--pipeline-parallel", "2", "--micro-batch-size", "5"]),
}


@pytest.mark.parametrize(("world", "options"), LAYOUTS.values(), ids=LAYOUTS.keys())
def test_scores_are_transformers_own(ranks: Any, root: Path, tmp_path: Path, world: int, options: list[str]) -> None:
    options = [*options, "--cache", str(root / "cache")]
    ranks(world, score, root, tmp_path / "scores.jsonl", root / "hf", *options)
    assert_scores(root, tmp_path / "scores.jsonl")
    assert [p.name for p in tmp_path.iterdir()] == ["scores.jsonl"]


def test_megatron_directories_are_scored_and_may_need_a_description(ranks: Any, root: Path, tmp_path: Path) -> None:
    from megatron_mopd import conversion

    conversion.hugging_face_to_megatron(root / "hf", tmp_path / "megatron")
    ranks(2, score, root, tmp_path / "a.jsonl", tmp_path / "megatron", "--tensor-parallel", "2")
    assert_scores(root, tmp_path / "a.jsonl")
    (tmp_path / "megatron/release/mopd_manifest.json").unlink()  # as another program writes it
    said = ranks(1, refused, root, tmp_path / "b.jsonl", tmp_path / "megatron")[0]
    assert "does not say which model it holds; name a Hugging Face directory of the same model with --like" in said
    ranks(2, score, root, tmp_path / "b.jsonl", tmp_path / "megatron", "--like", root / "hf", "--tensor-parallel", "2")
    assert_scores(root, tmp_path / "b.jsonl")


def refused(root: Path, output: Path, checkpoint: Path, *options: str) -> str:
    with pytest.raises(ConfigurationError) as caught:
        score(root, output, checkpoint, *options)
    return str(caught.value)


def test_an_output_that_exists_and_a_layout_that_cannot_be_are_refused(ranks: Any, root: Path, tmp_path: Path) -> None:
    (tmp_path / "there.jsonl").write_text("mine")
    for said in ranks(2, refused, root, tmp_path / "there.jsonl", root / "hf"):
        assert "there.jsonl: exists already and is not overwritten" in said
    assert (tmp_path / "there.jsonl").read_text() == "mine"
    said = ranks(1, refused, root, tmp_path / "gone" / "x.jsonl", root / "hf")[0]
    assert "gone: no directory that can be written; name another" in said
    assert [p.name for p in tmp_path.iterdir()] == ["there.jsonl"]  # nothing was converted either
    assert "does not divide" in ranks(1, refused, root, tmp_path / "x.jsonl", root / "hf", "--tensor-parallel", "3")[0]
    assert "2 running processes" in ranks(2, refused, root, tmp_path / "x", root / "hf", "--expert-parallel", "4")[0]
    said = ranks(1, refused, root, tmp_path / "x.jsonl", root / "hf", "--preset", "tiny")[0]
    assert "leave --like and --preset out" in said


# --------------------------------------------------------------------------- lines


def scorer_of(groups: Any, **options: Any) -> Scorer:
    settings: dict[str, Any] = {"vocab_size": VOCAB, "pad_token": 0, "micro_batch_size": 2, "max_tokens": 10} | options
    return Scorer(groups=groups, parallel=Parallel(), **settings)


GOOD = '{"id": 1, "tokens": [5, 6], "note": "kept out"}\n'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"f\.jsonl:3: not valid JSON"),
        ("[1]", r":3: an object with the fields \"id\" and \"tokens\""),
        ('{"id": 2}', ":3: an object with the fields"),
        ('{"id": true, "tokens": [1]}', ":3: id = True: must be text or a whole number"),
        ('{"id": 2, "tokens": []}', r":3: tokens = \[\]: must be a list with at least one token id"),
        ('{"id": 2, "tokens": [1, 2.0]}', ":3: tokens holds 2.0: token ids are whole numbers"),
        ('{"id": 2, "tokens": [1, true]}', ":3: tokens holds True"),
        ('{"id": 2, "tokens": [1, 101]}', ":3: token id 101 is not in the vocabulary of 101 tokens"),
        ('{"id": 2, "tokens": [-1, 1]}', ":3: token id -1 is not in the vocabulary"),
        ('{"id": 1, "tokens": [1]}', ":3: id 1 is on line 1 already"),
        ('{"id": 2, "tokens": [1,1,1,1,1,1,1,1,1,1,1]}', ":3: 11 tokens are more than the 10 .* raise --max-tokens"),
    ],
)
def test_a_line_that_cannot_be_scored_is_named(groups: Any, tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "f.jsonl"
    file.write_text(GOOD + "\n" + line + "\n")
    with pytest.raises(ConfigurationError, match=message):
        token_scores.check(file, scorer_of(groups))


def test_files_without_lines_are_refused(groups: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="cannot be read: No such file"):
        token_scores.check(tmp_path / "gone", scorer_of(groups))
    (tmp_path / "empty").write_text("\n\n")
    with pytest.raises(ConfigurationError, match="holds no line"):
        token_scores.check(tmp_path / "empty", scorer_of(groups))
    (tmp_path / "good").write_text(GOOD)
    assert token_scores.check(tmp_path / "good", scorer_of(groups)) == token_scores.Totals(1, 2)


def test_a_window_is_bounded_in_lines_and_tokens(groups: Any) -> None:
    lines = [token_scores.Line(i, i, [1] * (1 + i % 10)) for i in range(500)]
    found = list(token_scores.windows(iter(lines), scorer_of(groups)))
    assert [line for window in found for line in window] == lines
    assert max(map(len, found)) == 2 * token_scores.WINDOW
    narrow = list(token_scores.windows(lines, scorer_of(groups, micro_batch_size=50)))
    assert max(sum(len(line.tokens) for line in window) for window in narrow) <= 10 * token_scores.WINDOW


def test_micro_batches_hold_no_more_tokens_than_allowed(groups: Any) -> None:
    from megatron_mopd.records import Prompt, Rollout

    rows = [
        Rollout(
            prompt=Prompt(id=str(n), domain="", messages=(), tokens=(1,)),
            sample=0,
            completion=torch.ones(n, dtype=torch.int64),
            finish="length",
        )
        for n in (8, 4, 4, 3, 0, 9, 1)
    ]
    packed = scorer_of(groups, micro_batch_size=3).pack(rows)
    assert [tuple(mb.tokens.shape) for mb in packed] == [(1, 9), (2, 5), (2, 4), (1, 10), (1, 2)]
    assert [tuple(mb.tokens.shape) for mb in scorer_of(groups, max_tokens=None).pack(rows)][:2] == [(2, 9), (2, 5)]


def test_a_score_that_is_none_leaves_no_file(groups: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in").write_text(GOOD)
    monkeypatch.setattr(Scorer, "logprobs", lambda *_: torch.tensor([float("nan")]))
    with pytest.raises(ScoringError, match=r"the checkpoint gives log-probability nan to token 0 of id 1 .*\(line 1\)"):
        token_scores.score_file(tmp_path / "in", tmp_path / "out", None, scorer_of(groups))
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_two_writers_of_one_file_do_not_mix(tmp_path: Path) -> None:
    child = (
        "import sys; from pathlib import Path; from megatron_mopd.files import atomically;"
        " atomically(Path(sys.argv[1]), lambda file: file.write_text('second'))"
    )

    def fill(file: Path) -> None:
        with file.open("w") as stream:
            stream.write("first, ")
            stream.flush()
            subprocess.run([sys.executable, "-c", child, str(tmp_path / "out")], check=True, timeout=60)
            assert (tmp_path / "out").read_text() == "second"
            stream.write("to its end")

    atomically(tmp_path / "out", fill)
    assert (tmp_path / "out").read_text() == "first, to its end"


@pytest.mark.slow
def test_the_command_line_scores_under_torchrun(root: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=4", "--master-port=29541", str(TOOL)]
    command += ["--checkpoint", str(root / "hf"), "--input", str(root / "tokens.jsonl")]
    command += ["--output", str(tmp_path / "scores.jsonl"), "--tensor-parallel", "2", "--expert-parallel", "2"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    tokens = sum(len(json.loads(line)["tokens"]) for line in (root / "tokens.jsonl").read_text().split("\n") if line)
    assert f"scores.jsonl: 40 sequences, {tokens} tokens in" in done.stdout and "tokens/s" in done.stdout
    assert_scores(root, tmp_path / "scores.jsonl")
    again = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert again.returncode != 0 and "exists already and is not overwritten" in again.stderr
