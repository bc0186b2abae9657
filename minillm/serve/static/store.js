// Conversations in the browser: one localStorage key each, so that two tabs never overwrite each
// other's. A turn is {role, content} and, for answers, {thought, thinkS, tokens, seconds, note, error}.
const CHAT_KEY = "minillm.chat.";
const TURN_FIELDS = { thought: "string", error: "string", note: "string", thinkS: "number", tokens: "number", seconds: "number" };
const chats = new Map();

function readJson(key) {
  try { return JSON.parse(localStorage.getItem(key)); } catch { return null; }
}

// Returns whether it could be stored; a full or a forbidden storage is no reason to stop chatting.
function writeJson(key, value) {
  try { localStorage.setItem(key, JSON.stringify(value)); return true; } catch { return false; }
}

const newId = () => Date.now().toString(36) + Math.random().toString(36).slice(2, 8);
const newChat = () => ({ id: newId(), title: "", at: Date.now(), turns: [] });

function cleanTurn(raw) {
  if (!["user", "assistant"].includes(raw?.role) || typeof raw.content !== "string") return null;
  const turn = { role: raw.role, content: raw.content };
  for (const [name, type] of Object.entries(TURN_FIELDS)) if (typeof raw[name] === type) turn[name] = raw[name];
  return turn;
}

// Only what we know leaves a file or the storage; null if it is no conversation.
function cleanChat(raw) {
  const turns = Array.isArray(raw?.turns) ? raw.turns.map(cleanTurn) : [];
  if (!turns.length || turns.includes(null)) return null;
  const id = /^[a-z0-9]{1,40}$/.test(raw.id) ? raw.id : newId();
  const title = typeof raw.title === "string" ? raw.title.slice(0, 200) : "";
  return { id, title, at: Number.isFinite(raw.at) ? raw.at : Date.now(), turns };
}

function loadChat(key) {
  const id = key.slice(CHAT_KEY.length), chat = cleanChat(readJson(key));
  if (chat && chat.id === id) chats.set(id, chat);
  else chats.delete(id);
}

function loadChats() {
  let keys = [];
  try { keys = Object.keys(localStorage); } catch { /* storage is off */ }
  for (const key of keys) if (key.startsWith(CHAT_KEY)) loadChat(key);
}

function saveChat(chat) {
  if (!chats.has(chat.id)) return true;   // deleted meanwhile
  return writeJson(CHAT_KEY + chat.id, chat);
}

function dropChat(chat) {
  chats.delete(chat.id);
  try { localStorage.removeItem(CHAT_KEY + chat.id); } catch { /* storage is off */ }
}

const sortedChats = () => [...chats.values()].sort((a, b) => b.at - a.at);

const exportChats = () => JSON.stringify({ format: "minillm-chats", version: 1, chats: sortedChats() }, null, 1);

// Adds the conversations of an exported file and returns the first; null if there is none.
function importChats(text) {
  let raw = null;
  try { raw = JSON.parse(text); } catch { return null; }
  const found = (Array.isArray(raw?.chats) ? raw.chats : []).map(cleanChat).filter(Boolean);
  for (const chat of found) {
    const old = chats.get(chat.id);
    if (old && JSON.stringify(old.turns) !== JSON.stringify(chat.turns)) chat.id = newId();
    chats.set(chat.id, chat);
    if (!writeJson(CHAT_KEY + chat.id, chat)) say(t.full, true);
  }
  return found[0] ?? null;
}

// What the model is told: a question whose answer failed is left out, with its answer.
function messagesOf(turns) {
  const messages = [];
  for (const { role, content } of turns) {
    if (role === "user" || content) messages.push({ role, content });
    else messages.pop();
  }
  return messages;
}
