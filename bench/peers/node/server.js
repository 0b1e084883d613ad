// UserService in Node as it is usually written: grpc-js, and pg with its pool and named prepared statements.
//
// The protos are read by protobufjs, as by @grpc/proto-loader, which would also copy each message.
// Times are parsed here, because a Date has no microseconds.
'use strict';

const grpc = require('@grpc/grpc-js');
const pg = require('pg');
const { from: copyFrom } = require('pg-copy-streams');
const protobuf = require('protobufjs');

const CONNECTIONS = 20;
const PAGE_ROWS = 50;
const EXPORT_ROWS = 1000;
const COLUMNS = 'SELECT id, email, full_name, is_active, created_at, updated_at, version FROM users ';
const COPY = 'COPY users (email, hashed_password, full_name, is_active) FROM STDIN';

// Numbers instead of Long objects: ids and versions are below 2^53.
protobuf.util.Long = undefined;
protobuf.configure();

const INT8 = 20;
const TIMESTAMPTZ = 1184;
pg.types.setTypeParser(INT8, Number);
pg.types.setTypeParser(TIMESTAMPTZ, (text) => {
  // 2024-01-31 09:30:00.123456+00, because the session's time zone is UTC
  const part = (start, end) => Number(text.slice(start, end));
  const seconds = Date.UTC(part(0, 4), part(5, 7) - 1, part(8, 10), part(11, 13), part(14, 16), part(17, 19)) / 1000;
  const digits = text[19] === '.' ? text.slice(20, -3) : '';
  return { seconds, nanos: Number(digits.padEnd(9, '0')) };
});

const pool = new pg.Pool({
  connectionString: process.env.DATABASE_URL,
  max: CONNECTIONS,
  options: '-c TimeZone=UTC',
});

const toUser = (row) => ({
  id: row.id,
  email: row.email,
  fullName: row.full_name,
  isActive: row.is_active,
  createdAt: row.created_at,
  updatedAt: row.updated_at,
  version: row.version,
});

async function select(name, condition, values) {
  const { rows } = await pool.query({ name, text: COLUMNS + condition, values });
  return rows.map(toUser);
}

const selectAfter = (id, limit) => select('after', 'WHERE id > $1 ORDER BY id LIMIT $2', [id, limit]);

async function getUser(request) {
  const [user] = request.key === 'email'
    ? await select('email', 'WHERE email = $1', [request.email])
    : await select('id', 'WHERE id = $1', [request.id]);
  if (!user) throw { code: grpc.status.NOT_FOUND, message: 'no such user' };
  return user;
}

async function batchGetUsers({ ids }) {
  const found = new Map();
  for (const user of await select('ids', 'WHERE id = ANY($1)', [ids])) found.set(user.id, user);
  return {
    users: ids.filter((id) => found.has(id)).map((id) => found.get(id)),
    missingIds: ids.filter((id) => !found.has(id)),
  };
}

async function listUsers({ pageSize, pageToken }) {
  const size = pageSize || PAGE_ROWS;
  const users = await selectAfter(Number(pageToken), size + 1);
  if (users.length <= size) return { users };
  users.pop();
  return { users, nextPageToken: String(users[size - 1].id) };
}

// Text for COPY: a backslash, a tab and line ends are escaped.
const ESCAPES = { '\\': '\\\\', '\t': '\\t', '\n': '\\n', '\r': '\\r' };
const copyField = (value) => (value ? value.replace(/[\\\t\n\r]/g, (found) => ESCAPES[found]) : '\\N');

function copyLine(user) {
  const isActive = Object.hasOwn(user, 'isActive') ? user.isActive : true;
  return `${copyField(user.email)}\t${copyField(user.hashedPassword)}\t${copyField(user.fullName)}\t${isActive}\n`;
}

async function copyUsers(users) {
  const client = await pool.connect();
  try {
    const stream = client.query(copyFrom(COPY));
    await new Promise((resolve, reject) => {
      stream.on('finish', resolve).on('error', reject);
      stream.end(users.map(copyLine).join(''));
    });
  } finally {
    client.release();
  }
}

async function bulkCreateUsers(call) {
  let total = 0;
  call.write({ opened: { maxRows: 5000, maxBytes: 4 << 20 } });
  // Otherwise the end of the requests would destroy the call before the summary.
  for await (const { users } of call.iterator({ destroyOnReturn: false })) {
    await copyUsers(users);
    const offset = total;
    total += users.length;
    call.write({ ack: { offset, nextOffset: total, created: users.length } });
  }
  call.write({ summary: { nextOffset: total, created: total, state: 2 } });
  call.end();
}

async function exportUsers(call) {
  const size = call.request.batchSize || EXPORT_ROWS;
  let lastId = call.request.afterId;
  for (let users; (users = await selectAfter(lastId, size)).length > 0;) {
    lastId = users[users.length - 1].id;
    if (!call.write({ users, lastId })) await new Promise((resolve) => call.once('drain', resolve));
  }
  call.end();
}

const unary = (answer) => (call, callback) => answer(call.request).then((value) => callback(null, value), callback);
const streaming = (answer) => (call) => answer(call).catch((error) => call.destroy(error));

const codec = (type) => ({
  serialize: (message) => type.encode(message).finish(),
  deserialize: (bytes) => type.decode(bytes),
});

function definition(service) {
  const methods = service.methodsArray.map((method) => {
    const request = codec(method.resolvedRequestType);
    const response = codec(method.resolvedResponseType);
    return [method.name, {
      path: `/roster.v1.UserService/${method.name}`,
      requestStream: Boolean(method.requestStream),
      responseStream: Boolean(method.responseStream),
      requestSerialize: request.serialize,
      requestDeserialize: request.deserialize,
      responseSerialize: response.serialize,
      responseDeserialize: response.deserialize,
    }];
  });
  return Object.fromEntries(methods);
}

function main() {
  const root = new protobuf.Root();
  root.resolvePath = (origin, target) => `${__dirname}/protos/${target}`;
  root.loadSync('roster/v1/users.proto').resolveAll();
  const server = new grpc.Server();
  server.addService(definition(root.lookupService('roster.v1.UserService')), {
    GetUser: unary(getUser),
    BatchGetUsers: unary(batchGetUsers),
    ListUsers: unary(listUsers),
    BulkCreateUsers: streaming(bulkCreateUsers),
    ExportUsers: streaming(exportUsers),
  });
  server.bindAsync('127.0.0.1:0', grpc.ServerCredentials.createInsecure(), (error, port) => {
    if (error) throw error;
    console.error(`listening on 127.0.0.1:${port}`);
  });
}

main();
