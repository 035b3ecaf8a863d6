// The page: what is served, views, colours, the token, and the stream of figures.

import { charts } from "./charts.js";
import { Chat } from "./chat.js";
import { replicas } from "./cluster.js";
import { ask, events, setToken } from "./stream.js";
import { count } from "./text.js";

const KEPT_SAMPLES = 300;
const RETRY_MS = 2000;
const find = (id) => document.getElementById(id);

// --- colours ---

const dark = matchMedia("(prefers-color-scheme: dark)");
const root = document.documentElement;
root.dataset.theme = localStorage.getItem("phalanx-theme") ?? "";
find("theme").addEventListener("click", () => {
  const now = root.dataset.theme || (dark.matches ? "dark" : "light");
  root.dataset.theme = now === "dark" ? "light" : "dark";
  localStorage.setItem("phalanx-theme", root.dataset.theme);
  if (cluster) showReplicas(cluster);
});
dark.addEventListener("change", () => cluster && showReplicas(cluster));

// --- views, where there is room for one at a time ---

const tabs = [find("tab-chat"), find("tab-cluster")];
function view(name) {
  document.body.dataset.view = name;
  for (const tab of tabs) {
    const chosen = tab.id === `tab-${name}`;
    tab.setAttribute("aria-selected", String(chosen));
    tab.tabIndex = chosen ? 0 : -1;
  }
}
for (const tab of tabs) {
  tab.addEventListener("click", () => view(tab.id.slice(4)));
  tab.addEventListener("keydown", (event) => {
    if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
    const other = tabs[1 - tabs.indexOf(tab)];
    view(other.id.slice(4));
    other.focus();
  });
}

// --- the token ---

const dialog = find("token-dialog");
let refused = false;
function askToken() {
  find("token").hidden = false;
  find("token-wrong").hidden = !refused;
  if (!dialog.open) dialog.showModal();
}
find("token").addEventListener("click", () => {
  refused = false;
  askToken();
});
dialog.querySelector("form").addEventListener("submit", () => {
  setToken(find("token-value").value);
  find("token-value").value = "";
  refused = true;
  wake?.();
});

// --- figures ---

const showCharts = charts(find("charts"));
const showReplicas = replicas(find("replicas"));
const chat = new Chat(askToken);
let samples = [];
let cluster = null;
let wake = null;

function health(state, text) {
  find("health").dataset.state = state;
  find("health").querySelector("span").textContent = text;
}

function take(event) {
  if (event.model) {
    const { model } = event;
    find("model").textContent = model.name;
    find("model-facts").textContent = `${model.family}, ${model.dtype}, ${count(model.max_context)} tokens of context`;
    document.title = `${model.name} · Phalanx`;
    chat.serve(model);
    samples = event.samples;
  } else samples = [...samples, event.sample].slice(-KEPT_SAMPLES);
  cluster = event.cluster;
  const ready = cluster.replicas.filter((replica) => replica.state === "ready").length;
  const ranks = cluster.replicas.reduce((sum, replica) => sum + replica.ranks.length, 0);
  const words = `${ready} of ${cluster.replicas.length} replicas ready, ${ranks} ranks`;
  health(ready ? "ready" : "starting", cluster.replicas.length > 1 || !ready ? words : `ready, ${ranks} ${ranks === 1 ? "rank" : "ranks"}`);
  showCharts(samples);
  showReplicas(cluster);
}

async function watch() {
  for (;;) {
    try {
      const answer = await ask("events");
      refused = false;
      if (dialog.open) dialog.close();
      for await (const data of events(answer)) take(JSON.parse(data));
      health("lost", "connection lost");
    } catch (error) {
      health("lost", error.status === 401 ? "token needed" : "not reachable");
      if (error.status === 401) {
        askToken();
        await new Promise((resolve) => {
          wake = resolve;
        });
        continue;
      }
    }
    await new Promise((resolve) => setTimeout(resolve, RETRY_MS));
  }
}

watch();
