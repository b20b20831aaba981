"""A party of the selftest whose provider has a fault: what an item must find."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from typing import Any

import msgspec

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
            time.sleep(0.1)
            self._memories["kv"].write(12345, b"late")

        threading.Thread(target=write, daemon=True).start()
        return super().unlink(*args, **kwargs)


class Immortal(Party):
    """Never learns that a link is gone."""

    def query(self, *_: Any, **__: Any) -> Link | None:
        return Link(alive=True)


class Promising(Party):
    """Tells more than it does."""

    def capabilities(self) -> dict[str, int]:
        return super().capabilities() | {"max_regions": 16}

    def register(self, *args: Any, **kwargs: Any) -> Outcome:
        count = getattr(self, "count_", 0)
        self.count_ = count + 1
        return super().register(*args, **kwargs) if count < 8 else Outcome(status="LLM_FAILED", why="full")


class Crashing(Party):
    def link(self, *args: Any, **kwargs: Any) -> Outcome:
        os.kill(os.getpid(), signal.SIGSEGV)
        return super().link(*args, **kwargs)


class OneThread(Party):
    def pull_in_thread(self, *args: Any, **kwargs: Any) -> Outcome:
        return msgspec.structs.replace(super().pull_in_thread(*args, **kwargs), status="LLM_FAILED")


class Keeping(Party):
    """Refuses a link that it has already, although its peer has unlinked."""

    def link(self, *args: Any, **kwargs: Any) -> Outcome:
        count = getattr(self, "count_", 0)
        self.count_ = count + 1
        return super().link(*args, **kwargs) if count == 0 else Outcome(status="LLM_LINK_FAILED", why="linked already")


if __name__ == "__main__":
    serve(globals()[sys.argv[1]])
