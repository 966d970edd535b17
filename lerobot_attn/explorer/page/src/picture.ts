/** The view as a PNG: the cameras as they are shown, and a caption that says what they show. */

import type { Facts } from "./api";
import { NORMALISATIONS, type Normalisation } from "./heat";
import { averagedInWords, headInWords, inWords, tokenInWords } from "./labels";
import { actionOfQuery, denoises } from "./layout";
import type { EpisodeModel } from "./model";
import { olderFrame } from "./objects";
import { outlinesInWords } from "./outlines";
import * as state from "./state";

const GAP = 12;
const LINE = 20;
const HEIGHT = 360;
const UNITS: Record<Normalisation, string> = {
  share: "share of all attention",
  image: "share within the image",
  frame: "relative to the frame's largest patch",
  episode: "share of all attention, one range for the episode",
};

/** What a picture must say of itself. */
export function caption(model: EpisodeModel): string[] {
  const [facts, shown] = [model.facts.value, model.shown.value];
  if (!facts || !shown || !NORMALISATIONS.includes(state.normalisation.value)) return [];
  const layer =
    model.layer.value === "mean"
      ? `mean of ${inWords("layer", facts.mean_layers, facts.n_layers)}`
      : `layer ${model.layer.value}`;
  const head = headInWords(model.head.value, facts);
  const query = shown.row
    ? tokenInWords(facts, actionOfQuery(facts, shown.row.query))
    : facts.decodes
      ? `mean of ${averagedInWords(facts)}`
      : `mean of ${facts.replay ? "" : "executed "}actions${executedInWords(facts)}`;
  const step = denoises(facts) ? `denoise step ${shown.step} · ` : "";
  const word = model.word.value;
  return [
    `${facts.task_group ?? ""} ${facts.task_id ?? ""} · episode ${facts.episode ?? "?"} · ${facts.task}`,
    word
      ? `frame ${shown.frame} · what “${shown.tokens.groups[word.group]?.label}” looks at in the prefix, layer ${word.layer}, ${headInWords(word.head, facts)} · ${UNITS[state.normalisation.value]}`
      : `frame ${shown.frame} · ${layer} · ${head} · ${step}${query} · ${UNITS[state.normalisation.value]}`,
    ...(state.outlines.value === "on" && facts.scene && model.masks.value
      ? [`outlines${asAt(model)}: ${outlinesInWords(facts.scene)}`]
      : []),
    ...(shown.pictures.size && shown.pictureFrame !== shown.frame
      ? [`pictures of frame ${shown.pictureFrame}, when the policy was asked`]
      : []),
    ...(facts.random_weights ? ["random weights: the maps mean nothing"] : []),
    ...(facts.condition ? [`condition: ${facts.condition}`] : []),
    ...(facts.policy_remark ? [facts.policy_remark] : []),
  ];
}

function asAt(model: EpisodeModel): string {
  const older = olderFrame(model);
  return older === null ? "" : ` as at frame ${older}`;
}

/** " 0–9", or nothing where it is not known which are executed. */
function executedInWords(facts: Facts): string {
  if (!facts.executed_queries) return "";
  const [start, stop] = facts.executed_queries;
  return ` ${actionOfQuery(facts, start)}–${actionOfQuery(facts, stop - 1)}`;
}

/** Draw everything that the cameras show onto one canvas. */
export function compose(models: EpisodeModel[], root: ParentNode = document): HTMLCanvasElement {
  const rows = models.map((model) => ({
    lines: caption(model),
    canvases: [
      ...root.querySelectorAll<HTMLCanvasElement>(
        `[data-episode="${CSS.escape(model.id)}"] canvas[data-camera]`,
      ),
    ],
  }));
  const widthOf = (canvas: HTMLCanvasElement) => Math.round((canvas.width * HEIGHT) / canvas.height);
  const width = Math.max(
    640,
    ...rows.map(({ canvases }) => canvases.reduce((total, canvas) => total + widthOf(canvas) + GAP, GAP)),
  );
  const heightOf = (lines: string[]) => HEIGHT + GAP + lines.length * LINE + GAP;
  const found = document.createElement("canvas");
  found.width = width;
  found.height = GAP + rows.reduce((total, { lines }) => total + heightOf(lines), 0);
  const context = found.getContext("2d")!;
  context.fillStyle = "#fff";
  context.fillRect(0, 0, found.width, found.height);
  context.imageSmoothingEnabled = false;
  context.font = "13px system-ui, sans-serif";
  context.textBaseline = "top";
  let top = GAP;
  for (const { lines, canvases } of rows) {
    let left = GAP;
    for (const canvas of canvases) {
      context.drawImage(canvas, left, top, widthOf(canvas), HEIGHT);
      const outlines = canvas.parentElement?.querySelector<HTMLCanvasElement>("canvas[data-outlines]");
      if (outlines?.width) {
        context.imageSmoothingEnabled = true;
        context.drawImage(outlines, left, top, widthOf(canvas), HEIGHT);
        context.imageSmoothingEnabled = false;
      }
      left += widthOf(canvas) + GAP;
    }
    lines.forEach((line, i) => {
      context.fillStyle = line.startsWith("random weights") ? "#b00020" : "#222";
      context.fillText(line, GAP, top + HEIGHT + GAP / 2 + i * LINE, width - 2 * GAP);
    });
    top += heightOf(lines);
  }
  return found;
}

export function download(models: EpisodeModel[]): void {
  const shown = models[0]?.shown.value;
  compose(models).toBlob((blob) => {
    if (!blob) return;
    const link = document.createElement("a");
    link.href = URL.createObjectURL(blob);
    link.download = `${models[0]!.id.replaceAll(":", "_")}_frame_${shown?.frame ?? 0}.png`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
  }, "image/png");
}
