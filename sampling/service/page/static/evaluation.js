// One evaluation: its figures, its settings, some images; of chains how they move.

import { ask, path, query } from "./api.js";
import { chart } from "./charts.js";
import { facts, h, number, replace, samplerText, table } from "./dom.js";
import { figureTables } from "./figures.js";
import { pictureOf, playgroundLink, tile } from "./pictures.js";

const CHAINS = 5;

export async function evaluation(scope, [run, id]) {
  const where = path("v1", "runs", run, "evaluations", id);
  const found = await ask(where, scope);
  const { sampler } = found;
  const images = h("div", { class: "tiles" });
  replace(scope.root,
    h("p", { class: "hint" }, h("a", { href: `#/${path("runs", run)}` }, run), " / evaluation"),
    h("h1", {}, samplerText(sampler)),
    found.finished ? figureTables(found) : h("p", { class: "card" }, "It is under way: it has no figures yet."),
    found.chains ? await chains(scope, where, found) : null,
    found.kept ? h("section", { class: "card", "aria-labelledby": "some" }, h("h2", { id: "some" }, "Images"), images, h("a", { class: "button", href: `#/gallery${query({ run, evaluation: id })}` }, "Gallery by class")) : h("p", { class: "card" }, "Its images are not kept. ", found.sheets.length ? h("a", { href: `#/gallery${query({ run, evaluation: id })}` }, "Pictures of the first ones of each class") : null),
    h("section", { class: "card", "aria-labelledby": "settings" }, h("h2", { id: "settings" }, "Settings"), facts({
      Checkpoint: `step ${number(found.step)}, ${found.which}`, "Evaluations of the network an image": number(found.nfe), Images: `${number(found.count)}, labels ${found.labels}`,
      Seed: found.seed, ...Object.fromEntries(Object.entries(sampler).filter(([name]) => !["dlg", "seed"].includes(name)).map(([name, value]) => [name.replaceAll("_", " "), String(value)])),
    }), found.chains ? h("details", {}, h("summary", {}, "Settings of the chains"), facts(Object.fromEntries(Object.entries(sampler.dlg).map(([name, value]) => [name.replaceAll("_", " "), JSON.stringify(value)])))) : null));
  if (!found.kept) return;
  const [{ images: some }, { settings: usual }] = await Promise.all([ask(`${where}/images${query({ limit: 12 })}`, scope), ask("v1/samplers", scope)]);
  for (const each of some) {
    images.append(tile(pictureOf(scope, each.b64_json, `image ${each.number}, class ${each.class}`), [each.class, `seed ${found.seed} · image ${each.number}`],
      playgroundLink(usual, run, found.step, found.which, sampler, each.label, each.number)));
  }
}

/** How chains move: σ along them, how alike their samples are, which modes they visit. */
async function chains(scope, where, found) {
  const section = h("section", { class: "card", "aria-labelledby": "chains" }, h("h2", { id: "chains" }, "Chains"));
  const figures = Object.values(found.results).map((result) => result.chains).find(Boolean);
  for (const warning of figures?.warnings || []) section.append(h("p", { class: "warning" }, warning));
  if (figures?.sigma) section.append(tiles(figures));
  const charts = h("div", { class: "charts two" });
  section.append(charts);
  if (found.kept) {
    const told = await ask(`${where}/traces${query({ limit: CHAINS })}`, scope);
    if (told.traces.length) {
      charts.append(chart({
        title: `Noise level σ along the first ${told.traces.length} of ${number(told.chains)} chains`, xLabel: "Langevin–Gibbs steps after burn-in", yLabel: "σ (units of the network's input)", yLog: true,
        series: told.traces.map((each) => ({ name: `chain ${each.chain}, class ${each.label}`, marks: false, points: each.trace.map((sigma, step) => ({ x: step + 1, y: sigma })) })),
      }), chart({
        title: "σ of the states that were denoised", xLabel: "Langevin–Gibbs steps after burn-in", yLabel: "σ (units of the network's input)", yLog: true,
        series: told.traces.map((each) => ({ name: `chain ${each.chain}, class ${each.label}`, line: false, points: each.denoised.map(([step, sigma]) => ({ x: step, y: sigma })) })),
      }));
    }
    section.append(await strips(scope, where, told));
  } else section.append(h("p", { class: "hint" }, "Its images are not kept, and their traces with them."));
  if (figures?.sigma) {
    charts.append(correlation(figures.sigma, "Autocorrelation of log σ", "Langevin–Gibbs steps apart"), correlation(figures.features, "Autocorrelation of features", "samples apart"));
    if (figures.modes?.visited) charts.append(modes(figures.modes));
  }
  return section;
}

function tiles(figures) {
  const { sigma, features, recall, modes: visited } = figures;
  const quantiles = Object.entries(sigma.quantiles).map(([share, value]) => `${number(value, 3)} (${100 * share}%)`).join(" · ");
  return facts({
    Chains: `${number(figures.chains)} of ${number(figures.samples_per_chain)} samples, ${number(figures.steps_per_sample)} steps each`,
    "Levels of σ": quantiles,
    "Worth of the steps in σ": sigma.effective === null ? "–" : `${number(sigma.effective, 3)} independent of ${number(sigma.samples)}`,
    "Worth of the samples": features.effective === null ? "–" : `${number(features.effective, 3)} independent of ${number(features.samples)}`,
    "R̂ of σ, of features": `${number(sigma.split_r_hat, 3)}, ${number(features.split_r_hat, 3)}`,
    "Recall of chains": recall ? `${number(recall.recall_of_chains, 3)}; of independent samples ${number(recall.recall_of_independent, 3)}` : null,
    "Changes of mode": visited?.changes ? `${(100 * visited.changes.share).toFixed(1)}%; of independent samples ${(100 * visited.changes.expected).toFixed(1)}%` : null,
  });
}

function correlation(found, title, lag) {
  const bounds = Object.values(found.of_chains || {});
  return chart({ title, xLabel: lag, yLabel: "autocorrelation", yLeast: -0.5, yMost: 1.05, xLog: false, empty: "Not known: see the warnings.", lines: [{ y: 0, name: "" }],
    series: [{ name: "all chains", marks: found.lags.length <= 30, points: found.lags.map((step, place) => ({ x: step, y: found.autocorrelation[place], text: "all chains" })) },
      ...(bounds.length === 2 && found.lags.length ? [{ name: "10% to 90% of chains", points: [], band: found.lags.map((step, place) => ({ x: step, low: Math.max(-0.5, bounds[0][place]), high: Math.min(1.05, bounds[1][place]) })) }] : [])] });
}

function modes(found) {
  const last = Math.max(...found.visited_histogram.map((count, place) => (count ? place + 1 : 0)), Math.round(found.visited.expected) + 1);
  return chart({ title: "Modes that a chain visits", xLabel: `modes, of ${found.modes}`, yLabel: "chains",
    lines: [{ x: found.visited.expected, name: `independent samples: ${number(found.visited.expected, 3)}` }],
    series: [{ name: "chains", bars: true, points: found.visited_histogram.slice(0, last).map((count, place) => ({ x: place + 1, y: count })) }] });
}

/** The successive samples of the first chains, a row for each. */
async function strips(scope, where, told) {
  const rows = [];
  for (const each of told.traces) {
    const first = each.chain * told.samples_per_chain;
    const { images } = await ask(`${where}/images${query({ first, limit: Math.min(12, told.samples_per_chain) })}`, scope);
    rows.push([`chain ${each.chain}, ${images[0]?.class ?? each.label}`, ...images.map((image, place) => pictureOf(scope, image.b64_json, `sample ${place} of chain ${each.chain}`))]);
  }
  const most = Math.max(...rows.map((row) => row.length));
  return h("div", { class: "strips" }, table("Successive samples of a chain, from left to right", ["", ...Array.from({ length: most - 1 }, (_, place) => place)], rows));
}
