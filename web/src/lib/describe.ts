// Words and figures for what only this server can tell.

import type { Response, Tier } from "./types.ts";

const PLACES: Record<Tier, string> = { device: "device", host: "host memory", disk: "disk" };
const REASONS: Record<string, string> = {
  first_turn: "first turn: there was nothing to reuse yet",
  input_changed: "the history was changed before this turn",
  template_changed: "the chat template writes earlier messages differently now",
  evicted: "the history was forgotten to make room",
  not_saved: "the history was not among what was saved",
  expired: "the saved history was let go to make room on the disk",
  checksum_failed: "the saved history was damaged",
  read_failed: "the saved history could not be read",
  model_changed: "the model has changed since",
};
const LIMITS: Record<string, string> = {
  max_output_tokens: "reached the reply's length limit",
  context_window: "the context is full: fork an earlier message, or start a new session",
};

export const TIERS: Tier[] = ["device", "host", "disk"];

export const count = (value: number): string => Math.round(value).toLocaleString("en");

export function milliseconds(value: number): string {
  return value < 1000 ? `${count(value)} ms` : `${(value / 1000).toFixed(1)} s`;
}

export function bytes(value: number): string {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  const power = Math.min(units.length - 1, Math.floor(Math.log2(Math.max(1, value)) / 10));
  return `${(value / 1024 ** power).toFixed(power && value / 1024 ** power < 100 ? 1 : 0)} ${units[power]}`;
}

export const place = (tier: Tier): string => PLACES[tier];

/** Why a reply ended as it did; "" where it simply came to its end. */
export function ending(response: Response | undefined): string {
  if (response?.status === "cancelled") return "Stopped";
  if (response?.status === "failed") return `Failed: ${response.error?.message ?? "why is not known any more"}`;
  if (response?.status !== "incomplete") return "";
  const reason = response.incomplete_details?.reason ?? "";
  return `Cut off: ${LIMITS[reason] ?? reason}`;
}

/** Whether a reply that ended early can go on where it stopped. */
export function canContinue(response: Response | undefined): boolean {
  if (response?.status === "incomplete") return response.incomplete_details?.reason !== "context_window";
  return response?.status === "cancelled" || response?.status === "failed";
}

/** The short line under a reply. */
export function badge(response: Response | undefined): string[] {
  if (!response?.usage) return [];
  const { input_tokens, cached_tokens_details: held } = response.usage;
  const parts = [reused(count(input_tokens), held)];
  const { ttft_ms = 0, tokens_per_second = 0 } = response.timings ?? {};
  if (ttft_ms) parts.push(`${milliseconds(ttft_ms)} to first token`);
  if (tokens_per_second) parts.push(`${count(tokens_per_second)} tokens/s`);
  return parts;
}

function reused(input: string, held: Record<Tier, number>): string {
  const tiers = TIERS.filter((tier) => held[tier]);
  if (!tiers.length) return `0 of ${input} reused`;
  if (tiers.length === 1) return `${count(held[tiers[0]])} of ${input} from ${PLACES[tiers[0]]}`;
  return `${tiers.map((tier) => `${count(held[tier])} from ${PLACES[tier]}`).join(" + ")} of ${input}`;
}

/** The badge in full: rows of a name and a value. */
export function costs(response: Response): [string, string][] {
  const rows: [string, string][] = [];
  const { usage, timings, cache } = response;
  if (usage) {
    rows.push(["Input", `${count(usage.input_tokens)} tokens, ${count(usage.input_tokens_details.cached_tokens)} reused`]);
    rows.push(...TIERS.map((tier): [string, string] => [`From ${PLACES[tier]}`, count(usage.cached_tokens_details[tier])]));
    rows.push(["Output", `${count(usage.output_tokens)} tokens`]);
  }
  const reason = missed(cache?.reason);
  if (reason) rows.push(["Not all reused", reason]);
  if (timings) {
    rows.push(["Waited", milliseconds(timings.queue_ms)], ["Brought back in", milliseconds(timings.restore_ms)]);
    rows.push(["Prompt computed in", milliseconds(timings.prefill_ms)], ["First token after", milliseconds(timings.ttft_ms)]);
    rows.push(["Reply took", milliseconds(timings.decode_ms)]);
  }
  rows.push(["Model", response.model]);
  return rows;
}

/** Why not everything was reused, in words. */
export function missed(reason: string | null | undefined): string {
  return reason ? (REASONS[reason] ?? reason) : "";
}

/** A session's name made of its first words. */
export function titleFrom(text: string): string {
  const line = text.trim().split(/\s+/).join(" ");
  const characters = [...line];
  if (characters.length <= 48) return line;
  const cut = characters.slice(0, 47).join("");
  return `${cut.slice(0, Math.max(cut.lastIndexOf(" "), 24))}…`;
}

/** When something was, as a list says it. */
export function ago(ms: number, now: number): string {
  const day = 86_400_000;
  if (now - ms < day) return "Today";
  if (now - ms < 2 * day) return "Yesterday";
  return now - ms < 7 * day ? "Last 7 days" : "Older";
}
