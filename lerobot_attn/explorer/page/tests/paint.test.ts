import { describe, expect, it } from "vitest";
import { colourTable } from "../src/colormaps";
import { pixelMap } from "../src/layout";
import { paintHeat, paintPatches } from "../src/paint";
import type { ColourMap } from "../src/colormaps";
import fromPython from "./pixel_maps.json";
import scales from "./colour_scale.json";

/** What a browser's ImageData is to these functions. */
function image(width: number, height: number): ImageData {
  return { width, height, data: new Uint8ClampedArray(width * height * 4) } as ImageData;
}

const pixel = (target: ImageData, x: number, y: number) => [
  ...target.data.subarray((y * target.width + x) * 4, (y * target.width + x) * 4 + 4),
];
const [darkest, brightest] = [0, 255].map((index) => [
  ...colourTable("inferno").subarray(index * 3, index * 3 + 3),
]);

describe("paintHeat", () => {
  it.each(fromPython)("lights exactly the pixels of one patch", ({ geometry, rows, columns, visible }) => {
    const { grid_rows, grid_columns } = geometry;
    for (let patch = 0; patch < grid_rows * grid_columns; patch++) {
      if (!visible[patch]) continue;
      const values = new Float32Array(grid_rows * grid_columns);
      values[patch] = 0.5;
      const target = image(geometry.width_px, geometry.height_px);
      paintHeat(target, values, pixelMap(geometry), grid_columns, 0.5, "inferno", "opaque");
      const [row, column] = [Math.floor(patch / grid_columns), patch % grid_columns];
      const words = new Uint32Array(target.data.buffer);
      const [lit, dark] = [brightest!, darkest!].map(
        (rgb) => new Uint32Array(new Uint8Array([...rgb, 255]).buffer)[0],
      );
      const unseen = 0; // transparent
      const wrong = rows.flatMap((r, y) =>
        columns.flatMap((c, x) => {
          const isSeen = r < grid_rows && c < grid_columns;
          const expected = !isSeen ? unseen : r === row && c === column ? lit : dark;
          return words[y * geometry.width_px + x] === expected ? [] : [[x, y]];
        }),
      );
      expect(wrong).toEqual([]);
    }
  });

  it("leaves missing values transparent, and grows opaque with the value's root", () => {
    const map = {
      width: 4,
      height: 1,
      rows: new Uint16Array(1),
      columns: Uint16Array.from([0, 1, 2, 3]),
    };
    const target = image(4, 1);
    paintHeat(target, Float32Array.from([NaN, 0, 0.25, 1]), map, 4, 1, "gray", 0.5);
    expect(pixel(target, 0, 0)[3]).toBe(0);
    expect(pixel(target, 1, 0)[3]).toBe(0);
    expect(pixel(target, 2, 0)).toEqual([64, 64, 64, Math.round(255 * 0.5 * Math.sqrt(64 / 255))]);
    expect(pixel(target, 3, 0)).toEqual([255, 255, 255, 128]);
  });

  it("shows nothing where the policy saw nothing, because it was cut off", () => {
    const cut = fromPython.filter(({ geometry }) => geometry.pad_left_px < 0);
    expect(cut.length).toBe(2);
    for (const { geometry, columns } of cut) {
      const target = image(geometry.width_px, geometry.height_px);
      const values = new Float32Array(geometry.grid_rows * geometry.grid_columns).fill(1);
      paintHeat(target, values, pixelMap(geometry), geometry.grid_columns, 1, "inferno", 0.5);
      const middle = geometry.height_px >> 1;
      const shown = columns.map((_, x) => pixel(target, x, middle)[3]! > 0);
      expect(shown).toEqual(columns.map((column) => column < geometry.grid_columns));
      expect([shown[0], shown[geometry.width_px >> 1], shown.at(-1)]).toEqual([false, true, false]);
    }
  });

  it("paints over all that was there", () => {
    const { geometry } = fromPython[1]!;
    const target = image(geometry.width_px, geometry.height_px);
    target.data.fill(99);
    const values = new Float32Array(geometry.grid_rows * geometry.grid_columns);
    paintHeat(target, values, pixelMap(geometry), geometry.grid_columns, 1, "inferno", "opaque");
    expect(new Set(new Uint32Array(target.data.buffer)).size).toBe(1);
    expect(pixel(target, 0, 0)).toEqual([...darkest!, 255]);
  });
});

describe("the package's colour scale", () => {
  it.each(scales)("$colormap, opacity $alpha, up to $vmax", ({ colormap, alpha, vmax, values, rgba }) => {
    const n = values.length;
    const target = image(n, 1);
    const map = { width: n, height: 1, rows: new Uint16Array(1), columns: Uint16Array.from(values.keys()) };
    const there = Float32Array.from(values, (value) => value ?? NaN);
    paintHeat(target, there, map, n, vmax, colormap as ColourMap, alpha ?? "opaque");
    rgba.forEach((expected, x) => {
      const found = pixel(target, x, 0);
      expect([x, found[3]]).toEqual([x, expected[3]]);
      // Blended between 52 of the map's colours, a channel is up to 4 off.
      for (let c = 0; c < 3; c++) expect(Math.abs(found[c]! - expected[c]!)).toBeLessThanOrEqual(4);
    });
  });
});

describe("paintPatches", () => {
  it("puts a small map at its place, and touches nothing else", () => {
    const target = image(5, 4);
    paintPatches(target, 2, 1, Float32Array.from([1, 0, 0, 1]), 2, 1, "gray");
    const alphas = Array.from({ length: 20 }, (_, i) => pixel(target, i % 5, Math.floor(i / 5))[3]);
    const inside = (i: number) => [7, 8, 12, 13].includes(i);
    expect(alphas).toEqual(alphas.map((_, i) => (inside(i) ? 255 : 0)));
    expect([7, 8, 12, 13].map((i) => pixel(target, i % 5, Math.floor(i / 5))[0])).toEqual([255, 0, 0, 255]);
  });
});
