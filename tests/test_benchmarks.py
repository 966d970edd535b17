"""The benchmarks run at tiny sizes, and docs and README quote what they wrote. Nothing says how fast."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from browser import require, why_no_browser

FOLDER = Path(__file__).parent.parent / "benchmarks"
MARKED = "# Title\n\n<!-- benchmarks -->\nold\n<!-- /benchmarks -->\n\nrest\n"

# Benchmark → words that its results must name.
BENCHMARKS = {
    "size": ("per action", "each once"),
    "codecs": ("the store's own way", "compressed a second"),
    "write": ("bare codec", "torch.save"),
    "read": ("one raw map", "full scan with Dask"),
    "explorer": ("next frame, key held", "another layer", "first view", "memory"),
    "neuron_words": ("peak memory", "from the cache"),
    "summarise": ("bare decoding speed", "one process", "peak memory"),
    "live": ("watching live", "median", "p95"),
}
IN_A_BROWSER = ("explorer", "live")


def run(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, FOLDER / f"{script}.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def load(script: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(FOLDER)
    spec = importlib.util.spec_from_file_location(f"benchmark_{script}", FOLDER / f"{script}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def result(**changes) -> dict:
    empty = {"least": None, "most": None, "at_most": None, "at_least": None, "headline": True}
    return {"what": "a claim", "value": 2.0, "unit": "×", **empty, **changes}


def write_results(folder: Path, *results: dict, name: str = "one", **changes) -> None:
    machine = {"cores": 2, "processor": "Some CPU", "device": "cpu"}
    document = {"benchmark": name, "quick": False, "machine": machine, "results": list(results), **changes}
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(document))


def rewrite(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run(
        "readme_table", "--results", tmp_path / "results", "--pages", tmp_path / "README.md", *arguments
    )


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.browser] * (name in IN_A_BROWSER)) for name in BENCHMARKS]
)
def test_runs_at_tiny_sizes(name, tmp_path):
    if name in IN_A_BROWSER:
        require(why_no_browser())
    file = tmp_path / "result.json"
    done = run(name, "--quick", "--json", file)
    assert done.returncode == 0, done.stderr
    document = json.loads(file.read_text())
    assert document["benchmark"] == name
    assert document["quick"] is True
    claims = " ".join(one["what"] for one in document["results"])
    for words in BENCHMARKS[name]:
        assert words in claims
    assert all(one["value"] > 0 for one in document["results"])
    assert not re.search(r"\bnan\b", done.stdout)


def test_table_shows_headlines_with_their_targets(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(MARKED)
    write_results(
        tmp_path / "results",
        result(what="small", value=25.0, least=24.0, most=26.5, at_least=20),
        result(what="slow", value=1.2, at_most=1.05),
        result(what="left out", headline=False),
    )
    assert rewrite(tmp_path).returncode == 0
    text = readme.read_text()
    assert "| small | 25.00× (24.00–26.50) | ≥ 20 | yes |" in text
    assert "| slow | 1.20× | ≤ 1.05 | **no** |" in text
    assert "left out" not in text
    assert "old" not in text
    assert "2 cores of Some CPU: one." in text
    assert text.startswith("# Title\n\n<!-- benchmarks -->\n|")
    assert text.endswith("\n<!-- /benchmarks -->\n\nrest\n")


def test_check_tells_a_stale_table_and_leaves_it(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(MARKED)
    write_results(tmp_path / "results", result())
    assert rewrite(tmp_path, "--check").returncode == 1
    assert readme.read_text() == MARKED
    rewrite(tmp_path)
    assert rewrite(tmp_path, "--check").returncode == 0
    write_results(tmp_path / "results", result(value=3.0))
    assert rewrite(tmp_path, "--check").returncode == 1


@pytest.mark.parametrize(
    "readme", ["no markers", MARKED + MARKED, "<!-- /benchmarks -->\n<!-- benchmarks -->\n"]
)
def test_table_needs_its_markers(readme, tmp_path):
    (tmp_path / "README.md").write_text(readme)
    write_results(tmp_path / "results", result())
    done = rewrite(tmp_path)
    assert done.returncode == 2
    assert "<!-- benchmarks -->" in done.stderr
    assert (tmp_path / "README.md").read_text() == readme


def test_a_quick_run_never_gets_into_the_table(tmp_path):
    (tmp_path / "README.md").write_text(MARKED)
    write_results(tmp_path / "results", result(), quick=True)
    done = rewrite(tmp_path)
    assert done.returncode == 2
    assert "--quick" in done.stderr


def test_losses_are_noticed(tmp_path, monkeypatch):
    size = load("size", monkeypatch)
    plan = size.SyntheticPlan(n_frames=3)
    episode = size.MadeUpEpisode(plan)
    maps = episode.maps(0)
    path = tmp_path / "episode.zarr"
    episode.write(path, lambda inference: maps.as_float16())
    size.check_lossless(path, [maps])
    maps.full[0, 0, 0, 0, 0] *= 1.01
    with pytest.raises(RuntimeError, match="suffix_attention of inference 0: 1 of"):
        size.check_lossless(path, [maps])


def test_every_way_to_compress_gives_back_what_went_in(monkeypatch):
    codecs = load("codecs", monkeypatch)
    data = codecs.kinds_of_data(quick=True)
    ways = list(codecs.ways())
    assert len({way.name for way in ways}) == len(ways) > 30
    for way in ways:
        for maps in data.values():
            assert 0 < way.checked_bytes(maps) < maps.nbytes * 1.2, way.name


def test_a_way_that_loses_precision_is_noticed(monkeypatch):
    codecs = load("codecs", monkeypatch)
    maps = codecs.kinds_of_data(quick=True)["float32"]
    rounded = codecs.blosc("zstd", 1, change=codecs.rounding(4), relative=2.0**-5)
    rounded.checked_bytes(maps)
    for claimed in (0, 2.0**-6):
        way = codecs.blosc("zstd", 1, change=codecs.rounding(4), relative=claimed)
        with pytest.raises(RuntimeError, match="4 bits of mantissa"):
            way.checked_bytes(maps)


def test_made_up_maps_are_attention(monkeypatch):
    made_up = load("made_up", monkeypatch)
    from lerobot_attn.synthetic import SyntheticPlan

    episode = made_up.MadeUpEpisode(SyntheticPlan())
    maps = episode.maps(1)
    assert maps.full.sum(axis=-1) == pytest.approx(1, abs=1e-5)
    assert maps.means.sum(axis=-1) == pytest.approx(1, abs=1e-5)
    masked = episode.rows(1, maps)["key_kind"] == 0
    assert masked.any()
    assert (maps.full[..., masked] == 0).all()
    assert (maps.full[..., ~masked] > 0).all()
    assert (maps.full == episode.maps(1).full).all()
    assert not (maps.full == episode.maps(0).full).all()
    low_bits = maps.as_bfloat16().full.view("uint32") & 0xFFFF
    assert not low_bits.any()


def test_a_layout_with_other_numbers_is_noticed(monkeypatch):
    read = load("read", monkeypatch)
    places = read.Places(Path(), Path(), (0,), 1, layers=(1, 2), grid=(1, 1))
    answer = np.full((1, 3, 4), 0.1)
    read.compare("means", {"store": answer, "pt": answer * 1.001}, places)
    other = answer.copy()
    other[0, 0] = 7  # of a layer whose maps the store does not have
    read.compare("means", {"store": answer, "pt": other}, places)
    with pytest.raises(AssertionError, match="map: pt"):
        read.compare("map", {"store": answer, "pt": other}, places)
    other = answer.copy()
    other[0, 2, 3] *= 1.01
    with pytest.raises(AssertionError, match="means: pt"):
        read.compare("means", {"store": answer, "pt": other}, places)


def test_a_writer_that_stores_other_numbers_is_noticed(tmp_path, monkeypatch):
    write = load("write", monkeypatch)
    episode = write.MadeUpEpisode(write.SyntheticPlan(n_frames=6))
    maps = [episode.maps(inference).as_float16() for inference in range(2)]
    store = write.StoreWriting(tmp_path / "episode.zarr", episode, maps)
    store.run()
    store.run()
    store.check()
    maps[0].means[0, 0, 0, 0] += 0.01
    with pytest.raises(RuntimeError, match="suffix_attention_mean differs"):
        store.check()


def test_bare_codec_does_to_chunks_what_the_store_does(tmp_path, monkeypatch):
    write = load("write", monkeypatch)
    episode = write.MadeUpEpisode(write.SyntheticPlan(n_frames=3))
    maps = [episode.maps(0).as_float16()]
    store = write.StoreWriting(tmp_path / "episode.zarr", episode, maps)
    store.run()
    compressed = write.compress(maps, store.codecs())
    shards = [
        file.read_bytes()
        for name in write.FIELDS
        for file in (tmp_path / "episode.zarr" / name / "c").rglob("*")
        if file.is_file()
    ]
    assert len(shards) == len(write.FIELDS)
    assert all(any(chunk in shard for shard in shards) for chunk in compressed)


def test_the_table_and_readmes_figures_are_made_of_the_results():
    done = run("readme_table", "--check")
    assert done.returncode == 0, done.stderr


def test_the_size_against_the_original_comes_from_the_measured_bytes(tmp_path):
    page = tmp_path / "README.md"
    page.write_text(MARKED.replace("benchmarks", "figures"))
    documents = [json.loads(file.read_text()) for file in sorted((FOLDER / "results").glob("*.json"))]
    for document in documents:
        if document["benchmark"] == "size":
            document["details"]["store bytes"]["float32"] = [280e6, 1, 1e12]
        (tmp_path / "results").mkdir(exist_ok=True)
        (tmp_path / "results" / f"{document['benchmark']}.json").write_text(json.dumps(document))
    assert rewrite(tmp_path).returncode == 0
    assert " 10 times less than the 2.8 GB " in " ".join(page.read_text().split())


def test_a_figure_whose_result_is_missing_is_named(tmp_path):
    (tmp_path / "README.md").write_text(MARKED.replace("benchmarks", "figures"))
    write_results(tmp_path / "results", result())
    done = rewrite(tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("size: has no result that begins with")
