// Reading the operator's routes: the key, errors as words.

const KEY = "helium-key";
const root = new URL(".", document.baseURI); // …/helium/

export class Unauthorized extends Error {}

export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set(value) {
    if (value) sessionStorage.setItem(KEY, value);
    else sessionStorage.removeItem(KEY);
  },
};

async function request(path, { method = "GET", body, signal } = {}) {
  const url = new URL(path, root);
  const headers = { Accept: "application/json" };
  if (key.get()) headers.Authorization = `Bearer ${key.get()}`;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  const response = await fetch(url, { method, headers, body, signal, cache: "no-store", credentials: "omit" });
  if (response.status === 401) throw new Unauthorized("the proxy asks for an API key");
  const text = await response.text();
  let parsed;
  try {
    parsed = JSON.parse(text);
  } catch {
    parsed = null;
  }
  if (!response.ok) {
    const error = parsed?.error;
    throw new Error(error?.message ?? (typeof error === "string" ? error : `HTTP ${response.status}`));
  }
  if (parsed === null) throw new Error("the answer is not JSON");
  return parsed;
}

const id = encodeURIComponent;

export const api = {
  runs: ({ limit = 50, workflow = "", state = "" } = {}, signal) => {
    const query = new URLSearchParams({ limit });
    if (workflow) query.set("workflow", workflow);
    if (state) query.set("state", state);
    return request(`runs?${query}`, { signal });
  },
  run: (run, signal) => request(`runs/${id(run)}`, { signal }),
  workers: (signal) => request("workers", { signal }),
  templates: (signal) => request("templates", { signal }),
  plans: (signal) => request("../v1/workflows", { signal }),
  plan: (plan, signal) => request(`../v1/workflows/${id(plan)}/explain`, { signal }),
  explain: (body, signal) => request("../v1/workflows/explain", { method: "POST", body, signal }),
};
