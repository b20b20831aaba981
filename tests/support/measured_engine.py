"""The meters of one engine core's ranks and scheduler, and how vLLM takes from them in each step."""

from __future__ import annotations

import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from vllm_datadist_connector.labels import Transport
from vllm_datadist_connector.metrics import DataDistStats, SchedulerMeter, WorkerMeter


class MeasuredEngine:
    def __init__(self, name: str = "engine", num_ranks: int = 2, **clock: Callable[[], float]) -> None:
        self.ranks = [WorkerMeter(f"pp0tp{rank}") for rank in range(num_ranks)]
        self.scheduler = SchedulerMeter(name, **clock)

    def pull(self, rank: int, seconds: float, num_bytes: int, transport: Transport = Transport.CMA) -> None:
        transfer: Any = SimpleNamespace(
            queued_s=0.0,
            run_s=seconds / 2,
            num_bytes=num_bytes,
            early_bytes=num_bytes // 4,
            pushed_bytes=0,
            num_blocks=2,
            transport=transport,
        )
        self.ranks[rank].pulled(transfer, seconds)

    def link(self, rank: int, count: int, transport: Transport = Transport.CMA) -> None:
        self.ranks[rank].state({transport: count} if count else {}, 0)

    def step(self, asks_first: bool = False) -> dict[str, Any] | None:
        """What an API server gets of one step; None without stats.

        Args:
            asks_first: as vLLM 0.23, which takes the scheduler's before it hands on what the workers report.
        """
        workers: DataDistStats | None = None
        for stats in (rank.take() for rank in self.ranks):
            if stats is not None:
                workers = workers.aggregate(stats) if workers is not None else stats
        if not asks_first:
            self.scheduler.absorb(workers)
        ours = self.scheduler.take()
        both = workers.aggregate(ours) if workers is not None and ours is not None else workers or ours
        if asks_first:
            self.scheduler.absorb(workers)
        return json.loads(json.dumps(both.to_dict())) if both is not None else None
