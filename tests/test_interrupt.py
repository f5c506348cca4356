import os
import signal
import threading

import pytest
import torch

from axolotl_layersel.interrupt import InterruptFlag


def test_a_signal_is_remembered_and_the_handler_given_back():
    def theirs(signum, frame):
        raise AssertionError("the handler that was there before ran")

    before = signal.signal(signal.SIGINT, theirs)
    try:
        flag = InterruptFlag(torch.device("cpu"))
        flag.install()
        assert not flag.is_raised_anywhere()
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert flag.is_raised_anywhere()
        flag.install()
        assert not flag.is_raised_anywhere(), "a new training must not end by an old signal"
        flag.restore()
        assert signal.getsignal(signal.SIGINT) is theirs
        flag.install()
        with pytest.raises(KeyboardInterrupt):
            for _ in range(3):
                os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is theirs
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_trainer_in_another_thread_leaves_signals_alone():
    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=lambda: InterruptFlag(torch.device("cpu")).install())
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGINT) is before
