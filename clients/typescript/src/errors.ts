import { fromBinary } from "@bufbuild/protobuf";
import { anyUnpack, durationMs, type Any } from "@bufbuild/protobuf/wkt";
import { status, type ServiceError } from "@grpc/grpc-js";

import { BadRequestSchema, ErrorInfoSchema, RetryInfoSchema } from "./google/rpc/error_details_pb.js";
import { StatusSchema } from "./google/rpc/status_pb.js";

export const OUTCOME_UNKNOWN = "OUTCOME_UNKNOWN";
export const DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED";
export const DISCONNECTED = "DISCONNECTED";

/** The reasons of calls that no server of Roster has answered. */
const REASONS_WITHOUT_ANSWER: Partial<Record<status, string>> = {
  [status.DEADLINE_EXCEEDED]: DEADLINE_EXCEEDED,
  [status.UNAVAILABLE]: DISCONNECTED,
  [status.CANCELLED]: DISCONNECTED, // by a server that is stopping, or by a proxy
  [status.INTERNAL]: DISCONNECTED,
  [status.UNKNOWN]: DISCONNECTED,
};

/** An invalid field of a request: its path, and a sentence. */
export interface Violation {
  readonly field: string;
  readonly message: string;
}

/** Why a call failed. All functions of this package throw it. */
export class RosterError extends Error {
  override readonly name = "RosterError";

  /**
   * For programs to switch on, such as "EMAIL_TAKEN". If no server of Roster has answered, it is "DEADLINE_EXCEEDED" if
   * the call timed out, "DISCONNECTED" if no server was reached or the connection broke, and "" for other errors.
   */
  readonly reason: string;

  /**
   * The metadata of the error, such as `existing_id`. For a write that may have been applied, they have the
   * `request_id` with which it is safe to repeat it.
   */
  readonly facts: Record<string, string> = {};

  /** The invalid fields of the request. */
  readonly violations: readonly Violation[] = [];

  /** The shortest time to wait before another attempt, in milliseconds; undefined if the server has not set one. */
  readonly retryDelayMs: number | undefined;

  constructor(
    /** The code of the gRPC status. */
    readonly code: status,
    message: string,
    details: readonly Any[] = [],
  ) {
    super(message);
    this.reason = REASONS_WITHOUT_ANSWER[code] ?? "";
    for (const detail of details) {
      const info = anyUnpack(detail, ErrorInfoSchema);
      const invalid = anyUnpack(detail, BadRequestSchema);
      const retry = anyUnpack(detail, RetryInfoSchema);
      if (info) {
        this.reason = info.reason;
        this.facts = { ...info.metadata };
      }
      if (invalid) {
        this.violations = invalid.fieldViolations.map(({ field, description }) => ({ field, message: description }));
      }
      if (retry?.retryDelay) this.retryDelayMs = durationMs(retry.retryDelay);
    }
  }

  /** Whether repeating the call can succeed. */
  get isRetryable(): boolean {
    if (this.retryDelayMs !== undefined || this.code === status.UNAVAILABLE) return true;
    return this.reason === DISCONNECTED || this.reason === OUTCOME_UNKNOWN;
  }
}

/** Return the error of a failed call. */
export function errorFromCall({ code, details, metadata }: ServiceError): RosterError {
  const [packed] = metadata.get("grpc-status-details-bin");
  if (!(packed instanceof Buffer)) return new RosterError(code, details);
  const { message, details: unpacked } = fromBinary(StatusSchema, packed);
  return new RosterError(code, message, unpacked);
}

/** Return an error of the client, which a retry may fix. */
export function unavailable(message: string): RosterError {
  return new RosterError(status.UNAVAILABLE, message);
}

export function isServiceError(error: unknown): error is ServiceError {
  return error instanceof Error && "code" in error && "metadata" in error && "details" in error;
}
