// The question: its fields, what it costs, and the wait for its answer.

import { showAnswer } from "./answer.js";
import { element } from "./dom.js";
import { chosenPicture } from "./picture.js";
import { follow, formOf, inWords, request, send } from "./server.js";
import { readStatus } from "./status.js";
import { Climb, showVotes } from "./votes.js";
import { inTime, whole } from "./words.js";

const MODES = {
  certify: "The label that most noisy copies vote for, with the radius that their votes prove.",
  predict: "The label alone, from fewer copies.",
  purify: "A diffusion model cleans the picture before the classifier sees it. This is slow, " +
    "and certifies nothing.",
};
const PURIFIED_ROWS = 150;  // What one purification is charged as (docs/purification.md).

let models = [];
let denoisers = [];
let running = null;
let speed = 0;

// The words of the first set, which new tasks are made with; none where it takes any.
export const knownWords = () => denoisers[0]?.words ?? [];

export const modelOf = (task) => models.find((model) => model.task === task);

export async function listTasks() {
  try {
    ({ models, denoisers } = await request("models"));
  } catch (problem) {
    if (problem.status === 401) return false;
    element("problem").textContent = inWords(problem);
    return true;
  }
  const chosen = element("task").value;
  element("task").replaceChildren(...models.map((model) => new Option(nameOf(model), model.task)));
  if (modelOf(chosen)) element("task").value = chosen;
  fit();
  return true;
}

// Tasks of one name are told apart by their ids.
function nameOf({ name, task, labels }) {
  const isTwice = name && models.filter((model) => model.name === name).length > 1;
  return `${name || task}${isTwice ? ` · ${task.slice(0, 8)}` : ""} (${labels.length} labels)`;
}

export function fields() {
  const mode = element("mode").value;
  const given = { image: chosenPicture(), task: element("task").value, mode };
  if (mode === "certify") given.method = "anytime";
  for (const name of ["sigma", "n", "target_radius", "alpha"]) {
    const { value, disabled } = element(name);
    if (!disabled && value) given[name] = value;
  }
  return given;
}

// The copies of a question, at most: those that choose the label, and those that bound it.
function rowsOf({ mode, n, target_radius: target }) {
  if (mode === "purify") return PURIFIED_ROWS * Number(n || 8);
  if (mode === "predict") return Number(n || 100);
  return target ? 16 + Number(n || 10000) : 100 + Number(n || 1000);
}

function fit() {
  const mode = element("mode").value;
  const target = element("target_radius");
  target.disabled = mode !== "certify";
  element("mode-hint").textContent = MODES[mode];
  const counts = { certify: target.value ? "10000" : "1000", predict: "100", purify: "8" };
  element("n").placeholder = counts[mode];
  const limit = modelOf(element("task").value)?.largest_sigma;
  element("sigma").max = limit ?? 4;
  element("sigma-limit").textContent = limit ? `This task takes at most ${limit}.` : "";
  const rows = rowsOf(fields());
  const seconds = speed ? `, ${inTime(rows / speed)} here` : "";
  const most = mode === "certify" ? "up to " : "";
  element("cost").textContent = `Costs ${most}${whole(rows)} rows${seconds}.`;
}

// A change of the mode keeps fields that the user has set, where the new mode takes them.
function fitToMode() {
  const isPurify = element("mode").value === "purify";
  const [usual, other] = isPurify ? ["0.121", "0.25"] : ["0.25", "0.121"];
  if (element("sigma").value === other) element("sigma").value = usual;
  element("n").max = isPurify ? 16 : 100000;
  if (isPurify) element("n").value = "";
  fit();
}

export async function measureSpeed() {
  speed = (await readStatus())?.speed ?? speed;
  fit();
}

function busy(isBusy) {
  element("ask").disabled = isBusy;
  element("cancel").hidden = element("watching").hidden = !isBusy;
  element("proven").textContent = element("left").textContent = "";
  element("climb").replaceChildren();
}

function clear() {
  element("problem").textContent = "";
  element("empty").hidden = true;
  element("progress").value = 0;
  for (const name of ["answer", "take", "deeper"]) element(name).hidden = true;
  showVotes([]);
}

export async function ask(event) {
  event.preventDefault();
  if (!chosenPicture()) {
    element("problem").textContent = "Choose a picture first.";
    return;
  }
  const mine = running = new AbortController();
  clear();
  markFields([]);
  busy(true);
  element("result").scrollIntoView({ block: "nearest" });
  const asked = fields();
  try {
    const answer = await answered(asked, mine);
    busy(false);
    showAnswer(answer, asked, modelOf(asked.task)?.largest_sigma ?? 4);
  } catch (problem) {
    if (mine !== running) return;
    busy(false);
    element("empty").hidden = false;
    element("problem").textContent = mine.signal.aborted ? "Cancelled." : inWords(problem);
    markFields((problem.errors ?? []).map(({ field }) => field));
  }
  measureSpeed();
}

// Marks the fields that the service refused, and goes to the first.
function markFields(names) {
  const inputs = [...element("question").querySelectorAll("input, select")];
  for (const input of inputs) input.setAttribute("aria-invalid", names.includes(input.id));
  const first = inputs.find((input) => names.includes(input.id));
  if (!first) return;
  element("advanced").open ||= element("advanced").contains(first);
  first.focus();
}

async function answered(asked, mine) {
  const headers = { Prefer: "respond-async" };
  const job = await request("predict", { method: "POST", body: formOf(asked), headers });
  mine.job = job.id;
  if (mine.signal.aborted) {
    send(`jobs/${job.id}`, { method: "DELETE" });
    throw {};
  }
  const climb = new Climb(rowsOf(asked), asked.target_radius);
  const started = Date.now();
  const heard = {
    progress: ({ progress, rows_done: done, rows }) => {
      element("progress").value = progress;
      const seconds = ((Date.now() - started) / 1000) * (1 / progress - 1);
      const left = progress > 0.05 ? `, ${inTime(seconds)} left at most` : "";
      element("left").textContent = `${whole(done)} of ${whole(rows)} rows${left}`;
    },
    bound: (bound) => climb.add(bound),
    result: (answer) => answer,
    problem: (problem) => {
      throw { problem };
    },
  };
  return follow(job.id, heard, mine.signal);
}

function cancel() {
  running.abort();
  if (running.job) send(`jobs/${running.job}`, { method: "DELETE" });
}

// Asks again with another number of copies, as an abstention advises.
export function askWith(n) {
  element("n").value = n;
  element("question").requestSubmit();
}

export function takeQuestions() {
  element("question").addEventListener("submit", ask);
  element("cancel").addEventListener("click", cancel);
  for (const name of ["mode", "target_radius", "n", "task"]) {
    element(name).addEventListener("input", fit);
  }
  element("mode").addEventListener("change", fitToMode);
  fit();  // A browser may have kept the fields of an earlier visit.
}
