/** An episode as the page holds it: what was loaded, and what is shown of it. */

import { batch, computed, effect, signal, untracked, type ReadonlySignal } from "@preact/signals";
import {
  ApiError,
  type ActionChunk,
  type Choice,
  type EpisodeRow,
  type Facts,
  type Ranges,
  type Shares,
  type Slab,
  type Timeline,
  type Tokens,
} from "./api";
import { patches, pick, rangeEnd, rowOf, type Normalisation } from "./heat";
import { Frames } from "./labels";
import { cameraViews, type CameraView } from "./layout";
import type { EpisodeId, Source } from "./source";
import * as state from "./state";

/** Everything of one frame, which belongs together: it changes as a whole, when all of it is here. */
export interface Shown {
  frame: number;
  inference: number;
  step: number;
  /** (layer, head, key) */
  means: Slab;
  /** (1, head, key) of one action token, where it was asked for and recorded; with its layer. */
  row: { slab: Slab; layer: number; query: number } | null;
  tokens: Tokens;
  chunk: ActionChunk;
  /** Full name of a camera → its picture, if there is a video. */
  pictures: Map<string, ImageBitmap>;
}

export interface Heat {
  view: CameraView;
  /** (row × column) in the unit of the normalisation. */
  values: Float32Array;
  /** Sum over the patches: the share of all attention that this camera gets. */
  share: number;
}

const PREFETCH_FRAMES = 12;
const SHARES_SETTLE_MS = 120;
const STEPS_SETTLE_MS = 150;

export class EpisodeModel {
  readonly facts = signal<Facts | null>(null);
  readonly timeline = signal<Timeline | null>(null);
  readonly shares = signal<Shares | null>(null);
  readonly ranges = signal<Ranges | null>(null);
  readonly shown = signal<Shown | null>(null);
  /** Means of every denoise step of the shown inference, once they are here. */
  readonly steps = signal<{ inference: number; slabs: Slab[] } | null>(null);
  /** Whether the cameras' canvases are there and were painted. */
  readonly isPainted = signal(false);
  /** What went wrong last, in a sentence; null once something has worked again. */
  readonly problem = signal<string | null>(null);
  /** A word whose view of the images is shown instead, in the prefix. */
  readonly word = signal<{ group: number; attention: Float32Array; layer: number } | null>(null);

  readonly views = computed(() => (this.facts.value ? cameraViews(this.facts.value) : []));
  readonly frames = computed(() => new Frames(this.facts.value?.n_frames ?? 0, this.facts.value?.frames));
  readonly lastFrame = computed(() => this.frames.value.last);
  readonly step = computed(() => nearestLabel(this.facts.value?.denoise_steps ?? [], state.step.value));
  readonly layer = computed<Choice>(() =>
    state.layer.value === "mean"
      ? "mean"
      : nearestLabel(this.facts.value?.mean_layers ?? [], state.layer.value),
  );
  readonly head = computed(() =>
    typeof state.head.value === "string"
      ? state.head.value
      : nearestLabel(this.facts.value?.heads ?? [], state.head.value),
  );
  readonly camera = computed(
    () =>
      this.views.value.find((view) => view.camera.label === state.camera.value) ??
      this.views.value[0] ??
      null,
  );

  // What an inference's frames share stays the same object: who reads these is not drawn anew each frame.
  readonly means = computed(() => this.shown.value?.means ?? null);
  readonly tokens = computed(() => this.shown.value?.tokens ?? null);
  private readonly isOpened = computed(() => this.shown.value !== null || this.problem.value !== null);
  private readonly row = computed(() => this.shown.value?.row ?? null);

  /** (key) of the chosen layer and head, and whether it is an action token's own row. */
  readonly attention = computed(() => {
    const [means, row] = [this.means.value, this.row.value];
    if (!means) return null;
    if (row && row.layer === this.layer.value) return pick(row.slab, 0, this.headIndex.value);
    return pick(means, this.layerIndex.value, this.headIndex.value);
  });
  readonly layerIndex = computed<Choice>(() => indexOf(this.facts.value?.mean_layers, this.layer.value));
  readonly headIndex = computed(() => indexOf(this.facts.value?.heads, this.head.value));

  /** What lies over the cameras: the chosen map, or what a word of the prompt looks at. */
  readonly heats = computed<Heat[]>(() => {
    const attention = this.word.value?.attention ?? this.attention.value;
    return attention ? this.heatsOf(attention, state.normalisation.value) : [];
  });

  private readonly stops: (() => void)[] = [];
  private request = 0;
  private delivered = 0;
  /** The word that a person points at, whether or not its view is here yet. */
  private pointedAt: number | null = null;

  constructor(
    private readonly source: Source,
    readonly id: string,
    /** The frame that is wanted; may be beyond the last. */
    readonly wanted: ReadonlySignal<number>,
  ) {
    void this.open();
    this.stops.push(
      effect(() => this.loadShown()),
      effect(() => this.loadShares()),
      effect(() => this.loadRanges()),
      effect(() => this.loadSteps()),
    );
  }

  dispose(): void {
    for (const stop of this.stops) stop();
    this.request = Infinity;
  }

  get key(): EpisodeId {
    return { id: this.id, version: this.facts.value?.version ?? "" };
  }

  frameShown(): number {
    return this.frames.value.nearest(this.wanted.value);
  }

  heatsOf(attention: Float32Array, normalisation: Normalisation): Heat[] {
    return this.views.value.map((view) => ({
      view,
      values: patches(attention, view.segment, normalisation),
      share: attention
        .slice(view.segment.start, view.segment.stop)
        .reduce((total, value) => total + value, 0),
    }));
  }

  videoUrl(camera: string): string | null {
    return this.source.videoUrl(this.key, camera);
  }

  /** Where the colour range of the chosen map ends, for this episode's cameras. */
  episodeEnds(): number[] {
    const ranges = this.ranges.value;
    if (!ranges) return [];
    const layer = ranges.layers.indexOf(this.layer.value);
    const head = ranges.heads.indexOf(this.head.value);
    return this.views.value.map((view) => ranges.ranges[view.camera.name]?.[layer]?.[head] ?? 0);
  }

  /** The server says that the episode has changed. */
  async changed(row: EpisodeRow): Promise<void> {
    const before = this.facts.value;
    if (!before || row.version !== before.version) return this.open();
    const follows = this.wanted.value >= this.lastFrame.value && before.n_inferences > 0;
    await this.attempt(async () => {
      const [facts, timeline] = await Promise.all([
        this.source.facts(this.id),
        this.source.timeline(this.key),
      ]);
      batch(() => {
        this.facts.value = facts;
        this.timeline.value = timeline;
        if (follows && this.wanted === state.frame) state.frame.value = this.lastFrame.value;
      });
    });
  }

  removed(): void {
    this.problem.value = "This episode's store is gone. What was loaded is still shown.";
  }

  /** What the tokens of a word look at in the prefix, on average over tokens and heads. */
  async showWord(group: number | null): Promise<void> {
    this.pointedAt = group;
    const { facts, shown } = { facts: this.facts.value, shown: this.shown.value };
    const layer = facts?.prefix_layers.at(-1);
    if (group === null || !facts || !shown || layer === undefined) {
      this.word.value = null;
      return;
    }
    const keys = shown.tokens.group_of_key.flatMap((found, key) => (found === group ? [key] : []));
    await this.attempt(async () => {
      const slabs = await Promise.all(
        keys.map((key) => this.source.prefix(this.key, shown.inference, layer, key)),
      );
      // Meanwhile the pointer may have left, or the next inference have come, which asks for itself.
      if (this.pointedAt !== group || this.shown.value?.inference !== shown.inference) return;
      const attention = new Float32Array(facts.n_keys);
      for (const slab of slabs) {
        pick({ shape: [1, ...slab.shape], values: slab.values }, 0, this.headIndex.value).forEach(
          (value, key) => (attention[key]! += value / slabs.length),
        );
      }
      this.word.value = { group, attention, layer };
    });
  }

  /** The full map of the shown frame, (head, query, key): of the chosen layer or the last one that has it. */
  async fullMap(): Promise<{ slab: Slab; layer: number } | null> {
    const [facts, shown, chosen] = [this.facts.value, this.shown.value, this.layer.value];
    if (!facts || !shown || !facts.layers.length) return null;
    const layer = facts.layers.find((label) => label === chosen) ?? facts.layers.at(-1)!;
    return { slab: await this.source.map(this.key, shown.inference, shown.step, layer), layer };
  }

  private async open(): Promise<void> {
    await this.attempt(async () => {
      const [facts, timeline] = await Promise.all([
        this.source.facts(this.id),
        this.source.timeline({ id: this.id, version: "latest" }),
      ]);
      batch(() => {
        this.shares.value = this.ranges.value = this.steps.value = null;
        this.facts.value = facts;
        this.timeline.value = timeline;
      });
    });
  }

  private loadShown(): void {
    const [facts, timeline] = [this.facts.value, this.timeline.value];
    const [frame, step, query] = [this.frameShown(), this.step.value, state.query.value];
    // Only an action token's own row depends on the layer.
    const layer = query === "executed" ? null : this.layer.value;
    if (!facts || !timeline || !facts.n_inferences) return;
    const inference = timeline.frame_inference[frame] ?? 0;
    const old = untracked(() => this.shown.value);
    if (
      old?.frame === frame &&
      old.inference === inference &&
      old.step === step &&
      !old.row &&
      layer === null
    )
      return;
    const request = ++this.request;
    void this.attempt(async () => {
      const [means, row, tokens, chunk, pictures] = await Promise.all([
        this.source.means(this.key, inference, step),
        this.loadRow(facts, timeline, frame, inference, step, layer, query),
        this.source.tokens(this.key, inference),
        this.source.actions(this.key, inference),
        this.loadPictures(frame),
      ]);
      if (request < this.delivered || this.request === Infinity) return; // a later one was faster
      this.delivered = request;
      const isSameInference = untracked(() => this.shown.value)?.inference === inference;
      batch(() => {
        if (!isSameInference) this.word.value = null;
        this.shown.value = { frame, inference, step, means, row, tokens, chunk, pictures };
      });
      if (!isSameInference && this.pointedAt !== null) void this.showWord(this.pointedAt);
      if (request !== this.request) return;
      // The first view comes first.
      if (old === null) afterPaint(() => this.prefetch(timeline, frame, step, false));
      else this.prefetch(timeline, frame, step, frame < old.frame);
    });
  }

  private async loadRow(
    facts: Facts,
    timeline: Timeline,
    frame: number,
    inference: number,
    step: number,
    layer: Choice | null,
    query: state.Query,
  ): Promise<Shown["row"]> {
    if (typeof layer !== "number" || query === "executed" || !facts.layers.includes(layer)) return null;
    const wanted =
      query === "frame"
        ? (timeline.frame_query[frame] ?? facts.first_action_query)
        : facts.first_action_query + query;
    if (wanted >= facts.n_queries || wanted < 0) return null;
    const map = await this.source.map(this.key, inference, step, layer);
    return { slab: rowOf(map, wanted), layer, query: wanted };
  }

  private async loadPictures(frame: number): Promise<Map<string, ImageBitmap>> {
    const found = new Map<string, ImageBitmap>();
    await Promise.all(
      untracked(() => this.views.value).map(async ({ camera }) => {
        if (!camera.has_video) return;
        try {
          found.set(camera.name, await this.source.picture(this.key, camera.name, frame));
        } catch (error) {
          // Attention is shown without its picture: while it is recorded, a video has no frames yet.
          if (!(error instanceof ApiError) || error.status === 0) throw error;
        }
      }),
    );
    return found;
  }

  /** Ask for what a person is likely to look at next. */
  private prefetch(timeline: Timeline, frame: number, step: number, isBackwards: boolean): void {
    const ignore = () => {};
    const inference = timeline.frame_inference[frame] ?? 0;
    for (const next of [inference + 1, inference - 1]) {
      if (next < 0 || next >= timeline.inference_frame.length) continue;
      this.source.means(this.key, next, step).catch(ignore);
      this.source.tokens(this.key, next).catch(ignore);
      this.source.actions(this.key, next).catch(ignore);
    }
    const frames = this.frames.value;
    const place = frames.placeOf(frame);
    for (const { camera } of this.views.value) {
      for (let ahead = 1; camera.has_video && ahead <= PREFETCH_FRAMES; ahead++) {
        for (const next of [place + ahead, place - ahead]) {
          if (next < 0 || next >= frames.length || (next < place !== isBackwards && ahead > 3)) continue;
          this.source.picture(this.key, camera.name, frames.at(next)).catch(ignore);
        }
      }
    }
  }

  private loadShares(): (() => void) | void {
    const facts = this.facts.value;
    const where = { layer: this.layer.value, head: this.head.value, step: this.step.value };
    // The first view comes first.
    if (!facts || !facts.n_inferences || !this.isOpened.value) return;
    const key = this.key;
    const asked = JSON.stringify(where);
    const old = untracked(() => this.shares.value) as (Shares & { asked?: string }) | null;
    const known = old?.asked === asked ? old : null;
    if (known && known.share.length === facts.n_inferences) return;
    const timer = setTimeout(() => {
      void this.attempt(async () => {
        const first = known?.share.length ?? 0;
        const found = await this.source.shares(key, first, where);
        // An incomplete episode's later inferences may bring a modality that the earlier ones lack.
        const fits = known && String(known.modalities) === String(found.modalities);
        if (first && !fits) {
          this.shares.value = { ...(await this.source.shares(key, 0, where)), asked } as Shares;
          return;
        }
        this.shares.value = {
          ...found,
          first: 0,
          share: [...(known?.share ?? []), ...found.share],
          effective_tokens: [...(known?.effective_tokens ?? []), ...found.effective_tokens],
          asked,
        } as Shares;
      });
    }, SHARES_SETTLE_MS);
    return () => clearTimeout(timer);
  }

  private loadRanges(): void {
    const facts = this.facts.value;
    if (!facts || !facts.n_inferences || state.normalisation.value !== "episode") return;
    const [key, step] = [this.key, this.step.value];
    void this.attempt(async () => {
      this.ranges.value = await this.source.ranges(key, step);
    });
  }

  private loadSteps(): (() => void) | void {
    const [facts, shown] = [this.facts.value, this.shown.value];
    if (!facts || !shown || untracked(() => this.steps.value)?.inference === shown.inference) return;
    const timer = setTimeout(() => {
      void this.attempt(async () => {
        const slabs = await Promise.all(
          facts.denoise_steps.map((step) => this.source.means(this.key, shown.inference, step)),
        );
        if (this.shown.value?.inference === shown.inference) {
          this.steps.value = { inference: shown.inference, slabs };
        }
      });
    }, STEPS_SETTLE_MS);
    return () => clearTimeout(timer);
  }

  private async attempt(action: () => Promise<void>): Promise<void> {
    try {
      await action();
      if (this.request !== Infinity) this.problem.value = null;
    } catch (error) {
      if (this.request !== Infinity) this.problem.value = message(error);
    }
  }
}

/** Where the colour range of episodes that are shown together ends. */
export function sharedEnd(models: EpisodeModel[], normalisation: Normalisation): number {
  const shown = models.flatMap((model) => model.heats.value.map((heat) => heat.values));
  return rangeEnd(
    shown,
    normalisation,
    models.flatMap((model) => model.episodeEnds()),
  );
}

/** Call once what has just changed is on the screen. */
function afterPaint(action: () => void): void {
  requestAnimationFrame(() => setTimeout(action));
}

export function message(error: unknown): string {
  return error instanceof Error ? error.message : String(error);
}

/** The label itself, or the nearest one that was recorded; negative ones count from the end. */
function nearestLabel(labels: number[], wanted: number): number {
  if (!labels.length) return 0;
  if (wanted < 0) return labels.at(Math.max(wanted, -labels.length))!;
  return labels.reduce((best, label) => (Math.abs(label - wanted) < Math.abs(best - wanted) ? label : best));
}

function indexOf<T extends string>(labels: number[] | undefined, label: number | T): number | T {
  return typeof label === "string" ? label : Math.max(0, (labels ?? []).indexOf(label));
}
