// A message as it is shown. `update` may be called after each piece of an answer.

import { button, copyButton, fit, isTouched, make } from "./dom.js";
import { render } from "./markdown.js";

const SHORTEST = 0.02; // seconds of an answer that say how fast it was

// What a reader can do: { edit(message, text), retry(), goOn(), sendResults(results) }.
export function viewOf(message, deeds) {
  if (message.role === "assistant") return new AnswerView(message, deeds);
  return message.role === "tool" ? new ResultView(message) : new UserView(message, deeds);
}

function article(kind, name) {
  return make("article", { class: kind, "aria-label": name });
}

class UserView {
  constructor(message, deeds) {
    this.message = message;
    this.element = article("user", "You");
    this.text = make("div", { class: "text", dir: "auto" }, message.content);
    this.actions = make("div", { class: "actions" },
      copyButton(() => message.content, { "aria-label": "Copy your message" }),
      button("Edit", () => this.edit(), { class: "edit", "aria-label": "Edit your message" }));
    this.deeds = deeds;
    this.element.append(this.text, this.actions);
  }

  update() {}

  edit() {
    const field = make("textarea", { "aria-label": "Edit your message" });
    field.value = this.message.content;
    const close = () => this.element.replaceChildren(this.text, this.actions);
    const form = make("form", { class: "editing" }, field, make("div", { class: "buttons" },
      make("span", { class: "quiet" }, "What follows is replaced."),
      button("Cancel", () => { close(); this.actions.querySelector(".edit").focus(); }),
      make("button", { type: "submit" }, "Send")));
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      if (field.value.trim()) this.deeds.edit(this.message, field.value);
    });
    field.addEventListener("keydown", (event) => {
      if (isEnter(event)) {
        event.preventDefault();
        form.requestSubmit();
      } else if (event.key === "Escape") {
        event.stopPropagation();
        form.querySelector("button").click();
      }
    });
    field.addEventListener("input", () => fit(field));
    this.element.replaceChildren(form);
    fit(field);
    field.focus();
    field.setSelectionRange(field.value.length, field.value.length);
  }
}

class ResultView {
  constructor({ name, content }) {
    this.element = article("result", `Result of ${name}`);
    this.element.append(make("h3", {}, `Result of ${name}`), make("pre", { tabindex: 0 }, content));
  }

  update() {}
}

class AnswerView {
  constructor(message, deeds) {
    this.message = message;
    this.deeds = deeds;
    this.element = article("assistant", "Answer");
    this.text = make("div", { class: "text" });
    this.calls = make("div", { class: "calls" });
    this.state = make("p", { class: "state" });
    this.usage = make("span", { class: "usage quiet" });
    this.retry = button("Retry", () => deeds.retry(), { class: "retry" });
    this.goOn = button("Continue", () => deeds.goOn(), { class: "go-on" });
    this.copy = copyButton(() => message.content, { "aria-label": "Copy the answer" });
    this.actions = make("div", { class: "actions" }, this.copy, this.retry, this.goOn, this.usage);
    this.element.append(this.text, this.calls, this.state, this.actions);
  }

  // `isLast`: nothing follows; `isRunning`: it is being written, by this tab.
  update({ isLast, isRunning }) {
    const { message } = this;
    this.element.setAttribute("aria-busy", isRunning);
    if (this.shown !== message.content) render(this.text, (this.shown = message.content));
    this.updateCalls(isLast && message.state === "done");
    const [kind, line] = isRunning ? ["waiting", waiting(message)] : stateOf(message);
    this.state.className = `state ${kind}`;
    if (this.state.textContent !== line) this.state.textContent = line;
    this.state.hidden = !line;
    this.actions.hidden = isRunning;
    this.copy.hidden = !message.content;
    this.retry.hidden = !isLast;
    this.goOn.hidden = !isLast || !message.content || !["length", "stopped", "running", "failed"].includes(message.state);
    this.usage.textContent = usageOf(message);
  }

  updateCalls(wantsResults) {
    const seen = JSON.stringify([this.message.calls, wantsResults]);
    if (this.seen === seen) return;
    this.seen = seen;
    const fields = [];
    this.calls.replaceChildren(...this.message.calls.map((call) => {
      const box = make("section", { class: "call", "aria-label": `Call of ${call.name}` },
        make("h3", {}, "Call of ", make("code", {}, call.name)),
        make("pre", { tabindex: 0 }, pretty(call.arguments)));
      if (wantsResults) {
        const field = make("textarea", { rows: 1, "aria-label": `Result of ${call.name}`, placeholder: "Its result" });
        field.addEventListener("input", () => fit(field));
        fields.push(field);
        box.append(field);
      }
      return box;
    }));
    if (fields.length) {
      const send = () => this.deeds.sendResults(fields.map((field) => field.value));
      this.calls.append(button(fields.length > 1 ? "Send the results" : "Send the result", send, { class: "send-results" }));
    }
  }
}

// Whether a key sends what a field holds. On a screen that is touched, Enter begins a line.
export function isEnter(event) {
  return event.key === "Enter" && !event.shiftKey && !event.isComposing && !isTouched();
}

function pretty(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text;
  }
}

function waiting({ content, calls, progress }) {
  if (content || calls.length) return "";
  if (!progress || progress.processed >= progress.total) return "…";
  return `Reading the prompt: ${count(progress.processed)} of ${count(progress.total)} tokens`;
}

function stateOf({ state, line, usage }) {
  if (state === "failed") return ["problem", line ?? "The answer failed."];
  if (state === "stopped") return ["stopped", line ?? "Stopped."];
  if (state === "running") return ["stopped", "This answer was not finished here."]; // by a tab that is gone, or another one
  if (state === "length") {
    const tokens = usage ? ` after ${count(usage.completion_tokens)} tokens` : "";
    return ["stopped", `Cut${tokens}, the most an answer may have: see Settings, or continue.`];
  }
  return ["", ""];
}

function usageOf({ usage, seconds }) {
  if (!usage) return "";
  const drawn = usage.completion_tokens;
  const cached = usage.prompt_tokens_details?.cached_tokens ?? 0;
  const parts = [`${count(drawn)} tokens`];
  if (seconds > SHORTEST) parts.push(`${((drawn - 1) / seconds).toFixed(1)} tok/s`);
  parts.push(`prompt ${count(usage.prompt_tokens)}`, `${count(cached)} cached`);
  return parts.join(" · ");
}

function count(number) {
  return number.toLocaleString("en");
}
