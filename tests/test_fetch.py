"""Fetching from strangers: whatever the web does, bytes or one reason come out, in bounded time and memory."""

import asyncio
import socket
import time
from dataclasses import replace

import pytest
from aiohttp.abc import AbstractResolver
from hypothesis import given, settings
from hypothesis import strategies as st

from sd_nb.data.fetch import NotFetched, Rules, check_url, fetch, is_public, open_session, opted_out, seconds_of
from web import PRIVATE, PUBLIC, ROBOTS, Web, bad_pictures, pictures


def counts_as_public(address): return address == PUBLIC or is_public(address)


RULES = Rules(max_bytes=1_000_000, seconds=1, pause=0.01, patience=5, permitted=counts_as_public)


@pytest.fixture(scope="module")
def web():
    with Web() as web: yield web


class Names(AbstractResolver):
    """Knows some names; a list of lists of addresses is answered one list after the other, as a lying name server does."""

    def __init__(self, **names): self.names, self.asked = names, []

    async def resolve(self, host, port=0, family=socket.AF_INET):
        self.asked.append(host)
        if host not in self.names: raise OSError(f"no host {host}")
        found = self.names[host]
        if isinstance(found[0], list): found = found.pop(0) if len(found) > 1 else found[0]
        return [dict(hostname=host, host=address, port=port, proto=0, flags=socket.AI_NUMERICHOST,
                     family=socket.AF_INET6 if ":" in address else socket.AF_INET) for address in found]

    async def close(self): pass


def get(url, rules=RULES, resolver=None):
    """The bytes of an address, or the reason why there are none."""
    async def run():
        async with open_session(rules, resolver=resolver) as session: return await fetch(session, url, rules)
    try: return asyncio.run(run())
    except NotFetched as failure: return failure.reason


def test_every_picture_arrives_whole(web):
    for name, data in pictures().items(): assert get(web.url(name)) == data
    for name, (data, _) in bad_pictures().items(): assert get(web.url(name)) == data


@pytest.mark.parametrize("path, reason, visits", [
    ("status/404", "HTTP 404", 1), ("status/410", "HTTP 410", 1), ("status/403", "HTTP 403", 1), ("status/204", "HTTP 204", 1),
    ("status/206", "HTTP 206", 1), ("status/304", "HTTP 304", 1), ("status/500", "HTTP 500", 3), ("status/429", "HTTP 429", 3),
    ("status/503", "HTTP 503", 3), ("later/100", "HTTP 429", 1), ("later/0", "HTTP 429", 3), ("later/-1", "HTTP 429", 3),
    ("silent", "timeout", 3), ("drips", "timeout", 3), ("header_drips", "timeout", 3), ("hangs_up", "no connection", None),
    ("endless", "too many bytes", 1), ("endless_header", "not HTTP", 1), ("not_http", "not HTTP", 1),
    ("says_huge", "too many bytes", 1), ("says_more", "cut short", 3), ("zip_bomb", "too many bytes", 1), ("not_zipped", "cut short", 3),
    ("nowhere", "bad address", 1), ("loop_/", "too many redirects", None)])
def test_fault_25_a_reason_for_every_fault(web, path, reason, visits):
    """Refused, tried again or given up, in a few seconds, and each under its own reason."""
    before, start = web.hits[path], time.monotonic()
    assert get(web.url(path)) == reason
    assert visits is None or web.hits[path] - before == visits
    assert time.monotonic() - start < 6


def test_fault_25_what_passes_is_tried_again(web):
    """A server that is busy twice and fine then has served; Retry-After is waited for."""
    for code in (429, 500, 502, 503, 504, 408): assert get(web.url(f"recovers/{code}/fetch")) == pictures()["good.jpg"]
    start = time.monotonic()
    assert get(web.url("later/1"), replace(RULES, tries=2)) == "HTTP 429"
    assert time.monotonic() - start > 1


def test_fault_25_lengths(web):
    """A length that is too small cuts the picture (decoding finds out) or is noticed; compressed answers are unpacked."""
    assert get(web.url("says_less")) in ("not HTTP", pictures()["good.jpg"][:1500])
    assert get(web.url("zipped")) == pictures()["good.jpg"]


def test_fault_25_memory_is_bounded(web):
    """Endless bodies and a gzip bomb of 100 MB cost no more than the cap and the pieces under way."""
    get(web.url("good.jpg"))
    with open("/proc/self/clear_refs", "w") as f: f.write("5")  # forget the peak so far
    before = peak()
    for path in ("endless", "zip_bomb", "says_huge", "endless_header"): get(web.url(path))
    assert peak() - before < 30e6


def peak():
    """The most memory that this process had, in bytes."""
    with open("/proc/self/status") as f: return next(int(line.split()[1]) * 1024 for line in f if line.startswith("VmHWM"))


@pytest.mark.parametrize("url", ["file:///etc/passwd", "gopher://127.0.0.2/", "ftp://127.0.0.2/a.jpg", "data:image/png;base64,AA",
                                 "//127.0.0.2/a", "http://", "http:///a", "", None, 7, "no address", "http://[::1", "http://a:b/", "http://\ud800/"])
def test_fault_25_what_is_no_web_address(url):
    assert get(url) == "bad address"


@pytest.mark.parametrize("target", ["file:///etc/passwd", "gopher://a/", "http://[::1", "http://a:b/"])
def test_fault_25_redirects_to_no_web_address(web, target):
    assert get(web.redirect(target)) == "bad address"


HERE = ["127.0.0.1", "localhost", "0x7f.1", "2130706433", "0177.0.0.1", "127.1", "0.0.0.0", "0", "[::ffff:127.0.0.1]",
        "[::ffff:7f00:1]"]


@pytest.mark.parametrize("host", HERE)
def test_fault_25_this_machine_by_any_name(web, host):
    """However it is spelled, directly or by a redirect: nobody here is asked."""
    before, refused = len(web.asked), ("private address", "bad address")  # no name is all digits: some versions stop there
    assert get(f"http://{host}:{web.port}/good.jpg") in refused
    assert len(web.asked) == before
    assert get(web.redirect(f"http://{host}:{web.port}/good.jpg")) in refused
    assert len(web.asked) == before + 1


@pytest.mark.parametrize("host", ["169.254.169.254", "10.0.0.1", "192.168.1.1", "172.16.0.1", "100.64.0.1", "[fd00::1]", "[fe80::1]", "[::]",
                                  "[::1]", "[64:ff9b::7f00:1]", "[2002:7f00:1::]", "224.0.0.1", "255.255.255.255"])
def test_fault_25_the_network_at_home(web, host):
    assert get(f"http://{host}/") == get(web.redirect(f"http://{host}/")) == "private address"


@pytest.mark.parametrize("address, public", [
    ("8.8.8.8", True), ("2606:4700::1111", True), ("::ffff:8.8.8.8", True), ("64:ff9b::808:808", True), ("2002:808:808::1", True),
    ("ff0e::1", False), ("fec0::1", False), ("4000::1", False), ("2001:0:808:808::1", False), ("2001:db8::1", False), ("fe80::1%eth0", False),
    ("64:ff9b::a00:1", False), ("2002:a00:1::", False), ("::ffff:169.254.169.254", False), ("::", False), ("239.1.1.1", False),
    ("192.0.2.1", False), ("198.18.0.1", False), ("240.0.0.1", False), ("100.127.255.255", False)])
def test_fault_25_which_numbers_are_public(address, public):
    """The registries of special addresses, and what gateways unpack."""
    assert is_public(address) is public


def test_fault_25_names_that_lie(web):
    """A name that leads here is refused, also among public ones, also when only the second answer does; a public one is fine."""
    names = Names(**{"good.test": [PUBLIC], "home.test": [PRIVATE], "both.test": [PRIVATE, "::1"],
                     "rebind.test": [[PUBLIC], [PRIVATE]]})
    assert get(f"http://good.test:{web.port}/good.jpg", resolver=names) == pictures()["good.jpg"]
    before = len(web.asked)
    for name in ("home.test", "both.test"): assert get(f"http://{name}:{web.port}/good.jpg", resolver=names) == "private address"
    assert len(web.asked) == before
    assert get(f"http://rebind.test:{web.port}/good.jpg", resolver=names) == pictures()["good.jpg"]
    assert get(f"http://rebind.test:{web.port}/good.jpg", resolver=names) == "private address"
    assert get(f"http://away.test:{web.port}/good.jpg", resolver=names) == "no such host"
    assert [address for address, _ in web.asked[before:]] == [PUBLIC]


def test_fault_25_a_name_server_that_is_busy(web):
    """"Ask again" is asked again; "no such name" is not."""
    class Busy(Names):
        async def resolve(self, host, port=0, family=socket.AF_INET):
            if self.asked.count(host) < 2:
                self.asked.append(host)
                raise socket.gaierror(socket.EAI_AGAIN, "try again")
            return await super().resolve(host, port, family)

    names = Busy(**{"good.test": [PUBLIC]})
    assert get(f"http://good.test:{web.port}/good.jpg", resolver=names) == pictures()["good.jpg"]
    nobody = Names()
    assert get("http://good.test/", resolver=nobody) == "no such host" and len(nobody.asked) == 1


@pytest.mark.parametrize("number, may", list(enumerate(ROBOTS.values())), ids=list(ROBOTS))
def test_fault_25_robots(web, number, may):
    """The owner's no, in all its forms, and everything that cannot be read."""
    assert get(web.url(f"robots/{number}")) == (pictures()["good.jpg"] if may else "opted out")


def test_robots_of_several_headers():
    assert not opted_out([]) and not opted_out(["all", "otherbot: noai"])
    assert opted_out(["otherbot: noai", "noai"]) and opted_out(["all", ""])


@settings(deadline=None)
@given(st.lists(st.one_of(st.text(), st.text(alphabet="noai:, *-x"), st.sampled_from(list(ROBOTS))), max_size=3))
def test_fault_25_robots_never_fail(headers):
    """Any text is a yes or a no; a no stays one whatever else is said."""
    assert opted_out(headers) in (True, False)
    assert opted_out([*headers, "noai"]) and opted_out(["noai", *headers])


@settings(deadline=None)
@given(st.one_of(st.text(), st.text(alphabet="htps:/[].@#?%0a"), st.from_regex(r"https?://\S*", fullmatch=True)), st.sampled_from(["", "http://a/b"]))
def test_fault_25_any_text_is_an_address_or_none(text, base):
    try: assert check_url(text, base).scheme in ("http", "https")
    except NotFetched as failure: assert failure.reason == "bad address"


def test_an_honest_name(web):
    """The request says who asks, asks for no compression, and brings no cookie."""
    get(web.url("good.jpg"))
    lines = dict(line.split(": ", 1) for line in web.lines[1:] if line)
    assert lines["User-Agent"].startswith("sd_nb/") and "noai" in lines["User-Agent"] and "Mozilla" not in lines["User-Agent"]
    assert lines["Accept-Encoding"] == "identity" and "Cookie" not in lines


def test_retry_after():
    assert [seconds_of(said) for said in (None, "", "3", " 3 ", "-3", "1e9", "nan", "inf", "\u0663", "9" * 99, "tomorrow")] == [
        0, 0, 3, 3, 0, 0, 0, 0, 0, 0, 0]
    assert 3500 < seconds_of(time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 3600))) <= 3600
