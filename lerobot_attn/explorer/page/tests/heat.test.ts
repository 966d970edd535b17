import { describe, expect, it } from "vitest";
import type { Choice, HeadChoice, Segment, Slab } from "../src/api";
import {
  columnOf,
  effectiveNumber,
  isMissing,
  patches,
  percent,
  percentile,
  pick,
  rangeEnd,
  rowOf,
  shareOf,
  sumByGroup,
} from "../src/heat";
import means from "./means.json";

const floats = (...values: number[]) => Float32Array.from(values);

/** (layer 2, head 2, key 3) */
const slab: Slab = {
  shape: [2, 2, 3],
  values: floats(...[1, 2, 3], ...[4, 5, 6], ...[9, 0, 1], ...[0, 9, 2]),
};
const missing: Slab = { shape: slab.shape, values: slab.values.slice() };
missing.values.fill(NaN, 6, 9); // layer 1, head 0

/** (head 2, query 2, key 3) */
const map: Slab = {
  shape: [2, 2, 3],
  values: floats(...[1, 2, 3], ...[4, 5, 6], ...[7, 8, 9], ...[0, 1, 2]),
};

describe("pick", () => {
  it.each([
    [0, 0, [1, 2, 3]],
    [1, 1, [0, 9, 2]],
    [0, "mean", [2.5, 3.5, 4.5]],
    [1, "max", [9, 9, 2]],
    ["mean", 0, [5, 1, 2]],
    ["mean", 1, [2, 7, 4]],
    ["mean", "mean", [3.5, 4, 3]],
    // Layers are averaged before the largest head is taken: the largest of each layer would give 6.5, 7, 4.
    ["mean", "max", [5, 7, 4]],
  ] as const)("layer %s, head %s", (layer, head, expected) => {
    expect([...pick(slab, layer, head)]).toEqual([...expected]);
  });

  it.each([
    [1, 0],
    ["mean", 0],
    [1, "mean"],
    [1, "max"],
    ["mean", "mean"],
    ["mean", "max"],
  ] as const)("a missing map makes layer %s, head %s missing", (layer, head) => {
    expect([...pick(missing, layer, head)]).toEqual([NaN, NaN, NaN]);
  });

  it("a missing map leaves others alone", () => {
    expect([...pick(missing, 0, "max")]).toEqual([4, 5, 6]);
    expect([...pick(missing, "mean", 1)]).toEqual([2, 7, 4]);
  });

  it("the largest head is that of negative numbers too", () => {
    expect([...pick({ shape: [1, 2, 2], values: floats(-3, -1, -2, -5) }, 0, "max")]).toEqual([-2, -1]);
  });
});

describe("the package's own means", () => {
  it.each(means)("$name, layer $layer, head $head", ({ shape, values, blind, from, layer, head, mean }) => {
    const slab = { shape, values: Float32Array.from(values, (value) => value ?? NaN) };
    const found = pick(
      slab,
      layer as Choice,
      head as HeadChoice,
      blind.length ? { layers: blind, from } : undefined,
    );
    const expected = mean.map((value) => value ?? NaN);
    expect([...found].map(Number.isNaN)).toEqual(expected.map(Number.isNaN));
    found.forEach((value, key) => {
      if (!Number.isNaN(value)) expect(value).toBeCloseTo(expected[key]!, 6);
    });
  });
});

describe("a full map", () => {
  it("gives an action token's row as a slab of one layer", () => {
    const row = rowOf(map, 1);
    expect(row.shape).toEqual([1, 2, 3]);
    expect([...row.values]).toEqual([4, 5, 6, 0, 1, 2]);
  });

  it("gives what each token gives a key", () => {
    expect([...columnOf(map, 2, 0)]).toEqual([3, 6]);
    expect([...columnOf(map, 2, "mean")]).toEqual([6, 4]);
    expect([...columnOf(map, 0, "max")]).toEqual([7, 4]);
  });
});

describe("units", () => {
  const segment: Segment = { kind: "image", name: "camera", start: 1, stop: 4 };
  const attention = floats(0.5, 0.125, 0.25, 0.125, 0);

  it("normalises a camera's patches, and leaves the attention as it is", () => {
    expect([...patches(attention, segment, "share")]).toEqual([0.125, 0.25, 0.125]);
    expect([...patches(attention, segment, "episode")]).toEqual([0.125, 0.25, 0.125]);
    expect([...patches(attention, segment, "image")]).toEqual([0.25, 0.5, 0.25]);
    expect([...patches(attention, segment, "frame")]).toEqual([0.5, 1, 0.5]);
    expect([...attention]).toEqual([0.5, 0.125, 0.25, 0.125, 0]);
  });

  it.each(["image", "frame"] as const)("keeps 0 where there is no attention: %s", (normalisation) => {
    expect([...patches(new Float32Array(5), segment, normalisation)]).toEqual([0, 0, 0]);
  });

  it.each(["share", "image", "frame"] as const)("a missing map stays missing: %s", (normalisation) => {
    const found = patches(floats(0, NaN, 1, 1, 0), segment, normalisation);
    expect(found[0]).toBeNaN();
    expect(isMissing(found)).toBe(true);
    expect(isMissing(floats(0, 1))).toBe(false);
  });

  it("ends the colours where the package does", () => {
    const shown = [floats(0, 0.25), floats(0.5, 1)];
    expect(rangeEnd(shown, "frame")).toBe(1);
    expect(rangeEnd(shown, "share")).toBeCloseTo(0.5 + 0.5 * 0.997, 6);
    expect(rangeEnd(shown, "episode", [0.125, 0.75])).toBe(0.75);
    // Until the episode's range is here, and where it is 0, that of what is shown.
    expect(rangeEnd(shown, "episode", [])).toBe(1);
    expect(rangeEnd(shown, "episode", [0, 0])).toBe(1);
    expect(rangeEnd([floats(NaN)], "share")).toBe(0);
  });

  it.each([
    [0, 0.03125],
    [25, 0.0546875],
    [50, 0.109375],
    [99.9, 0.28059375],
    [100, 0.28125],
  ])("the %s th percentile is NumPy's", (percent_, expected) => {
    const values = [3, 1, 4, 1, 5, 9, 2, 6].map((value) => value / 32);
    expect(percentile([floats(...values)], percent_)).toBeCloseTo(expected, 7);
    // In pieces, and with missing values among them, it is the same.
    const pieces = [floats(NaN, ...values.slice(0, 3)), floats(), floats(...values.slice(3), NaN)];
    expect(percentile(pieces, percent_)).toBeCloseTo(expected, 7);
  });

  it("the percentile of nothing is 0", () => {
    expect(percentile([], 50)).toBe(0);
    expect(percentile([floats(NaN, NaN)], 50)).toBe(0);
  });
});

describe("sums", () => {
  it("adds the keys of each group, and none of -1", () => {
    expect([...sumByGroup(floats(1, 2, 4, 8), [1, -1, 0, 1], 3)]).toEqual([4, 9, 0]);
  });

  it("adds the keys that a layer sees, and tells what it cannot see from what is missing", () => {
    const [seen, blind] = [floats(1, 2, NaN, NaN), floats(NaN, NaN, NaN, NaN)];
    expect([...sumByGroup(seen, [0, 0, 0, 1], 3)]).toEqual([3, NaN, 0]);
    expect([...sumByGroup(blind, [0, 0, 0, 1], 2)]).toEqual([NaN, NaN]);
    expect(shareOf(seen, NaN)).toBe("not visible to this layer");
    expect(shareOf(blind, NaN)).toBe("missing");
    expect(shareOf(seen, 0.5)).toBe("50 %");
  });

  it("counts how many keys attention is worth", () => {
    expect(effectiveNumber(floats(0.25, 0.25, 0.25, 0.25))).toBeCloseTo(4, 10);
    expect(effectiveNumber(floats(0, 1, 0))).toBe(1);
    expect(effectiveNumber(floats(2, 2))).toBeCloseTo(2, 10); // whatever it sums to
    expect(effectiveNumber(floats(0, 0))).toBeNull();
    expect(effectiveNumber(floats(NaN, NaN))).toBeNull();
    expect(effectiveNumber(floats(NaN, 1, 1))).toBeCloseTo(2, 10); // a key that the layer cannot see
  });

  it.each([
    [0.5, "50 %"],
    [0.0712, "7.1 %"],
    [0.0042, "0.42 %"],
    [0.00001, "< 0.01 %"],
    [0, "0.00 %"],
    [null, "missing"],
    [undefined, "missing"],
    [NaN, "missing"],
  ])("writes %s as %s", (share, text) => {
    expect(percent(share)).toBe(text);
  });
});
