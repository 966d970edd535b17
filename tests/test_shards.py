"""A part of a task's episodes, in a job of its own: the same episodes as those of one job for all."""

import gymnasium as gym
import numpy as np
import pytest
import scripted
from evaluation import evaluate_all
from lerobot.utils.random_utils import set_seed
from test_recording import make_policy, scripted_adapter  # noqa: F401

from lerobot_attn.config import AttentionConfig
from lerobot_attn.errors import ConfigError
from lerobot_attn.plugin.acting import Acting
from lerobot_attn.plugin.shards import beginning_at, check_first_episode
from lerobot_attn.recording.run import RunRecorder
from lerobot_attn.store.reader import open_run


class NumberedEnv(scripted.ScriptedEnv):
    """Counts its initial states as LiberoEnv does; the state that the policy gets is the initial one's."""

    def __init__(self, number, n_envs):
        super().__init__(length=3, success=False, max_steps=10)
        self.init_state_id, self._stride, self._own = number, n_envs, None

    def reset(self, **options):
        self._own, self.init_state_id = self.init_state_id, self.init_state_id + self._stride
        return super().reset(**options)

    def _observation(self):
        return {**super()._observation(), "agent_pos": np.array([self._own or 0, 0.0])}


class Lazy:
    """As LeRobot's lazy vector of environments: it cannot set attributes itself."""

    def __init__(self, env):
        self._env = env

    def __getattr__(self, name):
        if name == "set_attr":
            raise AttributeError(name)
        return getattr(self._env, name)

    @property
    def unwrapped(self):
        return self


def evaluate_part(folder, first, n_episodes, lazy=False, n_envs=2):
    """Evaluate episodes from `first` on; return what LeRobot says of them."""
    makers = [lambda number=number: NumberedEnv(number, n_envs) for number in range(n_envs)]
    env = gym.vector.SyncVectorEnv(makers, autoreset_mode=gym.vector.AutoresetMode.NEXT_STEP)
    run = RunRecorder(AttentionConfig(), folder / "attention", {"policy": {"dtype": "float32"}})
    set_seed(1000)
    return evaluate_all(
        {3: Lazy(env) if lazy else env},
        make_policy(),
        run,
        first_episode=first,
        wraps=[lambda namespace: beginning_at(namespace, first)],
        n_episodes=n_episodes,
        max_episodes_rendered=1,
        videos_dir=folder / "videos",
    )


@pytest.mark.parametrize("lazy", [False, True])
def test_a_part_has_the_numbers_seeds_and_initial_states_of_the_whole(tmp_path, lazy):
    info = evaluate_part(tmp_path, 4, 3, lazy)
    episodes = list(open_run(tmp_path))
    assert [episode.path.name for episode in episodes] == [f"episode_0000{i}.zarr" for i in (4, 5, 6)]
    said = [(e.attributes["episode_index"], e.attributes["seed"]) for e in episodes]
    assert said == [(4, 1004), (5, 1005), (6, 1006)]
    assert [float(e.dataset.state[0, 0]) for e in episodes] == [4, 5, 6], "other initial states"
    assert [e.is_complete for e in episodes] == [True] * 3
    assert [e.eval_video is not None for e in episodes] == [True, False, False]
    assert episodes[0].eval_video.name == "eval_episode_0.mp4"
    metrics = info["per_task"][0]["metrics"]
    assert (metrics["attention"]["n_saved"], len(metrics["attention_paths"])) == (3, 3)


def test_parts_do_not_share_their_noise(tmp_path):
    noise = []
    for first in (0, 2):
        evaluate_part(tmp_path / str(first), first, 2)
        noise.append(open_run(tmp_path / str(first))[0].dataset.action.values[:, 3])
    assert not np.array_equal(*noise)


def test_a_condition_counts_as_the_stores_do():
    from lerobot_attn.interventions import Condition

    acting = Acting(Condition.from_dict({"name": "nothing"}, where="test"), first_episode=4)
    begun = []
    acting.begin_episodes = begun.append
    acting.start_task()
    acting.begin(2)
    acting.begin(2)
    assert begun == [range(4, 6), range(6, 8)]


def test_the_first_episode_has_a_number_from_0():
    with pytest.raises(ConfigError, match=r"--eval.first_episode: got -1, expected an episode's number"):
        check_first_episode(-1, "--eval.first_episode")
