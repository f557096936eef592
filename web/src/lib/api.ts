// The HTTP side: lists, documents, figures. A refusal becomes an Error with the server's own words.

import type { HeldTokens, Session } from "./types.ts";

const PAGE = 200;
const TIMEOUT_MS = 10_000; // of what is asked by itself: a line may be dead without saying so
let token: string | null = null;

export function useToken(value: string | null): void {
  token = value;
}

async function request(path: string, options: RequestInit = {}): Promise<globalThis.Response> {
  const headers: Record<string, string> = token ? { Authorization: `Bearer ${token}` } : {};
  const response = await fetch(path, { ...options, headers: { ...headers, ...(options.headers ?? {}) } }).catch(() => null);
  if (!response) throw new Error("The server does not answer; try again when the page is connected.");
  if (response.ok) return response;
  const body = await response.json().catch(() => null);
  throw new Error(body?.error?.message ?? `The server answered ${response.status}; try again.`);
}

async function read(path: string): Promise<globalThis.Response> {
  return request(path, { signal: AbortSignal.timeout(TIMEOUT_MS) });
}

/** All sessions, the newest first. */
export async function listSessions(): Promise<Session[]> {
  const sessions: Session[] = [];
  for (let before = ""; ; before = `&before=${sessions[sessions.length - 1].id}`) {
    const page = await (await read(`/v1/sessions?limit=${PAGE}${before}`)).json();
    sessions.push(...page.data);
    if (!page.has_more) return sessions;
  }
}

/** The latest sessions, at most 200, in whose title or messages all these words stand. */
export async function searchSessions(words: string): Promise<Session[]> {
  return (await (await read(`/v1/sessions?limit=${PAGE}&search=${encodeURIComponent(words)}`)).json()).data;
}

/** Delete a session for good; goes through even while the page is being closed. */
export async function deleteSession(id: string): Promise<void> {
  await request(`/v1/sessions/${id}`, { method: "DELETE", keepalive: true });
}

/** Where a session's tokens are now. */
export async function heldTokens(id: string): Promise<HeldTokens> {
  return (await read(`/v1/sessions/${id}/cache`)).json();
}

export async function exportSession(id: string, format: "json" | "markdown"): Promise<Blob> {
  return (await request(`/v1/sessions/${id}/export?format=${format}`)).blob();
}

export async function importSession(document: Blob): Promise<Session> {
  const headers = { "Content-Type": "application/json" };
  return (await request("/v1/sessions/import", { method: "POST", body: document, headers })).json();
}

export async function serverFigures(): Promise<string> {
  return (await read("/metrics")).text();
}

export async function serverVersion(): Promise<Record<string, string | number>> {
  return (await read("/version")).json();
}
