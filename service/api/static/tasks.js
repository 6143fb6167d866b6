"use strict";

const cards = new Map();
let looks = 0;
let nextLook = null;

async function request(address, options) {
  const response = await send(address, options).catch(() => {
    throw { detail: "The service does not answer." };
  });
  const body = response.status === 204 ? null : await response.json();
  if (!response.ok) throw body;
  return body;
}

function refuse(problem) {
  element("refusal").textContent = inWords(problem);
}

function stateInWords(task) {
  if (task.state === "queued") return "waiting for its turn";
  if (task.state !== "running") return task.state;
  const seconds = task.eta_seconds;
  const left = seconds === null ? [] : seconds < 90 ? [`about ${Math.ceil(seconds)} s left`] :
    [`about ${Math.round(seconds / 60)} min left`];
  return [task.stage || "starting", `${Math.floor(task.progress * 100)} %`, ...left].join(", ");
}

function makeCard(task) {
  const details = element("card").content.firstElementChild.cloneNode(true);
  const find = (kind) => details.querySelector(kind);
  const card = { details, task, find, pictures: new Map(), loading: new AbortController() };
  details.open = ["queued", "running"].includes(task.state);
  details.addEventListener("toggle", () => showPictures(card));
  card.find(".use").addEventListener("click", () => {
    element("task").value = task.id;
    element("question").scrollIntoView({ behavior: "smooth" });
  });
  card.find(".delete").addEventListener("click", () => remove(card));
  return card;
}

function fill(card, task) {
  card.task = task;
  const busy = ["queued", "running"].includes(task.state);
  card.find(".name").textContent = task.name;
  card.find(".state").textContent = stateInWords(task);
  card.find("progress").value = task.progress;
  card.find("progress").hidden = !busy;
  card.find(".labels").textContent = task.labels.join(", ");
  card.find(".problem").textContent = task.problem ? task.problem.detail : "";
  card.find(".measure").hidden = card.find(".use").hidden = task.state !== "ready";
  card.find(".command").textContent = `vouchsafe evaluate --task ${task.id} --images FOLDER`;
  showPictures(card);
  return busy;
}

async function showPictures(card) {
  if (!card.details.open) return;
  const addresses = card.task.references;
  const wanted = addresses.filter((address) => !card.pictures.has(address));
  for (const address of wanted) {
    const picture = new Image();
    picture.alt = picture.title = card.task.labels[parseInt(address.split("/").pop(), 10)];
    card.pictures.set(address, picture);
  }
  for (const address of card.pictures.keys()) {
    if (!addresses.includes(address)) card.pictures.delete(address);
  }
  const shown = addresses.map((address) => card.pictures.get(address));
  const list = card.find(".pictures");
  const other = (picture, index) => list.children[index] !== picture;
  if (shown.length !== list.children.length || shown.some(other)) list.replaceChildren(...shown);
  for (const address of wanted) {
    const picture = card.pictures.get(address);
    if (card.loading.signal.aborted) return;
    if (!picture) continue;
    const blob = await send(address, { signal: card.loading.signal })
      .then((response) => response.ok && response.blob())
      .catch(() => null);
    if (!blob) {
      picture.remove();
      card.pictures.delete(address);
      continue;
    }
    picture.onload = () => URL.revokeObjectURL(picture.src);
    picture.src = URL.createObjectURL(blob);
  }
}

function place(tasks) {
  const list = element("tasks");
  for (const [id, card] of cards) {
    if (tasks.some((task) => task.id === id)) continue;
    card.details.remove();
    cards.delete(id);
  }
  tasks.forEach((task, index) => {
    if (!cards.has(task.id)) cards.set(task.id, makeCard(task));
    const { details } = cards.get(task.id);
    if (list.children[index] !== details) list.insertBefore(details, list.children[index] || null);
  });
}

async function look() {
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
  if (busy) nextLook = setTimeout(look, 1000);
}

async function wish(event) {
  event.preventDefault();
  element("make").disabled = true;
  element("refusal").textContent = "";
  const lines = element("labels").value.split("\n").map((line) => line.trim());
  const asked = { labels: lines.filter(Boolean), allow_unknown_labels: element("insist").checked };
  if (element("name").value.trim()) asked.name = element("name").value;
  const headers = { "Content-Type": "application/json" };
  try {
    const task = await request("tasks", { method: "POST", body: JSON.stringify(asked), headers });
    element("wish").reset();
    await look();
    if (cards.has(task.id)) cards.get(task.id).details.open = true;
  } catch (problem) {
    refuse(problem);
  }
  element("make").disabled = false;
}

async function remove(card) {
  if (!confirm(`Delete the task “${card.task.name}” and all that belongs to it?`)) return;
  card.find(".delete").disabled = true;
  card.loading.abort();  // Its pictures go with it.
  element("refusal").textContent = "";
  try {
    await request(`tasks/${card.task.id}`, { method: "DELETE" });
  } catch (problem) {
    refuse(problem);
    card.loading = new AbortController();
    card.pictures.clear();
    card.find(".delete").disabled = false;
  }
  await look();
  listTasks();
}
