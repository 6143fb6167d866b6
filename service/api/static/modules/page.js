// The page: its views, and what starts with it.

import { watchDeeper } from "./deeper.js";
import { element } from "./dom.js";
import { watchKey } from "./key.js";
import { offerPictures } from "./picture.js";
import { askWith, knownWords, listTasks, measureSpeed, takeQuestions } from "./question.js";
import { showStatus } from "./status.js";
import { watchTaking } from "./take.js";
import { look, offerWishes, offerWords } from "./tasks.js";
import { watchVerifying } from "./verify.js";

function showView() {
  const views = [...document.querySelectorAll("[data-view]")];
  const named = views.find((view) => `#${view.dataset.view}` === location.hash) ?? views[0];
  for (const view of views) view.hidden = view !== named;
  for (const link of document.querySelectorAll("nav a")) {
    if (link.hash === `#${named.dataset.view}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  showStatus();
}

async function begin() {
  if (!(await listTasks())) return false;
  offerWords(knownWords());
  look();
  measureSpeed();
  showStatus();
  return true;
}

window.addEventListener("hashchange", showView);
for (const kind of ["dragover", "drop"]) {
  window.addEventListener(kind, (event) => event.preventDefault());  // No dropped file replaces the page.
}
element("retry").addEventListener("click", (event) => askWith(event.target.value));
offerPictures(() => {
  element("problem").textContent = "";
});
takeQuestions();
watchDeeper();
watchTaking();
watchVerifying();
offerWishes();
showView();
watchKey(begin);
