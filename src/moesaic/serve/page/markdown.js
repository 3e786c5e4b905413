// Markdown as far as models write it, made of elements and text nodes: no text of a model is ever read as HTML.
import { button, el } from "./dom.js";

const FENCE = /^\s*(`{3,}|~{3,})\s*([^\s`]*)[^`]*$/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;
const HEADING = /^(#{1,6})\s+(.*?)\s*#*$/;
const RULE = /^ {0,3}([-*_])(\s*\1){2,}\s*$/;
const QUOTE = /^ {0,3}> ?/;
const DIVIDER = /^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$/;

/** A text cut into blocks, {kind, lines}. Joined again by newlines the lines are the text, so that a text that only
 * gets longer keeps all its blocks but the last. */
export function blocksOf(text) {
  const blocks = [];
  let open = null;
  for (const line of text.split("\n")) {
    const kind = kindOf(line, open);
    if (open && goesOn(open, kind, line)) {
      open.lines.push(line);
      if (open.kind === "code" && isClosing(line, open)) open.closed = true;
    } else {
      open = { kind, lines: [line], fence: kind === "code" ? FENCE.exec(line)[1] : null, closed: false };
      blocks.push(open);
    }
  }
  return blocks;
}

function kindOf(line, open) {
  if (open && open.kind === "code" && !open.closed) return "code";
  if (!line.trim()) return "blank";
  if (FENCE.test(line)) return "code";
  if (HEADING.test(line)) return "heading";
  if (RULE.test(line)) return "rule";
  if (QUOTE.test(line)) return "quote";
  if (ITEM.test(line)) return "list";
  return line.includes("|") && line.trim().startsWith("|") ? "table" : "paragraph";
}

function goesOn(open, kind, line) {
  if (open.kind === "code") return !open.closed;
  if (open.kind === "list") return kind === "list" || (/^\s+\S/.test(line) && kind !== "blank");
  return open.kind === kind && ["paragraph", "quote", "table", "blank"].includes(kind);
}

const isClosing = (line, open) => line.trim().startsWith(open.fence) && !line.trim().replace(/[`~]/g, "");

/** The elements of a block; none of a blank one. */
export function render(block) {
  const { kind, lines } = block;
  if (kind === "blank") return [];
  if (kind === "code") return [codeBlock(block)];
  if (kind === "heading") {
    const [, marks, title] = HEADING.exec(lines[0]);
    return [el("h" + Math.min(6, marks.length + 3), {}, ...inline(title))];
  }
  if (kind === "rule") return [el("hr")];
  if (kind === "quote") return [el("blockquote", {}, ...inline(lines.map((line) => line.replace(QUOTE, "")).join("\n")))];
  if (kind === "list") return lists(lines);
  if (kind === "table" && lines.length > 1 && DIVIDER.test(lines[1])) return [table(lines)];
  return [el("p", {}, ...inline(lines.join("\n")))];
}

function codeBlock({ lines, closed }) {
  const language = FENCE.exec(lines[0])[2];
  const text = lines.slice(1, closed ? -1 : undefined).join("\n");
  const copy = button("Copy", async () => {
    await navigator.clipboard.writeText(text);
    copy.textContent = "Copied";
    setTimeout(() => (copy.textContent = "Copy"), 1500);
  });
  return el("div", { class: "code" }, el("div", {}, el("span", {}, language), copy), el("pre", { tabindex: 0 }, el("code", {}, text)));
}

/** Lists in lists by how far items are indented; a line that is no item goes on with the one before. */
function lists(lines) {
  const roots = [];
  const stack = []; // {indent, list, ordered}
  let item = null;
  for (const line of lines) {
    const found = ITEM.exec(line);
    if (!found) {
      item.append("\n", ...inline(line.trim()));
      continue;
    }
    const [, space, mark, text] = found;
    const ordered = /\d/.test(mark);
    while (stack.length && stack.at(-1).indent > space.length) stack.pop();
    let top = stack.at(-1);
    if (!top || top.indent < space.length || top.ordered !== ordered) {
      if (top && top.indent === space.length) stack.pop();
      const list = el(ordered ? "ol" : "ul", ordered && parseInt(mark) !== 1 ? { start: parseInt(mark) } : {});
      const parent = stack.at(-1);
      if (parent) parent.list.lastElementChild.append(list);
      else roots.push(list);
      top = { indent: space.length, list, ordered };
      stack.push(top);
    }
    item = el("li", {}, ...inline(text));
    top.list.append(item);
  }
  return roots;
}

function table(lines) {
  const cells = (line) => line.trim().replace(/^\||\|$/g, "").split("|").map((cell) => cell.trim());
  const row = (line, tag) => el("tr", {}, ...cells(line).map((cell) => el(tag, {}, ...inline(cell))));
  const body = lines.slice(2).map((line) => row(line, "td"));
  return el("div", { class: "table" }, el("table", {}, el("thead", {}, row(lines[0], "th")), el("tbody", {}, ...body)));
}

// Code first: nothing in it means anything. A mark of emphasis begins before a letter and ends after one. Lengths are
// bounded, so that a text full of marks that never end costs little.
const INLINE = new RegExp(
  [
    /(`+)([^`\n]|[^`\n][^\n]{0,1000}?[^`\n])\1(?!`)/,
    /\*\*(?=\S)([^\n]{0,1000}?\S)\*\*/,
    /(?<!\w)__(?=\S)([^\n]{0,1000}?\S)__(?!\w)/,
    /\*(?=[^\s*])([^*\n]{0,1000}?[^\s*])\*/,
    /(?<!\w)_(?=[^\s_])([^_\n]{0,1000}?[^\s_])_(?!\w)/,
    /~~(?=\S)([^\n]{0,1000}?\S)~~/,
    /\[([^\][\n]{1,1000})\]\((https?:\/\/[^\s()]{1,2000})\)/,
    /\\([\\`*_~[\]#>|-])/,
  ].map((part) => part.source).join("|"),
  "g",
);

function inline(text, depth = 0) {
  if (depth > 4) return [text];
  const parts = [];
  let end = 0;
  for (const found of text.matchAll(INLINE)) {
    if (found.index > end) parts.push(text.slice(end, found.index));
    parts.push(marked(found, depth));
    end = found.index + found[0].length;
  }
  if (end < text.length) parts.push(text.slice(end));
  return parts;
}

function marked([, , code, strong, strong2, weak, weak2, struck, label, address, escaped], depth) {
  const inside = (inner) => inline(inner, depth + 1);
  if (code !== undefined) return el("code", {}, code.trim() || code);
  if (strong ?? strong2) return el("strong", {}, ...inside(strong ?? strong2));
  if (weak ?? weak2) return el("em", {}, ...inside(weak ?? weak2));
  if (struck) return el("s", {}, ...inside(struck));
  if (label) return el("a", { href: address, rel: "noopener noreferrer nofollow", target: "_blank", title: address }, label);
  return escaped;
}
