"""Interventions wherever a policy runs: LeRobot's evaluation and rollout, replays, and one's own loop."""

from __future__ import annotations

import contextlib
import functools
import json

import gymnasium as gym
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("lerobot")

import recorded  # noqa: E402
import scripted  # noqa: E402
from evaluation import evaluate_all  # noqa: E402
from lerobot.rollout.strategies import episodic  # noqa: E402
from recorded import write_dataset  # noqa: E402
from robots import Scripted  # noqa: E402
from test_plugin import ENV, error_of, run_main  # noqa: E402, F401
from test_record_episodes import batch_of, observation_of  # noqa: E402
from test_recording import make_policy, scripted_adapter  # noqa: E402, F401
from test_robots import Conductor, Keys, rollout  # noqa: E402, F401
from test_segmentation import make_envs as masked_envs  # noqa: E402
from test_segmentation import mask_at, turning  # noqa: E402

from lerobot_attn import AttentionConfig, open_run, record_dataset, record_episodes  # noqa: E402
from lerobot_attn.errors import ConfigError, StoreError  # noqa: E402
from lerobot_attn.interventions import Condition, FixedNoise, Task, intervene  # noqa: E402
from lerobot_attn.plugin.acting import Acting, acting_in, read_condition  # noqa: E402
from lerobot_attn.recording.conditions import said_of  # noqa: E402
from lerobot_attn.recording.run import RunRecorder  # noqa: E402
from lerobot_attn.store.video import read_frames  # noqa: E402

BASELINE = Condition("baseline")
NOISE = Condition("noise", (FixedNoise(3),))
MILK = Condition("milk", (Task(text="pick up the milk"), FixedNoise(3)))
SHUFFLED = Condition("shuffled", (Task(shuffle=True),))
SMALL = {"layers": [-1], "mean_layers": "none", "cameras": False}


class NoisyPolicy(scripted.ScriptedPolicy):
    """Does what its noise says; draws some where it is given none."""

    def __init__(self, config):
        super().__init__(config)
        self.told = []

    def predict_action_chunk(self, batch, noise=None):
        actions = super().predict_action_chunk(batch)
        self.told.append(batch.get("task"))
        return torch.randn(actions.shape) if noise is None else noise


def noisy(n_action_steps=5):
    policy = NoisyPolicy(scripted.make_config(n_action_steps=n_action_steps))
    policy.config.tokenizer_max_length = 48  # as of a policy that is given an instruction
    return policy


def evaluate(
    folder,
    envs,
    condition=None,
    *,
    policy=None,
    n_episodes=None,
    record=True,
    env_preprocessor=lambda value: value,
    **settings,
):
    """Run LeRobot's `eval_policy_all` as the plugin does; return its summary and the policy."""
    policy = policy or noisy()
    how = {"env_preprocessor": env_preprocessor}
    how |= {} if n_episodes is None else {"n_episodes": n_episodes}
    torch.manual_seed(0)
    acting = None if condition is None else Acting(condition)
    run = None
    if record:
        attributes = {"policy": {"dtype": "float32"}, **said_of(condition)}
        run = RunRecorder(AttentionConfig(**{**SMALL, **settings}), folder / "attention", attributes)
    wraps = [] if acting is None else [lambda namespace: acting_in(namespace, acting)]
    return evaluate_all(envs, policy, run, acting=acting, wraps=wraps, **how), policy


def actions_of(folder):
    return [episode.arrays["action"].values for episode in open_run(folder)]


# An evaluation


def test_a_condition_without_interventions_changes_no_bit(tmp_path):
    lengths, states = (7, 12), []
    for name, condition in (("without", None), ("with", BASELINE)):
        evaluate(tmp_path / name, {0: scripted.make_envs(lengths)}, condition, policy=make_policy())
        states.append(torch.get_rng_state())
    assert torch.equal(*states)
    for without, acted in zip(actions_of(tmp_path / "without"), actions_of(tmp_path / "with"), strict=True):
        np.testing.assert_array_equal(without, acted)
    without, acted = (next(iter(open_run(tmp_path / name))) for name in ("without", "with"))
    assert "condition" not in without.attributes
    assert acted.attributes["condition"] == {
        "name": "baseline",
        "text": "baseline: no intervention",
        "interventions": [],
    }
    assert without.condition == acted.condition


def test_an_episodes_noise_depends_neither_on_the_batch_nor_on_the_condition(tmp_path):
    """Three episodes in batches of two: the last batch has one that nobody counts."""
    found = {}
    kinds = (("one", 1, NOISE), ("two", 2, NOISE), ("milk", 2, MILK), ("free", 2, None))
    for name, n_envs, condition in kinds:
        envs = {task: scripted.make_envs((8,) * n_envs) for task in ((0, 4) if name == "two" else (0,))}
        evaluate(tmp_path / name, envs, condition, n_episodes=3)
        found[name] = actions_of(tmp_path / name)
    for one, two, milk, free in zip(*(actions[:3] for actions in found.values()), strict=True):
        np.testing.assert_array_equal(one, two)
        np.testing.assert_array_equal(one, milk)
        assert (one != free).all()
    np.testing.assert_array_equal(found["two"][3:], found["two"][:3])  # of an episode's number, in every task
    assert len(np.unique(np.concatenate(found["one"]), axis=0)) == 3 * 8  # another one in each inference


def test_the_policy_is_told_another_task_and_the_store_says_both(tmp_path):
    """Each environment's words are shuffled by its episode's number, the surplus one's too."""
    _, policy = evaluate(tmp_path, {2: scripted.make_envs((4, 4))}, SHUFFLED, n_episodes=3)
    (shuffle,) = SHUFFLED.interventions
    told = [shuffle.applied("do as told", episode) for episode in range(4)]
    assert "do as told" not in told
    assert policy.told == [told[:2], told[2:]]
    for index, episode in enumerate(open_run(tmp_path)):
        assert episode.task == told[index]
        assert episode.attributes["environment_task"] == "do as told"
        assert episode.condition.text == "shuffled: words of the instruction shuffled (seed 0)"
        assert list(episode.condition.interventions) == SHUFFLED.to_dict()["interventions"]


def test_words_that_are_not_in_the_task_end_the_run_in_one_line(tmp_path):
    condition = Condition("swap", (Task(replace={"soup": "milk"}),))
    with pytest.raises(ConfigError, match="'soup' is not in the task, expected words of 'do as told'"):
        evaluate(tmp_path, {0: scripted.make_envs((4,))}, condition)


def test_it_acts_where_nothing_is_recorded(tmp_path):
    _, policy = evaluate(tmp_path, {0: scripted.make_envs((4,))}, MILK, record=False)
    assert policy.told == [["pick up the milk"]]
    assert "select_action" not in vars(policy)
    assert "predict_action_chunk" not in vars(policy)
    assert list(tmp_path.iterdir()) == []


def test_a_run_goes_on_in_its_own_condition_alone(tmp_path):
    evaluate(tmp_path, {0: scripted.make_envs((4,))}, MILK)
    evaluate(tmp_path, {0: scripted.make_envs((4,))}, MILK, existing="skip")
    other = Condition("milk", (Task(text="pick up the soup"), FixedNoise(3)))
    refused = ((NOISE, "'milk', this run's is 'noise'"), (None, "is 'baseline'"), (other, "soup"))
    for condition, said in refused:
        with pytest.raises(StoreError, match=f"was recorded with condition .*{said}"):
            evaluate(tmp_path, {0: scripted.make_envs((4,))}, condition, existing="skip")


def test_an_untouched_run_goes_on_as_the_baseline(tmp_path):
    evaluate(tmp_path, {0: scripted.make_envs((4,))})
    evaluate(tmp_path, {0: scripted.make_envs((4,))}, BASELINE, existing="skip")


def test_an_experiment_is_passed_through(tmp_path):
    experiment = {"name": "prompt_swap", "condition": "noise", "control_of": "milk"}
    condition = Condition.from_dict({**NOISE.to_dict(), "experiment": experiment})
    evaluate(tmp_path, {0: scripted.make_envs((4,))}, condition)
    (episode,) = open_run(tmp_path)
    assert episode.attributes["experiment"] == experiment
    assert set(episode.attributes["condition"]) == {"name", "text", "interventions"}


@pytest.mark.parametrize("option", ["{file}", "{inline}"])
def test_lerobot_sees_its_own_config_and_the_condition_is_read_before_any_environment(
    run_main,  # noqa: F811
    tmp_path,
    option,
):
    file = tmp_path / "milk.yaml"
    file.write_text(json.dumps(MILK.to_dict()))
    value = option.format(file=file, inline=json.dumps(MILK.to_dict()))
    arguments = [*ENV, f"--output_dir={tmp_path / 'out'}"]
    assert run_main(*arguments, f"--eval.interventions={value}") == run_main(*arguments, install=False)
    assert run_main(*arguments, "--eval.interventions", value) == run_main(*arguments, install=False)
    assert not (tmp_path / "out").exists()
    assert read_condition(value, "--eval.interventions") == MILK


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--eval.interventions=none.yaml"], "error: none.yaml: "),
        (["--eval.interventions={name: a, interventions: [{kind: paint}]}"], "error: --eval.interventions: "),
        (["--eval.interventions={name: a"], "error: --eval.interventions: got '{name: a', expected a YAML"),
        (["--eval.interventions={name: a}", "--env.max_parallel_tasks=2"], "error: env.max_parallel_tasks:"),
        (
            [
                "--eval.interventions={name: a, interventions: [{kind: fixed_noise}]}",
                "--policy.compile_model=true",
            ],
            "error: --eval.interventions: got a with policy.compile_model=true, expected false",
        ),
        (["--eval.interventions={name: a b}"], "error: --eval.interventions: name: got 'a b'"),
    ],
)
def test_what_cannot_be_done_is_one_line_before_any_environment(
    run_main,  # noqa: F811
    capsys,
    tmp_path,
    arguments,
    message,
):
    error = error_of(run_main, capsys, *ENV, f"--output_dir={tmp_path / 'out'}", *arguments)
    assert error.startswith(message)
    assert "\n" not in error.strip()


PAINTED = Condition.from_dict(
    {
        "name": "painted",
        "interventions": [{"kind": "occlude", "where": {"camera": "image", "box": [0, 0, 0.5, 0.5]}}],
    }
)


def lit_picture():
    """A bright square in the upper left quarter; `PAINTED` takes the mean colour of the rest, 40."""
    image = np.full((32, 32, 3), 40, np.uint8)
    image[:16, :16] = 200
    return image


def corners_of(episode):
    """How bright that quarter is in each frame of the camera's video."""
    return [frame[4:12, 4:12].mean() for frame in read_frames(episode.video(scripted.CAMERA))]


class Lit(scripted.ScriptedEnv):
    def _observation(self):
        return super()._observation() | {"pixels": {"image": lit_picture()}}


def test_a_video_shows_what_an_inference_saw(tmp_path):
    """What is painted over is so at the frames at which the policy was asked, in each environment's video."""
    lit = gym.vector.SyncVectorEnv(
        [lambda: Lit(7, False, 1000, size=32)] * 2, autoreset_mode=gym.vector.AutoresetMode.NEXT_STEP
    )
    evaluate(tmp_path, {0: lit}, PAINTED, policy=noisy(3), cameras=True)
    for episode in open_run(tmp_path):
        np.testing.assert_allclose(corners_of(episode), [40, 200, 200] * 2 + [40], atol=6)


BLOCKED = Condition.from_dict(
    {
        "name": "painted_target",
        "interventions": [{"kind": "occlude", "where": {"role": "target"}}, {"kind": "fixed_noise"}],
    }
)


@pytest.mark.parametrize("recorded", [True, False])
def test_the_simulator_says_where_a_role_is(tmp_path, recorded):
    """Each environment's target is painted over where it is now; masks are drawn once an inference."""
    seen = []

    class Watching(NoisyPolicy):
        def predict_action_chunk(self, batch, noise=None):
            seen.append(batch[scripted.CAMERA].clone())
            return super().predict_action_chunk(batch, noise)

    policy = Watching(scripted.make_config(n_action_steps=3))
    envs = masked_envs((7, 7))
    settings = {"record": recorded, "segmentation": recorded, "env_preprocessor": turning}
    evaluate(tmp_path, {0: envs}, BLOCKED, policy=policy, **settings)
    assert [env.asked for env in envs.envs] == [[0, 3, 6]] * 2
    for batch, frame in zip(seen, (0, 3, 6), strict=True):
        for env in (0, 1):
            target = mask_at(env, frame)[::-1, ::-1] == 1
            shown = batch[env].numpy()
            assert np.ptp(shown[:, target], axis=1).max() < 1e-6  # one colour
            assert np.ptp(shown[:, ~target], axis=1).min() > 0.1
    if recorded:
        (first, _) = open_run(tmp_path)
        assert first.condition.name == "painted_target"
        assert (first.arrays["segmentation"].values[1, 0] == mask_at(0, 3)[::-1, ::-1]).all()


def test_an_environment_of_lerobots_without_masks_is_refused_before_it_is_built(
    run_main,  # noqa: F811
    capsys,
    tmp_path,
):
    condition = f"--eval.interventions={json.dumps(BLOCKED.to_dict())}"
    error = error_of(run_main, capsys, "--env.type=pusht", f"--output_dir={tmp_path / 'out'}", condition)
    assert "env.type=pusht" in error
    assert "expected an environment that simulates with MuJoCo" in error
    assert "\n" not in error.strip()


def test_environments_without_masks_end_the_run_before_the_first_action(tmp_path):
    policy = noisy()
    with pytest.raises(
        ConfigError, match=r"masks: what is evaluated has none .*, expected .* MuJoCo, or whose class"
    ):
        evaluate(tmp_path, {0: scripted.make_envs((4,))}, BLOCKED, policy=policy, record=False)
    assert not policy.told


# A robot


@pytest.mark.parametrize("recorded", [True, False])
def test_a_robots_policy_is_told_another_task(rollout, tmp_path, recorded):  # noqa: F811
    file = tmp_path / "milk.yaml"
    file.write_text(json.dumps(MILK.to_dict()))
    options = (f"--interventions={file}", "--robot.breaks_at=9")
    robot = rollout(*options, recorded=recorded, raises=ConnectionError)
    if not recorded:
        bare = rollout("--robot.breaks_at=9", recorded=False, raises=ConnectionError)
        assert len(robot.sent) == len(bare.sent)
        assert robot.sent != bare.sent
        assert not rollout.stores.exists()
        return
    (episode,) = open_run(rollout.stores)
    assert prompt_of(episode) == ["pick", "up", "the", "milk"]
    assert episode.task == "pick up the milk"
    assert episode.attributes["environment_task"] == "pick up the soup"
    assert episode.condition.name == "milk"


def prompt_of(episode):
    data = episode.arrays
    return "".join(data["token_text"].values[0][data["text_word"].values[0] >= 0]).split()


def test_real_time_chunking_is_told_another_task_too(rollout, monkeypatch):  # noqa: F811
    Conductor(monkeypatch, 3)
    shuffled = json.dumps({"name": "shuffled", "interventions": [{"kind": "task", "shuffle": True}]})
    options = ("--robot.breaks_at=12", "--inference.type=rtc", f"--interventions={shuffled}")
    rollout(*options, raises=ConnectionError)
    (episode,) = open_run(rollout.stores)
    assert prompt_of(episode) == SHUFFLED.interventions[0].applied("pick up the soup", 0).split()
    assert episode.task.split() == prompt_of(episode) != ["pick", "up", "the", "soup"]


def test_each_of_a_robots_episodes_begins_with_its_number(rollout, monkeypatch):  # noqa: F811
    events = {"exit_early": False, "rerecord_episode": False, "stop_recording": False}
    monkeypatch.setattr(episodic, "init_keyboard_listener", lambda: (None, events))
    ends = functools.partial(events.update, exit_early=True)
    again = functools.partial(events.update, exit_early=True, rerecord_episode=True)
    Keys(monkeypatch, {5: ends, 7: ends, 11: again, 13: ends, 17: ends})
    begun, begin = [], Acting.begin_episodes
    monkeypatch.setattr(
        Acting, "begin_episodes", lambda acting, numbers: begun.append(numbers) or begin(acting, numbers)
    )
    rollout(
        "--dataset.num_episodes=2", "--dataset.episode_time_s=60", "--dataset.reset_time_s=60",
        "--strategy.reset_to_initial_position=false", f"--interventions={json.dumps(SHUFFLED.to_dict())}",
        strategy="episodic",
    )  # fmt: skip
    # The engine starts; the first episode; the second one, which is recorded again.
    assert begun == [[0], [0], [1], [1]]
    told = [SHUFFLED.interventions[0].applied("pick up the soup", number) for number in (0, 1)]
    assert [episode.task for episode in open_run(rollout.stores)] == told
    assert [prompt_of(episode) for episode in open_run(rollout.stores)] == [task.split() for task in told]


def test_robots_have_no_masks_and_compiled_policies_are_left_alone(rollout, capsys):  # noqa: F811
    blocked = "{name: a, interventions: [{kind: block_attention, keys: {role: target}}]}"
    noise = "{name: a, interventions: [{kind: fixed_noise}]}"
    for option, expected in (
        ([f"--interventions={blocked}"], "condition a: needs masks"),
        ([f"--interventions={noise}", "--use_torch_compile=true"], "a compiled policy cannot be acted on"),
    ):
        with pytest.raises(SystemExit) as caught:
            rollout(*option)
        assert expected in str(caught.value.code)
        assert "\n" not in str(caught.value.code)
    assert not Scripted.made


# A recorded data set


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A data set for the scripted policy: two episodes of 7 frames."""
    root = tmp_path_factory.mktemp("data") / "small"
    return write_dataset(root, (7, 7), cameras=(scripted.CAMERA,), dims=(3, 4), size=8)


def test_a_replay_tells_another_task_and_keeps_its_noise(small, tmp_path):
    chunks = {}
    for name, condition, seed in (("plain", None, 3), ("milk", MILK, 0), ("baseline", BASELINE, 0)):
        policy = noisy()
        done = record_dataset(
            policy, small, tmp_path / name, AttentionConfig(**SMALL), seed=seed, interventions=condition
        )
        assert all(result.reason is None for result in done)
        run = list(open_run(tmp_path / name))
        chunks[name] = [episode.arrays["action_chunk"].values for episode in run]
        assert {episode.condition.name for episode in run} == {"milk" if name == "milk" else "baseline"}
        told = {task for tasks in policy.told for task in tasks}
        assert {episode.task for episode in run} == told
        assert (told == {"pick up the milk"}) == (name == "milk")
    np.testing.assert_array_equal(chunks["plain"], chunks["milk"])  # both of seed 3
    assert not np.array_equal(chunks["plain"], chunks["baseline"])
    assert all("environment_task" not in e.attributes for e in open_run(tmp_path / "plain"))
    assert all(e.attributes["environment_task"] for e in open_run(tmp_path / "milk"))


def test_a_replay_has_no_masks(small, tmp_path):
    blocked = Condition.from_dict(
        {"name": "a", "interventions": [{"kind": "occlude", "where": {"role": "target"}}]}
    )
    with pytest.raises(ConfigError, match=r"needs masks \(role: …\), and a replay has none"):
        record_dataset(noisy(), small, tmp_path, AttentionConfig(**SMALL), interventions=blocked)
    assert not list(tmp_path.rglob("*.zarr"))


def test_a_replays_video_shows_what_an_inference_saw(tmp_path, monkeypatch):
    monkeypatch.setattr(recorded, "picture", lambda *args: lit_picture())
    root = tmp_path / "lit"
    data = write_dataset(root, (7,), cameras=(scripted.CAMERA,), dims=(3, 4), size=32)
    config = AttentionConfig(**{**SMALL, "cameras": True})
    record_dataset(noisy(), data, tmp_path / "out", config, every=3, batch_size=2, interventions=PAINTED)
    (episode,) = open_run(tmp_path / "out")
    np.testing.assert_allclose(corners_of(episode), [40, 200, 200] * 2 + [40], atol=6)


# One's own loop


def run_episode(policy, episode):
    policy.reset()
    for frame in range(7):
        action = policy.select_action({**batch_of(frame), "task": [episode.task]})
        episode.step(observation_of(frame), action)


@pytest.mark.parametrize("entered", ["by the recording", "around it", "around it, and given"])
def test_a_loop_is_told_what_to_say_and_each_episode_has_its_noise(tmp_path, entered):
    policy = noisy()
    with contextlib.ExitStack() as stack:
        acting = MILK if entered == "by the recording" else stack.enter_context(intervene(policy, MILK))
        acting = None if entered == "around it" else acting
        recording = stack.enter_context(
            record_episodes(policy, tmp_path, AttentionConfig(**SMALL), fps=20, interventions=acting)
        )
        for index in (4, 2):
            with recording.episode(task="pick up the soup", index=index) as episode:
                assert episode.task == "pick up the milk"
                run_episode(policy, episode)
    second, fourth = open_run(tmp_path)
    assert (second.condition.name, second.task) == ("milk", "pick up the milk")
    assert second.attributes["environment_task"] == "pick up the soup"
    assert not np.array_equal(second.arrays["action"].values, fourth.arrays["action"].values)
    with (
        record_episodes(
            noisy(), tmp_path / "again", AttentionConfig(**SMALL), fps=20, interventions=MILK
        ) as again,
        again.episode(task="pick up the soup", index=2) as episode,
    ):
        run_episode(again._policy, episode)
    (same,) = open_run(tmp_path / "again")
    np.testing.assert_array_equal(same.arrays["action"].values, second.arrays["action"].values)


def test_two_conditions_at_once_are_refused_for_a_store_says_one(tmp_path):
    policy = noisy()
    for given in (None, MILK):
        with (
            intervene(policy, NOISE),
            intervene(policy, MILK) if given is None else contextlib.nullcontext(),
            pytest.raises(ConfigError, match=r"noise.* already acts on the policy, exp"),
            record_episodes(policy, tmp_path, AttentionConfig(**SMALL), fps=20, interventions=given),
        ):
            pass
    with record_episodes(policy, tmp_path, AttentionConfig(**SMALL), fps=20) as recording:
        assert "condition" not in recording._attributes
