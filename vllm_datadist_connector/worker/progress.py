"""Progress of one P rank in a prefill that goes on: what of its KV cache is final, and what of that was pulled.

    Mark: of all layers, tokens [0, base) are final; of `layers`, those that the step under way has written, [0, next)

Pure: no sockets, no threads. A mark counts layers as they stand in the rank's geometry, cache by cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

from vllm_datadist_connector.protocol.handshake import RankGeometry
from vllm_datadist_connector.worker.pairing import Pairing
from vllm_datadist_connector.worker.plan import BlockPull, TokenRange, plan_layers


class Mark(NamedTuple):
    base: int
    next: int = 0
    layers: bytes = b""
    """A bit per layer, the lowest of the first byte first."""

    def tokens(self, layer: int) -> int:
        byte, bit = divmod(layer, 8)
        is_written = byte < len(self.layers) and bool(self.layers[byte] >> bit & 1)
        return max(self.base, self.next) if is_written else self.base


NOTHING = Mark(0)


def layer_bits(geometry: RankGeometry) -> dict[str, tuple[int, ...]]:
    """The bits of each layer of the model, in marks of that rank: it may have several tensors, as LAYER:0, LAYER:1."""
    bits: dict[str, tuple[int, ...]] = {}
    for bit, layer in enumerate(layer for cache in geometry.caches for layer in cache.layers):
        name = layer.partition(":")[0]
        bits[name] = (*bits.get(name, ()), bit)
    return bits


class Progress:
    """Of one transfer and one P rank."""

    def __init__(self, ours: RankGeometry, theirs: RankGeometry, pairings: Sequence[Pairing]) -> None:
        self._ours = ours
        self._theirs = theirs
        self._pairings = pairings
        starts = accumulate((len(cache.layers) for cache in theirs.caches), initial=0)
        first_bit = {id(cache): start for cache, start in zip(theirs.caches, starts, strict=False)}
        self._bits = [first_bit[id(pairing.src)] + pairing.src_first for pairing in pairings]
        self._pulled = [[0] * pairing.num_layers for pairing in pairings]

    def take(self, mark: Mark | None, tokens: TokenRange) -> list[BlockPull]:
        """Calls for whatever is final and was not taken yet.

        Args:
            mark: None: the prefill is done, everything is final, states too.
            tokens: all that is to be pulled; of the remote blocks, those that are known.

        Raises:
            PlanError: block ids that do not fit the geometries.
        """
        pulls = []
        for pairing, pulled, bit in zip(self._pairings, self._pulled, self._bits, strict=True):
            final = [self._final(pairing, mark, bit + layer, tokens) for layer in range(pairing.num_layers)]
            for layers in _runs(pulled, final):
                first, end = max(tokens.first, pulled[layers[0]]), final[layers[0]]
                due = tokens._replace(first=first, end=end) if pairing.chunk_tokens else tokens
                pull = plan_layers(self._ours, self._theirs, pairing, due, layers)
                if pull is not None:
                    pulls.append(pull)
            pulled[:] = map(max, pulled, final)
        return pulls

    def _final(self, pairing: Pairing, mark: Mark | None, bit: int, tokens: TokenRange) -> int:
        """How many of the first tokens of a layer can be pulled: whole blocks on both sides, until the last."""
        if mark is None:
            return tokens.end
        if not pairing.chunk_tokens:
            return 0
        theirs, ours = self._theirs.block_sizes[pairing.src.group], self._ours.block_sizes[pairing.dst.group]
        final = min(mark.tokens(bit), len(tokens.remote[pairing.src.group]) * theirs)
        if final >= tokens.end:
            return tokens.end
        final -= final % max(ours, theirs)
        return final if final > tokens.first else 0


def _runs(pulled: Sequence[int], final: Sequence[int]) -> Iterator[range]:
    """Adjacent layers of which the same tokens are due."""
    start = 0
    for at in range(1, len(pulled) + 1):
        if at == len(pulled) or (pulled[at], final[at]) != (pulled[start], final[start]):
            if final[start] > pulled[start]:
                yield range(start, at)
            start = at
