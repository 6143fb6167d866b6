// Tasks from labels: the form, and the list that follows their making.

import { fill, makeCard, showPictures } from "./card.js";
import { Chips } from "./chips.js";
import { element } from "./dom.js";
import { listTasks } from "./question.js";
import { inWords, request } from "./server.js";

const EVERY = 1000;

const cards = new Map();
let chips = null;
let looks = 0;
let nextLook = null;

function place(tasks) {
  const list = element("tasks");
  for (const [id, card] of cards) {
    if (tasks.some((task) => task.id === id)) continue;
    card.details.remove();
    cards.delete(id);
  }
  tasks.forEach((task, index) => {
    if (!cards.has(task.id)) cards.set(task.id, makeCard(task, { use, remove }));
    const { details } = cards.get(task.id);
    if (list.children[index] !== details) list.insertBefore(details, list.children[index] || null);
  });
  element("no-tasks").hidden = tasks.length > 0;
}

export async function look() {
  clearTimeout(nextLook);
  const mine = ++looks;
  let busy = true;
  try {
    const { tasks } = await request("tasks");
    if (mine !== looks) return;
    const before = new Map([...cards].map(([id, card]) => [id, card.task.state]));
    place(tasks);
    busy = tasks.filter((task) => fill(cards.get(task.id), task)).length > 0;
    if (tasks.some((task) => before.get(task.id) !== task.state)) listTasks();
  } catch (problem) {
    if (problem.status === 401) return;
    // Others are tried again, as while a task is being made.
  }
  if (busy) nextLook = setTimeout(look, EVERY);
}

// Shows each problem of the form beside its field.
function refuse(problem) {
  const ofLabels = (problem.errors ?? []).filter(({ field }) => /^labels\b/.test(field));
  chips.mark(ofLabels.map(({ field }) => Number(field.split(".")[1])));
  const words = ofLabels.map(({ value, detail }) => (detail.includes("is not a word") ?
    `"${value}" is not a word that the networks were trained on: see below.` : detail));
  element("labels-problem").textContent = words.join(" ");
  element("refusal").textContent = words.length ? "" : inWords(problem);
}

async function wish(event) {
  event.preventDefault();
  chips.take();
  refuse({ detail: "" });
  element("refusal").textContent = "";
  const asked = { labels: chips.labels, allow_unknown_labels: element("insist").checked };
  if (element("name").value.trim()) asked.name = element("name").value;
  element("make").disabled = true;
  try {
    const headers = { "Content-Type": "application/json" };
    const task = await request("tasks", { method: "POST", body: JSON.stringify(asked), headers });
    element("wish").reset();
    chips.clear();
    await look();
    const card = cards.get(task.id);
    if (card) {
      card.details.open = true;
      showPictures(card);
    }
  } catch (problem) {
    refuse(problem);
  }
  element("make").disabled = false;
}

function use({ task }) {
  element("task").value = task.id;
  element("task").dispatchEvent(new Event("input"));
  location.hash = "#try";
}

async function remove(card) {
  if (!confirm(`Delete the task “${card.task.name}” and all that belongs to it?`)) return;
  card.find(".delete").disabled = true;
  card.loading.abort();  // Its pictures go with it.
  element("refusal").textContent = "";
  try {
    await request(`tasks/${card.task.id}`, { method: "DELETE" });
  } catch (problem) {
    element("refusal").textContent = inWords(problem);
    card.loading = new AbortController();
    card.pictures.clear();
    card.find(".delete").disabled = false;
  }
  await look();
  listTasks();
}

export const offerWords = (words) => chips.offer(words);

export function offerWishes() {
  chips = new Chips();
  element("wish").addEventListener("submit", wish);
}
