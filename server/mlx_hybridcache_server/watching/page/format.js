// Numbers and ages as people read them, and elements made without markup: all text stays text.

export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  set(made, attributes);
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

export function drawn(tag, attributes = {}, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

function set(made, attributes) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "on") {
      for (const [event, listener] of Object.entries(value)) made.addEventListener(event, listener);
    } else if (name === "style") {
      for (const [property, what] of Object.entries(value)) made.style.setProperty(property, what);
    } else if (typeof value === "boolean") {
      made.toggleAttribute(name, value);
    } else {
      made.setAttribute(name, value);
    }
  }
}

// Writes only what differs, so that nothing is laid out again for nothing.
export function say(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

export function figure(id, value, text) {
  const node = document.getElementById(id);
  if (node.getAttribute("value") !== String(value)) node.setAttribute("value", value);
  say(node, text);
}

const whole = new Intl.NumberFormat("en");
const precise = new Intl.NumberFormat("en", { maximumSignificantDigits: 3 });

export const count = (number) => whole.format(number);

export function many(number, one, more = `${one}s`) {
  return `${count(number)} ${number === 1 ? one : more}`;
}

// No line ends between a figure and its unit.
export function bytes(number) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  let left = number;
  while (left >= 1024 && unit < units.length - 1) {
    left /= 1024;
    unit += 1;
  }
  return `${left >= 100 ? whole.format(Math.round(left)) : precise.format(left)}\u00a0${units[unit]}`;
}

export function seconds(number) {
  if (number < 0.9995) return `${precise.format(number * 1000)}\u00a0ms`;
  if (number < 99.5) return `${precise.format(number)}\u00a0s`;
  return `${precise.format(number / 60)}\u00a0min`;
}

export const percent = (part, all) => (all ? `${(Math.floor((1000 * part) / all) / 10).toFixed(1)}\u00a0%` : "–");

// Ages. `at` is the server's clock, which may differ from this machine's.
let ahead = 0;

export function clock(serverTime) {
  ahead = serverTime - Date.now() / 1000;
}

export function age(at) {
  if (at === null) return "before start";
  const past = Math.max(0, Date.now() / 1000 + ahead - at);
  if (past < 5) return "now";
  if (past < 60) return `${Math.floor(past / 5) * 5} s`;
  if (past < 3600) return `${Math.floor(past / 60)} min`;
  if (past < 86400) return `${Math.floor(past / 3600)} h`;
  return `${Math.floor(past / 86400)} d`;
}

export function aged(at) {
  const node = element("span", { class: "age" });
  setAge(node, at);
  return node;
}

export function setAge(node, at) {
  node.dataset.at = at === null ? "" : at;
  say(node, age(at));
}

export function refreshAges() {
  for (const node of document.querySelectorAll(".age")) {
    say(node, age(node.dataset.at === "" ? null : Number(node.dataset.at)));
  }
}
