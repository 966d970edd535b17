import { describe, expect, it } from "vitest";
import { Cache } from "../src/source";

/** A cache that notes what is made and what is dropped. */
function noted(size: number) {
  const made: string[] = [];
  const dropped: string[] = [];
  const cache = new Cache<string>(size, (value) => dropped.push(value));
  const get = (key: string) =>
    cache.get(key, async () => {
      made.push(key);
      return key.toUpperCase();
    });
  return { made, dropped, get };
}

describe("Cache", () => {
  it("asks once for one address, also while the answer is on its way", async () => {
    const { made, get } = noted(3);
    expect(await Promise.all([get("a"), get("a"), get("b"), get("a")])).toEqual(["A", "A", "B", "A"]);
    expect(made).toEqual(["a", "b"]);
  });

  it("drops what was not used for longest", async () => {
    const { made, dropped, get } = noted(3);
    for (const key of ["a", "b", "c", "a", "d"]) await get(key);
    expect(dropped).toEqual(["B"]);
    await get("a");
    await get("c");
    await get("d");
    expect(made).toEqual(["a", "b", "c", "d"]);
    await get("b");
    expect(made).toEqual(["a", "b", "c", "d", "b"]);
    expect(dropped).toEqual(["B", "A"]);
  });

  it("asks again for an answer that failed", async () => {
    const cache = new Cache<number>(3);
    let calls = 0;
    const ask = () =>
      cache.get("a", async () => {
        calls += 1;
        if (calls === 1) throw new Error("the server is away");
        return calls;
      });
    await expect(ask()).rejects.toThrow("the server is away");
    expect(await ask()).toBe(2);
    expect(await ask()).toBe(2);
  });
});
