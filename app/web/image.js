// One image, large: its denoising, its address, its code, and other samplers.
let shown, watching = null;  // the image: its request's fields, and by view its frames {step, picture}

async function enlarge(image, label) {
  if (!valid()) return;
  watching?.abort();
  const mine = watching = new AbortController();
  const classes = model.class_names, index = classes.length ? image % classes.length : null;
  const name = label ?? (classes.length ? classes[index] : null);
  shown = {name, image, fields: {}, xt: [], x0: [], png: null};
  el.title.textContent = name ?? `Image ${image + 1}`;
  complain("", el.detail_alert);
  el.facts.replaceChildren();
  el.code.hidden = el.download.hidden = true;
  el.comparison.open = el.repaint.open = false;
  el.scrub.disabled = true;
  el.scrub.max = el.scrub.value = 0;
  el.count.textContent = "";
  el.halt.hidden = false;
  el.detail_status.textContent = "Waiting for the first step…";
  for (const canvas of [el.xt, el.x0]) [canvas.height, canvas.width] = model.image_shape.slice(1);
  if (!el.detail.open) el.detail.showModal();
  try {
    if (!el.seed.value) el.seed.value = String(crypto.getRandomValues(new Uint32Array(1))[0]);  // of both views the same
    shown.fields = {...settings(), n: 1, index: image, ...(name !== null && {class_label: name})};
    remember({image, ...(label !== undefined && {class: label})});
    const done = await Promise.all(["xt", "x0"].map(view =>
      denoise({...shown.fields, view}, mine.signal, () => {}, (picture, step, steps) => {
        if (mine.signal.aborted) return;  // the other view has said so
        if (shown[view].at(-1)?.step !== step) shown[view].push({step, picture});
        shown.steps = steps;
        if (view === "xt") look(shown.xt.length - 1);
        else draw(el.x0, picture);
        el.detail_status.textContent = "Denoising…";
      })));
    finish(done[0]);
  } catch (error) {
    if (mine !== watching) return;  // another image was chosen
    const came = shown.xt.length;
    el.detail_status.textContent = (error.name === "AbortError" ? "Stopped." : "") + (came ? " What came is kept: drag the slider." : "");
    if (error.name !== "AbortError") complain(error.message, el.detail_alert);
  } finally {
    if (mine === watching) {
      mine.abort();
      if (document.activeElement === el.halt) el.close.focus();
      el.halt.hidden = true;
      look(shown.xt.length - 1);
    }
  }
}

function look(i) {  // at frame i of x_t, and at the x0 of that step
  if (i < 0) return;
  const {step, picture} = shown.xt[i];
  draw(el.xt, picture);
  const nearest = shown.x0.filter(frame => frame.step <= Math.max(step, 1)).at(-1);
  if (nearest) draw(el.x0, nearest.picture);
  el.scrub.disabled = false;
  el.scrub.max = shown.xt.length - 1;
  el.scrub.value = i;  // after max, which it cannot pass
  el.count.textContent = `step ${step} of ${shown.steps}`;
  el.scrub.setAttribute("aria-valuetext", el.count.textContent);
}

function finish(done) {
  shown.done = done;
  el.download.href = "data:image/png;base64," + done.png;
  el.download.download = `${done.model}-${shown.name ?? "image"}-${shown.fields.seed}-${shown.image}.png`;
  el.download.hidden = false;
  const facts = {
    Seed: `${shown.fields.seed}, image ${shown.image}`,
    Sampler: `${done.sampler}, ${done.steps} steps, guidance ${done.guidance_scale}`,
    Checkpoint: `${done.model}, SHA-256 ${done.checkpoint.slice(0, 12)}…`,
  };
  el.facts.replaceChildren(...Object.entries(facts).flatMap(([name, value]) => [node("dt", name), node("dd", value)]));
  el.detail_status.textContent = "Done. Drag the slider to look back.";
  clearMask();
}

const TEXT = new Set(["model", "class_label", "sampler"]);

function json(request) {  // by hand: a seed may be above 2^53
  const fields = Object.entries(request).map(([name, value]) => `"${name}": ${TEXT.has(name) ? JSON.stringify(value) : value}`);
  return `{${fields.join(", ")}}`;
}

function curl() {
  const quote = text => "'" + text.replaceAll("'", "'\\''") + "'";
  const key = apiKey ? ' -H "authorization: Bearer $KEY"' : "";
  return `curl -X POST ${quote(new URL("generate", location.href).href)}${key} -H 'content-type: application/json' -d ${quote(json(shown.fields))} -o image.png`;
}

function python() {
  const key = apiKey ? ', headers={"authorization": "Bearer " + os.environ["KEY"]}' : "";
  return [
    "import io" + (key && ", os"), "", "import httpx", "from PIL import Image", "",
    `request = ${json(shown.fields)}`,
    `response = httpx.post("${new URL("generate", location.href).href}", json=request, timeout=60${key})`,
    "response.raise_for_status()",
    "image = Image.open(io.BytesIO(response.content))",
  ].join("\n");
}

function address() {  // of the image itself, for an <img> tag
  const {model: named, class_label, seed, index, n, ...rest} = shown.fields;
  const path = [model.name, class_label ?? "none", seed, `${index}.png`].map(encodeURIComponent).join("/");
  return new URL(`images/${path}?${new URLSearchParams(rest)}`, location.href).href;
}

async function copy(text, what) {
  el.code.textContent = text;
  try {
    await navigator.clipboard.writeText(text);
    el.detail_status.textContent = `${what} copied.`;
  } catch {  // no clipboard on a page without TLS: select it by hand
    el.code.hidden = false;
    getSelection().selectAllChildren(el.code);
    el.detail_status.textContent = `${what} is below, to be copied.`;
  }
}

async function compare() {
  el.compared.replaceChildren();
  await Promise.all(model.samplers.map(async sampler => {
    const item = node("li"), canvas = node("canvas", "", {role: "img", ariaLabel: sampler}), steps = model.default_steps[sampler];
    const caption = node("span", `${sampler}, ${steps} steps`, {className: "caption"});
    [canvas.height, canvas.width] = model.image_shape.slice(1);
    item.append(canvas, caption);
    el.compared.append(item);
    try {
      const body = json({...shown.fields, sampler, steps});
      const response = await ask("generate", {method: "POST", body, headers: {"content-type": "application/json", accept: "image/png"}});
      const nfe = response.headers.get("x-ddpm-nfe");
      draw(canvas, await createImageBitmap(await response.blob()));
      if (nfe) caption.textContent += `, ${nfe} network rows`;
    } catch (error) {
      caption.textContent = `${sampler}: ${error.message}`;
    }
  }));
}
