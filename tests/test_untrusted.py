"""Stores from strangers: whatever one holds, a reader gets values or one clean line, and nothing is run."""

import copy
import json
import os
import pickle
import re
import shutil
import tracemalloc
import warnings

import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from lerobot_attn import analysis
from lerobot_attn.errors import LerobotAttnError, StoreError
from lerobot_attn.inspection import describe_episode, describe_run, render_episode, render_run
from lerobot_attn.store.reader import open_episode, open_run
from lerobot_attn.store.schema import BY_NAME, SCHEMA_VERSION
from lerobot_attn.synthetic import SyntheticPlan, write_planted_episode

CAMERA = "observation.images.image"
PLAN = SyntheticPlan(
    n_frames=4,
    n_executed=2,
    n_queries=2,
    n_denoise_steps=2,
    n_layers=2,
    layers=(1,),
    grid=(2, 2),
    n_text=24,
    task="pick up",
    n_empty_cameras=0,
    n_state=1,
    n_actions=1,
    image_px={CAMERA: (16, 16)},
)
# What xarray, zarr and their codecs raise when values are read.
PLAIN = (LerobotAttnError, ValueError, RuntimeError, LookupError, OSError, TypeError)


def fuzz(max_examples):
    return settings(
        max_examples=max_examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    )


@pytest.fixture(scope="session")
def pristine(tmp_path_factory):
    return write_planted_episode(tmp_path_factory.mktemp("pristine") / "run", PLAN)


@pytest.fixture
def path(pristine, copied):
    return copied(pristine)


@pytest.fixture(scope="session")
def document(pristine):
    return json.loads((pristine / "zarr.json").read_text())


def write(path, document):
    (path / "zarr.json").write_text(document if isinstance(document, str) else json.dumps(document))


def clean(function, *arguments):
    """Return what a function does, or None if it raises one clean line."""
    try:
        return function(*arguments)
    except LerobotAttnError as error:
        message = str(error)
    assert len(message.splitlines()) == 1
    assert len(message) < 1000
    return None


def tolerated(function):
    try:
        return function()
    except PLAIN:
        return None


def rendered(content):
    console = Console(width=100, file=open(os.devnull, "w", encoding="utf-8"))  # noqa: PTH123, SIM115
    with console.file:
        console.print(content)


def read_everything(path):
    """Do what readers do; whatever the package itself raises must be a clean line."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = clean(open_run, path.parent)
        if run is not None:
            rendered(render_run(describe_run(run)))
            for _, reason in run.damaged:
                assert len(reason.splitlines()) == 1
        episode = clean(open_episode, path)
        if episode is None:
            return
        for name in ("task", "success", "is_complete", "n_frames", "n_inferences", "has_random_weights"):
            getattr(episode, name)
        repr(episode)
        episode.raw_bytes()
        clean(lambda: episode.layout)
        clean(episode.row_sum_tolerance)
        clean(lambda: episode.image_size_px(CAMERA))
        run_folder = path.parents[2].resolve()
        for video in [*(clean(lambda: episode.videos) or {}).values(), episode.eval_video]:
            assert video is None or video.resolve().is_relative_to(run_folder)
        facts = clean(describe_episode, episode)
        if facts is not None:
            json.dumps(facts)
            rendered(render_episode(facts))
        data = clean(lambda: episode.dataset)
        if data is not None and "suffix_attention" in data:
            tolerated(lambda: data["suffix_attention"][0, 0, 0].values)
        data = clean(lambda: episode.arrays)
        if data is not None:
            tolerated(lambda: analysis.modality_share(data, inference=0))


def test_a_sound_store_is_read(path):
    episode = open_episode(path)
    assert list(episode.videos) == [CAMERA]
    assert episode.eval_video is not None
    assert describe_episode(episode)["rows_sum_to_one"]
    read_everything(path)


NUMBERS = st.sampled_from([0, 1, -1, 2**31, 2**63, 10**12, 10**400, -(10**12), 0.5, 1e308, float("inf")])
TEXTS = st.sampled_from(
    [
        "",
        "../../../secret.mp4",
        "/etc/passwd",
        "a\nb",
        "[/red]",
        "\x1b[2J",
        "\ud800",
        "\0",
        "x" * 5000,
        "pickle",
    ]
) | st.text(max_size=8)
LEAVES = st.none() | st.booleans() | NUMBERS | TEXTS
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)


def nodes(value, at=()):
    """Yield the place of every node of a JSON document, as keys and indices from its root."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*at, key)
        yield from nodes(inner, (*at, key))


def changed(document, at, value, *, delete=False):
    document = copy.deepcopy(document)
    parent = document
    for key in at[:-1]:
        parent = parent[key]
    if delete:
        del parent[at[-1]]
    else:
        parent[at[-1]] = value
    return document


@fuzz(40)
@given(draw=st.data())
def test_any_attribute_may_be_anything(path, document, draw):
    at = draw.draw(st.sampled_from([at for at in nodes(document) if at[0] != "consolidated_metadata"]))
    delete = draw.draw(st.integers(0, 4)) == 0
    write(path, changed(document, at, draw.draw(VALUES), delete=delete))
    read_everything(path)


ODD_PARTS = {
    "shape": st.lists(NUMBERS, max_size=7),
    "chunk_grid": st.builds(
        lambda chunks: {"name": "regular", "configuration": {"chunk_shape": chunks}}, st.lists(NUMBERS)
    ),
    "codecs": st.lists(
        st.sampled_from(
            [
                {"name": n, "configuration": {}}
                for n in ("numcodecs.pickle", "pickle", "bytes", "zstd", "gzip")
            ]
        )
    ),
    "data_type": st.sampled_from(["object", "float64", "r8000000000", "int8", {"name": "struct"}]),
    "fill_value": LEAVES,
    "dimension_names": st.lists(st.sampled_from(["key", "layer", "x"]), max_size=6),
    "attributes": st.dictionaries(
        st.sampled_from(["units", "scale_factor", "_FillValue", "dtype", "coordinates"]), LEAVES, max_size=2
    ),
    "zarr_format": st.sampled_from([2, 4, None]),
    "node_type": st.sampled_from(["group", None, []]),
}


@fuzz(80)
@given(draw=st.data())
def test_any_arrays_metadata_may_be_anything(path, document, draw):
    arrays = document["consolidated_metadata"]["metadata"]
    name = draw.draw(st.sampled_from(sorted(arrays)))
    at = ("consolidated_metadata", "metadata", name)
    if draw.draw(st.booleans()):
        part = draw.draw(st.sampled_from(sorted(ODD_PARTS)))
        write(path, changed(document, (*at, part), draw.draw(ODD_PARTS[part])))
    else:
        inner = draw.draw(st.sampled_from([(), *nodes(arrays[name])]))
        delete = draw.draw(st.integers(0, 4)) == 0
        write(path, changed(document, (*at, *inner), draw.draw(VALUES), delete=delete))
    read_everything(path)


@fuzz(25)
@given(cut=st.integers(0, 100_000), flip=st.integers(0, 100_000))
def test_metadata_may_be_cut_or_garbled(path, document, cut, flip):
    data = bytearray(json.dumps(document).encode())
    data[flip % len(data)] ^= 0xFF
    (path / "zarr.json").write_bytes(bytes(data))
    read_everything(path)
    write(path, json.dumps(document)[: cut % len(data)])
    read_everything(path)
    assert clean(open_episode, path) is None


@fuzz(25)
@given(draw=st.data())
def test_any_chunk_may_be_damaged(path, draw):
    chunks = sorted(p for p in path.glob("*/c/**/*") if p.is_file())
    chunk = draw.draw(st.sampled_from(chunks))
    data = chunk.read_bytes()
    kind = draw.draw(st.sampled_from(["cut", "flip", "delete", "folder", "noise"]))
    position = draw.draw(st.integers(0, max(0, len(data) - 1)))
    try:
        chunk.unlink()
        if kind == "cut":
            chunk.write_bytes(data[:position])
        elif kind == "flip":
            chunk.write_bytes(data[:position] + bytes([data[position] ^ 0xFF]) + data[position + 1 :])
        elif kind == "noise":
            chunk.write_bytes(draw.draw(st.binary(max_size=200)))
        elif kind == "folder":
            chunk.mkdir()
        read_everything(path)
    finally:
        if chunk.is_dir():
            chunk.rmdir()
        chunk.write_bytes(data)


class Bomb:
    """Leaves a file when it is unpickled."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


def test_an_array_of_zarr_2_cannot_unpickle(path, document, tmp_path):
    # Zarr takes entries of version 2 here; 3.4 refuses pickle in them by itself, which older ones may not.
    trap = tmp_path / "executed"
    (path / "head" / "0").write_bytes(pickle.dumps(Bomb(trap)))
    entry = {
        "zarr_format": 2,
        "shape": [2],
        "chunks": [2],
        "dtype": "|O",
        "compressor": None,
        "fill_value": 0,
        "order": "C",
        "filters": [{"id": "pickle"}],
        "dimension_separator": ".",
        "attributes": {"_ARRAY_DIMENSIONS": ["head"]},
    }
    for name in ("head", "foreign"):
        if name == "foreign":
            shutil.copytree(path / "head", path / name)
        write(path, changed(document, ("consolidated_metadata", "metadata", name), entry))
        with pytest.raises(StoreError, match=f"array {name} has zarr_format 2, expected 3"):
            open_episode(path)
        read_everything(path)
    assert not trap.exists()


@pytest.mark.parametrize("codec", ["numcodecs.pickle", "pickle", "my_package.codec", 7, None])
@pytest.mark.parametrize("where", [(), (0, "configuration", "codecs"), (0, "configuration", "index_codecs")])
def test_only_zarrs_own_codecs_run(path, document, codec, where):
    at = ("consolidated_metadata", "metadata", "suffix_attention", "codecs", *where, 0)
    write(path, changed(document, at, {"name": codec, "configuration": {}}))
    with pytest.raises(StoreError, match="array suffix_attention has codec"):
        open_episode(path)


@pytest.mark.parametrize("name", ["../outside", "..", "/etc", "a/b", "a\\b", "", "a\nb"])
def test_an_arrays_name_leads_nowhere(path, document, name):
    arrays = document["consolidated_metadata"]["metadata"]
    write(path, changed(document, ("consolidated_metadata", "metadata", name), arrays["head"]))
    with pytest.raises(StoreError, match="expected a plain name"):
        open_episode(path)


def entry(shape, chunks, dims):
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": shape,
        "data_type": "int32",
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunks}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": 0,
        "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
        "attributes": {},
        "dimension_names": dims,
        "storage_transformers": [],
    }


def every(document, dim, length):
    """Give a dimension another length in every array, so that they agree."""
    document = copy.deepcopy(document)
    for array in document["consolidated_metadata"]["metadata"].values():
        for axis, name in enumerate(array["dimension_names"]):
            if name == dim:
                array["shape"][axis] = length
    return document


def layout_of_keys(document, n_keys):
    document = copy.deepcopy(document)
    document["attributes"]["layout"]["segments"][-1]["stop"] = n_keys
    return document


def chunk_of(document, name, length):
    document = copy.deepcopy(document)
    grid = document["consolidated_metadata"]["metadata"][name]["chunk_grid"]["configuration"]
    grid["chunk_shape"] = [length] * len(grid["chunk_shape"])
    return document


ABSURD = {
    "inferences": lambda d: every(d, "inference", 10**12),
    "frames": lambda d: every(d, "frame", 10**12),
    "keys": lambda d: every(d, "key", 10**12),
    "layers, an index that xarray loads": lambda d: every(d, "layer", 10**8),
    "heads": lambda d: every(d, "head", 10**8),
    "keys of no inference": lambda d: every(every(d, "inference", 0), "key", 10**12),
    "chunks of maps": lambda d: chunk_of(d, "suffix_attention", 10**12),
    "chunks of a table": lambda d: chunk_of(d, "reward", 10**12),
    "keys of the layout": lambda d: layout_of_keys(d, 10**8),
    "a foreign index": lambda d: changed(
        d, ("consolidated_metadata", "metadata", "foreign"), entry([10**8], [10**8], ["foreign"])
    ),
}


@pytest.mark.parametrize("case", ABSURD)
def test_absurd_sizes_do_not_allocate(path, document, case):
    read_everything(path)  # imports are not what is measured
    write(path, ABSURD[case](document))
    tracemalloc.start()
    try:
        read_everything(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 50e6


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (("attributes",), [], "of another kind"),
        (("attributes",), None, "of another kind"),
        (("attributes", "schema_version"), SCHEMA_VERSION + 1, "schema version 3, expected at most 2"),
        (("attributes", "schema_version"), True, "schema version True"),
        (("attributes", "schema_version"), "x" * 10_000, "schema version 'xxx"),
        (("attributes", "policy"), ["a"], "its policy is"),
        (("attributes", "capture"), "x", "its capture is 'x', expected an object"),
        (("attributes", "videos"), None, "its videos is None"),
        (("attributes", "executed_queries"), [0, 1e308], "its executed_queries is"),
        (("attributes", "executed_queries"), [0], "its executed_queries is"),
        (("consolidated_metadata",), None, "no consolidated metadata"),
        (("consolidated_metadata", "metadata", "reward", "data_type"), "float64", "expected 'float32'"),
        (("consolidated_metadata", "metadata", "key_kind", "dimension_names"), ["a", "b"], "dimension_names"),
    ],
)
def test_what_is_wrong_is_said(path, document, at, value, message):
    write(path, changed(document, at, value))
    with pytest.raises(StoreError, match=message) as error:
        open_episode(path)
    assert len(str(error.value)) < 500
    read_everything(path)


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, "9" * 10_000, " " * 16_000_001, "\ufeff{}", "null", "7", '"text"', ""],
    ids=["nesting", "long number", "large", "mark", "null", "number", "text", "empty"],
)
def test_metadata_that_is_no_store(path, text):
    write(path, text)
    with pytest.raises(StoreError) as error:
        open_episode(path)
    assert "\n" not in str(error.value)
    read_everything(path)


def test_metadata_that_cannot_be_parsed_is_not_read_when_too_large(path):
    write(path, " " * 16_000_001)
    with pytest.raises(StoreError, match="larger than 16000000 bytes"):
        open_episode(path)


@pytest.mark.parametrize(
    ("at", "value"),
    [
        (("prefix_len",), float("inf")),
        (("segments", 0, "stop"), 1e308),
        (("segments", 0, "name"), []),
        (("segments",), "text"),
        (("cameras", 0, "name"), {}),
        (("cameras", 0, "geometry", "grid_columns"), 0),
        (("cameras", 0, "geometry", "height_px"), 10**12),
        (("cameras", 0, "geometry"), [1]),
        (("cameras",), 5),
        (("segments", 2, "kind"), "other"),
    ],
)
def test_a_damaged_layout_is_said(path, document, at, value):
    write(path, changed(document, ("attributes", "layout", *at), value))
    with pytest.raises(StoreError, match="its token layout is damaged"):
        _ = open_episode(path).layout
    read_everything(path)


def test_a_video_that_is_a_link_out_of_the_folder_is_not_followed(path, tmp_path):
    secret = tmp_path / "secret.mp4"
    secret.write_bytes(b"")
    for file in (path.parent / "episode_00000.image.mp4", open_episode(path).eval_video):
        file.unlink()
        file.symlink_to(secret)
    episode = open_episode(path)
    assert episode.videos == {}
    assert episode.eval_video is None


def test_an_unlisted_video_that_is_a_link_is_not_followed(path, document, tmp_path):
    write(path, changed(document, ("attributes", "videos"), None, delete=True))
    assert list(open_episode(path).videos) == [CAMERA]
    (tmp_path / "secret.mp4").write_bytes(b"")
    (path.parent / "episode_00000.image.mp4").unlink()
    (path.parent / "episode_00000.image.mp4").symlink_to(tmp_path / "secret.mp4")
    assert open_episode(path).videos == {}


def test_a_store_outside_a_run_reaches_its_own_folder_alone(path, document, tmp_path):
    # Three folders above a download may be somebody's home.
    store = tmp_path / "home" / "me" / "downloads" / path.name
    shutil.copytree(path, store)
    (tmp_path / "home" / "private.mp4").write_bytes(b"")
    for name in ("../../private.mp4", str(tmp_path / "home" / "private.mp4")):
        write(store, changed(document, ("attributes", "eval_video"), {"path": name}))
        assert open_episode(store).eval_video is None


@pytest.mark.parametrize(
    "name",
    ["/etc/passwd", "..", "", "\0.mp4", "x" * 5000 + ".mp4", "\ud800.mp4", "../x.mp4", "loop.mp4", 3, []],
)
def test_odd_names_of_videos_are_no_videos(path, document, name):
    (path.parent / "loop.mp4").symlink_to("loop.mp4")
    document = changed(document, ("attributes", "videos", CAMERA, "path"), name)
    write(path, changed(document, ("attributes", "eval_video", "path"), name))
    episode = open_episode(path)
    assert (episode.videos, episode.eval_video) == ({}, None)


def test_a_store_cannot_write_to_the_terminal(path, document, capsys):
    camera = "[/red]\x1b[2J"
    document = changed(document, ("attributes", "task"), "\x1b]0;owned\x07[bold]pick")
    document["attributes"]["layout"]["cameras"][0]["name"] = camera
    document["attributes"]["layout"]["segments"][0]["name"] = camera
    document["attributes"]["episode_index"] = "[/]"
    write(path, document)
    console = Console(force_terminal=False, width=200)
    console.print(render_episode(describe_episode(open_episode(path))))
    console.print(render_run(describe_run(open_run(path.parent))))
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "[bold]pick" in out
    assert "[/red]" in out


def test_rows_that_are_not_there_do_not_sum_to_1(path):
    shutil.rmtree(path / "suffix_attention" / "c" / "1")
    shutil.rmtree(path / "suffix_attention_mean" / "c" / "1")
    facts = describe_episode(open_episode(path))
    assert facts["rows_sum_to_one"] is False
    rendered(render_episode(facts))


STRANGE_NUMBERS = [
    ("key_kind", (1, 5), 99, "0 to 7"),
    ("key_kind", (0, 0), -3, "0 to 7"),
    ("text_word", (1, 3), -7, "-1 or more"),
    ("text_state_dim", (0, 4), -2, "-1 or more"),
    ("key_camera", (3,), 17, "-1 to 0"),
    ("key_camera", (4,), -9, "-1 to 0"),
    ("inference_frame", (1,), -1, "0 or more"),
    ("frame_inference", (3,), 2**30, None),
    ("frame_inference", (3,), -1, None),
    ("frame_query", (2,), 500, None),
    ("frame_query", (2,), -2, None),
]


@pytest.mark.parametrize(("name", "at", "value", "allowed"), STRANGE_NUMBERS)
def test_a_number_that_means_nothing_is_named_with_its_place(path, name, at, value, allowed):
    array = zarr.open_group(path, mode="r+", use_consolidated=False)[name]
    array[at] = value
    place = ", ".join(f"{dim} {i}" for dim, i in zip(BY_NAME[name].dims, at, strict=True))
    message = f"{name} is {value} at {place}, expected {allowed or ''}"
    episode = open_episode(path)
    selections = [
        lambda data: data[name].values,
        lambda data: data[name][at].values,
        lambda data: data[name][at[0] :].values,
        lambda data: data[name][[at[0], 0]].values,
        lambda data: data[name].isel({BY_NAME[name].dims[0]: slice(at[0], None, 2)}).load(),
    ]
    for data in (episode.arrays, episode.dataset):
        for select in selections:
            with pytest.raises(StoreError, match=re.escape(message)):
                select(data)
    for dataset in (open_episode(path).arrays, open_episode(path).dataset):
        for analyse in (analysis.modality_share, analysis.token_attention, analysis.attention_sinks):
            clean(analyse, dataset)
        clean(lambda data: analysis.attention(data, frame=3, query="frame"), dataset)
        clean(lambda data: analysis.image_heatmap(data, frame=2), dataset)
    read_everything(path)


def test_numbers_are_checked_when_they_are_read_and_not_before(path):
    zarr.open_group(path, mode="r+", use_consolidated=False)["key_kind"][0, 0] = 99
    episode = open_episode(path)
    assert episode.arrays["suffix_attention"][0, 0, 0].values.shape
    assert episode.dataset["token_id"].values.shape
