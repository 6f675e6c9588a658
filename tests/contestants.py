"""The libraries that the benchmark compares: add a server to SERVERS, a client to RECEIVERS."""

import asyncio
import json
import secrets
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

from tornado.httpserver import HTTPServer
from tornado.netutil import bind_sockets
from tornado.web import Application
from tornado.websocket import WebSocketHandler, websocket_connect

from client import WebSocketClient
from server import WebSocketServer, make_app

FIRST = 100_000  # the first offset: all messages of one sample are equally long
Send = Callable[[list[Any]], Awaitable[None] | None]
Serving = AbstractAsyncContextManager[tuple[int, Send]]
Take = Callable[[list[Any]], bool]
Receiver = Callable[[str, Take], Coroutine[Any, Any, None]]


# Serving: each contestant yields its port, and a function that sends samples to every client.


class Log:
    """The same numbered messages as ours, for the contestants that have no log of their own."""

    def __init__(self) -> None:
        self.epoch = secrets.token_hex(4)
        self.end = FIRST

    def message(self, samples: list[Any]) -> str:
        """Encode the samples, and count them."""
        offset, self.end = self.end, self.end + len(samples)
        return json.dumps({"epoch": self.epoch, "offset": offset, "samples": samples})


def tornado_port(application: Application, pings: bool, port: int) -> int:
    """Serve an application and return its port."""
    if not pings:
        application.settings["websocket_ping_interval"] = 0
    sockets = bind_sockets(port, "127.0.0.1", family=socket.AF_INET)
    HTTPServer(application).add_sockets(sockets)
    return int(sockets[0].getsockname()[1])


@asynccontextmanager
async def ours(pings: bool, port: int) -> AsyncIterator[tuple[int, Send]]:
    WebSocketServer.end, WebSocketServer.max_clients = FIRST, 100_000
    yield tornado_port(make_app(), pings, port), WebSocketServer.send_message


@asynccontextmanager
async def fast_lane(pings: bool, port: int) -> AsyncIterator[tuple[int, Send]]:
    from tests.recipes.fast_lane import FastLane as server

    server.end, server.max_clients = FIRST, 100_000
    yield tornado_port(make_app(server), pings, port), server.send_message


@asynccontextmanager
async def plain_loop(pings: bool, port: int) -> AsyncIterator[tuple[int, Send]]:
    clients: set[WebSocketHandler] = set()
    log = Log()

    class Handler(WebSocketHandler):
        def open(self) -> None:
            self.set_nodelay(True)
            clients.add(self)

        def on_close(self) -> None:
            clients.discard(self)

    def send(samples: list[Any]) -> None:
        message = log.message(samples)
        for client in clients:
            client.write_message(message)

    yield (
        tornado_port(
            Application([("/websocket", Handler)], websocket_ping_interval=10), pings, port
        ),
        send,
    )


@asynccontextmanager
async def websockets_broadcast(pings: bool, port: int) -> AsyncIterator[tuple[int, Send]]:
    from websockets.asyncio.server import ServerConnection, broadcast, serve

    clients: set[ServerConnection] = set()
    log = Log()

    async def handler(websocket: ServerConnection) -> None:
        clients.add(websocket)
        try:
            await websocket.wait_closed()
        finally:
            clients.remove(websocket)

    async with serve(handler, "127.0.0.1", port, ping_interval=20 if pings else None) as server:
        yield (
            next(iter(server.sockets)).getsockname()[1],
            lambda samples: broadcast(clients, log.message(samples)),
        )


@asynccontextmanager
async def aiohttp_loop(pings: bool, port: int) -> AsyncIterator[tuple[int, Send]]:
    from aiohttp import web

    clients: set[web.WebSocketResponse] = set()
    log = Log()

    async def handler(request: web.Request) -> web.WebSocketResponse:
        websocket = web.WebSocketResponse(heartbeat=10 if pings else None)
        await websocket.prepare(request)
        clients.add(websocket)
        try:
            async for _ in websocket:
                pass
        finally:
            clients.discard(websocket)
        return websocket

    async def send(samples: list[Any]) -> None:
        message = log.message(samples)
        for websocket in clients:
            await websocket.send_str(message)

    application = web.Application()
    application.add_routes([web.get("/websocket", handler)])
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    yield runner.addresses[0][1], send


@asynccontextmanager
async def picows_loop(pings: bool, port: int) -> AsyncIterator[tuple[int, Send]]:
    from picows import WSListener, WSMsgType, WSTransport, ws_create_server

    clients: set[WSTransport] = set()
    log = Log()

    class Listener(WSListener):
        def on_ws_connected(self, transport: WSTransport) -> None:
            clients.add(transport)

        def on_ws_disconnected(self, transport: WSTransport) -> None:
            clients.discard(transport)

    def send(samples: list[Any]) -> None:
        message = log.message(samples).encode()
        for transport in clients:
            transport.send(WSMsgType.TEXT, message)

    server = await ws_create_server(
        lambda request: Listener(), "127.0.0.1", port, enable_auto_ping=pings
    )
    yield server.sockets[0].getsockname()[1], send


@asynccontextmanager
async def starlette_loop(pings: bool, port: int) -> AsyncIterator[tuple[int, Send]]:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.routing import WebSocketRoute
    from starlette.websockets import WebSocket, WebSocketDisconnect

    clients: list[WebSocket] = []
    log = Log()

    async def endpoint(websocket: WebSocket) -> None:
        await websocket.accept()
        clients.append(websocket)
        try:
            while True:
                await websocket.receive_text()
        except WebSocketDisconnect:
            clients.remove(websocket)

    async def send(samples: list[Any]) -> None:
        message = log.message(samples)
        for websocket in clients:
            await websocket.send_text(message)

    server = uvicorn.Server(
        uvicorn.Config(
            Starlette(routes=[WebSocketRoute("/websocket", endpoint)]),
            port=port,
            log_level="critical",
            ws_ping_interval=20 if pings else None,
        )
    )
    task = asyncio.ensure_future(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()[1], send
    task.cancel()


@asynccontextmanager
async def floor(pings: bool, port: int) -> AsyncIterator[tuple[int, Send]]:
    clients: list[socket.socket] = []
    log = Log()
    loop = asyncio.get_running_loop()
    listener = socket.create_server(("127.0.0.1", port))
    listener.setblocking(False)

    async def accept() -> None:
        while True:
            client, _ = await loop.sock_accept(listener)
            await loop.sock_recv(client, 4096)
            await loop.sock_sendall(client, b"HTTP/1.1 101 Switching Protocols\r\n\r\n")
            clients.append(client)

    def send(samples: list[Any]) -> None:
        message = log.message(samples).encode()
        frame = bytes([0x81, len(message)]) + message
        for client in clients:
            client.send(frame)

    task = asyncio.ensure_future(accept())
    yield listener.getsockname()[1], send
    task.cancel()


SERVERS: dict[str, Callable[[bool, int], Serving]] = {
    "ours": ours,
    "ours, fast lane": fast_lane,
    "Tornado, plain loop": plain_loop,
    "websockets, broadcast": websockets_broadcast,
    "aiohttp": aiohttp_loop,
    "picows": picows_loop,
    "starlette, uvicorn": starlette_loop,
    "floor: socket.send": floor,
}


# Receiving: each contestant connects and hands the samples to `take`, until that returns True.


async def receive_ours(url: str, take: Take) -> None:
    class Client(WebSocketClient):
        def on_message(self, samples: list[int]) -> None:
            if take(samples):
                task.cancel()

    task = asyncio.ensure_future(Client(url).run())
    await asyncio.wait([task])


async def receive_tornado(url: str, take: Take) -> None:
    connection = await websocket_connect(url)
    while message := await connection.read_message():
        if take(json.loads(message)["samples"]):
            connection.close()


async def receive_websockets(url: str, take: Take) -> None:
    from websockets.asyncio.client import connect

    async with connect(url) as websocket:
        async for message in websocket:
            if take(json.loads(message)["samples"]):
                break


async def receive_websocket_client(url: str, take: Take) -> None:
    import websocket

    def on_message(app: Any, message: str) -> None:
        if take(json.loads(message)["samples"]):
            app.close()

    websocket.WebSocketApp(url, on_message=on_message).run_forever()


async def receive_aiohttp(url: str, take: Take) -> None:
    import aiohttp

    async with aiohttp.ClientSession() as session, session.ws_connect(url) as websocket:
        async for message in websocket:
            if take(json.loads(message.data)["samples"]):
                break


async def receive_picows(url: str, take: Take) -> None:
    from picows import WSFrame, WSListener, WSMsgType, WSTransport, ws_connect

    class Listener(WSListener):
        def on_ws_frame(self, transport: WSTransport, frame: WSFrame) -> None:
            if frame.msg_type != WSMsgType.TEXT:
                return
            if take(json.loads(frame.get_payload_as_utf8_text())["samples"]):
                transport.disconnect()

    transport, _ = await ws_connect(Listener, url)
    await transport.wait_disconnected()


RECEIVERS: dict[str, Receiver] = {
    "ours": receive_ours,
    "Tornado, read_message": receive_tornado,
    "websockets": receive_websockets,
    "websocket-client": receive_websocket_client,
    "aiohttp": receive_aiohttp,
    "picows": receive_picows,
}
FLOODED = "ours", "ours, fast lane", "Tornado, plain loop", "websockets, broadcast"
PEERS = {  # the package that a contestant needs
    "websockets, broadcast": "websockets",
    "websockets, async for": "websockets",
    "websockets": "websockets",
    "websocket-client": "websocket-client",
    "aiohttp": "aiohttp",
    "picows": "picows",
    "starlette, uvicorn": "uvicorn",
}


async def return_websockets(url: str, take: Take) -> None:
    from websockets.asyncio.client import connect
    from websockets.exceptions import ConnectionClosed

    async for websocket in connect(url):
        try:
            async for message in websocket:
                take(json.loads(message)["samples"])
        except ConnectionClosed:
            continue
