// From the server's events to the page, and from the page's buttons to the server.

import { doing, notice } from "./actions.js";
import { startExplaining } from "./explain.js";
import { showFigures, showFirstTokens, showRunning } from "./figures.js";
import { clock, count, many, refreshAges, say } from "./format.js";
import { addRequests, recentRequests, startRequests } from "./requests.js";
import { ask, lacksKey, listen, stop, useKey } from "./stream.js";
import { showTree, startTree, view } from "./tree.js";

const AGES_MS = 5000;
const HIDDEN_MS = 30000; // nobody looks: the server need not tell

const by = (id) => document.getElementById(id);
let remembered = 0;
let server = null;
let cache = null;
let hiding = null;

const STATES = { live: "live", connecting: "connecting", key: "needs a key", paused: "paused" };

function state(name) {
  by("state").dataset.state = name;
  say(by("state"), STATES[name]);
  by("key").hidden = name !== "key";
  by("main").hidden = name === "key" || cache === null;
  if (name === "key") {
    say(by("key-note"), "The server does not know this key.");
    by("key-field").focus();
  }
}

function told(update, isFirst) {
  const began = performance.now();
  clock(update.time);
  const isNewServer = Boolean(update.server) && update.server.started !== server?.started;
  server = update.server ?? server;
  cache = update.cache ?? cache;
  if (update.cache) showFigures(cache, server);
  if (update.running) showRunning(update.running);
  if (update.recent || isNewServer) {
    remembered = update.remembered ?? 0;
    addRequests(update.recent ?? [], isNewServer);
    showFirstTokens(recentRequests());
  }
  if (update.tree) {
    showTree(update.tree, isFirst);
    treeNote();
  }
  by("main").hidden = false;
  by("main").dataset.updates = Number(by("main").dataset.updates ?? 0) + 1;
  performance.measure("update", { start: began });
  refreshAges();
}

function treeNote() {
  const soft = cache.soft_pinned ? `, ${count(cache.soft_pinned)} kept for a time` : "";
  const pins = (cache.pinned ? `, ${count(cache.pinned)} pinned` : "") + soft;
  say(
    by("tree-note"),
    `${many(cache.conversations, "conversation")} and ${many(cache.checkpoints, "checkpoint")} in memory${pins}. ` +
      "A row is one of them, or a beginning that several share; every branch, such as a regenerated reply, counts.",
  );
}

function pause() {
  stop();
  state("paused");
}

function start() {
  if (lacksKey()) {
    state("key");
    say(by("key-note"), "");
    return;
  }
  listen({ view: () => ({ ...view(), since: remembered, started: server?.started ?? 0 }), told, state });
}

by("key").addEventListener("submit", (event) => {
  event.preventDefault();
  useKey(by("key-field").value);
  by("key-field").value = "";
  start();
});

by("warm-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = by("warm-text").value;
  const isSystem = new FormData(event.target).get("kind") === "system";
  const body = isSystem ? { messages: [{ role: "system", content: text }] } : { prompt: text };
  doing(event.submitter, async () => {
    const what = by("warm-pin").checked ? "pin" : "warm";
    const found = await ask("POST", `v1/cache/${what}`, body);
    by("warm-text").value = "";
    return `${what === "pin" ? "Pinned" : "Warm"} up to token ${count(found.position)}.`;
  });
});

document.addEventListener("visibilitychange", () => {
  clearTimeout(hiding);
  if (document.hidden) hiding = setTimeout(pause, HIDDEN_MS);
  else if (by("state").dataset.state === "paused") start();
});

window.addEventListener("unhandledrejection", (event) => notice(String(event.reason), true));

startRequests();
startExplaining();
startTree(start);
setInterval(refreshAges, AGES_MS);
start();
