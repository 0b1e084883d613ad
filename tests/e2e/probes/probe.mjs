// Prints what a caller sees: probe.mjs pages|errors|write|cancel|unanswered ADDRESS, or
// probe.mjs wrong|addresses ADDRESS...
import { credentials } from "@grpc/grpc-js";
import { createClient, load, pages } from "roster-client";

const [kind, ...addresses] = process.argv.slice(2);

// An address that begins with "tls:" is called with TLS.
function client(address) {
  const options = address.startsWith("tls:") ? { credentials: credentials.createSsl() } : {};
  return createClient(address.replace("tls:", ""), { timeoutMs: 1_000, ...options });
}

async function print(call) {
  await call.catch(({ message, reason, facts, violations }) => {
    const parts = Object.entries(facts).map(([name, value]) => `${name}=${value}`);
    parts.push(...violations.map(({ field }) => field));
    const said = ["", "DEADLINE_EXCEEDED", "DISCONNECTED"].includes(reason) ? [reason, message] : [reason];
    console.log([...said, ...parts].join(" "));
  });
}

const LOADS = 10; // that are cancelled

/** Rows that never arrive. */
async function* silence() {
  await new Promise((resolve) => setTimeout(resolve, 60_000).unref());
  yield {};
}

if (kind === "addresses") {
  for (const address of addresses) {
    try {
      createClient(address).close();
      console.log("<nil>");
    } catch (error) {
      console.log(error.message);
    }
  }
  process.exit();
}

const clients = addresses.map(client);
if (kind === "pages") {
  for await (const { id } of pages(clients[0].users.listUsers, { pageSize: 2 })) console.log(String(id));
} else if (kind === "errors") {
  const { users } = clients[0];
  await print(users.createUser({ user: { email: "user0@example.org" } }));
  await print(users.createUser({ user: { email: "nobody" } }));
  await print(users.getUser({ key: { case: "id", value: 7n } }));
} else if (kind === "write") {
  await print(clients[0].users.createUser({ user: { email: "ada@example.org" } }, { timeoutMs: undefined }));
} else if (kind === "cancel") {
  for (let number = 0; number < LOADS; number += 1) {
    const signal = AbortSignal.timeout(20);
    const loaded = load(clients[0].users.bulkCreateUsers, silence(), { signal });
    console.log(await loaded.catch((error) => error === signal.reason));
  }
} else if (kind === "unanswered") {
  const aborted = AbortSignal.abort();
  for (const options of [{}, { signal: aborted }]) {
    try {
      for await (const _ of clients[0].users.exportUsers({}, options));
    } catch (error) {
      console.log(error === aborted.reason ? "true" : error.reason);
    }
  }
} else {
  const calls = clients.map(({ users }) => users.createUser({ user: { email: "ada@example.org" } }));
  for (const call of calls) await print(call);
}
clients.forEach((each) => each.close());
