// Small helpers: elements, keyed updates (so that focus and transitions survive a poll), and formats.

const SVG = "http://www.w3.org/2000/svg";

function apply(element, props) {
  for (const [name, value] of Object.entries(props)) {
    if (value === undefined || value === null) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "text") element.textContent = value;
    else if (name.startsWith("--")) element.style.setProperty(name, value);
    else if (value === false) element.removeAttribute(name);
    else element.setAttribute(name, value === true ? "" : value);
  }
  return element;
}

/** An HTML element; children are elements, strings or null. */
export function h(tag, props = {}, ...children) {
  const element = apply(document.createElement(tag), props);
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

/** An SVG element. */
export function s(tag, props = {}, ...children) {
  const element = apply(document.createElementNS(SVG, tag), props);
  element.append(...children.flat().filter(Boolean));
  return element;
}

/** Set attributes, custom properties and text of an existing element, touching only what changed. */
export function set(element, props) {
  for (const [name, value] of Object.entries(props)) {
    if (name === "text") {
      if (element.textContent !== String(value)) element.textContent = value;
    } else if (name.startsWith("--")) element.style.setProperty(name, value);
    else if (value === false || value === null || value === undefined) element.removeAttribute(name);
    else {
      const text = value === true ? "" : String(value);
      if (element.getAttribute(name) !== text) element.setAttribute(name, text);
    }
  }
}

/** Make `parent`'s children one per item, in order, reusing the element of an equal key. */
export function keyed(parent, items, key, create, update) {
  const known = (parent.keyedChildren ??= new Map());
  const keep = new Set();
  let place = parent.firstElementChild;
  for (const item of items) {
    const id = String(key(item));
    keep.add(id);
    let element = known.get(id);
    if (!element) {
      element = create(item);
      known.set(id, element);
    }
    if (element !== place) parent.insertBefore(element, place);
    else place = place.nextElementSibling;
    update?.(element, item);
  }
  for (const [id, element] of known) {
    if (!keep.has(id)) {
      element.remove();
      known.delete(id);
    }
  }
}

const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const short = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 });
const finite = (value) => typeof value === "number" && Number.isFinite(value);

export const format = {
  int: (value) => (finite(value) ? whole.format(value) : "–"),
  tokens: (value) => (finite(value) ? (Math.abs(value) < 10000 ? whole.format(value) : short.format(value)) : "–"),
  percent: (value) => (finite(value) ? `${(100 * value).toFixed(value > 0 && value < 0.1 ? 1 : 0)}%` : "–"),
  seconds(value) {
    if (!finite(value)) return "–";
    if (value < 0.0995) return `${Math.round(value * 1000)} ms`;
    if (value < 10) return `${value.toFixed(2)} s`;
    if (value < 100) return `${value.toFixed(1)} s`;
    return `${Math.floor(value / 60)} m ${Math.round(value % 60)} s`;
  },
};

/** "1 call", "2 calls". */
export const counted = (number, noun) => `${format.int(number)} ${noun}${number === 1 ? "" : "s"}`;

export const pill = (text, kind = text) => h("span", { class: `pill ${kind}`, text });

/** Update (or fill) a stacked bar; parts are [kind, amount, label]. */
export function stack(element, parts) {
  const total = parts.reduce((sum, [, amount]) => sum + amount, 0);
  keyed(element, parts, ([kind]) => kind, ([kind]) => h("span", { class: `c-${kind}` }), (bar, [, amount]) => {
    set(bar, { "--w": total ? amount / total : 0, hidden: !amount });
  });
  const words = parts.filter(([, amount]) => amount).map(([, amount, label]) => `${label} ${format.tokens(amount)}`);
  set(element, { role: "img", "aria-label": words.join(", ") || "nothing yet", title: words.join(" · ") });
  return element;
}

export const newStack = (tall = false) => h("div", { class: tall ? "stack tall" : "stack" });

export function legend(kinds) {
  return h("ul", { class: "legend" }, kinds.map(([kind, text]) => h("li", { class: `c-${kind}`, text })));
}

/** A tile of the summary: returns the element; `set(tile.value, …)` changes it. */
export function tile(label, extra = "") {
  const value = h("dd", { text: "–" });
  const element = h("div", { class: `tile ${extra}` }, h("dt", { text: label }), value);
  return Object.assign(element, { value });
}
