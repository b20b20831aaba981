"""Version of everything that crosses instances beside the KV bytes.

Bump it when a message, the lease ticket or the meaning of a geometry field changes: both ends must then be upgraded
together, and an older peer is refused in the handshake with both versions named.
"""

from __future__ import annotations

from typing import Final

PROTOCOL_VERSION: Final = 8
