// Creates a user for each e-mail of the standard input, one on each line. If it was interrupted, run it again with the
// same LOAD_ID and input.
//
//   node dist/load.js ADDRESS LOAD_ID
import { createInterface } from "node:readline";

import { createClient, load, type RosterClient } from "roster-client";
import type { BulkAck } from "roster-client/v1";

async function* users() {
  for await (const email of createInterface({ input: process.stdin })) yield { email };
}

function printAck({ failures, nextOffset }: BulkAck) {
  for (const { offset, reason, field } of failures) console.log(`row ${offset}: ${reason} ${field}`);
  console.log(`${nextOffset} rows are settled`);
}

async function run(client: RosterClient, loadId: string) {
  const summary = await load(client.users.bulkCreateUsers, users(), { options: { loadId }, onAck: printAck });
  console.log(`${summary.created} created, ${summary.failed} failed`);
}

try {
  const [address, loadId] = process.argv.slice(2);
  if (!address || !loadId) throw new Error("usage: load.js ADDRESS LOAD_ID");
  const client = createClient(address);
  await run(client, loadId).finally(() => client.close());
} catch (error) {
  console.error(String(error));
  process.exitCode = 1;
}
