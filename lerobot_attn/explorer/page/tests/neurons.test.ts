import { signal } from "@preact/signals";
import { afterEach, beforeEach, describe, expect, it, vi } from "vitest";
import type { Activations, Facts, Neurons, Timeline } from "../src/api";
import {
  askOf,
  besideInWords,
  besideOf,
  chosenOf,
  EpisodeNeurons,
  groupLabel,
  groupOf,
  MOST_EACH,
  offersOf,
  otherFrame,
  short,
  span,
  stateOver,
  unitOf,
  type Ask,
} from "../src/neurons";
import type { Source } from "../src/source";
import { stopsOf } from "../src/tour";

const STREAMS: Neurons["streams"] = {
  vlm: {
    groups: ["images.front", "task"],
    reductions: ["mean", "max"],
    layers: [1, 3],
    n_units: 10,
    per_step: false,
  },
  expert: { groups: ["state", "actions"], reductions: ["mean"], layers: [0], n_units: 4, per_step: true },
};

const set = (kind: "found" | "fired", name: string, units: Neurons["sets"][0]["units"], n_left_out = 0) => ({
  kind,
  name,
  units,
  n_left_out,
});

function facts(sets: Neurons["sets"] = [], streams = STREAMS): Facts {
  return {
    version: "v",
    n_inferences: 3,
    neurons: { streams, sets },
    state_dims: ["x", "eef_z", "grip"],
    cameras: [{ name: "images.front", label: "front" }],
  } as unknown as Facts;
}

const FOUND = set(
  "found",
  "words.csv",
  {
    vlm: [
      [1, 2],
      [3, 4],
    ],
    expert: [[0, 1]],
  },
  1,
);
const FIRED = set("fired", "steer", { vlm: [[3, 4]] });

describe("sets of neurons", () => {
  it("are offered by stream, the found one first, and what the other episode fires", () => {
    const offers = offersOf(facts([FOUND]), facts([FOUND, FIRED]));
    expect(offers.map(({ value, name }) => [value, name])).toEqual([
      ["found:vlm", "words.csv: 2 neurons (vlm)"],
      ["found:expert", "words.csv: 1 neuron (expert)"],
      ["other:vlm", "fired by steer: 1 neuron (vlm)"],
    ]);
    expect(offers[0]).toMatchObject({
      stream: "vlm",
      units: [
        [1, 2],
        [3, 4],
      ],
      nLeftOut: 1,
    });
  });

  it("are several where a table holds several, each with its address", () => {
    const low = set("found", "words.csv, low", { vlm: [[3, 1]] });
    expect(offersOf(facts([FOUND, low]), null).map(({ value }) => value)).toEqual([
      "found:vlm",
      "found:expert",
      "found2:vlm",
    ]);
  });

  it("are offered once where both episodes fire the same, twice where they do not", () => {
    expect(offersOf(facts([FIRED]), facts([FIRED])).map(({ value }) => value)).toEqual(["fired:vlm"]);
    const control = set("fired", "random", { vlm: [[3, 5]] });
    expect(offersOf(facts([FIRED]), facts([control])).map(({ value }) => value)).toEqual([
      "fired:vlm",
      "other:vlm",
    ]);
  });

  it("come before a single neuron, which has an address of its own", () => {
    const offers = offersOf(facts([FIRED]), null);
    expect(chosenOf("", offers, facts([FIRED]))?.value).toBe("fired:vlm");
    expect(chosenOf("found:vlm", offers, facts([FIRED]))?.value).toBe("fired:vlm");
    expect(chosenOf("unit:expert:0:3", offers, facts([FIRED]))).toMatchObject({
      stream: "expert",
      units: [[0, 3]],
    });
    expect(chosenOf("off", offers, facts([FIRED]))).toBeNull();
    expect(chosenOf("", [], facts())).toMatchObject({ value: "unit:vlm:1:0", units: [[1, 0]] });
    expect(chosenOf("", [], { ...facts(), neurons: null } as Facts)).toBeNull();
  });

  it.each([
    ["unit:vlm:2:5", "unit:vlm:1:5"], // a layer that was not recorded
    ["unit:vlm:3:99", "unit:vlm:3:9"],
    ["unit:none:3:2", "unit:vlm:3:2"],
  ])("of one neuron hold what was recorded: %s", (asked, shown) => {
    expect(chosenOf(asked, [], facts())?.value).toBe(shown);
  });

  it("are read from addresses that name one neuron", () => {
    expect(unitOf("unit:vlm:3:17")).toEqual({ stream: "vlm", layer: 3, unit: 17 });
    for (const odd of ["", "unit:vlm:3", "unit:vlm:-3:1", "unit:vlm:3:1e5", "found:vlm"]) {
      expect(unitOf(odd)).toBeNull();
    }
  });
});

describe("what is asked of an episode", () => {
  const offer = offersOf(facts([FOUND]), null);

  it("has the chosen tokens, or the task's words, or the actions", () => {
    expect(askOf(facts(), offer[0]!, "images.front", "max", 9)).toEqual({
      stream: "vlm",
      units: [
        [1, 2],
        [3, 4],
      ],
      group: "images.front",
      reduction: "max",
      step: -1, // the vlm has none
    });
    expect(askOf(facts(), offer[1]!, "task", "max", 9)).toMatchObject({
      group: "actions",
      reduction: "mean",
      step: 9,
    });
    expect(groupOf({ ...STREAMS.vlm!, groups: ["a", "b"] }, "c")).toBe("a");
    expect(groupLabel(facts(), "images.front")).toBe("front");
    expect(groupLabel(facts(), "task")).toBe("task");
  });

  it("is nothing where a neuron of the set is lacking: the rest is another set", () => {
    const few = { ...STREAMS, vlm: { ...STREAMS.vlm!, layers: [1] } };
    expect(askOf(facts([], few), offer[0]!, "", "mean", 0)).toBeNull();
    const small = { ...STREAMS, vlm: { ...STREAMS.vlm!, n_units: 4 } };
    expect(askOf(facts([], small), offer[0]!, "", "mean", 0)).toBeNull();
    expect(askOf({ ...facts(), neurons: null } as Facts, offer[0]!, "", "mean", 0)).toBeNull();
  });
});

describe("what is drawn beside", () => {
  const timeline = {
    state: [
      [0, 1, 2],
      [3, null, 5],
    ],
  } as unknown as Timeline;

  it("is the hand's height unless another is chosen", () => {
    expect(besideOf(facts(), "")).toBe("eef_z");
    expect(besideOf(facts(), "grip")).toBe("grip");
    expect(besideOf({ state_dims: ["a"] }, "eef_z")).toBe("a");
    expect(besideOf({ state_dims: [] }, "")).toBeNull();
    expect(stateOver(facts(), timeline, "eef_z")).toEqual([1, null]);
    expect(stateOver(facts(), timeline, null)).toBeNull();
    expect(stateOver(facts(), { state: null } as unknown as Timeline, "eef_z")).toBeNull();
  });

  it("has a unit where it is known", () => {
    expect(besideInWords("eef_z")).toEqual({ name: "hand's height, eef_z", unit: "m" });
    expect(besideInWords("eef_x")).toEqual({ name: "eef_x", unit: "m" });
    expect(besideInWords("eef_rx").unit).toBe("");
    expect(besideInWords("joint_1")).toEqual({ name: "joint_1", unit: "" });
  });

  it("has scales that hold all numbers", () => {
    expect(span([0, null, 10], [5])).toEqual([-0.8, 10.8]);
    expect(span([], [null, NaN])).toEqual([0, 1]);
    const [low, high] = span([3, 3]);
    expect(low).toBeLessThan(3);
    expect(high).toBeGreaterThan(3);
  });

  it("goes by frame or by phase", () => {
    expect(otherFrame(7, 10, 20, false)).toBe(7);
    expect(otherFrame(7, 10, 20, true)).toBe(14);
    expect(otherFrame(0, 0, 20, true)).toBe(0);
  });

  it.each([
    [null, "–"],
    [undefined, "–"],
    [0, "0"],
    [0.33649, "0.336"],
    [-12.04, "-12"],
    [0.00001234, "1.2e-5"],
    [65504, "6.6e+4"],
  ])("is written short: %s", (value, text) => expect(short(value)).toBe(text));
});

describe("the tour", () => {
  it("stops at the neurons where there are some", () => {
    const plain = stopsOf({ neurons: null });
    const with_ = stopsOf({ neurons: { streams: STREAMS, sets: [] } });
    expect(with_.filter((stop) => !plain.includes(stop)).map(({ at }) => at)).toEqual(["neurons"]);
    expect(with_[with_.findIndex(({ at }) => at === "neurons") - 1]!.at).toBe("timeline");
  });
});

describe("activations over an episode", () => {
  const asks: [number, Ask, boolean][] = [];
  let n = 3;
  let delayMs = 0;
  const source = {
    neurons: async (_: unknown, first: number, asked: Ask, each: boolean): Promise<Activations> => {
      asks.push([first, asked, each]);
      const there = n;
      if (delayMs) await new Promise((done) => setTimeout(done, delayMs));
      const rows = Array.from({ length: there - first }, (_, i) => first + i);
      return {
        ...asked,
        first,
        denoise_step: null,
        mean: rows,
        expected: rows,
        each: each ? rows.map((i) => [i]) : null,
      };
    },
  } as unknown as Source;
  const ask = (unit: number, n = 2): Ask => ({
    stream: "vlm",
    units: Array.from({ length: n }, (_, i) => [1, unit + i]),
    group: "task",
    reduction: "mean",
    step: -1,
  });

  function opened() {
    const model = {
      key: { id: "e", version: "v" },
      facts: signal(facts()),
      isDisposed: false,
      attempt: async (_: string, load: () => Promise<void>) => load().then(() => true),
    };
    return { model, neurons: new EpisodeNeurons(model, source) };
  }

  const pass = (ms = 500) => vi.advanceTimersByTimeAsync(ms);

  beforeEach(() => {
    vi.useFakeTimers();
    [asks.length, n, delayMs] = [0, 3, 0];
  });
  afterEach(() => void vi.useRealTimers());

  it("are asked for once, and then of the new inferences alone", async () => {
    const { model, neurons } = opened();
    neurons.want(ask(1), true);
    neurons.load();
    await pass();
    expect(neurons.found.value!.mean).toEqual([0, 1, 2]);
    neurons.load();
    await pass();
    expect(asks).toHaveLength(1);
    n = 5;
    model.facts.value = { ...facts(), n_inferences: 5 };
    neurons.load();
    await pass();
    expect(asks[1]![0]).toBe(3);
    expect(neurons.found.value).toMatchObject({
      mean: [0, 1, 2, 3, 4],
      each: [[0], [1], [2], [3], [4]],
      first: 0,
    });
  });

  it("that come late do not take the place of those that are wanted now", async () => {
    const { neurons } = opened();
    neurons.want(ask(1), false);
    delayMs = 400;
    neurons.load();
    await pass(200);
    delayMs = 0;
    neurons.want(ask(5), false);
    neurons.load();
    await pass(1000);
    expect(neurons.found.value!.units[0]).toEqual([1, 5]);
  });

  it("are not asked for where nothing is wanted, nor each where lines would be too many", async () => {
    const { neurons } = opened();
    neurons.want(ask(0, MOST_EACH + 1), true);
    neurons.load();
    await pass();
    expect(asks[0]![2]).toBe(false);
    neurons.want(null, true);
    neurons.load();
    await pass();
    expect(neurons.found.value).toBeNull();
    expect(asks).toHaveLength(1);
  });
});
