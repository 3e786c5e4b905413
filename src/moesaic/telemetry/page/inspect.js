"use strict";
// The report of `moesaic inspect`: what is drawn here follows the layer, expert and domain that are chosen.
(() => {
  const place = document.getElementById("inspection");
  if (!place) return;
  const data = JSON.parse(place.textContent);
  const subjects = data.subjects;
  const HALF = (data.bins - 1) / 2;
  const state = { layer: 0, expert: 0, domain: -1, only: false, grouped: true, query: "" };
  const STATES = {
    dead: "dead: below a tenth of the fair share",
    cold: "cold: below half of the fair share",
    oversized: "oversized: it does the work of several",
    unknown: "far from the fair share, which may be chance",
  };
  const byId = (id) => document.getElementById(id);

  function el(tag, attributes, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes || {})) {
      if (value !== null && value !== undefined) element.setAttribute(name, value);
    }
    element.append(...children.filter((child) => child !== null && child !== undefined));
    return element;
  }

  const escaped = (text) =>
    String(text).replace(/[&<>"]/g, (sign) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" })[sign]);
  const percent = (value) => (100 * value).toFixed(value < 0.1 ? 1 : 0) + " %";
  const times = (ratio) => (ratio === null ? "no rows" : ratio.toFixed(2) + " × the fair share");
  const sum = (values) => values.reduce((total, value) => total + value, 0);
  const hue = (expert) => ((expert * 137.508) % 360).toFixed(1);
  const layerOf = (subject) => subject.layers[Math.min(state.layer, subject.layers.length - 1)];
  const tokenText = (subject, id) => subject.token_texts[id] || "<" + id + ">";

  function bin(ratio) {
    if (!(ratio > 0)) return 0;
    return HALF + Math.round(Math.max(-HALF, Math.min(HALF, (Math.log2(ratio) / data.octaves) * HALF)));
  }

  // Counts as multiples of the fair share; null where there are no rows at all.
  function ratios(counts) {
    const total = sum(counts);
    return counts.map((count) => (total ? (count / total) * counts.length : null));
  }

  // White space made visible, so that a token of nothing else can be seen.
  const visible = (text) => text.replace(/\n/g, "↵").replace(/\t/g, "⇥").replace(/^ +| +$/g, (gap) => "·".repeat(gap.length));

  const most = (values) => values.reduce((best, value, index) => (value > values[best] ? index : best), 0);

  // The order in which a layer's experts stand: by number, or next to those that serve most of the same.
  function orderOf(layer, table) {
    const numbers = layer.counts.map((_, expert) => expert);
    if (!state.grouped || !table) return numbers;
    const shares = table.map(ratios);
    const favourite = numbers.map((expert) => most(shares.map((row) => row[expert] || 0)));
    const strength = numbers.map((expert) => shares[favourite[expert]][expert] || 0);
    return numbers.sort((a, b) => favourite[a] - favourite[b] || strength[b] - strength[a]);
  }

  /* ---- one heat map: rows of multiples of chance, with a cell that is chosen by pointer or arrow keys ---- */
  function heat(host, table) {
    const columns = Math.max(...table.rows.map((row) => row.length));
    const room = Math.max(240, (host.clientWidth || 900) - 16);
    const left = 16 + 6.6 * Math.max((table.rowTitle || "").length, ...table.names.map((name) => name.length));
    const width = Math.max(5, Math.min(table.widest || 34, (room - left) / columns));
    const height = Math.max(8, Math.min(table.tallest || 26, 620 / table.rows.length));
    const top = 32;
    const gap = width > 12 ? 1.5 : 0.4;
    const every = Math.max(1, Math.ceil((7 * (1 + String(columns - 1).length)) / width));
    const parts = [
      `<text class="axis" x="${left}" y="10">${escaped(table.columnTitle || "")}</text>`,
      `<text class="axis" x="${left - 8}" y="10" text-anchor="end">${escaped(table.rowTitle || "")}</text>`,
    ];
    table.columns.forEach((name, column) => {
      if (column % every) return;
      parts.push(`<text class="tick" x="${(left + (column + 0.5) * width).toFixed(1)}" y="${top - 6}" text-anchor="middle">${escaped(name)}</text>`);
    });
    table.rows.forEach((row, line) => {
      const y = top + line * height;
      if (height >= 11 || line % 2 === 0) {
        parts.push(`<text class="tick" x="${left - 8}" y="${(y + height / 2 + 4).toFixed(1)}" text-anchor="end">${escaped(table.names[line])}</text>`);
      }
      row.forEach((ratio, column) => {
        const x = left + column * width;
        const style = ratio === null ? "hn" : "h" + bin(ratio);
        const chosen = table.isChosen && table.isChosen(line, column) ? " chosen" : "";
        parts.push(
          `<rect class="${style}${chosen}" data-at="${line},${column}" data-tip="${escaped(table.tip(line, column, ratio))}" ` +
            `x="${x.toFixed(1)}" y="${y.toFixed(1)}" width="${(width - gap).toFixed(1)}" height="${(height - (height > 12 ? 1.5 : 0.4)).toFixed(1)}"/>`,
        );
        if (width >= 25 && height >= 15 && ratio !== null) {
          const ink = Math.abs(bin(ratio) - HALF) > 4 ? "on-dark" : "on-light";
          parts.push(`<text class="cell ${ink}" x="${(x + (width - gap) / 2).toFixed(1)}" y="${(y + height / 2 + 3.5).toFixed(1)}" text-anchor="middle">${ratio < 0.1 ? "×" : ratio.toFixed(1)}</text>`);
        }
      });
    });
    const size = [Math.ceil(left + columns * width + 4), Math.ceil(top + table.rows.length * height + 4)];
    const label = table.title + (table.pick ? "; arrow keys move the choice" : "");
    host.innerHTML =
      `<svg class="heat" role="img" aria-label="${escaped(label)}" ${table.pick ? 'tabindex="0"' : ""} width="${size[0]}" height="${size[1]}" viewBox="0 0 ${size[0]} ${size[1]}">${parts.join("")}</svg>`;
    if (!table.pick) return;
    const picture = host.firstElementChild;
    picture.classList.add("pickable");
    picture.addEventListener("click", (event) => {
      const at = event.target.getAttribute("data-at");
      if (at) table.pick(...at.split(",").map(Number));
    });
    picture.addEventListener("keydown", (event) => {
      const move = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
      if (!move) return;
      event.preventDefault();
      const at = table.chosen();
      const line = Math.max(0, Math.min(table.rows.length - 1, at[0] + move[0]));
      const column = Math.max(0, Math.min(table.rows[line].length - 1, at[1] + move[1]));
      table.pick(line, column);
      const again = host.querySelector("svg");
      if (again) again.focus();
    });
  }

  // A panel has one place for each model.
  function sides(id, draw) {
    const host = byId(id);
    if (!host) return;
    const had = document.activeElement && host.contains(document.activeElement) ? document.activeElement.closest("[data-side]") : null;
    const hosts = subjects.map((subject, index) => {
      const side = el("div", { class: "side", "data-side": index });
      if (subjects.length > 1) side.append(el("h4", {}, el("span", { class: "badge s" + 3 * index }, "AB"[index]), " " + subject.name));
      const inner = el("div", { class: "scroll" });
      side.append(inner);
      return [side, inner, subject, index];
    });
    host.replaceChildren(...hosts.map(([side]) => side));
    for (const [, inner, subject, index] of hosts) draw(inner, subject, index);
    if (had) {
      const again = host.querySelector(`[data-side="${had.dataset.side}"] svg[tabindex]`);
      if (again) again.focus({ preventScroll: true });
    }
  }

  /* ---- the panels ---- */
  function drawLoad() {
    sides("load", (host, subject) => {
      const order = subject.layers.map((layer) => {
        const numbers = layer.counts.map((_, expert) => expert);
        return state.grouped ? numbers.sort((a, b) => layer.counts[b] - layer.counts[a]) : numbers;
      });
      const inDomain = (layer) => (state.domain < 0 || !layer.domain_counts ? layer.counts : layer.domain_counts[state.domain]);
      const rows = subject.layers.map((layer, line) => {
        const all = ratios(inDomain(layer));
        return order[line].map((expert) => all[expert]);
      });
      const where = state.domain < 0 ? "" : " in " + subject.domains[state.domain];
      heat(host, {
        title: "load of every expert in every layer" + where,
        rows,
        names: subject.layers.map((layer) => String(layer.layer)),
        // Every layer has an order of its own, so places have no numbers then.
        columns: rows[0].map((_, column) => (state.grouped ? "" : String(column))),
        rowTitle: "layer",
        columnTitle: state.grouped ? "experts, the heaviest first" : "expert",
        tallest: 30,
        tip: (line, column, ratio) => `layer ${subject.layers[line].layer}, expert ${order[line][column]}${where}: ${times(ratio)}`,
        isChosen: (line, column) => line === state.layer && order[line][column] === state.expert,
        chosen: () => [state.layer, Math.max(0, order[Math.min(state.layer, order.length - 1)].indexOf(state.expert))],
        pick: (line, column) => choose({ layer: line, expert: order[line][column] }),
      });
    });
  }

  function lean(name, ratio, tip, mark) {
    const bar = el("span", { class: "lean", "data-tip": tip });
    if (ratio !== null) {
      const reach = Math.max(-1, Math.min(1, ratio > 0 ? Math.log2(ratio) / 3 : -1)) * 50;
      bar.append(
        el("span", { class: ratio >= 1 ? "more" : "less", style: `left:${Math.min(50, 50 + reach)}%;width:${Math.abs(reach)}%` }),
      );
    }
    return el("div", { class: "row" + (mark ? " marked" : "") }, el("span", { class: "name" }, name), bar, el("span", { class: "number" }, ratio === null ? "–" : ratio.toFixed(1) + "×"));
  }

  function chips(subject, tokens) {
    return tokens.map((token) =>
      el(
        "span",
        { class: "chip", style: `--strength:${token.share.toFixed(2)}`, "data-tip": `${percent(token.share)} of its ${token.times} occurrences come here` },
        visible(tokenText(subject, token.token_id)),
      ),
    );
  }

  function goTo(layer, expert, label) {
    const button = el("button", { type: "button", class: "go" }, label);
    button.addEventListener("click", () => choose({ layer, expert }));
    return button;
  }

  function part(title, ...children) {
    return el("div", { class: "part" }, el("h5", {}, title), ...children);
  }

  function drawCard() {
    sides("card", (host, subject) => {
      const layer = layerOf(subject);
      const expert = Math.min(state.expert, layer.num_experts - 1);
      const total = sum(layer.counts);
      const ratio = total ? (layer.counts[expert] / total) * layer.num_experts : null;
      const facts = [
        ["load", times(ratio)],
        ["rows", `${layer.counts[expert]} of ${total}`],
        ["mean weight", layer.mean_weights[expert] === null ? "–" : layer.mean_weights[expert].toFixed(3)],
      ];
      if (layer.states[expert] !== "fair") facts.push(["state", STATES[layer.states[expert]]]);
      const list = el("dl", { class: "facts" });
      for (const [name, value] of facts) list.append(el("dt", {}, name), el("dd", {}, value));
      const card = el("div", { class: "card" });
      card.append(
        el("h3", {}, el("span", { class: "swatch", style: `--hue:${hue(expert)}` }), `Layer ${layer.layer}, expert ${expert}`),
        list,
      );
      if (layer.loved && layer.loved[expert].length) {
        card.append(part("Tokens it loves", el("div", { class: "chips" }, ...chips(subject, layer.loved[expert]))));
      }
      const columns = el("div", { class: "columns" });
      if (layer.domain_counts) {
        columns.append(part("Domains", ...leans(layer.domain_counts, subject.domains, expert, state.domain)));
      }
      if (layer.class_counts) columns.append(part("Kinds of tokens", ...leans(layer.class_counts, subject.classes, expert, -1)));
      card.append(columns);
      const friends = layer.pairs.filter((pair) => pair.first === expert || pair.second === expert).slice(0, 6);
      if (friends.length) {
        const buttons = friends.map((pair) => {
          const other = pair.first === expert ? pair.second : pair.first;
          return goTo(state.layer, other, `expert ${other}, ${pair.lift.toFixed(1)} × chance`);
        });
        card.append(part("Often together with", el("div", { class: "chips" }, ...buttons)));
      }
      host.append(card);
    });
  }

  function leans(table, names, expert, marked) {
    return table
      .map((counts, index) => [names[index], ratios(counts)[expert], index])
      .filter(([, ratio]) => ratio !== null)
      .map(([name, ratio, index]) => lean(name, ratio, `${name}: ${times(ratio)}`, index === marked));
  }

  function byExpert(id, title, key, names, pick, isChosen) {
    sides(id, (host, subject) => {
      const layer = layerOf(subject);
      const there = (layer[key] || []).map((counts, index) => [index, counts]).filter(([, counts]) => sum(counts) > 0);
      if (!there.length) {
        host.append(el("p", { class: "note" }, "This recording does not tell."));
        return;
      }
      const order = orderOf(layer, there.map(([, counts]) => counts));
      const rows = there.map(([, counts]) => ratios(counts)).map((row) => order.map((expert) => row[expert]));
      heat(host, {
        title: `${title}, layer ${layer.layer}`,
        rows,
        names: there.map(([index]) => subject[names][index]),
        columns: order.map(String),
        columnTitle: `expert of layer ${layer.layer}` + (state.grouped ? ", beside those that serve most of the same" : ""),
        tallest: 24,
        tip: (line, column, ratio) => `${subject[names][there[line][0]]}, expert ${order[column]}: ${times(ratio)}`,
        isChosen: (line, column) => order[column] === state.expert || isChosen(there[line][0]),
        chosen: () => [state[id] || 0, Math.max(0, order.indexOf(state.expert))],
        pick: (line, column) => {
          state[id] = line;
          pick(there[line][0], order[column]);
        },
      });
    });
  }

  function drawCompany() {
    sides("company", (host, subject) => {
      const layer = layerOf(subject);
      const pairs = el("ol", { class: "pairs" });
      for (const pair of layer.pairs.slice(0, 10)) {
        const label = `${pair.first} with ${pair.second}`;
        pairs.append(el("li", {}, goTo(state.layer, pair.first, label), ` ${pair.lift.toFixed(1)} × chance, ${percent(pair.share)} of the tokens of ${pair.first}`));
      }
      if (!layer.pairs.length) {
        host.append(el("p", { class: "note" }, "No two experts of this layer serve together beyond chance (or every token has one expert only)."));
        return;
      }
      if (!layer.company) {
        host.append(el("p", { class: "note" }, "There are too many experts for the whole table; these pairs stand out."), pairs);
        return;
      }
      const picture = el("div", {});
      host.append(el("div", { class: "beside" }, picture, el("div", {}, el("h5", {}, "Closest pairs"), pairs)));
      const order = orderOf(layer, layer.domain_counts || layer.class_counts);
      heat(picture, {
        title: `co-activation, layer ${layer.layer}`,
        rows: order.map((line) => order.map((column) => layer.company[line][column])),
        names: order.map(String),
        columns: order.map(String),
        rowTitle: "of expert",
        columnTitle: "tokens that also go to expert",
        widest: 18,
        tallest: 18,
        tip: (line, column, ratio) => (line === column ? `expert ${order[line]}` : `${order[line]} with ${order[column]}: ` + (ratio === null ? "never" : ratio.toFixed(2) + " × chance")),
        isChosen: (line, column) => order[line] === state.expert && column !== line,
        chosen: () => [Math.max(0, order.indexOf(state.expert)), 0],
        pick: (line) => choose({ expert: order[line] }),
      });
    });
  }

  // Which tokens of a text a search finds: those that a match begins, ends or lies in, so that words in pieces count.
  function found(tokens, needle) {
    const text = tokens.join("").toLowerCase();
    const ends = [];
    tokens.reduce((length, token, index) => (ends[index] = length + token.length), 0);
    const hits = new Set();
    for (let at = text.indexOf(needle); at >= 0; at = text.indexOf(needle, at + 1)) {
      ends.forEach((end, index) => {
        if (end > at && end - tokens[index].length < at + needle.length) hits.add(index);
      });
    }
    return hits;
  }

  function drawTexts() {
    const needle = state.query.trim().toLowerCase();
    sides("texts", (host, subject) => {
      const layer = layerOf(subject);
      host.classList.add("samples");
      for (const sample of subject.samples) {
        if (state.domain >= 0 && sample.domain && sample.domain !== subject.domains[state.domain]) continue;
        const text = el("p", { class: "text" });
        const hits = needle ? found(sample.tokens, needle) : null;
        sample.tokens.forEach((token, index) => {
          const experts = sample.experts[layer.layer][index];
          const first = experts.length ? experts[0] : -1;
          const dim = (state.only && !experts.includes(state.expert)) || (hits && !hits.has(index));
          const shown = el(
            "span",
            {
              class: "token" + (dim ? " dim" : "") + (first < 0 ? " none" : ""),
              style: first < 0 ? null : `--hue:${hue(first)}`,
              "data-first": first,
              "data-tip": `“${visible(token)}” → expert${experts.length > 1 ? "s" : ""} ${experts.join(", ") || "none"}`,
            },
            token.replace(/\n/g, "↵\n"),
          );
          text.append(shown);
        });
        host.append(el("div", { class: "sample" }, sample.domain ? el("h5", {}, sample.domain) : null, text));
      }
      if (!host.children.length) host.append(el("p", { class: "note" }, subject.samples.length ? "No text of this domain was kept." : "The tokens of this recording have no texts; give --tokenizer."));
      host.onclick = (event) => {
        const first = event.target.getAttribute("data-first");
        if (first !== null && first >= 0) choose({ expert: Number(first) });
      };
    });
  }

  function drawWays() {
    const needle = state.query.trim().toLowerCase();
    sides("ways", (host, subject) => {
      const found = subject.ways.filter((way) => !needle || way.text.toLowerCase().includes(needle)).slice(0, needle ? 40 : 12);
      if (!found.length) {
        host.append(el("p", { class: "note" }, needle ? "No frequent token contains this." : "No token occurs often enough."));
        return;
      }
      const head = el("tr", {}, el("th", { scope: "col" }, "token"), el("th", { scope: "col" }, "times"), ...subject.layers.map((layer) => el("th", { scope: "col" }, "layer " + layer.layer)));
      const rows = found.map((way) => {
        const row = el("tr", {}, el("th", { scope: "row" }, el("code", { class: "inline" }, visible(way.text))), el("td", {}, String(way.times)));
        subject.layers.forEach((layer, index) => {
          const cell = el("td", {});
          way.experts[layer.layer].slice(0, 2).forEach(([expert, share]) => {
            const button = goTo(index, expert, `${expert}`);
            button.setAttribute("data-tip", `layer ${layer.layer}, expert ${expert}: ${percent(share)} of the occurrences`);
            button.setAttribute("style", `--hue:${hue(expert)};--strength:${share}`);
            button.className = "go way";
            cell.append(button);
          });
          row.append(cell);
        });
        return row;
      });
      host.append(el("table", { class: "ways" }, el("thead", {}, head), el("tbody", {}, ...rows)));
    });
  }

  /* ---- the controls ---- */
  const layerChoice = byId("choose-layer");
  const expertChoice = byId("choose-expert");
  const domainChoice = byId("choose-domain");

  function fill(select, names) {
    select.replaceChildren(...names.map(([value, name]) => el("option", { value }, name)));
  }

  function mostExperts() {
    return Math.max(...subjects.map((subject) => layerOf(subject).num_experts));
  }

  function draw() {
    layerChoice.value = state.layer;
    if (expertChoice.options.length !== mostExperts()) fill(expertChoice, Array.from({ length: mostExperts() }, (_, expert) => [expert, expert]));
    expertChoice.value = state.expert;
    if (domainChoice) domainChoice.value = state.domain;
    drawLoad();
    drawCard();
    byExpert("domains", "load per domain and expert", "domain_counts", "domains", (_, expert) => choose({ expert }), (domain) => domain === state.domain);
    byExpert("classes", "load per kind of token and expert", "class_counts", "classes", (_, expert) => choose({ expert }), () => false);
    drawCompany();
    drawTexts();
    drawWays();
  }

  function choose(change) {
    Object.assign(state, change);
    state.layer = Math.max(0, Math.min(state.layer, Math.max(...subjects.map((subject) => subject.layers.length)) - 1));
    state.expert = Math.max(0, Math.min(state.expert, mostExperts() - 1));
    draw();
  }

  fill(layerChoice, subjects.reduce((a, b) => (b.layers.length > a.layers.length ? b : a)).layers.map((layer, index) => [index, layer.layer]));
  layerChoice.addEventListener("change", () => choose({ layer: Number(layerChoice.value) }));
  expertChoice.addEventListener("change", () => choose({ expert: Number(expertChoice.value) }));
  if (domainChoice) {
    fill(domainChoice, [[-1, "all text"], ...subjects[0].domains.map((name, index) => [index, name])]);
    domainChoice.addEventListener("change", () => choose({ domain: Number(domainChoice.value) }));
  }
  byId("grouped").addEventListener("change", (event) => choose({ grouped: event.target.checked }));
  byId("only").addEventListener("change", (event) => choose({ only: event.target.checked }));
  byId("query").addEventListener("input", (event) => {
    state.query = event.target.value;
    drawTexts();
    drawWays();
  });

  // The first look: the layer where domains differ most, and there the expert that leans most.
  const first = subjects[0];
  const strongest = most(first.layers.map((layer) => (layer.divergence ? layer.divergence.value || 0 : 0)));
  const table = (first.layers[strongest].domain_counts || []).map(ratios);
  const leaning = first.layers[strongest].counts.map((count, expert) => count * Math.max(1, ...table.map((row) => row[expert] || 0)));
  choose({ layer: strongest, expert: most(leaning) });
  let width = innerWidth;
  addEventListener("resize", () => {
    if (innerWidth === width) return;
    width = innerWidth;
    draw();
  });
})();
