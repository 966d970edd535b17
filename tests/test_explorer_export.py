"""The exported page: it holds what the store holds, is as large as it may be, and opens without a network."""

import base64
import gzip
import io
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import zarr
from browser import assert_frames, assert_shows, canvas, colour_end, until
from PIL import Image
from test_inspection import run_cli
from test_store import make_writer, write_episode

from lerobot_attn import open_episode
from lerobot_attn.analysis.spatial import NORMALISATIONS
from lerobot_attn.errors import ConfigError, SelectionError, SetupError, StoreError
from lerobot_attn.explorer import export as export_module
from lerobot_attn.explorer import tables
from lerobot_attn.explorer.document import single_document
from lerobot_attn.explorer.export import ELEMENT, ExportSettings, export_html
from lerobot_attn.explorer.facts import facts as facts_of
from lerobot_attn.explorer.library import Library
from lerobot_attn.store.video import read_frames
from lerobot_attn.synthetic import SyntheticPlan, write_planted_episode

IMAGE, WRIST = "observation.images.image", "observation.images.wrist"
PLAN = SyntheticPlan(n_frames=20, n_executed=3, task='say "</script><!--<script>" & pick <b>it</b> up')


@pytest.fixture(scope="module")
def episode(tmp_path_factory):
    return open_episode(write_planted_episode(tmp_path_factory.mktemp("planted"), PLAN))


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A folder like the built page's, with a script that would end its own element."""
    folder = tmp_path_factory.mktemp("page") / "static"
    (folder / "assets").mkdir(parents=True)
    (folder / "assets" / "index.js").write_text(
        "const ends = '</script><!--<script>'; const dollar = '\\\\1 \\\\g<0>'; console.log(ends);\n"
    )
    (folder / "assets" / "style.css").write_text("body { color: #222 } /* </style> */\n")
    (folder / "index.html").write_text(
        '<!doctype html>\n<html lang="en">\n  <head>\n    <meta charset="utf-8" />\n'
        "    <link\n"
        '      rel="icon"\n      href="data:image/svg+xml,%3Csvg xmlns=\'http://www.w3.org/2000/svg\'/%3E"\n'
        "    />\n    <title>explorer</title>\n"
        '    <script type="module" crossorigin src="./assets/index.js"></script>\n'
        '    <link rel="stylesheet" crossorigin href="./assets/style.css">\n'
        '  </head>\n  <body>\n    <div id="page"></div>\n  </body>\n</html>\n'
    )
    return folder


class Document(HTMLParser):
    """The elements of a page, as a browser finds them: a script ends where its text says so first."""

    def __init__(self, path):
        super().__init__()
        self.elements = []  # (tag, attributes, text before the next tag)
        self.inside = False
        self.feed(path.read_text(encoding="utf-8"))
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append([tag, dict(attrs), ""])
        self.inside = True

    handle_startendtag = handle_starttag

    def handle_endtag(self, tag):
        self.inside = False

    def handle_data(self, data):
        if self.inside:
            self.elements[-1][2] += data

    def all(self, tag, **attributes):
        return [
            (found, text)
            for name, found, text in self.elements
            if name == tag and attributes.items() <= found.items()
        ]

    @property
    def data(self):
        ((_, text),) = self.all("script", id=ELEMENT)
        return json.loads(text)


def means_of(data):
    values = np.frombuffer(gzip.decompress(base64.b64decode(data["means"]["data"])), "<f2")
    return values.reshape(data["means"]["shape"])


def image_of(data, camera, frame):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data["pictures"][camera][str(frame)]))))


CHOICES = {
    "default": ({}, [0, 1, 2, 3], [0, 1], [2], range(20)),
    "everything": ({"denoise_steps": "all"}, [0, 1, 2, 3], [0, 1], [0, 1, 2], range(20)),
    "one of each": ({"layers": -1, "heads": 1, "denoise_steps": 0, "frames": 7}, [3], [1], [0], [7]),
    "lists": (
        {"layers": "3,1", "heads": [0], "denoise_steps": "0,2", "frames": "18,2,2"},
        [1, 3],
        [0],
        [0, 2],
        [2, 18],
    ),
    "a range": ({"frames": "4-8"}, [0, 1, 2, 3], [0, 1], [2], range(4, 9)),
    "a stride": ({"frames": "1-19:7"}, [0, 1, 2, 3], [0, 1], [2], [1, 8, 15]),
}


@pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES)
def test_the_file_holds_what_the_store_holds(episode, page, tmp_path, choice):
    settings, layers, heads, steps, frames = choice
    frames = list(frames)
    written = export_html(episode, tmp_path / "page.html", ExportSettings(**settings), page=page)
    assert written.path.stat().st_size == written.contents.total_bytes
    assert not written.notes
    data, store = Document(written.path).data, episode.arrays

    inferences = sorted({store["frame_inference"].values[frame] for frame in frames})
    assert data["inferences"] == inferences
    stored = store["suffix_attention_mean"].values
    np.testing.assert_array_equal(means_of(data), stored[np.ix_(inferences, steps, layers, heads)])

    facts, everything = data["facts"], facts_of(episode)
    chosen = {
        "mean_layers": layers,
        "heads": heads,
        "denoise_steps": steps,
        "flow_time": [everything["flow_time"][step] for step in steps],
        "layers": [],
        "prefix_layers": [],
    }
    assert {name: facts[name] for name in chosen} == chosen
    assert facts.get("frames", list(range(20))) == frames
    assert ("frames" in facts) == (len(frames) < 20)
    kept = set(everything) - set(chosen)
    assert {name: facts[name] for name in kept} == {name: everything[name] for name in kept}
    (summary,) = Library(episode.path).look().summaries
    assert data["row"] == summary.to_dict()
    assert facts["version"] == summary.version

    assert data["timeline"] == tables.timeline(episode)
    assert data["tokens"] == [tables.tokens(episode, inference) for inference in inferences]
    assert data["actions"] == [tables.action_chunk(episode, inference) for inference in inferences]

    assert list(data["pictures"]) == [IMAGE, WRIST]
    for camera, of_camera in data["pictures"].items():
        assert list(map(int, of_camera)) == frames
        video = list(read_frames(episode.videos[camera], size_px=episode.image_size_px(camera)))
        for frame in frames:
            shown = image_of(data, camera, frame).astype(int)
            assert shown.shape == video[frame].shape
            error = [np.abs(shown - other).mean() for other in video]
            assert np.argmin(error) == frame
            assert error[frame] < 3


def test_layers_with_full_maps_alone_are_in_the_file(page, tmp_path):
    write_episode(tmp_path / "episode_00000.zarr")  # means of layers 0 to 3, full maps of 16 and 17
    episode = open_episode(tmp_path / "episode_00000.zarr")
    settings = ExportSettings(layers="3,16", denoise_steps=9)
    data = Document(export_html(episode, tmp_path / "page.html", settings, page=page).path).data
    assert data["facts"]["mean_layers"] == [3, 16]
    store = episode.arrays
    np.testing.assert_array_equal(
        means_of(data)[:, 0, 0], store["suffix_attention_mean"].sel(all_layer=3, denoise_step=9)
    )
    full = store["suffix_attention"].sel(layer=16, denoise_step=9).isel(query=slice(0, 2)).values
    mean = full.astype(np.float32).mean(axis=2).astype(np.float16)
    np.testing.assert_array_equal(means_of(data)[:, 0, 1], mean)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "all layers, all heads, denoise step 2, all frames"),
        ({"denoise_steps": "all"}, "all layers, all heads, all denoise steps, all frames"),
        ({"layers": "2-3", "heads": 0, "frames": 3}, "layers 2-3, head 0, denoise step 2, frame 3"),
        ({"frames": "0-9"}, "denoise step 2, frames 0-9"),
        ({"frames": "0-19:5"}, "denoise step 2, every 5th of frames 0-15"),
        ({"frames": "0-19:2"}, "every 2nd of frames 0-18"),
        ({"frames": "0-19:3"}, "every 3rd of frames 0-18"),
        ({"frames": "0,1,9"}, "3 of 20 frames"),
        ({"layers": "0,2-3"}, "layers 0, 2-3, all heads"),
    ],
)
def test_the_page_says_what_it_is_an_export_of(episode, page, tmp_path, settings, said):
    written = export_html(episode, tmp_path / "page.html", ExportSettings(**settings), page=page)
    excerpt = Document(written.path).data["facts"]["excerpt"]
    assert excerpt.startswith("An export of ")
    assert f"{said}. Means" in excerpt or f"{said}, " in excerpt


def test_nothing_in_the_data_or_the_script_ends_an_element(episode, page, tmp_path):
    written = export_html(episode, tmp_path / "page.html", page=page)
    document = Document(written.path)
    assert document.data["facts"]["task"] == PLAN.task
    assert [found.get("type") for found, _ in document.all("script")] == ["module", "application/json"]
    ((_, script),) = document.all("script", type="module")
    assert script.endswith("console.log(ends);\n")
    assert script.replace(r"\x3c", "<") == (page / "assets" / "index.js").read_text()
    assert len(document.all("style")) == 1
    assert len(document.all("div", id="page")) == 1
    assert not document.all("b")  # of the task
    text = written.path.read_text()
    assert text.count("</script") == 2
    assert "<!--" not in text


def test_the_page_allows_no_request_and_no_script_but_its_own(episode, page, tmp_path):
    import hashlib

    document = Document(export_html(episode, tmp_path / "page.html", page=page).path)
    tags = [tag for tag, _, _ in document.elements]
    ((policy, _),) = document.all("meta", **{"http-equiv": "Content-Security-Policy"})
    rules = dict(rule.strip().split(" ", 1) for rule in policy["content"].split(";"))
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
    assert rules["img-src"] == "data: blob:"
    ((_, script),) = document.all("script", type="module")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert rules["script-src"] == f"'sha256-{digest}'"
    assert tags.index("meta") < tags.index("link") < tags.index("script")
    for tag, attributes, _ in document.elements:
        assert "src" not in attributes, tag
        assert attributes.get("href", "data:").startswith("data:"), tag


def without_means(path, target):
    """Copy an episode as one that was recorded without mean layers."""
    found = shutil.copytree(path.parent, target) / path.name
    metadata = json.loads((found / "zarr.json").read_text())
    for name in ("suffix_attention_mean", "all_layer"):
        shutil.rmtree(found / name)
        del metadata["consolidated_metadata"]["metadata"][name]
    (found / "zarr.json").write_text(json.dumps(metadata))
    return open_episode(found)


def test_an_episode_without_stored_means_exports_those_of_its_maps(episode, page, tmp_path):
    bare = without_means(episode.path, tmp_path / "bare")
    written = export_html(bare, tmp_path / "page.html", ExportSettings(layers=3), page=page)
    data = Document(written.path).data
    maps = episode.arrays["suffix_attention"].values[:, 2:, 1:, :, :3].astype(np.float32)
    np.testing.assert_array_equal(means_of(data), maps.mean(axis=4).astype(np.float16))
    assert data["facts"]["mean_layers"] == [3]


def test_labels_from_the_end_are_the_policys_own(page, tmp_path):
    path = write_planted_episode(tmp_path / "run", SyntheticPlan(n_frames=3, layers=(1, 2), videos=False))
    bare = without_means(path, tmp_path / "bare")
    data = Document(export_html(bare, tmp_path / "2.html", ExportSettings(layers=-2), page=page).path).data
    assert data["facts"]["mean_layers"] == [2]
    with pytest.raises(SelectionError, match="layer 3 was not saved; saved are 1-2"):
        export_html(bare, tmp_path / "3.html", ExportSettings(layers=-1), page=page)


def test_the_last_denoise_step_is_the_last_one_that_was_recorded(page, tmp_path):
    policy = {"n_layers": 4, "n_heads": 2, "n_denoise_steps": 10}
    path = write_planted_episode(tmp_path, SyntheticPlan(n_frames=3, videos=False), policy=policy)
    facts = Document(export_html(open_episode(path), tmp_path / "page.html", page=page).path).data["facts"]
    assert facts["denoise_steps"] == [2]
    last = ExportSettings(denoise_steps=-1)  # of the policy's
    with pytest.raises(SelectionError, match="denoise step 9 was not saved; saved are 0-2"):
        export_html(open_episode(path), tmp_path / "page.html", last, page=page)


def test_missing_maps_stay_missing(episode, page, tmp_path):
    path = shutil.copytree(episode.path.parent, tmp_path / "run") / episode.path.name
    array = zarr.open_array(path / "suffix_attention_mean", mode="r+")
    array[2, :, 1] = np.nan
    written = export_html(open_episode(path), tmp_path / "page.html", page=page)
    means = means_of(Document(written.path).data)
    assert np.isnan(means[2, 0, 1]).all()
    assert np.isnan(means).sum() == means[2, 0, 1].size


def test_an_episode_without_videos_has_no_pictures(page, tmp_path):
    path = write_planted_episode(tmp_path, SyntheticPlan(n_frames=4, videos=False))
    written = export_html(open_episode(path), tmp_path / "page.html", page=page)
    data = Document(written.path).data
    assert data["pictures"] == {}
    assert not any(camera["has_video"] for camera in data["facts"]["cameras"])
    assert (written.contents.n_cameras, written.contents.pictures_bytes) == (0, 0)


def test_an_incomplete_episode_is_exported_as_far_as_it_goes(page, tmp_path):
    path = write_planted_episode(tmp_path, SyntheticPlan(n_frames=9, complete=False))
    short, broken = (path.with_suffix(f".{camera}.mp4") for camera in ("image", "wrist"))
    other = write_planted_episode(tmp_path / "other", SyntheticPlan(n_frames=6))
    shutil.copy(other.with_suffix(".image.mp4"), short)
    broken.write_bytes(broken.read_bytes()[:200])
    written = export_html(open_episode(path), tmp_path / "page.html", page=page)
    data = Document(written.path).data
    assert data["facts"]["complete"] is False
    assert list(data["pictures"][IMAGE]) == [str(frame) for frame in range(6)]
    assert data["pictures"][WRIST] == {}
    has_video = {camera["name"]: camera["has_video"] for camera in data["facts"]["cameras"]}
    assert (has_video[IMAGE], has_video[WRIST]) == (True, False)
    first, second = written.notes
    assert first.startswith(f"6 of 9 pictures of {IMAGE}: ")
    assert second.startswith(f"0 of 9 pictures of {WRIST}: ")
    assert first in str(written)
    assert means_of(data).shape[0] == 3


def test_progress_and_what_will_be_written_are_told_before_it_is(episode, page, tmp_path):
    calls, path = [], tmp_path / "new" / "page.html"

    def announce(contents):
        assert not path.exists()
        calls.append(contents)

    steps = []
    settings = ExportSettings(frames="0-9:3", layers="2,3")
    export_html(
        episode,
        path,
        settings,
        page=page,
        progress=lambda done, total: steps.append((done, total)),
        announce=announce,
    )
    assert steps == [(i + 1, 4 + 2 * 4) for i in range(12)]
    (contents,) = calls
    sizes = (contents.n_inferences, contents.n_denoise_steps, contents.n_layers, contents.n_heads)
    assert sizes == (4, 1, 2, 2)
    assert (contents.n_frames, contents.n_cameras) == (4, 2)
    data = Document(path).data
    assert contents.maps_bytes == len(data["means"]["data"])
    pictures = [picture for of_camera in data["pictures"].values() for picture in of_camera.values()]
    assert contents.pictures_bytes == sum(map(len, pictures))
    assert "4 inferences × 1 denoise step × 2 layers × 2 heads" in str(contents)
    assert "4 frames × 2 cameras" in str(contents)
    assert list(tmp_path.joinpath("new").iterdir()) == [path]


def test_quality_decides_how_large_pictures_are(episode, page, tmp_path):
    sizes = [
        export_html(
            episode, tmp_path / "page.html", ExportSettings(quality=quality, frames="0-4"), page=page
        ).contents.pictures_bytes
        for quality in (30, 60, 90)
    ]
    assert sizes == sorted(sizes)
    assert sizes[2] > 1.3 * sizes[0]


def large_episode(folder):
    """Write an episode of random numbers, which do not compress, with pictures of noise."""
    plan = SyntheticPlan(n_frames=24, n_executed=2, n_layers=6, layers=(5,), n_heads=4, n_empty_cameras=0)
    path = write_planted_episode(folder, plan)
    array = zarr.open_array(path / "suffix_attention_mean", mode="r+")
    values = np.random.default_rng(0).random(array.shape, dtype=np.float32) / array.shape[-1]
    array[...] = values.astype(np.float16)
    return open_episode(path)


def test_a_file_above_the_limit_is_not_written_and_the_remedies_hold(page, tmp_path):
    found = large_episode(tmp_path / "run")
    target = tmp_path / "page.html"
    whole = export_html(found, target, ExportSettings(denoise_steps="all"), page=page).contents
    limit = 0.6 * whole.total_bytes / 1e6
    target.write_text("what was there")
    with pytest.raises(ConfigError) as caught:
        export_html(found, target, ExportSettings(denoise_steps="all", max_mb=limit), page=page)
    message = str(caught.value)
    assert "\n" not in message
    assert target.read_text() == "what was there"
    assert not list(tmp_path.glob(".page*"))
    assert f"would be {whole}; expected at most {limit:g} MB" in message
    assert f"--max-mb {int(np.ceil(whole.total_bytes / 1e6))} allows it" in message
    remedies = re.findall(r"--([\w-]+) (\S+) (?:would bring it )?to about ([\d.]+) kB", message)
    assert [name for name, _, _ in remedies] == ["frames", "layers", "heads", "denoise-steps"]
    for name, value, about in remedies:
        chosen = {"denoise_steps": "all", "max_mb": limit, name.replace("-", "_"): value}
        contents = export_html(found, target, ExportSettings(**chosen), page=page).contents
        assert contents.total_bytes / 1e3 == pytest.approx(float(about), rel=0.05)
    # The first stride that is enough: one less is not.
    stride = int(remedies[0][1].rpartition(":")[2])
    fewer = ExportSettings(denoise_steps="all", max_mb=limit, frames=f"0-23:{stride - 1}")
    with pytest.raises(ConfigError, match="expected at most"):
        export_html(found, target, fewer, page=page)


def test_where_nothing_would_be_enough_only_a_larger_limit_is_named(page, tmp_path):
    found = large_episode(tmp_path / "run")
    chosen = {"frames": "3", "layers": 0, "heads": 0, "max_mb": 0.1}
    big = shutil.copytree(page, tmp_path / "big")
    (big / "assets" / "index.js").write_text("//" + "x" * 200_000)
    with pytest.raises(ConfigError) as caught:
        export_html(found, tmp_path / "page.html", ExportSettings(**chosen), page=big)
    assert "to about" not in str(caught.value)
    assert "expected at most 0.1 MB; --max-mb 1 allows it; nothing was written" in str(caught.value)


def test_frames_without_a_pattern_are_named_one_by_one(page, tmp_path):
    found = large_episode(tmp_path / "run")
    frames = [0, 1, 4, 9, 16]
    size = export_html(found, tmp_path / "page.html", ExportSettings(frames=frames), page=page).contents
    limit = 0.99 * size.total_bytes / 1e6
    with pytest.raises(ConfigError, match=r"--frames 0,4,16 would bring it"):
        export_html(found, tmp_path / "no.html", ExportSettings(frames=frames, max_mb=limit), page=page)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": "mean"}, "layers: got 'mean', expected 'all', a number, a list or a range"),
        ({"heads": "max"}, "heads: got 'max', expected 'all'"),
        ({"denoise_steps": 1.5}, "denoise_steps: got 1.5"),
        ({"frames": None}, "frames: got None"),
        ({"frames": "0-9:0"}, "got '0-9:0', expected a number, a list"),
        ({"frames": "9:2"}, "got '9:2', expected a number, a list"),
        ({"frames": "0-9:"}, "got '0-9:', expected a number, a list"),
        ({"max_mb": 0}, "max_mb: got 0, expected a number from 0.1 to 10000"),
        ({"max_mb": "many"}, "max_mb: got 'many'"),
        ({"quality": 0}, "quality: got 0, expected a number from 1 to 95"),
        ({"quality": 50.5}, "quality: got 50.5, expected a whole number from 1 to 95"),
    ],
)
def test_odd_settings(settings, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        ExportSettings(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": 77}, "layer 77 was not saved; saved are 0-3"),
        ({"layers": []}, "layer []: expected at least one"),
        ({"heads": "0-5"}, "head 2 was not saved; saved are 0-1"),
        ({"denoise_steps": "3"}, "denoise step 3 was not saved; saved are 0-2"),
        ({"frames": "0-20"}, "frame 20 does not exist: the episode's are 0 to 19"),
        ({"frames": []}, "frames []: expected one at least"),
    ],
)
def test_what_the_episode_does_not_hold(episode, page, tmp_path, settings, message):
    with pytest.raises(SelectionError, match=re.escape(message)):
        export_html(episode, tmp_path / "page.html", ExportSettings(**settings), page=page)
    assert not list(tmp_path.iterdir())


def test_odd_targets(episode, page, tmp_path):
    (tmp_path / "folder.html").mkdir()
    (tmp_path / "file").write_text("")
    for path, message in (
        (tmp_path / "page.pdf", "cannot write '.pdf', expected .html"),
        (tmp_path / "page", "cannot write 'no suffix', expected .html"),
        (tmp_path / "folder.html", "is a folder, expected a file's name"),
        (episode.path / "page.html", "lies inside the episode's store"),
        (tmp_path / "file" / "page.html", "cannot write the page: "),
    ):
        with pytest.raises(ConfigError, match=re.escape(message)):
            export_html(episode, path, page=page)
    assert not list(episode.path.glob("*.html"))


def test_episodes_of_which_there_is_nothing_to_show(page, tmp_path):
    make_writer(tmp_path / "episode_00000.zarr").commit()
    with pytest.raises(StoreError, match="holds no frames yet; expected one at least"):
        export_html(open_episode(tmp_path / "episode_00000.zarr"), tmp_path / "page.html", page=page)
    path = tmp_path / "bare" / "episode_00000.zarr"
    write_episode(path)
    metadata = json.loads((path / "zarr.json").read_text())
    for name in ("suffix_attention", "suffix_attention_mean", "all_layer", "layer"):
        shutil.rmtree(path / name)
        del metadata["consolidated_metadata"]["metadata"][name]
    (path / "zarr.json").write_text(json.dumps(metadata))
    with pytest.raises(SelectionError, match="was recorded without suffix attention"):
        export_html(open_episode(path), tmp_path / "page.html", page=page)


def test_a_damaged_episode_is_named(page, tmp_path):
    path = tmp_path / "episode_00000.zarr"
    write_episode(path)
    for file in (path / "suffix_attention_mean").rglob("*"):
        if file.is_file() and file.name != "zarr.json":
            file.write_bytes(b"\0" * 100)
    with pytest.raises(StoreError, match=r"episode_00000\.zarr: cannot be exported .*lerobot-attn verify"):
        export_html(open_episode(path), tmp_path / "page.html", page=page)
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: shutil.rmtree(folder), "no page to export (index.html is missing"),
        (lambda folder: (folder / "assets" / "index.js").unlink(), "(index.js is missing"),
        (lambda folder: edit(folder, 'type="module"', "defer"), "has 0 scripts, expected one"),
        (lambda folder: edit(folder, "</head>", '<script src="x.js"></script></head>'), "asks for x.js"),
        (lambda folder: edit(folder, '<meta charset="utf-8" />', ""), "lacks its charset"),
    ],
    ids=["nothing", "no script", "another script", "a second script", "no charset"],
)
def test_a_page_that_was_not_built(episode, page, tmp_path, change, message):
    folder = shutil.copytree(page, tmp_path / "static")
    change(folder)
    with pytest.raises(SetupError) as caught:
        export_html(episode, tmp_path / "page.html", page=folder)
    assert message in str(caught.value)
    assert "scripts/build_explorer.sh" in str(caught.value)


def edit(folder, old, new):
    path = folder / "index.html"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_the_command(episode, page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(export_module, "single_document", lambda _: single_document(page))
    status, out, _ = run_cli(monkeypatch, capsys, "export-html", episode.path)
    assert status == 0
    announced, wrote = out.splitlines()
    assert announced.startswith("episode_00000.html: ")
    assert announced.endswith(", at most 25 MB")
    assert "maps" in announced
    assert "pictures" in announced
    assert wrote == "Wrote episode_00000.html"

    Path("settings.yaml").write_text("layers: 2-3\nframes: 0-19:4\nmax_mb: 5\n")
    options = ["--settings", "settings.yaml", "--frames", "0-19:5", "--heads", "1", "-o", "page.html"]
    status, out, _ = run_cli(monkeypatch, capsys, "export-html", episode.path, *options)
    assert status == 0
    assert "at most 5 MB" in out
    facts = Document(Path("page.html")).data["facts"]
    assert (facts["mean_layers"], facts["frames"], facts["heads"]) == ([2, 3], [0, 5, 10, 15], [1])

    options = ["--denoise-steps", "all", "--quality", "95", "--max-mb", "0.1", "-o", "large.html"]
    status, out, error = run_cli(monkeypatch, capsys, "export-html", episode.path, *options)
    assert status == 1
    (line,) = error.strip().splitlines()
    assert line.startswith("error: large.html: would be ")
    assert not Path("large.html").exists()


# From here on in a browser, with the page as it is built.

in_browser = pytest.mark.browser


class Opened:
    """An exported page in the browser, opened from disk without a network."""

    def __init__(self, page, path):
        self.page, self.path = page, path
        self.asked_for = []
        page.on("request", lambda request: self.asked_for.append(request.url))

    def go(self, **choice):
        """Open a link with choices, and wait until it is drawn."""
        query = "&".join(f"{name}={value}" for name, value in choice.items())
        self.page.goto(f"file://{self.path}?{query}")
        return self.drawn()

    def drawn(self, frame=None):
        """Wait until something, or that frame, is drawn; return what it is."""

        # Playwright's own waiting is a text that the page would have to evaluate, which it refuses to.
        def said():
            found = self.page.evaluate("document.documentElement.dataset.drawn")
            return found if found and frame in (None, int(found.split("/")[1])) else None

        return until(self.page, said, f"frame {frame} is drawn").split("/")

    def check_maps(self, episode, normalisation="share", *, layer, head, step, frame):
        """Check that every camera's map has the colours that the package's analysis gives it."""
        data = episode.arrays
        where = {
            "inference": int(data["frame_inference"][frame]),
            "layer": layer,
            "head": head,
            "denoise_step": step,
            "query": "executed",
        }
        assert_shows(self.page, data, colour_end([data], normalisation, **where), normalisation, **where)

    def text(self, selector):
        return self.page.locator(selector).inner_text()

    def options(self, label):
        return self.page.get_by_label(label, exact=False).first.locator("option").all_inner_texts()


@pytest.fixture
def opened(pages, tmp_path):
    """Export an episode and open it; in the end it has asked for nothing but itself."""
    found = []

    def open_(episode, settings=None):
        path = tmp_path / f"page {len(found)}.html"
        export_html(episode, path, settings)
        found.append(Opened(pages.open("about:blank", wait=False, offline=True), path))
        return found[-1]

    yield open_
    for page in found:
        assert {url.partition("?")[0] for url in page.asked_for} == {page.path.as_uri()}


GEOMETRIES = {
    "centred": SyntheticPlan(n_frames=6, image_px={IMAGE: (96, 128), WRIST: (97, 61)}),
    "left, top": SyntheticPlan(n_frames=6, image_px={IMAGE: (60, 100), WRIST: (96, 96)}, padding="left_top"),
}


@in_browser
@pytest.mark.parametrize("plan", GEOMETRIES.values(), ids=GEOMETRIES)
def test_every_pixel_is_the_analysis(tmp_path, opened, plan):
    episode = open_episode(write_planted_episode(tmp_path, plan))
    page = opened(episode, ExportSettings(denoise_steps="all"))
    views = [
        {"layer": 3, "head": 1, "step": 0, "frame": 4},
        {"layer": "mean", "head": "mean", "step": 2, "frame": 0},
        {"layer": 1, "head": "max", "step": 1, "frame": 5},
    ]
    for view in views:
        for normalisation in NORMALISATIONS:
            page.go(**view, norm=normalisation)
            page.check_maps(episode, normalisation, **view)


@in_browser
def test_a_picture_is_of_the_frame_that_the_page_names(episode, opened):
    page = opened(episode, ExportSettings(frames="1-19:4"))
    videos = {
        camera: list(read_frames(episode.videos[camera], size_px=episode.image_size_px(camera)))
        for camera in (IMAGE, WRIST)
    }

    def check(frame):
        assert page.drawn(frame)[1] == str(frame)
        inference = episode.arrays["frame_inference"].values[frame]
        assert page.text(".transport output") == f"frame {frame} of 17 · inference {inference}"
        for camera, video in videos.items():
            assert_frames(page.page, video, camera.rpartition(".")[2], frame)
        page.check_maps(episode, layer=3, head="mean", step=2, frame=frame)

    page.go(frame=8, opacity=0)  # not in the file: the one before it is shown, and said so
    check(5)
    page.page.keyboard.press("ArrowRight")
    check(9)
    page.page.keyboard.press("ArrowLeft")
    page.page.keyboard.press("ArrowLeft")
    check(1)
    page.page.keyboard.press("ArrowLeft")
    check(1)
    page.page.keyboard.press("Shift+ArrowRight")
    check(17)
    page.page.keyboard.press("Home")
    check(1)
    page.page.keyboard.press("End")
    check(17)
    slider = page.page.get_by_label("Frame", exact=True)
    slider.focus()
    page.page.keyboard.press("ArrowLeft")
    check(13)
    assert slider.get_attribute("aria-valuetext") == "frame 13"
    assert (slider.get_attribute("min"), slider.get_attribute("max")) == ("0", "4")
    box = page.page.locator(".timeline .u-over").first.bounding_box()
    page.page.mouse.click(box["x"] + box["width"] * 11.6 / 20, box["y"] + 5)
    check(9)
    assert "frame=9" in page.page.evaluate("new Promise(r => setTimeout(() => r(location.search), 400))")
    page.page.get_by_role("button", name="Play").click()
    check(17)  # at the end it stops
    page.page.get_by_role("button", name="Play").wait_for()


@in_browser
def test_the_page_offers_what_is_in_it_and_says_so(episode, opened):
    page = opened(episode, ExportSettings(layers="1,3", heads=1, denoise_steps="0,2", frames="0-8"))
    page.go()
    assert page.options("Layer") == ["1", "3", "mean of these"]
    assert page.options("Head") == ["mean of these", "largest of these", "1"]
    assert [name.split()[0] for name in page.options("Denoise step")] == ["0", "2"]
    assert page.options("Action token") == ["mean of the executed"]
    note = "An export of layers 1, 3, head 1, denoise steps 0, 2, frames 0-8. Means, largest values"
    assert page.page.get_by_text(note).is_visible()
    assert page.page.get_by_text("Random weights: these maps mean nothing.").is_visible()
    assert page.page.get_by_text(PLAN.task, exact=True).first.is_visible()
    assert page.page.locator("b", has_text="it").count() == 0


@in_browser
def test_everything_on_the_page_works_without_a_network(episode, opened):
    page = opened(episode, ExportSettings(denoise_steps="all"))
    page.go(norm="episode")
    for key in ("ArrowUp", "ArrowDown", "[", "]", "h", "H", "c", "Shift+ArrowRight"):
        page.page.keyboard.press(key)
    page.page.locator("canvas[data-kind=overlay]").first.click(position={"x": 20, "y": 20})
    page.page.get_by_text("Layers and heads that give it most").wait_for()
    page.page.keyboard.press("?")
    page.page.locator("dialog").get_by_role("button", name="Close").click()
    page.page.locator("dialog").wait_for(state="detached")
    with page.page.expect_download() as download:
        page.page.get_by_role("button", name="Save PNG").click()
    with Image.open(download.value.path()) as picture:
        assert picture.width >= 640
    page.page.get_by_role("button", name="Tour").click()
    for _ in range(9):
        page.page.get_by_role("button", name="Next").click()
    page.page.get_by_role("button", name="Done").click()
    page.page.wait_for_timeout(500)
    assert page.page.locator("[role=alert]").count() == 0


@in_browser
def test_the_policy_is_in_force(episode, opened, pages):
    page = opened(episode, ExportSettings(frames=0))
    page.go()
    refused = page.page.evaluate(
        """async () => {
            const refused = [];
            addEventListener("securitypolicyviolation", (e) => refused.push(e.effectiveDirective));
            await fetch("http://127.0.0.1:9/").catch(() => {});
            await new Promise((done) => {
                const image = new Image();
                image.onerror = done;
                image.src = "http://127.0.0.1:9/x.png";
            });
            const script = document.createElement("script");
            script.textContent = "window.intruded = true";
            document.body.append(script);
            await new Promise((done) => setTimeout(done, 100));
            return [refused, window.intruded ?? false];
        }"""
    )
    assert refused == [["connect-src", "img-src", "script-src-elem"], False]
    pages.forgive("Content Security Policy")
    page.asked_for = [url for url in page.asked_for if not url.startswith("http://127.0.0.1:9/")]


@in_browser
def test_a_link_into_the_file_shows_the_same_view(episode, opened):
    page = opened(episode, ExportSettings(denoise_steps="all"))
    page.go(frame=7, layer=1, head=0, step=1, camera="wrist", norm="frame")
    page.page.keyboard.press("ArrowRight")
    page.page.keyboard.press("ArrowUp")
    page.page.wait_for_timeout(400)
    before, pixels = page.drawn(), canvas(page.page, "wrist", "raw")
    assert before[1:] == ["8", "1", "2", "0", "wrist", "frame", "executed"]
    page.page.reload()
    assert page.drawn() == before
    until(page.page, lambda: (canvas(page.page, "wrist", "raw") == pixels).all(), "the same map is drawn")


@in_browser
def test_a_stride_longer_than_a_chunk_leaves_gaps_and_no_wrong_map(episode, opened):
    """Inferences that no chosen frame belongs to are not in the file; those after them are not renumbered."""
    page = opened(episode, ExportSettings(frames="2-19:6"))
    for frame in (2, 8, 14):
        page.go(frame=frame, layer=2, head=0)
        page.check_maps(episode, layer=2, head=0, step=2, frame=frame)
    page.page.wait_for_timeout(300)
    assert page.page.locator("[role=alert]").count() == 0
