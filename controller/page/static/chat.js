// The conversation, through the OpenAI front on this page's own address.

import { ask, events } from "./stream.js";
import { duration, element, show } from "./text.js";

const find = (id) => document.getElementById(id);
const log = find("log");
const question = find("question");

export class Chat {
  constructor(onRefused) {
    this.onRefused = onRefused;
    this.model = null;
    this.turns = [];
    this.cancel = null;
    find("ask").addEventListener("submit", (event) => {
      event.preventDefault();
      this.send(question.value);
    });
    question.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        this.send(question.value);
      }
    });
    question.addEventListener("input", () => this.settle());
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape") this.cancel?.abort();
    });
    find("stop").addEventListener("click", () => this.cancel?.abort());
    find("clear").addEventListener("click", () => this.clear());
    for (const button of document.querySelectorAll(".example")) {
      button.addEventListener("click", () => this.send(button.textContent));
    }
    this.settle();
  }

  /** What is served; before that, nothing can be sent. */
  serve(model) {
    this.model = model;
    const most = find("max-tokens");
    most.max = model.max_context;
    most.value = Math.min(most.valueAsNumber || 256, Math.ceil(model.max_context / 2));
    this.settle();
  }

  settle() {
    if (!CSS.supports("field-sizing", "content")) {
      question.style.height = "auto";
      question.style.height = `${question.scrollHeight}px`;
    }
    find("send").disabled = !this.model || !question.value.trim();
    find("send").hidden = this.cancel !== null;
    find("stop").hidden = this.cancel === null;
    find("clear").hidden = !this.turns.length || this.cancel !== null;
  }

  clear() {
    this.turns = [];
    log.replaceChildren(find("welcome") ?? this.welcome);
    this.settle();
    question.focus();
  }

  body(text) {
    const fields = {
      model: this.model.name,
      max_tokens: find("max-tokens").valueAsNumber || 256,
      stream: true,
      stream_options: { include_usage: true },
    };
    const temperature = find("temperature").valueAsNumber;
    if (!Number.isNaN(temperature)) fields.temperature = temperature;
    if (find("seed").value) fields.seed = find("seed").valueAsNumber;
    if (!this.model.chat) return { ...fields, prompt: text };
    const system = find("system").value.trim();
    const first = system ? [{ role: "system", content: system }] : [];
    return { ...fields, messages: [...first, ...this.turns, { role: "user", content: text }] };
  }

  async send(text) {
    text = text.trim();
    if (!text || !this.model || this.cancel) return;
    const body = this.body(text);
    this.welcome ??= find("welcome");
    this.welcome.remove();
    question.value = "";
    const asked = element("div", { class: "turn user" }, element("div", { class: "said" }, text));
    const turn = new Turn();
    log.append(asked, turn.root);
    log.scrollTop = log.scrollHeight;
    this.cancel = new AbortController();
    this.settle();
    try {
      await this.read(body, turn);
      turn.end(this.turnFacts(turn));
    } catch (error) {
      turn.fail(error, this.cancel.signal.aborted);
      if (error.status === 401) this.onRefused();
    }
    this.cancel = null;
    if (turn.text) this.turns.push({ role: "user", content: text }, { role: "assistant", content: turn.text });
    find("announce").textContent = turn.text ? `Answer: ${turn.text}` : "No answer";
    this.settle();
  }

  async read(body, turn) {
    const path = this.model.chat ? "api/v1/chat/completions" : "api/v1/completions";
    const began = performance.now();
    const answer = await ask(path, {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(body),
      signal: this.cancel.signal,
    });
    for await (const data of events(answer)) {
      if (data === "[DONE]") break;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(chunk.error.message);
      turn.take(chunk, began);
    }
  }

  turnFacts(turn) {
    const facts = [];
    if (turn.firstMs !== null) facts.push(`first token ${duration(turn.firstMs / 1000).join(" ")}`);
    const span = (turn.lastMs - turn.firstMs) / 1000;
    if (turn.tokens > 1 && span > 0) facts.push(`${((turn.tokens - 1) / span).toFixed(1)} tokens/s`);
    if (turn.tokens) facts.push(`${turn.tokens} tokens`);
    if (turn.finish === "length") facts.push("cut at the most tokens");
    return facts;
  }
}

class Turn {
  constructor() {
    this.said = element("div", { class: "said" });
    this.root = element("div", { class: "turn answer", "aria-busy": "true" }, this.said);
    Object.assign(this, { text: "", tokens: 0, finish: null, firstMs: null, lastMs: 0, drawn: false });
  }

  take(chunk, began) {
    const [choice] = chunk.choices ?? [];
    const text = choice?.delta?.content ?? choice?.text ?? "";
    if (chunk.usage) this.tokens = chunk.usage.completion_tokens;
    if (choice?.finish_reason) this.finish = choice.finish_reason;
    if (!text) return;
    this.lastMs = performance.now() - began;
    this.firstMs ??= this.lastMs;
    this.text += text;
    if (this.drawn) return;
    this.drawn = true;
    requestAnimationFrame(() => this.draw());
  }

  draw() {
    this.drawn = false;
    const below = log.scrollHeight - log.scrollTop - log.clientHeight;
    show(this.said, this.text);
    if (below < 60) log.scrollTop = log.scrollHeight;
  }

  end(facts) {
    this.draw();
    this.root.setAttribute("aria-busy", "false");
    const copy = element("button", { type: "button" }, "Copy");
    copy.addEventListener("click", async () => {
      await navigator.clipboard.writeText(this.text);
      copy.textContent = "Copied";
    });
    const items = facts.map((fact) => element("span", {}, fact));
    this.root.append(element("div", { class: "facts" }, ...items, ...(this.text ? [copy] : [])));
    log.scrollTop = log.scrollHeight;
  }

  fail(error, stopped) {
    this.end(stopped ? ["stopped"] : []);
    if (!stopped) this.root.append(element("p", { class: "error", role: "alert" }, error.message));
    log.scrollTop = log.scrollHeight;
  }
}
