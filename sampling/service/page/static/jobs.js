// All jobs, newest first, and new ones.

import { ask, ENDED, give, path, pause, query } from "./api.js";
import { clearProblems, counted, duration, field, h, number, replace, samplerText, say, select, showProblem } from "./dom.js";
import { chainField, chainSettings, classOptions, guidanceField, isChain, numberField, otherField, otherSettings, PACE, paceFields, paceOf, runOptions, samplerField, seedField, stepsField, valuesOf } from "./fields.js";

const PAGE = 30;
const EVERY = 1500;
export const STATES = { queued: "queued", in_progress: "in progress", completed: "completed", failed: "failed", cancelled: "cancelled", expired: "expired" };

export function badge(job) {
  return h("span", { class: `badge ${job.status}` }, job.cancelling ? "cancelling" : STATES[job.status] || job.status);
}

export function progress(job) {
  const { done, total } = job.progress;
  return [
    h("progress", { max: total, value: done, "aria-label": `Progress of ${job.kind} ${shortId(job)}` }),
    h("span", { class: "count" }, `${number(done)} of ${number(total)} images`),
  ];
}

export const shortId = (job) => job.id.replace(/^job-/, "").slice(0, 8);
export const jobText = (job) => `${job.kind} ${shortId(job)}: ${job.request.model}, ${samplerText(job.request)}, seed ${job.request.seed}`;

export function times(job) {
  const now = Date.now() / 1000;
  if (job.status === "queued") return `waits for ${duration(now - job.created_at)}`;
  if (job.status === "in_progress") return `for ${duration(now - job.started_at)}`;
  return job.started_at && job.completed_at ? `took ${duration(job.completed_at - job.started_at)}` : "";
}

/** A job's line, which keeps its element while the job changes, so that nobody loses the focus. */
class Line {
  constructor(job, onChoose) {
    this.choice = h("input", { type: "checkbox", "aria-label": `Compare ${job.kind} ${shortId(job)}`, on: { change: () => onChoose(job.id, this.choice.checked) } });
    this.state = h("span");
    this.progress = h("div", { class: "progress" });
    this.when = h("span", { class: "hint" });
    this.element = h("li", { class: "card job" },
      this.choice,
      h("div", { class: "what" },
        h("a", { href: `#/${path("jobs", job.id)}` }, `${job.kind === "draw" ? "Draw" : "Evaluate"} ${shortId(job)}`),
        h("span", { class: "hint" }, `${job.request.model} · step ${number(job.request.step)} · ${samplerText(job.request)} · seed ${job.request.seed}`)),
      h("div", { class: "state" }, this.state, this.when),
      this.progress);
    this.show(job);
  }

  show(job) {
    const text = JSON.stringify(job);
    if (!ENDED.has(job.status)) this.when.textContent = times(job);
    if (text === this.text) return;
    this.text = text;
    replace(this.state, badge(job));
    replace(this.progress, progress(job));
    this.when.textContent = times(job);
  }
}

export async function jobs(scope) {
  const list = h("ul", { class: "list", "aria-label": "Jobs" });
  const empty = h("p", { class: "empty", hidden: true }, "No jobs yet. What takes longer than a request is one: many images, or an evaluation.");
  const bar = h("div", { class: "bar", hidden: true });
  const more = h("button", { type: "button", hidden: true }, "Older jobs");
  const trouble = h("p", { class: "warning", hidden: true }, "The service does not answer; trying again.");
  const lines = new Map();
  const older = [];
  const chosen = new Set();

  const choose = (id, is) => {
    if (is) chosen.add(id);
    else chosen.delete(id);
    for (const [name, line] of lines) line.choice.disabled = chosen.size === 2 && !chosen.has(name);
    const [a, b] = chosen;
    bar.hidden = chosen.size === 0;
    replace(bar, chosen.size === 2 ? h("a", { class: "button main", href: `#/compare${query({ a, b })}` }, "Compare the two") : h("span", {}, "Choose another job to compare it with."));
  };

  const show = (page) => {
    const all = [...page.data, ...older.filter((job) => !page.data.some((each) => each.id === job.id))];
    all.forEach((job, place) => {
      if (!lines.has(job.id)) lines.set(job.id, new Line(job, choose));
      const { element } = lines.get(job.id);
      lines.get(job.id).show(job);
      if (list.children[place] !== element) list.insertBefore(element, list.children[place] || null);
    });
    empty.hidden = all.length > 0;
    if (!older.length) more.hidden = !page.has_more;
    const count = (state) => page.data.filter((job) => job.status === state).length;
    if (all.length) say(`${counted(count("in_progress"), "job")} in progress, ${count("queued")} queued`);
    return all;
  };

  const load = async () => show(await ask(`v1/jobs${query({ limit: PAGE })}`, scope));
  more.addEventListener("click", async () => {
    const last = [...lines.keys()].at(-1);
    const page = await ask(`v1/jobs${query({ limit: PAGE, after: list.children.length ? idOf(list.lastElementChild) : last })}`, scope);
    older.push(...page.data);
    more.hidden = !page.has_more;
    await load();
  });
  const idOf = (element) => [...lines].find(([, line]) => line.element === element)[0];

  replace(scope.root, h("h1", {}, "Jobs"), await newJob(scope, load), trouble, bar, empty, list, more);
  await load();
  watch();

  /** One request for all: a stream for each job would use up the connections that a browser has for one host. */
  async function watch() {
    while (!scope.signal.aborted) {
      await pause(document.hidden ? 4 * EVERY : EVERY, scope.signal);
      if (scope.signal.aborted) return;
      try {
        await load();
        trouble.hidden = true;
      } catch (error) {
        if (scope.signal.aborted || error.status === 401) return;
        trouble.hidden = false;
      }
    }
  }
}

async function newJob(scope, onGiven) {
  const [{ data: models }, names, evaluators] = await Promise.all([ask("v1/models", scope), ask("v1/samplers", scope), ask("v1/evaluators", scope)]);
  const usable = models.filter((model) => !model.problem);
  if (!usable.length) return h("p", { class: "hint" }, "No run has a checkpoint yet, so there is nothing to draw from.");
  const problem = h("p", { class: "problem", role: "alert" });
  const classes = h("div");
  const sampler = h("div");
  const ofEvaluations = [
    field("Classes", select("labels", [["random", "at random"], ["balanced", "in turn"]], "random")),
    field("Features of", select("features", evaluators.features.map((each) => [each, each]), "classifier")),
    field("Compared with", select("reference", [["", "the run's images"], ...evaluators.references.map((each) => [each, each])], "")),
    field("Keeps", select("keep", [["chunks", "all images"], ["npz", "one file of images"], ["statistics", "statistics alone"]], "chunks")),
  ];
  const chains = chainField('{"samples_per_chain": 10}');
  const kind = select("kind", [["draw", "draw"], ["evaluate", "evaluate"]], "draw");
  const run = select("model", runOptions(models), usable[0].id);
  const adapt = () => {
    const isDraw = kind.value === "draw";
    const before = form?.elements.namedItem("sampler")?.value ?? "";
    for (const each of ofEvaluations) each.hidden = isDraw;
    classes.hidden = !isDraw;
    replace(classes, isDraw ? field("Class", select("class", classOptions(usable.find((model) => model.id === run.value)), "")) : null);
    replace(sampler, samplerField(names.samplers, before, { chains: names.chains }));
    chains.hidden = !isChain(before);
  };
  let form = null;
  form = h("form", { class: "grid", "aria-label": "New job" },
    field("Kind", kind), field("Run", run), classes, ofEvaluations,
    field("Images", numberField("count", 64, { min: 1, step: 1 })), seedField(0), sampler, stepsField(25), guidanceField(1), chains,
    h("details", {}, h("summary", {}, "More settings"), paceFields((name) => PACE[name]), otherField("")),
    h("div", { class: "buttons" }, h("button", { class: "main" }, "Give the job")), problem);
  adapt();
  kind.addEventListener("change", adapt);
  run.addEventListener("change", adapt);
  form.addEventListener("input", () => { chains.hidden = !isChain(form.elements.namedItem("sampler").value); });
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    clearProblems(form, problem);
    const texts = ["kind", "model", "sampler", ...(kind.value === "evaluate" ? ["labels", "features", "reference", "keep"] : [])];
    const body = { ...valuesOf(form, ["count", "seed", "steps", "cfg_scale", "class"], texts), ...paceOf(form), key: crypto.randomUUID ? crypto.randomUUID() : `${Date.now()}-${Math.random()}` };
    try {
      if (isChain(body.sampler)) body.dlg = chainSettings(form);
      const job = await give("v1/jobs", { ...body, ...otherSettings(form) }, scope.signal);
      say(`Job ${shortId(job)} is on disk`);
      await onGiven();
    } catch (error) {
      if (!scope.signal.aborted) showProblem(form, problem, error, (param) => (form.elements.namedItem(param) ? param : "other"));
    }
  });
  return h("details", { class: "card new" }, h("summary", {}, "New job"), form);
}
