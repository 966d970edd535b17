/** Which objects a camera shows: their masks, outlines and colours, and how much of a map lies on each. Pure functions. */

import type { CameraMask, Instance, Scene } from "./api";

/** In the order in which they are told; all that no task speaks of is background, which is not outlined. */
export const ROLES = ["target", "destination", "distractor", "robot"] as const;
export type Role = (typeof ROLES)[number];

interface Look {
  colour: string;
  /** Dashes and gaps as multiples of the line's width, so that colour alone need not tell the roles apart. */
  dashes: number[];
}

/** None of the heatmaps' colours, told apart by colour-blind readers too; the figures have the same. */
export const LOOKS: Record<Role, Look> = {
  target: { colour: "#1E9BDC", dashes: [] },
  destination: { colour: "#AA00FF", dashes: [5, 2] },
  distractor: { colour: "#808080", dashes: [1.5, 1.5] },
  robot: { colour: "#C08A4E", dashes: [6, 2, 1.5, 2] },
};

export const isRole = (role: string): role is Role => (ROLES as readonly string[]).includes(role);

/** (height × width), row by row: the instance that each pixel shows, -1 where nobody knows. */
export function decodeMask(runs: readonly number[]): Int16Array {
  let length = 0;
  for (let i = 1; i < runs.length; i += 2) length += runs[i]!;
  const found = new Int16Array(length);
  let start = 0;
  for (let i = 0; i < runs.length; i += 2) {
    found.fill(runs[i]!, start, start + runs[i + 1]!);
    start += runs[i + 1]!;
  }
  return found;
}

/** The instance at a place of a camera's picture, both in shares of its size, 0 to 1. */
export function instanceAt(mask: Int16Array, { width_px, height_px }: Scene, x: number, y: number): number {
  const pixel = (share: number, length: number) =>
    Math.min(Math.max(Math.floor(share * length), 0), length - 1);
  return mask[pixel(y, height_px) * width_px + pixel(x, width_px)] ?? -1;
}

/** Closed lines along the edges of pixels, x and y in turn, in pixels of the mask. */
export type Outline = number[][];

const outlines = new WeakMap<Int16Array, Map<number, Outline>>();

/**
 * The outline of each instance. An object that touches another, or the picture's edge, is bounded there too.
 *
 * @param mask (height × width), row by row
 */
export function outlinesOf(mask: Int16Array, width: number): Map<number, Outline> {
  let found = outlines.get(mask);
  if (!found) {
    found = new Map();
    for (const [instance, edges] of edgesOf(mask, width)) found.set(instance, chained(edges, width + 1));
    outlines.set(mask, found);
  }
  return found;
}

/** Each instance's edges: corner → corners, the instance on the right of each. A corner is y · (width + 1) + x. */
function edgesOf(mask: Int16Array, width: number): Map<number, Map<number, number[]>> {
  const [height, stride] = [mask.length / width, width + 1];
  const found = new Map<number, Map<number, number[]>>();
  const add = (instance: number, from: number, to: number) => {
    let edges = found.get(instance);
    if (!edges) found.set(instance, (edges = new Map()));
    const known = edges.get(from);
    if (known) known.push(to);
    else edges.set(from, [to]);
  };
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      const place = y * width + x;
      const instance = mask[place]!;
      if (instance < 0) continue;
      const corner = y * stride + x; // its top left one
      if (y === 0 || mask[place - width] !== instance) add(instance, corner, corner + 1);
      if (x === width - 1 || mask[place + 1] !== instance) add(instance, corner + 1, corner + stride + 1);
      if (y === height - 1 || mask[place + width] !== instance)
        add(instance, corner + stride + 1, corner + stride);
      if (x === 0 || mask[place - 1] !== instance) add(instance, corner + stride, corner);
    }
  }
  return found;
}

/** Join edges to closed lines, of which only the corners stay where the direction changes. */
function chained(edges: Map<number, number[]>, stride: number): Outline {
  const found: Outline = [];
  for (const first of edges.keys()) {
    while (edges.get(first)!.length) {
      const line: number[] = [];
      let [corner, direction] = [first, 0];
      do {
        const next = edges.get(corner)!.pop()!;
        if (next - corner !== direction) line.push(corner % stride, Math.floor(corner / stride));
        direction = next - corner;
        corner = next;
      } while (corner !== first);
      found.push(line);
    }
  }
  return found;
}

/** How much of a camera's map lies on something; `analysis.grounding` has the same numbers. */
export interface Lying {
  /** Of the attention on the patches that show the image; NaN where the map is missing or none falls on them. */
  share: number;
  /** What a uniform map would have: the share of the image's area. 0 where it is not in view. */
  chance: number;
}

/**
 * @param values (row × column) patches of a camera's map, in any unit
 * @param instances what is asked about, together
 */
export function lyingOn(values: Float32Array, mask: CameraMask, instances: readonly number[]): Lying {
  let [total, inside, area] = [0, 0, 0];
  for (const value of values) total += value;
  for (const patch of mask.hidden) total -= values[patch]!;
  for (const number of instances) {
    area += mask.area[number] ?? 0;
    const [patches, shares] = mask.coverage[number] ?? [[], []];
    patches.forEach((patch, i) => (inside += values[patch]! * shares[i]!));
  }
  return { share: total > 0 ? inside / total : NaN, chance: area };
}

/** Numbers of the instances that have a role. */
export function ofRole(instances: readonly Instance[], role: string): number[] {
  return instances.flatMap((instance, number) => (instance.role === role ? [number] : []));
}

/** The roles of a scene that are told. */
export function rolesOf({ instances }: Scene): Role[] {
  return ROLES.filter((role) => instances.some((instance) => instance.role === role));
}

/** Whether anything of a mask is known at all. */
export const isKnown = ({ runs }: CameraMask) => runs.some((value, i) => i % 2 === 0 && value >= 0);

/** How many times as much as by chance: "3.2 ×"; nothing where there is no chance. */
export function timesChance({ share, chance }: Lying): string {
  if (!(chance > 0) || Number.isNaN(share)) return "";
  const ratio = share / chance;
  return `${ratio.toFixed(ratio >= 10 ? 0 : ratio >= 1 ? 1 : 2)} ×`;
}
