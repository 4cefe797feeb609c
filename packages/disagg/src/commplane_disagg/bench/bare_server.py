"""What the registry's bench compares with: aiohttp that reads a request, decodes nothing and answers. Prints its port."""

from __future__ import annotations

import asyncio
import sys

from aiohttp import web

from commplane_disagg.port import bind_listener

__all__ = ["main"]


async def main() -> None:
    """Serve until the process is ended."""

    async def answer(request: web.Request) -> web.Response:
        await request.read()
        return web.Response(body=bytes(64))

    application = web.Application()
    application.router.add_put("/{rest:.*}", answer)
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    bound = bind_listener("127.0.0.1")
    await web.SockSite(runner, bound.socket, backlog=4096).start()
    sys.stdout.write(f"serving on {bound}\n")
    sys.stdout.flush()
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())
