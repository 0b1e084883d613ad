"""The metrics of a server, as Prometheus reads them."""

import asyncio
from collections.abc import Mapping
from typing import Self
from urllib.request import ProxyHandler, build_opener

from prometheus_client.parser import text_string_to_metric_families

Sample = tuple[str, frozenset[tuple[str, str]]]


class Scrape:
    """The samples of one scrape, by name and labels."""

    def __init__(self, text: str) -> None:
        families = list(text_string_to_metric_families(text))
        self.samples: Mapping[Sample, float] = {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in families
            for sample in family.samples
        }

    @classmethod
    async def of(cls, address: str) -> Self:
        """Read the metrics at an address."""
        return cls(await asyncio.to_thread(_read, f"http://{address}/metrics"))

    @classmethod
    async def at_rest(cls, address: str) -> Self:
        """Read the metrics once no call is in flight: a client has the status before the server counts it."""
        while (scrape := await cls.of(address)).value("roster_calls_in_flight"):
            pass
        return scrape

    def value(self, name: str, **labels: str) -> float:
        """Return the sum of the samples with these labels and possibly others."""
        wanted = labels.items()
        return sum(value for (its, has), value in self.samples.items() if its == name and wanted <= set(has))

    def since(self, earlier: Self, name: str, **labels: str) -> float:
        """Return the increase of a value since an earlier scrape."""
        return self.value(name, **labels) - earlier.value(name, **labels)


def _read(url: str) -> str:
    with build_opener(ProxyHandler({})).open(url) as answer:
        return str(answer.read().decode())
