"""Patroni with etcd behind HAProxy: a cluster that fails over by itself, and has one address."""

import asyncio
import os
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Self

import pytest

from tests.support.postgres import find_programs, free_port, owner
from tests.support.programs import TOOLS, program
from tests.support.replication import signal_server

PROGRAM = TOOLS / "patroni/bin/patroni"
SCOPE = "roster"
TTL_SECONDS = 20  # the shortest that Patroni accepts: of the leader's lock, after which a standby takes it
# Ends everything however the tests end; a stopped process has to continue in order to be stopped.
CLEAN_UP = """
    pids=; while read -r pid; do pids="$pids $pid"; done
    kill -KILL $pids
    for data in "$2"/*/data; do
        postmaster=$(head -n 1 "$data/postmaster.pid") || continue
        kill -CONT "$postmaster" $(cat "/proc/$postmaster/task/$postmaster/children")
        "$1/pg_ctl" stop --mode=immediate --pgdata="$data"
    done
    rm -rf "$2"
"""
PATRONI = """
scope: {scope}
name: {name}
restapi: {{listen: '127.0.0.1:{rest}', connect_address: '127.0.0.1:{rest}'}}
etcd3: {{host: '127.0.0.1:{etcd}'}}
bootstrap:
  dcs: {{ttl: {ttl}, loop_wait: 2, retry_timeout: 3, synchronous_mode: true}}
  initdb: [encoding: UTF8, locale: C.UTF-8, no-sync]
postgresql:
  listen: '127.0.0.1:{port}'
  connect_address: '127.0.0.1:{port}'
  data_dir: {folder}/data
  bin_dir: {programs}
  pgpass: {folder}/pgpass
  authentication: {{superuser: {{username: postgres}}, replication: {{username: replicator}}}}
  pg_hba: [local all all trust, host all all 127.0.0.1/32 trust, host replication all 127.0.0.1/32 trust]
  parameters: {{unix_socket_directories: '{folder}', max_connections: 200, fsync: 'off'}}
"""
HAPROXY = """
defaults
    mode tcp
    timeout connect 2s
    timeout client 30m
    timeout server 30m
    timeout check 1s
listen primary
    bind 127.0.0.1:{port}
    option httpchk OPTIONS /primary
    http-check expect status 200
    default-server inter 1s downinter 500ms fall 2 rise 1 on-marked-down shutdown-sessions
{servers}
"""


class Member:
    """Patroni and its PostgreSQL."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.folder = folder / name
        self.port, self.rest = free_port(), free_port()
        self.process: subprocess.Popen[bytes] | None = None

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to Patroni and to all processes of PostgreSQL."""
        assert self.process
        self.process.send_signal(number)
        signal_server(self.folder / "data", number)

    async def status(self, path: str) -> int:
        """Return the HTTP status of Patroni's answer, 0 if there is none."""
        try:
            async with asyncio.timeout(1):
                reader, writer = await asyncio.open_connection("127.0.0.1", self.rest)
                writer.write(f"GET {path} HTTP/1.0\r\n\r\n".encode())
                answer = await reader.readline()
                writer.close()
        except OSError:
            return 0
        return int(answer.split()[1]) if answer else 0


class PatroniCluster:
    """A leader, and a synchronous standby; `url` is that of HAProxy, which leads to the leader."""

    def __init__(self) -> None:
        # Where an unprivileged user can get to.
        self._folder = Path(tempfile.mkdtemp(prefix="roster-patroni-", dir="/tmp"))
        self._members = [Member(f"node{number}", self._folder) for number in range(2)]
        self._programs = find_programs("initdb", "pg_ctl", "postgres", "pg_basebackup", "pg_rewind")
        self._processes: list[subprocess.Popen[bytes]] = []
        self._etcd = free_port()
        self._port = free_port()
        self.url = f"postgresql://postgres@127.0.0.1:{self._port}/postgres"

    async def __aenter__(self) -> Self:
        await asyncio.to_thread(self._start_all)
        await self._wait_for(self._members[0], "/primary")
        await self._wait_for(self._members[1], "/synchronous")
        return self

    def _start_all(self) -> None:
        if not PROGRAM.exists():
            pytest.skip("Patroni is missing: run `make test-failover`")
        etcd = program("etcd", ".tools/failover/unpacked")
        haproxy = program("haproxy", ".tools/failover/unpacked")
        self._configure()
        self._guard = subprocess.Popen(
            ["sh", "-c", CLEAN_UP, "sh", self._programs, self._folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C ends the tests, and they the guard
            **owner(),
        )
        peer, client = f"http://127.0.0.1:{free_port()}", f"http://127.0.0.1:{self._etcd}"
        self._start(
            etcd.path,
            *(f"--data-dir={self._folder}/etcd", f"--listen-peer-urls={peer}"),
            *(f"--initial-advertise-peer-urls={peer}", f"--initial-cluster=default={peer}"),
            *(f"--listen-client-urls={client}", f"--advertise-client-urls={client}"),
            environment=etcd.environment,
        )
        self._start(haproxy.path, "-db", "-f", self._folder / "haproxy.cfg", environment=haproxy.environment)
        first, *others = self._members
        self._start_member(first)
        while not (first.folder / "data/postmaster.pid").exists():  # it has become the leader
            time.sleep(0.1)
        for member in others:
            self._start_member(member)

    def _start_member(self, member: Member) -> None:
        member.process = self._start(PROGRAM, member.folder / "patroni.yml")

    def _configure(self) -> None:
        for member in self._members:
            member.folder.mkdir()
            configuration = PATRONI.format(
                scope=SCOPE,
                ttl=TTL_SECONDS,
                name=member.name,
                rest=member.rest,
                port=member.port,
                etcd=self._etcd,
                folder=member.folder,
                programs=self._programs,
            )
            (member.folder / "patroni.yml").write_text(configuration)
        servers = [
            f"    server {member.name} 127.0.0.1:{member.port} check port {member.rest}"
            for member in self._members
        ]
        configuration = HAPROXY.format(port=self._port, servers="\n".join(servers))
        (self._folder / "haproxy.cfg").write_text(configuration)
        if "user" in owner():
            names = f"{owner()['user']}:{owner()['group']}"
            subprocess.run(["chown", "-R", names, self._folder], check=True)

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self._guard.communicate)
        for process in self._processes:
            process.wait()

    @property
    def leader(self) -> Member:
        """The member that leads at first."""
        return self._members[0]

    async def wait_for_promotion(self) -> None:
        """Wait until the standby is the leader."""
        await self._wait_for(self._members[1], "/primary")

    def log(self) -> str:
        """Return what all programs have written."""
        return (self._folder / "log").read_text()

    def _start(
        self, *command: str | Path, environment: dict[str, str] | None = None
    ) -> "subprocess.Popen[bytes]":
        with (self._folder / "log").open("ab") as log:
            process = subprocess.Popen(
                command, env=environment or {"PATH": os.defpath}, stdout=log, stderr=log, **owner()
            )
        self._processes.append(process)
        assert self._guard.stdin
        self._guard.stdin.write(f"{process.pid}\n".encode())
        self._guard.stdin.flush()
        return process

    async def _wait_for(self, member: Member, path: str) -> None:
        while await member.status(path) != 200:  # noqa: ASYNC110  (another process changes it)
            await asyncio.sleep(0.1)
