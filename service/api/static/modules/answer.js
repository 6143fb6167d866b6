// The answer: label, radius, and what they mean.

import { showDeeper } from "./deeper.js";
import { element, make } from "./dom.js";
import { offerToTake } from "./take.js";
import { showVotes } from "./votes.js";
import {
  advice, among, down, inGrayLevels, largestRadius, runnerUp, statement, targetInWords, whole,
} from "./words.js";

const RETRIED_ROWS = 100_000;

function badge(answer) {
  if (answer.abstained) return ["abstained", "badge warn"];
  return answer.certified ? ["certified", "badge good"] : ["not certified", "badge"];
}

function showGauge(answer) {
  element("gauge").hidden = !answer.certified;
  if (!answer.certified) return;
  const largest = largestRadius(answer);
  const share = Math.min(1, answer.radius / largest);
  const gauge = element("gauge").querySelector(".gauge");
  gauge.firstElementChild.style.width = `${share * 100}%`;
  gauge.setAttribute("aria-label", `radius ${down(answer.radius, 3)} of at most ${down(largest, 3)}`);
  element("radius").textContent = `radius ${down(answer.radius, 3)}`;
  element("largest").textContent = `of ${down(largest, 3)}, if all ${whole(answer.n)} copies agreed`;
}

export function showAnswer(answer, asked, largestSigma) {
  element("label").textContent = answer.abstained ? "No answer" : answer.label;
  [element("badge").textContent, element("badge").className] = badge(answer);
  showGauge(answer);
  element("statement").textContent = statement(answer);
  element("levels").replaceChildren(
    ...inGrayLevels(answer).map((words) => make("li", { textContent: words })));
  element("reached").textContent = targetInWords(answer);
  element("runner-up").textContent = runnerUp(answer);
  element("advice").textContent = advice(answer, largestSigma);
  element("among").textContent = among(answer);
  const needed = answer.abstention?.rows_needed;
  element("retry").hidden = !needed || needed > RETRIED_ROWS;
  element("retry").textContent = needed ? `Ask with ${whole(needed)} copies` : "";
  element("retry").value = needed ?? "";
  showVotes(answer.counts);
  element("answer").hidden = false;
  offerToTake(answer, asked);
  showDeeper(answer, asked);
}
