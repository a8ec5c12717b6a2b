"""hub/fetch.py against servers that misbehave: no wrong file is accepted, no token leaves for
another host, and every command finishes when it is run again.

    pytest tests/test_fetch.py

Two servers on this machine: 127.0.0.1 is the hub, 127.0.0.2 some other host.
"""

import errno
import gzip
import hashlib
import http.server
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import namedtuple
from pathlib import Path
from urllib.parse import quote

import pytest
import torch

from conftest import REPO
from model import Transformer, init_weights
from nano360.config import CHECKPOINT, DATA, USAGE, ModelConfig, Stop
from nano360.hub import fetch as net
from nano360.hub.fetch import ask, fetch, fetch_repo, inside, list_hub, list_urls
from nano360.sources import Remote

CANARY = "hf_CANARYcanary0123456789"
BODY = random.Random(0).randbytes(300_000)
OTHER = random.Random(1).randbytes(300_000)  # of the same size
THIRD = len(BODY) // 3
COMMIT = "0123456789abcdef0123456789abcdef01234567"
OPEN = ("", "size", "sha256", "blob")  # what may be known of a file


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves server.files, unless server.play(handler, n) takes the n-th request for itself."""
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        server = self.server
        with server.guard:
            server.seen.append((self.command, self.path, dict(self.headers)))
            n = sum(path == self.path for _, path, _ in server.seen) - 1
        try:
            if not (server.play and server.play(self, n)):
                self.file()
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    do_HEAD = do_GET

    def file(self, etag='"v1"', stop=None, ranges=True, body=None):
        """What a good server does; `stop`: the connection is cut after so many bytes of it."""
        found = self.server.files.get(self.path)
        if found is None:
            return self.reply(404, {}, b"no such file")
        body, more = (body or found[0]), found[1]
        asked = self.headers.get("Range") if ranges else None
        if not asked or self.headers.get("If-Range", etag) != etag:
            return self.reply(200, {"ETag": etag} | more, body, stop)
        begin = int(asked.removeprefix("bytes=").rstrip("-"))
        if begin >= len(body):
            return self.reply(416, {"Content-Range": f"bytes */{len(body)}"}, b"")
        said = {"ETag": etag, "Content-Range": f"bytes {begin}-{len(body) - 1}/{len(body)}"}
        self.reply(206, said, body[begin:], stop)

    def reply(self, code, headers, body=b"", stop=None):
        """One answer; a header of None is left out."""
        self.send_response(code)
        for key, value in ({"Content-Length": len(body)} | headers).items():
            if value is not None:
                self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return True
        body = body[:stop]
        self.wfile.write(body)
        with self.server.guard:
            self.server.sent += len(body)
        if stop is not None or headers.get("Content-Length", 0) is None:
            self.close_connection = True
        return True

    def endless(self, headers):
        self.reply(200, headers | {"Content-Length": None})
        while True:
            self.wfile.write(b"x" * 65536)

    def stall(self, stop):
        """Part of the file, and then nothing on a connection that stays open."""
        self.reply(200, {"ETag": '"v1"', "Content-Length": len(BODY)}, BODY[:stop])
        self.wfile.flush()
        self.server.woken.wait(5)
        self.close_connection = True


def start(host: str) -> http.server.ThreadingHTTPServer:
    server = http.server.ThreadingHTTPServer((host, 0), Handler)
    server.handle_error = lambda request, address: None  # a client that hangs up
    server.guard, server.woken = threading.Lock(), threading.Event()
    server.url = f"http://{host}:{server.server_address[1]}"
    server.seen, server.sent, server.files, server.play = [], 0, {}, None
    server.daemon_threads, server.block_on_close = True, False
    threading.Thread(target=server.serve_forever, args=(0.005,), daemon=True).start()
    return server


@pytest.fixture
def hosts(monkeypatch, tmp_path):
    """The hub and another host; the canary is set, and .netrc has a password for both."""
    hub, other = start("127.0.0.1"), start("127.0.0.2")
    for server in (hub, other):
        server.files["/f.bin"] = (BODY, {})
    monkeypatch.setattr(net, "HUB", hub.url)
    monkeypatch.setattr(net, "SCHEMES", ("http://127.0.0.1:", "http://127.0.0.2:"))
    monkeypatch.setattr(net, "PAUSE", 0.002)
    monkeypatch.setattr(net, "TIMEOUT", (2.0, 0.3))
    monkeypatch.setenv("HF_TOKEN", CANARY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,127.0.0.2")
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login me password netrcCANARY\n"
                     "machine 127.0.0.2 login me password netrcCANARY\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    yield namedtuple("Hosts", "hub other")(hub, other)
    for server in (hub, other):
        server.woken.set()
        server.shutdown()
        server.server_close()


def blob(body: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()


def remote(url: str, known: str, body: bytes = BODY) -> Remote:
    return Remote("f.bin", url, len(body) if known else None,
                  sha256=hashlib.sha256(body).hexdigest() if known == "sha256" else "",
                  blob=blob(body) if known == "blob" else "")


def stopped(code: int, call, *args) -> str:
    """The message of the Stop that call(*args) ends in."""
    with pytest.raises(Stop) as caught:
        call(*args)
    assert caught.value.code == code, caught.value
    assert CANARY not in str(caught.value) and "SIGNED" not in str(caught.value)
    assert "\n" not in str(caught.value) and caught.value.__suppress_context__ | (
        caught.value.__context__ is None)
    return str(caught.value)


def to(where):
    """A server that redirects to where(hub, other), but answers there."""
    def play(h, n):
        if h.path != "/f.bin" or h.server is not to.hub:
            return False
        return h.reply(302, {"Location": where(to.hub.url, to.other.url)}, b"moved")
    return play


def text_html(h, n):
    return h.reply(200, {"Content-Type": "text/html; charset=utf-8"}, b"<html>log in</html>")


def first(play):
    """Misbehave at the first request only."""
    return lambda h, n: n == 0 and (play(h, n) or True)


def cut_then(play):
    """Break off after a third of the file, then misbehave."""
    return lambda h, n: (h.file(stop=THIRD) or True) if n == 0 else n == 1 and (play(h, n) or True)


def ranged(begin, more=0, etag='"v1"'):
    """A part of another file, as what was asked for."""
    return lambda h, n: h.reply(206, {"ETag": etag, "Content-Range": (
        f"bytes {begin}-{len(BODY) - 1}/{len(BODY) + more}")}, OTHER[begin:])


# name -> how the server behaves, what it ends in (0: finishes), what has to be known of the file
CASES = {
    "cut once": (cut_then(lambda h, n: h.file()), 0, OPEN),
    "cut at every 10,000th byte": (lambda h, n: h.file(stop=10_000) or True, 0, OPEN),
    "cut before the first byte": (lambda h, n: h.file(stop=0) or True, DATA, OPEN),
    "no answer at all": (first(lambda h, n: setattr(h, "close_connection", True)), 0, OPEN),
    "cut without a declared length": (first(lambda h, n: h.reply(
        200, {"ETag": '"v1"', "Content-Length": None}, BODY[:THIRD])), 0, OPEN[1:]),
    "cut in a chunk": (first(lambda h, n: h.reply(
        200, {"Transfer-Encoding": "chunked", "Content-Length": None},
        b"%x\r\n" % len(BODY) + BODY[:THIRD])), 0, OPEN),
    "ignores Range": (lambda h, n: h.file(ranges=False, stop=THIRD if n < 2 else None) or True, 0,
                      OPEN),
    "cut and ignores Range, always": (lambda h, n: h.file(ranges=False, stop=THIRD) or True, DATA,
                                      OPEN),
    "range begins elsewhere": (cut_then(ranged(THIRD + 1)), 0, OPEN),
    "range of another size": (cut_then(ranged(THIRD, more=1)), None, OPEN),
    "range without Content-Range": (cut_then(lambda h, n: h.reply(206, {}, OTHER[THIRD:])), 0,
                                    OPEN),
    "416": (cut_then(lambda h, n: h.reply(416, {"Content-Type": "text/html"}, b"no")), 0, OPEN),
    "changed between tries": (cut_then(lambda h, n: h.file(etag='"v2"')), 0, OPEN),
    "changed, and If-Range passed over": (cut_then(ranged(THIRD, etag='"v2"')), 0, OPEN),
    "weak ETag": (lambda h, n: h.file(etag='W/"v1"', stop=THIRD if n == 0 else None) or True, 0,
                  OPEN),
    "declares too little": (lambda h, n: h.reply(200, {}, BODY[:THIRD]), DATA, OPEN[1:]),
    "declares too much": (lambda h, n: h.reply(200, {}, BODY + b"x"), DATA, OPEN[1:]),
    "sends too much": (lambda h, n: h.reply(200, {"Content-Length": None}, BODY + b"x"), DATA,
                       OPEN[1:]),
    "declares more than any file": (lambda h, n: h.reply(200, {"Content-Length": 10**12}, b"",
                                                         0), DATA, OPEN),
    "endless": (lambda h, n: h.endless({}), DATA, OPEN),
    "endless and packed": (lambda h, n: h.endless({"Content-Encoding": "gzip"}), DATA, OPEN),
    "packed": (lambda h, n: h.reply(200, {"Content-Encoding": "gzip"}, gzip.compress(BODY)), DATA,
               OPEN),
    "wrong bytes": (lambda h, n: h.reply(200, {}, OTHER), DATA, OPEN[2:]),
    "wrong bytes after a cut": (cut_then(ranged(THIRD)), DATA, OPEN[2:]),
    "redirect to another host": (to(lambda hub, other: f"{other}/f.bin?X-Sig=SIGNED&{hub}/"), 0,
                                 OPEN),
    "redirect to it as the hub's password": (to(lambda hub, other: other + "\\@" + hub[7:]
                                                + "/f.bin"), DATA, OPEN),
    "redirect, relative": (to(lambda hub, other: "g/../g.bin"), 0, OPEN),
    "redirect to another scheme": (to(lambda hub, other: other.replace("http", "ftp")
                                      + "/f.bin?X=SIGNED"), DATA, OPEN),
    "redirect to what works, but may not": (to(lambda hub, other: hub.replace(
        "127.0.0.1", "localhost") + "/g.bin"), DATA, OPEN),
    "redirect to a file": (to(lambda hub, other: "file:///etc/hostname"), DATA, OPEN),
    "redirect to no address": (to(lambda hub, other: "http://127.0.0.1:99999999/?SIGNED"), DATA,
                               OPEN),
    "redirect to [": (to(lambda hub, other: "http://[/?SIGNED"), DATA, OPEN),
    "redirect loop": (to(lambda hub, other: "/f.bin"), DATA, OPEN),
    "redirect with an endless body": (first(lambda h, n: h.reply(
        302, {"Location": "/g.bin", "Content-Length": None}) and h.endless({})), 0, OPEN),
    "redirect to nobody": (to(lambda hub, other: "http://127.0.0.1:1/f?X-Sig=SIGNED"), DATA, OPEN),
    "401": (lambda h, n: h.reply(401, {}, b"no"), DATA, OPEN),
    "403": (lambda h, n: h.reply(403, {}, b"no"), DATA, OPEN),
    "404": (lambda h, n: h.reply(404, {}, b"no"), DATA, OPEN),
    "400": (lambda h, n: h.reply(400, {}, BODY), DATA, OPEN),
    "204": (lambda h, n: h.reply(204, {"Content-Length": None}), DATA, OPEN),
    "429, again in 1 s": (first(lambda h, n: h.reply(429, {"Retry-After": "1"})), 0, OPEN[2:3]),
    "429 in nonsense": (first(lambda h, n: h.reply(429, {"Retry-After": "soon \xb2"})), 0, OPEN),
    "500 three times": (lambda h, n: n < 3 and h.reply(500, {}, b"oops"), 0, OPEN),
    "503 always": (lambda h, n: h.reply(503, {}, b"oops"), DATA, OPEN),
    "a page to log in": (text_html, DATA, OPEN),
    "a page to log in, after a cut": (cut_then(text_html), DATA, OPEN),
    "stalls": (first(lambda h, n: h.stall(THIRD)), 0, OPEN[:3]),
    "no http": (first(lambda h, n: h.wfile.write(b"SSH-2.0-x\r\n\r\n") and h.close_connection), 0,
                OPEN[:2]),
}


@pytest.mark.parametrize("name, known", [(name, known) for name, (_, _, kinds) in CASES.items()
                                         for known in kinds])
def test_misbehaviour(name, known, hosts, tmp_path, capfd):
    """Never a wrong file, never the token elsewhere, and the same call ends well afterwards."""
    play, code, _ = CASES[name]
    if code is None:  # a size that is known shows it at once; else the file is begun again
        code = DATA if known else 0
    hub, other = to.hub, to.other = hosts
    for server, more in ((hub, "/g.bin"), (other, f"/f.bin?X-Sig=SIGNED&{hub.url}/")):
        server.files[more] = server.files["/f.bin"]
    folder = tmp_path / "in"
    path, wanted = folder / "f.bin", remote(f"{hub.url}/f.bin", known)
    hub.play = play
    if code:
        stopped(code, fetch, wanted, path, 10**7)
        assert not path.exists()
    else:
        fetch(wanted, path, 10**7)
        assert path.read_bytes() == BODY
    hub.play = None
    fetch(wanted, path, 10**7)
    assert path.read_bytes() == BODY
    left = {p.name for p in folder.iterdir()} - {"f.bin", "f.bin.bad"}
    assert not left, left
    assert any(CANARY in headers.get("Authorization", "") for _, _, headers in hub.seen)
    assert not any("CANARY" in str(seen) for seen in other.seen)
    assert not any("netrc" in str(seen) for seen in hub.seen + other.seen)
    assert not any(b"CANARY" in p.read_bytes() or b"SIGNED" in p.read_bytes()
                   for p in folder.iterdir())
    said = "".join(capfd.readouterr())
    assert CANARY not in said and "SIGNED" not in said


@pytest.mark.parametrize("step", [1000, 99_999, 100_000, 299_999])
def test_nothing_is_fetched_twice(step, hosts, tmp_path):
    hosts.hub.play = lambda h, n: h.file(stop=step) or True
    fetch(remote(f"{hosts.hub.url}/f.bin", ""), tmp_path / "f", 10**6)
    assert (tmp_path / "f").read_bytes() == BODY
    assert hosts.hub.sent == len(BODY)
    assert len(hosts.hub.seen) == -(-len(BODY) // step)
    fetch(remote(f"{hosts.hub.url}/f.bin", "sha256"), tmp_path / "f")
    assert len(hosts.hub.seen) == -(-len(BODY) // step)  # it is there


def test_what_came_before_a_stall_is_kept(hosts, tmp_path):
    hosts.hub.play = lambda h, n: n == 0 and (h.stall(THIRD) or True)
    fetch(remote(f"{hosts.hub.url}/f.bin", ""), tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == BODY
    assert [headers.get("Range") for _, _, headers in hosts.hub.seen] == [None, f"bytes={THIRD}-"]


def test_a_part_is_of_one_content(hosts, tmp_path):
    """A part is gone on with only for the same URL and content, and where equality is sure."""
    path, url = tmp_path / "f", f"{hosts.hub.url}/f.bin"

    def second(known: str, etag: str, change) -> str | None:
        """The Range of the second call, after a first one that was cut and given up."""
        for p in tmp_path.glob("f*"):
            p.unlink()
        hosts.hub.play = lambda h, n: h.file(etag=etag, stop=THIRD) if not n else h.reply(400, {})
        hosts.hub.seen.clear()
        stopped(DATA, fetch, remote(url, known), path)
        assert Path(f"{path}.part").stat().st_size == THIRD
        hosts.hub.play = lambda h, n: h.file(etag=etag) or True
        change()
        fetch(remote(url, known), path)
        assert path.read_bytes() == BODY and len(hosts.hub.seen) == 3  # one of them the second's
        headers = hosts.hub.seen[-1][2]
        assert headers.get("If-Range") == (etag if etag == '"v1"' and "Range" in headers else None)
        return headers.get("Range")

    def nothing():
        pass

    def note(text):
        return lambda: Path(f"{path}.part.json").write_text(text)
    rest = f"bytes={THIRD}-"
    assert second("", '"v1"', nothing) == rest
    assert second("sha256", 'W/"v1"', nothing) == rest
    assert second("blob", 'W/"v1"', nothing) == rest
    assert second("", 'W/"v1"', nothing) is None
    assert second("size", "v1", nothing) is None
    assert second("sha256", '"v1"', note("{torn")) is None
    assert second("sha256", '"v1"', note("[]")) is None
    other = {"url": "http://127.0.0.9/f.bin", "hash": "", "etag": '"v1"'}
    assert second("", '"v1"', note(json.dumps(other))) is None
    assert second("sha256", '"v1"', note(json.dumps(other | {"url": url}))) is None
    assert second("size", '"v1"', lambda: os.truncate(f"{path}.part", 10**6)) is None


def test_a_whole_part_needs_no_network(hosts, tmp_path):
    """Killed between the last byte and the rename."""
    path, wanted = tmp_path / "f", remote(f"{hosts.hub.url}/f.bin", "sha256")
    Path(f"{path}.part").write_bytes(BODY)
    Path(f"{path}.part.json").write_text(json.dumps(
        {"url": wanted.url, "hash": wanted.sha256, "etag": ""}))
    fetch(wanted, path)
    assert path.read_bytes() == BODY and not hosts.hub.seen


def test_what_is_there(hosts, tmp_path):
    path, wanted = tmp_path / "f", remote(f"{hosts.hub.url}/f.bin", "sha256")
    path.write_bytes(OTHER)
    for known in ("sha256", "blob"):
        text = stopped(DATA, fetch, remote(wanted.url, known), path)
        assert "move it away" in text and path.read_bytes() == OTHER
    path.write_bytes(BODY[:-1])
    assert "299999 bytes, expected 300000" in stopped(DATA, fetch, remote(wanted.url, "size"), path)
    assert not hosts.hub.seen
    hosts.hub.files["/f.bin"] = (b"", {})
    for known in OPEN:  # an empty file is a file
        fetch(remote(wanted.url, known, b""), tmp_path / f"empty{known}")
        assert (tmp_path / f"empty{known}").read_bytes() == b""


@pytest.mark.parametrize("known", OPEN)
def test_the_limit(known, hosts, tmp_path):
    """Declared, it ends before a byte is read, and it is not tried again."""
    wanted = remote(f"{hosts.hub.url}/f.bin", known)
    assert "at most 299999" in stopped(DATA, fetch, wanted, tmp_path / "f", len(BODY) - 1)
    assert len(hosts.hub.seen) == 1 and not [*tmp_path.glob("f*")]
    fetch(wanted, tmp_path / "f", len(BODY))


def test_wrong_hash_is_kept_aside(hosts, tmp_path):
    path, wanted = tmp_path / "f", remote(f"{hosts.hub.url}/f.bin", "sha256")
    hosts.hub.play = lambda h, n: h.file(body=OTHER) or True
    text = stopped(DATA, fetch, wanted, path)
    assert wanted.sha256 in text and hashlib.sha256(OTHER).hexdigest() in text
    assert [p.name for p in tmp_path.glob("f*")] == ["f.bad"]
    assert (tmp_path / "f.bad").read_bytes() == OTHER


def test_the_listed_etag_holds(hosts, tmp_path):
    one = ask(f"{hosts.other.url}/f.bin")
    assert (one.name, one.size, one.etag) == ("f.bin", len(BODY), '"v1"')
    hosts.other.play = lambda h, n: h.file(etag='"v2"', body=OTHER) or True
    text = stopped(DATA, fetch, one, tmp_path / "f")
    assert "changed" in text and not (tmp_path / "f").exists()


def test_words(hosts, tmp_path, monkeypatch, capsys):
    """What a message says: what happened, and what to do."""
    url, path = f"{hosts.hub.url}/api/models/a/b/resolve/x/f.bin?token=SIGNED", tmp_path / "f"
    wanted = Remote("f.bin", url, None)
    hosts.hub.play = lambda h, n: h.reply(403, {})
    assert f"terms on {hosts.hub.url}/a/b and" in (text := stopped(DATA, fetch, wanted, path))
    assert "HF_TOKEN was sent" in text
    monkeypatch.delenv("HF_TOKEN")
    assert "HF_TOKEN is not set" in stopped(DATA, fetch, wanted, path)
    url = f"{hosts.hub.url}/datasets/a/b/resolve/x/f.bin"
    assert f"{hosts.hub.url}/datasets/a/b and" in stopped(DATA, fetch, Remote("f", url, 1), path)
    hosts.other.play = lambda h, n: h.reply(403, {})
    url = f"http://user:SIGNED@{hosts.other.url[7:]}/f.bin"
    monkeypatch.setattr(net, "SCHEMES", ("http://",))
    text = stopped(DATA, fetch, Remote("f.bin", url, None), path)
    assert "forbidden" in text and "HF_TOKEN" not in text and f"{hosts.other.url}/f.bin" in text
    assert "Authorization" not in hosts.other.seen[-1][2]
    hosts.hub.play = lambda h, n: h.file(stop=THIRD) if not n else h.reply(500, {})
    text = stopped(DATA, fetch, remote(f"{hosts.hub.url}/f.bin", "size"), path)
    assert "100,000 bytes are kept" in text and "same command" in text and "answered 500" in text
    assert "the network failed (ProtocolError); again in" in capsys.readouterr().out
    monkeypatch.setenv("HF_TOKEN", f"{CANARY}\nX-Evil: 1")
    stopped(USAGE, fetch, remote(f"{hosts.hub.url}/f.bin", "size"), path)


def test_tries_are_counted_from_the_last_byte(hosts, tmp_path, monkeypatch):
    monkeypatch.setattr(net, "TRIES", 3)
    # two failures between any two pieces, far more than 3 in all
    hosts.hub.play = lambda h, n: h.reply(500, {}) if n % 3 else (h.file(stop=50_000) or True)
    fetch(remote(f"{hosts.hub.url}/f.bin", "sha256"), tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == BODY and len(hosts.hub.seen) == 16
    hosts.hub.seen.clear()
    hosts.hub.play = lambda h, n: h.reply(500, {})
    stopped(DATA, fetch, remote(f"{hosts.hub.url}/f.bin", "sha256"), tmp_path / "g")
    assert len(hosts.hub.seen) == 3


def test_pauses(hosts, tmp_path, monkeypatch):
    """Doubled up to a minute; what a server asks for in seconds, up to five."""
    slept = []
    monkeypatch.setattr(net.time, "sleep", slept.append)
    monkeypatch.setattr(net, "PAUSE", 1.0)
    after = {"a": None, "b": "7", "c": "9999999", "d": "0", "e": "nan", "f": "-5", "g": "1" * 5000,
             "h": "Wed, 21 Oct 2026 07:28:00 GMT"}
    first_pause = {}
    for key, value in after.items():
        slept.clear()
        hosts.hub.play = lambda h, n, value=value: h.reply(429, {"Retry-After": value})
        stopped(DATA, fetch, remote(f"{hosts.hub.url}/f.bin", ""), tmp_path / key)
        first_pause[key] = slept[0]
        if key == "a":
            assert slept == [1, 2, 4, 8, 16, 32, 60]
    assert first_pause == {"a": 1, "b": 7, "c": 300, "d": 1, "e": 1, "f": 1, "g": 1, "h": 1}


CHILD = """
import json, resource, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from nano360.config import run
from nano360.hub import fetch as net
url, path, limit, hub = sys.argv[2:]
net.HUB, net.SCHEMES, net.TIMEOUT = hub, ("http://127.0.0.",), (5, 20)
if int(limit):
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
one = net.Remote("f.bin", url, 300_000)
sys.exit(run(lambda argv: net.fetch(one, Path(path)), "", [], []))
"""


def child(hub, path: Path, limit: int = 0) -> subprocess.Popen:
    words = [str(REPO), f"{hub.url}/f.bin", str(path), str(limit), hub.url]
    return subprocess.Popen([sys.executable, "-c", CHILD, *words], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True)


def test_disk_full_then_room(hosts, tmp_path):
    process = child(hosts.hub, tmp_path / "f", 123_456)
    out, err = process.communicate(timeout=30)
    assert process.returncode == CHECKPOINT and "Traceback" not in err
    assert "needed" in err and "free" in err and "same command" in err
    assert (tmp_path / "f.part").read_bytes() == BODY[:123_456] and not (tmp_path / "f").exists()
    fetch(remote(f"{hosts.hub.url}/f.bin", "size"), tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == BODY
    assert hosts.hub.seen[-1][2]["Range"] == "bytes=123456-"
    assert CANARY not in out + err


def test_no_space_left(hosts, tmp_path, monkeypatch):
    """A disk or a quota that is full; and an error that is not about space stays what it is."""
    wanted = remote(f"{hosts.hub.url}/f.bin", "sha256")

    class Full(io.FileIO):
        def write(self, block):
            room = 50_000 - os.fstat(self.fileno()).st_size
            if room <= 0:
                raise OSError(number, os.strerror(number))
            return super().write(block[:min(room, 777)])  # a raw write may be a short one
    for number in (errno.ENOSPC, errno.EDQUOT):
        with monkeypatch.context() as patch:
            patch.setattr(net, "open", lambda path, mode, **_: Full(path, mode), raising=False)
            text = stopped(CHECKPOINT, fetch, wanted, tmp_path / str(number))
        assert os.strerror(number) in text and "needed 250,000 bytes" in text
        assert (tmp_path / f"{number}.part").read_bytes() == BODY[:50_000]
        fetch(wanted, tmp_path / str(number))
        assert (tmp_path / str(number)).read_bytes() == BODY
        assert hosts.hub.seen[-1][2]["Range"] == "bytes=50000-"
    (tmp_path / "g").mkdir()
    (tmp_path / "g" / "f.part").mkdir()
    with pytest.raises(OSError) as caught:
        fetch(remote(f"{hosts.hub.url}/f.bin", "sha256"), tmp_path / "g" / "f")
    assert caught.value.errno == errno.EISDIR


def test_killed_in_the_middle(hosts, tmp_path):
    hosts.hub.play = lambda h, n: n == 0 and (h.stall(THIRD) or True)
    process = child(hosts.hub, tmp_path / "f")
    part, end = tmp_path / "f.part", time.time() + 20
    while not (part.exists() and part.stat().st_size == THIRD) and time.time() < end:
        time.sleep(0.01)
    text = stopped(CHECKPOINT, fetch, remote(f"{hosts.hub.url}/f.bin", "size"), tmp_path / "f")
    assert f"process {process.pid} on" in text and part.stat().st_size == THIRD
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL and not (tmp_path / "f").exists()
    sent = hosts.hub.sent
    fetch(remote(f"{hosts.hub.url}/f.bin", "size"), tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == BODY
    assert hosts.hub.sent - sent == len(BODY) - THIRD
    assert [p.name for p in tmp_path.glob("f*")] == ["f"]


# ---- names and listings --------------------------------------------------------------------------

HOSTILE = ["", "/etc/passwd", "..", "../f", "a/../../f", "a//b", "a/", "/", ".", "./a", "a/./b",
           "a\\b", "..\\f", "C:f", "c:/f", "a\0b", "a\nb", "a\x1b[2Jb", "\ud800", "a/f.part",
           "f.PART", "f.part.json", "f.bad", "hub.json", "a/Hub.json", "a\u202eb"]


def test_names(tmp_path):
    for name in HOSTILE:
        text = stopped(DATA, inside, tmp_path, name)
        assert text.isprintable()
    for name in ("a", "a/b.c", "..a", "a..", "...", "é ß/文", "a b", "github.json", ".git"):
        assert inside(tmp_path, name) == tmp_path / name
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "out").symlink_to(tmp_path)
    (tmp_path / "root" / "f").symlink_to("/etc/hostname")
    (tmp_path / "link").symlink_to(tmp_path / "root")
    for name in ("out/f", "f"):
        assert "symlink" in stopped(DATA, inside, tmp_path / "root", name)
    assert inside(tmp_path / "link", "g") == tmp_path / "link" / "g"  # the root may be one


def serve_repo(server, repo: str, files: dict[str, bytes], per_page: int = 1000,
               commit: str = COMMIT, odd: dict | None = None) -> None:
    """Put a repository on the hub: its api as it was when this was written, and its files."""
    api = f"/api/{'' if repo.startswith('datasets/') else 'models/'}{repo}"
    for name in ("main", "ckpt_1", "refs%2Fpr%2F1", commit):
        server.files[f"{api}/revision/{name}"] = (json.dumps({"sha": commit}).encode(), {})
    entries = [{"type": "directory", "path": "a", "size": 0, "oid": "0" * 40}]
    for name, body in files.items():
        large = {"lfs": {"oid": hashlib.sha256(body).hexdigest(), "size": len(body),
                         "pointerSize": 134}} if len(body) > 1000 else {}
        entries.append({"type": "file", "path": name, "size": len(body),
                        "oid": "f" * 40 if large else blob(body)} | large | (odd or {}))
        server.files[f"/{repo}/resolve/{commit}/{quote(name)}"] = (body, {})
    for k in range(0, len(entries), per_page):
        cursor = f"&cursor={k}" if k else ""
        more = k + per_page < len(entries)
        link = f'<{server.url}{api}/tree/{commit}?recursive=true&cursor={k + per_page}>; rel="next"'
        server.files[f"{api}/tree/{commit}?recursive=true{cursor}"] = (
            json.dumps(entries[k:k + per_page]).encode(), {"Link": link} if more else {})


def test_list_hub(hosts):
    files = {f"data/{k:02d} é%.txt": b"%d" % k for k in range(25)}
    files |= {"large.bin": BODY, "x.md": b""}
    serve_repo(hosts.hub, "datasets/o-1/n.b", files, per_page=4)
    commit, found = list_hub("datasets/o-1/n.b", "", "")
    assert commit == COMMIT and [one.name for one in found] == sorted(files)
    assert sum("/tree/" in path for _, path, _ in hosts.hub.seen) == 7
    large = [one for one in found if one.name == "large.bin"][0]
    assert (large.size, large.sha256, large.blob) == (
        len(BODY), hashlib.sha256(BODY).hexdigest(), "")
    assert [one.blob for one in found[:25]] == [blob(b"%d" % k) for k in range(25)]
    assert found[0].url == (
        f"{hosts.hub.url}/datasets/o-1/n.b/resolve/{COMMIT}/data/00%20%C3%A9%25.txt")
    assert [one.name for one in list_hub("datasets/o-1/n.b", "refs/pr/1", "data/0[12]*")[1]] == [
        "data/01 é%.txt", "data/02 é%.txt"]
    text = stopped(DATA, list_hub, "datasets/o-1/n.b", "main", "*.parquet")
    assert "none of 27" in text and "data/00" in text and "*.parquet" in text
    assert "not found" in stopped(DATA, list_hub, "datasets/o-1/n.b", "gone", "")
    for repo in ("n", "a/b/c", "datasets/n", "../n", "a/..", "https://x/y", "a/b?c", "", "a/b\n"):
        stopped(USAGE, list_hub, repo, "", "")
    for revision in ("a b", "../x", "a?b", "é", "a\n"):
        stopped(USAGE, list_hub, "o/n", revision, "")


ODD = [{"path": name} for name in HOSTILE] + [{"path": 1}, {"path": None}, {"size": -1},
      {"size": "5"}, {"size": True}, {"size": None}, {"oid": "f" * 39}, {"oid": "F" * 40},
      {"oid": None}, {"lfs": 1}, {"lfs": {"size": 5}}, {"lfs": {"size": 5, "oid": "a" * 63}},
      {"lfs": {"size": 5, "oid": "../" * 21 + "a"}}]


@pytest.mark.parametrize("odd", ODD, ids=ascii)
def test_hostile_entries(odd, hosts, tmp_path):
    serve_repo(hosts.hub, "datasets/o/n", {"f.txt": b"hello"}, odd=odd)
    text = stopped(DATA, list_hub, "datasets/o/n", "", "")
    assert text.isprintable()
    stopped(DATA, fetch_repo, "datasets/o/n", "*", tmp_path / "to")
    assert not (tmp_path / "to").exists()


@pytest.mark.parametrize("page, headers", [
    (b"{", {}), (b"[1]", {}), (b'{"a": 1}', {}), (b"[" * 200_000, {}), (b"\xff\xfe", {}),
    (b"null", {}), (b"[]", {}), (b"[]", {"Link": '</api/next>; rel="next"'}),
    (b"[]", {"Link": '<https://evil.example/?SIGNED>; rel="next"'}),
    (b"[]", {"Link": '<OTHER/api/next>; rel="next"'}),
    (b"[]", {"Link": '<http://[>; rel="next"'}), (b"<html>", {"Content-Type": "text/html"}),
    (b'"' + b"x" * 300_000 + b'"', {})], ids=range(13))
def test_hostile_listings(page, headers, hosts, monkeypatch):
    """Odd json, pages without end, a next page elsewhere: one line, and nothing is asked there."""
    monkeypatch.setattr(net, "LISTING", 250_000)
    monkeypatch.setattr(net, "PAGES", 20)
    serve_repo(hosts.hub, "o/n", {"f.txt": b"hello"})
    headers = {key: text.replace("OTHER", hosts.other.url) for key, text in headers.items()}
    hosts.hub.files[f"/api/models/o/n/tree/{COMMIT}?recursive=true"] = (page, headers)
    hosts.hub.files["/api/next"] = (page, headers)
    stopped(DATA, list_hub, "o/n", "", "")
    assert len(hosts.hub.seen) <= 21 and not hosts.other.seen
    for sha in (b'{"sha": "../../x"}', b'{"sha": 1}', b"{}", b"[]", b'{"sha": "%s"}' % (b"a" * 39)):
        hosts.hub.files["/api/models/o/n/revision/main"] = (sha, {})
        stopped(DATA, list_hub, "o/n", "", "")


def test_a_listing_has_a_limit(hosts, monkeypatch):
    serve_repo(hosts.hub, "o/n", {f"{k}.txt": b"%d" % k for k in range(50)})
    monkeypatch.setattr(net, "LISTING", 1000)
    assert "more than 1,000 bytes" in stopped(DATA, list_hub, "o/n", "", "")


def test_a_cut_listing_is_asked_again(hosts):
    serve_repo(hosts.hub, "o/n", {f"{k}.txt": b"%d" % k for k in range(50)})
    hosts.hub.play = lambda h, n: n == 0 and (h.file(stop=20) or True)
    assert len(list_hub("o/n", "", "")[1]) == 50


def test_list_urls(hosts):
    hub, other = hosts.hub.url, hosts.other.url
    names = [f"arxiv/{k:02d}.jsonl" for k in range(20)] + ["c4/a%20b.jsonl"]
    for k, name in enumerate(names):
        hosts.hub.files[f"/data/v1/{name}"] = (b"x" * k, {})
    hosts.other.files["/else/where.jsonl?k=SIGNED"] = (b"abc", {})
    lines = [f"{hub}/data/v1/{name}" for name in names] + [f"{other}/else/where.jsonl?k=SIGNED"]
    hosts.hub.files["/data/v1/urls.txt"] = (("\r\n".join(lines) + "\n\n").encode(), {})
    found = list_urls(f"{hub}/data/v1/urls.txt", "")
    assert [one.name for one in found] == [*names[:20], "c4/a b.jsonl", "else/where.jsonl"]
    assert [one.size for one in found] == [*range(21), 3]
    assert {one.etag for one in found} == {'"v1"'} and found[-1].url == lines[-1]
    assert {method for method, _, _ in hosts.other.seen} == {"HEAD"}
    hosts.hub.seen.clear()
    assert [one.name for one in list_urls(f"{hub}/data/v1/urls.txt", "c4/*")] == ["c4/a b.jsonl"]
    assert len(hosts.hub.seen) == 2  # the list, and the one that is wanted
    assert "none of 22" in stopped(DATA, list_urls, f"{hub}/data/v1/urls.txt", "*.zst")
    for line in ("http://evil.example/f", "ftp://x/f", "file:///etc/hostname", f"{hub}/a/%2e%2e/f",
                 f"{hub}/data/v1/a%2f..%2f..%2ff", f"{hub}/data/v1/a%5cb", f"{hub}/data/v1/",
                 f"{hub}//a", f"{hub}/data/v1/a%00b", f"{hub}/data/v1/a?1\n{hub}/data/v1/a?2",
                 f"{hub}/data/v1/gone.jsonl"):
        hosts.hub.files["/data/v1/urls.txt"] = (line.encode(), {})
        stopped(DATA, list_urls, f"{hub}/data/v1/urls.txt", "")
    for k in (1, 2):
        hosts.hub.files[f"/data/v1/a?{k}"] = (b"", {})
    hosts.hub.files["/data/v1/urls.txt"] = (f"{hub}/data/v1/a?1\n{hub}/data/v1/a?2".encode(), {})
    assert "two files a;" in stopped(DATA, list_urls, f"{hub}/data/v1/urls.txt", "")
    hosts.hub.play = lambda h, n: h.command == "HEAD" and n < 2 and h.reply(503, {})
    assert ask(f"{hub}/data/v1/arxiv/07.jsonl").size == 7


def test_https_alone():
    """As it is without the settings of these tests."""
    assert net.SCHEMES == ("https://",) and net.HUB == "https://huggingface.co"
    assert "https://" in stopped(DATA, fetch, Remote("f", "http://127.0.0.1:1/f", 1), Path("f"))
    assert not Path("f.part").exists()


# ---- repositories --------------------------------------------------------------------------------

SIZES = dict(n_layer=2, n_head=2, n_embd=16, n_inner=32, vocab_size=40, seq_len=16, init_std=0.3)
CRYSTAL = dict(norm="layer", bias=True, rope_interleaved=True, rotary_dim=4, tie=True,
               mup_base_width=8, mup_emb_mult=14.6, mup_alpha=2.2)


@pytest.mark.parametrize("kind", ["llama", "shards", "pickled", "crystalcoder"])
def test_a_model_for_its_readers(kind, hosts, tmp_path, capsys):
    """Served as saved, fetched, read: the same weights."""
    model = Transformer(ModelConfig(**SIZES, **(CRYSTAL if kind == "crystalcoder" else {})))
    init_weights(model, 3)
    model.save_pretrained(tmp_path / "made", 1, 2, max_shard_gb=4e-6 if kind == "shards" else 5.0)
    files = {p.name: p.read_bytes() for p in (tmp_path / "made").iterdir()}
    if kind == "pickled":
        del files["model.safetensors"]
        torch.save(dict(model.state_dict()), tmp_path / "pytorch_model.bin")
        files["pytorch_model.bin"] = (tmp_path / "pytorch_model.bin").read_bytes()
    else:
        files["pytorch_model.bin"] = b"not wanted"
    wanted = {name for name in files if kind == "pickled" or name != "pytorch_model.bin"}
    files |= {"modeling_x.py": b"evil()", "README.md": b"x", "optimizer.pt": BODY,
              "sub/model.safetensors": BODY, "special_tokens_map.json": b"{}"}
    wanted |= {"special_tokens_map.json"}
    serve_repo(hosts.hub, "LLM360/Amber", files)
    fetch_repo("LLM360/Amber@ckpt_1", "", tmp_path / "to")
    assert {p.name for p in (tmp_path / "to").iterdir()} == wanted | {*net.OURS}
    read = Transformer.from_pretrained(tmp_path / "to")
    for name, weight in model.state_dict().items():
        assert torch.equal(read.state_dict()[name], weight), name
    said = capsys.readouterr().out
    assert "--tokenizer=FILE" in said and f"{len(wanted)} files" in said and "free at" in said
    serve_repo(hosts.hub, "LLM360/Amber", files | {"tokenizer.model": b"x"})
    fetch_repo("LLM360/Amber", "", tmp_path / "to2")
    assert "--tokenizer" not in capsys.readouterr().out
    fetch_repo("LLM360/Amber", "*m*", tmp_path / "to3")
    assert not list((tmp_path / "to3").rglob("*.py"))
    assert (tmp_path / "to3" / "sub" / "model.safetensors").read_bytes() == BODY


def test_what_is_no_model(hosts, tmp_path):
    for files in ({"model.safetensors": b"x"}, {"config.json": b"{}"}, {"README.md": b""},
                  {"config.json": b"{}", "model.safetensors.index.json": b"{}"}):
        serve_repo(hosts.hub, "o/n", files)
        assert "config.json" in stopped(DATA, fetch_repo, "o/n", "", tmp_path / "to")
    assert not (tmp_path / "to").exists()
    assert "--files" in stopped(USAGE, fetch_repo, "datasets/o/n", "", tmp_path / "to")
    assert "not found" in stopped(DATA, fetch_repo, "o/gone", "", tmp_path / "to")


def test_hub_json(hosts, tmp_path, capsys):
    """A folder is of one repository at one commit, whatever the branch does."""
    to, files = tmp_path / "to", {"a.txt": b"one", "b.txt": BODY, "run.py": b"code"}
    serve_repo(hosts.hub, "datasets/o/n", files)
    fetch_repo("datasets/o/n", "*.txt", to)
    said = json.loads((to / "hub.json").read_text())
    assert (said["repo"], said["revision"], said["commit"]) == ("datasets/o/n", "main", COMMIT)
    assert said["files"] == {
        "a.txt": {"size": 3, "sha256": "", "blob": blob(b"one")},
        "b.txt": {"size": len(BODY), "sha256": hashlib.sha256(BODY).hexdigest(), "blob": ""}}
    serve_repo(hosts.hub, "datasets/o/n", {"a.txt": b"two", "c.txt": b""}, commit="a" * 40)
    hosts.hub.seen.clear()
    (to / "a.txt").unlink()
    fetch_repo("datasets/o/n", "*", to)  # a data set may hold code
    assert (to / "a.txt").read_bytes() == b"one" and not (to / "c.txt").exists()
    assert (to / "run.py").read_bytes() == b"code"
    assert not any("revision/main" in path for _, path, _ in hosts.hub.seen)
    assert [path for _, path, _ in hosts.hub.seen if "b.txt" in path] == []
    assert json.loads((to / "hub.json").read_text()) == said
    (to / "b.txt").write_bytes(OTHER)
    assert "b.txt" in stopped(DATA, fetch_repo, "datasets/o/n", "*", to)
    for spec in ("datasets/o/m", "o/n", f"datasets/o/n@{COMMIT}", "datasets/o/n@refs/pr/1"):
        assert "choose another --to" in stopped(USAGE, fetch_repo, spec, "*", to)
    (to / "hub.json").write_text((to / "hub.json").read_text().replace(COMMIT, "b" * 40))
    assert "was changed" in stopped(DATA, fetch_repo, "datasets/o/n", "*", to)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("mine")
    stopped(USAGE, fetch_repo, "datasets/o/n", "*", tmp_path / "full")
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["x"]
    for names in (["hub.json.part"], ["hub.json"], ["hub.json", "hub.json.sha256.part"]):
        torn = tmp_path / "".join(names)  # killed before the seal was there
        torn.mkdir()
        for name in names:
            (torn / name).write_text("{")
        fetch_repo("datasets/o/n", "*", torn)
        assert (torn / "a.txt").read_bytes() == b"two"


def test_room(hosts, tmp_path, monkeypatch):
    """What is there already needs none, and a part needs the rest."""
    usage = namedtuple("usage", "total used free")
    free = [0]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, free[0]))
    serve_repo(hosts.hub, "datasets/o/n", {"a.bin": BODY, "b.bin": OTHER})
    free[0] = 599_999
    text = stopped(CHECKPOINT, fetch_repo, "datasets/o/n", "*", tmp_path / "to")
    assert "needed 600,000 bytes, free 599,999" in text
    assert {p.name for p in (tmp_path / "to").iterdir()} == {*net.OURS}
    hosts.hub.play = lambda h, n: h.path.endswith("b.bin") and (
        h.file(stop=THIRD) or True if n == 0 else h.reply(400, {}))
    free[0] = 600_000
    stopped(DATA, fetch_repo, "datasets/o/n", "*", tmp_path / "to")
    hosts.hub.play, free[0] = None, 199_999
    text = stopped(CHECKPOINT, fetch_repo, "datasets/o/n", "*", tmp_path / "to")
    assert "needed 200,000 bytes, free 199,999" in text
    free[0] = 200_000
    fetch_repo("datasets/o/n", "*", tmp_path / "to")
    assert (tmp_path / "to" / "b.bin").read_bytes() == OTHER
