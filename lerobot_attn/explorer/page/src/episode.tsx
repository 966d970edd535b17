/** One episode, or two side by side. */

import {
  computed,
  signal,
  useComputed,
  useSignal,
  useSignalEffect,
  type ReadonlySignal,
} from "@preact/signals";
import { useEffect, useMemo } from "preact/hooks";
import { Actions } from "./actions";
import { chosenNeurons, NeuronsPanel } from "./activations";
import type { EpisodeRow, Facts, Run } from "./api";
import { Cameras } from "./camera";
import { colourTable } from "./colormaps";
import { announceDrawn, Controls, followKeys, play, Transport } from "./controls";
import { HeadGrid, StepStrip } from "./grid";
import { percent } from "./heat";
import { Help } from "./help";
import { episodeName, grouped, outcome } from "./labels";
import { visiblePatches } from "./layout";
import { EpisodeModel, sharedEnd } from "./model";
import { askOf } from "./neurons";
import { ObjectsPanel, OutlineLegend } from "./objects";
import { PatchPanel } from "./patch";
import { download } from "./picture";
import { Part } from "./part";
import { Outcome, RandomWeights } from "./run";
import type { Source } from "./source";
import * as state from "./state";
import { Sentence, ShareBar } from "./text";
import { TimelinePanel } from "./timeline";
import { Tour } from "./tour";

/** A model of an episode that lives as long as it is on the page. */
function useModel(source: Source, id: string, wanted: ReadonlySignal<number>, models: Set<EpisodeModel>) {
  const model = useMemo(() => (id ? new EpisodeModel(source, id, wanted) : null), [id]);
  useEffect(() => {
    if (!model) return;
    models.add(model);
    return () => {
      models.delete(model);
      model.dispose();
    };
  }, [model]);
  return model;
}

export function EpisodePage(props: {
  run: Run | null;
  source: Source;
  growing: ReadonlySet<string>;
  models: Set<EpisodeModel>;
  parts: Set<Part>;
}) {
  const { run, source, growing, models, parts } = props;
  const first = useModel(source, state.episode.value, state.frame, models)!;
  const other = useMemo(() => otherFrame(first), [first]);
  const compared = state.compared.value === first.id ? "" : state.compared.value;
  const second = useModel(source, compared, other.wanted, models);
  other.model.value = second;
  const both = second ? [first, second] : [first];
  const end = useComputed(() =>
    sharedEnd(other.model.value ? [first, other.model.value] : [first], state.normalisation.value),
  );
  const stop = useSignal<(() => void) | null>(null);
  const help = useSignal(false);

  const toggle = () => {
    if (stop.peek()) {
      stop.peek()!();
      stop.value = null;
      return;
    }
    const longest = other.longest.peek();
    if (longest.frameShown() >= longest.lastFrame.value) state.frame.value = 0;
    stop.value = play(other.longest, () => {
      stop.peek()?.();
      stop.value = null;
    });
  };
  useEffect(() => {
    const stops = [followKeys(first, other.longest, toggle, () => (help.value = true)), announceDrawn(first)];
    return () => {
      stops.forEach((done) => done());
      stop.peek()?.();
    };
  }, [first]);
  useSignalEffect(() => {
    const facts = first.facts.value;
    document.title = facts ? `${episodeName(facts)} · lerobot-attn` : "lerobot-attn explorer";
  });

  useSignalEffect(() => {
    const other_ = other.model.value;
    const facts = first.facts.value;
    const chosen = facts && chosenNeurons(facts, other_?.facts.value ?? null);
    for (const model of other_ ? [first, other_] : [first]) {
      const own = model.facts.value;
      const asked =
        own && chosen && askOf(own, chosen, state.tokens.value, state.reduction.value, model.step.value);
      model.neurons.want(asked ?? null, state.units.value === "on");
    }
  });

  const facts = first.facts.value;
  return (
    <main class="episode-page">
      <header class="bar">
        {run && !run.is_episode && (
          <a
            href="?"
            onClick={(event) => {
              event.preventDefault();
              state.navigate(() => {
                state.episode.value = state.compared.value = "";
                state.tour.value = 0;
              });
            }}
          >
            All episodes
          </a>
        )}
        {facts && (
          <>
            <h1>{episodeName(facts)}</h1>
            {!second && (
              <span class="task" title={facts.task} dir="auto">
                {facts.task}
              </span>
            )}
            <Outcome of={facts} />
            {facts.replay && (
              <span
                class="badge unknown"
                title="The policy was shown what had been recorded; its actions moved nothing."
              >
                replay
              </span>
            )}
            {growing.has(first.id) && <span class="badge live">live</span>}
          </>
        )}
        <span class="spacer" />
        {run && run.n_episodes > 1 && (
          <CompareWith
            own={first.id}
            other={second}
            nOthers={run.n_episodes - 1}
            source={source}
            parts={parts}
          />
        )}
        <span class="buttons">
          <button type="button" onClick={() => (state.tour.value = 1)}>
            Tour
          </button>
          <button type="button" onClick={() => download(both)}>
            Save PNG
          </button>
          <button type="button" onClick={() => (help.value = true)}>
            Help <kbd>?</kbd>
          </button>
        </span>
      </header>
      {facts?.random_weights && <RandomWeights />}
      {facts && (facts.policy_remark || (!second && facts.condition)) && (
        <p class="note">
          {!second && facts.condition && <span class="condition">condition: {facts.condition}</span>}
          {!second && facts.condition && facts.policy_remark && " · "}
          {facts.policy_remark}
        </p>
      )}
      {facts?.excerpt && <p class="note">{facts.excerpt}</p>}
      {both.map(
        (model) =>
          model.problem.value && (
            <p key={model.id} class="warning" role="alert">
              {model.problem.value}
            </p>
          ),
      )}
      {facts && !facts.n_inferences && <p class="note">Nothing is recorded yet.</p>}
      {facts && facts.n_inferences > 0 && !facts.mean_layers.length && (
        <p class="note">
          No attention of the action tokens was recorded
          {facts.prefix_layers.length > 0 && ": hover a word to see what it looks at in the prefix"}.
        </p>
      )}
      {!facts && !first.problem.value && <p class="note">Loading …</p>}
      {facts && (
        <>
          <Controls model={first} hasMasks={both.some(hasMasks)} />
          <div class={second ? "sides two" : "sides"}>
            {both.map((model, i) => (
              <Side
                key={`${model.id} ${model.facts.value?.version}`}
                first={first}
                model={model}
                end={end}
                isSecond={i > 0}
                isCompared={second !== null}
              />
            ))}
          </div>
          <footer class={second ? "two" : ""}>
            <Transport model={other.longest.value} isPlaying={stop.value !== null} toggle={toggle} />
            <NeuronsPanel model={first} other={second} />
            {both.map((model, i) => (
              <TimelinePanel
                key={model.id}
                model={model}
                other={second && both[1 - i]!}
                label={i ? "Timeline of the second episode" : "Timeline"}
                onSeek={i ? other.seek : (frame) => (state.frame.value = frame)}
              />
            ))}
          </footer>
        </>
      )}
      {help.value && <Help hasMasks={both.some(hasMasks)} onClose={() => (help.value = false)} />}
      {state.tour.value > 0 && <Tour model={first} />}
    </main>
  );
}

const hasMasks = (model: EpisodeModel) => Boolean(model.facts.value?.scene);

/** The frame of the compared episode that goes with the first one's, and where the playhead can go. */
function otherFrame(first: EpisodeModel) {
  const model = signal<EpisodeModel | null>(null);
  const wanted = computed(() => {
    // Bounded by each episode for itself: one may be longer than the other.
    if (state.lock.value === "frame" || !first.lastFrame.value) return first.wanted.value;
    return Math.round((first.frameShown() / first.lastFrame.value) * (model.value?.lastFrame.value ?? 0));
  });
  /** Move the first episode to the frame that goes with one of the second's. */
  const seek = (frame: number) => {
    const last = model.value?.lastFrame.value ?? 0;
    const isPhase = state.lock.value === "phase" && last > 0;
    state.frame.value = isPhase ? Math.round((frame / last) * first.lastFrame.value) : frame;
  };
  /** Whose frames the playhead goes through: locked by frame, the longer episode's. */
  const longest = computed(() => {
    const second = state.lock.value === "frame" ? model.value : null;
    return second && second.lastFrame.value > first.lastFrame.value ? second : first;
  });
  return { model, wanted, seek, longest };
}

const MOST_OFFERED = 100; // a list of thousands is of no use

function CompareWith(props: {
  own: string;
  other: EpisodeModel | null;
  nOthers: number;
  source: Source;
  parts: Set<Part>;
}) {
  const { own, other, nOthers, source, parts } = props;
  const part = useMemo(() => new Part(source), []);
  useEffect(() => {
    part.want({ limit: MOST_OFFERED + 1 });
    parts.add(part);
    return () => {
      parts.delete(part);
      part.dispose();
    };
  }, []);
  const run = part.run.value;
  // Episodes of several conditions have the same names, because they begin from the same scenes.
  const isOfSeveral = (run?.conditions.length ?? 0) > 1;
  const name = (
    row: Pick<
      EpisodeRow & Facts,
      "task_group" | "task_id" | "episode" | "success" | "complete" | "condition_name"
    >,
  ) => {
    const told = [isOfSeveral && row.condition_name, outcome(row) !== "unknown" && outcome(row)];
    const more = told.filter(Boolean).join(", ");
    return more ? `${episodeName(row)} (${more})` : episodeName(row);
  };
  const others = run?.episodes.filter((row) => row.id !== own) ?? [];
  const offered = others.slice(0, MOST_OFFERED).map((row) => ({ id: row.id, name: name(row) }));
  const chosen = state.compared.value;
  if (chosen && !offered.some(({ id }) => id === chosen)) {
    const facts = other?.facts.value;
    offered.unshift({ id: chosen, name: facts ? name(facts) : chosen });
  }
  const nLeftOut = run ? run.n_found - run.episodes.length + Math.max(0, others.length - MOST_OFFERED) : 0;
  return (
    <>
      {nOthers > MOST_OFFERED && (
        <input
          class="inline"
          type="search"
          size={13}
          aria-label="Find episodes to compare with"
          placeholder="find episodes"
          onInput={(event) =>
            part.want({ find: event.currentTarget.value || undefined, limit: MOST_OFFERED + 1 })
          }
        />
      )}
      <label class={state.compared.value ? "inline wide" : "inline"}>
        Compare{" "}
        <select
          value={state.compared.value}
          onChange={(event) => (state.compared.value = event.currentTarget.value)}
        >
          <option value="">with nothing</option>
          {offered.map(({ id, name }) => (
            <option key={id} value={id} selected={id === chosen}>
              {name}
            </option>
          ))}
          {nLeftOut > 0 && <option disabled>and {grouped(nLeftOut)} more: find them by words</option>}
        </select>
      </label>
      {state.compared.value && (
        <label class="inline">
          at the same{" "}
          <select
            value={state.lock.value}
            onChange={(event) => (state.lock.value = event.currentTarget.value as state.Lock)}
          >
            <option value="frame" selected={state.lock.value === "frame"}>
              frame
            </option>
            <option value="phase" selected={state.lock.value === "phase"}>
              phase
            </option>
          </select>
        </label>
      )}
    </>
  );
}

/** What is shown of an episode where it is not what is shown of the first, whose policy may be another. */
function differences(first: EpisodeModel, model: EpisodeModel): string {
  const parts = [
    ["layer", first.layer.value, model.layer.value],
    ["head", first.head.value, model.head.value],
    ["denoise step", first.step.value, model.step.value],
  ];
  return parts.map(([name, one, own]) => (one === own ? "" : ` · ${name} ${own}`)).join("");
}

function Side(props: {
  first: EpisodeModel;
  model: EpisodeModel;
  end: ReadonlySignal<number>;
  isSecond: boolean;
  isCompared: boolean;
}) {
  const { first, model, end, isSecond, isCompared } = props;
  const facts = model.facts.value;
  return (
    <div
      class={model.views.value.length > 2 ? "side many" : "side"}
      data-episode={model.id}
      style={sizes(model)}
    >
      {isCompared && facts && (
        <h2 class="side-title">
          {episodeName(facts)} <Outcome of={facts} />{" "}
          <small>
            frame {model.shown.value?.frame ?? 0}
            {differences(first, model)} · <bdi>{facts.task}</bdi>
            {facts.condition && (
              <>
                {" "}
                · <span class="condition">condition: {facts.condition}</span>
              </>
            )}
          </small>
        </h2>
      )}
      <div class="panels seen">
        <section class="panel" id={isSecond ? "cameras-2" : "cameras"} aria-label="Cameras">
          <Cameras model={model} end={end} />
          <OutlineLegend model={model} />
          {!isSecond && <ColourBar end={end} />}
        </section>
      </div>
      {!isSecond && (
        <div
          class="panels maps"
          role="group"
          aria-label="Layers, heads, denoise steps and actions"
          tabIndex={0}
        >
          {isCompared && facts && <h2 class="side-title">More of {episodeName(facts)}</h2>}
          <HeadGrid model={model} />
          <StepStrip model={model} />
          <Actions model={model} />
        </div>
      )}
      <div class="panels told">
        <ShareBar model={model} />
        <ObjectsPanel model={model} id={isSecond ? "objects-2" : "objects"} />
        <Sentence model={model} />
        {!isSecond && <PatchPanel model={model} />}
      </div>
    </div>
  );
}

/** For the style sheet, which makes the cameras as large as the window has room for. */
function sizes(model: EpisodeModel): Record<string, string> {
  const geometries = model.views.value.map(({ geometry }) => geometry);
  const tall = geometries.reduce((total, { height_px, width_px }) => total + height_px / width_px, 0);
  // What lies on the letterbox is said below the picture, and takes a second line.
  const isLetterboxed = geometries.some((geometry) => visiblePatches(geometry).includes(false));
  return {
    "--cameras": String(geometries.length),
    "--tall": String(tall || 1),
    "--rows": String(Math.ceil(geometries.length / 2)), // of compared cameras, two beside each other
    "--caption-lines": isLetterboxed ? "2" : "1",
  };
}

function ColourBar({ end }: { end: ReadonlySignal<number> }) {
  const colours = useComputed(() => {
    const table = colourTable(state.colours.value);
    const stops = Array.from({ length: 9 }, (_, i) => {
      const at = Math.round((i / 8) * 255) * 3;
      return `rgb(${table[at]} ${table[at + 1]} ${table[at + 2]})`;
    });
    return `linear-gradient(to right, ${stops.join(",")})`;
  });
  const unit = {
    share: "of all attention, in one patch",
    image: "of the image's attention, in one patch",
    frame: "of the largest patch",
    episode: "of all attention, in one patch",
  };
  return (
    <p class="colour-bar">
      <span>0</span>
      <span class="colours" style={{ background: colours.value }} aria-hidden="true" />
      <span>
        {percent(end.value)} {unit[state.normalisation.value]}
      </span>
    </p>
  );
}
