"""What the tests of small policies with two cameras share: observations, captures, recordings of a loop."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_contract import AdapterContract, act
from matplotlib.text import Text
from test_explorer import client_of, values
from typer.testing import CliRunner

from lerobot_attn import open_run, record_episodes
from lerobot_attn.capture import capture_attention
from lerobot_attn.cli import app
from lerobot_attn.config import AttentionConfig
from lerobot_attn.errors import ConfigError, SelectionError
from lerobot_attn.interventions import Task, intervene
from lerobot_attn.plot import plot

TOP, WRIST = "observation.images.top", "observation.images.wrist"
SIZE = (96, 128)
TASKS = ("put the bowl on the plate", "open the drawer")
EVERYTHING = AttentionConfig(layers="all", prefix_layers="all")


def raw_observation(
    n: int = 2,
    seed: int = 0,
    size: tuple[int, int] = SIZE,
    tasks: tuple[str, ...] = TASKS,
    cameras: tuple[str, ...] = (TOP, WRIST),
) -> dict[str, Any]:
    """Return what a preprocessor gets: images in [0, 1] (n, 3, height, width), a state (n, 6), n tasks."""
    noise = torch.Generator().manual_seed(seed)
    raw: dict[str, Any] = {name: torch.rand(n, 3, *size, generator=noise) for name in cameras}
    raw["observation.state"] = torch.rand(n, 6, generator=noise)
    return {**raw, "task": [tasks[i % len(tasks)] for i in range(n)]}


def family_fixtures(builder: str) -> tuple[Any, Any, Any, Any]:
    """Return four fixtures for a test module: `loaded`, `preprocessor`, `policy` (reset), `batch` (of two).

    Args:
        builder: the name of the fixture whose call gives a policy, its preprocessor and its postprocessor.
    """

    @pytest.fixture(scope="module")
    def loaded(request: pytest.FixtureRequest) -> Any:
        return request.getfixturevalue(builder)()

    @pytest.fixture(scope="module")
    def preprocessor(loaded: Any) -> Any:
        return loaded[1]

    @pytest.fixture
    def policy(loaded: Any) -> Any:
        loaded[0].reset()
        return loaded[0]

    @pytest.fixture(scope="module")
    def batch(preprocessor: Any) -> Any:
        return preprocessor(raw_observation())

    return loaded, preprocessor, policy, batch


class SmallPolicyContract(AdapterContract):
    """The contract of a policy that is told its task, with the fixtures that `family_fixtures` makes."""

    @pytest.fixture
    def longer(self, preprocessor: Any) -> Any:
        """A context that yields a batch with longer tasks."""

        @contextmanager
        def with_longer_tasks() -> Iterator[Any]:
            yield preprocessor(raw_observation(tasks=tuple(task * 2 for task in TASKS)))

        return with_longer_tasks


def captured(policy: Any, batch: Any, config: AttentionConfig = EVERYTHING, **options: Any) -> Any:
    """Return the record of one inference."""
    policy.reset()
    with capture_attention(policy, config, **options) as capture:
        act(policy, batch, 0)
    (record,) = capture.drain()
    return record


def record_own_loop(folder: Path, policy: Any, preprocessor: Any, postprocessor: Any) -> Path:
    """Record two episodes of one's own loop, each of eight frames: a square that moves, in both cameras."""
    with record_episodes(policy, folder, EVERYTHING, fps=10, preprocessor=preprocessor) as recording:
        for number in range(2):
            with recording.episode(task=TASKS[number]) as episode:
                policy.reset()
                for t in range(8):
                    raw = raw_observation(1, tasks=TASKS[number:])
                    for name in (TOP, WRIST):
                        raw[name].fill_(0.2)
                        raw[name][..., 20 + 3 * t : 32 + 3 * t, 30:42] = 1
                    with torch.inference_mode():
                        action = postprocessor(policy.select_action(preprocessor(raw)))
                    pictures = {name: raw[name][0] for name in (TOP, WRIST, "observation.state")}
                    episode.step(pictures, action[0])
                episode.success = True
    return folder


def compiled_is_refused(policy: Any, policy_type: str) -> None:
    """Assert that a policy which LeRobot never compiles is not read as a compiled one."""
    with (
        pytest.raises(ConfigError, match=rf"^compiled=true: LeRobot does not compile {policy_type}"),
        capture_attention(policy, AttentionConfig(compiled=True)),
    ):
        pass


def another_task_is_told(policy: Any) -> None:
    """Assert that an intervention changes the instruction."""
    with intervene(policy, Task(text="open the drawer")) as acting:
        assert acting.task("put the bowl on the plate", 0) == "open the drawer"


def training_goes_on_unrecorded(policy: Any, batch: Any, target: Any) -> None:
    """Assert that a step of training is not captured, and that the inference after it is."""
    with capture_attention(policy, EVERYTHING) as capture:
        policy.forward(target)
        assert not capture.records
        act(policy, batch, 0)
    assert len(capture.records) == 1


def plot_is_drawn(run: Path, kind: str, missing: dict[str, str] | None = None) -> str:
    """Assert that a plot of a run's first episode is drawn, or refused where it must be; return its words.

    Args:
        run: what `record_own_loop` has recorded.
        kind: one of `lerobot_attn.plot.kinds.KINDS`.
        missing: kind → a pattern of why it is refused; besides "vision", which is not recorded.
    """
    why = {"vision": "vision attention was not captured", **(missing or {})}.get(kind)
    if why is not None:
        with pytest.raises(SelectionError, match=why):
            plot(open_run(run)[0], kind)
        return ""
    figure = plot(open_run(run)[0], kind)
    said = " ".join(text.get_text() for text in figure.findobj(Text))
    assert "nan" not in said
    return said


def commands_take(run: Path, folder: Path, says: dict[str, str], *, of_prefix: bool = True) -> None:
    """Assert that `inspect`, `verify` and `overlay` read a run's first episode.

    Args:
        run: what `record_own_loop` has recorded.
        folder: for what they write.
        says: command → words that it prints.
        of_prefix: whether a film of the word "bowl" can be made.
    """
    store = str(open_run(run)[0].path)
    commands = [
        ["inspect", store],
        ["verify", store, "-o", str(folder / "sheet.png")],
        ["overlay", store, "-o", str(folder / "film.mp4"), "--camera", "wrist"],
    ]
    if of_prefix:
        commands.append(["overlay", store, "-o", str(folder / "word.mp4"), "--prefix-query", "bowl"])
    for command in commands:
        done = CliRunner().invoke(app, command)
        said = " ".join(done.output.split())
        assert done.exit_code == 0, (command, said)
        assert says.get(command[0], "") in said


def explorer_serves(run: Path, n_heads: int, prefix_map: str = "prefix/1/14") -> dict[str, Any]:
    """Assert that the explorer serves a run's first episode, and return what it says of the episode.

    Args:
        run: what `record_own_loop` has recorded.
        n_heads: of the policy's attention.
        prefix_map: address of one row of a prefix map: layer and token; "" where there is none.
    """
    with client_of(run) as client:
        first = client.get("/api/run").json()["episodes"][0]
        facts: dict[str, Any] = client.get(f"/api/episodes/{first['id']}").json()
        base = f"/api/episodes/{first['id']}/{first['version']}"
        prefix_len, n_keys = facts["prefix_len"], facts["n_keys"]
        if prefix_map:
            row = values(client.get(f"{base}/inferences/0/{prefix_map}"))
            assert row.shape == (n_heads, prefix_len)
        maps = values(client.get(f"{base}/inferences/0/maps/0/2"))
        assert maps.shape == (n_heads, n_keys - prefix_len, n_keys)
        for address in ("shares", "timeline", "ranges/0", f"cameras/{WRIST}/frames/4.jpg"):
            assert client.get(f"{base}/{address}").status_code == 200, address
    return facts
