"""A lock file that lets one run at a time write into a folder. It names its process, and is stale once that is gone.

``filelock.SoftFileLease`` is not used: it takes two machines for one that have the same host name, as containers and
cloned machines do, and then takes over the lock of a live run at once.
"""

import atexit
import contextlib
import datetime
import json
import logging
import os
import socket
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.common.files import writing

LOG = logging.getLogger("axolotl.layersel")

FILE = "_layersel.lock"  # a leading underscore keeps it from being pushed to a hub
BEAT = 15.0  # seconds between two signs of life
SILENCE = 120.0  # seconds without one after which a process on another machine is gone
POLL = 1.0  # seconds between two looks for one


@dataclass(frozen=True)
class Owner:
    """The process that holds a lock."""

    host: str
    process: int
    since: str  # when it took the lock
    machine: str | None  # see ``find_machine``
    process_start: str | None  # see ``find_start``

    @classmethod
    def current(cls) -> "Owner":
        """Return this process."""
        pid = os.getpid()
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        return cls(socket.gethostname(), pid, now, find_machine(), find_start(pid))

    @classmethod
    def read(cls, path: Path) -> "Owner | None":
        """Return the owner in a lock file, or None if the file names none, because it is just being written.

        Raises:
            FileNotFoundError: if there is no such file.
        """
        try:
            owner = cls(**json.loads(path.read_bytes()))
        except (ValueError, TypeError):
            return None
        return owner if isinstance(owner.process, int) and owner.process > 0 else None

    def is_alive(self) -> bool:
        """Return whether the process, on this machine, still runs. Another process may have got its id."""
        try:
            os.kill(self.process, 0)
        except ProcessLookupError:
            return False
        except PermissionError:  # another user's
            return True
        return find_start(self.process) == self.process_start


def find_machine() -> str | None:
    """Return an id of this boot of this machine and of this namespace of process ids; None if the system has none.

    Host names do not do: containers may share one.
    """
    try:
        started = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{started} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def find_start(process: int) -> str | None:
    """Return the start time of a process of this machine, in clock ticks since boot, or None if it has ended."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    state, start = fields[0], fields[19]
    return None if state in "ZX" else start


class RunLock:
    """A lock file of this process. A thread updates its modification time as a sign of life."""

    def __init__(self, path: Path, handle: int) -> None:
        self.path = path
        self.handle = handle
        self.owner = os.getpid()
        self.ended = threading.Event()
        self.beating = threading.Thread(target=self.beat, daemon=True, name="layersel lock")
        self.beating.start()
        atexit.register(self.release)

    @classmethod
    def take(cls, folder: str | Path) -> "RunLock":
        """Return the lock of ``folder``, which is created if necessary.

        Raises:
            LayerselError: if another run holds it, or it cannot be written.
        """
        path, content = Path(folder) / FILE, json.dumps(asdict(Owner.current())).encode()
        with writing(path, len(content)):
            path.parent.mkdir(parents=True, exist_ok=True)
            while True:
                try:
                    handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
                except FileExistsError:
                    remove_stale(path)
                    continue
                try:
                    os.write(handle, content)
                    os.fsync(handle)
                except BaseException:  # the next run would wait for a file that names nobody
                    os.close(handle)
                    path.unlink(missing_ok=True)
                    raise
                return cls(path, handle)

    def beat(self) -> None:
        """Update the modification time until the lock is released."""
        while not self.ended.wait(BEAT):
            # A disk that fails once may work the next time; the run continues in any case.
            with contextlib.suppress(OSError):
                os.utime(self.handle)

    def is_ours(self) -> bool:
        """Return whether the file is still the one that this process created."""
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(self.handle))
        except FileNotFoundError:
            return False

    def confirm(self) -> None:
        """Raise LayerselError if another run, which found the same stale lock, has taken the folder."""
        if not self.is_ours():
            raise LayerselError(
                f"output_dir: another run has taken {self.path.parent} at the same moment. Set another output_dir."
            )

    def release(self) -> None:
        """Remove the file, unless another run has replaced it. A forked process does nothing."""
        if self.ended.is_set() or os.getpid() != self.owner:
            return
        self.ended.set()
        self.beating.join()
        if self.is_ours():
            self.path.unlink(missing_ok=True)
        os.close(self.handle)
        atexit.unregister(self.release)


def remove_stale(path: Path) -> None:
    """Remove the lock file of a run that is gone, after waiting for a sign of life if it is on another machine.

    Raises:
        LayerselError: if that run goes on.
    """
    try:
        owner = Owner.read(path)
        if owner is not None and owner.machine is not None and owner.machine == find_machine():
            # It may be an earlier run of this very process.
            gone = owner.process == os.getpid() or not owner.is_alive()
        else:
            gone = stays_silent(path, owner)
            owner = Owner.read(path)
    except FileNotFoundError:
        return
    if not gone:
        who = f"process {owner.process} on {owner.host} since {owner.since}" if owner else "an unknown process"
        raise LayerselError(
            f"output_dir: {path.parent} is being written by another run ({who}). Wait for its end, or set another "
            f"output_dir. If that run is gone for certain, delete {path}."
        )
    LOG.info("layersel: %s was left by a run that is gone, and is removed", path)
    path.unlink(missing_ok=True)


def stays_silent(path: Path, owner: Owner | None) -> bool:
    """Return whether a lock file stays unchanged for ``SILENCE`` seconds. The clocks of two machines may differ.

    Raises:
        FileNotFoundError: if the file is removed meanwhile.
    """
    LOG.warning(
        "layersel: %s is of a run on %s; that run is gone if it gives no sign of life for %.0f seconds",
        path,
        owner.host if owner else "an unknown machine",
        SILENCE,
    )
    first, end = read_state(path), time.monotonic() + SILENCE
    while time.monotonic() < end:
        time.sleep(POLL)
        if read_state(path) != first:
            return False
    return True


def read_state(path: Path) -> tuple[int, bytes]:
    """Return a file's modification time and content. Opening it makes a network disk refresh them."""
    with open(path, "rb") as file:
        return os.fstat(file.fileno()).st_mtime_ns, file.read()
