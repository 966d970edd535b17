/**
 * Attention by numbers: which map, in which unit, over which range. Pure functions.
 *
 * A map that is NaN at every key is missing. One that is NaN at some keys belongs to a layer that cannot see them:
 * they are absent, which is neither 0 nor missing. `tests/means.json` holds these rules to the package's own.
 */

import type { Choice, HeadChoice, Segment, Slab } from "./api";

export const NORMALISATIONS = ["share", "image", "frame", "episode"] as const;
export type Normalisation = (typeof NORMALISATIONS)[number];

/** Where the colour range ends: this percentile of the patches, as in the package's figures. */
export const CLIP = 99.9;

/** Layers of a slab, by their places, that cannot see the keys from one on. */
export interface Blind {
  layers: readonly number[];
  from: number;
}

/**
 * One map of means. A mean over layers takes for each key those that can see it; a missing map makes it missing.
 *
 * @param slab (layer, head, key)
 * @param layer index, or the mean of all; taken first
 * @param head index, or the mean or largest of all
 * @param blind layers that cannot see the suffix, if there are any
 * @returns (key), of one layer and head a part of the slab itself
 */
export function pick(slab: Slab, layer: Choice, head: HeadChoice, blind?: Blind): Float32Array {
  const [nLayers, nHeads, nKeys] = slab.shape as [number, number, number];
  if (typeof layer === "number" && typeof head === "number") {
    const start = (layer * nHeads + head) * nKeys;
    return slab.values.subarray(start, start + nKeys);
  }
  const layers = layer === "mean" ? range(nLayers) : [layer];
  const heads = typeof head === "string" ? range(nHeads) : [head];
  const blindLayers = blind ? layers.filter((l) => blind.layers.includes(l)) : [];
  const nSeeing = layers.length - blindLayers.length;
  // Of layers that all are blind the keys stay NaN, as they are.
  const stop = blind && blindLayers.length && nSeeing ? Math.min(blind.from, nKeys) : nKeys;
  const found = new Float32Array(nKeys);
  const perHead = new Float32Array(nKeys);
  heads.forEach((h, place) => {
    perHead.fill(0);
    for (const l of layers) {
      const start = (l * nHeads + h) * nKeys;
      const isBlind = stop < nKeys && blindLayers.includes(l);
      for (let key = 0; key < (isBlind ? stop : nKeys); key++) perHead[key]! += slab.values[start + key]!;
      // A blind layer's map that is missing as a whole is missing at the keys that it cannot see as well.
      if (isBlind && Number.isNaN(slab.values[start]!)) perHead.fill(NaN, stop);
    }
    for (let key = 0; key < nKeys; key++) {
      const value = perHead[key]! / (key < stop ? layers.length : nSeeing);
      if (head !== "max") found[key]! += value / heads.length;
      else if (place === 0 || value > found[key]! || Number.isNaN(value)) found[key] = value;
    }
  });
  return found;
}

/** One action token's row of a full map, (head, query, key), as a slab of one layer: (1, head, key). */
export function rowOf(map: Slab, query: number): Slab {
  const [nHeads, nQueries, nKeys] = map.shape as [number, number, number];
  const values = new Float32Array(nHeads * nKeys);
  for (let head = 0; head < nHeads; head++) {
    const start = (head * nQueries + query) * nKeys;
    values.set(map.values.subarray(start, start + nKeys), head * nKeys);
  }
  return { shape: [1, nHeads, nKeys], values };
}

/** What each action token gives to one key: (query) of a full map, (head, query, key). */
export function columnOf(map: Slab, key: number, head: HeadChoice): Float32Array {
  const [nHeads, nQueries, nKeys] = map.shape as [number, number, number];
  const found = new Float32Array(nQueries);
  const heads = typeof head === "string" ? range(nHeads) : [head];
  for (let query = 0; query < nQueries; query++) {
    const values = heads.map((h) => map.values[(h * nQueries + query) * nKeys + key]!);
    found[query] = head === "max" ? Math.max(...values) : sum(values) / values.length;
  }
  return found;
}

/** The patches of a camera in the unit of a normalisation; without attention they stay 0. */
export function patches(
  attention: Float32Array,
  segment: Segment,
  normalisation: Normalisation,
): Float32Array {
  const found = attention.slice(segment.start, segment.stop);
  if (normalisation === "image") scale(found, sum(found));
  else if (normalisation === "frame") scale(found, largest(found));
  return found;
}

/**
 * Where the colour range of maps that are shown together ends.
 *
 * @param shown patches of every camera, in the unit of the normalisation
 * @param ofEpisode for "episode": of each camera, from the server
 */
export function rangeEnd(
  shown: Float32Array[],
  normalisation: Normalisation,
  ofEpisode: number[] = [],
): number {
  if (normalisation === "frame") return 1;
  const wanted = normalisation === "episode" ? Math.max(0, ...ofEpisode) : percentile(shown, CLIP);
  return wanted > 0 ? wanted : percentile(shown, 100);
}

/**
 * A percentile, 0 to 100, of the numbers that are there, between neighbours as NumPy has it; 0 of none. Quick for
 * those near 100, for which it keeps the largest numbers alone.
 */
export function percentile(arrays: Float32Array[], percent: number): number {
  let n = 0;
  for (const array of arrays) for (const value of array) if (Number.isFinite(value)) n++;
  if (!n) return 0;
  const position = ((n - 1) * percent) / 100;
  const low = Math.floor(position);
  const largest = new Float32Array(n - low).fill(-Infinity); // ascending
  for (const array of arrays) {
    for (const value of array) {
      if (!Number.isFinite(value) || value <= largest[0]!) continue;
      let place = 1;
      for (; place < largest.length && largest[place]! < value; place++) largest[place - 1] = largest[place]!;
      largest[place - 1] = value;
    }
  }
  const [a, b] = [largest[0]!, largest[Math.min(1, largest.length - 1)]!];
  return a + (b - a) * (position - low);
}

/** Sum over the keys of each group that exist; -1 is no group. NaN where the map is missing or none of them exists. */
export function sumByGroup(
  attention: Float32Array,
  groupOfKey: ArrayLike<number>,
  nGroups: number,
): Float32Array {
  const found = new Float32Array(nGroups);
  const [seen, absent] = [new Uint8Array(nGroups), new Uint8Array(nGroups)];
  for (let key = 0; key < attention.length; key++) {
    const group = groupOfKey[key]!;
    if (group < 0) continue;
    if (Number.isNaN(attention[key]!)) {
      absent[group] = 1;
    } else {
      seen[group] = 1;
      found[group]! += attention[key]!;
    }
  }
  for (let group = 0; group < nGroups; group++) if (absent[group] && !seen[group]) found[group] = NaN;
  return found;
}

/** 2^entropy over the keys that exist: how many the attention is worth; null where it is all 0 or missing. */
export function effectiveNumber(attention: Float32Array): number | null {
  let total = 0;
  for (const value of attention) if (value > 0) total += value;
  if (!(total > 0)) return null;
  let entropy = 0;
  for (const value of attention) if (value > 0) entropy -= (value / total) * Math.log2(value / total);
  return 2 ** entropy;
}

export function sum(values: ArrayLike<number>): number {
  let total = 0;
  for (let i = 0; i < values.length; i++) total += values[i]!;
  return total;
}

export function isMissing(attention: Float32Array): boolean {
  return Number.isNaN(sum(attention));
}

function largest(values: Float32Array): number {
  let found = -Infinity;
  for (const value of values) {
    if (Number.isNaN(value)) return NaN;
    if (value > found) found = value;
  }
  return found;
}

function scale(values: Float32Array, by: number): void {
  if (by !== 0) for (let i = 0; i < values.length; i++) values[i]! /= by;
}

function range(n: number): number[] {
  return Array.from({ length: n }, (_, i) => i);
}

/** What is said of a share that a layer cannot have. */
export const UNSEEN = "not visible to this layer";

/** A share of a map in words; NaN is a key that its layer cannot see, or the whole map is missing. */
export function shareOf(attention: Float32Array, share: number): string {
  return Number.isNaN(share) && attention.some((value) => !Number.isNaN(value)) ? UNSEEN : percent(share);
}

/** A share in words: per cent with two digits that count. */
export function percent(share: number | null | undefined): string {
  if (share === null || share === undefined || Number.isNaN(share)) return "missing";
  const value = share * 100;
  if (value !== 0 && Math.abs(value) < 0.01) return "< 0.01 %";
  return `${value.toFixed(Math.abs(value) >= 10 ? 0 : Math.abs(value) >= 1 ? 1 : 2)} %`;
}
