"""`view` opens its page filtered as it was asked to: the table has the episodes that the filters mean."""

from urllib.parse import parse_qsl, urlsplit

import pytest
from test_inspection import run_cli
from test_run_index import document, many, put  # noqa: F401

from lerobot_attn import open_run
from lerobot_attn.explorer import server
from lerobot_attn.explorer.library import Library
from lerobot_attn.explorer.listing import part, wanted_of

NAMES = {"show": "outcome"}  # in the page's address → in its requests, where they differ


@pytest.fixture
def opened(monkeypatch):
    """What the browser is told to open, where the server only says that it has begun."""
    seen = []

    class Server:
        def __init__(self, app, config, when_started):
            self.run = lambda sockets: when_started()

    monkeypatch.setattr(server, "_Server", Server)
    monkeypatch.setattr(server, "open_page", seen.append)
    return seen


@pytest.mark.parametrize(
    ("options", "address", "where"),
    [
        ((), {}, {}),
        (("--failure",), {"show": "failure"}, {"success": False}),
        (
            ("--success", "--condition", "baseline"),
            {"show": "success", "condition": "baseline"},
            {"success": True, "condition": "baseline"},
        ),
        (("--task", "kitchen_1"), {"find": "kitchen_1"}, {"task": "kitchen_1"}),  # and not kitchen_10
        (("--task", "kitchen", "--success"), {"find": "kitchen", "show": "success"}, {"success": True}),
        (("--task", "the CUP"), {"task": "put the cup away"}, {"task": "the cup"}),
    ],
)
def test_the_page_opens_with_the_filters_in_its_address(
    many,  # noqa: F811
    opened,
    monkeypatch,
    capsys,
    options,
    address,
    where,
):
    status, said, error = run_cli(monkeypatch, capsys, "view", many, "--port", "0", *options)
    assert (status, error) == (0, "")
    (url,) = opened
    assert f"The explorer is at {url} (" in said
    found = dict(parse_qsl(urlsplit(url).query))
    assert found == address
    wanted = wanted_of({NAMES.get(name, name): value for name, value in found.items()})
    shown = part(Library(many).look(), wanted)["episodes"]
    meant = [(row.table.task_id, row.table.episode) for row in open_run(many).where(**where).rows()]
    assert [(row["task_id"], row["episode"]) for row in shown] == meant


def test_what_no_episode_is_costs_one_line(many, opened, monkeypatch, capsys):  # noqa: F811
    status, said, error = run_cli(monkeypatch, capsys, "view", many, "--task", "fork")
    assert (status, said) == (1, "")
    assert "no episode of task 'fork'; of its 48 episodes there are tasks" in error
    assert not opened


def test_who_waits_for_episodes_may_filter_what_is_not_there_yet(many, opened, monkeypatch, capsys):  # noqa: F811
    options = ("--wait", "--port", "0", "--task", "fork", "--failure")
    assert run_cli(monkeypatch, capsys, "view", many, *options)[0] == 0
    assert urlsplit(opened[0]).query == "show=failure&find=fork"
