"""The explorer behind proxies, on machines with odd registries, and in terminals."""

import contextlib
import http.client
import itertools
import json
import mimetypes
import os
import pty
import re
import select
import stat
import subprocess
import sys
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urljoin

import numpy as np
import pytest
from browser import drawn
from test_explorer import TASK, Served, client_of
from test_store import inference_rows, make_writer, write_episode

from lerobot_attn.errors import ConfigError
from lerobot_attn.explorer import app as app_module
from lerobot_attn.explorer import browser as browser_module
from lerobot_attn.explorer.base_path import base_path
from lerobot_attn.explorer.browser import graphical_browser, open_page
from lerobot_attn.explorer.hosts import host_pattern
from lerobot_attn.explorer.library import Library
from lerobot_attn.synthetic import SyntheticPlan, write_planted_episode

NAME = "hub.example.org"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    write_episode(folder / TASK / "episode_00000.zarr", 2)
    return folder


@pytest.fixture(scope="module")
def static(tmp_path_factory):
    """A folder like the built page's, with a file of every kind."""
    folder = tmp_path_factory.mktemp("static")
    (folder / "assets").mkdir()
    (folder / "index.html").write_text(
        '<!doctype html><html><head><script type="module" src="./assets/index-abc.js"></script></head></html>'
    )
    for name in ("index-abc.js", "index-abc.css", "a.svg", "a.woff2", "a.map", "a.unheardof"):
        (folder / "assets" / name).write_text("content")
    (folder / "sources.sha256").write_text("abc")
    return folder


@contextlib.contextmanager
def proxied(port, path, *, strips, host=NAME, says=False):
    """Show a server under a path, as reverse proxies do; yields the proxy's port.

    `strips` takes the path off what is passed on; `says` tells it in a header; `host` is what users call the
    proxy, which is passed on.
    """

    class Proxy(BaseHTTPRequestHandler):
        def do_GET(self):
            asked = self.path
            if asked.split("?")[0] != path and not asked.startswith(f"{path}/"):
                self.send_error(404)
                return
            if strips:
                asked = asked.removeprefix(path)
                asked = asked if asked.startswith("/") else f"/{asked}"
            upstream = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
            headers = {"Host": host, **({"X-Forwarded-Prefix": path} if says else {})}
            upstream.request("GET", asked, headers=headers)
            answer = upstream.getresponse()
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in ("transfer-encoding", "connection"):
                    self.send_header(name, value)
            self.send_header("Connection", "close")
            self.end_headers()
            with contextlib.suppress(OSError):
                while part := answer.read1():
                    self.wfile.write(part)
                    self.wfile.flush()

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        thread.join(20)
        server.server_close()


def get(url):
    with urllib.request.urlopen(url, timeout=20) as answer:  # follows redirects, as a browser does
        return answer.url, answer.read().decode()


def open_as_a_browser(url):
    """Load a page as a browser does, and return where it is once its own script has been followed."""
    url, page = get(url)
    (script,) = re.findall(r"<head><script>(.*?)</script>", page)
    ends = re.search(r"if\(!/(.*?)/\.test\(location\.pathname\)\)", script)[1].replace(r"\/", "/")
    before, mark, query = url.partition("?")
    if not re.search(ends, before):
        assert 'location.replace(location.pathname+"/"+location.search+location.hash)' in script
        url, page = get(f"{before}/{mark}{query}")
    return url, page


WAYS = {
    "the path is taken off": {"strips": True},
    "the path is taken off, and told": {"strips": True, "says": True},
    "the path is passed on, and told": {"strips": False, "says": True},
    "the path is passed on": {"strips": False},
}


@pytest.mark.parametrize("slash", ["/", ""])
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("path", ["/proxy/8123", "/user/jane doe/proxy/8123".replace(" ", "%20"), "/a.b"])
def test_the_page_and_its_data_are_there_behind_a_proxy(run, static, way, path, slash):
    base = base_path(path + slash) if not way.get("says") and not way["strips"] else ""
    options = {"hosts": ["127.0.0.1", NAME], "base": base, "static": static}
    with client_of(run, **options) as client, proxied(client.port, path, **way) as port:
        url, page = open_as_a_browser(f"http://127.0.0.1:{port}{path}{slash}?frame=3")
        assert url == f"http://127.0.0.1:{port}{path}/?frame=3"
        (script,) = re.findall(r'src="(.*?)"', page)
        assert get(urljoin(url, script))[1] == "content"
        (episode,) = json.loads(get(urljoin(url, "api/run"))[1])["episodes"]
        facts = get(urljoin(url, f"api/episodes/{episode['id']}"))[1]
        assert json.loads(facts)["version"] == episode["version"]
        with urllib.request.urlopen(urljoin(url, "api/events"), timeout=20) as events:
            assert events.headers["X-Accel-Buffering"] == "no"
            assert events.readline() == b"event: ready\n"
        # Without the proxy, too.
        assert client.get("/api/run").status_code == 200


def test_an_address_under_a_path_needs_no_host_of_its_own_to_be_led_on(run, static):
    """A redirect to the server's own name would lead away from the proxy."""
    with client_of(run, base="/attn", static=static) as client:
        answer = client.get("/attn?frame=3")
        assert (answer.status_code, answer.headers["location"]) == (307, "/attn/?frame=3")


def test_a_path_that_is_passed_on_unannounced_names_the_remedy(run, static):
    with client_of(run, static=static) as client:
        for path in ("/attn", "/attn/", "/attn/index.html", "/attn/api/run", "/attn/assets/index-abc.js"):
            answer = client.get(path)
            assert answer.status_code == 404
            assert answer.json()["error"].endswith("lerobot-attn view … --base-path /attn/"), path
        for path in ("/favicon.ico", "/api/nothing", "//evil.example/", "/../x/", "/assets/nothing.js"):
            answer = client.get(path)
            assert answer.status_code == 404
            assert "--base-path" not in answer.text, path


@pytest.mark.parametrize(
    "said", ["//evil.example", "/\\evil", "https://evil.example", "/..", "/api", "x" * 999]
)
def test_a_header_cannot_lead_elsewhere(run, static, said):
    with client_of(run, static=static) as client:
        for path in ("/", "/api/run", "/index.html"):
            assert client.get(path, {"X-Forwarded-Prefix": said}).status_code == 200
        answer = client.get("//evil.example", {"X-Forwarded-Prefix": said})
        assert answer.status_code == 404
        assert "location" not in answer.headers


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/proxy/8123/", "/proxy/8123"),
        ("proxy/8123", "/proxy/8123"),
        ("https://hub.example.org/user/jane/proxy/8123/", "/user/jane/proxy/8123"),
        ("/a%20b", "/a b"),
        ("/a b/", "/a b"),
        ("/é", "/é"),
        ("/", ""),
        ("", ""),
    ],
)
def test_base_paths_are_read_as_people_write_them(text, expected):
    assert base_path(text) == expected


@pytest.mark.parametrize("text", ["/api/", "/assets", "/a/../b", "/..", "/a//b", "/a?b=c", "/a#b"])
def test_what_is_no_base_path_is_refused(text):
    with pytest.raises(ConfigError, match="--base-path: got") as error:
        base_path(text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (NAME, NAME),
        (f"{NAME}:8443", NAME),
        (f"https://{NAME}/user/jane/", NAME),
        ("HUB.Example.org", NAME),
        ("*.example.org", "*.example.org"),
        ("*", "*"),
        ("10.0.0.7", "10.0.0.7"),
        ("::1", "[::1]"),
        ("[fe80::1]:8123", "[fe80::1]"),
        ("bücher.example", "xn--bcher-kva.example"),
    ],
)
def test_hosts_are_read_as_people_write_them(text, expected):
    assert host_pattern(text) == expected


@pytest.mark.parametrize(
    "text", ["", " ", "a b", "exa*mple.org", "**", "http://", "a:port", "x\ny", "a..b", "/a"]
)
def test_what_is_no_host_is_refused(text):
    with pytest.raises(ConfigError, match="--allow-host: got") as error:
        host_pattern(text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_proxy_whose_name_is_not_known_is_refused_with_the_remedy(run, way):
    with client_of(run) as client, proxied(client.port, "/proxy/8123", **way) as port:
        for path in ("/", "/api/run", "/api/events"):
            with pytest.raises(urllib.error.HTTPError, match="400") as refused:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/proxy/8123{path}", timeout=20)
            text = refused.value.read().decode()
            assert len(text.splitlines()) == 1
            assert f"'{NAME}'" in text
            assert "127.0.0.1, localhost, [::1]" in text
            assert text.endswith(f"lerobot-attn view … --allow-host {NAME}\n")


def test_allowed_names_are_answered_and_no_others(run):
    hosts = ["127.0.0.1", host_pattern(NAME), host_pattern("*.lab.example")]
    with client_of(run, hosts=hosts) as client:
        for name in (NAME, f"{NAME}:8443", "a.lab.example", "b.a.lab.example", "HUB.EXAMPLE.ORG"):
            assert client.get("/api/run", {"Host": name}).status_code == 200, name
        for name in (
            "evil.example",
            f"{NAME}.evil.example",
            f"evil{NAME}",
            "lab.example.evil",
            "xlab.example",
        ):
            assert client.get("/api/run", {"Host": name}).status_code == 400, name
    with client_of(run, hosts=["*"]) as client:
        assert client.get("/api/run", {"Host": "evil.example"}).status_code == 200


@pytest.mark.parametrize("host", ["<script>alert(1)</script>", "a b", "x" * 5000, "", "$(reboot)"])
def test_a_host_that_is_no_name_is_refused_in_plain_text(run, host):
    with client_of(run) as client:
        answer = client.get("/", {"Host": host})
    assert answer.status_code == 400
    assert answer.headers["content-type"].startswith("text/plain")
    assert len(answer.text) < 1000
    assert "--allow-host NAME" in answer.text or not answer.text.startswith("Host")  # refused before us


BROKEN = {".js": "text/plain", ".css": "application/x-css", ".html": "text/plain", ".svg": "text/xml"}


@pytest.mark.parametrize("registry", ["wrong", "empty"])
def test_the_pages_files_have_their_types_whatever_the_machine_says(run, static, monkeypatch, registry):
    def guess(path, *_, **__):
        suffix = Path(path).suffix
        return (BROKEN.get(suffix, "text/plain") if registry == "wrong" else None, None)

    monkeypatch.setattr(mimetypes, "guess_type", guess)
    monkeypatch.setattr("starlette.responses.guess_type", guess)
    expected = {
        "/": "text/html; charset=utf-8",
        "/index.html": "text/html; charset=utf-8",
        "/assets/index-abc.js": "text/javascript; charset=utf-8",
        "/assets/index-abc.css": "text/css; charset=utf-8",
        "/assets/a.svg": "image/svg+xml",
        "/assets/a.woff2": "font/woff2",
        "/assets/a.map": "application/json",
        "/assets/a.unheardof": "application/octet-stream",
        "/sources.sha256": "application/octet-stream",
        "/api/run": "application/json",
    }
    with client_of(run, static=static) as client:
        for path, media_type in expected.items():
            answer = client.get(path)
            assert (answer.status_code, answer.headers["content-type"]) == (200, media_type), path
            again = client.get(path, {"If-None-Match": answer.headers["etag"]})
            assert (again.status_code, again.content) == (304, b""), path


def command(folder, name, script="#!/bin/sh\nexit 0\n"):
    """Write a program."""
    path = folder / name
    path.write_text(script)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.fixture
def desktop(tmp_path, monkeypatch):
    """A machine whose browsers are in one folder, with neither display nor preference yet."""
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER", "XDG_CURRENT_DESKTOP"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    monkeypatch.setenv("PATH", str(bin_))
    # Python looks once for browsers.
    monkeypatch.setattr(browser_module.webbrowser, "_tryorder", None)
    monkeypatch.setattr(browser_module.webbrowser, "_browsers", {})
    monkeypatch.setattr(browser_module.webbrowser, "_os_preferred_browser", None)
    return bin_


TEXT = ["w3m", "lynx", "links", "links2", "elinks", "www-browser", "browsh"]


@pytest.mark.parametrize("display", [None, "DISPLAY", "WAYLAND_DISPLAY"])
@pytest.mark.parametrize("name", TEXT)
def test_a_text_browser_is_never_opened(desktop, monkeypatch, name, display):
    path = command(desktop, name)
    if display:
        monkeypatch.setenv(display, ":0")
    assert graphical_browser() is None
    for choice in (name, str(path), f"{path} %s", f"{name} -T text/html", f"{name.upper()}"):
        monkeypatch.setenv("BROWSER", choice)
        monkeypatch.setattr(browser_module.webbrowser, "_tryorder", None)
        monkeypatch.setattr(browser_module.webbrowser, "_browsers", {})
        assert graphical_browser() is None, choice


@pytest.mark.parametrize("name", ["www-browser", "x-www-browser", "my-browser"])
def test_a_link_to_a_text_browser_is_one(desktop, monkeypatch, name):
    command(desktop, "w3m")
    (desktop / name).symlink_to(desktop / "w3m")
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setenv("BROWSER", name)
    assert graphical_browser() is None


@pytest.mark.parametrize("name", ["firefox", "chromium", "xdg-open", "x-www-browser", "google-chrome"])
def test_a_graphical_browser_needs_a_display(desktop, monkeypatch, name):
    command(desktop, name)
    command(desktop, "w3m")
    assert graphical_browser() is None
    monkeypatch.setattr(browser_module.webbrowser, "_tryorder", None)
    monkeypatch.setattr(browser_module.webbrowser, "_browsers", {})
    monkeypatch.setenv("DISPLAY", ":0")
    assert graphical_browser().name == name


@pytest.mark.parametrize("choice", ["'", '"x %s', "%s", " "])
def test_a_preference_that_is_no_command_opens_nothing(desktop, monkeypatch, choice):
    monkeypatch.setenv("BROWSER", choice)
    browser = graphical_browser()
    assert browser is None or not browser_module._open("http://127.0.0.1:1/")


def test_a_command_of_ones_own_gets_the_address_and_no_terminal(desktop, tmp_path, monkeypatch):
    """Remote editors set such a command where there is no display; it may as well end in a text browser."""
    told = tmp_path / "told"
    script = (
        f"#!/bin/sh\nexec 2>/dev/null\n"
        f"if (: </dev/tty); then tty=yes; else tty=no; fi\n"
        f'if read -r line; then typed=yes; else typed=no; fi\necho "$1 $tty $typed" > {told}.new\n'
        f"/bin/mv {told}.new {told}\n"
    )
    path = command(desktop, "helper.sh", script)
    monkeypatch.setenv("BROWSER", str(path))
    main, other = pty.openpty()
    code = "from lerobot_attn.explorer.browser import open_page\nimport time\nopen_page('http://x/')\ntime.sleep(5)"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=other, stdout=other, stderr=other, start_new_session=True
    )
    os.close(other)
    os.write(main, b"typed by a person\n")
    deadline = time.monotonic() + 30
    while not told.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    process.wait(20)
    assert told.read_text().split() == ["http://x/", "no", "no"]
    seen = b""
    while select.select([main], [], [], 0.2)[0]:
        try:
            seen += os.read(main, 1000)
        except OSError:  # the other end is closed
            break
    os.close(main)
    assert seen.replace(b"\r", b"") in (b"", b"typed by a person\n")


def test_opening_a_page_waits_for_nothing(desktop, monkeypatch):
    monkeypatch.setenv("BROWSER", str(command(desktop, "slow", "#!/bin/sh\n/bin/sleep 3\n")))
    start = time.monotonic()
    opening = open_page("http://127.0.0.1:1/")
    assert time.monotonic() - start < 2.5
    opening.join(20)
    assert time.monotonic() - start > 2.5  # it was started


def test_view_takes_names_and_a_path(run):
    served = Served(
        run, "--port", 0, "--allow-host", NAME, "--allow-host", "*.lab.example", "--base-path", "/attn/"
    )
    try:
        for host in (NAME, "a.lab.example", "127.0.0.1"):
            request = urllib.request.Request(served.url + "attn/api/run", headers={"Host": host})
            with urllib.request.urlopen(request, timeout=20) as answer:
                assert answer.status == 200
        request = urllib.request.Request(served.url, headers={"Host": "evil.example"})
        with pytest.raises(urllib.error.HTTPError, match="400"):
            urllib.request.urlopen(request, timeout=20)
    finally:
        served.stop()


def test_names_that_are_told_are_the_only_ones_also_where_others_can_reach_the_server(run):
    served = Served(run, "--port", 0, "--host", "0.0.0.0", "--allow-host", NAME)
    try:
        for host, status in ((NAME, 200), ("127.0.0.1", 200), ("evil.example", 400)):
            connection = http.client.HTTPConnection(served.url.split("/")[2], timeout=20)
            connection.request("GET", "/api/run", headers={"Host": host})
            assert connection.getresponse().status == status, host
            connection.close()
    finally:
        served.stop()


@pytest.mark.parametrize(
    "wrong", [("--allow-host", "a b"), ("--base-path", "/api/"), ("--base-path", "/../x")]
)
def test_view_says_what_is_wrong_with_a_name_or_a_path(run, wrong):
    command = [sys.executable, "-m", "lerobot_attn.cli", "view", str(run), "--no-browser", *wrong]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {wrong[0]}: got '{wrong[1]}'")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.browser
def test_the_page_itself_opens_behind_a_proxy(pages, tmp_path):
    write_planted_episode(tmp_path, SyntheticPlan(n_frames=6))
    under = "/user/jane/proxy/8123"
    with (
        client_of(tmp_path, hosts=["127.0.0.1", NAME]) as client,
        proxied(client.port, under, strips=True) as port,
    ):
        at = f"http://127.0.0.1:{port}{under}"
        for slash in ("/", ""):
            page = pages.open(f"{at}{slash}?episode=attention:synthetic_0:episode_00000&frame=4", wait=False)
            drawn(page, frame=4)
            assert page.url.startswith(f"{at}/?")
            assert page.locator("canvas[data-kind=raw]").count() == 2
        pages.close()
    # What was asked for beside the path, before the browser was led on.
    pages.said = [text for text in pages.said if "404" not in text]


# Live


def test_what_grows_is_looked_at_more_often(tmp_path, monkeypatch):
    looks = []
    real = Library.look
    monkeypatch.setattr(Library, "look", lambda *args: (looks.append(time.monotonic()), real(*args))[1])
    monkeypatch.setattr(app_module, "POLL_S", 1.0)
    rng, writer = np.random.default_rng(0), make_writer(tmp_path / "episode_00000.zarr")
    writer.append_inference(inference_rows(rng, 0))
    writer.commit()
    with client_of(tmp_path) as client:
        url = f"http://127.0.0.1:{client.port}/api/events"
        with urllib.request.urlopen(url, timeout=60) as events:
            assert events.readline() == b"event: ready\n"
            time.sleep(1)
            assert len(looks) < 5
            writer.append_inference(inference_rows(rng, 1))
            writer.commit()
            while not events.readline().startswith(b'data: {"changed": [{'):
                pass
            looks.clear()
            deadline = time.monotonic() + 50
            while not any(later - look < 0.5 for look, later in itertools.pairwise(looks)):
                assert time.monotonic() < deadline, "it is looked at no more often than what stays as it is"
                time.sleep(0.02)
    assert app_module.GROWING_POLL_S < 0.05
