// How answers are to be drawn: fields of the page, kept in this browser.
import { byId } from "./dom.js";
import { load, save } from "./store.js";

const form = byId("fields");
const NUMBERS = ["temperature", "top_p", "top_k", "min_p", "max_tokens", "seed"];

export function startSettings() {
  const kept = load("settings", {});
  for (const name of NUMBERS) form.elements[name].value = kept[name] ?? "";
  byId("system").value = kept.system ?? "";
  byId("want-experts").checked = kept.experts ?? true;
  byId("settings").open = kept.open ?? false;
  form.addEventListener("input", keep);
  form.addEventListener("reset", () => setTimeout(keep));
  form.addEventListener("submit", (event) => event.preventDefault());
  byId("settings").addEventListener("toggle", keep);
  brief();
}

function keep() {
  save("settings", { ...sampling(), system: byId("system").value, experts: byId("want-experts").checked, open: byId("settings").open });
  brief();
}

function brief() {
  const set = Object.entries(sampling()).map(([name, value]) => `${name.replace("_", "-").replace("max-tokens", "most")} ${value}`);
  byId("settings-brief").textContent = set.join(", ") || "as the server has it";
}

/** The fields that are filled in, and can be, under the names that the protocol has for them. */
export function sampling() {
  const set = {};
  for (const name of NUMBERS) {
    const field = form.elements[name];
    if (field.value !== "" && field.validity.valid) set[name] = Number(field.value);
  }
  return set;
}

export const systemPrompt = () => byId("system").value.trim();
export const wantsExperts = () => byId("want-experts").checked;
