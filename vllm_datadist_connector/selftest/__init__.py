"""`vllm-datadist selftest`: what a provider of the LLM-DataDist API does on this hardware, without vLLM and a model.

    command ── bench ── items ──> End ── remote ──(lines of JSON)──> party: one provider in a process of its own
                                                     │
                                                     └── on another host by way of hosts.py, which starts and kills it

Every item has two fresh processes: what one of them does to a library, a device or itself costs no other item its
result, and an item may kill them. Whoever runs the test never calls the provider. Imports neither vLLM nor torch; torch
only in a party whose provider moves device memory alone.
"""
