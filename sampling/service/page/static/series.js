// Evaluations as lines of a chart: those that differ in what is drawn over, and in the seed, are one line.

import { samplerText } from "./dom.js";

/** What decides how many evaluations of the network an image takes. */
const LENGTH = new Set(["steps", "tolerance", "dlg.skip", "dlg.thin", "dlg.samples_per_chain", "dlg.initial_steps", "dlg.burn_in", "dlg.burn_in_first", "dlg.restart_every"]);
/** What samplers do not all look at. */
const SILENT = { churn: "kar2", churn_min: "kar2", churn_max: "kar2", churn_noise: "kar2", ddim_eta: "ddim", tolerance: "rk45", corrector_snr: "corrector" };

/** All settings of an evaluation under flat names. */
function flat(each) {
  const found = { which: each.which, count: each.count, labels: each.labels };
  for (const [name, value] of Object.entries(each.sampler)) {
    if (name === "dlg") for (const [inner, own] of Object.entries(value || {})) found[`dlg.${inner}`] = own;
    else if (!SILENT[name] || String(each.sampler.sampler).endsWith(SILENT[name])) found[name] = value;
  }
  delete found.seed;
  return found;
}

const shown = (value) => (typeof value === "object" ? JSON.stringify(value) : String(value));

/**
 * Lines of a figure over "nfe" or "step".
 *
 * Evaluations that differ in the seed alone are one point: their mean, from the least to the most; one alone has the
 * interval that its results have.
 */
export function seriesOf(evaluations, network, key, over) {
  const groups = new Map();
  for (const each of evaluations) {
    const figure = each.figures?.[network]?.[key];
    if (!figure || (over === "nfe" && each.nfe === null)) continue;
    const settings = flat(each);
    for (const name of Object.keys(settings)) if (over === "nfe" && LENGTH.has(name)) delete settings[name];
    if (over === "nfe") settings.step = each.step;
    const name = JSON.stringify(Object.entries(settings).sort());
    if (!groups.has(name)) groups.set(name, { settings, points: new Map() });
    const points = groups.get(name).points;
    const place = `${over === "nfe" ? each.nfe : each.step} ${over === "nfe" ? JSON.stringify(flat(each)) : ""}`;
    if (!points.has(place)) points.set(place, []);
    points.get(place).push({ each, figure });
  }
  const all = [...groups.values()];
  const series = all.map((group) => {
    const points = [...group.points.values()].map((same) => {
      const values = same.map(({ figure }) => figure.value);
      const mean = values.reduce((sum, value) => sum + value, 0) / values.length;
      const several = same.length > 1;
      const interval = several ? [Math.min(...values), Math.max(...values)] : same[0].figure.interval || [null, null];
      const { each, figure } = same[0];
      return { x: over === "nfe" ? each.nfe : each.step, y: mean, low: interval[0], high: interval[1], text: `${samplerText(each.sampler)}; ${several ? `mean of ${same.length} seeds, least to most` : figure.interval_is || `seed ${each.seed}`}` };
    });
    return { name: nameOf(group.settings, all.map((each) => each.settings)), points: points.sort((a, b) => a.x - b.x), line: true };
  });
  series.sort((a, b) => Number(a.name.startsWith("dlg:")) - Number(b.name.startsWith("dlg:")) || b.points.length - a.points.length);
  const names = new Map();
  for (const each of series) {
    const count = (names.get(each.name) || 0) + 1;
    names.set(each.name, count);
    if (count > 1) each.name += ` (${count})`;
  }
  series.forEach((each, place) => { each.hidden = place >= 6; });
  return series;
}

/** The sampler, and in what it differs from most of the others of the same sampler. */
function nameOf(settings, all) {
  const same = all.filter((other) => other.sampler === settings.sampler);
  const differ = Object.keys(settings).filter((name) => {
    const alike = same.filter((other) => shown(other[name]) === shown(settings[name])).length;
    return name !== "sampler" && alike <= same.length / 2;
  });
  const told = differ.slice(0, 3).map((name) => `${name.replace("dlg.", "").replaceAll("_", " ")} ${shown(settings[name])}`);
  return [settings.sampler, ...told].join(", ");
}

/** The feature networks and figures that some evaluations have. */
export function figuresThere(evaluations) {
  const found = new Map();
  for (const each of evaluations) {
    for (const [network, figures] of Object.entries(each.figures || {})) {
      if (!found.has(network)) found.set(network, new Map());
      for (const [key, figure] of Object.entries(figures)) found.get(network).set(key, figure.title);
    }
  }
  return found;
}
