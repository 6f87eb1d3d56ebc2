// The page: what is open, what is running, and what the reader does. Nothing of its address is read,
// so no link can send anything.

import { answerTo, Problem, servedModel } from "./api.js";
import { button, fit, isTouched, make } from "./dom.js";
import { isEnter, viewOf } from "./messages.js";
import * as store from "./store.js";

const KEEP_EVERY = 1000; // milliseconds, while an answer is written
const NEAR = 48; // pixels from the end at which a reader is at the end

const parts = {};
for (const element of document.querySelectorAll("[id]")) parts[element.id] = element;

let conversation = store.conversationOf(store.openId()) ?? store.newConversation();
let views = new Map(); // by message
let running = null; // { controller, message, conversation } of the answer that is written
let served = null; // the model
const deeds = { edit, retry, goOn, sendResults };

// ------------------------------------------------------------------------------ asking and answers
function send(text) {
  settle();
  conversation.messages.push({ role: "user", content: text });
  return ask();
}

function edit(message, text) {
  if (running) return;
  conversation.messages.length = conversation.messages.indexOf(message);
  return send(text);
}

function retry() {
  if (running) return;
  while (conversation.messages.at(-1)?.role === "assistant") conversation.messages.pop();
  if (conversation.messages.length) return ask();
}

function goOn() {
  if (!running) return send("Continue.");
}

function sendResults(results) {
  if (running) return;
  const { calls } = conversation.messages.at(-1);
  calls.forEach(({ id, name }, number) => {
    conversation.messages.push({ role: "tool", call: id, name, content: results[number] });
  });
  return ask();
}

async function ask() {
  const asked = conversation;
  const message = { role: "assistant", content: "", calls: [], state: "running" };
  const controller = new AbortController();
  const messages = requestMessages(asked.messages);
  asked.messages.push(message);
  asked.updated = Date.now();
  running = { controller, message, conversation: asked };
  parts.messages.ariaLive = "polite";
  draw();
  scrollToEnd();
  keep(asked);
  drawConversations();
  focusField();
  let finish = "stop";
  let first = null; // seconds, when the first piece of the answer came
  try {
    const body = { messages, ...options() };
    for await (const piece of answerTo(body, store.apiKey(), controller.signal)) {
      finish = piece.finish ?? finish;
      take(message, piece);
      if (piece.text || piece.call) {
        const now = performance.now() / 1000;
        first ??= now;
        message.seconds = now - first;
      }
      drawSoon();
      keepSoon(asked);
    }
    message.state = finish === "length" ? "length" : "done";
  } catch (error) {
    if (!(error instanceof Problem)) console.error(error);
    message.state = error.kind === "stopped" ? "stopped" : "failed";
    message.line = error.message;
    if (message.state === "failed") served = null; // it may be another one that answers next
    if (error.kind === "key") wantKey();
  } finally {
    delete message.progress;
    if (running?.message === message) running = null;
    keep(asked);
    draw();
    if (!served) findModel();
  }
}

function take(message, { text, call, progress, usage }) {
  if (progress) message.progress = progress;
  if (usage) message.usage = usage;
  if (call) {
    message.calls[call.index] ??= { id: call.id, name: call.function.name, arguments: "" };
    message.calls[call.index].arguments += call.function.arguments;
  }
  if (text) message.content += text;
}

// What the API is sent of a conversation: nothing of an answer that has nothing, no call that was cut.
function requestMessages(messages) {
  const sent = messages.flatMap(({ role, content, calls = [], call, state }) => {
    if (role === "user") return [{ role, content }];
    if (role === "tool") return [{ role, content, tool_call_id: call }];
    const whole = state === "done" ? calls : [];
    if (!content && !whole.length) return [];
    const made = whole.map(({ id, name, arguments: text }) => ({ id, type: "function", function: { name, arguments: text } }));
    return [{ role, content, ...(made.length && { tool_calls: made }) }];
  });
  const { system } = store.settings();
  return system.trim() ? [{ role: "system", content: system }, ...sent] : sent;
}

function options() {
  const { temperature, maxTokens, tools } = store.settings();
  const found = {};
  if (temperature !== "") found.temperature = Number(temperature);
  if (maxTokens !== "") found.max_tokens = Number(maxTokens);
  if (tools.trim()) found.tools = toolsOf(tools);
  return found;
}

function toolsOf(text) {
  try {
    const found = JSON.parse(text);
    if (Array.isArray(found)) return found;
  } catch {
    // told below
  }
  throw new Problem("refused", "Tools must be a JSON array.");
}

// What another tab, or this one before it was closed, left unfinished.
function settle() {
  for (const message of conversation.messages) {
    if (message.state === "running") message.state = "stopped";
  }
}

function stop(line = "Stopped.") {
  running?.controller.abort(line);
}

async function findModel() {
  try {
    served = await servedModel(store.apiKey());
    parts.model.textContent = served.id;
    parts.context.textContent = `${Math.round(served.max_model_len / 1024).toLocaleString("en")}K context`;
    if (parts.notice.dataset.about === "server") tell("");
    parts["key-form"].hidden = true;
  } catch (problem) {
    if (problem.kind === "key") wantKey();
    else if (!conversation.messages.length) tell(problem.message, "server");
  }
}

function wantKey() {
  parts["key-form"].hidden = false;
  if (!running) parts.key.focus();
}

// ------------------------------------------------------------------------------------ conversations
function open(found) {
  stop("Stopped, as another conversation was opened.");
  running = null;
  conversation = found;
  store.keepOpenId(found.id);
  views = new Map();
  parts.messages.ariaLive = "off"; // what was said before is not read out
  parts.messages.replaceChildren();
  draw();
  drawConversations();
  scrollToEnd();
}

function keep(kept) {
  clearTimeout(keep.timer);
  keep.timer = null;
  const how = store.keep(kept);
  if (how === "full") tell("This browser keeps no more: the conversation is gone when the page is closed.");
  if (how === "copied") tell("Another tab has changed this conversation: this one goes on as a copy.");
  if (kept === conversation) store.keepOpenId(kept.id);
  if (how === "copied") drawConversations();
}

function keepSoon(kept) {
  keep.timer ??= setTimeout(() => {
    keep.timer = null;
    if (running?.conversation === kept) keep(kept);
  }, KEEP_EVERY);
}

function remove({ id, title }) {
  const removed = id === conversation.id ? conversation : store.conversationOf(id);
  if (running?.conversation === removed) return tell("Stop the answer first.");
  store.forget(id);
  if (removed === conversation) open(store.newConversation());
  drawConversations();
  const undo = button("Undo", () => {
    keep(removed);
    drawConversations();
    tell("");
  });
  tell(`Deleted “${title}”. `, "", undo);
}

function changedElsewhere(id) {
  drawConversations();
  if (running || (id !== null && id !== conversation.id)) return;
  if (document.querySelector(".editing")) return; // what is written there stays; sending it makes a copy
  const found = store.conversationOf(conversation.id);
  const [top, isAtEnd] = [parts.scroll.scrollTop, atEnd()];
  if (found) open(found);
  else if (conversation.revision) open(store.newConversation());
  if (!isAtEnd) parts.scroll.scrollTop = top;
}

// ------------------------------------------------------------------------------------------ drawing
function draw() {
  clearFrame();
  const isAtEnd = atEnd();
  const { messages } = conversation;
  for (const [message, view] of views) {
    if (!messages.includes(message)) {
      view.element.remove();
      views.delete(message);
    }
  }
  for (const message of messages) {
    if (!views.has(message)) {
      views.set(message, viewOf(message, deeds));
      parts.messages.append(views.get(message).element);
    }
    views.get(message).update({ isLast: message === messages.at(-1), isRunning: message === running?.message });
  }
  const isHere = running?.conversation === conversation;
  document.body.classList.toggle("running", isHere);
  parts.stop.hidden = !isHere;
  parts.send.hidden = isHere;
  parts.empty.hidden = messages.length > 0;
  document.title = messages.length ? `${store.titleOf(messages)} · mlx_kimi` : "mlx_kimi";
  if (isAtEnd) scrollToEnd();
  parts.latest.hidden = atEnd();
}

// At most once in a frame.
function drawSoon() {
  draw.frame ??= requestAnimationFrame(draw);
}

function clearFrame() {
  cancelAnimationFrame(draw.frame);
  draw.frame = null;
}

function atEnd() {
  const { scrollTop, scrollHeight, clientHeight } = parts.scroll;
  return scrollHeight - scrollTop - clientHeight < NEAR;
}

function scrollToEnd() {
  parts.scroll.scrollTop = parts.scroll.scrollHeight;
}

function drawConversations() {
  parts.conversations.replaceChildren(...store.conversations().map((each) =>
    make("li", {},
      button(each.title, () => choose(each.id), { class: "open", "aria-current": each.id === conversation.id && "true" }),
      button("×", () => remove(each), { class: "remove", "aria-label": `Delete “${each.title}”` }))));
}

function choose(id) {
  showSide(false);
  const found = store.conversationOf(id);
  if (found && id !== conversation.id) open(found);
  focusField();
}

// Where a screen is touched, the focus would raise its keyboard.
function focusField() {
  if (!isTouched()) parts.text.focus();
}

// A line below the messages, and perhaps a button.
function tell(line, about = "", ...more) {
  parts.notice.replaceChildren(line, ...more);
  parts.notice.dataset.about = about;
  parts.notice.hidden = !line;
}

function showSide(isShown) {
  document.body.classList.toggle("side", isShown);
  parts.menu.setAttribute("aria-expanded", isShown);
  parts.veil.hidden = !isShown;
  document.querySelector("main").inert = isShown;
  if (isShown) parts.new.focus();
}

// ------------------------------------------------------------------------------------------- events
parts.composer.addEventListener("submit", (event) => {
  event.preventDefault();
  const text = parts.text.value;
  if (running || !text.trim()) return;
  parts.text.value = "";
  fit(parts.text);
  tell("");
  send(text);
});

parts.text.addEventListener("input", () => fit(parts.text));

parts.text.addEventListener("keydown", (event) => {
  if (isEnter(event)) {
    event.preventDefault();
    parts.composer.requestSubmit();
  } else if (event.key === "ArrowUp" && !parts.text.value && !running) {
    const last = conversation.messages.findLast(({ role }) => role === "user");
    if (last) {
      event.preventDefault();
      views.get(last).edit();
    }
  }
});

addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || parts.settings.open) return;
  if (document.body.classList.contains("side")) {
    showSide(false);
    parts.menu.focus();
  } else stop();
});

parts.stop.addEventListener("click", () => {
  stop();
  focusField();
});

parts.new.addEventListener("click", () => {
  showSide(false);
  tell("");
  open(store.newConversation());
  focusField();
});

parts.menu.addEventListener("click", () => showSide(!document.body.classList.contains("side")));
parts.veil.addEventListener("click", () => showSide(false));
parts.latest.addEventListener("click", scrollToEnd);
parts.scroll.addEventListener("scroll", () => (parts.latest.hidden = atEnd()), { passive: true });

parts["key-form"].addEventListener("submit", async (event) => {
  event.preventDefault();
  store.keepApiKey(parts.key.value.trim());
  parts.key.value = "";
  parts["key-form"].hidden = true;
  await findModel();
  if (!parts["key-form"].hidden) return;
  focusField();
  if (conversation.messages.at(-1)?.state === "failed") retry();
});

// --------------------------------------------------------------------------------------- settings
const FIELDS = { system: "system", temperature: "temperature", maxTokens: "max-tokens", tools: "tools" };

parts["open-settings"].addEventListener("click", () => {
  const values = store.settings();
  for (const [name, id] of Object.entries(FIELDS)) parts[id].value = values[name];
  tellInSettings("");
  parts.settings.showModal();
});

parts["settings-form"].addEventListener("submit", (event) => {
  event.preventDefault();
  if (parts.tools.value.trim()) {
    try {
      toolsOf(parts.tools.value);
    } catch ({ message }) {
      return tellInSettings(message);
    }
  }
  store.keepSettings(Object.fromEntries(Object.entries(FIELDS).map(([name, id]) => [name, parts[id].value])));
  parts.settings.close();
  focusField();
});

function tellInSettings(line) {
  parts["settings-problem"].textContent = line;
  parts["settings-problem"].hidden = !line;
}

parts.forget.addEventListener("click", () => {
  if (running) return tellInSettings("Stop the answer first.");
  if (!confirm("Delete all conversations that this browser keeps?")) return;
  store.forgetAll();
  open(store.newConversation());
  parts.settings.close();
});

// An answer that is being written when the page goes is kept as far as it came.
addEventListener("pagehide", () => {
  if (!running) return;
  const { message, conversation: asked } = running;
  message.state = "stopped";
  message.line = "The page was closed before the answer ended.";
  stop(message.line);
  keep(asked);
});

store.whenChangedElsewhere(changedElsewhere);
store.keepOpenId(conversation.id);
draw();
drawConversations();
scrollToEnd();
focusField();
findModel();
