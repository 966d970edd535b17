/** Little-endian float16 → float32, by a table of all its 65,536 values. */

let table: Float32Array | null = null;

function makeTable(): Float32Array {
  const values = new Float32Array(65536);
  for (let bits = 0; bits < 65536; bits++) {
    const sign = bits & 0x8000 ? -1 : 1;
    const exponent = (bits >> 10) & 0x1f;
    const fraction = bits & 0x3ff;
    if (exponent === 0) values[bits] = sign * fraction * 2 ** -24;
    else if (exponent === 31) values[bits] = fraction ? NaN : sign * Infinity;
    else values[bits] = sign * (1 + fraction / 1024) * 2 ** (exponent - 15);
  }
  return values;
}

export function decodeFloat16(buffer: ArrayBuffer): Float32Array<ArrayBuffer> {
  table ??= makeTable();
  const bits = new Uint16Array(buffer);
  const values = new Float32Array(bits.length);
  for (let i = 0; i < bits.length; i++) values[i] = table[bits[i]!]!;
  return values;
}
