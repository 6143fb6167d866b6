// What the networks see of noisy copies, and changes of the picture that test the radius.

import { element, make, picture } from "./dom.js";
import { demonstrate, inWords, predict } from "./server.js";
import { draw } from "./statistics.js";
import { down } from "./words.js";

const LARGEST_EPSILON = 16;

let shown = null;

// Offers both for an answer of the mode `certify`, whose votes are of noisy copies.
export function showDeeper(answer, asked) {
  shown = { answer, asked, rows: null };
  element("deeper").hidden = answer.mode !== "certify";
  element("rows").replaceChildren();
  element("pushed").replaceChildren();
  for (const name of ["inside-problem", "push-problem"]) element(name).textContent = "";
  const slider = element("epsilon");
  const middle = answer.radius || answer.sigma;
  slider.max = Math.min(LARGEST_EPSILON, Math.ceil(middle * 400) / 100);
  slider.value = down(middle * 0.9, 2) || 0.01;
  showLength();
}

function showLength() {
  const { radius } = shown.answer;
  const length = Number(element("epsilon").value);
  const where = !radius ? "" : length < radius ? " (inside the radius)" : " (beyond the radius)";
  element("epsilon-value").textContent = length.toFixed(2) + where;
}

const ofQuestion = ({ image, task, sigma }, more) => ({ image, task, sigma, ...more });

async function rows(mine) {
  mine.rows ??= await demonstrate(ofQuestion(mine.asked, { kind: "rows" }));
  return mine.rows;
}

async function lookInside() {
  const mine = shown;
  element("look-inside").disabled = true;
  element("inside-problem").textContent = "";
  try {
    const { samples } = await rows(mine);
    if (mine !== shown) return;
    element("rows").replaceChildren(...samples.map(({ noisy, denoised, label }) =>
      make("figure", {},
        make("div", { className: "trio" }, picture(noisy, "with noise"),
          make("span", { textContent: "→", "aria-hidden": "true" }), picture(denoised, "denoised")),
        make("figcaption", { textContent: `votes for ${label}` }))));
  } catch (problem) {
    if (mine === shown) element("inside-problem").textContent = inWords(problem);
  } finally {
    element("look-inside").disabled = false;
  }
}

// The pixels (RGBA, 0 to 255) of a picture.
async function pixelsOf(source) {
  const image = picture(source, "");
  await image.decode();
  const canvas = make("canvas", { width: image.naturalWidth, height: image.naturalHeight });
  const context = canvas.getContext("2d");
  context.drawImage(image, 0, 0);
  return { canvas, context, data: context.getImageData(0, 0, canvas.width, canvas.height) };
}

const isColor = (index) => index % 4 !== 3;

// A change in a random direction, rounded to the grid and cut to [0, 255], at most `epsilon` long.
async function changedAtRandom(seen, epsilon) {
  const { canvas, context, data } = await pixelsOf(seen);
  const before = Float64Array.from(data.data);
  const direction = before.map((_, index) => (isColor(index) ? draw() : 0));
  const length = Math.hypot(...direction);
  let scale = (epsilon * 255) / length;
  let l2 = Infinity;
  for (; l2 > epsilon; scale *= 0.99) {
    let sum = 0;
    before.forEach((value, index) => {
      data.data[index] = Math.round(value + scale * direction[index]);
      sum += (data.data[index] - value) ** 2;
    });
    l2 = Math.sqrt(sum) / 255;
  }
  context.putImageData(data, 0, 0);
  return { image: canvas.toDataURL("image/png"), l2 };
}

function verdict(answer, l2) {
  const { label, radius, abstained } = shown.answer;
  const isInside = l2 < radius;
  if (abstained) return ["", `Nothing was certified. The changed picture gets: ${answer.label ?? "no answer"}.`];
  if (isInside && answer.abstained) {
    return ["warn", "No answer this time. An abstention inside the radius contradicts nothing: the " +
      "votes of the changed picture were too close to prove its label."];
  }
  if (isInside && answer.label === label) return ["good", `Inside the radius: still ${label}, as certified.`];
  if (isInside) {
    return ["bad", `Inside the radius, and ${answer.label}: one of the two statements is wrong. That ` +
      `happens with probability ${2 * answer.alpha} at most. Please report it.`];
  }
  if (answer.abstained) return ["warn", "Beyond the radius: no answer."];
  return answer.label === label ?
    ["good", `Beyond the radius, and still ${label}. The radius is what is proven; the label may hold farther.`] :
    ["warn", `Beyond the radius the label broke: ${answer.label}.`];
}

async function changed(mine, kind, epsilon) {
  if (kind === "random") {
    const { seen } = await rows(mine);
    return { seen, kind: "random", ...(await changedAtRandom(seen, epsilon)) };
  }
  const found = await demonstrate(ofQuestion(mine.asked, { kind: "attack", epsilon }));
  return { ...found, kind: `worst found by ${found.steps} PGD steps` };
}

async function push(event) {
  event.preventDefault();
  const mine = shown;
  const kind = element("push").elements.kind.value;
  element("push-button").disabled = true;
  element("push-problem").textContent = "";
  element("pushed").replaceChildren(make("p", { className: "hint", textContent: "Asking…" }));
  try {
    const { seen, image, l2, kind: words } = await changed(mine, kind, Number(element("epsilon").value));
    const blob = await (await toBlob(image));
    const file = new File([blob], "changed.png");
    const answer = await predict({ ...mine.asked, image: file });
    if (mine !== shown) return;
    const [tone, sentence] = verdict(answer, l2);
    const proven = answer.radius ? ` Its radius is ${down(answer.radius, 3)}.` : "";
    element("pushed").replaceChildren(
      make("div", { className: "compare" }, compared(seen, "as the network sees it"),
        compared(image, `changed by ${l2.toFixed(3)} (${words})`),
        compared(await difference(seen, image), "the change, ten times as strong")),
      make("p", { className: `verdict ${tone}`, textContent: sentence + proven }));
  } catch (problem) {
    if (mine !== shown) return;
    element("pushed").replaceChildren();
    element("push-problem").textContent = inWords(problem);
  } finally {
    element("push-button").disabled = false;
  }
}

const compared = (source, words) =>
  make("figure", {}, picture(source, words), make("figcaption", { textContent: words }));

// Ten times the change, around gray.
async function difference(seen, image) {
  const [before, after] = [await pixelsOf(seen), await pixelsOf(image)];
  after.data.data.forEach((value, index, all) => {
    if (isColor(index)) all[index] = 128 + 10 * (value - before.data.data[index]);
  });
  after.context.putImageData(after.data, 0, 0);
  return after.canvas.toDataURL("image/png");
}

// The file of a data: address; the page's policy lets no request go there.
async function toBlob(address) {
  const bytes = Uint8Array.from(atob(address.split(",")[1]), (letter) => letter.charCodeAt(0));
  return new Blob([bytes], { type: "image/png" });
}

export function watchDeeper() {
  element("look-inside").addEventListener("click", lookInside);
  element("epsilon").addEventListener("input", showLength);
  element("push").addEventListener("submit", push);
}
