import type { ServiceClient } from "./calls.js";
import { RosterError, unavailable } from "./errors.js";
import { Pauses } from "./pauses.js";
import type { Change_Entity, ChangeService, WatchChangesResponse } from "./roster/v1/changes_pb.js";

// The server sends a response at least every 10 s. A proxy may keep a connection to a server that is gone.
const SILENCE_MS = 35_000;

export interface WatchOptions {
  /** Where to begin: the token of a response or of an export. By default, the watch begins now. */
  token?: string;
  /** What to report; by default everything. */
  entities?: Change_Entity[];
  /** Ends the watch, which throws the reason of the signal. */
  signal?: AbortSignal;
}

/**
 * Yield the responses of the change feed, without end.
 *
 * Store the changes of a response together with its token before you ask for the next one, then no change is lost or
 * applied to an older state: after a restart, pass the stored token.
 *
 * A watch that breaks with an error that a retry can fix continues with the last token, after a pause. There is no
 * limit to the retries, but if no server has answered yet, it gives up after a few seconds: the address may be wrong.
 * Other errors are thrown. After the reasons FEED_RESET and TOKEN_EXPIRED, make a new copy from an export.
 */
export async function* watch(
  changes: ServiceClient<typeof ChangeService>,
  { token = "", entities = [], signal }: WatchOptions = {},
): AsyncGenerator<WatchChangesResponse> {
  const pauses = new Pauses(Infinity, signal);
  while (true) {
    const silence = new Silence();
    try {
      const signals = signal ? AbortSignal.any([signal, silence.signal]) : silence.signal;
      const responses = changes.watchChanges({ entities, token }, { signal: signals });
      for await (const response of responses) {
        silence.end();
        token = response.token;
        pauses.reset();
        yield response;
        silence.begin();
      }
      throw unavailable("the server ended the watch without an error");
    } catch (error) {
      signal?.throwIfAborted();
      if (!(error instanceof RosterError)) throw error;
      // After a statement timeout, the next statement may be faster.
      await pauses.wait(error, error.isRetryable || error.reason === "STATEMENT_TIMEOUT");
    } finally {
      silence.end();
    }
  }
}

/** Aborts a signal if nothing ends it in time. */
class Silence {
  private readonly controller = new AbortController();
  private timer!: NodeJS.Timeout;

  constructor() {
    this.begin();
  }

  get signal(): AbortSignal {
    return this.controller.signal;
  }

  begin(): void {
    const lost = unavailable(`the server has sent nothing for ${SILENCE_MS / 1000} s`);
    this.timer = setTimeout(() => this.controller.abort(lost), SILENCE_MS);
  }

  end(): void {
    clearTimeout(this.timer);
  }
}
