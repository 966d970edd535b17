/** Which neurons are looked at, and how active they are over the episode. */

import { batch, signal, untracked, type ReadonlySignal } from "@preact/signals";
import type { Activations, Facts, Neuron, NeuronStream, Timeline } from "./api";
import type { EpisodeId, Source } from "./source";

/** A set of neurons of one stream that can be chosen. */
export interface Offer {
  /** As the address has it: "found:vlm", "found2:vlm", "fired:expert", "other:vlm" (what the other episode fires), "unit:vlm:3:17". */
  value: string;
  name: string;
  stream: string;
  units: Neuron[];
  /** Units of the set that were not recorded, of either stream. */
  nLeftOut: number;
}

/** What is asked of an episode; its denoise step is the page's. */
export interface Ask {
  stream: string;
  units: Neuron[];
  group: string;
  reduction: string;
  step: number;
}

export const HIDDEN = "off";
/** So many lines beside each other can be told apart, or so; an exported page holds no more. */
export const MOST_EACH = 32;

const counted = (n: number) => (n === 1 ? "1 neuron" : `${n} neurons`);

/**
 * The sets that there are, the found one first.
 *
 * @param other the episode that is shown beside it
 */
export function offersOf(facts: Facts, other: Facts | null): Offer[] {
  const own = (facts.neurons?.sets ?? []).map((set) => ({ ...set, from: set.kind as string }));
  const others = (other?.neurons?.sets ?? [])
    .filter((set) => set.kind === "fired" || !own.some(({ kind }) => kind === "found"))
    .map((set) => ({ ...set, from: set.kind === "fired" ? "other" : "found" }));
  const numbered = new Map<string, number>();
  const offers = [...own, ...others].flatMap(({ from, kind, name, units, n_left_out }) => {
    const number = (numbered.get(from) ?? 0) + 1;
    numbered.set(from, number);
    return Object.entries(units).map(([stream, of]) => ({
      value: `${from}${number > 1 ? number : ""}:${stream}`,
      name: `${kind === "found" ? name : `fired by ${name}`}: ${counted(of.length)} (${stream})`,
      stream,
      units: of,
      nLeftOut: n_left_out,
    }));
  });
  // Two episodes of one condition fire the same.
  const seen = new Set<string>();
  return offers.filter(({ stream, units }) => {
    const key = `${stream} ${units.join(" ")}`;
    return !seen.has(key) && seen.add(key);
  });
}

/** The neuron that an address names, "unit:vlm:3:17"; null if it names none. */
export function unitOf(value: string): { stream: string; layer: number; unit: number } | null {
  const found = /^unit:([a-z]+):(\d{1,9}):(\d{1,9})$/.exec(value);
  return found && { stream: found[1]!, layer: Number(found[2]), unit: Number(found[3]) };
}

/** What is shown: as chosen, or else the first set, or else the first neuron; null where it is hidden or there is none. */
export function chosenOf(value: string, offers: Offer[], facts: Facts): Offer | null {
  if (value === HIDDEN || !facts.neurons) return null;
  const chosen = offers.find((offer) => offer.value === value);
  if (chosen) return chosen;
  const asked = unitOf(value);
  // An exported page holds the sets alone.
  if (!asked && offers.length) return offers[0]!;
  const streams = facts.neurons.streams;
  const stream = asked && streams[asked.stream] ? asked.stream : Object.keys(streams)[0];
  const recorded = stream === undefined ? undefined : streams[stream];
  if (stream === undefined || !recorded?.layers.length) return null;
  const layer = asked && recorded.layers.includes(asked.layer) ? asked.layer : recorded.layers[0]!;
  const unit = Math.min(asked?.unit ?? 0, recorded.n_units - 1);
  return {
    value: `unit:${stream}:${layer}:${unit}`,
    name: `neuron ${unit} of ${stream} layer ${layer}`,
    stream,
    units: [[layer, unit]],
    nLeftOut: 0,
  };
}

/** The group of tokens: as chosen, or else the task's words, or the executed actions, or whatever there is. */
export function groupOf({ groups }: NeuronStream, chosen: string): string {
  return [chosen, "task", "actions"].find((name) => groups.includes(name)) ?? groups[0] ?? "";
}

/** What to ask of an episode; null where it lacks a neuron of the set, for then it is another set. */
export function askOf(
  facts: Facts,
  { stream, units }: Offer,
  group: string,
  reduction: string,
  step: number,
): Ask | null {
  const recorded = facts.neurons?.streams[stream];
  if (!recorded || !recorded.groups.length) return null;
  if (!units.every(([layer, unit]) => recorded.layers.includes(layer) && unit < recorded.n_units))
    return null;
  const known = recorded.reductions.includes(reduction) ? reduction : (recorded.reductions[0] ?? "mean");
  // A stream that runs once an inference has no steps, so a change of the page's asks for nothing.
  const ownStep = recorded.per_step ? step : -1;
  return { stream, units, group: groupOf(recorded, group), reduction: known, step: ownStep };
}

/** The state's dimension that is drawn beside: as chosen, or else the height of the hand, or the first. */
export function besideOf({ state_dims }: Pick<Facts, "state_dims">, chosen: string): string | null {
  return [chosen, "eef_z"].find((name) => state_dims.includes(name)) ?? state_dims[0] ?? null;
}

/** A number of the state for people, and its unit where it is known: `eef_…` is the hand's place in metres. */
export function besideInWords(name: string): { name: string; unit: string } {
  return {
    name: name === "eef_z" ? "hand's height, eef_z" : name,
    unit: /^eef_[xyz]$/.test(name) ? "m" : "",
  };
}

/** A token group's name for people: a camera's is its short one. */
export function groupLabel(facts: Pick<Facts, "cameras">, group: string): string {
  return facts.cameras.find(({ name }) => name === group)?.label ?? group;
}

/** (frame) a dimension of the state; null where it was not recorded. */
export function stateOver(facts: Facts, timeline: Timeline, name: string | null): (number | null)[] | null {
  const place = name === null ? -1 : facts.state_dims.indexOf(name);
  if (place < 0 || !timeline.state) return null;
  return timeline.state.map((row) => row[place] ?? null);
}

/** Ends of a scale that holds all numbers, with a little room; 0 to 1 where there are none. */
export function span(...lists: (readonly (number | null)[])[]): [number, number] {
  let [low, high] = [Infinity, -Infinity];
  for (const value of lists.flat()) {
    if (value === null || !Number.isFinite(value)) continue;
    [low, high] = [Math.min(low, value), Math.max(high, value)];
  }
  if (low > high) return [0, 1];
  const room = 0.08 * (high - low) || Math.abs(high) * 0.1 || 0.5;
  return [low - room, high + room];
}

/** Frame of the other episode that goes with one of this; locked by phase, at the same part of the way. */
export function otherFrame(frame: number, last: number, otherLast: number, isPhase: boolean): number {
  return isPhase && last > 0 ? Math.round((frame / last) * otherLast) : frame;
}

/** A number in a few letters, as it stands in a legend. */
export function short(value: number | null | undefined): string {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  return size !== 0 && (size < 0.001 || size >= 10000)
    ? value.toExponential(1)
    : String(+value.toPrecision(3));
}

/** What the activations need of the episode that is shown. */
export interface Asked {
  readonly key: EpisodeId;
  readonly facts: ReadonlySignal<{ n_inferences: number; version: string } | null>;
  readonly isDisposed: boolean;
  attempt(what: "neurons", load: () => Promise<void>): Promise<boolean>;
}

const SETTLE_MS = 120;

/** The activations of the wanted neurons, over all inferences of one episode. */
export class EpisodeNeurons {
  readonly wanted = signal<Ask | null>(null);
  private readonly each = signal(false);
  readonly found = signal<(Activations & { asked: string }) | null>(null);

  constructor(
    private readonly model: Asked,
    private readonly source: Source,
  ) {}

  /** Say what to load; by whoever knows both episodes. */
  want(ask: Ask | null, each: boolean): void {
    const isEach = each && ask !== null && ask.units.length > 1 && ask.units.length <= MOST_EACH;
    batch(() => {
      if (JSON.stringify(ask) !== JSON.stringify(this.wanted.peek())) this.wanted.value = ask;
      this.each.value = isEach;
    });
  }

  forget(): void {
    this.found.value = null;
  }

  /** Load what is lacking: all of it, or the inferences that are new. */
  load(): (() => void) | void {
    const [facts, wanted, each] = [this.model.facts.value, this.wanted.value, this.each.value];
    if (!facts || !facts.n_inferences || !wanted) {
      if (!wanted) this.forget();
      return;
    }
    const asked = this.asked();
    const old = untracked(() => this.found.value);
    const known = old?.asked === asked ? old : null;
    if (known && known.mean.length === facts.n_inferences) return;
    const timer = setTimeout(() => {
      void this.model.attempt("neurons", async () => {
        const first = known?.mean.length ?? 0;
        const found = await this.source.neurons(this.model.key, first, wanted, each);
        const present = this.found.value;
        const n = first + found.mean.length;
        const isOld = present?.asked === asked && present.mean.length > n;
        if (this.model.isDisposed || asked !== this.asked() || isOld) return; // a later one was faster
        this.found.value = {
          ...found,
          first: 0,
          mean: [...(known?.mean ?? []), ...found.mean],
          expected: [...(known?.expected ?? []), ...found.expected],
          each: found.each && [...(known?.each ?? []), ...found.each],
          asked,
        };
      });
    }, SETTLE_MS);
    return () => clearTimeout(timer);
  }

  private asked(): string {
    return JSON.stringify([this.model.facts.peek()?.version, this.wanted.peek(), this.each.peek()]);
  }
}
