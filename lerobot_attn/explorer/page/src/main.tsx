/** The explorer's page: which episode, or the whole run; live while something is recorded. */

import { signal } from "@preact/signals";
import { render } from "preact";
import type { Changes, EpisodeRow, Run } from "./api";
import { EpisodePage } from "./episode";
import { embedded, FileSource } from "./file";
import { message, type EpisodeModel } from "./model";
import { RunPage } from "./run";
import { ServerSource, type Source } from "./source";
import { byPath } from "./labels";
import * as state from "./state";
import "./style.css";

const run = signal<Run | null>(null);
const problem = signal<string | null>(null);
/** null until it is known. */
const connected = signal<boolean | null>(null);
/** Episodes that have grown lately. */
const growing = signal<ReadonlySet<string>>(new Set());
const GROWING_MS = 30_000;
const models = new Set<EpisodeModel>();

async function loadRun(source: Source): Promise<void> {
  try {
    run.value = await source.run();
    problem.value = null;
    if (run.value.is_episode && !state.episode.value) state.episode.value = run.value.episodes[0]?.id ?? "";
  } catch (error) {
    problem.value = message(error);
  }
}

function follow({ changed, removed, damaged, n_unread }: Changes): void {
  const known = new Set(run.value?.episodes.map((row) => row.id));
  if (run.value) {
    const news = new Map(changed.map((row) => [row.id, row]));
    const kept = run.value.episodes
      .filter((row) => !removed.includes(row.id))
      .map((row) => {
        const found = news.get(row.id) ?? row;
        news.delete(row.id);
        return found;
      });
    const episodes = [...kept, ...news.values()].sort((a, b) => byPath(a.id, b.id));
    run.value = { ...run.value, episodes, damaged, n_unread };
  }
  for (const row of changed) if (known.has(row.id)) noteGrowth(row);
  for (const model of models) {
    const row = changed.find((found) => found.id === model.id);
    if (row || removed.includes(model.id)) void model.follow(row);
  }
}

/** Whatever has happened while there was no connection is in the run's table. */
async function catchUp(source: Source): Promise<void> {
  await loadRun(source);
  for (const model of models) {
    const row = run.value?.episodes.find((found) => found.id === model.id);
    if (row || !run.value?.n_unread) void model.follow(row);
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

function Page({ source }: { source: Source }) {
  const lost = source.live && connected.value === false;
  return (
    <>
      {problem.value && (
        <p class="warning" role="alert">
          {problem.value}
        </p>
      )}
      {lost && (
        <p class="warning" role="status">
          No connection to the server; what was loaded is still shown.
        </p>
      )}
      {state.episode.value ? (
        <EpisodePage
          run={run.value}
          source={source}
          growing={growing.value}
          models={models}
          key={state.episode.value}
        />
      ) : run.value ? (
        <RunPage run={run.value} source={source} growing={growing.value} />
      ) : (
        !problem.value && <p class="note">Loading …</p>
      )}
    </>
  );
}

const data = embedded();
const source: Source = data ? new FileSource(data) : new ServerSource();
state.followAddress();
source.watch(follow, (isConnected) => {
  if (isConnected) void catchUp(source);
  connected.value = isConnected;
});
void loadRun(source);
render(<Page source={source} />, document.getElementById("page")!);
