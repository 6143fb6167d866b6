// Checks a certificate by the service's own keys.

import { acceptDrops, element, make } from "./dom.js";
import { inWords, request } from "./server.js";

const OUTCOMES = new Map([[true, ["passed", "good"]], [false, ["failed", "bad"]], [null, ["not checked", ""]]]);

function listed({ name, passed, detail }) {
  const [words, tone] = OUTCOMES.get(passed);
  return make("li", {}, make("span", { className: `badge ${tone}`, textContent: words }),
    ` ${name}: ${detail}`);
}

async function verify(file) {
  element("checked").replaceChildren();
  element("verify-problem").textContent = "";
  try {
    const { passed, document, checks } = await request("certificates/verify", {
      method: "POST", body: await file.text(), headers: { "Content-Type": "application/json" },
    });
    element("checked").replaceChildren(
      make("h2", { textContent: passed ? "The certificate holds" : "The certificate does not hold" }),
      ...(document && passed ? [make("p", { textContent: document.statement })] : []),
      make("ul", {}, ...checks.map(listed)));
  } catch (problem) {
    element("verify-problem").textContent = inWords(problem);
  }
}

export function watchVerifying() {
  acceptDrops(element("certificate-drop"), verify);
  element("certificate-file").addEventListener("change", (event) => {
    const [file] = event.target.files;
    if (file) verify(file);
    event.target.value = "";
  });
}
