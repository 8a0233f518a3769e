// Images at once; with the same seeds by a second sampler beside it. The address has all that is set.

import { ask, give } from "./api.js";
import { clearProblems, field, h, number, replace, say, samplerText, select, showProblem } from "./dom.js";
import { cacheField, chainField, chainSettings, classOptions, guidanceField, isChain, NUMBERS as SETTINGS, numberField, otherField, otherSettings, PACE, paceFields, paceOf, runOptions, samplerField, seedField, stepsField, TEXTS as NAMES, valuesOf } from "./fields.js";
import { pictureOf } from "./pictures.js";

const NUMBERS = ["step", "class", "first", "n", ...SETTINGS.filter((name) => !(name in PACE))];
const TEXTS = ["model", "weights", ...NAMES];
const SECOND = ["with", "with_steps"];
const USUAL = { first: "0", ddim_eta: "0", other: "", ...PACE };
const START = { ...USUAL, seed: "0", n: "8", steps: "25", cfg_scale: "1.5", with_steps: "25", with_cache_interval: "1", dlg: '{"samples_per_chain": 4}' };

/** "48 evaluations, in 25 passes through the network and 23 extrapolated": means over images. */
function costText(images) {
  const mean = (name) => images.reduce((sum, each) => sum + each[name], 0) / images.length;
  const [evaluations, passes, cached] = ["nfe", "passes", "cached_passes"].map(mean);
  const told = `${number(evaluations)} evaluations`;
  if (passes === evaluations && !cached) return told;
  return `${told}, in ${number(passes)} passes through the network${cached ? ` and ${number(cached)} extrapolated` : ""},`;
}

export async function playground(scope, _, params) {
  const [{ data: models }, names] = await Promise.all([ask("v1/models", scope), ask("v1/samplers", scope)]);
  const usable = models.filter((model) => !model.problem);
  if (!usable.length) {
    replace(scope.root, h("h1", {}, "Playground"), h("p", { class: "empty" }, "No run has a checkpoint yet. As soon as one has, its images can be drawn here."));
    return;
  }
  const value = (name) => params.get(name) ?? START[name] ?? "";
  const modelOf = (id) => usable.find((model) => model.id === id) || usable[0];
  const chosen = modelOf(params.get("model"));
  const results = h("div", { class: "results", "aria-busy": "false" }, h("p", { class: "empty" }, "Images appear here. An image depends on its seed, its number and its class alone."));
  const problem = h("p", { class: "problem", role: "alert" });
  const classes = h("div");
  const checkpoints = h("div");
  const second = h("input", { type: "checkbox", name: "second", id: "second", checked: params.has("with") });
  const other = h("fieldset", { class: "row" }, h("legend", { class: "unseen" }, "The second sampler"),
    samplerField(names.samplers, value("with"), { name: "with", label: "Second sampler", chains: names.chains }), stepsField(value("with_steps"), "with_steps", "Its steps"),
    cacheField(value("with_cache_interval"), "with_cache_interval", "Its blocks at every N-th step"));
  const chains = chainField(value("dlg"));
  const showOther = () => {
    other.hidden = other.disabled = !second.checked;
    chains.hidden = !(isChain(form.elements.namedItem("sampler").value) || (second.checked && isChain(form.elements.namedItem("with").value)));
  };
  const showModel = (model, label, step) => {
    const chosen = /^\d*$/.test(label) ? label : model.classes.indexOf(label); // a job may have its name
    replace(classes, field("Class", select("class", classOptions(model), chosen)));
    replace(checkpoints, field("Checkpoint", select("step", [["", `newest (${number(model.step)})`], ...model.steps.map((each) => [each, `step ${number(each)}`])], step)));
  };
  const run = select("model", runOptions(models), chosen.id);
  const draw = h("button", { class: "main" }, "Draw");
  const form = h("form", { class: "card controls", "aria-label": "What is drawn", novalidate: false },
    field("Run", run), classes,
    h("div", { class: "row" }, seedField(value("seed")), field("Images", numberField("n", value("n"), { min: 1, max: 64, step: 1 }))),
    samplerField(names.samplers, value("sampler"), { chains: names.chains }),
    h("div", { class: "row" }, stepsField(value("steps")), guidanceField(value("cfg_scale"))),
    h("label", { class: "check", for: "second" }, second, "Compare with a second sampler"), other, chains,
    h("details", { open: ["step", "weights", "schedule", "precision", ...Object.keys(USUAL)].some((name) => params.has(name)) }, h("summary", {}, "More settings"),
      checkpoints,
      field("Weights", select("weights", [["", "moving average"], ["weights", "as trained"]], value("weights") === "weights" ? "weights" : "")),
      field("Schedule", select("schedule", [["", "of the sampler"], ...names.schedules.map((each) => [each, each])], value("schedule"))),
      paceFields(value),
      field("Number of the first image", numberField("first", value("first"), { min: 0, step: 1 })),
      field("Noise of ddim (η)", numberField("ddim_eta", value("ddim_eta"), { min: 0, max: 1, step: "any" })),
      field("Arithmetic", select("precision", [["", "fp32"], ["bf16", "bf16"]], value("precision") === "bf16" ? "bf16" : "")),
      otherField(value("other"))),
    h("div", { class: "row buttons" }, draw, h("button", { type: "button", on: { click: otherSeed } }, "Another seed")), problem);
  showModel(chosen, params.get("class") ?? "", params.get("step") ?? "");
  showOther();

  /** What the form says, as the address has it; what is as it was at the start is left out. */
  function address() {
    const values = {};
    for (const name of [...NUMBERS, ...TEXTS, ...Object.keys(PACE), "other"]) {
      const given = form.elements.namedItem(name)?.value ?? "";
      if (given !== (USUAL[name] ?? "")) values[name] = given;
    }
    if (second.checked) {
      for (const name of SECOND) values[name] = form.elements.namedItem(name).value;
      const every = form.elements.namedItem("with_cache_interval").value;
      if (every !== PACE.cache_interval) values.with_cache_interval = every;
    }
    if (!chains.hidden) values.dlg = form.elements.namedItem("dlg").value;
    return `#/playground?${new URLSearchParams(values)}`;
  }
  const keep = () => history.replaceState(null, "", address());

  function otherSeed() {
    form.elements.namedItem("seed").value = String(Math.floor(Math.random() * 1e6));
    keep();
    form.requestSubmit();
  }

  form.addEventListener("input", () => { showOther(); keep(); });
  for (const [sampler, steps] of [["sampler", "steps"], ["with", "with_steps"]]) {
    let usual = START[steps]; // what nobody has typed: each sampler needs its own number
    form.elements.namedItem(sampler).addEventListener("change", ({ target }) => {
      const control = form.elements.namedItem(steps);
      const next = String(names.steps[target.value] ?? START[steps]);
      if (control.value === usual) control.value = next;
      usual = next;
      keep();
    });
  }
  run.addEventListener("change", () => { showModel(modelOf(run.value), "", ""); keep(); });

  /** What is asked of the service, of each sampler. */
  function bodies() {
    const first = { ...valuesOf(form, NUMBERS, TEXTS), ...paceOf(form), ...otherSettings(form) };
    const asked = [first];
    if (second.checked) {
      const { sampler, ...rest } = first;
      const name = form.elements.namedItem("with").value;
      const [steps, every] = ["with_steps", "with_cache_interval"].map((each) => Number(form.elements.namedItem(each).value));
      asked.push({ ...rest, steps, cache_interval: every, ...(name ? { sampler: name } : {}) });
    }
    return asked.map((body) => (isChain(body.sampler) ? { ...body, dlg: chainSettings(form) } : body));
  }

  let drawing = null;
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    keep();
    drawing?.abort();
    const mine = (drawing = new AbortController());
    scope.signal.addEventListener("abort", () => mine.abort(), { once: true });
    clearProblems(form, problem);
    let asked = [];
    try {
      asked = bodies();
    } catch (error) {
      showProblem(form, problem, error);
      return;
    }
    results.setAttribute("aria-busy", "true");
    if (!results.querySelector("figure")) replace(results, h("p", { class: "empty" }, "Drawing…"));
    say("Drawing");
    try {
      const begun = performance.now();
      const replies = await Promise.all(asked.map(async (body) => {
        const reply = await give("v1/images/generations", body, mine.signal);
        return { reply, seconds: (performance.now() - begun) / 1000 };
      }));
      scope.free(results);
      replace(results, shown(replies));
      say(`${replies[0].reply.data.length} images drawn`);
    } catch (error) {
      if (mine.signal.aborted) return;
      if (!results.querySelector("figure")) replace(results, h("p", { class: "empty" }, "No images were drawn."));
      showProblem(form, problem, error, (param) => (param === "labels" ? "class" : form.elements.namedItem(param) ? param : "other"));
    } finally {
      if (drawing === mine) results.setAttribute("aria-busy", "false");
    }
  });

  function shown(replies) {
    const marks = replies.length > 1 ? ["A", "B"] : [""];
    const told = replies.map(({ reply, seconds }, place) => h("li", {},
      marks[place] ? h("span", { class: `mark mark-${marks[place]}` }, marks[place]) : null,
      h("span", {}, `${samplerText(reply.sampler)}: ${costText(reply.data)} an image, all in ${seconds.toFixed(1)} s`)));
    return [
      h("h2", { class: "unseen" }, "Images"),
      h("ul", { class: "told" }, told),
      h("div", { class: replies.length > 1 ? "tiles pairs" : "tiles" }, replies[0].reply.data.map((each, row) =>
        h("figure", { class: replies.length > 1 ? "tile pair" : "tile" },
          h("div", { class: "both" }, replies.map(({ reply }, place) => h("div", { class: "one" },
            pictureOf(scope, reply.data[row].b64_json, `${marks[place]} class ${reply.data[row].class}, seed ${each.seed}, image ${each.number}`.trim()),
            marks[place] ? h("span", { class: `mark mark-${marks[place]}`, "aria-hidden": "true" }, marks[place]) : null))),
          h("figcaption", {}, h("span", {}, each.class), h("span", {}, `seed ${each.seed} · image ${each.number}`))))),
      h("p", { class: "hint" }, `Step ${number(replies[0].reply.step)} of ${replies[0].reply.model}. `,
        h("a", { href: address() }, "This address"), " draws them again."),
    ];
  }

  replace(scope.root, h("h1", {}, "Playground"), h("div", { class: "split" }, form, results));
  if (params.has("sampler") && params.has("seed")) form.requestSubmit();
}
