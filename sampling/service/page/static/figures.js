// The figures of an evaluation, as tables.

import { h, number, table } from "./dom.js";

export const TITLES = { fid: "FID", sfid: "sFID", kid: "KID", precision: "Precision", recall: "Recall", inception_score: "Inception Score" };
/** Of which a higher one is better. */
export const HIGHER = new Set(["precision", "recall", "inception_score", "recognised"]);

/** The figures of a feature network's result, by key: value, floor, interval. */
export function figuresOf(result) {
  const found = {};
  for (const [key, title] of Object.entries(TITLES)) {
    const value = result[key];
    if (typeof value !== "number") continue;
    const floor = key === "inception_score" ? result.inception_score_real : result[`${key}_floor`];
    const interval = result[`${key}_interval`] || (typeof result[`${key}_deviation`] === "number" ? [value - result[`${key}_deviation`], value + result[`${key}_deviation`]] : null);
    found[key] = { title, value, floor: floor ?? null, interval };
  }
  if (result.recogniser) found.recognised = { title: "Recognised", value: result.recogniser.accuracy, floor: result.recogniser.held_out_accuracy, interval: null };
  return found;
}

const between = (interval) => (interval ? `${number(interval[0])} to ${number(interval[1])}` : "–");

/** A table for each feature network of metrics.json. */
export function figureTables(metrics) {
  return Object.entries(metrics.results).map(([network, result]) => h("section", { class: "card" },
    h("h2", {}, "Figures"),
    table(`${number(result.drawn_images)} drawn images against ${result.real_images === null ? "statistics" : number(result.real_images)} of ${result.real.name}, in features of ${network}`,
      ["", "figure", "interval", "of real images", "ratio to it"],
      Object.values(figuresOf(result)).map((each) => [each.title, h("b", {}, number(each.value)), between(each.interval), number(each.floor), each.floor ? `× ${number(each.value / each.floor, 3)}` : "–"])),
    (result.warnings || []).map((warning) => h("p", { class: "warning" }, warning))));
}
