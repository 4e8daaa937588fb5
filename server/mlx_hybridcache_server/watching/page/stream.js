// The server's events and the page's requests. The key travels in a header, never in an address.

import { needsKey } from "./server.js";

const KEY = "mlx-hybridcache-key";
const LONGEST_WAIT = 10000;

let key = needsKey ? sessionStorage.getItem(KEY) : null;
let under_way = null;
let waiting = null;

export const lacksKey = () => needsKey && !key;

export function useKey(given) {
  key = given;
  sessionStorage.setItem(KEY, given);
}

export function forgetKey() {
  key = null;
  sessionStorage.removeItem(KEY);
}

function headers() {
  const sent = { "Content-Type": "application/json" };
  if (key) sent.Authorization = `Bearer ${key}`;
  return sent;
}

export async function ask(method, path, body) {
  const response = await fetch(path, { method, headers: headers(), body: JSON.stringify(body) });
  const reply = await response.json();
  if (!response.ok) throw new Error(reply.error?.message ?? `The server answered ${response.status}.`);
  return reply;
}

// Listens until `stop`, again and again: `view()` is what to ask for, `told(update, isFirst)` gets
// each event, `state(name)` hears of "live", "connecting" and "key".
export function listen({ view, told, state }) {
  stop();
  const abort = new AbortController();
  under_way = abort;
  let tries = 0;
  const again = () => {
    if (abort.signal.aborted) return;
    state("connecting");
    waiting = setTimeout(run, Math.min(LONGEST_WAIT, 500 * 2 ** tries));
    tries += 1;
  };
  const run = async () => {
    try {
      const response = await fetch("v1/cache/watch", {
        method: "POST",
        headers: headers(),
        body: JSON.stringify(view()),
        signal: abort.signal,
      });
      if (response.status === 401) {
        forgetKey();
        state("key");
        return;
      }
      if (!response.ok) throw new Error(`${response.status}`);
      let isFirst = true;
      for await (const update of events(response.body)) {
        if (abort.signal.aborted) return;
        tries = 0;
        state("live");
        told(update, isFirst);
        isFirst = false;
      }
    } catch (error) {
      if (abort.signal.aborted) return;
    }
    again();
  };
  run();
}

export function stop() {
  clearTimeout(waiting);
  under_way?.abort();
}

async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    held += value;
    const whole = held.split("\n\n");
    held = whole.pop();
    for (const event of whole) {
      const data = event.split("\n").filter((line) => line.startsWith("data:"));
      if (data.length) yield JSON.parse(data.map((line) => line.slice(5)).join("\n"));
    }
  }
}
