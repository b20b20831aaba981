"""A party of the selftest whose provider has a fault: what an item must find."""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import signal
import struct
import sys
import threading
import time
from typing import Any

import msgspec

from vllm_datadist_connector.selftest.memory import SegmentedMemory
from vllm_datadist_connector.selftest.party import Link, Outcome, Party, serve


class WrongByte(Party):
    def pull(self, *args: Any, **kwargs: Any) -> Outcome:
        outcome = super().pull(*args, **kwargs)
        memory = self._memories["kv"]
        memory.write(0, bytes([memory.read(0, 1)[0] ^ 1]))
        return outcome


class LateWriter(Party):
    """As hardware may that goes on after its call has failed."""

    def unlink(self, *args: Any, **kwargs: Any) -> Outcome:
        def write() -> None:
            while True:  # what comes before the watch begins is written over
                time.sleep(0.05)
                self._memories["kv"].write(12345, b"late")

        threading.Thread(target=write, daemon=True).start()
        return super().unlink(*args, **kwargs)


class Immortal(Party):
    """Never learns that a link is gone."""

    def query(self, *_: Any, **__: Any) -> Link | None:
        return Link(alive=True)


class CountingViews(Party):
    """Takes eight registrations in all, whatever they are of."""

    def capabilities(self) -> dict[str, int]:
        return super().capabilities() | {"max_regions": 8, "max_addrs_per_cache": 240}

    def register(self, *args: Any, **kwargs: Any) -> Outcome:
        count = getattr(self, "count_", 0)
        self.count_ = count + 1
        return super().register(*args, **kwargs) if count < 8 else Outcome(status="LLM_FAILED", why="full")


class Promising(CountingViews):
    """Tells more than it does."""

    def capabilities(self) -> dict[str, int]:
        return super().capabilities() | {"max_regions": 16}


class Crashing(Party):
    def link(self, *args: Any, **kwargs: Any) -> Outcome:
        os.kill(os.getpid(), signal.SIGSEGV)
        return super().link(*args, **kwargs)


class Fenceless(Party):
    def pull_beside_work(self, *args: Any, **kwargs: Any) -> int:
        return super().pull_beside_work(*args, **kwargs | {"fenced": False})


class InOrder(Party):
    """Its transfers wait for the device by themselves."""

    def pull_beside_work(self, *args: Any, **kwargs: Any) -> int:
        return super().pull_beside_work(*args, **kwargs | {"fenced": True})


class WholeSegments(Party):
    """Loses what it has registered when the memory grows."""

    def grow(self, name: str) -> int:
        if isinstance(self._memories[name], SegmentedMemory):
            self.lost_ = True
        return super().grow(name)

    def pull(self, *args: Any, **kwargs: Any) -> Outcome:
        lost = getattr(self, "lost_", False)
        return Outcome(status="LLM_FAILED", why="gone") if lost else super().pull(*args, **kwargs)


class OneThread(Party):
    def pull_in_thread(self, *args: Any, **kwargs: Any) -> Outcome:
        return msgspec.structs.replace(super().pull_in_thread(*args, **kwargs), status="LLM_FAILED")


class WithoutProcessMemory(Party):
    """As a container's seccomp profile has it that does not let processes read each other's memory."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        refuse_process_vm_readv()
        super().__init__(*args, **kwargs)


def refuse_process_vm_readv() -> None:
    """From now on the call fails with EPERM, in this thread and those that it starts."""
    number = {"x86_64": 310, "aarch64": 270}[platform.machine()]
    # Load the call's number; if it is that one, the errno, else allow: linux/filter.h, linux/seccomp.h.
    rules = [(0x20, 0, 0, 0), (0x15, 0, 1, number), (0x06, 0, 0, 0x00050000 | errno.EPERM), (0x06, 0, 0, 0x7FFF0000)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *rule) for rule in rules))
    program = struct.pack("HxxxxxxP", len(rules), ctypes.addressof(code))
    libc = ctypes.CDLL(None, use_errno=True)
    no_new_privileges, set_seccomp, filter_mode = 38, 22, 2
    if libc.prctl(no_new_privileges, 1, 0, 0, 0) or libc.prctl(set_seccomp, filter_mode, program, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")


class Keeping(Party):
    """Refuses a link that it has already, although its peer has unlinked."""

    def link(self, *args: Any, **kwargs: Any) -> Outcome:
        count = getattr(self, "count_", 0)
        self.count_ = count + 1
        return super().link(*args, **kwargs) if count == 0 else Outcome(status="LLM_LINK_FAILED", why="linked already")


if __name__ == "__main__":
    serve(globals()[sys.argv[1]])
