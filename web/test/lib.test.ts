// Words, figures and blocks.
import { expect, it } from "vitest";
import { badge, titleFrom } from "../src/lib/describe.ts";
import { meanBetween, parseFigures, total } from "../src/lib/figures.ts";
import type { Response } from "../src/lib/types.ts";

it("names a session after its first words", () => {
  expect(titleFrom("  my cat\n is  called Momo ")).toBe("my cat is called Momo");
  expect(titleFrom("one two three four five six seven eight nine ten eleven")).toBe("one two three four five six seven eight nine…");
});

it("says where the reused tokens came from", () => {
  const usage = { input_tokens: 1200, input_tokens_details: { cached_tokens: 1100 }, output_tokens: 5, total_tokens: 1205, cached_tokens_details: { device: 0, host: 1000, disk: 100 } };
  const timings = { queue_ms: 0, restore_ms: 2, prefill_ms: 3, ttft_ms: 12, decode_ms: 9, tokens_per_second: 210.4 };
  const response = { usage, timings } as Response;
  expect(badge(response)).toEqual(["1,000 from host memory + 100 from disk of 1,200", "12 ms to first token", "210 tokens/s"]);
  const one = { ...usage, cached_tokens_details: { device: 0, host: 1100, disk: 0 } };
  expect(badge({ usage: one } as Response)).toEqual(["1,100 of 1,200 from host memory"]);
  const none = { ...usage, cached_tokens_details: { device: 0, host: 0, disk: 0 } };
  expect(badge({ usage: none } as Response)).toEqual(["0 of 1,200 reused"]);
});

it("reads Prometheus' text", () => {
  const text = '# HELP x\nchatserve_a{tier="host"} 1.0\nchatserve_a{tier="disk"} 2.5\nchatserve_t_sum 3.0\nchatserve_t_count 2.0\n';
  const figures = parseFigures(text);
  expect(total(figures, "a")).toBe(3.5);
  expect(meanBetween(new Map(), figures, "t")).toBe(1.5);
  expect(meanBetween(figures, figures, "t")).toBeNull();
});
