"""The contestants: what serves samples, and what receives them, written with each library.

To add a library, write one or both functions and a row of CONTESTANTS. Measuring is elsewhere.
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
from tests.recipes.fast_lane import FastLane, frame

Send = Callable[[list[Any]], Awaitable[None] | None]
Serving = tuple[int, Send]
Take = Callable[[list[Any]], None]


# Serving, with pings or without, at a port or a free one, 0: each returns the port, and a function
# that sends samples to every client. Its process is killed, so there is nothing to end.


class Log:
    """The same numbered messages as ours, for the contestants that have no log of their own."""

    def __init__(self) -> None:
        self.epoch, self.end = secrets.token_hex(4), 0

    def message(self, samples: list[Any]) -> str:
        """Encode the samples, and count them."""
        offset, self.end = self.end, self.end + len(samples)
        return json.dumps({"epoch": self.epoch, "offset": offset, "samples": samples})


clients: set[Any] = set()  # of the one contestant that a process serves
log = Log()


class Handler(WebSocketHandler):
    """A client of a Tornado server without a log."""

    def open(self) -> None:
        self.set_nodelay(True)
        clients.add(self)

    def on_close(self) -> None:
        clients.discard(self)


def tornado_port(application: Application, pings: bool, port: int) -> int:
    """Serve an application and return its port."""
    application.settings["websocket_ping_interval"] = 10 if pings else 0
    sockets = bind_sockets(port, "127.0.0.1", family=socket.AF_INET)
    HTTPServer(application).add_sockets(sockets)
    return int(sockets[0].getsockname()[1])


async def ours(pings: bool, port: int, handler: type[WebSocketServer] = WebSocketServer) -> Serving:
    handler.max_clients = 100_000
    return tornado_port(make_app(handler), pings, port), handler.send_message


async def plain_loop(pings: bool, port: int) -> Serving:
    def send(samples: list[Any]) -> None:
        message = log.message(samples)
        for client in clients:
            client.write_message(message)

    return tornado_port(Application([("/websocket", Handler)]), pings, port), send


async def bare_socket(pings: bool, port: int) -> Serving:
    def send(samples: list[Any]) -> None:
        data = frame(log.message(samples).encode())
        if len(sockets) < len(clients):  # all have come by now
            sockets.extend(client.ws_connection.stream.socket for client in clients)
        for client in sockets:
            client.send(data)

    sockets: list[socket.socket] = []
    return tornado_port(Application([("/websocket", Handler)]), pings, port), send


async def websockets_broadcast(pings: bool, port: int) -> Serving:
    from websockets.asyncio.server import ServerConnection, broadcast, serve

    async def handler(websocket: ServerConnection) -> None:
        clients.add(websocket)
        await websocket.wait_closed()
        clients.remove(websocket)

    server = await serve(handler, "127.0.0.1", port, ping_interval=20 if pings else None)
    send = lambda samples: broadcast(clients, log.message(samples))
    return next(iter(server.sockets)).getsockname()[1], send


async def aiohttp_loop(pings: bool, port: int) -> Serving:
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
        message = log.message(samples)
        for websocket in tuple(clients):
            await websocket.send_str(message)

    application = web.Application()
    application.add_routes([web.get("/websocket", handler)])
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    return runner.addresses[0][1], send


async def picows_loop(pings: bool, port: int) -> Serving:
    from picows import WSListener, WSMsgType, WSTransport, ws_create_server

    class Listener(WSListener):
        def on_ws_connected(self, transport: WSTransport) -> None:
            clients.add(transport)

        def on_ws_disconnected(self, transport: WSTransport) -> None:
            clients.discard(transport)

    def send(samples: list[Any]) -> None:
        message = log.message(samples).encode()
        for transport in clients:
            transport.send(WSMsgType.TEXT, message)

    make = lambda request: Listener()
    server = await ws_create_server(make, "127.0.0.1", port, enable_auto_ping=pings)
    return server.sockets[0].getsockname()[1], send


async def starlette_loop(pings: bool, port: int) -> Serving:
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
        message = log.message(samples)
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


async def receive_picows(url: str, take: Take) -> None:
    from picows import WSFrame, WSListener, WSMsgType, WSTransport, ws_connect

    class Listener(WSListener):
        def on_ws_frame(self, transport: WSTransport, frame: WSFrame) -> None:
            if frame.msg_type == WSMsgType.TEXT:
                take(json.loads(frame.get_payload_as_utf8_text())["samples"])

    transport, _ = await ws_connect(Listener, url)
    await transport.wait_disconnected()


class Contestant(NamedTuple):
    """What a library offers; None where it has no such side, and is measured with our client."""

    serve: Callable[[bool, int], Coroutine[Any, Any, Serving]] | None
    receive: Callable[[str, Take], Coroutine[Any, Any, None]] | None
    modules: tuple[str, ...] = ("tornado",)


CONTESTANTS = {
    "ours": Contestant(ours, receive_ours),
    "fast lane": Contestant(partial(ours, handler=FastLane), None),
    "plain Tornado": Contestant(plain_loop, receive_tornado),
    "websockets": Contestant(websockets_broadcast, receive_websockets, ("websockets",)),
    "websocket-client": Contestant(None, receive_websocket_client, ("websocket",)),
    "aiohttp": Contestant(aiohttp_loop, receive_aiohttp, ("aiohttp",)),
    "picows": Contestant(picows_loop, receive_picows, ("picows",)),
    "starlette": Contestant(starlette_loop, None, ("starlette", "uvicorn")),
    "bare socket": Contestant(bare_socket, None),
}
