import { defineConfig } from "vite";

// One script and one style sheet: `lerobot-attn export-html` puts both into a single file.
export default defineConfig({
  base: "./",
  build: {
    outDir: "../static",
    emptyOutDir: true,
    target: "es2023",
    modulePreload: false,
    assetsInlineLimit: 100_000,
    cssCodeSplit: false,
  },
  oxc: { jsx: { runtime: "automatic", importSource: "preact" } },
  server: { proxy: { "/api": "http://127.0.0.1:8123" } },
});
