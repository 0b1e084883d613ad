/** Addresses of servers: gRPC's targets, with a sentence for what looks like one and is not. */
const DEFAULT_PORT = 50051;
const SECURE_PORT = 443; // of a URL
const MAX_PORT = 65535;

const URL_PARTS = /^([A-Za-z][A-Za-z0-9+.-]*):\/\/([^]*)$/;
// Other kinds of targets that grpc-js knows.
const SOCKET = /^(unix|xds):.+$/;
const NAMED = /^(?:dns|ipv4|ipv6):(?:\/\/[^/]*\/)?(.+)$/;
const HOST_AND_PORT = /^(?:\[[\w:.%]+\]|[^\s:/@?#,[\]]*):(\d{1,5})$/;

/** Return the address as a target of grpc-js; throws a TypeError with the address that was probably meant. */
export function checkAddress(text: string): string {
  const address = text.trim();
  if (SOCKET.test(address)) return address;
  const named = NAMED.exec(address);
  if (named) {
    for (const endpoint of named[1]!.split(",")) checkEndpoint(address, endpoint);
    return address;
  }
  if (!address) throw new TypeError(`the address is empty; write host:port, such as 127.0.0.1:${DEFAULT_PORT}`);
  if (address.includes("@")) { // not repeated, because a password may precede it
    throw new TypeError(`the address has a user name, which gRPC does not use; write ${suggest(address)}`);
  }
  const scheme = URL_PARTS.exec(address)?.[1];
  if (scheme) {
    const isSecure = /^(https|grpcs)$/i.test(scheme);
    const meant = isSecure ? `${suggest(address, SECURE_PORT)}; for TLS, pass credentials` : suggest(address);
    throw new TypeError(`the address ${address} has the scheme ${scheme}, which gRPC does not use; write ${meant}`);
  }
  checkEndpoint(address, address);
  return address.startsWith(":") ? `localhost${address}` : address;
}

/** Throw unless an endpoint is a host and a port. */
function checkEndpoint(address: string, endpoint: string): void {
  const port = HOST_AND_PORT.exec(endpoint)?.[1];
  if (port && Number(port) > 0 && Number(port) <= MAX_PORT) return;
  throw new TypeError(`the address ${address} ${problemOf(endpoint, port)}`);
}

function problemOf(endpoint: string, port: string | undefined): string {
  if (port) return `has the port ${port}; a port is a number from 1 to ${MAX_PORT}`;
  if (/^[./~]/.test(endpoint)) return `is a path; for a Unix socket, write unix:${endpoint}`;
  if (endpoint.includes(",")) return "has several servers; give them one name in DNS, and write name:port";
  if (/:.*:/.test(endpoint) && !endpoint.includes("[")) {
    return `is ambiguous; write IPv6 in brackets: [::1]:${DEFAULT_PORT}`;
  }
  const meant = `write ${suggest(endpoint)}`;
  if (/[/?#]/.test(endpoint)) return `has a path, which gRPC does not use; ${meant}`;
  if (/^[^\s:@]+:?$/.test(endpoint)) return `has no port; ${meant}`;
  return `is not a host and a port; ${meant}`;
}

/** Return the host and port of a URL, with defaults for parts that are missing. */
function suggest(address: string, defaultPort = DEFAULT_PORT): string {
  try {
    // A scheme that has no default port.
    const { hostname, port } = new URL(`grpc://${URL_PARTS.exec(address)?.[2] ?? address}`);
    return `${hostname.toLowerCase() || "127.0.0.1"}:${port || defaultPort}`;
  } catch {
    return "host:port";
  }
}
