"""Hugging Face directories as student, teacher and result of a run: converted once, and given back as trained."""

from __future__ import annotations

import fcntl
import json
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_nemotron_h import saved_with_tokenizer
from small_stages import task
from torch import Tensor

from megatron_mopd import conversion, exchange, origins, parallel, presets, runner, together, torch_dist, train
from megatron_mopd.config import ConfigurationError, Parallel, build_config
from megatron_mopd.conversion import cache, inspection
from megatron_mopd.conversion.model_settings import facts
from megatron_mopd.conversion.partial_directory import partial_path
from megatron_mopd.data_config import Tokenizer
from megatron_mopd.parallel import Groups
from megatron_mopd.tokenizer import build_tokenizer

# --------------------------------------------------------------------------- helpers, also called on the ranks


def saved(path: Path, pattern: str = "M*E-", seed: int = 5, **changes: Any) -> Any:
    """A model whose convolution is not as long as the preset's."""
    return saved_with_tokenizer(path, pattern, seed, **{"conv_kernel": 3} | changes)


def tree(run: Path, initial: Path | None, **sections: Any) -> dict[str, Any]:
    """A short supervised stage."""
    return {
        "run": {"dir": str(run), "steps": 1},
        "model": {"max_sequence_length": 24} | ({"initial": str(initial)} if initial else {}),
        "source": {"type": "dataset"},
        "objective": {"type": "cross_entropy"},
        "batching": {"micro_batch_size": 4, "sequences_per_step": 8},
        "optimizer": {"lr": 1e-3, "warmup_steps": 0},
        "data": {"train": [task()]},
        "checkpoint": {"export": "hugging_face"},
    } | sections


def tensors_of(path: Path) -> dict[str, Tensor]:
    return {name: t for file in sorted(path.glob("*.safetensors")) for name, t in load_file(file).items()}


def theirs(directory: Path, tokens: Tensor) -> Tensor:
    """Log-probabilities of ``tokens`` after the first under transformers' own model of a directory."""
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    model, report = loaded
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        logits = model.eval()(tokens, use_cache=False).logits.float()
    return logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)


def ours(trainer: Any, tokens: Tensor) -> Tensor:
    """The same of a trainer's weights, on any layout."""
    from megatron_mopd.records import Prompt, Rollout
    from megatron_mopd.scoring import Scorer

    rows = [
        Rollout(
            prompt=Prompt(id=str(i), domain="", messages=(), tokens=(int(row[0]),)),
            sample=0,
            completion=row[1:],
            finish="length",
        )
        for i, row in enumerate(tokens)
    ]
    scorer = Scorer(
        groups=trainer.groups,
        parallel=trainer.config.parallel,
        vocab_size=trainer.vocab_size,
        pad_token=0,
        micro_batch_size=2,
    )
    trainer.learner.model.eval()
    return scorer.logprobs(trainer.learner.model, scorer.even(scorer.pack(rows))).view(len(tokens), -1)


def sample(vocab: int = 100) -> Tensor:
    return torch.randint(0, vocab, (4, 13), generator=torch.Generator().manual_seed(0))


def train_and_export(settings: dict[str, Any]) -> Tensor:
    """One stage on any layout; the log-probabilities of the weights it ended with."""
    from megatron_mopd.trainer import Trainer

    config = build_config(settings)
    groups = parallel.initialize(config.parallel, seed=3)
    train.run_stage(config, groups)
    trainer = Trainer(config, groups)
    assert trainer.resume() and trainer.step_index == config.run.steps
    return ours(trainer, sample())


def config_json(path: Path) -> dict[str, Any]:
    return json.loads((path / "config.json").read_text())


# --------------------------------------------------------------------------- a run from and to a directory


LAYOUTS = [
    pytest.param(1, {}, id="one"),
    pytest.param(4, {"tensor": 2, "expert": 2}, id="tp2-ep2"),
    pytest.param(2, {"pipeline": 2}, id="pp2", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("world", "layout"), LAYOUTS)
def test_a_directory_is_trained_and_given_back(ranks: Any, tmp_path: Path, world: int, layout: dict[str, int]) -> None:
    from transformers import AutoConfig

    saved(tmp_path / "hf")
    run = tmp_path / "runs" / "sft"
    settings = tree(run, tmp_path / "hf", parallel=layout)
    for found in ranks(world, train_and_export, settings):
        torch.testing.assert_close(found, theirs(run / "hugging_face", sample()), rtol=0, atol=1e-5)
    before, after = tensors_of(tmp_path / "hf"), tensors_of(run / "hugging_face")
    assert {n: (t.shape, t.dtype) for n, t in after.items()} == {n: (t.shape, t.dtype) for n, t in before.items()}
    assert not torch.equal(after["lm_head.weight"], before["lm_head.weight"])
    stored = torch_dist.open_index(run / "checkpoints" / "iter_0000001")
    rows = len(after["lm_head.weight"])
    assert torch.equal(torch_dist.read(stored, "output_layer.weight")[:rows], after["lm_head.weight"])
    assert inspection.differences(run / "checkpoints", run / "hugging_face") == []
    assert config_json(run / "hugging_face") == config_json(tmp_path / "hf")
    configs = [AutoConfig.from_pretrained(p).to_diff_dict() for p in (run / "hugging_face", tmp_path / "hf")]
    assert configs[0] == configs[1]
    carried = {p.name for p in (tmp_path / "hf").iterdir()}
    assert {p.name for p in (run / "hugging_face").iterdir()} == carried
    own = build_tokenizer(Tokenizer(type="huggingface", path=run / "hugging_face"))
    assert own.tokenizer_sha == build_tokenizer(Tokenizer()).tokenizer_sha


def test_no_source_is_needed_once_a_stage_has_read_it(groups: Groups, tmp_path: Path) -> None:
    saved(tmp_path / "hf")
    first, second = tmp_path / "runs" / "first", tmp_path / "runs" / "second"
    plain = {"checkpoint": {"export": "none"}}
    train.run_stage(build_config(tree(first, tmp_path / "hf", **plain)), groups)
    shutil.rmtree(tmp_path / "hf")
    shutil.rmtree(tmp_path / "runs" / "converted")
    train.run_stage(build_config(tree(second, first / "checkpoints", **plain)), groups)
    shutil.rmtree(first)
    done = conversion.megatron_to_hugging_face(second / "checkpoints", tmp_path / "out")
    manifest = json.loads((second / "checkpoints/iter_0000001/mopd_manifest.json").read_text())
    assert done.checkpoint_id == manifest["checkpoint_id"]
    assert theirs(tmp_path / "out", sample()).isfinite().all()
    assert (tmp_path / "out" / "tokenizer.json").is_file()


@pytest.mark.parametrize("shared", [True, False], ids=["one-mtp-block", "a-block-a-depth"])
def test_weights_that_were_drawn_here_are_given_away(groups: Groups, tmp_path: Path, shared: bool) -> None:
    run = tmp_path / "runs" / "drawn"
    settings = tree(run, None, model={"pattern": "M*E-/*E/*E", "max_sequence_length": 24})
    settings["model"]["override"] = {"recompute_granularity": "selective", "mtp_use_repeated_layer": shared}
    found = train_and_export(settings)
    torch.testing.assert_close(found, theirs(run / "hugging_face", sample()), rtol=0, atol=1e-5)
    drawn = tensors_of(run / "hugging_face")
    assert {"mtp.layers.0.eh_proj.weight", "mtp.layers.2.eh_proj.weight"} & drawn.keys() == (
        {"mtp.layers.0.eh_proj.weight"} | (set() if shared else {"mtp.layers.2.eh_proj.weight"})
    )
    assert config_json(run / "hugging_face")["num_nextn_predict_layers"] == 2
    tokenizer = build_tokenizer(Tokenizer(type="huggingface", path=run / "hugging_face"))
    assert tokenizer.tokenizer_sha == build_tokenizer(Tokenizer()).tokenizer_sha
    again = build_config(tree(tmp_path / "runs" / "next", run / "hugging_face"))  # what goes out comes in
    model = origins.resolved(again).model
    assert facts(model) == facts(build_config(settings).model) and presets.resolve(model).pattern == "M*E-/*E/*E"
    train.run_stage(again, groups)
    trained = tensors_of(tmp_path / "runs" / "next" / "hugging_face")
    assert trained.keys() == drawn.keys()
    assert all(not torch.equal(trained[n], drawn[n]) for n in drawn if n.startswith("mtp.") and "proj" in n)


def test_a_tied_head_is_trained_apart_and_said(
    groups: Groups, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved(tmp_path / "hf", "M-", tie_word_embeddings=True)
    run = tmp_path / "runs" / "sft"
    found = train_and_export(tree(run, tmp_path / "hf"))
    assert "tie_word_embeddings is now false" in caplog.text
    assert config_json(run / "hugging_face") == config_json(tmp_path / "hf") | {"tie_word_embeddings": False}
    torch.testing.assert_close(found, theirs(run / "hugging_face", sample()), rtol=0, atol=1e-5)


def test_what_the_format_cannot_say_is_not_promised(
    groups: Groups, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = tree(tmp_path / "run", None, model={"pattern": "M-", "override": {"activation_func": "gelu"}})
    with pytest.raises(ConfigurationError, match=r"cannot say what model\.override = .*gelu.* take the override out"):
        train.run_stage(build_config(settings), groups)
    assert not (tmp_path / "run").exists()  # before the first step
    assert "which config.json of nemotron_h cannot say" in caplog.text


def test_a_dtype_that_changes_is_said(groups: Groups, tmp_path: Path) -> None:
    model = saved(tmp_path / "hf", "M-")
    model.to(torch.bfloat16).save_pretrained(tmp_path / "hf")
    assert config_json(tmp_path / "hf")["dtype"] == "bfloat16"
    run = tmp_path / "runs" / "sft"
    found = train_and_export(tree(run, tmp_path / "hf"))
    assert config_json(run / "hugging_face") == config_json(tmp_path / "hf") | {"dtype": "float32"}
    torch.testing.assert_close(found, theirs(run / "hugging_face", sample()), rtol=0, atol=1e-5)


def test_mtp_that_is_promised_and_not_stored_is_left_out_and_said(
    groups: Groups, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved(tmp_path / "hf", "M*E", num_nextn_predict_layers=2)
    run = tmp_path / "runs" / "sft"
    train.run_stage(build_config(tree(run, tmp_path / "hf")), groups)
    assert "promises 2 MTP depths and no MTP weights are stored" in caplog.text
    assert "an export holds no MTP weights although" in caplog.text
    assert config_json(run / "hugging_face") == config_json(tmp_path / "hf")
    assert tensors_of(run / "hugging_face").keys() == tensors_of(tmp_path / "hf").keys()
    wanted = tree(run, tmp_path / "hf", model={"pattern": "M*E/*E/*E", "initial": str(tmp_path / "hf")})
    with pytest.raises(ConfigurationError, match=r"MTP layers \*E x 2 in the settings, none there"):
        origins.resolved(build_config(wanted))


def test_an_export_overwrites_nothing(groups: Groups, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "hugging_face").mkdir(parents=True)
    (run / "hugging_face" / "notes").write_text("mine")
    settings = tree(run, None, model={"pattern": "M-"})
    with pytest.raises(ConfigurationError, match=r"hugging_face is there already.*move it away, or choose another run"):
        train.run_stage(build_config(settings), groups)
    assert not (run / "checkpoints").exists()  # before the first step
    (run / "hugging_face" / "notes").unlink()  # an empty directory is nobody's
    train.run_stage(build_config(settings), groups)
    before = (run / "hugging_face" / "model.safetensors").stat().st_mtime_ns
    train.run_stage(build_config(settings), groups)  # finished: nothing to do, these weights are there
    assert (run / "hugging_face" / "model.safetensors").stat().st_mtime_ns == before
    tensors = tensors_of(run / "hugging_face")
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, run / "hugging_face" / "model.safetensors")
    with pytest.raises(ConfigurationError, match=r"holds other weights than .*lm_head\.weight"):
        train.run_stage(build_config(settings), groups)


# --------------------------------------------------------------------------- the cache


def test_a_directory_is_converted_once_and_again_when_it_changes(
    groups: Groups, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(hf := tmp_path / "hf", "M-")
    config = build_config(tree(tmp_path / "runs" / "sft", hf))
    made = exchange.prepare(config, groups)
    target = made.model.initial
    assert target is not None and target.parent == tmp_path / "runs" / "converted" and target.name.startswith("hf-")
    assert exchange.prepare(made, groups) == made
    with monkeypatch.context() as patch:
        patch.setattr(cache, "convert", lambda *_, **__: pytest.fail("converted again"))
        assert exchange.prepare(config, groups) == made
        elsewhere = build_config(tree(tmp_path / "runs" / "sft", tmp_path / "moved"))
        hf.rename(tmp_path / "moved")
        shutil.copytree(target, target.with_name(target.name.replace("hf-", "moved-")))
        assert exchange.prepare(elsewhere, groups).model.initial.name[-16:] == target.name[-16:]  # type: ignore[union-attr]
        (tmp_path / "moved").rename(hf)
    places = {cache.place(hf, tmp_path)}
    tensors = load_file(hf / "model.safetensors")
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, hf / "model.safetensors", metadata={"format": "pt"})
    places.add(cache.place(hf, tmp_path))
    (hf / "generation_config.json").write_text("{}")
    places.add(cache.place(hf, tmp_path))
    (hf / "chat_template.jinja").unlink()
    places.add(cache.place(hf, tmp_path))
    assert len(places) == 4
    again = exchange.prepare(config, groups).model.initial
    assert again != target and inspection.differences(hf, again) == []  # type: ignore[arg-type]


def conversions_of(settings: dict[str, Any]) -> tuple[str, int]:
    """Where the student is read from, and how many conversions this rank made for it."""
    config, calls, original = build_config(settings), [], cache.convert
    groups = parallel.initialize(config.parallel, seed=3)
    cache.convert = lambda *args, **options: calls.append(args) or original(*args, **options)
    try:
        return str(exchange.prepare(config, groups).model.initial), len(calls)
    finally:
        cache.convert = original


def test_one_rank_converts_for_all_and_a_failure_reaches_all(ranks: Any, tmp_path: Path) -> None:
    saved(tmp_path / "hf", "M-")
    (first, made), (second, none) = ranks(2, conversions_of, tree(tmp_path / "run", tmp_path / "hf"))
    assert first == second and (made, none) == (1, 0)
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    tensors["lm_head.weight"][3, 0] = float("nan")
    save_file(tensors, tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})
    for said in ranks(2, refusal_of, tree(tmp_path / "run", tmp_path / "hf")):
        assert "NaN in lm_head.weight" in said


def refusal_of(settings: dict[str, Any]) -> str:
    groups = parallel.initialize(Parallel(), seed=3)
    with pytest.raises(ConfigurationError) as caught:
        exchange.prepare(build_config(settings), groups)
    return str(caught.value)


def test_an_interrupted_conversion_goes_on(groups: Groups, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_mopd.conversion import plans

    monkeypatch.setattr(plans, "MEGATRON_SHARD", 50_000)  # several files
    saved(hf := tmp_path / "hf")
    target = cache.place(hf, tmp_path / "cache")

    def stop(done: int, total: int) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    monkeypatch.setattr("os.cpu_count", lambda: 1)
    with pytest.raises(KeyboardInterrupt):
        cache.convert(hf, target, without_mtp=True, report=stop)
    assert not cache.is_converted(target)
    assert cache.convert(hf, target, without_mtp=True).resumed > 0 and cache.is_converted(target)
    exchange._conversion(hf, target)(lambda done, total: None)  # on a machine that did not see it yet: nothing to do
    (target / "release" / ".metadata").unlink()
    with pytest.raises(ConfigurationError, match="exists already"):
        exchange._conversion(hf, target)(lambda done, total: None)


def test_another_runs_conversion_is_waited_for(
    groups: Groups, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    saved(hf := tmp_path / "hf", "M-")
    partial = partial_path(cache.place(hf, tmp_path / "cache"))
    partial.mkdir(parents=True)
    journal = (partial / ".journal.jsonl").open("w")
    fcntl.flock(journal, fcntl.LOCK_EX)
    threading.Timer(0.2, journal.close).start()  # the other one is killed
    assert cache.is_converted(exchange.converted(hf, tmp_path / "cache", groups))
    assert "another process is writing it" in caplog.text


def test_a_cache_that_cannot_be_written_is_refused(groups: Groups, tmp_path: Path) -> None:
    saved(tmp_path / "hf", "M-")
    (tmp_path / "file").write_text("")
    settings = tree(tmp_path / "run", tmp_path / "hf", checkpoint={"cache": str(tmp_path / "file" / "cache")})
    with pytest.raises(ConfigurationError, match=r"checkpoint\.cache = .*/file/cache: cannot be written \(Not a dir"):
        exchange.prepare(build_config(settings), groups)


def test_work_is_waited_for_and_failures_are_everybodys(ranks: Any) -> None:
    assert ranks(3, wait_for_the_second) == [[], [(1, 2)], []]
    assert ranks(3, fail_on_the_second) == ["rank 1: OSError: [Errno 5] no such luck"] * 3


def wait_for_the_second() -> list[tuple[int, int]]:
    import time

    groups, shown = parallel.initialize(Parallel(), seed=3), []

    def action(report: Any) -> None:
        report(1, 2)
        time.sleep(0.2)

    together.work(groups, groups.rank == 1, action, lambda done, total: shown.append((done, total)))
    return list(dict.fromkeys(shown))


def fail_on_the_second() -> str:
    groups = parallel.initialize(Parallel(), seed=3)

    def action(report: Any) -> None:
        raise OSError(5, "no such luck")

    with pytest.raises(ConfigurationError) as caught:
        together.work(groups, groups.rank == 1, action)
    return str(caught.value)


# --------------------------------------------------------------------------- what is said


def test_a_finished_stage_is_exported_when_that_is_asked_for_later(groups: Groups, tmp_path: Path) -> None:
    saved(tmp_path / "hf", "M-")
    run = tmp_path / "runs" / "sft"
    runner.run_unless_finished(
        build_config(tree(run, tmp_path / "hf", checkpoint={"export": "none"})), groups, title="sft"
    )
    before = (run / "result.json").stat().st_mtime_ns
    assert not (run / "hugging_face").exists()
    runner.run_unless_finished(build_config(tree(run, tmp_path / "hf")), groups, title="sft")
    assert (run / "result.json").stat().st_mtime_ns == before
    assert inspection.differences(run / "checkpoints", run / "hugging_face") == []


def test_later_stages_have_the_model_of_those_they_start_from(groups: Groups, tmp_path: Path) -> None:
    saved(tmp_path / "hf", "M*-")
    plain = {"checkpoint": {}}
    common = tree(Path("unused"), tmp_path / "hf", **plain)
    common.pop("run")
    stages = [
        {"name": "first", "settings": {"run": {"steps": 1}}},
        {"name": "second", "initial": "first", "settings": {"run": {"steps": 1}}},
    ]
    recipe = runner.Recipe.model_validate({"dir": str(tmp_path / "runs"), "common": common, "stages": stages})
    runner.run(recipe, groups)  # the second is checked before the first has run
    manifests = [
        json.loads((tmp_path / "runs" / name / "checkpoints/iter_0000001/mopd_manifest.json").read_text())
        for name in ("first", "second")
    ]
    assert (
        manifests[0]["model"] == manifests[1]["model"] and manifests[0]["hugging_face"] == manifests[1]["hugging_face"]
    )


def test_a_teacher_without_a_tokenizer_and_a_student_with_another_are_refused(groups: Groups, tmp_path: Path) -> None:
    from megatron_mopd.teachers import TeacherPool
    from megatron_mopd.trainer import Trainer

    saved(tmp_path / "hf", "M-")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / "hf" / name).unlink()
    teachers = {"t": {"checkpoint": str(tmp_path / "hf"), "domains": ["plain"]}}
    config = build_config(tree(tmp_path / "run", None, teachers=teachers))
    with pytest.raises(ConfigurationError, match=r"lacks tokenizer_sha.*put the tokenizer's files, chat template incl"):
        TeacherPool(config, groups, build_tokenizer(Tokenizer()))
    saved(tmp_path / "other", "M-", vocab_size=90)
    with pytest.raises(ConfigurationError, match=r"vocab_size = 90, of .*/other, but .*has 101 tokens; name the token"):
        Trainer(build_config(tree(tmp_path / "runs" / "new", tmp_path / "other")), groups)
    assert not (tmp_path / "runs").exists()  # before anything is converted
