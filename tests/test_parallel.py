"""Process groups: sizes and ranks of a layout, and layouts that cannot work."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_mopd.config import ConfigurationError, Parallel


def coordinates(parallel: Parallel) -> tuple[int, ...]:
    from megatron_mopd import parallel as mopd_parallel

    g = mopd_parallel.initialize(parallel, seed=7)
    assert (g.tp.size(), g.dp.size(), g.ep.size(), g.pp.size()) == (g.tp_size, g.dp_size, g.ep_size, g.pp_size)
    return g.rank, g.world_size, g.tp_rank, g.tp_size, g.dp_rank, g.dp_size, g.ep_rank, g.ep_size, g.expt_dp.size()


def test_a_world_of_one(groups: Any) -> None:
    assert (groups.world_size, groups.tp_size, groups.dp_size, groups.ep_size, groups.seed) == (1, 1, 1, 1, 42)
    assert groups.device.type in ("cpu", "cuda")


def test_tensor_and_expert_parallel_share_four_ranks(ranks: Any) -> None:
    layout = Parallel(tensor=2, expert=2)
    assert ranks(4, coordinates, layout) == [
        (0, 4, 0, 2, 0, 2, 0, 2, 2),
        (1, 4, 1, 2, 0, 2, 1, 2, 2),
        (2, 4, 0, 2, 1, 2, 0, 2, 2),
        (3, 4, 1, 2, 1, 2, 1, 2, 2),
    ]


def stages(parallel: Parallel) -> tuple[int, int, bool, bool]:
    from megatron_mopd import parallel as mopd_parallel

    g = mopd_parallel.initialize(parallel, seed=7)
    return g.pp_rank, g.dp_rank, g.first_stage, g.last_stage


def test_pipeline_stages_hold_the_same_data(ranks: Any) -> None:
    assert ranks(4, stages, Parallel(pipeline=2)) == [
        (0, 0, True, False),
        (0, 1, True, False),
        (1, 0, False, True),
        (1, 1, False, True),
    ]


def test_expert_tensor_parallelism_widens_the_expert_block(ranks: Any) -> None:
    layout = Parallel(tensor=2, expert=2, expert_tensor=2, dispatcher="allgather")
    assert [c[-1] for c in ranks(4, coordinates, layout)] == [1, 1, 1, 1]


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        (Parallel(tensor=2), r"parallel.tensor = 2 does not divide the 1 running processes; start a multiple of 2"),
        (Parallel(expert=4), r"parallel.expert x parallel.expert_tensor = 4 does not divide the 1 "),
        (Parallel(pipeline=2), r"parallel.tensor x parallel.pipeline = 2 does not divide the 1 running processes"),
        (Parallel(expert_tensor=2), r"parallel.expert_tensor = 2 with parallel.dispatcher = 'alltoall' .*allgather"),
        (Parallel(backend="nccl"), r"parallel.backend = 'nccl' needs CUDA"),
    ],
)
def test_layouts_that_cannot_work_are_refused(
    monkeypatch: pytest.MonkeyPatch, parallel: Parallel, message: str
) -> None:
    import torch

    from megatron_mopd import parallel as mopd_parallel

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    try:
        with pytest.raises(ConfigurationError, match=message):
            mopd_parallel.initialize(parallel, seed=0)
    finally:
        mopd_parallel.destroy()


def failing(_parallel: Parallel) -> None:
    raise RuntimeError("on purpose")


def test_a_failing_rank_is_reported_and_the_pool_recovers(ranks: Any) -> None:
    with pytest.raises(pytest.fail.Exception, match=r"rank . of 2 failed(.|\n)*on purpose"):
        ranks(2, failing, Parallel())
    assert len(ranks(2, coordinates, Parallel())) == 2
