"""Requests that are quietly prefilled where they should not be: counted by reason, and said now and then."""

from __future__ import annotations

from typing import Any

import pytest
from support.d_requests import noted
from support.engine_config import FULL, group_of, vllm_config
from support.pd import TO_P, make_params, make_request

from vllm_datadist_connector.config import ConnectorConfig
from vllm_datadist_connector.duties import Duties
from vllm_datadist_connector.labels import Reason
from vllm_datadist_connector.metrics import SchedulerMeter
from vllm_datadist_connector.protocol.params import Unusable
from vllm_datadist_connector.scheduler.local_prefills import LINE_INTERVAL_S, REASON_OF, LocalPrefills
from vllm_datadist_connector.scheduler.scheduler import ConnectorScheduler

FOR_D = make_params()
P, D, BOTH = (True, False), (False, True), (True, True)


@pytest.mark.parametrize(
    ("params", "sides", "reason"),
    [
        (TO_P, P, None),
        (TO_P, BOTH, None),
        (FOR_D, D, None),
        (FOR_D, BOTH, None),
        (None, BOTH, None),
        ({}, BOTH, None),
        (TO_P, D, "role"),
        (FOR_D, P, "role"),
        (None, D, "no_params"),
        (None, P, "no_params"),
        ({}, D, "no_params"),
        ({"do_remote_prefill": False}, D, "no_params"),
        (FOR_D | {"do_remote_prefill": "true"}, D, "flag"),
        (FOR_D | {"do_remote_prefill": "true"}, BOTH, "flag"),
        (FOR_D | {"do_remote_prefill": 1}, D, "flag"),
        (TO_P | {"do_remote_decode": "True"}, P, "flag"),
        ([], BOTH, "params"),
        ("{}", D, "params"),
    ],
)
def test_arrivals(params: Any, sides: tuple[bool, bool], reason: str | None) -> None:
    local = LocalPrefills(meter := SchedulerMeter("engine"))
    local.note_arrival("r", params, Duties(*sides))
    assert noted(meter) == ({reason: 1} if reason else {})
    assert noted(meter) == {}


@pytest.mark.parametrize(
    ("role", "params", "advice"),
    [
        ("kv_consumer", TO_P, "compare the router's lists of instances with their kv_role"),
        ("kv_producer", FOR_D, "compare the router's lists of instances with their kv_role"),
        ("kv_consumer", None, "let the router ask a prefill instance first"),
        ("kv_consumer", FOR_D | {"do_remote_prefill": "true"}, "a router must send true or false"),
    ],
)
def test_a_scheduler_counts_and_says_what_to_do(
    role: str, params: dict[str, Any] | None, advice: str, caplog: pytest.LogCaptureFixture
) -> None:
    scheduler = ConnectorScheduler(ConnectorConfig(), vllm_config(role), [group_of(FULL, "l")])
    try:
        request = make_request([1, 2, 3], params)
        scheduler.on_new_request(request)
        stats = scheduler.take_stats()
        scheduler.request_finished(request, ([],))
    finally:
        scheduler.close()
    assert stats is not None
    assert [key for key in stats.data["counts"] if key.startswith("local_prefills:")]
    assert request.request_id in caplog.text
    assert advice in caplog.text


def test_one_line_in_an_interval_for_each_reason(caplog: pytest.LogCaptureFixture) -> None:
    now = 0.0
    local = LocalPrefills(meter := SchedulerMeter("engine"), clock=lambda: now)
    for count in range(40):
        local.note(f"r{count}", Reason.ROLE, "it is another's")
        local.note(f"s{count}", Reason.FLAG, "it is no flag")
    assert [record.getMessage().split()[1] for record in caplog.records] == ["r0", "s0"]
    now = LINE_INTERVAL_S
    local.note("r40", Reason.ROLE, "it is another's")
    assert caplog.records[-1].getMessage().endswith("(and 39 others since the last such line)")
    assert noted(meter) == {"role": 41, "flag": 40}


def test_every_reason_of_the_params_has_a_label() -> None:
    assert set(REASON_OF) == set(Unusable)
