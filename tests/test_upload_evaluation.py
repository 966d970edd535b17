"""The evaluation's own videos and its eval_info.json go to the bucket when it is over, and stay here too."""

import importlib
import json
import shlex
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from servers import serving
from test_inspection import run_cli
from test_recording import evaluate, scripted_adapter  # noqa: F401
from test_upload import PLAN, TASK, URL, s3, written  # noqa: F401
from test_upload_recording import LENGTHS, envs, quick, stores_of, warnings_of  # noqa: F401

from lerobot_attn import plugin
from lerobot_attn.recording import uploading
from lerobot_attn.recording.run import RunRecorder
from lerobot_attn.store.receipts import receipt_of
from lerobot_attn.store.runs import open_run
from lerobot_attn.store.upload import upload
from lerobot_attn.synthetic import write_planted_episode

INFO = {"overall": {"pc_success": 50.0}}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """The output folder of an evaluation of two episodes."""
    folder = tmp_path_factory.mktemp("recorded") / "run"
    for number in (0, 1):
        write_planted_episode(folder, replace(PLAN, episode_index=number))
    (folder / "eval_info.json").write_text(json.dumps(INFO))
    return folder


@pytest.fixture
def run(recorded, tmp_path):
    return shutil.copytree(recorded, tmp_path / "run")


def send(path, **options):
    return [*upload(path, URL, **options)]


def there(server, below="eval"):
    """What lies in the bucket beside stores and their cameras' videos: name → content."""
    folder = server.folder / "bucket" / below
    return {
        file.relative_to(folder).as_posix(): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file() and (file.name.startswith("eval_info") or "videos" in file.parts)
    }


def films(run):
    return {
        f"videos/{TASK}/episode_0000{n}.mp4": (run / f"videos/{TASK}/eval_episode_{n}.mp4").read_bytes()
        for n in (0, 1)
    }


# upload


@pytest.mark.parametrize("form", ["run", "attention"])
def test_a_run_goes_with_them_once_and_they_stay(run, s3, form):  # noqa: F811
    path = {"run": run, "attention": run / "attention"}[form]
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    done = send(path)
    assert [one.sent for one in done] == [True] * 3
    assert done[-1].url == f"{URL}/eval_info.json"
    assert there(s3) == {**films(run), "eval_info.json": (run / "eval_info.json").read_bytes()}
    assert {file: file.read_bytes() for file in before} == before
    s3.asked.clear()
    assert [one.sent for one in send(path)] == [False] * 3
    assert [asked.method for asked in s3.asked] == ["HEAD"] * 3
    # Of the run that goes on.
    (run / "eval_info.json").write_text(json.dumps({**INFO, "more": 1}))
    assert [one.sent for one in send(path, keep_local=False)] == [False, False, True]
    assert json.loads(there(s3)["eval_info.json"])["more"] == 1
    assert len(open_run(URL)) == 2
    assert {*films(run)} < {*there(s3)}  # and here


@pytest.mark.parametrize("form", ["task", "episode"])
def test_a_part_of_a_run_is_not_the_evaluation(run, s3, form):  # noqa: F811
    store = run / "attention" / TASK / "episode_00001.zarr"
    assert send(store if form == "episode" else store.parent)[-1].sent
    wanted = films(run)
    if form == "episode":
        del wanted[f"videos/{TASK}/episode_00000.mp4"]
    assert there(s3) == wanted


def test_jobs_that_share_an_address_do_not_meet(run, s3, tmp_path):  # noqa: F811
    send(run)
    other = tmp_path / "job=2,seed=7"
    write_planted_episode(other, replace(PLAN, episode_index=2))
    (other / "eval_info.json").write_text('{"other": 1}')
    assert [one.refused for one in send(other)] == [None, None]
    found = there(s3)
    assert json.loads(found["eval_info.json"]) == INFO
    assert json.loads(found["eval_info.job=2,seed=7.json"]) == {"other": 1}
    # Though LeRobot calls both videos eval_episode_0 or 2.
    assert {name for name in found if "videos" in name} == {
        *films(run),
        f"videos/{TASK}/episode_00002.mp4",
    }
    # Each finds its own again.
    for folder, name in ((run, "eval_info.json"), (other, "eval_info.job=2,seed=7.json")):
        (folder / "eval_info.json").write_text(f'{{"again": "{name}"}}')
        assert send(folder)[-1].sent
        assert json.loads(there(s3)[name]) == {"again": name}
    # Neither name is free for a third one.
    (other / "eval_info.json.uploaded.json").unlink()
    (other / "eval_info.json").write_text('{"third": 1}')
    before = there(s3)
    refused = send(other)[-1].refused
    assert refused.startswith(f"{URL}/eval_info.job=2,seed=7.json: holds that of another evaluation")
    assert there(s3) == before
    assert send(other, overwrite=True)[-1].sent
    assert json.loads(there(s3)["eval_info.json"]) == {"again": "eval_info.json"}


def test_a_sweep_keeps_its_folders(recorded, s3, tmp_path):  # noqa: F811
    for job in ("a", "b"):
        shutil.copytree(recorded, tmp_path / "out" / job)
    (tmp_path / "out" / "eval_info.json").write_text('{"gathered": 1}')
    assert len(send(tmp_path / "out")) == 4 + 3
    found = there(s3)
    assert json.loads(found["eval_info.json"]) == {"gathered": 1}
    for job in ("a", "b"):
        assert json.loads(found[f"{job}/attention/eval_info.json"]) == INFO
        assert found[f"{job}/attention/videos/{TASK}/episode_00001.mp4"]


def test_a_video_that_came_later_goes_though_the_episode_is_gone(run, s3):  # noqa: F811
    wanted = films(run)
    shutil.move(run / "videos", run / "hidden")
    send(run, keep_local=False)
    assert {*there(s3)} == {"eval_info.json"}
    shutil.move(run / "hidden", run / "videos")
    done = send(run)
    assert [one.sent for one in done] == [True, True, False]
    assert {**there(s3)}.items() >= wanted.items()
    assert receipt_of(done[0].path).removed
    assert [one.sent for one in send(run)] == [False]


def test_no_store_leads_to_a_file_elsewhere(run, s3, tmp_path):  # noqa: F811
    secret = tmp_path / "secret.mp4"
    secret.write_bytes(b"secret")
    (run / "eval_info.json").unlink()
    (run / "eval_info.json").symlink_to(secret)
    for number in (0, 1):
        file = run / "attention" / TASK / f"episode_0000{number}.zarr" / "zarr.json"
        document = json.loads(file.read_text())
        document["attributes"]["eval_video"]["path"] = "../../../secret.mp4"
        file.write_text(json.dumps(document))
    assert [one.sent for one in send(run)] == [True, True]
    assert there(s3) == {}


def test_what_the_bucket_does_not_take_is_tried_again(run, s3):  # noqa: F811
    send(run / "attention" / TASK / "episode_00000.zarr")
    send(run / "attention" / TASK / "episode_00001.zarr")
    s3.n_failing = 4  # a request is tried three times
    assert send(run)[-1].sent
    assert "eval_info.json" in there(s3)


def test_the_command_says_so(run, s3, monkeypatch, capsys):  # noqa: F811
    status, output, _ = run_cli(monkeypatch, capsys, "upload", run, URL)
    assert status == 0
    assert output.splitlines()[-1].startswith(f"{URL}/eval_info.json: ")


# An evaluation


def ended(run, **settings):
    """Evaluate, and do what LeRobot and the plugin do behind it."""
    info, recorder = evaluate(run, envs(), **settings)
    (run / "eval_info.json").write_text(json.dumps(INFO))
    return info, recorder


@pytest.mark.parametrize("keep_local", [True, False])
def test_when_an_evaluation_is_over_the_rest_goes(tmp_path, s3, keep_local):  # noqa: F811
    run = tmp_path / "run"
    info, recorder = ended(run, upload=URL, keep_local=keep_local)
    assert there(s3) == {}
    recorder.upload_evaluation(run)
    found = there(s3)
    assert json.loads(found.pop("eval_info.json")) == INFO
    assert found == {
        f"videos/group_0/episode_0000{n}.mp4": Path(path).read_bytes()
        for n, path in enumerate(info["overall"]["video_paths"])
    }
    assert len(found) == len(LENGTHS)
    before = len(written(s3))
    recorder.upload_evaluation(run)
    assert len(written(s3)) == before
    assert receipt_of(stores_of(run)[0]).removed == (not keep_local)


def test_it_is_said_what_went_and_what_did_not(tmp_path, s3, monkeypatch, caplog):  # noqa: F811
    caplog.set_level("INFO")
    run = tmp_path / "run"
    _, recorder = ended(run, upload=URL)
    with monkeypatch.context() as patched:
        patched.setattr(uploading, "PATIENCE_S", 0.05)
        s3.gate.clear()
        recorder.upload_evaluation(run)
        s3.gate.set()
    line = warnings_of(caplog)[-1]
    assert line.startswith(f"4 of 4 files of the evaluation were not uploaded to {URL} and stay in {run}/")
    command = shlex.split(line.rpartition("to send them: ")[2])
    caplog.clear()
    assert run_of(command, monkeypatch) == 0
    assert len(there(s3)) == 4
    shutil.rmtree(s3.folder / "bucket" / "eval" / "videos")
    for store in stores_of(run):
        store.with_name(f"{store.stem}.uploaded.json").unlink()
    recorder.upload_evaluation(run)  # of episodes of which nobody knows that they are there, nothing goes
    assert {*there(s3)} == {"eval_info.json"}


def run_of(command, monkeypatch):
    from lerobot_attn import cli

    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code


def test_where_episodes_could_not_go_nothing_more_is_tried(tmp_path, s3, monkeypatch, caplog):  # noqa: F811
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    run = tmp_path / "run"
    _, recorder = ended(run, upload=URL)
    n_said = len(warnings_of(caplog))
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.url)
    recorder.upload_evaluation(run)
    assert len(warnings_of(caplog)) == n_said
    assert not written(s3)
    send(run / "attention")
    assert len(there(s3)) == len(LENGTHS) + 1


def test_without_upload_nothing_is_asked(tmp_path):
    run = tmp_path / "run"
    with serving(tmp_path) as server:
        _, recorder = ended(run)
        recorder.upload_evaluation(run)
    assert not server.asked


def test_it_goes_once_lerobot_has_written_its_summary(tmp_path, monkeypatch, demo_checkpoint):
    spec = importlib.util.find_spec(plugin.EVAL_MODULE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    seen = []

    def eval_main(cfg):
        Path(cfg.output_dir, "eval_info.json").write_text("{}")

    module.eval_main = eval_main
    plugin.install(vars(module))
    monkeypatch.setattr(
        RunRecorder,
        "upload_evaluation",
        lambda run, output: seen.append((output, (output / "eval_info.json").exists())),
    )
    arguments = ["--env.type=libero", "--env.task=libero_object", f"--output_dir={tmp_path}"]
    arguments += ["--eval.save_attention_maps=true", f"--policy.path={demo_checkpoint}"]
    monkeypatch.setattr(sys, "argv", ["lerobot-eval", *arguments])
    module.eval_main()
    assert seen == [(tmp_path, True)]
