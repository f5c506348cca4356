"""Ctrl-C and SIGTERM: they are noted, and end the run at a place where all ranks can act on them together."""

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
PATIENCE = 3  # a launcher repeats the user's Ctrl-C once; a third one means that the user wants out at once
SPACING = 8  # micro-batches between two looks


class Interrupted(BaseException):
    """All ranks have agreed to end by a signal. Like KeyboardInterrupt it is no Exception, which others may catch."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


class SignalWatch:
    """Remembers SIGINT and SIGTERM until all ranks can act on them.

    A handler that saves at once, as Axolotl's does on one rank, cannot gather sharded weights: no
    collective call is safe there.

    Attributes:
        received: the signal that arrived, of both SIGTERM, or 0.
    """

    def __init__(self) -> None:
        self.received = 0
        self.interrupts = 0
        self.previous: dict[int, Any] = {}
        self.process = 0

    def install(self) -> None:
        """Take over both signals, and forget earlier ones."""
        self.received = self.interrupts = 0
        # Signals reach the main thread only; a trainer run in another one keeps its owner's handling.
        if not self.previous and threading.current_thread() is threading.main_thread():
            self.process = os.getpid()
            self.previous = {signum: signal.signal(signum, self.remember) for signum in WATCHED}

    def remember(self, signum: int, frame: FrameType | None) -> None:
        """Note the signal; raise KeyboardInterrupt at the third SIGINT."""
        if os.getpid() != self.process:  # a process forked since, which whoever forked it may want to end
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
        """Give both signals back to whoever had them."""
        for signum, handler in self.previous.items():
            signal.signal(signum, handler or signal.SIG_DFL)
        self.previous, self.received = {}, 0


# A process has one handler for a signal, so it has one watch.
WATCH = SignalWatch()


def outlive_signals(worker: int) -> None:
    """Let a process that loads data end by its parent alone.

    A terminal sends Ctrl-C to all processes, and Slurm and torchrun send SIGTERM to all. Without their data the ranks
    could not finish their step.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Blocked here and waited for below, since only so one learns who has sent it.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    """End this process at a SIGTERM of its parent's."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


class SharedSignal:
    """The signal that any rank has received, as all ranks learn of it at the same place, so that they act together.

    Asking is a collective call, and waiting for the answer makes every rank wait for the slowest one. Between two
    optimizer steps DDP's ranks need not wait for each other at all. There the question is asked after every ``SPACING``
    micro-batches, and the answer is read ``SPACING`` micro-batches later, when it has long arrived.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.micro_batches = 0
        self.answer: Callable[[], int] | None = None

    def look(self) -> int:
        """Return the signal that ended a look ``SPACING`` micro-batches ago, or 0; every rank must call this."""
        self.micro_batches += 1
        if self.micro_batches % SPACING:
            return 0
        signum = self.answer() if self.answer else 0
        self.answer = collectives.begin_to_share(WATCH.received, self.device)
        return signum

    def settle(self) -> int:
        """Return the signal that any rank has received until now, or 0; every rank must call this, and waits."""
        signum = self.answer() if self.answer else 0
        self.answer, self.micro_batches = None, 0
        return max(signum, collectives.share_largest(WATCH.received, self.device))


def stop_if_signalled(device: torch.device) -> None:
    """Raise Interrupted on all ranks if any has received a signal; a collective call, in which ranks wait."""
    signum = collectives.share_largest(WATCH.received, device)
    if signum:
        raise Interrupted(signum)


@contextlib.contextmanager
def ending_on_signal(device: torch.device, message: str) -> Iterator[None]:
    """Let a signal end the process at the next ``stop_if_signalled`` within the block, or at its end.

    What the block has changed is put back first, while the ranks can still communicate.

    Args:
        device: of the ranks' communication.
        message: says what is lost.
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
    """End the process as a shell reports a signal, 128 + its number, with one line by rank 0; every rank calls this."""
    if collectives.get_rank() == 0:
        LOG.warning("layersel: %s: %s", signal.Signals(signum).name, message)
    collectives.leave(128 + signum)
