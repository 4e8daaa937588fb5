// Why a request is read again: what the server says of one, or of two that came one after the other.

import { doing } from "./actions.js";
import { count, element, many, seconds } from "./format.js";
import { ask } from "./stream.js";

const by = (id) => document.getElementById(id);

export function startExplaining() {
  by("explain-form").addEventListener("submit", (event) => {
    event.preventDefault();
    by("explained").replaceChildren();
    doing(event.submitter, async () => {
      const texts = [by("explain-first").value, by("explain-second").value].filter((text) => text.trim());
      const found = await ask("POST", "v1/cache/explain", { requests: texts.map(read) });
      by("explained").replaceChildren(...shown(found));
      return found.sentence;
    });
  });
}

function read(text) {
  try {
    return JSON.parse(text);
  } catch (error) {
    throw new Error(`This is not JSON: ${error.message}`);
  }
}

function shown(found) {
  const kind = found.change ? [element("span", { class: "reason", "data-change": found.change }, found.change), " "] : [];
  const parts = [element("p", {}, ...kind, found.sentence), element("p", {}, found.advice)];
  if (!found.is_hot && found.change) parts.push(...letters(found.text));
  const list = element("dl");
  for (const [name, value] of facts(found)) {
    list.append(element("div", {}, element("dt", {}, name), element("dd", {}, value)));
  }
  return [...parts, list, element("p", { class: "small" }, found.assumed)];
}

function facts(found) {
  const again = found.again_seconds === null ? "" : `, about ${seconds(found.again_seconds)}`;
  const all = [
    ["Where", found.where ?? "–"],
    ["Prompt", many(found.prompt_tokens, "token")],
    ["Parts ways at", `token ${count(found.common_tokens)}`],
    ["Restored", many(found.restored_tokens, "token")],
    ["Read again", `${many(found.again_tokens, "token")}${again}`],
    ["New", many(found.new_tokens, "token")],
  ];
  return [...all, ...found.also.map((each) => ["Also", `${each.change}: ${each.where}`])];
}

function letters(text) {
  const { before, ...behind } = text;
  return Object.entries(behind)
    .filter(([, said]) => said !== null)
    .map(([name, said]) =>
      element(
        "div",
        { class: "text" },
        element("h3", {}, name),
        element("pre", {}, element("span", { class: "same" }, before), element("mark", {}, said)),
      ),
    );
}
