"""The page in a real browser, of prompts that were cut or empty, and of episodes whose policies differ."""

import numpy as np
import pytest
import zarr
from browser import assert_shows, drawn, until
from test_explorer_page import assert_share, seek

from lerobot_attn import analysis, open_episode
from lerobot_attn.layout import Kind
from lerobot_attn.synthetic import FAMILIES, SyntheticPlan, write_planted_episode, write_softmax_episode

pytestmark = pytest.mark.browser

FIRST = "attention:synthetic_0:episode_00000"
OTHER = "attention:other_0:episode_00000"


# Prompts


def bars(shown):
    """Return title → (label, value) of each bar of the words' panel of a page, or of one of its sides."""
    return {
        part.locator("h3").inner_text(): [
            (row.locator(".bar-label").inner_text(), row.locator(".bar-value").inner_text())
            for row in part.locator("li").all()
        ]
        for part in shown.locator("#words .bar-columns > *").all()
    }


def test_a_prompt_that_was_cut(pages, tmp_path):
    """Said once; what is left of the words has its share, and nothing is invented of the state."""
    path = write_planted_episode(tmp_path / "out", FAMILIES["truncated prompt"])
    data = open_episode(path).arrays
    assert data["prompt_truncated"].values.all()
    with pages.serving(path) as address:
        page = pages.open(f"{address}?frame=4&layer=2&head=mean")
        assert page.get_by_text("The prompt was cut").count() == 1
        expected = analysis.token_attention(data, frame=4, layer=2, head="mean", query="executed")
        words = expected.where(expected.kind == "task", drop=True)
        left = [str(label) for label in words["label"].values]
        assert 1 < len(left) < len(SyntheticPlan().task.split())
        shown = bars(page)
        assert "State" not in shown
        assert [label for label, _ in shown["Words"]] == left
        for (label, value), share in zip(shown["Words"], words, strict=True):
            assert_share(value, share, label)
        sentence = page.locator(".sentence").inner_text()
        assert sentence.endswith(left[-1])
        assert "State:" not in sentence
        assert SyntheticPlan().task in page.locator(".bar .task").inner_text()  # as it was given
        legend = page.locator("#shares .legend").inner_text()
        assert "state" not in legend
        assert "NaN" not in page.locator("main").inner_text()


def without_words(path):
    """Make a store's instruction an empty one: no token is a word of it."""
    for name, of_words in (("text_word", -1), ("token_text", "")):
        array = zarr.open_array(path / name, mode="r+")
        values = array[:]
        values[open_episode(path).arrays["text_word"].values >= 0] = of_words
        if name == "token_text":
            array[:] = values
    kinds = zarr.open_array(path / "key_kind", mode="r+")
    kinds[:] = np.where(kinds[:] == Kind.TASK, Kind.TEMPLATE, kinds[:])
    array = zarr.open_array(path / "text_word", mode="r+")
    array[:] = np.full(array.shape, -1, array.dtype)
    zarr.open_group(path, mode="r+").attrs["task"] = ""


@pytest.mark.parametrize("other", ["", f"&compare={OTHER}"], ids=["alone", "compared"])
def test_an_empty_instruction(pages, tmp_path, other):
    path = write_softmax_episode(tmp_path / "out", SyntheticPlan(task="x"))
    write_softmax_episode(tmp_path / "out", SyntheticPlan(task_group="other", seed=3))
    without_words(path)
    data = open_episode(path).arrays
    assert open_episode(path).task == ""
    with pages.serving(tmp_path / "out") as address:
        page = pages.open(f"{address}?episode={FIRST}&frame=4&layer=2&head=mean{other}")
        first = page.locator(".side").first
        until(page, lambda: first.get_by_text("The instruction is empty").count() == 1, "it is said")
        until(page, lambda: "State" in bars(first), "the state has its bars")
        shown = bars(first)
        assert "Words" not in shown
        expected = analysis.token_attention(data, frame=4, layer=2, head="mean", query="executed")
        state = expected.where(expected.kind == "state", drop=True)
        for (label, value), share in zip(shown["State"], state, strict=True):
            assert_share(value, share, label)
        assert "task" not in first.locator("#shares .legend").inner_text()
        assert not first.locator(".colour-bar").inner_text().endswith("0 0 %")
        text = page.locator("main").inner_text()
        assert "NaN" not in text
        assert "undefined" not in text


# Policies


SMALL = SyntheticPlan()  # 4 layers, 2 heads, 3 denoise steps; cameras "image" and "wrist"
DEEP = SyntheticPlan(
    task_group="other",
    n_frames=20,
    n_executed=5,
    n_queries=12,
    n_layers=7,
    layers=(5, 6),
    n_heads=5,
    n_denoise_steps=10,
    image_px={"observation.images.top": (64, 96)},
    grid=(8, 8),
    n_actions=6,
    seed=4,
)
SMOLVLA = SyntheticPlan(
    task_group="third",
    n_heads=3,
    n_denoise_steps=5,
    padding="left_top",
    n_empty_cameras=0,
    image_px={f"observation.images.{name}": (64, 64) for name in ("image", "left", "right")},
    state_in_prompt=False,
    n_prefix_state=1,
    n_prefix_padding=3,
    prefix_only_layers=(1, 3),
    has_reward=False,
    has_success=False,
)
# What is asked for of the first; what the second shows in its place, and what is said of it.
UNLIKE = [
    (SMALL, DEEP, {}, ""),
    (DEEP, SMALL, {"layer": 6, "head": 4, "denoise_step": 9}, "layer 3 · head 1 · denoise step 2 · "),
    (DEEP, SMALL, {"layer": 2, "head": "max", "denoise_step": 1}, ""),
    (DEEP, SMOLVLA, {"layer": 5, "head": 4, "denoise_step": 3}, "layer 3 · head 2 · "),
    (SMOLVLA, DEEP, {"layer": "mean", "head": "mean", "denoise_step": 4}, ""),
]


def ids(plan):
    return f"attention:{plan.task_group}_0:episode_00000"


def own(data, where):
    """Return the nearest of what an episode has to what is asked for."""
    names = {"layer": "all_layer", "head": "head", "denoise_step": "denoise_step"}
    found = {}
    for name, value in where.items():
        has = data[names[name]].values if name in names else ()
        found[name] = int(has[np.abs(has - value).argmin()]) if len(has) and value not in WORDS else value
    return found


WORDS = ("mean", "max")


@pytest.mark.parametrize(("first", "second", "asked", "differs"), UNLIKE)
def test_compared_policies_may_be_unlike(pages, tmp_path, first, second, asked, differs):
    """Each side shows its own cameras and the nearest of what is asked for, in one range; and says where."""
    paths = [write_softmax_episode(tmp_path / "out", plan) for plan in (first, second)]
    data = [open_episode(path).arrays for path in paths]
    asked = {"layer": 3, "head": 0, "denoise_step": 2, **asked}
    link = "&".join(f"{name.replace('denoise_', '')}={value}" for name, value in asked.items())
    with pages.serving(tmp_path / "out") as address:
        page = pages.open(
            f"{address}?episode={ids(first)}&compare={ids(second)}&lock=frame&frame=0&norm=share&{link}"
        )
        side = page.locator(".side").nth(1)
        side.locator("canvas[data-kind=raw]").first.wait_for()
        seek(page, 7)
        drawn(page, frame=7)
        title = side.locator(".side-title small")
        until(page, lambda: title.inner_text().startswith(f"frame 7 · {differs}"), "the frame is shown")
        expected = [own(each, {**asked, "frame": 7, "query": "executed"}) for each in data]
        ends = [
            heatmap.values.ravel()
            for each, where in zip(data, expected, strict=True)
            for heatmap in analysis.by_camera(each, analysis.attention(each, **where)).values()
        ]
        end = analysis.spatial.percentile_of(np.concatenate(ends), 99.9)
        for number, (each, where) in enumerate(zip(data, expected, strict=True)):
            assert_shows(page, each, end, "share", side=number, **where)
            labels = [name.rpartition(".")[2] for name in analysis.camera_names(each)]
            shown = page.locator(".side").nth(number).locator("figcaption strong").all_inner_texts()
            assert shown == labels
            keys = page.locator(".timeline-keys").nth(number).inner_text()
            assert [name for name in ("image", "wrist", "left", "right", "top") if name in keys.split()] == [
                name for name in ("image", "wrist", "left", "right", "top") if name in labels
            ]
            assert ("reward" in keys) == ("reward" in each)
        # The end of the longer one: the shorter stays at its last frame.
        page.keyboard.press("End")
        last = [len(each["frame"]) - 1 for each in data]
        for number, frame in enumerate(last):
            page.locator(".side").nth(number).get_by_text(f"frame {frame} ·").wait_for()
        assert page.locator(".warning[role=alert]").count() == 0
