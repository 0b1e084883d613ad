"""Clients that others wrote, each a program of its own: grpcurl, buf, and Node with grpc-js.

All read requests and print answers as JSON, one message after the other.
"""

import base64
import json
import os
import shutil
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import json_format
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message_factory import GetMessageClass
from google.rpc import error_details_pb2
from google.rpc.status_pb2 import Status

from tests.support.command import Ended, run
from tests.support.wire import RPCS

CHECKOUT = Path(__file__).parents[2]
NODE = Path(__file__).with_name("node")
# The folders with all protos: those of the contract, and those that it imports.
INCLUDES = (CHECKOUT / "protos", Path(error_details_pb2.__file__).parents[2])
STATUS_CODES = {code.name.lower(): code for code in grpc.StatusCode}


def installed(name: str, *folders: Path) -> Path:
    """Return the path of a program; skips the test where it is missing."""
    found = shutil.which(name, path=os.pathsep.join(map(str, [*folders, *os.get_exec_path()])))
    if not found:
        pytest.skip(f"{name} is missing: run `make tools`, and heed its warnings")
    return Path(found)


class Refused(grpc.RpcError):
    """The error of a call, as a client reports it."""

    def __init__(self, status: Status) -> None:
        super().__init__(status.message)
        self._status = status

    def code(self) -> grpc.StatusCode:
        return next(code for code in grpc.StatusCode if code.value[0] == self._status.code)

    def details(self) -> str:
        return str(self._status.message)

    def trailing_metadata(self) -> tuple[tuple[str, bytes]]:  # type: ignore[override]
        return (("grpc-status-details-bin", self._status.SerializeToString()),)


class Client(ABC):
    """A client of the server at an address, `host:port` or `unix:/path`."""

    def __init__(self, address: str) -> None:
        self.address = address

    async def call(self, rpc: str, *messages: dict[str, Any]) -> list[Any]:
        """Return everything that the RPC answers; raises Refused."""
        method = RPCS[rpc]
        lines = "\n".join(map(json.dumps, messages))
        ended = await self.run(f"{method.containing_service.full_name}/{rpc}", lines)
        if ended.status:
            raise Refused(self.status(ended.err))
        answer = GetMessageClass(method.output_type)
        return [json_format.ParseDict(document, answer()) for document in _documents(ended.out)]

    @abstractmethod
    async def run(self, method: str, stdin: str) -> Ended:
        """Run the program for one call."""

    def status(self, said: str) -> Status:
        """Return the status of a failed call from what was said; here a Status in protobuf's JSON."""
        return json_format.Parse(said, Status())


class Grpcurl(Client):
    """https://github.com/fullstorydev/grpcurl, which learns the contract from the server."""

    def __init__(self, address: str, *options: str | Path) -> None:
        super().__init__(address)
        self._program = installed("grpcurl", CHECKOUT / ".tools/bin")
        self._options = options or ("-plaintext",)

    async def run(self, method: str, stdin: str) -> Ended:
        return await self.ask("-format-error", "-d", "@", self.address, method, stdin=stdin)

    async def ask(self, *arguments: str, stdin: str = "") -> Ended:
        """Run it with arguments of the test's own."""
        return await run(self._program, *self._options, *arguments, stdin=stdin.encode())


class Buf(Client):
    """`buf curl`, https://buf.build/docs/curl/usage, which learns the contract from the server."""

    async def run(self, method: str, stdin: str) -> Ended:
        return await self.ask("--data", "@-", path=method, stdin=stdin)

    async def ask(self, *arguments: str, path: str = "", stdin: str = "") -> Ended:
        """Run it with arguments of the test's own."""
        program = installed("buf", Path(sys.executable).parent)
        options = ["--protocol", "grpc", "--http2-prior-knowledge"]
        host = self.address
        if host.startswith("unix:"):
            options += ["--unix-socket", host.removeprefix("unix:")]
            host = "localhost"
        return await run(program, "curl", *options, *arguments, f"http://{host}/{path}", stdin=stdin.encode())

    def status(self, said: str) -> Status:
        error = json.loads(said)
        details = [
            AnyMessage(
                type_url=f"type.googleapis.com/{detail['type']}",
                value=base64.b64decode(detail["value"] + "=="),  # it leaves out the padding
            )
            for detail in error["details"]
        ]
        code = STATUS_CODES[error["code"]].value[0]
        return Status(code=code, message=error["message"], details=details)


class Node(Client):
    """@grpc/grpc-js with @grpc/proto-loader, which reads the contract from the checkout."""

    def __init__(self, address: str) -> None:
        super().__init__(address)
        self._program = installed("node")
        if not (NODE / "node_modules").is_dir():
            pytest.skip(f"{NODE}/node_modules is missing: run `make tools`, and heed its warnings")

    async def run(self, method: str, stdin: str) -> Ended:
        return await run(
            self._program, NODE / "call.mjs", self.address, method, *INCLUDES, stdin=stdin.encode()
        )


def _documents(text: str) -> Iterator[Any]:
    decoder = json.JSONDecoder()
    while text := text.lstrip():
        document, end = decoder.raw_decode(text)
        yield document
        text = text[end:]
