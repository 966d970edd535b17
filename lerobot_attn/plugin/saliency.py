"""Importance beside attention: a policy is asked about recorded frames whose patches are hidden in turn.

    found = measure_saliency(policy, VideoFrames({"image": "grasp.mp4"}, task="…"), preprocessor=preprocessor)

Nothing is rolled out: the observation is the recorded one, and only the change of the action is looked at.
What is made of the answers is `lerobot_attn.analysis.saliency`'s.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from lerobot_attn.analysis.saliency import (
    SHARES,
    FrameSaliency,
    Patches,
    Saliency,
    hidden_along,
    importance_of,
    random_masks,
    random_ranking,
    ranking,
    shifted_ranking,
    with_means,
)
from lerobot_attn.capture import AttentionCapture, InferenceRecord, capture_attention
from lerobot_attn.config import AttentionConfig, resolve_indices
from lerobot_attn.errors import ConfigError
from lerobot_attn.plugin.own_options import by_section, rename_map
from lerobot_attn.plugin.saliency_ask import Asker, Fill, Hide, Place, Scene
from lerobot_attn.policies import unwrap
from lerobot_attn.policies.shuffling import shuffled_weights
from lerobot_attn.recording.dataset import DatasetFrames
from lerobot_attn.recording.footage import Footage
from lerobot_attn.recording.replay_inputs import ReplayInputs
from lerobot_attn.recording.video_frames import VideoFrames

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]  # called as `progress(done, total)`

_PICTURES = 6  # frames whose pictures are kept, to be drawn
_LEAST_MASKS = 8


def measure_saliency(
    policy: Any,
    footage: Any,
    *,
    preprocessor: Any = None,
    episodes: Sequence[int] | None = None,
    frames: Sequence[int] | None = None,
    max_frames: int = 16,
    rename: Mapping[str, str] | None = None,
    task: str | None = None,
    layers: Any = "all",
    curve_layers: Sequence[int | str] = ("mean",),
    n_masks: int = 256,
    hidden_share: float = 0.0625,
    fill: Fill = "mean",
    n_draws: int = 3,
    shares: Sequence[float] = SHARES,
    batch_size: int = 16,
    seed: int = 0,
    n_shuffled: int = 0,
    progress: Progress | None = None,
) -> Saliency:
    """Measure what matters to a policy at recorded frames, and what its attention says beside it.

    At each frame the policy is asked once as it is, when its attention is captured, and then with patches
    hidden: by random masks, which give the importance, and along rankings of the patches by attention, by
    importance and at random, which give the deletion and insertion curves (Petsiuk et al. 2018). The change
    of the action is the root mean square over the executed actions of the chunk, in the policy's normalised
    units. All of a frame's questions start from the same noise, which depends on `seed`, the episode and the
    frame. Patches are hidden in the camera's own picture, before the preprocessor.

    One frame's masks and one batch of its pictures are in memory at a time.

    Args:
        policy: a LeRobot policy that an adapter knows.
        footage: a LeRobotDataset, its folder or name, or `VideoFrames`, e.g. of an episode's camera videos.
        preprocessor: the policy's; without it the policy gets the observations as they are.
        episodes: numbers of the footage's episodes; default: all.
        frames: numbers of the frames in each episode; default: where the policy would be asked anew, thinned
            to `max_frames`.
        max_frames: frames at most, evenly spread, where `frames` does not say them.
        rename: the footage's feature → the policy's.
        task: the instruction, instead of the recorded ones.
        layers: layers of the expert, as `AttentionConfig.layers` takes them. Their attention is the mean over
            the executed action tokens and the denoise steps.
        curve_layers: layers whose maps rank the patches for the curves; "mean" is the mean of `layers`. Each
            is the mean over its heads.
        n_masks: random masks a frame, made up to whole rounds (`analysis.saliency.random_masks`).
        hidden_share: share of the patches that a mask hides, up to 1/2.
        fill: what a hidden patch shows: the picture's "mean" colour, or the picture itself after a strong
            "blur" (Gaussian, sigma 1/16 of its longer side).
        n_draws: draws of the random and of the shifted rankings.
        shares: of the patches, ascending between 0 and 1, at which the curves are asked for.
        batch_size: pictures that the policy is asked about at once. One of a policy that denoises and takes
            no noise (X-VLA), because it draws its own for a whole batch.
        seed: of masks, noise and draws.
        n_shuffled: how often the same is asked of the policy with shuffled weights (`policies.shuffling`), as
            a control that has learned nothing; 0, or at least 2. They are back in their places at the end.
        progress: called with (questions answered, questions in all).

    Raises:
        UnsupportedPolicyError: no adapter knows the policy.
        ConfigError: no such frame, layer or camera, a setting out of range, or a policy that sees no image.
        CaptureError: its attention could not be captured, or a frame cannot be read.
    """
    least = {"n_masks": _LEAST_MASKS, "n_draws": 1, "batch_size": 1, "max_frames": 1, "seed": 0}
    given = {"n_masks": n_masks, "n_draws": n_draws, "batch_size": batch_size, "max_frames": max_frames}
    for name, value in {**given, "seed": seed}.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least[name]:
            raise ConfigError(f"{name}: got {value!r}, expected a whole number of at least {least[name]}")
    if isinstance(n_shuffled, bool) or not isinstance(n_shuffled, int) or n_shuffled < 0 or n_shuffled == 1:
        raise ConfigError(
            f"n_shuffled: got {n_shuffled!r}, expected 0, or at least 2: one copy says not how they differ"
        )
    if not 0 < hidden_share <= 0.5:
        raise ConfigError(f"hidden_share: got {hidden_share!r}, expected a number above 0, up to 0.5")
    if [*shares] != sorted({share for share in shares if 0 < share < 1}) or not shares:
        raise ConfigError(f"shares: got {shares!r}, expected numbers between 0 and 1, ascending")
    if fill not in get_args(Fill):
        raise ConfigError(f"fill: got {fill!r}, expected one of {', '.join(get_args(Fill))}")
    footage = footage if hasattr(footage, "observation") else DatasetFrames(footage)
    inputs = ReplayInputs.of(unwrap(policy).config, footage, rename, preprocessor)
    config = AttentionConfig(layers="none", mean_layers=layers, prefix_layers="none")
    records: list[InferenceRecord] = []
    with capture_attention(policy, config, on_record=records.append) as capture:
        names = _curve_layers(curve_layers, capture)
        places = _places(footage, episodes, frames, max_frames, capture.policy.n_action_steps)
        asker = Asker(policy, capture, inputs, preprocessor, records, batch_size)
        plan = _Plan(n_masks, hidden_share, fill, n_draws, seed, names, tuple(shares))
        patches: list[Patches] = []
        total = plan.n_questions * len(places) * (1 + n_shuffled)
        kept = set(np.linspace(0, len(places) - 1, _PICTURES).round().tolist())

        def asked(copy: int) -> tuple[FrameSaliency, ...]:
            """Ask about all frames; copy 0 is the policy itself."""
            found = []
            for number, place in enumerate(places):
                before = (copy * len(places) + number) * plan.n_questions
                scene = asker.scene(footage, place, task, seed)
                patches.append(_patches_of(scene.record))
                if patches[-1].geometries != patches[0].geometries:
                    raise ConfigError(
                        f"{place}: its cameras' pictures have another size than those before it"
                    )
                keep, told = not copy and number in kept, _counted(progress, before, total)
                found.append(_measure(asker, scene, patches[0], plan, place, keep, told))
            return tuple(found)

        frames_found, selection = asked(0), capture.selection
        copies = []
        for copy in range(1, n_shuffled + 1):
            with shuffled_weights(unwrap(policy), copy):
                copies.append(asked(copy))
        facts = {
            "footage": dict(footage.said),
            "policy_type": capture.policy.policy_type,
            "random_weights": capture.policy.random_weights,
            "remark": capture.policy.remark,
            "n_masks": plan.n_masks,
            "hidden_share": 1 / plan.n_groups,
            "fill": fill,
            "n_draws": n_draws,
            "seed": seed,
            "executed_actions": capture.policy.n_action_steps,
            "task": task,
        }
    own = Saliency(
        patches[0],
        selection.mean_layers,
        selection.heads,
        tuple(names),
        plan.shares,
        frames_found,
        facts,
    )
    return replace(own, shuffled=tuple(replace(own, frames=frames) for frames in _finite(copies)))


def _finite(copies: Sequence[tuple[FrameSaliency, ...]]) -> list[tuple[FrameSaliency, ...]]:
    """Return the copies whose actions are numbers, if these are enough to compare with; says so if not."""
    finite = [frames for frames in copies if all(np.isfinite(frame.all_hidden) for frame in frames)]
    if len(finite) < len(copies):
        logger.warning(
            "%d of %d copies with shuffled weights gave actions that are not finite%s",
            len(copies) - len(finite),
            len(copies),
            "; they are left out" if len(finite) > 1 else ", too many to compare with the others",
        )
    return finite if len(finite) > 1 else []


def _places(
    footage: Footage,
    episodes: Sequence[int] | None,
    frames: Sequence[int] | None,
    max_frames: int,
    every: int,
) -> list[Place]:
    """Return the frames that are looked at, in the order of the footage."""
    found = []
    for index in footage.choose(episodes):
        episode = footage.episode(index)
        numbers = episode.arrays["frame_index"].tolist()
        rows = {number: row for row, number in enumerate(numbers)}
        wanted = numbers[:: footage.every or every] if frames is None else sorted(set(frames))
        for number in wanted:
            if number not in rows:
                raise ConfigError(
                    f"frames: got {number}, episode {index} has frames {numbers[0]} to {numbers[-1]}; "
                    "expected some of them"
                )
            found.append(Place(episode, rows[number], number))
    if not found:
        raise ConfigError("frames: got none, expected at least one")
    return found if frames is not None else spread(found, max_frames)


def spread[T](items: Sequence[T], at_most: int) -> list[T]:
    """Return so many items at most, evenly spread over all; says so where it leaves some out."""
    if len(items) <= at_most:
        return list(items)
    logger.info("%d of %d frames, evenly spread; max_frames takes more", at_most, len(items))
    return [items[i] for i in np.linspace(0, len(items) - 1, at_most).round().astype(int)]


class _Plan(NamedTuple):
    """How each frame is asked about."""

    masks: int
    hidden_share: float
    fill: Fill
    n_draws: int
    seed: int
    curve_layers: Sequence[str]
    shares: tuple[float, ...]

    @property
    def n_groups(self) -> int:
        return max(2, round(1 / self.hidden_share))

    @property
    def n_masks(self) -> int:
        """Masks, in two halves of whole rounds."""
        return -(-self.masks // (2 * self.n_groups)) * 2 * self.n_groups

    @property
    def n_questions(self) -> int:
        """Pictures that the policy is shown at each frame."""
        rankings = 1 + len(self.curve_layers) * (1 + 2 * self.n_draws)
        return 1 + 2 + self.n_masks + rankings * 2 * len(self.shares)


def _measure(
    asker: Asker,
    scene: Scene,
    patches: Patches,
    plan: _Plan,
    place: Place,
    keep: bool,
    told: Callable[[int], None],
) -> FrameSaliency:
    """Ask everything about one frame."""
    rng = np.random.default_rng([plan.seed, place.episode.index, place.frame])
    cameras = {camera: asker.features[camera] for camera in patches.cameras}
    hide = Hide(scene.inputs, patches, cameras, plan.fill)
    told(1)
    masks = random_masks(patches, plan.n_masks, hidden_share=plan.hidden_share, rng=rng)
    ends = np.stack([np.zeros(len(patches), bool), np.ones(len(patches), bool)])
    answers = asker.changes(scene, patches, np.concatenate([ends, masks]), hide, told)
    floor, all_hidden, change = float(answers[0]), float(answers[1]), answers[2:]
    importance = importance_of(masks, change)
    # Whole rounds, so that each patch is hidden equally often in either half.
    half = len(masks) // 2
    halves = np.stack([importance_of(masks[part], change[part]) for part in (slice(half), slice(half, None))])
    attention = _attention(scene.record, patches)
    layers = scene.record.selection.mean_layers
    orders = _orders(importance, attention, patches, plan, layers, rng)
    flat = np.concatenate([hidden_along(order, plan.shares) for draws in orders.values() for order in draws])
    curves = asker.changes(scene, patches, flat.reshape(-1, len(patches)), hide, told)
    curves = curves.reshape(-1, 2, len(plan.shares))
    by_ranking, start = {}, 0
    for name, draws in orders.items():
        by_ranking[name] = curves[start : start + len(draws)]
        start += len(draws)
    pictures = {}
    if keep:
        pictures = {
            camera: (scene.inputs[feature] * 255).round().byte().permute(1, 2, 0).numpy()
            for camera, feature in cameras.items()
        }
    return FrameSaliency(
        place.episode.index,
        place.frame,
        importance,
        halves,
        attention,
        by_ranking,
        all_hidden,
        floor,
        pictures,
    )


def _patches_of(record: InferenceRecord) -> Patches:
    """Return the patches of the cameras that showed the policy an image.

    Raises:
        ConfigError: none did.
    """
    geometries = {c.name: c.geometry for c in record.layout.cameras if c.geometry is not None}
    if not geometries:
        raise ConfigError(
            f"the policy ({record.policy.policy_type}) saw no camera image, expected one with patches to hide"
        )
    return Patches(geometries)


def _attention(record: InferenceRecord, patches: Patches) -> NDArray[np.float32]:
    """Return (layer, head, patch): share of all attention, mean over the denoise steps."""
    means = record.suffix_attention_mean
    assert means is not None
    mean = means[:, :, 0].mean(axis=0, dtype=np.float32)
    images = [segment for segment in record.layout.segments if segment.kind == "image"]
    grids = {}
    for camera, segment in zip(record.layout.cameras, images, strict=True):
        if camera.geometry is not None:
            shape = camera.geometry.grid_rows, camera.geometry.grid_columns
            grids[camera.name] = mean[:, :, segment.start : segment.stop].reshape(*mean.shape[:2], *shape)
    return np.asarray(patches.of_grids(grids), np.float32)


def _orders(
    importance: NDArray[np.float64],
    attention: NDArray[np.float32],
    patches: Patches,
    plan: _Plan,
    layers: Sequence[int],
    rng: np.random.Generator,
) -> dict[str, list[NDArray[np.intp]]]:
    """Return the draws of each ranking whose curves are asked for, as `FrameSaliency.curves` names them."""
    by_layer = dict(zip([*map(str, layers), "mean"], with_means(attention)[:, -1], strict=True))
    draws = range(plan.n_draws)
    orders = {"importance": [ranking(importance, rng)]}
    for layer in plan.curve_layers:
        order = ranking(by_layer[layer], rng)
        orders[f"attention {layer}"] = [order]
        orders[f"random {layer}"] = [random_ranking(order, patches, rng) for _ in draws]
        orders[f"shifted {layer}"] = [shifted_ranking(by_layer[layer], patches, rng) for _ in draws]
    return orders


def _curve_layers(wanted: Sequence[int | str], capture: AttentionCapture) -> list[str]:
    """Return the layers whose curves are asked for, as text, each once.

    Raises:
        ConfigError: one is no layer, or none of those that are looked at.
    """
    names = []
    for layer in wanted:
        if layer == "mean":
            names.append("mean")
            continue
        if isinstance(layer, str):
            raise ConfigError(f"curve_layers: got {layer!r}, expected numbers of layers, or 'mean'")
        (number,) = resolve_indices("curve layer", [layer], capture.policy.n_layers)
        if number not in capture.selection.mean_layers:
            held = ", ".join(map(str, capture.selection.mean_layers))
            raise ConfigError(f"curve_layers: got {layer}, expected one of layers ({held}), or 'mean'")
        names.append(str(number))
    if not names:
        raise ConfigError("curve_layers: got none, expected at least one, e.g. 'mean'")
    return list(dict.fromkeys(names))


def _counted(progress: Progress | None, before: int, total: int) -> Callable[[int], None]:
    done = before

    def told(n: int) -> None:
        nonlocal done
        done += n
        if progress is not None:
            progress(done, total)

    return told


@dataclass
class SaliencyRequest:
    """What the command line asks for.

    Attributes:
        policy_path: the checkpoint's folder, or its name on the Hub.
        footage: the name or folder of a data set, or the arguments of `VideoFrames`.
        options: `--policy.name=value`, as they were written.
        rename: JSON of the footage's feature → the policy's.
        measure: further arguments of `measure_saliency`.
    """

    policy_path: str
    footage: str | Mapping[str, Any]
    options: Sequence[str] = ()
    rename: str | None = None
    measure: Mapping[str, Any] = field(default_factory=dict)


def saliency(request: SaliencyRequest, progress: Progress | None = None) -> Saliency:
    """Do what the command line asks for; cameras and sizes are checked before weights are loaded.

    Args:
        request: what it asks for.
        progress: called with (questions answered, questions in all).

    Raises:
        LerobotAttnError: as `measure_saliency` says; or a checkpoint or an option that is none.
    """
    from lerobot_attn.plugin.checkpoints import load_policy, read_checkpoint

    options = by_section(request.options, ("policy",))
    rename = rename_map(request.rename)
    footage: Footage
    if isinstance(request.footage, str):
        footage = DatasetFrames(request.footage)
    else:
        footage = VideoFrames(**request.footage)
    checkpoint = read_checkpoint(request.policy_path, options["policy"])
    ReplayInputs.of(checkpoint.config, footage, rename, checkpoint.preprocessor)
    policy = load_policy(checkpoint, getattr(footage, "meta", None), renames=True)
    return measure_saliency(
        policy,
        footage,
        preprocessor=checkpoint.preprocessor,
        rename=rename,
        progress=progress,
        **request.measure,
    )
