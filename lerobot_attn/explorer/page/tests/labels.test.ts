import { describe, expect, it } from "vitest";
import {
  averagedInWords,
  counted,
  Frames,
  headInWords,
  inWords,
  isAll,
  outcome,
  tokenInWords,
} from "../src/labels";

describe("all frames of an episode", () => {
  const frames = new Frames(5);

  it("are their own places", () => {
    expect([frames.length, frames.last]).toEqual([5, 4]);
    for (let frame = 0; frame < 5; frame++) {
      expect(frames.at(frame)).toBe(frame);
      expect(frames.placeOf(frame)).toBe(frame);
      expect(frames.nearest(frame)).toBe(frame);
    }
  });

  it("end at the first and the last", () => {
    expect([frames.at(-3), frames.at(9), frames.nearest(-1), frames.nearest(99)]).toEqual([0, 4, 0, 4]);
  });

  it("may be none", () => {
    const none = new Frames(0);
    expect([none.length, none.last, none.at(3), none.placeOf(3), none.nearest(3)]).toEqual([0, 0, 0, 0, 0]);
  });
});

describe("the frames of an export", () => {
  const frames = new Frames(20, [2, 5, 11]);

  it("are moved among by place", () => {
    expect([frames.length, frames.last]).toEqual([3, 11]);
    expect([0, 1, 2].map((place) => frames.at(place))).toEqual([2, 5, 11]);
    expect([frames.at(-1), frames.at(3)]).toEqual([2, 11]);
    expect([2, 5, 11].map((frame) => frames.placeOf(frame))).toEqual([0, 1, 2]);
  });

  it("stand for the frames after them that are not here, and the first for those before", () => {
    expect([0, 1, 2, 3, 4, 5, 10, 11, 12, 19].map((frame) => frames.nearest(frame))).toEqual([
      2, 2, 2, 2, 2, 5, 5, 11, 11, 11,
    ]);
  });
});

describe("labels in words", () => {
  it.each([
    [[0, 1, 2], 3, "all layers"],
    [[0, 1, 2], null, "all layers"],
    [[0, 1, 2], 4, "layers 0–2"],
    [[0, 2, 3, 7], 8, "layers 0, 2–3, 7"],
    [[3], 4, "layer 3"],
  ])("%j of %s", (labels, total, text) => {
    expect(inWords("layer", labels, total)).toBe(text);
  });

  it("call a decoded token no action", () => {
    expect([tokenInWords({}, 3), tokenInWords({ decodes: true }, 3)]).toEqual([
      "action 3",
      "decoded token 3",
    ]);
    expect([averagedInWords({}), averagedInWords({ decodes: true })]).toEqual([
      "the executed actions",
      "the decoded tokens",
    ]);
  });

  it("say of a replay that nothing was executed", () => {
    expect(averagedInWords({ replay: true, executed_queries: [1, 11] })).toBe("the first 10 actions");
    expect(averagedInWords({ replay: true, executed_queries: null })).toBe("the first actions");
  });

  it("knows when they are all", () => {
    expect([isAll([0, 1], 2), isAll([1], 2), isAll([1], null)]).toEqual([true, false, true]);
  });
});

it.each([
  [2, "head 2"],
  ["mean", "mean of all heads"],
  ["max", "largest of all heads"],
] as const)("says head %s in words", (head, expected) => {
  expect(headInWords(head, { heads: [0, 1, 2], n_heads: 3 })).toBe(expected);
});

it("says of how many heads a mean is", () => {
  expect(headInWords("mean", { heads: [0, 1, 5], n_heads: 8 })).toBe("mean of heads 0–1, 5");
});

it.each([
  [{ success: true, complete: true }, "success"],
  [{ success: false, complete: true }, "failure"],
  [{ success: true, complete: false }, "incomplete"],
  [{ success: null, complete: true }, "unknown"],
])("says how an episode ended: %o", (row, expected) => {
  expect(outcome(row)).toBe(expected);
});

it("counts in words", () => {
  expect([counted(1, "success", "successes"), counted(10_000, "episode")]).toEqual([
    "1 success",
    "10,000 episodes",
  ]);
});
