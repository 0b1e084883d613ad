// Writes firebase-*.json and firebase-*.csv with the exporter of firebase-tools; only the HTTP client is replaced.
// Usage: node make_firebase.js FOLDER, where FOLDER is an unpacked firebase-tools (npm pack firebase-tools).
const { createWriteStream } = require("fs");
const Module = require("module");
const path = require("path");

const users = require("./firebase-accounts.json");
const stubs = {
  "./apiv2": { Client: class { async post() { return { body: { users: users.map((user) => ({ ...user })) } }; } } },
  "./error": { FirebaseError: Error },
  "./api": { googleOrigin: () => "" },
  "./utils": { logSuccess() {} },
};
const load = Module._load;
Module._load = (name, ...rest) => stubs[name] ?? load(name, ...rest);
const { serialExportUsers, validateOptions } = require(path.resolve(process.argv[2], "lib/accountExporter.js"));

async function main() {
  for (const name of ["firebase-export.json", "firebase-export.csv"]) {
    const options = validateOptions({}, name);
    const writeStream = createWriteStream(path.join(__dirname, name));
    if (options.format === "json") writeStream.write('{"users": [\n'); // as commands/auth-export.js
    await serialExportUsers("project", { ...options, writeStream, batchSize: 1000 });
    if (options.format === "json") writeStream.write("]}\n");
    writeStream.end();
  }
}
main();
