"""The services of the contract, listed once: for the server, health, reflection, rights and the audit log."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor

from service.interceptors.chain import Chain


@dataclass(frozen=True, slots=True)
class Service:
    """One service: its descriptor, its servicers' base class, and the function that adds one to a server."""

    descriptor: ServiceDescriptor
    base: type[Any]
    add: Callable[[Any, Any], None]

    @classmethod
    def of(cls, file: str) -> "Service":
        """Return the one service of a file of the contract."""
        messages, stubs = (import_module(f"roster.v1.{file}_{kind}") for kind in ("pb2", "pb2_grpc"))
        [descriptor] = messages.DESCRIPTOR.services_by_name.values()
        servicer = f"{descriptor.name}Servicer"
        return cls(descriptor, getattr(stubs, servicer), getattr(stubs, f"add_{servicer}_to_server"))


SERVICES = (
    Service.of("users"),
    Service.of("posts"),
    Service.of("bulk"),
    Service.of("changes"),
)
SERVICE_NAMES = tuple(service.descriptor.full_name for service in SERVICES)


def add_servicer(servicer: object, chain: Chain) -> None:
    """Add a servicer to the handlers of a server; its base class says which service it is."""
    [service] = [service for service in SERVICES if isinstance(servicer, service.base)]
    service.add(servicer, chain)


def path(method: MethodDescriptor) -> str:
    """Return the name of an RPC on the wire, such as `/roster.v1.UserService/GetUser`."""
    return f"/{method.containing_service.full_name}/{method.name}"


# Every RPC, by its name on the wire.
RPCS = {path(method): method for service in SERVICES for method in service.descriptor.methods}
