// Follows the change feed with a cache, a search index or a mirror of the users.
//
//   node consumer.mjs cache|index|mirror ADDRESS FOLDER PROTO_FOLDER...
//
// It reads ids, or words for the index, one on each line, and prints what it has for each. Kill it at any
// time and run it again: the index and the mirror continue where they were.
import { createInterface } from "node:readline/promises";
import { setTimeout as sleep } from "node:timers/promises";
import { promisify } from "node:util";

import grpc from "@grpc/grpc-js";
import loader from "@grpc/proto-loader";
import { ClassicLevel } from "classic-level";

const [kind, address, folder, ...includeDirs] = process.argv.slice(2);
const files = ["roster/v1/changes.proto", "roster/v1/users.proto", "google/rpc/error_details.proto"];
const definition = loader.loadSync(files, {
  includeDirs, keepCase: true, longs: String, enums: String, oneofs: true, defaults: true,
});
const { ChangeService, UserService } = grpc.loadPackageDefinition(definition).roster.v1;
const options = { "grpc.keepalive_time_ms": 30_000, "grpc.keepalive_timeout_ms": 10_000 };
const feed = new ChangeService(address, grpc.credentials.createInsecure(), options);
const users = new UserService(address, grpc.credentials.createInsecure(), options);
const getUser = promisify(users.GetUser).bind(users);

const { UNAVAILABLE, CANCELLED, DEADLINE_EXCEEDED, RESOURCE_EXHAUSTED, INTERNAL, UNKNOWN, NOT_FOUND } = grpc.status;
const RETRYABLE = [UNAVAILABLE, CANCELLED, DEADLINE_EXCEEDED, RESOURCE_EXHAUSTED, INTERNAL, UNKNOWN];
const SILENCE_MS = 35_000; // the server sends a response every 10 s
const FRESH_MS = 30_000;

// A copy of the users in LevelDB. No batch stores rows without the token that belongs to them.
class Store {
  constructor() {
    this.db = new ClassicLevel(folder, { valueEncoding: "json" });
  }

  // Returns the stored token; without one, copies all users first.
  async begin() {
    let token = await this.db.get("token");
    if (token !== undefined) return token;
    await this.db.clear();
    for await (const response of users.ExportUsers({})) {
      token ??= response.watch_token; // of the first message
      const edits = await Promise.all(response.users.map((user) => this.edits(user.id, user)));
      await this.db.batch(edits.flat());
    }
    if (!token) { // it would mean now, and changes since the export would be missing
      throw new Error("the server has no change feed: its exports have no watch_token");
    }
    await this.db.put("token", token);
    return token;
  }

  // Applies changes in the order received, and stores the token, in one batch. No row is in it twice.
  async apply({ changes, token }) {
    const edits = await Promise.all(
      changes.map((change) => this.edits(change.user?.id ?? change.deleted_user_id, change.user)),
    );
    await this.db.batch([...edits.flat(), { type: "put", key: "token", value: token }]);
  }

  // Forgets the token: the next beginning is an export.
  async clear() {
    await this.db.del("token");
  }
}

// All users. The id is the only key, because two users can trade their e-mails.
class Mirror extends Store {
  async edits(id, user) {
    return [user ? { type: "put", key: `user:${id}`, value: user } : { type: "del", key: `user:${id}` }];
  }

  async ask(id) {
    const user = await this.db.get(`user:${id}`);
    return user ? (user.full_name ?? "") : "-";
  }
}

// The ids of users by the words of their names. It stores the words of each user, to find those to delete.
class Index extends Store {
  async edits(id, user) {
    const old = (await this.db.get(`words:${id}`)) ?? [];
    const words = [...new Set(user?.full_name?.toLowerCase().match(/[\p{L}\p{N}]+/gu))];
    return [
      ...old.map((word) => ({ type: "del", key: `word:${word}:${id}` })),
      ...words.map((word) => ({ type: "put", key: `word:${word}:${id}`, value: id })),
      user ? { type: "put", key: `words:${id}`, value: words } : { type: "del", key: `words:${id}` },
    ];
  }

  async ask(word) {
    const key = `word:${word.toLowerCase()}`;
    const ids = await this.db.values({ gt: `${key}:`, lt: `${key};` }).all();
    return ids.sort((a, b) => a - b).join(" ") || "-";
  }
}

// Users that were read before, in memory. A change drops its user; the next question reads it again.
class Cache {
  constructor() {
    this.clear();
  }

  // Returns the last token, "" to begin now: a cache that is empty has missed nothing.
  begin() {
    return this.token;
  }

  apply({ changes, token }) {
    for (const change of changes) {
      const id = change.user?.id ?? change.deleted_user_id;
      this.names.delete(id);
      this.reads.delete(id); // its result may be older than this change
    }
    [this.token, this.heardAt] = [token, performance.now()];
  }

  clear() {
    [this.token, this.heardAt, this.names, this.reads] = ["", -FRESH_MS, new Map(), new Map()];
  }

  async ask(id) {
    // Without responses it does not know what has changed. Before the first one, changes are not reported.
    const isFresh = performance.now() - this.heardAt < FRESH_MS;
    if (isFresh && this.names.has(id)) return `hit ${this.names.get(id)}`;
    const read = Symbol();
    if (isFresh) this.reads.set(id, read);
    const name = await getUser({ id }).then((user) => user.full_name ?? "", (error) => {
      if (error.code !== NOT_FOUND) throw error;
      return "-";
    });
    if (this.reads.get(id) === read) { // no change has arrived since the read began
      this.names.set(id, name);
      this.reads.delete(id);
    }
    return `miss ${name}`;
  }
}

// Yields responses from a token on. A server that sends nothing counts as lost: a proxy may hide that it is.
async function* watch(token) {
  const call = feed.WatchChanges({ entities: ["USERS"], token });
  const timer = setTimeout(() => call.cancel(), SILENCE_MS);
  try {
    for await (const response of call) {
      yield response;
      timer.refresh();
    }
  } finally {
    clearTimeout(timer);
    call.cancel();
  }
}

function reason(error) {
  const [packed] = error.metadata?.get("grpc-status-details-bin") ?? [];
  if (!packed) return "";
  const { details } = definition["google.rpc.Status"].deserialize(packed);
  const info = details.find(({ type_url }) => type_url.endsWith("google.rpc.ErrorInfo"));
  return info ? definition["google.rpc.ErrorInfo"].deserialize(info.value).reason : "";
}

// Applies changes for ever.
async function follow(sink) {
  for (let pause = 250; ; ) {
    try {
      for await (const response of watch(await sink.begin())) {
        await sink.apply(response);
        pause = 250;
      }
    } catch (error) {
      if (["FEED_RESET", "TOKEN_EXPIRED"].includes(reason(error))) {
        await sink.clear();
        continue;
      }
      if (!RETRYABLE.includes(error.code)) throw error;
      console.error(`${error.details}; trying again`);
      await sleep(pause * (0.5 + Math.random() / 2));
      pause = Math.min(pause * 2, 10_000);
    }
  }
}

const sink = new { cache: Cache, index: Index, mirror: Mirror }[kind]();
follow(sink).catch((error) => {
  console.error(error);
  process.exit(1);
});
for await (const question of createInterface({ input: process.stdin })) {
  console.log(await sink.ask(question));
}
process.exit();
