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

export const isChain = (name) => String(name).startsWith("dlg:");

/** Settings of chains, as the API has them: JSON. */
export const chainField = (value) => field("Settings of the chains", h("input", { name: "dlg", value, spellcheck: "false", autocomplete: "off" }),
  { hint: "JSON, such as samples_per_chain, skip, burn_in; what is left out has its default" });

/** What the field of chains says. An error names the field, as one of the service does. */
export function chainSettings(form) {
  const text = form.elements.namedItem("dlg").value.trim();
  let settings = null;
  try {
    settings = JSON.parse(text || "{}");
  } catch (error) {
    throw Object.assign(new Error(`no JSON: ${error.message}`), { param: "dlg" });
  }
  if (settings === null || typeof settings !== "object" || Array.isArray(settings)) throw Object.assign(new Error('expected an object, such as {"skip": 8}'), { param: "dlg" });
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
