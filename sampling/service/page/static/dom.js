// Elements, and values as texts. What comes from elsewhere becomes text nodes, never markup.

const SVG = "http://www.w3.org/2000/svg";

function put(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "on") {
      for (const [event, listener] of Object.entries(value)) element.addEventListener(event, listener);
    } else if (name === "properties") Object.assign(element, value);
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  fill(element, children);
  return element;
}

export function fill(element, children) {
  for (const child of children.flat(Infinity)) {
    if (child === null || child === undefined || child === false) continue;
    element.append(child instanceof Node ? child : document.createTextNode(String(child)));
  }
}

/** An element: h("a", {href: "#/jobs"}, "Jobs"). */
export function h(tag, attributes = {}, ...children) {
  return put(document.createElement(tag), attributes, children);
}

/** An element of an SVG picture. */
export function s(tag, attributes = {}, ...children) {
  return put(document.createElementNS(SVG, tag), attributes, children);
}

export function replace(element, ...children) {
  element.replaceChildren();
  fill(element, children);
  return element;
}

let made = 0;
/** An id that no other element has. */
export const newId = (name) => `${name}-${++made}`;

/** Tell those who hear the page. */
export function say(text) {
  const place = document.getElementById("said");
  if (place.textContent !== text) place.textContent = text;
}

export function number(value, digits = 4) {
  if (value === null || value === undefined) return "–";
  if (typeof value !== "number") return String(value);
  if (value < 0) return `−${number(-value, digits)}`;
  if (Number.isInteger(value) && Math.abs(value) < 1e15) return value.toLocaleString("en-US");
  const size = Math.abs(value);
  if (size >= 1e6 || (size > 0 && size < 1e-3)) return value.toExponential(2).replace("e", " × 10^").replace("^+", "^");
  return String(Number(value.toPrecision(digits)));
}

/** "1 job", "2 jobs". */
export const counted = (count, name) => `${number(count)} ${name}${count === 1 ? "" : "s"}`;

export function duration(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  seconds = Math.max(0, seconds); // clocks differ
  if (seconds < 10) return `${seconds.toFixed(1)} s`;
  if (seconds < 90) return `${Math.round(seconds)} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  if (seconds < 129600) return `${Math.round(seconds / 3600)} h`;
  return `${Math.round(seconds / 86400)} days`;
}

export function time(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  const at = new Date(seconds * 1000);
  return h("time", { datetime: at.toISOString() }, at.toLocaleString(undefined, { dateStyle: "medium", timeStyle: "medium" }));
}

/** "heun, 18 steps, guidance 1.5", of a request or the settings of an evaluation. */
export function samplerText(settings) {
  const parts = [settings.sampler || "default sampler"];
  if (settings.sampler && settings.sampler.endsWith("rk45")) parts.push(`tolerance ${number(settings.tolerance)}`);
  else parts.push(`${settings.steps} ${settings.steps === 1 ? "step" : "steps"}`);
  if (settings.schedule) parts.push(settings.schedule);
  if (settings.cache_interval > 1) parts.push(`blocks at every ${number(settings.cache_interval)} steps`, `order ${number(settings.cache_order ?? 1)}`);
  if (settings.cfg_scale !== undefined && settings.cfg_scale !== 1) parts.push(`guidance ${number(settings.cfg_scale)}${intervalText(settings)}`);
  return parts.join(", ");
}

/** " at 0.3 < σ ≤ 5", where guidance does not act at all noise levels. */
function intervalText({ cfg_sigma_min: least, cfg_sigma_max: most }) {
  const below = most === null || most === undefined ? "" : ` ≤ ${number(most)}`;
  return least > 0 || below ? ` at ${number(least ?? 0)} < σ${below}` : "";
}

/** Pairs of a term and what it is. */
export function facts(pairs) {
  return h("dl", { class: "facts" }, Object.entries(pairs).map(([name, value]) =>
    value === null || value === undefined ? null : h("div", {}, h("dt", {}, name), h("dd", {}, value))));
}

/** A table whose first column names its rows; it scrolls by itself where it is too wide. */
export function table(caption, heads, rows, { unseen = false } = {}) {
  return h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": caption },
    h("table", {}, h("caption", { class: unseen ? "unseen" : "" }, caption),
      h("thead", {}, h("tr", {}, heads.map((head) => h("th", { scope: "col" }, head)))),
      h("tbody", {}, rows.map((row) => h("tr", {}, row.map((cell, place) =>
        place === 0 ? h("th", { scope: "row" }, cell) : h("td", {}, cell)))))));
}

/** A field with its label; `problem` is where it is told what is wrong with it. */
export function field(label, control, { hint = null } = {}) {
  const id = newId("field");
  const problem = h("span", { class: "problem", id: `${id}-problem` });
  const note = hint ? h("span", { class: "hint", id: `${id}-hint` }, hint) : null;
  control.id = id;
  control.setAttribute("aria-describedby", `${id}-problem${hint ? ` ${id}-hint` : ""}`);
  return h("div", { class: "field" }, h("label", { for: id }, label), control, note, problem);
}

export function select(name, options, chosen) {
  return h("select", { name }, options.map(([value, text]) =>
    h("option", { value, selected: String(value) === String(chosen) }, text)));
}

/** Mark the field that an error names, or say it in `place`. */
export function showProblem(form, place, error, names = (param) => param) {
  clearProblems(form, place);
  const name = error.param ? names(String(error.param).split(".")[0]) : null;
  const control = name ? form.elements.namedItem(name) : null;
  if (control instanceof Element) {
    for (let parent = control.parentElement; parent; parent = parent.parentElement) if (parent.tagName === "DETAILS") parent.open = true;
    control.setAttribute("aria-invalid", "true");
    document.getElementById(`${control.id}-problem`).textContent = error.message;
    control.focus();
  } else place.textContent = error.message;
  say(error.message);
}

export function clearProblems(form, place) {
  place.textContent = "";
  for (const each of form.querySelectorAll(".problem")) each.textContent = "";
  for (const each of form.querySelectorAll("[aria-invalid]")) each.removeAttribute("aria-invalid");
}
