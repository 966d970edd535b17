/** The run's page: a part of its episodes, and successes against failures. */

import { batch, useSignal, type Signal } from "@preact/signals";
import type { ComponentChildren } from "preact";
import { useEffect, useRef } from "preact/hooks";
import type { EpisodeRow, Groups, Named, Run } from "./api";
import { percent } from "./heat";
import { counted, episodeName, grouped, outcome } from "./labels";
import { message } from "./model";
import type { Source } from "./source";
import * as state from "./state";

export function bytes(n: number): string {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let unit = 0;
  while (n >= 1000 && unit < units.length - 1) [n, unit] = [n / 1000, unit + 1];
  return `${n >= 100 || unit === 0 ? n.toFixed(0) : n.toFixed(1)} ${units[unit]}`;
}

/** A badge; none where the recording does not know of success. */
export function Outcome({ of }: { of: { success: boolean | null; complete: boolean } }) {
  const found = outcome(of);
  return found === "unknown" ? null : <span class={`badge ${found}`}>{found}</span>;
}

/** Whether a click is meant for this page, not for another tab or window. */
const isPlain = (event: MouseEvent) =>
  !(event.ctrlKey || event.metaKey || event.shiftKey || event.altKey || event.button);

/** Choose other rows: from the first page on. */
const choose = (change: () => void) => () => {
  change();
  state.page.value = 1;
};

export function RunPage(props: {
  run: Run;
  source: Source;
  growing: ReadonlySet<string>;
  /** Whether other rows are wanted than these. */
  isBehind: boolean;
}) {
  const { run, source, growing, isBehind } = props;
  const table = useRef<HTMLTableElement>(null);
  useEffect(() => void (document.title = `${run.name} · lerobot-attn`), [run.name]);
  const open = (row: EpisodeRow) =>
    state.navigate(() => {
      state.episode.value = row.id;
      state.frame.value = 0;
      state.patch.value = "";
    });
  const { success, failure, incomplete } = run.outcomes;
  const turn = (page: number) => state.navigate(() => (state.page.value = page));
  const turnBelow = (page: number) => {
    turn(page);
    table.current?.focus({ preventScroll: true });
    table.current?.scrollIntoView();
  };
  return (
    <main class="run-page">
      <header class="bar">
        <h1>{run.name}</h1>
        <span class="note">
          {counted(run.n_episodes, "episode")}
          {success + failure > 0 &&
            `, ${counted(success, "success", "successes")}, ${counted(failure, "failure")}`}
          {incomplete > 0 && `, ${grouped(incomplete)} incomplete`}
        </span>
        {growing.size > 0 && <span class="badge live">live</span>}
      </header>
      {run.random_weights && <RandomWeights />}
      {run.policy_remarks.map((remark) => (
        <p class="note" key={remark}>
          {remark}
        </p>
      ))}
      {run.n_damaged > 0 && (
        <details class="warning">
          <summary>{counted(run.n_damaged, "store")} cannot be opened</summary>
          <ul>
            {run.damaged.map((problem) => (
              <li key={problem}>{problem}</li>
            ))}
            {run.n_damaged > run.damaged.length && (
              <li>and {grouped(run.n_damaged - run.damaged.length)} more</li>
            )}
          </ul>
        </details>
      )}
      <Filters run={run} />
      <div class="found">
        <span class="note" role="status">
          {grouped(run.n_found)} of {grouped(run.n_episodes)}
          {run.n_unread > 0 && `, ${grouped(run.n_unread)} more are being read …`}
        </span>
        <Pager run={run} label="Pages" turn={turn} />
      </div>
      <table class="episodes" ref={table} tabIndex={-1} aria-busy={isBehind}>
        <caption class="hidden">Episodes {range(run)}</caption>
        <thead>
          <tr>
            <th scope="col">
              <span class="hidden">Picture</span>
            </th>
            <Head column="path">Episode</Head>
            <Head column="task">Task</Head>
            {run.is_changed && (
              <Head column="condition" kind="on-medium">
                Condition
              </Head>
            )}
            <Head column="outcome">Outcome</Head>
            <Head column="frames" kind="number on-medium">
              Frames
            </Head>
            <Head column="inferences" kind="number on-wide">
              Inferences
            </Head>
            <Head column="size" kind="number on-wide">
              Size
            </Head>
          </tr>
        </thead>
        <tbody>
          {run.episodes.map((row) => (
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
              <td dir="auto">
                {row.task}
                {row.condition && <small class="on-narrow">{row.condition}</small>}
              </td>
              {run.is_changed && (
                <td class="on-medium" dir="auto">
                  {row.condition}
                </td>
              )}
              <td>
                <Outcome of={row} /> {growing.has(row.id) && <span class="badge live">live</span>}
              </td>
              <td class="number on-medium">{row.n_frames}</td>
              <td class="number on-wide">{row.n_inferences}</td>
              <td class="number on-wide">{bytes(row.stored_bytes)}</td>
            </tr>
          ))}
        </tbody>
      </table>
      {run.n_found === 0 && !isBehind && <p class="note">No episode is like that.</p>}
      <Pager run={run} label="Pages, below the table" turn={turnBelow} />
      {success > 0 && failure > 0 && <GroupPanel source={source} />}
    </main>
  );
}

function Filters({ run }: { run: Run }) {
  const outcomes: state.Filter[] = ["all", "success", "failure", "incomplete"];
  if (run.outcomes.unknown || state.filter.value === "unknown") outcomes.push("unknown");
  return (
    <div class="filters" role="search">
      <Choice label="Show" value={state.filter} options={outcomes.map((name) => [name, name])} />
      <Values label="Task" value={state.task} all="all tasks" of={run.tasks} />
      <Values label="Condition" value={state.condition} all="all conditions" of={run.conditions} />
      <label class="control">
        <span>Find</span>
        <input
          type="search"
          placeholder="words of the task"
          value={state.search.value}
          onInput={({ currentTarget }) => batch(choose(() => (state.search.value = currentTarget.value)))}
        />
      </label>
    </div>
  );
}

/** A choice of one of the values that a column has; none where there is only one. */
function Values(props: { label: string; value: Signal<string>; all: string; of: readonly Named[] }) {
  const { label, value, all, of } = props;
  if (of.length < 2 && !value.value) return null;
  const options = of.map(({ name, n }): [string, string] => [name, `${name} (${grouped(n)})`]);
  if (!of.some(({ name }) => name === value.value)) options.push([value.value, value.value]);
  // What has no name cannot be told from all of them.
  return <Choice label={label} value={value} options={[["", all], ...options.filter(([name]) => name)]} />;
}

function Choice<T extends string>(props: {
  label: string;
  value: Signal<T>;
  options: readonly (readonly [value: T, text: string])[];
}) {
  const { label, value, options } = props;
  return (
    <label class="control">
      <span>{label}</span>
      <select
        value={value.value}
        onChange={({ currentTarget }) =>
          state.navigate(choose(() => (value.value = currentTarget.value as T)))
        }
      >
        {options.map(([option, text]) => (
          <option key={option} value={option} selected={option === value.value}>
            {text}
          </option>
        ))}
      </select>
    </label>
  );
}

/** A column's head, which sorts by it: upwards, and downwards if it does so already. */
function Head(props: {
  column: state.Column;
  /** Classes of its cells. */ kind?: string;
  children: ComponentChildren;
}) {
  const { column, kind, children } = props;
  const [isUp, isDown] = [state.sort.value === column, state.sort.value === `-${column}`];
  return (
    <th scope="col" class={kind} aria-sort={isUp ? "ascending" : isDown ? "descending" : undefined}>
      <button
        type="button"
        class="sort"
        onClick={() => state.navigate(choose(() => (state.sort.value = isUp ? `-${column}` : column)))}
      >
        {children}
        <span aria-hidden="true">{isUp ? " ▲" : isDown ? " ▼" : ""}</span>
      </button>
    </th>
  );
}

/** Which of the rows that fit are shown: "51–100 of 10,000". */
function range({ offset, episodes, n_found }: Run): string {
  if (!episodes.length) return `0 of ${grouped(n_found)}`;
  return `${grouped(offset + 1)}–${grouped(offset + episodes.length)} of ${grouped(n_found)}`;
}

/** From page to page; nothing where there is one. */
function Pager(props: { run: Run; label: string; turn: (page: number) => void }) {
  const { run, label, turn } = props;
  const last = Math.ceil(run.n_found / state.PAGE_ROWS);
  if (last < 2 && run.offset === 0) return null;
  const page = Math.floor(run.offset / state.PAGE_ROWS) + 1;
  const button = (text: string, name: string, to: number) => {
    const isOff = to < 1 || to > last || to === page;
    return (
      <button type="button" aria-label={name} aria-disabled={isOff} onClick={() => isOff || turn(to)}>
        {text}
      </button>
    );
  };
  return (
    <nav class="pager" aria-label={label}>
      <span class="note">{range(run)}</span>
      {button("«", "First page", 1)}
      {button("‹", "Previous page", page - 1)}
      <label class="inline">
        page{" "}
        <input
          type="number"
          min={1}
          max={last}
          value={page}
          onChange={({ currentTarget }) => {
            const wanted = Math.round(Number(currentTarget.value));
            if (wanted >= 1) turn(Math.min(wanted, last));
            else currentTarget.value = String(page);
          }}
        />{" "}
        of {grouped(last)}
      </label>
      {button("›", "Next page", page + 1)}
      {button("»", "Last page", last)}
    </nav>
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
