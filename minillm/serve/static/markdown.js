// Markdown to DOM nodes. Model text only ever becomes text nodes: no HTML is parsed anywhere.
const LIST = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;
const RULE = /^\s*([-*_])(\s*\1){2,}\s*$/;
const FENCE = /^\s{0,3}(`{3,}|~{3,})\s*([^`]*)$/;
const TABLE_LINE = /^\s*\|?\s*:?-+:?(\s*\|\s*:?-+:?)*\s*\|?$/;
// Spans are at most 1,000 characters, so that hostile text costs linear time.
const LABEL = String.raw`((?:[^\[\]\n]|\[[^\[\]\n]{0,100}\]){0,500})`;
const TARGET = String.raw`(?:<([^<>\n]{0,2000})>|((?:[^\s()<>]|\((?:[^\s()]|\([^\s()]{0,200}\)){0,500}\)){1,2000}))`;   // parentheses nest twice
const INLINE = new RegExp([
  String.raw`(?<!${"`"})(${"`"}+)([^${"`"}]|[^${"`"}][\s\S]{0,1000}?[^${"`"}])\1(?!${"`"})`,
  String.raw`\*\*(?=\S)([\s\S]{0,1000}?\S)\*\*`, String.raw`__(?=\S)([\s\S]{0,1000}?\S)__(?!\w)`,
  String.raw`~~(?=\S)([\s\S]{0,1000}?\S)~~`,
  String.raw`\*(?=[^\s*])([^*]{0,1000}?[^\s*])\*`, String.raw`\b_(?=[^\s_])([^_]{0,1000}?[^\s_])_\b`,
  String.raw`!?\[${LABEL}\]\(\s*${TARGET}(?:\s+(?:"[^"\n]{0,500}"|'[^'\n]{0,500}'))?\s*\)`,
  "(https?:\\/\\/[^\\s<>\"'`，。；！？）】」]+)", "\\\\([\\\\`*_{}[\\]()#+\\-.!|~>])",
].join("|"), "g");

function element(tag, parent, text) {
  const node = document.createElement(tag);
  if (text !== undefined) node.textContent = text;
  if (parent) parent.append(node);
  return node;
}

// Only these go anywhere when clicked; anything else (javascript:, data:, relative) stays text.
function safeUrl(text) {
  try {
    const url = new URL(text);
    return ["http:", "https:", "mailto:"].includes(url.protocol) ? url.href : "";
  } catch { return ""; }
}

function link(parent, text, target) {
  const href = safeUrl(target);
  if (!href) { parent.append(text); return; }
  const node = element("a", parent);
  node.href = href;
  node.target = "_blank";
  node.rel = "noopener noreferrer nofollow";
  node.title = href;
  node.append(text);
}

// A full stop or a closing parenthesis after an address belongs to the sentence around it.
function bareUrl(text) {
  let open = text.split("(").length - text.split(")").length, end = text.length;
  for (; /[.,;:!?*_~]/.test(text[end - 1]) || (text[end - 1] === ")" && open < 0); end -= 1) open += text[end - 1] === ")";
  return text.slice(0, end);
}

function inline(parent, text, depth = 0) {
  let at = 0;
  for (const found of depth > 8 ? [] : text.matchAll(INLINE)) {
    const [all, , code, b1, b2, gone, i1, i2, label, pointed, plain, bare, escaped] = found;
    const target = pointed || plain;
    parent.append(text.slice(at, found.index));
    at = found.index + all.length;
    if (code !== undefined) element("code", parent, code.trim() || code);
    else if (b1 ?? b2) inline(element("strong", parent), b1 ?? b2, depth + 1);
    else if (gone) inline(element("del", parent), gone, depth + 1);
    else if (i1 ?? i2) inline(element("em", parent), i1 ?? i2, depth + 1);
    else if (target) link(parent, label || target, target);
    else if (bare) {
      const url = bareUrl(bare);
      link(parent, url, url);
      parent.append(bare.slice(url.length));
    } else if (escaped) parent.append(escaped);
  }
  parent.append(text.slice(at));
}

function cells(line) {
  return line.trim().replace(/^\|/, "").replace(/\|$/, "").split(/(?<!\\)\|/)
    .map((cell) => cell.trim().replaceAll("\\|", "|"));
}

function table(parent, lines) {
  const box = element("div", parent);
  box.className = "table";
  const node = element("table", box);
  const sides = cells(lines[1]).map((mark) => /^:-+:$/.test(mark) ? "center" : /-:$/.test(mark) ? "right" : "");
  lines.forEach((line, number) => {
    if (number === 1) return;
    const row = element("tr", element(number ? "tbody" : "thead", node));
    cells(line).slice(0, sides.length).forEach((cell, column) => {
      const place = element(number ? "td" : "th", row);
      if (sides[column]) place.className = sides[column];
      inline(place, cell);
    });
  });
}

function list(parent, lines, depth) {
  const first = LIST.exec(lines[0]);
  const node = element(/\d/.test(first[2]) ? "ol" : "ul", parent);
  if (/\d/.test(first[2]) && parseInt(first[2], 10) !== 1) node.start = parseInt(first[2], 10);
  const indent = first[1].length;
  let item = [];
  const close = () => { if (item.length) blocks(element("li", node), item, depth + 1); };
  for (const line of lines) {
    const found = LIST.exec(line);
    if (found && found[1].length <= indent + 1) { close(); item = [found[3]]; }
    else item.push(line.replace(new RegExp(`^\\s{0,${indent + 2 + (node.tagName === "OL")}}`), ""));
  }
  close();
}

function codeBlock(parent, language, text) {
  const box = element("div", parent);
  box.className = "code";
  const bar = element("div", box);
  element("span", bar, language);
  const button = element("button", bar);
  button.type = "button";
  button.className = "copy";
  const pre = element("pre", box);
  pre.tabIndex = 0;
  element("code", pre, text);
}

// One line that begins another kind of block ends a paragraph.
function begins(line, next) {
  return FENCE.test(line) || RULE.test(line) || /^\s{0,3}(#{1,6}\s|>)/.test(line) || LIST.test(line)
    || (line.includes("|") && next !== undefined && next.includes("-") && TABLE_LINE.test(next.trimEnd()));
}

function blocks(parent, lines, depth = 0) {
  for (let at = 0; at < lines.length;) {
    const line = lines[at], start = at, fence = FENCE.exec(line);
    let found;
    if (!line.trim()) at += 1;
    else if (fence) {
      const end = new RegExp(`^\\s{0,3}${fence[1][0]}{${fence[1].length},}\\s*$`);
      for (at += 1; at < lines.length && !end.test(lines[at]);) at += 1;
      codeBlock(parent, fence[2].trim().split(/\s/)[0], lines.slice(start + 1, at).join("\n"));
      at += 1;
    } else if ((found = /^\s{0,3}(#{1,6})\s+(.*)$/.exec(line))) {
      const title = found[2].trimEnd().replace(/(^|\s)#+$/, "");
      inline(element("h" + Math.min(6, found[1].length + 1), parent), title.trimEnd());
      at += 1;
    } else if (RULE.test(line)) { element("hr", parent); at += 1; }
    else if (/^\s{0,3}>/.test(line) && depth < 8) {
      while (at < lines.length && /^\s{0,3}>/.test(lines[at])) at += 1;
      blocks(element("blockquote", parent), lines.slice(start, at).map((one) => one.replace(/^\s{0,3}> ?/, "")), depth + 1);
    } else if (LIST.test(line) && depth < 8) {
      for (at += 1; at < lines.length; at += 1) {
        const blank = !lines[at].trim(), after = lines[at + 1] ?? "";
        if (LIST.test(lines[at]) || /^\s+\S/.test(lines[at])) continue;
        if (blank ? !(LIST.test(after) || /^\s{2,}\S/.test(after)) : begins(lines[at], after) || !lines[at - 1].trim()) break;
      }
      list(parent, lines.slice(start, at), depth);
    } else if (line.includes("|") && begins(line, lines[at + 1]) && !LIST.test(line) && !/^\s{0,3}>/.test(line)) {
      for (at += 2; at < lines.length && lines[at].includes("|");) at += 1;
      table(parent, lines.slice(start, at));
    } else {
      for (at += 1; at < lines.length && lines[at].trim() && !begins(lines[at], lines[at + 1]);) at += 1;
      inline(element("p", parent), lines.slice(start, at).join("\n"));
    }
  }
}

// Draw `text` into `parent`; blocks that did not change since the last call are kept as they are,
// so that a selection or a focus in them survives the stream.
function renderMarkdown(parent, text) {
  const fresh = document.createElement("div");
  blocks(fresh, text.replace(/\r\n?/g, "\n").split("\n"));
  const nodes = [...fresh.childNodes];
  nodes.forEach((node, index) => {
    const old = parent.childNodes[index];
    if (!old) parent.append(node);
    else if (!old.drawn.isEqualNode(node)) old.replaceWith(node);
    else return;
    node.drawn = node.cloneNode(true); // as it was before anyone pressed a button in it
  });
  while (parent.childNodes.length > nodes.length) parent.lastChild.remove();
}
