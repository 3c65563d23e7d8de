// The network runs in the server that sent this page.
export const place = "server";
export const parallel = 4;

/** The network: {name, classes, megabytes, explains}. */
export async function about() {
  const answer = await reach("network");
  return answer.json();
}

/** What the network says of a file: {classes: [{class, probability}], unlike?, overlay?, nearest?}. */
export async function classify(file, explain = false) {
  const form = new FormData();
  form.append("file", file, file.name);
  for (let attempt = 0; ; attempt += 1) {
    const answer = await reach(`predict?top_k=5&explain=${Number(explain)}`, { method: "POST", body: form });
    if (answer.status === 503 && attempt < 5) {
      await new Promise((resolve) => setTimeout(resolve, 1000 * (Number(answer.headers.get("retry-after")) || 1)));
      continue;
    }
    const value = await answer.json();
    if (answer.ok) return value.predictions[0];
    const key = { 408: "slow", 413: "too_large", 422: "unreadable", 503: "busy" }[answer.status] ?? "failed";
    throw Object.assign(new Error(value.error), { key });
  }
}

async function reach(...request) {
  try {
    return await fetch(...request);
  } catch (error) {
    throw Object.assign(error, { key: "unreachable" });
  }
}
