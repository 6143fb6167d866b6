// One task: its state, pictures, figures and commands.

import { copy, element, make } from "./dom.js";
import { send } from "./server.js";
import { inTime } from "./words.js";

const STAGES = {
  synthesizing: "making pictures", personalizing: "adapting the denoiser",
  finetuning: "adapting the classifier", evaluating: "measuring",
};
const TONES = { ready: "good", failed: "bad", cancelled: "warn" };
const FIGURE = /^one noisy row of a reference recogni[sz]ed, sigma (.*)$/;

function stateInWords(task) {
  if (task.state === "queued") return "waiting for its turn";
  if (task.state !== "running") return task.state;
  const left = task.eta_seconds === null ? [] : [`${inTime(task.eta_seconds)} left`];
  return [STAGES[task.stage] || "starting", `${Math.floor(task.progress * 100)} %`, ...left].join(", ");
}

function stagesInWords({ losses, settings }) {
  const made = Object.entries(settings).map(([name, value]) => `${name} ${value}`);
  const lost = Object.entries(losses).map(([stage, loss]) =>
    `loss ${STAGES[stage] ? `of ${STAGES[stage]}` : stage} ${loss.toPrecision(3)}`);
  return [...made, ...lost].join(" · ");
}

export function makeCard(task, { use, remove }) {
  const details = element("card").content.firstElementChild.cloneNode(true);
  const find = (kind) => details.querySelector(kind);
  const card = { details, task, find, pictures: new Map(), loading: new AbortController() };
  details.open = ["queued", "running"].includes(task.state);
  details.addEventListener("toggle", () => showPictures(card));
  find(".use").addEventListener("click", () => use(card));
  find(".delete").addEventListener("click", () => remove(card));
  find(".copy").addEventListener("click", () => copy(card.task.id, find(".copy")));
  return card;
}

function showFigures(card, figures) {
  const rows = Object.entries(figures).flatMap(([name, value]) => {
    const [, sigma] = name.match(FIGURE) ?? [];
    return sigma ? [[`sigma ${sigma}`, value["zero-shot"], value.adapted]] : [];
  });
  const percent = (share) => `${(share * 100).toFixed(0)} %`;
  card.find(".figures").hidden = !rows.length;
  card.find(".figures tbody").replaceChildren(...rows.map(([name, before, after]) =>
    make("tr", {}, make("th", { scope: "row", textContent: name }),
      make("td", { textContent: percent(before) }), make("td", { textContent: percent(after) }))));
}

// Shows the task as it is now, and returns whether it is in the making.
export function fill(card, task) {
  card.task = task;
  const busy = ["queued", "running"].includes(task.state);
  card.find(".name").textContent = task.name;
  card.find(".state").textContent = stateInWords(task);
  card.find(".state").className = `badge state ${TONES[task.state] ?? ""}`;
  card.find("progress").value = task.progress;
  card.find("progress").hidden = !busy;
  card.find(".stages").textContent = stagesInWords(task);
  card.find(".labels").textContent = task.labels.join(", ");
  card.find(".problem").textContent = task.problem ? task.problem.detail : "";
  showFigures(card, task.figures);
  card.find(".id").textContent = task.id;
  card.find(".made").textContent = new Date(task.created * 1000).toLocaleString();
  card.find(".measure").hidden = card.find(".use").hidden = task.state !== "ready";
  const service = new URL(".", document.baseURI).href;
  card.find(".curl").textContent = `curl -s -F image=@picture.png -F task=${task.id} ${service}predict`;
  card.find(".command").textContent = `vouchsafe evaluate --task ${task.id} --images FOLDER`;
  showPictures(card);
  return busy;
}

export async function showPictures(card) {
  if (!card.details.open) return;
  const addresses = card.task.references;
  const wanted = addresses.filter((address) => !card.pictures.has(address));
  for (const address of wanted) {
    const words = card.task.labels[parseInt(address.split("/").pop(), 10)];
    card.pictures.set(address, make("img", { alt: words, title: words }));
  }
  for (const address of card.pictures.keys()) {
    if (!addresses.includes(address)) card.pictures.delete(address);
  }
  const shown = addresses.map((address) => card.pictures.get(address));
  const list = card.find(".pictures");
  const other = (picture, index) => list.children[index] !== picture;
  if (shown.length !== list.children.length || shown.some(other)) list.replaceChildren(...shown);
  for (const address of wanted) await load(card, address);
}

// Pictures need the key, so they are loaded by requests; one that fails is tried at the next look.
async function load(card, address) {
  const image = card.pictures.get(address);
  if (!image || card.loading.signal.aborted) return;
  const relative = address.replace(/^\//, "");
  const blob = await send(relative, { signal: card.loading.signal })
    .then((response) => response.ok && response.blob())
    .catch(() => null);
  if (!blob) {
    image.remove();
    card.pictures.delete(address);
    return;
  }
  image.onload = () => URL.revokeObjectURL(image.src);
  image.src = URL.createObjectURL(blob);
}
