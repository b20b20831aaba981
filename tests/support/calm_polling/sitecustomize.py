"""Makes vLLM's processes poll their shared-memory queues calmly; on the path of tensor-parallel test servers only.

Each of them polls in a loop around sched_yield(). Two tensor-parallel instances are six such processes: on two cores
they can keep others, our heartbeat threads included, from running for up to half a minute. That is a property of the
small machine, not of what is tested here.
"""

import os
import time


def _poll_calmly() -> None:
    time.sleep(0.0002)


os.sched_yield = _poll_calmly
