/** What the explorer's server answers. docs/explorer-api.md says the same for people. */

export interface Geometry {
  height_px: number;
  width_px: number;
  resized_height_px: number;
  resized_width_px: number;
  pad_top_px: number;
  pad_left_px: number;
  input_height_px: number;
  input_width_px: number;
  grid_rows: number;
  grid_columns: number;
}

export interface Segment {
  kind: "image" | "language" | "state" | "action" | "special" | "padding";
  name: string;
  start: number;
  stop: number;
}

export interface Camera {
  name: string;
  label: string;
  /** null for an empty camera, whose tokens are masked. */
  geometry: Geometry | null;
  has_video: boolean;
  /** While the video is written: the only frame of which there is a picture. */
  still?: number | null;
  /** Whether the video is a file of its own, which can be handed out; otherwise it is a part of a data set's. */
  has_file: boolean;
  /** Changes with the video's file. */
  video_version: string | null;
}

export interface Instance {
  name: string;
  role: string;
}

/** What masks show: their numbers' meaning, and which cameras have masks, by full name. */
export interface Scene {
  /** The first is the background. */
  instances: Instance[];
  cameras: string[];
  /** Of a mask, whatever the size of its camera. */
  height_px: number;
  width_px: number;
}

/** Patches, row by row in the grid, and which share of what each of them shows something takes. */
export type Coverage = [patches: number[], shares: number[]];

export interface CameraMask {
  /** Row by row: instance, length, instance, length …; -1 where nobody knows. */
  runs: number[];
  /** By the instance's number, of those in view: its share of the image's area. */
  area: Record<number, number>;
  /** Likewise. */
  coverage: Record<number, Coverage>;
  /** Patches that show nothing of the image, or nothing that is known. */
  hidden: number[];
}

/** What the cameras showed at an inference, by full name. */
export interface Masks {
  cameras: Record<string, CameraMask>;
}

/** How much of one camera's attention lies on the objects of each role. */
export interface RoleShares {
  /** Number of the first inference. */
  first: number;
  camera: string;
  roles: string[];
  /** (inference, role); null where nothing of it is in view too. */
  share: (number | null)[][];
  /** Likewise, of a uniform map: the share of the image's area. */
  chance: (number | null)[][];
}

/** One neuron of a feed-forward network: its layer, and its number in the layer. */
export type Neuron = [layer: number, unit: number];

/** What was recorded of one stream's neurons. */
export interface NeuronStream {
  /** Of tokens: cameras by full name, then "task", "state" …; or, of the expert, "actions". */
  groups: string[];
  /** Over a group's tokens. */
  reductions: string[];
  layers: number[];
  /** Of one layer. */
  n_units: number;
  /** Whether there is one activation a denoise step. */
  per_step: boolean;
}

export interface Neurons {
  /** "vlm", "expert" */
  streams: Record<string, NeuronStream>;
  /** Sets that somebody found, and the one that the episode's condition fires. */
  sets: {
    kind: "found" | "fired";
    name: string;
    /** By stream; those that were recorded. */
    units: Record<string, Neuron[]>;
    n_left_out: number;
  }[];
}

/** How active neurons are, in the policy's own units; null where an inference has no such tokens, or is damaged. */
export interface Activations {
  /** Number of the first inference. */
  first: number;
  stream: string;
  units: Neuron[];
  group: string;
  reduction: string;
  /** null of a stream that runs once an inference. */
  denoise_step: number | null;
  /** (inference) over the neurons. */
  mean: (number | null)[];
  /** Likewise, of all neurons of the same layers: what as many drawn at random would have on average. */
  expected: (number | null)[];
  /** (inference, neuron), if it was asked for. */
  each: (number | null)[][] | null;
}

export interface EpisodeRow {
  id: string;
  version: string;
  task_group: string | null;
  task_id: number | null;
  episode: number | null;
  task: string;
  success: boolean | null;
  complete: boolean;
  n_frames: number;
  n_inferences: number;
  random_weights: boolean;
  policy_remark: string;
  /** What was done to the policy, a line; "" where nothing was. */
  condition: string;
  /** Of the condition; "baseline" where nothing was done. */
  condition_name: string;
  stored_bytes: number;
  /** A camera with a video, for the thumbnail. */
  camera: string | null;
}

export const OUTCOMES = ["success", "failure", "incomplete", "unknown"] as const;
export type Outcome = (typeof OUTCOMES)[number];

/** Which episodes are wanted, and which part of them. What is not said is not asked for: all, from the first. */
export interface Wanted {
  /** Words, all of which are in an episode's name, task, condition, id or outcome. */
  find?: string | undefined;
  outcome?: Outcome | undefined;
  task?: string | undefined;
  /** Its name. */
  condition?: string | undefined;
  /** A column, with "-" before it from the largest down. */
  sort?: string | undefined;
  offset?: number | undefined;
  limit?: number | undefined;
  /** Id of the episode that the part begins with, if it is among them; goes before the offset. */
  first?: string | undefined;
}

/** A value of a column, and how many episodes have it. */
export interface Named {
  name: string;
  n: number;
}

export interface Run {
  name: string;
  /** Whether the server was given one episode rather than a folder of them. */
  is_episode: boolean;
  /** Those that were asked for. */
  episodes: EpisodeRow[];
  /** Number of the first of them, from 0, among the `n_found` that fit. */
  offset: number;
  n_found: number;
  /** Of the whole run, as all that follows. */
  n_episodes: number;
  outcomes: Record<Outcome, number>;
  tasks: Named[];
  conditions: Named[];
  /** Whether anything was done to the policy in any of them. */
  is_changed: boolean;
  random_weights: boolean;
  policy_remarks: string[];
  /** Why other stores cannot be opened, a line each, of the first ones. */
  damaged: string[];
  n_damaged: number;
  /** Stores that the server has not looked into yet; events bring them. */
  n_unread: number;
}

export interface Facts {
  version: string;
  task: string;
  task_group: string | null;
  task_id: number | null;
  episode: number | null;
  seed: number | null;
  success: boolean | null;
  complete: boolean;
  random_weights: boolean;
  policy_remark: string;
  /** What was done to the policy, a line; "" where nothing was. */
  condition: string;
  /** Of the condition; "baseline" where nothing was done. */
  condition_name: string;
  policy: string | null;
  n_frames: number;
  n_inferences: number;
  n_layers: number | null;
  n_heads: number | null;
  n_queries: number;
  n_keys: number;
  /** Keys of the prefix; the key of a suffix query is `prefix_len` plus its number. */
  prefix_len: number;
  /** Whether the suffix is made of decoded tokens, none of which is an action of its own. */
  decodes?: boolean;
  first_action_query: number;
  /** First suffix query that is an action, and the one after the last; a state token may come before. */
  action_queries: [number, number];
  /** Whether recorded observations were shown to the policy: then none of its actions was executed. */
  replay?: boolean;
  /** null where it is not known which are executed. */
  executed_queries: [number, number] | null;
  /** Layers whose means over the executed actions can be shown: stored ones, and those of full maps. */
  mean_layers: number[];
  /** Layer that is shown unless another is chosen; null: the last. */
  shown_layer: number | null;
  /** Layers whose full maps are stored. */
  layers: number[];
  prefix_layers: number[];
  /** Layers that cannot see the suffix: its keys are NaN in their maps, which is neither 0 nor missing. */
  prefix_only_layers: number[];
  heads: number[];
  denoise_steps: number[];
  /** Of each denoise step; null where the policy does not denoise. */
  flow_time: (number | null)[];
  state_dims: string[];
  action_dims: string[];
  segments: Segment[];
  cameras: Camera[];
  /** null where the recording has no masks of what its cameras showed. */
  scene?: Scene | null;
  /** null where the recording has none. */
  neurons?: Neurons | null;
  /** Full name of a camera → why its video could not be written. */
  video_errors: Record<string, string>;
  /** Whether the policy cut a prompt because it did not fit. */
  prompt_truncated: boolean;
  /** Name of a kind → its value in `Tokens.key_kind`. */
  kinds: Record<string, number>;
  fps: number;
  /** Of an exported page alone: what it holds of the recording, in a sentence. */
  excerpt?: string;
  /** Of an exported page alone: the frames that it holds, ascending, where these are not all. */
  frames?: number[];
}

export interface TokenGroup {
  kind: "task" | "state" | "template" | "text" | "special";
  /** Which word of the task, or which dimension of the state. */
  ordinal: number;
  label: string;
}

export interface Tokens {
  text: string[];
  id: number[];
  /** Key of each language slot. */
  key: number[];
  /** Kind of each key. */
  key_kind: number[];
  /** Group of each key, -1 for none. */
  group_of_key: number[];
  groups: TokenGroup[];
  /** Whether the policy cut this inference's prompt because it did not fit. */
  prompt_truncated: boolean;
}

export interface Timeline {
  inference_frame: number[];
  frame_inference: number[];
  /** (frame) Suffix query of the executed action; -1 where it is no token of an inference's chunk. */
  frame_query: number[];
  /** null where the recording has none, as for `success` and `state`. */
  reward: (number | null)[] | null;
  success: boolean[] | null;
  /** As it was executed; in a replay, as it was recorded. */
  action: (number | null)[][];
  /** (frame, action_dim) What the policy predicted for each frame, in a replay; null elsewhere. */
  predicted_action?: (number | null)[][] | null;
  state: (number | null)[][] | null;
}

export interface Shares {
  /** Number of the first inference. */
  first: number;
  /** Cameras by full name, then task, state, template, text, special, actions, padding. */
  modalities: string[];
  /** (inference, modality) */
  share: (number | null)[][];
  /** (inference): 2^entropy over all keys. */
  effective_tokens: (number | null)[];
}

export interface ActionChunk {
  /** (query, action_dim), in the policy's normalised units. */
  action: (number | null)[][];
}

/** (layer + mean) × (head + mean + max), in the order of the labels: where the episode's colour range ends. */
export interface Ranges {
  layers: (number | "mean")[];
  heads: (number | "mean" | "max")[];
  /** Full name of a camera → (layer, head). */
  ranges: Record<string, number[][]>;
}

/** Ranges of every denoise step, in the order of the facts: (denoise step, layer, head) of each camera. */
export interface AllRanges extends Pick<Ranges, "layers" | "heads"> {
  denoise_steps: number[];
  ranges: Record<string, number[][][]>;
}

/** The share of attention on something, in two groups of episodes; null where there is none. */
export interface GroupRow {
  label: string;
  success: number | null;
  failure: number | null;
  difference: number | null;
  /** Ends of the difference's interval; with fewer than two episodes a group there is none. */
  low: number | null;
  high: number | null;
}

export interface Groups {
  n_success: number;
  n_failure: number;
  what: string;
  /** Episodes that cannot be read, and why, a line each. */
  left_out: string[];
  rows: GroupRow[];
}

/** A block of numbers of attention, C order. */
export interface Slab {
  shape: number[];
  values: Float32Array;
}

export interface Changes {
  changed: EpisodeRow[];
  /** Ids of those that were there before. */
  grown: string[];
  removed: string[];
  damaged: string[];
  n_damaged: number;
  n_unread: number;
}

export type Choice = number | "mean";
export type HeadChoice = number | "mean" | "max";

/** An answer that is no answer; its message is for people. */
export class ApiError extends Error {
  constructor(
    readonly status: number,
    message: string,
  ) {
    super(message);
  }
}
