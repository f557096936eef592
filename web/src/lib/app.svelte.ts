// What the page knows and does: the open session, the list, and what a person asks for. Components only show it.

import * as api from "./api.ts";
import { copyText, saveFile } from "./browser.ts";
import { Deletions, UNDO_MS } from "./deletions.svelte.ts";
import { titleFrom } from "./describe.ts";
import { CommandError, Connection, type Line, newKey } from "./protocol.ts";
import { type Conversation, type Message, branch, fromSnapshot, reduce, tip } from "./reducer.ts";
import { apiKey, draftOf, keepApiKey, keepDraft } from "./stored.ts";
import type { Attached, HeldTokens, Params, Pending, Session, SessionEvent, Toast } from "./types.ts";

const REFRESH_MS = 150;
const HIDDEN_FLUSH_MS = 250;
const RETRY_ATTACH_MS = 1000;
const RETRY_LIST_MS = 3000;
const TYPING_EVERY_MS = 5000;
const PRESENCE = ["pointermove", "pointerdown", "touchstart", "wheel", "keydown"]; // somebody is at the page

export class App {
  line = $state.raw<Line>({ state: "connecting" });
  model = $state("");
  maxContext = $state(0);
  wasOpen = $state(false);
  needsKey = $state(false);
  sessions = $state.raw<Session[]>([]);
  isListed = $state(false);
  readonly deletions = new Deletions((id) => this.deleteForGood(id));
  view = $state<"chat" | "server">("chat");
  openId = $state<string | null>(null);
  conversation = $state.raw<Conversation | null>(null);
  pending = $state.raw<Pending | null>(null);
  held = $state.raw<HeldTokens | null>(null);
  problem = $state("");
  /** The message that is being edited. */
  editingId = $state<string | null>(null);
  announcement = $state("");
  toast = $state.raw<Toast | null>(null);
  /** Raised whenever the composer should take up the kept draft. */
  draftVersion = $state(0);
  /** What the next new session begins with. */
  newInstructions = $state("");
  newParams = $state.raw<Params>({});

  private readonly connection: Connection;
  private latest: Conversation | null = null;
  private flushing = false;
  private attaching = false;
  private lastTyping = 0;
  private refreshTimer: ReturnType<typeof setTimeout> | undefined;
  private toastTimer: ReturnType<typeof setTimeout> | undefined;

  constructor() {
    const scheme = location.protocol === "https:" ? "wss:" : "ws:";
    this.connection = new Connection(`${scheme}//${location.host}/v1/ws`, {
      onEvent: (event) => this.receive(event),
      onNotice: (notice) => this.notice(notice),
      onLine: (line) => this.lineChanged(line),
      resume: () => (this.latest ? [{ session_id: this.latest.id, epoch: this.latest.epoch, after_seq: this.latest.seq }] : []),
      token: apiKey,
    });
    api.useToken(apiKey());
  }

  /** Connect, and follow the address. Returns how to stop. */
  start(): () => void {
    const stopping = new AbortController();
    const options = { signal: stopping.signal, passive: true };
    const check = () => this.connection.check();
    for (const name of ["online", "offline"]) addEventListener(name, check, options);
    for (const name of PRESENCE) addEventListener(name, () => this.connection.near(), options);
    addEventListener("hashchange", () => this.route(), options);
    addEventListener("pagehide", () => this.deletions.finishAll(), options);
    document.addEventListener("visibilitychange", () => document.hidden || check(), options);
    this.connection.open();
    this.route();
    return () => {
      stopping.abort();
      this.connection.close();
    };
  }

  reconnect(): void {
    this.connection.open();
  }

  useKey(key: string): void {
    keepApiKey(key);
    api.useToken(key);
    this.needsKey = false;
    this.connection.open();
  }

  // ---- the line

  private lineChanged(line: Line): void {
    this.line = line;
    if (line.state === "open") {
      this.model = line.welcome.models[0]?.id ?? "";
      this.maxContext = line.welcome.models[0]?.max_context ?? 0;
      if (this.wasOpen) this.announcement = "Connected again.";
      this.wasOpen = true;
      this.refresh();
      void this.refreshHeld();
    }
    if (line.state === "lost" && this.wasOpen) this.announcement = "Connection lost. Reconnecting.";
    if (line.state === "stopped") this.needsKey = line.needsKey;
  }

  private notice(notice: { type: string; [field: string]: unknown }): void {
    if (notice.type === "sessions.changed") this.refresh();
    if (notice.session_id !== this.openId) return;
    if (notice.type === "session.attached") this.attached(notice as unknown as Attached);
    if (notice.type === "error") this.stoodStill(notice.error as { message: string; retryable?: boolean });
  }

  /** The server stopped following the open session for us. */
  private stoodStill(error: { message: string; retryable?: boolean }): void {
    if (error.retryable) setTimeout(() => void this.attach(), RETRY_ATTACH_MS);
    else this.problem = error.message;
  }

  // ---- the log of the open session

  private receive(event: SessionEvent): void {
    if (!this.latest || event.session_id !== this.latest.id) return;
    const { verdict, state } = reduce(this.latest, event);
    if (verdict === "gap") void this.attach();
    if (verdict !== "apply") return;
    const ended = this.latest.active && !state.active;
    this.take(state);
    if (event.type === "message.created" && this.isPending(state)) this.settle();
    if (ended) this.replyEnded(state);
    if (event.type === "session.updated") this.refresh();
    if (state.deleted) this.closeDeleted();
  }

  private take(state: Conversation | null): void {
    this.latest = state;
    this.connection.isBusy = Boolean(state?.active);
    if (this.flushing) return;
    this.flushing = true;
    if (document.hidden) setTimeout(() => this.flush(), HIDDEN_FLUSH_MS);
    else requestAnimationFrame(() => this.flush());
  }

  private flush(): void {
    this.flushing = false;
    this.conversation = this.latest;
  }

  private replyEnded(state: Conversation): void {
    const status = state.messages.get(state.headId ?? "")?.response?.status;
    this.announcement = status === "completed" ? "Reply finished." : `Reply ended: ${status}.`;
    this.refresh();
    void this.refreshHeld();
  }

  private closeDeleted(): void {
    this.announcement = "This session was deleted.";
    this.goto(null);
  }

  private attached({ epoch, head_seq, snapshot }: Attached): void {
    if (!snapshot) return;
    const state = fromSnapshot({ ...snapshot, epoch, head_seq });
    this.take(state);
    this.flush();
    if (this.pending?.messageId && state.messages.has(this.pending.messageId)) this.settle();
    this.forgetSentDraft(state);
  }

  /** A draft that was sent while the line broke is no draft any more. */
  private forgetSentDraft(state: Conversation): void {
    const said = [...state.messages.values()].filter((each) => each.role === "user").at(-1);
    if (this.pending || !said || said.text.trim() !== draftOf(state.id).trim()) return;
    keepDraft(state.id, "");
    this.draftVersion++;
  }

  /** Follow the open session, from the last event applied where there is one. */
  private async attach(): Promise<void> {
    const id = this.openId;
    if (!id || this.attaching) return;
    this.attaching = true;
    const cursor = this.latest?.id === id ? { epoch: this.latest.epoch, after_seq: this.latest.seq } : {};
    try {
      const answer = await this.connection.command("session.attach", { session_id: id, ...cursor });
      if (this.openId === id) this.attached(answer as unknown as Attached);
    } catch (error) {
      if (this.openId === id) this.notFollowed(error);
    } finally {
      this.attaching = false;
    }
    if (this.openId && this.openId !== id) await this.attach();
  }

  private notFollowed(error: unknown): void {
    this.refused(error);
    if (error instanceof CommandError && error.code === "session_not_found") this.goto(null);
    else setTimeout(() => void this.attach(), RETRY_ATTACH_MS);
  }

  // ---- where we are

  private route(): void {
    const [, place = "", id = ""] = location.hash.split("/");
    this.view = place === "server" ? "server" : "chat";
    if (place !== "server") this.show(place === "s" && id ? decodeURIComponent(id) : null);
  }

  goto(sessionId: string | null): void {
    location.hash = sessionId ? `#/s/${encodeURIComponent(sessionId)}` : "#/";
  }

  private show(id: string | null): void {
    if (id === this.openId) return;
    const before = this.openId;
    this.openId = id;
    this.held = null;
    this.problem = "";
    this.editingId = null;
    this.lastTyping = 0;
    this.take(null);
    this.flush();
    if (before && this.line.state === "open") void this.quietly(this.connection.command("session.detach", { session_id: before }));
    if (id) void this.attach();
    if (id) void this.refreshHeld();
  }

  // ---- the list

  refresh(afterMs = REFRESH_MS): void {
    clearTimeout(this.refreshTimer);
    this.refreshTimer = setTimeout(() => void this.list(), afterMs);
  }

  private async list(): Promise<void> {
    const sessions = await this.quietly(api.listSessions());
    this.sessions = sessions ?? this.sessions;
    this.isListed ||= Boolean(sessions);
    if (!sessions && this.line.state === "open") this.refresh(RETRY_LIST_MS);
  }

  /** The ids of the sessions in which these words were said; none where the server cannot say. */
  async search(words: string): Promise<Set<string>> {
    const found = await this.quietly(api.searchSessions(words));
    return new Set((found ?? []).map((session) => session.id));
  }

  /** Where the open session's tokens are now. */
  async refreshHeld(): Promise<void> {
    const id = this.openId;
    if (!id || this.line.state !== "open") return;
    const held = await this.quietly(api.heldTokens(id));
    if (held && id === this.openId) this.held = held;
  }

  update(session: { id: string }, fields: object): Promise<unknown> {
    return this.attempt(() => this.connection.command("session.update", { session_id: session.id, ...fields }));
  }

  /** Hide a session now, and delete it for good when nobody called it back. */
  remove(session: Session): void {
    const wasOpen = session.id === this.openId;
    this.deletions.begin(session.id);
    const undo = () => this.restore(session.id, wasOpen);
    this.showToast({ text: `Deleted “${session.title || "New session"}”`, undo }, UNDO_MS);
    if (wasOpen) this.goto(null);
  }

  private restore(id: string, wasOpen: boolean): void {
    this.deletions.undo(id);
    this.toast = null;
    this.announcement = "The session is back.";
    if (wasOpen) this.goto(id);
  }

  private async deleteForGood(id: string): Promise<void> {
    const isGone = await this.attempt(() => api.deleteSession(id).then(() => true));
    if (!isGone) return;
    this.sessions = this.sessions.filter((session) => session.id !== id);
    keepDraft(id, "");
  }

  async importFile(file: Blob): Promise<void> {
    const session = await this.attempt(() => api.importSession(file));
    if (session) this.goto(session.id);
  }

  async exportFile(session: Session, format: "json" | "markdown"): Promise<void> {
    const blob = await this.attempt(() => api.exportSession(session.id, format));
    if (blob) saveFile(blob, session.title, session.id, format === "json" ? "json" : "md");
  }

  // ---- turns

  /** Say something; begins a session where none is open. True once the server has it. */
  async send(text: string): Promise<boolean> {
    const writtenIn = this.openId;
    this.pending = { writtenIn, sessionId: writtenIn, text };
    keepDraft(writtenIn, text); // until the server has it, so that a reload loses nothing
    const id = writtenIn ?? (await this.createSession(titleFrom(text)));
    if (id) this.pending = { writtenIn, sessionId: id, text };
    const answer = id ? await this.respond({ input: text }, id) : null;
    if (answer) this.accepted(answer.message_id, text);
    else this.takeBack();
    return Boolean(answer);
  }

  private accepted(messageId: string | undefined, text: string): void {
    if (messageId && this.latest?.messages.has(messageId)) this.settle();
    else if (this.pending) this.pending = { ...this.pending, messageId };
    if (this.latest && !this.latest.session.title) this.nameAfterFirstWords(this.latest, text);
  }

  private isPending({ messages, headId }: Conversation): boolean {
    const { text, messageId } = this.pending ?? {};
    return headId !== null && (headId === messageId || messages.get(headId)?.text === text);
  }

  /** What was said is in the log: it is no draft any more. */
  private settle(): void {
    const pending = this.pending;
    if (pending && draftOf(pending.writtenIn) === pending.text) keepDraft(pending.writtenIn, "");
    this.pending = null;
    this.draftVersion++;
  }

  /** What was said was refused: it is a draft again, where the person is now. */
  private takeBack(): void {
    const text = this.pending?.text ?? "";
    this.settle();
    if (!draftOf(this.openId)) keepDraft(this.openId, text);
    this.draftVersion++;
  }

  private nameAfterFirstWords(state: Conversation, text: string): void {
    const first = [...state.messages.values()].find((message) => message.role === "user");
    void this.update({ id: state.id }, { title: titleFrom(first?.text ?? text) });
  }

  private async createSession(title: string): Promise<string | null> {
    const instructions = this.newInstructions.trim() || undefined;
    const fields = { key: newKey(), title, instructions, params: $state.snapshot(this.newParams) };
    const answer = await this.attempt(() => this.connection.command("session.create", fields));
    const id = answer?.session?.id;
    if (!id) return null;
    this.goto(id);
    this.show(id); // does what the address' change would do later
    this.newInstructions = "";
    this.newParams = {};
    return id;
  }

  edit(message: Message, text: string): Promise<unknown> {
    return this.respond({ input: text, parent_id: message.parentId ?? "root" });
  }

  /** Begin to edit what was said last; whether there is such a message. */
  editLast(): boolean {
    const said = this.conversation ? branch(this.conversation).filter(({ role }) => role === "user") : [];
    this.editingId = said.at(-1)?.id ?? null;
    return this.editingId !== null;
  }

  /** Answer again: a reply beside this one. */
  regenerate(reply: Message): Promise<unknown> {
    return this.respond({ parent_id: reply.parentId });
  }

  /** Let an unfinished reply go on. */
  goOn(reply: Message): Promise<unknown> {
    return this.respond({ parent_id: reply.id });
  }

  stop(): Promise<unknown> {
    const active = this.conversation?.active;
    const fields = { session_id: this.openId, response_id: active?.id };
    return active ? this.attempt(() => this.connection.command("response.cancel", fields)) : Promise.resolve();
  }

  switchTo(version: Message): Promise<unknown> | undefined {
    const state = this.conversation;
    return state ? this.update({ id: state.id }, { head_id: tip(state, version).id }) : undefined;
  }

  async fork(at: Message): Promise<void> {
    const title = `${this.conversation?.session.title || "New session"} (fork)`.slice(0, 200);
    const fields = { session_id: this.openId, at_message_id: at.id, key: newKey(), title };
    const answer = await this.attempt(() => this.connection.command("session.fork", fields));
    if (answer?.session) this.goto(answer.session.id);
  }

  /** Somebody types: the history may be wanted soon, and so is the line. */
  typing(): void {
    const now = Date.now();
    if (now - this.lastTyping < TYPING_EVERY_MS) return;
    this.lastTyping = now;
    this.connection.check();
    if (!this.openId) return;
    this.connection.hint("session.typing", { session_id: this.openId });
  }

  private respond(fields: object, id: string | null = this.openId) {
    return this.attempt(() => this.connection.command("response.create", { session_id: id, key: newKey(), ...fields }));
  }

  // ---- what went wrong, and what to say about it

  /** Do what a person asked for; a refusal is shown, and gives null. */
  async attempt<T>(action: () => Promise<T>): Promise<T | null> {
    this.problem = "";
    try {
      return await action();
    } catch (error) {
      this.refused(error);
      return null;
    }
  }

  private refused(error: unknown): void {
    this.problem = error instanceof Error ? error.message : String(error);
  }

  private async quietly<T>(asked: Promise<T>): Promise<T | null> {
    return asked.catch(() => null);
  }

  showToast(toast: Toast, forMs = 3000): void {
    clearTimeout(this.toastTimer);
    this.toast = toast;
    this.announcement = toast.text;
    this.toastTimer = setTimeout(() => (this.toast = null), forMs);
  }

  /** Whether the text is in the clipboard now. */
  async copy(text: string): Promise<boolean> {
    const isCopied = Boolean(await this.quietly(copyText(text).then(() => true)));
    if (isCopied) this.announcement = "Copied.";
    else this.showToast({ text: "The browser did not allow copying." });
    return isCopied;
  }
}
