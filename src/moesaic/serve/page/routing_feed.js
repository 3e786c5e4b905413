// The live load of the model's experts, as the server tells it twice a second; the last minute of it is kept.
import { listen } from "./api.js";

const KEPT_S = 60;
const RETRY_MS = [1000, 2000, 5000, 10000];

export class RoutingFeed {
  /** `heard(feed)` is called after every window; `failed(error)` when the server does not answer. */
  constructor(heard, failed) {
    this.heard = heard;
    this.failed = failed;
    this.abort = null;
    this.forget();
  }

  forget() {
    this.windows = []; // {seconds, tokens, steps, layers}, the oldest first
    this.total = null;
    this.newest = null;
  }

  /** Listen for a model, and no longer for another. */
  async follow(model) {
    this.abort?.abort();
    const abort = (this.abort = new AbortController());
    this.forget();
    for (let tries = 0; !abort.signal.aborted; tries++) {
      try {
        for await (const { event, data } of listen("v1/routing/stream?model=" + encodeURIComponent(model), abort.signal)) {
          tries = 0;
          this.take(event, JSON.parse(data));
        }
      } catch (error) {
        if (abort.signal.aborted) return;
        if (error.status === 401 || error.status === 404) return this.failed(error);
        this.failed(error);
      }
      await new Promise((done) => setTimeout(done, RETRY_MS[Math.min(tries, RETRY_MS.length - 1)]));
    }
  }

  take(event, told) {
    if (event === "total") {
      this.windows = [];
      this.total = told;
    } else {
      this.windows.push(told);
      while (this.windows.length > 2 && this.seconds(this.windows) > KEPT_S) this.windows.shift();
      grow(this.total, told);
    }
    this.newest = told;
    this.heard(this);
  }

  seconds(windows) {
    return windows.reduce((total, { seconds }) => total + seconds, 0);
  }

  /** Steps, tokens and each layer's counts of the last seconds; 0: since the start. */
  over(seconds) {
    if (!seconds || !this.windows.length) return this.total;
    let from = this.windows.length;
    for (let left = seconds; from > 0 && left > 0; ) left -= this.windows[--from].seconds;
    const chosen = this.windows.slice(from);
    const all = { seconds: 0, steps: 0, tokens: 0, layers: this.total.layers.map((layer) => ({ ...layer, counts: layer.counts.map(() => 0), distinct: 0 })) };
    for (const window of chosen) {
      all.seconds += window.seconds;
      grow(all, window);
    }
    return all;
  }
}

function grow(total, window) {
  total.steps += window.steps;
  total.tokens += window.tokens;
  window.layers.forEach(({ counts, distinct }, at) => {
    const layer = total.layers[at];
    layer.distinct += distinct;
    counts.forEach((count, expert) => (layer.counts[expert] += count));
  });
}
