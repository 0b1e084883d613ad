import { setTimeout as sleep } from "node:timers/promises";

import { DISCONNECTED, type RosterError } from "./errors.js";

const FIRST_PAUSE_MS = 250;
const LONGEST_PAUSE_MS = 10_000;
const CONNECT_RETRIES = 4; // until a server has answered: the address may be wrong

/** The waiting times between retries: each is twice the last, with jitter. */
export class Pauses {
  private retries = 0;
  private isAnswered = false;

  /** `maxRetries` limits the retries in a row, once a server has answered. */
  constructor(
    private readonly maxRetries: number,
    private readonly signal: AbortSignal | undefined,
  ) {}

  /** Start again with the shortest pause, after a call has succeeded. */
  reset(): void {
    this.retries = 0;
    this.isAnswered = true;
  }

  /** Sleep before the next retry, or throw the failure if there is none. */
  async wait(failure: RosterError, isRetryable = failure.isRetryable): Promise<void> {
    const maxRetries = this.isAnswered || failure.reason !== DISCONNECTED ? this.maxRetries : CONNECT_RETRIES;
    if (!isRetryable || this.retries >= maxRetries) throw failure;
    const longest = Math.min(FIRST_PAUSE_MS * 2 ** this.retries, LONGEST_PAUSE_MS);
    this.retries += 1;
    const pause = (failure.retryDelayMs ?? 0) + longest * (0.5 + Math.random() / 2);
    await sleep(pause, undefined, { signal: this.signal }).catch(() => this.signal?.throwIfAborted());
  }
}
