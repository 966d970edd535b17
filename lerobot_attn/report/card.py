"""The card of a run that is given away: what is in it, how it ended, what it looks like, how to open it.

    parcel = pack_up(run)
    push(parcel, "user/name", beside=write_card(run, parcel, "user/name"))

Knows runs and what they say of themselves. Knows nothing of the network.
"""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from lerobot_attn.analysis.labels import ranges
from lerobot_attn.errors import RANDOM_WEIGHTS, LerobotAttnError
from lerobot_attn.figures.canvas import Caption, new_figure, styled
from lerobot_attn.figures.fonts import one_line
from lerobot_attn.overlay import OverlaySettings, overlay_frames
from lerobot_attn.report.page import Page
from lerobot_attn.sizes import format_bytes
from lerobot_attn.store.hub import CARD, CARD_MARK, SHEET
from lerobot_attn.store.parcel import Parcel
from lerobot_attn.store.reader import Episode
from lerobot_attn.store.runs import Run
from lerobot_attn.store.scrub import Scrubber
from lerobot_attn.store.video import Frame

_SHOWN = 6  # episodes in the contact sheet
_VIEW_PX = 224
_OUTCOMES = {True: "success", False: "failure", None: "no outcome"}


def write_card(run: Run, parcel: Parcel, repo: str) -> dict[str, bytes]:
    """Return the card of a run and its picture, by their names in the repository.

    Args:
        run: from `open_run`.
        parcel: what is given away of it.
        repo: "user/name", for the lines that say how to open it.

    Returns:
        `README.md`, and `contact_sheet.png` where a camera's video is there to draw attention on.
    """
    episodes = [one for one in run if one.is_complete]
    scrubber = Scrubber(parcel.root)
    sheet = contact_sheet_of(episodes)
    found = {CARD: _card(episodes, parcel, repo, scrubber, has_sheet=sheet is not None).encode()}
    if sheet is not None:
        buffer = io.BytesIO()
        # No date and no version: the same run has the same picture, which is then not sent again.
        sheet.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
        found[SHEET] = buffer.getvalue()
    return found


def contact_sheet_of(episodes: Sequence[Episode]) -> Figure | None:
    """Draw the middle frame of up to six of a run's episodes, as a camera saw it and with its attention.

    The episodes are spread evenly over the run, so none is chosen for its looks. The heatmap is that of the
    last stored layer and denoise step, averaged over heads, for the action executed at the frame.

    Args:
        episodes: in the run's order.

    Returns:
        The figure; None where no episode has both a map and a video.
    """
    shown: list[tuple[Episode, int, Frame]] = []
    for episode in _spread(episodes, _SHOWN):
        middle = episode.n_frames // 2
        settings = OverlaySettings(frames=middle, size=_VIEW_PX, normalisation="frame")
        try:
            shown += [(episode, middle, frame) for frame in overlay_frames(episode, settings)]
        except LerobotAttnError:  # no video, or no map: it has no picture
            continue
    return _drawn(shown) if shown else None


@styled
def _drawn(shown: Sequence[tuple[Episode, int, Frame]]) -> Figure:
    columns, width_in = min(2, len(shown)), 7.0
    rows = -(-len(shown) // columns)
    height, width, _ = shown[0][2].shape
    panel_in = width_in / columns * height / width + 0.22
    random = any(episode.has_random_weights for episode, _, _ in shown)
    remarks = list(dict.fromkeys(one.policy_remark for one, _, _ in shown if one.policy_remark))
    facts = ["left: what a camera showed the policy, with its attention", "right: the attention alone"]
    facts.append("relative to each frame's largest patch")
    figure = new_figure(width_in, rows * panel_in, Caption(facts, RANDOM_WEIGHTS if random else "", remarks))
    grid = figure.add_gridspec(rows, columns)
    for place, (episode, number, frame) in enumerate(shown):
        axes = figure.add_subplot(grid[place // columns, place % columns])
        axes.imshow(frame, interpolation="nearest")
        axes.set_axis_off()
        axes.set_anchor("N")  # a frame whose footer has more lines is higher
        outcome = _OUTCOMES[episode.success]
        name = f"{episode.path.parent.name}, episode {_index(episode)}, frame {number}: {outcome}"
        axes.set_title(one_line(name, 60), pad=2)
    return figure


def _card(
    episodes: Sequence[Episode], parcel: Parcel, repo: str, scrubber: Scrubber, *, has_sheet: bool
) -> str:
    first = episodes[0]
    attributes = [scrubber.value(one.attributes, Path(str(one.path.parent))) for one in episodes]
    policies = _different(_policy(one.get("policy")) for one in attributes)
    suites = _different(str(one.get("task_group")) for one in attributes)
    page = Page(f"What {_listed(policies, 'a policy')} attended to, on {_listed(suites, 'its tasks')}")
    outcomes = Counter(episode.success for episode in episodes)
    known = outcomes[True] + outcomes[False]
    solved = f"; {outcomes[True]} of {known} successful ({outcomes[True] / known:.0%})" if known else ""
    solved += f"; of {outcomes[None]} nobody knows how they ended" if outcomes[None] else ""
    page.text(
        f"{len(episodes)} episodes{solved}; {format_bytes(parcel.n_bytes)}. Each is a Zarr store with the "
        "attention of every inference, aligned with the episode's frames, and its videos. Recorded with "
        f"lerobot-attn {_version(attributes, 'lerobot_attn')} in LeRobot {_version(attributes, 'lerobot')}."
    )
    if any(episode.has_random_weights for episode in episodes):
        page.text(f"**Attention: {RANDOM_WEIGHTS}.**")
    page.points(scrubber.text(remark) for remark in _different(episode.policy_remark for episode in episodes))
    if has_sheet:
        page.linked_picture(
            SHEET,
            "The middle frame of some episodes, spread evenly over the run: what a camera showed the policy "
            "with its attention, and the attention alone",
        )
    page.heading("Episodes")
    rows: dict[tuple[str, str, str], list[Episode]] = {}
    for episode, said in zip(episodes, attributes, strict=True):
        task = f"{said.get('task_group')} {said.get('task_id')}"
        rows.setdefault((task, scrubber.text(episode.task), episode.condition.name), []).append(episode)
    header = ("task", "instruction", "condition", "episodes", "successful", "frames")
    page.table(
        header,
        (
            [*key, str(len(found)), _successes(found), str(sum(one.n_frames for one in found))]
            for key, found in rows.items()
        ),
    )
    conditions = {one.condition.name: scrubber.text(one.condition.text) for one in episodes}
    page.points(f"{name}: {text}" for name, text in conditions.items() if text)
    page.heading("What was recorded")
    page.points(_recorded(first, attributes[0]))
    page.heading("How to open it")
    store = next(iter(parcel.episodes))
    page.code(
        "pip install 'lerobot_policy_attn[hub]'\n"
        f"lerobot-attn pull {repo} -o run\n"
        "lerobot-attn view run            # in the browser\n"
        f"lerobot-attn inspect run/{store}\n"
        f"lerobot-attn plot run/{store} --kind combined -o figure.png"
    )
    page.code(
        "from lerobot_attn import open_run\n\n"
        'for episode in open_run("run"):\n'
        "    print(episode.task, episode.success, episode.dataset)  # an xarray dataset"
    )
    page.text(
        "Paths of the machine that recorded it were shortened to their last part (“…/name”) in what stores "
        "say of themselves. No licence was chosen with it: ask its owner."
    )
    return f"{_front_matter(policies)}\n{CARD_MARK}\n\n{page.markdown}"


def _front_matter(policies: Iterable[str]) -> str:
    """Return what the Hub reads of a card; each value as JSON, which is YAML."""
    tags = ["lerobot", "lerobot-attn", "attention", "interpretability", "zarr"]
    values = {
        "tags": tags,
        "task_categories": ["robotics"],
        "pretty_name": f"Attention of {_listed(list(policies), 'a policy')}",
        "viewer": False,
    }
    lines = [f"{name}: {json.dumps(value)}" for name, value in values.items()]
    return "\n".join(["---", *lines, "---"])


def _recorded(episode: Episode, said: Mapping[str, Any]) -> Iterable[str]:
    policy = said.get("policy")
    if isinstance(policy, Mapping):
        yield (
            f"Policy: {_policy(policy)}, {policy.get('n_layers')} layers, {policy.get('n_heads')} heads, "
            f"{policy.get('n_denoise_steps') or 'no'} denoise steps, {policy.get('n_action_steps')} of "
            f"{policy.get('chunk_size')} actions executed"
        )
    for name, what in (
        ("layer", "full maps of layers"),
        ("all_layer", "means over the executed actions of layers"),
    ):
        if episode.array_shape(name) is not None:
            yield f"{what[0].upper()}{what[1:]} {ranges([int(n) for n in episode.arrays[name].values])}"
    if episode.array_shape("prefix_attention") is not None:
        layers = ranges([int(n) for n in episode.arrays["prefix_layer"].values])
        yield f"The language model's self-attention of layers {layers}"
    if said.get("seed") is not None:
        yield f"Seed of the first episode: {said['seed']}"


def _policy(policy: Any) -> str:
    if not isinstance(policy, Mapping):
        return "a policy"
    path = f" ({policy['path']})" if policy.get("path") else ""
    return f"{policy.get('type')}{path}"


def _version(attributes: Sequence[Mapping[str, Any]], name: str) -> str:
    versions = (one.get("versions") for one in attributes)
    return _listed(
        _different(str(one.get(name, "")) for one in versions if isinstance(one, Mapping)), "unknown"
    )


def _successes(episodes: Iterable[Episode]) -> str:
    outcomes = [episode.success for episode in episodes if episode.success is not None]
    return f"{sum(outcomes)} of {len(outcomes)}" if outcomes else "not known"


def _index(episode: Episode) -> Any:
    return episode.attributes.get("episode_index", episode.path.stem)


def _different(texts: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(text for text in texts if text))


def _listed(texts: Sequence[str], otherwise: str) -> str:
    shown = ", ".join(texts[:4]) or otherwise
    return f"{shown} and {len(texts) - 4} more" if len(texts) > 4 else shown


def _spread(episodes: Sequence[Episode], most: int) -> list[Episode]:
    """Return so many of them, from the first to the last at even distances."""
    if len(episodes) <= most:
        return list(episodes)
    return [episodes[round(place * (len(episodes) - 1) / (most - 1))] for place in range(most)]
