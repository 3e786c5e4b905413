// The tokens of an answer, coloured by the expert that a layer chose first for each.
import { el, tip } from "./dom.js";

export const hue = (expert) => ((expert * 137.508) % 360).toFixed(1);

/** White space made visible, so that a token of nothing else can be seen. */
export const visible = (text) => text.replace(/\n/g, "↵").replace(/\t/g, "⇥").replace(/^ +| +$/g, (gap) => "·".repeat(gap.length));

/** What an answer's chunks tell: tokens [{text, experts: {layer: [ids]}}]. */
export function tokensOf(told) {
  return told.tokens.map((text, at) => {
    const experts = {};
    for (const [layer, rows] of Object.entries(told.experts)) experts[layer] = rows[at].filter((id) => id >= 0);
    return { text, experts };
  });
}

/** The coloured tokens of one answer. `focus` {layer, expert or null} says by which layer, and which expert alone;
 * `look(token)` is told which token is pointed at or moved to. */
export class TokenView {
  constructor(look) {
    this.tokens = [];
    this.focus = { layer: null, expert: null };
    this.look = look;
    this.chosen = -1;
    this.host = el("div", { class: "tokens", tabindex: 0, role: "group", "aria-label": "tokens by expert; arrow keys move from token to token" });
    this.host.addEventListener("pointerover", (event) => this.pointed(event));
    this.host.addEventListener("pointerleave", () => tip.hide());
    this.host.addEventListener("blur", () => tip.hide());
    this.host.addEventListener("keydown", (event) => this.moved(event));
  }

  add(tokens) {
    this.tokens.push(...tokens);
    this.host.append(...tokens.map((token) => this.paint(el("span", {}, token.text), token)));
  }

  show(focus) {
    this.focus = focus;
    [...this.host.children].forEach((span, at) => this.paint(span, this.tokens[at]));
  }

  paint(span, token) {
    const experts = token.experts[this.focus.layer] || [];
    span.style.setProperty("--hue", experts.length ? hue(experts[0]) : 0);
    span.classList.toggle("none", !experts.length);
    span.classList.toggle("dim", this.focus.expert !== null && !experts.includes(this.focus.expert));
    return span;
  }

  pointed(event) {
    const place = [...this.host.children].indexOf(event.target);
    if (place >= 0) this.choose(place);
  }

  moved(event) {
    const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -1, ArrowDown: 1, Home: -Infinity, End: Infinity }[event.key];
    if (!step || !this.tokens.length) return;
    event.preventDefault();
    this.choose(Math.max(0, Math.min(this.tokens.length - 1, this.chosen + step)));
  }

  words(token) {
    const experts = token.experts[this.focus.layer] || [];
    return `layer ${this.focus.layer}: ${experts.length ? "expert" + (experts.length > 1 ? "s " : " ") + experts.join(", ") : "no expert"}`;
  }

  choose(place) {
    this.host.children[this.chosen]?.classList.remove("chosen");
    this.chosen = place;
    const span = this.host.children[place];
    span.classList.add("chosen");
    span.scrollIntoView({ block: "nearest" });
    this.look(this.tokens[place]);
    const box = span.getBoundingClientRect();
    tip.show(this.words(this.tokens[place]), box.left, box.top);
  }
}
