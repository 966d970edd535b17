"""The explorer's page in what is distributed: the wheel has it built, the sources can build it."""

import html.parser
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import urllib.request
import zipfile
from pathlib import Path

import pytest
from browser import require, why_no_page
from test_explorer import client_of
from test_store import write_episode

from lerobot_attn.explorer.page_files import ADD_SLASH

ROOT = Path(__file__).parent.parent
EXPLORER = "lerobot_attn/explorer"
PAGE = ROOT / EXPLORER / "page"
# What XML calls its vocabularies; nothing is asked of them.
NAMESPACES = {
    "http://www.w3.org/1999/xhtml",
    "http://www.w3.org/2000/svg",
    "http://www.w3.org/1998/Math/MathML",
}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Folder with the wheel and the sdist of this checkout."""
    require(why_no_page())
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    return folder


@pytest.fixture(scope="module")
def unzipped(built, tmp_path_factory):
    """The wheel's files."""
    folder = tmp_path_factory.mktemp("wheel")
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        wheel.extractall(folder)
    return folder


def test_the_wheel_has_the_page_and_not_its_sources(unzipped):
    files = {path.relative_to(unzipped).as_posix() for path in unzipped.rglob("*") if path.is_file()}
    of_page = {name for name in files if name.startswith(f"{EXPLORER}/static/")}
    assert f"{EXPLORER}/static/index.html" in of_page
    assert {Path(name).suffix for name in of_page} == {".html", ".js", ".css"}
    others = files - of_page - {"lerobot_attn/demo/weights/tokenizer.json"}  # the demo policy's, no source
    assert not [name for name in others if Path(name).suffix in (".ts", ".tsx", ".css", ".json", ".html")]
    assert not [name for name in others if "node_modules" in name]
    for name in of_page:
        assert (unzipped / name).read_bytes() == (ROOT / name).read_bytes()


def test_the_sdist_has_the_page_and_its_sources(built):
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        files = {name.partition("/")[2] for name in archive.getnames()}
    for name in ("page/package-lock.json", "page/.npmrc", "page/src/main.tsx", "static/index.html"):
        assert f"{EXPLORER}/{name}" in files
    assert {"scripts/build_explorer.sh", "constraints.txt"} <= files
    assert not [name for name in files if "node_modules" in name]


class Addresses(html.parser.HTMLParser):
    """What a page asks for."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found += [value for name, value in attributes if name in ("src", "href", "srcset", "action")]


def test_the_page_asks_for_nothing_outside(unzipped):
    static = unzipped / EXPLORER / "static"
    asked = [a for a in Addresses((static / "index.html").read_text()).found if not a.startswith("data:")]
    assert len(asked) == 2  # one script, one style sheet
    for address in asked:
        assert (static / address).is_file()
        assert (static / address).resolve().is_relative_to(static.resolve())
    for path in static.rglob("*"):
        text = path.read_text() if path.is_file() else ""
        assert set(re.findall(r"https?://[^\s\"'`)<>\\]+", text)) <= NAMESPACES, path.name
        assert not re.search(r"""["'`(]//\w""", text), f"{path.name}: an address without its scheme"
        if path.suffix == ".css":
            assert "@import" not in text
            assert not re.search(r"url\((?!['\"]?data:)", text)


def view(package, path):
    """Return what `lerobot-attn view` of an unzipped package answers to "/"."""
    process = subprocess.Popen(
        [sys.executable, "-m", "lerobot_attn.cli", "view", str(path), "--no-browser", "--port", "0"],
        env={**os.environ, "PYTHONPATH": str(package)},
        cwd=path,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        address = process.stdout.readline().split()[4]
        with urllib.request.urlopen(address, timeout=20) as answer:
            return answer.read().decode()
    finally:
        process.terminate()
        process.wait(20)


def test_the_server_of_the_wheel_finds_its_page(unzipped, tmp_path):
    write_episode(tmp_path / "run" / "episode_00000.zarr", 1)
    package = shutil.copytree(unzipped, tmp_path / "package")
    index = package / EXPLORER / "static" / "index.html"
    index.write_text(index.read_text() + "<!-- the wheel's own -->")
    served = view(package, tmp_path / "run")
    assert served.count(ADD_SLASH.decode()) == 1  # for proxies
    assert served.replace(ADD_SLASH.decode(), "") == index.read_text()


def test_an_installation_without_the_page_says_how_to_get_it(tmp_path):
    write_episode(tmp_path / "run" / "episode_00000.zarr", 1)
    (tmp_path / "static").mkdir()
    with client_of(tmp_path / "run", static=tmp_path / "static") as client:
        answer = client.get("/")
        assert answer.status_code == 200
        assert "scripts/build_explorer.sh" in answer.text
        assert client.get("/api/run").status_code == 200
    assert (ROOT / "scripts" / "build_explorer.sh").is_file()


def test_the_lock_file_names_no_registry():
    lock = json.loads((PAGE / "package-lock.json").read_text())
    assert len(lock["packages"]) > 10
    for name, package in lock["packages"].items():
        assert "resolved" not in package, name
        assert not name or "integrity" in package, name


@pytest.fixture
def checkout(tmp_path):
    """The page's sources and the script that builds them, with an npm that only notes its calls."""
    folder = tmp_path / "checkout"
    shutil.copytree(PAGE, folder / EXPLORER / "page", ignore=shutil.ignore_patterns("node_modules"))
    (folder / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "build_explorer.sh", folder / "scripts")
    write_program(folder / "bin" / "node", "exit 0")
    static = f"{EXPLORER}/static"
    write_program(
        folder / "bin" / "npm",
        'echo "$*" >>calls',
        f'case "$*" in *" ci "*) mkdir -p {EXPLORER}/page/node_modules;;',
        f'*" build "*) rm -rf {static}; mkdir -p {static}; echo built >{static}/index.html;; esac',
    )
    return folder


def write_program(path, *lines):
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    path.chmod(0o755)


def build(checkout, *scripts):
    """Run the script; return how it ended, and the npm commands that it ran."""
    (checkout / "calls").write_text("")
    done = subprocess.run(
        ["bash", "scripts/build_explorer.sh", *scripts],
        cwd=checkout,
        env={**os.environ, "PATH": f"{checkout / 'bin'}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    calls = (checkout / "calls").read_text().splitlines()
    return done, [next(word for word in ("ci", "build", "lint", "test") if word in c.split()) for c in calls]


def test_the_page_is_built_when_its_sources_have_changed(checkout):
    page, static = checkout / EXPLORER / "page", checkout / EXPLORER / "static"
    assert build(checkout)[1] == ["ci", "build"]
    assert build(checkout)[1] == []
    with (page / "src" / "main.tsx").open("a") as file:
        file.write("// more\n")
    assert build(checkout)[1] == ["build"]
    with (page / "package-lock.json").open("a") as file:
        file.write("\n")
    assert build(checkout)[1] == ["ci", "build"]
    (page / "src" / "new.ts").write_text("export {};\n")
    assert build(checkout)[1] == ["build"]
    shutil.rmtree(static)
    assert build(checkout)[1] == ["build"]
    assert build(checkout, "lint", "test")[1] == ["lint", "test"]


def test_a_build_by_hand_is_not_taken_for_one_of_these_sources(checkout):
    build(checkout)
    static = checkout / EXPLORER / "static"
    shutil.rmtree(static)  # as vite does first
    static.mkdir()
    (static / "index.html").write_text("of other sources")
    assert build(checkout)[1] == ["build"]


def test_a_build_that_fails_says_so_and_is_tried_again(checkout):
    write_program(checkout / "bin" / "npm", 'echo "$*" >>calls', 'case "$*" in *" build "*) exit 1;; esac')
    (checkout / EXPLORER / "page" / "node_modules").mkdir()
    for _ in range(2):
        done, calls = build(checkout)
        assert done.returncode == 1
        assert calls[-1] == "build"
        assert done.stderr == "error: the explorer's page does not build\n"


def test_without_a_node_and_a_place_to_install_one(checkout):
    write_program(checkout / "bin" / "node", "exit 1")
    done, calls = build(checkout)
    assert done.returncode == 1
    assert not calls
    assert done.stderr.startswith("error: no Node 20.19 or newer on this machine, and no .venv")
    assert len(done.stderr.splitlines()) == 1
