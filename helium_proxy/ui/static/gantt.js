// A timeline: one row per worker, calls that overlap in lanes of their own; waiting, prefill and decode are told apart.

import { format, h, keyed, s, set } from "./dom.js";
import { glyph, lanes } from "./model.js";

const LABEL = 132;
const RIGHT = 20;
const TOP = 26;
const GAP = 12; // between rows

/**
 * `update({rows: [{id, label}], bars: [{id, row, name, kind, wait, from, first, to, critical, title}], start, end, live})`;
 * times in seconds on one clock.
 */
export function ganttView({ label, onselect }) {
  const grid = s("g");
  const rowsGroup = s("g");
  const barsGroup = s("g");
  const now = s("line", { class: "now" });
  const svg = s("svg", { role: "group", "aria-label": label }, grid, rowsGroup, barsGroup, now);
  const element = h("div", { class: "gantt" }, svg);
  let order = []; // ids of the bars by row and time: what the arrow keys walk
  let last = null; // the latest arguments, to draw again when the width changes

  function keydown(event, id) {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      onselect?.(id);
    } else if (step) {
      event.preventDefault();
      barsGroup.keyedChildren.get(String(order[(order.indexOf(id) + step + order.length) % order.length]))?.focus();
    }
  }

  function makeBar({ id }) {
    const parts = { wait: s("line", { class: "wait" }), prefill: s("rect", { class: "prefill", rx: 2.5 }), decode: s("rect", { class: "decode", rx: 2.5 }),
      outline: s("rect", { class: "outline", rx: 2.5 }), caption: s("text", { class: "caption" }), title: s("title") };
    return Object.assign(s("g", { role: "button", onclick: () => onselect?.(id), onkeydown: (event) => keydown(event, id) }, Object.values(parts)), { parts });
  }

  function update(data, selected = null) {
    last = [data, selected];
    const width = element.clientWidth;
    if (!width) return;
    const span = Math.max(data.end - data.start, 0.001);
    const x = (time) => LABEL + ((time - data.start) / span) * (width - LABEL - RIGHT);
    let y = TOP;
    const tops = new Map();
    const rows = data.rows.map((row) => {
      const bars = data.bars.filter((bar) => bar.row === row.id);
      const count = Math.max(1, lanes(bars));
      const lane = Math.max(9, Math.min(20, 210 / count));
      const placed = { ...row, y, height: count * lane, lane };
      tops.set(row.id, placed);
      y += placed.height + GAP;
      return placed;
    });
    set(svg, { viewBox: `0 0 ${width} ${y}`, height: y });
    const every = nice(span / Math.max(2, Math.floor(width / 120)));
    const ticks = [];
    for (let time = 0; time <= span + 1e-9; time += every) ticks.push(time);
    keyed(grid, ticks, (time) => time, () => s("g", {}, s("line", { class: "grid" }), s("text")), (tick, time) => {
      const at = x(data.start + time);
      set(tick.firstChild, { x1: at, x2: at, y1: TOP - 6, y2: y });
      set(tick.lastChild, { x: at, y: 13, "text-anchor": "middle", text: `${Number(time.toPrecision(6))} s` });
    });
    keyed(rowsGroup, rows, (row) => row.id, () => s("g", {}, s("line", { class: "sep" }), s("text", { class: "row-label" })), (group, row) => {
      set(group.firstChild, { x1: 0, x2: width, y1: row.y - GAP / 2, y2: row.y - GAP / 2 });
      set(group.lastChild, { x: 14, y: row.y + row.height / 2 + 4, text: row.label.length > 17 ? `${row.label.slice(0, 16)}…` : row.label });
      group.setAttribute("data-row", row.id);
    });
    const bars = [...data.bars].sort((a, b) => (a.row > b.row ? 1 : a.row < b.row ? -1 : a.from - b.from));
    order = bars.map((bar) => bar.id);
    const first = order.includes(selected) ? selected : order[0];
    keyed(barsGroup, bars, (bar) => bar.id, makeBar, (group, bar) => {
      const row = tops.get(bar.row);
      const top = row.y + bar.lane * row.lane + 1;
      const height = row.lane - 2;
      const [from, to] = [x(bar.from), Math.max(x(bar.to), x(bar.from) + 3)];
      const middle = bar.first == null ? to : Math.min(Math.max(x(bar.first), from), to);
      const classes = ["g-bar", `c-${bar.tone ?? bar.kind}`, bar.critical ? "critical" : "", bar.id === selected ? "selected" : ""];
      set(group, { class: classes.filter(Boolean).join(" "), tabindex: bar.id === first ? 0 : -1, "aria-label": bar.title, "data-id": bar.id, "data-row": bar.row });
      const { parts } = group;
      const waited = bar.wait != null && x(bar.wait) < from - 1;
      set(parts.wait, { x1: waited ? x(bar.wait) : from, x2: from, y1: top + height / 2, y2: top + height / 2 });
      set(parts.prefill, { x: from, y: top, width: middle - from, height });
      set(parts.decode, { x: middle, y: top, width: Math.max(0, to - middle), height });
      set(parts.outline, { x: from, y: top, width: to - from, height });
      const room = to - from - 8;
      const letters = Math.floor(room / 6.4) - 2;
      const name = letters >= bar.name.length ? bar.name : letters > 5 ? `${bar.name.slice(0, letters - 1)}…` : "";
      const caption = height >= 12 && room > 6 ? `${glyph(bar.kind)} ${name}` : "";
      set(parts.caption, { x: from + 5, y: top + height / 2 + 3.5, text: caption });
      set(parts.title, { text: bar.title });
    });
    set(now, { x1: x(data.end), x2: x(data.end), y1: TOP - 6, y2: y, visibility: data.live ? "visible" : "hidden" });
  }

  new ResizeObserver(() => last && update(...last)).observe(element);
  return { element, update };
}

/** The next 1, 2 or 5 times a power of ten. */
function nice(step) {
  const power = 10 ** Math.floor(Math.log10(step));
  return [1, 2, 5, 10].map((factor) => factor * power).find((value) => value >= step);
}
