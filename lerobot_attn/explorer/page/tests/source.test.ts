import { describe, expect, it } from "vitest";
import { Cache } from "../src/source";

/** A cache that notes what is made. */
function noted(limit: number, weigh?: (value: string) => number) {
  const made: string[] = [];
  const cache = new Cache<string>(limit, weigh);
  const get = (key: string) =>
    cache.get(key, async () => {
      made.push(key);
      return key.toUpperCase();
    });
  return { made, get };
}

describe("Cache", () => {
  it("asks once for one address, also while the answer is on its way", async () => {
    const { made, get } = noted(3);
    expect(await Promise.all([get("a"), get("a"), get("b"), get("a")])).toEqual(["A", "A", "B", "A"]);
    expect(made).toEqual(["a", "b"]);
  });

  it("drops what was not used for longest", async () => {
    const { made, get } = noted(3);
    for (const key of ["a", "b", "c", "a", "d", "a", "c", "d"]) await get(key);
    expect(made).toEqual(["a", "b", "c", "d"]);
    await get("b");
    await get("a");
    expect(made).toEqual(["a", "b", "c", "d", "b", "a"]);
  });

  it("is limited by what its answers weigh, and keeps the last one however heavy", async () => {
    const { made, get } = noted(4, (value) => value.length);
    for (const key of ["aa", "bb", "cc", "aa"]) await get(key);
    expect(made).toEqual(["aa", "bb", "cc", "aa"]);
    for (const key of ["dddddd", "dddddd", "cc", "cc"]) await get(key);
    expect(made.slice(4)).toEqual(["dddddd", "cc"]);
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
