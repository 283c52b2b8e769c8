// A directed graph: laid out by dagre, drawn as SVG, so that nodes are real elements that can be focused and styled.

import { h, keyed, s, set } from "./dom.js";
import { glyph } from "./model.js";
import { Graph, layout } from "./vendor/dagre.esm.js";

const WIDTH = 188;
const HEIGHT = 46;
const FAR = 0.6; // below this scale the second line is unreadable and is left out
const LIMIT = 400; // nodes drawn at most: the layout's cost grows faster than the graph

/**
 * A graph view. `update({nodes, edges})` with nodes `{id, name, sub, kind, fill (0..1 or null), critical, title}` and
 * edges `{from, to, label, kind, critical}`; positions are computed again only when the shape changes.
 */
export function dagView({ label, onselect, short = false }) {
  const edgesGroup = s("g");
  const labelsGroup = s("g");
  const nodesGroup = s("g");
  const world = s("g", {}, edgesGroup, labelsGroup, nodesGroup);
  const arrow = s("marker", { id: `arrow-${label.replace(/\W/g, "")}`, viewBox: "0 0 8 8", refX: 7, refY: 4, markerWidth: 6, markerHeight: 6, orient: "auto" },
    s("path", { d: "M0 0 8 4 0 8z" }));
  const svg = s("svg", { role: "group", "aria-label": label }, s("defs", {}, arrow), world);
  const element = h("div", { class: short ? "dag short" : "dag" }, svg);
  const note = h("span", { class: "muted" });
  const tools = h("span", { class: "filters" },
    note,
    h("button", { type: "button", "aria-label": "Zoom in", text: "+", onclick: () => zoom(1.3) }),
    h("button", { type: "button", "aria-label": "Zoom out", text: "−", onclick: () => zoom(1 / 1.3) }),
    h("button", { type: "button", text: "Fit", onclick: () => fit() }));

  // All mutable state.
  let shape = ""; // what the layout was computed for
  let places = new Map(); // id -> {x, y} of the node's centre
  let curves = new Map(); // "from>to" -> {d, x, y}
  let size = { width: 1, height: 1 };
  let camera = { x: 0, y: 0, k: 1 };
  let fitted = true; // until the person moves the view it follows the graph
  let selected = null;
  let around = new Map(); // id -> {parents, children}

  function place(nodes, edges) {
    const graph = new Graph({ multigraph: false });
    graph.setGraph({ rankdir: "LR", nodesep: 14, ranksep: 54, marginx: 16, marginy: 16 });
    graph.setDefaultEdgeLabel(() => ({}));
    for (const node of nodes) graph.setNode(node.id, { width: WIDTH, height: HEIGHT });
    for (const edge of edges) graph.setEdge(edge.from, edge.to, {});
    layout(graph);
    const { width, height } = graph.graph();
    const box = element.getBoundingClientRect();
    const wide = box.width && width ? Math.min(4, Math.max(1, (box.width / box.height) * (height / width))) : 1; // use the room beside a tall graph
    size = { width: (width - WIDTH) * wide + WIDTH || 1, height: height || 1 };
    const across = (x) => (x - WIDTH / 2) * wide + WIDTH / 2;
    places = new Map(nodes.map((node) => [node.id, { x: across(graph.node(node.id).x), y: graph.node(node.id).y }]));
    curves = new Map(edges.map((edge) => {
      const [from, to] = [places.get(edge.from), places.get(edge.to)];
      const start = { x: from.x + WIDTH / 2, y: from.y };
      const end = { x: to.x - WIDTH / 2 - 2, y: to.y };
      const bends = graph.edge(edge.from, edge.to).points.slice(1, -1).map(({ x, y }) => ({ x: across(x), y })).filter((point) => point.x > start.x && point.x < end.x);
      const points = [start, ...bends, end];
      const middle = points.length > 2 ? points[points.length >> 1] : { x: (start.x + end.x) / 2, y: (start.y + end.y) / 2 };
      return [`${edge.from}>${edge.to}`, { d: curve(points), x: middle.x, y: middle.y }];
    }));
    around = new Map(nodes.map((node) => [node.id, { parents: [], children: [] }]));
    for (const edge of edges) {
      around.get(edge.from).children.push(edge.to);
      around.get(edge.to).parents.push(edge.from);
    }
  }

  function look() {
    set(world, { transform: `translate(${camera.x} ${camera.y}) scale(${camera.k})` });
    svg.classList.toggle("far", camera.k < FAR);
  }

  function fit() {
    const box = element.getBoundingClientRect();
    if (!box.width) return;
    const k = Math.min(box.width / size.width, box.height / size.height, 1.15);
    camera = { k, x: (box.width - size.width * k) / 2, y: (box.height - size.height * k) / 2 };
    fitted = true;
    look();
  }

  function zoom(factor, at = null) {
    const box = element.getBoundingClientRect();
    const x = at ? at.x - box.left : box.width / 2;
    const y = at ? at.y - box.top : box.height / 2;
    const k = Math.min(3, Math.max(0.08, camera.k * factor));
    camera = { k, x: x - ((x - camera.x) * k) / camera.k, y: y - ((y - camera.y) * k) / camera.k };
    fitted = false;
    look();
  }

  svg.addEventListener("wheel", (event) => {
    if (!event.ctrlKey && !event.metaKey) return; // a plain wheel scrolls the page
    event.preventDefault();
    zoom(Math.exp(-event.deltaY / 300), { x: event.clientX, y: event.clientY });
  }, { passive: false });
  svg.addEventListener("pointerdown", (event) => {
    if (event.target.closest(".node")) return;
    svg.setPointerCapture(event.pointerId);
    svg.classList.add("panning");
  });
  svg.addEventListener("pointermove", (event) => {
    if (!svg.hasPointerCapture(event.pointerId)) return;
    camera = { ...camera, x: camera.x + event.movementX, y: camera.y + event.movementY };
    fitted = false;
    look();
  });
  svg.addEventListener("pointerup", () => svg.classList.remove("panning"));
  new ResizeObserver(() => fitted && fit()).observe(element);

  function neighbour(id, direction) {
    const { parents, children } = around.get(id);
    if (direction === "ArrowLeft") return nearest(id, parents);
    if (direction === "ArrowRight") return nearest(id, children);
    const here = places.get(id);
    const down = direction === "ArrowDown";
    const beside = [...places].filter(([other, at]) => other !== id && Math.abs(at.x - here.x) < WIDTH / 2 && (down ? at.y > here.y : at.y < here.y));
    return nearest(id, beside.map(([other]) => other));
  }

  function nearest(id, others) {
    const here = places.get(id);
    const distance = (other) => Math.hypot(places.get(other).x - here.x, places.get(other).y - here.y);
    return others.reduce((best, other) => (best === null || distance(other) < distance(best) ? other : best), null);
  }

  function keydown(event, id) {
    if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      onselect?.(id);
    } else if (event.key.startsWith("Arrow")) {
      event.preventDefault();
      const next = neighbour(id, event.key);
      if (next !== null) nodesGroup.keyedChildren.get(String(next)).focus();
    } else if (event.key === "+" || event.key === "-" || event.key === "0") {
      if (event.key === "0") fit();
      else zoom(event.key === "+" ? 1.3 : 1 / 1.3);
    }
  }

  function makeNode({ id }) {
    const clip = { x: -WIDTH / 2, y: -HEIGHT / 2, rx: 9 };
    const parts = {
      box: s("rect", { ...clip, class: "box", width: WIDTH, height: HEIGHT }),
      tint: s("rect", { ...clip, class: "tint", width: WIDTH, height: HEIGHT }),
      track: s("rect", { class: "track", x: -WIDTH / 2 + 10, y: HEIGHT / 2 - 7, width: WIDTH - 20, height: 3, rx: 1.5 }),
      fill: s("rect", { class: "fill", x: -WIDTH / 2 + 10, y: HEIGHT / 2 - 7, width: 0, height: 3, rx: 1.5 }),
      mark: s("circle", { class: "mark", cx: -WIDTH / 2 + 17, cy: -6, r: 8.5 }),
      glyph: s("text", { class: "glyph", x: -WIDTH / 2 + 17, y: -5.5 }),
      name: s("text", { class: "name", x: -WIDTH / 2 + 32, y: -6 }),
      brief: s("text", { class: "brief" }),
      sub: s("text", { class: "sub", x: -WIDTH / 2 + 32, y: 9 }),
      title: s("title"),
    };
    const node = s("g", { role: "button", onclick: () => onselect?.(id), onkeydown: (event) => keydown(event, id) }, Object.values(parts));
    return Object.assign(node, { parts });
  }

  function updateNode(node, item, first) {
    const { x, y } = places.get(item.id);
    const { parts } = node;
    const classes = ["node", `c-${item.tone ?? item.kind}`, item.critical ? "critical" : "", item.id === selected ? "selected" : ""];
    set(node, { class: classes.filter(Boolean).join(" "), transform: `translate(${x} ${y})`, tabindex: first ? 0 : -1,
      "data-id": item.id, "data-kind": item.kind, "aria-label": item.title, "aria-pressed": String(item.id === selected) });
    set(parts.glyph, { text: glyph(item.kind) });
    set(parts.name, { text: cut(item.name, 19) });
    set(parts.brief, { text: cut(item.name, 12) });
    set(parts.sub, { text: cut(item.sub ?? "", 24) });
    set(parts.fill, { width: Math.max(0, (WIDTH - 20) * (item.fill ?? 0)) });
    set(parts.track, { visibility: item.fill === null || item.fill === undefined ? "hidden" : "visible" });
    set(parts.title, { text: item.title });
  }

  function update({ nodes, edges }, select = null) {
    selected = select;
    const shown = nodes.slice(-LIMIT);
    const ids = new Set(shown.map((node) => node.id));
    const links = edges.filter((edge) => ids.has(edge.from) && ids.has(edge.to) && edge.from !== edge.to);
    set(note, { text: shown.length < nodes.length ? `newest ${LIMIT} of ${nodes.length}` : "" });
    const now = JSON.stringify([[...ids], links.map((edge) => [edge.from, edge.to])]);
    const changed = now !== shape;
    if (changed) {
      place(shown, links);
      shape = now;
    }
    const first = ids.has(selected) ? selected : shown[0]?.id;
    keyed(edgesGroup, links, edgeKey, () => s("path", { "marker-end": `url(#${arrow.id})` }), (path, edge) => {
      set(path, { d: curves.get(edgeKey(edge)).d, class: ["edge", edge.kind ?? "", edge.critical ? "critical" : ""].filter(Boolean).join(" ") });
    });
    keyed(labelsGroup, links.filter((edge) => edge.label), edgeKey, () => s("text", { class: "edge-label" }), (text, edge) => {
      const { x, y } = curves.get(edgeKey(edge));
      set(text, { x, y: y - 5, text: edge.label });
    });
    keyed(nodesGroup, shown, (node) => node.id, makeNode, (node, item) => updateNode(node, item, item.id === first));
    if (changed && fitted) requestAnimationFrame(fit);
  }

  /** From now on the view follows the graph again. */
  function follow() {
    fitted = true;
  }

  return { element, tools, update, fit, follow };
}

const edgeKey = (edge) => `${edge.from}>${edge.to}`;
const cut = (text, length) => (text.length > length ? `${text.slice(0, length - 1)}…` : text);

/** A smooth path through dagre's bend points. */
function curve(points) {
  const [first, ...rest] = points;
  let d = `M${first.x.toFixed(1)} ${first.y.toFixed(1)}`;
  let from = first;
  for (const to of rest) {
    const middle = (from.x + to.x) / 2;
    d += `C${middle.toFixed(1)} ${from.y.toFixed(1)} ${middle.toFixed(1)} ${to.y.toFixed(1)} ${to.x.toFixed(1)} ${to.y.toFixed(1)}`;
    from = to;
  }
  return d;
}
