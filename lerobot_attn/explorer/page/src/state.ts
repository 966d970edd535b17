/** What a person has chosen to look at. All of it is in the address, so that a link shows the same. */

import { batch, computed, effect, signal, type Signal } from "@preact/signals";
import { OUTCOMES, type Choice, type HeadChoice, type Outcome, type Wanted } from "./api";
import { COLOUR_MAPS, type ColourMap } from "./colormaps";
import { NORMALISATIONS, type Normalisation } from "./heat";

/** "executed": the mean over the executed actions; "frame": the action executed at the frame; or its number. */
export type Query = "executed" | "frame" | number;
export type Toggle = "on" | "off";
export type Lock = "frame" | "phase";
export type Filter = "all" | Outcome;

/** Of the run's table, by which it can be sorted. */
export const COLUMNS = ["path", "task", "condition", "outcome", "frames", "inferences", "size"] as const;
export type Column = (typeof COLUMNS)[number];

interface Field<T> {
  name: string;
  initial: T;
  value: Signal<T>;
  parse: (text: string) => T | undefined;
}

const fields: Field<never>[] = [];

function field<T>(name: string, initial: T, parse: (text: string) => T | undefined): Signal<T> {
  const value = signal(initial);
  fields.push({ name, initial, value, parse } as unknown as Field<never>);
  return value;
}

const whole = (text: string) => (/^-?\d{1,9}$/.test(text) ? Number(text) : undefined);
const oneOf =
  <T extends string>(...words: readonly T[]) =>
  (text: string) =>
    words.find((word) => word === text);
const either =
  <T>(...parsers: ((text: string) => T | undefined)[]) =>
  (text: string) =>
    parsers.map((parse) => parse(text)).find((value) => value !== undefined);
const text = (value: string) => value.slice(0, 300);

export const episode = field("episode", "", text);
export const frame = field("frame", 0, (value) => {
  const number = whole(value);
  return number === undefined ? undefined : Math.max(0, number);
});
/** Labels; -1 is the last that was recorded, of layers the one that the policy is to be shown by, if it names one. */
export const UNCHOSEN = -1;
export const layer = field<Choice>("layer", UNCHOSEN, either<Choice>(whole, oneOf("mean")));
export const step = field("step", -1, whole);
export const head = field<HeadChoice>("head", "mean", either<HeadChoice>(whole, oneOf("mean", "max")));
export const query = field<Query>("query", "executed", either<Query>(whole, oneOf("executed", "frame")));
/** Short name of a camera; none is the first. */
export const camera = field("camera", "", text);
export const normalisation = field<Normalisation>("norm", "share", oneOf(...NORMALISATIONS));
export const colours = field<ColourMap>("colours", "inferno", oneOf(...COLOUR_MAPS));
export const opacity = field("opacity", 0.7, (value) => {
  const number = Number(value);
  return number >= 0 && number <= 1 ? number : undefined;
});
/** Whether objects are outlined, in recordings that have masks of them. */
export const outlines = field<Toggle>("outlines", "on", oneOf("on", "off"));
/** Set of neurons, as `Offer` has it; none is the first. "off" hides them. */
export const neurons = field("neurons", "", text);
/** Group of tokens at which they are looked at. */
export const tokens = field("tokens", "", text);
/** Over the group's tokens. */
export const reduction = field("reduction", "mean", text);
/** Whether each neuron of the set has a line. */
export const units = field<Toggle>("units", "off", oneOf("on", "off"));
/** Dimension of the state beside them; none is the hand's height. */
export const beside = field("beside", "", text);
/** camera:row:column of the patch that was asked about. */
export const patch = field("patch", "", (value) => (/^.+:\d+:\d+$/.test(value) ? value : undefined));
/** A second episode beside the first. */
export const compared = field("compare", "", text);
export const lock = field<Lock>("lock", "frame", oneOf("frame", "phase"));
/** Step of the tour from 1; 0 is none. */
export const tour = field("tour", 0, (value) => {
  const number = whole(value);
  return number === undefined ? undefined : Math.max(0, number);
});
/** On the run's page. */
export const filter = field<Filter>("show", "all", oneOf("all", ...OUTCOMES));
export const search = field("find", "", text);
/** An instruction; none is any. */
export const task = field("task", "", (value) => value.slice(0, 2000));
/** Name of a condition; none is any. */
export const condition = field("condition", "", text);
/** A column of the table, with "-" before it from the largest down. */
export const sort = field("sort", "path", (value) =>
  COLUMNS.some((column) => column === value.replace(/^-/, "")) ? value : undefined,
);
/** Of the table, from 1. */
export const page = field("page", 1, (value) => {
  const number = whole(value);
  return number === undefined ? undefined : Math.max(1, number);
});

/** Rows on a page of the run's table. */
export const PAGE_ROWS = 50;
/** Which rows of the run's table are chosen. */
export const wanted = computed((): Wanted => ({
  find: search.value || undefined,
  outcome: filter.value === "all" ? undefined : filter.value,
  task: task.value || undefined,
  condition: condition.value || undefined,
  sort: sort.value === "path" ? undefined : sort.value,
  offset: (page.value - 1) * PAGE_ROWS,
  limit: PAGE_ROWS,
}));

/** Take everything from the address; what it does not say, or says wrongly, has its initial value. */
export function readAddress(address: string = location.search): void {
  const said = new URLSearchParams(address);
  batch(() => {
    for (const { name, initial, value, parse } of fields) {
      const found = said.get(name);
      value.value = (found === null ? undefined : parse(found)) ?? initial;
    }
  });
}

/** The part of an address that says all of it. */
export function address(): string {
  const said = new URLSearchParams();
  for (const { name, initial, value } of fields) {
    if (value.value !== initial) said.set(name, String(value.value));
  }
  const found = said.toString().replaceAll("%3A", ":");
  return found ? `?${found}` : "";
}

const SETTLE_MS = 150; // browsers refuse hundreds of changes of the address a second

/** Keep the address in step with the choices, and the choices with the browser's back and forward. */
export function followAddress(): void {
  readAddress();
  addEventListener("popstate", () => readAddress());
  let timer: ReturnType<typeof setTimeout> | undefined;
  effect(() => {
    const wanted = address();
    clearTimeout(timer);
    timer = setTimeout(() => {
      if (wanted === location.search) return;
      try {
        history.replaceState(null, "", wanted || location.pathname);
      } catch {
        // Some browsers do not let an exported page, a file, change its address.
      }
    }, SETTLE_MS);
  });
}

/** Go to another page, which the browser's back button returns from. */
export function navigate(change: () => void): void {
  history.pushState(null, "", address() || location.pathname);
  batch(change);
}
