// The conversation: its messages, kept in this browser, and what is being written.
import { write } from "./answer.js";
import { ApiError } from "./api.js";
import { byId, el, say } from "./dom.js";
import { MessageView } from "./message.js";
import { load, save } from "./store.js";

const log = byId("log");
const KEPT = ["role", "text", "reasoning", "facts", "trouble", "model", "plain"];

export class Conversation {
  /** `context`: model() and routes() of what is chosen; askKey(again), look(token), plain(isPlain) to be told. */
  constructor(context) {
    this.context = context;
    this.messages = load("conversation", []);
    this.views = new Map();
    this.coloured = load("coloured", false);
    this.focused = { layer: null, expert: null };
    this.abort = null;
    log.addEventListener("scroll", () => (this.follows = log.scrollHeight - log.scrollTop - log.clientHeight < 40));
    this.follows = true;
    this.draw();
  }

  get isWriting() {
    return this.abort !== null;
  }

  draw() {
    const shown = this.messages.map((message) => this.viewOf(message).root);
    log.replaceChildren(...(shown.length ? shown : [welcome()]));
    this.follow();
  }

  viewOf(message) {
    if (!this.views.has(message)) {
      const actions = {
        edit: (own, text) => this.edit(own, text),
        regenerate: (answer) => this.regenerate(answer),
        colour: (view, on) => this.colour(on),
        look: (token) => this.context.look(token),
      };
      this.views.set(message, new MessageView(message, actions));
    }
    return this.views.get(message);
  }

  keep() {
    save("conversation", this.messages.map((message) => Object.fromEntries(KEPT.filter((name) => name in message).map((name) => [name, message[name]]))));
  }

  async send(text) {
    if (this.isWriting || !text) return;
    this.messages.push({ role: "user", text });
    await this.answer();
  }

  /** Write an answer to the messages as they stand. */
  async answer() {
    const model = this.context.model();
    const message = { role: "assistant", text: "", model: model?.id };
    const before = [...this.messages];
    this.messages.push(message);
    this.abort = new AbortController();
    this.follows = true;
    this.draw();
    const view = this.viewOf(message);
    view.isWriting = true;
    this.context.changed();
    const changed = () => {
      view.update();
      if (this.coloured && !view.tokens) view.colour(true, this.focused);
      this.follow();
    };
    try {
      const plain = await write(model, before, message, { signal: this.abort.signal, changed, routes: this.context.routes() });
      this.context.plain(plain);
      say("the answer is complete");
    } catch (error) {
      this.failed(message, error);
    } finally {
      this.abort = null;
      view.isWriting = false;
      this.follow();
      this.keep();
      this.context.changed();
    }
  }

  failed(message, error) {
    if (error.name === "AbortError") {
      message.facts = "stopped";
      say("stopped");
      return;
    }
    if (!(error instanceof ApiError)) console.error(error);
    message.trouble = error.message;
    if (error.status === 401) this.context.askKey();
  }

  stop() {
    this.abort?.abort();
  }

  regenerate(answer = this.messages.at(-1)) {
    const place = this.messages.indexOf(answer);
    if (this.isWriting || place < 1) return;
    this.messages.length = place;
    this.answer();
  }

  edit(own, text) {
    if (this.isWriting) return;
    this.messages.length = this.messages.indexOf(own);
    this.send(text);
  }

  editLast() {
    const own = this.messages.findLast(({ role }) => role === "user");
    if (own && !this.isWriting) this.viewOf(own).edit();
  }

  copyLast() {
    const answer = this.messages.findLast(({ role }) => role === "assistant");
    if (answer) this.viewOf(answer).copy();
  }

  clear() {
    this.stop();
    this.messages = [];
    this.views.clear();
    this.keep();
    this.draw();
  }

  /** Show all answers coloured by experts, or as text. */
  colour(on = !this.coloured) {
    this.coloured = on;
    save("coloured", on);
    for (const view of this.views.values()) view.colour(on, this.focused);
  }

  /** Colour by another layer, or show the tokens of one expert alone. */
  focus(focus) {
    this.focused = focus;
    for (const view of this.views.values()) view.focus(focus);
  }

  follow() {
    if (this.follows) requestAnimationFrame(() => (log.scrollTop = log.scrollHeight));
  }
}

function welcome() {
  return el("div", { class: "welcome" }, el("h2", {}, "Ask the model something"), el("p", {}, "Nothing that is written here leaves this server."));
}
