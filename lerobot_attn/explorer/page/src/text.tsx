/** Attention on the prompt: the sentence, its words and the numbers of the state; and shares of everything. */

import type { Tokens } from "./api";
import { percent, shareOf, sumByGroup } from "./heat";
import { headInWords } from "./labels";
import { modalitiesOf, modalityColour, modalityLabel, modalityOfKey, takesInstruction } from "./layout";
import type { EpisodeModel } from "./model";

/** Whether tokens are the prompt's frame rather than what it says. */
const isRest = (kind: string) => kind === "template" || kind === "special";

interface Run {
  group: number;
  text: string;
}

/** The prompt's tokens, joined where they belong to one word, number or run of the template. */
function runs(tokens: Tokens): Run[] {
  const found: Run[] = [];
  tokens.key.forEach((key, slot) => {
    const group = tokens.group_of_key[key] ?? -1;
    if (group < 0) return;
    const last = found.at(-1);
    if (last?.group === group) last.text += tokens.text[slot] ?? "";
    else found.push({ group, text: tokens.text[slot] ?? "" });
  });
  return found;
}

export function Sentence({ model }: { model: EpisodeModel }) {
  const [tokens, attention, facts] = [model.tokens.value, model.attention.value, model.facts.value];
  if (!tokens || !attention || !facts) return null;
  const { groups, group_of_key } = tokens;
  if (!groups.length) {
    const what = takesInstruction(facts) ? "got no language tokens" : "takes no instruction";
    return <p class="note">This policy {what}.</p>;
  }
  const shares = sumByGroup(attention, group_of_key, groups.length);
  const most = Math.max(...groups.map((group, i) => (isRest(group.kind) ? 0 : shares[i]! || 0)));
  const hasPrefix = facts.prefix_layers.length > 0;
  const word = model.word.value;
  return (
    <section class="panel" aria-labelledby="words-title" id="words">
      <h2 id="words-title">
        Words and state <small>what the policy was told, shaded by attention</small>
      </h2>
      {tokens.prompt_truncated && (
        <p class="note">The prompt was cut because it did not fit: its end is not among the tokens.</p>
      )}
      {!takesInstruction(facts) ? (
        <p class="note">This policy takes no instruction.</p>
      ) : (
        !facts.task.trim() && <p class="note">The instruction is empty.</p>
      )}
      <p class="sentence" dir="auto">
        {runs(tokens).map(({ group, text }, i) => {
          const { kind, label } = groups[group]!;
          const share = shares[group]!;
          const style = { "--shade": isRest(kind) ? 0 : Math.sqrt(share / (most || 1)) || 0 };
          const title = `${label}: ${shareOf(attention, share)} of all attention`;
          if (!hasPrefix || isRest(kind)) {
            return (
              <span key={i} class={`token ${kind}`} style={style} title={title}>
                {text}
              </span>
            );
          }
          const show = () => void model.showWord(group);
          const hide = () => void model.showWord(null);
          return (
            <button
              key={i}
              type="button"
              class={`token ${kind}`}
              style={style}
              title={`${title}. Hover or focus: what it looks at in the images`}
              aria-pressed={word?.group === group}
              onMouseEnter={show}
              onFocus={show}
              onMouseLeave={hide}
              onBlur={hide}
            >
              {text}
            </button>
          );
        })}
      </p>
      {word && (
        <p class="note" role="status">
          The cameras show what “{groups[word.group]?.label}” looks at in the prefix, layer {word.layer},{" "}
          {headInWords(word.head, facts)}.
        </p>
      )}
      <div class="bar-columns">
        <GroupBars
          title="Words"
          model={model}
          kinds={["task", "text"]}
          attention={attention}
          shares={shares}
        />
        <GroupBars title="State" model={model} kinds={["state"]} attention={attention} shares={shares} />
        <GroupBars
          title="Rest of the prompt"
          model={model}
          kinds={["template", "special"]}
          attention={attention}
          shares={shares}
        />
      </div>
    </section>
  );
}

function GroupBars(props: {
  title: string;
  model: EpisodeModel;
  kinds: string[];
  attention: Float32Array;
  shares: Float32Array;
}) {
  const { title, model, kinds, attention, shares } = props;
  const shown = model.shown.value;
  const facts = model.facts.value;
  if (!shown || !facts) return null;
  const chosen = shown.tokens.groups.flatMap((group, i) =>
    kinds.includes(group.kind) ? [{ ...group, share: shares[i]! }] : [],
  );
  if (!chosen.length) return null;
  const values = model.timeline.value?.state?.[shown.frame];
  return (
    <div>
      <h3>{title}</h3>
      <Bars
        rows={chosen.map((group) => ({
          label: group.label,
          share: group.share,
          said: shareOf(attention, group.share),
          colour: modalityColour(facts, group.kind),
          note: group.kind === "state" ? value(values?.[group.ordinal]) : "",
        }))}
      />
    </div>
  );
}

function value(number: number | null | undefined): string {
  return number === null || number === undefined ? "" : number.toFixed(2);
}

interface BarRow {
  label: string;
  share: number;
  /** The share in words, where they are others than per cent. */
  said?: string;
  colour: string;
  note?: string;
}

/** Bars of shares, relative to the largest of them. */
export function Bars({ rows, wide = false }: { rows: BarRow[]; wide?: boolean }) {
  const most = Math.max(...rows.map((row) => row.share || 0), 1e-9);
  return (
    <ul class={wide ? "bars wide" : "bars"}>
      {rows.map((row, i) => (
        <li key={i}>
          <span class="bar-label" title={row.label} dir="auto">
            {row.label}
          </span>
          <span class="bar-track">
            <span
              class="bar"
              style={{ width: `${(100 * row.share) / most || 0}%`, background: row.colour }}
            />
          </span>
          <span class="bar-value">{row.said ?? percent(row.share)}</span>
          {row.note && <span class="bar-note">{row.note}</span>}
        </li>
      ))}
    </ul>
  );
}

/** Where all of the chosen map's attention goes: one stacked bar, and its legend. */
export function ShareBar({ model }: { model: EpisodeModel }) {
  const [tokens, attention, facts] = [model.tokens.value, model.attention.value, model.facts.value];
  if (!tokens || !attention || !facts) return null;
  const names = modalitiesOf(facts, tokens.key_kind);
  const shares = sumByGroup(attention, modalityOfKey(facts, tokens.key_kind, names), names.length);
  const rows = names
    .map((name, i) => ({ name, share: shares[i]!, colour: modalityColour(facts, name) }))
    .filter((row) => row.name !== "padding" || row.share > 0);
  return (
    <section class="panel" aria-labelledby="shares-title" id="shares">
      <h2 id="shares-title">
        Where it goes <small>shares of all attention at this frame</small>
      </h2>
      <div class="stacked" aria-hidden="true">
        {rows.map((row) => (
          <span key={row.name} style={{ flexGrow: row.share || 0, background: row.colour }} />
        ))}
      </div>
      <ul class="legend">
        {rows.map((row) => (
          <li key={row.name}>
            <span class="swatch" style={{ background: row.colour }} />
            {modalityLabel(facts, row.name)} <strong>{shareOf(attention, row.share)}</strong>
          </li>
        ))}
      </ul>
    </section>
  );
}
