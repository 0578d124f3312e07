"""Runs a function on several ranks, each in a process of its own, and brings the results or the tracebacks back.

Importing Megatron takes seconds of CPU time. A process that has done it once, and nothing else, is forked for every rank.
"""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import pickle
import random
import socket
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

#: Imported before ranks are forked. None of them may start a thread: a lock that it held would stay locked in every rank.
PRELOADED = ["skyrl_mega.orchestration.layout_check", "skyrl_mega.models.hf_io", "transformers.models.llama.modeling_llama"]


def free_port() -> int:
    """A TCP port of this host that was free a moment ago.

    Below the range from which the system gives outgoing connections theirs: nobody takes it by chance before it is used.
    """
    for port in random.SystemRandom().sample(range(20_000, 32_000), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise OSError("None of 100 ports between 20000 and 32000 is free.")


def run_ranks(fn: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 120) -> list[Any]:
    """What `fn(rank, *args)` returned, in the order of the ranks.

    Every rank is a process of its own with this one's environment and what torchrun sets (RANK, LOCAL_RANK, WORLD_SIZE,
    MASTER_ADDR, MASTER_PORT), and one torch thread. `fn` must be a module-level function; arguments and results must pickle
    (return numpy arrays or CPU tensors). Raises AssertionError with the traceback of each rank that failed, and with the stacks
    of the ranks still running at the deadline. As soon as one rank has failed the others get 10 seconds to fail by themselves.
    """
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        processes = start_ranks(fn, world_size, folder, timeout_s, *args)
        late = _wait(processes, timeout_s)
        _say_again(Path(folder), world_size)
        reports = [_report(Path(folder), rank, process.exitcode, rank in late) for rank, process in enumerate(processes)]
    problems = [text for status, text in reports if status == "failed"]
    assert not problems, f"{len(problems)} of {world_size} ranks failed\n" + "\n".join(problems)
    return [value for _, value in reports]


def run_cases(
    fn: Callable[..., Any], world_size: int, cases: Mapping[Any, tuple[Any, ...]], timeout_s: float = 120
) -> list[dict[Any, Any]]:
    """What `fn(*case)` returned for each case, by the case's name, in the order of the ranks.

    The cases run one after another in the same ranks, since starting ranks takes longer than most cases. Every case may join
    and leave a world: it has a port of its own, so that a rank that is quicker does not meet the store of the case before.
    Otherwise as `run_ranks`; the traceback of a failure names its case.
    """
    return run_ranks(_run_in_turn, world_size, fn, cases, [free_port() for _ in cases], timeout_s=timeout_s)


def _run_in_turn(rank: int, fn: Callable[..., Any], cases: Mapping[Any, tuple[Any, ...]], ports: list[int]) -> dict[Any, Any]:
    results = {}
    for (name, case), port in zip(cases.items(), ports, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        try:
            results[name] = fn(*case)
        except Exception as error:
            raise RuntimeError(f"rank {rank} failed in the case {name}") from error
    return results


def start_ranks(fn: Callable[..., Any], world_size: int, folder: str, timeout_s: float, *args: Any) -> list[Any]:
    """The processes of the ranks of `run_ranks`, started; what they say, and their results, go to files in `folder`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    environment = {
        **os.environ,
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
    }
    processes = [
        context.Process(target=_run_one, args=(fn, rank, environment, folder, timeout_s, args), daemon=False)
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    return processes


def _wait(processes: list[Any], timeout_s: float) -> set[int]:
    """Waits for the ranks; ends those that are left at the deadline and returns their numbers."""
    deadline = time.monotonic() + timeout_s
    while any(process.is_alive() for process in processes) and time.monotonic() < deadline:
        if any(process.exitcode not in (None, 0) for process in processes):
            deadline = min(deadline, time.monotonic() + 10)
        time.sleep(0.05)
    late = {rank for rank, process in enumerate(processes) if process.is_alive()}
    for rank in late:
        processes[rank].kill()
    for process in processes:
        process.join()
    return late


def _say_again(folder: Path, world_size: int) -> None:
    """Writes what the ranks wrote to where this process writes now: they have what the process they were forked from has."""
    for descriptor in (1, 2):
        for rank in range(world_size):
            said = folder / f"{rank}.{descriptor}"
            if said.exists():
                os.write(descriptor, said.read_bytes())


def _report(folder: Path, rank: int, exitcode: int | None, late: bool) -> tuple[str, Any]:
    """("ok", value) or ("failed", text) from the files that the rank left."""
    result = folder / f"{rank}.pkl"
    if result.exists() and not late:
        status, value = pickle.loads(result.read_bytes())
        return (status, value) if status == "ok" else (status, f"--- rank {rank} ---\n{value}")
    stacks = (folder / f"{rank}.stacks").read_text() if (folder / f"{rank}.stacks").exists() else ""
    why = "was still running at the deadline" if late else f"died with exit code {exitcode}"
    return "failed", f"--- rank {rank} {why} ---\n{stacks}"


def _run_one(fn: Callable[..., Any], rank: int, environment: dict[str, str], folder: str, timeout_s: float, args: tuple) -> None:
    # The process that this one was forked from has the environment of the first call.
    os.environ.clear()
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
    for descriptor in (1, 2):
        os.dup2(os.open(f"{folder}/{rank}.{descriptor}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    import torch

    torch.set_num_threads(1)
    with open(f"{folder}/{rank}.stacks", "w") as stacks:
        faulthandler.dump_traceback_later(max(timeout_s - 2, 1), file=stacks)
        try:
            outcome = pickle.dumps(("ok", fn(rank, *args)))
            code = 0
        except BaseException:  # noqa: BLE001 - whatever ended the rank is what the test wants to see
            outcome = pickle.dumps(("failed", traceback.format_exc()))
            code = 1
        faulthandler.cancel_dump_traceback_later()
    temporary = Path(folder) / f"{rank}.tmp"
    temporary.write_bytes(outcome)
    temporary.rename(Path(folder) / f"{rank}.pkl")
    # A rank whose peer died may hang in the destructors of its process groups: leave at once, the result is written. What it
    # started itself (a checkpoint writer's manager, say) must not stay behind.
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(code)
