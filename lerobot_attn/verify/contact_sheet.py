"""The contact sheet: what the policy saw, what was filmed, and the overlay, to check with one's own eyes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from matplotlib.figure import Figure

from lerobot_attn import analysis
from lerobot_attn.analysis.select import MEANS, Where
from lerobot_attn.analysis.spatial import NO_CAMERAS
from lerobot_attn.errors import (
    RANDOM_WEIGHTS,
    ConfigError,
    LerobotAttnError,
    SelectionError,
    StoreError,
    first_line,
)
from lerobot_attn.figures.canvas import Caption, colorbar, new_figure, store_name, styled
from lerobot_attn.figures.scale import colormap as check_colormap
from lerobot_attn.inspection import sampled_inferences
from lerobot_attn.overlay import ColourScale
from lerobot_attn.overlay.maps import is_damaged
from lerobot_attn.settings import check_one_map, check_ranges, parse_choice
from lerobot_attn.store.reader import Episode
from lerobot_attn.store.references import Video
from lerobot_attn.store.video import Frame, read_frames


@dataclass(frozen=True)
class VerifySettings:
    """Settings of `lerobot-attn verify`."""

    # Check the rows of every inference; of the first, the middle and the last one otherwise.
    thorough: bool = False
    # Of the contact sheet: the layer, a number (negative from the last) or 'mean'. Default: the last stored.
    layer: int | Literal["mean"] | None = None
    # The denoise step, likewise; the policy's last one yields the action.
    denoise_step: int | Literal["mean"] | None = None
    # A matplotlib colour map.
    colormap: str = "inferno"
    # Opacity of the largest value, 0 to 1.
    alpha: float = 0.6
    # Width, inches.
    width: float = 7.0
    # Dots per inch of PNG files.
    dpi: int = 150

    def __post_init__(self) -> None:
        """Read choices given as text, and check what can be checked without an episode.

        Raises:
            ConfigError: a value is out of range or of the wrong type.
        """
        for name in ("layer", "denoise_step"):
            value = parse_choice(getattr(self, name))
            object.__setattr__(self, name, value)
            if value is not None:
                check_one_map(name, value, ("mean",))
        if not isinstance(self.thorough, bool):
            raise ConfigError(f"thorough: got {self.thorough!r}, expected true or false")
        check_ranges(self, {"alpha": (0, 1), "width": (2, 30), "dpi": (30, 1200)})
        check_colormap(self.colormap)


@styled
def contact_sheet(episode: Episode, settings: VerifySettings | None = None) -> Figure:
    """Draw the first, the middle and the last inference, a row for each camera.

    From left to right: what the policy was shown, the evaluation MP4's frame of the same number, and the
    policy's view with the heatmap of the action executed at that frame, relative to its largest patch. Where
    a video is missing or too short, or the map is missing, the panel says so.

    Args:
        episode: from `open_episode`.
        settings: whose maps, and how to draw them.

    Raises:
        StoreError: the episode is empty or damaged.
        SelectionError: no such layer or step, or no camera showed an image.
    """
    if episode.n_frames == 0:
        raise StoreError(f"{episode.path}: holds no frames yet; expected one at least")
    settings = settings or VerifySettings()
    width_in, colormap = settings.width, settings.colormap
    data = episode.arrays
    inferences = sampled_inferences(episode.n_inferences)
    frames = [min(int(data["inference_frame"].values[i]), episode.n_frames - 1) for i in inferences]
    where: Where = {"frame": frames, "layer": settings.layer, "denoise_step": settings.denoise_step}
    cameras = analysis.camera_names(data)
    if not cameras:
        raise SelectionError(NO_CAMERAS)
    try:
        array = analysis.attention(data, **where).load()
        # Where it lies is the question here, not how much.
        heats = [*analysis.by_camera(data, array, cameras, normalisation="frame").values()]
    except LerobotAttnError:
        raise
    except Exception as error:
        if not is_damaged(episode):
            raise
        raise StoreError(
            f"{episode.path}: the attention of inferences {inferences} cannot be read: {first_line(error)}"
        ) from error
    views = {
        camera: _some_frames(episode.videos.get(camera), frames, episode.image_size_px(camera))
        for camera in cameras
    }
    filmed = _some_frames(episode.eval_video, frames)
    scale = ColourScale(1.0, colormap, settings.alpha)
    geometries = [analysis.camera_geometry(data, camera)[1] for camera in cameras]
    panel_in = (width_in - 0.7) / 3
    heights = [panel_in * g.height_px / g.width_px + 0.2 for _ in frames for g in geometries]
    attrs, short = heats[0].attrs, episode.layout.short_names
    facts = [
        f"{store_name(episode.path)}{'' if episode.is_complete else ', incomplete'}",
        *(attrs[name] for name in ("layer", "denoise_step", "head", "query")),
        attrs["units"],
        "from stored means" if attrs["source"] == MEANS else "",
    ]
    remarks = [line for line in (episode.condition.line, episode.policy_remark) if line]
    caption = Caption(facts, RANDOM_WEIGHTS if episode.has_random_weights else "", remarks)
    figure = new_figure(width_in, sum(heights) + 0.05, caption)
    grid = figure.add_gridspec(len(heights), 3, height_ratios=heights)
    all_axes = []
    for row, (number, index) in enumerate(np.ndindex(len(frames), len(cameras))):
        camera, frame = cameras[index], frames[number]
        view, film = views[camera][number], filmed[number]
        over, without = None, "no camera video"
        heat = heats[index][number]
        if heat.isnull().all():  # a repair dropped it; the bare image would look like no attention at all
            without = "the map is missing"
        elif view is not None:
            height, width, _ = view.shape
            over = scale.over(
                view, analysis.on_camera_pixels(heat, geometries[index], size_px=(height, width))
            )
        panels = (
            (f"inference {inferences[number]}, frame {frame}: {short[camera]}", view, "no camera video"),
            (f"evaluation's MP4, frame {frame}", film, "no evaluation MP4"),
            (f"{short[camera]} with attention, frame {frame}", over, without),
        )
        for column, (title, image, missing) in enumerate(panels):
            axes = figure.add_subplot(grid[row, column])
            axes.set_title(title, pad=2)
            axes.set_xticks([])
            axes.set_yticks([])
            if image is None:
                axes.set_facecolor("#EEEEEE")
                axes.text(0.5, 0.5, f"{missing}\nof this frame", ha="center", va="center")
                axes.set_box_aspect(geometries[index].height_px / geometries[index].width_px)
            else:
                axes.imshow(image, interpolation="nearest")
            all_axes.append(axes)
    colorbar(figure, all_axes, colormap, 0, 1, attrs["units"], aspect=40, shrink=min(1, 3 / sum(heights)))
    return figure


def _some_frames(
    video: Video | None, frames: Sequence[int], size_px: tuple[int, int] | None = None
) -> list[Frame | None]:
    """Return frames of a video, None where it is missing, damaged or too short."""
    if video is None:
        return [None] * len(frames)
    found: dict[int, Frame] = {}
    numbers = sorted(set(frames))
    try:
        for number, image in zip(numbers, read_frames(video, size_px=size_px, numbers=numbers), strict=False):
            found[number] = image
    except StoreError:
        pass
    return [found.get(frame) for frame in frames]
