// Makes single calls: a write that can be repeated, an error, an update, and a list page by page.
//
//   node dist/calls.js ADDRESS
import { RosterError, createClient, pages, type RosterClient } from "roster-client";
import { BulkOptions_OnConflict } from "roster-client/v1";

async function run({ users }: RosterClient) {
  const user = { email: "ada@example.org" };
  // With SKIP, a user who has the e-mail is returned, so that the program can run again.
  const ada = await users.createUser({ user, onConflict: BulkOptions_OnConflict.SKIP });
  console.log(`user ${ada.id}, version ${ada.version}`);
  try {
    await users.createUser({ user }); // by default, the e-mail must be free
  } catch (error) {
    if (!(error instanceof RosterError) || error.reason !== "EMAIL_TAKEN") throw error;
    console.log(`user ${error.facts["existing_id"]} has this e-mail`);
  }

  const change = { id: ada.id, fullName: "Ada King", version: ada.version };
  const changed = await users.updateUser({ user: change });
  console.log(`${changed.fullName}, version ${changed.version}`);

  const list = { filter: 'email = "ada@example.org"', pageSize: 100 };
  for await (const { email } of pages(users.listUsers, list)) console.log(email);
}

try {
  const [address] = process.argv.slice(2);
  if (!address) throw new Error("usage: calls.js ADDRESS");
  const client = createClient(address);
  await run(client).finally(() => client.close());
} catch (error) {
  console.error(String(error));
  process.exitCode = 1;
}
