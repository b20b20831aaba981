"""TransferTable: which deadlines are waited for, and which have been dealt with."""

from __future__ import annotations

from support.pd import make_params, make_ticket

from vllm_datadist_connector.labels import Failure
from vllm_datadist_connector.metadata import PullJob
from vllm_datadist_connector.protocol.params import parse_remote_prefill
from vllm_datadist_connector.side_channel.endpoint import Endpoint
from vllm_datadist_connector.worker.instances import Instance, InstanceKey
from vllm_datadist_connector.worker.transfers import Transfer, TransferTable


def add(table: TransferTable, request_id: str, deadline: float) -> Transfer:
    remote = parse_remote_prefill(make_params(((1,),), ticket=make_ticket()))
    instance = Instance(InstanceKey(Endpoint("127.0.0.1", 1), "e", "i"), met_at=0.0, last_used=0.0)
    return table.add(PullJob(request_id, remote, ((2,),), 0, 16, "", False, 1.0), instance, deadline)


def test_a_deadline_that_passes_between_two_looks_is_not_slept_through() -> None:
    table = TransferTable()
    assert table.next_deadline() is None
    late, later = add(table, "late", 10.0), add(table, "later", 20.0)
    assert table.next_deadline() == 10.0
    assert table.overdue(9.9) == []
    assert table.overdue(15.0) == [late]
    assert table.next_deadline() == 10.0, "nobody has dealt with it yet, whatever the time is"
    late.failure = Failure.DEADLINE
    assert table.overdue(15.0) == []
    assert table.next_deadline() == 20.0
    assert table.overdue(20.0) == [later]


def test_one_that_is_over_waits_for_its_calls_and_not_for_time() -> None:
    table = TransferTable()
    failed, cancelled = add(table, "failed", 10.0), add(table, "cancelled", 10.0)
    failed.failure, cancelled.cancelled = Failure.TRANSFER, True
    assert (table.next_deadline(), table.overdue(11.0)) == (None, [])
