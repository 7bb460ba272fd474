"""A small web on this machine that serves good pictures and everything that goes wrong with others."""

import asyncio
import gzip
import io
import struct
import threading
import zlib
from collections import Counter
from functools import cache
from urllib.parse import quote, unquote

import numpy as np
from PIL import Image

PUBLIC, PRIVATE = "127.0.0.2", "127.0.0.1"  # tests say that the first one counts as public


def save(image, kind, **how):
    image.save(buffer := io.BytesIO(), kind, **how)
    return buffer.getvalue()


def photo(width=320, height=240, mode="RGB"):
    """A smooth picture: red grows to the right, green downwards."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, 128 + 0 * x], -1).astype("uint8")).convert(mode)


def turned():
    """A picture that is red on top once its orientation tag, 'turn me a quarter', is obeyed."""
    upright = Image.new("RGB", (240, 320), "white")
    upright.paste("red", (0, 0, 240, 160))
    lying = upright.rotate(90, expand=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010F] = "a camera"
    return save(lying, "JPEG", exif=exif)


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def after_header(png, name, data):
    """A PNG with one more chunk after its header."""
    return png[:33] + chunk(name, data) + png[33:]


@cache
def pictures():
    """Files by name: those that shall arrive."""
    grey16 = Image.fromarray(np.linspace(0, 65535, 320 * 240).reshape(240, 320).astype("uint16"))
    return {
        "good.jpg": save(photo(), "JPEG"), "large.jpg": save(photo(1600, 1200), "JPEG", quality=90),
        "good.png": save(photo(), "PNG"), "good.webp": save(photo(), "WEBP"),
        "cmyk.jpg": save(photo(mode="CMYK"), "JPEG"), "grey.jpg": save(photo(mode="L"), "JPEG"),
        "grey16.png": save(grey16, "PNG"), "palette.png": save(photo().quantize(16), "PNG"),
        "la.png": save(photo(mode="LA"), "PNG"), "clear.png": save(Image.new("RGBA", (320, 240), (9, 9, 9, 0)), "PNG"),
        "turned.jpg": turned(), "suffix_lies.jpg": save(photo(), "PNG")}


@cache
def bad_pictures():
    """Files by name, each with the reason why it shall not arrive."""
    frames = dict(save_all=True, append_images=[photo().rotate(90)])
    bomb = zlib.compress(bytes(30_000_000), 9)
    png = save(photo(), "PNG")
    return {
        "truncated.jpg": (save(photo(), "JPEG")[:2000], "broken picture"), "empty.jpg": (b"", "not a picture"),
        "page.jpg": (b"<html><body>404, but friendly</body></html>", "not a picture"),
        "noise.jpg": (bytes(range(256)) * 9, "not a picture"), "good.gif": (save(photo(), "GIF"), "not a picture"),
        "animated.png": (save(photo(), "PNG", **frames), "animated"),
        "animated.webp": (save(photo(), "WEBP", **frames), "animated"),
        "1x1.png": (save(photo(1, 1), "PNG"), "too small"), "1x10000.png": (save(photo(1, 10000), "PNG"), "too small"),
        "ribbon.png": (save(photo(100, 2000), "PNG"), "too long"),
        "81_megapixels.png": (save(Image.new("1", (9000, 9000)), "PNG"), "too many pixels"),
        "196_megapixels.png": (save(Image.new("1", (14000, 14000)), "PNG"), "too many pixels"),
        "text_bomb.png": (after_header(png, b"zTXt", b"note\0\0" + bomb), "broken picture"),
        "half.png": (png[: len(png) // 2], "broken picture")}


@cache
def zip_bomb(): return gzip.compress(bytes(100_000_000), 1)


def answer(body=b"", status="200 OK", length=None, **headers):
    """An HTTP answer in bytes."""
    headers = {"Content-Length": len(body) if length is None else length, "Connection": "close", **headers}
    lines = [f"HTTP/1.1 {status}", *(f"{name.replace('_', '-')}: {value}" for name, value in headers.items())]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1") + body


ROBOTS = {  # header lines -> may we?
    "index, follow": True, "nofollow": True, "otherbot: noai": True, "max-image-preview: large, nosnippet": True,
    "noai": False, "NoImageAI": False, "noindex": False, "none": False, "noimageindex": False, "sd_nb: noai": False,
    "*: noimageai": False, "all, noai": False, "otherbot: all, sd_nb: none": False, "otherbot: noai, nofollow": True,
    "": False, "no ai": False, ",": False, "noai;": False, ":": False, "sd_nb:": False, "no\xe4i": False, "neverheardof": False,
    "unavailable_after: 25 Jun 2010 15:00:00 GMT": False}


class Web:
    """Serves on two addresses with one port in a thread of its own; counts who asked for what."""

    def __init__(self):
        self.hits, self.asked, self.lines = Counter(), [], []  # of paths; (address, path); header lines of the last one
        pictures(), bad_pictures(), zip_bomb()  # made beforehand: tests have clocks
        self.loop, ready = asyncio.new_event_loop(), threading.Event()
        self.thread = threading.Thread(target=self._serve, args=(ready,), daemon=True)
        self.thread.start()
        ready.wait()

    def __enter__(self): return self

    def __exit__(self, *_):
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()

    def url(self, path, host=PUBLIC): return f"http://{host}:{self.port}/{path}"

    def redirect(self, target): return self.url("to/" + quote(target, safe=""))

    def _serve(self, ready):
        async def start():
            first = await asyncio.start_server(self._visit, PUBLIC, 0)
            self.port = first.sockets[0].getsockname()[1]
            return first, await asyncio.start_server(self._visit, PRIVATE, self.port)
        asyncio.set_event_loop(self.loop)
        servers = self.loop.run_until_complete(start())
        ready.set()
        self.loop.run_forever()
        for server in servers: server.close()
        tasks = asyncio.all_tasks(self.loop)
        for task in tasks: task.cancel()
        self.loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        self.loop.close()

    async def _visit(self, reader, writer):
        try:
            self.lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            path = self.lines[0].split()[1].lstrip("/")
            self.hits[path] += 1
            self.asked.append((writer.get_extra_info("sockname")[0], path))
            await self._answer(path, writer)
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError): pass
        finally: writer.close()

    async def _answer(self, path, writer):
        """Files by their names; a path `fault/argument` by the method of that name."""
        kind, _, argument = path.partition("/")
        data = pictures().get(kind) or bad_pictures().get(kind, (None,))[0]
        if data is None: await getattr(self, kind)(argument, writer)
        else: writer.write(answer(data))
        await writer.drain()

    async def status(self, argument, writer): writer.write(answer(status=f"{argument} Whatever"))

    async def recovers(self, argument, writer):
        """Answers with a status twice and is fine then; the path says who asks, so that each test counts alone."""
        code, count = argument.split("/")[0], self.hits[f"recovers/{argument}"]
        again = {"Retry_After": "0"} if code == "429" else {}
        writer.write(answer(status=f"{code} Busy", **again) if count < 3 else answer(pictures()["good.jpg"]))

    async def later(self, argument, writer): writer.write(answer(status="429 Busy", Retry_After=argument))

    async def silent(self, argument, writer): await asyncio.sleep(60)

    async def hangs_up(self, argument, writer): pass

    async def drips(self, argument, writer):
        writer.write(answer(length=100_000))
        for _ in range(10_000):
            writer.write(b"x")
            await writer.drain()
            await asyncio.sleep(0.02)

    async def header_drips(self, argument, writer):
        writer.write(b"HTTP/1.1 200 OK\r\nX-Long: ")
        for _ in range(10_000):
            writer.write(b"x")
            await writer.drain()
            await asyncio.sleep(0.02)

    async def endless(self, argument, writer):
        writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")
        while True:
            writer.write(bytes(65536))
            await writer.drain()

    async def endless_header(self, argument, writer):
        writer.write(b"HTTP/1.1 200 OK\r\nX-Long: ")
        while True:
            writer.write(b"x" * 65536)
            await writer.drain()

    async def not_http(self, argument, writer): writer.write(b"SSH-2.0-OpenSSH_9.6\r\n\r\n")

    async def says_huge(self, argument, writer): writer.write(answer(b"x", length=10**12))

    async def says_more(self, argument, writer): writer.write(answer(pictures()["good.jpg"], length=10**5))

    async def says_less(self, argument, writer): writer.write(answer(pictures()["good.jpg"], length=1500))

    async def zipped(self, argument, writer):
        writer.write(answer(gzip.compress(pictures()["good.jpg"]), Content_Encoding="gzip"))

    async def zip_bomb(self, argument, writer): writer.write(answer(zip_bomb(), Content_Encoding="gzip"))

    async def not_zipped(self, argument, writer): writer.write(answer(b"plain", Content_Encoding="gzip"))

    async def to(self, argument, writer): writer.write(answer(status="302 Found", Location=unquote(argument)))

    async def nowhere(self, argument, writer): writer.write(answer(status="302 Found"))

    async def loop_(self, argument, writer):
        writer.write(answer(status="301 Moved", Location="/loop_/" + "a" * (self.hits.total() % 2)))

    async def robots(self, argument, writer):
        writer.write(answer(pictures()["good.jpg"], X_Robots_Tag=list(ROBOTS)[int(argument)]))
