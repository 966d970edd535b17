/** An episode inside the page itself, as `lerobot-attn export-html` writes it: nothing is asked of a network. */

import {
  ApiError,
  OUTCOMES,
  type ActionChunk,
  type Activations,
  type AllRanges,
  type EpisodeRow,
  type Facts,
  type Masks,
  type Ranges,
  type RoleShares,
  type Run,
  type Shares,
  type Slab,
  type Timeline,
  type Tokens,
} from "./api";
import { decodeFloat16 } from "./float16";
import { CLIP, effectiveNumber, percentile, pick, sumByGroup } from "./heat";
import { outcome } from "./labels";
import { blindOf, cameraViews, modalitiesOf, modalityOfKey } from "./layout";
import type { Ask } from "./neurons";
import { isKnown, lyingOn, ofRole, rolesOf, type Lying } from "./scene";
import { pictureCache, type EpisodeId, type Source, type Video, type Where } from "./source";

export interface Embedded {
  row: EpisodeRow;
  facts: Facts;
  /** Of all frames of the episode, whichever can be shown. */
  timeline: Timeline;
  /** Numbers of the inferences that are in the file, ascending; what follows is in their order. */
  inferences: number[];
  tokens: Tokens[];
  actions: ActionChunk[];
  /** None of a recording without. */
  masks?: Masks[];
  /** Of every set, group, reduction and step of the facts; none of a recording without. */
  neurons?: Activations[];
  /** float16 (inference, denoise step, layer, head, key), gzip, base64 */
  means: { shape: [number, number, number, number, number]; data: string };
  /** Full name of a camera → frame → JPEG, base64. */
  pictures: Record<string, Record<string, string>>;
}

const ELEMENT = "lerobot-attn-episode";

/** The episode in this page, if there is one. */
export function embedded(): Embedded | null {
  const element = document.getElementById(ELEMENT);
  return element?.textContent ? (JSON.parse(element.textContent) as Embedded) : null;
}

function decodeBase64(text: string): Uint8Array<ArrayBuffer> {
  const characters = atob(text);
  const found = new Uint8Array(characters.length);
  for (let i = 0; i < characters.length; i++) found[i] = characters.charCodeAt(i);
  return found;
}

async function unzip(zipped: Uint8Array<ArrayBuffer>): Promise<ArrayBuffer> {
  const stream = new Blob([zipped]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).arrayBuffer();
}

export class FileSource implements Source {
  readonly live = false;
  private values: Promise<Float32Array> | null = null;
  private readonly decoded = pictureCache();

  constructor(private readonly data: Embedded) {}

  /** A file holds one episode, whatever is asked for. */
  run = async (): Promise<Run> => {
    const { row } = this.data;
    const outcomes = Object.fromEntries(OUTCOMES.map((name) => [name, Number(name === outcome(row))]));
    return {
      name: row.task,
      is_episode: true,
      episodes: [row],
      offset: 0,
      n_found: 1,
      n_episodes: 1,
      outcomes: outcomes as Run["outcomes"],
      tasks: [{ name: row.task, n: 1 }],
      conditions: [{ name: row.condition_name, n: 1 }],
      is_changed: row.condition !== "",
      random_weights: row.random_weights,
      policy_remarks: row.policy_remark ? [row.policy_remark] : [],
      damaged: [],
      n_damaged: 0,
      n_unread: 0,
    };
  };
  groups = () => Promise.reject(notHere("other episodes"));
  facts = async (_id: string) => this.data.facts;
  timeline = async (_: EpisodeId) => this.data.timeline;
  tokens = async (_: EpisodeId, inference: number) => this.data.tokens[this.place(inference)]!;
  actions = async (_: EpisodeId, inference: number) => this.data.actions[this.place(inference)]!;
  masks = async (_: EpisodeId, inference: number) => {
    const found = this.data.masks?.[this.place(inference)];
    if (!found) throw notHere("masks");
    return found;
  };
  map = () => Promise.reject(notHere("full maps"));
  prefix = () => Promise.reject(notHere("the prefix"));

  async means(_: EpisodeId, inference: number, step: number): Promise<Slab> {
    this.values ??= unzip(decodeBase64(this.data.means.data)).then(decodeFloat16);
    const values = await this.values;
    const [, nSteps, ...shape] = this.data.means.shape;
    const size = shape.reduce((product, length) => product * length, 1);
    const start = (this.place(inference) * nSteps + this.data.facts.denoise_steps.indexOf(step)) * size;
    return { shape, values: values.subarray(start, start + size) };
  }

  async shares(episode: EpisodeId, first: number, where: Where): Promise<Shares> {
    const { facts, tokens, inferences } = this.data;
    const names = modalitiesOf(
      facts,
      tokens.flatMap((found) => found.key_kind),
    );
    const found: Shares = { first, modalities: names, share: [], effective_tokens: [] };
    for (let inference = first; inference < facts.n_inferences; inference++) {
      const place = inferences.indexOf(inference);
      if (place < 0) {
        found.share.push(names.map(() => null));
        found.effective_tokens.push(null);
        continue;
      }
      const attention = await this.attention(episode, inference, where);
      const modality = modalityOfKey(facts, tokens[place]!.key_kind, names);
      const shares = [...sumByGroup(attention, modality, names.length)];
      found.share.push(shares.map((share) => (Number.isNaN(share) ? null : share)));
      found.effective_tokens.push(effectiveNumber(attention));
    }
    return found;
  }

  async roles(episode: EpisodeId, first: number, where: Where, camera: string): Promise<RoleShares> {
    const { facts, masks, inferences } = this.data;
    const view = cameraViews(facts).find((view) => view.camera.name === camera);
    if (!facts.scene || !masks || !view) throw notHere("masks");
    const roles = rolesOf(facts.scene);
    const found: RoleShares = { first, camera, roles, share: [], chance: [] };
    for (let inference = first; inference < facts.n_inferences; inference++) {
      const mask = masks[inferences.indexOf(inference)]?.cameras[camera];
      if (!mask || !isKnown(mask)) {
        found.share.push(roles.map(() => null));
        found.chance.push(roles.map(() => null));
        continue;
      }
      const attention = await this.attention(episode, inference, where);
      const values = attention.subarray(view.segment.start, view.segment.stop);
      const lying = roles.map((role) => lyingOn(values, mask, ofRole(facts.scene!.instances, role)));
      const seen = (value: number, { chance }: Lying) => (chance > 0 && !Number.isNaN(value) ? value : null);
      found.share.push(lying.map((one) => seen(one.share, one)));
      found.chance.push(lying.map((one) => seen(one.chance, one)));
    }
    return found;
  }

  async neurons(_: EpisodeId, first: number, asked: Ask, each: boolean): Promise<Activations> {
    const found = this.data.neurons?.find(
      (one) =>
        one.stream === asked.stream &&
        one.group === asked.group &&
        one.reduction === asked.reduction &&
        (one.denoise_step === null || one.denoise_step === asked.step) &&
        String(one.units) === String(asked.units),
    );
    if (!found) throw notHere("these neurons");
    return {
      ...found,
      first,
      mean: found.mean.slice(first),
      expected: found.expected.slice(first),
      each: each && found.each ? found.each.slice(first) : null,
    };
  }

  async ranges(episode: EpisodeId, step: number): Promise<Ranges> {
    const { facts, inferences } = this.data;
    const found: Ranges = {
      layers: [...facts.mean_layers, "mean"],
      heads: [...facts.heads, "mean", "max"],
      ranges: Object.fromEntries(cameraViews(facts).map(({ camera }) => [camera.name, []])),
    };
    const slabs = await Promise.all(inferences.map((inference) => this.means(episode, inference, step)));
    for (const layer of found.layers) {
      const rows = new Map(cameraViews(facts).map(({ camera }) => [camera.name, [] as number[]]));
      for (const head of found.heads) {
        const l = typeof layer === "number" ? facts.mean_layers.indexOf(layer) : layer;
        const h = typeof head === "number" ? facts.heads.indexOf(head) : head;
        const maps = slabs.map((slab) => pick(slab, l, h, blindOf(facts)));
        for (const { camera, segment } of cameraViews(facts)) {
          const patches = maps.map((map) => map.subarray(segment.start, segment.stop));
          rows.get(camera.name)!.push(percentile(patches, CLIP));
        }
      }
      for (const [name, row] of rows) found.ranges[name]!.push(row);
    }
    return found;
  }

  async allRanges(episode: EpisodeId): Promise<AllRanges> {
    const { denoise_steps } = this.data.facts;
    const found = await Promise.all(denoise_steps.map((step) => this.ranges(episode, step)));
    const { layers, heads, ranges } = found[0]!;
    const names = Object.keys(ranges);
    return {
      denoise_steps,
      layers,
      heads,
      ranges: Object.fromEntries(names.map((name) => [name, found.map((step) => step.ranges[name]!)])),
    };
  }

  picture(_: EpisodeId, { name }: Video, frame: number): Promise<ImageBitmap> {
    const picture = this.data.pictures[name]?.[frame];
    if (!picture) return Promise.reject(notHere(`frame ${frame}`));
    return this.decoded.get(`${name} ${frame}`, () =>
      createImageBitmap(new Blob([decodeBase64(picture)], { type: "image/jpeg" })),
    );
  }

  pictureUrl = (_: EpisodeId, camera: string, frame: number) =>
    `data:image/jpeg;base64,${this.data.pictures[camera]?.[frame] ?? ""}`;
  videoUrl = () => null;
  watch = () => () => {};

  /** Where an inference's values are in the file. */
  private place(inference: number): number {
    const place = this.data.inferences.indexOf(inference);
    if (place < 0) throw notHere(`inference ${inference}`);
    return place;
  }

  private async attention(episode: EpisodeId, inference: number, where: Where): Promise<Float32Array> {
    const { facts } = this.data;
    const layer = where.layer === "mean" ? "mean" : facts.mean_layers.indexOf(where.layer);
    const head = typeof where.head === "string" ? where.head : facts.heads.indexOf(where.head);
    return pick(await this.means(episode, inference, where.step), layer, head, blindOf(facts));
  }
}

function notHere(what: string): ApiError {
  return new ApiError(404, `This file does not hold ${what}; the recording itself may.`);
}
