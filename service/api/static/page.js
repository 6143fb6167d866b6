"use strict";

const element = (id) => document.getElementById(id);

let key = null;
try {
  key = sessionStorage.getItem("key");
} catch {
  // Storage is blocked: the key lasts as long as the page.
}

function keep(given) {
  key = given;
  try {
    if (key) sessionStorage.setItem("key", key);
    else sessionStorage.removeItem("key");
  } catch {
    // As above.
  }
}

// Every request goes through here: with the key, where there is one.
async function send(address, options = {}) {
  const sent = key;
  const headers = { ...options.headers, ...(sent && { Authorization: `Bearer ${sent}` }) };
  const response = await fetch(address, { ...options, headers });
  if (response.status === 401 && sent === key) refuseKey();
  return response;
}

function noteKey(note, isProblem) {
  element("access").hidden = false;
  element("forget").hidden = !key;
  element("access-note").classList.toggle("problem", isProblem);
  element("access-note").textContent = note;
}

function refuseKey() {
  const note = key ? "The service does not know this key." :
    "This service answers those who have a key. Enter yours.";
  keep(null);
  noteKey(note, true);
}

function useKey(event) {
  event.preventDefault();
  keep(element("key").value);
  for (const name of ["problem", "refusal"]) element(name).textContent = "";
  begin();
}

function forgetKey() {
  keep(null);
  location.reload();
}

async function begin() {
  if (!await listTasks()) return;
  if (key) noteKey("Your key is kept until you close this tab.", false);
  element("access").reset();
  look();
}

function inWords(problem) {
  if (problem.status === 401) return "Enter a key first, at the top of the page.";
  return problem.detail || problem.title || String(problem);
}

element("wish").addEventListener("submit", wish);
element("question").addEventListener("submit", ask);
element("cancel").addEventListener("click", () => {
  ++question;
  if (job) send(job, { method: "DELETE" });
  fail("Cancelled.");
});
element("mode").addEventListener("change", fitToMode);
element("target_radius").addEventListener("input", fitToMode);
element("save").addEventListener("click", saveCertificate);
element("image").addEventListener("change", (event) => {
  const [file] = event.target.files;
  URL.revokeObjectURL(element("preview").src);
  element("preview").hidden = !file;
  if (file) element("preview").src = URL.createObjectURL(file);
});
element("access").addEventListener("submit", useKey);
element("forget").addEventListener("click", forgetKey);
fitToMode();  // A browser may have kept the fields of an earlier visit.
begin();
