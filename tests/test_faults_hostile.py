"""Hostile clients, each beside a healthy one that must notice nothing."""

import zlib

from tests import faults
from tests.faults import BINARY, CLOSE, CONTINUATION, PING, PONG, TEXT, frame, request
from tests.scenarios import FaultCase, scene

BYE = frame(CLOSE, (1000).to_bytes(2))


class HostileCase(FaultCase):
    """Attacks on a server whose healthy client must get every number once."""

    async def asyncSetUp(self) -> None:
        await super().asyncSetUp()
        self.scene = await self.enterAsyncContext(scene())
        self.enterContext(self.assertNoLogs("client", "WARNING"))  # of the healthy one

    async def asyncTearDown(self) -> None:
        self.assert_each_once(await self.scene.count())

    async def attack(self, ends: set[str], *attacks: bytes, then_end: bool = False) -> None:
        """Send each on a connection of its own, which ends with one of these statuses or codes."""
        for data in attacks:
            self.scene.send(1)
            end = await faults.answer(self.scene.url, data, then_end=then_end)
            self.assertIn(end, ends, data[:300])


class FrameTests(HostileCase):
    """What follows a good handshake."""

    async def frames(self, ends: set[str], *attacks: bytes) -> None:
        await self.attack(ends, *(request() + data for data in attacks))

    async def test_message(self) -> None:
        """A client that speaks is closed with 1008, or above 1,024 bytes with 1009."""
        for opcode in (TEXT, BINARY):
            await self.frames({"1008"}, frame(opcode), frame(opcode, bytes(1_024)))
            await self.frames({"1009"}, frame(opcode, bytes(1_025)))
        fragments = frame(TEXT, b"a", final=False) + frame(CONTINUATION, b"b")
        await self.frames({"1008"}, frame(TEXT, b"1") * 2, fragments)

    async def test_endless_message(self) -> None:
        """One that is far too long is not taken, whole, announced, or in endless fragments."""
        whole, announced = frame(TEXT, bytes(100_000)), b"\x81\xff" + (2**63).to_bytes(8)
        fragments = frame(TEXT, b"x", final=False) + 9_999 * frame(CONTINUATION, b"x", final=False)
        await self.frames({"1009", "dropped"}, whole, announced, fragments)

    async def test_invalid_frames(self) -> None:
        """A text that is not UTF-8, and bits or opcodes without a meaning, end the connection."""
        overlong, surrogate, half = b"\xc0\x80", b"\xed\xa0\x80", b"\xe2\x82"
        for payload in (b"\xff\xfe", overlong, surrogate, half):
            await self.frames({"dropped"}, frame(TEXT, payload))
        for bits in range(1, 8):
            await self.frames({"dropped"}, frame(TEXT, b"x", reserved=bits))
        for opcode in (3, 4, 5, 6, 7, 11, 12, 13, 14, 15):
            await self.frames({"dropped"}, frame(opcode, b"x"))

    async def test_fragments(self) -> None:
        """A fragment that continues nothing, or a message inside another, ends the connection."""
        alone = frame(CONTINUATION, b"x"), frame(CONTINUATION, b"x", final=False)
        await self.frames({"dropped"}, *alone, frame(TEXT, final=False) + frame(TEXT))

    async def test_control_frames(self) -> None:
        """A control frame that is too long, or a fragment, ends the connection."""
        for opcode in (CLOSE, PING, PONG):
            too_long, fragment = frame(opcode, bytes(126)), frame(opcode, b"x", final=False)
            await self.frames({"dropped"}, too_long, fragment)

    async def test_close_frames(self) -> None:
        """A Close frame ends its connection, whatever code and reason it has."""
        for code in (0, 999, 1004, 1005, 1006, 1015, 2999, 5000, 65_535):
            await self.frames({str(code), "dropped"}, frame(CLOSE, code.to_bytes(2)))
        half, not_utf_8 = frame(CLOSE, b"\x03"), frame(CLOSE, b"\x03\xe8\xff")
        await self.frames({"0", "1000", "dropped"}, frame(CLOSE), half, not_utf_8, BYE + BYE)

    async def test_unmasked(self) -> None:
        """Neither a message without a mask nor a second handshake keeps a connection open."""
        await self.frames({"1008", "dropped"}, frame(TEXT, b"x", masked=False), request())

    async def test_ping_flood(self) -> None:
        """20,000 pings are answered, and keep no other client waiting."""
        await self.frames({"1000"}, 20_000 * frame(PING, bytes(100)) + BYE)


class RequestTests(HostileCase):
    """What comes in place of a good handshake."""

    async def test_not_a_websocket_request(self) -> None:
        """A request that lacks the upgrade or the key, or has another version, is refused."""
        for name in (b"Upgrade", b"Sec-WebSocket-Key"):
            await self.attack({"400"}, request().replace(name, b"X"))
        for method in ("POST", "WATCH"):
            await self.attack({"405"}, request("Content-Length: 0", method=method))
        await self.attack({"426"}, request().replace(b"Version: 13", b"Version: 8"))
        tls = b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n"
        await self.attack({"400", "dropped"}, b"hello\r\n\r\n", tls)

    async def test_many_headers(self) -> None:
        """A head of 70 kB, or of 20,000 lines, is refused."""
        too_much = request(f"X: {'x' * 70_000}"), request(*["X: x"] * 20_000)
        await self.attack({"400", "431", "dropped"}, *too_much)

    async def test_smuggling(self) -> None:
        """A request that two servers could read in two ways is refused."""
        two_lengths = request("Transfer-Encoding: chunked", "Content-Length: 4", method="POST")
        await self.attack({"400"}, two_lengths + b"0\r\n\r\n", request().replace(b"Host", b"X"))
        for line in ("Content-Length: 1, 2", "Host: evil.example", "Host : a", "odd", "X: a\0b"):
            await self.attack({"400"}, request(line) + b"xx")

    async def test_body(self) -> None:
        """A handshake with a body is accepted, and the body is no message."""
        await self.attack({"1000"}, request("Content-Length: 2048") + bytes(2048) + BYE)

    async def test_compression(self) -> None:
        """A client that asks for compression does not get it, and cannot send a bomb."""
        offer = request("Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits")
        bomb = frame(TEXT, zlib.compress(bytes(100_000), wbits=-15), reserved=4)
        await self.attack({"dropped"}, offer + bomb)

    async def test_halves(self) -> None:
        """A connection that ends in the middle of something is forgotten."""
        for half in (b"", request()[:16], request(), request() + BYE[:1], request() + BYE[:5]):
            await self.attack({"dropped"}, half, then_end=True)
