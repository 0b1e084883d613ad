// Prints the changes of users. It stores its position in a file, and continues there.
//
//   node dist/feed.js ADDRESS FILE
import { existsSync, readFileSync, renameSync, writeFileSync } from "node:fs";

import { createClient, watch } from "roster-client";
import { Change_Entity } from "roster-client/v1";

const [address, file] = process.argv.slice(2) as [string, string];
const client = createClient(address);
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
