// The network runs in the visitor's browser: onnxruntime-web on the pixels of a canvas.
import * as ort from "./ort.wasm.min.mjs";

export const place = "browser";
export const parallel = 1;
const MOST_PIXELS = 12e6; // larger pictures are drawn smaller, as phones cannot hold their canvas
let session;
let network;

ort.env.wasm.numThreads = 1; // threads need headers that a plain host does not send
ort.env.wasm.wasmPaths = new URL("./", import.meta.url).href;

/** The network: {name, classes, megabytes, explains, unlike_above}; loads it. */
export async function about() {
  network = await (await reach("network.json")).json();
  const content = await (await reach("network.onnx")).arrayBuffer();
  session = await ort.InferenceSession.create(new Uint8Array(content), { executionProviders: ["wasm"] });
  return network;
}

/** What the network says of a file: {classes: [{class, probability}], unlike?, unlike_score?}. */
export async function classify(file) {
  const { pixels, height, width } = await rgb(file);
  const images = new ort.Tensor("uint8", pixels, [1, height, width, 3]);
  const tells = typeof network.unlike_above === "number";
  const outputs = await session.run({ images }, tells ? ["probabilities", "unlike"] : ["probabilities"]);
  const shares = Array.from(outputs.probabilities.data);
  const order = shares.map((_, index) => index).sort((a, b) => shares[b] - shares[a] || a - b);
  const classes = order.slice(0, 5).map((index) => ({ class: network.classes[index], probability: shares[index] }));
  if (!tells) return { classes };
  const score = outputs.unlike.data[0];
  return { classes, unlike: score > network.unlike_above, unlike_score: score };
}

/** The pixels of a picture as a viewer shows it: upright, in RGB, transparent parts on white. */
async function rgb(file) {
  let bitmap;
  try {
    const how = { imageOrientation: "from-image", premultiplyAlpha: "none", colorSpaceConversion: "none" };
    bitmap = await createImageBitmap(file, how);
  } catch (error) {
    throw Object.assign(error, { key: "unreadable" });
  }
  const scale = Math.min(1, Math.sqrt(MOST_PIXELS / (bitmap.width * bitmap.height)));
  const width = Math.max(1, Math.round(scale * bitmap.width));
  const height = Math.max(1, Math.round(scale * bitmap.height));
  const canvas = document.createElement("canvas");
  canvas.width = width;
  canvas.height = height;
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.fillStyle = "white";
  context.fillRect(0, 0, width, height);
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, 0, 0, width, height);
  bitmap.close();
  const rgba = context.getImageData(0, 0, width, height).data;
  const pixels = new Uint8Array(3 * width * height);
  for (let from = 0, to = 0; from < rgba.length; from += 4, to += 3) {
    pixels[to] = rgba[from];
    pixels[to + 1] = rgba[from + 1];
    pixels[to + 2] = rgba[from + 2];
  }
  return { pixels, height, width };
}

async function reach(name) {
  const answer = await fetch(new URL(name, import.meta.url));
  if (!answer.ok) throw new Error(`${name}: ${answer.status}`);
  return answer;
}
