// Markdown, read as the terminal's chat reads it (cli/chat/dialect.py), and links beside.
//
// Marks disappear only around `code`, **bold**, *italic* and _italic_ text and links, in fences and
// tables, before headings and items of lists. HTML, entities, images, escapes and mathematics are text.
// Elements are made one by one, and text is only ever set as text: nothing of an answer is HTML.

import { copyButton, make } from "./dom.js";
import markdownIt from "./vendor/markdown-it-15.0.3.js";

const DEEPEST = 40; // nested blocks, two for a list: beyond, a list is text

// Stars are marks beside spaces and punctuation, or in a script that is written without spaces.
// Beside other letters, digits and operators they are products, powers, patterns or pointers.
const NO_SPACES =
  "\\u0e00-\\u0eff\\u1000-\\u109f\\u1780-\\u17ff\\u2010-\\u205e\\u2600-\\u27bf\\u2e80-\\ua4cf" +
  "\\uac00-\\ud7af\\uf900-\\ufaff\\ufe0f\\uff00-\\uffef\\u{1f300}-\\u{1faff}\\u{20000}-\\u{3ffff}";
const BEFORE = `(?<![^\\s(\\["'\\-:,|${NO_SPACES}])`;
const AFTER = `(?![^\\s)\\]"'\\-:,|.;!?${NO_SPACES}])`;
// `int *a; char* b`, twice the star too, has the form of emphasis, and so has `2 *pi* r`.
const BOLD = "(?=\\S)(?:(?!\\*\\*(?!\\*))[^\\n;])+(?<!\\s)(?<!\\bchar)(?<!\\bint)(?<!\\bvoid)(?<!\\bfloat)";
const LETTER = "[\\p{L}\\p{Nl}\\p{No}]";
const WORDS = `${LETTER}{2,}(?:['’\\- ]${LETTER}+)*[.!?…]?`;
const NO_OPERAND = "(?<![\\d=+\\-*\\/^)]\\s)";
const STARS = new RegExp(
  `${BEFORE}(?:(?<bold>\\*\\*\\*|\\*\\*)(?<strong>${BOLD})\\k<bold>|${NO_OPERAND}\\*(?<em>${WORDS})\\*)${AFTER}`,
  "uy",
);
const UNDERSCORES =
  /(?<![^\s(\["'\-:,|*])_(?<em>[\p{L}\p{N}]+(?:[ _'’\-][\p{L}\p{N}]+)*[.!?…]?)_(?![^\s)\]"'\-:,|.;!?*])/uy;
const MATH =
  /\\\((?:(?!\\\().)*?\\\)|\\\[(?:(?!\\\[).)*?\\\]|\$\$(?:(?!\$\$).)*\$\$|\$(?![\s$])[^$\n]*(?<!\s)\$(?!\d)/suy;
const LINK = /\[(?<label>[^\[\]\n]+)\]\((?<href>(?:https?:\/\/|mailto:)(?:[^\s()<>"]|\([^\s()<>"]*\))+)\)/iuy;
const SAFE = /^(?:https?:\/\/|mailto:)/i;

const parser = made();

// Shows a text in `container`; what is there of an earlier, shorter text stays as far as it holds.
export function render(container, text) {
  const groups = grouped(parser.parse(text, {}));
  const lines = text.replace(/\r\n?/g, "\n").split("\n");
  groups.forEach((tokens, number) => {
    const [start, end] = tokens[0].map;
    const source = lines.slice(start, end).join("\n");
    const before = container.children[number];
    if (before?.source === source && before.kind === tokens[0].type) return;
    if (before && isGrown(before, tokens[0])) {
      before.querySelector("code").textContent = withoutEnd(tokens[0].content);
      before.source = source;
      return;
    }
    const block = blocks(tokens);
    block.source = source;
    block.kind = tokens[0].type;
    block.info = tokens[0].info;
    if (before) before.replaceWith(block);
    else container.append(block);
  });
  while (container.children.length > groups.length) container.lastChild.remove();
}

// Whether a block of code is the one that stood here, with more lines.
function isGrown(before, token) {
  return token.type === "fence" && before.kind === "fence" && before.info === token.info;
}

// The tokens of each block that is in no other.
function grouped(tokens) {
  const groups = [];
  for (const token of tokens) {
    if (token.level === 0 && token.nesting >= 0) groups.push([]);
    groups.at(-1).push(token);
  }
  return groups;
}

// The element of one block and what it holds.
function blocks(tokens) {
  const root = make("div");
  const path = [root];
  for (const token of tokens) {
    if (token.nesting < 0) path.pop().dir = "auto"; // once it is whole: each change would be weighed anew
    else if (token.type === "inline") path.at(-1).append(...inline(token.children));
    else {
      const element = blockOf(token);
      path.at(-1).append(element);
      if (token.nesting > 0) path.push(element);
    }
  }
  return root.firstChild;
}

function blockOf(token) {
  switch (token.type) {
    case "fence": return code(token.content, token.info.trim());
    case "code_block": return code(token.content, "");
    case "table": return table(token.content.split("\n"));
    case "list_item_open": return make("li", { value: token.info || undefined });
    case "bullet_list_open": return make("ul");
    case "ordered_list_open": return make("ol");
    case "heading_open": return make(`h${Math.min(Number(token.tag[1]) + 1, 6)}`);
    case "hr": return make("hr");
    default: return make("p", { class: token.hidden ? "tight" : undefined });
  }
}

function code(content, language) {
  const text = make("code", {}, withoutEnd(content));
  const copy = copyButton(() => text.textContent, { "aria-label": "Copy the code" });
  const bar = make("div", { class: "bar" }, make("span", {}, language), copy);
  return make("div", { class: "code" }, bar, make("pre", { tabindex: 0, dir: "ltr" }, text));
}

function withoutEnd(content) {
  return content.endsWith("\n") ? content.slice(0, -1) : content;
}

function table(rows) {
  const [header, dashes, ...body] = rows.map(cells);
  const columns = Math.max(header.length, ...body.map((row) => row.length));
  const row = (texts, tag) =>
    make("tr", {}, ...Array.from({ length: columns }, (_, n) => {
      const mark = dashes[n] ?? "";
      const align = mark.endsWith(":") ? (mark.startsWith(":") ? "centre" : "end") : undefined;
      return make(tag, { class: align, dir: "auto" }, ...inline(parser.parseInline(texts[n] ?? "", {})[0].children));
    }));
  const head = make("thead", {}, row(header, "th"));
  const drawn = make("table", {}, head, make("tbody", {}, ...body.map((texts) => row(texts, "td"))));
  return make("div", { class: "table", tabindex: 0 }, drawn);
}

function cells(row) {
  const parts = row.trim().replace(/^\|/, "").split(/(?<!\\)\|/);
  if (!parts.at(-1)) parts.pop();
  return parts.map((part) => part.replaceAll("\\|", "|").trim());
}

function inline(tokens) {
  const root = make("span");
  const path = [root];
  for (const token of tokens) {
    if (token.nesting < 0) path.pop();
    else if (token.type === "code_inline") path.at(-1).append(make("code", {}, token.content));
    else if (token.nesting === 0) path.at(-1).append(token.content);
    else {
      const element = token.type === "link_open" ? link(token.attrGet("href")) : make(token.tag);
      path.at(-1).append(element);
      path.push(element);
    }
  }
  return [...root.childNodes];
}

function link(href) {
  return make("a", { href, title: href, target: "_blank", rel: "noopener noreferrer" });
}

// ----------------------------------------------------------------------------------- the dialect
function made() {
  const md = markdownIt("zero", { maxNesting: 2 * DEEPEST, linkify: true });
  md.enable(["code", "fence", "hr", "list", "heading", "table", "backticks", "linkify"]);
  md.linkify.set({ fuzzyLink: false, fuzzyEmail: false, fuzzyIP: false });
  md.validateLink = (url) => SAFE.test(url);
  const ruler = md.block.ruler;
  const rule = (name) => ruler.__rules__.find((each) => each.name === name).fn;
  const [paragraph, heading, tabled, listed, dashed] = ["paragraph", "heading", "table", "list", "hr"].map(rule);
  ruler.at("paragraph", asWritten(paragraph));
  // What ends what: a table ends where a quote would.
  ruler.at("heading", asWritten(heading, /^ {0,3}#{1,6}[ \t]*/), { alt: ["paragraph", "blockquote"] });
  ruler.at("table", wholeTable(tabled), { alt: ["paragraph"] });
  ruler.at("list", (state, ...how) => state.level < DEEPEST && listed(state, ...how), { alt: ["paragraph", "blockquote"] });
  // A line across; `___` is a gap to be filled in, and `***` may be anything.
  const isLine = (state, start) => linesOf(state, start, start + 1).startsWith("-");
  ruler.at("hr", (state, start, ...how) => isLine(state, start) && dashed(state, start, ...how), { alt: ["paragraph", "blockquote", "list"] });
  md.inline.ruler.before("backticks", "math", math);
  md.inline.ruler.push("named_link", namedLink);
  md.inline.ruler.push("emphasis", emphasis);
  return md;
}

// A paragraph or heading with its line breaks and its indentation.
function asWritten(rule, mark = "") {
  return (state, start, end, silent) => {
    if (!rule(state, start, end, silent)) return false;
    if (!silent) state.tokens.at(-2).content = linesOf(state, start).replace(mark, "");
    return true;
  };
}

// A table with all its cells: the usual rule drops those beyond the header's number.
function wholeTable(rule) {
  return (state, start, end, silent) => {
    const before = state.tokens.length;
    if (!rule(state, start, end, silent)) return false;
    if (!silent) {
      state.tokens.length = before;
      const token = state.push("table", "table", 0);
      token.content = linesOf(state, start);
      token.map = [start, state.line];
    }
    return true;
  };
}

function linesOf(state, start, end = state.line) {
  return state.getLines(start, end, state.blkIndent, false).trimEnd();
}

// What a pattern finds at the place that is read.
function found(pattern, state) {
  pattern.lastIndex = state.pos;
  return pattern.exec(state.src.slice(0, state.posMax));
}

function emphasis(state, silent) {
  const match = found(state.src[state.pos] === "*" ? STARS : UNDERSCORES, state);
  if (!match) return false;
  const { bold = "", strong, em } = match.groups;
  const tags = { "": ["em"], "**": ["strong"], "***": ["strong", "em"] }[bold];
  const start = state.pos + (bold.length || 1);
  if (!silent) within(state, tags, start, start + (strong ?? em).length);
  state.pos = match.index + match[0].length;
  return true;
}

function namedLink(state, silent) {
  const match = found(LINK, state);
  if (!match) return false;
  if (!silent) {
    state.linkLevel += 1;
    within(state, ["a"], state.pos + 1, state.pos + 1 + match.groups.label.length, match.groups.href);
    state.linkLevel -= 1;
  }
  state.pos = match.index + match[0].length;
  return true;
}

// Reads a part of the line within new elements.
function within(state, tags, start, end, href) {
  const type = href ? "link" : "emphasis";
  for (const tag of tags) {
    const token = state.push(`${type}_open`, tag, 1);
    if (href) token.attrSet("href", href);
  }
  const rest = state.posMax;
  [state.pos, state.posMax] = [start, end];
  state.md.inline.tokenize(state);
  state.posMax = rest;
  for (const tag of tags.toReversed()) state.push(`${type}_close`, tag, -1);
}

function math(state, silent) {
  const match = found(MATH, state);
  if (!match) return false;
  if (!silent) state.pending += match[0];
  state.pos += match[0].length;
  return true;
}
