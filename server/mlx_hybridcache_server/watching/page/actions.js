// What can be done about a run: warm, pin, unpin, drop.

import { bytes, count, element, say } from "./format.js";
import { ask } from "./stream.js";

const SURE_SECONDS = 4;
let hiding = null;

export function notice(text, isError = false) {
  const node = document.getElementById("notice");
  node.hidden = false;
  node.classList.toggle("error", isError);
  say(node, text);
  clearTimeout(hiding);
  hiding = setTimeout(() => {
    node.hidden = true;
  }, isError ? 12000 : 6000);
}

export async function doing(button, work) {
  button.disabled = true;
  try {
    notice(await work());
  } catch (error) {
    notice(error.message, true);
  } finally {
    button.disabled = false;
  }
}

// Buttons are kept while their kind stays, so that the one that has the focus keeps it.
export function actions(node, run, namespace) {
  const can = namespace?.kind !== "other";
  const isPinned = run.pins.length > 0;
  const isCold = run.parts.some((part) => !part[2]) || run.places.some((place) => place[1] === null);
  const wanted = [
    can && isPinned && "unpin",
    can && !isPinned && run.resume && "pin",
    can && isCold && "warm",
    can && !isPinned && "drop",
  ].filter(Boolean);
  node.run = run;
  const kinds = wanted.join(" ");
  if (node.dataset.kinds === kinds) return;
  node.dataset.kinds = kinds;
  const had = new Map([...node.children].map((button) => [button.dataset.act, button]));
  node.replaceChildren(...wanted.map((kind) => had.get(kind) ?? button(node, kind)));
}

const TITLES = {
  pin: "Never let it go",
  unpin: "Let it go like everything else",
  warm: "Read it into memory",
  drop: "Forget it, with all that goes on behind it",
};

function button(node, kind) {
  const made = element("button", { type: "button", "data-act": kind, title: TITLES[kind] }, kind);
  made.addEventListener("click", () => {
    if (kind === "drop" && !made.classList.contains("sure")) {
      made.classList.add("sure");
      say(made, `really drop ${bytes(node.run.total.memory + node.run.total.disk)}?`);
      setTimeout(() => {
        made.classList.remove("sure");
        say(made, "drop");
      }, SURE_SECONDS * 1000);
      return;
    }
    doing(made, () => ACTS[kind](node.run));
  });
  return made;
}

const ACTS = {
  async pin(run) {
    const found = await ask("POST", "v1/cache/pin", { key: run.resume });
    return `Pinned up to token ${count(found.position)}.`;
  },
  async unpin(run) {
    for (const key of run.pins) await ask("DELETE", "v1/cache/pin", { key });
    return "Unpinned.";
  },
  async warm(run) {
    const found = await ask("POST", "v1/cache/warm", { key: run.resume ?? run.key });
    const from = found.tier === "disk" ? ", from disk" : "";
    return `In memory up to token ${count(found.position)}${from}.`;
  },
  async drop(run) {
    const found = await ask("POST", "v1/cache/drop", { key: run.key });
    return found.position
      ? `Dropped from token ${count(found.position)} on; what is before it has other uses.`
      : "Dropped.";
  },
};
