import { describe, expect, it } from "vitest";
import type { CameraMask, Scene } from "../src/api";
import {
  decodeMask,
  instanceAt,
  isKnown,
  LOOKS,
  lyingOn,
  ofRole,
  outlinesOf,
  ROLES,
  rolesOf,
  timesChance,
} from "../src/scene";
import table from "./masks.json";
import looks from "./roles.json";

/** A mask from lines of digits; "." is unknown. */
function drawn(...lines: string[]): Int16Array {
  return Int16Array.from([...lines.join("")].map((digit) => (digit === "." ? -1 : Number(digit))));
}

/** Area within closed lines, by the shoelace formula, holes taken off. */
function area(lines: number[][]): number {
  return lines.reduce((total, line) => {
    const corners = line.length / 2;
    let twice = 0;
    for (let i = 0; i < corners; i++) {
      const j = (i + 1) % corners;
      twice += line[2 * i]! * line[2 * j + 1]! - line[2 * j]! * line[2 * i + 1]!;
    }
    return total + twice / 2;
  }, 0);
}

describe("a mask", () => {
  it("is what its runs say", () => {
    expect([...decodeMask([0, 2, -1, 1, 3, 3])]).toEqual([0, 0, -1, 3, 3, 3]);
  });

  it("is known as soon as one pixel is", () => {
    const mask = (runs: number[]) => ({ runs }) as CameraMask;
    expect(isKnown(mask([-1, 6]))).toBe(false);
    expect(isKnown(mask([-1, 5, 0, 1]))).toBe(true);
    expect(isKnown(mask([-1, 2, -1, 4]))).toBe(false);
  });

  it("tells what lies at a place, at its edges too", () => {
    const scene = { width_px: 3, height_px: 2 } as Scene;
    const mask = drawn("012", "345");
    const at = (x: number, y: number) => instanceAt(mask, scene, x, y);
    expect([at(0, 0), at(0.4, 0.4), at(0.99, 0.1), at(0.1, 0.6), at(1, 1), at(-0.1, 2)]).toEqual([
      0, 1, 2, 3, 5, 3,
    ]);
  });
});

describe("an outline", () => {
  it("goes round an object by its corners", () => {
    const lines = outlinesOf(drawn("00000", "01110", "01110", "00000"), 5).get(1)!;
    expect(lines).toEqual([[1, 1, 4, 1, 4, 3, 1, 3]]);
  });

  it("bounds an object at the picture's edge and beside another", () => {
    const found = outlinesOf(drawn("1122", "1122"), 4);
    expect(found.get(1)).toEqual([[0, 0, 2, 0, 2, 2, 0, 2]]);
    expect(found.get(2)).toEqual([[2, 0, 4, 0, 4, 2, 2, 2]]);
  });

  it.each([
    ["a hole", drawn("11111", "10001", "10101", "10001", "11111"), 5],
    ["pixels that touch at a corner", drawn("100", "010", "101"), 3],
    ["two parts", drawn("1010", "1010"), 4],
    ["unknown pixels", drawn("1..1", "11.1"), 4],
    ["a single pixel", drawn("000", "010", "000"), 3],
  ])("holds as many pixels as the mask: %s", (_, mask, width) => {
    const pixels = mask.filter((value) => value === 1).length;
    expect(area(outlinesOf(mask, width).get(1)!)).toBe(pixels);
  });

  it("is not drawn of what nobody knows", () => {
    expect([...outlinesOf(drawn("..", ".0"), 2).keys()]).toEqual([0]);
  });
});

describe("what lies on objects", () => {
  const asked = table.flatMap(({ asked, ...rest }) => asked.map((one) => ({ ...rest, ...one })));

  it.each(asked)("is the package's: $name, $instances", ({ values, mask, instances, share, chance }) => {
    // The unit does not matter.
    for (const unit of [1, 7]) {
      const map = Float32Array.from(values, (value) => unit * value);
      const found = lyingOn(map, mask as unknown as CameraMask, instances);
      expect(found.share).toBeCloseTo(share, 5);
      expect(found.chance).toBeCloseTo(chance, 5);
    }
  });

  it("is missing where the map is, or nothing of it falls on this camera", () => {
    const mask = { area: { 1: 0.5 }, coverage: { 1: [[0], [1]] }, hidden: [] } as unknown as CameraMask;
    expect(lyingOn(Float32Array.of(NaN, NaN), mask, [1])).toEqual({ share: NaN, chance: 0.5 });
    expect(lyingOn(Float32Array.of(0, 0), mask, [1])).toEqual({ share: NaN, chance: 0.5 });
    expect(lyingOn(Float32Array.of(1, 3), mask, [2])).toEqual({ share: 0, chance: 0 });
  });

  it("is compared with chance", () => {
    expect(timesChance({ share: 0.5, chance: 0.25 })).toBe("2.0 ×");
    expect(timesChance({ share: 0.5, chance: 0.01 })).toBe("50 ×");
    expect(timesChance({ share: 0.01, chance: 0.04 })).toBe("0.25 ×");
    expect(timesChance({ share: 0.01, chance: 0 })).toBe("");
    expect(timesChance({ share: NaN, chance: 0.1 })).toBe("");
  });

  it("is told by role, in one order", () => {
    const instances = ["background", "robot", "distractor", "target", "distractor", "odd"].map((role) => ({
      name: role,
      role,
    }));
    expect(rolesOf({ instances } as Scene)).toEqual(["target", "distractor", "robot"]);
    expect(ofRole(instances, "distractor")).toEqual([2, 4]);
  });
});

describe("roles", () => {
  it("look as in the package's figures and overlays", () => {
    expect(looks.map(({ role }) => role)).toEqual([...ROLES]);
    for (const { role, colour, dashes } of looks) {
      expect(LOOKS[role as keyof typeof LOOKS]).toEqual({ colour, dashes });
    }
  });
});
