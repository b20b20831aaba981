"""A5: over CANN's backend `hixl` each side listens, and a link reads in the direction of who made it."""

from __future__ import annotations

from pathlib import Path

from support.cann_ranks import calls, check_pull, model_of, run_in_process


def over_hixl(trace: Path) -> None:
    check_pull(model_of(2, seed=1), model_of(2, seed=2), addresses=[4], local_comm_res='{"version": "1.3"}')
    both = [line for line in calls(trace, "Initialize") if "llm.TransferBackend=hixl" in line]
    assert ["llm.ListenIpInfo=127.0.0.1:" in line for line in both] == [True, True]


def test_d_listens_and_says_where(tmp_path: Path) -> None:
    run_in_process(over_hixl, tmp_path, local_port=1)
