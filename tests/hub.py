"""A little Hugging Face Hub on the loopback: the few addresses that a download of a snapshot asks for."""

import hashlib
import json
import os
import subprocess
import sys
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import unquote, urlsplit

COMMITS = {"a": "a" * 40, "b": "b" * 40}


def read(directory):
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_): pass

    def answer(self, code, body=b"", **headers):
        self.send_response(code)
        for name, value in {"Content-Length": len(body), **headers}.items(): self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command == "GET": self.wfile.write(body)

    def do_GET(self):
        path = unquote(urlsplit(self.path).path).strip("/")
        self.server.asked.append(path)
        words = path.split("/")
        repo = "/".join(words[2:4] if words[0] == "api" else words[:2])
        if repo not in self.server.repos: return self.answer(404, X_Error_Code="RepoNotFound")
        commits, branches = self.server.repos[repo]
        what, revision, *rest = words[4:] if words[0] == "api" else words[2:]
        commit = branches.get(revision, revision)
        if commit not in commits: return self.answer(404, X_Error_Code="RevisionNotFound")
        files = commits[commit]
        oid = lambda name: hashlib.sha1(files[name]).hexdigest()
        listing = [dict(type="file", path=name, size=len(data), oid=oid(name)) for name, data in files.items()]
        if what == "revision": return self.answer(200, json.dumps(dict(id=repo, sha=commit, siblings=[dict(rfilename=n) for n in files])).encode())
        if what == "tree": return self.answer(200, json.dumps(listing).encode())
        name = "/".join(rest)
        if name not in files: return self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        self.answer(200, files[name], X_Repo_Commit=commit, ETag=f'"{oid(name)}"')

    do_HEAD = do_GET


@contextmanager
def hub(repos):
    """Serve `{name: ({commit: {path: bytes}}, {branch: commit})}`; gives address and the list of what is asked for."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.repos, server.asked, server.daemon_threads = repos, [], True
    Thread(target=server.serve_forever, daemon=True).start()
    try: yield f"http://127.0.0.1:{server.server_port}", server.asked
    finally:
        server.shutdown()
        server.server_close()


SCRIPT = """
import json, sys
from sd_nb.opening import open_parts
for source, revision in json.loads(sys.argv[1]):
    try: print(json.dumps(["parts", open_parts(source, revision=revision).unet.conv_in.bias.tolist()]))
    except Exception as error: print(json.dumps([type(error).__name__, str(error)]))
"""


def open_there(home, endpoint, *wanted, **env):
    """Open models in a process of its own whose Hub is at `endpoint` and whose cache is in `home`."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and "proxy" not in k.lower()}
    env = clean | dict(HF_ENDPOINT=endpoint, HF_HOME=str(home), HF_HUB_DISABLE_XET="1", HF_HUB_DISABLE_TELEMETRY="1", NO_PROXY="*") | env
    done = subprocess.run([sys.executable, "-c", SCRIPT, json.dumps(wanted)], capture_output=True, text=True, timeout=100, env=env, cwd=home)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]
