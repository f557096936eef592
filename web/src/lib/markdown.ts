// Markdown as safe HTML, block by block, so that what is finished is not made again while more streams in.

import DOMPurify from "dompurify";
import { Marked, type Token } from "marked";
import remend from "remend";

export interface Block {
  kind: "html" | "code";
  raw: string;
  /** Of code: its language and text. */
  language: string;
  code: string;
}

// Raw HTML is shown as it was written, and an image as a link to it: nothing is fetched from elsewhere.
const marked = new Marked({
  gfm: true,
  breaks: true,
  renderer: {
    html: ({ text }) => escape(text),
    checkbox: ({ checked }) => (checked ? "☑ " : "☐ "),
    image: ({ href, text }) => `<a href="${escape(href)}">${escape(text || href)}</a>`,
  },
});

function escape(text: string): string {
  const names: Record<string, string> = { "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#39;" };
  return text.replace(/[&<>"']/g, (character) => names[character]);
}

/** Splits a growing text; only what stands behind the last but one block is read again. */
export class BlockReader {
  private text = "";
  private tokens: Token[] = [];
  private blocks: Block[] = [];

  read(text: string): Block[] {
    const kept = text.startsWith(this.text) ? this.tokens.slice(0, -2) : [];
    const done = kept.reduce((length, token) => length + token.raw.length, 0);
    this.tokens = [...kept, ...marked.lexer(text.slice(done))];
    this.text = text;
    const shown = this.tokens.filter((token) => token.type !== "space" && token.type !== "def");
    if (this.tokens.map((token) => token.raw).join("") !== text) this.tokens = [];  // line ends that marked rewrote
    this.blocks = shown.map((token, index) => (this.blocks[index]?.raw === token.raw ? this.blocks[index] : toBlock(token)));
    return this.blocks;
  }
}

function toBlock(token: Token): Block {
  if (token.type !== "code") return { kind: "html", raw: token.raw, language: "", code: "" };
  return { kind: "code", raw: token.raw, language: (token.lang ?? "").split(/\s/)[0].toLowerCase(), code: token.text };
}

/** The HTML of one block; `isGrowing`: markup that is still open is closed for now. */
export function blockHtml(raw: string, isGrowing: boolean): string {
  const html = marked.parse(isGrowing ? remend(raw, { linkMode: "text-only" }) : raw, { async: false });
  return DOMPurify.sanitize(html, { FORBID_ATTR: ["style", "class", "id", "name"], FORBID_TAGS: ["style", "form", "input", "button", "textarea", "select", "img", "svg", "math", "video", "audio"] });
}

DOMPurify.addHook("afterSanitizeAttributes", (node) => {
  if (node.tagName !== "A") return;
  node.setAttribute("target", "_blank");
  node.setAttribute("rel", "noopener noreferrer");
});
