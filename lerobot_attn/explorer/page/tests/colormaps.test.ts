import { describe, expect, it } from "vitest";
import { COLOUR_MAPS, colourIndex, colourTable, type ColourMap } from "../src/colormaps";

/** Of matplotlib: colours 0, 50, 128, 201 and 255. */
const MATPLOTLIB: Record<ColourMap, number[][]> = {
  inferno: [
    [0, 0, 4],
    [64, 10, 103],
    [188, 55, 84],
    [252, 159, 7],
    [252, 255, 164],
  ],
  viridis: [
    [68, 1, 84],
    [65, 66, 135],
    [33, 145, 140],
    [115, 208, 86],
    [253, 231, 37],
  ],
  magma: [
    [0, 0, 4],
    [57, 15, 110],
    [183, 55, 121],
    [253, 154, 106],
    [252, 253, 191],
  ],
  cividis: [
    [0, 34, 78],
    [52, 69, 108],
    [125, 124, 120],
    [197, 181, 104],
    [254, 232, 56],
  ],
  gray: [
    [0, 0, 0],
    [50, 50, 50],
    [128, 128, 128],
    [201, 201, 201],
    [255, 255, 255],
  ],
};

const colour = (name: ColourMap, index: number) => [...colourTable(name).subarray(index * 3, index * 3 + 3)];

describe.each(COLOUR_MAPS)("%s", (name) => {
  it("begins and ends as matplotlib's", () => {
    expect(colour(name, 0)).toEqual(MATPLOTLIB[name][0]);
    expect(colour(name, 255)).toEqual(MATPLOTLIB[name][4]);
  });

  it("is within 4 of 255 of matplotlib's between", () => {
    [50, 128, 201].forEach((index, i) => {
      colour(name, index).forEach((channel, c) => {
        expect(Math.abs(channel - MATPLOTLIB[name][i + 1]![c]!)).toBeLessThanOrEqual(4);
      });
    });
  });

  it("grows lighter with the value", () => {
    const lightness = (index: number) => {
      const [r, g, b] = colour(name, index) as [number, number, number];
      return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    for (let index = 8; index < 256; index += 8) {
      expect(lightness(index)).toBeGreaterThan(lightness(index - 8));
    }
  });
});

describe("colourIndex", () => {
  it("spreads 0 to the end over the table", () => {
    expect([0, 0.25, 0.5, 1].map((value) => colourIndex(value, 0.5))).toEqual([0, 128, 255, 255]);
    expect(colourIndex(-1, 0.5)).toBe(0);
  });

  it("is 0 where there is no range", () => {
    expect(colourIndex(0.5, 0)).toBe(0);
  });
});
