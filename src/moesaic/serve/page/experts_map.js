// The map: a line for each layer, a cell for each expert, its colour its load.
import { tip } from "./dom.js";
import { palette } from "./palette.js";
import { blank } from "./picture.js";
import { ratios } from "./numbers.js";

const TALLEST = 22;
const MOST_HEIGHT = 300;
const LEFT = 26;

/** Draws on `canvas`. `pick(layer, expert)` is called for a cell that is chosen; `point(text)` tells of one in words. */
export class ExpertsMap {
  constructor(canvas, { pick, point }) {
    this.canvas = canvas;
    this.pick = pick;
    this.point = point;
    this.layers = [];
    this.token = null; // whose experts are marked
    this.focus = { layer: null, expert: null };
    this.at = { line: 0, expert: 0 };
    canvas.addEventListener("pointermove", (event) => this.hover(event));
    canvas.addEventListener("pointerleave", () => tip.hide());
    canvas.addEventListener("click", (event) => this.click(event));
    canvas.addEventListener("keydown", (event) => this.move(event));
    canvas.addEventListener("focus", () => this.draw());
    canvas.addEventListener("blur", () => this.draw());
    new ResizeObserver(() => this.draw()).observe(canvas.parentElement);
  }

  show(layers) {
    this.layers = layers;
    this.ratios = layers.map(({ counts }) => ratios(counts));
    this.draw();
  }

  size() {
    const columns = Math.max(...this.layers.map(({ counts }) => counts.length));
    const line = Math.max(3, Math.min(TALLEST, MOST_HEIGHT / this.layers.length));
    return { columns, line, height: Math.ceil(line * this.layers.length) };
  }

  draw() {
    if (!this.layers.length || !this.canvas.parentElement.clientWidth) return;
    const { columns, line, height } = this.size();
    const { context, width } = blank(this.canvas, height);
    const cell = (width - LEFT) / columns;
    const gap = Math.min(cell, line) > 5 ? 1 : 0;
    const colours = palette();
    const style = getComputedStyle(this.canvas);
    context.font = `10.5px ${style.fontFamily}`;
    context.textBaseline = "middle";
    const every = Math.ceil(13 / line);
    const box = (at, expert) => [LEFT + expert * cell, at * line, Math.max(1, cell - gap), Math.max(1, line - gap)];
    const focused = this.layers.findIndex(({ layer }) => layer === this.focus.layer);
    const isLabelled = (at) => at === focused || (at % every === 0 && (focused < 0 || Math.abs(at - focused) >= every));
    this.layers.forEach(({ layer, counts }, at) => {
      context.fillStyle = colours.ink;
      context.globalAlpha = at === focused ? 1 : 0.6;
      if (isLabelled(at)) context.fillText((at === focused ? "▸" : " ") + layer, 0, (at + 0.5) * line);
      context.globalAlpha = 1;
      counts.forEach((_, expert) => {
        context.fillStyle = colours.of(this.ratios[at][expert]);
        context.fillRect(...box(at, expert));
      });
    });
    const outline = (at, expert, width) => {
      const [x, y, w, h] = box(at, expert);
      // Two strokes, one of which is seen on any colour.
      for (const [stroke, inset, colour] of [[width, width / 2, colours.ink], [1, width + 0.5, colours.paper]]) {
        context.lineWidth = stroke;
        context.strokeStyle = colour;
        if (w > 2 * inset && h > 2 * inset) context.strokeRect(x + inset, y + inset, w - 2 * inset, h - 2 * inset);
      }
    };
    if (this.token) this.layers.forEach(({ layer }, at) => (this.token.experts[layer] || []).forEach((expert) => outline(at, expert, 1.5)));
    if (this.focus.expert !== null && focused >= 0) outline(focused, this.focus.expert, 2.5);
    if (document.activeElement === this.canvas) outline(this.at.line, this.at.expert, 2);
    this.cell = cell;
    this.line = line;
  }

  found(event) {
    const box = this.canvas.getBoundingClientRect();
    const line = Math.floor((event.clientY - box.top) / this.line);
    const expert = Math.floor((event.clientX - box.left - LEFT) / this.cell);
    const layer = this.layers[line];
    return layer && expert < layer.counts.length ? { line, expert } : null;
  }

  words({ line, expert }) {
    const ratio = this.ratios[line][expert];
    return `layer ${this.layers[line].layer}, expert ${expert}: ${ratio === null ? "no tokens" : ratio.toFixed(2) + " × its fair share, " + this.layers[line].counts[expert] + " tokens"}`;
  }

  hover(event) {
    const cell = this.found(event);
    if (!cell || cell.expert < 0) return tip.hide();
    tip.show(this.words(cell), event.clientX, event.clientY);
  }

  click(event) {
    const cell = this.found(event);
    if (!cell) return;
    this.at = { line: cell.line, expert: Math.max(0, cell.expert) };
    this.pick(this.layers[cell.line].layer, cell.expert < 0 ? null : cell.expert);
  }

  move(event) {
    const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (!this.layers.length || (!step && event.key !== "Enter" && event.key !== " ")) return;
    event.preventDefault();
    if (!step) return this.pick(this.layers[this.at.line].layer, this.at.expert);
    const line = Math.max(0, Math.min(this.layers.length - 1, this.at.line + step[0]));
    this.at = { line, expert: Math.max(0, Math.min(this.layers[line].counts.length - 1, this.at.expert + step[1])) };
    this.draw();
    this.point(this.words(this.at));
  }
}
