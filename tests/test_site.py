"""The site builds by one command, every page answers, and no link, anchor or picture is broken."""
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from html.parser import HTMLParser
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(re.sub(r"^\d+[a-zA-Z0-9]*_", "", p.stem) + ".html" for p in (ROOT / "nbs").glob("*.ipynb") if p.name[0] not in "_.")

pytestmark = pytest.mark.skipif(
    not shutil.which("quarto") and not importlib.util.find_spec("smalldocs"),
    reason="neither Quarto nor smalldocs (which needs Python 3.11) is installed",
)


def docs():
    """tools/docs.py as a module."""
    spec = importlib.util.spec_from_file_location("sd_nb_docs", ROOT / "tools" / "docs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Page(HTMLParser):
    """Ids of a page, and everything that it points to."""

    def __init__(self, text):
        super().__init__()
        self.ids, self.links, self.text = set(), [], text
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if attrs.get("id"): self.ids.add(attrs["id"])
        self.links += [(tag, attrs[k]) for k in ("href", "src") if attrs.get(k)]

    handle_startendtag = handle_starttag


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built by the documented command into a folder of its own."""
    out = tmp_path_factory.mktemp("site") / "_docs"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "MPLBACKEND": "agg"}
    done = subprocess.run([sys.executable, "tools/docs.py", "build", "--out", str(out)], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.fixture(scope="module")
def get(site):
    """A function that asks the site's server, on loopback, for a path: status and body."""
    server = docs().server(site, 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def get(path):
        connection = HTTPConnection(*server.server_address, timeout=30)
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read()

    yield get
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def pages(get):
    """Every page of the site, as the server answers it."""
    answers = {name: get(f"/{name}") for name in PAGES}
    assert {name: status for name, (status, _) in answers.items() if status != 200} == {}
    return {name: Page(body.decode()) for name, (_, body) in answers.items()}


def test_every_notebook_has_a_page(site):
    """One page for each notebook, under its name without the number, and no page besides."""
    assert sorted(p.relative_to(site).as_posix() for p in site.rglob("*.html") if p.name != "404.html") == PAGES


def test_no_link_is_broken(pages, get):
    """Every link, picture, script and stylesheet of the site answers, and every anchor exists on its page."""
    broken, known = [], {}
    for name, page in pages.items():
        for tag, link in page.links:
            if urlsplit(link).scheme or link.startswith("//"): continue
            whole = urlsplit(urljoin(f"/{name}", link))
            path = whole.path + ("index.html" if whole.path.endswith("/") else "")
            if path not in known: known[path] = get(path)[0]
            target, anchor = pages.get(unquote(path)[1:]), unquote(whole.fragment)
            if known[path] != 200 or target and anchor and anchor not in target.ids: broken.append(f"{name}: <{tag}> {link}")
    assert broken == []


def test_pictures_are_pictures(pages, get):
    """The map answers as an SVG, and pictures inside a page are whole data."""
    assert get("/images/map.svg")[1].lstrip().startswith(b"<?xml")
    inline = [link for page in pages.values() for tag, link in page.links if tag == "img" and link.startswith("data:")]
    assert inline and all(re.match(r"data:image/[a-z+]+;base64,[A-Za-z0-9+/=\s]+\Z", link) for link in inline)


def test_sidebar_lists_the_book(pages):
    """Every page links to every other page."""
    for name, page in pages.items():
        there = {urlsplit(link).path.removeprefix("./") for tag, link in page.links if tag == "a"}
        assert set(PAGES) - there - {name} == set(), name


def test_search_knows_every_page(get):
    """The search index has text from each page."""
    entries = json.loads(get("/search.json")[1])
    assert set(PAGES) <= {entry["href"].partition("#")[0] for entry in entries}


def test_signatures_are_shown_and_linked(pages):
    """A public class has its signature with an anchor, and its name in another notebook's prose links there."""
    assert "unet" in pages["model.unet.html"].ids and "Exported source" in pages["model.unet.html"].text
    links = {link for page in pages.values() for tag, link in page.links if tag == "a"}
    assert [link for link in links if re.match(r"[\w.]+\.html#\w", link)]


def test_site_works_offline(pages, site):
    """No script, style or picture comes from elsewhere; formulas alone may, where KaTeX could not be fetched."""
    outside = {link for page in pages.values() for tag, link in page.links if tag != "a" and re.match(r"(https?:)?//", link)}
    if not (site / "site_libs" / "katex").is_dir(): outside = {link for link in outside if "katex" not in link}
    assert outside == set()


def test_numbers_stay_out_of_addresses(pages):
    """No page links to a notebook file or to a numbered page: moving a notebook breaks no address."""
    local = {link for page in pages.values() for tag, link in page.links if tag == "a" and not urlsplit(link).scheme}
    assert [link for link in local if ".ipynb" in link or re.match(r"\d\d_", link)] == []
