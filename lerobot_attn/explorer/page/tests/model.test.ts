import { afterEach, beforeEach, describe, expect, it, vi } from "vitest";
import { ApiError, type EpisodeRow, type Facts, type Shares, type Timeline } from "../src/api";
import { EpisodeModel, sharedEnd } from "../src/model";
import type { Source, Where } from "../src/source";
import * as state from "../src/state";

const CAMERA = {
  name: "images.front",
  label: "front",
  has_video: true,
  video_version: "1",
  geometry: {
    height_px: 4,
    width_px: 4,
    resized_height_px: 4,
    resized_width_px: 4,
    pad_top_px: 0,
    pad_left_px: 0,
    input_height_px: 4,
    input_width_px: 4,
    grid_rows: 2,
    grid_columns: 2,
  },
};
const FRAMES_EACH = 2;

/** A server of one episode of four patches and two words, which tests change and delay. */
class Server {
  version = "A";
  nInferences = 2;
  nTimeline: number | null = null;
  /** What all maps of inference 0 hold; of the next 10 more. */
  value = 1;
  shownLayer: number | null = null;
  hasPictures = true;
  still: number | null = null;
  hasMasks = false;
  hasDamagedMasks = false;
  broken: (what: string) => void = () => {};
  delayMs: (what: string) => number = () => 0;
  asked: string[] = [];
  n_refused = 0;

  private async answer<T>(what: string, value: T): Promise<T> {
    this.asked.push(what);
    const delay = this.delayMs(what);
    if (delay) await new Promise((done) => setTimeout(done, delay));
    this.broken(what);
    return value;
  }

  get row(): EpisodeRow {
    return this.facts() as unknown as EpisodeRow;
  }

  facts(): Facts {
    return {
      version: this.version,
      n_inferences: this.nInferences,
      n_frames: FRAMES_EACH * this.nInferences,
      complete: false,
      success: null,
      mean_layers: [0, 1],
      layers: [],
      prefix_layers: [0],
      heads: [0, 1],
      denoise_steps: [0, 1],
      n_keys: 10,
      n_queries: 4,
      first_action_query: 0,
      prefix_len: 6,
      action_queries: [0, 4],
      prefix_only_layers: [],
      shown_layer: this.shownLayer,
      video_errors: {},
      segments: [
        { kind: "image", name: CAMERA.name, start: 0, stop: 4 },
        { kind: "language", name: "language", start: 4, stop: 6 },
      ],
      cameras: [{ ...CAMERA, still: this.still }],
      scene: this.hasMasks ? { instances: [], cameras: [CAMERA.name], height_px: 2, width_px: 2 } : null,
      kinds: { image: 1, task: 2 },
    } as unknown as Facts;
  }

  timeline(): Timeline {
    const n = this.nTimeline ?? this.nInferences;
    const frame_inference = Array.from({ length: FRAMES_EACH * n }, (_, i) => Math.floor(i / FRAMES_EACH));
    return { frame_inference, inference_frame: [...new Array(n).keys()] } as unknown as Timeline;
  }

  source(): Source {
    const map = (n: number, inference: number) => new Float32Array(n).fill(this.value + 10 * inference);
    return {
      live: true,
      facts: () => this.answer("facts", this.facts()),
      timeline: () => this.answer("timeline", this.timeline()),
      means: (_: unknown, inference: number, step: number) =>
        this.answer(`means ${inference} ${step}`, { shape: [2, 2, 6], values: map(24, inference) }),
      prefix: (_: unknown, inference: number) =>
        this.answer(`prefix ${inference}`, {
          shape: [2, 6],
          values: map(12, inference).map((value, i) => (i < 6 ? value : 2 * value)),
        }),
      tokens: () =>
        this.answer("tokens", { key_kind: [1, 1, 1, 1, 2, 2], group_of_key: [-1, -1, -1, -1, 0, 1] }),
      actions: () => this.answer("actions", { action: [] }),
      picture: (_: unknown, __: unknown, frame: number) => {
        if (!this.hasPictures) {
          this.n_refused++;
          return Promise.reject(new ApiError(422, "no such frame"));
        }
        return this.answer(`picture ${frame}`, {} as ImageBitmap);
      },
      shares: (_: unknown, first: number, where: Where) =>
        this.answer(`shares ${where.layer}`, {
          first,
          modalities: [`layer ${where.layer}`],
          share: new Array(this.nInferences - first).fill([1]),
          effective_tokens: new Array(this.nInferences - first).fill(1),
        } as Shares),
      masks: (_: unknown, inference: number) => {
        if (this.hasDamagedMasks) return Promise.reject(new ApiError(422, "damaged"));
        return this.answer(`masks ${inference}`, { cameras: { [CAMERA.name]: { runs: [inference, 4] } } });
      },
      roles: (_: unknown, first: number, where: Where, camera: string) =>
        this.answer(`roles ${first} ${where.layer} ${camera}`, {
          first,
          camera,
          roles: ["target"],
          share: Array.from({ length: this.nInferences - first }, (_, i) => [first + i]),
          chance: Array.from({ length: this.nInferences - first }, () => [0.1]),
        }),
      ranges: (_: unknown, step: number) =>
        this.answer(`ranges ${step}`, {
          layers: [0, 1, "mean"],
          heads: [0, 1, "mean", "max"],
          ranges: { [CAMERA.name]: new Array(3).fill(new Array(4).fill(step + 1)) },
        }),
      allRanges: () =>
        this.answer("all ranges", {
          denoise_steps: [0, 1],
          layers: [0, 1, "mean"],
          heads: [0, 1, "mean", "max"],
          ranges: { [CAMERA.name]: [3, 5].map((end) => new Array(3).fill(new Array(4).fill(end))) },
        }),
      videoUrl: () => null,
    } as unknown as Source;
  }
}

let server: Server;
let model: EpisodeModel;

const pass = (ms = 1000) => vi.advanceTimersByTimeAsync(ms);

async function opened(): Promise<void> {
  model = new EpisodeModel(server.source(), "episode", state.frame);
  await pass();
}

beforeEach(() => {
  vi.useFakeTimers();
  vi.stubGlobal("requestAnimationFrame", (call: () => void) => setTimeout(call, 16));
  state.readAddress("");
  server = new Server();
});

afterEach(() => {
  model.dispose();
  vi.unstubAllGlobals();
  vi.useRealTimers();
});

describe("the layer", () => {
  it.each([
    { shownLayer: null, chosen: -1, shown: 1 },
    { shownLayer: 0, chosen: -1, shown: 0 },
    { shownLayer: 0, chosen: 1, shown: 1 },
    { shownLayer: 0, chosen: "mean" as const, shown: "mean" },
  ])(
    "is the policy's own, or the last, unless another is chosen: $shown",
    async ({ shownLayer, chosen, shown }) => {
      server.shownLayer = shownLayer;
      state.layer.value = chosen;
      await opened();
      expect(model.layer.value).toBe(shown);
    },
  );
});

describe("an episode that changes", () => {
  it("keeps nothing of a recording whose place another has taken", async () => {
    await opened();
    expect(model.shown.value!.means.values[0]).toBe(1);
    model.isPainted.value = true;
    [server.version, server.value] = ["B", 7];
    await model.follow(server.row);
    expect(model.isPainted.value).toBe(false);
    await pass();
    expect(model.shown.value!.means.values[0]).toBe(7);
    expect(model.steps.value!.slabs[0]!.values[0]).toBe(7);
  });

  it("drops what was asked of the old recording and comes late", async () => {
    await opened();
    server.delayMs = (what) => (what.startsWith("means 1") ? 500 : 0);
    state.frame.value = 3;
    await pass(10);
    [server.version, server.value, server.delayMs] = ["B", 7, () => 0];
    await model.follow(server.row);
    await pass(2000);
    expect(model.shown.value).toMatchObject({ version: "B", frame: 3, inference: 1 });
    expect(model.shown.value!.means.values[0]).toBe(17);
  });

  it("follows at the end, and only there", async () => {
    await opened();
    server.nInferences = 3;
    await model.follow(server.row);
    expect(state.frame.value).toBe(0);
    state.frame.value = model.lastFrame.value;
    server.nInferences = 4;
    await model.follow(server.row);
    expect(state.frame.value).toBe(7);
    await pass();
    expect(model.shown.value).toMatchObject({ frame: 7, inference: 3 });
    expect(model.shares.value!.share).toHaveLength(4);
  });

  it("leaves the playhead where a longer episode beside it is looked at", async () => {
    await opened();
    state.frame.value = 20;
    server.nInferences = 3;
    await model.follow(server.row);
    expect(state.frame.value).toBe(20);
    await pass();
    expect(model.shown.value).toMatchObject({ frame: 5, inference: 2 });
  });

  it("does not show a frame before the timeline tells of it", async () => {
    await opened();
    state.frame.value = model.lastFrame.value;
    await pass();
    [server.nInferences, server.nTimeline] = [3, 2];
    await model.follow(server.row);
    await pass();
    expect(model.shown.value).toMatchObject({ frame: 3, inference: 1 });
    server.nTimeline = 3;
    server.nInferences = 4;
    await model.follow(server.row);
    await pass();
    expect(model.shown.value).toMatchObject({ frame: 5, inference: 2 });
  });

  it("lets a person who has moved on be, and is silent once it is closed", async () => {
    await opened();
    state.frame.value = model.lastFrame.value;
    server.delayMs = (what) => (what === "facts" ? 300 : 0);
    server.nInferences = 3;
    const news = model.follow(server.row);
    state.frame.value = 1;
    await pass();
    await news;
    expect(state.frame.value).toBe(1);
    state.frame.value = model.lastFrame.value;
    server.nInferences = 4;
    const late = model.follow(server.row);
    model.dispose();
    state.frame.value = 0;
    await pass();
    await late;
    expect(state.frame.value).toBe(0);
  });

  it("asks for the pictures again when the video is there", async () => {
    server.hasPictures = false;
    await opened();
    expect(model.shown.value!.pictures.size).toBe(0);
    server.hasPictures = true;
    server.nInferences = 3;
    await model.follow(server.row);
    await pass();
    expect(model.shown.value!.pictures.size).toBe(1);
  });

  it("shows what the policy saw last while the video is written, and asks for no other picture", async () => {
    const pictures = () => server.asked.filter((what) => what.startsWith("picture"));
    server.still = 1; // inference 1 was asked there, and governs frames 2 and 3
    await opened();
    expect(model.shown.value!.pictures.size).toBe(0);
    state.frame.value = 2;
    await pass();
    expect(model.shown.value).toMatchObject({ frame: 2, pictureFrame: 1 });
    expect(model.shown.value!.pictures.size).toBe(1);
    expect(pictures()).toEqual(["picture 1"]);
    server.still = null;
    server.nInferences = 3;
    await model.follow(server.row);
    await pass();
    expect(model.shown.value).toMatchObject({ frame: 2, pictureFrame: 2 });
  });

  it("asks for no further pictures where one cannot be had", async () => {
    server.hasPictures = false;
    await opened();
    await pass(500);
    expect(server.n_refused).toBe(1);
  });

  it("asks for nothing when the table says what is known", async () => {
    await opened();
    server.asked = [];
    await model.follow(server.row);
    expect(server.asked).toEqual([]);
  });

  it("says why it is gone, shows what it has, and comes back", async () => {
    await opened();
    server.broken = (what) => {
      if (what === "facts") throw new ApiError(404, "episode 0 was removed while it was open");
    };
    await model.follow(undefined);
    expect(model.problem.value).toBe(
      "episode 0 was removed while it was open. What was loaded is still shown.",
    );
    state.step.value = 0; // loads something else, which is there
    await pass();
    expect(model.shown.value!.step).toBe(0);
    expect(model.problem.value).toMatch("removed");
    server.broken = () => {};
    await model.follow(server.row);
    expect(model.problem.value).toBeNull();
  });
});

describe("answers that come late", () => {
  it("are not the shares of another layer", async () => {
    await opened();
    server.delayMs = (what) => (what === "shares mean" ? 800 : 0);
    state.layer.value = "mean";
    await pass(300);
    state.layer.value = 0;
    await pass(3000);
    expect(server.asked).toContain("shares mean");
    expect(model.shares.value!.modalities).toEqual(["layer 0"]);
  });

  it("are not the ranges of another step", async () => {
    await opened();
    state.normalisation.value = "episode";
    server.delayMs = (what) => (what === "ranges 0" ? 800 : 0);
    state.step.value = 0;
    await pass(300);
    expect(model.ranges.ofChosen()).toEqual([]);
    state.step.value = 1;
    await pass(3000);
    expect(server.asked).toContain("ranges 0");
    expect(model.ranges.ofChosen()).toEqual([2]);
    state.step.value = 0; // came meanwhile, and is kept
    expect(model.ranges.ofChosen()).toEqual([1]);
  });

  it("of ranges are not asked for with every commit", async () => {
    state.normalisation.value = "episode";
    await opened();
    for (let i = 0; i < 8; i++) {
      server.nInferences += 1;
      await model.follow(server.row);
      await pass(500);
    }
    expect(server.asked.filter((what) => what.startsWith("ranges"))).toHaveLength(1);
    await pass(5000);
    expect(server.asked.filter((what) => what.startsWith("ranges"))).toHaveLength(2);
  });

  it("are not those of a word that is no longer pointed at", async () => {
    await opened();
    server.delayMs = (what) => (what.startsWith("prefix") ? 300 : 0);
    const asked = model.showWord(0);
    await model.showWord(null);
    await pass();
    await asked;
    expect(model.word.value).toBeNull();
  });
});

describe("one range for the episode", () => {
  it("is not asked for where each frame has its own", async () => {
    await opened();
    expect(server.asked.filter((what) => what.includes("ranges"))).toEqual([]);
    expect(model.ranges.ofHeads(CAMERA.name)).toEqual([]);
    expect(model.ranges.ofDenoiseSteps(CAMERA.name)).toEqual([]);
  });

  it("is that of every single head in the grid, and of every denoise step in the strip", async () => {
    state.normalisation.value = "episode";
    await opened();
    expect(model.ranges.ofHeads(CAMERA.name)).toEqual([2, 2, 2, 2]);
    expect(model.ranges.ofDenoiseSteps(CAMERA.name)).toEqual([3, 5]);
    expect(model.ranges.ofHeads("no such camera")).toEqual([]);
    state.frame.value = 3;
    await pass();
    expect(server.asked.filter((what) => what === "all ranges")).toHaveLength(1);
  });
});

describe("a word that is pointed at", () => {
  it("follows the inference and the head", async () => {
    await opened();
    await model.showWord(1);
    expect(model.word.value).toMatchObject({ group: 1, layer: 0, head: "mean" });
    expect(model.word.value!.attention[0]).toBe(1.5);
    state.head.value = 1;
    await pass();
    expect(model.word.value!.attention[0]).toBe(2);
    state.frame.value = 2;
    await pass();
    expect(model.word.value!.attention[0]).toBe(22);
  });

  it("has seen nothing of what enters with the actions, which is not 0", async () => {
    await opened();
    await model.showWord(1);
    const { prefix_len, n_keys } = model.facts.value!;
    expect(n_keys).toBeGreaterThan(prefix_len);
    const attention = [...model.word.value!.attention];
    expect(attention.slice(0, prefix_len).some(Number.isNaN)).toBe(false);
    expect(attention.slice(prefix_len).every(Number.isNaN)).toBe(true);
  });

  it("has colours of its own, not the episode's", async () => {
    state.normalisation.value = "episode";
    await opened();
    expect(sharedEnd([model], "episode")).toBe(2);
    await model.showWord(1);
    expect(sharedEnd([model], "episode")).toBe(1.5);
  });
});

it("says which frame cannot be loaded, until one can", async () => {
  await opened();
  server.broken = (what) => {
    if (what.startsWith("means 1")) throw new ApiError(422, "inference 1 is damaged");
  };
  state.frame.value = 2;
  await pass();
  expect(model.failedFrame.value).toBe(2);
  expect(model.problem.value).toBe("inference 1 is damaged");
  state.frame.value = 1;
  await pass();
  expect(model.failedFrame.value).toBeNull();
  expect(model.problem.value).toBeNull();
});

describe("masks", () => {
  beforeEach(() => {
    server.hasMasks = true;
  });

  it("are of the shown inference, and so are their numbers", async () => {
    await opened();
    expect([...model.maskOf(CAMERA.name)!.pixels]).toEqual([0, 0, 0, 0]);
    state.frame.value = 2;
    await pass();
    expect([...model.maskOf(CAMERA.name)!.pixels]).toEqual([1, 1, 1, 1]);
    expect(model.maskOf("another")).toBeNull();
  });

  it("cost no frame where they are damaged", async () => {
    server.hasDamagedMasks = true;
    await opened();
    expect(model.shown.value).toMatchObject({ frame: 0, masks: null });
    expect(model.problem.value).toBeNull();
  });

  it("are not asked for where there are none", async () => {
    server.hasMasks = false;
    await opened();
    expect(model.shown.value!.masks).toBeNull();
    expect(server.asked.filter((what) => /masks|roles/.test(what))).toEqual([]);
  });

  it("have shares of roles, of which a growing episode asks for the new ones alone", async () => {
    await opened();
    expect(model.roles.value).toMatchObject({ first: 0, share: [[0], [1]] });
    server.nInferences = 4;
    await model.follow(server.row);
    await pass();
    expect(model.roles.value).toMatchObject({ first: 0, share: [[0], [1], [2], [3]] });
    expect(server.asked.filter((what) => what.startsWith("roles"))).toEqual([
      `roles 0 1 ${CAMERA.name}`,
      `roles 2 1 ${CAMERA.name}`,
    ]);
  });

  it("have shares of the layer that is chosen last, however late another's come", async () => {
    await opened();
    server.delayMs = (what) => (what.startsWith("roles 0 mean") ? 800 : 0);
    state.layer.value = "mean";
    await pass(300);
    state.layer.value = 0;
    await pass(2000);
    expect(server.asked).toContain(`roles 0 mean ${CAMERA.name}`);
    expect(JSON.parse(model.roles.value!.asked)[0]).toContain(",0,");
  });
});
