"""Request lifecycle in the scheduler process: what P keeps (producer, leases) and what D pulls (consumer).

Never imports worker or torch. Every hook is total: any input ends in a pull, a local prefill or a failed request.
"""
