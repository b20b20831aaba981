"""The recording engine as the one that LLMDataDist makes for itself."""

from __future__ import annotations

from typing import Any

from support.recording_engine import RecordingEngine
from vllm_datadist_connector import _native


class NotedEngine(RecordingEngine):
    """The engine that LLMDataDist makes; take() gives the calls since the last one as (name, *arguments)."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[int, int]] = []
        self.answers |= {
            "link_clusters": (0, [0]),
            "unlink_clusters": (0, [0]),
            "link_comm": (0, 1),
            "query_comm": (0, _native.COMM_OK, ""),
            "query_link": (0, None),
        }

    def make(self, cluster_id: int, role: int) -> NotedEngine:
        self.made.append((cluster_id, role))
        return self

    def take(self) -> list[tuple[Any, ...]]:
        calls, self.calls = self.calls, []
        return [(call.name, *call.arguments.values()) for call in calls]
