"""Calls that wait for peers, and end at once for a program that is told to end.

Python runs signal handlers between the steps of its main thread, and there are none while that is in the engine: Ctrl-C
would be heard when the call's time is up. So the main thread lets a thread of ours make the call and waits for it, as
Python can be interrupted in that. The call itself goes on where it is, to its own end: memory that it reads or writes
stays registered, and unregister_cache and finalize wait for it as they wait for the call of any other thread.
"""

from __future__ import annotations

import functools
import os
import queue
import threading
from collections.abc import Callable
from typing import Any, ClassVar, Generic, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


_DEAF_S = 0.25
"""A signal that comes just before the wait, or that another thread takes, does not end it: it is heard so late."""


class _Job(Generic[R]):
    """A call, and what came of it once `ended` is set."""

    def __init__(self, call: Callable[[], R]) -> None:
        self._call: Callable[[], R] | None = call
        self._result: R
        self._error: BaseException | None = None
        self.ended = threading.Event()

    def run(self) -> None:
        """Once; what the call was given is let go before it counts as ended, as after any call."""
        call, self._call = self._call, None
        try:
            if call is not None:
                self._result = call()
        except BaseException as error:
            self._error = error
        del call
        self.ended.set()

    def result(self) -> R:
        """Once."""
        if self._error is None:
            return self._result
        error, self._error = self._error, None
        try:
            raise error
        finally:
            del error  # its traceback holds this frame, which would hold it until garbage is collected


class _Caller:
    """A thread that makes the main thread's calls, one after the other, until one of them is left to it."""

    idle: ClassVar[_Caller | None] = None
    """Only the main thread touches it."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[_Job[Any] | None] = queue.SimpleQueue()
        threading.Thread(target=self._serve, name="datadist-caller", daemon=True).start()

    def _serve(self) -> None:
        while self._run_next():
            pass

    def _run_next(self) -> bool:
        """Holds no job, nor the caches that one was given, once it is done."""
        job = self._jobs.get()
        if job is not None:
            job.run()
        return job is not None

    def call(self, job: _Job[R]) -> R:
        self._jobs.put(job)
        try:
            while not job.ended.wait(_DEAF_S):
                pass
        except BaseException:
            self._jobs.put(None)
            raise
        _Caller.idle = self
        return job.result()


def _forget_parents_caller() -> None:
    _Caller.idle = None


os.register_at_fork(after_in_child=_forget_parents_caller)


def interruptible(call: Callable[P, R]) -> Callable[P, R]:
    """`call`, which in the main thread an exception of a signal handler (KeyboardInterrupt) ends."""

    @functools.wraps(call)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        if threading.current_thread() is not threading.main_thread():
            return call(*args, **kwargs)
        try:
            caller, _Caller.idle = _Caller.idle or _Caller(), None
        except RuntimeError:  # no threads are started any more: the interpreter ends
            return call(*args, **kwargs)
        return caller.call(_Job(functools.partial(call, *args, **kwargs)))

    return wrapper
