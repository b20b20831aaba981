"""The connector-level channel between instances: what a D asks a P for beside KV, in the engine's own frames.

    D scheduler ── renew, release ──────────> P scheduler     leases stay alive while D queues; blocks come back at once
    D worker    ── describe_rank, confirm ──> P scheduler     geometry of a rank; was the lease held while we read?

Both ends are native threads: P answers while its Python threads are busy, D's callers never wait. The wire, its limits
and what is idempotent: native/src/channel/messages.h. Whoever may enter can ask for geometry; only the holder of a
lease's random token can renew, confirm or release it.
"""
