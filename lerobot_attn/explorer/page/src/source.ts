/** Where episodes come from: the server, or a file that holds one episode (see file.ts). */

import {
  ApiError,
  type ActionChunk,
  type Activations,
  type AllRanges,
  type Camera,
  type Changes,
  type Choice,
  type Facts,
  type Groups,
  type HeadChoice,
  type Masks,
  type Ranges,
  type RoleShares,
  type Run,
  type Shares,
  type Slab,
  type Timeline,
  type Tokens,
  type Wanted,
} from "./api";
import { decodeFloat16 } from "./float16";
import type { Ask } from "./neurons";

export interface EpisodeId {
  id: string;
  version: string;
}

export type Video = Pick<Camera, "name" | "video_version">;

export interface Source {
  /** Whether there is a server behind it, which can be asked for more. */
  readonly live: boolean;
  run(wanted: Wanted): Promise<Run>;
  groups(): Promise<Groups>;
  facts(id: string): Promise<Facts>;
  timeline(episode: EpisodeId): Promise<Timeline>;
  shares(episode: EpisodeId, first: number, where: Where): Promise<Shares>;
  /** Of one camera, by its full name. */
  roles(episode: EpisodeId, first: number, where: Where, camera: string): Promise<RoleShares>;
  /** With `each`, of every neuron by itself too. */
  neurons(episode: EpisodeId, first: number, asked: Ask, each: boolean): Promise<Activations>;
  ranges(episode: EpisodeId, step: number): Promise<Ranges>;
  allRanges(episode: EpisodeId): Promise<AllRanges>;
  tokens(episode: EpisodeId, inference: number): Promise<Tokens>;
  actions(episode: EpisodeId, inference: number): Promise<ActionChunk>;
  masks(episode: EpisodeId, inference: number): Promise<Masks>;
  /** (layer, head, key): means over the executed actions. */
  means(episode: EpisodeId, inference: number, step: number): Promise<Slab>;
  /** (head, query, key): a full map. */
  map(episode: EpisodeId, inference: number, step: number, layer: number): Promise<Slab>;
  /** (head, prefix key): what one prefix token attends to. */
  prefix(episode: EpisodeId, inference: number, layer: number, query: number): Promise<Slab>;
  picture(episode: EpisodeId, camera: Video, frame: number): Promise<ImageBitmap>;
  pictureUrl(episode: EpisodeId, camera: string, frame: number): string;
  videoUrl(episode: EpisodeId, camera: string): string | null;
  /**
   * Call back on every change, until the returned function is called. What is asked for once there is a
   * connection, and changes afterwards, is told.
   */
  watch(onChange: (changes: Changes) => void, onConnection: (connected: boolean) => void): () => void;
}

export interface Where {
  layer: Choice;
  head: HeadChoice;
  step: number;
}

/** The latest answers, by address; an answer that failed is asked for again. */
export class Cache<T> {
  private readonly entries = new Map<string, { answer: Promise<T>; weight: number }>();
  private weight = 0;

  /**
   * @param limit of the weight of all answers
   * @param weigh of an answer once it is there; by default 1
   */
  constructor(
    private readonly limit: number,
    private readonly weigh: (value: T) => number = () => 1,
  ) {}

  get(key: string, make: () => Promise<T>): Promise<T> {
    const known = this.entries.get(key);
    if (known) {
      this.entries.delete(key);
      this.entries.set(key, known);
      return known.answer;
    }
    const entry = { answer: make(), weight: 0 };
    this.entries.set(key, entry);
    entry.answer.then(
      (value) => {
        if (this.entries.get(key) !== entry) return;
        entry.weight = this.weigh(value);
        this.weight += entry.weight;
        this.trim();
      },
      () => {
        if (this.entries.get(key) === entry) this.entries.delete(key);
      },
    );
    return entry.answer;
  }

  /** Drop what was not used for longest; an answer that is still on its way stays. */
  private trim(): void {
    for (const [key, { weight }] of this.entries) {
      if (this.weight <= this.limit || this.entries.size === 1) break;
      if (!weight) continue;
      this.entries.delete(key);
      this.weight -= weight;
    }
  }
}

/** Pictures, of 150 MB of pixels at most. One is not closed when dropped: it may still be shown. */
export const pictureCache = () =>
  new Cache<ImageBitmap>(150e6, (picture) => 4 * picture.width * picture.height);

async function ask(address: string): Promise<Response> {
  let response: Response;
  try {
    response = await fetch(address);
  } catch {
    throw new ApiError(0, "The server does not answer. Is lerobot-attn view still running?");
  }
  if (!response.ok) {
    const said: unknown = await response.json().catch(() => null);
    const message =
      said && typeof said === "object" && "error" in said ? String(said.error) : response.statusText;
    throw new ApiError(response.status, message);
  }
  return response;
}

async function json<T>(address: string): Promise<T> {
  return (await ask(address)).json() as Promise<T>;
}

async function slab(address: string): Promise<Slab> {
  const response = await ask(address);
  const shape = (response.headers.get("X-Shape") ?? "").split(",").map(Number);
  return { shape, values: decodeFloat16(await response.arrayBuffer()) };
}

export class ServerSource implements Source {
  readonly live = true;
  private readonly slabs = new Cache<Slab>(64);
  private readonly maps = new Cache<Slab>(12);
  private readonly facts_ = new Cache<unknown>(400);
  private readonly pictures = pictureCache();

  run = (wanted: Wanted) => json<Run>(`api/run${parameters(wanted)}`);
  groups = () => json<Groups>("api/groups");
  facts = (id: string) => json<Facts>(`api/episodes/${encodeURIComponent(id)}`);
  timeline = (episode: EpisodeId) => json<Timeline>(`${base(episode)}/timeline`);

  shares = (episode: EpisodeId, first: number, where: Where) =>
    json<Shares>(`${base(episode)}/shares?${asked(first, where)}`);
  roles = (episode: EpisodeId, first: number, where: Where, camera: string) =>
    json<RoleShares>(`${base(episode)}/roles/${encodeURIComponent(camera)}?${asked(first, where)}`);

  neurons = (
    episode: EpisodeId,
    first: number,
    { stream, units, group, reduction, step }: Ask,
    each: boolean,
  ) => {
    const said = units.map(([layer, unit]) => `${layer}:${unit}`).join();
    const of = `group=${encodeURIComponent(group)}&reduction=${encodeURIComponent(reduction)}&denoise_step=${step}`;
    return json<Activations>(
      `${base(episode)}/neurons/${encodeURIComponent(stream)}?first=${first}&units=${said}&${of}&each=${Number(each)}`,
    );
  };

  ranges = (episode: EpisodeId, step: number) => json<Ranges>(`${base(episode)}/ranges/${step}`);
  allRanges = (episode: EpisodeId) => json<AllRanges>(`${base(episode)}/ranges`);
  tokens = (episode: EpisodeId, inference: number) =>
    this.kept<Tokens>(`${base(episode)}/inferences/${inference}/tokens`);
  actions = (episode: EpisodeId, inference: number) =>
    this.kept<ActionChunk>(`${base(episode)}/inferences/${inference}/actions`);
  masks = (episode: EpisodeId, inference: number) =>
    this.kept<Masks>(`${base(episode)}/inferences/${inference}/masks`);

  means(episode: EpisodeId, inference: number, step: number): Promise<Slab> {
    const address = `${base(episode)}/inferences/${inference}/means/${step}`;
    return this.slabs.get(address, () => slab(address));
  }

  map(episode: EpisodeId, inference: number, step: number, layer: number): Promise<Slab> {
    const address = `${base(episode)}/inferences/${inference}/maps/${step}/${layer}`;
    return this.maps.get(address, () => slab(address));
  }

  prefix(episode: EpisodeId, inference: number, layer: number, query: number): Promise<Slab> {
    const address = `${base(episode)}/inferences/${inference}/prefix/${layer}/${query}`;
    return this.slabs.get(address, () => slab(address));
  }

  picture(episode: EpisodeId, camera: Video, frame: number): Promise<ImageBitmap> {
    const address = `${this.pictureUrl(episode, camera.name, frame)}?v=${camera.video_version}`;
    return this.pictures.get(address, async () => createImageBitmap(await (await ask(address)).blob()));
  }

  pictureUrl(episode: EpisodeId, camera: string, frame: number): string {
    return `${base(episode)}/cameras/${encodeURIComponent(camera)}/frames/${frame}.jpg`;
  }

  videoUrl(episode: EpisodeId, camera: string): string {
    return `${base(episode)}/cameras/${encodeURIComponent(camera)}.mp4`;
  }

  /** A page that nobody sees does not listen: a browser has six connections to a server, for all its tabs. */
  watch(onChange: (changes: Changes) => void, onConnection: (connected: boolean) => void): () => void {
    let events: EventSource | null = null;
    const listen = () => {
      events?.close();
      events = null;
      if (document.hidden) return;
      events = new EventSource("api/events");
      events.addEventListener("ready", () => onConnection(true));
      events.onerror = () => onConnection(false);
      events.onmessage = (event: MessageEvent<string>) => onChange(JSON.parse(event.data) as Changes);
    };
    document.addEventListener("visibilitychange", listen);
    listen();
    return () => {
      document.removeEventListener("visibilitychange", listen);
      events?.close();
    };
  }

  private kept<T>(address: string): Promise<T> {
    return this.facts_.get(address, () => json<T>(address)) as Promise<T>;
  }
}

/** What is wanted, as the part of an address behind the path. */
export function parameters(wanted: Wanted): string {
  const said = new URLSearchParams();
  for (const [name, value] of Object.entries(wanted)) if (value) said.set(name, String(value));
  return said.size ? `?${said}` : "";
}

function asked(first: number, { layer, head, step }: Where): string {
  return `first=${first}&layer=${layer}&head=${head}&denoise_step=${step}`;
}

function base(episode: EpisodeId): string {
  return `api/episodes/${encodeURIComponent(episode.id)}/${episode.version}`;
}
