"""An interrupt ends the main thread's wait for a call, however it comes; the call goes on."""

from __future__ import annotations

import signal
import threading
import time

import pytest

from vllm_datadist_connector.llm_datadist.v2.interruptible import interruptible

LONG_S = 60.0


def test_an_interrupt_that_wakes_nobody() -> None:
    """It comes before the wait has begun, or another thread takes it: as here, where it ends no wait of ours."""
    let_go, ended = threading.Event(), threading.Event()

    @interruptible
    def call() -> None:
        signal.pthread_kill(threading.get_ident(), signal.SIGINT)
        let_go.wait(LONG_S)
        ended.set()

    # Python leaves SIGINT ignored where it found it so: in a background job of a shell.
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    started = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            call()
    finally:
        signal.signal(signal.SIGINT, previous)
    assert time.monotonic() - started < LONG_S / 2
    assert not ended.is_set()
    let_go.set()
    assert ended.wait(LONG_S)
