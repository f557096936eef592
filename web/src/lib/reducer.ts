// What a session's log says: pure functions from (conversation, event) to the next conversation. Nothing is changed in
// place, so what is on the screen can be compared by identity.

import type { Context, Response, Session, SessionEvent, Snapshot, StoredMessage } from "./types.ts";

export type Verdict = "apply" | "drop" | "gap";

export interface Message {
  id: string;
  parentId: string | null;
  role: "user" | "assistant" | "system";
  text: string;
  response?: Response;
  resumed?: boolean;
}

export interface Conversation {
  id: string;
  epoch: number;
  seq: number;
  session: Session;
  messages: ReadonlyMap<string, Message>;
  headId: string | null;
  active: Response | null;
  context: Context | null;
  deleted: boolean;
}

const TERMINAL = new Set(["response.completed", "response.incomplete", "response.cancelled", "response.failed"]);

/** Where an event stands to the last one applied: apply iff it is the next one, drop it if it is known. */
export function judge(lastSeq: number, event: { seq: number; seq_from?: number }): Verdict {
  if (event.seq <= lastSeq) return "drop";
  return (event.seq_from ?? event.seq) === lastSeq + 1 ? "apply" : "gap";
}

/** A session as the server gives it. */
export function fromSnapshot(snapshot: Snapshot): Conversation {
  const { messages, active_response, context, epoch, head_seq, ...session } = snapshot;
  const known = new Map(messages.map((message) => [message.id, toMessage(message)]));
  const state: Conversation = {
    id: snapshot.id, epoch, seq: head_seq, session, messages: known, headId: snapshot.head_id ?? null,
    active: null, context, deleted: false,
  };
  return active_response ? begin(state, active_response) : state;
}

/** Take one event of the session's log. At a gap the caller attaches again from `seq`. */
export function reduce(state: Conversation, event: SessionEvent): { verdict: Verdict; state: Conversation } {
  const verdict = judge(state.seq, event);
  if (verdict !== "apply") return { verdict, state };
  const next = applied({ ...state, seq: event.seq }, event);
  return next ? { verdict, state: next } : { verdict: "gap", state };
}

/** The messages from the first one to the head. */
export function branch(state: Conversation): Message[] {
  const path: Message[] = [];
  for (let at = find(state, state.headId); at; at = find(state, at.parentId)) path.push(at);
  return path.reverse();
}

/** For each place of the tree the messages that stand there, oldest first: versions of one another. */
export function versions(state: Conversation): Map<string, Message[]> {
  const places = new Map<string, Message[]>();
  for (const message of state.messages.values()) {
    const key = place(message);
    const beside = places.get(key);
    if (beside) beside.push(message);
    else places.set(key, [message]);
  }
  return places;
}

export const place = (message: Message): string => `${message.role} ${message.parentId ?? ""}`;

/** The newest message below this one: where a branch is taken up again. */
export function tip(state: Conversation, message: Message): Message {
  let at = message;
  for (;;) {
    const children = [...state.messages.values()].filter((each) => each.parentId === at.id);
    if (!children.length) return at;
    at = children[children.length - 1];
  }
}

const find = (state: Conversation, id: string | null) => (id === null ? undefined : state.messages.get(id));
const codePoints = (text: string) => text.length - (text.match(/[\uD800-\uDBFF][\uDC00-\uDFFF]/g)?.length ?? 0);

function toMessage(message: StoredMessage): Message {
  const text = message.content.map((part) => part.text ?? "").join("");
  return {
    id: message.id, parentId: message.parent_id ?? null, role: message.role, text, response: message.response,
    resumed: message.response?.resumed,
  };
}

function put(state: Conversation, message: Message, rest: Partial<Conversation> = {}): Conversation {
  return { ...state, ...rest, messages: new Map(state.messages).set(message.id, message) };
}

/** The state after an event; null where text is missing before it. */
function applied(state: Conversation, event: SessionEvent): Conversation | null {
  switch (event.type) {
    case "session.created":
    case "session.updated":
      return withSession(state, event.session as Session);
    case "session.deleted":
      return { ...state, deleted: true };
    case "message.created": {
      const message = toMessage(event.message as StoredMessage);
      return put(state, message, { headId: message.id });
    }
    case "response.created":
      return begin(state, event.response as Response);
    default:
      return TERMINAL.has(event.type) ? end(state, event.response as Response) : inReply(state, event);
  }
}

function withSession(state: Conversation, session: Session): Conversation {
  const headId = state.active ? state.headId : (session.head_id ?? state.headId);
  return { ...state, session: { ...state.session, ...session }, headId };
}

function begin(state: Conversation, response: Response): Conversation {
  const known = state.messages.get(response.message_id);
  const reply: Message = {
    id: response.message_id, parentId: response.parent_id, role: "assistant",
    text: response.text ?? known?.text ?? "", response,
  };
  return put(state, reply, { headId: reply.id, active: response });
}

function end(state: Conversation, response: Response): Conversation {
  const active = state.active?.id === response.id ? null : state.active;
  const reply = state.messages.get(response.message_id);
  const used = response.usage?.total_tokens;
  const context = state.context && used !== undefined ? contextOf(state.context.max_tokens, used) : state.context;
  if (!reply) return { ...state, active, context };
  return put(state, { ...reply, text: response.text ?? reply.text, response }, { active, context });
}

function contextOf(maxTokens: number, used: number): Context {
  return { used_tokens: used, max_tokens: maxTokens, left_tokens: Math.max(0, maxTokens - used) };
}

function inReply(state: Conversation, event: SessionEvent): Conversation | null {
  const reply = state.active && state.messages.get(state.active.message_id);
  if (!state.active || !reply || event.response_id !== state.active.id) return state;
  if (event.type === "response.output_text.delta") return addText(state, reply, event);
  if (event.type === "response.output_text.done") return put(state, { ...reply, text: event.text as string });
  if (event.type === "response.resumed") return resume(state, reply, event.offset as number);
  if (event.type !== "response.in_progress") return state;
  const { usage, cache } = event as unknown as Response;
  return put(state, { ...reply, response: { ...state.active, usage, cache } });
}

function addText(state: Conversation, reply: Message, event: SessionEvent): Conversation | null {
  const known = codePoints(reply.text) - (event.offset as number);
  if (known < 0) return null;
  const delta = event.delta as string;
  return put(state, { ...reply, text: reply.text + (known ? [...delta].slice(known).join("") : delta) });
}

function resume(state: Conversation, reply: Message, offset: number): Conversation | null {
  if (codePoints(reply.text) < offset) return null;
  return put(state, { ...reply, text: [...reply.text].slice(0, offset).join(""), resumed: true });
}
