// The reducer, on logs that tests/page/record_logs.py recorded from a real server.
import { readdirSync, readFileSync } from "node:fs";
import { describe, expect, it } from "vitest";
import { branch, type Conversation, fromSnapshot, place, reduce, tip, type Verdict, versions } from "../src/lib/reducer.ts";
import type { SessionEvent, Snapshot } from "../src/lib/types.ts";

const DATA = new URL("../../tests/page/data/", import.meta.url);
interface Log { snapshot: Snapshot; arrivals: { verdict: Verdict; event: SessionEvent }[] }
const names = readdirSync(DATA).filter((name) => name.endsWith(".json"));
const read = (name: string): Log => JSON.parse(readFileSync(new URL(name, DATA), "utf8"));

function empty({ snapshot }: Log): Conversation {
  const before = { ...snapshot, title: "", head_seq: 0, head_id: null, messages: [], active_response: null };
  return fromSnapshot(before);
}

const said = (state: Conversation) => branch(state).map(({ id, role, text }) => ({ id, role, text }));

describe.each(names)("%s", (name) => {
  const log = read(name);

  it("comes to the server's snapshot, whatever the line repeated, merged or left out", () => {
    let state = empty(log);
    for (const { verdict, event } of log.arrivals) {
      const next = reduce(state, event);
      expect(next.verdict).toBe(verdict);
      state = next.state;
    }
    const expected = fromSnapshot(log.snapshot);
    expect(said(state)).toEqual(said(expected));
    expect([...state.messages.keys()].sort()).toEqual([...expected.messages.keys()].sort());
    expect(state.session.title).toBe(log.snapshot.title);
    expect({ seq: state.seq, active: state.active }).toEqual({ seq: log.snapshot.head_seq, active: null });
  });

  it("goes on from a snapshot in the middle of a reply", () => {
    const applied = log.arrivals.filter(({ verdict }) => verdict === "apply").map(({ event }) => event);
    let state = empty(log);
    for (const event of applied) state = reduce(state, event).state;
    const cut = applied.findIndex((event) => event.type.endsWith(".delta")) + 1;
    let half = applied.slice(0, cut).reduce((each, event) => reduce(each, event).state, empty(log));
    const active = { ...half.active!, text: half.messages.get(half.headId!)!.text };
    const stored = [...half.messages.values()].map((each) => ({
      id: each.id, parent_id: each.parentId, role: each.role, created_at: 0, content: [{ type: "text", text: each.text }],
    }));
    half = fromSnapshot({ ...log.snapshot, head_seq: half.seq, head_id: half.headId, messages: stored, active_response: active });
    for (const event of applied) half = reduce(half, event).state; // what is known is dropped
    expect(said(half)).toEqual(said(state));
  });
});

describe("the tree", () => {
  const state = fromSnapshot(read("branches.json").snapshot);

  it("knows the other versions of a message, and where each branch ends", () => {
    const first = branch(state)[0];
    const beside = versions(state).get(place(first))!;
    expect(beside.map(({ text }) => text)).toEqual(["My cat is called Möhre 🐈 and my name is Zoë.", "My cat is called Momo."]);
    expect(tip(state, beside[1]).parentId).toBe(beside[1].id);
    expect(versions(state).get(place(branch(state)[1]))!.length).toBe(2);
  });

  it("sees text that is missing", () => {
    const response = { id: "r", message_id: "m", parent_id: state.headId!, model: "x", status: "in_progress" };
    const event = (seq: number, fields: object) => ({ session_id: state.id, ts: 0, seq, ...fields }) as SessionEvent;
    const begun = reduce(state, event(state.seq + 1, { type: "response.created", response })).state;
    const delta = { type: "response.output_text.delta", response_id: "r", delta: "x", offset: 1 };
    expect(reduce(begun, event(begun.seq + 1, delta)).verdict).toBe("gap");
  });

  it("takes an interruption back to where the reply goes on, in code points", () => {
    const response = { id: "r", message_id: "m", parent_id: state.headId!, model: "x", status: "in_progress", text: "🐈ab" };
    const event = (seq: number, fields: object) => ({ session_id: state.id, ts: 0, seq, ...fields }) as SessionEvent;
    const begun = reduce(state, event(state.seq + 1, { type: "response.created", response })).state;
    const resumed = reduce(begun, event(begun.seq + 1, { type: "response.resumed", response_id: "r", offset: 2 })).state;
    const after = reduce(resumed, event(resumed.seq + 1, { type: "response.output_text.delta", response_id: "r", offset: 2, delta: "c" })).state;
    expect(after.messages.get("m")).toMatchObject({ text: "🐈ac", resumed: true });
  });

  it("is told which replies of a snapshot were interrupted", () => {
    const { snapshot } = read("branches.json");
    const messages = snapshot.messages.map((each) => (each.response ? { ...each, response: { ...each.response, resumed: true } } : each));
    const marked = [...fromSnapshot({ ...snapshot, messages }).messages.values()].filter(({ resumed }) => resumed);
    expect(marked.map(({ role }) => role)).toEqual(messages.filter(({ response }) => response).map(() => "assistant"));
  });
});
