// The fields of a sampler, as the playground and new jobs have them.

import { field, h, select } from "./dom.js";

export const numberField = (name, value, attributes) => h("input", { name, type: "number", value, required: true, inputmode: "decimal", ...attributes });

export function runOptions(models) {
  return models.filter((model) => !model.problem).map((model) => [model.id, model.id]);
}

export function classOptions(model, first = "all in turn") {
  return [["", first], ...model.classes.map((name, label) => [label, name === String(label) ? name : `${label}: ${name}`])];
}

export function samplerField(names, chosen, { name = "sampler", label = "Sampler", chains = [] } = {}) {
  const control = select(name, [["", "of the run"], ...names.map((each) => [each, each])], chosen);
  if (chains.length) control.append(h("optgroup", { label: "Chains" }, chains.map((each) => h("option", { value: each, selected: each === chosen }, each))));
  return field(label, control);
}

export const stepsField = (value, name = "steps", label = "Steps") => field(label, numberField(name, value, { min: 1, max: 1000000, step: 1 }));
export const guidanceField = (value) => field("Guidance", numberField("cfg_scale", value, { min: 0, max: 100, step: "any" }), { hint: "1: none" });
export const seedField = (value) => field("Seed", numberField("seed", value, { min: 0, step: 1 }));

/** What makes images cheaper, as it is where nothing is chosen: blocks at each step, guidance at each noise level. */
export const PACE = { cache_interval: "1", cache_order: "1", cfg_sigma_min: "0", cfg_sigma_max: "" };

export const cacheField = (value, name = "cache_interval", label = "Blocks at every N-th step") =>
  field(label, numberField(name, value, { min: 1, max: 1000, step: 1 }), { hint: "1: at each; between them, extrapolated" });

/** Fields of all that; `value` of a name. */
export const paceFields = (value) => [
  h("div", { class: "row" }, cacheField(value("cache_interval")),
    field("Order of the extrapolation", numberField("cache_order", value("cache_order"), { min: 0, max: 8, step: 1 }))),
  h("div", { class: "row" }, field("Guidance above σ", numberField("cfg_sigma_min", value("cfg_sigma_min"), { min: 0, step: "any" })),
    field("Guidance up to σ", numberField("cfg_sigma_max", value("cfg_sigma_max"), { min: 0, step: "any", required: false }), { hint: "empty: no limit" })),
];

/** What was chosen of it, as the API has it. */
export function paceOf(form) {
  const chosen = Object.keys(PACE).filter((name) => form.elements.namedItem(name).value !== PACE[name]);
  return valuesOf(form, chosen, []);
}

/** Settings of samplers that have a field of their own, named as the API names them; the others share one. */
export const NUMBERS = ["seed", "steps", "cfg_scale", "ddim_eta", ...Object.keys(PACE)];
export const TEXTS = ["sampler", "schedule", "precision"];

/** Settings of a sampler that have no field of their own: JSON, as the API has them. */
export const otherField = (value) => field("Other settings", h("input", { name: "other", value, spellcheck: "false", autocomplete: "off" }),
  { hint: 'JSON, such as {"churn": 40}' });
export const otherSettings = (form) => objectOf(form, "other", '{"churn": 40}');

export const isChain = (name) => String(name).startsWith("dlg:");

/** Settings of chains, as the API has them: JSON. */
export const chainField = (value) => field("Settings of the chains", h("input", { name: "dlg", value, spellcheck: "false", autocomplete: "off" }),
  { hint: "JSON, such as samples_per_chain, skip, burn_in; what is left out has its default" });

export const chainSettings = (form) => objectOf(form, "dlg", '{"skip": 8}');

/** What a field of JSON says. An error names the field, as one of the service does. */
function objectOf(form, name, example) {
  const text = form.elements.namedItem(name).value.trim();
  let settings = null;
  try {
    settings = JSON.parse(text || "{}");
  } catch (error) {
    throw Object.assign(new Error(`no JSON: ${error.message}`), { param: name });
  }
  if (settings === null || typeof settings !== "object" || Array.isArray(settings)) throw Object.assign(new Error(`expected an object, such as ${example}`), { param: name });
  return settings;
}

/** The values of a form's fields, as the API has them: numbers as numbers, and nothing for what is empty. */
export function valuesOf(form, numbers, texts) {
  const values = {};
  for (const name of numbers) {
    const control = form.elements.namedItem(name);
    if (control && control.value !== "") values[name] = Number(control.value);
  }
  for (const name of texts) {
    const control = form.elements.namedItem(name);
    if (control && control.value !== "") values[name] = control.value;
  }
  return values;
}
