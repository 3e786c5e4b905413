// One answer of the server: asked for, and added to a message as it comes.
import { ApiError, chunks } from "./api.js";
import { short } from "./numbers.js";
import { sampling, systemPrompt, wantsExperts } from "./settings.js";
import { tokensOf } from "./tokens.js";

const PLAIN_TOKENS = 256;
const NO_TEMPLATE = /chat.template/i;

/** Have `message` written as the answer to the messages before it. Calls `changed` for every piece.
 * A model without a chat template goes on with the text as it stands; returns whether it did. */
export async function write(model, before, message, { signal, changed, routes }) {
  const common = { model: model.id, ...sampling(), ...(routes && wantsExperts() ? { experts: true } : {}) };
  const take = (stream) => taken(stream, message, changed);
  if (!model.plain) {
    try {
      await take(chunks("v1/chat/completions", { ...common, messages: messagesOf(before) }, signal));
      return false;
    } catch (error) {
      if (!(error instanceof ApiError && error.status === 400 && NO_TEMPLATE.test(error.message + error.code))) throw error;
    }
  }
  message.plain = true;
  // That protocol stops after 16 tokens where nothing is said.
  await take(chunks("v1/completions", { max_tokens: PLAIN_TOKENS, ...common, prompt: before.map(({ text }) => text).join("") }, signal));
  return true;
}

function messagesOf(before) {
  const system = systemPrompt() ? [{ role: "system", content: systemPrompt() }] : [];
  return [...system, ...before.map(({ role, text }) => ({ role, content: text }))];
}

async function taken(stream, message, changed) {
  const started = performance.now();
  let first = null;
  for await (const chunk of stream) {
    first ??= performance.now();
    if (chunk.usage) message.usage = chunk.usage;
    for (const choice of chunk.choices) add(message, choice);
    message.facts = factsOf(message, started, first);
    changed();
  }
}

function add(message, choice) {
  const delta = choice.delta || {};
  message.text += delta.content || choice.text || "";
  const reasoning = delta.reasoning_content || delta.reasoning;
  if (reasoning) message.reasoning = (message.reasoning || "") + reasoning;
  if (choice.moesaic) (message.tokens ||= []).push(...tokensOf(choice.moesaic));
  if (choice.finish_reason) message.ended = choice.finish_reason;
}

/** "120 tokens, 31.5 a second, first after 0.2 s". */
function factsOf(message, started, first) {
  if (!message.usage) return "";
  const count = message.usage.completion_tokens;
  const seconds = (performance.now() - first) / 1000;
  const parts = [`${count} token${count === 1 ? "" : "s"}`];
  if (count > 1 && seconds > 0) parts.push(`${short((count - 1) / seconds)} a second`);
  parts.push(`first after ${((first - started) / 1000).toFixed(2)} s`);
  if (message.ended === "length") parts.push("cut at the limit");
  return parts.join(" · ");
}
