"""One run at a time in a folder: a lock file names the process that writes there, and is stale once that is gone."""

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

# What begins with an underscore is not pushed to a hub.
FILE = "_layersel.lock"
BEAT = 15.0  # seconds between two signs of life
SILENCE = 120.0  # seconds without one after which a process on another machine is gone
POLL = 1.0


@dataclass(frozen=True)
class Owner:
    """The process that a lock is of."""

    host: str
    process: int
    since: str
    machine: str | None  # as of its start, and as its processes see it; None where that cannot be told
    process_start: str | None

    @classmethod
    def current(cls) -> "Owner":
        """Return this process."""
        pid = os.getpid()
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        return cls(socket.gethostname(), pid, now, find_machine(), find_start(pid))

    @classmethod
    def read(cls, path: Path) -> "Owner | None":
        """Return the owner that a lock file names, or None where it names none: it may be about to be written.

        Raises:
            FileNotFoundError: if there is no such file.
        """
        try:
            owner = cls(**json.loads(path.read_bytes()))
        except (ValueError, TypeError):
            return None
        return owner if isinstance(owner.process, int) and owner.process > 0 else None

    def is_alive(self) -> bool:
        """Return whether the process, of this machine, still runs; another may have its number."""
        try:
            os.kill(self.process, 0)
        except ProcessLookupError:
            return False
        except PermissionError:  # somebody else's
            return True
        return find_start(self.process) == self.process_start


def find_machine() -> str | None:
    """Return an identifier of this boot of the machine and this PID namespace; None if the system has none.

    Containers may share the name of their host, but have process numbers of their own.
    """
    try:
        started = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{started} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def find_start(process: int) -> str | None:
    """Return when a process of this machine started, in its own count, or None if it has ended."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    state, start = fields[0], fields[19]
    return None if state in "ZX" else start


class RunLock:
    """A lock file that this process holds; a thread gives signs of life by its time of modification."""

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
        """Return the lock of ``folder``, which is made where it does not exist.

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
                os.write(handle, content)
                os.fsync(handle)
                return cls(path, handle)

    def beat(self) -> None:
        """Give a sign of life now and then."""
        while not self.ended.wait(BEAT):
            # A disk that does not answer once may do so the next time; the run goes on in any case.
            with contextlib.suppress(OSError):
                os.utime(self.handle)

    def is_ours(self) -> bool:
        """Return whether the file is still the one that this process made."""
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(self.handle))
        except FileNotFoundError:
            return False

    def confirm(self) -> None:
        """Raise LayerselError if another run has taken the folder: of two that find a stale lock, one gets it."""
        if not self.is_ours():
            raise LayerselError(
                f"output_dir: another run has taken {self.path.parent} at the same moment. Set another output_dir."
            )

    def release(self) -> None:
        """Remove the file, and leave it if it has become another run's; not in a process that was forked."""
        if self.ended.is_set() or os.getpid() != self.owner:
            return
        self.ended.set()
        self.beating.join()
        if self.is_ours():
            self.path.unlink(missing_ok=True)
        os.close(self.handle)
        atexit.unregister(self.release)


def remove_stale(path: Path) -> None:
    """Remove the lock file of a run that is gone; one on another machine is given time for a sign of life.

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
        who = f"process {owner.process} on {owner.host} since {owner.since}" if owner else "a process that does not say"
        raise LayerselError(
            f"output_dir: {path.parent} is being written by another run ({who}). Wait for its end, or set another "
            f"output_dir. If that run is gone for certain, delete {path}."
        )
    LOG.info("layersel: %s was left by a run that is gone, and is removed", path)
    path.unlink(missing_ok=True)


def stays_silent(path: Path, owner: Owner | None) -> bool:
    """Return whether the process that holds the lock gives no sign of life for a while.

    Only changes are looked for, so that the clocks of two machines need not agree.

    Raises:
        FileNotFoundError: if the file goes away meanwhile.
    """
    LOG.warning(
        "layersel: %s is of a run on %s; it is gone if there is no sign of life of it for %.0f seconds",
        path,
        owner.host if owner else "a machine that does not say",
        SILENCE,
    )
    first, end = look(path), time.monotonic() + SILENCE
    while time.monotonic() < end:
        time.sleep(POLL)
        if look(path) != first:
            return False
    return True


def look(path: Path) -> tuple[int, bytes]:
    """Return when a file was last written, and its content; opening it makes a network disk look again."""
    with open(path, "rb") as file:
        return os.fstat(file.fileno()).st_mtime_ns, file.read()
