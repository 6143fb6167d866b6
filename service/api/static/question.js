"use strict";

let events = null;
let job = null;
let question = 0;

function busy(isBusy) {
  element("ask").disabled = isBusy;
  element("cancel").hidden = !isBusy;
  element("progress").hidden = !isBusy;
  element("proven").textContent = "";
  if (!isBusy && events) events.abort();
}

function fail(problem) {
  busy(false);
  element("problem").textContent = inWords(problem);
}

const onEvent = {
  progress: (status) => { element("progress").value = status.progress; },
  bound: ({ radius, rows }) => {
    const proven = radius ? `radius ${down(radius, 3)}` : "no radius";
    element("proven").textContent = `Proven so far: ${proven}, from ${whole(rows)} noisy copies.`;
  },
  result: show,
  problem: fail,
};

// An EventSource sends no Authorization, so the stream is read by hand.
async function follow(location) {
  const mine = events = new AbortController();
  while (!mine.signal.aborted) {
    try {
      const response = await send(location + "/events", { signal: mine.signal });
      if (response.ok) await read(response.body);
      else if (![429, 503].includes(response.status)) return fail(await response.json());
    } catch {
      // Tried again, as where the stream ends before the job.
    }
    await new Promise((resolve) => setTimeout(resolve, 1000));
  }
}

async function read(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (let part = await reader.read(); !part.done; part = await reader.read()) {
    const blocks = (rest + part.value).split("\r\n\r\n");
    rest = blocks.pop();
    blocks.forEach(act);
  }
}

function act(block) {
  const [, name, data] = block.match(/^event: (.*?)\r\ndata: (.*)$/s) || [];
  if (name in onEvent) onEvent[name](JSON.parse(data));
}

function fitToMode() {
  const certifies = element("mode").value === "certify";
  const target = element("target_radius");
  target.disabled = !certifies;
  element("n").placeholder = !certifies ? "100" : target.value ? "10000" : "1000";
}

async function ask(event) {
  event.preventDefault();
  const mine = ++question;
  job = null;
  busy(true);
  element("progress").value = 0;
  element("problem").textContent = "";
  element("answer").hidden = true;
  const form = new FormData();
  form.append("image", element("image").files[0]);
  for (const name of ["task", "mode", "sigma", "target_radius", "n"]) {
    const { value, disabled } = element(name);
    if (value && !disabled) form.append(name, value);
  }
  try {
    const headers = { Prefer: "respond-async" };
    const response = await send("predict", { method: "POST", body: form, headers });
    if (response.status !== 202) return fail(await response.json());
    const location = response.headers.get("Location");
    if (mine !== question) return send(location, { method: "DELETE" });
    job = location;
    follow(job);
  } catch {
    fail("The service does not answer.");
  }
}

async function listTasks() {
  try {
    const response = await send("models");
    if (response.status === 401) return false;
    const body = await response.json();
    if (!response.ok) throw body;
    const chosen = element("task").value;
    element("task").replaceChildren(...body.models.map((model) =>
      new Option(`${model.name || model.task} (${model.labels.length} labels)`, model.task)));
    if (body.models.some((model) => model.task === chosen)) element("task").value = chosen;
  } catch (problem) {
    fail(problem.detail ? problem : "The service does not answer.");
  }
  return true;
}
