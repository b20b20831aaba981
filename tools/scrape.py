"""Reads what a server exposes under /metrics (Prometheus text format). Standard library only."""

from __future__ import annotations

import re
import urllib.request
from dataclasses import dataclass

SAMPLE = re.compile(r"^(?P<name>[A-Za-z_:][\w:]*)(?:\{(?P<labels>.*)\})?\s+(?P<value>\S+)")
LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


@dataclass(frozen=True)
class Sample:
    name: str
    labels: dict[str, str]
    value: float


class Metrics:
    """One reading of a server's metrics."""

    def __init__(self, text: str) -> None:
        self._samples: dict[str, list[Sample]] = {}
        for line in text.splitlines():
            match = SAMPLE.match(line)
            if match is None or line.startswith("#"):
                continue
            sample = Sample(match["name"], dict(LABEL.findall(match["labels"] or "")), float(match["value"]))
            self._samples.setdefault(sample.name, []).append(sample)

    def samples(self, name: str) -> list[Sample]:
        """Samples of one name; counters are found with and without their `_total`."""
        return self._samples.get(name) or self._samples.get(f"{name}_total") or []

    def total(self, name: str, **labels: str) -> float:
        """Sum over the samples of `name` whose labels include `labels`; 0 where there is none yet."""
        wanted = labels.items()
        return sum(sample.value for sample in self.samples(name) if wanted <= sample.labels.items())

    def names(self) -> set[str]:
        return set(self._samples)


def scrape(url: str, timeout_s: float = 10.0) -> Metrics:
    with urllib.request.urlopen(f"{url}/metrics", timeout=timeout_s) as answer:
        return Metrics(answer.read().decode())
