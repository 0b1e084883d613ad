"""Server reflection, v1 and v1alpha, including method symbols and error details."""

import grpc
from google.protobuf import descriptor_pool, text_format
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from google.rpc import error_details_pb2  # noqa: F401  (its import adds it to the pool: grpcurl can print error details)
from grpc_reflection.v1alpha import reflection_pb2
from grpc_reflection.v1alpha.reflection import aio

from service.interceptors.chain import Chain

METHOD = "ServerReflectionInfo"


class Reflection(aio.ReflectionServicer):  # type: ignore[misc]
    """The library's servicer can't look up a method, so look up its service instead."""

    def _file_containing_symbol(
        self, request: reflection_pb2.ServerReflectionRequest, fully_qualified_name: str
    ) -> reflection_pb2.ServerReflectionResponse:
        service, _, _ = fully_qualified_name.rpartition(".")
        is_method = service in self._service_names
        return super()._file_containing_symbol(request, service if is_method else fully_qualified_name)


def describe_v1(pool: descriptor_pool.DescriptorPool) -> None:
    """Add the file of v1 to a pool. The library lacks it, but some clients describe every service."""
    alpha = FileDescriptorProto.FromString(reflection_pb2.DESCRIPTOR.serialized_pb)
    renamed = text_format.MessageToString(alpha).replace("v1alpha", "v1")
    pool.AddSerializedFile(text_format.Parse(renamed, FileDescriptorProto()).SerializeToString())


def add_reflection(handlers: Chain, services: list[str]) -> None:
    """Add the reflection service in both versions, whose messages are the same (grpc#38576)."""
    versions = ["grpc.reflection.v1.ServerReflection", "grpc.reflection.v1alpha.ServerReflection"]
    pool = descriptor_pool.Default()
    describe_v1(pool)
    servicer = Reflection([*services, *versions], pool=pool)
    handler = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    handlers.add_generic_rpc_handlers(
        tuple(grpc.method_handlers_generic_handler(version, {METHOD: handler}) for version in versions)
    )
