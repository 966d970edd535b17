/** Cameras with the heatmap over them, and the heatmap alone beside it. */

import { useSignal, useSignalEffect, type ReadonlySignal } from "@preact/signals";
import { useRef } from "preact/hooks";
import { isMissing, percent, sum } from "./heat";
import { pixelMap, visiblePatches, type CameraView } from "./layout";
import { isFinished, type EpisodeModel, type Heat } from "./model";
import { objectInWords } from "./objects";
import { paintOutlines } from "./outlines";
import { paintHeat } from "./paint";
import { instanceAt } from "./scene";
import * as state from "./state";

/** What the pictures below say of themselves: the numbers beside a camera's name. */
function shareText(model: EpisodeModel, heat: Heat | undefined): string {
  if (!heat) return "";
  if (isMissing(heat.values)) {
    const isUnseen = model.word.value && heat.view.segment.start >= model.facts.value!.prefix_len;
    return isUnseen ? "the language model has not seen it" : "this map is missing from the store";
  }
  const hidden = visiblePatches(heat.view.geometry)
    .map((visible, i) => (visible ? 0 : heat.values[i]!))
    .reduce((total, value) => total + value, 0);
  const padding = hidden > 0 ? `, ${percent(hidden / (sum(heat.values) || 1))} of it on the letterbox` : "";
  return `${percent(heat.share)} of all attention${padding}`;
}

export function Cameras({ model, end }: { model: EpisodeModel; end: ReadonlySignal<number> }) {
  return (
    <div class="cameras">
      {model.views.value.map((view) => (
        <CameraFigure key={view.camera.name} model={model} view={view} end={end} />
      ))}
    </div>
  );
}

function CameraFigure(props: { model: EpisodeModel; view: CameraView; end: ReadonlySignal<number> }) {
  const { model, view, end } = props;
  const overlay = useRef<HTMLCanvasElement>(null);
  const raw = useRef<HTMLCanvasElement>(null);
  const outlines = { overlay: useRef<HTMLCanvasElement>(null), raw: useRef<HTMLCanvasElement>(null) };
  /** The object that is pointed at, and where, in shares of the picture. */
  const pointed = useSignal<{ kind: string; instance: number; x: number; y: number } | null>(null);
  const scratch = useRef<{ heat: ImageData; canvas: OffscreenCanvas } | null>(null);
  const map = pixelMap(view.geometry);
  const name = view.camera.name;
  const heat = model.heats.value.find((found) => found.view === view);
  const isChosen = model.camera.value === view;
  const videoError = model.facts.value?.video_errors[name];
  const scene = model.facts.value?.scene;
  const isOutlined = Boolean(scene?.cameras.includes(name)) && state.outlines.value === "on";

  useSignalEffect(() => {
    const found = model.heats.value.find((heat) => heat.view === view);
    const picture = model.shown.value?.pictures.get(name);
    const [colours, opacity] = [state.colours.value, state.opacity.value];
    if (!found || !overlay.current || !raw.current) return;
    scratch.current ??= {
      heat: new ImageData(map.width, map.height),
      canvas: new OffscreenCanvas(map.width, map.height),
    };
    const { heat: image, canvas } = scratch.current;
    const columns = view.geometry.grid_columns;
    paintHeat(image, found.values, map, columns, end.value, colours, "opaque");
    raw.current.getContext("2d")!.putImageData(image, 0, 0);
    paintHeat(image, found.values, map, columns, end.value, colours, opacity);
    canvas.getContext("2d")!.putImageData(image, 0, 0);
    const context = overlay.current.getContext("2d")!;
    context.clearRect(0, 0, map.width, map.height);
    if (picture) context.drawImage(picture, 0, 0, map.width, map.height);
    context.drawImage(canvas, 0, 0);
    model.isPainted.value = true;
  });

  useSignalEffect(() => {
    const scene = model.facts.value?.scene;
    const found = state.outlines.value === "on" ? model.maskOf(name) : null;
    for (const { current } of Object.values(outlines)) {
      if (!scene || !current) continue;
      paintOutlines(current, found?.pixels ?? null, scene);
      // For whoever waits for it.
      current.dataset["inference"] = String(model.shown.value?.inference ?? "");
    }
  });

  /** Where an event lies, in shares of the picture. */
  const placeOf = (event: MouseEvent) => {
    const box = (event.currentTarget as HTMLElement).getBoundingClientRect();
    return { x: (event.clientX - box.left) / box.width, y: (event.clientY - box.top) / box.height };
  };
  const point = (event: MouseEvent, kind: string) => {
    const found = isOutlined && scene ? model.maskOf(name) : null;
    const { x, y } = placeOf(event);
    const instance = found ? instanceAt(found.pixels, scene!, x, y) : -1;
    pointed.value = instance < 0 ? null : { kind, instance, x, y };
  };
  const leave = (event: PointerEvent) => {
    if (event.pointerType !== "touch") pointed.value = null; // a finger leaves as soon as it has tapped
  };
  const pickPatch = (event: MouseEvent) => {
    const place = placeOf(event);
    const [x, y] = [Math.floor(place.x * map.width), Math.floor(place.y * map.height)];
    const row = map.rows[Math.min(Math.max(y, 0), map.height - 1)]!;
    const column = map.columns[Math.min(Math.max(x, 0), map.width - 1)]!;
    if (row >= view.geometry.grid_rows || column >= view.geometry.grid_columns) return; // not seen: cut off
    state.patch.value = `${view.camera.label}:${row}:${column}`;
    state.camera.value = view.camera.label;
  };

  const shown = model.shown.value;
  const what = `attention on camera ${view.camera.label}, frame ${shown?.frame ?? 0}`;
  const isOlder = shown !== null && shown.pictures.has(name) && shown.pictureFrame !== shown.frame;
  return (
    <figure class={`camera ${isChosen ? "chosen" : ""}`}>
      <div class="pictures">
        {[
          { ref: overlay, lines: outlines.overlay, kind: "overlay", label: `Picture with ${what}` },
          { ref: raw, lines: outlines.raw, kind: "raw", label: `Map alone: ${what}` },
        ].map(({ ref, lines, kind, label }) => (
          <div
            class="picture"
            onClick={(event) => {
              pickPatch(event);
              point(event, kind);
            }}
            onPointerMove={(event) => point(event, kind)}
            onPointerLeave={leave}
            key={kind}
            title={isOutlined ? undefined : "Click a patch to ask who looks at it"}
          >
            <canvas
              ref={ref}
              width={map.width}
              height={map.height}
              role="img"
              aria-label={label}
              data-camera={view.camera.label}
              data-kind={kind}
            />
            {isOutlined && (
              <canvas
                ref={lines}
                class="outlines"
                aria-hidden="true"
                data-outlines={view.camera.label}
                data-over={kind}
              />
            )}
            <PatchMark view={view} />
            {isOutlined && pointed.value?.kind === kind && (
              <ObjectLabel model={model} view={view} {...pointed.value} />
            )}
          </div>
        ))}
      </div>
      <figcaption>
        <strong>{view.camera.label}</strong> <span>{shareText(model, heat)}</span>
        {isOlder && ` · picture of frame ${shown.pictureFrame}, when the policy was asked`}
        {view.camera.has_video
          ? view.camera.has_file && isFinished(view.camera) && <VideoLink model={model} camera={name} />
          : videoError
            ? ` · its video could not be written: ${videoError}`
            : " · recorded without video"}
      </figcaption>
    </figure>
  );
}

/** What is pointed at: its name, its role, and how much of this camera's attention lies on it. */
function ObjectLabel(props: {
  model: EpisodeModel;
  view: CameraView;
  instance: number;
  x: number;
  y: number;
}) {
  const { model, view, instance, x, y } = props;
  const said = objectInWords(model, view, instance);
  if (!said) return null;
  const style = {
    [x < 0.5 ? "left" : "right"]: `${100 * Math.min(x, 1 - x)}%`,
    [y < 0.5 ? "top" : "bottom"]: `calc(${100 * Math.min(y, 1 - y)}% + 14px)`,
  };
  return (
    <span class="object-label" role="status" style={style}>
      <strong>{said.name}</strong> {said.role}
      <br />
      {said.numbers}
    </span>
  );
}

/** The video as it was recorded, to play or keep: its player cannot stop at an exact frame. */
function VideoLink({ model, camera }: { model: EpisodeModel; camera: string }) {
  const address = model.videoUrl(camera);
  return address ? (
    <>
      {" · "}
      <a href={address} target="_blank" rel="noreferrer">
        MP4
      </a>
    </>
  ) : null;
}

/** A frame around the patch that was asked about. */
function PatchMark({ view }: { view: CameraView }) {
  const [label, row, column] = splitPatch(state.patch.value);
  if (label !== view.camera.label) return null;
  const map = pixelMap(view.geometry);
  const [top, bottom] = extent(map.rows, row);
  const [left, right] = extent(map.columns, column);
  if (bottom <= top || right <= left) return null;
  return (
    <svg
      class="mark"
      viewBox={`0 0 ${map.width} ${map.height}`}
      preserveAspectRatio="none"
      aria-hidden="true"
    >
      <rect x={left} y={top} width={right - left} height={bottom - top} vector-effect="non-scaling-stroke" />
    </svg>
  );
}

/** First and last + 1 pixel of a patch along an axis. */
function extent(patchOfPixel: Uint16Array, patch: number): [number, number] {
  const first = patchOfPixel.indexOf(patch);
  return first < 0 ? [0, 0] : [first, patchOfPixel.lastIndexOf(patch) + 1];
}

/** Label of the camera, row and column of an address's patch; the label is empty where there is none. */
export function splitPatch(patch: string): [string, number, number] {
  const [, label = "", row = "0", column = "0"] = /^(.+):(\d+):(\d+)$/.exec(patch) ?? [];
  return [label, Number(row), Number(column)];
}
