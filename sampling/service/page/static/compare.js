// Two jobs beside each other: in what they differ, their figures, their images of equal seeds.

import { ask, ENDED, path, pause, query } from "./api.js";
import { field, h, number, replace, select, table } from "./dom.js";
import { figuresOf, HIGHER } from "./figures.js";
import { badge, jobText } from "./jobs.js";
import { fetchPicture } from "./pictures.js";

const IMAGES = 12;
const LEFT_OUT = new Set(["key", "user"]);

export async function compare(scope, _, params) {
  const { data } = await ask(`v1/jobs${query({ limit: 100 })}`, scope);
  if (data.length < 2) {
    replace(scope.root, h("h1", {}, "Compare"), h("p", { class: "empty" }, "Two jobs are needed; ", h("a", { href: "#/jobs" }, "give them"), "."));
    return;
  }
  const ids = data.map((job) => job.id);
  const [a, b] = [params.get("a") || ids.find((id) => id !== params.get("b")), params.get("b") || ids.find((id) => id !== (params.get("a") || ids[0]))];
  const chosen = await Promise.all([a, b].map(async (id) => data.find((job) => job.id === id) || ask(path("v1", "jobs", id), scope)));
  const all = [...data, ...chosen.filter((job) => !ids.includes(job.id))];
  const field_ = (name, job, label) => {
    const control = select(name, all.map((each) => [each.id, jobText(each)]), job.id);
    control.addEventListener("change", () => { location.hash = `#/compare${query({ a, b, [name]: control.value })}`; });
    return field(label, control);
  };
  const figures = h("div");
  const images = h("div");
  const differ = h("section", { class: "card", "aria-labelledby": "differ" }, h("h2", { id: "differ" }, "In what they differ"), differences(chosen));
  replace(scope.root, h("h1", {}, "Compare"),
    h("form", { class: "card row wide", "aria-label": "Which jobs" }, field_("a", chosen[0], "Job A"), field_("b", chosen[1], "Job B")),
    differ, figures, images);
  await Promise.all([showFigures(scope, figures, chosen), showImages(scope, images, chosen)]);
  if (chosen.every((job) => ENDED.has(job.status))) return;
  follow().catch((error) => { if (!scope.signal.aborted) replace(differ, h("p", { class: "warning" }, error.message)); });

  /** Until both have ended: how far they are, and what they have in the end. */
  async function follow() {
    let now = chosen;
    while (!scope.signal.aborted && !now.every((job) => ENDED.has(job.status))) {
      await pause(2000, scope.signal);
      if (scope.signal.aborted) return;
      try {
        now = await Promise.all(now.map((job) => (ENDED.has(job.status) ? job : ask(path("v1", "jobs", job.id), scope))));
      } catch (error) {
        if (error.status) throw error;
        continue; // the service is away
      }
      replace(differ, h("h2", { id: "differ" }, "In what they differ"), differences(now));
      if (!images.querySelector("figure")) await showImages(scope, images, now);
    }
    if (!scope.signal.aborted) await Promise.all([showFigures(scope, figures, now), showImages(scope, images, now)]);
  }
}

const mark = (name) => h("span", { class: `mark mark-${name}` }, name);
const head = (jobs) => ["", ...jobs.map((job, place) => h("a", { href: `#/${path("jobs", job.id)}` }, mark("AB"[place])))];

function differences(jobs) {
  const [a, b] = jobs.map((job) => flat(job.request));
  const names = [...new Set([...Object.keys(a), ...Object.keys(b)])].filter((name) => !LEFT_OUT.has(name) && JSON.stringify(a[name]) !== JSON.stringify(b[name]));
  const text = (value) => (value === undefined ? "–" : value === null ? "default" : typeof value === "number" ? number(value) : String(value));
  const rows = [["status", ...jobs.map(badge)], ["images", ...jobs.map((job) => `${number(job.progress.done)} of ${number(job.progress.total)}`)],
    ...names.filter((name) => name !== "count").map((name) => [name.replaceAll("_", " "), text(a[name]), text(b[name])])];
  return [table("Status, and settings that differ", head(jobs), rows), names.length ? null : h("p", {}, "They were asked for the same.")];
}

function flat(request, prefix = "") {
  return Object.entries(request).reduce((found, [name, value]) =>
    ({ ...found, ...(value && typeof value === "object" && !Array.isArray(value) ? flat(value, `${prefix}${name}.`) : { [prefix + name]: value }) }), {});
}

async function showFigures(scope, place, jobs) {
  const scored = jobs.every((job) => job.kind === "evaluate" && job.status === "completed");
  if (!scored) {
    replace(place, h("section", { class: "card" }, h("h2", {}, "Figures"), h("p", { class: "empty" }, "Two evaluations that are completed have figures.")));
    return;
  }
  const [a, b] = await Promise.all(jobs.map((job) => ask(`${path("v1", "jobs", job.id)}/figures`, scope)));
  const sections = Object.keys(a.results).filter((network) => b.results[network]).map((network) => {
    const [first, second] = [a, b].map((each) => figuresOf(each.results[network]));
    const rows = [["evaluations an image", number(a.evaluation.nfe), number(b.evaluation.nfe), signed(b.evaluation.nfe - a.evaluation.nfe), ""]];
    for (const [key, each] of Object.entries(first)) {
      if (!second[key]) continue;
      const off = second[key].value - each.value;
      const apart = each.interval && second[key].interval && (each.interval[1] < second[key].interval[0] || second[key].interval[1] < each.interval[0]);
      const better = off === 0 ? "equal" : (off > 0) === HIGHER.has(key) ? "B is better" : "A is better";
      rows.push([each.title, number(each.value), number(second[key].value), signed(off), each.interval ? `${better}${apart ? "" : ", within the intervals"}` : better]);
    }
    const same = a.results[network].real.fingerprint === b.results[network].real.fingerprint;
    return h("section", { class: "card" }, h("h2", {}, "Figures"),
      same ? null : h("p", { class: "warning" }, "They are scored against different real images: their figures cannot be compared."),
      table(`In features of ${network}`, [...head(jobs), "B − A", ""], rows));
  });
  replace(place, sections.length ? sections : h("p", { class: "warning" }, "They are scored in features of different networks."));
}

const signed = (value) => (value > 0 ? `+${number(value)}` : number(value));

/** Whether image i of both has one start: the same seed, and the same class by its number. */
function sameStarts([a, b]) {
  if (a.request.seed !== b.request.seed) return `Their seeds are ${a.request.seed} and ${b.request.seed}: no image of one starts as one of the other.`;
  // Those of chains go by the number of their chain.
  const samples = (job) => (String(job.request.sampler).startsWith("dlg:") ? job.request.dlg?.samples_per_chain : 1);
  const rule = (job) => `${job.kind === "draw" ? job.request.class ?? "balanced" : job.request.labels} ${samples(job)}`;
  if (rule(a) !== rule(b)) return "Their classes are dealt out differently: images of one number are of different classes.";
  return null;
}

async function showImages(scope, place, jobs) {
  const title = h("h2", {}, "Images of equal seeds");
  const gone = jobs.some((job) => job.status === "expired" || (job.status === "completed" && job.kind === "evaluate" && (job.request.keep ?? "chunks") !== "chunks"));
  const problem = gone ? "The images of one of them are not kept." : sameStarts(jobs);
  const there = Math.min(...jobs.map((job) => job.progress.done));
  const say = (text) => replace(place, h("section", { class: "card" }, title, h("p", { class: "empty" }, text)));
  if (problem || !there || !jobs.every((job) => job.kind === "draw" || ENDED.has(job.status))) {
    say(problem || "Both need images first.");
    return;
  }
  const grid = h("div", { class: "tiles pairs" });
  const more = h("button", { type: "button" }, "More images");
  replace(place, h("section", { class: "card" }, title, grid, more));
  let next = 0;
  const load = async () => {
    const last = Math.min(there, next + IMAGES);
    const numbers = Array.from({ length: last - next }, (_, step) => next + step);
    const rows = await Promise.all(numbers.map((image) => Promise.all(jobs.map((job, which) => fetchPicture(scope, `${path("v1", "jobs", job.id)}/images/${image}`, `${"AB"[which]}, image ${image}`)))));
    rows.forEach((pair, row) => grid.append(h("figure", { class: "tile pair" }, h("div", { class: "both" }, pair.map((image, which) => h("div", { class: "one" }, image, mark("AB"[which])))),
      h("figcaption", {}, h("span", {}, `seed ${jobs[0].request.seed} · image ${numbers[row]}`)))));
    next = last;
    more.hidden = next === there;
  };
  more.addEventListener("click", () => load().catch((error) => { if (!scope.signal.aborted) more.textContent = error.message; }));
  try {
    await load();
  } catch (error) {
    if (error.status !== 404) throw error;
    say("The first images are still being drawn."); // parts of a job come in any order
  }
}
