// Writes what the build was made from to static/build.json, and refuses a first load beyond its budget.
// tests/page/test_build.py makes the same hash of web/ and compares.
import { createHash } from "node:crypto";
import { readdirSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { gzipSync } from "node:zlib";

const BUDGET_BYTES = 120 * 1024;
const BUILT = "../chatserve/static";
const SOURCES = ["index.html", "package.json", "package-lock.json", "svelte.config.js", "tsconfig.json", "vite.config.ts"];

function filesUnder(directory) {
  const entries = readdirSync(directory, { withFileTypes: true, recursive: true });
  return entries.filter((entry) => entry.isFile()).map((entry) => join(entry.parentPath, entry.name));
}

function sourceHash() {
  const hash = createHash("sha256");
  for (const path of [...SOURCES, ...filesUnder("public"), ...filesUnder("scripts"), ...filesUnder("src")].sort()) {
    hash.update(`${path}\0`).update(readFileSync(path)).update("\0");
  }
  return hash.digest("hex");
}

function firstLoad() {
  const html = readFileSync(join(BUILT, "index.html"), "utf8");
  const named = [...html.matchAll(/(?:src|href)="\.?\/?([^"]+)"/g)].map((match) => match[1]);
  return ["index.html", ...named];
}

const zipped = (path) => gzipSync(readFileSync(join(BUILT, path))).length;
const first = firstLoad();
const bytes = first.reduce((sum, path) => sum + zipped(path), 0);
writeFileSync(join(BUILT, "build.json"), `${JSON.stringify({ sources: sourceHash() })}\n`);
for (const path of filesUnder(join(BUILT, "assets")).map((path) => path.slice(BUILT.length + 1))) {
  console.log(`${String(zipped(path)).padStart(7)} B gzipped  ${path}${first.includes(path) ? "" : "  (when needed)"}`);
}
console.log(`first load: ${bytes} B gzipped of ${BUDGET_BYTES}`);
if (bytes > BUDGET_BYTES) throw new Error(`the first load has ${bytes} B gzipped, more than ${BUDGET_BYTES}; load something later`);
