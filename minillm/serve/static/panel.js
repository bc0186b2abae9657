// The list of conversations, the settings, theme and language.
const THEMES = ["auto", "light", "dark"];
const FIELDS = ["temperature", "top_p", "max_tokens", "seed", "system"];
const settings = { theme: "auto", lang: "", think: false, ...readJson("minillm.settings") };

// This tab's own: which conversation is open, the API key.
function readSession(name) {
  try { return sessionStorage.getItem("minillm." + name) ?? ""; } catch { return ""; }
}

function writeSession(name, value) {
  try { sessionStorage.setItem("minillm." + name, value); } catch { /* storage is off */ }
}

// ---- conversations

function drawList() {
  const list = $("chats");
  if (list.querySelector("input")) return;   // a name is being typed
  list.replaceChildren();
  for (const chat of sortedChats()) {
    const item = make("li", chat === current ? "on" : "", list);
    const open = textButton(item, "name", chat.title || t.fresh, () => { select(chat); showSide(false); });
    open.title = chat.title;
    if (chat === current) open.setAttribute("aria-current", "true");
    if (running.has(chat.id)) make("span", "dot", item).title = t.answering;
    iconButton(item, "pencil", t.rename, () => rename(item, chat));
    iconButton(item, "bin", t.remove, () => remove(chat));
  }
}

function select(chat) {
  current = chat;
  writeSession("chat", chat.id);
  $("notice").textContent = "";
  draw();
  if (matchMedia("(min-width: 48.01rem)").matches) $("box").focus();
}

function rename(item, chat) {
  const box = make("input");
  const done = (store) => {
    box.onblur = null;
    const title = box.value.trim().slice(0, 200);
    if (store && title) { chat.title = title; keep(chat); }
    box.remove();
    refresh();
    [...document.querySelectorAll("#chats .name")].find((node) => node.textContent === chat.title)?.focus();
  };
  box.value = chat.title;
  box.setAttribute("aria-label", t.name);
  box.onblur = () => done(true);
  box.onkeydown = (event) => {
    if (event.isComposing || event.keyCode === 229) return;
    if (event.key === "Enter") done(true);
    if (event.key === "Escape") { event.stopPropagation(); done(false); }
  };
  item.replaceChildren(box);
  box.select();
}

function remove(chat) {
  if (!confirm(t.sure + "\n" + chat.title)) return;
  running.get(chat.id)?.control.abort();
  running.delete(chat.id);
  dropChat(chat);
  if (chat === current) select(sortedChats()[0] ?? newChat());
  else refresh();
}

function download() {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([exportChats()], { type: "application/json" }));
  link.download = `minillm-chats-${new Date().toISOString().slice(0, 10)}.json`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

async function upload() {
  const file = $("file").files[0];
  $("file").value = "";
  if (!file) return;
  const chat = importChats(await file.text());
  if (chat) select(chat);
  else say(t.badFile, true);
}

// On a narrow screen the list is a drawer over the page.
function showSide(open) {
  const was = document.body.classList.contains("drawer");
  document.body.classList.toggle("drawer", open);
  $("page").inert = open;
  $("menu").setAttribute("aria-expanded", String(open));
  if (open) $("fresh").focus();
  else if (was) $("menu").focus();
}

function startSide() {
  $("menu").onclick = () => showSide(true);
  $("scrim").onclick = $("shut").onclick = () => showSide(false);
  $("fresh").onclick = () => { select(newChat()); showSide(false); $("box").focus(); };
  $("export").onclick = download;
  $("import").onclick = () => $("file").click();
  $("file").onchange = upload;
  matchMedia("(min-width: 48.01rem)").onchange = () => showSide(false);
  addEventListener("storage", ({ key }) => {   // another tab wrote
    if (!key?.startsWith(CHAT_KEY) || running.has(key.slice(CHAT_KEY.length))) return;
    loadChat(key);
    const mine = chats.get(current.id);
    if (mine && mine !== current) { current = mine; draw(); } else refresh();
  });
}

// ---- settings

function showSettings(open) {
  $("settings").hidden = !open;
  $("tune").setAttribute("aria-expanded", String(open));
}

function askKey() {
  $("keyRow").hidden = false;
  showSettings(true);
  $("key").focus();
}

function remember() {
  for (const name of FIELDS) settings[name] = $(name).value;
  settings.think = $("think").checked;
  if (!writeJson("minillm.settings", settings)) say(t.full, true);
}

function setTheme(theme) {
  settings.theme = THEMES.includes(theme) ? theme : "auto";
  document.documentElement.dataset.theme = settings.theme;
  $("theme").textContent = t[settings.theme];
  $("theme").setAttribute("aria-label", `${t.theme}: ${t[settings.theme]}`);
}

function setLanguage(wanted) {
  lang = wanted === "zh" ? "zh" : "en";
  t = WORDS[lang];
  document.documentElement.lang = lang === "zh" ? "zh-CN" : "en";
  for (const node of document.querySelectorAll("[data-t]")) node.textContent = t[node.dataset.t];
  for (const node of document.querySelectorAll("[data-label]")) {
    node.title = t[node.dataset.label];
    node.setAttribute("aria-label", t[node.dataset.label]);
  }
  for (const node of document.querySelectorAll("[data-hint]")) node.placeholder = t[node.dataset.hint];
  $("box").placeholder = matchMedia("(max-width: 48rem)").matches ? t.short : t.placeholder;
  $("lang").lang = lang === "zh" ? "en" : "zh-CN";
  setTheme(settings.theme);
}

function startSettings() {
  for (const [id, name] of Object.entries({ menu: "menu", shut: "close", tune: "tune", newest: "down" })) $(id).append(icon(name));
  $("fresh").prepend(icon("plus"));
  for (const name of FIELDS) $(name).value = settings[name] ?? "";
  $("think").checked = settings.think === true;
  $("key").value = readSession("key");
  $("settings").onsubmit = (event) => event.preventDefault();
  $("settings").onchange = remember;
  $("key").onchange = () => { writeSession("key", $("key").value.trim()); findModel(); };
  $("tune").onclick = () => showSettings($("settings").hidden);
  $("theme").onclick = () => { setTheme(THEMES[(THEMES.indexOf(settings.theme) + 1) % 3]); remember(); };
  $("lang").onclick = () => { settings.lang = lang === "zh" ? "en" : "zh"; setLanguage(settings.lang); remember(); draw(); };
}
