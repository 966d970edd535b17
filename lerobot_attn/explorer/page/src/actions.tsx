/** The action chunk that the inference yielded, and the frame's own action: executed, or recorded and predicted. */

import { useSignalEffect } from "@preact/signals";
import { useRef } from "preact/hooks";
import type { Facts } from "./api";
import { averagedInWords } from "./labels";
import { actionOfQuery, countActions } from "./layout";
import type { EpisodeModel } from "./model";
import { ink } from "./theme";

const ROW_PX = 26;

export function Actions({ model }: { model: EpisodeModel }) {
  const canvas = useRef<HTMLCanvasElement>(null);
  const [facts, shown, timeline] = [model.facts.value, model.shown.value, model.timeline.value];

  useSignalEffect(() => {
    const [facts, shown, timeline] = [model.facts.value, model.shown.value, model.timeline.value];
    if (!facts || !shown || !timeline || !canvas.current) return;
    const rows = shown.chunk.action.slice(...facts.action_queries);
    const query = timeline.frame_query[shown.frame] ?? -1;
    draw(
      canvas.current,
      rows,
      facts.action_dims.length,
      query < 0 ? null : actionOfQuery(facts, query),
      facts.executed_queries?.map((query) => actionOfQuery(facts, query)) as [number, number] | undefined,
    );
  });

  if (!facts || !shown) return null;
  // In a replay, the one that was recorded.
  const executed = timeline?.action[shown.frame];
  const predicted = timeline?.predicted_action?.[shown.frame];
  const query = timeline?.frame_query[shown.frame] ?? -1;
  return (
    <section class="panel" aria-labelledby="actions-title" id="actions">
      <h2 id="actions-title">
        Actions <small>{said(facts, query, Boolean(timeline?.predicted_action))}</small>
      </h2>
      <div class="actions">
        <ul class="action-names">
          {facts.action_dims.map((name, i) => (
            <li key={name} style={{ height: `${ROW_PX}px` }}>
              {name} <strong>{executed?.[i]?.toFixed(3) ?? ""}</strong>
              {timeline?.predicted_action && (
                <span class="predicted">{predicted?.[i]?.toFixed(3) ?? ""}</span>
              )}
            </li>
          ))}
        </ul>
        {!facts.decodes && (
          <canvas
            ref={canvas}
            role="img"
            aria-label={`Lines of ${facts.action_dims.length} action dimensions over ${countActions(facts)} action tokens`}
            style={{ height: `${facts.action_dims.length * ROW_PX}px` }}
          />
        )}
      </div>
    </section>
  );
}

/** What is shown. In a replay no action was executed: the frame's own was recorded, the policy's is predicted. */
function said(facts: Facts, query: number, isPredicted: boolean): string {
  const beside = isPredicted
    ? "the recorded action of this frame, and beside it the predicted one"
    : "the recorded action of this frame";
  if (facts.decodes) {
    const what = facts.replay ? beside : "the action executed at this frame";
    return `${what}; all decoded tokens together make the chunk`;
  }
  const line = `the line is action ${actionOfQuery(facts, query)}`;
  const parts = ["the chunk as the policy yielded it"];
  if (facts.replay) {
    parts.push(
      query < 0 ? "none of it stands for this frame" : `${line}, predicted for this frame`,
      `left: ${beside}`,
    );
  } else {
    parts.push(
      query < 0 ? "the action of this frame is no token of a chunk" : `${line}, executed at this frame`,
    );
  }
  if (facts.executed_queries) {
    parts.push(`shaded: ${facts.replay ? averagedInWords(facts) : "all that are executed"}`);
  }
  return parts.join("; ");
}

function draw(
  canvas: HTMLCanvasElement,
  rows: (number | null)[][],
  nDims: number,
  current: number | null,
  executed: [number, number] | undefined,
): void {
  const ratio = devicePixelRatio || 1;
  const width = canvas.clientWidth || 300;
  canvas.width = width * ratio;
  canvas.height = nDims * ROW_PX * ratio;
  const context = canvas.getContext("2d")!;
  context.scale(ratio, ratio);
  const colour = ink(canvas);
  const x = (query: number) => 2 + ((width - 4) * query) / Math.max(1, rows.length - 1);
  if (executed) {
    context.fillStyle = colour.shade;
    context.fillRect(x(executed[0]), 0, Math.max(2, x(executed[1] - 1) - x(executed[0])), nDims * ROW_PX);
  }
  for (let dim = 0; dim < nDims; dim++) {
    const values = rows.map((row) => row[dim] ?? NaN);
    const there = values.filter(Number.isFinite);
    const [low, high] = [Math.min(...there), Math.max(...there)];
    const y = (value: number) =>
      dim * ROW_PX +
      ROW_PX -
      4 -
      ((ROW_PX - 8) * (value - low)) / (high - low || 1) -
      (high === low ? ROW_PX / 2 - 4 : 0);
    context.strokeStyle = colour.line;
    context.beginPath();
    context.moveTo(0, (dim + 1) * ROW_PX - 0.5);
    context.lineTo(width, (dim + 1) * ROW_PX - 0.5);
    context.stroke();
    context.strokeStyle = colour.accent;
    context.lineWidth = 1.5;
    context.beginPath();
    values.forEach((value, query) => {
      if (!Number.isFinite(value)) return;
      if (query === 0) context.moveTo(x(query), y(value));
      else context.lineTo(x(query), y(value));
    });
    context.stroke();
    context.lineWidth = 1;
  }
  if (current === null) return;
  context.strokeStyle = colour.text;
  context.beginPath();
  context.moveTo(x(current), 0);
  context.lineTo(x(current), nDims * ROW_PX);
  context.stroke();
}
