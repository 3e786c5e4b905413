// One message on the page.
import { beforeNextFrame, button, el, say } from "./dom.js";
import { TokenView } from "./tokens.js";
import { Written } from "./written.js";

/** Shows a message {role, text, reasoning, tokens, facts, trouble}. `actions`: edit, regenerate, look (at a token). */
export class MessageView {
  constructor(message, actions) {
    this.message = message;
    this.actions = actions;
    this.isAnswer = message.role === "assistant";
    this.body = el("div", { class: "body" });
    this.written = this.isAnswer && !message.plain ? new Written(this.body) : null;
    this.footer = el("footer");
    this.trouble = el("p", { class: "trouble", role: "alert", hidden: "" });
    const name = { user: "You", assistant: message.model || "Model" }[message.role];
    this.root = el("article", { class: "message " + message.role }, el("h3", {}, name), this.body, this.trouble, this.footer);
    this.tokens = null;
    this.update = beforeNextFrame(() => this.draw());
    this.draw();
  }

  set isWriting(writing) {
    this.root.classList.toggle("writing", writing);
    this.root.setAttribute("aria-busy", writing);
    this.writing = writing;
    this.draw();
  }

  draw() {
    const { text, reasoning, trouble } = this.message;
    this.drawReasoning(reasoning);
    if (this.tokens) this.catchUp();
    else if (this.written) this.written.show(text);
    else this.body.textContent = text;
    this.trouble.hidden = !trouble;
    if (this.trouble.textContent !== (trouble || "")) this.trouble.textContent = trouble || "";
    this.drawFooter();
  }

  drawReasoning(reasoning) {
    if (!reasoning) return;
    if (!this.reasoning) {
      this.reasoning = el("details", { class: "reasoning" }, el("summary", {}, "Reasoning"), el("div"));
      this.body.before(this.reasoning);
    }
    this.reasoning.lastChild.textContent = reasoning;
  }

  /** Tokens that have come since. */
  catchUp() {
    this.tokens.add((this.message.tokens || []).slice(this.tokens.tokens.length));
  }

  /** Coloured by experts, or as text. */
  colour(isColoured, focus) {
    if (!this.isAnswer || isColoured === Boolean(this.tokens) || (isColoured && !this.message.tokens?.length)) return;
    this.tokens = isColoured ? new TokenView((token) => this.actions.look(token)) : null;
    if (this.tokens) this.tokens.show(focus);
    (this.tokens ? this.body : this.shownTokens).replaceWith(this.tokens ? this.tokens.host : this.body);
    this.shownTokens = this.tokens?.host;
    this.draw();
  }

  /** By which layer and expert tokens are coloured. */
  focus(focus) {
    this.tokens?.show(focus);
  }

  drawFooter() {
    const state = [this.writing, this.message.tokens?.length > 0, Boolean(this.tokens), this.message.facts].join();
    if (state === this.footerState) return;
    this.footerState = state;
    const had = this.footer.contains(document.activeElement) ? document.activeElement.textContent : null;
    this.footer.replaceChildren(...this.buttons(), el("span", { class: "facts" }, this.message.facts || ""));
    if (had) [...this.footer.children].find((child) => child.textContent === had)?.focus();
  }

  buttons() {
    const colours = this.message.tokens?.length
      ? button("Experts", () => this.actions.colour(this, !this.tokens), { "aria-pressed": Boolean(this.tokens), title: "Colour tokens by their experts (e)" })
      : null;
    if (this.writing) return [colours].filter(Boolean);
    const copy = button("Copy", () => this.copy(copy));
    if (!this.isAnswer) return [copy, button("Edit", () => this.edit())];
    return [copy, button("Again", () => this.actions.regenerate(this.message), { title: "Write this answer again (r)" }), colours].filter(Boolean);
  }

  async copy(pressed) {
    try {
      await navigator.clipboard.writeText(this.message.text);
      say("copied");
      if (pressed) pressed.textContent = "Copied";
      setTimeout(() => pressed && (pressed.textContent = "Copy"), 1500);
    } catch {
      say("this browser does not allow copying here");
    }
  }

  /** Change a message of one's own; all that followed it is written anew. */
  edit() {
    const field = el("textarea", { "aria-label": "Edit the message" });
    field.value = this.message.text;
    const done = () => (form.replaceWith(this.body), (this.footer.hidden = false));
    const cancel = button("Cancel", done);
    const form = el("form", {}, field, el("footer", {}, el("button", { class: "primary" }, "Send again"), cancel));
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      if (field.value.trim()) this.actions.edit(this.message, field.value);
    });
    field.addEventListener("keydown", (event) => {
      if (event.key === "Escape") done();
      else if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        form.requestSubmit();
      }
    });
    this.body.replaceWith(form);
    this.footer.hidden = true;
    field.focus();
  }
}
