// What the service does now, from its probe and its metrics.

import { element, make } from "./dom.js";
import { inWords, request, send } from "./server.js";
import { whole } from "./words.js";

const EVERY = 5000;

let next = null;

// The sum of a metric's samples, or 0.
function sumOf(text, name) {
  const lines = text.matchAll(new RegExp(`^${name}(?:{[^}]*})? (\\S+)$`, "gm"));
  return [...lines].reduce((sum, [, value]) => sum + Number(value), 0);
}

// Workers, waiting rows, rows a second and questions so far; null where metrics are refused.
export async function readStatus() {
  const response = await send("metrics").catch(() => null);
  if (!response?.ok) return null;
  const text = await response.text();
  return {
    workers: sumOf(text, "vouchsafe_workers"),
    waiting: sumOf(text, "vouchsafe_queue_rows"),
    speed: sumOf(text, "vouchsafe_queue_rows_per_second"),
    answered: sumOf(text, "vouchsafe_predictions_total"),
    adaptations: sumOf(text, "vouchsafe_adaptations_open"),
    version: text.match(/vouchsafe_build_info{version="([^"]*)"}/)?.[1] ?? "",
  };
}

export async function showStatus() {
  clearTimeout(next);
  const view = document.querySelector("[data-view=status]");
  if (view.hidden) return;
  try {
    const health = await send("readyz").then((response) => response.json());
    const isWell = health.status === "ok" && !health.detail;
    element("health").textContent = isWell ? "Ready: questions are answered." :
      `Not ready: ${health.detail || health.status}`;
    element("health").className = isWell ? "" : "problem";
    const status = await readStatus();
    const named = status && {
      "Workers": status.workers, "Rows waiting": status.waiting,
      "Rows a second": Math.round(status.speed), "Answers since the start": status.answered,
      "Tasks in the making": status.adaptations,
    };
    element("numbers").replaceChildren(...Object.entries(named ?? {}).map(([name, value]) =>
      make("div", {}, make("dt", { textContent: name }), make("dd", { textContent: whole(value) }))),
    make("div", {}, make("dt", { textContent: "Version" }),
      make("dd", { textContent: status?.version ?? "" })));
    const { models } = await request("models");
    element("served").replaceChildren(...models.map((model) => make("tr", {},
      make("th", { scope: "row", textContent: model.name || model.task }),
      make("td", { textContent: model.labels.length }),
      make("td", { textContent: `${model.resolution}×${model.resolution}` }),
      make("td", { textContent: model.largest_sigma }),
      make("td", { textContent: model.ready ? "ready" : "no worker" }))));
  } catch (problem) {
    element("health").textContent = problem.detail ? inWords(problem) : "The service does not answer.";
    element("health").className = "problem";
  }
  next = setTimeout(showStatus, EVERY);
}
