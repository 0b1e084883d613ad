/** Client of Roster: calls, pages, loads that resume, and the change feed. */
export { createClient, type ClientOptions, type RosterClient } from "./client.js";
export type { BulkMethod, CallOptions, ServiceClient } from "./calls.js";
export { RosterError, type Violation } from "./errors.js";
export { load, type LoadOptions } from "./load.js";
export { pages } from "./pages.js";
export { watch, type WatchOptions } from "./watch.js";
