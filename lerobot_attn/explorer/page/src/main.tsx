/** The explorer's page: which episode, or the whole run; live while something is recorded. */

import { effect, signal } from "@preact/signals";
import { render } from "preact";
import type { Changes, EpisodeRow } from "./api";
import { EpisodePage } from "./episode";
import { embedded, FileSource } from "./file";
import type { EpisodeModel } from "./model";
import { Part } from "./part";
import { RunPage } from "./run";
import { ServerSource, type Source } from "./source";
import * as state from "./state";
import "./style.css";

const data = embedded();
const source: Source = data ? new FileSource(data) : new ServerSource();
/** null until it is known. */
const connected = signal<boolean | null>(null);
/** Episodes that have grown lately. */
const growing = signal<ReadonlySet<string>>(new Set());
const GROWING_MS = 30_000;
const models = new Set<EpisodeModel>();
const table = new Part(source);
/** Of the run's table: that of its page, and those that are chosen from. */
const parts = new Set([table]);

/** A run of one episode shows it at once. */
async function openOnly(): Promise<void> {
  const run = table.run.value;
  if (!run?.is_episode || state.episode.value) return;
  const [only] = run.episodes.length ? run.episodes : (await source.run({ limit: 1 })).episodes;
  state.episode.value = only?.id ?? "";
}

function follow(changes: Changes): void {
  const { changed, grown, removed } = changes;
  for (const part of parts) part.follow(changes);
  for (const row of changed) if (grown.includes(row.id)) noteGrowth(row);
  for (const model of models) {
    const row = changed.find((found) => found.id === model.id);
    if (row || removed.includes(model.id)) void model.follow(row);
  }
}

/** Whatever has happened while there was no connection is in the run's table. */
async function catchUp(): Promise<void> {
  await Promise.all([...parts].map((part) => part.again()));
  for (const model of models) {
    const { episodes, n_unread } = await source.run({ first: model.id, limit: 1 });
    const row = episodes.find((found) => found.id === model.id);
    if (row || !n_unread) void model.follow(row);
  }
}

const timers = new Map<string, ReturnType<typeof setTimeout>>();

function noteGrowth(row: EpisodeRow): void {
  clearTimeout(timers.get(row.id));
  const stop = () => {
    growing.value = new Set([...growing.value].filter((id) => id !== row.id));
  };
  if (row.complete) return stop();
  if (!growing.value.has(row.id)) growing.value = new Set([...growing.value, row.id]);
  timers.set(row.id, setTimeout(stop, GROWING_MS));
}

function Page() {
  const run = table.run.value;
  const problem = table.problem.value;
  const lost = source.live && connected.value === false;
  return (
    <>
      {problem && (
        <p class="warning" role="alert">
          {problem}
        </p>
      )}
      {lost && (
        <p class="warning" role="status">
          No connection to the server; what was loaded is still shown.
        </p>
      )}
      {state.episode.value ? (
        <EpisodePage
          run={run}
          source={source}
          growing={growing.value}
          models={models}
          parts={parts}
          key={state.episode.value}
        />
      ) : run ? (
        <RunPage run={run} source={source} growing={growing.value} isBehind={table.isBehind.value} />
      ) : (
        !problem && <p class="note">Loading …</p>
      )}
    </>
  );
}

state.followAddress();
effect(() => table.want(state.wanted.value));
effect(() => void openOnly());
source.watch(follow, (isConnected) => {
  if (isConnected) void catchUp().catch(() => {}); // the connection is lost again, which will be told
  connected.value = isConnected;
});
render(<Page />, document.getElementById("page")!);
