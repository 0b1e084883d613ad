// Calls one RPC: node call.mjs ADDRESS SERVICE/METHOD PROTO_FOLDER...
// Standard input has the requests, one JSON object a line; each answer is printed as one line of JSON.
// A call that fails prints its google.rpc.Status as JSON to standard error.
import { readFileSync } from "node:fs";
import { promisify } from "node:util";

import grpc from "@grpc/grpc-js";
import loader from "@grpc/proto-loader";

const [address, path, ...includeDirs] = process.argv.slice(2);
const [serviceName, name] = path.split("/");
const files = ["roster/v1/users.proto", "roster/v1/posts.proto", "google/rpc/error_details.proto"];
const definition = loader.loadSync(files, { includeDirs, keepCase: true, longs: String, enums: String });
const [, , service] = serviceName.split(".");
const Service = grpc.loadPackageDefinition(definition).roster.v1[service];

async function* answers(client, messages) {
  const { requestStream, responseStream } = Service.service[name];
  if (!responseStream) {
    yield await promisify(client[name]).call(client, messages[0]);
    return;
  }
  const call = requestStream ? client[name]() : client[name](messages[0]);
  if (requestStream) {
    messages.forEach((message) => call.write(message));
    call.end();
  }
  yield* call;
}

function status(error) {
  const [packed] = error.metadata?.get("grpc-status-details-bin") ?? [];
  if (!packed) throw error; // not one of the server's
  const { code, message, details } = definition["google.rpc.Status"].deserialize(packed);
  return { code, message, details: details.map(unpacked) };
}

function unpacked({ type_url, value }) {
  return { "@type": type_url, ...definition[type_url.split("/").pop()].deserialize(value) };
}

function timesAsText(field, value) {
  if (!field.endsWith("_at")) return value;
  const { seconds = 0, nanos = 0 } = value; // those of zero are left out
  return new Date(seconds * 1000 + nanos / 1e6).toISOString();
}

const client = new Service(address, grpc.credentials.createInsecure());
const messages = readFileSync(0, "utf8").split("\n").map((line) => JSON.parse(line));
try {
  for await (const answer of answers(client, messages)) {
    console.log(JSON.stringify(answer, timesAsText));
  }
} catch (error) {
  console.error(JSON.stringify(status(error)));
  process.exitCode = 1;
} finally {
  client.close();
}
