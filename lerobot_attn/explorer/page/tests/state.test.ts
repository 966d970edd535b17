import { afterEach, describe, expect, it } from "vitest";
import { parameters } from "../src/source";
import * as state from "../src/state";

afterEach(() => state.readAddress(""));

const initial = {
  episode: "",
  frame: 0,
  layer: -1,
  step: -1,
  head: "mean",
  query: "executed",
  camera: "",
  normalisation: "share",
  colours: "inferno",
  opacity: 0.7,
  patch: "",
  compared: "",
  lock: "frame",
  tour: 0,
  filter: "all",
  search: "",
  task: "",
  condition: "",
  sort: "path",
  page: 1,
};

type Name = keyof typeof initial;
const now = () =>
  Object.fromEntries((Object.keys(initial) as Name[]).map((name) => [name, state[name].value]));

describe("the address", () => {
  it("is empty for what one sees first", () => {
    expect(now()).toEqual(initial);
    expect(state.address()).toBe("");
  });

  it("says everything that was chosen, and nothing else", () => {
    const said =
      "?episode=attention:libero_0:episode_00003&frame=23&layer=17&step=9&head=3&query=4&camera=wrist" +
      "&norm=episode&colours=viridis&opacity=0.25&patch=wrist:3:12&compare=attention:libero_0:episode_00004" +
      "&lock=phase&tour=2&show=failure&find=red+b%C3%B6wl+%26+more" +
      "&task=pick+up+the+milk&condition=block_target&sort=-size&page=7";
    state.readAddress(said);
    expect(now()).toEqual({
      episode: "attention:libero_0:episode_00003",
      frame: 23,
      layer: 17,
      step: 9,
      head: 3,
      query: 4,
      camera: "wrist",
      normalisation: "episode",
      colours: "viridis",
      opacity: 0.25,
      patch: "wrist:3:12",
      compared: "attention:libero_0:episode_00004",
      lock: "phase",
      tour: 2,
      filter: "failure",
      search: "red böwl & more",
      task: "pick up the milk",
      condition: "block_target",
      sort: "-size",
      page: 7,
    });
    expect(state.address()).toBe(said);
  });

  it.each(["layer=mean", "head=max", "query=frame", "layer=0", "step=0", "layer=-3"])(
    "holds %s",
    (choice) => {
      state.readAddress(`?${choice}`);
      expect(state.address()).toBe(`?${choice}`);
    },
  );

  it.each([
    ["frame", "-4", 0],
    ["frame", "1.5", 0],
    ["frame", "99999999999", 0],
    ["layer", "last", -1],
    ["layer", "max", -1],
    ["head", "", "mean"],
    ["query", "all", "executed"],
    ["opacity", "2", 0.7],
    ["opacity", "-1", 0.7],
    ["opacity", "dark", 0.7],
    ["normalisation", "percent", "share"],
    ["colours", "jet", "inferno"],
    ["patch", "wrist:3", ""],
    ["patch", "wrist:3:-1", ""],
    ["lock", "time", "frame"],
    ["filter", "broken", "all"],
    ["tour", "soon", 0],
    ["sort", "--size", "path"],
    ["sort", "colour", "path"],
    ["page", "0", 1],
    ["page", "last", 1],
  ] as const)("takes no nonsense: %s = %s", (name, text, expected) => {
    const inAddress = { normalisation: "norm", filter: "show" }[name as string] ?? name;
    state.readAddress(`?${inAddress}=${encodeURIComponent(text)}`);
    expect(state[name].value).toBe(expected);
    expect(state.address()).toBe("");
  });

  it("forgets what a later address does not say", () => {
    state.readAddress("?frame=3&head=max");
    state.readAddress("?head=1");
    expect([state.frame.value, state.head.value]).toEqual([0, 1]);
  });

  it("bounds texts", () => {
    state.readAddress(`?find=${"a".repeat(1000)}`);
    expect(state.search.value).toHaveLength(300);
  });
});

describe("the rows that are wanted", () => {
  it("are all, if nothing was chosen", () => {
    expect(parameters(state.wanted.value)).toBe("?limit=50");
  });

  it("are what was chosen, from the chosen page on", () => {
    state.readAddress("?find=a+b&show=failure&task=pick+%26+place&condition=baseline&sort=-frames&page=3");
    expect(parameters(state.wanted.value)).toBe(
      "?find=a+b&outcome=failure&task=pick+%26+place&condition=baseline&sort=-frames&offset=100&limit=50",
    );
  });
});
