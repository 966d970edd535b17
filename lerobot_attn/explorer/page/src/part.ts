/** A part of the run's table, as the server has it now: it is asked for, and follows what is recorded. */

import { signal } from "@preact/signals";
import type { Changes, EpisodeRow, Run, Wanted } from "./api";
import { message } from "./model";
import type { Source } from "./source";

/** Between two requests that changes cause, of which dozens may come a second. */
export const AGAIN_MS = 1000;

export class Part {
  /** null until there is an answer. */
  readonly run = signal<Run | null>(null);
  readonly problem = signal<string | null>(null);
  /** Whether what is shown is not yet what is wanted. */
  readonly isBehind = signal(false);
  private wanted: Wanted | null = null;
  private answered: Wanted | null = null;
  private isAsking = false;
  /** Whether something may have changed since the server was asked. */
  private isOld = false;
  private timer: ReturnType<typeof setTimeout> | null = null;
  private askedAt = -Infinity;

  constructor(private readonly source: Source) {}

  /** Show another part. Of several that are wanted while the server answers, only the last is asked for. */
  want(wanted: Wanted): void {
    if (this.wanted && isSame(wanted, this.wanted)) return;
    this.wanted = wanted;
    this.isBehind.value = true;
    if (!this.isAsking) void this.ask();
  }

  /** Ask once more for what is shown. */
  async again(): Promise<void> {
    if (!this.wanted) return;
    if (this.isAsking) this.isOld = true;
    else await this.ask();
  }

  /** Take what has changed: at once in the rows that are shown; what that means for others is asked for. */
  follow({ changed, removed, damaged, n_damaged, n_unread }: Changes): void {
    const shown = this.run.value;
    if (!shown) return;
    const news = new Map(changed.map((row) => [row.id, row]));
    const gone = new Set(removed);
    const episodes = shown.episodes.filter((row) => !gone.has(row.id)).map((row) => news.get(row.id) ?? row);
    this.run.value = { ...shown, episodes, damaged, n_damaged, n_unread };
    if (this.timer) return;
    const sinceAsked = performance.now() - this.askedAt;
    this.timer = setTimeout(
      () => {
        this.timer = null;
        void this.again();
      },
      Math.max(AGAIN_MS / 10, AGAIN_MS - sinceAsked),
    );
  }

  dispose(): void {
    if (this.timer) clearTimeout(this.timer);
  }

  private async ask(): Promise<void> {
    this.isAsking = true;
    this.isOld = false;
    this.askedAt = performance.now();
    const wanted = this.wanted!;
    const shown = this.answered && isSame(wanted, this.answered) ? this.run.value : null;
    try {
      const found = await this.source.run(shown ? anchored(wanted, shown) : wanted);
      this.answered = wanted;
      this.run.value = shown ? { ...found, episodes: settled(wanted, shown, found) } : found;
      this.problem.value = null;
    } catch (error) {
      this.problem.value = message(error);
    } finally {
      this.isAsking = false;
    }
    if (wanted === this.wanted) this.isBehind.value = false;
    if (wanted !== this.wanted || this.isOld) await this.ask();
  }
}

const isSame = (a: Wanted, b: Wanted) => JSON.stringify(a) === JSON.stringify(b);
const isByPath = (wanted: Wanted) => /^-?path$/.test(wanted.sort ?? "path");

/**
 * The same part after something was recorded. In the order of paths it begins with the same episode, however many
 * came before it; not while the server still reads stores, when the place that is wanted may not be there yet.
 */
function anchored(wanted: Wanted, shown: Run): Wanted {
  const first = shown.episodes[0]?.id;
  return shown.offset > 0 && isByPath(wanted) && !shown.n_unread && first ? { ...wanted, first } : wanted;
}

/** Its rows: those that were there stay where they are, though their new numbers would put them elsewhere. */
function settled(wanted: Wanted, shown: Run, found: Run): EpisodeRow[] {
  if (isByPath(wanted) || shown.n_unread) return found.episodes;
  const news = new Map(found.episodes.map((row) => [row.id, row]));
  const kept = shown.episodes.flatMap((row) => news.get(row.id) ?? []);
  kept.forEach((row) => news.delete(row.id));
  return [...kept, ...news.values()];
}
