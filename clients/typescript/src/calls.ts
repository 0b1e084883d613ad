/** Typed calls of the services of a contract, on a client of grpc-js. */
import { randomUUID } from "node:crypto";

import {
  clone,
  create,
  fromBinary,
  toBinary,
  type DescMessage,
  type DescMethod,
  type DescMethodBiDiStreaming,
  type DescMethodServerStreaming,
  type DescMethodUnary,
  type DescService,
  type MessageInitShape,
  type MessageShape,
} from "@bufbuild/protobuf";
import {
  Metadata,
  status,
  type ClientDuplexStream,
  type ClientReadableStream,
  type Client as Connection,
  type MetadataOptions,
} from "@grpc/grpc-js";

import { DISCONNECTED, OUTCOME_UNKNOWN, RosterError, errorFromCall, isServiceError } from "./errors.js";

export interface CallOptions {
  /** The deadline, in milliseconds from now. Unary calls have one by default, streams have none. */
  timeoutMs?: number;
  /** Cancels the call, which throws the reason of the signal. */
  signal?: AbortSignal;
  /** Metadata to send, such as `x-request-id`. */
  metadata?: Record<string, string>;
}

/** A method with a request stream. `load` calls it. */
export interface BulkMethod<I extends DescMessage, O extends DescMessage> {
  (options?: CallOptions): ClientDuplexStream<MessageShape<I>, MessageShape<O>>;
  readonly input: I;
  readonly transport: Transport;
}

type Call<M extends DescMethod> =
  M extends DescMethodUnary<infer I, infer O>
    ? (request: MessageInitShape<I>, options?: CallOptions) => Promise<MessageShape<O>>
    : M extends DescMethodServerStreaming<infer I, infer O>
      ? (request: MessageInitShape<I>, options?: CallOptions) => AsyncIterable<MessageShape<O>>
      : M extends DescMethodBiDiStreaming<infer I, infer O>
        ? BulkMethod<I, O>
        : never;

/** A method for each RPC of a service. */
export type ServiceClient<S extends DescService> = { readonly [K in keyof S["method"]]: Call<S["method"][K]> };

/** What the calls of a client share. */
export interface Transport {
  readonly connection: Connection;
  /** The deadline of unary calls without one of their own. */
  readonly timeoutMs: number;
  /** Return the error to throw for the error of a call. */
  explain(error: RosterError, options: CallOptions): Promise<RosterError>;
}

type Writable = MessageShape<DescMessage> & { requestId?: string };

interface Codec {
  readonly path: string;
  readonly serialize: (message: MessageShape<DescMessage>) => Buffer;
  readonly deserialize: (bytes: Buffer) => MessageShape<DescMessage>;
}

/** Return a client of a service. */
export function serviceClient<S extends DescService>(service: S, transport: Transport): ServiceClient<S> {
  const calls = service.methods.map((method) => [method.localName, callOf(method, transport)]);
  return Object.fromEntries(calls) as ServiceClient<S>;
}

function callOf(method: DescMethod, transport: Transport): unknown {
  const { connection, timeoutMs } = transport;
  const codec: Codec = {
    path: `/${method.parent.typeName}/${method.name}`,
    serialize: (message) => bufferOf(toBinary(method.input, message)),
    deserialize: (bytes) => fromBinary(method.output, bytes),
  };
  const { path, serialize, deserialize } = codec;
  switch (method.methodKind) {
    case "unary":
      return async (init: MessageInitShape<DescMessage>, options: CallOptions = {}) => {
        const request = withRequestId(method.input, create(method.input, init));
        return await repeatable(transport, codec, request, { ...options, timeoutMs: options.timeoutMs ?? timeoutMs });
      };
    case "server_streaming":
      return async function* (init: MessageInitShape<DescMessage>, options: CallOptions = {}) {
        const request = create(method.input, init);
        const call = connection.makeServerStreamRequest(
          path, serialize, deserialize, request, ...callArguments(options, { waitForReady: false }),
        );
        yield* responses(call, transport, options);
      };
    default: {
      const open = (options: CallOptions = {}) =>
        connection.makeBidiStreamRequest(
          path, serialize, deserialize, ...callArguments(options, { waitForReady: false }),
        );
      return Object.assign(open, { input: method.input, transport });
    }
  }
}

/** Return a write with its `requestId`, or a copy with a new one. */
function withRequestId(schema: DescMessage, request: Writable): Writable {
  if (!schema.fields.some(({ name }) => name === "request_id") || request.requestId) return request;
  const copied: Writable = clone(schema, request);
  copied.requestId = randomUUID();
  return copied;
}

/** Call a unary method, and once more if the outcome is unknown: the `requestId` makes it safe. */
async function repeatable(
  transport: Transport,
  codec: Codec,
  request: Writable,
  options: CallOptions,
): Promise<MessageShape<DescMessage>> {
  const deadline = deadlineOf(options); // of both attempts
  const attempt = () =>
    translated(transport, options, () => unary(transport.connection, codec, request, options, deadline));
  try {
    return await attempt().catch((error: unknown) => {
      const isUnknown = error instanceof RosterError && error.reason === OUTCOME_UNKNOWN;
      if (isUnknown && request.requestId) return attempt();
      throw error;
    });
  } catch (error) {
    if (error instanceof RosterError && request.requestId && mayBeApplied(error)) {
      error.facts["request_id"] = request.requestId;
    }
    throw error;
  }
}

function mayBeApplied({ code, reason }: RosterError): boolean {
  if ([status.DEADLINE_EXCEEDED, status.UNAVAILABLE, status.CANCELLED].includes(code)) return true;
  return reason === DISCONNECTED || reason === OUTCOME_UNKNOWN;
}

function unary(
  connection: Connection,
  { path, serialize, deserialize }: Codec,
  request: MessageShape<DescMessage>,
  options: CallOptions,
  deadline: Date | undefined,
): Promise<MessageShape<DescMessage>> {
  const { signal } = options;
  return new Promise((resolve, reject) => {
    signal?.throwIfAborted();
    const [metadata, callOptions] = callArguments(options, { waitForReady: true }, deadline);
    const call = connection.makeUnaryRequest(
      path, serialize, deserialize, request, metadata, callOptions, (error, response) => {
        signal?.removeEventListener("abort", cancel);
        if (error) reject(error);
        else resolve(response!);
      },
    );
    const cancel = () => call.cancel();
    signal?.addEventListener("abort", cancel);
  });
}

/** Yield the responses of a call, which is cancelled at the end of the iteration. */
export async function* responses<O>(
  call: ClientReadableStream<O>,
  transport: Transport,
  options: CallOptions,
): AsyncGenerator<O> {
  const cancel = () => call.cancel();
  options.signal?.addEventListener("abort", cancel);
  // After the end of the iteration, nobody else handles the error of the cancelled call.
  call.on("error", () => undefined);
  try {
    options.signal?.throwIfAborted();
    const iterator: AsyncIterator<O> = call[Symbol.asyncIterator]();
    while (true) {
      const next = await translated(transport, options, () => iterator.next());
      if (next.done) return;
      yield next.value;
    }
  } finally {
    options.signal?.removeEventListener("abort", cancel);
    call.cancel();
  }
}

async function translated<T>(transport: Transport, options: CallOptions, work: () => Promise<T>): Promise<T> {
  try {
    return await work();
  } catch (error) {
    options.signal?.throwIfAborted();
    if (!isServiceError(error)) throw error;
    throw await transport.explain(errorFromCall(error), options);
  }
}

function callArguments(
  options: CallOptions,
  metadataOptions: MetadataOptions,
  deadline = deadlineOf(options),
): [Metadata, { deadline?: Date }] {
  const metadata = new Metadata(metadataOptions);
  for (const [name, value] of Object.entries(options.metadata ?? {})) metadata.set(name, value);
  return [metadata, deadline ? { deadline } : {}];
}

function deadlineOf({ timeoutMs }: CallOptions): Date | undefined {
  return timeoutMs === undefined ? undefined : new Date(Date.now() + timeoutMs);
}

/** Return why no server can be reached; undefined if one can be reached. */
export function connectionError(connection: Connection): Promise<string | undefined> {
  const bytes = (buffer: Buffer) => buffer;
  const metadata = new Metadata({ waitForReady: false });
  const deadline = new Date(Date.now() + 200);
  return new Promise((resolve) => {
    // It fails without being sent if there is no connection.
    connection.makeUnaryRequest(
      "/grpc.health.v1.Health/Check", bytes, bytes, Buffer.alloc(0), metadata, { deadline }, (error) => {
        resolve(error?.code === status.UNAVAILABLE ? error.details : undefined);
      },
    );
  });
}

function bufferOf(bytes: Uint8Array): Buffer {
  return Buffer.from(bytes.buffer, bytes.byteOffset, bytes.byteLength);
}
