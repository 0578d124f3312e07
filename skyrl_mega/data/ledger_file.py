"""The ledger's file: an SQLite database in WAL mode, which one process writes and any process of the same machine may read.

What SQLite gives, and what is asked of it here:

- A transaction is in the file wholly or not at all, whatever kills the process. With `synchronous=NORMAL` it is there once the
  call has returned, for every death but that of the machine; `synced=True` waits for the disk too, for it and all before it.
- WAL mode lets an audit read a consistent state while the run writes. Its readers and its writer share memory, so they must run
  on one machine; the lock file names it.
- A second writer would not damage the file, but the two would interleave their histories. So the writer holds a POSIX lock on
  `ledger.sqlite.lock` for as long as it lives: the kernel drops it with the process, and no child inherits it.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import socket
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from skyrl_mega.errors import LedgerError

FILE_NAME = "ledger.sqlite"
SCHEMA_VERSION = 2
_APPLICATION_ID = 0x534D4C47  # "SMLG"
#: How long a call waits for a reader's or a checkpointer's short lock before it fails.
_BUSY_TIMEOUT_S = 30.0
#: How long a writer tries to become the writer: an audit holds the lock for an instant, a killed predecessor until it is gone.
_LOCK_PATIENCE_S = 2.0

#: Groups that later steps trained again (`ledger_replay`).
_REPLAYS = """CREATE TABLE replays (
    step INTEGER NOT NULL, seq INTEGER NOT NULL REFERENCES groups (seq), age INTEGER NOT NULL, max_age INTEGER NOT NULL,
    PRIMARY KEY (step, seq)
) WITHOUT ROWID"""
#: `groups.step` and `position`: where a taken or trained group stands; kept by a rollback, for the step that must take it again.
#: `content` holds finished trajectories apart from the rows, so that counting never reads them.
_SCHEMA = f"""
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE groups (
    seq INTEGER PRIMARY KEY, group_id TEXT NOT NULL UNIQUE, prompt_id TEXT NOT NULL, payload TEXT, num_samples INTEGER NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('issued', 'finished', 'taken', 'trained', 'dropped')),
    reason TEXT NOT NULL DEFAULT '', issued_version INTEGER NOT NULL, min_version INTEGER, max_version INTEGER,
    tokens INTEGER, response_tokens INTEGER, longest_response INTEGER,
    early_stops INTEGER NOT NULL DEFAULT 0, discarded_tokens INTEGER NOT NULL DEFAULT 0,
    step INTEGER, position INTEGER, staleness INTEGER, issued_at REAL NOT NULL, finished_at REAL, trained_at REAL
);
CREATE INDEX groups_by_state ON groups (state);
CREATE UNIQUE INDEX groups_by_step ON groups (step, position) WHERE step IS NOT NULL;
CREATE TABLE content (seq INTEGER PRIMARY KEY REFERENCES groups (seq), trajectories BLOB NOT NULL);
CREATE TABLE steps (
    step INTEGER PRIMARY KEY, state TEXT NOT NULL CHECK (state IN ('taken', 'trained', 'rolled_back')),
    num_groups INTEGER NOT NULL, policy_version INTEGER NOT NULL, max_staleness INTEGER NOT NULL,
    attempts INTEGER NOT NULL DEFAULT 1, taken_at REAL NOT NULL, trained_at REAL
);
CREATE TABLE weight_versions (
    id INTEGER PRIMARY KEY, version INTEGER NOT NULL, step INTEGER NOT NULL, session INTEGER NOT NULL, checksum TEXT NOT NULL,
    num_tensors INTEGER NOT NULL, size_bytes INTEGER NOT NULL, seconds TEXT NOT NULL, at REAL NOT NULL,
    rolled_back INTEGER NOT NULL DEFAULT 0
);
CREATE TABLE events (id INTEGER PRIMARY KEY, seq INTEGER NOT NULL, kind TEXT NOT NULL, step INTEGER, note TEXT, at REAL NOT NULL);
{_REPLAYS};
"""
#: What a ledger of an older schema lacks; it is added when the file is next opened for writing.
_UPGRADES = {1: _REPLAYS}

_writers_here: set[Path] = set()


class LedgerFile:
    """An open ledger file. Any thread may use it; one transaction runs at a time."""

    def __init__(self, path: Path, connection: sqlite3.Connection, lock: TextIO | None) -> None:
        self.path = path
        self._connection = connection
        self._writer_lock = lock
        self._thread_lock = threading.RLock()

    @classmethod
    def open_to_write(cls, path: str | Path) -> LedgerFile:
        """The file, made if there is none. Raises LedgerError if another process writes it, or it is damaged."""
        path = Path(path).resolve()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = _lock(path)
        except OSError as error:
            raise LedgerError(
                f"{lock_path(path)} can't be written: {error}. See that the disk has space and that this user may write there."
            ) from error
        try:
            with explained(path):
                file = cls(path, _connect(f"{path.as_uri()}?mode=rwc"), lock)
                file._prepare()
                return file
        except BaseException:
            _unlock(path, lock)
            raise

    @classmethod
    def open_to_read(cls, path: str | Path) -> LedgerFile:
        """The file as it stands at each read, also while another process writes it. Raises LedgerError."""
        path = Path(path).resolve()
        if not path.is_file():
            raise LedgerError(f"there is no ledger at {path}; give the directory of a run that has begun.")
        writer = writer_of(path)
        if writer is not None and writer["host"] not in (socket.gethostname(), "?"):
            raise LedgerError(
                f"{path} is being written on {writer['host']} (process {writer['pid']}), and a ledger is read on the machine "
                f"that writes it; this one is {socket.gethostname()}. Read it there, or when that process has ended."
            )
        with explained(path):
            file = cls(path, _connect(f"{path.as_uri()}?mode=ro"), None)
            version = file._check_format(*_UPGRADES, SCHEMA_VERSION)
            if version in _UPGRADES:  # as the upgrade would leave it, without touching the file
                file._connection.execute(_UPGRADES[version].replace("CREATE TABLE", "CREATE TEMP TABLE", 1))
            return file

    def close(self) -> None:
        """Safe to call twice."""
        with self._thread_lock:
            self._connection.close()
            if self._writer_lock is not None:
                _unlock(self.path, self._writer_lock)
                self._writer_lock = None

    @contextmanager
    def transaction(self, *, synced: bool = False) -> Iterator[sqlite3.Connection]:
        """All of the block's changes or none; `synced`: on disk when the block ends. Raises LedgerError, the file as it was."""
        with self._thread_lock, explained(self.path):
            if synced:
                self._connection.execute("PRAGMA synchronous=FULL")
            try:
                yield from self._block("BEGIN IMMEDIATE")
            finally:
                if synced:
                    self._connection.execute("PRAGMA synchronous=NORMAL")

    @contextmanager
    def snapshot(self) -> Iterator[sqlite3.Connection]:
        """One state of the file for all of the block's reads, whatever is written meanwhile."""
        with self._thread_lock, explained(self.path):
            yield from self._block("BEGIN")

    def _block(self, begin: str) -> Iterator[sqlite3.Connection]:
        if self._connection.in_transaction:  # a transaction of this thread around this one
            yield self._connection
            return
        self._connection.execute(begin)
        try:
            yield self._connection
            self._connection.execute("COMMIT")
        finally:
            if self._connection.in_transaction:
                self._connection.rollback()

    def damage(self) -> list[str]:
        """What SQLite's own check finds wrong with the file's structure; reads all of it."""
        with self._thread_lock, explained(self.path):
            lines = [str(row[0]) for row in self._connection.execute("PRAGMA integrity_check(20)")]
        return [] if lines == ["ok"] else lines

    def _prepare(self) -> None:
        connection = self._connection
        [mode] = connection.execute("PRAGMA journal_mode=WAL").fetchone()
        if mode != "wal":
            raise LedgerError(
                f"{self.path} needs SQLite's WAL mode, and its file system allows only {mode}; put trainer.run_dir on a "
                "local disk."
            )
        connection.execute("PRAGMA synchronous=NORMAL")
        with self.transaction() as db:
            is_new = db.execute("SELECT count(*) FROM sqlite_master").fetchone() == (0,)
            if is_new:
                # Not executescript, which would commit first: a killed process leaves a whole schema or none.
                for statement in _SCHEMA.split(";\n"):
                    db.execute(statement)
                db.execute(f"PRAGMA application_id={_APPLICATION_ID}")
                db.execute(f"PRAGMA user_version={SCHEMA_VERSION}")
            elif (version := self._check_format(*_UPGRADES, SCHEMA_VERSION)) in _UPGRADES:
                db.execute(_UPGRADES[version])
                db.execute(f"PRAGMA user_version={SCHEMA_VERSION}")
        [verdict] = connection.execute("PRAGMA quick_check(1)").fetchone()
        if verdict != "ok":
            raise _damaged(self.path, str(verdict))

    def _check_format(self, *readable: int) -> int:
        """The file's schema, which is one of `readable`. Raises LedgerError."""
        [application] = self._connection.execute("PRAGMA application_id").fetchone()
        [version] = self._connection.execute("PRAGMA user_version").fetchone()
        if application == 0 and self._connection.execute("SELECT count(*) FROM sqlite_master").fetchone() == (0,):
            raise LedgerError(f"{self.path} is empty: the run was ended before its first entry. The same command begins it.")
        if application != _APPLICATION_ID:
            raise LedgerError(f"{self.path} is an SQLite file, but no ledger of skyrl_mega; move it away.")
        if version not in readable:
            raise LedgerError(
                f"{self.path} has schema {version}, and this program reads {SCHEMA_VERSION}; go on with the program that wrote "
                "it, or start a new trainer.run_dir."
            )
        return version


def set_aside(path: Path) -> Path:
    """Gives the ledger at `path` a dated name beside it, and returns that. Raises LedgerError if another process writes it."""
    LedgerFile.open_to_write(path).close()  # what is in the write-ahead log moves into the file: one rename is the whole change
    date = time.strftime("%Y%m%d-%H%M%S", time.localtime(path.stat().st_mtime))
    names = (f"{path.stem}-{date}{f'-{again}' if again else ''}{path.suffix}" for again in itertools.count())
    target = next(candidate for name in names if not (candidate := path.with_name(name)).exists())
    path.rename(target)
    return target


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """SQLite's complaints about the disk or the file as LedgerError with a remedy; others, being bugs, as they are."""
    try:
        yield
    except sqlite3.DatabaseError as error:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code == sqlite3.SQLITE_FULL:
            raise LedgerError(
                f"the disk is full: {path} can't grow ({error}). Nothing of this call was written and the ledger is whole; free "
                "space and start the run again, it goes on from its newest checkpoint."
            ) from error
        if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            raise _damaged(path, str(error)) from error
        if code in (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM):
            raise LedgerError(
                f"{path} can't be used: {error}. Nothing of this call was written; see that the disk has space, that it and its "
                "directory may be written by this user, and start the run again."
            ) from error
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            raise LedgerError(
                f"{path} was locked for more than {_BUSY_TIMEOUT_S:.0f} s by another program ({error}). End what reads it for so "
                "long, and start the run again."
            ) from error
        raise


def _damaged(path: Path, problem: str) -> LedgerError:
    return LedgerError(
        f"{path} is damaged: {problem}. Nothing was changed. Put back a copy of it, or start a new trainer.run_dir; the "
        "checkpoints beside it are whole files of their own and can be exported."
    )


def _connect(uri: str) -> sqlite3.Connection:
    return sqlite3.connect(uri, uri=True, timeout=_BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)


# ---- the one writer -------------------------------------------------------------------------------------------------------


def lock_path(path: Path) -> Path:
    return path.with_name(path.name + ".lock")


def writer_of(path: Path) -> dict[str, Any] | None:
    """pid, host and start (Unix seconds) of the process that writes the ledger at `path`, None where there is none."""
    path = path.resolve()
    if path in _writers_here:
        # Opening the lock file and closing it again would drop this process's lock: POSIX.
        return {"pid": os.getpid(), "host": socket.gethostname(), "since": 0.0}
    try:
        # Asking whether a lock is held means trying to take it: a shared one, which many may ask for at once.
        with lock_path(path).open(encoding="utf-8") as file:
            return None if _try_lock(file, fcntl.LOCK_SH) else _owner(file)
    except FileNotFoundError:
        return None


def _lock(path: Path) -> TextIO:
    if path in _writers_here:
        raise LedgerError(f"{path} is already open for writing in this process; close that ledger first.")
    file = lock_path(path).open("a+", encoding="utf-8")
    deadline = time.monotonic() + _LOCK_PATIENCE_S
    while not (is_ours := _try_lock(file, fcntl.LOCK_EX)) and time.monotonic() < deadline:
        time.sleep(0.05)
    if not is_ours:
        owner = _owner(file)
        file.close()
        raise LedgerError(
            f"{path} has one writer, and that is process {owner['pid']} on {owner['host']}. Wait for it, end it, or give this "
            "run another trainer.run_dir."
        )
    file.seek(0)
    file.truncate()
    json.dump({"pid": os.getpid(), "host": socket.gethostname(), "since": round(time.time(), 3)}, file)
    file.flush()
    _writers_here.add(path)
    return file


def _try_lock(file: TextIO, kind: int) -> bool:
    try:
        fcntl.lockf(file, kind | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True


def _owner(file: TextIO) -> dict[str, Any]:
    file.seek(0)
    try:
        return json.load(file)
    except json.JSONDecodeError:  # it has only just taken the lock
        return {"pid": "?", "host": "?", "since": 0.0}


def _unlock(path: Path, lock: TextIO) -> None:
    _writers_here.discard(path)
    lock.close()
