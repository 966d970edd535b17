/** All layers and heads at once, and all denoise steps: small maps of the chosen camera. */

import { batch, useSignalEffect } from "@preact/signals";
import { useRef } from "preact/hooks";
import type { Choice, HeadChoice, Slab } from "./api";
import { patches, pick, rangeEnd, type Blind } from "./heat";
import { averagedInWords } from "./labels";
import { type CameraView, denoises } from "./layout";
import type { EpisodeModel } from "./model";
import { paintPatches } from "./paint";
import * as state from "./state";

const GAP = 1; // pixels of the canvas between maps

interface Cell {
  values: Float32Array;
  column: number;
  row: number;
}

/** Pixels of so many maps side by side. */
const extent = (n: number, nPatches: number) => n * (nPatches + GAP) - GAP;

/** A canvas keeps its place from before it is painted: what lies below does not jump. */
function shape([nColumns, nRows]: [number, number], { geometry }: CameraView) {
  return { aspectRatio: `${extent(nColumns, geometry.grid_columns)} / ${extent(nRows, geometry.grid_rows)}` };
}

/**
 * Paint maps side by side. With "frame" each has its own range; otherwise they share one.
 *
 * @param ofEpisode where the range ends of each of these maps over the whole episode, once it is known
 */
function paintCells(canvas: HTMLCanvasElement, cells: Cell[], view: CameraView, ofEpisode: number[]): void {
  const { grid_rows: height, grid_columns: width } = view.geometry;
  const nColumns = Math.max(...cells.map((cell) => cell.column)) + 1;
  const nRows = Math.max(...cells.map((cell) => cell.row)) + 1;
  canvas.width = extent(nColumns, width);
  canvas.height = extent(nRows, height);
  const image = new ImageData(canvas.width, canvas.height);
  const normalisation = state.normalisation.value;
  const end = rangeEnd(
    cells.map((cell) => cell.values),
    normalisation,
    ofEpisode,
  );
  canvas.dataset["end"] = String(end);
  for (const { values, column, row } of cells) {
    paintPatches(
      image,
      column * (width + GAP),
      row * (height + GAP),
      values,
      width,
      end,
      state.colours.value,
    );
  }
  canvas.getContext("2d")!.putImageData(image, 0, 0);
}

function cell(slab: Slab, layer: Choice, head: HeadChoice, view: CameraView, blind?: Blind) {
  return patches(pick(slab, layer, head, blind), view.segment, state.normalisation.value);
}

function place(event: MouseEvent, nColumns: number, nRows: number): [number, number] {
  const box = (event.currentTarget as HTMLElement).getBoundingClientRect();
  return [
    Math.min(nColumns - 1, Math.floor(((event.clientX - box.left) / box.width) * nColumns)),
    Math.min(nRows - 1, Math.floor(((event.clientY - box.top) / box.height) * nRows)),
  ];
}

/** A frame around chosen cells, in per cent of the canvas. */
function Chosen(props: {
  column: number;
  row: number;
  width?: number;
  height?: number;
  of: [number, number];
}) {
  const { column, row, width = 1, height = 1, of } = props;
  const share = (value: number, whole: number) => `${(100 * value) / whole}%`;
  return (
    <span
      class="chosen-cell"
      aria-hidden="true"
      style={{
        left: share(column, of[0]),
        top: share(row, of[1]),
        width: share(width, of[0]),
        height: share(height, of[1]),
      }}
    />
  );
}

/** Maps fill their card; a few of them are not blown up to more than a camera's picture. */
function widest(nColumns: number): string {
  return `${nColumns * 160}px`;
}

export function HeadGrid({ model }: { model: EpisodeModel }) {
  const canvas = useRef<HTMLCanvasElement>(null);
  const facts = model.facts.value;
  const view = model.camera.value;

  useSignalEffect(() => {
    const [facts, view, means] = [model.facts.value, model.camera.value, model.means.value];
    if (!facts || !view || !means || !canvas.current) return;
    const isWide = facts.mean_layers.length >= facts.heads.length;
    const cells = facts.mean_layers.flatMap((_, layer) =>
      facts.heads.map((_, head) => ({
        values: cell(means, layer, head, view),
        column: isWide ? layer : head,
        row: isWide ? head : layer,
      })),
    );
    if (cells.length) paintCells(canvas.current, cells, view, model.ranges.ofHeads(view.camera.name));
  });

  if (!facts || !view || !facts.mean_layers.length) return null;
  // The longer of the two lies across.
  const isWide = facts.mean_layers.length >= facts.heads.length;
  const [columns, rows] = isWide ? [facts.mean_layers, facts.heads] : [facts.heads, facts.mean_layers];
  const size: [number, number] = [columns.length, rows.length];
  const [column, row] = isWide
    ? [model.layerIndex.value, model.headIndex.value]
    : [model.headIndex.value, model.layerIndex.value];
  const across = isWide ? "layers across, heads down" : "heads across, layers down";
  return (
    <section class="panel" aria-labelledby="heads-title" id="heads">
      <h2 id="heads-title">
        Layers and heads{" "}
        <small>
          {across}; camera {view.camera.label}, mean of {averagedInWords(facts)}
        </small>
      </h2>
      <div class="grid-with-labels">
        <div class="row-labels" aria-hidden="true">
          {rows.map((label) => (
            <span key={label}>{label}</span>
          ))}
        </div>
        <div
          class="cells"
          style={{ maxWidth: widest(size[0]) }}
          title="Click a map to choose its layer and head"
          onClick={(event) => {
            const [x, y] = place(event, ...size);
            const [layer, head] = isWide ? [x, y] : [y, x];
            batch(() => {
              state.layer.value = facts.mean_layers[layer]!;
              state.head.value = facts.heads[head]!;
            });
          }}
        >
          <canvas
            ref={canvas}
            role="img"
            data-kind="heads"
            style={shape(size, view)}
            aria-label={`Maps of ${facts.mean_layers.length} layers and ${facts.heads.length} heads, ${across}`}
          />
          <Chosen
            of={size}
            column={typeof column === "number" ? column : 0}
            width={typeof column === "number" ? 1 : size[0]}
            row={typeof row === "number" ? row : 0}
            height={typeof row === "number" ? 1 : size[1]}
          />
        </div>
        <span />
        <div class="column-labels" aria-hidden="true" style={{ maxWidth: widest(size[0]) }}>
          {columns.map((label) => (
            <span key={label}>{label}</span>
          ))}
        </div>
      </div>
    </section>
  );
}

export function StepStrip({ model }: { model: EpisodeModel }) {
  const canvas = useRef<HTMLCanvasElement>(null);
  const facts = model.facts.value;
  const view = model.camera.value;

  useSignalEffect(() => {
    const [view, steps, layer, head] = [
      model.camera.value,
      model.steps.value,
      model.layerIndex.value,
      model.headIndex.value,
    ];
    if (!view || !steps?.slabs.length || !canvas.current) return;
    const cells = steps.slabs.map((slab, column) => ({
      values: cell(slab, layer, head, view, model.blind.value),
      column,
      row: 0,
    }));
    paintCells(canvas.current, cells, view, model.ranges.ofDenoiseSteps(view.camera.name));
  });

  if (!facts || !view || !facts.mean_layers.length || !denoises(facts)) return null;
  const size: [number, number] = [facts.denoise_steps.length, 1];
  const isStale = model.steps.value?.inference !== model.shown.value?.inference;
  return (
    <section class="panel" aria-labelledby="steps-title" id="steps">
      <h2 id="steps-title">
        From noise to action <small>denoise steps, by their flow time t</small>
      </h2>
      <div
        class={`cells strip ${isStale ? "stale" : ""}`}
        style={{ maxWidth: widest(size[0]) }}
        title="Click a map to choose its denoise step"
      >
        <div
          class="inner"
          onClick={(event) => {
            state.step.value = facts.denoise_steps[place(event, ...size)[0]]!;
          }}
        >
          <canvas
            ref={canvas}
            role="img"
            data-kind="steps"
            style={shape(size, view)}
            aria-label={`Maps of ${size[0]} denoise steps`}
          />
          <Chosen of={size} column={Math.max(0, facts.denoise_steps.indexOf(model.step.value))} row={0} />
        </div>
        <div class="column-labels" aria-hidden="true">
          {facts.denoise_steps.map((label, i) => (
            <span key={label}>
              {label} <small>t {facts.flow_time[i]?.toFixed(1)}</small>
            </span>
          ))}
        </div>
      </div>
    </section>
  );
}
