// Asks the server, and draws what comes.
"use strict";
const el = Object.fromEntries([...document.querySelectorAll("[id]")].map(node => [node.id, node]));
const MOST_FRAMES = 50;
let models = [], model;

// In the tab's memory, and in its storage, which outlives a reload and which a browser may deny.
let apiKey = null;
try { apiKey = sessionStorage.getItem("key"); } catch { /* denied */ }

function keep(key) {
  apiKey = key;
  try { key ? sessionStorage.setItem("key", key) : sessionStorage.removeItem("key"); } catch { /* denied, or full */ }
}

async function ask(path, options = {}) {
  let response;
  try {
    // In a header, never in an address: addresses are logged.
    response = await fetch(path, {...options, headers: {...options.headers, ...(apiKey && {authorization: `Bearer ${apiKey}`})}});
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server cannot be reached.");
  }
  if (response.ok) return response;
  if (response.status === 401) {
    const tried = apiKey;
    keep(null);
    if (el.detail.open) el.detail.close();
    el.form.hidden = true;
    el.entrance.hidden = false;
    el.served.textContent = "This server needs an API key.";
    el.key.focus();
    throw new Error(tried ? "The server does not know this key, or not any more." : "");
  }
  let text = `${response.status} ${response.statusText}`;
  try {
    const {code, message} = (await response.json()).error;
    text = `${response.status} ${code}: ${message}`;
  } catch { /* not from ddpm-serve: a proxy's page, say */ }
  const after = response.headers.get("retry-after");
  throw new Error(after ? `${text} (Retry-After: ${after} s)` : text);
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const {done, value} = await reader.read().catch(error => {
      throw error.name === "AbortError" ? error : new Error("The connection to the server broke.");
    });
    if (done) return;
    const blocks = (rest + value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const field = name => block.split("\n").find(line => line.startsWith(name + ": "))?.slice(name.length + 2);
      if (field("data")) yield {name: field("event"), data: JSON.parse(field("data"))};  // or it is a comment
    }
  }
}

// Follows a denoising: onFrame(picture, step, steps), the finished one included. Resolves to what was made.
async function denoise(fields, signal, onStart, onFrame) {
  const frames = Math.min(model.limits.frames, MOST_FRAMES, Number(el.steps.value) + 1);
  const query = new URLSearchParams({...fields, frames, every_frame: true, format: "sse"});
  // fetch and not EventSource, which hides the status and the message of a refusal
  const response = await ask("diffusion-sequence?" + query, {signal, headers: {accept: "text/event-stream"}});
  onStart(response.headers.get("x-ddpm-seed"));  // the event's own number is rounded above 2^53
  for await (const {name, data} of events(response)) {
    if (name === "frame") onFrame(await decode(data.png), data.step, data.steps);
    if (name === "error") throw new Error(`${data.error.code}: ${data.error.message}`);
    if (name === "completed") {
      onFrame(await decode(data.png), data.steps, data.steps);
      return data;
    }
  }
  throw new Error("The stream ended before the images were done.");
}

const bytes = base64 => Uint8Array.from(atob(base64), character => character.charCodeAt(0));
const decode = base64 => createImageBitmap(new Blob([bytes(base64)], {type: "image/png"}));

function draw(canvas, picture, i = 0) {  // image i of a grid of one row
  const [, height, width] = model.image_shape;
  canvas.width = width;
  canvas.height = height;
  canvas.getContext("2d").drawImage(picture, i * width, 0, width, height, 0, 0, width, height);
}

function node(tag, text = "", properties = {}) {
  const made = Object.assign(document.createElement(tag), properties);
  if (text) made.textContent = text;  // never markup: names come from a checkpoint, and a checkpoint from anywhere
  return made;
}

function complain(text, where = el.alert) {
  where.className = text ? "alert" : "";
  where.textContent = text;
}
