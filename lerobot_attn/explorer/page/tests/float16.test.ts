import { describe, expect, it } from "vitest";
import { decodeFloat16 } from "../src/float16";

const bits = (...values: number[]) => decodeFloat16(new Uint16Array(values).buffer);

describe("float16", () => {
  it("knows the numbers of the standard", () => {
    expect([...bits(0x3c00, 0xc000, 0x3555, 0x7bff, 0x0400, 0x03ff, 0x0001, 0x0000)]).toEqual([
      1,
      -2,
      0.333251953125,
      65504,
      2 ** -14,
      1023 * 2 ** -24,
      2 ** -24,
      0,
    ]);
    expect([...bits(0x7c00, 0xfc00)]).toEqual([Infinity, -Infinity]);
    expect([...bits(0x7e00, 0xfe01, 0x7c01)]).toEqual([NaN, NaN, NaN]);
    expect(Object.is(bits(0x8000)[0], -0)).toBe(true);
  });

  it("reads the low byte first", () => {
    expect([...decodeFloat16(new Uint8Array([0x00, 0x3c, 0x00, 0xb8]).buffer)]).toEqual([1, -0.5]);
  });

  it("grows with the bits, and is odd", () => {
    const values = decodeFloat16(Uint16Array.from({ length: 65536 }, (_, i) => i).buffer);
    const finite = Array.from({ length: 0x7c00 }, (_, i) => i);
    const unlike = finite.filter((i) => values[i + 0x8000] !== -values[i]!);
    expect(unlike).toEqual([]);
    // 11 bits count: from one number to the next it is a 1024th to a 2048th of it, below 2^-14 always 2^-24.
    const wrong = finite.slice(0, -1).filter((i) => {
      const step = values[i + 1]! - values[i]!;
      if (i < 0x0400) return step !== 2 ** -24;
      return step > values[i]! * 2 ** -10 || step < values[i]! * 2 ** -11;
    });
    expect(wrong).toEqual([]);
  });
});
