interface PageRequest {
  pageToken?: string;
}

/** The type of the rows of a page. */
type RowOf<P> = { [K in keyof P]: P[K] extends readonly (infer Row)[] ? Row : never }[Exclude<keyof P, "$unknown">];

/**
 * Yield the rows of all pages of a List call, which gets each page when it is needed:
 *
 *     for await (const user of pages(client.users.listUsers, { filter: "is_active = true" })) …
 */
export async function* pages<Request extends PageRequest, P extends { readonly nextPageToken: string }>(
  list: (request: Request) => Promise<P>,
  request: Request,
): AsyncGenerator<RowOf<P>> {
  let next = request;
  while (true) {
    const page = await list(next);
    const rows = Object.entries(page).find(([name, value]) => Array.isArray(value) && name !== "$unknown");
    yield* (rows?.[1] ?? []) as RowOf<P>[];
    if (!page.nextPageToken) return;
    next = { ...next, pageToken: page.nextPageToken };
  }
}
