"""One process at a time changes a file: a lock on ``.NAME.lock`` beside it, the operating system's own.

It ends with the process that holds it, however that ends, so that a lock file which a killed process left blocks
nobody, and the next change removes it. (On Windows the empty lock file stays. The package filelock would leave it
everywhere.)
"""

from __future__ import annotations

import errno
import os
import random
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from learngene_hub.errors import StoreError

if sys.platform == "win32":
    import msvcrt

    def _lock_now(file: int) -> None:
        msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
else:
    import fcntl

    def _lock_now(file: int) -> None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


LOCK_SECONDS = 60.0  # of waiting for another process that edits the same file
BUSY = (errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK)  # of a lock that another process holds


@contextmanager
def locked(target: Path) -> Iterator[None]:
    """Waits until no other process edits ``target``, and keeps the others waiting."""
    lock = target.with_name(f".{target.name}.lock")
    file = _acquire(lock, time.monotonic() + LOCK_SECONDS)
    try:
        yield
    finally:
        with suppress(OSError):  # Windows removes no open file
            lock.unlink()  # before the lock is given up: later it may be another's
        os.close(file)


def _acquire(lock: Path, deadline: float) -> int:
    """The descriptor of the file, which nobody else has locked."""
    while True:
        file = os.open(lock, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        mine = False
        try:
            _lock_now(file)
            mine = _is_at(lock, file)  # else its holder removed it meanwhile, and the next one locks a new file
        except OSError as error:
            if error.errno not in BUSY:
                raise
        finally:
            if not mine:
                os.close(file)
        if mine:
            return file
        if time.monotonic() > deadline:
            raise StoreError(f"another process has held {lock} for {LOCK_SECONDS:.0f} s; try again when it is done")
        time.sleep(random.uniform(0.002, 0.02))


def _is_at(path: Path, file: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(file))
    except FileNotFoundError:
        return False
