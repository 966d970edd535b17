import { describe, expect, it } from "vitest";
import type { Facts, Geometry } from "../src/api";
import {
  cameraViews,
  modalitiesOf,
  modalityColour,
  modalityLabel,
  modalityOfKey,
  pixelMap,
  takesInstruction,
  visiblePatches,
} from "../src/layout";
import fromPython from "./pixel_maps.json";

const [first] = fromPython;
const geometry: Geometry = { ...first!.geometry, grid_rows: 1, grid_columns: 2 };

/** Two cameras of two patches, an empty one, five language slots and two actions. */
const facts = {
  n_keys: 13,
  segments: [
    { kind: "image", name: "images.front", start: 0, stop: 2 },
    { kind: "image", name: "images.wrist", start: 2, stop: 4 },
    { kind: "image", name: "images.empty", start: 4, stop: 6 },
    { kind: "language", name: "language", start: 6, stop: 11 },
    { kind: "action", name: "action", start: 11, stop: 13 },
  ],
  cameras: [
    { name: "images.front", label: "front", geometry, has_video: true },
    { name: "images.wrist", label: "wrist", geometry: { ...geometry }, has_video: false },
    { name: "images.empty", label: "empty", geometry: null, has_video: false },
  ],
  kinds: { padding: 0, image: 1, task: 2, state: 3, template: 4, action: 5, text: 6 },
} as unknown as Facts;
const keyKind = [1, 1, 1, 1, 0, 0, 4, 2, 2, 3, 0, 5, 5];

describe("takesInstruction", () => {
  it("is told by the layout: an empty instruction has its slots all the same", () => {
    expect(takesInstruction(facts)).toBe(true);
    const without = facts.segments.filter((segment) => segment.kind !== "language");
    expect(takesInstruction({ segments: without })).toBe(false);
  });
});

describe("pixelMap", () => {
  it.each(fromPython.map((one) => ({ name: JSON.stringify(one.geometry), ...one })))(
    "is the package's for $name",
    (one) => {
      const map = pixelMap(one.geometry);
      expect([map.height, map.width]).toEqual([one.geometry.height_px, one.geometry.width_px]);
      expect([...map.rows]).toEqual(one.rows);
      expect([...map.columns]).toEqual(one.columns);
    },
  );

  it.each(fromPython)("leaves the letterbox out, as the package does", (one) => {
    expect(visiblePatches(one.geometry).map(Number)).toEqual(one.visible);
  });

  it("is made once for a camera", () => {
    expect(pixelMap(geometry)).toBe(pixelMap(geometry));
  });
});

describe("cameras and keys", () => {
  it("passes over a camera that showed nothing, and keeps the others' keys", () => {
    const views = cameraViews(facts).map(({ camera, segment }) => [
      camera.label,
      segment.start,
      segment.stop,
    ]);
    expect(views).toEqual([
      ["front", 0, 2],
      ["wrist", 2, 4],
    ]);
  });

  it("names the modalities that there are, in the figures' order", () => {
    expect(modalitiesOf(facts, keyKind)).toEqual([
      "images.front",
      "images.wrist",
      "task",
      "state",
      "template",
      "actions",
      "padding",
    ]);
    expect(modalityLabel(facts, "images.wrist")).toBe("wrist");
    expect(modalityLabel(facts, "state")).toBe("state");
  });

  it("calls what a policy decodes no actions", () => {
    const decoding = { ...facts, decodes: true };
    const names = modalitiesOf(decoding, keyKind);
    expect(names).toContain("decoded tokens");
    expect(names).not.toContain("actions");
    expect(names[modalityOfKey(decoding, keyKind, names).at(-1)!]).toBe("decoded tokens");
    expect(modalityColour(decoding, "decoded tokens")).toBe(modalityColour(facts, "actions"));
  });

  it("gives each key its modality", () => {
    const names = modalitiesOf(facts, keyKind);
    const found = [...modalityOfKey(facts, keyKind, names)].map((index) => names[index]);
    expect(found).toEqual([
      "images.front",
      "images.front",
      "images.wrist",
      "images.wrist",
      "padding",
      "padding",
      "template",
      "task",
      "task",
      "state",
      "padding",
      "actions",
      "actions",
    ]);
  });

  it("leaves a key of an unlisted modality out", () => {
    expect([...modalityOfKey(facts, keyKind, ["task"])]).toEqual(
      keyKind.map((kind) => (kind === facts.kinds["task"] ? 0 : -1)),
    );
  });

  it("gives every modality a colour of its own", () => {
    const names = modalitiesOf(facts, keyKind);
    const colours = names.map((name) => modalityColour(facts, name));
    expect(new Set(colours).size).toBe(names.length);
    colours.forEach((colour) => expect(colour).toMatch(/^#[0-9A-F]{6}$/i));
  });
});
