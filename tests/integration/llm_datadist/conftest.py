"""Nodes of LLM-DataDist: one LLMDataDist each, in processes of their own or, for transport `local`, in this one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.datadist_channels import ProcessPool
from support.datadist_cluster import Cluster


@pytest.fixture(scope="package")
def process_pool() -> Iterator[ProcessPool]:
    pool = ProcessPool()
    yield pool
    pool.close()


@pytest.fixture
def cluster(process_pool: ProcessPool, transport: str) -> Iterator[Cluster]:
    """By every transport."""
    made = Cluster(process_pool, transport)
    yield made
    made.close()


@pytest.fixture
def processes(process_pool: ProcessPool) -> Iterator[Cluster]:
    """In processes of their own, by the transport that they agree on."""
    made = Cluster(process_pool, "auto")
    yield made
    made.close()
