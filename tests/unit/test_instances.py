"""What is known of an instance: how long it rests after faults of its links, and what of its peers counts."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vllm_datadist_connector.side_channel.endpoint import Endpoint
from vllm_datadist_connector.worker.instances import Instance, InstanceKey, InstanceState, Peer, pause_s
from vllm_datadist_connector.worker.pairing import Rank

FAULTS = st.integers(1, 10**6)
MOST = st.floats(0.001, 86400)
SPREAD = st.floats(0, 1)


@given(FAULTS, MOST, SPREAD)
def test_a_pause_is_bounded_and_never_none(faults: int, most_s: float, spread: float) -> None:
    assert 0 < pause_s(faults, most_s, spread) <= most_s


@given(st.integers(1, 100), MOST)
def test_it_doubles_up_to_its_bound(faults: int, most_s: float) -> None:
    assert pause_s(faults + 1, most_s, 0.0) == min(most_s, 2 * pause_s(faults, most_s, 0.0)) or faults > 30


@given(FAULTS, MOST)
def test_chance_spreads_it_over_half_of_it(faults: int, most_s: float) -> None:
    assert pause_s(faults, most_s, 1.0) == pause_s(faults, most_s, 0.0) / 2


def test_what_is_heard_of_an_earlier_meeting_does_not_count() -> None:
    instance = Instance(InstanceKey(Endpoint("127.0.0.1", 1), "e", "i"), met_at=0.0, last_used=0.0)
    rank = Rank(0, 0)
    earlier, present = Peer(rank), Peer(rank)
    instance.peers[rank] = present
    assert [instance.is_meeting(peer) for peer in (earlier, present)] == [False, True]
    for state in set(InstanceState) - {InstanceState.MEETING}:
        instance.state = state
        assert not instance.is_meeting(present)


def test_it_is_proven_by_an_answer_only() -> None:
    """Clients can make up any number of instances; one that rests between two meetings is none of those."""
    instance = Instance(InstanceKey(Endpoint("127.0.0.1", 1), "e", "i"), met_at=0.0, last_used=0.0)
    instance.peers[Rank(0, 0)] = Peer(Rank(0, 0))
    assert not instance.is_proven
    instance.state = InstanceState.RESTING
    assert instance.is_proven
