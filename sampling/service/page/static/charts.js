// Charts as SVG: lines, points with intervals, bands, bars. With axes and units, a legend that hides and shows,
// a tooltip for a pointer, and the same numbers as a table for everybody.

import { h, newId, number, replace, s, table } from "./dom.js";

const LEFT = 68;
const RIGHT = 12;
const TOP = 10;
const BOTTOM = 44;
const COLOURS = 8;
/** Lines that the legend names at once. */
const KEYS = 8;

function ticksOf([low, high], log, room) {
  const count = Math.max(2, Math.floor(room / 70));
  if (log) {
    const found = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++) {
      for (const step of [1, 2, 5]) found.push(step * 10 ** power);
    }
    const inside = found.filter((value) => value >= low * 0.999 && value <= high * 1.001);
    const powers = inside.filter((value) => Math.abs(Math.log10(value) - Math.round(Math.log10(value))) < 1e-9);
    const chosen = inside.length > 2 * count ? powers : inside;
    if (chosen.length >= 2) return chosen.filter((_, place) => place % Math.ceil(chosen.length / (1.5 * count)) === 0);
  }
  const rough = (high - low) / count;
  const size = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((each) => each * size).find((each) => each >= rough) || rough;
  const found = [];
  for (let value = Math.ceil(low / step) * step; value <= high + step * 1e-6; value += step) found.push(Math.abs(value) < step * 1e-6 ? 0 : value);
  return found;
}

function tickText(value) {
  const size = Math.abs(value);
  if (size >= 1e6) return `${Number((value / 1e6).toPrecision(4))}M`;
  if (size >= 1e4) return `${Number((value / 1e3).toPrecision(4))}k`;
  if (size > 0 && size < 1e-3) return value.toExponential(0);
  return String(Number(value.toPrecision(4)));
}

/** The least and the most of some values, with room around them. */
function range(values, log, least, most) {
  let low = Math.min(...values);
  let high = Math.max(...values);
  if (log) {
    if (low === high) [low, high] = [low / 1.5, high * 1.5];
    const room = (high / low) ** 0.06;
    return [low / room, high * room];
  }
  if (low === high) [low, high] = [low - (Math.abs(low) || 1) / 2, high + (Math.abs(high) || 1) / 2];
  const room = (high - low) * 0.06;
  return [least ?? low - room, most ?? high + room];
}

const known = (value) => typeof value === "number" && Number.isFinite(value);

/**
 * A chart.
 *
 * series: [{name, points: [{x, y, low, high, text}], line, marks, band: [{x, low, high}], bars}] ; lines: [{y or x, name}].
 * title, xLabel, yLabel; xLog, yLog; yLeast, yMost.
 */
export function chart(options) {
  const { title, xLabel, yLabel, lines = [] } = options;
  const series = options.series.filter((each) => each.points.length || each.band?.length);
  if (!series.length) return h("figure", { class: "chart" }, h("figcaption", {}, title), h("p", { class: "empty" }, options.empty || "Nothing to draw yet."));
  const hidden = new Set(series.filter((each) => each.hidden).map((each) => each.name));
  const id = newId("chart");
  const canvas = h("div", { class: "canvas" });
  const tooltip = h("div", { class: "tooltip", hidden: true, "aria-hidden": "true" });
  const legend = h("div", { class: "legend", role: "group", "aria-label": `Lines of ${title}` });
  const data = h("details", { class: "data" }, h("summary", {}, "As a table"));
  const figure = h("figure", { class: "chart", "aria-labelledby": id }, h("figcaption", { id }, title), canvas, legend, data);
  const log = { x: options.xLog, y: options.yLog };
  let drawn = [];
  let width = 0;

  const colour = (each) => `c${series.indexOf(each) % COLOURS}`;
  const isShown = (each) => !hidden.has(each.name);
  const usable = (point) => known(point.x) && known(point.y) && (!log.x || point.x > 0) && (!log.y || point.y > 0);

  function draw() {
    const shown = series.filter(isShown);
    const points = shown.flatMap((each) => each.points.filter(usable));
    const bands = shown.flatMap((each) => each.band || []);
    const height = options.height || (width < 420 ? 230 : 270);
    const svg = s("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": `${title}: ${yLabel} over ${xLabel}; the numbers are in the table below` });
    drawn = [];
    if (!points.length && !bands.length) {
      replace(canvas, svg, tooltip);
      return;
    }
    const bars = shown.some((each) => each.bars);
    const xs = [...points.map((each) => each.x), ...bands.map((each) => each.x), ...lines.filter((each) => known(each.x)).map((each) => each.x)];
    const ys = [...points.flatMap((each) => [each.y, each.low, each.high]), ...bands.flatMap((each) => [each.low, each.high]), ...lines.map((each) => each.y)]
      .filter((value) => known(value) && (!log.y || value > 0));
    const xRange = bars ? [Math.min(...xs) - 0.6, Math.max(...xs) + 0.6] : range(xs, log.x);
    const yRange = bars ? [0, 1.25 * Math.max(...ys)] : range(ys, log.y, options.yLeast, options.yMost);
    const scale = (value, [low, high], isLog, from, to) => {
      const share = isLog ? Math.log(value / low) / Math.log(high / low) : (value - low) / (high - low);
      return from + share * (to - from);
    };
    const px = (value) => scale(value, xRange, log.x, LEFT, width - RIGHT);
    const py = (value) => scale(value, yRange, log.y, height - BOTTOM, TOP);

    for (const value of ticksOf(yRange, log.y, height - TOP - BOTTOM + 60)) {
      svg.append(s("line", { class: "rule", x1: LEFT, x2: width - RIGHT, y1: py(value), y2: py(value) }),
        s("text", { class: "tick", x: LEFT - 8, y: py(value) + 4, "text-anchor": "end" }, tickText(value)));
    }
    for (const value of ticksOf(xRange, log.x, width - LEFT - RIGHT)) {
      if (bars && !Number.isInteger(value)) continue;
      svg.append(s("line", { class: "axis", x1: px(value), x2: px(value), y1: height - BOTTOM, y2: height - BOTTOM + 4 }),
        s("text", { class: "tick", x: px(value), y: height - BOTTOM + 18, "text-anchor": "middle" }, tickText(value)));
    }
    svg.append(s("line", { class: "axis", x1: LEFT, x2: width - RIGHT, y1: height - BOTTOM, y2: height - BOTTOM }),
      s("text", { class: "label", x: (LEFT + width - RIGHT) / 2, y: height - 8, "text-anchor": "middle" }, xLabel),
      s("text", { class: "label", transform: `translate(13 ${(TOP + height - BOTTOM) / 2}) rotate(-90)`, "text-anchor": "middle" }, yLabel));
    for (const each of shown) {
      if (each.band?.length) {
        const up = each.band.map((point) => `${px(point.x)},${py(point.high)}`);
        const down = each.band.map((point) => `${px(point.x)},${py(point.low)}`).reverse();
        svg.append(s("polygon", { class: `band ${colour(each)}`, points: [...up, ...down].join(" ") }));
      }
      const good = each.points.filter(usable);
      if (each.bars) {
        const wide = Math.max(2, (px(1) - px(0)) * 0.7);
        for (const point of good) svg.append(s("rect", { class: `column ${colour(each)}`, x: px(point.x) - wide / 2, width: wide, y: py(point.y), height: Math.max(0, height - BOTTOM - py(point.y)) }));
      } else if (each.line !== false && good.length > 1) {
        svg.append(s("polyline", { class: `curve ${colour(each)}`, points: good.map((point) => `${px(point.x)},${py(point.y)}`).join(" ") }));
      }
      for (const point of good) {
        if (known(point.low) && known(point.high)) {
          const x = px(point.x);
          const [low, high] = [log.y ? Math.max(point.low, yRange[0]) : point.low, point.high].map(py);
          svg.append(s("path", { class: `whisker ${colour(each)}`, d: `M${x - 4} ${low}H${x + 4}M${x} ${low}V${high}M${x - 4} ${high}H${x + 4}` }));
        }
        if (each.marks !== false && !each.bars) svg.append(s("circle", { class: `point ${colour(each)}`, cx: px(point.x), cy: py(point.y), r: 3.5 }));
        drawn.push({ x: px(point.x), y: py(point.y), point, each });
      }
    }
    for (const each of lines) {
      const at = known(each.y) ? { x1: LEFT, x2: width - RIGHT, y1: py(each.y), y2: py(each.y) } : { x1: px(each.x), x2: px(each.x), y1: TOP, y2: height - BOTTOM };
      svg.append(s("line", { class: "reference", ...at }),
        s("text", { class: "tick", x: known(each.y) ? width - RIGHT : at.x1 + 5, y: known(each.y) ? at.y1 - 5 : TOP + 10, "text-anchor": known(each.y) ? "end" : "start" }, each.name));
    }
    replace(canvas, svg, tooltip);
  }

  function pointAt(event) {
    const box = canvas.getBoundingClientRect();
    const [x, y] = [event.clientX - box.left, event.clientY - box.top];
    let nearest = null;
    let least = Infinity;
    for (const each of drawn) {
      const distance = Math.abs(each.x - x) + Math.abs(each.y - y) / 2;
      if (distance < least) [nearest, least] = [each, distance];
    }
    if (!nearest || least > 60) {
      tooltip.hidden = true;
      return;
    }
    const { point, each } = nearest;
    replace(tooltip, h("b", {}, each.name), h("span", {}, `${xLabel} ${number(point.x)}`),
      h("span", {}, `${yLabel} ${number(point.y)}${known(point.low) ? ` (${number(point.low)} to ${number(point.high)})` : ""}`),
      point.text ? h("span", {}, point.text) : null);
    tooltip.hidden = false;
    const left = Math.min(Math.max(nearest.x - tooltip.offsetWidth / 2, 0), Math.max(0, width - tooltip.offsetWidth));
    tooltip.style.left = `${left}px`;
    tooltip.style.top = `${nearest.y > tooltip.offsetHeight + 16 ? nearest.y - tooltip.offsetHeight - 12 : nearest.y + 12}px`;
  }
  canvas.addEventListener("pointermove", pointAt);
  canvas.addEventListener("pointerdown", pointAt);
  canvas.addEventListener("pointerleave", () => { tooltip.hidden = true; });

  if (series.length > 1) {
    const others = h("div");
    series.forEach((each, place) => {
      const button = h("button", { type: "button", class: `quiet key ${colour(each)}`, "aria-pressed": String(isShown(each)) }, h("span", { class: "swatch" }), each.name);
      button.addEventListener("click", () => {
        if (!hidden.delete(each.name)) hidden.add(each.name);
        button.setAttribute("aria-pressed", String(isShown(each)));
        draw();
      });
      (place < KEYS ? legend : others).append(button);
    });
    if (series.length > KEYS) legend.append(h("details", {}, h("summary", {}, `${series.length - KEYS} more lines`), others));
  } else legend.hidden = true;

  data.addEventListener("toggle", () => {
    if (!data.open || data.children.length > 1) return;
    const rows = series.flatMap((each) => each.points.map((point) => [each.name, number(point.x), number(point.y), known(point.low) ? `${number(point.low)} to ${number(point.high)}` : "–"]));
    const most = 500;
    data.append(table(title, ["line", xLabel, yLabel, "interval"], rows.slice(0, most)));
    if (rows.length > most) data.append(h("p", { class: "hint" }, `The first ${most} of ${number(rows.length)} rows.`));
  });

  new ResizeObserver(([entry]) => {
    const now = Math.floor(entry.contentRect.width);
    if (now && now !== width) {
      width = now;
      draw();
    }
  }).observe(canvas);
  return figure;
}
