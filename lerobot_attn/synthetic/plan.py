"""What a synthetic episode is like: its sizes, its token layout, what its loop and its policy lack.

Knows no attention and writes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from lerobot_attn.errors import ConfigError
from lerobot_attn.layout import Camera, ImageGeometry, Segment, TokenLayout
from lerobot_attn.masks import Role, instances_of


def _two_cameras() -> dict[str, tuple[int, int]]:
    return {"observation.images.image": (96, 96), "observation.images.wrist": (96, 128)}


@dataclass(frozen=True)
class SyntheticPlan:
    """Sizes of a synthetic episode; counts are of tokens, layers and so on, images in pixels.

    The prefix holds the cameras, the empty cameras, the language slots, then state tokens and padding; the
    suffix holds cameras that the prefix lacks and state tokens, then the actions. The defaults are those of
    Pi0.5, which has neither. `FAMILIES` has ready plans of other policies and other loops.
    """

    n_frames: int = 12
    n_executed: int = 3
    n_queries: int = 5  # suffix tokens: its cameras' and state tokens, and the actions of a chunk
    n_denoise_steps: int = 3
    n_layers: int = 4
    layers: tuple[int, ...] = (2, 3)  # whose full maps are stored; none: the array is left out
    prefix_layers: tuple[int, ...] = ()
    vision_layers: tuple[int, ...] = ()
    n_vision_layers: int = 4
    n_vision_heads: int = 3
    vision_grid: tuple[int, int] | None = None  # patches of the vision tower; by default as many as tokens
    # Layers whose neurons, and whose residual stream, are stored, of "vlm" and "expert".
    neurons: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    residuals: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    record_full: bool = False  # every token's, too
    n_units: int = 6  # neurons of a layer; the residual stream has two numbers less
    has_means: bool = True  # whether the means over the executed actions are stored
    n_heads: int = 2
    image_px: Mapping[str, tuple[int, int]] = field(default_factory=_two_cameras)  # camera → (height, width)
    n_empty_cameras: int = 1
    image_special: tuple[int, int] = (0, 0)  # special tokens before and after the patches of each camera
    padding: Literal["centred", "left_top"] = "centred"
    input_px: tuple[int, int] = (224, 224)
    grid: tuple[int, int] = (16, 16)
    n_text: int = 48
    n_state: int = 3
    state_in_prompt: bool = True  # "Task: …, State: 12 99;\nAction: " as in Pi0.5, or the task alone
    cut_prompt: bool = False  # whether a prompt of more than n_text tokens loses its end; an error otherwise
    n_prefix_state: int = 0  # state tokens after the language (SmolVLA: 1)
    n_prefix_padding: int = 0  # padding after them
    n_suffix_state: int = 0  # state tokens that open the suffix (pi0: 1)
    n_suffix_cameras: int = 0  # of image_px the last ones, whose tokens open the suffix (X-VLA: all but one)
    prefix_only_layers: tuple[int, ...] = ()  # layers that cannot see the suffix (SmolVLA: the odd ones)
    n_actions: int = 4  # action dimensions
    frames_without_query: tuple[int, ...] = ()  # frames whose action is no token of a chunk
    objects: Mapping[str, Role] = field(
        default_factory=dict
    )  # of the scene, by name; none: there are no masks
    out_of_sight: tuple[int, ...] = ()  # inferences at which no camera shows the first object
    # (layer, head) whose image attention lies on the first object's centre, at every denoise step
    on_first_object: tuple[int, int] | None = None
    has_reward: bool = True
    has_success: bool = True
    task: str = "pick up the red block and place it in the bowl"
    task_group: str = "synthetic"
    task_id: int = 0
    episode_index: int = 0
    success: bool = True
    complete: bool = True
    videos: bool = True
    fps: float = 20.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Check that there is something to plant in: a camera of several patches, a word, a number of state.

        Raises:
            ConfigError: a size is too small, or a role of an object does not exist.
        """
        instances_of(("background", *self.objects), self.objects, where="objects")
        most = self.n_chunk
        before = " - n_suffix_cameras' patches" * bool(self.n_suffix_cameras)
        before += " - n_suffix_state" * bool(self.n_suffix_state)
        most_text = f"1 to n_queries{before} = {most}"
        every_layer = range(self.n_layers)
        rules = {
            "image_px": (len(self.image_px) >= 1, "at least one camera"),
            "n_suffix_cameras": (
                0 <= self.n_suffix_cameras < len(self.image_px)
                and not (self.n_suffix_cameras and self.n_empty_cameras),
                "fewer than the cameras, and none with empty cameras",
            ),
            "grid": (self.grid[0] * self.grid[1] >= 2, "at least two patches"),
            "task": (len(self.task.split()) >= 1, "at least one word"),
            "n_state": (self.n_state >= 1, "at least 1"),
            "n_executed": (1 <= self.n_executed <= most, most_text),
            "layers": ({*self.layers} <= {*every_layer}, f"0 to {self.n_layers - 1}"),
            "prefix_only_layers": ({*self.prefix_only_layers} <= {*every_layer}, f"0 to {self.n_layers - 1}"),
            "vision_layers": (
                {*self.vision_layers} <= {*range(self.n_vision_layers)},
                f"0 to {self.n_vision_layers - 1}",
            ),
            "neurons": (_are_layers(self.neurons, self.n_layers), f"layers below {self.n_layers} of streams"),
            "residuals": (
                _are_layers(self.residuals, self.n_layers),
                f"layers below {self.n_layers} of streams",
            ),
            "n_units": (self.n_units >= 3, "at least 3"),
            "on_first_object": (
                self.on_first_object is None
                or (
                    bool(self.objects)
                    and self.on_first_object[0] in every_layer
                    and 0 <= self.on_first_object[1] < self.n_heads
                ),
                f"a layer below {self.n_layers} and a head below {self.n_heads}, in a plan with objects",
            ),
            "has_means": (
                self.has_means or bool(self.layers or self.neurons or self.residuals),
                "True, or layers whose full maps, neurons or residuals are stored",
            ),
        }
        for name, (is_fine, expected) in rules.items():
            if not is_fine:
                raise ConfigError(f"{name}: got {getattr(self, name)!r}, expected {expected}")

    @classmethod
    def full_size(cls, n_frames: int = 280, **changes: Any) -> SyntheticPlan:
        """Return the sizes of Pi0.5 as released: (8, 50, 1018) a map, 18 layers, 10 denoise steps."""
        sizes: dict[str, Any] = {
            "n_executed": 10,
            "n_queries": 50,
            "n_denoise_steps": 10,
            "n_layers": 18,
            "layers": (16, 17),
            "n_heads": 8,
            "image_px": {"observation.images.image": (360, 360), "observation.images.image2": (360, 360)},
            "n_text": 200,
            "n_state": 8,
            "n_actions": 7,
        }
        return cls(n_frames=n_frames, **{**sizes, **changes})

    @property
    def n_inferences(self) -> int:
        """Inferences that the frames need."""
        return -(-self.n_frames // self.n_executed)

    @property
    def first_action_query(self) -> int:
        """Suffix tokens before the actions: those of cameras and of the state."""
        each = sum(self.image_special) + self.grid[0] * self.grid[1]
        return self.n_suffix_cameras * each + self.n_suffix_state

    @property
    def n_chunk(self) -> int:
        """Actions of a chunk: the suffix's tokens without those before them."""
        return self.n_queries - self.first_action_query

    @property
    def patches(self) -> tuple[int, int]:
        """Rows and columns of the vision tower's patches of an image."""
        return self.grid if self.vision_grid is None else self.vision_grid

    @property
    def executed_queries(self) -> slice:
        """The suffix queries whose actions are executed."""
        return slice(self.first_action_query, self.first_action_query + self.n_executed)

    @property
    def layout(self) -> TokenLayout:
        """The segments in order, of which those without tokens are left out."""
        cameras = [
            Camera(name, ImageGeometry.letterbox(size, self.input_px, self.grid, padding=self.padding))
            for name, size in self.image_px.items()
        ]
        cameras += [Camera(f"observation.images.empty_{i}", None) for i in range(self.n_empty_cameras)]
        sizes: list[tuple[str, str, int]] = []
        of_suffix: list[tuple[str, str, int]] = []
        for number, camera in enumerate(cameras):
            before, after = (0, 0) if camera.is_empty else self.image_special
            opens_suffix = number >= len(cameras) - self.n_suffix_cameras
            (of_suffix if opens_suffix else sizes).extend(
                [
                    ("special", f"before {camera.name}", before),
                    ("image", camera.name, self.grid[0] * self.grid[1]),
                    ("special", f"after {camera.name}", after),
                ]
            )
        sizes += [
            ("language", "language", self.n_text),
            ("state", "state", self.n_prefix_state),
            ("padding", "padding", self.n_prefix_padding),
            *of_suffix,
            ("state", "state", self.n_suffix_state),
            ("action", "action", self.n_chunk),
        ]
        segments: list[Segment] = []
        position = 0
        for kind, name, length in sizes:
            if length:
                segments.append(Segment(kind, name, position, position + length))
            position += length
        return TokenLayout(tuple(segments), position - self.n_queries, tuple(cameras))


def _are_layers(chosen: Mapping[str, tuple[int, ...]], n_layers: int) -> bool:
    """Say whether these are layers of the language model and of the action expert."""
    return all(
        stream in ("vlm", "expert") and layers and {*layers} <= {*range(n_layers)}
        for stream, layers in chosen.items()
    )


def _small(**changes: Any) -> SyntheticPlan:
    every = (0, 1, 2, 3)
    maps: dict[str, Any] = {"layers": every, "prefix_layers": every, "vision_layers": (0, 1)}
    return SyntheticPlan(**{"grid": (8, 8), **maps, **changes})


_PI0: dict[str, Any] = {"n_suffix_state": 1, "n_queries": 6, "state_in_prompt": False}
_SMOLVLA: dict[str, Any] = {
    "padding": "left_top",
    "n_empty_cameras": 0,
    "state_in_prompt": False,
    "n_prefix_state": 1,
    "n_prefix_padding": 3,
    "prefix_only_layers": (1, 3),
    "vision_grid": (16, 16),  # four patches a token
}

_XVLA: dict[str, Any] = {
    "padding": "left_top",
    "n_empty_cameras": 0,
    "state_in_prompt": False,
    "grid": (4, 4),
    "image_special": (1, 0),
    "n_suffix_cameras": 1,
    "n_queries": 17 + 5,
}

# Small episodes of every kind that a reader meets; `dataclasses.replace` changes a plan.
FAMILIES: dict[str, SyntheticPlan] = {
    "pi05": _small(),
    "pi05 left-top": _small(padding="left_top"),
    "pi0": _small(**_PI0),
    "pi0 without means": _small(**_PI0, has_means=False),
    "smolvla": _small(**_SMOLVLA),
    "smolvla with special tokens": _small(**_SMOLVLA, image_special=(2, 1)),
    "smolvla means only": _small(**_SMOLVLA, layers=(), prefix_layers=(), vision_layers=()),
    "xvla": _small(**_XVLA, vision_layers=()),
    "without reward and success": _small(has_reward=False, has_success=False),
    "actions that are no token": _small(frames_without_query=(0, 4, 5, 10)),
    "pi0, actions that are no token": _small(**_PI0, frames_without_query=(0, 4, 5, 10)),
    "truncated prompt": _small(n_text=14, cut_prompt=True),
    "few layers": _small(layers=(1,), prefix_layers=(2,), vision_layers=(), has_means=False),
}
