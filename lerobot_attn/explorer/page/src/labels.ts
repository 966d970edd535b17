/** What there is of an episode's frames, layers and heads; an exported page may hold a part of them. */

import type { Facts, HeadChoice, Outcome } from "./api";

/** The frames that can be shown: every one of an episode, or those that an export kept. */
export class Frames {
  /**
   * @param n frames of the episode
   * @param kept their numbers, ascending, where not all are here
   */
  constructor(
    private readonly n: number,
    private readonly kept?: readonly number[],
  ) {}

  get length(): number {
    return this.kept?.length ?? this.n;
  }

  get last(): number {
    return this.at(this.length - 1);
  }

  /** The frame at a place, from 0; the first or the last one beyond the ends. */
  at(place: number): number {
    const bounded = Math.max(0, Math.min(place, this.length - 1));
    return this.kept ? (this.kept[bounded] ?? 0) : bounded;
  }

  /** Place of a frame; of one that is not here, the place of the last one before it. */
  placeOf(frame: number): number {
    const place = this.kept ? this.kept.findLastIndex((kept) => kept <= frame) : frame;
    return Math.max(0, Math.min(place, this.length - 1));
  }

  /** The frame itself, or the last one before it that is here; before all of them the first. */
  nearest(frame: number): number {
    return this.at(this.placeOf(frame));
  }
}

/** The label itself, or the nearest one that was recorded; negative ones count from the end. */
export function nearestLabel(labels: number[], wanted: number): number {
  if (!labels.length) return 0;
  if (wanted < 0) return labels.at(Math.max(wanted, -labels.length))!;
  return labels.reduce((best, label) => (Math.abs(label - wanted) < Math.abs(best - wanted) ? label : best));
}

/** Place of a label; a word such as "mean" stays what it is. */
export function indexOf<T extends string>(labels: number[] | undefined, label: number | T): number | T {
  return typeof label === "string" ? label : Math.max(0, (labels ?? []).indexOf(label));
}

/** Labels as people write them: "all layers", "layers 0–3, 17", "layer 17". */
export function inWords(what: string, labels: readonly number[], total: number | null): string {
  if (isAll(labels, total)) return `all ${what}s`;
  const runs: [number, number][] = [];
  for (const label of labels) {
    const run = runs.at(-1);
    if (run && label === run[1] + 1) run[1] = label;
    else runs.push([label, label]);
  }
  const listed = runs.map(([first, last]) => (first === last ? `${first}` : `${first}–${last}`)).join(", ");
  return `${what}${labels.length === 1 ? "" : "s"} ${listed}`;
}

/** A chosen head as people write it: "head 3", "mean of all heads", "largest of heads 0–3". */
export function headInWords(head: HeadChoice, { heads, n_heads }: Pick<Facts, "heads" | "n_heads">): string {
  if (typeof head === "number") return `head ${head}`;
  return `${head === "mean" ? "mean" : "largest"} of ${inWords("head", heads, n_heads)}`;
}

/** One token of the suffix: "action 3", or "decoded token 3" where the policy decodes them one by one. */
export function tokenInWords({ decodes }: Pick<Facts, "decodes">, number: number | string): string {
  return `${decodes ? "decoded token" : "action"} ${number}`;
}

/** What the stored means are over, after "mean of ". In a replay nothing was executed. */
export function averagedInWords(
  facts: Partial<Pick<Facts, "decodes" | "replay" | "executed_queries">>,
): string {
  const { decodes, replay, executed_queries: queries } = facts;
  if (decodes) return "the decoded tokens";
  if (!replay) return "the executed actions";
  return queries ? `the first ${queries[1] - queries[0]} actions` : "the first actions";
}

/** Whether these are all that the policy has, as far as is known. */
export function isAll(labels: readonly number[], total: number | null): boolean {
  return total === null || labels.length >= total;
}

/** How an episode ended. */
export function outcome(row: { success: boolean | null; complete: boolean }): Outcome {
  if (!row.complete) return "incomplete";
  return row.success === null ? "unknown" : row.success ? "success" : "failure";
}

/** What an episode is called. */
export function episodeName(row: {
  task_group: string | null;
  task_id: number | null;
  episode: number | null;
}): string {
  return `${row.task_group ?? "episode"} ${row.task_id ?? ""} · episode ${row.episode ?? "?"}`;
}

/** A number as people read it: "10,000". */
export const grouped = (n: number) => n.toLocaleString("en");

export function counted(n: number, one: string, many = `${one}s`): string {
  return `${grouped(n)} ${n === 1 ? one : many}`;
}
