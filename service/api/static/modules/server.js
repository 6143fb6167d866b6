// Requests to the service, with the caller's key where there is one.

let key = null;
try {
  key = sessionStorage.getItem("key");
} catch {
  // Storage is blocked: the key lasts as long as the page.
}

const refused = [];

export const currentKey = () => key;

// `heard` is called where a key is missing or unknown.
export const onRefusal = (heard) => refused.push(heard);

export function keep(given) {
  key = given;
  try {
    if (key) sessionStorage.setItem("key", key);
    else sessionStorage.removeItem("key");
  } catch {
    // As above.
  }
}

// Addresses are relative, so that the page works below any path.
export async function send(address, options = {}) {
  const sent = key;
  const headers = { ...options.headers, ...(sent && { Authorization: `Bearer ${sent}` }) };
  const response = await fetch(address, { ...options, headers });
  if (response.status === 401 && sent === key) refused.forEach((heard) => heard(sent));
  return response;
}

// The response's JSON; throws a problem document.
export async function request(address, options) {
  const response = await send(address, options).catch((error) => {
    if (error.name === "AbortError") throw error;
    throw { detail: "The service does not answer." };
  });
  const body = response.status === 204 ? null : await response.json();
  if (!response.ok) throw body;
  return body;
}

export function inWords(problem) {
  if (problem.status === 401) return "Enter a key first, at the top of the page.";
  return problem.detail || problem.title || String(problem);
}

const pause = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));

// A job's events until one of `heard` returns a value. An EventSource sends no Authorization, so
// the stream is read by hand.
export async function follow(job, heard, signal) {
  while (true) {
    try {
      const response = await send(`jobs/${job}/events`, { signal });
      if (response.ok) {
        for await (const { name, data } of eventsOf(response.body)) {
          const found = heard[name]?.(data);
          if (found) return found;
        }
      } else if (![429, 503].includes(response.status)) {
        throw { problem: await response.json() };
      }
    } catch (error) {
      if (error.problem) throw error.problem;
      if (signal.aborted) throw error;
      // Tried again, as where the stream ends before the job.
    }
    await pause(1000);
  }
}

async function* eventsOf(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (let part = await reader.read(); !part.done; part = await reader.read()) {
    const blocks = (rest + part.value).split("\r\n\r\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const [, name, data] = block.match(/^event: (.*?)\r\ndata: (.*)$/s) || [];
      if (name) yield { name, data: JSON.parse(data) };
    }
  }
}

// A demonstration, once it is done.
export async function demonstrate(fields, signal) {
  let found = await request("demonstrations", { method: "POST", body: formOf(fields), signal });
  while (found.status !== "done") {
    if (found.problem) throw found.problem;
    if (["failed", "cancelled"].includes(found.status)) throw { detail: "The pictures failed." };
    await pause(500);
    found = await request(`demonstrations/${found.id}`, { signal });
  }
  return found;
}

// A prediction that is waited for.
export const predict = (fields, signal) =>
  request("predict", { method: "POST", body: formOf(fields), signal });

export function formOf(fields) {
  const form = new FormData();
  for (const [name, value] of Object.entries(fields)) {
    if (value !== "" && value !== null) form.append(name, value);
  }
  return form;
}
