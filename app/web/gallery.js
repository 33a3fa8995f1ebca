// The controls, the page's address, and an image of each class in one request.
function settings() {  // as a query has them
  const seed = el.seed.value.trim();
  return {
    ...(model.default ? {} : {model: model.name}),
    ...(seed && {seed}),
    sampler: el.sampler.value,
    steps: el.steps.value,
    ...(el.guidance.disabled ? {} : {guidance_scale: el.guidance.value}),
  };
}

function remember(more = {}) {
  history.replaceState(null, "", "#" + new URLSearchParams({...settings(), ...more}));
}

function choose(asked = new URLSearchParams()) {
  model = models[Number(el.model.value)];
  const [channels, height, width] = model.image_shape;
  el.served.textContent =
    `Images out of noise, one step at a time. Served now: ${model.name}, ${width} × ${height} pixels, ${channels === 1 ? "grey" : "colour"}.`;
  el.sampler.replaceChildren(...model.samplers.map(name => node("option", name, {value: name})));
  el.sampler.value = model.defaults.sampler;
  if (model.samplers.includes(asked.get("sampler"))) el.sampler.value = asked.get("sampler");
  followSampler();
  el.steps.max = model.limits.steps;
  el.steps.value = asked.get("steps") ?? el.steps.value;
  el.guidance.value = asked.get("guidance_scale") ?? model.defaults.guidance_scale;
  el.guidance.disabled = model.guidance === false;
  const plans = Object.entries(model.plans ?? {}).map(([name, {steps, nfe}]) => node("option", `${name}: ${steps} steps, ${nfe} network rows an image`, {value: name}));
  el.plan.replaceChildren(...plans, node("option", "as set below", {value: ""}));
  el.plans.hidden = !plans.length;
  namePlan();
  el.seed.value = asked.get("seed") ?? el.seed.value;
  el.paint_class.replaceChildren(...model.class_names.map((name, i) => node("option", name, {value: i})));
  el.paint_class.parentElement.hidden = !model.class_names.length;
  el.go.textContent = model.class_names.length ? "Denoise all classes" : "Denoise";
  el.controls.disabled = false;  // what you type before would be lost
  lay(0);
}

function followSampler() {  // its steps, and its counts where it takes no others
  const sampler = el.sampler.value;
  el.steps.value = sampler === model.defaults.sampler ? Math.min(model.defaults.steps, model.limits.steps) : model.default_steps[sampler];
  if (sampler === "fitted") el.guidance.value = model.plans.fast.guidance_scale;  // it has no other
  el.step_counts.replaceChildren(...(sampler === "fitted" ? model.fitted_steps ?? [] : []).map(count => node("option", "", {value: count})));
}

function followPlan() {  // its sampler, steps and guidance
  const plan = model.plans[el.plan.value];
  if (!plan) return;
  el.sampler.value = plan.sampler;
  followSampler();
  [el.steps.value, el.guidance.value] = [plan.steps, plan.guidance_scale];
}

function namePlan() {  // by sampler, steps and guidance
  const found = Object.entries(model.plans ?? {}).find(([, plan]) =>
    plan.sampler === el.sampler.value && plan.steps === Number(el.steps.value) && plan.guidance_scale === Number(el.guidance.value));
  el.plan.value = found ? found[0] : "";
}

async function begin() {
  try {
    models = (await (await ask("models")).json()).models;
  } catch (error) {
    if (el.entrance.hidden) el.served.textContent = "";
    complain(error.message);
    return false;
  }
  const asked = new URLSearchParams(location.hash.slice(1));
  el.model.replaceChildren(...models.map(({name}, i) => node("option", name, {value: i})));
  el.model.value = Math.max(0, models.findIndex(({name}) => name === asked.get("model")));
  el.models.hidden = models.length < 2;
  choose(asked);
  const [name, sampler] = [asked.get("model"), asked.get("sampler")];
  const missing = name !== null && name !== model.name ? `model ${name}` : sampler !== null && sampler !== el.sampler.value ? `sampler ${sampler}` : "";
  if (missing) complain(`This link names the ${missing}, which is not served here. Its images would be others.`);
  else if (asked.has("image")) enlarge(Number(asked.get("image")) || 0, asked.get("class") ?? undefined);
  else if (asked.has("seed")) fill();
  return true;
}

function valid() {
  const seed = el.seed.value.trim();
  const good = seed === "" || (/^[0-9]{1,20}$/.test(seed) && BigInt(seed) < 2n ** 64n);
  el.seed.setCustomValidity(good ? "" : "A seed is a whole number below 2^64; leave it empty to have one drawn.");
  return el.form.reportValidity();
}

let offset = 0, running = null;  // the first class that is shown; the AbortController of the run

function lay(first) {
  offset = first;
  const classes = model.class_names.length;
  const many = Math.min(model.limits.n, classes ? classes - offset : 9);
  el.gallery.replaceChildren(...Array.from({length: many}, (_, i) => {
    const item = node("li"), button = node("button", "", {type: "button"}), canvas = node("canvas");
    const name = classes ? model.class_names[offset + i] : `image ${i + 1}`;
    [canvas.height, canvas.width] = model.image_shape.slice(1);
    button.append(canvas, node("span", name, {className: "caption"}));
    button.addEventListener("click", () => enlarge(offset + i));
    item.append(button);
    return item;
  }));
  el.previous.hidden = offset === 0;
  el.next.hidden = !classes || offset + many >= classes;
}

async function fill() {
  if (running || !valid()) return;
  running = new AbortController();
  const cells = [...el.gallery.querySelectorAll("canvas")];
  complain("");
  el.go.setAttribute("aria-disabled", true);  // and not disabled, which would take the focus away
  el.stop.hidden = el.progress.hidden = false;
  el.progress.value = 0;
  el.status.textContent = "Waiting for the first step…";
  const fields = {...settings(), n: cells.length, columns: cells.length, index: offset, ...(model.class_names.length && {each_class: true})};
  let last = null;
  try {
    await denoise(fields, running.signal, seed => { el.seed.value = seed; remember(); }, (picture, step, steps) => {
      cells.forEach((canvas, i) => draw(canvas, picture, i));
      el.progress.max = steps;
      el.progress.value = last = step;
      el.status.textContent = `Step ${step} of ${steps}`;
    });
    el.status.textContent = "Choose an image to see it large.";
  } catch (error) {
    const kept = last === null ? "" : ` The images are as they were after step ${last}; the seed is kept.`;
    el.status.textContent = (error.name === "AbortError" ? "Stopped." : "") + kept;
    if (error.name !== "AbortError") complain(error.message);
  } finally {
    running.abort();
    running = null;
    if (document.activeElement === el.stop) el.go.focus();
    el.go.setAttribute("aria-disabled", false);
    el.stop.hidden = el.progress.hidden = true;
  }
}
