"""The pool of teachers: right teacher, right order, right values, nothing moved; and every unfit checkpoint refused."""

import dataclasses
import hashlib
import json
import shutil
from types import SimpleNamespace

import pytest
import torch

from megatron_mopd import batch as batching
from megatron_mopd.config import ConfigurationError, build_config
from megatron_mopd.records import Policy, Prompt, Rollout, Sampling

VOCAB = 53  # odd: padded under tensor parallelism
TOKENIZER = SimpleNamespace(pad_token=0, tokenizer_sha="tok", template_sha="tem", vocab_size=VOCAB)
LAYOUTS = {
    "dp2": (2, {}),
    "tp2": (2, {"tensor": 2}),
    "ep2": (2, {"expert": 2}),
    "tp2_ep2_dp2": (4, {"tensor": 2, "expert": 2}),
    "pp2": (2, {"pipeline": 2}),
    "pp4": (4, {"pipeline": 4}),
    "pp2_tp2": (4, {"pipeline": 2, "tensor": 2}),
    "pp2_ep2": (4, {"pipeline": 2, "expert": 2}),
}


def configuration(root, teachers=None, **sections):
    teachers = teachers or {
        "wordy": {"checkpoint": root / "a", "domains": ["spell", "rhyme"]},
        "exact": {"checkpoint": root / "b", "domains": ["count"]},
    }
    tree = {"run": {"dir": str(root / "run"), "steps": 1}, "teachers": teachers, "batching": {"micro_batch_size": 3}}
    return build_config(tree | {"rollout": {"temperature": 0.8}} | sections)


def write_checkpoints(root):
    """Checkpoints a and b of the tiny preset from different seeds, and c of another width."""
    from pathlib import Path

    from megatron_mopd import checkpoint, parallel, student
    from megatron_mopd.config import Model, Parallel

    for seed, (name, model) in enumerate({"a": Model(), "b": Model(), "c": wider()}.items()):
        groups = parallel.initialize(Parallel(), seed=seed)
        built = student.build_model(model, Parallel(), groups, VOCAB)
        with torch.no_grad():
            built.output_layer.weight.mul_(5)  # far from uniform, so that teachers differ
            for buffer_name, buffer in built.named_buffers():
                if buffer_name.endswith("expert_bias"):
                    buffer.normal_()
        manifest = {"tokenizer_sha": "tok", "template_sha": "tem", "vocab_size": VOCAB}
        manifest["model"] = model.model_dump(mode="json")
        checkpoint.save(Path(root) / name, 1, built, None, groups, state={}, manifest=manifest)


def wider():
    from megatron_mopd.config import Model

    return Model(override={"ffn_hidden_size": 96})


@pytest.fixture(scope="module")
def root(ranks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("teachers")
    ranks(1, write_checkpoints, str(folder))
    return folder


def make_rollouts(count=11):
    """Interleaved domains, ragged lengths."""
    generator = torch.Generator().manual_seed(5)
    rollouts = []
    for i in range(count):
        tokens = torch.randint(1, VOCAB, (3 + i % 4,), generator=generator)
        domain = ("count", "spell", "rhyme")[i % 3]
        completion = torch.randint(1, VOCAB, (2 + (5 * i) % 7,), generator=generator)
        prompt = Prompt(id=f"p{i}", domain=domain, messages=(), tokens=tuple(tokens.tolist()))
        options = {"sample": 0, "finish": "stop", "provenance": record(domain)}
        rollouts.append(Rollout(prompt=prompt, completion=completion, **options))
    return rollouts


def record(domain):
    from megatron_mopd.records import Provenance

    return Provenance(
        policy=Policy(run_id="run", step=0),
        teacher_id=None,
        tokenizer_sha="tok",
        template_sha="tem",
        sampling=Sampling(temperature=0.8, max_new_tokens=8, stop_tokens=()),
        domain=domain,
        seed=42,
    )


def pool_of(config, groups):
    from megatron_mopd.teachers import TeacherPool

    return TeacherPool(config, groups, TOKENIZER)


def loaded(path, groups, config, mtp=False):
    """A checkpoint as a plain model, apart from any pool."""
    from megatron_mopd import checkpoint, student

    model = student.build_model(config.model, config.parallel, groups, VOCAB, "fp32", mtp=mtp)
    checkpoint.load_weights(path, model, groups)
    return model


@torch.no_grad()
def log_softmax(model, rollout, temperature=0.8):
    """fp64 [n, V] log-probabilities of one rollout alone, from whole logits."""
    from megatron_mopd import student

    out = student.forward(model, rollout.tokens[None])
    start = len(rollout.prompt.tokens) - 1
    hidden = out.hidden[start : start + len(rollout.completion), 0].double()
    return (hidden @ out.output_weight[:VOCAB].double().T / temperature).log_softmax(-1)


def digest(tensors):
    return hashlib.sha256(b"".join(t.detach().numpy().tobytes() for t in tensors)).hexdigest()


def test_each_rollout_is_scored_by_its_domains_teacher(root, groups):
    config = configuration(root)
    pool, rollouts = pool_of(config, groups), make_rollouts()
    scored = pool.score(rollouts)
    models = {"wordy": loaded(root / "a", groups, config), "exact": loaded(root / "b", groups, config)}
    for item, rollout in zip(scored, rollouts, strict=True):
        expected = {"count": "exact"}.get(rollout.prompt.domain, "wordy")
        assert item.teacher == expected and item.rollout.prompt is rollout.prompt
        assert item.rollout.provenance.teacher_id == pool.ids[expected]
        truth = log_softmax(models[expected], rollout).gather(1, rollout.completion[:, None])[:, 0]
        assert item.teacher_logprobs.dtype == torch.float32
        torch.testing.assert_close(item.teacher_logprobs.double(), truth, rtol=0, atol=2e-5)
    assert len(set(pool.ids.values())) == 2


def test_a_teacher_is_loaded_once_a_pass_in_the_order_of_the_configuration(root, groups, monkeypatch):
    pool, rollouts = pool_of(configuration(root), groups), make_rollouts()
    turns, swap = [], pool.swap_in
    monkeypatch.setattr(pool, "swap_in", lambda name: turns.append(name) or swap(name))
    pool.score(rollouts)
    pool.score([r for r in rollouts if r.prompt.domain == "count"])
    assert turns == ["wordy", "exact", "exact"]
    assert pool.score([]) == []


def test_teachers_cost_no_device_memory_gradient_or_mtp_and_never_move(root, groups):
    alone = {"wordy": {"checkpoint": root / "a", "domains": ["count", "spell", "rhyme"]}}
    one = pool_of(configuration(root, alone), groups)
    pool, rollouts = pool_of(configuration(root), groups), make_rollouts()
    size = lambda p: sum(t.numel() for m in p._residents.values() for t in [*m.parameters(), *m.buffers()])  # noqa: E731
    assert size(pool) == size(one)
    (model,) = pool._residents.values()
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert not any(name.startswith("mtp") for name, _ in model.named_modules())
    biases = [n for n in pool._weights[pool.ids["wordy"]] if n.endswith("expert_bias")]
    assert biases
    host = {identity: digest(weights.values()) for identity, weights in pool._weights.items()}
    for _ in range(2):
        scored = pool.score(rollouts)
    pool.reverse_kl(loaded(root / "a", groups, configuration(root)).train(), rollouts)
    assert host == {identity: digest(weights.values()) for identity, weights in pool._weights.items()}
    for name in pool.names:
        resident = dict(pool.swap_in(name).named_buffers())
        assert digest(resident[n] for n in biases) == digest(pool._weights[pool.ids[name]][n] for n in biases)
    assert all(p.grad is None for p in model.parameters())
    assert not any(item.teacher_logprobs.requires_grad for item in scored)


def test_a_student_equal_to_its_teacher_has_advantage_exactly_zero(root, groups):
    from megatron_mopd import student
    from megatron_mopd.config import Mopd
    from megatron_mopd.objectives.mopd import mopd_loss
    from megatron_mopd.records import Counts
    from mopd_kernels import linear_logprob

    config = configuration(root)
    scored = [s for s in pool_of(config, groups).score(make_rollouts()) if s.teacher == "wordy"]
    model = loaded(root / "a", groups, config, mtp=True).train()
    for micro_batch in batching.pack(scored, 3, 0):
        out = student.forward(model, micro_batch.tokens)
        hidden = student.gather_hidden(out.hidden, groups, model.config)[micro_batch.rows]
        theta = linear_logprob(hidden, out.output_weight, micro_batch.targets, temperature=0.8, valid_vocab=VOCAB)
        micro_batch = dataclasses.replace(micro_batch, behav_logprobs=theta.detach())
        output = mopd_loss(theta, micro_batch, Mopd(), Counts(tokens=50, sequences=7))
        output.loss.backward()
        assert not output.per_token["advantage"].any()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_equal_checkpoints_share_one_host_copy(root, groups):
    shutil.copytree(root / "a", root / "copy", dirs_exist_ok=True)
    teachers = {
        "first": {"checkpoint": root / "a", "domains": ["spell"]},
        "second": {"checkpoint": root / "copy", "domains": ["count", "rhyme"]},
    }
    pool = pool_of(configuration(root, teachers), groups)
    assert pool.ids["first"] == pool.ids["second"] and len(pool._weights) == 1
    assert {s.teacher for s in pool.score(make_rollouts())} == {"first", "second"}


def test_teachers_of_two_architectures_have_a_resident_each(root, groups):
    teachers = {
        "wordy": {"checkpoint": root / "a", "domains": ["spell", "rhyme"]},
        "wide": {"checkpoint": root / "c", "domains": ["count"], "model": wider().model_dump(mode="json")},
    }
    pool = pool_of(configuration(root, teachers), groups)
    assert len(pool._residents) == 2 and len(pool.score(make_rollouts())) == 11


def test_reverse_kl_is_exact_per_teacher_and_domain(root, groups):
    config = configuration(root)
    pool, rollouts = pool_of(config, groups), make_rollouts()
    models = {"wordy": loaded(root / "a", groups, config), "exact": loaded(root / "b", groups, config)}
    student = models["wordy"].train()
    found = pool.reverse_kl(student, rollouts, all_pairs=True)
    assert student.training
    for name, row in found.items():
        for domain, value in row.items():
            parts = []
            for rollout in (r for r in rollouts if r.prompt.domain == domain):
                log_p, log_q = log_softmax(student.eval(), rollout), log_softmax(models[name], rollout)
                parts.append((log_p.exp() * (log_p - log_q)).sum(-1))
            assert value == pytest.approx(float(torch.cat(parts).mean()), rel=1e-4, abs=1e-6)
    assert set(found["exact"]) == {"spell", "rhyme", "count"} and min(found["exact"].values()) > 0.1
    own = pool.reverse_kl(student, rollouts)
    assert own["exact"] == {"count": pytest.approx(found["exact"]["count"])}
    assert own["wordy"] == {"spell": 0.0, "rhyme": 0.0}


# ---------------------------------------------------------------- several ranks


def score_on_a_rank(root, layout):
    """This rank's scores by prompt id, and the divergences; the last data-parallel rank has no rollout of some
    teacher."""
    from pathlib import Path

    from megatron_mopd import parallel

    config = configuration(Path(root), parallel=layout)
    groups = parallel.initialize(config.parallel, seed=42)
    pool, rollouts = pool_of(config, groups), make_rollouts()
    if groups.dp_size > 1:
        lone = [r for r in rollouts if r.prompt.domain == "count"]
        rollouts = lone if groups.dp_rank else [r for r in rollouts if r not in lone]
    scores = {item.rollout.prompt.id: item.teacher_logprobs for item in pool.score(rollouts)}
    return scores, pool.reverse_kl(loaded(Path(root) / "a", groups, config), rollouts, all_pairs=True), pool.ids


@pytest.mark.parametrize("name", LAYOUTS)
def test_scores_do_not_depend_on_the_layout(root, ranks, name):
    ((expected, divergence, ids),) = ranks(1, score_on_a_rank, str(root), {})
    world, layout = LAYOUTS[name]
    answers = ranks(world, score_on_a_rank, str(root), layout)
    assert set().union(*(scores for scores, _, _ in answers)) == set(expected)
    for scores, kl, other_ids in answers:
        assert other_ids == ids
        for prompt, values in scores.items():
            torch.testing.assert_close(values, expected[prompt], rtol=0, atol=2e-5)
        for teacher, row in divergence.items():
            assert kl[teacher] == pytest.approx(row, rel=1e-4, abs=1e-5)


# ---------------------------------------------------------------- bad input


def test_an_unknown_domain_is_refused_at_start_and_when_scoring(root, groups):
    pool = pool_of(configuration(root), groups)
    pool.require(["spell", "count"])
    with pytest.raises(ConfigurationError, match=r"domain 'chess' has no teacher; known are \['count', 'rhyme'"):
        pool.require(["spell", "chess"])
    stray = dataclasses.replace(make_rollouts(1)[0].prompt, domain="chess")
    with pytest.raises(ConfigurationError, match="chess"):
        pool.score([dataclasses.replace(make_rollouts(1)[0], prompt=stray)])


def edited(root, tmp_path, **changes):
    """A copy of checkpoint b with entries of its manifest replaced, or removed where the new value is None."""
    shutil.copytree(root / "b", tmp_path / "edited")
    file = next((tmp_path / "edited").glob("iter_*")) / "mopd_manifest.json"
    manifest = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in manifest.items() if v is not None}))
    return tmp_path / "edited"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer_sha": "other"}, "tokenizer_sha is 'other', the student's 'tok'"),
        ({"template_sha": "other"}, "template_sha is 'other', the student's 'tem'"),
        ({"vocab_size": 99}, "vocab_size is 99, the student's 53"),
        ({"tokenizer_sha": None}, "lacks tokenizer_sha"),
        (
            {"model": {"preset": "tiny", "pattern": "ME*", "override": {}}},
            r'holds another model: pattern = "MEM\*E-" in the settings, "ME\*" there',
        ),
        ({"model": {"preset": "tiny", "pattern": None, "override": {"moe_router_topk": 1}}}, "moe_router_topk = 2 in"),
        ({"checkpoint_id": "0" * 64}, "says checkpoint_id 000000000000, the tensors beside it give"),
    ],
    ids=["tokenizer", "template", "vocabulary", "no_tokenizer", "pattern", "override", "exchanged"],
)
def test_a_teacher_that_reads_or_is_built_otherwise_is_refused(root, groups, tmp_path, changes, message):
    teachers = {"exact": {"checkpoint": edited(root, tmp_path, **changes), "domains": ["count"]}}
    teachers["exact"]["model"] = {"preset": "tiny"}
    with pytest.raises(ConfigurationError, match=rf"teachers\.exact\.(checkpoint = |model: ).*{message}"):
        pool_of(configuration(root, teachers), groups)


def test_a_teacher_without_a_model_has_its_checkpoints(root, groups, tmp_path):
    other = {"model": {"preset": "tiny", "pattern": None, "override": {"moe_router_topk": 1}}}
    teachers = {"exact": {"checkpoint": edited(root, tmp_path, **other), "domains": ["count"]}}
    teachers["wordy"] = {"checkpoint": root / "b", "domains": ["spell", "rhyme"]}
    pool = pool_of(configuration(root, teachers), groups)
    assert len(pool._residents) == 2  # one expert a token, and two
    scored = {item.teacher: item for item in pool.score(make_rollouts(2))}
    assert set(scored) == {"exact", "wordy"} and len(set(pool.ids.values())) == 1


def test_recompute_settings_make_no_other_architecture(root, groups, tmp_path):
    model = {"preset": "tiny", "pattern": None, "override": {"recompute_granularity": "selective"}}
    teachers = {"exact": {"checkpoint": edited(root, tmp_path, model=model), "domains": ["count"]}}
    assert pool_of(configuration(root, teachers), groups).names == ("exact",)


def test_a_missing_checkpoint_is_named(root, groups):
    teachers = {"exact": {"checkpoint": root / "nowhere", "domains": ["count"]}}
    with pytest.raises(ConfigurationError, match=r"teachers\.exact\.checkpoint = .*nowhere.*no such directory"):
        pool_of(configuration(root, teachers), groups)


def test_a_truncated_checkpoint_is_refused(root, groups, tmp_path):
    path = edited(root, tmp_path)
    largest = max(path.rglob("*.distcp"), key=lambda f: f.stat().st_size)
    with open(largest, "r+b") as stream:
        stream.truncate(largest.stat().st_size // 2)
    with pytest.raises(ConfigurationError, match=r"teachers\.exact\.checkpoint = "):
        pool_of(configuration(root, {"exact": {"checkpoint": path, "domains": ["count"]}}), groups)


def test_weights_of_another_shape_are_refused_without_a_word_in_the_manifest(root, groups, tmp_path):
    shutil.copytree(root / "c", tmp_path / "c")
    file = next((tmp_path / "c").glob("iter_*")) / "mopd_manifest.json"
    manifest = json.loads(file.read_text())
    del manifest["model"]
    file.write_text(json.dumps(manifest))
    with pytest.raises(ConfigurationError, match=r"teachers\.exact\.checkpoint = .*of another shape"):
        pool_of(configuration(root, {"exact": {"checkpoint": tmp_path / "c", "domains": ["count"]}}), groups)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 2e-4])
def test_values_that_are_no_log_probabilities_are_named(root, groups, monkeypatch, value):
    from megatron_mopd import scoring

    pool, (rollout, *_) = pool_of(configuration(root), groups), make_rollouts()
    logprobs = -torch.ones(len(rollout.completion))
    logprobs[1] = value
    monkeypatch.setattr(scoring.Scorer, "logprobs", lambda self, model, micro_batches, weight: logprobs)
    with pytest.raises(ValueError, match=r"teacher 'exact' gives \S+ \S+ to token 1 of prompt p0 "):
        pool.score([rollout])


def test_damaged_weights_are_found_by_their_scores(root, groups):
    pool, rollouts = pool_of(configuration(root), groups), make_rollouts()
    pool._weights[pool.ids["wordy"]]["output_layer.weight"][7, 0] = float("nan")
    pool._present.update(dict.fromkeys(pool._present, ""))
    with pytest.raises(ValueError, match="teacher 'wordy' gives log-probability nan"):
        pool.score(rollouts)


def test_an_unsigned_rollout_is_not_scored(root, groups):
    from megatron_mopd.provenance import ProvenanceError

    with pytest.raises(ProvenanceError, match="no record of who sampled it"):
        pool_of(configuration(root), groups).score([dataclasses.replace(make_rollouts(1)[0], provenance=None)])
