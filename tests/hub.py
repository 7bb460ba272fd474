"""A small Hub on this machine that can be slow, break off, lie and fail."""
import hashlib
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "c0ffee" * 6 + "c0de"


def git_hash(data): return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Handler(BaseHTTPRequestHandler):
    "Small files as they are, large ones from a store on another port, as the Hub does it"
    def log_message(self, *args): pass

    def reply(self, code, headers, body=b""):
        self.send_response(code)
        for name, value in headers.items(): self.send_header(name, value)
        self.end_headers()
        if self.command == "GET": self.send(body)

    def send(self, body):
        hub = self.server.hub
        stop = hub.breaks.pop(0) if hub.breaks and body else len(body)
        for i in range(0, min(stop, len(body)), hub.piece):
            self.wfile.write(body[i:min(i + hub.piece, stop)])
            hub.pause.wait(hub.seconds)
        self.close_connection = True

    def do_GET(self):
        hub, path = self.server.hub, self.path
        hub.log.append((self.command, path, self.headers.get("Range")))
        if hub.failures: return self.reply(hub.failures.pop(0), {"Content-Length": "0"})
        if path == "/loop": return self.reply(302, {"Location": "/loop"})
        name = path.split("/store/")[-1] if "/store/" in path else path[1:].replace(f"/resolve/{COMMIT}/", ":").replace("/resolve/main/", ":")
        for pinned in hub.pinned: name = name.replace(f"/resolve/{pinned}/", ":")
        data = hub.files.get(name)
        if data is None: return self.reply(404, {"Content-Length": "0"})
        large = len(data) > hub.large
        tag = hub.tags.get(name) or (hashlib.sha256(data).hexdigest() if large else git_hash(data))
        if large and "/store/" not in path:
            return self.reply(302, {"Location": f"{hub.store}/store/{name}", "X-Linked-Etag": f'"{tag}"', "X-Linked-Size": str(len(data)),
                                    "X-Repo-Commit": COMMIT, "ETag": '"the page that sends you on"'})
        about = {"ETag": f'"{tag}"', "X-Repo-Commit": COMMIT}
        start = int(self.headers["Range"][6:-1]) if self.headers.get("Range") and hub.ranges else 0
        if start and self.headers.get("If-Range", f'"{tag}"') == f'"{tag}"':
            piece = {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}
            return self.reply(206, about | piece | {"Content-Length": str(len(data) - start)}, data[start:])
        self.reply(200, about | {"Content-Length": str(len(data))}, data)

    do_HEAD = do_GET


class Hub:
    def __init__(self, files, pinned=()):
        self.files, self.pinned, self.log, self.failures, self.breaks, self.tags = dict(files), pinned, [], [], [], {}
        self.large, self.ranges, self.piece, self.seconds, self.pause = 1000, True, 1 << 16, 0, threading.Event()

    def gets(self): return [(path, start) for method, path, start in self.log if method == "GET" and ("/store/" in path or "large" not in path)]


@contextmanager
def serve(files, pinned=()):
    "Run a Hub and its store until the block ends"
    hub, servers = Hub(files, pinned), [ThreadingHTTPServer(("127.0.0.1", 0), Handler) for _ in range(2)]
    for server in servers:
        server.hub, server.daemon_threads = hub, True
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    hub.address, hub.store = (f"http://127.0.0.1:{server.server_port}" for server in servers)
    try: yield hub
    finally:
        hub.pause.set()
        for server in servers:
            server.shutdown()
            server.server_close()
