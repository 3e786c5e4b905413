// The panel of the experts at work: it follows the model, the chosen layer, and the token that is looked at.
import { byId, el, facts } from "./dom.js";
import { ExpertsMap } from "./experts_map.js";
import { LoadStrip } from "./load_strip.js";
import { fixed, percent, short } from "./numbers.js";
import { palette } from "./palette.js";
import { RoutingFeed } from "./routing_feed.js";
import { visible } from "./tokens.js";

export class ExpertsPanel {
  /** `focused({layer, expert})` is told by what tokens are to be coloured. */
  constructor(focused) {
    this.focused = focused;
    this.focus = { layer: null, expert: null };
    this.map = new ExpertsMap(byId("map"), { pick: (layer, expert) => this.pick(layer, expert), point: (text) => (byId("map-cell").textContent = text) });
    this.strip = new LoadStrip(byId("strip"));
    this.feed = new RoutingFeed(() => this.draw(), (error) => this.missing(error.message));
    byId("span").addEventListener("change", () => this.draw());
    byId("layer").addEventListener("change", (event) => this.choose({ layer: Number(event.target.value), expert: null }));
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => (drawScale(), this.draw()));
    drawScale();
  }

  get routes() {
    return Boolean(this.feed.total?.routes);
  }

  follow(model) {
    byId("experts").hidden = true;
    byId("no-experts").hidden = true;
    this.choose({ layer: null, expert: null });
    this.feed.follow(model);
  }

  missing(text) {
    byId("no-experts").hidden = false;
    byId("no-experts").textContent = text;
  }

  draw() {
    const { total, newest } = this.feed;
    this.drawTiles(total, newest);
    byId("experts").hidden = !total.routes;
    byId("no-experts").hidden = total.routes;
    if (!total.routes) return this.missing("This model is dense: it has no experts to choose from.");
    if (this.focus.layer === null) this.start(total.layers);
    const place = total.layers.findIndex(({ layer }) => layer === this.focus.layer);
    const shown = this.feed.over(Number(byId("span").value));
    this.map.show(shown.layers);
    byId("map").setAttribute("aria-label", `load of every expert in ${shown.layers.length} layers; arrow keys move, Enter chooses`);
    this.strip.show(this.feed.windows, place);
    byId("strip").setAttribute("aria-label", `load of the experts of layer ${this.focus.layer} over the last minute`);
    this.drawLayer(shown, place);
  }

  start(layers) {
    byId("layer").replaceChildren(...layers.map(({ layer }) => el("option", { value: layer }, String(layer))));
    this.choose({ layer: layers[Math.floor(layers.length / 2)].layer, expert: null });
  }

  drawTiles(total, newest) {
    const recent = this.feed.over(5);
    const rate = recent !== total && recent.seconds ? recent.tokens / recent.seconds : 0;
    const serving = newest.serving || {};
    const tiles = [["throughput", short(rate), "tok/s"], ["at work", short(serving.running), serving.waiting ? `+${serving.waiting} wait` : ""]];
    tiles.push(["cache", percent(serving.cache_used)], ["since start", short(total.tokens), "tok"]);
    byId("tiles").replaceChildren(...facts(tiles));
  }

  drawLayer(shown, place) {
    const layer = shown.layers[place];
    const shares = layer.counts.filter((count) => count).map((count) => count / layer.counts.reduce((a, b) => a + b));
    const worth = shares.length ? Math.exp(-shares.reduce((total, share) => total + share * Math.log(share), 0)) : null;
    byId("layer-facts").replaceChildren(
      ...facts([
        ["experts", `${layer.num_experts}, ${layer.top_k} a token`],
        ["as good as", worth === null ? "–" : fixed(worth, 1) + " even ones"],
        ["a step uses", shown.steps ? fixed(layer.distinct / shown.steps, 1) + " of them" : "–"],
      ]),
    );
  }

  pick(layer, expert) {
    const again = layer === this.focus.layer && expert === this.focus.expert;
    this.choose({ layer, expert: again ? null : expert });
  }

  choose(focus) {
    this.focus = this.map.focus = focus;
    byId("layer").value = String(focus.layer);
    const cell = focus.expert === null ? "Choose a cell to see the tokens of that expert alone." : `Layer ${focus.layer}, expert ${focus.expert}: its tokens alone are coloured.`;
    byId("map-cell").textContent = cell;
    this.focused(focus);
    if (this.feed.total && focus.layer !== null) this.draw();
    this.lookAt(this.token);
  }

  /** The next or the previous layer. */
  step(by) {
    const layers = this.feed.total?.layers || [];
    const place = layers.findIndex(({ layer }) => layer === this.focus.layer) + by;
    if (layers[place]) this.choose({ layer: layers[place].layer, expert: null });
  }

  /** Tell the experts of a token in all layers. */
  lookAt(token) {
    this.token = this.map.token = token;
    byId("token").hidden = !token;
    if (!token) return;
    const lines = Object.entries(token.experts).map(([layer, experts]) =>
      el("li", { class: Number(layer) === this.focus.layer ? "here" : null }, el("span", {}, layer), el("span", {}, experts.join(", ") || "none")),
    );
    byId("token").replaceChildren(el("h3", {}, "Experts of ", el("code", {}, visible(token.text))), el("ol", { "aria-label": "by layer" }, ...lines));
    this.map.draw();
  }
}

function drawScale() {
  byId("scale").replaceChildren(
    ...palette().colours.map((colour) => {
      const cell = el("b");
      cell.style.background = colour;
      return cell;
    }),
  );
}
