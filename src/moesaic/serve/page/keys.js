// The page without a pointer.
import { byId, el } from "./dom.js";
import { load, save } from "./store.js";

const isField = (element) => element.matches("input, textarea, select, [contenteditable]");

/** `actions`: what single keys do outside of fields, {key: [what it says, function]}. Escape: `stop`. */
export function startKeys(actions, stop) {
  const single = byId("single-keys");
  single.checked = load("single-keys", true);
  single.addEventListener("change", () => save("single-keys", single.checked));
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && !document.querySelector("dialog[open]")) stop();
    if (event.ctrlKey || event.metaKey || event.altKey || isField(event.target) || document.querySelector("dialog[open]")) return;
    if (!single.checked || !actions[event.key]) return;
    event.preventDefault();
    actions[event.key][1]();
  });
  const fixed = [["Enter", "send; with Shift a new line"], ["Escape", "stop the answer"], ["↑", "in the empty message field: edit the last message"], ["← → ↑ ↓", "in the map and in coloured tokens: move"]];
  const lines = [...fixed, ...Object.entries(actions).map(([key, [what]]) => [key, what])];
  byId("keys").replaceChildren(...lines.flatMap(([key, what]) => [el("dt", {}, el("kbd", {}, key)), el("dd", {}, what)]));
}
