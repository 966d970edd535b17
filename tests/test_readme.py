"""README and docs say what the code does: tables are generated, code and commands run, links lead on."""

import importlib
import importlib.util
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import matplotlib as mpl
import pytest
from typer.testing import CliRunner

from lerobot_attn import analysis
from lerobot_attn.config import AttentionConfig
from lerobot_attn.plot import KINDS
from lerobot_attn.store.schema import schema_table
from lerobot_attn.synthetic import SyntheticPlan, write_planted_episode

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# Their code blocks are run. CONTRIBUTING has none; the explorer's requests have a test of their own.
CODE = ("README.md", "store.md", "recipes.md", "places.md", "evidence.md")
WITH_CODE = [page for page in PAGES if page.name in CODE]
README = (ROOT / "README.md").read_text(encoding="utf-8")
RECORDING = (ROOT / "docs" / "recording.md").read_text(encoding="utf-8")
STORE = (ROOT / "docs" / "store.md").read_text(encoding="utf-8")
FIGURES = (ROOT / "docs" / "figures.md").read_text(encoding="utf-8")
RECIPES = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")


def name_of(page):
    return page.name


def blocks(page, language):
    """The page's code blocks of a language ("" for commands), as they are written."""
    text = page.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


# Tables


def test_schema_table_is_generated():
    table = STORE.split("<!-- schema -->")[1].split("<!-- /schema -->")[0].strip()
    assert table == schema_table(), "run benchmarks/readme_table.py"


def test_every_setting_is_explained():
    section = RECORDING.split("## Settings")[1].split("\n## ")[0]
    for name in AttentionConfig().to_dict():
        assert f"`--eval.attention.{name}`" in section or f"`{name}`" in section, name


def test_preset_sizes_are_the_presets_own():
    for preset in (ROOT / "configs" / "capture").glob("*.yaml"):
        size = re.search(r"full size: ([\d.]+ MB)", preset.read_text())[1]
        assert re.search(rf"\| `{preset.stem}` \|.*\| {re.escape(size)} \|", RECORDING), preset.stem
        if preset.stem == "summary":
            assert f"({size} an inference" in README


def test_every_kind_of_plot_is_explained():
    section = FIGURES.split("## Kinds")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `([a-z-]+)` \|", section, re.MULTILINE)
    assert rows == ["--kind", *KINDS]
    look = README.split("## Look")[1].split("\n## ")[0]
    assert [kind for kind in KINDS if f"`{kind}`" not in look] == []


def test_every_function_of_the_analysis_is_named():
    table = RECIPES.split("| function | gives |\n|---|---|\n")[1].split("\n\n")[0]
    functions = {name for name in analysis.__all__ if name[0].islower()}
    named = {name for row in table.splitlines() for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    renamed = {"rollout", "flow", "sharpness"}  # still there, deprecated
    assert functions - named <= {"to_table", "camera_geometry", "camera_names", *renamed}
    assert named - functions <= set()


# Pictures, links and names


def test_every_picture_is_there_and_small():
    pictures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", README)
    assert {Path(picture).stem for picture in pictures} >= set(KINDS)
    assert sum((ROOT / picture).stat().st_size for picture in pictures) < 3_000_000


def test_whose_maps_they_are_is_said_where_pictures_are_shown():
    for section in README.split("\n## "):
        if set(re.findall(r"!\[[^]]*\]\(docs/images/([^)]+)\)", section)) - {"token-row.svg"}:
            assert "demo policy" in section, section.splitlines()[0]


def test_the_token_row_is_drawn_by_its_script():
    spec = importlib.util.spec_from_file_location("token_row", ROOT / "scripts" / "token_row.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.FILE.read_text(encoding="utf-8") == script.drawing(), "run scripts/token_row.py"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_to_files_that_are_there(page):
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if "://" not in link:
            assert (page.parent / link).exists(), link


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_what_is_named_by_its_import_path_is_there(page):
    for path in sorted(set(re.findall(r"\blerobot_attn(?:\.\w+)+", page.read_text(encoding="utf-8")))):
        parts = path.removesuffix(".py").split(".")
        found = importlib.import_module(parts[0])
        for i, part in enumerate(parts[1:], start=2):
            try:
                found = getattr(found, part)
            except AttributeError:
                found = importlib.import_module(".".join(parts[:i]))


def test_readme_stays_readable_in_one_go():
    assert len(README.splitlines()) <= 215


# Code and commands


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with a run in `out`, of a success and a failure, in which README's labels exist."""
    folder = tmp_path_factory.mktemp("run")
    plan = SyntheticPlan(
        n_frames=16,
        n_layers=18,
        layers=(16, 17),
        vision_layers=(3,),
        n_denoise_steps=10,
        task_group="libero_object",
        objects={"soup": "target", "basket": "destination", "arm": "robot"},
    )
    write_planted_episode(folder / "out", plan)
    write_planted_episode(folder / "out", replace(plan, episode_index=1, success=False))
    return folder


@pytest.mark.parametrize("page", WITH_CODE, ids=name_of)
def test_code_blocks_run(page, run, tmp_path, monkeypatch):
    for file in run.iterdir():
        (tmp_path / file.name).symlink_to(file)
    monkeypatch.chdir(tmp_path)
    names = {}
    ran = 0
    for block in blocks(page, "python"):
        need = ("capture_attention", "record_episodes", "record_dataset", "measure_saliency")
        if any(name in block for name in need):
            continue  # needs a policy: test_own_loop.py, test_replay.py, test_saliency_asking.py
        exec(compile(block, page.name, "exec"), names)
        ran += 1
    assert ran


def commands(pages, program):
    """Every command of a program in the pages' blocks, as words, without comments."""
    for page in pages:
        for language in ("", "bash"):
            for block in blocks(page, language):
                for line in block.replace("\\\n", " ").splitlines():
                    if line.startswith(program + " "):
                        yield pytest.param(
                            shlex.split(line, comments=True)[len(program.split()) :], id=line[:60]
                        )


@pytest.mark.parametrize("words", [*commands(PAGES, "lerobot-attn")])
def test_commands_run(words, run, tmp_path, monkeypatch, request):
    from lerobot_attn.cli import app

    mpl.use("agg")
    monkeypatch.chdir(tmp_path)
    places = {
        "EPISODE": "out/attention/libero_object_0/episode_00000.zarr",
        "A": "out/attention/libero_object_0/episode_00000.zarr",
        "B": "out/attention/libero_object_0/episode_00001.zarr",
    }
    (tmp_path / "out").symlink_to(run / "out")
    if words[0] in ("pack", "unpack"):  # of which one changes what it is given
        shutil.copytree(run / "out", tmp_path / "outputs" / "eval")
    if words[:2] == ["neurons", "words"]:
        places["CHECKPOINT"] = str(request.getfixturevalue("demo_checkpoint"))
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    words = [places.get(word, word) for word in words]
    command = words[:2] if words[0] == "neurons" else words[:1]
    if (
        words[0] in ("view", "export-html", "replay", "effects", "experiment", "masks", "push", "pull")
        or command in (["neurons", "contrast"], ["neurons", "probe"])
        or "--policy.path=CHECKPOINT" in words
        or any("://" in word for word in words)
    ):
        # One serves until Ctrl-C, two need the built page: only that their options exist is tried. Others
        # need a policy, many episodes, the Hub or a server: test_replay.py, test_neuron_reports.py,
        # test_hub.py, test_remote.py.
        help_text = CliRunner().invoke(app, [*command, "--help"], env={"COLUMNS": "200"}).output
        options = [word.partition("=")[0] for word in words if word.startswith("--")]
        assert not [option for option in options if option not in help_text]
        return
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output


# The launchers' settings replace the plugins' own of the same names; scripts/eval.py mutes Hydra's warning.
@pytest.mark.filterwarnings("ignore:\\s*'hydra/launcher/:UserWarning")
@pytest.mark.parametrize("words", [*commands(PAGES, "python scripts/eval.py")])
def test_evaluations_compose(words):
    hydra = pytest.importorskip("hydra")
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from omegaconf import OmegaConf

    from lerobot_attn.plugin.launch import eval_arguments

    if words[0] == "-m":  # of a sweep the first run
        parsed = OverridesParser.create().parse_overrides(words[1:])
        words = [
            f"{one.get_key_element()}={next(one.sweep_string_iterator())}"
            if one.is_sweep_override()
            else str(one.input_line)
            for one in parsed
        ]
    with hydra.initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        config = hydra.compose("eval", ["output_dir=out", *words])
    assert "--policy.path=CHECKPOINT" in eval_arguments(OmegaConf.to_container(config, resolve=True))


@pytest.mark.parametrize("words", [*commands(PAGES, "python scripts/experiment.py")])
def test_experiments_compose(words):
    hydra = pytest.importorskip("hydra")
    from omegaconf import OmegaConf

    from lerobot_attn.plugin.experiment import ExperimentPlan

    with hydra.initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        values = OmegaConf.to_container(hydra.compose("experiment", words), resolve=True)
    assert Path(values.pop("output_dir")).parts[0] == "outputs"
    assert values.pop("dry_run") is False
    assert ExperimentPlan.from_dict(values).policy["path"] == "CHECKPOINT"


def test_every_option_of_an_evaluation_is_a_setting():
    settings = set(AttentionConfig().to_dict())
    for page in PAGES:
        named = set(re.findall(r"--eval\.attention\.(\w+)", page.read_text(encoding="utf-8")))
        assert named <= settings, page.name
