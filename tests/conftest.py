"""Fixtures for every test: a world of one in this process, and a pool of four ranks for multi-rank functions.

Importing Megatron-Core costs seconds, so it is done once a session: this file, run as a script, imports it and forks
the ranks before any thread exists. A rank connects back, loads test files by path and calls functions by name; between
calls only process groups are rebuilt.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import importlib
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.connection import Client, Connection, Listener, wait
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # what several test files share lies beside them
import scripts

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported, by the ranks too: kernels run on CPU

POOL_SIZE = 4
START_TIMEOUT = 300.0  # seconds until every rank has imported Megatron-Core
CALL_TIMEOUT = 120.0  # seconds until every rank has answered one call
GRACE = 2.0  # seconds the others get to fail too once one rank has failed

Ranks = Callable[..., list[Any]]


class RankPool:
    """Four gloo ranks; killed and started afresh after a failure that leaves one of them hanging."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None  # leads the process group of the ranks
        self._connections: list[Connection] = []
        self._folder = Path()  # of the socket and of the calls' stores
        self._calls = 0

    def __call__(self, world: int, function: FunctionType, *args: Any) -> list[Any]:
        """Call ``function(*args)`` on ranks 0..world-1 and return their results in rank order.

        ``function`` is a module-level function of a test file or of an installed module. Arguments and results are
        pickled.
        """
        if not 1 <= world <= POOL_SIZE:
            raise ValueError(f"world = {world}: the pool has {POOL_SIZE} ranks")
        if self._process is None:
            self._start()
        self._calls += 1
        # A rank leaves its group after it has answered and looks for the store then, for long where it is gone; so
        # stores stay as long as the ranks.
        call = (str(self._folder / f"store{self._calls}"), world, _reference(function), args)
        for connection in self._connections[:world]:
            connection.send_bytes(pickle.dumps(call))
        return self._collect(world, function.__name__)

    def _collect(self, world: int, name: str) -> list[Any]:
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}
        silent = dict(enumerate(self._connections[:world]))
        deadline = time.monotonic() + CALL_TIMEOUT
        while silent and (ready := wait(list(silent.values()), timeout=max(0.0, deadline - time.monotonic()))):
            for rank in [r for r, connection in silent.items() if connection in ready]:
                ok, value = _answer(silent.pop(rank))
                (results if ok else failures)[rank] = value
            if failures:
                deadline = min(deadline, time.monotonic() + GRACE)
        if silent or _DIED in failures.values():  # a rank that waits for another can not be used again
            self.kill()
        if failures:
            text = "\n".join(f"rank {rank} of {world} failed\n{reason}" for rank, reason in failures.items())
            pytest.fail(f"{name}: {text}")
        if silent:
            pytest.fail(f"{name}: ranks {sorted(silent)} of {world} gave no answer in {CALL_TIMEOUT:.0f} s")
        return [results[rank] for rank in range(world)]

    def _start(self) -> None:
        key = os.urandom(16)
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
            "PYTHONWARNINGS": "ignore",
            "MOPD_POOL_KEY": key.hex(),
        }
        self._folder = Path(tempfile.mkdtemp(prefix="mopd-pool-"))
        with Listener(str(self._folder / "socket"), authkey=key) as listener:
            listener._listener._socket.settimeout(START_TIMEOUT)  # type: ignore[attr-defined]
            command = [sys.executable, __file__, str(listener.address)]
            self._process = subprocess.Popen(command, env=environment, start_new_session=True)
            arrived: dict[int, Connection] = {}
            while len(arrived) < POOL_SIZE:
                connection = listener.accept()
                arrived[pickle.loads(connection.recv_bytes())] = connection
        self._connections = [arrived[rank] for rank in range(POOL_SIZE)]

    def kill(self) -> None:
        """End the ranks; the next call starts new ones."""
        for connection in self._connections:
            connection.close()
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            shutil.rmtree(self._folder)
        self._process, self._connections = None, []


_DIED = "the process died"


def _answer(connection: Connection) -> tuple[bool, Any]:
    try:
        return pickle.loads(connection.recv_bytes())
    except EOFError:
        return False, _DIED


def _reference(function: FunctionType) -> tuple[str, str]:
    """Where a rank finds the function: an installed module's name, or the path of a test file."""
    module = function.__module__
    if module.partition(".")[0] in ("megatron_mopd", "mopd_kernels"):
        return module, function.__qualname__
    return function.__code__.co_filename, function.__qualname__


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """``ranks(world, function, *args) -> [result of rank 0, ...]``, run in a gloo process group of that size."""
    pool = RankPool()
    yield pool
    pool.kill()


@pytest.fixture
def groups() -> Iterator[Any]:
    """Process groups of a world of one in this process, seeded with 42."""
    from megatron_mopd import parallel
    from megatron_mopd.config import Parallel

    yield parallel.initialize(Parallel(), seed=42)
    parallel.destroy()


@pytest.fixture
def fake_world() -> Iterator[Callable[[int, int], None]]:
    """``fake_world(size, rank)``: a process group of that size without other processes; its collectives do nothing."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from megatron_mopd import parallel

    def start(size: int, rank: int) -> None:
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)

    yield start
    parallel.destroy()


def pytest_collection_finish(session: pytest.Session) -> None:
    _spare_the_collector()


def _spare_the_collector() -> None:
    """Take what the imports made out of the garbage collector's sight.

    Torch and Megatron-Core leave half a million objects that stay. Megatron-Core collects garbage before it writes an
    optimizer, and walking over them took longer than writing a small one.
    """
    gc.collect()
    gc.freeze()


def _load(where: str, known: dict[str, ModuleType]) -> ModuleType:
    if not where.endswith(".py"):
        return importlib.import_module(where)
    if where not in known:
        known[where] = scripts.loaded(where)
    return known[where]


def _start_ranks(address: str) -> None:
    import reasoning_gym  # noqa: F401
    import torch
    import transformers.tokenization_utils_fast  # noqa: F401

    import megatron_mopd.runner  # noqa: F401 - as the two above: imports that cost, done once for all ranks

    torch.set_num_threads(1)
    _spare_the_collector()
    for rank in range(POOL_SIZE):
        if os.fork() == 0:
            _serve(address, rank)
            os._exit(0)
    for _ in range(POOL_SIZE):
        os.wait()


def _serve(address: str, rank: int) -> None:
    """One rank: answer calls until the connection closes."""
    import torch.distributed as dist

    from megatron_mopd import parallel

    connection = Client(address, authkey=bytes.fromhex(os.environ["MOPD_POOL_KEY"]))
    connection.send_bytes(pickle.dumps(rank))
    known: dict[str, ModuleType] = {}
    while True:
        try:
            store, world, (where, name), args = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        faulthandler.dump_traceback_later(0.9 * CALL_TIMEOUT)  # where a hanging rank hangs
        try:
            dist.init_process_group(
                "gloo",
                store=dist.FileStore(store, world),
                rank=rank,
                world_size=world,
                timeout=timedelta(seconds=CALL_TIMEOUT),
            )
            dist.barrier()  # nobody takes the group down while another still connects
            value = getattr(_load(where, known), name)(*args)
            dist.barrier()
            answer = (True, value)
        except BaseException:  # whatever it is, the test must see it
            answer = (False, traceback.format_exc())
        faulthandler.cancel_dump_traceback_later()
        connection.send_bytes(pickle.dumps(answer))
        parallel.destroy()


if __name__ == "__main__":
    _start_ranks(sys.argv[1])
