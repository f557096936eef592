// Everything is built to files with hashed names: no inline script, no inline style, nothing from elsewhere.
import { svelte } from "@sveltejs/vite-plugin-svelte";
import { defineConfig } from "vitest/config";

export default defineConfig({
  plugins: [svelte()],
  build: {
    outDir: "../chatserve/static",
    emptyOutDir: true,
    assetsInlineLimit: 0,
    modulePreload: { polyfill: false },
    target: "es2022",
    reportCompressedSize: false,
    license: { fileName: "licenses.md" },
  },
  server: { proxy: { "/v1": { target: "http://127.0.0.1:8000", ws: true }, "/metrics": "http://127.0.0.1:8000", "/version": "http://127.0.0.1:8000" } },
  test: { include: ["test/**/*.test.ts"] },
});
