/** An episode as the page holds it: what was loaded, and what is shown of it. */

import { batch, computed, effect, signal, untracked, type ReadonlySignal } from "@preact/signals";
import {
  ApiError,
  type ActionChunk,
  type Camera,
  type Choice,
  type HeadChoice,
  type EpisodeRow,
  type CameraMask,
  type Facts,
  type Masks,
  type RoleShares,
  type Shares,
  type Slab,
  type Timeline,
  type Tokens,
} from "./api";
import { patches, pick, rangeEnd, rowOf, type Normalisation } from "./heat";
import { Frames, indexOf, nearestLabel } from "./labels";
import { blindOf, cameraViews, queryOfAction, type CameraView } from "./layout";
import { EpisodeNeurons } from "./neurons";
import { EpisodeRanges } from "./ranges";
import { decodeMask, isKnown } from "./scene";
import type { EpisodeId, Source } from "./source";
import * as state from "./state";

/** Everything of one frame, which belongs together: it changes as a whole, when all of it is here. */
export interface Shown {
  /** Of the recording, as the facts have it. */
  version: string;
  frame: number;
  inference: number;
  step: number;
  /** (layer, head, key) */
  means: Slab;
  /** (1, head, key) of one action token, where it was asked for and recorded; with its layer. */
  row: { slab: Slab; layer: number; query: number } | null;
  tokens: Tokens;
  chunk: ActionChunk;
  /** null where the recording has none, or they cannot be read. */
  masks: Masks | null;
  /** Full name of a camera → its picture, if there is a video. */
  pictures: Map<string, ImageBitmap>;
  /** What they show: the frame, or, while it is recorded, the one at which the policy was asked. */
  pictureFrame: number;
}

/** What is loaded by itself, and can fail by itself. */
export type Loaded =
  "episode" | "frame" | "shares" | "roles" | "neurons" | "ranges" | "all ranges" | "steps" | "word" | "map";

interface Word {
  group: number;
  /** (key) */
  attention: Float32Array;
  layer: number;
  head: HeadChoice;
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
  readonly shares = signal<(Shares & { asked: string }) | null>(null);
  /** Of the chosen camera. */
  readonly roles = signal<(RoleShares & { asked: string }) | null>(null);
  readonly shown = signal<Shown | null>(null);
  /** Means of every denoise step of the shown inference, once they are here. */
  readonly steps = signal<{ inference: number; slabs: Slab[] } | null>(null);
  /** Whether the cameras' canvases are there and were painted. */
  readonly isPainted = signal(false);
  /** What went wrong, by what was loaded, in a sentence each; until the same has worked again. */
  private readonly problems = signal<ReadonlyMap<Loaded, string>>(new Map());
  readonly problem = computed(() => [...this.problems.value.values()][0] ?? null);
  /** The wanted frame, if it could not be loaded. */
  readonly failedFrame = signal<number | null>(null);
  /** A word whose view of the images is shown instead, in the prefix, at the chosen head. */
  readonly word = signal<Word | null>(null);

  readonly views = computed(() => (this.facts.value ? cameraViews(this.facts.value) : []));
  readonly frames = computed(() => {
    const [facts, timeline] = [this.facts.value, this.timeline.value];
    // The two are asked for at once, and a commit may come between their answers.
    const n = Math.min(facts?.n_frames ?? 0, timeline?.frame_inference.length ?? 0);
    return new Frames(n, facts?.frames);
  });
  readonly lastFrame = computed(() => this.frames.value.last);
  readonly step = computed(() => nearestLabel(this.facts.value?.denoise_steps ?? [], state.step.value));
  readonly layer = computed<Choice>(() => {
    const [facts, chosen] = [this.facts.value, state.layer.value];
    if (chosen === "mean") return "mean";
    const wanted = chosen === state.UNCHOSEN ? (facts?.shown_layer ?? chosen) : chosen;
    return nearestLabel(facts?.mean_layers ?? [], wanted);
  });
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
  readonly masks = computed(() => this.shown.value?.masks ?? null);
  private readonly isOpened = computed(() => this.shown.value !== null || this.problem.value !== null);
  private readonly row = computed(() => this.shown.value?.row ?? null);

  /** (key) of the chosen layer and head, and whether it is an action token's own row. */
  readonly attention = computed(() => {
    const [means, row] = [this.means.value, this.row.value];
    if (!means) return null;
    if (row && row.layer === this.layer.value) return pick(row.slab, 0, this.headIndex.value);
    return pick(means, this.layerIndex.value, this.headIndex.value, this.blind.value);
  });
  /** Layers that cannot see the suffix, by their places. */
  readonly blind = computed(() => (this.facts.value ? blindOf(this.facts.value) : undefined));
  readonly layerIndex = computed<Choice>(() => indexOf(this.facts.value?.mean_layers, this.layer.value));
  readonly headIndex = computed(() => indexOf(this.facts.value?.heads, this.head.value));

  /** What lies over the cameras: the chosen map, or what a word of the prompt looks at. */
  readonly heats = computed<Heat[]>(() => {
    const attention = this.word.value?.attention ?? this.attention.value;
    return attention ? this.heatsOf(attention, state.normalisation.value) : [];
  });

  readonly ranges: EpisodeRanges;
  readonly neurons: EpisodeNeurons;
  readonly hasMeans = computed(() => Boolean(this.facts.value?.mean_layers.length));
  /** Which shares are wanted. */
  private readonly sharesAsked = computed(() =>
    JSON.stringify([this.facts.value?.version, this.layer.value, this.head.value, this.step.value]),
  );

  /** Which role shares are wanted; null where there can be none. */
  private readonly rolesAsked = computed(() => {
    const camera = this.camera.value?.camera.name;
    const hasMasks = camera !== undefined && this.facts.value?.scene?.cameras.includes(camera);
    return hasMasks ? JSON.stringify([this.sharesAsked.value, camera]) : null;
  });

  private readonly stops: (() => void)[] = [];
  isDisposed = false;
  private readonly pixels = new WeakMap<CameraMask, Int16Array>();
  private request = 0;
  private delivered = 0;
  private refreshes = 0;
  /** The word that a person points at, whether or not its view is here yet. */
  private pointedAt: number | null = null;

  constructor(
    private readonly source: Source,
    readonly id: string,
    /** The frame that is wanted; may be beyond the last. */
    readonly wanted: ReadonlySignal<number>,
  ) {
    this.ranges = new EpisodeRanges(this, source);
    this.neurons = new EpisodeNeurons(this, source);
    void this.refresh();
    this.stops.push(
      effect(() => this.loadShown()),
      effect(() => this.loadShares()),
      effect(() => this.loadRoles()),
      effect(() => this.neurons.load()),
      effect(() => this.ranges.loadStep()),
      effect(() => this.ranges.loadAll()),
      effect(() => this.loadSteps()),
      effect(() => this.followHead()),
    );
  }

  dispose(): void {
    for (const stop of this.stops) stop();
    this.isDisposed = true;
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

  /** What a camera shows at the shown inference: its mask and what is known of it; null where there is none. */
  maskOf(camera: string): { mask: CameraMask; pixels: Int16Array } | null {
    const mask = this.masks.value?.cameras[camera];
    if (!mask || !isKnown(mask)) return null;
    let pixels = this.pixels.get(mask);
    if (!pixels) this.pixels.set(mask, (pixels = decodeMask(mask.runs)));
    return { mask, pixels };
  }

  videoUrl(camera: string): string | null {
    return this.source.videoUrl(this.key, camera);
  }

  /**
   * Take what the server has now, if it differs from what is here.
   *
   * @param row of the run's table; none if the server has no such episode, or none that can be opened
   */
  async follow(row: EpisodeRow | undefined): Promise<void> {
    const [facts, failed] = [this.facts.value, this.problems.value.has("episode")];
    if (!facts && !failed) return; // it is being loaded
    if (!row && failed) return; // that is said already
    const told = ["version", "n_frames", "n_inferences", "complete", "success"] as const;
    if (row && facts && !failed && told.every((name) => row[name] === facts[name])) return;
    await this.refresh();
  }

  /** What a word looks at in the prefix, at the chosen head, on average over the word's tokens. */
  async showWord(group: number | null): Promise<void> {
    this.pointedAt = group;
    const { facts, shown } = { facts: this.facts.value, shown: this.shown.value };
    const layer = facts?.prefix_layers.at(-1);
    if (group === null || !facts || !shown || layer === undefined) {
      this.word.value = null;
      return;
    }
    const keys = shown.tokens.group_of_key.flatMap((found, key) => (found === group ? [key] : []));
    const head = this.head.value;
    await this.attempt("word", async () => {
      const slabs = await Promise.all(
        keys.map((key) => this.source.prefix(this.key, shown.inference, layer, key)),
      );
      // Meanwhile the pointer may have left, or another head or inference be chosen, which asks for itself.
      const isWanted = this.pointedAt === group && this.head.value === head;
      if (!isWanted || this.shown.value?.inference !== shown.inference) return;
      // The prefix has not seen what enters with the actions: that is absent, which is not 0.
      const attention = new Float32Array(facts.n_keys).fill(NaN).fill(0, 0, facts.prefix_len);
      for (const slab of slabs) {
        pick({ shape: [1, ...slab.shape], values: slab.values }, 0, this.headIndex.value).forEach(
          (value, key) => (attention[key]! += value / slabs.length),
        );
      }
      this.word.value = { group, attention, layer, head };
    });
  }

  /** Full map of the shown frame, (head, query, key): of the chosen layer or the last that has it; null if none. */
  async fullMap(): Promise<{ slab: Slab; layer: number } | null> {
    const [facts, shown, chosen] = [this.facts.value, this.shown.value, this.layer.value];
    if (!facts || !shown || !facts.layers.length) return null;
    const layer = facts.layers.find((label) => label === chosen) ?? facts.layers.at(-1)!;
    let slab: Slab | null = null;
    await this.attempt("map", async () => {
      slab = await this.source.map(this.key, shown.inference, shown.step, layer);
    });
    return slab && { slab, layer };
  }

  /** Take facts and timeline as they are now; of another recording in the same place nothing is kept. */
  private async refresh(): Promise<void> {
    const call = ++this.refreshes;
    await this.attempt("episode", async () => {
      const [facts, timeline] = await Promise.all([
        this.source.facts(this.id),
        this.source.timeline({ id: this.id, version: "latest" }),
      ]);
      if (call !== this.refreshes || this.isDisposed) return;
      const old = this.facts.value;
      const isSame = old?.version === facts.version;
      const follows = isSame && old.n_inferences > 0 && this.wanted.value >= this.lastFrame.value;
      batch(() => {
        if (!isSame) this.forget();
        this.facts.value = facts;
        this.timeline.value = timeline;
        // One beyond the last belongs to a longer episode beside this one.
        if (follows && this.wanted === state.frame)
          state.frame.value = Math.max(state.frame.value, this.lastFrame.value);
      });
    });
  }

  private forget(): void {
    this.delivered = ++this.request;
    this.shown.value = this.shares.value = this.steps.value = this.word.value = null;
    this.roles.value = null;
    this.ranges.forget();
    this.neurons.forget();
    this.isPainted.value = false;
  }

  private loadShown(): void {
    const [facts, timeline] = [this.facts.value, this.timeline.value];
    const [frame, step, query] = [this.frameShown(), this.step.value, state.query.value];
    // Only an action token's own row depends on the layer.
    const layer = query === "executed" ? null : this.layer.value;
    if (!facts || !timeline || !facts.n_inferences) return;
    const inference = timeline.frame_inference[frame] ?? 0;
    const old = untracked(() => this.shown.value);
    const wanted = { version: facts.version, frame, inference, step };
    const isShown =
      old && (["version", "frame", "inference", "step"] as const).every((name) => old[name] === wanted[name]);
    // A video may be finished after its frame was shown.
    const lacksPicture = this.views.value.some(
      ({ camera }) =>
        camera.has_video &&
        (!old?.pictures.has(camera.name) || (isFinished(camera) && old.pictureFrame !== frame)),
    );
    if (isShown && !lacksPicture && !old.row && layer === null) return;
    const request = ++this.request;
    const load = async () => {
      const [means, row, tokens, chunk, masks, pictures] = await Promise.all([
        this.loadMeans(facts, inference, step),
        this.loadRow(facts, timeline, frame, inference, step, layer, query),
        this.source.tokens(this.key, inference),
        this.source.actions(this.key, inference),
        this.loadMasks(facts, inference),
        this.loadPictures(frame, timeline.inference_frame[inference]),
      ]);
      if (request < this.delivered || this.isDisposed) return; // a later one was faster
      this.delivered = request;
      const isSameInference = untracked(() => this.shown.value)?.inference === inference;
      batch(() => {
        if (!isSameInference) this.word.value = null;
        this.failedFrame.value = null;
        this.shown.value = { ...wanted, means, row, tokens, chunk, masks, ...pictures };
      });
      if (!isSameInference && this.pointedAt !== null) void this.showWord(this.pointedAt);
      if (request !== this.request) return;
      // What was asked for is drawn first.
      afterPaint(() => {
        if (request === this.request) this.prefetch(timeline, frame, step, frame < (old?.frame ?? 0));
      });
    };
    void this.attempt("frame", load).then((hasWorked) => {
      if (!hasWorked && request === this.request) this.failedFrame.value = frame;
    });
  }

  /** Means of an inference; of a recording without suffix maps, whose words may look at images, missing ones. */
  private loadMeans(facts: Facts, inference: number, step: number): Promise<Slab> {
    if (facts.mean_layers.length) return this.source.means(this.key, inference, step);
    const shape = [1, Math.max(1, facts.heads.length), facts.n_keys];
    const values = new Float32Array(shape.reduce((product, length) => product * length)).fill(NaN);
    return Promise.resolve({ shape, values });
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
    const wanted = query === "frame" ? (timeline.frame_query[frame] ?? -1) : queryOfAction(facts, query);
    if (wanted === null || wanted < 0) return null;
    const map = await this.source.map(this.key, inference, step, layer);
    return { slab: rowOf(map, wanted), layer, query: wanted };
  }

  private async loadMasks(facts: Facts, inference: number): Promise<Masks | null> {
    if (!facts.scene) return null;
    try {
      return await this.source.masks(this.key, inference);
    } catch (error) {
      // As of pictures: attention is shown without them where they are damaged.
      if (!(error instanceof ApiError) || error.status === 0) throw error;
      return null;
    }
  }

  private async loadPictures(
    frame: number,
    askedAt: number | null | undefined,
  ): Promise<Pick<Shown, "pictures" | "pictureFrame">> {
    const pictures = new Map<string, ImageBitmap>();
    let pictureFrame = frame;
    await Promise.all(
      untracked(() => this.views.value).map(async ({ camera }) => {
        if (!camera.has_video) return;
        // While it is recorded, there is only what the policy saw when it was asked last.
        if (!isFinished(camera) && camera.still !== askedAt) return;
        try {
          const shown = camera.still ?? frame;
          pictures.set(camera.name, await this.source.picture(this.key, camera, shown));
          pictureFrame = shown;
        } catch (error) {
          // Attention is shown without its picture: while it is recorded, a video has no frames yet.
          if (!(error instanceof ApiError) || error.status === 0) throw error;
        }
      }),
    );
    return { pictures, pictureFrame };
  }

  /** Ask for what a person is likely to look at next. */
  private prefetch(timeline: Timeline, frame: number, step: number, isBackwards: boolean): void {
    const ignore = () => {};
    const inference = timeline.frame_inference[frame] ?? 0;
    for (const next of [inference + 1, inference - 1]) {
      if (next < 0 || next >= timeline.inference_frame.length) continue;
      if (this.hasMeans.value) this.source.means(this.key, next, step).catch(ignore);
      this.source.tokens(this.key, next).catch(ignore);
      this.source.actions(this.key, next).catch(ignore);
      if (this.facts.value?.scene) this.source.masks(this.key, next).catch(ignore);
    }
    const frames = this.frames.value;
    const place = frames.placeOf(frame);
    for (const { camera } of this.views.value) {
      // Where this frame's picture cannot be had, because it is recorded yet, the next ones cannot either.
      const isReadable = isFinished(camera) && this.shown.value?.pictures.has(camera.name);
      for (let ahead = 1; isReadable && ahead <= PREFETCH_FRAMES; ahead++) {
        for (const next of [place + ahead, place - ahead]) {
          if (next < 0 || next >= frames.length || (next < place !== isBackwards && ahead > 3)) continue;
          this.source.picture(this.key, camera, frames.at(next)).catch(ignore);
        }
      }
    }
  }

  private loadShares(): (() => void) | void {
    const facts = this.facts.value;
    const where = { layer: this.layer.value, head: this.head.value, step: this.step.value };
    const asked = this.sharesAsked.value;
    // The first view comes first.
    if (!facts || !facts.n_inferences || !this.hasMeans.value || !this.isOpened.value) return;
    const key = this.key;
    const old = untracked(() => this.shares.value);
    const known = old?.asked === asked ? old : null;
    if (known && known.share.length === facts.n_inferences) return;
    const timer = setTimeout(() => {
      void this.attempt("shares", async () => {
        const first = known?.share.length ?? 0;
        let found = await this.source.shares(key, first, where);
        // An incomplete episode's later inferences may bring a modality that the earlier ones lack.
        const fits = known && String(known.modalities) === String(found.modalities);
        if (first && !fits) found = await this.source.shares(key, 0, where);
        const before = fits ? known : null;
        const share = [...(before?.share ?? []), ...found.share];
        const effective_tokens = [...(before?.effective_tokens ?? []), ...found.effective_tokens];
        const present = this.shares.value;
        const isOld = present?.asked === asked && present.share.length > share.length;
        if (asked !== this.sharesAsked.value || isOld) return; // a later one was faster
        this.shares.value = { modalities: found.modalities, first: 0, share, effective_tokens, asked };
      });
    }, SHARES_SETTLE_MS);
    return () => clearTimeout(timer);
  }

  private loadRoles(): (() => void) | void {
    const [facts, asked] = [this.facts.value, this.rolesAsked.value];
    const camera = this.camera.value?.camera.name;
    const where = { layer: this.layer.value, head: this.head.value, step: this.step.value };
    const isWanted = facts && facts.n_inferences && this.hasMeans.value && this.isOpened.value;
    if (!isWanted || asked === null || camera === undefined) return;
    const key = this.key;
    const old = untracked(() => this.roles.value);
    const known = old?.asked === asked ? old : null;
    if (known && known.share.length === facts.n_inferences) return;
    const timer = setTimeout(() => {
      void this.attempt("roles", async () => {
        const first = known?.share.length ?? 0;
        const found = await this.source.roles(key, first, where, camera);
        const share = [...(known?.share ?? []), ...found.share];
        const chance = [...(known?.chance ?? []), ...found.chance];
        const present = this.roles.value;
        const isOld = present?.asked === asked && present.share.length > share.length;
        if (asked !== this.rolesAsked.value || isOld) return; // a later one was faster
        this.roles.value = { ...found, first: 0, share, chance, asked };
      });
    }, SHARES_SETTLE_MS);
    return () => clearTimeout(timer);
  }

  private loadSteps(): (() => void) | void {
    const [facts, shown] = [this.facts.value, this.shown.value];
    if (!facts || !shown || !this.hasMeans.value) return;
    if (untracked(() => this.steps.value)?.inference === shown.inference) return;
    const timer = setTimeout(() => {
      void this.attempt("steps", async () => {
        const slabs = await Promise.all(
          facts.denoise_steps.map((step) => this.source.means(this.key, shown.inference, step)),
        );
        const now = this.shown.value;
        if (now?.inference === shown.inference && now.version === shown.version) {
          this.steps.value = { inference: shown.inference, slabs };
        }
      });
    }, STEPS_SETTLE_MS);
    return () => clearTimeout(timer);
  }

  /** A word that is pointed at is shown at the head that is chosen meanwhile. */
  private followHead(): void {
    const head = this.head.value;
    untracked(() => {
      if (this.pointedAt !== null && this.word.value?.head !== head) void this.showWord(this.pointedAt);
    });
  }

  /** Load something; returns whether it has worked. What went wrong is said on the page. */
  async attempt(what: Loaded, load: () => Promise<void>): Promise<boolean> {
    let problem: string | null = null;
    try {
      await load();
    } catch (error) {
      problem = message(error);
      if (what === "episode" && this.facts.value) problem = `${problem}. What was loaded is still shown.`;
    }
    if (this.isDisposed || problem === (this.problems.value.get(what) ?? null)) return problem === null;
    const problems = new Map(this.problems.value);
    if (problem === null) problems.delete(what);
    else problems.set(what, problem);
    this.problems.value = problems;
    return problem === null;
  }
}

/** Whether a camera's video can be read, as far as is known. */
export const isFinished = ({ still }: Pick<Camera, "still">) => still === null || still === undefined;

/** Where the colour range of episodes that are shown together ends. */
export function sharedEnd(models: EpisodeModel[], normalisation: Normalisation): number {
  const shown = models.flatMap((model) => model.heats.value.map((heat) => heat.values));
  return rangeEnd(
    shown,
    normalisation,
    // A word's view belongs to the prefix, whose range is another.
    models.flatMap((model) => (model.word.value ? [] : model.ranges.ofChosen())),
  );
}

/** Call once what has just changed is on the screen. */
function afterPaint(action: () => void): void {
  requestAnimationFrame(() => setTimeout(action));
}

export function message(error: unknown): string {
  return error instanceof Error ? error.message : String(error);
}
