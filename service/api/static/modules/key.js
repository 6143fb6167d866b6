// The key that a service may require, kept until the tab is closed.

import { element } from "./dom.js";
import { currentKey, keep, onRefusal } from "./server.js";

function note(words, isProblem) {
  element("access").hidden = false;
  element("key-entry").hidden = Boolean(currentKey());
  element("forget").hidden = !currentKey();
  element("access-note").classList.toggle("problem", isProblem);
  element("access-note").textContent = words;
}

// `begin` loads what the page shows, and returns whether the service accepted the key.
export function watchKey(begin) {
  onRefusal((refused) => {
    keep(null);
    note(refused ? "The service does not know this key." :
      "This service answers those who have a key. Enter yours.", true);
  });
  const started = async () => {
    if (!(await begin())) return;
    if (currentKey()) note("Your key is kept until you close this tab.", false);
    element("access").reset();
  };
  element("access").addEventListener("submit", (event) => {
    event.preventDefault();
    keep(element("key").value);
    for (const problem of document.querySelectorAll("[role=alert]")) problem.textContent = "";
    started();
  });
  element("forget").addEventListener("click", () => {
    keep(null);
    location.reload();
  });
  return started();
}
