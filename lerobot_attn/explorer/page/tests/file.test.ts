import { describe, expect, it } from "vitest";
import type { Facts, Tokens } from "../src/api";
import { FileSource, type Embedded } from "../src/file";
import type { Where } from "../src/source";

const ID = { id: "episode", version: "v" };
const ONE = 0x3c00; // float16

async function zipped(bits: Uint16Array<ArrayBuffer>): Promise<string> {
  const stream = new Blob([bits]).stream().pipeThrough(new CompressionStream("gzip"));
  const bytes = new Uint8Array(await new Response(stream).arrayBuffer());
  return btoa(String.fromCharCode(...bytes));
}

/** Two of five inferences (1 and 4), two steps, two layers, one head, four keys: two patches and two words. */
async function embedded(change: (bits: Uint16Array) => void = () => {}): Promise<FileSource> {
  const shape = [2, 2, 2, 1, 4] as Embedded["means"]["shape"];
  const bits = new Uint16Array(2 * 2 * 2 * 4);
  // Each map looks at one key: place, step and layer decide which.
  for (let map = 0; map < 8; map++) bits[map * 4 + (map % 4)] = ONE;
  change(bits);
  const data = await zipped(bits);
  const geometry = { grid_rows: 1, grid_columns: 2 };
  const tokens = (text: string) => ({ text: [text], key_kind: [1, 1, 2, 2] }) as unknown as Tokens;
  return new FileSource({
    row: { id: "episode", task: "pick" },
    facts: {
      version: "v",
      n_inferences: 5,
      n_keys: 4,
      mean_layers: [3, 7],
      heads: [2],
      prefix_only_layers: [],
      shown_layer: null,
      denoise_steps: [0, 9],
      segments: [
        { kind: "image", name: "images.front", start: 0, stop: 2 },
        { kind: "language", name: "language", start: 2, stop: 4 },
      ],
      cameras: [{ name: "images.front", label: "front", geometry, has_video: true }],
      kinds: { padding: 0, image: 1, task: 2 },
      frames: [2, 9],
    } as unknown as Facts,
    timeline: { frame_inference: [0, 0, 1, 1, 2, 2, 3, 3, 4, 4] },
    inferences: [1, 4],
    tokens: [tokens("one"), tokens("four")],
    actions: [{ action: [[1]] }, { action: [[4]] }],
    means: { shape, data },
    pictures: { "images.front": { 2: "", 9: "" } },
    neurons: [0, 9].map((step) => ({
      first: 0,
      stream: "expert",
      units: [[3, 1]],
      group: "actions",
      reduction: "mean",
      denoise_step: step,
      mean: [step, 1, 2, 3, 4],
      expected: [0, 0, 0, 0, 0],
      each: [[step], [1], [2], [3], [4]],
    })),
  } as unknown as Embedded);
}

describe("an exported episode", async () => {
  const source = await embedded();

  it("holds the activations of its sets, and says so of all others", async () => {
    const asked = {
      stream: "expert",
      units: [[3, 1]] as [number, number][],
      group: "actions",
      reduction: "mean",
      step: 9,
    };
    expect(await source.neurons(ID, 0, asked, false)).toMatchObject({ mean: [9, 1, 2, 3, 4], each: null });
    expect(await source.neurons(ID, 3, asked, true)).toMatchObject({
      first: 3,
      mean: [3, 4],
      each: [[3], [4]],
    });
    for (const other of [
      { step: 4 },
      { group: "state" },
      { reduction: "max" },
      { units: [[3, 2]] as [number, number][] },
    ]) {
      await expect(source.neurons(ID, 0, { ...asked, ...other }, false)).rejects.toThrow(
        "does not hold these neurons",
      );
    }
  });

  it("keeps the recording's numbers of inferences", async () => {
    expect((await source.tokens(ID, 4)).text).toEqual(["four"]);
    expect(await source.actions(ID, 1)).toEqual({ action: [[1]] });
    const expected: [number, number, number[]][] = [
      [1, 0, [1, 0, 0, 0, 0, 1, 0, 0]],
      [1, 9, [0, 0, 1, 0, 0, 0, 0, 1]],
      [4, 0, [1, 0, 0, 0, 0, 1, 0, 0]],
      [4, 9, [0, 0, 1, 0, 0, 0, 0, 1]],
    ];
    for (const [inference, step, values] of expected) {
      const slab = await source.means(ID, inference, step);
      expect(slab.shape).toEqual([2, 1, 4]);
      expect([...slab.values]).toEqual(values);
    }
  });

  it("tells inferences apart", async () => {
    const other = await embedded((bits) => bits.fill(0, 16));
    expect([...(await other.means(ID, 4, 9)).values]).toEqual(new Array(8).fill(0));
    expect([...(await other.means(ID, 1, 9)).values]).toContain(1);
  });

  it.each(["tokens", "actions"] as const)("says which %s it does not hold", async (what) => {
    await expect(source[what](ID, 2)).rejects.toThrow("does not hold inference 2");
  });

  it("says what else it does not hold", async () => {
    await expect(source.means(ID, 0, 9)).rejects.toThrow("does not hold inference 0");
    await expect(source.map()).rejects.toThrow("does not hold full maps");
    await expect(source.prefix()).rejects.toThrow("does not hold the prefix");
    await expect(source.groups()).rejects.toThrow("does not hold other episodes");
    await expect(source.picture(ID, { name: "images.front", video_version: null }, 3)).rejects.toThrow(
      "does not hold frame 3",
    );
  });

  it("gives shares of what is there, and null of what is not", async () => {
    const found = await source.shares(ID, 0, { layer: 7, head: "mean", step: 0 });
    expect(found.modalities).toEqual(["images.front", "task"]);
    expect(found.share).toEqual([
      [null, null],
      [1, 0],
      [null, null],
      [null, null],
      [1, 0],
    ]);
    expect(found.effective_tokens).toEqual([null, 1, null, null, 1]);
    const mean = await source.shares(ID, 4, { layer: "mean", head: 2, step: 9 });
    expect(mean.share).toEqual([[0, 1]]);
    expect(mean.effective_tokens[0]).toBeCloseTo(2, 10);
  });

  it("gives null for a map that is missing", async () => {
    const holed = await embedded((bits) => bits.fill(0x7e00, 0, 4));
    const found = await holed.shares(ID, 1, { layer: 3, head: 2, step: 0 });
    expect(found.share[0]).toEqual([null, null]);
    expect(found.effective_tokens[0]).toBeNull();
  });

  it("gives shares of roles of what is there, and null of what is not", async () => {
    const mask = (coverage: object, area: object) => ({
      cameras: { "images.front": { runs: [1, 2], coverage, area, hidden: [] } },
    });
    const scene = { instances: [{ role: "background" }, { role: "target" }], cameras: ["images.front"] };
    const masked = new FileSource({
      ...(source as unknown as { data: Embedded }).data,
      facts: { ...(await source.facts(ID.id)), scene },
      masks: [mask({ 1: [[0], [0.25]] }, { 1: 0.125 }), mask({}, {})],
    } as unknown as Embedded);
    const where: Where = { layer: 3, head: 2, step: 0 };
    // Inference 1 looks at patch 0 alone; at inference 4 the target is not in view.
    expect(await masked.roles(ID, 0, where, "images.front")).toEqual({
      first: 0,
      camera: "images.front",
      roles: ["target"],
      share: [[null], [0.25], [null], [null], [null]],
      chance: [[null], [0.125], [null], [null], [null]],
    });
    expect((await masked.masks(ID, 4)).cameras["images.front"]!.coverage).toEqual({});
    await expect(source.masks(ID, 1)).rejects.toThrow("does not hold masks");
    await expect(source.roles(ID, 0, where, "images.front")).rejects.toThrow("does not hold masks");
  });

  it("ends colours by what is in the file", async () => {
    const halves = await embedded((bits) => {
      bits.fill(0);
      bits[0] = 0x3800; // inference 1, step 0, layer 3, patch 0: one half
      bits[16 + 4 + 1] = 0x3400; // inference 4, step 0, layer 7, patch 1: a quarter
    });
    const { layers, heads, ranges } = await halves.ranges(ID, 0);
    expect(layers).toEqual([3, 7, "mean"]);
    expect(heads).toEqual([2, "mean", "max"]);
    // The percentile of four patches, of which one is not 0: 99.7 % of the way to the largest.
    const near = (value: number) => expect.closeTo(0.997 * value, 6);
    expect(ranges["images.front"]).toEqual([
      [near(0.5), near(0.5), near(0.5)],
      [near(0.25), near(0.25), near(0.25)],
      // Means of layers: a quarter and an eighth, which lies below it.
      [0.125, 0.125, 0.125].map(() => expect.closeTo(0.125 + 0.125 * 0.997, 6)),
    ]);
  });

  it("is one episode, and changes never", async () => {
    const run = await source.run();
    expect([run.is_episode, run.episodes.length, run.name]).toEqual([true, 1, "pick"]);
    expect(source.live).toBe(false);
    expect(source.videoUrl()).toBeNull();
  });
});
