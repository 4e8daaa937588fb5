// The tiles: hit rate, first token, memory and disk; and what is running now.

import { bytes, count, element, figure, many, percent, say, seconds } from "./format.js";

const by = (id) => document.getElementById(id);

export function showFigures(cache, server) {
  const { prompts, prompt_tokens: asked, restored_tokens: restored } = cache.requests;
  figure("hit-rate", asked ? restored / asked : 0, percent(restored, asked));
  figure("restored-tokens", restored, count(restored));
  figure("prompt-tokens", asked, count(asked));
  figure("prompts", prompts, count(prompts));
  say(by("prompts-word"), prompts === 1 ? "request" : "requests");
  say(by("model"), cache.model.split("/").slice(-2).join("/"));
  by("model").title = cache.model;

  figure("held", cache.held_bytes, bytes(cache.held_bytes));
  figure("budget", cache.budget_bytes, bytes(cache.budget_bytes));
  meter(by("memory-meter"), cache.budget_bytes, [
    ["rows", cache.rows_bytes, "keys and values"],
    ["snapshots", cache.snapshot_bytes, "checkpoints"],
    ["running", cache.running_bytes, "running requests"],
    ["lingering", cache.lingering_bytes, "being written to disk"],
    ["retained", cache.retained_bytes, "ready for next turns, goes first"],
  ]);
  const notes = [
    `keys and values ${bytes(cache.rows_bytes)}, checkpoints ${bytes(cache.snapshot_bytes)}`,
    cache.running_bytes ? `running ${bytes(cache.running_bytes)}` : "",
    cache.evictions ? `${many(cache.evictions, "checkpoint")} made room` : "",
    cache.store ? `stored smaller, at a cost: ${cache.store.told}` : "",
  ];
  say(by("memory-note"), notes.filter(Boolean).join(" · "));

  const disk = cache.disk;
  by("disk-of").hidden = by("disk-meter").hidden = disk === null;
  if (disk === null) {
    figure("disk-held", 0, "off");
    say(by("disk-note"), "With --cache-dir it outlives a restart.");
  } else {
    figure("disk-held", disk.held_bytes, bytes(disk.held_bytes));
    figure("disk-budget", disk.budget_bytes, bytes(disk.budget_bytes));
    meter(by("disk-meter"), disk.budget_bytes, [["disk", disk.held_bytes, "files"]]);
    const facts = [
      `${many(disk.checkpoints, "checkpoint")} in ${many(disk.files, "file")}`,
      disk.queued_bytes ? `writing ${bytes(disk.queued_bytes)}` : "",
      disk.is_writer ? "" : "another process writes",
      disk.rejected ? `${many(disk.rejected, "file")} passed over` : "",
      disk.failures ? `${many(disk.failures, "write")} failed` : "",
    ];
    say(by("disk-note"), facts.filter(Boolean).join(" · "));
  }
  showRanks(cache.ranks);
  warn(cache, server);
}

function showRanks(ranks) {
  by("machines").hidden = !ranks.length;
  while (by("ranks").children.length > ranks.length) by("ranks").lastChild.remove();
  ranks.forEach((one, at) => {
    const cells = [
      count(one.rank),
      one.machine,
      count(one.layers),
      bytes(one.mlx_bytes),
      bytes(Math.max(0, one.spare_bytes)),
      one.disk_bytes === null ? "off" : bytes(one.disk_bytes),
    ];
    if (at === by("ranks").children.length) {
      by("ranks").append(element("tr", {}, ...cells.map(() => element("td"))));
    }
    cells.forEach((text, column) => say(by("ranks").children[at].children[column], text));
  });
}

function warn(cache, server) {
  const why = !cache.enabled
    ? "The cache is off (--prompt-cache-size 0): every prompt is read as a whole."
    : server.unsupported.length
      ? `${server.unsupported.join(", ")} cannot be stored by this version: requests are served without the cache.`
      : "";
  by("warning").hidden = !why;
  say(by("warning"), why);
}

function meter(node, all, parts) {
  if (node.children.length !== parts.length) {
    node.replaceChildren(...parts.map(([name]) => element("span", { class: name })));
  }
  const told = [];
  parts.forEach(([, part, name], at) => {
    const share = all ? (100 * part) / all : 0;
    node.children[at].style.setProperty("width", `${share}%`);
    node.children[at].hidden = !part;
    if (part) told.push(`${name} ${bytes(part)}`);
  });
  node.title = told.join(", ") || "empty";
  node.setAttribute("aria-label", `${told.join(", ") || "nothing"} of ${bytes(all)}`);
}

export function showFirstTokens(requests) {
  const times = requests.map((one) => one.seconds_to_first_token).sort((a, b) => a - b);
  if (!times.length) {
    figure("ttft", 0, "–");
    say(by("ttft-note"), "median of the last requests");
    return;
  }
  const median = times[Math.floor((times.length - 1) / 2)];
  figure("ttft", median, seconds(median));
  const last = times.length === 1 ? "the last request" : `median of the last ${times.length}`;
  say(by("ttft-note"), `${last} · slowest ${seconds(times[times.length - 1])}`);
}

export function showRunning(running) {
  const list = by("running");
  by("now").hidden = !running.length;
  while (list.children.length > running.length) list.lastChild.remove();
  while (list.children.length < running.length) {
    list.append(
      element("li", {}, element("span", { class: "reason" }), element("progress"), element("span")),
    );
  }
  running.forEach((one, at) => {
    const [state, progress, text] = list.children[at].children;
    say(state, one.state);
    state.dataset.reason = one.state;
    progress.max = one.prompt_tokens;
    progress.value = one.state === "writing" ? one.prompt_tokens : one.read_tokens;
    progress.setAttribute("aria-label", "tokens of the prompt that are read");
    say(
      text,
      one.state === "writing"
        ? `${many(one.completion_tokens, "token")} written, prompt of ${count(one.prompt_tokens)}`
        : `${count(one.read_tokens)} of ${many(one.prompt_tokens, "token")}`,
    );
  });
}
