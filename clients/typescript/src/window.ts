/** A message of a load. The last one has no rows, and finishes the load. */
export interface Batch<Request> {
  readonly request: Request;
  /** Offset of the first row. */
  readonly offset: bigint;
}

const WINDOW_SIZE = 4;

/**
 * The messages of a load that are not acknowledged, oldest first.
 *
 *     | sent, waiting for acks | not sent yet |
 *     ^ oldest                 ^ nextUnsent()
 *
 * A server refuses a message without ending the stream, if a retry can succeed. The messages sent after it then don't
 * follow the last row written, so the server refuses them too. All of them are sent again, once the answers to them,
 * which are stale, have arrived.
 */
export class Window<Request> {
  private readonly batches: Batch<Request>[] = [];
  private sent = 0; // of the messages, by the current stream
  private stale = 0; // answers still to come to messages that will be sent again

  get size(): number {
    return this.batches.length;
  }

  get isFull(): boolean {
    return this.size >= WINDOW_SIZE;
  }

  /** Whether messages can be sent, once there are any. */
  get isOpen(): boolean {
    return this.stale === 0;
  }

  get hasUnsent(): boolean {
    return this.sent < this.size;
  }

  add(batch: Batch<Request>): void {
    this.batches.push(batch);
  }

  /** Return the next message to send, and count it as sent. */
  nextUnsent(): Request {
    this.sent += 1;
    return this.batches[this.sent - 1]!.request;
  }

  /** Begin with a new stream, which has been sent nothing. */
  restart(): void {
    this.sent = this.stale = 0;
  }

  /** Return whether the answer that has arrived is stale, and count it. */
  dropStaleAnswer(): boolean {
    if (this.stale === 0) return false;
    this.stale -= 1;
    return true;
  }

  /** Return whether an answer for this offset is for the oldest message. */
  isFor(offset: bigint): boolean {
    return this.sent > 0 && this.batches[0]!.offset === offset;
  }

  /** Send everything again, after the oldest message was refused. */
  refuse(): void {
    this.stale = this.sent - 1;
    this.sent = 0;
  }

  /** Remove the oldest message, which is settled. */
  acknowledge(): void {
    this.sent -= 1;
    this.batches.shift();
  }
}
