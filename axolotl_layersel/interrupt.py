"""Ctrl-C: finish the micro-batch, save on all ranks together, leave with an error code."""

import signal
import threading
from types import FrameType

import torch

from axolotl_layersel import engines

EXIT_CODE = 130  # 128 + SIGINT, as a shell reports it
PATIENCE = 3  # a launcher repeats the user's signal once; whoever sends a third wants out at once


class InterruptFlag:
    """Remembers a SIGINT until all ranks can act on it.

    A handler that saves at once, as Axolotl's does on one rank, cannot gather sharded weights: no
    collective call is safe there. Ranks agree by one flag after every micro-batch.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.signals = 0
        self.previous: object = None
        self.installed = False

    def install(self) -> None:
        """Take SIGINT over, and forget earlier ones."""
        self.signals = 0
        # Signals reach the main thread only; a trainer run in another one keeps its owner's handling.
        if not self.installed and threading.current_thread() is threading.main_thread():
            self.previous = signal.signal(signal.SIGINT, self.remember)
            self.installed = True

    def remember(self, signum: int, frame: FrameType | None) -> None:
        """Note the signal; raise KeyboardInterrupt at the third."""
        self.signals += 1
        if self.signals >= PATIENCE:
            self.restore()
            raise KeyboardInterrupt

    def is_raised_anywhere(self) -> bool:
        """Return whether any rank was interrupted; a collective call."""
        return engines.share_flag(self.signals > 0, self.device)

    def restore(self) -> None:
        """Give SIGINT back to whoever had it."""
        if self.installed:
            signal.signal(signal.SIGINT, self.previous)
            self.installed = False
