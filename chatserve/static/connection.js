// Protocol chatserve.v1 over one WebSocket that is kept up: commands with answers, cursors, pings, coming back.
// It shows nothing and knows no page; app.js does.

const FINAL_CODES = new Set([1000, 1007, 1009, 4400, 4401, 4403, 4409]);
const PONG_TIMEOUT_MS = 3000;
const SILENCE_MS = 2000;
const FIRST_BACKOFF_MS = 250;
const MAX_BACKOFF_MS = 10000;

export class CommandError extends Error {
  constructor(error) {
    super(error.message);
    this.code = error.code;
    this.retryable = error.retryable;
  }
}

export function newKey() {
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

export class Connection {
  // onEvent(event): session events, each once and in order, and what answers no command.
  // onState(state, detail): "connecting", "open" (detail: welcome), "lost", or "stopped" (detail: {code, reason}).
  constructor({ onEvent, onState }) {
    this.onEvent = onEvent;
    this.onState = onState;
    this.token = null;
    this.cursors = new Map();
    this.unanswered = new Map();
    this.nextId = 1;
    this.attempt = 0;
    this.pauseMs = 0;
    this.socket = null;
    this.busy = false; // a reply is being written: silence is suspicious then
    this.lastHeard = 0;
    this.pongTimer = null;
    this.retryTimer = null;
    setInterval(() => this.busy && performance.now() - this.lastHeard > SILENCE_MS && this.ping(), 1000);
    // A browser that goes offline leaves the socket silent, without a close event.
    for (const name of ["online", "offline"]) addEventListener(name, () => this.check());
    document.addEventListener("visibilitychange", () => document.hidden || this.check());
  }

  open() {
    clearTimeout(this.retryTimer);
    this.retryTimer = null;
    this.onState("connecting");
    const scheme = location.protocol === "https:" ? "wss:" : "ws:";
    const socket = new WebSocket(`${scheme}//${location.host}/v1/ws`, "chatserve.v1.json");
    this.socket = socket;
    this.welcomed = false;
    socket.onopen = () => this.#hello();
    socket.onmessage = (message) => socket === this.socket && this.#receive(JSON.parse(message.data));
    socket.onclose = (close) => socket === this.socket && this.#closed(close.code, close.reason);
  }

  // Send a command and wait for its answer, over as many connections as that takes.
  command(type, fields = {}) {
    const id = `c${this.nextId++}`;
    const message = { type, id, ...fields };
    return new Promise((resolve, reject) => {
      this.unanswered.set(id, { message, resolve, reject });
      this.#send(message);
    });
  }

  // A hint that needs no answer.
  hint(type, fields) {
    this.#send({ type, ...fields });
  }

  async detach(sessionId) {
    this.cursors.delete(sessionId);
    await this.command("session.detach", { session_id: sessionId });
  }

  ping() {
    if (!this.welcomed || this.pongTimer) return;
    this.#send({ type: "ping", t: Math.round(performance.now()) });
    this.pongTimer = setTimeout(() => this.#abandon("no answer"), PONG_TIMEOUT_MS);
  }

  check() {
    if (this.welcomed) this.ping();
    else if (this.retryTimer) this.open();
  }

  #hello() {
    const resume = [...this.cursors].map(([session_id, { epoch, seq }]) => ({ session_id, epoch, after_seq: seq }));
    const client = { name: "chatserve-page", version: "1" };
    const token = this.token ? { token: this.token } : {};
    this.socket.send(JSON.stringify({ type: "hello", client, resume, ...token }));
  }

  #send(message) {
    if (this.welcomed && this.socket.readyState === WebSocket.OPEN) this.socket.send(JSON.stringify(message));
  }

  #receive(event) {
    this.lastHeard = performance.now();
    if (event.type === "welcome") this.#welcome(event);
    else if (event.type === "pong") this.#pong();
    else if (event.type === "goaway") this.pauseMs = event.reconnect_after_ms;
    else if ("seq" in event) this.#receiveSessionEvent(event);
    else this.#receiveOther(event);
  }

  #welcome(event) {
    this.welcomed = true;
    this.attempt = 0;
    clearInterval(this.heartbeat);
    this.heartbeat = setInterval(() => this.ping(), event.heartbeat_ms);
    this.onState("open", event);
    for (const { message } of this.unanswered.values()) this.#send(message);
  }

  #pong() {
    clearTimeout(this.pongTimer);
    this.pongTimer = null;
  }

  // Apply what comes next, drop what is old, attach again where something is missing.
  #receiveSessionEvent(event) {
    const cursor = this.cursors.get(event.session_id);
    if (!cursor || event.seq <= cursor.seq) return;
    if ((event.seq_from ?? event.seq) === cursor.seq + 1) {
      cursor.seq = event.seq;
      this.onEvent(event);
    } else {
      this.#attachAgain(event.session_id);
    }
  }

  #receiveOther(event) {
    const waiting = this.unanswered.get(event.id);
    if (event.type === "session.attached") this.#moveCursor(event, waiting?.message);
    if (waiting) {
      this.unanswered.delete(event.id);
      if (event.type === "error") waiting.reject(new CommandError(event.error));
      else waiting.resolve(event);
    } else if (event.type === "error" && this.cursors.has(event.session_id) && event.error.retryable) {
      setTimeout(() => this.#attachAgain(event.session_id), 1000);
    } else {
      this.onEvent(event);
    }
  }

  #moveCursor(event, command) {
    if (event.mode === "snapshot") this.cursors.set(event.session_id, { epoch: event.epoch, seq: event.head_seq });
    else if (command) this.cursors.set(event.session_id, { epoch: event.epoch, seq: command.after_seq });
  }

  async #attachAgain(sessionId) {
    const cursor = this.cursors.get(sessionId);
    if (!cursor || cursor.attaching) return;
    cursor.attaching = true;
    const fields = { session_id: sessionId, epoch: cursor.epoch, after_seq: cursor.seq };
    try {
      this.onEvent(await this.command("session.attach", fields));
    } catch (error) {
      if (error.retryable) setTimeout(() => this.#attachAgain(sessionId), 1000);
      else this.onEvent({ type: "error", session_id: sessionId, error });
    }
    cursor.attaching = false;
  }

  #abandon(reason) {
    const socket = this.socket;
    this.socket = null;
    socket?.close();
    this.#closed(1006, reason);
  }

  #closed(code, reason) {
    this.welcomed = false;
    clearInterval(this.heartbeat);
    this.#pong();
    if (FINAL_CODES.has(code)) {
      this.onState("stopped", { code, reason });
      return;
    }
    this.onState("lost", { code, reason });
    const ceiling = Math.min(MAX_BACKOFF_MS, FIRST_BACKOFF_MS * 2 ** Math.min(this.attempt++, 10));
    this.retryTimer = setTimeout(() => this.open(), this.pauseMs + Math.random() * ceiling);
    this.pauseMs = 0;
  }
}
