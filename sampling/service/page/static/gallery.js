// The images of an evaluation by class, each with its seed.

import { ask, path, query } from "./api.js";
import { counted, field, h, number, replace, samplerText, say, select } from "./dom.js";
import { fetchPicture, pictureOf, playgroundLink, tile } from "./pictures.js";

const OF_CLASS = 24;
const OF_EACH = 8;
const CLASSES = 10;

export async function gallery(scope, _, params) {
  const { data: runs } = await ask("v1/runs", scope);
  const usable = runs.filter((run) => run.evaluations > 0);
  if (!usable.length) {
    replace(scope.root, h("h1", {}, "Gallery"), h("p", { class: "empty" }, "No run has an evaluation yet, whose images could be shown."));
    return;
  }
  const run = usable.find((each) => each.id === params.get("run")) || usable[0];
  const where = path("v1", "runs", run.id);
  const [{ data }, { classes }, { settings: usual }] = await Promise.all([ask(`${where}/evaluations`, scope), ask(where, scope), ask("v1/samplers", scope)]);
  const kept = data.filter((each) => each.kept || each.finished).sort((a, b) => Number(b.kept) - Number(a.kept) || b.step - a.step || Number(a.chains) - Number(b.chains) || (b.nfe ?? 0) - (a.nfe ?? 0));
  const runField = select("run", usable.map((each) => [each.id, each.id]), run.id);
  const shown = kept.find((each) => each.id === params.get("evaluation")) || kept[0];
  const go = (values) => { location.hash = `#/gallery${query(values)}`; };
  runField.addEventListener("change", () => go({ run: runField.value }));
  if (!shown) {
    replace(scope.root, h("h1", {}, "Gallery"), field("Run", runField), h("p", { class: "empty" }, "No evaluation of this run has images yet."));
    return;
  }
  const names = Array.from({ length: shown.classes }, (_, label) => classes?.[label] ?? String(label));
  const label = params.has("class") && names[Number(params.get("class"))] !== undefined ? Number(params.get("class")) : null;
  const evaluationField = select("evaluation", kept.map((each) => [each.id, `${samplerText(each.sampler)} · step ${number(each.step)} · seed ${each.seed} · ${each.id.slice(-4)}`]), shown.id);
  const classField = select("class", [["", "all classes"], ...names.map((name, place) => [place, name === String(place) ? name : `${place}: ${name}`])], label ?? "");
  evaluationField.addEventListener("change", () => go({ run: run.id, evaluation: evaluationField.value, class: label }));
  classField.addEventListener("change", () => go({ run: run.id, evaluation: shown.id, class: classField.value }));
  const place = h("div", { class: "gallery" });
  replace(scope.root, h("h1", {}, "Gallery"),
    h("form", { class: "card row wide", "aria-label": "What is shown", on: { submit: (event) => event.preventDefault() } }, field("Run", runField), field("Evaluation", evaluationField), field("Class", classField)),
    h("p", { class: "hint" }, h("a", { href: `#/${path("runs", run.id, "evaluations", shown.id)}` }, "Its figures"), !shown.kept ? null : `. An image depends on its seed, its number and its class alone${shown.chains ? ", and those of a chain follow each other" : ""}: each leads to the playground, which draws it again.`),
    place);
  if (!shown.kept) {
    await sheets(scope, place, `${where}/evaluations/${path(shown.id)}`, names, label);
    return;
  }
  const images = `${where}/evaluations/${path(shown.id)}/images`;

  const tileOf = (each) => tile(pictureOf(scope, each.b64_json, `class ${each.class}, image ${each.number}`), [`seed ${shown.seed}`, `image ${each.number}`],
    playgroundLink(usual, run.id, shown.step, shown.which, shown.sampler, each.label, each.number));

  if (label !== null) {
    const grid = h("div", { class: "tiles" });
    const more = h("button", { type: "button", hidden: true }, "More images");
    let next = 0;
    const load = async () => {
      const reply = await ask(`${images}${query({ class: label, first: next, limit: OF_CLASS })}`, scope);
      grid.append(...reply.images.map(tileOf));
      next = reply.next;
      more.hidden = next === null;
      say(`${counted(grid.children.length, "image")} of class ${names[label]}`);
    };
    more.addEventListener("click", load);
    const step = (by) => h("button", { type: "button", on: { click: () => go({ run: run.id, evaluation: shown.id, class: (label + by + names.length) % names.length }) } }, by < 0 ? "Class before" : "Next class");
    replace(place, h("section", { class: "card", "aria-labelledby": "of-class" }, h("h2", { id: "of-class" }, names[label]), grid, h("div", { class: "buttons" }, more, step(-1), step(1))));
    await load();
    if (!grid.children.length) grid.append(h("p", { class: "empty" }, "None of this class."));
    return;
  }

  // All classes: a row for each, asked for when it comes into sight.
  const seen = new IntersectionObserver((entries) => {
    for (const entry of entries.filter((each) => each.isIntersecting)) {
      seen.unobserve(entry.target);
      entry.target.load().catch((error) => { if (!scope.signal.aborted) entry.target.append(h("p", { class: "warning" }, error.message)); });
    }
  }, { rootMargin: "200px" });
  scope.signal.addEventListener("abort", () => seen.disconnect());
  let until = 0;
  const more = h("button", { type: "button", on: { click: grow } }, "More classes");
  place.after(more);
  function grow() {
    const last = Math.min(names.length, until + CLASSES);
    for (; until < last; until++) {
      const of = until;
      const grid = h("div", { class: "tiles small" });
      const section = h("section", { class: "card class-row" }, h("h2", {}, h("a", { href: `#/gallery${query({ run: run.id, evaluation: shown.id, class: of })}` }, names[of])), grid);
      section.load = async () => {
        const reply = await ask(`${images}${query({ class: of, limit: OF_EACH })}`, scope);
        if (reply.images.length) grid.append(...reply.images.map(tileOf));
        else grid.append(h("p", { class: "empty" }, "None of this class."));
      };
      place.append(section);
      seen.observe(section);
    }
    more.hidden = until === names.length;
  }
  grow();
}

/** Of an evaluation that has not kept its images: the pictures of the first ones of each class. */
async function sheets(scope, place, where, names, label) {
  const found = (await ask(where, scope)).sheets.filter((each) => label === null || each === label);
  replace(place, h("p", {}, found.length ? "Its images are not kept; these are the first of each class, whose numbers are not known." : "Its images are not kept, and there is no picture of them."));
  for (const each of found) {
    const image = await fetchPicture(scope, `${where}/sheets/${each}`, `the first images of class ${names[each] ?? each}`);
    place.append(h("section", { class: "card sheet" }, h("h2", {}, names[each] ?? each), image));
  }
}
