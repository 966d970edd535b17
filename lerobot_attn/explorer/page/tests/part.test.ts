import { afterEach, beforeEach, describe, expect, it, vi } from "vitest";
import type { Changes, EpisodeRow, Run, Wanted } from "../src/api";
import { AGAIN_MS, Part } from "../src/part";
import type { Source } from "../src/source";

const row = (id: string, n_frames = 1) => ({ id, n_frames }) as EpisodeRow;
const ids = (part: Part) => part.run.value?.episodes.map(({ id }) => id).join("");
const changes = (told: Partial<Changes>): Changes => ({
  changed: [],
  grown: [],
  removed: [],
  damaged: [],
  n_damaged: 0,
  n_unread: 0,
  ...told,
});

/** A server whose answers are given by hand. */
class Server {
  asked: Wanted[] = [];
  private readonly waiting: { answer: (run: Run) => void; refuse: (error: Error) => void }[] = [];

  run = (wanted: Wanted) =>
    new Promise<Run>((answer, refuse) => {
      this.asked.push(wanted);
      this.waiting.push({ answer, refuse });
    });

  async answer(rows: EpisodeRow[], told: Partial<Run> = {}): Promise<void> {
    const run = { episodes: rows, offset: 0, n_found: rows.length, n_unread: 0, ...told } as Run;
    this.waiting.shift()!.answer(run);
    await vi.advanceTimersByTimeAsync(0);
  }

  async refuse(message: string): Promise<void> {
    this.waiting.shift()!.refuse(new Error(message));
    await vi.advanceTimersByTimeAsync(0);
  }
}

let server: Server;
let part: Part;
beforeEach(() => {
  vi.useFakeTimers();
  server = new Server();
  part = new Part(server as unknown as Source);
});
afterEach(() => {
  part.dispose();
  vi.useRealTimers();
});

const nextRequest = () => vi.advanceTimersByTimeAsync(AGAIN_MS);

describe("a part of the run's table", () => {
  it("asks for the last of what is wanted while the server answers, and says that it is behind", async () => {
    for (const find of ["a", "ab", "abc"]) part.want({ find });
    await server.answer([row("a")]);
    expect([ids(part), part.isBehind.value]).toEqual(["a", true]);
    await server.answer([row("c")]);
    expect(server.asked).toEqual([{ find: "a" }, { find: "abc" }]);
    expect([ids(part), part.isBehind.value]).toEqual(["c", false]);
  });

  it("keeps what is shown, and says why, where the server refuses", async () => {
    part.want({});
    await server.answer([row("a")]);
    part.want({ find: "b" });
    await server.refuse("no connection");
    expect([ids(part), part.problem.value]).toEqual(["a", "no connection"]);
    void part.again();
    await server.answer([row("b")]);
    expect([ids(part), part.problem.value]).toEqual(["b", null]);
  });

  it("shows at once how its rows change, and asks once for what else does", async () => {
    part.want({});
    await server.answer([row("a"), row("b")]);
    part.follow(
      changes({ changed: [row("b", 7), row("c")], removed: ["a"], damaged: ["a: no"], n_damaged: 1 }),
    );
    expect(part.run.value!.episodes).toEqual([row("b", 7)]);
    expect(part.run.value!.damaged).toEqual(["a: no"]);
    for (let i = 0; i < 50; i++) part.follow(changes({ changed: [row("b", 8 + i)] }));
    await nextRequest();
    expect(server.asked).toHaveLength(2);
    await server.answer([row("b", 57), row("c")]);
    expect(ids(part)).toBe("bc");
  });

  it("asks again for what came after the server had looked", async () => {
    part.want({});
    await server.answer([row("a")]);
    void part.again();
    void part.again();
    expect(server.asked).toHaveLength(2);
    await server.answer([row("a")]);
    expect(server.asked).toHaveLength(3);
  });

  it("begins with the same episode, however many are recorded before it", async () => {
    part.want({ offset: 2, limit: 2 });
    await server.answer([row("c"), row("d")], { offset: 2 });
    part.follow(changes({ changed: [row("b")] }));
    await nextRequest();
    expect(server.asked[1]).toEqual({ offset: 2, limit: 2, first: "c" });
  });

  it("shows what comes before the first of all, and waits for a page that the server has not read yet", async () => {
    part.want({ limit: 2 });
    await server.answer([row("c"), row("d")]);
    part.follow(changes({}));
    await nextRequest();
    expect(server.asked[1]).toEqual({ limit: 2 });
    await server.answer([row("b"), row("c")]);
    expect(ids(part)).toBe("bc");
    part.want({ offset: 8, limit: 2 });
    await server.answer([row("e")], { offset: 4, n_unread: 5 });
    part.follow(changes({ n_unread: 4 }));
    await nextRequest();
    expect(server.asked[3]).toEqual({ offset: 8, limit: 2 });
  });

  it("leaves rows where they are while their numbers grow, until somebody sorts anew", async () => {
    part.want({ sort: "-frames", limit: 3 });
    await server.answer([row("c", 3), row("b", 2), row("a", 1)]);
    part.follow(changes({ changed: [row("b", 9), row("d", 5)], grown: ["b"] }));
    await nextRequest();
    await server.answer([row("b", 9), row("d", 5), row("c", 3)]);
    expect(part.run.value!.episodes).toEqual([row("c", 3), row("b", 9), row("d", 5)]);
    part.want({ sort: "frames", limit: 3 });
    await server.answer([row("a", 1), row("c", 3), row("d", 5)]);
    expect(ids(part)).toBe("acd");
  });

  it("asks no more once nobody sees it", async () => {
    part.want({});
    await server.answer([row("a")]);
    part.follow(changes({ changed: [row("b")] }));
    part.dispose();
    await nextRequest();
    expect(server.asked).toHaveLength(1);
  });
});
