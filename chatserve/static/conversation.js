// One session as the page knows it: the tree of messages and the branch that is shown, kept up by events. No DOM.

const TERMINAL = new Set(["response.completed", "response.incomplete", "response.cancelled", "response.failed"]);

const textOf = (message) => message.content.map((part) => part.text ?? "").join("");
const codePoints = (text) => { let count = 0; for (const _ of text) count++; return count; };

export class Conversation {
  constructor(snapshot) {
    this.id = snapshot.id;
    this.messages = new Map();
    for (const message of snapshot.messages) {
      this.messages.set(message.id, { ...message, text: textOf(message) });
    }
    this.headId = snapshot.head_id ?? null;
    this.context = snapshot.context ?? null;
    this.active = null;
    if (snapshot.active_response) this.#begin(snapshot.active_response);
  }

  // The messages from the first one to the head.
  branch() {
    const path = [];
    for (let at = this.messages.get(this.headId); at; at = this.messages.get(at.parent_id)) path.push(at);
    return path.reverse();
  }

  // Take an event. Returns what changed: "branch", "reply", "ended", "meta", "deleted", or "gap" where text is missing.
  apply(event) {
    if (event.type === "message.created") return this.#addMessage(event.message);
    if (event.type === "response.created") return this.#begin(event.response);
    if (event.type === "session.deleted") return "deleted";
    if (event.type === "session.updated") return this.#updateSession(event.session);
    if (TERMINAL.has(event.type)) return this.#end(event.response);
    const reply = this.active && this.messages.get(this.active.message_id);
    if (!reply || event.response_id !== this.active.id) return "";
    if (event.type === "response.output_text.delta") return this.#addText(reply, event);
    if (event.type === "response.output_text.done") reply.text = event.text;
    if (event.type === "response.in_progress") reply.response = { ...reply.response, usage: event.usage };
    return "reply";
  }

  #addMessage(message) {
    this.messages.set(message.id, { ...message, text: textOf(message) });
    this.headId = message.id;
    return "branch";
  }

  #begin(response) {
    const known = this.messages.get(response.message_id);
    const text = response.text ?? known?.text ?? "";
    this.messages.set(response.message_id, {
      id: response.message_id, parent_id: response.parent_id, role: "assistant", text, response,
    });
    this.headId = response.message_id;
    this.active = response;
    return "branch";
  }

  #addText(reply, { offset, delta }) {
    const have = codePoints(reply.text);
    if (offset > have) return "gap";
    const known = have - offset;
    reply.text += known ? [...delta].slice(known).join("") : delta;
    return "reply";
  }

  #end(response) {
    const reply = this.messages.get(response.message_id);
    if (reply) Object.assign(reply, { text: response.text ?? reply.text, response });
    if (this.active?.id === response.id) this.active = null;
    if (response.usage && this.context) {
      this.context = { ...this.context, used_tokens: response.usage.total_tokens };
    }
    return "ended";
  }

  #updateSession(session) {
    if (session.head_id && session.head_id !== this.headId && !this.active) this.headId = session.head_id;
    return "branch";
  }
}

// One line on how a reply went and what it cost.
export function describeReply(response) {
  if (!response) return "";
  const parts = [];
  if (response.status === "cancelled") parts.push("stopped");
  if (response.status === "failed") parts.push(`failed: ${response.error?.message ?? "no reason given"}`);
  if (response.status === "incomplete") parts.push(`cut off (${response.incomplete_details?.reason ?? "limit"})`);
  const number = (value) => Math.round(value).toLocaleString("en");
  if (response.usage) {
    const cached = response.usage.input_tokens_details.cached_tokens;
    parts.push(`${number(cached)} of ${number(response.usage.input_tokens)} input tokens cached`);
  }
  if (response.timings) {
    parts.push(`first token ${number(response.timings.ttft_ms)} ms`);
    if (response.timings.tokens_per_second) parts.push(`${number(response.timings.tokens_per_second)} tokens/s`);
  }
  return parts.join(" · ");
}

// One line on where a session's history is.
export function describeMemory({ tokens, device, host = 0, disk = 0 }) {
  if (!tokens) return "";
  const places = [[device, "on the device"], [host, "in host memory"], [disk, "on disk"]];
  const parts = places.filter(([count]) => count).map(([count, place]) => `${count.toLocaleString("en")} ${place}`);
  return `history: ${parts.join(", ") || "nowhere"}`;
}
