// Follows the change feed with a cache, a search index or a mirror of the users.
//
//   node consumer.mjs cache|index|mirror ADDRESS FOLDER
//
// It reads ids, or words for the index, one on each line, and prints what it has for each. Kill it at any
// time and run it again: the index and the mirror continue where they were.
import { createInterface } from "node:readline/promises";
import { setTimeout as sleep } from "node:timers/promises";

import { toJson } from "@bufbuild/protobuf";
import { ClassicLevel } from "classic-level";
import { RosterError, createClient, watch } from "roster-client";
import { Change_Entity, UserSchema } from "roster-client/v1";

const [kind, address, folder] = process.argv.slice(2);
const { users, changes } = createClient(address);
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
    for await (const response of users.exportUsers({})) {
      token ??= response.watchToken; // of the first message
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
      changes.map(({ change: { case: kind, value } }) =>
        kind === "user" ? this.edits(value.id, value) : this.edits(value)),
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
    const key = `user:${id}`;
    return [user ? { type: "put", key, value: toJson(UserSchema, user) } : { type: "del", key }];
  }

  async ask(id) {
    const user = await this.db.get(`user:${id}`);
    return user ? (user.fullName ?? "") : "-";
  }
}

// The ids of users by the words of their names. It stores the words of each user, to find those to delete.
class Index extends Store {
  async edits(id, user) {
    const old = (await this.db.get(`words:${id}`)) ?? [];
    const words = [...new Set(user?.fullName?.toLowerCase().match(/[\p{L}\p{N}]+/gu))];
    return [
      ...old.map((word) => ({ type: "del", key: `word:${word}:${id}` })),
      ...words.map((word) => ({ type: "put", key: `word:${word}:${id}`, value: String(id) })),
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
    for (const { change } of changes) {
      const id = change.case === "user" ? change.value.id : change.value;
      this.names.delete(id);
      this.reads.delete(id); // its result may be older than this change
    }
    [this.token, this.heardAt] = [token, performance.now()];
  }

  clear() {
    [this.token, this.heardAt, this.names, this.reads] = ["", -FRESH_MS, new Map(), new Map()];
  }

  async ask(question) {
    const id = BigInt(question);
    // Without responses it does not know what has changed. Before the first one, changes are not reported.
    const isFresh = performance.now() - this.heardAt < FRESH_MS;
    if (isFresh && this.names.has(id)) return `hit ${this.names.get(id)}`;
    const read = Symbol();
    if (isFresh) this.reads.set(id, read);
    const name = await users.getUser({ key: { case: "id", value: id } }).then(
      (user) => user.fullName ?? "",
      (error) => {
        if (error.reason !== "USER_NOT_FOUND") throw error;
        return "-";
      },
    );
    if (this.reads.get(id) === read) { // no change has arrived since the read began
      this.names.set(id, name);
      this.reads.delete(id);
    }
    return `miss ${name}`;
  }
}

// Applies changes for ever.
async function follow(sink) {
  while (true) {
    try {
      const token = await sink.begin();
      for await (const response of watch(changes, { token, entities: [Change_Entity.USERS] })) {
        await sink.apply(response);
      }
    } catch (error) {
      if (!(error instanceof RosterError)) throw error;
      if (["FEED_RESET", "TOKEN_EXPIRED"].includes(error.reason)) {
        await sink.clear();
      } else if (error.isRetryable) {
        console.error(`${error.message}; trying again`);
        await sleep(1_000);
      } else {
        throw error;
      }
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
