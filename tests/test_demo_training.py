"""The demo policy's training in miniature: forward pass, teacher, data, and going on where it was."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("lerobot")
pytest.importorskip("libero")

sys.path.append(str(Path(__file__).parent.parent / "scripts" / "demo"))

import evaluate  # noqa: E402
import expert  # noqa: E402
import frames as shards  # noqa: E402
import learn  # noqa: E402
import network  # noqa: E402
from expert import GRIPS, Moment, Stage  # noqa: E402
from scene import BASKET, CLASSES, OBJECTS, instruction, is_place, random_places  # noqa: E402

from lerobot_attn.demo import trained  # noqa: E402
from lerobot_attn.demo.checkpoint import libero_config  # noqa: E402
from lerobot_attn.demo.modeling_pi05_tiny import PI05TinyPolicy  # noqa: E402
from lerobot_attn.errors import SetupError  # noqa: E402

VOCABULARY = 640


@pytest.fixture(scope="module")
def policy():
    return PI05TinyPolicy(libero_config(VOCABULARY, **trained.SETTINGS)).eval()


@pytest.fixture(scope="module")
def inputs():
    draw = torch.Generator().manual_seed(0)
    mask = torch.arange(200) < torch.tensor([[50], [57]])
    return {
        "images": torch.rand((2, 2, 3, 224, 224), generator=draw) * 2 - 1,
        "prompt": torch.randint(300, 500, (2, 200), generator=draw),
        "mask": mask,
        "noise": torch.randn((2, 50, 32), generator=draw),
        "actions": torch.randn((2, 50, 32), generator=draw),
        "time": torch.rand(2, generator=draw),
    }


class TestForwardPass:
    """The training's own forward pass against LeRobot's."""

    @staticmethod
    def lerobots(inputs):
        """Return images and masks as LeRobot's model takes them: three cameras, the last one empty."""
        first, second = inputs["images"].unbind(1)
        there = torch.ones(2, dtype=torch.bool)
        images = [first, second, torch.full_like(first, -1.0)]
        return images, [there, there, ~there], inputs["prompt"], inputs["mask"]

    @staticmethod
    def prefix(policy, inputs, n=60):
        tokens = network.image_tokens(policy, inputs["images"])
        return network.encode(policy, tokens, inputs["prompt"][:, :n], inputs["mask"][:, :n])

    @torch.no_grad()
    def test_loss_is_lerobots(self, policy, inputs):
        time = inputs["time"][:, None, None]
        noisy = time * inputs["noise"] + (1 - time) * inputs["actions"]
        expected = policy.model(*self.lerobots(inputs), inputs["actions"], inputs["noise"], inputs["time"])
        velocity = network.velocity(policy, self.prefix(policy, inputs), noisy, inputs["time"])
        got = (inputs["noise"] - inputs["actions"] - velocity) ** 2
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)

    @torch.no_grad()
    def test_sampled_actions_are_lerobots(self, policy, inputs):
        expected = policy.model.sample_actions(*self.lerobots(inputs), noise=inputs["noise"], num_steps=4)
        got = network.sample(policy, self.prefix(policy, inputs), inputs["noise"], 4)
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)

    @torch.no_grad()
    def test_draws_of_one_observation_do_not_see_each_other(self, policy, inputs):
        prefix = self.prefix(policy, inputs)
        alone = network.velocity(policy, prefix, inputs["noise"], inputs["time"])
        others = torch.stack([inputs["noise"], inputs["actions"]], 1).flatten(0, 1)
        together = network.velocity(policy, prefix, others, inputs["time"].repeat_interleave(2))
        torch.testing.assert_close(together[::2], alone, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(together[1::2], alone)

    @torch.no_grad()
    def test_a_dropped_patch_is_as_if_masked_and_the_others_stay_where_they_were(self, policy, inputs):
        tokens = network.image_tokens(policy, inputs["images"])
        kept = torch.arange(40, 512).expand(2, -1)
        prompt, mask = inputs["prompt"][:, :60], inputs["mask"][:, :60]
        dropped = network.encode(policy, tokens[:, 40:], prompt, mask, kept)
        moved = network.encode(policy, tokens[:, 40:], prompt, mask)
        assert torch.equal(dropped.length, self.prefix(policy, inputs).length)
        # First layer: keys depend on the token and its position alone.
        torch.testing.assert_close(
            dropped.keys[0][:, :, :472], self.prefix(policy, inputs).keys[0][:, :, 40:512]
        )
        assert not torch.allclose(moved.keys[0][:, :, :472], dropped.keys[0][:, :, :472], atol=1e-3)

    @torch.no_grad()
    def test_some_tokens_of_a_chunk_keep_their_positions(self, policy, inputs):
        prefix, chosen = self.prefix(policy, inputs), torch.tensor([0, 3, 20])
        some = network.velocity(policy, prefix, inputs["noise"][:, chosen], inputs["time"], chosen)
        first = network.velocity(policy, prefix, inputs["noise"][:, chosen], inputs["time"])
        assert some.shape == (2, 3, 32)
        assert not torch.allclose(some, first, atol=1e-4)


def moment(**changes) -> Moment:
    now = Moment(
        hand=np.array([-0.15, 0.0, 0.25]),
        opening=0.078,
        target=np.array([0.05, -0.1, 0.038]),
        rest=0.038,
        basket=np.array([0.0, 0.26, 0.0]),
    )
    return replace(now, **changes)


class TestTeacher:
    @pytest.mark.parametrize("name", OBJECTS)
    def test_imagined_actions_lead_to_the_object_and_close_there(self, name):
        grip = GRIPS[name]
        actions = expert.imagine(moment(), grip, n=120)
        assert actions.shape == (120, 7)
        assert np.abs(actions).max() <= 1
        assert not actions[:, 3:6].any()
        hand, velocity = np.array([-0.15, 0.0, 0.25]), np.zeros(3)
        closing = int(np.flatnonzero(actions[:, 6] > 0)[0])
        for action in actions[:closing]:
            velocity = 0.45 * velocity + 0.55 * 0.0122 * action[:3]
            hand = hand + velocity
        assert np.hypot(hand[0] - 0.05, hand[1] + 0.1) < expert.CENTRED
        assert abs(hand[2] - grip.height) < 0.02

    def test_held_object_goes_up_then_over_then_down_then_free(self):
        grip = GRIPS["alphabet_soup"]
        held = {"opening": grip.width, "target": np.array([0.05, -0.1, 0.038])}
        low = moment(hand=np.array([0.05, -0.1, 0.045]), **held)
        action, stage = expert.act(low, grip)
        assert (stage, action[6]) == (Stage.LIFT, expert.CLOSE)
        assert action[2] > 0.9
        high = moment(
            hand=np.array([0.0, -0.1, 0.24]), opening=grip.width, target=np.array([0.0, -0.1, 0.233])
        )
        action, stage = expert.act(high, grip)
        assert (stage, action[6]) == (Stage.CARRY, expert.CLOSE)
        assert action[1] > 0.9
        over = moment(
            hand=np.array([0.0, 0.25, 0.2]), opening=grip.width, target=np.array([0.0, 0.25, 0.193])
        )
        action, stage = expert.act(over, grip)
        assert (stage, action[6]) == (Stage.LOWER, expert.CLOSE)
        assert action[2] < -0.5
        inside = moment(
            hand=np.array([0.0, 0.25, 0.08]), opening=grip.width, target=np.array([0.0, 0.25, 0.073])
        )
        assert expert.act(inside, grip)[0][6] == expert.OPEN

    def test_an_object_in_the_basket_is_left_alone(self):
        inside = moment(hand=np.array([0.0, 0.25, 0.08]), target=np.array([0.0, 0.25, 0.04]))
        action, stage = expert.act(inside, GRIPS["milk"])
        assert (stage, action[6]) == (Stage.LEAVE, expert.OPEN)
        assert action[2] > 0

    def test_lifting_higher_is_seen_in_the_actions(self):
        grip = GRIPS["alphabet_soup"]
        held = moment(
            hand=np.array([0.05, -0.1, 0.045]), opening=grip.width, target=np.array([0.05, -0.1, 0.038])
        )
        low, high = (expert.imagine(held, grip, lift=lift)[:, 2].sum() for lift in (0.0, 0.1))
        assert high > low + 2


class TestLayouts:
    def test_places_are_apart_in_reach_and_random(self):
        rng = np.random.default_rng(0)
        names = tuple(OBJECTS[:6])
        layouts = [random_places(names, rng) for _ in range(20)]
        for places in layouts:
            assert set(places) == {*names, BASKET}
            assert all(is_place(places[name]) for name in names)
            apart = [np.linalg.norm(places[a] - places[b]) for i, a in enumerate(names) for b in names[:i]]
            assert min(apart) > 0.1
        assert len({tuple(places[names[0]]) for places in layouts}) == 20

    def test_a_given_place_is_kept(self):
        given = np.array([0.0, 0.0])
        places = random_places(("milk", "ketchup"), np.random.default_rng(0), {"milk": given})
        assert places["milk"] is given


def made_up(n: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Return frames of noise with the right shapes, half of them with the object held."""
    rng = np.random.default_rng(seed)
    known = np.zeros((n, 10), np.uint8)
    stage = np.where(np.arange(n) % 2, Stage.CARRY, Stage.APPROACH).astype(np.uint8)
    target = rng.choice([0, 2, 3], n).astype(np.uint8)
    known[:, [0, 2, 3]] = (stage == Stage.APPROACH)[:, None] * 50
    known[np.arange(n), target] = 20
    patches = np.zeros((n, 2, 16, 16, len(CLASSES)), np.uint8)
    patches[..., 0] = 255
    patches[:, :, 4, 4, :] = 0
    patches[np.arange(n), :, 4, 4, target + 1] = 255
    positions = rng.normal(size=(n, 11, 3)).astype(np.float32) * 0.1
    positions[:, 9] = np.nan
    return {
        "images": rng.integers(0, 255, (n, 2, 224, 224, 3), np.uint8),
        "patches": patches,
        "state": np.tile(np.float32([-0.1, 0.0, 0.2, 3.14, 0, 0, 0.04, -0.04]), (n, 1)),
        "positions": positions,
        "actions": rng.normal(size=(n, 10, 50, 7)).astype(np.float16) * 0.3,
        "known": known,
        "stage": stage,
        "target": target,
    }


class TestFrames:
    def test_shards_come_back_whole_and_in_order(self, tmp_path):
        data = made_up(7)
        rows = [{name: array[i] for name, array in data.items()} for i in range(7)]
        shards.write_shard(tmp_path / "a.npz", rows[:4])
        shards.write_shard(tmp_path / "b.npz", rows[4:])
        read = shards.read_shards([tmp_path / "a.npz", tmp_path / "b.npz"])
        assert set(read) == set(shards.FIELDS)
        for name, array in data.items():
            np.testing.assert_array_equal(read[name], array)
            assert read[name].dtype == shards.FIELDS[name][0]
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npz", "b.npz"]

    def test_a_cut_shard_is_named_in_one_line(self, tmp_path):
        data = made_up(2)
        path = tmp_path / "a.npz"
        shards.write_shard(path, [{name: array[i] for name, array in data.items()} for i in range(2)])
        path.write_bytes(path.read_bytes()[:1000])
        with pytest.raises(SetupError, match=r"a\.npz.*delete the file") as caught:
            shards.read_shards([path])
        assert "\n" not in str(caught.value)
        with pytest.raises(SetupError, match="no training frames"):
            shards.read_shards([])

    def test_held_out_frames_are_not_trained_on(self):
        for n in (60, 400, 3000):
            train, held_out = learn.split({"state": np.zeros((n, 8))})
            assert len(held_out) > 0
            assert not set(train) & set(held_out)
            assert len(train) + len(held_out) == n

    def test_what_a_patch_shows_and_where(self):
        data = made_up(4)
        classes, places = learn.patch_targets(data)
        shown = classes.view(4, 2, 16, 16)
        assert shown[:, :, 4, 4].tolist() == [[t + 1] * 2 for t in data["target"].tolist()]
        assert (shown == 0).sum() == shown.numel() - 8
        wrist = places.view(4, 2, 16, 16, 3)[:, 1, 4, 4].numpy()
        positions = data["positions"][np.arange(4), data["target"]]
        np.testing.assert_allclose(wrist * 0.1 + data["state"][:, :3], positions, atol=1e-6)

    def test_only_objects_with_known_actions_are_named(self):
        data = made_up(200)
        lesson = learn.Lesson(data, np.arange(200), held=0.5)
        frames, objects = lesson.draw(np.random.default_rng(0), 40)
        assert len(frames) == len(objects) == 40
        assert (data["known"][frames, objects] > 0).all()
        held = data["stage"][frames] == Stage.CARRY
        assert held.sum() == 20
        assert (objects[held] == data["target"][frames[held]]).all()


def prompts_of(states, tasks):
    """Return token ids that differ from task to task, as the preprocessor would."""
    ids = torch.tensor([[300 + hash(word) % 7 for word in ("a", "b")] + [310 + len(task)] for task in tasks])
    return ids, torch.ones_like(ids, dtype=torch.bool)


@pytest.fixture(scope="module")
def data():
    return made_up(60)


class TestLearning:
    @staticmethod
    def teach(data, folder, steps, every=2):
        folder.mkdir(exist_ok=True)
        policy = PI05TinyPolicy(libero_config(VOCABULARY, **trained.SETTINGS))
        learn.prepare(policy, data, 0)
        settings = learn.CloningSettings(steps=4, batch=4, draws=2, patches=(60,), tokens=12)

        class StopError(Exception):
            pass

        seen = []

        def prompts(states, tasks):
            seen.append(len(tasks))
            if len(seen) > steps:
                raise StopError
            return prompts_of(states, tasks)

        try:
            return learn.teach_actions(policy, data, prompts, settings, folder, 0)
        except StopError:
            return None

    def test_an_interrupted_training_ends_as_an_uninterrupted_one(self, data, tmp_path, monkeypatch):
        monkeypatch.setattr(learn.Loop, "EVERY", 2)
        monkeypatch.setattr(learn, "judge", lambda *args: {"aim": 0.0})
        whole = self.teach(data, tmp_path / "whole", 99)
        assert self.teach(data, tmp_path / "cut", 3) is None  # after the checkpoint of two steps
        again = self.teach(data, tmp_path / "cut", 99)
        expected, got = whole.state_dict(), again.state_dict()
        assert [name for name in expected if not torch.equal(expected[name], got[name])] == []

    def test_a_checkpoint_of_another_training_is_refused(self, data, tmp_path, policy):
        torch.save({"step": 2}, tmp_path / "vision.pt")
        with pytest.raises(SetupError, match=r"vision\.pt.*begin the stage anew") as caught:
            learn.teach_vision(policy, data, learn.VisionSettings(steps=1), tmp_path, 0)
        assert "\n" not in str(caught.value)

    def test_the_loss_knows_only_known_actions(self, data, policy):
        tokens = torch.zeros((60, 512, 64), dtype=torch.float16)
        classes, _ = learn.patch_targets(data)
        settings = learn.CloningSettings(batch=4, draws=1, patches=(60,), tokens=50)
        frames, objects = np.array([1, 3, 5, 7]), data["target"][[1, 3, 5, 7]]

        def loss(changed):
            torch.manual_seed(0)
            rng = np.random.default_rng(0)
            return learn.flow_loss(
                policy, changed, tokens, classes, frames, objects, prompts_of, settings, rng
            ).item()

        beyond, within = (dict(data, actions=data["actions"].copy()) for _ in range(2))
        beyond["actions"][:, :, 20:] += 5  # noisy actions are seen, but not judged
        within["actions"][:, :, :20] += 5
        plain = loss(data)
        assert abs(loss(beyond) - plain) < 0.3 * plain
        assert loss(within) > 3 * plain


class TestShippedWeights:
    def test_rounding_and_leaving_out_heads_comes_back(self, policy):
        weights = trained.shipped(policy)
        assert all(tensor.dtype == torch.float16 for tensor in weights.values())
        again = trained.load(weights, replace(policy.config))
        state = again.state_dict()
        for name, tensor in weights.items():
            assert torch.equal(state[name], tensor.float()), name
        assert torch.equal(state[trained.HEADS[0]], state[trained.EMBEDDING])

    def test_weights_of_another_size(self, policy):
        config = libero_config(VOCABULARY, **trained.SETTINGS, width=96)
        with pytest.raises(SetupError, match="do not fit the policy") as caught:
            trained.load(trained.shipped(policy), config)
        assert "\n" not in str(caught.value)

    def test_every_state_in_the_workspace_has_three_digits(self):
        for (low, high), (q01, q99) in zip(trained._WORKSPACE, trained.STATE_RANGES, strict=True):
            bins = [
                int(np.digitize(2 * (x - q01) / (q99 - q01) - 1, np.linspace(-1, 1, 257)[:-1])) - 1
                for x in (low, high)
            ]
            assert 100 <= bins[0] < bins[1] <= 255


class TestReport:
    def test_wilson_interval(self):
        low, high = evaluate.wilson(41, 50)
        assert (round(low, 3), round(high, 3)) == (0.692, 0.902)
        assert evaluate.wilson(0, 0) == (0.0, 1.0)
        assert evaluate.wilson(50, 50)[1] == 1.0

    def test_table_counts_what_happened(self):
        rows = [
            {
                "kind": "named",
                "task": 0,
                "index": i,
                "name": "milk",
                "success": i < 2,
                "steps": 9,
                "reached": "milk" if i < 3 else "butter",
                "lifted": ["milk"] if i < 3 else ["butter"],
            }
            for i in range(4)
        ]
        line = next(line for line in evaluate.table(rows).splitlines() if line.startswith("| milk"))
        assert [cell.split(",")[0].strip() for cell in line.split("|")[2:6]] == [
            "3 of 4",
            "3 of 4",
            "1 of 4",
            "2 of 4",
        ]

    def test_table_counts_how_high_objects_were_carried(self):
        needed = expert.carry_height(GRIPS["milk"]) - GRIPS["milk"].height
        row = {"kind": "named", "task": 0, "name": "milk", "success": True, "steps": 9, "reached": "milk"}
        heights = [needed, needed + 0.001, needed + 0.061, needed - 0.05, needed + 0.3]
        rows = [{**row, "index": i, "lifted": ["milk"], "height": height} for i, height in enumerate(heights)]
        rows.append({**row, "index": 9, "lifted": [], "height": 0.0})  # not lifted: not counted
        head, _, counts = evaluate.table(rows).splitlines()[-3:]
        cells = dict(
            zip(*([cell.strip() for cell in line.split("|")] for line in (head, counts)), strict=True)
        )
        assert (cells["less"], cells["-1 to 1 cm"], cells["5 to 7 cm"], cells["more"]) == ("1", "2", "1", "1")
        assert "episodes, of 5" in counts

    def test_tasks_are_the_suites_own(self, libero_ready):
        from libero.libero import benchmark

        suite = benchmark.get_benchmark_dict()["libero_object"]()
        assert [suite.get_task(i).language for i in range(10)] == [instruction(name) for name in OBJECTS]
        assert OBJECTS[3] in evaluate.objects_of(3)
        assert len(evaluate.objects_of(3)) == 6
