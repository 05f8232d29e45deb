"""Checkpoints: exact resumption, other layouts, crashes, full disks, damaged and hostile files."""

from __future__ import annotations

import contextlib
import errno
import io
import multiprocessing
import os
import pickle
import resource
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_mopd import checkpoint_directory
from megatron_mopd.config import ConfigurationError, Model, Parallel
from megatron_mopd.records import Policy, Prompt, Provenance, Rollout, Sampling, ScoredRollout

VOCAB = 101  # odd: padded under tensor parallelism
MANIFEST = {"run_id": "r", "vocab_size": VOCAB}
SMALL = Model(pattern="M*E-/*E/*E")


# --------------------------------------------------------------------------- helpers, also called on the ranks


def _student(
    parallel: Parallel, precision: str = "fp32", model: Model = SMALL, seed: int = 42, mtp: bool = True
) -> Any:
    from megatron_mopd import parallel as mopd_parallel
    from megatron_mopd import student

    groups = mopd_parallel.initialize(parallel, seed=seed)
    return groups, student.build_model(model, parallel, groups, VOCAB, precision, mtp)


def _learner(parallel: Parallel, precision: str = "fp32", distributed: bool = True, seed: int = 42) -> Any:
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    groups, plain = _student(parallel, precision, seed=seed)
    ddp = DistributedDataParallelConfig(use_distributed_optimizer=distributed, grad_reduce_in_fp32=True)
    model = DistributedDataParallel(plain.config, ddp, plain, pg_collection=groups.pg)
    bf16 = precision == "bf16"
    options = OptimizerConfig(
        lr=1e-2,
        min_lr=0.0,
        weight_decay=0.1,
        clip_grad=0.0,  # a norm would bring rounding that depends on the layout
        use_distributed_optimizer=distributed,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
    )
    return (
        groups,
        model,
        get_megatron_optimizer(options, [model], use_gloo_process_groups=False, pg_collection=groups.pg),
    )


def _update(model: Any, optimizer: Any, times: int) -> None:
    """Steps along a gradient that is a function of each parameter element alone, hence the same on every layout."""
    for _ in range(times):
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.main_grad.copy_(torch.sin(40 * parameter.detach().float()))
        optimizer.step()


def _parameters(model: Any) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def _save(root: Path, step: int, model: Any, optimizer: Any, groups: Any, **options: Any) -> Path:
    from megatron_mopd import checkpoint

    options = {"state": {"note": step}, "manifest": MANIFEST, "rollouts": ()} | options
    return checkpoint.save(root, step, model, optimizer, groups, **options)


def _scored(prompt: int, sample: int) -> ScoredRollout:
    generator = torch.Generator().manual_seed(100 * prompt + sample)
    n = 1 + (3 * prompt + sample) % 5
    sampling = Sampling(temperature=0.7, max_new_tokens=8, stop_tokens=(2, 3))
    provenance = Provenance(
        policy=Policy(run_id="r", step=4),
        teacher_id="t" * 64,
        tokenizer_sha="a" * 64,
        template_sha="b" * 64,
        sampling=sampling,
        domain="spell",
        seed=7,
        draw=3,
    )
    text = {"role": "user", "content": f"prompt {prompt} ü"}
    rollout = Rollout(
        prompt=Prompt(id=str(prompt), domain="spell", messages=(text,), tokens=(1, prompt), verifier={"answer": "x"}),
        sample=sample,
        completion=torch.randint(0, VOCAB, (n,), generator=generator),
        finish="stop",
        behav_logprobs=torch.rand(n, generator=generator),
        provenance=provenance,
        reward=1 / 3,
    )
    return ScoredRollout(rollout=rollout, teacher="speller", teacher_logprobs=torch.rand(n, generator=generator))


def _share(prompts: int, samples: int, rank: int, size: int) -> list[ScoredRollout]:
    return [_scored(p, s) for p in range(rank, prompts, size) for s in range(samples)]


def _same(a: Any, b: Any) -> bool:
    """Equality of records that hold tensors."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b) and a.dtype == b.dtype
    if hasattr(a, "__dataclass_fields__"):
        return type(a) is type(b) and all(_same(getattr(a, f), getattr(b, f)) for f in a.__dataclass_fields__)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(_same, a, b))
    return a == b


# --------------------------------------------------------------------------- resumption


def resume_twice(root: Path, parallel: Parallel, precision: str, distributed: bool) -> tuple[bool, bool, bool, float]:
    """Three steps, a checkpoint, three more; and the same from the checkpoint in a model that began elsewhere."""
    from megatron_mopd import checkpoint, sharded_state

    groups, model, optimizer = _learner(parallel, precision, distributed)
    _update(model, optimizer, 3)
    batches = [_share(5, 2, groups.dp_rank, groups.dp_size), _share(1, 2, groups.dp_rank, groups.dp_size)]
    _save(root, 3, model, optimizer, groups, state={"lr": 0.1}, rollouts=batches)
    _update(model, optimizer, 3)
    straight = _parameters(model)
    groups, model, optimizer = _learner(parallel, precision, distributed, seed=7)
    found = checkpoint.load(root, model, optimizer, groups)
    _update(model, optimizer, 3)
    same = all(map(torch.equal, straight, _parameters(model)))
    return same, _same(found.rollouts, batches), found.state == {"lr": 0.1}, sharded_state.optimizer_step(optimizer)


@pytest.mark.parametrize(
    ("world", "parallel", "precision", "distributed"),
    [
        pytest.param(1, Parallel(), "fp32", True, id="one-rank"),
        pytest.param(1, Parallel(), "bf16", True, id="bf16"),
        pytest.param(1, Parallel(), "fp32", False, id="plain-optimizer"),
        pytest.param(2, Parallel(tensor=2), "fp32", True, id="tp2"),
        pytest.param(2, Parallel(expert=2), "bf16", True, id="ep2-bf16"),
        pytest.param(4, Parallel(tensor=2, expert=2), "fp32", True, id="tp2-ep2-dp2"),
        pytest.param(2, Parallel(pipeline=2), "bf16", True, id="pp2-bf16"),
    ],
)
def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(
    ranks: Any, tmp_path: Path, world: int, parallel: Parallel, precision: str, distributed: bool
) -> None:
    assert ranks(world, resume_twice, tmp_path, parallel, precision, distributed) == [(True, True, True, 6.0)] * world


def write_base(root: Path) -> str:
    from megatron_mopd import checkpoint

    groups, model, optimizer = _learner(Parallel())
    _update(model, optimizer, 2)
    _save(root, 2, model, optimizer, groups, rollouts=[_share(5, 2, 0, 1)])
    base = checkpoint.read_manifest(root)["checkpoint_id"]
    _update(model, optimizer, 1)
    _save(root.with_name("base-next"), 3, model, optimizer, groups)
    return base


def carry_on(source: Path, root: Path, parallel: Parallel) -> tuple[str, str, bool]:
    """Load on this layout, save, step once, save: ids of both, and whether this rank got its share of the rollouts."""
    from megatron_mopd import checkpoint

    groups, model, optimizer = _learner(parallel, seed=7)
    found = checkpoint.load(source, model, optimizer, groups)
    _save(root, 2, model, optimizer, groups, rollouts=found.rollouts)
    loaded = checkpoint.read_manifest(root)["checkpoint_id"]
    mine = _same(found.rollouts, [_share(5, 2, groups.dp_rank, groups.dp_size)])
    _update(model, optimizer, 1)
    _save(root.with_name(f"{root.name}-next"), 3, model, optimizer, groups)
    return loaded, checkpoint.read_manifest(root.with_name(f"{root.name}-next"))["checkpoint_id"], mine


def test_weights_optimizer_and_rollouts_move_through_a_chain_of_layouts(ranks: Any, tmp_path: Path) -> None:
    base = ranks(1, write_base, tmp_path / "base")[0]
    after = checkpoint_directory.read_manifest(tmp_path / "base-next")["checkpoint_id"]
    assert base != after
    source = tmp_path / "base"
    for name, world, parallel in (
        ("tp2", 2, Parallel(tensor=2)),
        ("ep2", 2, Parallel(expert=2)),
        ("tp2-ep2", 4, Parallel(tensor=2, expert=2)),
        ("pp2", 2, Parallel(pipeline=2)),
        ("dp2", 2, Parallel()),
    ):
        assert ranks(world, carry_on, source, tmp_path / name, parallel) == [(base, after, True)] * world, name
        source = tmp_path / name


def test_prompt_order_survives_any_number_of_ranks() -> None:
    from megatron_mopd import in_flight

    batch = _share(7, 3, 0, 1)
    for size in (1, 2, 3, 5):
        shares = [in_flight.share(batch, rank, size) for rank in range(size)]
        assert _same(shares, [_share(7, 3, rank, size) for rank in range(size)])
        assert _same(in_flight.interleave(shares), batch)


def test_optimizer_that_never_stepped_can_be_saved_and_loaded(groups: Any, tmp_path: Path) -> None:
    from megatron_mopd import checkpoint, sharded_state

    groups, model, optimizer = _learner(Parallel())
    _save(tmp_path, 0, model, optimizer, groups)
    checkpoint.load(tmp_path, model, optimizer, groups)
    assert sharded_state.optimizer_step(optimizer) == 0
    _update(model, optimizer, 2)
    assert sharded_state.optimizer_step(optimizer) == 2


def test_plain_optimizer_of_a_bf16_model_is_refused_before_anything_is_written(groups: Any, tmp_path: Path) -> None:
    groups, model, optimizer = _learner(Parallel(), "bf16", distributed=False)
    with pytest.raises(ConfigurationError, match=r"optimizer\.distributed"):
        _save(tmp_path / "run", 1, model, optimizer, groups)
    assert not (tmp_path / "run").exists()


# --------------------------------------------------------------------------- what is on disk


def test_directory_is_megatrons_and_only_the_newest_stay(groups: Any, tmp_path: Path) -> None:
    groups, model = _student(Parallel())
    for step in (1, 2, 900, 3):  # 900: of a future that a user went back from
        path = _save(tmp_path, step, model, None, groups, keep=2)
    assert path == tmp_path / "iter_0000003"
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "iter_0000002",
        "iter_0000003",
        "iter_0000900",
        "latest_checkpointed_iteration.txt",
    ]
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "3"
    assert {"common.pt", ".metadata", "metadata.json", "mopd_manifest.json"} <= {p.name for p in path.iterdir()}
    common = torch.load(path / "common.pt", weights_only=True)
    assert common["iteration"] == 3
    assert checkpoint_directory.latest(tmp_path) == path and checkpoint_directory.latest(path) == path
    assert not multiprocessing.active_children()


def test_megatrons_own_reader_reads_ours_and_we_read_what_its_writer_writes(groups: Any, tmp_path: Path) -> None:
    from megatron.core import dist_checkpointing

    from megatron_mopd import checkpoint

    groups, model = _student(Parallel())
    ours, theirs = _save(tmp_path / "ours", 1, model, None, groups), tmp_path / "theirs" / "iter_0000001"
    _, other = _student(Parallel(), seed=7)
    state = dist_checkpointing.load({"model": other.sharded_state_dict()}, str(ours))
    other.load_state_dict(state["model"], strict=False)
    assert all(map(torch.equal, _parameters(model), _parameters(other)))
    theirs.mkdir(parents=True)
    dist_checkpointing.save({"model": model.sharded_state_dict()}, str(theirs))
    _, other = _student(Parallel(), seed=7)
    manifest = checkpoint.load_weights(theirs.parent, other, groups)
    assert all(map(torch.equal, _parameters(model), _parameters(other)))
    assert manifest == {"checkpoint_id": checkpoint.read_manifest(ours)["checkpoint_id"]}
    with pytest.raises(ConfigurationError, match=r"model\.initial"):
        checkpoint.load(theirs, other, None, groups)


def test_weights_load_without_mtp_and_in_another_precision(groups: Any, tmp_path: Path) -> None:
    from megatron_mopd import checkpoint

    groups, model = _student(Parallel())
    _save(tmp_path, 1, model, None, groups)
    _, teacher = _student(Parallel(), "bf16", seed=7, mtp=False)
    assert checkpoint.load_weights(tmp_path, teacher, groups)["run_id"] == "r"
    weights = model.state_dict()
    assert any(name.startswith("mtp.") for name in weights)
    for name, value in teacher.state_dict().items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, weights[name].to(value.dtype)), name


# --------------------------------------------------------------------------- refusals


def test_another_architecture_is_refused_with_the_differences_listed(groups: Any, tmp_path: Path) -> None:
    from megatron_mopd import checkpoint

    groups, model = _student(Parallel())
    _save(tmp_path, 1, model, None, groups)
    for other, expected in (
        (Model(pattern="M*E-M/*E/*E"), r"missing from the file: decoder\.layers\.4\.mixer\.A_log"),
        (Model(pattern="M*E/*E/*E"), r"unknown to the model: decoder\.layers\.3\.mlp\.linear_fc1\.layer_norm_weight"),
        (
            Model(pattern="M*E-/*E/*E", override={"moe_ffn_hidden_size": 96}),
            r"of another shape: .*linear_fc1\.weight \[8, 128, 64\] in the file, \[8, 96, 64\] in the model",
        ),
    ):
        _, built = _student(Parallel(), model=other)
        before = _parameters(built)
        with pytest.raises(
            ConfigurationError, match=f"iter_0000001: not a checkpoint of this architecture.*{expected}"
        ):
            checkpoint.load_weights(tmp_path, built, groups)
        assert all(map(torch.equal, before, _parameters(built)))


def _cut(path: Path, size: int) -> None:
    with open(path, "r+b") as file:
        file.truncate(size)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: shutil.rmtree(p), "holds no complete checkpoint"),
        (lambda p: shutil.rmtree(p.parent), "no such directory"),
        (lambda p: (p / "__0_0.distcp").unlink(), r"__0_0\.distcp: missing"),
        (lambda p: _cut(p / "__0_0.distcp", 5000), r"__0_0\.distcp: truncated, 5000 bytes of"),
        (lambda p: _cut(p / ".metadata", 1000), r"\.metadata: truncated or damaged"),
        (lambda p: (p / "mopd_manifest.json").write_text("{"), r"mopd_manifest\.json: cannot be read"),
        (lambda p: (p / "__0_0.distcp").write_bytes(bytes((p / "__0_0.distcp").stat().st_size)), "damaged at byte"),
    ],
    ids=["empty", "absent", "file-missing", "file-truncated", "metadata-truncated", "manifest", "file-overwritten"],
)
def test_damaged_checkpoint_is_reported_by_file(
    groups: Any, tmp_path: Path, damage: Callable[[Path], Any], message: str
) -> None:
    from megatron_mopd import checkpoint

    groups, model = _student(Parallel())
    damage(_save(tmp_path / "run", 1, model, None, groups))
    with pytest.raises(ConfigurationError, match=message):
        checkpoint.load_weights(tmp_path / "run", model, groups)


class _Attack:
    """Unpickling this runs a command."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


def test_hostile_pickles_are_refused_by_name_and_run_nothing(groups: Any, tmp_path: Path) -> None:
    from megatron_mopd import checkpoint, torch_dist

    groups, model = _student(Parallel())
    path, marker = _save(tmp_path / "run", 1, model, None, groups), tmp_path / "marker"
    attack = pickle.dumps(_Attack(marker))
    pickle.loads(attack)
    assert marker.exists(), "the attack must work on a careless reader"
    marker.unlink()

    (path / "common.pt").write_bytes(attack)
    checkpoint.load(tmp_path / "run", model, None, groups)  # never opened

    stream = io.BytesIO()
    torch.save(_Attack(marker), stream)
    chunk = torch_dist.open_index(path).tensors["output_layer.weight"].chunks[0]
    with open(path / chunk.file, "r+b") as file:
        file.seek(chunk.start)
        file.write(stream.getvalue().ljust(chunk.length, b"\0"))
    with pytest.raises(ConfigurationError, match=r"output_layer\.weight: refused, its pickle uses posix\.system"):
        checkpoint.load_weights(path, model, groups)

    (path / ".metadata").write_bytes(attack)
    with pytest.raises(ConfigurationError, match=r"\.metadata: refused, its pickle uses posix\.system"):
        checkpoint.load_weights(path, model, groups)
    assert not marker.exists()


def test_metadata_cannot_point_outside_its_directory(groups: Any, tmp_path: Path) -> None:
    from megatron_mopd import checkpoint

    groups, model = _student(Parallel())
    path = _save(tmp_path, 1, model, None, groups)
    content = (path / ".metadata").read_bytes()
    (path / ".metadata").write_bytes(content.replace(b"__0_0.distcp", b"../../secret"))
    with pytest.raises(ConfigurationError, match="outside its directory"):
        checkpoint.load_weights(path, model, groups)


# --------------------------------------------------------------------------- crashes and full disks


class _Crash(BaseException):
    """Power fails."""


def _fail_at(monkeypatch: pytest.MonkeyPatch, moment: int) -> list[str]:
    """Crash before the ``moment``-th change to the file system that publishing makes; the list says what was done."""
    done: list[str] = []

    def guard(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(*args: Any, **kwargs: Any) -> Any:
            if len(done) == moment:
                raise _Crash(name)
            done.append(name)
            return call(*args, **kwargs)

        return guarded

    for owner, name in (
        (checkpoint_directory.Path, "mkdir"),
        (checkpoint_directory.Path, "rename"),
        (checkpoint_directory.Path, "replace"),
        (checkpoint_directory.shutil, "rmtree"),
        (checkpoint_directory, "write"),
    ):
        monkeypatch.setattr(owner, name, guard(name, getattr(owner, name)))
    return done


@pytest.mark.parametrize("step", [2, 1], ids=["new-step", "same-step-again"])
def test_crash_between_any_two_steps_leaves_a_good_checkpoint(
    groups: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    from megatron_mopd import checkpoint

    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # the machine goes on: what is written is not lost
    groups, model = _student(Parallel())
    moment, seen = 0, set()
    while True:
        root = tmp_path / str(moment)
        _save(root, 1, model, None, groups, state={"note": "old"}, keep=1)
        with pytest.MonkeyPatch.context() as patch:
            done = _fail_at(patch, moment)
            with contextlib.suppress(_Crash):
                _save(root, step, model, None, groups, state={"note": "new"}, keep=1)
        finished = len(done) < moment
        found = checkpoint.load(root, model, None, groups)
        seen.add(found.state["note"])
        assert found.state["note"] == "new" or not finished
        _save(root, 3, model, None, groups, state={"note": "later"}, keep=1)
        assert checkpoint.load(root, model, None, groups).state == {"note": "later"}
        assert sorted(p.name for p in root.iterdir()) == ["iter_0000003", checkpoint_directory.POINTER]
        if finished:
            break
        moment += 1
    assert seen == {"old", "new"} and moment >= 10


def fill_disk(root: Path, victim: str, rank: int) -> str:
    """Save once, then again with every write to ``victim`` on ``rank`` going to a full device; what was raised."""
    import builtins

    from torch.distributed.checkpoint.filesystem import FileSystem

    from megatron_mopd import checkpoint

    groups, model, optimizer = _learner(Parallel(expert=2))
    _update(model, optimizer, 1)
    _save(root, 1, model, optimizer, groups)
    before = _parameters(model)
    _update(model, optimizer, 1)
    stream, opened = FileSystem.create_stream, builtins.open

    def full(path: Any, mode: str = "r") -> Any:
        hit = groups.rank == rank and "w" in mode and Path(path).name.endswith(victim)
        return "/dev/full" if hit else path

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FileSystem, "create_stream", lambda self, path, mode: stream(self, full(path, mode), mode))
        patch.setattr(builtins, "open", lambda file, *args, **kwargs: opened(full(file, *args[:1]), *args, **kwargs))
        patch.setattr(os, "fsync", lambda descriptor: None)  # the device knows no fsync; its writes fail when flushed
        with pytest.raises(checkpoint.CheckpointError) as raised:
            _save(root, 2, model, optimizer, groups)
    found = checkpoint.load(root, model, optimizer, groups)
    assert found.step == 1 and all(map(torch.equal, before, _parameters(model)))
    torch.distributed.barrier()
    assert not list(root.glob(".iter*"))
    return str(raised.value)


@pytest.mark.parametrize(
    ("victim", "rank"),
    [(".distcp", 1), (".metadata.tmp", 0), ("common.pt", 0), ("mopd_manifest.json", 0)],
)
def test_full_disk_is_an_error_on_every_rank_and_costs_nothing(
    ranks: Any, tmp_path: Path, victim: str, rank: int
) -> None:
    for message in ranks(2, fill_disk, tmp_path, victim, rank):
        assert "the checkpoint of step 2 could not be written" in message
        assert os.strerror(errno.ENOSPC) in message, message
        assert "iter_0000001 is untouched" in message and "make room" in message


def test_file_size_limit_met_halfway_is_an_error_too(groups: Any, tmp_path: Path) -> None:
    from megatron_mopd import checkpoint

    groups, model = _student(Parallel())
    _save(tmp_path, 1, model, None, groups)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, hard))  # python ignores the signal, so writes fail
    try:
        with pytest.raises(checkpoint.CheckpointError, match="iter_0000001 is untouched"):
            _save(tmp_path, 2, model, None, groups)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert checkpoint.load(tmp_path, model, None, groups).step == 1


def test_rollouts_of_a_dataset_are_kept_unscored(groups: Any, tmp_path: Path) -> None:
    from megatron_mopd import checkpoint

    rollout = _scored(1, 0).rollout
    row = Rollout(prompt=rollout.prompt, sample=0, completion=rollout.completion, finish="stop")
    batches: Sequence[Sequence[Any]] = [[row], [], [_scored(2, 0), row]]
    groups, model = _student(Parallel())
    _save(tmp_path, 1, model, None, groups, rollouts=batches)
    assert _same(checkpoint.load(tmp_path, model, None, groups).rollouts, list(batches))
