/** Outlines of objects onto a canvas that lies over a camera's picture. */

import type { Scene } from "./api";
import { isRole, LOOKS, ofRole, outlinesOf, ROLES } from "./scene";

const SHARP_PX = 720; // of the canvas at least, so that lines are smooth on a large picture
const [LINE_PX, CASING_PX] = [2, 0.75]; // on the screen
const CASING = "#FFFFFFB0";

/**
 * Draw each object's outline inside of it, so that objects that touch keep a line each; a white line beside it sets it
 * off from dark and bright pictures alike.
 *
 * @param mask (height × width) of one camera; null draws nothing
 */
export function paintOutlines(canvas: HTMLCanvasElement, mask: Int16Array | null, scene: Scene): void {
  const { width_px: width, height_px: height } = scene;
  // A whole number of pixels for each of the mask's, or neighbours would show a seam.
  const scale = Math.ceil(SHARP_PX / Math.max(width, height));
  canvas.width = width * scale;
  canvas.height = height * scale;
  if (!mask) return;
  const context = canvas.getContext("2d")!;
  const perPixel = canvas.width / (canvas.clientWidth || canvas.width);
  const [line, casing] = [LINE_PX * perPixel, CASING_PX * perPixel];
  const found = outlinesOf(mask, width);
  context.lineJoin = "round";
  for (const [instance, lines] of found) {
    const role = scene.instances[instance]?.role ?? "";
    if (!isRole(role)) continue;
    const path = new Path2D();
    for (const points of lines) {
      path.moveTo(points[0]! * scale, points[1]! * scale);
      for (let i = 2; i < points.length; i += 2) path.lineTo(points[i]! * scale, points[i + 1]! * scale);
      path.closePath();
    }
    context.save();
    context.clip(path, "evenodd");
    context.setLineDash(LOOKS[role].dashes.map((length) => length * line));
    context.strokeStyle = CASING;
    context.lineWidth = 2 * (line + casing);
    context.stroke(path);
    context.strokeStyle = LOOKS[role].colour;
    context.lineWidth = 2 * line;
    context.stroke(path);
    context.restore();
  }
}

/** What the outlines are, in words: "target alphabet_soup_1; distractor milk_1, butter_1". */
export function outlinesInWords(scene: Scene): string {
  return ROLES.flatMap((role) => {
    const names = ofRole(scene.instances, role).map((number) => scene.instances[number]!.name);
    return names.length ? [`${role} ${names.join(", ")}`] : [];
  }).join("; ");
}
