// The objects of protocol chatserve.v1, as docs/protocol.md describes them, and the page's own.

export type Status = "in_progress" | "completed" | "incomplete" | "cancelled" | "failed";
export type Tier = "device" | "host" | "disk";

export interface ErrorObject {
  code: string;
  message: string;
  retryable?: boolean;
  retry_after_ms?: number;
}

export interface Usage {
  input_tokens: number;
  input_tokens_details: { cached_tokens: number };
  output_tokens: number;
  total_tokens: number;
  cached_tokens_details: Record<Tier, number>;
}

export interface Timings {
  queue_ms: number;
  restore_ms: number;
  prefill_ms: number;
  ttft_ms: number;
  decode_ms: number;
  tokens_per_second: number;
}

export interface Cache {
  result: "hit" | "partial" | "miss";
  restored_from: Tier | null;
  reason: string | null;
}

export interface Response {
  id: string;
  message_id: string;
  parent_id: string;
  model: string;
  status: Status;
  text?: string;
  usage?: Usage;
  timings?: Timings;
  cache?: Cache;
  resumed?: boolean;
  incomplete_details?: { reason: string };
  error?: ErrorObject;
}

export interface Params {
  temperature?: number;
  top_p?: number;
  top_k?: number;
  min_p?: number;
  max_output_tokens?: number;
  seed?: number;
  stop?: string[];
}

export interface Session {
  id: string;
  title: string;
  instructions: string;
  metadata: Record<string, string>;
  params: Params;
  archived: boolean;
  pinned: boolean;
  created_at: number;
  updated_at: number;
  head_id: string | null;
  num_messages: number;
}

export interface StoredMessage {
  id: string;
  parent_id?: string | null;
  role: "user" | "assistant" | "system";
  content: { type: string; text?: string }[];
  created_at: number;
  response?: Response;
}

export interface Context {
  used_tokens: number;
  max_tokens: number;
  left_tokens: number;
}

export interface Snapshot extends Session {
  epoch: number;
  head_seq: number;
  messages: StoredMessage[];
  active_response: Response | null;
  context: Context;
}

export interface SessionEvent {
  type: string;
  session_id: string;
  seq: number;
  seq_from?: number;
  ts: number;
  [field: string]: unknown;
}

export interface Attached {
  type: "session.attached";
  id?: string;
  session_id: string;
  epoch: number;
  head_seq: number;
  mode: "replay" | "snapshot";
  snapshot?: Snapshot;
}

export interface Welcome {
  type: "welcome";
  server: { name: string; version: string };
  models: { id: string; max_context: number }[];
  heartbeat_ms: number;
}

export interface HeldTokens extends Record<Tier, number> {
  tokens: number;
  restore_ms_estimate: number;
}

/** A short notice. */
export interface Toast {
  text: string;
  undo?: () => void;
}

/** What was said and is not in the log yet; its text is kept as the draft of where it was written. */
export interface Pending {
  writtenIn: string | null;
  sessionId: string | null;
  text: string;
  messageId?: string;
}
