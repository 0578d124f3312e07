"""The Ray cluster that rollout engines live in: one that is there already, or a small one of the run's own.

`rollout.ray_address`: "auto" joins the cluster that RAY_ADDRESS names or that `ray start` runs on this machine, and starts one if
there is none; "local" always starts one; anything else is the address of a cluster to join. A cluster that is started here is
private to the run (`current_cluster` finds no other run's), without dashboard, with a small object store (requests and tokens go
through it, weights never do), and it ends with the run: Ray binds its processes to the thread that started them, so `connect` is
called by the main thread.

Ray sets OMP_NUM_THREADS of its workers by the CPUs they claim; `actor_environment` gives an engine its own value.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import shutil
import signal
import socket
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tenacity

import skyrl_mega
from skyrl_mega.errors import BackendUnavailableError, DeadlineError
from skyrl_mega.rollout.signals import held_back, unheard

if TYPE_CHECKING:
    import psutil

OBJECT_STORE_BYTES = 128 * 2**20
SESSION_ROOT = Path("/tmp")
SESSION_PREFIX = "skyrl-ray-"
OWNER_FILE = "owner.lock"
#: How long a head may take to accept a connection.
HEAD_TIMEOUT_S = 5.0
#: How long the processes of a cluster get to end with it, before they are killed.
END_TIMEOUT_S = 5.0


@dataclass
class RayCluster:
    """A connection of this process to Ray. `session_dir` is set if the cluster was started here."""

    address: str
    session_dir: Path | None = None
    owner_lock: int = -1

    @property
    def started_here(self) -> bool:
        return self.session_dir is not None

    def head_answers(self) -> bool:
        """Whether the cluster's head (its GCS) still takes connections. For another's cluster True: Ray decides there."""
        if not self.started_here:
            return True
        host, _, port = self.address.rpartition(":")
        try:
            socket.create_connection((host, int(port)), timeout=HEAD_TIMEOUT_S).close()
        except OSError:
            return False
        return True

    def require_head(self) -> None:
        """Raises BackendUnavailableError if the head of a cluster that was started here is gone: nothing restarts it.

        Ray itself ends this process without a word to Python, after it has tried to reach its head for a minute.
        """
        if not self.head_answers():
            raise BackendUnavailableError(
                f"the head of the run's Ray cluster (gcs_server, {self.address}) died. The same command resumes the run."
            )

    def close(self) -> None:
        """Leaves the cluster; ends it if it was started here. Safe to call twice."""
        import psutil
        import ray

        # Without its head Ray ends only some of its processes at once: the agents beside a raylet look for the head a minute.
        processes = _processes_of(self.session_dir) if self.session_dir is not None else []
        if ray.is_initialized():
            ray.shutdown()
        for process in psutil.wait_procs(processes, timeout=END_TIMEOUT_S)[1]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        if self.session_dir is not None:
            shutil.rmtree(self.session_dir, ignore_errors=True)
        if self.owner_lock >= 0:
            os.close(self.owner_lock)
            self.owner_lock = -1


def _processes_of(session_dir: Path) -> list[psutil.Process]:
    """The processes below this one that belong to the cluster of `session_dir`: those that name it, and what they started."""
    import psutil

    found: dict[int, psutil.Process] = {}
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if any(str(session_dir) in word for word in child.cmdline()):
                found |= {process.pid: process for process in [child, *child.children(recursive=True)]}
    return list(found.values())


def connect(address: str, *, timeout_s: float) -> RayCluster:
    """Joins or starts Ray for this process. Called by the main thread.

    Raises BackendUnavailableError if a cluster that was named can't be joined, DeadlineError if Ray is not up after `timeout_s`.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray lowers the priority of its workers by 15: engines would starve beside a trainer that is busy on the same cores.
    os.environ.setdefault("RAY_worker_niceness", "0")
    import ray

    if ray.is_initialized():
        return RayCluster(ray.get_runtime_context().gcs_address)
    named = address if address not in ("auto", "local") else os.environ.get("RAY_ADDRESS", "") if address == "auto" else ""
    if named:
        return _join(named, timeout_s)
    if address == "auto" and (running := current_cluster()):
        return _join(running, timeout_s)
    return _start(timeout_s)


def _ray_init(**options: Any) -> Any:
    """`ray.init`. Ctrl-C and SIGTERM wait for its end: it would swallow them, or leave half a cluster behind."""
    import ray

    with held_back(), kept_handler(signal.SIGTERM):
        return ray.init(log_to_driver=False, logging_level=logging.ERROR, **options)


@contextlib.contextmanager
def kept_handler(number: signal.Signals) -> Iterator[None]:
    """Nobody takes `number` over in the block: how this process ends on a signal is not Ray's affair. In the main thread.

    Ray's Python side registers handlers that exit, while it starts: they are not let in. Its C++ side writes a stack trace and
    then does what the handler before it did; it comes last, and has the signal for the last half second of `ray.init`.
    """
    handler, register = signal.getsignal(number), signal.signal

    def register_others(signum: int, action: Any) -> Any:
        return handler if signum == number else register(signum, action)

    signal.signal = register_others  # as Ray itself does with SIGINT
    try:
        yield
    finally:
        signal.signal = register
        if handler is not None:  # None: a handler that is not Python's
            signal.signal(number, handler)


def current_cluster() -> str:
    """The address of the cluster that `ray start` runs on this machine, "" if there is none that answers.

    Not what Ray's own "auto" finds: that joins any gcs_server in the list of processes, also the private one of another run,
    and this run would end with it.
    """
    directory = Path(os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp") / "ray"
    try:
        address = (directory / "ray_current_cluster").read_text().strip()
        host, _, port = address.rpartition(":")
        socket.create_connection((host, int(port)), timeout=HEAD_TIMEOUT_S).close()
    except (OSError, ValueError):
        return ""
    return address


def _join(address: str, timeout_s: float) -> RayCluster:
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not address.startswith("ray://"):
        try:
            socket.create_connection((host, int(port)), timeout=timeout_s).close()
        except (OSError, ValueError) as error:
            raise BackendUnavailableError(
                f"no Ray cluster answers at {address} (rollout.ray_address or RAY_ADDRESS): {error}. "
                "Start it, or set rollout.ray_address=local."
            ) from error
    try:
        return _init(address)
    except (ConnectionError, RuntimeError) as error:
        raise BackendUnavailableError(
            f"the Ray cluster at {address} can't be joined: {error}. A cluster with token authentication needs its token "
            "(RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH) and RAY_AUTH_MODE=token here as well."
        ) from error


def _init(address: str) -> RayCluster:
    import ray

    try:
        context = _ray_init(address=address)
    except KeyboardInterrupt:
        ray.shutdown()
        raise
    return RayCluster(context.address_info["gcs_address"])


def _start(timeout_s: float) -> RayCluster:
    import ray

    remove_stale_sessions()
    # Short: Ray's sockets lie in it, and their paths are limited to about a hundred characters.
    session_dir = Path(tempfile.mkdtemp(prefix=SESSION_PREFIX, dir=SESSION_ROOT))
    owner_lock = os.open(session_dir / OWNER_FILE, os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(owner_lock, fcntl.LOCK_EX)
    # Ray gives its processes half a minute to come up, which a busy machine may exceed.
    attempts = tenacity.Retrying(
        retry=tenacity.retry_if_exception_type((ConnectionError, RuntimeError, TimeoutError, OSError)),
        stop=tenacity.stop_after_delay(timeout_s),
        before_sleep=lambda _: ray.shutdown(),
        reraise=True,
    )
    try:
        with unheard():  # a SIGTERM to all processes of the run must not end the cluster under the trainer
            context = attempts(
                _ray_init,
                address="local",
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                _temp_dir=str(session_dir),
            )
    except BaseException as error:  # Ctrl-C, too, must leave nothing behind
        RayCluster("", session_dir, owner_lock).close()
        if isinstance(error, (ConnectionError, RuntimeError, TimeoutError, OSError)):
            raise DeadlineError(f"Ray must start on this machine within {timeout_s:g} s and did not: {error}") from error
        raise
    return RayCluster(context.address_info["gcs_address"], session_dir, owner_lock)


def remove_stale_sessions(root: Path = SESSION_ROOT) -> list[Path]:
    """Removes the session directories of runs that were killed: those whose lock nobody holds. Returns them."""
    removed = []
    for session_dir in sorted(root.glob(f"{SESSION_PREFIX}*")):
        try:
            descriptor = os.open(session_dir / OWNER_FILE, os.O_RDWR)
        except OSError:
            continue  # just being made, or another user's
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(session_dir, ignore_errors=True)
            removed.append(session_dir)
        except BlockingIOError:
            pass  # its run is alive
        finally:
            os.close(descriptor)
    return removed


def cause_of_death(error: BaseException) -> str:
    """The sentences of Ray's page-long account that say why, on one line."""
    text = " ".join(str(error).split())
    because = re.search(r"The actor is dead because .*?\.(?= |$)", text)
    first = re.match(r".*?\.(?= |$)", text)
    return " ".join(dict.fromkeys(found.group() for found in (first, because) if found)) or text


def actor_environment(engine_environment: dict[str, str]) -> dict[str, str]:
    """Variables of an engine's actor: the engine's own, and a PYTHONPATH under which it finds this very code."""
    root = str(Path(skyrl_mega.__file__).resolve().parents[1])
    inherited = os.environ.get("PYTHONPATH", "")
    return {
        **engine_environment,
        "PYTHONPATH": os.pathsep.join([root, *(part for part in inherited.split(os.pathsep) if part and part != root)]),
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
    }
