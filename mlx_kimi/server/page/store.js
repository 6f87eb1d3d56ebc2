// Conversations in the browser's storage, each under a key of its own: two tabs write two keys.
//
// A conversation: { id, revision, updated, messages }, a message one of
//   { role: "user", content }
//   { role: "tool", call, name, content }      the result of a call
//   { role: "assistant", content, calls, state, line, usage, seconds }
// with calls { id, name, arguments } and a state of STATES; `line` says what went wrong.

const PREFIX = "mlx_kimi.chat.";
const SETTINGS = "mlx_kimi.settings";
const OPEN = "mlx_kimi.open";
const KEY = "mlx_kimi.key";
const MOST = 200; // conversations
const ROLES = ["user", "assistant", "tool"];
export const STATES = ["running", "done", "length", "stopped", "failed"];

export function newConversation() {
  return { id: random(), revision: null, updated: Date.now(), messages: [] };
}

// { id, title, updated } of each, the latest first. What cannot be read is left out.
export function conversations() {
  return keys()
    .map((key) => conversationOf(key.slice(PREFIX.length)))
    .filter(Boolean)
    .map(({ id, updated, messages }) => ({ id, updated, title: titleOf(messages) }))
    .sort((a, b) => b.updated - a.updated);
}

export function titleOf(messages) {
  const first = messages.find(({ role }) => role === "user")?.content ?? "";
  return first.trim().split("\n")[0].slice(0, 80) || "New chat";
}

// What is stored; null where there is nothing, or nothing that can be read.
export function conversationOf(id) {
  try {
    const found = JSON.parse(localStorage.getItem(PREFIX + id));
    return isConversation(found) ? { ...found, id } : null;
  } catch {
    return null;
  }
}

function isConversation(found) {
  return Array.isArray(found?.messages) && Number.isFinite(found.updated) && found.messages.every(isMessage);
}

function isMessage(message) {
  if (!ROLES.includes(message?.role) || typeof message.content !== "string") return false;
  if (message.role !== "assistant") return true;
  const areCalls = message.calls?.every?.((call) => ["id", "name", "arguments"].every((k) => typeof call?.[k] === "string"));
  return areCalls === true && STATES.includes(message.state);
}

// Stores a conversation: "kept", or "copied" where another tab has changed it since it was read:
// then it gets another id, and both are there. "full" where the storage takes no more.
export function keep(conversation) {
  const stored = conversationOf(conversation.id);
  const isCopy = stored !== null && stored.revision !== conversation.revision;
  if (isCopy) conversation.id = random();
  conversation.revision = random();
  if (!isWritten(conversation)) return "full";
  return isCopy ? "copied" : "kept";
}

// Makes room for it where that is needed.
function isWritten(conversation) {
  const key = PREFIX + conversation.id;
  const text = JSON.stringify(conversation);
  let others = null;
  for (;;) {
    try {
      const isRoom = localStorage.getItem(key) !== null || keys().length < MOST;
      if (isRoom) localStorage.setItem(key, text);
      if (isRoom) return true;
    } catch {
      // It is full, or there is none.
    }
    others ??= byUse().filter((other) => other !== key);
    if (!others.length) return false;
    localStorage.removeItem(others.shift());
  }
}

// Keys in the order in which they go: what cannot be read, then what was used longest ago.
function byUse() {
  const oldest = conversations().map(({ id }) => PREFIX + id).reverse();
  return [...keys().filter((key) => !oldest.includes(key)), ...oldest];
}

export function forget(id) {
  localStorage.removeItem(PREFIX + id);
}

export function forgetAll() {
  for (const key of keys()) localStorage.removeItem(key);
}

// Calls back with the id of a conversation that another tab has changed, or null for any.
export function whenChangedElsewhere(callback) {
  addEventListener("storage", ({ key }) => {
    if (key === null) callback(null);
    else if (key.startsWith(PREFIX)) callback(key.slice(PREFIX.length));
  });
}

function keys() {
  try {
    return Object.keys(localStorage).filter((key) => key.startsWith(PREFIX));
  } catch {
    return []; // a browser may give a page no storage
  }
}

function random() {
  const bytes = crypto.getRandomValues(new Uint8Array(12));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

// ------------------------------------------------------------------------- settings, of all tabs
export function settings() {
  const found = read(() => JSON.parse(localStorage.getItem(SETTINGS)));
  const text = (name) => (typeof found?.[name] === "string" ? found[name] : "");
  return { system: text("system"), temperature: text("temperature"), maxTokens: text("maxTokens"), tools: text("tools") };
}

export function keepSettings(values) {
  read(() => localStorage.setItem(SETTINGS, JSON.stringify(values)));
}

// ---------------------------------------------------------------------------------- of this tab
export const openId = () => read(() => sessionStorage.getItem(OPEN));
export const keepOpenId = (id) => read(() => sessionStorage.setItem(OPEN, id));
export const apiKey = () => read(() => sessionStorage.getItem(KEY)) ?? "";
export const keepApiKey = (key) => read(() => sessionStorage.setItem(KEY, key));

function read(storage) {
  try {
    return storage();
  } catch {
    return null;
  }
}
