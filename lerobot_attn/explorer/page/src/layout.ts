/** Which key is what, and where a patch lies on its camera's own pixels. */

import type { Camera, Facts, Geometry, Segment } from "./api";
import type { Blind } from "./heat";

export interface CameraView {
  camera: Camera;
  geometry: Geometry;
  segment: Segment;
}

/** The cameras that showed an image, each with its keys. */
export function cameraViews(facts: Facts): CameraView[] {
  const segments = facts.segments.filter((segment) => segment.kind === "image");
  return facts.cameras.flatMap((camera, index) => {
    const segment = segments[index];
    return camera.geometry && segment ? [{ camera, geometry: camera.geometry, segment }] : [];
  });
}

/**
 * The patch of each pixel along one axis: the one that holds the pixel's centre, once the policy's resize and
 * padding are undone.
 */
function patchesOfAxis(
  pixels: number,
  pad: number,
  resized: number,
  whole: number,
  patches: number,
): Uint16Array {
  const found = new Uint16Array(pixels);
  for (let pixel = 0; pixel < pixels; pixel++) {
    const position = ((pad + ((pixel + 0.5) * resized) / pixels) * patches) / whole;
    const isCut = pad < 0 && (position < 0 || position >= patches);
    found[pixel] = isCut ? patches : Math.min(Math.max(Math.trunc(position), 0), patches - 1);
  }
  return found;
}

export interface PixelMap {
  width: number;
  height: number;
  /** Patch row of each pixel row. */
  rows: Uint16Array;
  /** Patch column of each pixel column. */
  columns: Uint16Array;
}

const maps = new WeakMap<Geometry, PixelMap>();

/** Where each pixel of the camera's image finds its patch: one behind the last where the policy saw nothing. */
export function pixelMap(geometry: Geometry): PixelMap {
  let map = maps.get(geometry);
  if (!map) {
    const g = geometry;
    map = {
      width: g.width_px,
      height: g.height_px,
      rows: patchesOfAxis(g.height_px, g.pad_top_px, g.resized_height_px, g.input_height_px, g.grid_rows),
      columns: patchesOfAxis(g.width_px, g.pad_left_px, g.resized_width_px, g.input_width_px, g.grid_columns),
    };
    maps.set(geometry, map);
  }
  return map;
}

/** Whether a patch shows a part of the image, rather than padding alone: (row, column), row by row. */
export function visiblePatches(geometry: Geometry): boolean[] {
  const g = geometry;
  const axis = (pad: number, resized: number, whole: number, patches: number) =>
    Array.from({ length: patches }, (_, i) => {
      const [start, stop] = [(i * whole) / patches, ((i + 1) * whole) / patches];
      return stop > pad && start < pad + resized;
    });
  const rows = axis(g.pad_top_px, g.resized_height_px, g.input_height_px, g.grid_rows);
  const columns = axis(g.pad_left_px, g.resized_width_px, g.input_width_px, g.grid_columns);
  return rows.flatMap((row) => columns.map((column) => row && column));
}

/** Whether the policy has tokens for words at all: one that lacks them (ACT) is told nothing. */
export function takesInstruction(facts: Pick<Facts, "segments">): boolean {
  return facts.segments.some((segment) => segment.kind === "language");
}

/** Whether the policy denoises; one that does not has a single step without a flow time. */
export function denoises(facts: Pick<Facts, "flow_time">): boolean {
  return facts.flow_time.some((time) => time !== null);
}

/** Number of the action in its chunk that a suffix query is; a state token may come before the actions. */
export function actionOfQuery(facts: Pick<Facts, "action_queries">, query: number): number {
  return query - facts.action_queries[0];
}

/** Suffix query of an action of the chunk; null where there is no such action. */
export function queryOfAction(facts: Pick<Facts, "action_queries">, action: number): number | null {
  const [start, stop] = facts.action_queries;
  return action >= 0 && start + action < stop ? start + action : null;
}

export function countActions({ action_queries: [start, stop] }: Pick<Facts, "action_queries">): number {
  return stop - start;
}

/** The layers of a slab of means that cannot see the suffix; none where all can. */
export function blindOf(facts: Facts): Blind | undefined {
  const layers = facts.mean_layers.flatMap((label, place) =>
    facts.prefix_only_layers.includes(label) ? [place] : [],
  );
  return layers.length ? { layers, from: facts.prefix_len } : undefined;
}

/** The short name of a modality: a camera's label, or the word itself. */
export function modalityLabel(facts: Facts, modality: string): string {
  return facts.cameras.find((camera) => camera.name === modality)?.label ?? modality;
}

const CAMERA_COLOURS = ["#0072B2", "#56B4E9", "#004466", "#99D0F0"];
const COLOURS: Record<string, string> = {
  task: "#E69F00",
  state: "#009E73",
  template: "#999999",
  text: "#CC79A7",
  special: "#666666",
  actions: "#D55E00",
  "decoded tokens": "#D55E00",
  padding: "#DDDDDD",
};

/** Okabe and Ito's colours, which colour-blind readers tell apart; the figures have the same. */
export function modalityColour(facts: Facts, modality: string): string {
  const camera = cameraViews(facts).findIndex((view) => view.camera.name === modality);
  return camera >= 0 ? CAMERA_COLOURS[camera % CAMERA_COLOURS.length]! : (COLOURS[modality] ?? "#DDDDDD");
}

/** The modality of a kind of key: a policy that decodes its suffix has no token that is an action. */
function modalityOf(kind: string, { decodes }: Pick<Facts, "decodes">): string {
  return kind !== "action" ? kind : decodes ? "decoded tokens" : "actions";
}

/** Each key's modality: an index into `modalities`, -1 for none. */
export function modalityOfKey(facts: Facts, keyKind: number[], modalities: string[]): Int16Array {
  const nameOf = new Map(
    Object.entries(facts.kinds).map(([name, value]) => [value, modalityOf(name, facts)]),
  );
  const found = new Int16Array(facts.n_keys).fill(-1);
  keyKind.forEach((kind, key) => (found[key] = modalities.indexOf(nameOf.get(kind) ?? "")));
  for (const { camera, segment } of cameraViews(facts)) {
    const index = modalities.indexOf(camera.name);
    for (let key = segment.start; key < segment.stop; key++) {
      if (keyKind[key] === facts.kinds["image"]) found[key] = index;
    }
  }
  return found;
}

/** The modalities of an episode, in the order of the figures. */
export function modalitiesOf(facts: Facts, keyKind: number[]): string[] {
  const present = new Set(keyKind);
  const rest = ["task", "state", "template", "text", "special", "action", "padding"].filter((name) =>
    present.has(facts.kinds[name]!),
  );
  return [
    ...cameraViews(facts).map((view) => view.camera.name),
    ...rest.map((name) => modalityOf(name, facts)),
  ];
}
