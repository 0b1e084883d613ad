import asyncio, socket
import asyncpg, grpc, pytest
from sqlalchemy import make_url
from tests.e2e.test_error_statuses import *
async def test_ddl(postgresql_url):
    async with serving(postgresql_url) as (server, users):
        id = await create(users)
        await users.UpdateUser(renamed(id)); await users.GetUser(GetUserRequest(id=id))
        c = await asyncpg.connect(make_url(postgresql_url).set(drivername="postgresql").render_as_string(hide_password=False))
        for ddl in ["ALTER TABLE users ADD COLUMN nick text", "ALTER TABLE users ALTER COLUMN full_name TYPE varchar(300)"]:
            await c.execute(ddl)
            for what in (*[users.UpdateUser(renamed(id)) for _ in range(4)], *[users.GetUser(GetUserRequest(id=id)) for _ in range(4)]):
                try: await what; print(ddl, "ok")
                except grpc.aio.AioRpcError as e: print(ddl, e.code(), e.details())
        await c.close()
async def test_hole():
    with socket.create_server(("127.0.0.1",0)) as s:
        async with serving(f"postgresql://x@127.0.0.1:{s.getsockname()[1]}/x", connect_timeout=0.3) as (_, users):
            r = await refusal(users.GetUser(GetUserRequest(id=1), timeout=10)); print(r.code, r.reason)
async def test_ro(postgresql_url):
    c = await asyncpg.connect(make_url(postgresql_url).set(drivername="postgresql").render_as_string(hide_password=False))
    await c.execute(f"ALTER DATABASE {make_url(postgresql_url).database} SET default_transaction_read_only = on")
    async with serving(postgresql_url) as (server, users):
        r = await refusal(users.CreateUser(CREATE)); print(r.code, r.reason)
    await c.close()
