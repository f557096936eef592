// The connection, over a socket that does what the test says.
import { decode, encode } from "@msgpack/msgpack";
import { afterEach, beforeEach, expect, it, vi } from "vitest";
import { Connection, type Line, type ResumeEntry } from "../src/lib/protocol.ts";

type Wire = { type: string; [field: string]: unknown };

class Socket {
  static readonly OPEN = 1;
  readyState = 1;
  binaryType = "";
  sent: Wire[] = [];
  onopen = () => {};
  onmessage = (_: { data: Uint8Array }) => {};
  onclose = (_: { code: number; reason: string }) => {};
  send = (data: Uint8Array) => void this.sent.push(decode(data) as Wire);
  close = () => void (this.readyState = 3);
  hear = (event: Wire) => this.onmessage({ data: encode(event) });
  of = (type: string) => this.sent.filter((each) => each.type === type);
  welcome() {
    this.onopen();
    this.hear({ type: "welcome", server: {}, models: [], heartbeat_ms: 15000 });
  }
}


let sockets: Socket[];
let lines: Line["state"][];
let entries: ResumeEntry[];
let connection: Connection;
const last = () => sockets[sockets.length - 1];

beforeEach(() => {
  vi.useFakeTimers();
  vi.stubGlobal("WebSocket", Socket);
  vi.spyOn(Math, "random").mockReturnValue(1);
  [sockets, lines, entries] = [[], [], []];
  const hooks = {
    onEvent: () => {}, onNotice: () => {}, onLine: (line: Line) => void lines.push(line.state),
    resume: () => entries, token: () => "key",
  };
  connection = new Connection("ws://x/v1/ws", hooks, () => {
    sockets.push(new Socket());
    return last() as unknown as WebSocket;
  });
  connection.open();
});
afterEach(() => {
  connection.close();
  vi.useRealTimers();
  vi.restoreAllMocks();
});

it("says hello with its key and with the sessions it follows", () => {
  entries = [{ session_id: "s", epoch: 7, after_seq: 41 }];
  last().welcome();
  expect(last().sent[0]).toMatchObject({ type: "hello", token: "key", resume: entries });
  expect(lines).toEqual(["connecting", "open"]);
});

it("sends what was not answered again, as it was", async () => {
  last().welcome();
  const answer = connection.command("response.create", { key: "k", input: "hi" });
  const first = last().of("response.create")[0];
  last().onclose({ code: 1006, reason: "" });
  vi.advanceTimersByTime(300);
  last().welcome();
  expect(sockets.length).toBe(2);
  expect(last().of("response.create")).toEqual([first]);
  last().hear({ type: "ok", id: first.id, response_id: "r" });
  expect((await answer).response_id).toBe("r");
});

it("asks after 2 s of silence in a reply and comes back when there is no answer for 3 s", () => {
  last().welcome();
  connection.isBusy = true;
  vi.advanceTimersByTime(2600);
  expect(last().of("ping").length).toBe(1);
  vi.advanceTimersByTime(3000);
  expect(lines[2]).toBe("lost");
});

it("asks every 15 s when nothing is under way, and stays while it is answered", () => {
  last().welcome();
  for (let asked = 1; asked <= 3; asked++) {
    vi.advanceTimersByTime(15_500);
    expect(last().of("ping").length).toBe(asked);
    last().hear({ type: "pong", t: 0, server_ts: 0 });
  }
  expect(sockets.length).toBe(1);
});

it("asks sooner while somebody is at the page", () => {
  last().welcome();
  vi.advanceTimersByTime(10_000);
  expect(last().of("ping").length).toBe(0);
  connection.near();
  vi.advanceTimersByTime(5600);
  expect(lines[2]).toBe("lost");
});

it("waits longer each time, up to 10 s, and not at all when the browser is online again", () => {
  for (const pause of [250, 500, 1000, 2000, 4000, 8000, 10_000, 10_000]) {
    const before = sockets.length;
    last().onclose({ code: 1006, reason: "" });
    vi.advanceTimersByTime(pause - 1);
    expect(sockets.length).toBe(before);
    vi.advanceTimersByTime(1);
    expect(sockets.length).toBe(before + 1);
  }
  last().onclose({ code: 1006, reason: "" });
  connection.check();
  expect(sockets.length).toBe(10);
});

it.each([1000, 1009, 4400, 4401, 4403, 4409])("stays away after close code %i", (code) => {
  last().welcome();
  last().onclose({ code, reason: "no" });
  vi.advanceTimersByTime(60_000);
  expect(sockets.length).toBe(1);
  expect(lines.at(-1)).toBe("stopped");
});

it("waits as long as a server that goes away asks for", () => {
  last().welcome();
  last().hear({ type: "goaway", reason: "restart", time_left_ms: 0, reconnect_after_ms: 2000 });
  last().onclose({ code: 1012, reason: "" });
  vi.advanceTimersByTime(2200);
  expect(sockets.length).toBe(1);
  vi.advanceTimersByTime(100);
  expect(sockets.length).toBe(2);
});

it("gives a refusal with the server's words", async () => {
  last().welcome();
  const asked = connection.command("session.attach", { session_id: "x" });
  last().hear({ type: "error", id: last().of("session.attach")[0].id, error: { code: "session_not_found", message: "there is no session" } });
  await expect(asked).rejects.toMatchObject({ code: "session_not_found", message: "there is no session" });
});
