"""The nodes of a test, all by one transport."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from support.datadist_channels import Channel, InProcessChannel, ProcessChannel, ProcessPool
from support.datadist_peer import LOOPBACK, Peer
from vllm_datadist_connector.llm_datadist import LLMException, LLMStatusCode


def failure(call: Callable[..., Any], *args: Any, **kwargs: Any) -> LLMStatusCode:
    """The code of the LLMException that the call raises, whose text must say why."""
    with pytest.raises(LLMException) as caught:
        call(*args, **kwargs)
    assert "no reason given" not in str(caught.value)
    return caught.value.status_code


class Cluster:
    """The nodes of a test."""

    def __init__(self, pool: ProcessPool, transport: str) -> None:
        self._pool = pool
        self._transport = transport
        self._peers: list[Peer] = []

    def open(
        self,
        cluster_id: int,
        *,
        role: str = "MIX",
        listen: str = f"{LOOPBACK}:0",
        insecure: bool = False,
        **settings: Any,
    ) -> Peer:
        """A node in remote-accessible mode on a free port, unless LLMConfig's `settings` say otherwise.

        Args:
            insecure: whether it deals with who comes over TCP, or is found there, without a key.
        """
        defaults = {
            "device_id": 0,
            "enable_cache_manager": True,
            "enable_remote_cache_accessible": True,
            "sync_kv_timeout": 20_000,
            "listen_ip_info": listen,
            "ge_options": {"datadist.Transport": self._transport, "datadist.Insecure": str(int(insecure))},
        }
        channel: Channel = InProcessChannel() if self._transport == "local" else self._pool.take()
        try:
            peer = Peer(channel, cluster_id, role, defaults | settings)
        except Exception:
            self._release(channel)
            raise
        self._peers.append(peer)
        return peer

    def check(self) -> None:
        """Every byte of every cache is what the test expects."""
        for peer in self._peers:
            peer.check()

    def close(self) -> None:
        for peer in self._peers:
            channel = peer.channel
            if isinstance(channel, InProcessChannel) or (isinstance(channel, ProcessChannel) and channel.is_alive):
                peer.ask("close")
            self._release(channel)

    def _release(self, channel: Channel) -> None:
        if isinstance(channel, ProcessChannel):
            self._pool.give(channel)
