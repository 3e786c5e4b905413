// Load against time: a column for each window of the last minute. Above, how many tokens went through in it; below, how
// they fell on the experts of one layer, a line for each.
import { tip } from "./dom.js";
import { palette } from "./palette.js";
import { blank } from "./picture.js";
import { ratios, short } from "./numbers.js";

const SPAN_S = 60;
const BARS = 30; // pixels
const GAP = 4;
const SMOOTHED = 3; // windows: half a second of one request has too few tokens to tell much

export class LoadStrip {
  constructor(canvas) {
    this.canvas = canvas;
    this.columns = [];
    canvas.addEventListener("pointermove", (event) => this.hover(event));
    canvas.addEventListener("pointerleave", () => tip.hide());
    new ResizeObserver(() => this.draw()).observe(canvas.parentElement);
  }

  /** windows: of the feed; place: which of their layers. */
  show(windows, place) {
    this.num = windows.at(-1)?.layers[place]?.counts.length || 0;
    const counts = windows.map(({ layers }) => layers[place].counts);
    this.columns = windows.map(({ seconds }, at) => {
      const near = counts.slice(Math.max(0, at - SMOOTHED + 1), at + 1);
      return { seconds, tokens: windows[at].tokens, ratios: windows[at].tokens ? ratios(added(near)) : null };
    });
    this.draw();
  }

  draw() {
    if (!this.num || !this.canvas.parentElement.clientWidth) return;
    const height = Math.max(60, Math.min(180, this.num * 8));
    const { context, width } = blank(this.canvas, BARS + GAP + height);
    const most = Math.max(1, ...this.columns.map(({ seconds, tokens }) => tokens / seconds));
    const colours = palette();
    const line = height / this.num;
    context.fillStyle = colours.blank;
    context.fillRect(0, BARS + GAP, width, height);
    let right = width;
    this.edges = [];
    for (const column of this.columns.toReversed()) {
      const left = right - (column.seconds / SPAN_S) * width;
      this.edges.push([left, column]);
      const bar = (column.tokens / column.seconds / most) * BARS;
      context.fillStyle = colours.rate;
      context.fillRect(left, BARS - bar, right - left + 0.3, bar);
      column.ratios?.forEach((ratio, expert) => {
        context.fillStyle = colours.of(ratio);
        context.fillRect(left, BARS + GAP + expert * line, right - left + 0.5, line + 0.5);
      });
      right = left;
      if (right < 0) break;
    }
    context.fillStyle = colours.soft;
    context.font = `10.5px ${getComputedStyle(this.canvas).fontFamily}`;
    context.textBaseline = "top";
    if (this.columns.some(({ tokens }) => tokens)) context.fillText(`at most ${short(most)} tokens/s`, 0, 0);
    this.line = line;
  }

  hover(event) {
    const box = this.canvas.getBoundingClientRect();
    const expert = Math.floor((event.clientY - box.top - BARS - GAP) / this.line);
    const found = this.edges?.find(([left]) => event.clientX - box.left >= left);
    if (!found || expert >= this.num) return tip.hide();
    const ratio = found[1].ratios?.[expert] ?? null;
    const ago = ((box.right - event.clientX) / box.width) * SPAN_S;
    if (expert < 0) return tip.show(`${short(found[1].tokens / found[1].seconds)} tokens/s, ${ago.toFixed(0)} s ago`, event.clientX, event.clientY);
    tip.show(`expert ${expert}, ${ago.toFixed(0)} s ago: ${ratio === null ? "idle" : ratio.toFixed(2) + " × its fair share"}`, event.clientX, event.clientY);
  }
}

function added(lists) {
  return lists[0].map((_, at) => lists.reduce((total, list) => total + list[at], 0));
}
