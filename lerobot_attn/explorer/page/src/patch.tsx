/** Who looks at a patch: layers and heads, from the means, and action tokens, where full maps were recorded. */

import { useSignal, useSignalEffect } from "@preact/signals";
import { splitPatch } from "./camera";
import { columnOf, percent } from "./heat";
import type { EpisodeModel } from "./model";
import * as state from "./state";
import { Bars } from "./text";

const SHOWN = 6;

interface Looker {
  label: string;
  share: number;
}

function most(lookers: Looker[]): Looker[] {
  return lookers.sort((a, b) => b.share - a.share).slice(0, SHOWN);
}

export function PatchPanel({ model }: { model: EpisodeModel }) {
  const tokens = useSignal<{ layer: number; rows: Looker[] } | null>(null);
  const [facts, shown] = [model.facts.value, model.shown.value];
  const [label, row, column] = splitPatch(state.patch.value);
  const view = model.views.value.find(({ camera }) => camera.label === label);

  useSignalEffect(() => {
    const [facts, shown] = [model.facts.value, model.shown.value];
    const [label, row, column] = splitPatch(state.patch.value);
    const view = model.views.value.find(({ camera }) => camera.label === label);
    const [head, layer] = [model.headIndex.value, model.layer.value];
    tokens.value = null;
    if (!facts || !shown || !view || !facts.layers.length) return;
    const key = view.segment.start + row * view.geometry.grid_columns + column;
    const timer = setTimeout(() => {
      void model.fullMap().then((map) => {
        if (!map || model.shown.value !== shown || model.layer.value !== layer) return;
        const values = [...columnOf(map.slab, key, head)].slice(...facts.action_queries);
        const what = facts.decodes ? "token" : "action"; // the heading says which tokens
        const named = values.map((share, action) => ({ label: `${what} ${action}`, share }));
        // Tokens that were not read look at nothing.
        const rows = most(facts.decodes ? named.filter(({ share }) => !Number.isNaN(share)) : named);
        tokens.value = { layer: map.layer, rows };
      });
    }, 60);
    return () => clearTimeout(timer);
  });

  if (!facts || !shown) return null;
  if (!view) {
    return (
      <section class="panel" id="patch" aria-labelledby="patch-title">
        <h2 id="patch-title">Who looks at a patch?</h2>
        <p class="note">
          Click a patch in a picture, or{" "}
          <button
            type="button"
            onClick={() => (state.patch.value = `${model.camera.value?.camera.label ?? ""}:0:0`)}
          >
            choose one by number
          </button>
        </p>
      </section>
    );
  }
  const { grid_rows, grid_columns } = view.geometry;
  const set = (row: number, column: number) => (state.patch.value = `${label}:${row}:${column}`);
  const isThere = row < grid_rows && column < grid_columns;
  const key = view.segment.start + row * grid_columns + column;
  const [, nHeads, nKeys] = shown.means.shape as [number, number, number];
  const heads = facts.mean_layers.flatMap((layer, l) =>
    facts.heads.map((head, h) => ({
      label: `layer ${layer}, head ${head}`,
      share: shown.means.values[(l * nHeads + h) * nKeys + key]!,
    })),
  );
  const share = model.attention.value?.[key];
  const colour = "var(--accent)";
  return (
    <section class="panel" id="patch" data-asked aria-labelledby="patch-title">
      <h2 id="patch-title">
        Who looks at this patch? <small>{isThere && `${percent(share)} of the chosen map`}</small>
      </h2>
      <p class="patch-place">
        <span>{label}</span>
        <label>
          row{" "}
          <input
            type="number"
            min="0"
            max={grid_rows - 1}
            value={row}
            onInput={(event) => set(bounded(event.currentTarget.value, grid_rows), column)}
          />
        </label>
        <label>
          column{" "}
          <input
            type="number"
            min="0"
            max={grid_columns - 1}
            value={column}
            onInput={(event) => set(row, bounded(event.currentTarget.value, grid_columns))}
          />
        </label>
        <button type="button" onClick={() => (state.patch.value = "")}>
          Close
        </button>
      </p>
      {!isThere && (
        <p class="note">
          This camera has {grid_rows} rows and {grid_columns} columns of patches.
        </p>
      )}
      {isThere && (
        <div class="bar-columns">
          <div>
            <h3>Layers and heads that give it most</h3>
            <Bars wide rows={most(heads).map((found) => ({ ...found, colour }))} />
          </div>
          {tokens.value && (
            <div>
              <h3>
                {facts.decodes ? "Decoded" : "Action"} tokens, in layer {tokens.value.layer}
              </h3>
              <Bars rows={tokens.value.rows.map((found) => ({ ...found, colour }))} />
            </div>
          )}
          {!facts.layers.length && <p class="note">Without full maps, action tokens cannot be told apart.</p>}
        </div>
      )}
    </section>
  );
}

function bounded(text: string, length: number): number {
  return Math.min(Math.max(Math.trunc(Number(text)) || 0, 0), length - 1);
}
