// Makes single calls: a write, an error, an update, and a list page by page.
//
//   node dist/calls.js ADDRESS
import { RosterError, createClient, pages } from "roster-client";

const client = createClient(process.argv[2]!);
try {
  const user = { email: "ada@example.org" };
  const ada = await client.users.createUser({ user });
  console.log(`created user ${ada.id}, version ${ada.version}`);
  try {
    await client.users.createUser({ user });
  } catch (error) {
    if (!(error instanceof RosterError) || error.reason !== "EMAIL_TAKEN") throw error;
    console.log(`user ${error.facts["existing_id"]} has this e-mail`);
  }

  const change = { id: ada.id, fullName: "Ada King", version: ada.version };
  const changed = await client.users.updateUser({ user: change });
  console.log(`${changed.fullName}, version ${changed.version}`);

  const list = { filter: 'email = "ada@example.org"', pageSize: 100 };
  for await (const { email } of pages(client.users.listUsers, list)) console.log(email);
} finally {
  client.close();
}
