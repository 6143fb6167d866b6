// Takes an answer away: as files, and as commands that ask the same again.

import { copy, element, save } from "./dom.js";
import { currentKey } from "./server.js";

let taken = null;

const service = () => new URL(".", document.baseURI).href;
const certificateName = () => `certificate-${taken.answer.certificate.document.id}.json`;

// A word for a POSIX shell.
const quoted = (word) => (/^[\w@%+=:,./-]+$/.test(word) ? word : `'${word.replaceAll("'", "'\\''")}'`);

function fieldsOf({ asked }) {
  const { image, ...others } = asked;
  return [image.name || "picture.png", Object.entries(others)];
}

function asCurl() {
  const [name, others] = fieldsOf(taken);
  const key = currentKey() ? " -H \"Authorization: Bearer $VOUCHSAFE_KEY\"" : "";
  const form = others.map(([field, value]) => ` -F ${quoted(`${field}=${value}`)}`).join("");
  return `curl -s${key} -F ${quoted(`image=@${name}`)}${form} ${service()}predict`;
}

function asPython() {
  const [name, others] = fieldsOf(taken);
  const key = currentKey() ? ", key=os.environ[\"VOUCHSAFE_KEY\"]" : "";
  const inPython = (value) => (Number.isNaN(Number(value)) ? JSON.stringify(value) : value);
  const more = others.map(([field, value]) => `, ${field}=${inPython(value)}`).join("");
  return `${key && "import os\n\n"}from vouchsafe import Client\n\n` +
    `with Client(${JSON.stringify(service())}${key}) as client:\n` +
    `    answer = client.predict(${JSON.stringify(name)}${more})\n` +
    "print(answer[\"label\"], answer[\"radius\"])\n";
}

export function offerToTake(answer, asked) {
  taken = { answer, asked };
  element("take").hidden = false;
  element("save").hidden = element("certificate").hidden = !answer.certificate;
  element("copied").textContent = "";
  if (answer.certificate) element("verify").textContent = `vouchsafe verify ${certificateName()}`;
}

export function watchTaking() {
  element("save").addEventListener("click", () => save(certificateName(), taken.answer.certificate));
  element("save-answer").addEventListener("click", () =>
    save(`answer-${taken.answer.id}.json`, taken.answer));
  element("copy-curl").addEventListener("click", () => copy(asCurl(), element("copied")));
  element("copy-python").addEventListener("click", () => copy(asPython(), element("copied")));
}
