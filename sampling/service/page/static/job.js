// One job: its progress as it goes, its images as they come, its figures and files.

import { ask, ENDED, fetchBlob, give, path, query, watchJob } from "./api.js";
import { counted, duration, facts, h, number, replace, samplerText, say, time } from "./dom.js";
import { figureTables } from "./figures.js";
import { badge, progress, shortId, STATES, times } from "./jobs.js";
import { fetchPicture, pictureOf, playgroundLink, tile } from "./pictures.js";

const AT_ONCE = 24;
const MODES = { live: "live", polling: "asked every two seconds: the stream of events does not come through", reconnecting: "connecting again" };

export async function job(scope, [id]) {
  const where = path("v1", "jobs", id);
  const [first, { settings: usual }] = await Promise.all([ask(where, scope), ask("v1/samplers", scope)]);
  const state = h("p", { class: "line" });
  const bar = h("div", { class: "progress wide" });
  const mode = h("span", { class: "hint" });
  const problem = h("p", { class: "warning", role: "alert", hidden: true });
  const cancel = h("button", { type: "button" }, "Cancel");
  const settings = h("section", { class: "card", "aria-labelledby": "settings" });
  const figures = h("div");
  const files = h("div");
  const images = new Images(scope, where, first, usual);
  cancel.addEventListener("click", async () => {
    cancel.disabled = true;
    show(await give(`${where}/cancel`, {}, scope.signal));
  });

  const rate = rateSince(first);
  let told = "";
  let ended = false;
  function show(now) {
    replace(state, badge(now), h("span", {}, times(now)), rate(now), mode);
    replace(bar, progress(now));
    cancel.hidden = ENDED.has(now.status);
    cancel.disabled = now.cancelling;
    problem.hidden = !now.error;
    problem.textContent = now.error ? now.error.message : "";
    replace(settings, h("h2", { id: "settings" }, "Asked for"), facts({
      Run: h("a", { href: `#/${path("runs", now.request.model)}` }, now.request.model), Checkpoint: `step ${number(now.request.step)}, ${now.request.weights}`,
      Sampler: samplerText(now.request), Seed: now.request.seed, Images: number(now.progress.total), Class: now.kind === "draw" ? now.request.class ?? "in turn" : now.request.labels,
      Given: time(now.created_at), Begun: now.started_at && time(now.started_at), Ended: now.completed_at && time(now.completed_at), Expires: now.expires_at && time(now.expires_at),
      Evaluation: now.evaluation && h("a", { href: `#/${path("runs", now.request.model, "evaluations", now.evaluation)}` }, "its figures, images and chains") }));
    const text = `${STATES[now.status]}, ${now.progress.done} of ${now.progress.total} images`;
    const eighths = `${now.status} ${Math.floor((8 * now.progress.done) / now.progress.total)}`;
    if (eighths !== told) say(text);
    told = eighths;
    images.show(now);
    if (ENDED.has(now.status) && !ended) {
      ended = true;
      mode.textContent = "";
      finish(now).catch((error) => { if (!scope.signal.aborted) problem.hidden = !(problem.textContent = error.message); });
    }
  }

  async function finish(now) {
    if (now.kind === "evaluate" && now.status === "completed") replace(figures, figureTables(await ask(`${where}/figures`, scope)));
    if (now.progress.done === 0 || now.status === "expired") return;
    const { data } = await ask(`${where}/files`, scope);
    replace(files, h("details", { class: "card" }, h("summary", {}, counted(data.length, "file")), h("ul", { class: "files" }, data.map((file) =>
      h("li", {}, h("button", { type: "button", class: "quiet", on: { click: () => save(file.name) } }, file.name), h("span", { class: "hint" }, `${number(Math.ceil(file.bytes / 1024))} KiB`))))));
  }

  async function save(name) {
    const blob = await fetchBlob(`${where}/files/${path(...name.split("/"))}`, scope.signal);
    h("a", { href: scope.url(blob), download: name.split("/").at(-1) }).click();
  }

  replace(scope.root, h("h1", {}, `${first.kind === "draw" ? "Draw" : "Evaluation"} ${shortId(first)}`),
    h("section", { class: "card", "aria-label": "Progress" }, state, bar, problem, h("div", { class: "buttons" }, cancel, h("a", { class: "button", href: `#/compare${query({ a: id })}` }, "Compare"))),
    figures, images.element, settings, files);
  show(first);
  if (ENDED.has(first.status)) return;
  watchJob(id, { signal: scope.signal, onJob: show, onMode: (name) => { mode.textContent = MODES[name]; mode.dataset.mode = name; } })
    .catch((error) => { if (!scope.signal.aborted) { problem.hidden = false; problem.textContent = error.message; } });
}

/** How fast images come since this page looks, and how long the rest may take. */
function rateSince(first) {
  const begun = Date.now() / 1000;
  return (job) => {
    const drawn = job.progress.done - first.progress.done;
    if (job.status !== "in_progress" || drawn <= 0) return null;
    const seconds = (Date.now() / 1000 - begun) / drawn;
    return h("span", { class: "hint" }, `${number(1 / seconds, 3)} images a second, about ${duration(seconds * (job.progress.total - job.progress.done))} left`);
  };
}

/** The images of a job, as they come. */
class Images {
  constructor(scope, where, job, usual) {
    this.scope = scope;
    this.usual = usual;
    this.where = where;
    this.shown = 0;
    this.most = AT_ONCE;
    this.busy = false;
    this.grid = h("div", { class: "tiles" });
    this.more = h("button", { type: "button", hidden: true, on: { click: () => { this.most += AT_ONCE; this.show(this.job); } } }, "More images");
    this.empty = h("p", { class: "empty" }, "Images appear as soon as the first of them are drawn.");
    this.element = h("section", { class: "card", "aria-labelledby": "images" }, h("h2", { id: "images" }, "Images"), this.empty, this.grid, this.more);
    this.job = job;
  }

  show(job) {
    this.job = job;
    this.empty.hidden = this.shown > 0;
    if (ENDED.has(job.status) && !job.progress.done) this.empty.textContent = "It has no images.";
    if (job.status === "expired") this.empty.textContent = "The job has expired: what it made is removed. What an evaluation wrote into its run's folder is there.";
    else if (!this.busy) this.load().catch((error) => { if (!this.scope.signal.aborted) this.empty.textContent = error.message; });
  }

  async load() {
    this.busy = true;
    try {
      while (!this.scope.signal.aborted && this.shown < Math.min(this.most, this.job.progress.done)) {
        const before = this.shown;
        if (this.job.kind === "draw") await this.draw();
        else if (this.keeps()) await this.evaluation();
        this.empty.hidden = this.shown > 0;
        if (this.shown === before) break; // not in this order: those that come next will do
      }
    } finally {
      this.busy = false;
    }
    this.more.hidden = this.shown >= this.job.progress.done;
  }

  /** Whether the images of an evaluation are there: some are not kept when all is scored. */
  keeps() {
    const kept = this.job.status !== "completed" || (this.job.request.keep ?? "chunks") === "chunks";
    if (!kept) this.empty.textContent = "The images of this evaluation are not kept.";
    return kept;
  }

  async draw() {
    const { request } = this.job;
    const last = Math.min(this.most, this.job.progress.done, this.shown + 8);
    const numbers = Array.from({ length: last - this.shown }, (_, place) => this.shown + place);
    const name = request.class ?? null;
    const found = await Promise.all(numbers.map((each) => fetchPicture(this.scope, `${this.where}/images/${each}`, `image ${each}${name === null ? "" : `, class ${name}`}`)));
    // A name of digits may be that of a class, or its number: that the run alone can tell.
    const asked = /^\d+$/.test(name) && typeof name === "string" ? null : name ?? "";
    found.forEach((image, place) => this.grid.append(tile(image, [name, `seed ${request.seed} · image ${numbers[place]}`], asked === null ? null : this.link(asked, numbers[place]))));
    this.shown = last;
  }

  /** Where an image is drawn again. */
  link(label, number) {
    const { request } = this.job;
    return playgroundLink(this.usual, request.model, request.step, request.weights, request, label, number);
  }

  async evaluation() {
    if (!this.job.evaluation) return;
    const { request } = this.job;
    const where = path("v1", "runs", request.model, "evaluations", this.job.evaluation, "images");
    const { images } = await ask(`${where}${query({ limit: Math.min(60, this.most) })}`, this.scope);
    const fresh = images.slice(this.shown);
    for (const each of fresh) {
      const image = pictureOf(this.scope, each.b64_json, `image ${each.number}, class ${each.class}`);
      this.grid.append(tile(image, [each.class, `seed ${request.seed} · image ${each.number}`], this.link(each.label, each.number)));
    }
    this.shown += fresh.length;
    if (this.most > 60) this.most = this.shown; // the gallery has the others
  }
}
