// Protocol chatserve.v1 over one WebSocket that is kept up: commands with answers, pings, coming back. It knows no page.

import { decode, encode } from "@msgpack/msgpack";
import type { ErrorObject, SessionEvent, Welcome } from "./types.ts";

export const SUBPROTOCOL = "chatserve.v1.msgpack";
const FINAL_CODES = new Set([1000, 1007, 1009, 4400, 4401, 4403, 4409]);
const UNAUTHORIZED = 4401;
const QUIET_MS = 15_000;
const REPLY_QUIET_MS = 2000;
const NEAR_MS = 20_000; // for so long after they did something, somebody is at the page
const PONG_MS = 3000;
const WELCOME_MS = 10_000;
const FIRST_BACKOFF_MS = 250;
const MAX_BACKOFF_MS = 10_000;
const TICK_MS = 250;

export type Line =
  | { state: "connecting" | "lost" }
  | { state: "open"; welcome: Welcome }
  | { state: "stopped"; code: number; reason: string; needsKey: boolean };

export interface ResumeEntry {
  session_id: string;
  epoch: number;
  after_seq: number;
}

export interface Hooks {
  onEvent(event: SessionEvent): void;
  /** What answers no command: `sessions.changed`, errors of followed sessions, `session.attached` after a return. */
  onNotice(notice: { type: string; [field: string]: unknown }): void;
  onLine(line: Line): void;
  /** The sessions that are followed, with the last event applied. */
  resume(): ResumeEntry[];
  token(): string | null;
}

export interface Answer {
  type: string;
  session?: { id: string };
  message_id?: string;
  response_id?: string;
  [field: string]: unknown;
}

type SocketMaker = (url: string, protocol: string) => WebSocket;

interface Asked {
  message: object;
  resolve(answer: Answer): void;
  reject(error: CommandError): void;
}

/** A command that the server refused. */
export class CommandError extends Error {
  readonly code: string;

  constructor(error: ErrorObject) {
    super(error.message);
    this.code = error.code;
  }
}

/** A key of a command: whoever repeats it changes nothing. */
export function newKey(): string {
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

export class Connection {
  /** A reply is under way: the server should not be silent for long. */
  isBusy = false;
  private socket: WebSocket | null = null;
  private isWelcomed = false;
  private unanswered = new Map<string, Asked>();
  private nextId = 1;
  private attempt = 0;
  private pauseMs = 0;
  private lastHeard = 0;
  private lastPing = 0;
  private lastNear = -NEAR_MS;
  private deadline: ReturnType<typeof setTimeout> | undefined;
  private retry: ReturnType<typeof setTimeout> | undefined;
  private ticking: ReturnType<typeof setInterval> | undefined;

  constructor(
    private readonly url: string,
    private readonly hooks: Hooks,
    private readonly makeSocket: SocketMaker = (url, protocol) => new WebSocket(url, protocol),
  ) {}

  open(): void {
    this.forgetTimers();
    this.ticking = setInterval(() => this.tick(), TICK_MS);
    this.hooks.onLine({ state: "connecting" });
    const socket = this.makeSocket(this.url, SUBPROTOCOL);
    socket.binaryType = "arraybuffer";
    this.socket = socket;
    this.isWelcomed = false;
    this.deadline = setTimeout(() => this.abandon(), WELCOME_MS);
    socket.onopen = () => this.hello();
    socket.onmessage = (message) => socket === this.socket && this.receive(decode(message.data as ArrayBuffer) as Answer);
    socket.onclose = (close) => socket === this.socket && this.closed(close.code, close.reason);
  }

  close(): void {
    this.forgetTimers();
    const socket = this.socket;
    this.socket = null;
    socket?.close(1000);
  }

  /** Send a command and wait for its answer, over as many connections as that takes. Rejects with CommandError. */
  command(type: string, fields: object = {}): Promise<Answer> {
    const id = `c${this.nextId++}`;
    const message = { type, id, ...fields };
    return new Promise((resolve, reject) => {
      this.unanswered.set(id, { message, resolve, reject });
      this.send(message);
    });
  }

  /** A hint that needs no answer, and is not worth repeating. */
  hint(type: string, fields: object): void {
    this.send({ type, ...fields });
  }

  /** Ask whether the server is there, or come back at once: the browser went on- or offline, or the page is seen again. */
  check(): void {
    if (this.isWelcomed) this.ping();
    else if (this.retry !== undefined) this.open();
  }

  /** Somebody is at the page, and should not have to find out by themselves that the line is dead. */
  near(): void {
    this.lastNear = Date.now();
  }

  private hello(): void {
    const token = this.hooks.token();
    const client = { name: "chatserve-page", version: "2" };
    this.write({ type: "hello", client, resume: this.hooks.resume(), ...(token ? { token } : {}) });
  }

  private receive(event: Answer): void {
    this.lastHeard = Date.now();
    if (this.isWelcomed) this.expect(undefined);
    if (event.type === "welcome") this.welcome(event as unknown as Welcome);
    else if (event.type === "goaway") this.pauseMs = event.reconnect_after_ms as number;
    else if (typeof event.id === "string" && this.unanswered.has(event.id)) this.answer(event.id, event);
    else if (typeof event.seq === "number") this.hooks.onEvent(event as unknown as SessionEvent);
    else if (event.type !== "pong") this.hooks.onNotice(event);
  }

  private welcome(welcome: Welcome): void {
    this.isWelcomed = true;
    this.attempt = 0;
    this.lastPing = Date.now();
    this.expect(undefined);
    this.hooks.onLine({ state: "open", welcome });
    for (const { message } of this.unanswered.values()) this.write(message);
  }

  private answer(id: string, event: Answer): void {
    const asked = this.unanswered.get(id) as Asked;
    this.unanswered.delete(id);
    if (event.type === "error") asked.reject(new CommandError(event.error as ErrorObject));
    else asked.resolve(event);
  }

  private tick(): void {
    const now = Date.now();
    const isDue = this.isBusy || this.unanswered.size > 0 || now - this.lastNear < NEAR_MS;
    if (now - this.lastPing >= QUIET_MS || (isDue && now - this.lastHeard >= REPLY_QUIET_MS)) this.ping();
  }

  private ping(): void {
    if (!this.isWelcomed || this.deadline !== undefined) return;
    this.lastPing = Date.now();
    this.send({ type: "ping", t: this.lastPing });
    this.expect(PONG_MS);
  }

  /** Until the server says something, the time runs; undefined: nothing is expected. */
  private expect(withinMs: number | undefined): void {
    clearTimeout(this.deadline);
    this.deadline = withinMs === undefined ? undefined : setTimeout(() => this.abandon(), withinMs);
  }

  private abandon(): void {
    const socket = this.socket;
    this.socket = null;
    socket?.close();
    this.closed(1006, "");
  }

  private closed(code: number, reason: string): void {
    this.forgetTimers();
    this.isWelcomed = false;
    if (FINAL_CODES.has(code)) {
      this.hooks.onLine({ state: "stopped", code, reason, needsKey: code === UNAUTHORIZED });
      return;
    }
    this.hooks.onLine({ state: "lost" });
    const ceiling = Math.min(MAX_BACKOFF_MS, FIRST_BACKOFF_MS * 2 ** this.attempt++);
    this.retry = setTimeout(() => this.open(), this.pauseMs + Math.random() * ceiling);
    this.pauseMs = 0;
  }

  private forgetTimers(): void {
    this.expect(undefined);
    clearTimeout(this.retry);
    this.retry = undefined;
    clearInterval(this.ticking);
  }

  private send(message: object): void {
    if (this.isWelcomed) this.write(message);
  }

  private write(message: object): void {
    if (this.socket?.readyState === WebSocket.OPEN) this.socket.send(encode(message, { ignoreUndefined: true }));
  }
}

