"""Makes vLLM's processes poll their shared-memory queues calmly; on the path of the servers under test only.

Each of them, one engine and one worker at least, polls in a loop around sched_yield(). On two cores a few such
processes keep the others, our heartbeat threads included, from running for up to half a minute. That is a property of
the small machine, not of what is tested here.
"""

import os
import time


def _poll_calmly() -> None:
    time.sleep(0.0002)


os.sched_yield = _poll_calmly
