/** Heatmaps into pixels. */

import { colourIndex, colourTable, type ColourMap } from "./colormaps";
import type { PixelMap } from "./layout";

/** Opaque, or as an overlay whose opacity grows with the value's root, as in the package's pictures. */
export type Opacity = "opaque" | number;

const littleEndian = new Uint8Array(new Uint32Array([1]).buffer)[0] === 1;
const tables = new Map<string, Uint32Array>();

/** The 256 colours as pixels of an ImageData; missing values are entry 256, transparent. */
function pixels(name: ColourMap, opacity: Opacity): Uint32Array {
  const key = `${name} ${opacity}`;
  let table = tables.get(key);
  if (!table) {
    if (tables.size > 200) tables.clear(); // of an opacity slider that was moved a lot
    const colours = colourTable(name);
    table = new Uint32Array(257);
    for (let i = 0; i < 256; i++) {
      const alpha = opacity === "opaque" ? 255 : Math.round(255 * opacity * Math.sqrt(i / 255));
      const [r, g, b] = [colours[i * 3]!, colours[i * 3 + 1]!, colours[i * 3 + 2]!];
      table[i] = littleEndian
        ? ((alpha << 24) | (b << 16) | (g << 8) | r) >>> 0
        : ((r << 24) | (g << 16) | (b << 8) | alpha) >>> 0;
    }
    tables.set(key, table);
  }
  return table;
}

/**
 * Paint patches onto the pixels of the camera's own image.
 *
 * @param values (row × column) patches
 * @param end where the colour range ends
 */
export function paintHeat(
  target: ImageData,
  values: Float32Array,
  map: PixelMap,
  nColumns: number,
  end: number,
  name: ColourMap,
  opacity: Opacity,
): void {
  const table = pixels(name, opacity);
  const colours = new Uint32Array(values.length);
  for (let i = 0; i < values.length; i++) {
    colours[i] = table[Number.isNaN(values[i]!) ? 256 : colourIndex(values[i]!, end)]!;
  }
  const out = new Uint32Array(target.data.buffer);
  const [unseen, nRows] = [table[256]!, values.length / nColumns];
  let previous = -1;
  for (let y = 0; y < map.height; y++) {
    const row = map.rows[y]!;
    const start = y * map.width;
    if (row === previous) {
      out.copyWithin(start, start - map.width, start);
      continue;
    }
    previous = row;
    for (let x = 0; x < map.width; x++) {
      const column = map.columns[x]!;
      out[start + x] = row < nRows && column < nColumns ? colours[row * nColumns + column]! : unseen;
    }
  }
}

/** Paint a small heatmap, a pixel a patch, at a place of an image. */
export function paintPatches(
  target: ImageData,
  left: number,
  top: number,
  values: Float32Array,
  nColumns: number,
  end: number,
  name: ColourMap,
): void {
  const table = pixels(name, "opaque");
  const out = new Uint32Array(target.data.buffer);
  for (let i = 0; i < values.length; i++) {
    const place = (top + Math.floor(i / nColumns)) * target.width + left + (i % nColumns);
    out[place] = table[Number.isNaN(values[i]!) ? 256 : colourIndex(values[i]!, end)]!;
  }
}
