// Creates a user for each e-mail of the standard input, one on each line. If it was interrupted, run it again with the
// same LOAD_ID and input.
//
//   node dist/load.js ADDRESS LOAD_ID
import { createInterface } from "node:readline";

import { createClient, load } from "roster-client";
import type { BulkAck } from "roster-client/v1";

const [address, loadId] = process.argv.slice(2) as [string, string];
const client = createClient(address);

async function* users() {
  for await (const email of createInterface({ input: process.stdin })) yield { email };
}

function printAck({ failures, nextOffset }: BulkAck) {
  for (const { offset, reason, field } of failures) console.log(`row ${offset}: ${reason} ${field}`);
  console.log(`${nextOffset} rows are settled`);
}

try {
  const summary = await load(client.users.bulkCreateUsers, users(), { options: { loadId }, onAck: printAck });
  console.log(`${summary.created} created, ${summary.failed} failed`);
} finally {
  client.close();
}
