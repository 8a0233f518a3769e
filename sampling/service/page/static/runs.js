// The runs, and one of them: how it trains, what it drew of itself, what its evaluations found.

import { ask, path, pause } from "./api.js";
import { chart } from "./charts.js";
import { counted, duration, facts, field, h, number, replace, samplerText, say, select, table } from "./dom.js";
import { fetchPicture } from "./pictures.js";
import { figuresThere, seriesOf } from "./series.js";

const EVERY = 10000;
const ROWS = 25;
const CURVES = {
  loss: ["Loss", "loss"],
  images_per_second: ["Throughput", "images a second"],
  grad_norm: ["Norm of the gradient", "norm"],
  lr: ["Learning rate", "learning rate"],
  balance_loss: ["Balance loss of the experts", "balance loss"],
  data_wait_seconds: ["Waiting for data", "seconds a step"],
};

function trainingText(run) {
  if (!run.training) return "No record of training.";
  const of = run.training_steps ? ` of ${number(run.training_steps)}` : "";
  return `Step ${number(run.training.step)}${of}, loss ${number(run.training.loss)}; written ${duration(run.training.age)} ago.`;
}

const previewOf = (scope, run, step) => fetchPicture(scope, path("v1", "runs", run, "previews", String(step)), `Images that ${run} drew of itself at step ${step}`);

/** A run in the list; its preview is the newest. */
class Card {
  constructor(scope, run) {
    this.scope = scope;
    this.preview = h("div", { class: "thumb" });
    this.told = h("div");
    this.element = h("li", { class: "card" }, this.preview, h("h2", {}, h("a", { href: `#/${path("runs", run.id)}` }, run.id)), this.told);
  }

  show(run) {
    replace(this.told, h("p", {}, trainingText(run)), run.problem ? h("p", { class: "warning" }, run.problem) : null,
      h("p", { class: "hint" }, `${counted(run.steps.length, "checkpoint")}, ${counted(run.evaluations, "evaluation")}`));
    const newest = run.previews.at(-1);
    if (newest === undefined || newest === this.newest) return;
    this.newest = newest;
    previewOf(this.scope, run.id, newest).then((image) => {
      this.scope.free(this.preview);
      replace(this.preview, image);
    }, () => { this.newest = undefined; });
  }
}

export async function runs(scope) {
  const list = h("ul", { class: "cards" });
  const empty = h("p", { class: "empty", hidden: true }, "There are no runs in this folder yet.");
  const cards = new Map();
  const load = async () => {
    const { data } = await ask("v1/runs", scope);
    empty.hidden = data.length > 0;
    for (const run of data) {
      if (!cards.has(run.id)) {
        cards.set(run.id, new Card(scope, run));
        list.append(cards.get(run.id).element);
      }
      cards.get(run.id).show(run);
    }
  };
  replace(scope.root, h("h1", {}, "Runs"), empty, list);
  await load();
  follow();

  async function follow() {
    while (!scope.signal.aborted) {
      await pause(EVERY, scope.signal);
      if (scope.signal.aborted || document.hidden) continue;
      try {
        await load();
      } catch (error) {
        if (error.status === 401) return; // else it is away for a moment
      }
    }
  }
}

export async function run(scope, [name]) {
  const where = path("v1", "runs", name);
  const [first, { data: found }] = await Promise.all([ask(where, scope), ask(`${where}/evaluations`, scope)]);
  const told = h("p", { class: "line" });
  const live = h("div", { class: "preview" });
  const curves = h("div", { class: "charts" });
  const experts = h("div");
  const previews = new Previews(scope, name, live);
  const evaluations = new Evaluations(name, found);
  let shown = "";
  const show = (now) => {
    replace(told, trainingText(now));
    const text = JSON.stringify([now.curves.records, now.curves.step.at(-1), now.previews]);
    if (text === shown) return;
    if (shown && now.previews.at(-1) !== previews.newest) say(`A new preview, of step ${now.previews.at(-1)}`);
    shown = text;
    previews.show(now.previews);
    replace(curves, Object.entries(CURVES).filter(([key]) => now.curves.values[key]).map(([key, [title, unit]]) => chart({
      title, xLabel: "step", yLabel: unit, height: 220,
      series: [{ name: title, marks: false, points: now.curves.step.map((step, place) => ({ x: step, y: now.curves.values[key][place] })) }],
    })));
    replace(experts, expertLoad(now.curves.expert_load));
  };
  show(first);
  replace(scope.root, h("h1", {}, name),
    h("section", { class: "card split-even", "aria-labelledby": "training" },
      h("div", {}, h("h2", { id: "training" }, "Training"), told, first.problem ? h("p", { class: "warning" }, first.problem) : null, facts({
        Checkpoints: first.steps.length ? first.steps.map((step) => number(step)).join(", ") : "none yet", Objective: first.objective,
        Parameters: first.parameters && number(first.parameters), Network: first.model && networkText(first.model),
        Classes: first.classes && number(first.classes.length),
      }), h("div", { class: "buttons" }, h("a", { class: "button", href: `#/playground?${new URLSearchParams({ model: name })}` }, "Playground"), h("a", { class: "button", href: `#/gallery?${new URLSearchParams({ run: name })}` }, "Gallery"))),
      live),
    h("section", { class: "card", "aria-labelledby": "curves" }, h("h2", { id: "curves" }, "Curves"), first.curves.every > 1 ? h("p", { class: "hint" }, `Every ${first.curves.every}th of ${number(first.curves.records)} records.`) : null, curves, experts),
    evaluations.element);
  let known = `${first.evaluations} ${first.finished}`;
  follow();

  async function follow() {
    while (!scope.signal.aborted) {
      await pause(EVERY, scope.signal);
      if (scope.signal.aborted || document.hidden) continue;
      try {
        const now = await ask(where, scope);
        show(now);
        if (known === `${now.evaluations} ${now.finished}`) continue;
        known = `${now.evaluations} ${now.finished}`;
        evaluations.show((await ask(`${where}/evaluations`, scope)).data);
        say(`${now.finished} evaluations are finished`);
      } catch (error) {
        if (scope.signal.aborted || error.status === 401) return;
        replace(told, "The service does not answer; trying again.");
      }
    }
  }
}

const networkText = (model) => model.preset || ["depth", "hidden", "patch", "experts"].filter((key) => model[key]).map((key) => `${key} ${model[key]}`).join(", ");

/** What a run drew of itself; the newest, until another step is chosen. */
class Previews {
  constructor(scope, run, place) {
    Object.assign(this, { scope, run, place, newest: undefined, asked: undefined });
    this.slider = h("input", { type: "range", min: 0, value: 0, "aria-label": "Step of the preview", on: { input: () => this.choose() } });
    this.picture = h("div", { class: "frame" });
    this.told = h("p", { class: "hint" });
  }

  show(steps) {
    if (!steps.length) {
      replace(this.place, h("p", { class: "empty" }, "No previews: the run draws them where preview.every is set."));
      return;
    }
    const follows = this.newest === undefined || Number(this.slider.value) === this.steps.length - 1;
    this.steps = steps;
    this.newest = steps.at(-1);
    this.slider.max = steps.length - 1;
    this.slider.hidden = steps.length < 2;
    if (follows) this.slider.value = steps.length - 1;
    if (!this.picture.isConnected) replace(this.place, this.picture, this.slider, this.told);
    this.choose();
  }

  async choose() {
    const step = this.steps[Number(this.slider.value)];
    this.slider.setAttribute("aria-valuetext", `step ${step}`);
    if (step === this.asked) return;
    this.asked = step;
    try {
      const image = await previewOf(this.scope, this.run, step);
      if (this.asked !== step) return;
      this.scope.free(this.picture);
      replace(this.picture, image);
      replace(this.told, `Drawn at step ${number(step)}${step === this.newest ? ", the newest" : ""}; the seeds are the same at each step.`);
    } catch (error) {
      if (!this.scope.signal.aborted) replace(this.told, error.message);
    }
  }
}

/** Which share of the tokens each expert of each block got of late. */
function expertLoad(load) {
  if (!load || !load.length || load[0].length > 64) return null;
  const even = 1 / load[0].length;
  const rows = load.map((shares, block) => [`block ${block}`, ...shares.map((share) => {
    const off = Math.min(1, Math.abs(share - even) / even);
    return h("span", { class: `load ${share >= even ? "over" : "under"} off-${Math.round(off * 4)}` }, `${(100 * share).toFixed(1)}%`);
  })]);
  return h("details", { class: "data" }, h("summary", {}, "Load of the experts"),
    table(`Share of the tokens of each block that its experts got; ${(100 * even).toFixed(1)}% each would be even`, ["", ...load[0].map((_, expert) => `expert ${expert}`)], rows));
}

/** What evaluations found, as charts and as a table; what is chosen stays when there are new ones. */
class Evaluations {
  constructor(run, evaluations) {
    this.run = run;
    this.chosen = { network: null, figure: "fid" };
    this.element = h("div");
    this.show(evaluations);
  }

  show(evaluations) {
    this.evaluations = evaluations;
    replace(this.element, this.charts(figuresThere(evaluations)), evaluationTable(this.run, evaluations));
  }

  charts(there) {
    if (!there.size) return null;
    const { chosen } = this;
    if (!there.has(chosen.network)) chosen.network = [...there.keys()][0];
    const place = h("div", { class: "charts two" });
    const network = select("network", [...there.keys()].map((each) => [each, each]), chosen.network);
    const figures = h("div");
    const adapt = () => {
      chosen.network = network.value;
      const titles = there.get(chosen.network);
      if (!titles.has(chosen.figure)) chosen.figure = [...titles.keys()][0];
      const figure = select("figure", [...titles], chosen.figure);
      figure.addEventListener("change", () => { chosen.figure = figure.value; this.draw(place, titles); });
      replace(figures, field("Figure", figure));
      this.draw(place, titles);
    };
    network.addEventListener("change", adapt);
    adapt();
    return h("section", { class: "card", "aria-labelledby": "found" }, h("h2", { id: "found" }, "What evaluations found"),
      h("div", { class: "row narrow" }, field("Features of", network), figures), place,
      h("p", { class: "hint" }, "Points of several seeds are their mean, from the least to the most; one alone has the interval of its results. The legend hides and shows lines."));
  }

  draw(place, titles) {
    const { network, figure } = this.chosen;
    const title = titles.get(figure);
    const floor = this.evaluations.map((each) => each.figures?.[network]?.[figure]?.floor).find((each) => typeof each === "number");
    const options = (over, name, xLabel) => ({
      title: `${title} against ${name}`, xLabel, yLabel: title, lines: floor === undefined ? [] : [{ y: floor, name: "real images" }],
      yLog: ["fid", "sfid"].includes(figure), xLog: over === "nfe", series: seriesOf(this.evaluations, network, figure, over),
    });
    replace(place, chart(options("nfe", "NFE", "evaluations of the network an image (NFE)")), chart(options("step", "step", "training step")));
  }
}

function evaluationTable(run, evaluations) {
  if (!evaluations.length) return h("section", { class: "card" }, h("h2", {}, "Evaluations"), h("p", { class: "empty" }, "None yet: ditmoe evaluate, or a job, makes one."));
  const place = h("div");
  const there = [...figuresThere(evaluations)].flatMap(([network, figures]) => [...figures].map(([key, title]) => [network, key, title]));
  const columns = there.filter(([, key]) => ["fid", "kid", "precision", "recall"].includes(key)).slice(0, 4);
  const several = new Set(columns.map(([network]) => network)).size > 1;
  const rows = [...evaluations].sort((a, b) => (b.step ?? 0) - (a.step ?? 0) || Number(a.chains) - Number(b.chains) || (a.nfe ?? 1e9) - (b.nfe ?? 1e9)).map((each) => each.problem
    ? [each.id, h("span", { class: "warning" }, each.problem)]
    : [h("a", { href: `#/${path("runs", run, "evaluations", each.id)}` }, samplerText(each.sampler)), number(each.step), number(each.nfe), number(each.count), each.seed,
      ...columns.map(([network, key]) => (each.finished ? number(each.figures[network]?.[key]?.value) : "under way"))]);
  const show = (most) => {
    replace(place, table(counted(evaluations.length, "evaluation"), ["sampler", "step", "NFE", "images", "seed", ...columns.map(([network, , title]) => (several ? `${title} (${network})` : title))], rows.slice(0, most)),
      rows.length > most ? h("button", { type: "button", on: { click: () => show(rows.length) } }, `All ${number(rows.length)}`) : null);
  };
  show(ROWS);
  return h("section", { class: "card", "aria-labelledby": "evaluations" }, h("h2", { id: "evaluations" }, "Evaluations"), place);
}
