"""Exit with 0 if the server in this container is ready for calls. Docker's health check runs this."""  # noqa: INP001

import os
import sys

import grpc
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub

port = os.environ["ROSTER_HEALTH_LISTEN"].rpartition(":")[2]
try:
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        answer = HealthStub(channel).Check(HealthCheckRequest(), timeout=3)
except grpc.RpcError as error:
    sys.exit(f"no answer: {error.code()}")
if answer.status != HealthCheckResponse.SERVING:
    sys.exit("not ready; the server's log says why")
