/**
 * Where an episode's colour ranges end, for "one range for the episode". The server reads the whole episode for
 * them, so they come late and are asked for only when they are wanted; what has grown since may be lacking.
 */

import { computed, signal, untracked, type ReadonlySignal } from "@preact/signals";
import type { AllRanges, Ranges } from "./api";
import type { EpisodeId, Source } from "./source";
import * as state from "./state";

const SETTLE_MS = 150;
const GROW_MS = 5000; // of an episode that grows: each time all of it is read

/** What the ranges need of the episode that is shown. */
export interface Chosen {
  readonly key: EpisodeId;
  readonly isDisposed: boolean;
  readonly step: ReadonlySignal<number>;
  readonly layer: ReadonlySignal<number | "mean">;
  readonly head: ReadonlySignal<number | "max" | "mean">;
  readonly views: ReadonlySignal<readonly { camera: { name: string } }[]>;
  readonly facts: ReadonlySignal<{ n_inferences: number } | null>;
  readonly hasMeans: ReadonlySignal<boolean>;
  attempt(what: "ranges" | "all ranges", load: () => Promise<void>): Promise<boolean>;
}

interface Asked<T> {
  /** Inferences that there were when it was asked for. */
  n_inferences: number;
  asked_ms: number;
  ranges: T;
}

export class EpisodeRanges {
  private readonly ofSteps = signal<ReadonlyMap<number, Asked<Ranges>>>(new Map());
  private readonly ofAll = signal<Asked<AllRanges> | null>(null);
  /** Of the chosen denoise step. */
  private readonly ofStep = computed(() => this.ofSteps.value.get(this.model.step.value)?.ranges ?? null);

  constructor(
    private readonly model: Chosen,
    private readonly source: Source,
  ) {}

  /** Of the chosen map, for each camera that is shown; nothing until it is known. */
  ofChosen(): number[] {
    const found = this.ofStep.value;
    if (!found) return [];
    const layer = found.layers.indexOf(this.model.layer.value);
    const head = found.heads.indexOf(this.model.head.value);
    return this.model.views.value.map(({ camera }) => found.ranges[camera.name]?.[layer]?.[head] ?? 0);
  }

  /** Of every layer and head that is a map of its own, at the chosen denoise step. */
  ofHeads(camera: string): number[] {
    const found = this.ofStep.value;
    const rows = found?.ranges[camera];
    if (!found || !rows) return [];
    return rows.flatMap((row, layer) =>
      typeof found.layers[layer] === "number"
        ? row.filter((_, head) => typeof found.heads[head] === "number")
        : [],
    );
  }

  /** Of the chosen layer and head, at every denoise step. */
  ofDenoiseSteps(camera: string): number[] {
    const found = this.ofAll.value?.ranges;
    if (!found) return [];
    const layer = found.layers.indexOf(this.model.layer.value);
    const head = found.heads.indexOf(this.model.head.value);
    return (found.ranges[camera] ?? []).map((rows) => rows[layer]?.[head] ?? 0);
  }

  forget(): void {
    this.ofSteps.value = new Map();
    this.ofAll.value = null;
  }

  /** Load the chosen denoise step's, where they are wanted and not here. */
  loadStep(): (() => void) | void {
    const step = this.model.step.value;
    return this.load(
      "ranges",
      untracked(() => this.ofSteps.value.get(step)),
      (key) => this.source.ranges(key, step),
      (found) => (this.ofSteps.value = new Map(this.ofSteps.value).set(step, found)),
    );
  }

  /** Load those of every denoise step, where they are wanted and not here. */
  loadAll(): (() => void) | void {
    return this.load(
      "all ranges",
      untracked(() => this.ofAll.value),
      (key) => this.source.allRanges(key),
      (found) => (this.ofAll.value = found),
    );
  }

  private load<T>(
    what: "ranges" | "all ranges",
    known: Asked<T> | null | undefined,
    ask: (key: EpisodeId) => Promise<T>,
    take: (found: Asked<T>) => void,
  ): (() => void) | void {
    const { model } = this;
    const facts = model.facts.value;
    if (!facts || !facts.n_inferences || !model.hasMeans.value) return;
    if (state.normalisation.value !== "episode" || known?.n_inferences === facts.n_inferences) return;
    const key = model.key;
    const wait = known ? known.asked_ms + GROW_MS - performance.now() : 0;
    const timer = setTimeout(
      () => {
        void model.attempt(what, async () => {
          const asked_ms = performance.now();
          const ranges = await ask(key);
          if (key.version !== model.key.version || model.isDisposed) return;
          take({ n_inferences: facts.n_inferences, asked_ms, ranges });
        });
      },
      Math.max(SETTLE_MS, wait),
    );
    return () => clearTimeout(timer);
  }
}
