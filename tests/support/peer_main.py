"""The program of endpoints.PeerProcess: one Endpoint; a JSON request a line in, a JSON answer a line out."""

from __future__ import annotations

import base64
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from support.endpoints import Endpoint


@dataclass(frozen=True)
class _Address:
    cluster_id: int
    cache_id: int
    port: int


def _answer(endpoint: Endpoint, request: dict[str, Any]) -> Any:
    if "method" in request:
        return endpoint.call(request["method"], *request["args"], **request["kwargs"])
    if "link" in request:
        endpoint.link(_Address(*request["link"]))  # type: ignore[arg-type]  # an address is all that linking needs
        return None
    memory = endpoint.read_memory()
    return {"shape": memory.shape, "bytes": base64.b64encode(memory.tobytes()).decode()}


def main() -> None:
    with Endpoint(**json.loads(sys.argv[1])) as endpoint:
        print(json.dumps([endpoint.cache_id, endpoint.port]), flush=True)
        for line in sys.stdin:
            print(json.dumps(_answer(endpoint, json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
