// Prints the changes of users. It stores its position in a file, and continues there.
//
//   node dist/feed.js ADDRESS FILE
import { existsSync, readFileSync, renameSync, writeFileSync } from "node:fs";

import { createClient, watch, type RosterClient } from "roster-client";
import { Change_Entity } from "roster-client/v1";

async function run(client: RosterClient, file: string) {
  let token = existsSync(file) ? readFileSync(file, "utf8") : ""; // at first: begin now
  for await (const response of watch(client.changes, { token, entities: [Change_Entity.USERS] })) {
    for (const { change } of response.changes) {
      if (change.case === "user") console.log(`user ${change.value.id} is ${change.value.email}`);
      if (change.case === "deletedUserId") console.log(`user ${change.value} is deleted`);
    }
    if (!token) console.log("watching");
    token = response.token;
    writeFileSync(`${file}.new`, token); // a file that is half written would lose the position
    renameSync(`${file}.new`, file);
  }
}

try {
  const [address, file] = process.argv.slice(2);
  if (!address || !file) throw new Error("usage: feed.js ADDRESS FILE");
  const client = createClient(address);
  await run(client, file).finally(() => client.close());
} catch (error) {
  console.error(String(error));
  process.exitCode = 1;
}
