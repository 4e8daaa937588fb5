// The conversations as a tree of runs, all on one axis of positions. Only what is unfolded is known here.

import { aged, bytes, count, element, many, say, setAge } from "./format.js";
import { actions } from "./actions.js";

const FIRST = 30;
const MORE = 50;

const by = (id) => document.getElementById(id);
const runs = new Map(); // by key, as the server told them
const lists = new Map(); // keys below a namespace or an unfolded run, and how many there are
const rows = new Map(); // by key: elements
const shown = new Map(); // key of a run that is unfolded -> how many branches
const unfolded = new Set(); // also those without branches
let namespaces = [];
let order = "recent";
let most = 0; // the last position drawn
let changed = () => {}; // the view is another one: the server must be asked anew
let isLate = false; // an order that came while somebody was pointing at a row

export const view = () => ({ open: Object.fromEntries(shown), order });

export function startTree(onView) {
  changed = onView;
  const tree = by("tree");
  by("order").addEventListener("change", (event) => {
    order = event.target.value;
    changed();
  });
  tree.addEventListener("keydown", move);
  for (const event of ["pointerleave", "focusout"]) {
    tree.addEventListener(event, () => isLate && setTimeout(place, 0));
  }
}

export function showTree(told, isFirst) {
  if (isFirst) {
    runs.clear();
    lists.clear();
  }
  namespaces = told.shelves;
  for (const key of told.gone) {
    runs.delete(key);
    lists.delete(key);
  }
  for (const run of told.runs) runs.set(run.key, run);
  for (const [key, list] of Object.entries(told.lists)) {
    lists.set(key, list);
    if (runs.has(key) && !shown.has(key)) unfold(key); // a namespace's only row, which the server opens
  }
  const end = Math.max(1, ...[...runs.values()].map((run) => run.end));
  const hasGrown = end !== most;
  most = end;
  if (hasGrown) axis();
  for (const key of rows.keys()) if (!runs.has(key)) forget(key);
  for (const run of hasGrown || isFirst ? runs.values() : told.runs) fill(row(run.key), run);
  place();
}

function forget(key) {
  rows.get(key).item.remove();
  rows.delete(key);
  shown.delete(key);
  unfolded.delete(key);
}

// Elements

function row(key) {
  if (!rows.has(key)) rows.set(key, made(key));
  return rows.get(key);
}

function made(key) {
  const parts = {
    role: element("span", { class: "role" }),
    name: element("span", { class: "name" }),
    bar: element("div", { class: "bar", role: "img" }),
    places: element("span", { class: "places" }),
    range: element("span", { class: "range" }),
    size: element("span", { class: "size" }),
    age: aged(null),
    acts: element("span", { class: "acts" }),
    more: element("div", { class: "more", hidden: true }),
    table: element("div", { class: "stands" }),
    below: element("ul"),
    rest: element("button", { type: "button", class: "quiet", hidden: true }),
  };
  parts.fold = element(
    "button",
    { type: "button", class: "fold", "aria-expanded": "false", on: { click: () => toggle(key) } },
    element("span", { class: "twist", "aria-hidden": "true" }),
    parts.role,
    parts.name,
  );
  parts.rest.addEventListener("click", () => showMore(key));
  parts.more.append(parts.table, parts.below, parts.rest);
  const line = [parts.fold, parts.bar, parts.places, parts.range, parts.size, parts.age, parts.acts];
  parts.item = element("li", { "data-key": key }, element("div", { class: "row" }, ...line), parts.more);
  return parts;
}

function fill(parts, run) {
  const [role, words] = labelled(run);
  say(parts.role, role);
  say(parts.name, words);
  parts.name.title = run.text ?? "";
  const places = run.all_places ? many(run.all_places, "checkpoint") : "no checkpoint";
  const several = run.branches ? many(run.conversations, "conversation") : "";
  say(parts.places, several || places);
  parts.places.title = several ? `${many(run.branches, "row")} below; ${places}` : "";
  say(parts.range, `${count(run.start)} – ${count(run.end)}`);
  say(parts.size, bytes(run.total.memory + run.total.disk));
  const tiers = tiersOf(run);
  parts.size.title = `${tiers}: ${weighed(run)}`;
  setAge(parts.age, run.below_used_at);
  parts.item.classList.toggle("branches", run.branches > 0);
  parts.item.dataset.pinned = run.pins.length > 0;
  drawBar(parts.bar, run);
  parts.fold.setAttribute(
    "aria-label",
    [role, words, several, `tokens ${count(run.start)} to ${count(run.end)}`, places, tiers, run.pins.length && "pinned"]
      .filter(Boolean)
      .join(", "),
  );
  actions(parts.acts, run, namespaceOf(run.key));
  if (unfolded.has(run.key)) stands(parts, run);
}

const ROLES = "system|developer|user|assistant|model|tool";
const ROLE = new RegExp(`^(${ROLES})(?=\\s*\\n|$)`);
const NEXT_ROLE = new RegExp(` · (?:${ROLES})(?=\\s*\\n|$)`, "g");

// Whose turn it begins with, and its first words; without those the turns that it is part of, and
// the beginning of its id, as many have part in the same turn.
function labelled(run) {
  if (run.text !== null) {
    const role = run.text.match(ROLE)?.[1] ?? "";
    const words = run.text.slice(role.length).replace(NEXT_ROLE, " · ").replace(/\s+/g, " ");
    return [role, words.replace(/^[ ·]+|[ ·]+$/g, "") || (role ? "" : "…")];
  }
  const id = run.key.slice(0, 8);
  if (run.turns === null) return ["", `raw text · ${id}`];
  const [first, last] = run.turns;
  return ["", `${first === last ? `turn ${count(first)}` : `turns ${count(first)} – ${count(last)}`} · ${id}`];
}

function weighed(run) {
  const own = `its own ${bytes(run.memory_bytes)} in memory, ${bytes(run.disk_bytes)} on disk`;
  if (!run.branches) return own;
  return `${own}; with the rows below ${bytes(run.total.memory)} and ${bytes(run.total.disk)}`;
}

function tiersOf(run) {
  const memory = run.memory_bytes > 0 || run.parts.some((part) => part[2]);
  const disk = run.disk_bytes > 0 || run.parts.some((part) => part[3]);
  return [memory && "memory", disk && "disk"].filter(Boolean).join(" + ");
}

function namespaceOf(key) {
  return namespaces.find((namespace) => descends(namespace.key, key)) ?? namespaces[0];
}

function descends(from, key) {
  const list = lists.get(from)?.keys ?? [];
  return list.includes(key) || list.some((each) => shown.has(each) && descends(each, key));
}

const at = (position) => `${((100 * position) / most).toFixed(3)}%`;

function drawBar(bar, run) {
  const pieces = [];
  if (run.start) pieces.push(element("i", { class: "lead", style: { width: at(run.start) } }));
  for (const [start, end, memory, disk] of run.parts) {
    const style = { left: at(start), width: at(end - start) };
    if (memory) pieces.push(element("i", { class: "memory", style }));
    if (disk) pieces.push(element("i", { class: "disk", style }));
  }
  for (const [position, memory, , pinned] of run.places) {
    const name = `dot${memory === null ? " filed" : ""}${pinned ? " pinned" : ""}`;
    pieces.push(element("b", { class: name, style: { left: at(position) } }));
  }
  bar.replaceChildren(...pieces);
  const places = run.places.map((place) => count(place[0])).join(", ");
  bar.setAttribute("aria-label", places ? `checkpoints at ${places}` : "no checkpoint");
  bar.title = places ? `checkpoints at ${places}` : "";
}

function kept(until) {
  if (until === null || until * 1000 < Date.now()) return "";
  const time = new Date(until * 1000).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" });
  return element("span", { class: "pin" }, `kept until ${time}`);
}

function axis() {
  const step = [1, 2, 5].flatMap((n) => [...Array(8).keys()].map((power) => n * 10 ** power));
  const tick = step.sort((a, b) => a - b).find((each) => most / each <= 5) ?? most;
  const marks = [];
  for (let position = 0; position <= most; position += tick) {
    const name = position >= 10000 && tick >= 1000 ? `${position / 1000}K` : count(position);
    const isLast = position > 0.95 * most;
    marks.push(element("span", { class: isLast ? "last" : "", style: { left: at(position) } }, name));
  }
  by("axis").replaceChildren(element("div", {}, ...marks));
}

function stands(parts, run) {
  const about = element("p", { class: "small" }, `${weighed(run)} · id `, element("span", { class: "hash" }, run.key));
  if (!run.places.length) {
    const shared = "Shared by the rows below; nothing is resumed in it.";
    parts.table.replaceChildren(about, ...(run.branches ? [element("p", { class: "small" }, shared)] : []));
    return;
  }
  const size = (number) => (number === null ? "–" : bytes(number));
  const cell = (tag, ...what) => element(tag, {}, ...what);
  const body = run.places
    .map(([position, memory, disk, pinned, used, until]) =>
      element(
        "tr",
        { "data-position": position },
        cell("td", count(position), pinned ? element("span", { class: "pin" }, "pinned") : kept(until)),
        cell("td", size(memory)),
        cell("td", size(disk)),
        cell("td", aged(used)),
      ),
    )
    .reverse();
  const heads = ["checkpoint at", "memory", "disk", "used"].map((name) => cell("th", name));
  const left = run.all_places - run.places.length;
  parts.table.replaceChildren(
    about,
    element("table", {}, cell("thead", element("tr", {}, ...heads)), cell("tbody", ...body)),
    ...(left > 0 ? [element("p", { class: "small" }, `and ${many(left, "more checkpoint")}`)] : []),
  );
}

// Where they stand

function place() {
  const tree = by("tree");
  isLate = tree.matches(":hover") || tree.contains(document.activeElement);
  const several = namespaces.length > 1;
  const wanted = namespaces.map((namespace) => {
    const group = namespaceElement(namespace);
    group.head.hidden = !several && namespace.kind === "own";
    say(group.title, namespaceTitle(namespace));
    group.fold.setAttribute("aria-expanded", String(Boolean(lists.get(namespace.key)?.keys.length)));
    list(group.below, group.rest, namespace.key, 0);
    return group.item;
  });
  reconcile(tree, wanted, false);
  for (const key of [...groups.keys()]) {
    if (!namespaces.some((namespace) => namespace.key === key)) groups.delete(key);
  }
  by("no-tree").hidden = runs.size > 0 || namespaces.length > 0;
  by("axis").hidden = !runs.size;
}

function list(below, rest, key, depth) {
  const told = lists.get(key);
  const keys = (told?.keys ?? []).filter((each) => runs.has(each));
  reconcile(below, keys.map((each) => row(each).item), isLate);
  rest.hidden = !told || told.all <= told.keys.length || !told.keys.length;
  if (told) say(rest, `${count(told.all - told.keys.length)} more`);
  for (const each of keys) {
    const parts = row(each);
    parts.item.style.setProperty("--depth", depth);
    if (shown.get(each)) list(parts.below, parts.rest, each, depth + 1);
  }
}

// Puts elements in order. While somebody points at them, those that are there stay where they are.
function reconcile(parent, wanted, stays) {
  const want = new Set(wanted);
  for (const child of [...parent.children]) if (!want.has(child)) child.remove();
  if (stays) {
    const have = new Set(parent.children);
    parent.append(...wanted.filter((child) => !have.has(child)));
    return;
  }
  wanted.forEach((child, index) => {
    if (parent.children[index] !== child) parent.insertBefore(child, parent.children[index] ?? null);
  });
}

const groups = new Map(); // namespaces' elements, by key

function namespaceElement(namespace) {
  if (groups.has(namespace.key)) return groups.get(namespace.key);
  const parts = {
    title: element("span"),
    below: element("ul", { class: "top" }),
    rest: element("button", { type: "button", class: "quiet", hidden: true }),
  };
  parts.fold = element(
    "button",
    { type: "button", class: "fold namespace", on: { click: () => toggleNamespace(namespace.key) } },
    element("span", { class: "twist", "aria-hidden": "true" }),
    parts.title,
  );
  parts.rest.addEventListener("click", () => showMore(namespace.key));
  parts.head = element("h3", {}, parts.fold);
  parts.item = element("section", { "data-namespace": namespace.kind }, parts.head, parts.below, parts.rest);
  groups.set(namespace.key, parts);
  return parts;
}

function namespaceTitle(namespace) {
  const names = {
    own: "This model",
    salted: `With a cache_salt · ${namespace.key.slice(0, 8)}`,
    other: `Another model, setting or salt, on disk · ${namespace.key.slice(0, 8)}`,
  };
  return `${names[namespace.kind]} · ${many(namespace.conversations, "conversation")}, ${bytes(namespace.bytes)}`;
}

// What a reader does

function unfold(key) {
  const run = runs.get(key);
  const parts = row(key);
  parts.fold.setAttribute("aria-expanded", "true");
  parts.more.hidden = false;
  unfolded.add(key);
  stands(parts, run);
  if (run.branches) shown.set(key, FIRST);
}

function toggle(key) {
  if (!unfolded.has(key)) {
    unfold(key);
  } else {
    const parts = row(key);
    parts.fold.setAttribute("aria-expanded", "false");
    parts.more.hidden = true;
    parts.below.replaceChildren();
    unfolded.delete(key);
    if (runs.get(key).branches) shown.set(key, 0); // said, as the server would open a namespace's only row
  }
  if (runs.get(key).branches) changed();
}

function toggleNamespace(key) {
  shown.set(key, lists.get(key)?.keys.length ? 0 : FIRST);
  changed();
}

function showMore(key) {
  shown.set(key, Math.min(2000, (lists.get(key)?.keys.length ?? 0) + MORE));
  changed();
}

function move(event) {
  const fold = event.target.closest(".fold");
  if (!fold) return;
  const all = [...by("tree").querySelectorAll(".fold")].filter((each) => each.offsetParent);
  const here = all.indexOf(fold);
  const isOpen = fold.getAttribute("aria-expanded") === "true";
  const above = fold.closest("li")?.parentElement.closest("li")?.querySelector(".fold");
  const next = {
    ArrowDown: all[here + 1],
    ArrowUp: all[here - 1],
    Home: all[0],
    End: all[all.length - 1],
    ArrowLeft: isOpen ? fold : above,
    ArrowRight: isOpen ? all[here + 1] : fold,
  }[event.key];
  if (!next) return;
  event.preventDefault();
  if (next === fold) fold.click();
  next.focus();
}
