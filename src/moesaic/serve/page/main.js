// The page of the server: a conversation, and the experts that write it.
import { getJson, key } from "./api.js";
import { Conversation } from "./conversation.js";
import { byId, el } from "./dom.js";
import { ExpertsPanel } from "./experts.js";
import { startKeys } from "./keys.js";
import { startSettings } from "./settings.js";
import { load, save } from "./store.js";

const prompt = byId("prompt");
let models = [];

const panel = new ExpertsPanel((focus) => conversation.focus(focus));
const conversation = new Conversation({
  model: chosen,
  routes: () => panel.routes,
  look: (token) => panel.lookAt(token),
  plain: tellMode,
  askKey: () => askKey("The server does not take this key."),
  changed: drawCompose,
});

function chosen() {
  return models.find(({ id }) => id === byId("model").value);
}

async function findModels() {
  try {
    models = (await getJson("v1/models")).data;
  } catch (error) {
    if (error.status === 401) return askKey(key.get() ? "The server does not take this key." : null);
    byId("model").replaceChildren(el("option", {}, error.message));
    setTimeout(findModels, 3000);
    return;
  }
  byId("ask-key").hidden = true;
  byId("model").replaceChildren(...models.map(({ id }) => el("option", { value: id }, id)));
  byId("model").disabled = !models.length;
  const before = load("model", null);
  if (models.some(({ id }) => id === before)) byId("model").value = before;
  follow();
  drawCompose();
}

function follow() {
  if (!chosen()) return;
  document.title = `${chosen().id} · moesaic`;
  tellMode(chosen().plain);
  panel.follow(chosen().id);
}

function tellMode(plain) {
  if (chosen()) chosen().plain = plain;
  byId("mode").hidden = !plain;
  byId("mode").textContent = "This model has no chat template: it goes on with the text as it stands.";
}

function askKey(note) {
  byId("ask-key").hidden = false;
  if (note) byId("key-note").textContent = note;
  byId("key").focus();
}

function drawCompose() {
  const writing = conversation.isWriting;
  byId("stop").hidden = !writing;
  byId("send").hidden = writing;
  byId("send").disabled = !chosen() || !prompt.value.trim();
  prompt.style.height = "auto";
  prompt.style.height = prompt.scrollHeight + 2 + "px";
}

function send(event) {
  event?.preventDefault();
  const text = prompt.value;
  if (!text.trim() || !chosen() || conversation.isWriting) return;
  prompt.value = "";
  conversation.send(text);
  drawCompose();
}

function view(name) {
  document.body.dataset.view = name;
  for (const each of ["chat", "experts"]) byId("view-" + each).setAttribute("aria-pressed", each === name);
}

function clear() {
  conversation.clear();
  panel.lookAt(null);
  prompt.focus();
}

byId("compose").addEventListener("submit", send);
byId("stop").addEventListener("click", () => (conversation.stop(), prompt.focus()));
byId("new").addEventListener("click", clear);
byId("help").addEventListener("click", () => byId("help-box").showModal());
byId("view-chat").addEventListener("click", () => view("chat"));
byId("view-experts").addEventListener("click", () => view("experts"));
byId("model").addEventListener("change", () => (save("model", byId("model").value), follow()));
byId("ask-key").addEventListener("submit", (event) => {
  event.preventDefault();
  key.set(byId("key").value.trim());
  byId("key").value = "";
  findModels();
});
prompt.addEventListener("input", drawCompose);
prompt.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) send(event);
  if (event.key === "ArrowUp" && !prompt.value) {
    event.preventDefault();
    conversation.editLast();
  }
});
startSettings();
startKeys(
  {
    "/": ["go to the message field", () => (view("chat"), prompt.focus())],
    n: ["new conversation", clear],
    r: ["write the last answer again", () => conversation.regenerate()],
    c: ["copy the last answer", () => conversation.copyLast()],
    e: ["colour tokens by their experts, or not", () => conversation.colour()],
    "[": ["previous layer", () => panel.step(-1)],
    "]": ["next layer", () => panel.step(1)],
    s: ["open or close sampling", () => (view("experts"), (byId("settings").open = !byId("settings").open))],
    "?": ["this help", () => byId("help-box").showModal()],
  },
  () => conversation.stop(),
);
drawCompose();
findModels();
