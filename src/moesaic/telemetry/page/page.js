"use strict";
(() => {
  const tip = document.getElementById("tip");

  function show(x, y) {
    tip.hidden = false;
    const box = tip.getBoundingClientRect();
    const left = x + 16 + box.width > innerWidth ? x - 16 - box.width : x + 16;
    tip.style.left = Math.max(6, left) + "px";
    tip.style.top = Math.max(6, Math.min(innerHeight - box.height - 6, y - box.height - 12)) + "px";
  }

  function line(name, value, style) {
    const row = document.createElement("div");
    const label = document.createElement("b");
    const text = document.createElement("span");
    row.className = style;
    label.textContent = name;
    text.textContent = value;
    row.append(label, text);
    return row;
  }

  // One tip for every cell and bar.
  document.addEventListener("pointerover", (event) => {
    const cell = event.target.closest("[data-tip]");
    if (!cell) {
      if (!event.target.closest("svg.chart")) tip.hidden = true;
      return;
    }
    tip.replaceChildren(document.createTextNode(cell.dataset.tip));
    show(event.clientX, event.clientY);
  });

  // Line charts: the values of every line nearest to the pointer, also by the arrow keys.
  for (const chart of document.querySelectorAll("svg.chart")) {
    const data = JSON.parse(chart.dataset.chart);
    const places = [...new Set(data.series.flatMap((series) => series.at.map((point) => point[0])))].sort((a, b) => a - b);
    let layer = null;
    let place = places.length - 1;

    function mark(tag, attributes) {
      const element = document.createElementNS(chart.namespaceURI, tag);
      for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
      layer.append(element);
    }

    function hide() {
      if (layer) layer.remove();
      layer = null;
      tip.hidden = true;
    }

    function point(x, clientX, clientY) {
      hide();
      layer = document.createElementNS(chart.namespaceURI, "g");
      const rows = [];
      let heading = "";
      mark("line", { class: "cursor", x1: x, x2: x, y1: data.top, y2: data.bottom });
      for (const series of data.series) {
        const near = series.at.reduce((a, b) => (Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a));
        if (Math.abs(near[0] - x) > 12) continue;
        if (near[1] >= data.top - 4) mark("circle", { class: "knob " + series.style, cx: near[0], cy: near[1], r: 4.5 });
        rows.push(line(series.name, near[3], series.style));
        heading = heading || near[2];
      }
      chart.append(layer);
      const head = document.createElement("div");
      head.textContent = data.x + ": " + heading;
      tip.replaceChildren(head, ...rows);
      show(clientX, clientY);
    }

    chart.addEventListener("pointermove", (event) => {
      const box = chart.getBoundingClientRect();
      const x = ((event.clientX - box.left) / box.width) * chart.viewBox.baseVal.width;
      place = places.reduce((best, at, index) => (Math.abs(at - x) < Math.abs(places[best] - x) ? index : best), 0);
      point(places[place], event.clientX, event.clientY);
    });
    chart.addEventListener("pointerleave", hide);
    chart.addEventListener("blur", hide);
    chart.addEventListener("keydown", (event) => {
      const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!move) return;
      event.preventDefault();
      place = Math.max(0, Math.min(places.length - 1, place + move));
      const box = chart.getBoundingClientRect();
      point(places[place], box.left + (places[place] / chart.viewBox.baseVal.width) * box.width, box.top + box.height / 3);
    });
  }

  // The load at one step: the slider repaints the cells that the page came with.
  const slider = document.getElementById("step");
  if (!slider) return;
  const data = JSON.parse(document.getElementById("loads").textContent);
  const picture = document.querySelector("#load-at svg");
  const cells = [...picture.querySelectorAll("rect")];
  const half = (data.bins - 1) / 2;

  function bin(ratio) {
    if (!(ratio > 0)) return 0;
    return half + Math.round(Math.max(-half, Math.min(half, (Math.log2(ratio) / data.octaves) * half)));
  }

  function paint() {
    const ratios = data.ratios[slider.value].flat();
    const step = data.steps[slider.value];
    document.getElementById("step-name").textContent = step;
    slider.setAttribute("aria-valuetext", step);
    picture.setAttribute("aria-label", "load per layer and expert, " + step);
    cells.forEach((cell, index) => {
      const ratio = ratios[index];
      const known = ratio !== null;
      const text = cell.nextElementSibling;
      cell.setAttribute("class", known ? "h" + bin(ratio) : "hn");
      cell.dataset.tip = cell.dataset.tip.split(": ")[0] + ": " + (known ? ratio.toFixed(2) + " times the fair share" : "no rows");
      if (!text || !text.classList.contains("cell")) return;
      text.textContent = !known ? "" : ratio < 0.1 ? "×" : ratio.toFixed(1);
      text.setAttribute("class", "cell " + (Math.abs(bin(ratio) - half) > 4 ? "on-dark" : "on-light"));
    });
  }
  slider.addEventListener("input", paint);
})();
