// The page: takes pictures in, shows what the network says of them. The network itself is behind backend.js.
import { about, classify, parallel, place } from "./backend.js";
import { words } from "./words.js";

const IMAGE = /\.(jpe?g|png|webp|gif|bmp|tiff?|avif|heic|heif)$/i;
const element = (id) => document.getElementById(id);
let language = first_language();
let network = null;
let message = ["loading", {}, false]; // key, values, whether it is an error
let table = []; // {file, name, answer | error}, one for each row
let current = null; // the row that is shown large
let round = 0; // counts what the user asked for; older answers are dropped

function first_language() {
  let kept = null;
  try {
    kept = localStorage.getItem("language");
  } catch {} // a browser may forbid it
  if (kept in words) return kept;
  return (navigator.languages?.[0] ?? navigator.language ?? "en").startsWith("zh") ? "zh" : "en";
}

function say(key, values = {}) {
  return words[language][key].replace(/\{(\w+)\}/g, (_, name) => values[name]);
}

const share = (probability) => `${(100 * probability).toFixed(1)} %`;

function tell(key, values = {}, bad = false) {
  message = [key, values, bad];
  element("status").textContent = say(key, values);
  element("status").classList.toggle("bad", bad);
}

/** Writes every word of the page in the chosen language. */
function translate() {
  document.documentElement.lang = language === "zh" ? "zh-CN" : "en";
  for (const node of document.querySelectorAll("[data-word]")) node.textContent = say(node.dataset.word);
  element("language").textContent = say("other");
  element("language").lang = language === "zh" ? "en" : "zh-CN";
  element("privacy").textContent = say(`privacy_${place}`);
  document.title = say("title");
  if (network) element("network").textContent = say("network", { name: network.name, count: network.classes.length });
  tell(...message);
  if (current) show(current);
  if (!element("many").hidden) {
    element("summary").textContent = say("summary", { total: table.length });
    for (const row of table) if (row.answer || row.error) fill(row);
  }
}

function reason(error) {
  return say(error.key ?? "failed", { reason: error.message, megabytes: network?.megabytes });
}

/** Shows one picture and its classes. */
function show(row) {
  const { answer, error, name } = row;
  current = row;
  element("one").hidden = false;
  element("one").classList.toggle("busy", !answer && !error);
  element("file").textContent = name;
  element("picture").alt = say("alt", { file: name });
  const source = row.overlaid && answer?.overlay ? answer.overlay : url(row);
  if (element("picture").getAttribute("src") !== source) {
    element("picture").hidden = false;
    element("picture").src = source;
  }
  element("label").textContent = answer ? answer.classes[0].class : error ? reason(error) : "…";
  element("unlike").hidden = !answer?.unlike;
  element("bars").replaceChildren(...(answer?.classes ?? []).map(bar));
  element("why").hidden = !network?.explains || !answer;
  element("why").setAttribute("aria-pressed", String(Boolean(row.overlaid)));
  element("near").hidden = !answer?.nearest?.length;
  element("nearest").replaceChildren(...(answer?.nearest ?? []).map(neighbour));
}

function bar({ class: name, probability }) {
  const item = document.createElement("li");
  const track = make("div", "bar");
  const length = document.createElement("div");
  length.style.width = `${100 * probability}%`;
  track.setAttribute("aria-hidden", "true");
  track.append(length);
  item.append(make("span", "name", name), make("span", "share", share(probability)), track);
  return item;
}

function neighbour({ class: name, path, image }) {
  const item = document.createElement("li");
  if (image) {
    const picture = document.createElement("img");
    picture.src = image;
    picture.alt = path;
    item.append(picture);
  }
  item.append(make("span", "", name || path));
  return item;
}

function make(kind, style, text = "") {
  const node = document.createElement(kind);
  node.className = style;
  node.textContent = text;
  return node;
}

function url(row) {
  row.url ??= URL.createObjectURL(row.file);
  return row.url;
}

/** Writes the cells of one row of the table. */
function fill(row) {
  const { answer, error } = row;
  const [best] = answer?.classes ?? [];
  const text = document.createElement("td");
  text.textContent = best ? best.class : reason(error);
  text.classList.toggle("bad", Boolean(error));
  if (answer?.unlike) text.append(make("small", "", say("unlike_short")));
  row.cells.replaceChildren(row.cells.firstElementChild, text, make("td", "share", best ? share(best.probability) : ""));
}

function first_cell(row) {
  const cell = document.createElement("td");
  const inside = make("div", "cell");
  const picture = document.createElement("img");
  picture.loading = "lazy";
  picture.alt = "";
  picture.src = url(row);
  picture.addEventListener("error", () => picture.remove());
  const button = make("button", "link", row.name);
  button.type = "button";
  button.addEventListener("click", () => {
    show(row);
    element("label").focus();
    element("one").scrollIntoView({ block: "start" });
  });
  inside.append(picture, button);
  cell.append(inside);
  return cell;
}

/** Classifies files: one is shown large, several become a table. */
async function take(files) {
  const pictures = files.filter(({ file }) => file.type.startsWith("image/") || IMAGE.test(file.name));
  // a single file is tried whatever it is called: the server says what is wrong with it
  const rows = pictures.length || files.length !== 1 ? pictures : files;
  if (!network) return;
  if (!rows.length) return tell("nothing", {}, true);
  const turn = (round += 1);
  for (const row of table) if (row.url) URL.revokeObjectURL(row.url);
  table = rows;
  current = null;
  element("many").hidden = rows.length === 1;
  element("one").hidden = true;
  if (rows.length === 1) await one(rows[0], turn);
  else await many(rows, turn);
}

async function one(row, turn) {
  show(row);
  tell("looking", { file: row.name });
  await look(row);
  if (turn !== round) return;
  show(row);
  if (row.error) tell(row.error.key ?? "failed", { reason: row.error.message, megabytes: network.megabytes }, true);
  else tell("done", { file: row.name, class: row.answer.classes[0].class, share: share(row.answer.classes[0].probability) });
}

async function many(rows, turn) {
  element("summary").textContent = say("summary", { total: rows.length });
  element("progress").max = rows.length;
  element("progress").value = 0;
  element("progress").hidden = element("stop").hidden = false;
  for (const row of rows) {
    row.cells = document.createElement("tr");
    row.cells.append(first_cell(row), make("td", "", "…"), make("td", "share"));
  }
  element("rows").replaceChildren(...rows.map((row) => row.cells));
  let next = 0;
  let count = 0;
  const worker = async () => {
    while (next < rows.length && turn === round) {
      const row = rows[next++];
      await look(row);
      if (turn !== round) return;
      fill(row);
      element("progress").value = count += 1;
      if (count % 10 === 0) tell("working", { count, total: rows.length });
    }
  };
  tell("working", { count, total: rows.length });
  await Promise.all(Array.from({ length: parallel }, worker));
  if (turn === round) finish();
}

function finish() {
  const failed = table.filter((row) => row.error).length;
  const count = table.filter((row) => row.answer).length;
  element("progress").hidden = element("stop").hidden = true;
  tell(failed ? "finished_failed" : "finished", { count, failed });
}

/** Asks the network about a row; what goes wrong is kept in the row. */
async function look(row, explain = false) {
  try {
    if (row.file.size > 1e6 * (network.megabytes ?? Infinity)) throw Object.assign(new Error(), { key: "too_large" });
    row.answer = await classify(row.file, explain);
    delete row.error;
  } catch (error) {
    row.error = error;
  }
}

async function explain() {
  const row = current;
  row.overlaid = !row.overlaid;
  if (row.overlaid && !row.answer.overlay) {
    tell("looking", { file: row.name });
    await look(row, true);
    const { error } = row;
    delete row.error; // the classes are there still
    if (error) {
      row.overlaid = false;
      return tell(error.key ?? "failed", { reason: error.message }, true);
    }
  }
  if (row !== current) return;
  show(row);
  tell(row.overlaid ? "looked" : "ready");
}

/** The table as CSV, as ``finetune101 predict --csv`` writes it. */
function csv() {
  const width = Math.max(1, ...table.map((row) => row.answer?.classes.length ?? 0));
  const numbers = Array.from({ length: width }, (_, k) => k + 1);
  const head = ["path", ...numbers.flatMap((k) => [`class_${k}`, `probability_${k}`]), "unlike", "unlike_score"];
  const lines = table
    .filter((row) => row.answer)
    .map(({ name, answer }) => [
      cell(name),
      ...answer.classes.flatMap((one) => [cell(one.class), one.probability.toFixed(6)]),
      String(answer.unlike ?? ""),
      answer.unlike_score?.toFixed(6) ?? "",
    ]);
  const quoted = (text) => (/[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);
  return [head, ...lines].map((line) => `${line.map(quoted).join(",")}\n`).join("");
}

/** Text that no spreadsheet takes for a formula; the same as ``evaluation.predictions.cell``. */
function cell(text) {
  const unseen = /[\x00-\x1f\x7f-\x9f\ud800-\udfff]|\\(?=u[0-9a-f]{4})/gu;
  const plain = text.replace(unseen, (sign) => `\\u${sign.charCodeAt(0).toString(16).padStart(4, "0")}`);
  return /^'*[-=+@]/.test(plain) ? `'${plain}` : plain;
}

function download() {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([csv()], { type: "text/csv;charset=utf-8" }));
  link.download = "predictions.csv";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

/** Every file of what was dropped, those in folders as well. */
async function dropped(items) {
  const files = [];
  const walk = async (entry, folder) => {
    if (entry.name.startsWith(".")) return;
    if (entry.isFile) {
      const file = await new Promise((resolve, reject) => entry.file(resolve, reject));
      files.push({ file, name: folder + file.name });
      return;
    }
    const reader = entry.createReader();
    for (;;) {
      const entries = await new Promise((resolve, reject) => reader.readEntries(resolve, reject));
      if (!entries.length) return;
      for (const one of entries) await walk(one, `${folder}${entry.name}/`);
    }
  };
  // the list is empty after the first wait, so all entries are asked for before
  const entries = Array.from(items, (item) => item.webkitGetAsEntry?.()).filter(Boolean);
  for (const entry of entries) await walk(entry, "");
  return files;
}

const named = (list) => Array.from(list, (file) => ({ file, name: file.webkitRelativePath || file.name }));

for (const [button, input] of [["choose", "files"], ["photograph", "camera"], ["folder", "tree"]]) {
  element(button).addEventListener("click", () => element(input).click());
  element(input).addEventListener("change", (event) => {
    const files = named(event.target.files).filter(({ file }) => !file.name.startsWith("."));
    if (files.length) take(files);
    event.target.value = "";
  });
}
element("language").addEventListener("click", () => {
  language = language === "en" ? "zh" : "en";
  try {
    localStorage.setItem("language", language);
  } catch {} // the page forgets it then
  translate();
});
element("picture").addEventListener("error", () => {
  element("picture").hidden = true; // a format that this browser cannot show, though the network may read it
});
element("why").addEventListener("click", explain);
element("download").addEventListener("click", download);
element("stop").addEventListener("click", () => {
  round += 1;
  table = table.filter((row) => row.answer || row.error || row.cells.remove());
  finish();
});
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  element("drop").classList.add("over");
});
for (const kind of ["dragleave", "drop"]) {
  document.addEventListener(kind, () => element("drop").classList.remove("over"));
}
document.addEventListener("drop", async (event) => {
  event.preventDefault();
  take(await dropped(event.dataTransfer.items));
});
document.addEventListener("paste", (event) => {
  const files = Array.from(event.clipboardData.files);
  if (files.length) take(files.map((file) => ({ file, name: file.name || say("pasted") })));
});

element("stuck").remove(); // it is for browsers that do not run modules of a file
translate();
try {
  network = await about();
  message = ["ready", {}, false];
  document.documentElement.dataset.ready = "yes"; // for whoever drives the page by a program
} catch (error) {
  message = error.key ? [error.key, {}, true] : ["no_network", { reason: error.message }, true];
}
translate();
