// Pictures of any size in a grid: small ones enlarged by whole pixels, each with what it is.

import { blobOf, fetchBlob } from "./api.js";
import { h } from "./dom.js";
import { isChain, NUMBERS, TEXTS } from "./fields.js";

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

/** The playground starts with others than the API does. */
const ALWAYS = ["seed", "steps", "cfg_scale"];

/** Where the playground draws an image again.
 *
 * `usual` has each setting of samplers as it is where nothing is chosen (`settings` of v1/samplers): all that differ
 * go into the address, also those that have no field of their own. `label` may be empty, for classes in turn.
 */
export function playgroundLink(usual, run, step, which, settings, label, number) {
  const values = { model: run, step, class: label, first: number, n: 1 };
  if (which !== "ema") values.weights = which;
  const other = {};
  for (const [name, before] of Object.entries(usual)) {
    const now = settings[name] ?? before;
    if (name === "dlg") {
      if (isChain(settings.sampler)) values.dlg = JSON.stringify(now);
    } else if (ALWAYS.includes(name) || now !== before) {
      if (NUMBERS.includes(name) || TEXTS.includes(name)) values[name] = now;
      else other[name] = now;
    }
  }
  if (Object.keys(other).length) values.other = JSON.stringify(other);
  return `#/playground?${new URLSearchParams(values)}`;
}
