"""Failovers of PostgreSQL with streaming replication: nothing acknowledged is lost, and calls succeed again.

One failover in `make test`; `make test-failover` runs ten, with a primary that is killed, or stopped.
"""

import asyncio
import os
import signal
from pathlib import Path
from random import Random

import pytest

from tests.faults.failover import BACK_SECONDS, Fault, Trial
from tests.faults.histories import SEED
from tests.support.namespace import IsolatedNode, Namespace, namespace
from tests.support.patroni import PatroniCluster
from tests.support.replication import Cluster

# The number of failovers of each kind in `make test-failover`.
ROUNDS = int(os.environ.get("ROSTER_TEST_FAILOVERS", "0"))
SEEDS = [Random(SEED + number).getrandbits(32) for number in range(max(ROUNDS, 1))]


class PromotedByHand:
    """A cluster whose standby is promoted by `pg_ctl promote`."""

    def __init__(self, cluster: Cluster, random: Random) -> None:
        self.url = cluster.url()
        self._cluster = cluster
        self._random = random

    async def fail(self, fault: Fault) -> None:
        """Kill or stall the primary."""
        primary = self._cluster.primary
        await asyncio.to_thread(primary.kill if fault == "kill" else primary.stall)

    async def promote(self) -> None:
        """Promote the standby, a moment after the fault."""
        await asyncio.sleep(self._random.uniform(0, 2))
        await self._cluster.promote(self._cluster.standbys[0])


class CutOff(PromotedByHand):
    """A cluster whose primary is in a network namespace, and loses its network."""

    def __init__(self, cluster: Cluster, random: Random, space: Namespace) -> None:
        super().__init__(cluster, random)
        self._space = space

    async def fail(self, fault: Fault) -> None:  # noqa: ARG002
        """Cut the network: packets to the primary are dropped."""
        await asyncio.to_thread(self._space.cut)


class PromotedByPatroni:
    """A cluster whose standby is promoted by Patroni, behind the one address of HAProxy."""

    def __init__(self, cluster: PatroniCluster) -> None:
        self.url = cluster.url
        self._cluster = cluster

    async def fail(self, fault: Fault) -> None:
        """Kill or stall Patroni and the primary."""
        number = signal.SIGKILL if fault == "kill" else signal.SIGSTOP
        await asyncio.to_thread(self._cluster.leader.signal, number)

    async def promote(self) -> None:
        """Wait for Patroni."""
        await self._cluster.wait_for_promotion()


@pytest.mark.parametrize("number", range(len(SEEDS)))
async def test_failover_loses_nothing(number: int, tmp_path: Path) -> None:
    """The primary is killed, and in every second run stopped."""
    seed = SEEDS[number]
    fault: Fault = "stall" if number % 2 else "kill"
    async with Cluster() as cluster:
        outage = await Trial(PromotedByHand(cluster, Random(seed)), tmp_path, seed, fault).run()
    print(f"seed {seed}, {outage}")  # noqa: T201  (`make test-failover` shows it)
    assert outage.first_success <= BACK_SECONDS


@pytest.mark.skipif(not ROUNDS, reason="a part of `make test-failover`")
async def test_dropped_network_loses_nothing(tmp_path: Path) -> None:
    """The primary runs, and its connections stay open, but no packet arrives."""
    with namespace() as space:
        async with Cluster(primary=IsolatedNode("node0", space)) as cluster:
            databases = CutOff(cluster, Random(SEED), space)
            outage = await Trial(databases, tmp_path, SEED, "cut").run()
    print(f"seed {SEED}, {outage}")  # noqa: T201
    assert outage.first_success <= BACK_SECONDS


@pytest.mark.skipif(not ROUNDS, reason="takes a minute for each failover: `make test-failover`")
@pytest.mark.parametrize("number", range(ROUNDS))
async def test_failover_by_patroni_loses_nothing(number: int, tmp_path: Path) -> None:
    """The same behind HAProxy, with the URL of a single host."""
    seed = SEEDS[number]
    fault: Fault = "stall" if number % 2 else "kill"
    async with PatroniCluster() as cluster:
        outage = await Trial(PromotedByPatroni(cluster), tmp_path, seed, fault).run()
    print(f"seed {seed}, Patroni, {outage}")  # noqa: T201
    assert outage.first_success <= BACK_SECONDS
