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
    const deviation = result[`${key}_deviation`];
    const interval = result[`${key}_interval`] || (typeof deviation === "number" ? [value - deviation, value + deviation] : null);
    const note = interval && !result[`${key}_interval`] ? " (± one deviation)" : "";
    // Real images get a KID of 0, to which nothing has a ratio.
    found[key] = { title, value, floor: floor ?? null, interval, note, ratio: key === "kid" || !floor ? null : value / floor };
  }
  if (result.recogniser) found.recognised = { title: "Recognised", value: result.recogniser.accuracy, floor: result.recogniser.held_out_accuracy, interval: null, ratio: result.recogniser.accuracy / result.recogniser.held_out_accuracy };
  return found;
}

const between = (interval) => (interval ? `${number(interval[0])} to ${number(interval[1])}` : "–");

/** A table for each feature network of metrics.json. */
export function figureTables(metrics) {
  return Object.entries(metrics.results).map(([network, result]) => h("section", { class: "card" },
    h("h2", {}, "Figures"),
    table(`${number(result.drawn_images)} drawn images against ${result.real_images === null ? "statistics" : number(result.real_images)} of ${result.real.name}, in features of ${network}`,
      ["", "figure", "95% interval", "of real images", "ratio to it"],
      Object.values(figuresOf(result)).map((each) => [each.title, h("b", {}, number(each.value)), `${between(each.interval)}${each.note || ""}`, number(each.floor), each.ratio ? `× ${number(each.ratio, 3)}` : "–"])),
    (result.warnings || []).map((warning) => h("p", { class: "warning" }, warning))));
}
