"""What the maps say: pure functions on an episode's dataset, lazy where the dataset is.

    from lerobot_attn import analysis, open_episode

    data = open_episode("….zarr").dataset
    analysis.image_heatmap(data, "image", frame=12, layer=17)  # (grid_y, grid_x)
    analysis.modality_share(data, frame="all", layer="all")    # (frame, layer, modality)

Knows neither torch nor LeRobot, draws nothing and opens no file.
"""

from lerobot_attn.analysis.measures import sharpness, stability
from lerobot_attn.analysis.select import Where, attention
from lerobot_attn.analysis.spatial import (
    camera_geometry,
    camera_names,
    image_heatmap,
    on_camera_pixels,
    padding_share,
)
from lerobot_attn.analysis.tokens import action_self_attention, modality_share, to_table, token_attention

__all__ = [
    "Where",
    "action_self_attention",
    "attention",
    "camera_geometry",
    "camera_names",
    "image_heatmap",
    "modality_share",
    "on_camera_pixels",
    "padding_share",
    "sharpness",
    "stability",
    "to_table",
    "token_attention",
]
