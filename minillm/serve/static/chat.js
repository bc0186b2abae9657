// The page: what is shown, what the keys and buttons do.
const $ = (id) => document.getElementById(id);
const running = new Map();   // chat id -> {control, turn, view, frame, first}: answers on their way
let lang = "en", t = WORDS.en, current = null;

const ICONS = {
  menu: "M4 6h16M4 12h16M4 18h16", plus: "M12 5v14M5 12h14", close: "M6 6l12 12M18 6L6 18",
  pencil: "M4 20l1-5L16 4l4 4L9 19z", bin: "M5 7h14M9 7V4h6v3M7 7l1 13h8l1-13", up: "M12 19V5M6 11l6-6 6 6",
  tune: "M4 7h9M19 7h1M4 17h3M13 17h7M13 7a3 3 0 1 0 6 0 3 3 0 1 0-6 0M7 17a3 3 0 1 0 6 0 3 3 0 1 0-6 0", square: "M6 6h12v12H6z", down: "M12 5v14M6 13l6 6 6-6",
};

function make(tag, cls, parent, text) {
  const node = document.createElement(tag);
  if (cls) node.className = cls;
  if (text) node.textContent = text;   // never HTML
  if (parent) parent.append(node);
  return node;
}

function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("class", name);
  svg.setAttribute("aria-hidden", "true");
  path.setAttribute("d", ICONS[name]);
  svg.append(path);
  return svg;
}

function iconButton(parent, name, label, act) {
  const button = make("button", "icon", parent);
  button.type = "button";
  button.append(icon(name));
  button.title = label;
  button.setAttribute("aria-label", label);
  button.onclick = act;
  return button;
}

function textButton(parent, cls, label, act) {
  const button = make("button", cls, parent, label);
  button.type = "button";
  button.onclick = act;
  return button;
}

// For screen readers; `shown`: for everybody.
function say(text, shown = false) {
  $("say").textContent = text;
  if (shown) $("notice").textContent = text;
}

function keep(chat) { if (!saveChat(chat)) say(t.full, true); }

// Without https, a page that is not from this computer has no `navigator.clipboard`.
function oldCopy(text) {
  const box = make("textarea", "sr", document.body);
  box.value = text;
  box.select();
  const done = document.execCommand("copy");
  box.remove();
  return done;
}

async function copy(button, text) {
  try { await navigator.clipboard.writeText(text); } catch { if (!oldCopy(text)) return; }
  button.textContent = t.copied;
  say(t.copied);
  setTimeout(() => { button.textContent = t.copy; }, 1500);
}

// ---- turns

function drawUser(turn) {
  const node = make("div", "turn user", $("log"));
  make("div", "bubble", node, turn.content).dir = "auto";
  node.setAttribute("role", "article");
  node.setAttribute("aria-label", t.you);
  const meta = make("div", "meta", node);
  textButton(meta, "edit", t.edit, () => edit(node, turn));
  textButton(meta, "", t.copy, (event) => copy(event.target, turn.content));
}

function edit(node, turn) {
  if (node.querySelector("form")) return;
  const form = make("form", "editor", node), box = make("textarea", "", form), row = make("div", "", form);
  const close = () => { form.remove(); node.classList.remove("editing"); };
  node.classList.add("editing");
  box.value = turn.content;
  box.setAttribute("aria-label", t.edit);
  textButton(row, "", t.cancel, () => { close(); node.querySelector(".edit").focus(); });
  textButton(row, "main", t.save, () => form.requestSubmit());
  box.onkeydown = (event) => {
    if (sends(event)) { event.preventDefault(); form.requestSubmit(); }
    if (event.key === "Escape" && !event.isComposing) { event.stopPropagation(); close(); node.querySelector(".edit").focus(); }
  };
  form.onsubmit = (event) => {
    event.preventDefault();
    const text = box.value.trim();
    if (!text) return;
    running.get(current.id)?.control.abort();
    current.turns.length = current.turns.indexOf(turn);
    ask(text);
  };
  box.oninput = () => fit(box);
  box.focus();
  fit(box);
}

function drawAnswer(turn) {
  const node = make("div", "turn assistant", $("log"));
  node.setAttribute("role", "article");
  node.setAttribute("aria-label", t.answer);
  const think = make("details", "", node), summary = make("summary", "", think), thought = make("div", "", think);
  const text = make("div", "text", node), error = make("div", "error", node), meta = make("div", "meta", node);
  text.dir = "auto";
  textButton(meta, "again", t.again, () => again(turn));
  textButton(meta, "whole", t.copy, (event) => copy(event.target, turn.content));
  const view = { node, think, summary, thought, text, error, stats: make("span", "", meta) };
  paint(view, turn);
  return view;
}

function readout(turn) {
  const bits = [];
  if (turn.tokens) bits.push(`${turn.tokens} ${t.tokens}`);
  if (turn.tokens > 1 && turn.seconds > 0.05) bits.push(`${((turn.tokens - 1) / turn.seconds).toFixed(0)} ${t.rate}`);
  if (["stopped", "cut", "trimmed"].includes(turn.note)) bits.push(t[turn.note]);
  return bits.join(" · ");
}

// Bring a view to what its turn says; may be called at any time.
function paint(view, turn) {
  const busy = running.get(current.id)?.turn === turn;
  view.node.classList.toggle("busy", busy);
  view.node.setAttribute("aria-busy", String(busy));
  view.think.hidden = !turn.thought;
  if (view.thought.textContent !== (turn.thought ?? "")) view.thought.textContent = turn.thought;
  view.summary.textContent = turn.thinkS === undefined ? t.thinking : t.thought.replace("{}", turn.thinkS);
  renderMarkdown(view.text, turn.content);
  for (const button of view.text.querySelectorAll("button.copy:empty")) button.textContent = t.copy;
  view.node.classList.toggle("blank", !turn.content);
  view.error.textContent = turn.error ?? "";
  view.stats.textContent = readout(turn);
}

function atEnd() {
  const main = $("main");
  return main.scrollHeight - main.scrollTop - main.clientHeight < 80;
}

function toEnd() { $("main").scrollTop = 1e9; }

// Draw the answer with the next frame, however many chunks come before it.
function later(job) {
  if (job.frame) return;
  job.frame = requestAnimationFrame(() => {
    job.frame = 0;
    if (!job.view?.node.isConnected) return;
    const stick = atEnd();
    paint(job.view, job.turn);
    if (stick) toEnd();
  });
}

function take(chunk, job) {
  const turn = job.turn, choice = chunk.choices?.[0];
  if (chunk.error) throw new Error(chunk.error.message);
  if (chunk.usage) turn.tokens = chunk.usage.completion_tokens;
  if (choice?.finish_reason === "length") turn.note = "cut";
  const { content, reasoning_content: thought } = choice?.delta ?? {};
  if (!content && !thought) return;
  const now = performance.now();
  job.first ||= now;
  turn.tokens = (turn.tokens ?? 0) + 1;   // an estimate until usage comes
  turn.seconds = (now - job.first) / 1000;
  if (thought) {
    if (!turn.thought && job.view) job.view.think.open = true;
    turn.thought = (turn.thought ?? "") + thought;
  }
  if (content) {
    if (!turn.content && turn.thought) endThought(job);
    turn.content += content;
  }
}

function endThought({ turn, view, first }, open = false) {
  turn.thinkS = Number(((performance.now() - first) / 1000).toFixed(1));
  if (view) view.think.open = open;
}

async function answer(chat) {
  const control = new AbortController(), messages = messagesOf(chat.turns);
  const turn = { role: "assistant", content: "" };
  const job = { control, turn, view: null, frame: 0, first: 0 };
  chat.at = Date.now();
  chat.turns.push(turn);
  running.set(chat.id, job);
  keep(chat);
  job.view = drawAnswer(turn);
  refresh();
  toEnd();
  say(t.answering);
  try {
    if (!model) await findModel();
    const { response, trimmed } = await request(messages, control.signal);
    if (trimmed) turn.note = "trimmed";
    for await (const chunk of events(response)) { take(chunk, job); later(job); }
  } catch (error) {
    if (control.signal.aborted) turn.note = "stopped";
    else turn.error = error instanceof TypeError ? t.offline : error.message;
  }
  if (turn.thought && turn.thinkS === undefined) endThought(job, true);
  const stick = atEnd(), replaced = running.get(chat.id) !== job;
  if (!replaced) { running.delete(chat.id); keep(chat); }
  if (job.view?.node.isConnected) { paint(job.view, turn); if (stick) toEnd(); }
  refresh();
  if (chat === current && !replaced) say(turn.error || `${t.done}. ${turn.content.slice(0, 2000)}`);
}

// ---- what the user does

function ask(text) {
  const chat = current;
  chats.set(chat.id, chat);
  chat.title ||= [...text.replace(/\s+/g, " ")].slice(0, 60).join("");
  chat.turns.push({ role: "user", content: text });
  $("notice").textContent = "";
  draw();
  answer(chat);
  $("box").focus({ preventScroll: true });
}

function again(turn) {
  if (running.has(current.id) || turn !== current.turns.at(-1)) return;
  current.turns.pop();
  draw();
  answer(current);
  $("box").focus({ preventScroll: true });
}

function send() {
  const text = $("box").value.trim();
  if (!text || running.has(current.id)) return;
  $("box").value = "";
  fit();
  ask(text);
}

const stop = () => running.get(current.id)?.control.abort();

// Enter sends; never while an input method composes (229: Safari's last key of a composition).
function sends(event) {
  return event.key === "Enter" && !event.shiftKey && !event.isComposing && event.keyCode !== 229;
}

function fit(box = $("box")) {   // CSS says how high at most
  box.style.height = "auto";
  box.style.height = box.scrollHeight + 2 + "px";
}

function draw() {
  $("log").replaceChildren();
  const job = running.get(current.id);
  for (const turn of current.turns) {
    if (turn.role === "user") drawUser(turn);
    else {
      const view = drawAnswer(turn);
      if (job?.turn === turn) { job.view = view; view.think.open = Boolean(turn.thought && !turn.content); }
    }
  }
  $("empty").hidden = current.turns.length > 0;
  refresh();
  toEnd();
}

function refresh() {
  const busy = running.has(current.id), label = busy ? t.stop : t.send;
  if ($("send").title !== label) {
    $("send").replaceChildren(icon(busy ? "square" : "up"));
    $("send").title = label;
    $("send").setAttribute("aria-label", label);
  }
  $("title").textContent = current.title || t.fresh;
  document.title = (current.title ? current.title + " · " : "") + "minillm";
  drawList();
}

function start() {
  $("form").onsubmit = (event) => { event.preventDefault(); if (running.has(current.id)) stop(); else send(); };
  $("box").oninput = () => fit();
  $("box").onkeydown = (event) => {
    if (sends(event)) { event.preventDefault(); send(); }
    const last = [...document.querySelectorAll(".user .edit")].at(-1);
    if (event.key === "ArrowUp" && !$("box").value && last) { event.preventDefault(); last.click(); }
  };
  document.onkeydown = (event) => {
    if (event.key !== "Escape" || event.isComposing) return;
    if (document.body.classList.contains("drawer")) showSide(false);
    else stop();
  };
  $("log").addEventListener("click", (event) => {
    const button = event.target.closest("button.copy");
    if (button) copy(button, button.closest(".code").querySelector("pre").textContent);
  });
  $("main").onscroll = () => { $("newest").hidden = atEnd(); };
  $("newest").onclick = toEnd;
  addEventListener("pagehide", () => { for (const id of running.keys()) saveChat(chats.get(id) ?? { id }); });
  startSide();
  startSettings();
  loadChats();
  setLanguage(settings.lang || (navigator.language.toLowerCase().startsWith("zh") ? "zh" : "en"));
  select(chats.get(readSession("chat")) ?? sortedChats()[0] ?? newChat());
  findModel();
  fit();
}

start();
