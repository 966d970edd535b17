/** Native controls for everything that is chosen, and the keys that do the same. */

import { effect, type ReadonlySignal } from "@preact/signals";
import type { Facts } from "./api";
import { COLOUR_MAPS, type ColourMap } from "./colormaps";
import { NORMALISATIONS, type Normalisation } from "./heat";
import { averagedInWords, isAll, tokenInWords } from "./labels";
import { actionOfQuery, countActions, denoises } from "./layout";
import type { EpisodeModel } from "./model";
import * as state from "./state";

const NORMALISATION_NAMES: Record<Normalisation, string> = {
  share: "share of all attention",
  image: "share within the image",
  frame: "relative to the frame's largest patch",
  episode: "share, one range for the episode",
};

interface Option {
  value: string;
  name: string;
}

function Select(props: {
  label: string;
  keys?: string;
  value: string;
  options: Option[];
  onChange: (value: string) => void;
}) {
  return (
    <label class="control">
      <span>
        {props.label} {props.keys && <kbd>{props.keys}</kbd>}
      </span>
      <select value={props.value} onChange={(event) => props.onChange(event.currentTarget.value)}>
        {props.options.map((option) => (
          <option key={option.value} value={option.value} selected={option.value === props.value}>
            {option.name}
          </option>
        ))}
      </select>
    </label>
  );
}

const numbers = (labels: number[], name: (label: number) => string = String) =>
  labels.map((label) => ({ value: String(label), name: name(label) }));

const chosen = <T extends string>(value: string) => (/^-?\d+$/.test(value) ? Number(value) : (value as T));

function meanInWords(facts: Facts): string {
  if (facts.decodes) return "mean of all";
  return facts.replay ? `mean of ${averagedInWords(facts).replace(/ actions$/, "")}` : "mean of the executed";
}

export function Controls({ model, hasMasks }: { model: EpisodeModel; hasMasks: boolean }) {
  const facts = model.facts.value;
  if (!facts) return null;
  const nActions = countActions(facts);
  const shown = model.shown.value;
  const layer = model.layer.value;
  const ofLayers = isAll(facts.mean_layers, facts.n_layers) ? "of all" : "of these";
  const ofHeads = isAll(facts.heads, facts.n_heads) ? "of all" : "of these";
  const lacksMap =
    state.query.value !== "executed" && !(typeof layer === "number" && facts.layers.includes(layer));
  const isNoToken =
    state.query.value === "frame" &&
    shown !== null &&
    (model.timeline.value?.frame_query[shown.frame] ?? -1) < 0;
  const isBlind = typeof layer === "number" && facts.prefix_only_layers.includes(layer);
  return (
    <section class="controls" aria-label="What to look at">
      {facts.mean_layers.length > 0 && (
        <Select
          label="Layer"
          keys="↑ ↓"
          value={String(layer)}
          options={[
            ...numbers(
              facts.mean_layers,
              (label) => `${label}${facts.layers.includes(label) ? " (full maps)" : ""}`,
            ),
            { value: "mean", name: `mean ${ofLayers}` },
          ]}
          onChange={(value) => (state.layer.value = chosen<"mean">(value))}
        />
      )}
      <Select
        label="Head"
        keys="h"
        value={String(model.head.value)}
        options={[
          { value: "mean", name: `mean ${ofHeads}` },
          { value: "max", name: `largest ${ofHeads}` },
          ...numbers(facts.heads),
        ]}
        onChange={(value) => (state.head.value = chosen<"mean" | "max">(value))}
      />
      {denoises(facts) && (
        <Select
          label="Denoise step"
          keys="[ ]"
          value={String(model.step.value)}
          options={facts.denoise_steps.map((label, i) => ({
            value: String(label),
            name: `${label} (t ${facts.flow_time[i]?.toFixed(1)})`,
          }))}
          onChange={(value) => (state.step.value = Number(value))}
        />
      )}
      <Select
        label="Camera"
        keys="c"
        value={model.camera.value?.camera.label ?? ""}
        options={model.views.value.map(({ camera }) => ({ value: camera.label, name: camera.label }))}
        onChange={(value) => (state.camera.value = value)}
      />
      <Select
        label={facts.decodes ? "Decoded token" : "Action token"}
        value={String(state.query.value)}
        options={[
          { value: "executed", name: meanInWords(facts) },
          ...(facts.layers.length
            ? [
                ...(facts.decodes
                  ? []
                  : [
                      {
                        value: "frame",
                        name: facts.replay ? "the one for this frame" : "the one executed now",
                      },
                    ]),
                ...numbers(
                  Array.from({ length: nActions }, (_, i) => i),
                  (label) => tokenInWords(facts, label),
                ),
              ]
            : []),
        ]}
        onChange={(value) => (state.query.value = chosen<"executed" | "frame">(value))}
      />
      <Select
        label="Colours show"
        value={state.normalisation.value}
        options={NORMALISATIONS.map((value) => ({ value, name: NORMALISATION_NAMES[value] }))}
        onChange={(value) => (state.normalisation.value = value as Normalisation)}
      />
      <Select
        label="Colour map"
        value={state.colours.value}
        options={COLOUR_MAPS.map((value) => ({ value, name: value }))}
        onChange={(value) => (state.colours.value = value as ColourMap)}
      />
      <label class="control">
        <span>Opacity</span>
        <input
          type="range"
          min="0"
          max="1"
          step="0.05"
          value={state.opacity.value}
          onInput={(event) => (state.opacity.value = Number(event.currentTarget.value))}
        />
      </label>
      {hasMasks && (
        <label class="control toggle">
          <span>
            Outlines <kbd>o</kbd>
          </span>
          <input
            type="checkbox"
            checked={state.outlines.value === "on"}
            onChange={(event) => (state.outlines.value = event.currentTarget.checked ? "on" : "off")}
          />
        </label>
      )}
      {lacksMap && (
        <p class="note" role="status">
          No full map of layer {layer} was recorded (of {facts.layers.join(", ") || "none"}): this is the mean
          of {averagedInWords(facts)}.
        </p>
      )}
      {!lacksMap && isNoToken && (
        <p class="note" role="status">
          {facts.replay
            ? "No action of a chunk stands for this frame"
            : "The action of this frame is no token of a chunk"}
          : this is the mean of {averagedInWords(facts)}.
        </p>
      )}
      {isBlind && (
        <p class="note" role="status">
          Layer {layer} does not see the action tokens.
        </p>
      )}
      {!lacksMap && shown?.row && (
        <p class="note" role="status">
          {facts.decodes ? "Decoded" : "Action"} token {actionOfQuery(facts, shown.row.query)} alone.
        </p>
      )}
    </section>
  );
}

export function Transport({
  model,
  isPlaying,
  toggle,
}: {
  model: EpisodeModel;
  isPlaying: boolean;
  toggle: () => void;
}) {
  const frame = model.frameShown();
  const frames = model.frames.value;
  const inference = model.shown.value?.inference ?? 0;
  return (
    <div class="transport">
      <button type="button" onClick={toggle} title="Space">
        {isPlaying ? "Pause" : "Play"}
      </button>
      <input
        type="range"
        aria-label="Frame"
        aria-valuetext={`frame ${frame}`}
        min="0"
        max={Math.max(0, frames.length - 1)}
        value={frames.placeOf(frame)}
        onInput={(event) => (state.frame.value = frames.at(Number(event.currentTarget.value)))}
      />
      <output>
        frame {frame} of {model.lastFrame.value} · inference {inference}
      </output>
    </div>
  );
}

/** Move to the next or previous of some labels. */
function next<T>(labels: T[], current: T, by: number, wrap = false): T {
  const place = labels.indexOf(current) + by;
  if (wrap) return labels[(place + labels.length) % labels.length] ?? current;
  return labels[Math.min(Math.max(place, 0), labels.length - 1)] ?? current;
}

const MOVES = /^(Arrow\w+|Home|End|Page\w+)$/;

/** Whether a key belongs to the control that has the focus. */
function isTaken(event: KeyboardEvent): boolean {
  const target = event.target as HTMLElement;
  if (event.ctrlKey || event.metaKey || event.altKey) return true;
  if (target.closest("dialog")) return true;
  if (target instanceof HTMLInputElement && target.type === "range") return MOVES.test(event.key);
  if (target instanceof HTMLInputElement && target.type === "checkbox") return event.key === " ";
  if (target instanceof HTMLSelectElement) return MOVES.test(event.key) || /^[\w ]$/.test(event.key);
  if (target instanceof HTMLButtonElement || target instanceof HTMLAnchorElement) return event.key === " ";
  return target.matches("input, textarea, summary");
}

/** Follow the keys of the explorer, frames being those of `longest`; returns how to stop. */
export function followKeys(
  model: EpisodeModel,
  longest: ReadonlySignal<EpisodeModel>,
  toggle: () => void,
  help: () => void,
): () => void {
  const onKey = (event: KeyboardEvent) => {
    if (isTaken(event)) return;
    const facts = model.facts.value;
    if (!facts) return;
    const by = event.shiftKey ? 10 : 1;
    const frames = longest.value.frames.value;
    const place = frames.placeOf(longest.value.frameShown());
    const seek = (place: number) => (state.frame.value = frames.at(place));
    const actions: Record<string, () => void> = {
      " ": toggle,
      ArrowRight: () => seek(place + by),
      ArrowLeft: () => seek(place - by),
      Home: () => seek(0),
      End: () => seek(frames.length - 1),
      ArrowUp: () => (state.layer.value = next([...facts.mean_layers, "mean"], model.layer.value, 1)),
      ArrowDown: () => (state.layer.value = next([...facts.mean_layers, "mean"], model.layer.value, -1)),
      "]": () => (state.step.value = next(facts.denoise_steps, model.step.value, 1)),
      "[": () => (state.step.value = next(facts.denoise_steps, model.step.value, -1)),
      h: () => (state.head.value = next(["mean", "max", ...facts.heads], model.head.value, 1, true)),
      H: () => (state.head.value = next(["mean", "max", ...facts.heads], model.head.value, -1, true)),
      c: () => {
        const labels = model.views.value.map(({ camera }) => camera.label);
        state.camera.value = next(labels, model.camera.value?.camera.label ?? "", 1, true);
      },
      o: () => (state.outlines.value = state.outlines.value === "on" ? "off" : "on"),
      "?": help,
    };
    const action = actions[event.key];
    if (!action) return;
    event.preventDefault();
    action();
  };
  addEventListener("keydown", onKey);
  return () => removeEventListener("keydown", onKey);
}

const LONGEST_WAIT_MS = 1000; // where an export lacks many frames

/** Play at the episode's own speed, as fast as frames can be shown; returns how to stop. */
export function play(longest: ReadonlySignal<EpisodeModel>, onEnd: () => void): () => void {
  const fps = longest.value.facts.value?.fps || 20;
  let due = performance.now();
  let seen: number | undefined;
  let request = requestAnimationFrame(tick);
  function tick(now: number) {
    request = requestAnimationFrame(tick);
    const model = longest.value;
    // The next frame waits until the last one is on the screen: playing shows every frame.
    const frame = model.shown.value?.frame;
    const isOnScreen = frame === seen;
    seen = frame;
    // One that cannot be loaded is passed over.
    const isHere = [frame, model.failedFrame.value].includes(model.frameShown());
    if (now < due || !isOnScreen || !isHere) return;
    if (model.frameShown() >= model.lastFrame.value) return onEnd();
    const frames = model.frames.value;
    const next = frames.at(frames.placeOf(model.frameShown()) + 1);
    const wait = Math.min((1000 * (next - model.frameShown())) / fps, LONGEST_WAIT_MS);
    due = Math.max(due + wait, now - wait);
    state.frame.value = next;
  }
  return () => cancelAnimationFrame(request);
}

/** Say on the document what has been drawn, for whoever waits for it. */
export function announceDrawn(model: EpisodeModel): () => void {
  let request = 0;
  const stop = effect(() => {
    const shown = model.shown.value;
    const isPainted = model.isPainted.value || !model.views.value.length;
    if (!shown || !isPainted) return;
    const drawn = [
      model.id,
      shown.frame,
      shown.step,
      model.layer.value,
      model.head.value,
      model.camera.value?.camera.label,
      state.normalisation.value,
      shown.row ? shown.row.query : "executed",
    ].join("/");
    // The canvases are painted in the next animation frame, for which they have asked before.
    cancelAnimationFrame(request);
    request = requestAnimationFrame(() => (document.documentElement.dataset["drawn"] = drawn));
  });
  return () => {
    stop();
    cancelAnimationFrame(request);
  };
}
