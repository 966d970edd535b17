"""The commands of neurons: what they write and say, and that bad input costs one line and writes nothing."""

import sys
from dataclasses import replace

import pandas as pd
import pytest
from test_inspection import run_cli

from lerobot_attn import open_run
from lerobot_attn.analysis.neurons import units_of
from lerobot_attn.report.contrast import ContrastSettings, find_contrast, sentences
from lerobot_attn.synthetic import SyntheticPlan, write_planted_episode
from lerobot_attn.synthetic.activations import planted_unit

try:
    import sklearn
except ImportError:
    sklearn = None

needs_sklearn = pytest.mark.skipif(
    sklearn is None, reason="scikit-learn is not installed: lerobot_policy_attn[dev]"
)

# One unit of each layer rises through every episode; the others are noise.
PLAN = SyntheticPlan(
    n_frames=16,
    n_executed=2,
    image_px={"observation.images.image": (32, 32)},
    n_empty_cameras=0,
    grid=(2, 2),
    n_heads=1,
    neurons={"vlm": (0, 3), "expert": (1,)},
    residuals={"vlm": (3,)},
    n_units=8,
    layers=(),
    has_means=False,
    videos=False,
)
RISING = {
    "vlm": {layer: [planted_unit(PLAN, "vlm_neurons", layer)] for layer in (0, 3)},
    "expert": {1: [planted_unit(PLAN, "expert_neurons", 1)]},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs of eight and four episodes, every second of which succeeds."""
    folder = tmp_path_factory.mktemp("neurons")
    for name, n in (("a", 8), ("b", 4)):
        for index in range(n):
            plan = replace(PLAN, episode_index=index, seed=100 * n + index, success=index % 2 == 0)
            write_planted_episode(folder / name, plan)
    write_planted_episode(folder / "bare", SyntheticPlan(n_frames=6, videos=False))
    return folder


def test_contrast_writes_a_found_set_a_figure_and_a_page(runs, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    status, said, err = run_cli(
        monkeypatch, capsys, "neurons", "contrast", runs / "a", "--by", "time>0.5", "-o", out
    )
    assert status == 0, err
    assert {path.name for path in out.iterdir()} == {
        *("contrast.csv", "contrast.png", "report.md", "report.html")
    }
    table = pd.read_csv(out / "contrast.csv")
    shown = table[table.p_corrected <= 0.05]
    rising = {(s, layer, units[0]) for s, layers in RISING.items() for layer, units in layers.items()}
    assert set(zip(shown.stream, shown.layer, shown.unit, strict=True)) == rising
    assert (shown.auc == 1).all()
    found = units_of(out / "contrast.csv", top=3)
    assert {s: {k: sorted(u) for k, u in layers.items()} for s, layers in found.items()} == RISING
    assert f"{len(shown)} of {len(table)} tried" in said
    assert "none is shown to follow the label rather than the time course that all episodes share" in said
    assert said.splitlines()[0] in (out / "report.md").read_text()
    assert "Wrote" in said


def test_contrast_can_say_no_and_knows_two_runs(runs, tmp_path, monkeypatch, capsys):
    status, said, err = run_cli(
        monkeypatch, capsys, "neurons", "contrast", runs / "a", "--by", "success", "-o", tmp_path / "out"
    )
    assert status == 0, err
    assert said.startswith("No: none of ")
    found = find_contrast(
        open_run(runs / "a"), open_run(runs / "b"), None, ContrastSettings(stream="vlm", layers=(3,))
    )
    assert found.names == ("a", "b")
    assert (found.contrast.n_first, found.contrast.n_second) == (8, 4)
    assert set(found.contrast.table.layer) == {3}
    assert sentences(found)[0].startswith("No: none of ")
    residual = find_contrast(
        open_run(runs / "a"), None, "time>0.5", ContrastSettings(residuals=True, during="time<0.9")
    )
    best = residual.contrast.table.iloc[0]
    assert (best.layer, best.unit, best.auc) == (3, planted_unit(PLAN, "vlm_residual", 3), 1)


@needs_sklearn
def test_probe_reads_what_is_there_and_can_say_no(runs, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    table = tmp_path / "weights.csv"
    pd.DataFrame({"episode": range(8), "weight": [3.0, 1, 4, 1, 5, 9, 2, 6]}).to_csv(table, index=False)
    options = ("--stream", "vlm", "--layers", "3", "--group", "task")
    status, said, err = run_cli(
        monkeypatch, capsys, "neurons", "probe", runs / "a", "--what", "time", *options, "-o", out
    )
    assert status == 0, err
    assert {path.name for path in out.iterdir()} == {*("probe.csv", "probe.png", "report.md", "report.html")}
    found = pd.read_csv(out / "probe.csv")
    assert set(found.kind) == {"time", "neurons", "residual"}
    # Every episode rises alike, so shuffled values are read as well: this is no more than the time.
    assert (found.score > 0.9).all()
    assert said.startswith("No: time is not shown to be readable")
    status, said, err = run_cli(
        *(monkeypatch, capsys, "neurons", "probe", runs / "a", "--what", f"{table}:weight", *options),
        *("-o", tmp_path / "other"),
    )
    assert status == 0, err
    assert said.startswith("No: ")
    assert "R²" in said


def test_commands_take_a_part_of_a_run(runs, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    few = ("--stream", "vlm", "--layers", "3", "-o", out)
    sides = ("neurons", "contrast", runs / "a", runs / "b")
    status, said, err = run_cli(monkeypatch, capsys, *sides, "--success", "--condition", "baseline", *few)
    # Of both sides, those that succeeded.
    assert (status, said) == (1, "")
    assert "the label holds of 4 episodes and not of 2" in err
    status, _, err = run_cli(monkeypatch, capsys, *sides, "--task", "fly", *few)
    assert status == 1
    assert "no episode of task 'fly'; of its 8 episodes there are tasks" in err
    assert not out.exists()


@needs_sklearn
def test_a_probe_takes_a_part_of_a_run(runs, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    options = ("--stream", "vlm", "--layers", "3", "--kind", "neurons", "-o", out)
    probe = ("neurons", "probe", runs / "a", "--what", "time", "--fit", "regression")
    status, _, err = run_cli(monkeypatch, capsys, *probe, "--failure", *options)
    assert status == 0, err
    assert pd.read_csv(out / "probe.csv").n_episodes.unique().tolist() == [4]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("contrast", "bare", "--by", "time>0.5"), "record with --eval.attention.neurons="),
        (("contrast", "bare", "--by", "time>0.5", "--residuals"), "record with --eval.attention.residuals="),
        (("contrast", "a"), "got neither B nor --by"),
        (("contrast", "a", "b", "--by", "success"), "got both B and --by success"),
        (("contrast", "a", "--by", "eef_q>median"), "'eef_q': the episode has none of this name; it has "),
        (("contrast", "a", "--by", "time>2"), "one group is empty"),
        (("contrast", "b", "--by", "success"), "expected 4 or more of each"),
        (("contrast", "a", "--by", "task=fly"), "no inference has task 'fly'"),
        (("contrast", "a", "--by", "time>0.5", "--layers", "2"), "layer 2 was not recorded"),
        (("contrast", "a", "--by", "time>0.5", "--group", "hand"), "token group 'hand' was not recorded"),
        (("contrast", "a", "--by", "time>0.5", "--denoise-step", "9"), "denoise step 9 was not recorded"),
        (("contrast", "a", "--by", "time>0.5", "--reduction", "sum"), "expected one of mean, max"),
        (("contrast", "a", "--by", "none.csv:grip>1"), "cannot read the table"),
        pytest.param(
            ("probe", "bare", "--what", "time"), "holds no neurons and no residual", marks=needs_sklearn
        ),
        pytest.param(("probe", "a", "--what", "eef_q"), "none of this name", marks=needs_sklearn),
        pytest.param(("probe", "a", "--what", "task"), "the same at every inference", marks=needs_sklearn),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(
    runs, tmp_path, monkeypatch, capsys, arguments, message
):
    monkeypatch.chdir(runs)
    out = tmp_path / "out"
    status, said, err = run_cli(monkeypatch, capsys, "neurons", *arguments, "-o", out)
    assert status == 1
    assert said == ""
    assert message in err
    assert len(err.strip().splitlines()) == 1
    assert not out.exists()


def test_without_scikit_learn_a_probe_says_what_to_install(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "sklearn", None)  # as if it were not installed
    out = tmp_path / "out"
    status, _, err = run_cli(monkeypatch, capsys, "neurons", "probe", runs / "a", "--what", "time", "-o", out)
    assert status == 1
    assert "lerobot_policy_attn[neurons]" in err
    assert not out.exists()
