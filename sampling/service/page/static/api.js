// What is asked of the service: JSON, pictures, and jobs as they change.

const TOKEN = "ditmoe-token";
export const ENDED = new Set(["completed", "failed", "cancelled", "expired"]);

let kept = null;

/** The service's token: of this tab; in a browser that keeps nothing, of this page. */
export const token = {
  get: () => attempt(() => sessionStorage.getItem(TOKEN)) ?? kept,
  set: (value) => {
    kept = value;
    attempt(() => sessionStorage.setItem(TOKEN, value));
  },
  forget: () => {
    kept = null;
    attempt(() => sessionStorage.removeItem(TOKEN));
  },
};

/** What a browser may refuse to do; null: it did. */
export function attempt(action) {
  try {
    return action();
  } catch {
    return null;
  }
}

export class Refused extends Error {
  constructor(status, error) {
    super(error.message || `the service answered ${status}`);
    this.status = status;
    this.param = error.param || null;
    this.code = error.code || null;
  }
}

/** A path from parts, each quoted: path("v1", "jobs", id). */
export const path = (...parts) => parts.map((part) => encodeURIComponent(part)).join("/");

export function query(values) {
  const given = Object.entries(values).filter(([, value]) => value !== null && value !== undefined && value !== "");
  return given.length ? `?${new URLSearchParams(given)}` : "";
}

async function send(where, { method = "GET", body, signal } = {}) {
  const headers = {};
  if (token.get()) headers.Authorization = `Bearer ${token.get()}`;
  if (method === "POST") headers["Content-Type"] = "application/json";
  const reply = await fetch(where, { method, headers, signal, cache: "no-store", body: method === "POST" ? JSON.stringify(body || {}) : undefined });
  if (reply.ok) return reply;
  let error = {};
  try {
    error = (await reply.json()).error || {};
  } catch {
    error = { message: `the service answered ${reply.status}` };
  }
  if (reply.status === 429 && reply.headers.get("Retry-After")) error.message += `; try again in ${reply.headers.get("Retry-After")} s`;
  if (reply.status === 401) document.dispatchEvent(new CustomEvent("token-wanted"));
  throw new Refused(reply.status, error);
}

export const ask = async (where, options) => (await send(where, options)).json();
export const give = (where, body, signal) => ask(where, { method: "POST", body, signal });
export const fetchBlob = async (where, signal) => (await send(where, { signal })).blob();

export function blobOf(base64) {
  const text = atob(base64);
  const bytes = new Uint8Array(text.length);
  for (let place = 0; place < text.length; place++) bytes[place] = text.charCodeAt(place);
  return new Blob([bytes], { type: "image/png" });
}

export const pause = (milliseconds, signal) => new Promise((resolve) => {
  const timer = setTimeout(resolve, milliseconds);
  signal?.addEventListener("abort", () => { clearTimeout(timer); resolve(); }, { once: true });
});

/** The events of a job's stream; one that says nothing, as behind a proxy that keeps it back, fails. */
async function* events(where, signal) {
  const silent = new AbortController();
  const stop = () => silent.abort();
  signal.addEventListener("abort", stop, { once: true });
  let timer = setTimeout(stop, 8000);
  try {
    const reply = await send(where, { signal: silent.signal });
    const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
    let text = "";
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      clearTimeout(timer);
      timer = setTimeout(stop, 45000);
      text += value;
      const blocks = text.split("\n\n");
      text = blocks.pop();
      for (const block of blocks) if (block.startsWith("data: ")) yield JSON.parse(block.slice(6));
    }
  } finally {
    clearTimeout(timer);
    signal.removeEventListener("abort", stop);
    silent.abort();
  }
}

const TRIES = 3;
const POLLS = 15;

/** A job whenever it changes, until it ends: by its stream, connected again where it breaks; where that fails
    three times over, by asking every two seconds, and by the stream again after a while. */
export async function watchJob(id, { signal, onJob, onMode }) {
  const where = path("v1", "jobs", id);
  let failures = 0;
  let polls = 0;
  while (!signal.aborted) {
    try {
      if (failures < TRIES) {
        for await (const job of events(`${where}/events`, signal)) {
          failures = 0;
          onMode("live");
          onJob(job);
          if (ENDED.has(job.status)) return;
        }
        failures += 1;
      } else {
        const job = await ask(where, { signal });
        onMode("polling");
        onJob(job);
        if (ENDED.has(job.status)) return;
        polls += 1;
        if (polls % POLLS === 0) failures = 0;
      }
    } catch (error) {
      if (signal.aborted) return;
      if (error.status === 401 || error.status === 404) throw error;
      failures += 1;
      onMode("reconnecting");
    }
    await pause(failures < TRIES ? 500 : 2000, signal);
  }
}
