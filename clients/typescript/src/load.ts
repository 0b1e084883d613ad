import { randomUUID } from "node:crypto";

import {
  create,
  toBinary,
  type DescField,
  type DescMessage,
  type MessageInitShape,
  type MessageShape,
} from "@bufbuild/protobuf";
import type { ClientDuplexStream } from "@grpc/grpc-js";

import { responses, type BulkMethod } from "./calls.js";
import { RosterError, unavailable } from "./errors.js";
import { Pauses } from "./pauses.js";
import {
  BulkLoad_State,
  BulkOptionsSchema,
  type BulkAck,
  type BulkOpened,
  type BulkOptions,
  type BulkSummary,
  type BulkWriteResponse,
  type BulkWriteResponseSchema,
} from "./roster/v1/bulk_pb.js";
import { Window, type Batch } from "./window.js";

const MAX_RETRIES = 20; // about two minutes
const ROW_FRAMING_BYTES = 6; // a tag, and a length below 4 GiB
const MESSAGE_FRAMING_BYTES = 64;

export interface LoadOptions {
  /** By default, the load gets a random `loadId`. */
  options?: MessageInitShape<typeof BulkOptionsSchema>;
  /** Is called with the ack of each message, in order. The next one waits for the end of its promise. */
  onAck?: (ack: BulkAck) => void | Promise<void>;
  /** Ends the load, which stays open and throws the reason of the signal. */
  signal?: AbortSignal;
}

/** The fields of a message of a bulk method. */
interface BulkFields {
  options?: unknown;
  offset?: bigint;
  finish?: boolean;
}

/** The name of the field with the rows of a message, `users` or `posts`. */
type RowsField<I extends DescMessage> = Exclude<keyof MessageInitShape<I>, keyof BulkFields | `$${string}`>;

/** A row of a message. */
export type Row<I extends DescMessage> =
  NonNullable<MessageInitShape<I>[RowsField<I>]> extends readonly (infer R)[] ? R : never;

/**
 * Send rows through a bulk method, such as `client.users.bulkCreateUsers`, each exactly once, and return the summary.
 *
 * Each message of up to 5,000 rows is answered by an ack, whose failures list the rows that were not written, and why.
 * An exception of the rows or of `onAck` ends the load, which stays open.
 *
 * Messages that the server refuses with a retryable error are sent again, with increasing pauses, and a stream that
 * breaks is opened again, up to 20 times in a row without progress; if no server has answered yet, 4 times. At most 4
 * messages are in memory.
 *
 * A load that was interrupted is continued by another call with the same `loadId`, options and rows, in the same
 * order: rows that are settled are skipped, and `client.bulk.listBulkLoadFailures` returns their failures. With
 * `returnIds` they are sent again instead, so that each row has its ack, with its first outcome.
 */
export async function load<I extends DescMessage>(
  method: BulkMethod<I, typeof BulkWriteResponseSchema>,
  rows: AsyncIterable<Row<I>> | Iterable<Row<I>>,
  { options = {}, onAck = () => undefined, signal }: LoadOptions = {},
): Promise<BulkSummary> {
  const bulkOptions = create(BulkOptionsSchema, { ...options });
  if (!bulkOptions.loadId && !bulkOptions.validateOnly) bulkOptions.loadId = randomUUID();
  const batches = new Batches(method.input, rows);
  try {
    return await new Loader(method, bulkOptions, batches, onAck, signal).run();
  } finally {
    await batches.close();
  }
}

/** An exception of the rows or of `onAck`, or a refusal that ends the load. */
class Ending {
  constructor(readonly cause: unknown) {}
}

/** Runs one load, over one or more streams. */
class Loader<I extends DescMessage> {
  private readonly window = new Window<MessageShape<I>>();
  private readonly pauses: Pauses;
  private isStarted = false;

  constructor(
    private readonly method: BulkMethod<I, typeof BulkWriteResponseSchema>,
    private readonly options: BulkOptions,
    private readonly batches: Batches<I>,
    private readonly onAck: NonNullable<LoadOptions["onAck"]>,
    private readonly signal: AbortSignal | undefined,
  ) {
    this.pauses = new Pauses(MAX_RETRIES, signal);
  }

  async run(): Promise<BulkSummary> {
    while (true) {
      try {
        return await this.stream();
      } catch (error) {
        if (error instanceof Ending) throw error.cause;
        // A load that only validates is not stored, so it can't be resumed.
        if (!(error instanceof RosterError) || this.options.validateOnly) throw error;
        await this.pauses.wait(error);
      }
    }
  }

  /** Run one stream until the summary. */
  private async stream(): Promise<BulkSummary> {
    this.signal?.throwIfAborted();
    const { method, signal } = this;
    this.window.restart();
    const call = method();
    const answers = responses(call, method.transport, signal ? { signal } : {});
    call.write(this.batches.message({ options: this.options }));
    for await (const { event } of answers) {
      if (event.case === "opened" && !this.isStarted) {
        this.isStarted = true;
        this.batches.start(event.value, this.options.returnIds);
        this.pauses.reset();
      }
      if (event.case === "ack") await this.acknowledge(event.value);
      // A summary ends the load only if it is FINISHED (a server that stops sends one too) and nothing but the finish
      // message is pending: if a message was refused that an earlier stream had recorded, the acks of those after it
      // are still to come.
      if (event.case === "summary" && event.value.state === BulkLoad_State.FINISHED && this.window.size <= 1) {
        return event.value;
      }
      await this.send(call);
    }
    throw unavailable("the server ended the stream without a summary");
  }

  private async acknowledge(ack: BulkAck): Promise<void> {
    if (this.window.dropStaleAnswer()) return;
    if (!this.window.isFor(ack.offset)) throw unavailable(`the server sent an unexpected ack for row ${ack.offset}`);
    if (ack.error) {
      const { code, message, details } = ack.error;
      // A refusal does not end the stream, so another stream does not help.
      await ending(() => this.pauses.wait(new RosterError(code, message, details)));
      this.window.refuse();
      return;
    }
    this.window.acknowledge();
    this.pauses.reset();
    await ending(() => this.onAck(ack));
  }

  /** Send what the window has, and fill it. */
  private async send(call: ClientDuplexStream<MessageShape<I>, BulkWriteResponse>): Promise<void> {
    while (this.window.isOpen) {
      if (!this.window.hasUnsent) {
        const batch = this.window.isFull ? undefined : await ending(() => this.nextBatch());
        if (!batch) return;
        this.window.add(batch);
      }
      call.write(this.window.nextUnsent());
    }
  }

  private async nextBatch(): Promise<Batch<MessageShape<I>> | undefined> {
    this.signal?.throwIfAborted();
    return await unlessAborted(this.batches.next(), this.signal);
  }
}

/** Return the result of some work, or throw the reason of the signal once it is aborted. */
async function unlessAborted<T>(work: Promise<T>, signal: AbortSignal | undefined): Promise<T> {
  if (!signal) return await work;
  let abort = () => {};
  const aborted = new Promise<never>((_, reject) => (abort = () => reject(signal.reason)));
  signal.addEventListener("abort", abort);
  try {
    return await Promise.race([work, aborted]);
  } finally {
    signal.removeEventListener("abort", abort);
  }
}

async function ending<T>(work: () => T | Promise<T>): Promise<T> {
  try {
    return await work();
  } catch (error) {
    throw new Ending(error);
  }
}

/** Cuts rows into messages that are as large as allowed. */
class Batches<I extends DescMessage> {
  private readonly field: DescField & { message: DescMessage };
  private readonly rows: AsyncIterator<Row<I>> | Iterator<Row<I>>;
  private row: Row<I> | undefined; // that did not fit into the last message
  private read = 0; // rows of the source, the one that did not fit included
  private isCut = false; // the message that finishes the load was returned
  private isReading = false; // a row that has not arrived
  private offset = 0;
  private maxRows = 0;
  private maxBytes = 0;

  constructor(
    private readonly input: I,
    rows: AsyncIterable<Row<I>> | Iterable<Row<I>>,
  ) {
    const field = input.fields.find(({ fieldKind }) => fieldKind === "list");
    if (!field?.message) throw new TypeError(`${input.typeName} is not a message of a bulk method`);
    this.field = field as DescField & { message: DescMessage };
    this.rows = Symbol.asyncIterator in rows ? rows[Symbol.asyncIterator]() : rows[Symbol.iterator]();
  }

  message(fields: BulkFields): MessageShape<I> {
    return create(this.input, fields as MessageInitShape<I>);
  }

  /** Begin at the first row that is not settled, or at the first one. */
  start({ nextOffset, maxRows, maxBytes }: BulkOpened, fromFirst: boolean): void {
    this.offset = fromFirst ? 0 : Number(nextOffset);
    this.maxRows = maxRows;
    this.maxBytes = maxBytes;
  }

  /** Return the next message; the one that finishes the load after the last row, and then undefined. */
  async next(): Promise<Batch<MessageShape<I>> | undefined> {
    if (this.isCut) return undefined;
    const rows: MessageShape<DescMessage>[] = [];
    let size = MESSAGE_FRAMING_BYTES;
    while (rows.length < this.maxRows) {
      const init = await this.nextRow();
      if (init === undefined) break;
      if (this.read <= this.offset) continue;
      const row = create(this.field.message, init as MessageInitShape<DescMessage>);
      size += toBinary(this.field.message, row).length + ROW_FRAMING_BYTES;
      if (rows.length && size > this.maxBytes) {
        this.row = init;
        break;
      }
      rows.push(row);
    }
    if (this.read < this.offset) {
      throw new RangeError(`the source has only ${this.read} rows, but the load already has ${this.offset}`);
    }
    const offset = BigInt(this.offset);
    this.offset += rows.length;
    this.isCut = rows.length === 0;
    const content = this.isCut ? { finish: true } : { [this.field.localName]: rows };
    return { offset, request: this.message({ offset, ...content }) };
  }

  private async nextRow(): Promise<Row<I> | undefined> {
    if (this.row !== undefined) {
      const row = this.row;
      this.row = undefined;
      return row;
    }
    this.isReading = true;
    const { done, value } = await this.rows.next();
    this.isReading = false;
    if (done) return undefined;
    this.read += 1;
    return value;
  }

  /** End the iteration of the rows. */
  async close(): Promise<void> {
    const ended = Promise.resolve(this.rows.return?.());
    // A generator ends only after the row that it waits for.
    if (this.isReading) ended.catch(() => undefined);
    else await ended;
  }
}
