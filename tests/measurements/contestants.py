"""The contestants: what serves samples, and what receives them, written with each library.

To add a library, write one or both functions, and a row of CONTESTANTS.
"""

import asyncio
import json
import secrets
import socket
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

from tornado.httpserver import HTTPServer
from tornado.netutil import bind_sockets
from tornado.web import Application
from tornado.websocket import WebSocketHandler, websocket_connect

from client import WebSocketClient
from server import WebSocketServer, make_app
from tests.recipes.fast_lane import make_fast_app

Send = Callable[[list[Any]], Awaitable[None] | None]
Take = Callable[[list[Any]], None]


class Contestant(NamedTuple):
    """How to serve, and how to receive; None if a library has no such side."""

    serve: Callable[[bool, int], Coroutine[Any, Any, tuple[int, Send]]] | None
    receive: Callable[[str, Take], Coroutine[Any, Any, None]] | None
    modules: tuple[str, ...] = ("tornado",)


# Serving, with pings or without, at a port or a free one, 0: each returns the port, and a function
# that sends samples to every client. Its process is killed, so there is nothing to end.


clients: set[Any] = set()  # of the one contestant that a process serves
epoch, end = secrets.token_hex(4), 0


def encode(samples: list[Any]) -> str:
    """Write the next message, the same as ours, for those who have no log of their own."""
    global end
    message = json.dumps({"epoch": epoch, "offset": end, "samples": samples})
    end += len(samples)
    return message


def listen(application: Application, pings: bool, port: int) -> int:
    """Serve an application with Tornado, and return its port."""
    application.settings["websocket_ping_interval"] = 10 if pings else 0
    sockets = bind_sockets(port, "127.0.0.1", family=socket.AF_INET)
    HTTPServer(application).add_sockets(sockets)
    return int(sockets[0].getsockname()[1])


async def serve_ours(
    pings: bool, port: int, make: Callable[[], Application] = make_app
) -> tuple[int, Send]:
    # As server.run does. It is part of the pair; the other contestants run as people run them.
    asyncio.get_running_loop().set_task_factory(getattr(asyncio, "eager_task_factory", None))
    WebSocketServer.max_clients = 100_000
    return listen(make(), pings, port), WebSocketServer.send_message


class Handler(WebSocketHandler):
    """A client of a Tornado server without a log."""

    def open(self) -> None:
        self.set_nodelay(True)
        clients.add(self)

    def on_close(self) -> None:
        clients.discard(self)


async def serve_tornado(pings: bool, port: int) -> tuple[int, Send]:
    def send(samples: list[Any]) -> None:
        message = encode(samples)
        for client in clients:
            client.write_message(message)

    return listen(Application([("/websocket", Handler)]), pings, port), send


async def serve_websockets(pings: bool, port: int) -> tuple[int, Send]:
    from websockets.asyncio.server import ServerConnection, broadcast, serve

    async def handler(websocket: ServerConnection) -> None:
        clients.add(websocket)
        await websocket.wait_closed()
        clients.remove(websocket)

    server = await serve(handler, "127.0.0.1", port, ping_interval=20 if pings else None)
    send = lambda samples: broadcast(clients, encode(samples))
    return next(iter(server.sockets)).getsockname()[1], send


async def serve_aiohttp(pings: bool, port: int) -> tuple[int, Send]:
    from aiohttp import web

    async def handler(request: web.Request) -> web.WebSocketResponse:
        websocket = web.WebSocketResponse(heartbeat=10 if pings else None)
        await websocket.prepare(request)
        clients.add(websocket)
        async for _ in websocket:
            pass
        clients.remove(websocket)
        return websocket

    async def send(samples: list[Any]) -> None:
        message = encode(samples)
        for websocket in tuple(clients):
            await websocket.send_str(message)

    application = web.Application()
    application.add_routes([web.get("/websocket", handler)])
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    return runner.addresses[0][1], send


async def serve_starlette(pings: bool, port: int) -> tuple[int, Send]:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.routing import WebSocketRoute
    from starlette.websockets import WebSocket

    async def endpoint(websocket: WebSocket) -> None:
        await websocket.accept()
        clients.add(websocket)
        async for _ in websocket.iter_text():
            pass
        clients.remove(websocket)

    async def send(samples: list[Any]) -> None:
        message = encode(samples)
        for websocket in tuple(clients):
            await websocket.send_text(message)

    application = Starlette(routes=[WebSocketRoute("/websocket", endpoint)])
    interval = 20 if pings else None
    config = uvicorn.Config(application, port=port, log_level="critical", ws_ping_interval=interval)
    server = uvicorn.Server(config)
    asyncio.ensure_future(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    return server.servers[0].sockets[0].getsockname()[1], send


# Receiving: each connects and hands the samples to `take`, for as long as its process lives.


async def receive_ours(url: str, take: Take) -> None:
    class Client(WebSocketClient):
        def on_message(self, samples: list[Any]) -> None:
            take(samples)

    await Client(url).run()


async def receive_async(url: str, take: Take) -> None:
    class Client(WebSocketClient):
        async def on_message(self, samples: list[Any]) -> None:
            take(samples)

    await Client(url).run()


async def receive_tornado(url: str, take: Take) -> None:
    connection = await websocket_connect(url)
    while message := await connection.read_message():
        take(json.loads(message)["samples"])


async def receive_websockets(url: str, take: Take) -> None:
    from websockets.asyncio.client import connect
    from websockets.exceptions import ConnectionClosed

    async for websocket in connect(url):  # it comes back, too
        with suppress(ConnectionClosed):
            async for message in websocket:
                take(json.loads(message)["samples"])


async def receive_websocket_client(url: str, take: Take) -> None:
    from websocket import WebSocketApp

    on_message = lambda app, message: take(json.loads(message)["samples"])
    WebSocketApp(url, on_message=on_message).run_forever()


async def receive_aiohttp(url: str, take: Take) -> None:
    from aiohttp import ClientSession

    async with ClientSession() as session, session.ws_connect(url) as websocket:
        async for message in websocket:
            take(json.loads(message.data)["samples"])


CONTESTANTS = {
    "ours": Contestant(serve_ours, receive_ours),
    "ours, async def on_message": Contestant(None, receive_async),
    "fast lane": Contestant(partial(serve_ours, make=make_fast_app), None),
    "plain Tornado": Contestant(serve_tornado, receive_tornado),
    "websockets": Contestant(serve_websockets, receive_websockets, ("websockets",)),
    "websocket-client": Contestant(None, receive_websocket_client, ("websocket",)),
    "aiohttp": Contestant(serve_aiohttp, receive_aiohttp, ("aiohttp",)),
    "starlette": Contestant(serve_starlette, None, ("starlette", "uvicorn")),
}
