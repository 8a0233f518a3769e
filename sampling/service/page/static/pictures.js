// Pictures of any size in a grid: small ones enlarged by whole pixels, each with what it is.

import { blobOf, fetchBlob } from "./api.js";
import { h } from "./dom.js";

/** An image element of some bytes; of fewer pixels than 96 each is shown as a square. */
export function picture(scope, blob, alt) {
  const image = h("img", { src: scope.url(blob), alt, decoding: "async" });
  image.addEventListener("load", () => image.classList.toggle("pixels", image.naturalWidth < 96));
  return image;
}

export const pictureOf = (scope, base64, alt) => picture(scope, blobOf(base64), alt);
export const fetchPicture = async (scope, where, alt) => picture(scope, await fetchBlob(where, scope.signal), alt);

/** A picture with its lines below it; `link` leads to where it is drawn again. */
export function tile(image, lines, link = null) {
  return h("figure", { class: "tile" }, link ? h("a", { href: link, title: "Draw it in the playground" }, image) : image,
    h("figcaption", {}, lines.filter(Boolean).map((line) => h("span", {}, line))));
}

/** Where the playground draws an image again. */
export function playgroundLink(run, step, which, settings, label, number) {
  const values = { model: run, step, weights: which, class: label, seed: settings.seed, first: number, n: 1, sampler: settings.sampler, steps: settings.steps, cfg_scale: settings.cfg_scale };
  for (const name of ["schedule", "precision"]) if (settings[name]) values[name] = settings[name];
  if (!settings.sampler) delete values.sampler;
  if (settings.sampler?.startsWith("dlg:")) values.dlg = JSON.stringify(settings.dlg);
  return `#/playground?${new URLSearchParams(values)}`;
}
