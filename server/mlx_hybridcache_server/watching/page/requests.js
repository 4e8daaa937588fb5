// The requests that ended: drawn over time, and one by one with what was restored and why.

import { aged, count, drawn, element, many, say, seconds } from "./format.js";

const MOST = 300; // remembered by the page
const DRAWN = 60;
const LISTED = 8;
const HEIGHT = 168;
const TOKENS = { top: 8, height: 72 };
const TIMES = { top: 100, height: 58 };
const CHARACTER = 6.6; // as wide as a label's at most
const MOST_LABELS = 5;

const by = (id) => document.getElementById(id);
const requests = []; // newest first
let listsAll = false;

export const recentRequests = () => requests;

export function addRequests(newest, isNewServer) {
  if (isNewServer) requests.length = 0;
  requests.unshift(...newest);
  requests.length = Math.min(requests.length, MOST);
  if (isNewServer) by("recent").replaceChildren();
  const list = by("recent");
  list.prepend(...newest.map(listed));
  while (list.children.length > MOST) list.lastChild.remove();
  fold();
  draw();
}

export function startRequests() {
  by("more-requests").addEventListener("click", () => {
    listsAll = !listsAll;
    fold();
  });
  let width = 0;
  new ResizeObserver(() => {
    if (by("chart").clientWidth === width) return;
    width = by("chart").clientWidth;
    draw();
  }).observe(by("chart"));
}

function fold() {
  const items = by("recent").children;
  for (let at = 0; at < items.length; at += 1) items[at].hidden = !listsAll && at >= LISTED;
  by("no-requests").hidden = items.length > 0;
  by("more-requests").hidden = items.length <= LISTED;
  say(by("more-requests"), listsAll ? "Show fewer" : `Show all ${items.length}`);
}

// One by one

function listed(one) {
  const reason = element("span", { class: "reason", "data-reason": one.reason }, one.reason);
  const read = one.replayed_tokens
    ? `read ${count(one.replayed_tokens)} of ${count(one.prompt_tokens)}`
    : `${count(one.prompt_tokens)}`;
  return element(
    "li",
    { "data-id": one.id },
    element(
      "details",
      {},
      element(
        "summary",
        {},
        reason,
        promptBar(one),
        element("span", { class: "read" }, read),
        element("span", { class: "time" }, seconds(one.seconds_to_first_token)),
        aged(one.created),
      ),
      element("div", { class: "why" }, ...explained(one)),
    ),
  );
}

function promptBar(one) {
  const { restored_tokens: restored, matched_tokens: matched, prompt_tokens: all } = one;
  const known = Math.max(restored, matched);
  const at = (position) => `${(100 * position) / all}%`;
  const part = (name, from, to) =>
    element("span", { class: name, style: { left: at(from), width: at(to - from) } });
  const bar = element(
    "span",
    {
      class: "prompt",
      role: "img",
      "aria-label": `${count(restored)} of ${many(all, "token")} restored`,
    },
    part("restored", 0, restored),
    part("known", restored, known),
    part("replayed", known, all),
  );
  if (one.diverged_at !== null && one.diverged_at > 0) {
    bar.append(element("span", { class: "cut", style: { left: at(one.diverged_at) } }));
    bar.title = `parts ways with what is stored at token ${count(one.diverged_at)}`;
  }
  return bar;
}

function explained(one) {
  const parts = [element("p", {}, one.sentence)];
  const advice = advised(one);
  if (advice.length) parts.push(element("ul", {}, ...advice.map((line) => element("li", {}, line))));
  const facts = [
    ["Prompt", many(one.prompt_tokens, "token")],
    ["Known", many(one.matched_tokens, "token")],
    ["Restored", `${many(one.restored_tokens, "token")}${one.tier === "none" ? "" : `, from ${one.tier}`}`],
    ["Read", `${many(one.replayed_tokens, "token")} in ${many(one.forwards, "forward")}`],
    ["Parts ways at", one.diverged_at === null ? "–" : `token ${count(one.diverged_at)}`],
    ["First token", seconds(one.seconds_to_first_token)],
    ["of that waiting", seconds(one.seconds_waited)],
    ["reading", seconds(one.prefill_seconds)],
    ["Checkpoints taken", count(one.checkpoints_taken)],
    ["Written", many(one.completion_tokens, "token")],
    ["Request", `${one.endpoint} ${one.id}`],
  ];
  if (one.drafted_tokens) facts.push(["Drafted", drafts(one)]);
  if (one.soft_pins) facts.push(["Kept for a time", many(one.soft_pins, "checkpoint")]);
  if (one.stable_prefix) facts.push(["Stable prefix", arranged(one.stable_prefix)]);
  const list = element("dl");
  for (const [name, value] of facts) {
    list.append(element("div", {}, element("dt", {}, name), element("dd", {}, value)));
  }
  parts.push(list);
  if (one.text && one.diverged_at > 0) parts.push(...texts(one.text));
  return parts;
}

function drafts(one) {
  const right = `${count(one.accepted_tokens)} of ${many(one.drafted_tokens, "token")} right`;
  const behind = one.draft_restored_tokens ? ` behind ${many(one.draft_restored_tokens, "restored token")}` : "";
  const own = one.draft_forwards ? `, ${count(one.draft_forwards)} of what drafts${behind}` : "";
  return `${right}; ${many(one.reply_forwards, "forward")}${own}`;
}

function arranged({ mode, tokens, boundaries, moved, canonical_tools }) {
  const said = [];
  if (moved.length) said.push(`${many(moved.length, "line")} moved (${[...new Set(moved)].join(", ")})`);
  if (tokens !== null) said.push(`${many(tokens, "token")} before what may change`);
  if (boundaries.length) said.push(`marked at ${boundaries.map(count).join(", ")}`);
  if (canonical_tools) said.push("tools in one order");
  return said.join("; ") || `${mode}: nothing found that changes`;
}

function texts({ before, asked, stored }) {
  const shown = (name, text) =>
    element(
      "div",
      { class: "text" },
      element("h3", {}, name),
      element("pre", {}, element("span", { class: "same" }, before), element("mark", {}, text)),
    );
  return [shown("asked", asked), shown("stored", stored)];
}

function advised(one) {
  const lines = [];
  if (one.detail) lines.push(`Because of: ${one.detail}.`);
  const replaced = one.diverged_at !== null && one.diverged_at > 0;
  if (replaced && one.changed) {
    lines.push(
      `A ${one.changed} changed at token ${count(one.diverged_at)}, and all behind it had to be read. ` +
        "What changes from request to request belongs behind what stays.",
    );
  }
  const gap = one.matched_tokens - one.restored_tokens;
  if (gap > 64 && one.restored_tokens < one.prompt_tokens - 1) {
    lines.push(
      `${count(one.matched_tokens)} tokens matched, but the nearest checkpoint stood at ` +
        `${count(one.restored_tokens)}. This request left one where the prompts part ways.`,
    );
  }
  if (one.reason === "evicted") {
    lines.push("More memory (--prompt-cache-bytes), a --cache-dir or a pin would have kept it.");
  }
  if (one.checkpoints_refused) {
    lines.push(`${many(one.checkpoints_refused, "checkpoint")} found no room within the memory budget.`);
  }
  if (one.seconds_waited > 0.1 && one.seconds_waited > 0.2 * one.seconds_to_first_token) {
    lines.push(`It waited ${seconds(one.seconds_waited)} for its turn.`);
  }
  return lines;
}

// Over time

function draw() {
  const shown = requests.slice(0, DRAWN).reverse();
  const chart = by("chart");
  chart.hidden = by("chart-note").hidden = shown.length < 2;
  if (shown.length < 2) return;
  const width = Math.max(260, chart.clientWidth);
  const most = Math.max(...shown.map((one) => one.prompt_tokens));
  const times = decades(shown.map((one) => one.seconds_to_first_token));
  const labels = [shortened(most), ...times.labels.map(([, text]) => text)];
  const left = 12 + CHARACTER * Math.max(...labels.map((text) => text.length));
  const step = (width - left) / Math.max(shown.length, 16);
  const up = (tokens) => TOKENS.top + TOKENS.height * (1 - tokens / most);
  const late = (time) => TIMES.top + TIMES.height * (1 - times.place(time));
  const picture = drawn("svg", {
    viewBox: `0 0 ${width} ${HEIGHT}`,
    width,
    height: HEIGHT,
    role: "img",
    "aria-label": "Tokens restored and read, and the time to the first token, of each request",
  });
  const label = (y, text) => drawn("text", { x: left - 8, y: y + 3.5, "text-anchor": "end" }, text);
  const line = (y) => drawn("line", { class: "grid", x1: left, x2: width, y1: y, y2: y });
  picture.append(line(up(0)), line(up(most)), label(up(most) + 2, shortened(most)), label(up(0), "0"));
  for (const [time, text] of times.labels) picture.append(line(late(time)), label(late(time), text));
  shown.forEach((one, at) => picture.append(column(one, left + at * step, step, up, late)));
  chart.replaceChildren(picture);
  const slow = shown.reduce((a, b) => (a.seconds_to_first_token > b.seconds_to_first_token ? a : b));
  say(
    by("chart-note"),
    `Prompt tokens above, time to the first token below, of the last ${shown.length} requests, the newest on the right. ` +
      `The slowest took ${seconds(slow.seconds_to_first_token)} (${slow.reason}, ${many(slow.replayed_tokens, "token")} read).`,
  );
}

// A logarithmic axis over whole decades, with at most one label for each: `place` is from 0 to 1.
export function decades(times) {
  const slowest = Math.max(...times, 0.001);
  const fastest = Math.max(Math.min(...times, slowest / 10), 0.0001);
  const low = Math.floor(Math.log10(fastest));
  const high = Math.max(low + 1, Math.ceil(Math.log10(slowest)));
  const every = Math.ceil((high - low) / (MOST_LABELS - 1));
  const labels = [];
  for (let power = low; power <= high; power += every) {
    const text = power < 0 ? `${count(10 ** (power + 3))} ms` : `${count(10 ** power)} s`;
    labels.push([10 ** power, text]);
  }
  const place = (time) => (Math.log10(Math.max(time, 10 ** low)) - low) / (high - low);
  return { labels, place };
}

function column(one, x, step, up, late) {
  const wide = Math.max(1.5, Math.min(14, step - 2));
  const box = (name, from, to) =>
    drawn("rect", {
      class: name,
      x: x + (step - wide) / 2,
      width: wide,
      y: up(to),
      height: Math.max(0, up(from) - up(to)),
    });
  const known = Math.max(one.restored_tokens, one.matched_tokens);
  const said =
    `${one.reason}: ${count(one.replayed_tokens)} of ${many(one.prompt_tokens, "token")} read, ` +
    `first token after ${seconds(one.seconds_to_first_token)}`;
  const group = drawn(
    "g",
    { class: "column" },
    drawn("title", {}, said),
    drawn("rect", { class: "hit", x, y: 0, width: step, height: HEIGHT }),
    box("restored", 0, one.restored_tokens),
    box("known", one.restored_tokens, known),
    box("replayed", known, one.prompt_tokens),
    drawn("circle", { cx: x + step / 2, cy: late(one.seconds_to_first_token), r: 3 }),
  );
  group.addEventListener("click", () => show(one.id));
  return group;
}

function show(id) {
  const item = by("recent").querySelector(`li[data-id="${CSS.escape(id)}"]`);
  if (!item) return;
  if (item.hidden) {
    listsAll = true;
    fold();
  }
  item.firstChild.open = true;
  item.firstChild.firstChild.focus();
  item.scrollIntoView({ block: "nearest" });
}

function shortened(number) {
  return number >= 10000 ? `${Math.round(number / 1000)}K` : count(number);
}
