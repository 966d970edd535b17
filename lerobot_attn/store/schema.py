"""The one place that names the arrays, dimensions, chunks and codecs of an episode store.

Writer, reader, `inspect` and the README's table come from here. Knows no policy and opens no file.

Longer than 450 lines because the table of all arrays stands in one place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lerobot_attn.layout import Kind, TokenLayout

SCHEMA_NAME = "lerobot-attn/episode"
SCHEMA_VERSION = 2  # 2: arrays of reward and success may be absent, and keys that a layer cannot see are NaN
EPISODE_SUFFIX = ".zarr"
METADATA = "zarr.json"  # the file in which Zarr describes a group or an array

DIMENSIONS: dict[str, str] = {
    "inference": "one run of the policy that yields an action chunk",
    "denoise_step": "Euler step of flow matching inside an inference; labelled by the policy's step numbers; "
    "a single one of a policy that does not denoise (its `n_denoise_steps` is 0)",
    "layer": "layers whose full maps are stored",
    "all_layer": "layers whose means are stored",
    "prefix_layer": "layers whose prefix self-attention is stored",
    "head": "attention heads that are stored",
    "camera": "cameras that showed the policy an image, by name; only with `vision_attention`",
    "vision_layer": "layers of the vision tower whose self-attention is stored",
    "vision_head": "attention heads of the vision tower",
    "patch_query": "patches of a camera's image in the vision tower, attending; row by row from the top left",
    "patch_key": "the same patches, attended",
    "vlm_group": "groups of prefix tokens over which activations are reduced, by name: each camera that "
    "showed an image, then `task`, `state`, `template`, `text` (language that could not be told apart) and "
    "`special`, as far as there are such tokens",
    "expert_group": "groups of suffix tokens over which activations are reduced, by name: `state` where a "
    "state token opens the suffix, and `actions`, the action tokens that are executed",
    "reduction": "over the tokens of a group: `mean` and `max`",
    "vlm_neuron_layer": "layers of the language model whose feed-forward neurons are stored",
    "expert_neuron_layer": "layers of the action expert whose feed-forward neurons are stored",
    "vlm_residual_layer": "layers of the language model whose residual stream is stored",
    "expert_residual_layer": "layers of the action expert whose residual stream is stored",
    "vlm_unit": "neurons of a feed-forward network of the language model, in the order of its weights",
    "expert_unit": "likewise of the action expert",
    "vlm_feature": "numbers in the residual stream of the language model",
    "expert_feature": "likewise of the action expert",
    "mask_camera": "cameras that have instance masks, by name; only with `segmentation`",
    "mask_y": "pixel rows of a mask, 0 is the top; a camera of another size is scaled to it",
    "mask_x": "pixel columns of a mask, 0 is the left",
    "instance": "things that a mask can show, by name; the first is the background",
    "xyz": "coordinates in the world's frame",
    "query": "suffix tokens, the attending ones; query i is key prefix_len + i",
    "key": "prefix and suffix tokens, the attended ones",
    "prefix_query": "prefix tokens, attending",
    "prefix_key": "prefix tokens, attended",
    "text": "language slots of the prefix; text i is key `text_key[i]`",
    "frame": "one environment step = one video frame; frame t shows the observation that action t answers; "
    "in a replay, one recorded frame",
    "action_dim": "action dimensions",
    "state_dim": "state dimensions",
}

# Rows of the small arrays that share a chunk: the last chunk is written again at each commit, so it must stay
# small.
ROWS_PER_CHUNK = 64
FRAMES_PER_CHUNK = 1024

Growth = Literal["inference", "frame", None]


@dataclass(frozen=True)
class ArraySpec:
    """One array of the store.

    `dims` name its axes; the first is "inference" or "frame" for arrays that grow with the episode. `sharded`
    arrays put one inference in a shard, and one map with all its heads in a chunk.
    """

    name: str
    dims: tuple[str, ...]
    dtype: str
    description: str
    units: str = "1"
    sharded: bool = False
    optional: bool = False
    coordinate: bool = False
    flags: type[Kind] | None = None
    fill_value: Any = 0

    @property
    def is_map(self) -> bool:
        """Whether it holds attention or activations, which may be rounded."""
        return self.sharded and self.dtype == "float16"

    @property
    def can_be_missing(self) -> bool:
        """Whether what is not there reads as "nobody knows", and so cannot be taken for a value."""
        return self.fill_value != self.fill_value or self.name == "segmentation"

    @property
    def grows_with(self) -> Growth:
        """The dimension along which rows are appended, if any."""
        first = self.dims[0]
        if first == "inference":
            return "inference"
        return "frame" if first == "frame" else None

    def shape(self, sizes: Mapping[str, int], n_rows: int = 0) -> tuple[int, ...]:
        """Return the shape with `n_rows` rows along the growing dimension."""
        rest = tuple(sizes[dim] for dim in self.dims[1 if self.grows_with else 0 :])
        return (n_rows, *rest) if self.grows_with else rest

    def chunks(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Return the chunk shape: a map with its heads for sharded arrays, a run of rows for small ones."""
        if self.sharded:
            whole = {"head", "query", "key", "prefix_query", "prefix_key"}
            whole |= {"vision_head", "patch_query", "patch_key", "mask_y", "mask_x"}
            whole |= {"vlm_unit", "expert_unit", "vlm_feature", "expert_feature"}
            if "all_layer" in self.dims:  # means: all layers of a denoise step are looked at together
                whole.add("all_layer")
            if "reduction" in self.dims:  # likewise activations, of a group of tokens
                whole |= {dim for dim in self.dims if dim.endswith("_layer")}
            return tuple(max(1, sizes[dim]) if dim in whole else 1 for dim in self.dims)
        rows = {"inference": ROWS_PER_CHUNK, "frame": FRAMES_PER_CHUNK}.get(self.dims[0])
        return tuple(max(1, n) for n in (self.shape(sizes, rows) if rows else self.shape(sizes)))

    def shards(self, sizes: Mapping[str, int]) -> tuple[int, ...] | None:
        """Return the shard shape, or None for arrays without shards."""
        return tuple(max(1, n) for n in self.shape(sizes, 1)) if self.sharded else None

    @property
    def stored_order(self) -> tuple[int, ...] | None:
        """Order of the axes inside a chunk before it is compressed; None is as they are.

        In suffix maps keys come before queries: what neighbouring queries give one key resembles each other,
        so the maps become smaller (benchmarks/NOTES.md). Readers get the axes as `dims` names them.
        """
        swapped = {"query": "key", "key": "query"}
        if not self.sharded or not swapped.keys() <= set(self.dims):
            return None
        return tuple(self.dims.index(swapped.get(dim, dim)) for dim in self.dims)

    def attributes(self) -> dict[str, Any]:
        """Return the array's attributes: CF's `long_name`, `units` and flags."""
        attributes: dict[str, Any] = {"long_name": self.description, "units": self.units}
        if self.flags is not None:
            attributes["flag_values"] = [int(flag) for flag in self.flags]
            attributes["flag_meanings"] = " ".join(flag.name.lower() for flag in self.flags)
        return attributes


_MAPS = ("inference", "denoise_step", "layer", "head", "query", "key")
_PREFIX_MAPS = ("inference", "prefix_layer", "head", "prefix_query", "prefix_key")
_VISION_MAPS = ("inference", "camera", "vision_layer", "vision_head", "patch_query", "patch_key")
_NEURONS = "activation of each feed-forward neuron (what the network's last projection reads)"
_RESIDUAL = "residual stream as it leaves the layer"
_BEYOND = "; what lies beyond ±65504 is infinite"
_OF_GROUPS = f"mean and maximum over each group of tokens; NaN of a group without tokens{_BEYOND}"
NAN = float("nan")

ARRAYS: tuple[ArraySpec, ...] = (
    ArraySpec(
        "suffix_attention",
        _MAPS,
        "float16",
        "attention probability of the suffix-only pass, softmax over key; rows sum to 1; keys that a layer "
        "cannot see are NaN, and so are the rows of tokens that an autoregressive policy did not read",
        sharded=True,
        optional=True,
        fill_value=NAN,
    ),
    ArraySpec(
        "suffix_attention_mean",
        ("inference", "denoise_step", "all_layer", "head", "key"),
        "float16",
        "suffix attention averaged over the action tokens that are executed (of an autoregressive policy "
        "over the decoded tokens that were read); sums to 1 over key; keys that a layer cannot see are NaN",
        sharded=True,
        optional=True,
        fill_value=NAN,
    ),
    ArraySpec(
        "prefix_attention",
        _PREFIX_MAPS,
        "float16",
        "attention probability among prefix tokens; rows sum to 1, rows of padding queries are 0",
        sharded=True,
        optional=True,
        fill_value=NAN,
    ),
    ArraySpec(
        "vision_attention",
        _VISION_MAPS,
        "float16",
        "attention probability among the patches of a camera's image in the vision tower; rows sum to 1",
        sharded=True,
        optional=True,
        fill_value=NAN,
    ),
    ArraySpec(
        "vlm_neurons",
        ("inference", "vlm_group", "reduction", "vlm_neuron_layer", "vlm_unit"),
        "float16",
        f"language model: {_NEURONS}, {_OF_GROUPS}",
        sharded=True,
        optional=True,
        fill_value=NAN,
    ),
    ArraySpec(
        "expert_neurons",
        ("inference", "denoise_step", "expert_group", "reduction", "expert_neuron_layer", "expert_unit"),
        "float16",
        f"action expert: {_NEURONS}, {_OF_GROUPS}",
        sharded=True,
        optional=True,
        fill_value=NAN,
    ),
    ArraySpec(
        "vlm_residual",
        ("inference", "vlm_group", "reduction", "vlm_residual_layer", "vlm_feature"),
        "float16",
        f"language model: {_RESIDUAL}, {_OF_GROUPS}",
        sharded=True,
        optional=True,
        fill_value=NAN,
    ),
    ArraySpec(
        "expert_residual",
        ("inference", "denoise_step", "expert_group", "reduction", "expert_residual_layer", "expert_feature"),
        "float16",
        f"action expert: {_RESIDUAL}, {_OF_GROUPS}",
        sharded=True,
        optional=True,
        fill_value=NAN,
    ),
    ArraySpec(
        "vlm_neurons_full",
        ("inference", "vlm_neuron_layer", "prefix_query", "vlm_unit"),
        "float16",
        f"language model: {_NEURONS}, of every token; NaN of padding{_BEYOND}",
        sharded=True,
        optional=True,
        fill_value=NAN,
    ),
    ArraySpec(
        "expert_neurons_full",
        ("inference", "denoise_step", "expert_neuron_layer", "query", "expert_unit"),
        "float16",
        f"action expert: {_NEURONS}, of every token{_BEYOND}",
        sharded=True,
        optional=True,
        fill_value=NAN,
    ),
    ArraySpec(
        "vlm_residual_full",
        ("inference", "vlm_residual_layer", "prefix_query", "vlm_feature"),
        "float16",
        f"language model: {_RESIDUAL}, of every token; NaN of padding{_BEYOND}",
        sharded=True,
        optional=True,
        fill_value=NAN,
    ),
    ArraySpec(
        "expert_residual_full",
        ("inference", "denoise_step", "expert_residual_layer", "query", "expert_feature"),
        "float16",
        f"action expert: {_RESIDUAL}, of every token{_BEYOND}",
        sharded=True,
        optional=True,
        fill_value=NAN,
    ),
    ArraySpec(
        "segmentation",
        ("inference", "mask_camera", "mask_y", "mask_x"),
        "int16",
        "instance that each pixel of a camera shows, as an index into `instance`; oriented as the policy "
        "sees the camera, before its letterbox; -1 where nobody knows",
        sharded=True,
        optional=True,
        fill_value=-1,
    ),
    ArraySpec(
        "instance_position",
        ("inference", "instance", "xyz"),
        "float32",
        "where each instance is, in the world's frame; NaN where that is not known",
        units="m",
        optional=True,
        fill_value=NAN,
    ),
    ArraySpec("token_id", ("inference", "text"), "int32", "language token ids that the policy got"),
    ArraySpec("token_text", ("inference", "text"), "string", "decoded piece of each token id", fill_value=""),
    ArraySpec(
        "text_word", ("inference", "text"), "int16", "which word of the task, -1 elsewhere", fill_value=-1
    ),
    ArraySpec(
        "text_state_dim", ("inference", "text"), "int16", "which state dimension, -1 elsewhere", fill_value=-1
    ),
    ArraySpec("key_kind", ("inference", "key"), "int8", "what each key token is", flags=Kind),
    ArraySpec(
        "suffix_token_id",
        ("inference", "query"),
        "int32",
        "token ids that an autoregressive policy decoded, the one that ends them among them; -1 behind it",
        optional=True,
        fill_value=-1,
    ),
    ArraySpec(
        "suffix_token_text",
        ("inference", "query"),
        "string",
        "decoded piece of each of these tokens",
        optional=True,
        fill_value="",
    ),
    ArraySpec(
        "prompt_truncated",
        ("inference",),
        "bool",
        "whether the prompt was longer than the policy's language slots, so that LeRobot cut its end off",
        optional=True,
        fill_value=False,
    ),
    ArraySpec("inference_frame", ("inference",), "int32", "frame at which the policy was asked"),
    ArraySpec(
        "observed_before",
        ("inference",),
        "int32",
        "how many frames before the episode's first one the policy was shown what it answered to "
        "(`inference_frame` is 0 then); 0 where that was a frame of the episode",
        optional=True,
    ),
    ArraySpec(
        "inference_start",
        ("inference",),
        "float64",
        "when the policy was asked, on the clock of `frame_time`",
        units="s",
        optional=True,
        fill_value=NAN,
    ),
    ArraySpec(
        "inference_end",
        ("inference",),
        "float64",
        "when the chunk was there, on the clock of `frame_time`",
        units="s",
        optional=True,
        fill_value=NAN,
    ),
    ArraySpec(
        "inference_delay",
        ("inference",),
        "int32",
        "actions at the beginning of the chunk that were skipped, because the robot had moved on meanwhile",
        optional=True,
    ),
    ArraySpec(
        "action_chunk",
        ("inference", "query", "action_dim"),
        "float32",
        "actions that the inference yielded, one per action token, in the policy's normalised units; NaN "
        "where the token is no action",
        fill_value=NAN,
    ),
    ArraySpec(
        "frame_inference",
        ("frame",),
        "int32",
        "inference whose chunk gave this frame's action; the newest one where no single chunk gave it; in a "
        "replay, the newest one at this frame",
    ),
    ArraySpec(
        "frame_query",
        ("frame",),
        "int32",
        "query (action token) that gave this frame's action; -1 where the action is no token of a chunk; in "
        "a replay, the token that stands for this frame, -1 beyond the chunk's end",
    ),
    ArraySpec(
        "action",
        ("frame", "action_dim"),
        "float32",
        "action sent to the environment, in its own units; in a replay the one that was recorded, NaN where "
        "none was",
        fill_value=NAN,
    ),
    ArraySpec(
        "predicted_action",
        ("frame", "action_dim"),
        "float32",
        "in a replay, the action that the policy predicted for this frame, in the robot's units; NaN beyond "
        "the chunk's end",
        optional=True,
        fill_value=NAN,
    ),
    ArraySpec(
        "action_error",
        ("frame",),
        "float32",
        "mean over action_dim of the absolute difference between predicted and recorded action; NaN where "
        "one of them is missing",
        optional=True,
        fill_value=NAN,
    ),
    ArraySpec(
        "frame_time",
        ("frame",),
        "float64",
        "when this frame's action was sent; 0 is the first frame of the episode",
        units="s",
        optional=True,
        fill_value=NAN,
    ),
    ArraySpec(
        "state",
        ("frame", "state_dim"),
        "float32",
        "robot state that the policy was shown, before normalisation",
        optional=True,
        fill_value=NAN,
    ),
    ArraySpec(
        "reward",
        ("frame",),
        "float32",
        "reward of this frame's action",
        optional=True,
        fill_value=NAN,
    ),
    ArraySpec(
        "success",
        ("frame",),
        "bool",
        "whether the task was solved after this frame's action",
        optional=True,
        fill_value=False,
    ),
    ArraySpec(
        "frame_index",
        ("frame",),
        "int32",
        "number of the frame in the data set's episode, or in the video, that was replayed",
        optional=True,
        coordinate=True,
    ),
    ArraySpec(
        "timestamp",
        ("frame",),
        "float32",
        "time of the frame since its episode began, as the data set says it",
        units="s",
        optional=True,
        coordinate=True,
        fill_value=NAN,
    ),
    ArraySpec(
        "episode_index",
        ("frame",),
        "int32",
        "number of the data set's episode",
        optional=True,
        coordinate=True,
    ),
    ArraySpec(
        "task_index",
        ("frame",),
        "int32",
        "number of the frame's task in the data set",
        optional=True,
        coordinate=True,
    ),
    ArraySpec(
        "flow_time",
        ("denoise_step",),
        "float32",
        "t of the Euler step: 1 is noise, 0 the action; NaN of a policy that does not denoise",
        coordinate=True,
    ),
    ArraySpec("denoise_step", ("denoise_step",), "int32", "denoise step", coordinate=True),
    ArraySpec("layer", ("layer",), "int32", "layer of the action expert", coordinate=True),
    ArraySpec("all_layer", ("all_layer",), "int32", "layer of the action expert", coordinate=True),
    ArraySpec(
        "layer_sees_suffix",
        ("layer",),
        "bool",
        "whether the layer sees the suffix's own keys; without this array every layer does",
        coordinate=True,
    ),
    ArraySpec(
        "all_layer_sees_suffix",
        ("all_layer",),
        "bool",
        "whether the layer sees the suffix's own keys; without this array every layer does",
        coordinate=True,
    ),
    ArraySpec("prefix_layer", ("prefix_layer",), "int32", "layer of the language model", coordinate=True),
    ArraySpec("head", ("head",), "int32", "attention head", coordinate=True),
    ArraySpec(
        "camera",
        ("camera",),
        "string",
        "camera that showed the policy an image",
        coordinate=True,
        fill_value="",
    ),
    ArraySpec("vision_layer", ("vision_layer",), "int32", "layer of the vision tower", coordinate=True),
    ArraySpec(
        "vision_head", ("vision_head",), "int32", "attention head of the vision tower", coordinate=True
    ),
    ArraySpec(
        "patch_row",
        ("patch_key",),
        "int16",
        "row of each patch of the vision tower, 0 is the top of what the policy saw",
        coordinate=True,
    ),
    ArraySpec(
        "patch_column",
        ("patch_key",),
        "int16",
        "column of each patch of the vision tower, 0 is the left of what the policy saw",
        coordinate=True,
    ),
    ArraySpec(
        "vlm_group",
        ("vlm_group",),
        "string",
        "group of prefix tokens: a camera, task, state, template, text or special",
        coordinate=True,
        fill_value="",
    ),
    ArraySpec(
        "expert_group",
        ("expert_group",),
        "string",
        "group of suffix tokens: state or actions",
        coordinate=True,
        fill_value="",
    ),
    ArraySpec(
        "reduction",
        ("reduction",),
        "string",
        "mean or max over the tokens of a group",
        coordinate=True,
        fill_value="",
    ),
    ArraySpec(
        "vlm_neuron_layer",
        ("vlm_neuron_layer",),
        "int32",
        "layer of the language model",
        coordinate=True,
    ),
    ArraySpec(
        "expert_neuron_layer",
        ("expert_neuron_layer",),
        "int32",
        "layer of the action expert",
        coordinate=True,
    ),
    ArraySpec(
        "vlm_residual_layer",
        ("vlm_residual_layer",),
        "int32",
        "layer of the language model",
        coordinate=True,
    ),
    ArraySpec(
        "expert_residual_layer",
        ("expert_residual_layer",),
        "int32",
        "layer of the action expert",
        coordinate=True,
    ),
    ArraySpec(
        "mask_camera",
        ("mask_camera",),
        "string",
        "camera that has instance masks",
        coordinate=True,
        fill_value="",
    ),
    ArraySpec(
        "instance",
        ("instance",),
        "string",
        "name of a thing that a mask can show",
        coordinate=True,
        fill_value="",
    ),
    ArraySpec(
        "instance_role",
        ("instance",),
        "string",
        "its role in the task: target, destination, distractor, robot or background",
        coordinate=True,
        fill_value="",
    ),
    ArraySpec("text_key", ("text",), "int32", "key index of each language slot", coordinate=True),
    ArraySpec(
        "key_camera",
        ("key",),
        "int8",
        "index into the layout's cameras, -1 for tokens that are no image patch",
        coordinate=True,
        fill_value=-1,
    ),
    ArraySpec(
        "key_row",
        ("key",),
        "int16",
        "patch row, 0 is the top of what the policy saw; -1 elsewhere",
        coordinate=True,
        fill_value=-1,
    ),
    ArraySpec(
        "key_column",
        ("key",),
        "int16",
        "patch column, 0 is the left of what the policy saw; -1 elsewhere",
        coordinate=True,
        fill_value=-1,
    ),
    ArraySpec(
        "action_dim",
        ("action_dim",),
        "string",
        "name of the action dimension",
        coordinate=True,
        fill_value="",
    ),
    ArraySpec(
        "state_dim", ("state_dim",), "string", "name of the state dimension", coordinate=True, fill_value=""
    ),
)

BY_NAME: dict[str, ArraySpec] = {spec.name: spec for spec in ARRAYS}


def coordinates_of(layout: TokenLayout) -> dict[str, NDArray[np.integer[Any]]]:
    """Return the fixed arrays that a token layout says: array name → values, in the array's own dtype."""
    rows, columns = layout.key_patch()
    return {
        "text_key": np.arange(layout.language.start, layout.language.stop, dtype=np.int32),
        "key_camera": layout.key_camera(),
        "key_row": rows,
        "key_column": columns,
    }


def coordinates_of_patches(grid: tuple[int, int]) -> dict[str, NDArray[np.integer[Any]]]:
    """Return where the vision tower's patches lie in its grid of (rows, columns): array name → values."""
    rows, columns = np.divmod(np.arange(grid[0] * grid[1]), grid[1])
    return {"patch_row": rows.astype(np.int16), "patch_column": columns.astype(np.int16)}


def coordinates_of_vision(
    grid: tuple[int, int], cameras: Sequence[str], heads: Sequence[int]
) -> dict[str, NDArray[Any]]:
    """Return the fixed arrays of vision maps but for the layers: array name → values.

    Args:
        grid: (rows, columns) of the vision tower's patches.
        cameras: names of those that showed an image.
        heads: labels of the tower's heads.
    """
    return {
        "camera": np.array(cameras, dtype=object),
        "vision_head": np.array(heads, np.int32),
        **coordinates_of_patches(grid),
    }


def coordinates_of_masks(
    cameras: Sequence[str], instances: Sequence[tuple[str, str]]
) -> dict[str, NDArray[Any]]:
    """Return the fixed arrays of instance masks: array name → values.

    Args:
        cameras: names of those that have masks.
        instances: name and role of what a mask can show; the first is the background.
    """
    return {
        "mask_camera": np.array(cameras, dtype=object),
        "instance": np.array([name for name, _ in instances], dtype=object),
        "instance_role": np.array([role for _, role in instances], dtype=object),
    }


def activation_dims(name: str) -> tuple[str, str, str]:
    """Return the dimensions of an array of activations: of groups of tokens, of layers, of units."""
    spec = BY_NAME[name]
    return f"{name.partition('_')[0]}_group", spec.dims[-2], spec.dims[-1]


def coordinates_of_activations(
    groups: Mapping[Any, Sequence[str]], layers: Mapping[str, Sequence[int]], reductions: Sequence[str]
) -> dict[str, NDArray[Any]]:
    """Return the fixed arrays of neurons and residuals: array name → values.

    Args:
        groups: "vlm" and "expert" → names of their groups of tokens, of those that have arrays.
        layers: array, e.g. "vlm_neurons" → its layers.
        reductions: names of the reductions.
    """
    by_layer = {activation_dims(name)[1]: np.array(chosen, np.int32) for name, chosen in layers.items()}
    by_group = {f"{stream}_group": np.array(names, dtype=object) for stream, names in groups.items()}
    return {**by_group, **by_layer, "reduction": np.array(reductions, dtype=object)}


def schema_table() -> str:
    """Return the arrays as a Markdown table, for the README."""
    rows = ["| array | dimensions | dtype | what it holds |", "|---|---|---|---|"]
    for spec in ARRAYS:
        note = spec.description
        if spec.flags is not None:
            note += ": " + ", ".join(f"{int(flag)} {flag.name.lower()}" for flag in spec.flags)
        if spec.optional:
            note += " *(when captured)*"
        rows.append(f"| `{spec.name}` | {', '.join(spec.dims)} | {spec.dtype} | {note} |")
    return "\n".join(rows)
