"""Record Ctrl-C and SIGTERM, and end the run where all ranks can act on them together."""

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import torch

from axolotl_layersel.engines import collectives

LOG = logging.getLogger("axolotl.layersel")

WATCHED = (signal.SIGINT, signal.SIGTERM)
PATIENCE = 3  # interrupts before an immediate stop; a launcher repeats the user's Ctrl-C once
SPACING = 8  # micro-batches between two checks


class Interrupted(BaseException):
    """All ranks have agreed to end by a signal. Like KeyboardInterrupt it does not derive from Exception."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


class SignalWatch:
    """Records SIGINT and SIGTERM until all ranks can act on them.

    A handler that saves immediately, as Axolotl's does on one rank, cannot gather sharded weights, since collective
    calls are unsafe there.

    Attributes:
        received: the signal that arrived, SIGTERM if both did, or 0.
    """

    def __init__(self) -> None:
        self.received = 0
        self.interrupts = 0
        self.previous: dict[int, Any] = {}
        self.process = 0

    def install(self) -> None:
        """Install the handler of both signals, and reset earlier ones."""
        self.received = self.interrupts = 0
        # Only the main thread can handle signals; in another one the owner's handlers stay.
        if not self.previous and threading.current_thread() is threading.main_thread():
            self.process = os.getpid()
            self.previous = {signum: signal.signal(signum, self.remember) for signum in WATCHED}

    def remember(self, signum: int, frame: FrameType | None) -> None:
        """Record the signal; raise KeyboardInterrupt at the third SIGINT."""
        if os.getpid() != self.process:  # a forked process, which its parent may end by SIGTERM
            if signum == signal.SIGTERM:
                signal.signal(signum, signal.SIG_DFL)
                os.kill(os.getpid(), signum)
            return
        self.received = max(self.received, signum)
        self.interrupts += signum == signal.SIGINT
        if self.interrupts >= PATIENCE:
            self.restore()
            raise KeyboardInterrupt

    def restore(self) -> None:
        for signum, handler in self.previous.items():
            signal.signal(signum, handler or signal.SIG_DFL)
        self.previous, self.received = {}, 0


# A process has one handler per signal, and so one watch.
WATCH = SignalWatch()


def outlive_signals(worker: int) -> None:
    """Make a data loading process ignore signals that its parent does not send.

    A terminal sends Ctrl-C to all processes, and Slurm and torchrun send SIGTERM to all. Ranks without data could not
    finish their step.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # sigwaitinfo, which tells the sender, needs the signal blocked.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


class SharedSignal:
    """Shares a signal that any rank has received, so that all ranks act on it at the same point.

    Within an optimizer step the ranks need not wait for each other. Every ``SPACING`` micro-batches a collective call
    starts, whose result is read ``SPACING`` micro-batches later, when it has long arrived.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.micro_batches = 0
        self.answer: Callable[[], int] | None = None

    def look(self) -> int:
        """Return the signal found by the check started ``SPACING`` micro-batches ago, or 0; a collective call."""
        self.micro_batches += 1
        if self.micro_batches % SPACING:
            return 0
        signum = self.answer() if self.answer else 0
        self.answer = collectives.begin_to_share(WATCH.received, self.device)
        return signum

    def settle(self) -> int:
        """Return a signal that any rank has received until now, or 0; a collective call that waits."""
        signum = self.answer() if self.answer else 0
        self.answer, self.micro_batches = None, 0
        return max(signum, collectives.share_largest(WATCH.received, self.device))


def stop_if_signalled(device: torch.device) -> None:
    """Raise Interrupted on all ranks if any has received a signal; a collective call that waits."""
    signum = collectives.share_largest(WATCH.received, device)
    if signum:
        raise Interrupted(signum)


@contextlib.contextmanager
def ending_on_signal(device: torch.device, message: str) -> Iterator[None]:
    """Exit at the next ``stop_if_signalled`` in the block, or at its end, if a signal has arrived.

    Context managers within the block exit first, while the ranks can still communicate.

    Args:
        device: the device for communication.
        message: what the user loses, for the log.
    """
    WATCH.install()
    try:
        yield
        stop_if_signalled(device)
    except Interrupted as stop:
        leave(stop.signum, message)
    finally:
        WATCH.restore()


def leave(signum: int, message: str) -> None:
    """Log ``message`` on rank 0 and exit with 128 + ``signum``, as shells report it; every rank must call this."""
    if collectives.get_rank() == 0:
        LOG.warning("layersel: %s: %s", signal.Signals(signum).name, message)
    collectives.leave(128 + signum)
