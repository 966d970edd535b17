/** The episode over its frames: shares, sharpness, reward, when the policy was asked; and the playhead. */

import { useComputed, useSignal, useSignalEffect } from "@preact/signals";
import { useEffect, useRef } from "preact/hooks";
import uPlot from "uplot";
import "uplot/dist/uPlot.min.css";
import { besideColour, NeuronKeys } from "./activations";
import type { Facts, RoleShares, Shares, Timeline as Table } from "./api";
import { modalityColour, modalityLabel } from "./layout";
import type { EpisodeModel } from "./model";
import { besideOf, HIDDEN, otherFrame, short, span, stateOver } from "./neurons";
import { isRole, LOOKS } from "./scene";
import * as state from "./state";
import { ink, type Ink } from "./theme";

const SHARES_PX = 58;
const ROLES_PX = 46;
const NEURONS_PX = 76;
const LINES_PX = 64;
const AXIS_PX = 44;
const WHOLE = [1, 2, 5]
  .flatMap((digit) => [0, 1, 2, 3, 4].map((power) => digit * 10 ** power))
  .sort((a, b) => a - b);

/** Values of inferences, repeated for the frames that each of them governs. */
function perFrame(table: Table, of: (inference: number) => number | null | undefined): (number | null)[] {
  return table.frame_inference.map((inference) => of(inference) ?? null);
}

/** Shares added up from the first modality on, so that areas stack; the topmost first, as uPlot paints. */
function stacked(shares: Shares, table: Table): { names: string[]; rows: (number | null)[][] } {
  const kept = shares.modalities.map((name, i) => ({ name, i })).filter(({ name }) => name !== "padding");
  const rows = kept.map((_, place) =>
    perFrame(table, (inference) => {
      const row = shares.share[inference];
      if (!row || row[0] === null) return null;
      return kept.slice(0, place + 1).reduce((total, { i }) => total + (row[i] ?? 0), 0);
    }),
  );
  return { names: kept.map(({ name }) => name).reverse(), rows: rows.reverse() };
}

function boundaries(table: Table): (u: uPlot) => void {
  return (u) => {
    const colour = ink(u.root);
    const { ctx, bbox } = u;
    // Closer than a few pixels they would hide what they are meant to mark.
    const apart = bbox.width / Math.max(1, table.inference_frame.length);
    if (apart < 3 * devicePixelRatio) return;
    ctx.save();
    ctx.fillStyle = colour.line;
    for (const frame of table.inference_frame) {
      const x = Math.round(u.valToPos(frame - 0.5, "x", true));
      if (x >= bbox.left && x <= bbox.left + bbox.width) ctx.fillRect(x, bbox.top, 1, bbox.height);
    }
    ctx.restore();
  };
}

const NO_SHARES: Shares = { first: 0, modalities: [], share: [], effective_tokens: [] };
const FONT = "11px system-ui, sans-serif";

interface Plan {
  height: number;
  series: uPlot.Series[];
  data: (number | null)[][];
  scales: uPlot.Scales;
  axes: uPlot.Axis[];
  /** Whether frame numbers stand below. */
  numbered: boolean;
}

function plot(target: HTMLElement, table: Table, plan: Plan, onDrawn: () => void): uPlot {
  const colour = ink(target);
  const axis = { stroke: colour.soft, font: FONT, ticks: { show: false }, grid: { show: false } };
  const frames = plan.numbered ? { ...axis, size: 18, gap: 2, incrs: WHOLE } : { show: false };
  return new uPlot(
    {
      width: target.clientWidth || 600,
      height: plan.height,
      legend: { show: false },
      cursor: { show: false },
      padding: [6, plan.axes.some((own) => own.side === 1) ? 0 : AXIS_PX, plan.numbered ? 0 : 6, 0],
      scales: {
        x: { time: false, range: [-0.5, Math.max(0.5, table.frame_inference.length - 0.5)] },
        ...plan.scales,
      },
      axes: [frames, ...plan.axes.map((own) => ({ ...axis, size: AXIS_PX, gap: 4, ...own }))],
      series: [{}, ...plan.series],
      hooks: { draw: [boundaries(table), onDrawn] },
    },
    [table.frame_inference.map((_, frame) => frame), ...plan.data],
    target,
  );
}

const steps = uPlot.paths.stepped!({ align: 1 });

function sharesPlan(facts: Facts, shares: Shares, table: Table): Plan {
  const { names, rows } = stacked(shares, table);
  const series = names.map((name) => {
    const fill = modalityColour(facts, name);
    return {
      label: name,
      scale: "share",
      fill,
      stroke: fill,
      width: 0,
      paths: steps,
      points: { show: false },
    };
  });
  const values = (_: uPlot, ticks: number[]) => ticks.map((tick) => `${Math.round(tick * 100)} %`);
  return {
    height: SHARES_PX,
    series,
    data: rows,
    // The largest of heads sum to more than 1.
    scales: { share: { range: (_, __, most) => [0, Math.max(1, most)] } },
    axes: [{ scale: "share", values, splits: [0, 0.5, 1] }],
    numbered: false,
  };
}

/** Each role's share of the chosen camera's attention as a line, and its chance dashed, in the same colour. */
function rolesPlan(roles: RoleShares, table: Table): Plan {
  const told = roles.roles.flatMap((name, place) => (isRole(name) ? [{ name, place }] : []));
  const line = (colour: string) => ({
    scale: "share",
    stroke: colour,
    paths: steps,
    points: { show: false },
  });
  return {
    height: ROLES_PX,
    series: told.flatMap(({ name }) => {
      const { colour } = LOOKS[name];
      return [
        { ...line(colour), label: `${name} by chance`, width: 1, dash: [3, 3] },
        { ...line(colour), label: name, width: 2 },
      ];
    }),
    data: told.flatMap(({ place }) => [
      perFrame(table, (inference) => roles.chance[inference]?.[place]),
      perFrame(table, (inference) => roles.share[inference]?.[place]),
    ]),
    scales: { share: { range: (_, __, most) => [0, most > 0 ? Math.min(1, most * 1.1) : 1] } },
    axes: [
      {
        scale: "share",
        space: 20,
        values: (_, ticks) => ticks.map((tick) => `${+(tick * 100).toFixed(1)} %`),
      },
    ],
    numbered: false,
  };
}

function linesPlan(colour: Ink, shares: Shares, table: Table): Plan {
  const effective = perFrame(table, (inference) => shares.effective_tokens[inference]);
  const line = { width: 1.5, paths: steps, points: { show: false } };
  const rewards = (table.reward ?? []).filter((value) => value !== null);
  const [low, high] = [Math.min(0, ...rewards), Math.max(1, ...rewards)];
  return {
    height: LINES_PX,
    series: [
      { ...line, scale: "tokens", stroke: colour.accent },
      ...(table.reward ? [{ ...line, scale: "reward", stroke: colour.text, dash: [4, 3] }] : []),
    ],
    data: table.reward ? [effective, table.reward] : [effective],
    scales: {
      tokens: { range: (_, __, most) => [0, most > 0 ? most * 1.1 : 1] },
      reward: { range: [low, high * 1.1] },
    },
    axes: [
      { scale: "tokens", space: 20 },
      ...(table.reward ? [{ scale: "reward", side: 1, space: 20 }] : []),
    ],
    numbered: true,
  };
}

/**
 * The neurons' activation, what it would be by chance, and a number of the state; both scales are those of the two
 * episodes that are shown together.
 */
function neuronsPlan(colour: Ink, model: EpisodeModel, other: EpisodeModel | null, table: Table): Plan {
  const [facts, found] = [model.facts.value!, model.neurons.found.value];
  const others = other?.neurons.found.value ?? null;
  const otherTable = other?.timeline.value ?? null;
  const activation = { scale: "activation", paths: steps, points: { show: false } };
  const series: uPlot.Series[] = [];
  const data: (number | null)[][] = [];
  const add = (line: uPlot.Series, values: (number | null)[]) => {
    series.push(line);
    data.push(values);
  };
  const beside = besideOf(facts, state.beside.value);
  const height = stateOver(facts, table, beside);
  if (height)
    add({ scale: "state", stroke: besideColour(facts), width: 1.5, points: { show: false } }, height);
  if (found) {
    found.units.forEach((_, place) => {
      if (!found.each) return;
      const values = perFrame(table, (inference) => found.each![inference]?.[place]);
      add({ ...activation, stroke: colour.accent, alpha: 0.4, width: 0.75 }, values);
    });
    const expected = perFrame(table, (inference) => found.expected[inference]);
    add({ ...activation, stroke: colour.soft, width: 1.5, dash: [5, 3] }, expected);
  }
  if (others && otherTable) {
    const [last, otherLast] = [table, otherTable].map((one) => one.frame_inference.length - 1) as [
      number,
      number,
    ];
    const values = table.frame_inference.map((_, frame) => {
      const there =
        otherTable.frame_inference[otherFrame(frame, last, otherLast, state.lock.value === "phase")];
      return there === undefined ? null : (others.mean[there] ?? null);
    });
    add({ ...activation, stroke: colour.text, width: 1.5, dash: [1.5, 2.5] }, values);
  }
  if (found) {
    add(
      { ...activation, stroke: colour.accent, width: 2 },
      perFrame(table, (inference) => found.mean[inference]),
    );
  }
  const both = [found, others].filter((one) => one !== null);
  const ofActivation = span(...both.flatMap((one) => [one.mean, one.expected, ...(one.each ?? [])]));
  const otherFacts = other?.facts.value ?? null;
  const otherHeight = otherFacts && otherTable ? stateOver(otherFacts, otherTable, beside) : null;
  const ofState = span(height ?? [], otherHeight ?? []);
  const values = (_: uPlot, ticks: number[]) => ticks.map((tick) => short(tick));
  return {
    height: NEURONS_PX,
    series,
    data,
    scales: { activation: { range: ofActivation }, state: { range: ofState } },
    axes: [
      { scale: "activation", space: 14, values },
      ...(height
        ? [{ scale: "state", side: 1 as const, space: 14, values, stroke: besideColour(facts) }]
        : []),
    ],
    numbered: false,
  };
}

export function TimelinePanel(props: {
  model: EpisodeModel;
  /** The episode that is shown beside it. */
  other: EpisodeModel | null;
  label: string;
  onSeek: (frame: number) => void;
}) {
  const { model, other, label, onSeek } = props;
  const sharesRef = useRef<HTMLDivElement>(null);
  const rolesRef = useRef<HTMLDivElement>(null);
  const neuronsRef = useRef<HTMLDivElement>(null);
  const linesRef = useRef<HTMLDivElement>(null);
  const plots = useRef<uPlot[]>([]);
  const width = useSignal(0);
  const hasNeurons = useComputed(() => Boolean(model.facts.value?.neurons) && state.neurons.value !== HIDDEN);
  const left = useSignal<number | null>(null);

  useEffect(() => {
    const target = sharesRef.current!;
    const observer = new ResizeObserver(() => (width.value = target.clientWidth));
    observer.observe(target);
    const dark = matchMedia("(prefers-color-scheme: dark)");
    const redraw = () => (width.value = -target.clientWidth);
    dark.addEventListener("change", redraw);
    return () => {
      observer.disconnect();
      dark.removeEventListener("change", redraw);
      plots.current.forEach((plot) => plot.destroy());
    };
  }, []);

  useSignalEffect(() => {
    const [facts, table] = [model.facts.value, model.timeline.value];
    const shares = model.shares.value ?? (facts?.mean_layers.length ? null : NO_SHARES);
    if (!facts || !shares || !table || !width.value) return;
    plots.current.forEach((plot) => plot.destroy());
    const colour = ink(sharesRef.current!);
    plots.current = [plot(sharesRef.current!, table, sharesPlan(facts, shares, table), movePlayhead)];
    const roles = model.roles.value;
    if (rolesRef.current && roles) {
      plots.current.push(plot(rolesRef.current, table, rolesPlan(roles, table), () => {}));
    }
    if (neuronsRef.current && hasNeurons.value) {
      const plan = neuronsPlan(colour, model, other, table);
      plots.current.push(plot(neuronsRef.current, table, plan, () => {}));
    }
    if (linesRef.current) {
      plots.current.push(plot(linesRef.current, table, linesPlan(colour, shares, table), () => {}));
    }
  });

  const movePlayhead = () => {
    const frame = model.shown.value?.frame ?? 0;
    const first = plots.current[0];
    left.value = first?.over.clientWidth ? first.valToPos(frame, "x") + first.over.offsetLeft : null;
  };
  useSignalEffect(movePlayhead);

  const seek = (event: PointerEvent) => {
    const first = plots.current[0];
    if (!first || (event.type === "pointermove" && !event.buttons)) return;
    const x = event.clientX - first.over.getBoundingClientRect().left;
    const frame = Math.round(first.posToVal(x, "x"));
    onSeek(model.frames.value.nearest(frame));
  };

  const succeeded = model.timeline.value?.success?.indexOf(true) ?? -1;
  const [facts, modalities] = [model.facts.value, model.shares.value?.modalities];
  const roles = facts?.scene ? model.roles.value : null;
  return (
    <section class="timeline" aria-label={label}>
      <div class="timeline-keys" aria-hidden="true">
        <span>
          <b>shares</b> of attention:
        </span>
        {facts &&
          modalities
            ?.filter((name) => name !== "padding")
            .map((name) => (
              <span key={name}>
                <i class="swatch" style={{ background: modalityColour(facts, name) }} />{" "}
                {modalityLabel(facts, name)}
              </span>
            ))}
        {facts && roles && (
          <span>
            <b>on objects</b>, of camera {modalityLabel(facts, roles.camera)}:
          </span>
        )}
        {roles?.roles.map((role) => (
          <span key={role}>
            <i class="swatch" style={{ background: isRole(role) ? LOOKS[role].colour : "" }} /> {role}
          </span>
        ))}
        {roles && (
          <span>
            <i class="line dashed soft" /> chance, by area
          </span>
        )}
        <span>
          <i class="line accent" /> tokens it is worth (2^entropy)
        </span>
        {model.timeline.value?.reward && (
          <span>
            <i class="line dashed" /> reward
          </span>
        )}
        <span>thin lines: the policy was asked</span>
        {succeeded >= 0 && <span>success at frame {succeeded}</span>}
      </div>
      <NeuronKeys model={model} other={other} />
      <div class="plots" onPointerDown={seek} onPointerMove={seek}>
        <div ref={sharesRef} class="plot" />
        {facts?.scene && facts.mean_layers.length > 0 && <div ref={rolesRef} class="plot roles" />}
        {hasNeurons.value && <div ref={neuronsRef} class="plot neurons" />}
        <div ref={linesRef} class="plot" />
        {left.value !== null && <span class="playhead" style={{ left: `${left.value}px` }} />}
      </div>
    </section>
  );
}
