/** A walk through the explorer on whatever episode is loaded: what to look at, and what to check. */

import { batch, useSignal } from "@preact/signals";
import { useEffect, useRef } from "preact/hooks";
import type { Facts } from "./api";
import { averagedInWords } from "./labels";
import type { EpisodeModel } from "./model";
import { HIDDEN } from "./neurons";
import * as state from "./state";

interface Stop {
  title: string;
  text: (facts: Facts) => string;
  /** Element that is meant; it is scrolled into view and marked. */
  at: string;
  /** Move the controls to the right place. */
  show: (model: EpisodeModel, facts: Facts) => void;
}

const part = (facts: Facts, share: number) => Math.round(Math.max(0, facts.n_frames - 1) * share);
const labels = (model: EpisodeModel) => model.views.value.map(({ camera }) => camera.label);
const isWrist = (label: string) => /wrist|hand|image2|gripper/i.test(label);

/** The state's part in the input, which is digits in the prompt, a token of its own, or nothing. */
function stateInWords({ segments, state_dims }: Facts): string {
  if (segments.some((segment) => segment.kind === "state")) return ", a token for the robot's state";
  return state_dims.length ? ", the robot's state written as digits" : "";
}

function overview(facts: Facts): void {
  batch(() => {
    state.frame.value = part(facts, 0.25);
    state.layer.value = facts.shown_layer ?? facts.mean_layers.at(-1) ?? state.UNCHOSEN;
    state.step.value = facts.denoise_steps.at(-1) ?? -1;
    state.head.value = "mean";
    state.query.value = "executed";
    state.normalisation.value = "image";
    state.patch.value = "";
    state.camera.value = "";
  });
}

const STOPS: Stop[] = [
  {
    title: "What you see",
    at: "cameras",
    text: (facts) =>
      `Left of each pair is what the camera showed the policy at this frame, with a heatmap over it; right is the map alone. One square is one patch of the image, the smallest thing the policy can attend to. Bright patches got more of the action tokens' attention in layer ${facts.mean_layers.at(-1)}. Move through the frames with the arrow keys: the picture changes each frame, the map only when the policy is asked again.`,
    show: (_, facts) => overview(facts),
  },
  {
    title: "What the policy was given",
    at: "shares",
    text: (facts) =>
      `Its input is a row of ${facts.n_keys} tokens: patches of ${facts.cameras.filter((camera) => camera.geometry).length} cameras, the words of the task${stateInWords(facts)}, fixed words around them, and the ${facts.n_queries} action tokens themselves. The bar shows how one map divides its attention among them. Check: how much is left for the images at all? A bright patch may be the largest share of very little.`,
    show: (_, facts) => {
      overview(facts);
      state.normalisation.value = "share";
    },
  },
  {
    title: "From actions to images",
    at: "cameras",
    text: (facts) =>
      `The map is the mean of ${averagedInWords(facts)}. “Colours show” decides the unit: the share of all attention tells how much, the share within the image tells where. Switch between them and see whether the place still looks important when it is measured against everything else.`,
    show: (_, facts) => overview(facts),
  },
  {
    title: "Heads divide the labour, perhaps",
    at: "heads",
    text: (facts) =>
      `Each small map is one head of one layer, numbered at the edges. Click one to see it large. Look for heads that follow an object, heads that stay on one patch whatever happens, and heads that spread evenly. Then move to another frame: does a head still do what you thought? Here is layer ${facts.mean_layers.at(-1)}, head ${facts.heads[0]}.`,
    show: (_, facts) => {
      overview(facts);
      batch(() => {
        state.head.value = facts.heads[0] ?? "mean";
        state.normalisation.value = "frame";
      });
    },
  },
  {
    title: "Phases of the task",
    at: "timeline",
    text: () =>
      "The timeline shows the shares over the whole episode, and on how many tokens the attention is worth spreading. Thin lines mark when the policy was asked. Drag through it. Do the shares change when the gripper closes, or when something goes wrong? Note the frame, and compare it with the video before you believe it.",
    show: (_, facts) => {
      overview(facts);
      state.frame.value = part(facts, 0.6);
    },
  },
  {
    title: "The camera on the arm",
    at: "cameras",
    text: () =>
      "If there is a second camera, it is often on the wrist. Compare its share with the first camera's, early and late in the episode. One might expect it to matter more while something is being grasped: check whether it does here.",
    show: (model, facts) => {
      overview(facts);
      batch(() => {
        state.camera.value = labels(model).find(isWrist) ?? labels(model).at(1) ?? "";
        state.normalisation.value = "share";
        state.frame.value = part(facts, 0.5);
      });
    },
  },
  {
    title: "From noise to action",
    at: "steps",
    text: (facts) =>
      `A chunk of actions begins as noise and is refined in ${facts.denoise_steps.length} recorded steps; t is the part that is still noise. The strip shows the same layer and head at each of them. Step through with the bracket keys. Does the attention settle early, move, or stay the same throughout?`,
    show: (_, facts) => {
      overview(facts);
      state.step.value = facts.denoise_steps[0] ?? -1;
    },
  },
  {
    title: "Words",
    at: "words",
    text: () =>
      "Here is the prompt as the policy got it, each word shaded by its share. Do the words that name the object get more than the others? Do the fixed words, or the beginning of the sequence, take most of it? Tokens that take attention whatever the input are known as sinks.",
    show: (_, facts) => {
      overview(facts);
      state.layer.value = facts.mean_layers[Math.floor(facts.mean_layers.length / 2)] ?? -1;
    },
  },
  {
    title: "State and the arm",
    at: "words",
    text: (facts) =>
      `The robot's state is part of the prompt${facts.state_dims.length ? ` (${facts.state_dims.slice(0, 3).join(", ")} …)` : ""}: its bars stand beside the words, with the value at this frame. Below are the actions that came of it. Move to a frame where the hand comes down, or the fingers close: does the attention on a state dimension move with its value, or with nothing that you can see?`,
    show: (_, facts) => {
      overview(facts);
      state.frame.value = part(facts, 0.75);
    },
  },
  {
    title: "What attention can tell, and what not",
    at: "patch",
    text: (facts) =>
      (facts.prefix_layers.length
        ? "Hover a word to see what it looks at in the images, in the prefix. "
        : facts.excerpt
          ? ""
          : "Were the prefix recorded (prefix_layers), hovering a word would show what it looks at in the images. ") +
      "Click a patch to ask which layers, heads and action tokens look at it. And keep in mind: attention shows where information may flow, not what is done with it. A patch can be looked at and ignored, or matter through another token. Take what you saw as questions, and test them: change the scene, hide the object, compare episodes that went well with ones that did not.",
    show: (model, facts) => {
      overview(facts);
      const view = model.camera.value;
      if (view) {
        const { grid_rows, grid_columns } = view.geometry;
        state.patch.value = `${view.camera.label}:${Math.floor(grid_rows / 2)}:${Math.floor(grid_columns / 2)}`;
      }
    },
  },
];

const NEURONS: Stop = {
  title: "Neurons over the episode",
  at: "neurons",
  text: (facts) =>
    `Attention says what is looked at; neurons of the feed-forward layers say what is made of it. The line is the mean activation of the chosen neurons at each inference${facts.neurons?.sets.length ? ` (${facts.neurons.sets[0]!.name})` : ""}, beside a number of the robot's state. The dashed line is what as many neurons of the same layers, drawn at random, have on average: a set that rises with it has found nothing. And two lines that rise together may both follow the phase of the task: only firing the neurons tells whether they move the arm.`,
  show: (_, facts) => {
    overview(facts);
    if (state.neurons.value === HIDDEN) state.neurons.value = "";
  },
};

/** What there is to be seen in an episode: neurons come after the timeline that they are in. */
export function stopsOf(facts: Pick<Facts, "neurons">): Stop[] {
  if (!facts.neurons) return STOPS;
  const place = STOPS.findIndex(({ at }) => at === "timeline") + 1;
  return [...STOPS.slice(0, place), NEURONS, ...STOPS.slice(place)];
}

export function Tour({ model }: { model: EpisodeModel }) {
  const card = useRef<HTMLDivElement>(null);
  const isLeft = useSignal(false);
  const facts = model.facts.value;
  const stops = facts ? stopsOf(facts) : STOPS;
  const number = Math.min(state.tour.value, stops.length);
  const stop = stops[number - 1]!;
  // Only then all that the stops speak of is on the page.
  const isReady = model.shown.value !== null;
  useEffect(() => {
    if (!facts || !isReady) return;
    stop.show(model, facts);
    const element = document.getElementById(stop.at) ?? document.querySelector(`.${stop.at}`);
    const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
    element?.scrollIntoView({ block: "center", behavior: calm ? "auto" : "smooth" });
    element?.classList.add("toured");
    // The card must not lie on what it speaks of.
    const box = element?.getBoundingClientRect();
    isLeft.value = box !== undefined && box.left > innerWidth / 3;
    card.current?.focus({ preventScroll: true });
    return () => element?.classList.remove("toured");
  }, [number, facts?.version, isReady]);
  if (!facts) return null;
  const go = (to: number) => (state.tour.value = to > stops.length ? 0 : Math.max(0, to));
  return (
    <div
      class={`tour ${isLeft.value ? "left" : ""}`}
      role="dialog"
      aria-labelledby="tour-title"
      aria-describedby="tour-text"
      tabIndex={-1}
      ref={card}
      onKeyDown={(event) => {
        if (event.key === "Escape") go(0);
      }}
    >
      <h2 id="tour-title">
        {stop.title}{" "}
        <small>
          {number} of {stops.length}
        </small>
      </h2>
      {facts.random_weights && number === 1 && (
        <p class="warning">
          This policy's weights are random: the tour shows how to read, but there is nothing to be found here.
        </p>
      )}
      <p id="tour-text">{stop.text(facts)}</p>
      <p class="tour-buttons">
        <button type="button" onClick={() => go(number - 1)} disabled={number === 1}>
          Back
        </button>
        <button type="button" onClick={() => go(number + 1)}>
          {number === stops.length ? "Done" : "Next"}
        </button>
        <button type="button" onClick={() => go(0)}>
          End the tour
        </button>
      </p>
    </div>
  );
}
