"""A rollout of another run, step, tokenizer, domain or teacher never reaches an update."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from megatron_mopd import provenance, teacher_answers
from megatron_mopd.provenance import ProvenanceError
from megatron_mopd.records import Policy, Prompt, Rollout, Sampling, ScoredRollout
from megatron_mopd.scoring import ScoringError
from megatron_mopd.teacher_answers import Answer

TOKENIZER = SimpleNamespace(tokenizer_sha="tok", template_sha="tem")
NOW = Policy(run_id="run", step=7, initial_id="id-0")
ROUTING = {"spell": "speller", "count": "counter"}


class Scorers:
    def __init__(self):
        self.ids, self.temperature = {"speller": "id-s", "counter": "id-c"}, 1.0
        self.nvfp4 = {"speller": (), "counter": ()}
        self.routing = ROUTING

    def route(self, domain):
        return self.routing[domain]


def scored(domain="spell", step=6, teacher="speller", teacher_id="id-s"):
    prompt = Prompt(id="abc", domain=domain, messages=(), tokens=(1, 2))
    rollout = Rollout(prompt=prompt, sample=3, completion=torch.tensor([4, 5]), finish="stop")
    sampling = Sampling(temperature=1.0, max_new_tokens=8, stop_tokens=(5,))
    policy = dataclasses.replace(NOW, step=step)
    signed = provenance.sign(rollout, policy, TOKENIZER, sampling, seed=42, draw=6)
    return ScoredRollout(
        rollout=provenance.scored_by(signed, teacher_id, routing=ROUTING),
        teacher=teacher,
        teacher_logprobs=-torch.ones(2),
    )


def with_record(item, **changes):
    record = dataclasses.replace(item.rollout.provenance, **changes)
    return dataclasses.replace(item, rollout=dataclasses.replace(item.rollout, provenance=record))


def test_a_rollout_of_this_run_passes():
    item = scored()
    record = item.rollout.provenance
    assert (record.domain, record.seed, record.draw, record.teacher_id) == ("spell", 42, 6, "id-s")
    provenance.check([item, scored("count", 7, "counter", "id-c")], NOW, 1, TOKENIZER, Scorers())


def test_dataset_rows_pass_without_a_record():
    row = dataclasses.replace(scored().rollout, provenance=None)
    provenance.check([row], NOW, 0, TOKENIZER, None)


WRONG = {
    "scores": (with_record(scored(), scored_sha="x"), "the sha256 of the scored tokens is 'x'"),
    "run": (with_record(scored(), policy=Policy(run_id="other", step=6)), "the sampling run is 'other', .* 'run'"),
    "start": (
        with_record(scored(), policy=Policy(run_id="run", step=6, initial_id="id-1")),
        "the checkpoint the sampling run started from is 'id-1', .* 'id-0'",
    ),
    "routing": (with_record(scored(), routing_sha="7ab1e"), "the sha256 of the routing table is '7ab1e', .* '"),
    "tokenizer": (with_record(scored(), tokenizer_sha="kot"), "the tokenizer is 'kot', .* 'tok'"),
    "template": (with_record(scored(), template_sha="met"), "the chat template is 'met', .* 'tem'"),
    "domain": (with_record(scored(), domain="count"), "the recorded domain is 'count', .* 'spell'"),
    "teacher": (scored(teacher="counter"), "the scoring teacher is 'counter', .* 'speller'"),
    "checkpoint": (scored(teacher_id="id-c"), "checkpoint of teacher 'speller' is 'id-c', .* 'id-s'"),
    "precision": (with_record(scored(), teacher_nvfp4=("experts",)), r"'speller' keeps in NVFP4 is \('experts',\), .*"),
    "unscored": (with_record(scored(), teacher_id=None), "checkpoint of teacher 'speller' is None"),
    "too_old": (scored(step=5), "policy of step 5, updated at step 7; rollout.lag = 1 .*put rollout.lag back if it"),
    "from_the_future": (scored(step=8), "policy of step 8.* else start the same command again: the run goes on"),
    "steps": (
        dataclasses.replace(scored(), rollout=dataclasses.replace(scored().rollout, policy_steps=torch.tensor([6, 8]))),
        r"steps \[6, 8\]; .* current step 7; start the same command again: the run goes on",
    ),
    "temperature": (
        with_record(scored(), sampling=Sampling(temperature=0.5, max_new_tokens=8, stop_tokens=())),
        "the sampling temperature is 0.5, .* 1.0",
    ),
    "length": (dataclasses.replace(scored(), teacher_logprobs=-torch.ones(3)), "log-probabilities is 3, .* 2"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_contradiction_names_the_rollout_and_both_sides(name):
    item, message = WRONG[name]
    with pytest.raises(ProvenanceError, match=rf"rollout 3 of prompt abc \(spell\): .*{message}"):
        provenance.check([scored(), item], NOW, 1, TOKENIZER, Scorers())


def test_scores_need_a_record_and_a_pool():
    bare = dataclasses.replace(scored().rollout, provenance=None)
    with pytest.raises(ProvenanceError, match=r"scored by 'speller' but carries no record.*through provenance.sign"):
        provenance.check([dataclasses.replace(scored(), rollout=bare)], NOW, 1, TOKENIZER, Scorers())
    with pytest.raises(ProvenanceError, match=r"carries no record.*through provenance.sign"):
        provenance.scored_by(bare, "id-s")
    trace = with_record(scored(), policy=Policy(run_id="speller", step=0, initial_id="id-s")).rollout
    for item in (scored(), trace):
        with pytest.raises(ProvenanceError, match=r"this run has no teachers; put back .* under teachers, or choose"):
            provenance.check([item], NOW, 1, TOKENIZER, None)


def test_a_teacher_that_answers_for_too_many_or_too_few_tokens_is_refused_with_a_way_out():
    plain = scored().rollout
    read = provenance.tokens_sha(plain.tokens, 2)
    right = Answer(logprobs=-torch.ones(2), hidden=None, shas=[read])
    assert teacher_answers.check("speller", [plain], right) == [read]
    for change, said in (({"shas": [read, read]}, "2 with 2"), ({"logprobs": -torch.ones(3)}, "1 with 3")):
        with pytest.raises(ScoringError, match=f"1 sequences with 2 tokens and answered for {said}; .*same command"):
            teacher_answers.check("speller", [plain], dataclasses.replace(right, **change))


def taught(checkpoint_id, *domains, **more):
    return {"checkpoint_id": checkpoint_id, "domains": list(domains), **more}


def test_a_manifest_must_hold_every_expected_entry():
    expected = {"run_id": "run", "vocab_size": 7}
    provenance.check_manifest({**expected, "checkpoint_id": "x"}, expected, "ckpt")
    with pytest.raises(ProvenanceError, match=r"ckpt: was written with vocab_size = 8, .* has 7.*run.dir"):
        provenance.check_manifest({"run_id": "run", "vocab_size": 8}, expected, "ckpt")
    with pytest.raises(ProvenanceError, match=r"says nothing of vocab_size; .*Choose another run.dir .* model.initial"):
        provenance.check_manifest({"run_id": "run"}, expected, "ckpt")
    with pytest.raises(
        ProvenanceError, match=r"ckpt: .* the chat template aaa \(template_sha\), .* has bbb.*tokenizer"
    ):
        provenance.check_manifest({"template_sha": "aaa"}, {"template_sha": "bbb"}, "ckpt")


BEFORE = {"speller": taught("a" * 64, "spell"), "counter": taught("b" * 64, "count")}
A, B, C = "a" * 12, "b" * 12, "c" * 12
DIFFERENCES = {
    "renamed": (
        {"wizard": BEFORE["speller"], "counter": BEFORE["counter"]},
        [f"teacher 'speller' (checkpoint {A}) is called 'wizard' now, with the same checkpoint"],
    ),
    "swapped": (
        {"speller": taught("b" * 64, "spell"), "counter": taught("a" * 64, "count")},
        [
            f"teacher 'speller' was checkpoint {A} and is {B} now, teacher 'counter' was {B} and is {A}: it looks as if"
            " the directories of 'speller' and 'counter' (teachers.speller.checkpoint, teachers.counter.checkpoint)"
            " were swapped"
        ],
    ),
    "replaced": (
        {**BEFORE, "counter": taught("c" * 64, "count")},
        [
            f"teacher 'counter' was checkpoint {B} and is {C} now: teachers.counter.checkpoint was replaced by another"
            " checkpoint of that name"
        ],
    ),
    "gone_and_new": (
        {"speller": BEFORE["speller"], "adder": taught("c" * 64, "count")},
        [f"teacher 'counter' (checkpoint {B}) is there no more", f"teacher 'adder' (checkpoint {C}) is new"],
    ),
    "domains": (
        {**BEFORE, "counter": taught("b" * 64, "count", "sum")},
        [f"teacher 'counter' ({B}) was recorded with domains = ['count'], this configuration has ['count', 'sum']"],
    ),
    "precision": (
        {**BEFORE, "counter": taught("b" * 64, "count", nvfp4=["experts"])},
        [f"teacher 'counter' ({B}) was recorded with nvfp4 = None, this configuration has ['experts']"],
    ),
    "all": (
        {},
        [
            f"teacher 'speller' (checkpoint {A}) is there no more",
            f"teacher 'counter' (checkpoint {B}) is there no more",
        ],
    ),
}


@pytest.mark.parametrize("name", DIFFERENCES)
def test_teachers_that_differ_are_named_one_by_one(name):
    now, sentences = DIFFERENCES[name]
    assert provenance.teacher_differences(BEFORE, now) == sentences
    with pytest.raises(ProvenanceError) as refused:
        provenance.check_manifest({"teachers": BEFORE}, {"teachers": now or None}, "ckpt")
    assert str(refused.value).startswith(f"ckpt: {'; '.join(sentences)}. Put the teachers back")
    assert not provenance.teacher_differences(BEFORE, BEFORE)


def test_a_score_of_a_swapped_checkpoint_names_whose_it_is():
    with pytest.raises(ProvenanceError, match=r"is 'id-c', .* 'id-s' \(id-c is what teacher 'counter' has now\)"):
        provenance.check([scored(teacher_id="id-c")], NOW, 1, TOKENIZER, Scorers())
