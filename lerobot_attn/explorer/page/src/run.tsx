/** The run's page: its episodes, and successes against failures. */

import { useSignal } from "@preact/signals";
import type { EpisodeRow, Groups, Run } from "./api";
import { percent } from "./heat";
import { message } from "./model";
import type { Source } from "./source";
import * as state from "./state";

const SHOWN_AT_ONCE = 200;

export function bytes(n: number): string {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let unit = 0;
  while (n >= 1000 && unit < units.length - 1) [n, unit] = [n / 1000, unit + 1];
  return `${n >= 100 || unit === 0 ? n.toFixed(0) : n.toFixed(1)} ${units[unit]}`;
}

export function outcome(row: { success: boolean | null; complete: boolean }): string {
  if (!row.complete) return "incomplete";
  return row.success === null ? "unknown" : row.success ? "success" : "failure";
}

/** A badge; none where the recording does not know of success. */
export function Outcome({ of }: { of: { success: boolean | null; complete: boolean } }) {
  const found = outcome(of);
  return found === "unknown" ? null : <span class={`badge ${found}`}>{found}</span>;
}

export function episodeName(row: {
  task_group: string | null;
  task_id: number | null;
  episode: number | null;
}) {
  return `${row.task_group ?? "episode"} ${row.task_id ?? ""} · episode ${row.episode ?? "?"}`;
}

function counted(n: number, one: string, many = `${one}s`): string {
  return `${n} ${n === 1 ? one : many}`;
}

/** Whether a click is meant for this page, not for another tab or window. */
const isPlain = (event: MouseEvent) =>
  !(event.ctrlKey || event.metaKey || event.shiftKey || event.altKey || event.button);

/** Whether an episode's name, task, condition, id or outcome holds each word of a search. */
export function holds(row: EpisodeRow, search: string): boolean {
  const words = search.toLowerCase().split(/\s+/).filter(Boolean);
  const text = `${episodeName(row)} ${row.task} ${row.condition} ${row.id} ${outcome(row)}`.toLowerCase();
  return words.every((word) => text.includes(word));
}

function isWanted(row: EpisodeRow): boolean {
  const wanted = state.filter.value;
  return (wanted === "all" || outcome(row) === wanted) && holds(row, state.search.value);
}

export function RunPage(props: { run: Run; source: Source; growing: ReadonlySet<string> }) {
  const { run, source, growing } = props;
  const limit = useSignal(SHOWN_AT_ONCE);
  const rows = run.episodes.filter(isWanted);
  const shown = rows.slice(0, limit.value);
  const count = (kind: string) => run.episodes.filter((row) => outcome(row) === kind).length;
  const isChanged = run.episodes.some((row) => row.condition);
  const open = (row: EpisodeRow) =>
    state.navigate(() => {
      state.episode.value = row.id;
      state.frame.value = 0;
      state.patch.value = "";
    });
  return (
    <main class="run-page">
      <header class="bar">
        <h1>{run.name}</h1>
        <span class="note">
          {counted(run.episodes.length, "episode")}
          {count("success") + count("failure") > 0 &&
            `, ${counted(count("success"), "success", "successes")}, ${counted(count("failure"), "failure")}`}
          {count("incomplete") > 0 && `, ${count("incomplete")} incomplete`}
        </span>
        {growing.size > 0 && <span class="badge live">live</span>}
      </header>
      {run.episodes.some((row) => row.random_weights) && <RandomWeights />}
      {[...new Set(run.episodes.map((row) => row.policy_remark))].filter(Boolean).map((remark) => (
        <p class="note" key={remark}>
          {remark}
        </p>
      ))}
      {run.damaged.length > 0 && (
        <details class="warning">
          <summary>{counted(run.damaged.length, "store")} cannot be opened</summary>
          <ul>
            {run.damaged.map((problem) => (
              <li key={problem}>{problem}</li>
            ))}
          </ul>
        </details>
      )}
      <div class="filters">
        <label class="control">
          <span>Show</span>
          <select
            value={state.filter.value}
            onChange={(event) => (state.filter.value = event.currentTarget.value as state.Filter)}
          >
            {["all", "success", "failure", "incomplete"].map((value) => (
              <option key={value} value={value} selected={value === state.filter.value}>
                {value}
              </option>
            ))}
          </select>
        </label>
        <label class="control">
          <span>Find</span>
          <input
            type="search"
            placeholder="words of the task"
            value={state.search.value}
            onInput={(event) => (state.search.value = event.currentTarget.value)}
          />
        </label>
        <span class="note" role="status">
          {rows.length} of {run.episodes.length}
          {run.n_unread > 0 && `, ${run.n_unread} more are being read …`}
        </span>
      </div>
      <table class="episodes">
        <thead>
          <tr>
            <th scope="col">
              <span class="hidden">Picture</span>
            </th>
            <th scope="col">Episode</th>
            <th scope="col">Task</th>
            {isChanged && <th scope="col">Condition</th>}
            <th scope="col">Outcome</th>
            <th scope="col" class="number">
              Frames
            </th>
            <th scope="col" class="number">
              Inferences
            </th>
            <th scope="col" class="number">
              Size
            </th>
          </tr>
        </thead>
        <tbody>
          {shown.map((row) => (
            <tr key={row.id} onClick={(event) => isPlain(event) && open(row)}>
              <td>
                {row.camera !== null && row.n_frames > 0 && (
                  <img
                    key={`${row.version} ${row.n_frames} ${row.complete}`}
                    src={source.pictureUrl(row, row.camera, Math.floor(row.n_frames / 2))}
                    alt=""
                    loading="lazy"
                    width="64"
                    height="64"
                    onError={(event) => (event.currentTarget.style.visibility = "hidden")}
                  />
                )}
              </td>
              <td>
                <a
                  href={`?episode=${encodeURIComponent(row.id).replaceAll("%3A", ":")}`}
                  onClick={(event) => {
                    if (!isPlain(event)) return;
                    event.preventDefault();
                    event.stopPropagation();
                    open(row);
                  }}
                >
                  {episodeName(row)}
                </a>
              </td>
              <td dir="auto">{row.task}</td>
              {isChanged && <td dir="auto">{row.condition}</td>}
              <td>
                <Outcome of={row} /> {growing.has(row.id) && <span class="badge live">live</span>}
              </td>
              <td class="number">{row.n_frames}</td>
              <td class="number">{row.n_inferences}</td>
              <td class="number">{bytes(row.stored_bytes)}</td>
            </tr>
          ))}
        </tbody>
      </table>
      {rows.length === 0 && <p class="note">No episode is like that.</p>}
      {rows.length > shown.length && (
        <button type="button" onClick={() => (limit.value += SHOWN_AT_ONCE)}>
          Show {Math.min(SHOWN_AT_ONCE, rows.length - shown.length)} more of {rows.length - shown.length}
        </button>
      )}
      {count("success") > 0 && count("failure") > 0 && <GroupPanel source={source} />}
    </main>
  );
}

/** Successes against failures, computed only when asked for: it reads every episode. */
function GroupPanel({ source }: { source: Source }) {
  const groups = useSignal<Groups | null>(null);
  const said = useSignal("");
  const compute = () => {
    said.value = "Reading every episode …";
    source.groups().then(
      (found) => {
        groups.value = found;
        said.value = "";
      },
      (error: unknown) => (said.value = message(error)),
    );
  };
  const found = groups.value;
  return (
    <section class="panel" aria-labelledby="groups-title" id="groups">
      <h2 id="groups-title">Successes against failures</h2>
      {!found && (
        <p>
          <button type="button" onClick={compute}>
            Compare
          </button>{" "}
          <span class="note" role="status">
            {said.value}
          </span>
        </p>
      )}
      {found && (
        <>
          <p class="note">
            {counted(found.n_success, "success", "successes")}, {counted(found.n_failure, "failure")}.{" "}
            {found.what}
          </p>
          {found.left_out.length > 0 && (
            <details class="warning">
              <summary>{counted(found.left_out.length, "episode")} left out: cannot be read</summary>
              <ul>
                {found.left_out.map((problem) => (
                  <li key={problem}>{problem}</li>
                ))}
              </ul>
            </details>
          )}
          <table class="groups">
            <thead>
              <tr>
                <th scope="col">Share of attention on</th>
                <th scope="col" class="number">
                  Successes
                </th>
                <th scope="col" class="number">
                  Failures
                </th>
                <th scope="col" class="number">
                  Difference
                </th>
                <th scope="col">95 % interval</th>
              </tr>
            </thead>
            <tbody>
              {found.rows.map((row) => (
                <tr key={row.label}>
                  <th scope="row">{row.label}</th>
                  <td class="number">{percent(row.success)}</td>
                  <td class="number">{percent(row.failure)}</td>
                  <td class="number">{signed(row.difference)}</td>
                  <td>
                    <Interval row={row} all={found} />
                  </td>
                </tr>
              ))}
            </tbody>
          </table>
        </>
      )}
    </section>
  );
}

function Interval({ row, all }: { row: Groups["rows"][number]; all: Groups }) {
  const { low, high, difference } = row;
  if (low === null || high === null || difference === null) return <span class="note">none</span>;
  const reach = Math.max(
    ...all.rows.flatMap((row) => [Math.abs(row.low ?? 0), Math.abs(row.high ?? 0)]),
    1e-6,
  );
  const x = (value: number) => 50 + (48 * value) / reach;
  const text = `${signed(low)} to ${signed(high)}`;
  return (
    <span class="interval">
      <svg viewBox="0 0 100 12" preserveAspectRatio="none" role="img" aria-label={text}>
        <line x1="50" x2="50" y1="0" y2="12" class="zero" />
        <line x1={x(low)} x2={x(high)} y1="6" y2="6" class="span" />
        <line x1={x(difference)} x2={x(difference)} y1="2" y2="10" class="span" />
      </svg>
      <small>{text}</small>
    </span>
  );
}

function signed(share: number | null): string {
  if (share === null) return "missing";
  return `${share >= 0 ? "+" : "−"}${Math.abs(share * 100).toFixed(1)} pp`;
}

export function RandomWeights() {
  return <p class="warning">Random weights: these maps mean nothing.</p>;
}
