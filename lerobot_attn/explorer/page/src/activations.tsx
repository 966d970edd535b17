/** The neurons' panel: which neurons, of which tokens, and beside which number of the state; its lines are in the timeline. */

import type { Facts } from "./api";
import { modalityColour } from "./layout";
import type { EpisodeModel } from "./model";
import {
  besideInWords,
  besideOf,
  chosenOf,
  groupLabel,
  groupOf,
  HIDDEN,
  MOST_EACH,
  offersOf,
  short,
  stateOver,
} from "./neurons";
import type { Offer } from "./neurons";
import * as state from "./state";

/** The colour of the state's line: that of its share of attention. */
export const besideColour = (facts: Facts) => modalityColour(facts, "state");

interface Option {
  value: string;
  name: string;
}

function Choice(props: {
  label: string;
  wide?: boolean;
  value: string;
  options: Option[];
  onChange: (value: string) => void;
}) {
  return (
    <label class={props.wide ? "inline wide" : "inline"}>
      {props.label}{" "}
      <select value={props.value} onChange={(event) => props.onChange(event.currentTarget.value)}>
        {props.options.map(({ value, name }) => (
          <option key={value} value={value} selected={value === props.value}>
            {name}
          </option>
        ))}
      </select>
    </label>
  );
}

/** What the panel shows of an episode, beside another or alone; null where it is hidden. */
export function chosenNeurons(facts: Facts, other: Facts | null): Offer | null {
  return chosenOf(state.neurons.value, offersOf(facts, other), facts);
}

export function NeuronsPanel({ model, other }: { model: EpisodeModel; other: EpisodeModel | null }) {
  const facts = model.facts.value;
  if (!facts?.neurons) return null;
  const offers = offersOf(facts, other?.facts.value ?? null);
  const chosen = chosenOf(state.neurons.value, offers, facts);
  const recorded = chosen && facts.neurons.streams[chosen.stream];
  const isUnit = chosen?.value.startsWith("unit:") ?? false;
  const isExported = facts.excerpt !== undefined;
  const beside = besideOf(facts, state.beside.value);
  const streams = Object.keys(facts.neurons.streams);
  const [layer, unit] = chosen?.units[0] ?? [0, 0];
  const show = (stream: string, layer: number, unit: number) =>
    (state.neurons.value = `unit:${stream}:${layer}:${unit}`);
  const one: Option = isUnit
    ? { value: chosen!.value, name: "one neuron" }
    : { value: `unit:${chosen?.stream ?? streams[0]}:${layer}:${unit}`, name: "one neuron" };
  return (
    <section class="neurons" id="neurons" aria-label="Neurons">
      <Choice
        label="Neurons"
        wide
        value={chosen?.value ?? HIDDEN}
        options={[
          ...offers.map(({ value, name }) => ({ value, name })),
          ...(isExported ? [] : [one]),
          { value: HIDDEN, name: "hidden" },
        ]}
        onChange={(value) => (state.neurons.value = value)}
      />
      {chosen && recorded && (
        <>
          {isUnit && (
            <>
              {streams.length > 1 && (
                <Choice
                  label="stream"
                  value={chosen.stream}
                  options={streams.map((value) => ({ value, name: value }))}
                  onChange={(stream) => show(stream, layer, unit)}
                />
              )}
              <Choice
                label="layer"
                value={String(layer)}
                options={recorded.layers.map((label) => ({ value: String(label), name: String(label) }))}
                onChange={(label) => show(chosen.stream, Number(label), unit)}
              />
              <label class="inline">
                unit{" "}
                <input
                  type="number"
                  min="0"
                  max={recorded.n_units - 1}
                  value={unit}
                  onChange={(event) => {
                    const wanted = Math.round(Number(event.currentTarget.value));
                    show(chosen.stream, layer, Math.max(0, Math.min(wanted, recorded.n_units - 1)));
                  }}
                />
              </label>
            </>
          )}
          <Choice
            label="at tokens"
            value={groupOf(recorded, state.tokens.value)}
            options={recorded.groups.map((value) => ({ value, name: groupLabel(facts, value) }))}
            onChange={(group) => (state.tokens.value = group)}
          />
          {recorded.reductions.length > 1 && (
            <Choice
              label="their"
              value={
                recorded.reductions.includes(state.reduction.value)
                  ? state.reduction.value
                  : recorded.reductions[0]!
              }
              options={recorded.reductions.map((value) => ({
                value,
                name: value === "max" ? "maximum" : value,
              }))}
              onChange={(value) => (state.reduction.value = value)}
            />
          )}
          {chosen.units.length > 1 && chosen.units.length <= MOST_EACH && (
            <label class="inline">
              <input
                type="checkbox"
                checked={state.units.value === "on"}
                onChange={(event) => (state.units.value = event.currentTarget.checked ? "on" : "off")}
              />{" "}
              each neuron
            </label>
          )}
          {beside !== null && (
            <Choice
              label="beside"
              wide
              value={beside}
              options={facts.state_dims.map((value) => ({ value, name: besideInWords(value).name }))}
              onChange={(value) => (state.beside.value = value)}
            />
          )}
          {recorded.per_step && <small>denoise step {model.step.value}</small>}
          {chosen.nLeftOut > 0 && (
            <small>
              {chosen.nLeftOut} of the set {chosen.nLeftOut === 1 ? "was" : "were"} not recorded
            </small>
          )}
        </>
      )}
    </section>
  );
}

/** What the lines are, with their numbers at the shown frame. */
export function NeuronKeys({ model, other }: { model: EpisodeModel; other: EpisodeModel | null }) {
  const [facts, timeline, shown] = [model.facts.value, model.timeline.value, model.shown.value];
  const found = model.neurons.found.value;
  if (!facts?.neurons || !timeline || state.neurons.value === HIDDEN) return null;
  const inference = shown?.inference ?? 0;
  const beside = besideOf(facts, state.beside.value);
  const height = stateOver(facts, timeline, beside)?.[shown?.frame ?? 0];
  const told = besideInWords(beside ?? "");
  return (
    <div class="timeline-keys neuron-keys">
      {!found ? (
        <span>
          {model.neurons.wanted.value ? "neurons: loading …" : "neurons: this episode holds not all of these"}
        </span>
      ) : (
        <>
          <span>
            <i class="line accent" /> <b>activation</b> of{" "}
            {found.units.length === 1 ? "the neuron" : `${found.units.length} neurons, mean`}:{" "}
            <output>{short(found.mean[inference])}</output>
          </span>
          <span>
            <i class="line dashed soft" /> chance: all neurons of{" "}
            {found.units.length === 1 ? "its layer" : "their layers"}:{" "}
            <output>{short(found.expected[inference])}</output>
          </span>
          {other?.neurons.found.value && (
            <span>
              <i class="line dotted" /> the other episode
            </span>
          )}
        </>
      )}
      {height !== undefined && (
        <span>
          <i class="line" style={{ borderColor: besideColour(facts) }} /> {told.name}:{" "}
          <output>{`${short(height)} ${told.unit}`.trim()}</output>
        </span>
      )}
    </div>
  );
}
