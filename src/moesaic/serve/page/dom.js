// Making elements. Text from models and servers goes in as text nodes only.

export const byId = (id) => document.getElementById(id);

/** An element with attributes (null: left out) and children (texts or elements; null: left out). */
export function el(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

export function button(label, action, attributes = {}) {
  const made = el("button", { type: "button", ...attributes }, label);
  made.addEventListener("click", action);
  return made;
}

/** Terms and their values, as a list's children. */
export function facts(pairs) {
  return pairs.map(([name, value, unit]) => el("div", {}, el("dt", {}, name), el("dd", {}, value, unit ? el("small", {}, " " + unit) : null)));
}

/** Tell those who listen rather than look. */
export function say(text) {
  byId("said").textContent = text;
}

/** A function that runs `draw` once before the next picture, however often it is called. */
export function beforeNextFrame(draw) {
  let waiting = false;
  return () => {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => {
      waiting = false;
      draw();
    });
  };
}

export const tip = {
  show(text, x, y) {
    const box = byId("tip");
    box.textContent = text;
    box.hidden = false;
    const size = box.getBoundingClientRect();
    const left = x + 16 + size.width > innerWidth ? x - 16 - size.width : x + 16;
    box.style.left = Math.max(6, left) + "px";
    box.style.top = Math.max(6, Math.min(innerHeight - size.height - 6, y - size.height - 12)) + "px";
  },
  hide() {
    byId("tip").hidden = true;
  },
};
