"""What the maps say: pure functions on an episode's dataset, lazy where the dataset is.

    from lerobot_attn import analysis, open_episode

    data = open_episode("….zarr").dataset
    analysis.image_heatmap(data, "image", frame=12, layer=17)  # (grid_y, grid_x)
    analysis.modality_share(data, frame="all", layer="all")    # (frame, layer, modality)

Knows neither torch nor LeRobot, draws nothing and opens no file.
"""

from lerobot_attn.analysis.behaviour import (
    approached,
    lift_height,
    lift_height_max,
    lift_profile,
    mean_speed,
    path_length,
    steps_to_success,
)
from lerobot_attn.analysis.catalogue import MEASURES, Measure
from lerobot_attn.analysis.cluster import local_workers
from lerobot_attn.analysis.compare import (
    Aspect,
    compare,
    compare_each,
    compare_overall,
    same_geometry,
    split_by_condition,
    split_by_success,
)
from lerobot_attn.analysis.doses import dose_effects, dose_slopes
from lerobot_attn.analysis.effects import effects_table, episodes_needed, mcnemar, paired_effects
from lerobot_attn.analysis.grounding import grounding, mean_maps
from lerobot_attn.analysis.measures import attention_entropy, sharpness, stability
from lerobot_attn.analysis.neuron_contrast import contrast
from lerobot_attn.analysis.neurons import units_of
from lerobot_attn.analysis.prefix import (
    PrefixWhere,
    attention_from,
    cross_modal,
    image_to_text,
    prefix_attention,
    text_to_image,
)
from lerobot_attn.analysis.probes import probe
from lerobot_attn.analysis.propagation import attention_flow, attention_rollout, flow, rollout
from lerobot_attn.analysis.quantities import quantity
from lerobot_attn.analysis.reduce import mean_over, row_sum
from lerobot_attn.analysis.runs import summarise, summarise_run
from lerobot_attn.analysis.select import Where, attention, executed_actions, prefix_only_layers
from lerobot_attn.analysis.sinks import attention_sinks
from lerobot_attn.analysis.spatial import (
    by_camera,
    camera_geometry,
    camera_names,
    image_heatmap,
    on_camera_pixels,
    on_grid,
    padding_share,
    patch_of_pixels,
)
from lerobot_attn.analysis.tokens import (
    action_self_attention,
    by_modality,
    by_token,
    modality_share,
    prompt_truncated,
    to_table,
    token_attention,
)
from lerobot_attn.analysis.vision import (
    VisionWhere,
    attention_from_patch,
    vision_attention,
    vision_geometry,
    vision_rollout,
)

__all__ = [
    "MEASURES",
    "Aspect",
    "Measure",
    "PrefixWhere",
    "VisionWhere",
    "Where",
    "action_self_attention",
    "approached",
    "attention",
    "attention_entropy",
    "attention_flow",
    "attention_from",
    "attention_from_patch",
    "attention_rollout",
    "attention_sinks",
    "by_camera",
    "by_modality",
    "by_token",
    "camera_geometry",
    "camera_names",
    "compare",
    "compare_each",
    "compare_overall",
    "contrast",
    "cross_modal",
    "dose_effects",
    "dose_slopes",
    "effects_table",
    "episodes_needed",
    "executed_actions",
    "flow",
    "grounding",
    "image_heatmap",
    "image_to_text",
    "lift_height",
    "lift_height_max",
    "lift_profile",
    "local_workers",
    "mcnemar",
    "mean_maps",
    "mean_over",
    "mean_speed",
    "modality_share",
    "on_camera_pixels",
    "on_grid",
    "padding_share",
    "paired_effects",
    "patch_of_pixels",
    "path_length",
    "prefix_attention",
    "prefix_only_layers",
    "probe",
    "prompt_truncated",
    "quantity",
    "rollout",
    "row_sum",
    "same_geometry",
    "sharpness",
    "split_by_condition",
    "split_by_success",
    "stability",
    "steps_to_success",
    "summarise",
    "summarise_run",
    "text_to_image",
    "to_table",
    "token_attention",
    "units_of",
    "vision_attention",
    "vision_geometry",
    "vision_rollout",
]
