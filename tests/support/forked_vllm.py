"""What a forked `vllm serve` does otherwise than a spawned one; the fork server runs this file after its imports.

Each of the two is a way of vLLM's to be quick on a machine with a core for every process. On two cores, with several
servers on them, it takes most of the time from those that have something to do.
"""

import os
from functools import partial
from time import sleep

from vllm.model_executor.models import registry

NAP_S = 0.0003
"""Far below a step's time."""

# For a second after each message, ranks and engines that wait for one another spin, yielding.
os.sched_yield = partial(sleep, NAP_S)
# Whoever first serves an architecture starts an interpreter to look at it, so as not to meet CUDA before a fork. It
# imports all that is imported here.
registry._run_in_subprocess = lambda look: look()
