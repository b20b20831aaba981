"""One worker rank: its KV cache as registered caches, its peers, its transfers.

`worker.py` is what the connector's hooks call and never blocks; `driver.py` is the one thread that owns peers and
transfers; native threads move the bytes.
"""
