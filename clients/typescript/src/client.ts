import type { DescService } from "@bufbuild/protobuf";
import {
  Client as Connection,
  connectivityState,
  credentials as channelCredentials,
  status,
  type ChannelCredentials,
  type ClientOptions as ConnectionOptions,
} from "@grpc/grpc-js";

import { checkAddress } from "./address.js";
import { connectionError, serviceClient, type ServiceClient, type Transport } from "./calls.js";
import { DEADLINE_EXCEEDED, DISCONNECTED, RosterError } from "./errors.js";
import { BulkService } from "./roster/v1/bulk_pb.js";
import { ChangeService } from "./roster/v1/changes_pb.js";
import { PostService } from "./roster/v1/posts_pb.js";
import { UserService } from "./roster/v1/users_pb.js";

const TIMEOUT_MS = 10_000;
const MAX_MESSAGE_BYTES = 16 << 20;
const SERVICES: readonly DescService[] = [UserService, PostService, BulkService, ChangeService];

export interface ClientOptions {
  /** By default, the connection is not encrypted. */
  credentials?: ChannelCredentials;
  /** The deadline of unary calls without one of their own; 10 s by default. */
  timeoutMs?: number;
  /** Options of grpc-js; they take precedence over those set here. */
  connection?: ConnectionOptions;
}

export interface RosterClient {
  readonly users: ServiceClient<typeof UserService>;
  readonly posts: ServiceClient<typeof PostService>;
  readonly bulk: ServiceClient<typeof BulkService>;
  readonly changes: ServiceClient<typeof ChangeService>;
  /** What the calls use, for other services. */
  readonly connection: Connection;
  /** Close the connection, after the calls in progress. */
  close(): void;
}

/**
 * Return a client of the servers at `host:port`, `dns:///name:port` or `unix:/path`. It connects with the first call.
 *
 * If a name has several addresses, calls go to each in turn. Unary calls wait for a server within their deadline.
 * Calls whose server goes away are retried, up to 5 attempts; bulk streams are not (see `load`). A write without a
 * `requestId` gets one, so that it is applied once. Keepalive pings are sent every 30 s. Messages are limited to
 * 16 MiB. Calls throw RosterError. An address that is something else, such as a URL, throws a TypeError that says how
 * to write it.
 */
export function createClient(address: string, options: ClientOptions = {}): RosterClient {
  const target = checkAddress(address);
  const { credentials = channelCredentials.createInsecure(), timeoutMs = TIMEOUT_MS } = options;
  const connection = new Connection(target, credentials, {
    "grpc.service_config": JSON.stringify(serviceConfig()),
    "grpc.max_send_message_length": MAX_MESSAGE_BYTES,
    "grpc.max_receive_message_length": MAX_MESSAGE_BYTES,
    // The server allows one ping every 5 s, between calls too.
    "grpc.keepalive_time_ms": 30_000,
    "grpc.keepalive_timeout_ms": 10_000,
    "grpc.keepalive_permit_without_calls": 1,
    // By default it may take 2 minutes to reconnect to a server that was away.
    "grpc.initial_reconnect_backoff_ms": 200,
    "grpc.max_reconnect_backoff_ms": 1_000,
    "grpc.dns_min_time_between_resolutions_ms": 1_000,
    "grpc.enable_http_proxy": 0,
    ...options.connection,
  });
  const transport: Transport = {
    connection,
    timeoutMs,
    explain: (error, { timeoutMs }) => explain(error, target, connection, timeoutMs),
  };
  return {
    users: serviceClient(UserService, transport),
    posts: serviceClient(PostService, transport),
    bulk: serviceClient(BulkService, transport),
    changes: serviceClient(ChangeService, transport),
    connection,
    close: () => connection.close(),
  };
}

/** Return a gRPC service config (https://grpc.io/docs/guides/service-config/): balancing and retries. */
function serviceConfig(): object {
  // Request streams are left out: gRPC would repeat messages without the sender's knowledge.
  const name = SERVICES.flatMap((service) =>
    service.methods
      .filter(({ methodKind }) => methodKind === "unary" || methodKind === "server_streaming")
      .map((method) => ({ service: service.typeName, method: method.name })),
  );
  const retryPolicy = {
    maxAttempts: 5,
    initialBackoff: "0.1s",
    maxBackoff: "2s",
    backoffMultiplier: 2,
    // A server that is stopping cancels the calls that it has accepted but not started.
    retryableStatusCodes: ["UNAVAILABLE", "CANCELLED"],
  };
  return { loadBalancingConfig: [{ round_robin: {} }], methodConfig: [{ name, retryPolicy }] };
}

/** Return the error of a call. If no server has answered, its message has the address and the cause. */
async function explain(
  error: RosterError,
  address: string,
  connection: Connection,
  timeoutMs: number | undefined,
): Promise<RosterError> {
  const isUnreachable = error.reason === DISCONNECTED && error.code === status.UNAVAILABLE;
  if (error.reason !== DEADLINE_EXCEEDED && !isUnreachable) return error;
  const state = connection.getChannel().getConnectivityState(false);
  if (state === connectivityState.READY) {
    if (error.code === status.UNAVAILABLE) return error;
    return new RosterError(error.code, `${address} did not answer within ${timeoutMs} ms`);
  }
  const cause = (await connectionError(connection)) ?? (error.code === status.UNAVAILABLE ? error.message : "");
  const problem = cause ? `: ${describe(cause)}` : ` within ${timeoutMs} ms`;
  return new RosterError(error.code, `no server answers at ${address}${problem}`);
}

/** Return what a message of grpc-js says about a connection, and what it means. */
function describe(message: string): string {
  const [error = ""] = message.split("Last error: ").slice(-1); // errors quote others
  const cause = error
    .replace(/\. Resolution note:[^]*$/, "")
    .replace(/ \(\d{4}-[^)]*\)$/, "")
    .replace(/^(Error: )?([^]*SSL routines:[^:]*:([^:]*)[^]*)?/, "$3");
  if (/Protocol error|Failed to connect/.test(cause)) return `${cause} (it expects TLS, or is not a gRPC server)`;
  if (/wrong version number/.test(cause)) return `${cause} (it does not speak TLS)`;
  return cause;
}
