"use strict";
// The live page of `moesaic watch`: asks its own server every two seconds and draws what has changed.
(() => {
  const { bins, octaves } = JSON.parse(document.getElementById("settings").textContent);
  const HALF = (bins - 1) / 2;
  const NS = "http://www.w3.org/2000/svg";
  const byId = (id) => document.getElementById(id);
  const tip = byId("tip");
  let version = -1;
  let run = null;
  let missed = 0;

  const known = (value) => value !== null && value !== undefined;
  const fixed = (value, digits = 3) => (known(value) ? value.toFixed(digits) : "–");

  function short(value) {
    if (!known(value)) return "–";
    for (const [factor, prefix] of [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]]) {
      if (Math.abs(value) >= factor * 0.9995) return Number((value / factor).toPrecision(3)) + prefix;
    }
    return String(Number(value.toPrecision(3)));
  }

  function duration(seconds) {
    if (!known(seconds)) return "–";
    const whole = Math.round(seconds);
    if (whole < 60) return whole + " s";
    if (whole < 3600) return Math.floor(whole / 60) + " min " + String(whole % 60).padStart(2, "0") + " s";
    return Math.floor(whole / 3600) + " h " + String(Math.floor((whole % 3600) / 60)).padStart(2, "0") + " min";
  }

  function el(tag, attributes, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes || {})) element.setAttribute(name, value);
    element.append(...children.filter(known));
    return element;
  }

  function svg(tag, attributes, text) {
    const element = document.createElementNS(NS, tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    if (known(text)) element.textContent = text;
    return element;
  }

  function showTip(lines, x, y) {
    tip.replaceChildren(...lines.map(([name, value, style]) => el("div", { class: style || "" }, el("b", {}, name), el("span", {}, value))));
    tip.hidden = false;
    const box = tip.getBoundingClientRect();
    tip.style.left = Math.max(6, x + 16 + box.width > innerWidth ? x - 16 - box.width : x + 16) + "px";
    tip.style.top = Math.max(6, Math.min(innerHeight - box.height - 6, y - box.height - 12)) + "px";
  }

  const hideTip = () => (tip.hidden = true);

  function ticks(low, high, target) {
    const raw = (high - low) / Math.max(1, target - 1);
    if (!(raw > 0)) return [low];
    const power = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 2.5, 5, 10].map((factor) => factor * power).find((each) => each >= raw * 0.85) || 10 * power;
    const found = [];
    for (let at = Math.ceil(low / step - 1e-9); at <= Math.floor(high / step + 1e-9); at++) found.push(Number((at * step).toPrecision(10)));
    return found;
  }

  // Lines over steps. series: {name, xs, ys, style}. A curve's steep beginning may leave at the top.
  function chart(host, series, { title, floor, format = fixed }) {
    const lines = series.map((line) => ({ ...line, points: line.xs.map((x, at) => [x, line.ys[at]]).filter(([, y]) => known(y)) })).filter((line) => line.points.length);
    if (!lines.length) {
      host.replaceChildren(el("p", { class: "note" }, "nothing measured yet"));
      return;
    }
    const [width, height, left, top, right, bottom] = [420, 230, 50, 10, 14, 30];
    const xs = lines.flatMap((line) => line.points.map(([x]) => x));
    const ys = lines.flatMap((line) => line.points.map(([, y]) => y));
    const settled = lines.flatMap((line) => line.points.slice(Math.floor(line.points.length / 4)).map(([, y]) => y));
    let [x0, x1, y0, y1] = [Math.min(...xs), Math.max(...xs), Math.min(...ys), Math.max(...ys)];
    const isCut = floor === undefined && y1 - y0 > 1.6 * (Math.max(...settled) - y0) && Math.max(...settled) > y0;
    if (isCut) y1 = Math.max(...settled);
    if (floor !== undefined) y0 = Math.min(floor, y0);
    if (x1 === x0) [x0, x1] = [x0 - 1, x1 + 1];
    const pad = 0.06 * (y1 - y0) || Math.max(0.05 * Math.abs(y1), 1e-9);
    [y0, y1] = [floor === undefined ? y0 - pad : y0, y1 + pad];
    const px = (x) => left + ((width - left - right) * (x - x0)) / (x1 - x0);
    const py = (y) => top + (height - top - bottom) * (1 - (y - y0) / (y1 - y0));
    const picture = svg("svg", { class: "chart", role: "img", tabindex: 0, "aria-label": title, viewBox: `0 0 ${width} ${height}` });
    for (const y of ticks(y0, y1, 5)) {
      picture.append(svg("line", { class: "grid", x1: left, x2: width - right, y1: py(y), y2: py(y) }));
      picture.append(svg("text", { class: "tick", x: left - 7, y: py(y) + 4, "text-anchor": "end" }, Math.abs(y) >= 1000 ? short(y) : Number(y.toPrecision(4))));
    }
    for (const x of ticks(x0, x1, 5)) picture.append(svg("text", { class: "tick", x: px(x), y: height - bottom + 17, "text-anchor": "middle" }, short(x)));
    picture.append(svg("line", { class: "base", x1: left, x2: width - right, y1: height - bottom, y2: height - bottom }));
    if (isCut) picture.append(svg("text", { class: "axis", x: left + 4, y: top + 2 }, "the start lies above"));
    const inner = svg("svg", { x: left - 4, y: top, width: width - left - right + 8, height: height - top - bottom + 2, viewBox: `${left - 4} ${top} ${width - left - right + 8} ${height - top - bottom + 2}` });
    for (const line of lines) {
      const path = line.points.map(([x, y]) => `${px(x).toFixed(1)},${py(y).toFixed(1)}`).join(" ");
      if (line.points.length > 1) inner.append(svg("polyline", { class: "line " + line.style, points: path }));
      const end = line.points[line.points.length - 1];
      inner.append(svg("circle", { class: "dot " + line.style, cx: px(end[0]), cy: py(end[1]), r: 3 }));
    }
    picture.append(inner);
    const cursor = svg("line", { class: "cursor", y1: top, y2: height - bottom, visibility: "hidden" });
    picture.append(cursor);
    const steps = [...new Set(xs)].sort((a, b) => a - b);
    let place = steps.length - 1;
    function point(step, clientX, clientY) {
      cursor.setAttribute("x1", px(step));
      cursor.setAttribute("x2", px(step));
      cursor.setAttribute("visibility", "visible");
      const rows = lines.map((line) => {
        const near = line.points.reduce((a, b) => (Math.abs(b[0] - step) < Math.abs(a[0] - step) ? b : a));
        return [line.name, format(near[1]), line.style];
      });
      showTip([["step", short(step)], ...rows], clientX, clientY);
    }
    function leave() {
      cursor.setAttribute("visibility", "hidden");
      hideTip();
    }
    picture.addEventListener("pointermove", (event) => {
      const box = picture.getBoundingClientRect();
      const x = ((event.clientX - box.left) / box.width) * width;
      place = steps.reduce((best, step, at) => (Math.abs(px(step) - x) < Math.abs(px(steps[best]) - x) ? at : best), 0);
      point(steps[place], event.clientX, event.clientY);
    });
    picture.addEventListener("pointerleave", leave);
    picture.addEventListener("blur", leave);
    picture.addEventListener("keydown", (event) => {
      const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!move) return;
      event.preventDefault();
      place = Math.max(0, Math.min(steps.length - 1, place + move));
      const box = picture.getBoundingClientRect();
      point(steps[place], box.left + (px(steps[place]) / width) * box.width, box.top + box.height / 3);
    });
    host.replaceChildren(picture);
  }

  function bin(ratio) {
    if (!(ratio > 0)) return 0;
    return HALF + Math.round(Math.max(-HALF, Math.min(HALF, (Math.log2(ratio) / octaves) * HALF)));
  }

  function palette() {
    const style = getComputedStyle(document.documentElement);
    const colours = Array.from({ length: bins }, (_, at) => style.getPropertyValue("--h" + at).trim());
    return [colours, style.getPropertyValue("--blank").trim()];
  }

  // One canvas a layer: a pixel of it is a cell.
  function heats(router) {
    const host = byId("heats");
    const [colours, blank] = palette();
    while (host.children.length < router.layers.length) {
      const canvas = el("canvas", { role: "img" });
      host.append(el("figure", {}, el("figcaption", {}, ""), canvas, el("div", { class: "heat-foot" }, el("span", {}), el("span", {}))));
    }
    while (host.children.length > router.layers.length) host.lastChild.remove();
    router.layers.forEach((layer, index) => {
      const [caption, canvas, foot] = host.children[index].children;
      const columns = router.steps.length;
      caption.replaceChildren(`Layer ${layer.layer}`, el("small", { class: layer.dead ? "dead" : "" }, `${layer.num_experts} experts` + (known(layer.dead) ? `, ${layer.dead} dead now` : "")));
      canvas.width = columns;
      canvas.height = layer.num_experts;
      canvas.style.height = Math.max(110, Math.min(200, layer.num_experts * 5)) + "px";
      canvas.setAttribute("aria-label", `load of the ${layer.num_experts} experts of layer ${layer.layer} over steps`);
      const context = canvas.getContext("2d");
      layer.ratios.forEach((column, x) => column.forEach((ratio, y) => {
        context.fillStyle = known(ratio) ? colours[bin(ratio)] : blank;
        context.fillRect(x, y, 1, 1);
      }));
      foot.children[0].textContent = "step " + router.steps[0];
      foot.children[1].textContent = "step " + router.steps[columns - 1];
      canvas.onpointermove = (event) => {
        const box = canvas.getBoundingClientRect();
        const x = Math.min(columns - 1, Math.floor(((event.clientX - box.left) / box.width) * columns));
        const y = Math.min(layer.num_experts - 1, Math.floor(((event.clientY - box.top) / box.height) * layer.num_experts));
        const ratio = (layer.ratios[x] || [])[y];
        showTip([["layer " + layer.layer + ", expert " + y, ""], ["step " + router.steps[x], known(ratio) ? ratio.toFixed(2) + " × the fair share" : "no rows"]], event.clientX, event.clientY);
      };
      canvas.onpointerleave = hideTip;
    });
  }

  const layerStyle = (index, count) => "l" + Math.round((index * 7) / Math.max(1, count - 1));

  function drawRun() {
    if (!run) return;
    byId("curves").hidden = !run.steps.length;
    chart(byId("loss"), [{ name: "loss", xs: run.steps, ys: run.loss, style: "s0" }], { title: "training loss over steps" });
    chart(byId("held-out"), [{ name: "held-out", xs: run.held_out.map(([x]) => x), ys: run.held_out.map(([, y]) => y), style: "s1 solid" }], { title: "held-out bits per byte over steps" });
    chart(byId("speed"), [{ name: "tokens/s", xs: run.steps, ys: run.tokens_per_s, style: "s2 solid" }], { title: "tokens a second over steps", floor: 0, format: short });
    const domains = Object.entries(run.by_domain);
    byId("domains").hidden = !domains.length;
    byId("by-domain").replaceChildren(...domains.map(([name, value]) => el("tr", {}, el("th", { scope: "row" }, name), el("td", {}, fixed(value)))));
    const router = run.router;
    byId("router").hidden = !router;
    if (!router) return;
    const sign = router.is_healthy ? "✓" : "✗";
    byId("verdict").replaceChildren(el("li", { class: router.is_healthy ? "good" : "bad" }, el("span", { class: "mark", "aria-hidden": "true" }, sign), el("span", {}, "router: " + router.verdict)));
    heats(router);
    const count = router.layers.length;
    const named = router.layers.map((layer, at) => [layer, at]).filter(([, at]) => count <= 12 || at % Math.ceil(count / 8) === 0);
    byId("layers").replaceChildren(...named.map(([layer, at]) => el("li", { class: layerStyle(at, count) }, el("i", {}), "layer " + layer.layer)));
    for (const [place, key, floor] of [["violation", "max_violation", 0], ["entropy", "load_entropy", undefined]]) {
      const series = router.layers.map((layer, at) => ({ name: "layer " + layer.layer, xs: router.steps, ys: layer[key], style: layerStyle(at, router.layers.length) }));
      chart(byId(place), series, { title: key.replace("_", " ") + " by layer over steps", floor });
    }
  }

  function drawStanding(state) {
    document.title = state.num_steps ? `${Math.floor((100 * state.step) / state.num_steps)} % · ${state.name}` : state.name;
    byId("name").textContent = state.name;
    const status = byId("status");
    status.className = "lead " + state.status;
    const more = [state.status_text];
    if (state.restarts) more.push(`taken up again ${state.restarts} time${state.restarts > 1 ? "s" : ""} while watched`);
    if (state.unreadable) more.push(`${state.unreadable} lines could not be read`);
    status.textContent = more.join("; ");
    byId("done").style.width = state.num_steps ? (100 * state.step) / state.num_steps + "%" : "0";
    const last = (run && run.last) || {};
    const router = run && run.router;
    const tiles = [
      ["step", String(state.step), state.num_steps ? "of " + state.num_steps : ""],
      ["loss", fixed(last.loss), "nats a token"],
      ["held-out", run && run.held_out.length ? fixed(run.held_out[run.held_out.length - 1][1]) : "–", "bits per byte"],
      ["throughput", short(last.tokens_per_s), "tokens/s"],
      ["time spent", duration(state.seconds), ""],
      ["time left", duration(state.seconds_left), ""],
      ["memory", known(last.peak_memory_bytes) ? short(last.peak_memory_bytes) + "B" : "–", "at most"],
    ];
    if (router) tiles.push(["MaxVio", fixed(router.max_violation, 2), "mean of layers"]);
    byId("tiles").replaceChildren(...tiles.map(([name, value, unit]) => el("div", {}, el("dt", {}, name), el("dd", {}, value, el("small", {}, unit)))));
  }

  async function ask() {
    try {
      const answer = await fetch("state?version=" + version, { cache: "no-store" });
      if (!answer.ok) throw new Error(answer.statusText);
      const state = await answer.json();
      missed = 0;
      if (state.run) run = state.run;
      drawStanding(state);
      if (state.version !== version) drawRun();
      version = state.version;
    } catch {
      missed += 1;
      if (missed > 1) {
        const status = byId("status");
        status.className = "lead gone";
        status.textContent = "nobody answers any more: what stands here is the last that was heard; `moesaic watch RUN` opens it again";
      }
    }
    setTimeout(ask, document.hidden ? 10000 : 2000);
  }

  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawRun);
  ask();
})();
