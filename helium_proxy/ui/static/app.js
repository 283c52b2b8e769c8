// The frame: which view is shown, the poll that feeds it, the key, the theme.

import { Unauthorized, key } from "./api.js";
import { h, set } from "./dom.js";
import { plansView } from "./plans.js";
import { runsView } from "./runs.js";
import { templatesView } from "./templates.js";
import { workersView } from "./workers.js";

const EVERY_MS = 1000;
const SLOWEST_MS = 15000;
const views = { runs: runsView, templates: templatesView, plans: plansView, workers: workersView };
const byId = (id) => document.getElementById(id);
const main = byId("main");

// All of the page's own state.
let view = null; // the object made by one of `views`: {element, poll(signal), show(argument)}
let viewName = "";
let timer = 0;
let delay = EVERY_MS; // grows while the proxy does not answer
let asking = null; // AbortController of the poll in flight
let paused = false;

function route() {
  const [, name = "runs", ...rest] = location.hash.split("/");
  const argument = rest.map(decodeURIComponent).join("/");
  const known = views[name] ? name : "runs";
  if (known !== viewName) {
    view = views[known]();
    viewName = known;
    main.replaceChildren(view.element);
    document.title = `${known[0].toUpperCase()}${known.slice(1)} · Helium`;
    for (const link of document.querySelectorAll("nav a")) {
      set(link, { "aria-current": link.dataset.view === known ? "page" : null });
    }
  }
  view.show(argument);
  poll();
}

async function poll() {
  clearTimeout(timer);
  asking?.abort();
  const mine = (asking = new AbortController());
  try {
    await view.poll(mine.signal);
    if (mine.signal.aborted) return;
    delay = EVERY_MS;
    status(paused ? "paused" : "live", paused ? "" : "live");
  } catch (error) {
    if (mine.signal.aborted) return;
    if (error instanceof Unauthorized) {
      status("needs an API key", "bad");
      askForKey();
      return;
    }
    delay = Math.min(2 * delay, SLOWEST_MS);
    status(error instanceof TypeError ? "the proxy does not answer" : error.message, "bad");
  }
  if (!paused && !document.hidden) timer = setTimeout(poll, delay);
}

function status(text, kind) {
  set(byId("status"), { text, class: `status ${kind}` });
}

function askForKey() {
  const dialog = byId("key-dialog");
  if (dialog.open) return;
  byId("key-input").value = "";
  dialog.showModal();
}

byId("key").addEventListener("click", askForKey);
byId("key-cancel").addEventListener("click", () => byId("key-dialog").close());
byId("key-dialog").querySelector("form").addEventListener("submit", (event) => {
  event.preventDefault();
  key.set(byId("key-input").value.trim());
  byId("key-dialog").close();
  delay = EVERY_MS;
  poll();
});

byId("pause").addEventListener("click", () => {
  paused = !paused;
  set(byId("pause"), { "aria-pressed": String(paused), text: paused ? "Resume" : "Pause" });
  poll();
});

const THEMES = ["auto", "light", "dark"];
function theme(name) {
  set(document.documentElement, { "data-theme": name === "auto" ? null : name });
  set(byId("theme"), { text: name[0].toUpperCase() + name.slice(1), "aria-label": `Theme: ${name}` });
  localStorage.setItem("helium-theme", name);
}
byId("theme").addEventListener("click", () => {
  const now = localStorage.getItem("helium-theme") ?? "auto";
  theme(THEMES[(THEMES.indexOf(now) + 1) % THEMES.length]);
});
theme(THEMES.includes(localStorage.getItem("helium-theme")) ? localStorage.getItem("helium-theme") : "auto");

document.addEventListener("visibilitychange", () => !document.hidden && !paused && poll());
window.addEventListener("hashchange", route);
document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault();
  main.focus();
});
main.append(h("p", { class: "empty", text: "Loading …" }));
route();
