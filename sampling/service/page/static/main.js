// The frame: views by the address, the token, the colours.

import { ask, attempt, Refused, token } from "./api.js";
import { h, newId, replace, say } from "./dom.js";
import { compare } from "./compare.js";
import { evaluation } from "./evaluation.js";
import { gallery } from "./gallery.js";
import { jobs } from "./jobs.js";
import { job } from "./job.js";
import { playground } from "./playground.js";
import { run, runs } from "./runs.js";

const main = document.getElementById("main");
const VIEWS = [
  [["jobs"], "Jobs", jobs],
  [["jobs", null], "Job", job],
  [["playground"], "Playground", playground],
  [["gallery"], "Gallery", gallery],
  [["runs"], "Runs", runs],
  [["runs", null], "Run", run],
  [["runs", null, "evaluations", null], "Evaluation", evaluation],
  [["compare"], "Compare", compare],
];

/** What a view has for as long as it is shown. */
class Scope {
  #urls = new Set();
  #end = new AbortController();

  constructor(root) {
    this.root = root;
  }

  get signal() {
    return this.#end.signal;
  }

  /** An address for the bytes of a picture, given back when the view ends. */
  url(blob) {
    const url = URL.createObjectURL(blob);
    this.#urls.add(url);
    return url;
  }

  /** Give back what the pictures in an element hold: it is about to be replaced. */
  free(element) {
    for (const image of element.querySelectorAll("img")) {
      if (this.#urls.delete(image.src)) URL.revokeObjectURL(image.src);
    }
  }

  end() {
    this.#end.abort();
    for (const url of this.#urls) URL.revokeObjectURL(url);
  }
}

let scope = null;
let shownView = null;

function place() {
  const [where, text] = location.hash.replace(/^#\/?/, "").split("?");
  let parts;
  try {
    parts = where.split("/").filter(Boolean).map(decodeURIComponent);
  } catch {
    parts = ["?"];
  }
  return { parts: parts.length ? parts : ["jobs"], params: new URLSearchParams(text || "") };
}

async function show() {
  const { parts, params } = place();
  const found = VIEWS.find(([form]) => form.length === parts.length && form.every((part, i) => part === null || part === parts[i]));
  scope?.end();
  const root = h("div", { class: "view" });
  const current = (scope = new Scope(root));
  for (const link of document.querySelectorAll(".top nav a")) {
    if (link.getAttribute("href") === `#/${parts[0]}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  replace(main, root);
  window.scrollTo(0, 0);
  if (!found) {
    replace(root, h("h1", {}, "There is no such view"), h("p", {}, h("a", { href: "#/jobs" }, "To the jobs")));
    return;
  }
  const [form, title, view] = found;
  const names = parts.filter((_, i) => form[i] === null);
  document.title = `${names.length ? `${names.at(-1)} · ` : ""}${title} · ditmoe`;
  try {
    await view(current, names, params);
    if (current === scope && shownView !== null) focusTitle(root);
    shownView = view;
  } catch (error) {
    if (current.signal.aborted || (error instanceof Refused && error.status === 401)) return;
    replace(root, h("h1", {}, title), h("p", { class: "warning", role: "alert" }, told(error)),
      h("p", {}, h("button", { type: "button", on: { click: show } }, "Try again")));
  }
}

function focusTitle(root) {
  const title = root.querySelector("h1");
  if (!title) return;
  title.tabIndex = -1;
  title.focus({ preventScroll: true });
}

const told = (error) => (error instanceof TypeError ? "The service does not answer." : error.message);

// The token.

function askForToken() {
  scope?.end();
  document.getElementById("sign-out").hidden = true;
  const wrong = token.get() !== null;
  token.forget();
  const id = newId("token");
  const input = h("input", { id, type: "password", autocomplete: "off", required: true, "aria-describedby": `${id}-problem` });
  const problem = h("p", { class: "problem", id: `${id}-problem`, role: "alert" }, wrong ? "That is not the service's token." : "");
  const enter = async (event) => {
    event.preventDefault();
    token.set(input.value.trim());
    try {
      await ask("v1/samplers");
      document.getElementById("sign-out").hidden = false;
      await show();
    } catch (error) {
      if (error.status !== 401) problem.textContent = told(error);
    }
  };
  replace(main, h("form", { class: "card login", on: { submit: enter } }, h("h1", {}, "Token"),
    h("p", {}, "This service answers those who have its token. It is kept until this tab is closed."),
    h("div", { class: "field" }, h("label", { for: id }, "Token of the service"), input, problem),
    h("button", { class: "main" }, "Enter")));
  input.focus();
  document.title = "Token · ditmoe";
}

document.addEventListener("token-wanted", askForToken);
const signOut = document.getElementById("sign-out");
signOut.hidden = token.get() === null;
signOut.addEventListener("click", () => {
  token.forget();
  location.hash = "#/jobs";
  askForToken();
});

// The colours.

const themes = { auto: "as the system has them", light: "light", dark: "dark" };
const themeButton = document.getElementById("theme");
function showTheme() {
  const now = document.documentElement.dataset.theme || "auto";
  themeButton.textContent = now[0].toUpperCase() + now.slice(1);
  themeButton.setAttribute("aria-label", `Colours: ${themes[now]}`);
}
themeButton.addEventListener("click", () => {
  const names = Object.keys(themes);
  const next = names[(names.indexOf(document.documentElement.dataset.theme || "auto") + 1) % names.length];
  if (next === "auto") {
    delete document.documentElement.dataset.theme;
    attempt(() => localStorage.removeItem("ditmoe-theme"));
  } else {
    document.documentElement.dataset.theme = next;
    attempt(() => localStorage.setItem("ditmoe-theme", next));
  }
  showTheme();
  say(`Colours: ${themes[next]}`);
});
showTheme();

document.getElementById("skip").addEventListener("click", (event) => {
  event.preventDefault(); // the address has the view
  main.focus();
});
window.addEventListener("hashchange", show);
show();
