"""Teach the demo policy: first its image encoder what patches show, then actions, by flow matching alone.

No loss ever says which patches the instruction names, nor where attention should lie: what links word and
object is learned through the actions. Every step's chance follows from the seed and the step's number, so a
training that was interrupted goes on from its last checkpoint as if it had not been.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from expert import CHUNK, Stage
from network import N_CAMERAS, N_PATCHES, encode, image_tokens, sample, velocity
from numpy.typing import NDArray
from scene import CLASSES, OBJECTS, instruction
from steps import Loop
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from lerobot_attn.demo.modeling_pi05_tiny import PI05TinyPolicy

Array = NDArray[Any]
Data = dict[str, Array]
Prompts = Callable[[Array, list[str]], tuple[Tensor, Tensor]]

N_OBJECTS = len(OBJECTS)
BASKET_CLASS, ROBOT_CLASS = CLASSES.index("basket"), CLASSES.index("robot")
N_ACTION = 7
# Loss weights of an action's numbers: LIBERO's object suite never turns the hand.
ACTION_WEIGHTS = torch.tensor([1.0, 1.0, 1.0, 0.1, 0.1, 0.1, 1.0])
SOON, LATER = 16, 0.3  # the first actions count fully; later ones are predicted but seldom carried out
N_EULER = 10


@dataclass(frozen=True)
class VisionSettings:
    """Teaching the image encoder: steps, frames a step, the largest learning rate."""

    steps: int = 2500
    batch: int = 16
    rate: float = 2e-3


@dataclass(frozen=True)
class CloningSettings:
    """Teaching actions.

    Attributes:
        steps: in all.
        batch: pairs of a frame and an object's name, a step.
        draws: noisy chunks of each.
        rate: largest learning rate.
        patches: of a picture pair's 512, so many are kept; one of these numbers by chance.
        tokens: of a chunk's 50 actions, so many: the first ten, and others by chance.
        held: share of the pairs in which the teacher has closed its fingers on the object or is about to.
    """

    steps: int = 8000
    batch: int = 24
    draws: int = 4
    rate: float = 1e-3
    patches: tuple[int, ...] = (80, 80, 110, 200)
    tokens: int = 16
    held: float = 0.45


def split(data: Data) -> tuple[Array, Array]:
    """Return the numbers of the training and the validation frames: each 40th run of 25, or more of few."""
    every = min(40, max(2, len(data["state"]) // 50))
    held_out = (np.arange(len(data["state"])) // 25) % every == every - 1
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


@torch.no_grad()
def prepare(policy: PI05TinyPolicy, data: Data, seed: int) -> None:
    """Fill every weight for training: unit-variance layers, half-size residual branches, open AdaRMS gates.

    The patch embedding starts as the whitened principal components of the data's own patches.
    """
    torch.manual_seed(seed)
    model = policy.model
    towers = model.paligemma_with_expert
    vlm, expert = towers.paligemma.model, towers.gemma_expert.model

    def fill(layer: nn.Module, gain: float = 1.0) -> None:
        weight = layer.weight
        assert isinstance(weight, Tensor)
        weight.normal_(std=gain * weight[0].numel() ** -0.5)
        if isinstance(bias := getattr(layer, "bias", None), Tensor):
            bias.zero_()

    vision = vlm.vision_tower.vision_model
    vision.embeddings.position_embedding.weight.normal_(std=0.3)
    for layer in vision.encoder.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for part in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.fc1):
            fill(part)
        for part in (attention.out_proj, mlp.fc2):
            fill(part, 0.5)
    fill(vlm.multi_modal_projector.linear)
    vlm.language_model.embed_tokens.weight.normal_(std=policy.config.width**-0.5)
    for tower in (vlm.language_model, expert):
        for layer in tower.layers:
            attention, mlp = layer.self_attn, layer.mlp
            for part in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj):
                fill(part)
            for part in (attention.o_proj, mlp.down_proj):
                fill(part, 0.5)
    for layer in expert.layers:
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.dense.weight.zero_()
            norm.dense.bias.zero_()
            norm.dense.bias.chunk(3)[2].fill_(1.0)
    expert.norm.dense.weight.zero_()
    expert.norm.dense.bias.zero_()
    fill(model.time_mlp_in)
    fill(model.time_mlp_out, 2.0)
    fill(model.action_in_proj, (policy.config.max_action_dim / N_ACTION) ** 0.5)
    fill(model.action_out_proj, 0.3)
    model.action_out_proj.weight[N_ACTION:] = 0.0
    _ignore_padding(model)
    _whiten(vision.embeddings.patch_embedding, data, seed)


def _ignore_padding(model: Any) -> None:
    """Make the policy blind to an action's unused numbers, whose noise no loss teaches it to remove."""
    with torch.no_grad():
        model.action_in_proj.weight[:, N_ACTION:] = 0.0


def _whiten(embedding: nn.Conv2d, data: Data, seed: int, frames: int = 240) -> None:
    """Start the patch embedding as whitened principal components of patches of some frames."""
    chosen = np.random.default_rng(seed).choice(
        len(data["state"]), min(frames, len(data["state"])), replace=False
    )
    size, width = embedding.kernel_size[0], embedding.out_channels
    pixels = _pixels(data, np.sort(chosen)).flatten(0, 1)
    patches = F.unfold(pixels, size, stride=size).transpose(1, 2).flatten(0, 1)[::3]
    mean = patches.mean(0)
    _, variances, axes = torch.linalg.svd((patches - mean).T @ (patches - mean) / len(patches))
    deviations = variances[:width].sqrt()
    weight = axes[:width] / torch.maximum(deviations, 0.03 * deviations[0])[:, None]
    embedding.weight.copy_(weight.reshape(embedding.weight.shape))
    assert embedding.bias is not None
    embedding.bias.copy_(-(weight @ mean))


def _pixels(data: Data, frames: Array) -> Tensor:
    """Return images as the image encoder gets them, (frames, 2, 3, 224, 224), from -1 to 1."""
    return torch.from_numpy(data["images"][frames]).permute(0, 1, 4, 2, 3).float() / 127.5 - 1


class PatchReader(nn.Module):
    """Linear maps from an image token to what its patch shows and where that is; thrown away afterwards."""

    def __init__(self, width: int):
        super().__init__()
        self.classes = nn.Linear(width, len(CLASSES))
        self.places = nn.ModuleList(nn.Linear(width, 3) for _ in range(N_CAMERAS))

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Map (batch, 512, width) to class scores (batch, 512, classes) and places (batch, 512, 3)."""
        cameras = tokens.unflatten(1, (N_CAMERAS, -1)).unbind(1)
        places = [head(camera) for head, camera in zip(self.places, cameras, strict=True)]
        return self.classes(tokens), torch.cat(places, 1)


def patch_targets(data: Data) -> tuple[Tensor, Tensor]:
    """Return what each patch shows, (frames, 512) class numbers, and where that is, (frames, 512, 3).

    Places are in the agent view about the middle of the floor, in the wrist view about the hand, in units of
    about 0.1 m. A patch that shows less than a fifth of anything is background.
    """
    shares = data["patches"].reshape(len(data["patches"]), N_CAMERAS * N_PATCHES, -1).astype(np.float32) / 255
    things = shares[..., 1:].copy()
    things[..., :N_OBJECTS] *= 1.6  # small objects before the basket and the arm behind them
    classes = things.argmax(-1) + 1
    classes[shares[..., 1:].sum(-1) < 0.2] = 0
    hand = data["state"][:, None, :3]
    positions = np.nan_to_num(np.concatenate([data["positions"], hand], axis=1))
    frames = np.arange(len(classes))[:, None]
    places = positions[frames, np.clip(classes - 1, 0, ROBOT_CLASS - 1)]
    places[:, :N_PATCHES] = (places[:, :N_PATCHES] - np.array([0, 0, 0.08])) / np.array([0.15, 0.15, 0.1])
    places[:, N_PATCHES:] = (places[:, N_PATCHES:] - hand) / 0.1
    return torch.from_numpy(classes), torch.from_numpy(places.astype(np.float32))


def teach_vision(
    policy: PI05TinyPolicy, data: Data, settings: VisionSettings, folder: Path, seed: int
) -> None:
    """Teach the image encoder which of 13 classes each patch shows, and where that is.

    Afterwards image tokens have unit standard deviation, as large as words.
    """
    classes, places = patch_targets(data)
    reader = PatchReader(policy.config.width)
    vlm = policy.model.paligemma_with_expert.paligemma.model
    parameters = [
        *vlm.vision_tower.parameters(),
        *vlm.multi_modal_projector.parameters(),
        *reader.parameters(),
    ]
    weights = torch.ones(len(CLASSES))
    weights[0], weights[BASKET_CLASS], weights[ROBOT_CLASS] = 0.3, 0.4, 0.4
    train, held_out = split(data)

    def losses(frames: Array) -> tuple[Tensor, Tensor, Tensor]:
        scores, where = reader(image_tokens(policy, _pixels(data, frames)))
        target = classes[frames]
        something = (target > 0) & (target != BASKET_CLASS)
        right = F.cross_entropy(scores.flatten(0, 1), target.flatten(), weight=weights)
        near = F.smooth_l1_loss(where[something], places[frames][something], beta=0.3)
        objects = (target > 0) & (target <= N_OBJECTS)
        return right, near, (scores.argmax(-1) == target)[objects].float().mean()

    loop = Loop("vision", [policy, reader], parameters, settings.steps, settings.rate, folder, seed)
    for step, rng in loop:
        right, near, _ = losses(rng.choice(train, settings.batch))
        loop.descend(right + near)
        if loop.reports(step):
            with torch.no_grad():
                right, near, seen = losses(held_out[:64])
            loop.report(
                step, class_loss=right.item(), place_loss=near.item(), object_patches_right=seen.item()
            )
    with torch.no_grad():
        scale = 1 / tokens_of(policy, data, held_out[:64]).std()
        projector = vlm.multi_modal_projector.linear
        projector.weight.mul_(scale)
        projector.bias.mul_(scale)


@torch.no_grad()
def tokens_of(policy: PI05TinyPolicy, data: Data, frames: Array) -> Tensor:
    """Return the image tokens of frames, (frames, 512, width)."""
    parts = [
        image_tokens(policy, _pixels(data, frames[first : first + 32])) for first in range(0, len(frames), 32)
    ]
    return torch.cat(parts)


def all_tokens(policy: PI05TinyPolicy, data: Data) -> Tensor:
    """Return the image tokens of all frames, (frames, 512, width) float16, with a progress bar."""
    n = len(data["state"])
    out = torch.empty((n, N_CAMERAS * N_PATCHES, policy.config.width), dtype=torch.float16)
    for first in tqdm(range(0, n, 32), desc="image tokens", unit="batch", dynamic_ncols=True):
        out[first : first + 32] = tokens_of(policy, data, np.arange(first, min(first + 32, n))).half()
    return out


def teach_actions(
    policy: PI05TinyPolicy,
    data: Data,
    prompts: Prompts,
    settings: CloningSettings,
    folder: Path,
    seed: int,
    *,
    name: str = "cloning",
) -> PI05TinyPolicy:
    """Teach actions by flow matching, the image encoder left as it is; return the weights' moving average.

    Args:
        policy: with a taught image encoder.
        data: frames.
        prompts: (states (n, 8), instructions) → token ids and mask, (n, tokens).
        settings: how.
        folder: of checkpoints and the log.
        seed: of chance.
        name: of the stage.
    """
    tokens = all_tokens(policy, data)
    classes, _ = patch_targets(data)
    train, held_out = split(data)
    lesson = Lesson(data, train, settings.held)
    check = Lesson(data, held_out, 0.5)
    average = copy.deepcopy(policy)
    taught = [
        parameter
        for name, parameter in policy.named_parameters()
        if "vision_tower" not in name and "multi_modal_projector" not in name
    ]
    loop = Loop(name, [policy, average], taught, settings.steps, settings.rate, folder, seed)
    for step, rng in loop:
        frames, objects = lesson.draw(rng, settings.batch)
        loss = flow_loss(policy, data, tokens, classes, frames, objects, prompts, settings, rng)
        loop.descend(loss)
        _ignore_padding(policy.model)
        with torch.no_grad():
            kept = min(0.995, (1 + step) / (10 + step))
            for slow, fast in zip(average.parameters(), policy.parameters(), strict=True):
                slow.lerp_(fast, 1 - kept)
        if loop.reports(step):
            loop.report(step, flow=loss.item(), **judge(average, data, tokens, check, prompts))
    return average


class Lesson:
    """Which frames are asked about with which object's name."""

    def __init__(self, data: Data, frames: Array, held: float):
        known = data["known"][frames] > 0
        approaching = (data["stage"][frames] == Stage.APPROACH) & known.any(1)
        self._known, self._target = data["known"] > 0, data["target"]
        self.free = frames[approaching]
        self.held = frames[~approaching & known.any(1)]
        self._share = held if len(self.held) else 0.0

    def draw(self, rng: np.random.Generator, n: int) -> tuple[Array, Array]:
        """Return n frames' numbers and the objects named; a frame of an empty hand comes with two names."""
        n_held = round(n * self._share)
        frames, objects = [], []
        for frame in rng.choice(self.free, n):
            names = rng.permutation(np.flatnonzero(self._known[frame]))
            if self._known[frame, self._target[frame]] and rng.random() < 0.6:  # the object that is near
                names = np.array([self._target[frame], *names[names != self._target[frame]]])
            frames += [frame] * len(names[:2])
            objects += list(names[:2])
            if len(frames) >= n - n_held:
                break
        held = rng.choice(self.held, n_held) if n_held else np.empty(0, int)
        return (
            np.concatenate([frames[: n - n_held], held]).astype(int),
            np.concatenate([objects[: n - n_held], self._target[held]]).astype(int),
        )


def normalised(actions: Array) -> Tensor:
    """Return actions as the policy predicts them, float32: moves over 0.7, as the processors scale them."""
    out = torch.from_numpy(np.asarray(actions, np.float32)).clone()
    out[..., :3] /= 0.7
    return out


def flow_loss(
    policy: PI05TinyPolicy,
    data: Data,
    tokens: Tensor,
    classes: Tensor,
    frames: Array,
    objects: Array,
    prompts: Prompts,
    settings: CloningSettings,
    rng: np.random.Generator,
) -> Tensor:
    """Return the flow-matching loss of frames when objects are named.

    Patches are dropped by chance, those of any object less often than the floor's; which object is named
    plays no part in that.
    """
    n = len(frames)
    ids, mask = prompts(data["state"][frames], [instruction(OBJECTS[number]) for number in objects])
    shown = classes[frames]
    likely = torch.rand(shown.shape) + ((shown > 0) & (shown <= N_OBJECTS)) * 0.9 + (shown > N_OBJECTS) * 0.15
    places = likely.topk(int(rng.choice(settings.patches)), dim=1).indices.sort(dim=1).values
    images = torch.from_numpy(frames)
    kept = tokens[images[:, None], places].float()
    prefix = encode(policy, kept, ids, mask, places)

    first = min(10, settings.tokens)
    chosen = np.concatenate(
        [np.arange(first), first + np.sort(rng.permutation(CHUNK - first)[: settings.tokens - first])]
    )
    actions = normalised(data["actions"][frames, objects][:, chosen])
    actions = F.pad(actions, (0, policy.config.max_action_dim - N_ACTION)).repeat_interleave(
        settings.draws, 0
    )
    noise = torch.randn_like(actions)
    time = policy.model.sample_time(len(actions), "cpu")
    noisy = time[:, None, None] * noise + (1 - time[:, None, None]) * actions
    predicted = velocity(policy, prefix, noisy, time, torch.from_numpy(chosen))
    errors = (predicted - (noise - actions))[..., :N_ACTION] ** 2

    counts = torch.from_numpy(chosen < data["known"][frames, objects][:, None]).float()
    counts = counts * torch.where(torch.from_numpy(chosen) < SOON, 1.0, LATER)
    weights = counts.repeat_interleave(settings.draws, 0)[..., None] * ACTION_WEIGHTS
    assert n == len(counts)
    loss: Tensor = (errors * weights).sum() / weights.sum()
    return loss


@torch.no_grad()
def judge(
    policy: PI05TinyPolicy, data: Data, tokens: Tensor, check: Lesson, prompts: Prompts
) -> dict[str, float]:
    """Return how good sampled actions are on held-out frames, all patches and tokens, fixed noise.

    Returns:
        `aim`: share of frames whose move over 16 actions is nearer to what the teacher would do for the named
        object than for any other that could be named; `aim_chance`: what guessing gives; `error`: mean
        squared error of the first ten moves, `error_held` with the object in hand; `fingers`: share of right
        openings.
    """
    rng = np.random.default_rng(0)
    several = check.free[(data["known"][check.free] > 0).sum(1) > 1][:96]
    objects = np.array([rng.choice(np.flatnonzero(data["known"][frame] > 0)) for frame in several])
    chunk = _sampled(policy, data, tokens, several, objects, prompts)
    labels = normalised(data["actions"][several])
    own = labels[np.arange(len(several)), objects]
    apart = ((chunk[:, None, :SOON, :3].sum(2) - labels[:, :, :SOON, :3].sum(2)) ** 2).sum(-1)
    apart[torch.from_numpy(data["known"][several] == 0)] = torch.inf
    choices = torch.from_numpy((data["known"][several] > 0).sum(1)).float()
    held = check.held[:64]
    carried = _sampled(policy, data, tokens, held, data["target"][held], prompts)
    true = normalised(data["actions"][held, data["target"][held]])
    return {
        "aim": (apart.argmin(1) == torch.from_numpy(objects)).float().mean().item(),
        "aim_chance": (1 / choices).mean().item(),
        "error": ((chunk - own)[:, :10, :3] ** 2).mean().item(),
        "error_held": ((carried - true)[:, :10, :3] ** 2).mean().item(),
        "fingers": ((carried[:, :10, 6] > 0) == (true[:, :10, 6] > 0)).float().mean().item(),
    }


def _sampled(
    policy: PI05TinyPolicy, data: Data, tokens: Tensor, frames: Array, objects: Array, prompts: Prompts
) -> Tensor:
    """Return chunks, (frames, 50, 7), normalised, that the policy makes of fixed noise."""
    ids, mask = prompts(data["state"][frames], [instruction(OBJECTS[number]) for number in objects])
    prefix = encode(policy, tokens[torch.from_numpy(frames)].float(), ids, mask)
    noise = torch.randn(
        (len(frames), CHUNK, policy.config.max_action_dim), generator=torch.Generator().manual_seed(0)
    )
    return sample(policy, prefix, noise, N_EULER)[..., :N_ACTION]
