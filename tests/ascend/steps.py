"""Requests, and the steps that see them through."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from instance import BLOCK_SIZE, Instance
from support.party import wait_until
from support.pd import TO_P

PATIENCE_S = 60.0


def prompt(number: int, blocks: float = 2.9) -> list[int]:
    return [(number * 37 + at * 11) % 900 for at in range(int(blocks * BLOCK_SIZE))]


def run(instance: Instance, until: Callable[[], bool] | None = None) -> dict[str, list[Any]]:
    """Steps until no request is left; the outputs of each."""
    outputs: dict[str, list[Any]] = {}

    def step() -> bool:
        for name, output in instance.step().items():
            outputs.setdefault(name, []).append(output)
        return until() if until is not None else not instance.scheduler.requests

    wait_until(step, "the end of all requests", PATIENCE_S)
    return outputs


def prefill_all(p: Instance, prompts: dict[str, list[int]], sent: dict[str, Any] = TO_P) -> dict[str, dict[str, Any]]:
    """The params of prompts that were prefilled for a D."""
    params: dict[str, dict[str, Any]] = {}
    for name, tokens in prompts.items():
        p.add(name, tokens, dict(sent))

    def step() -> bool:
        params.update({name: output.kv_transfer_params for name, output in p.step().items()})
        return len(params) == len(prompts)

    wait_until(step, "the prefills", PATIENCE_S)
    return params
