/** Which keys there are, and what the words mean. */

import { useEffect, useRef } from "preact/hooks";

const KEYS: [string, string][] = [
  ["Space", "play and pause"],
  ["← →", "frame; with Shift ten frames"],
  ["Home End", "first and last frame"],
  ["↑ ↓", "layer"],
  ["[ ]", "denoise step"],
  ["h", "head; H backwards"],
  ["c", "camera"],
  ["o", "outlines of objects"],
  ["?", "this help"],
];

export function Help({ hasMasks, onClose }: { hasMasks: boolean; onClose: () => void }) {
  const dialog = useRef<HTMLDialogElement>(null);
  useEffect(() => dialog.current!.showModal(), []);
  return (
    <dialog ref={dialog} onClose={onClose} aria-labelledby="help-title">
      <h2 id="help-title">Keys and words</h2>
      <dl class="keys">
        {KEYS.filter(([key]) => hasMasks || key !== "o").map(([key, meaning]) => (
          <div key={key}>
            <dt>
              <kbd>{key}</kbd>
            </dt>
            <dd>{meaning}</dd>
          </div>
        ))}
      </dl>
      <p>
        A map says to which tokens the policy's action tokens attend, in one layer and head, at one denoise
        step: shares that add up to 1 over all tokens, of which a camera's patches are a part. An{" "}
        <b>inference</b> yields a chunk of actions, of which the first few are executed, a frame each; until
        the next inference the maps stay the same.
      </p>
      {hasMasks && (
        <p>
          Objects are outlined where they were when the policy was asked. <b>Chance</b> is the share of the
          camera's area that they take: what a map would give them that is the same everywhere.
        </p>
      )}
      <p>
        Attention tells where information may flow, not what the policy does with it. A bright patch is a
        question to check, not an answer.
      </p>
      <form method="dialog">
        <button type="submit">Close</button>
      </form>
    </dialog>
  );
}
