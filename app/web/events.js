// What the controls do.
el.entrance.addEventListener("submit", async event => {
  event.preventDefault();
  const key = el.key.value.trim();
  if (!/^[A-Za-z0-9._~+/-]{16,512}=*$/.test(key)) {
    el.key.focus();
    return complain("This cannot be a key: a key has at least 16 letters, digits or signs (- . _ ~ + /) and no blanks.");
  }
  keep(key);
  el.key.value = "";
  el.entrance.hidden = true;
  el.form.hidden = false;
  complain("");
  if (await begin()) el.go.focus();
});
el.form.addEventListener("submit", event => { event.preventDefault(); fill(); });
el.dice.addEventListener("click", () => { if (!running) { el.seed.value = ""; fill(); } });
el.stop.addEventListener("click", () => running?.abort());
el.seed.addEventListener("input", () => el.seed.setCustomValidity(""));
el.model.addEventListener("change", () => choose());
el.sampler.addEventListener("change", () => { followSampler(); namePlan(); });
el.plan.addEventListener("change", followPlan);
for (const input of [el.steps, el.guidance]) input.addEventListener("change", namePlan);
el.previous.addEventListener("click", () => { lay(Math.max(0, offset - model.limits.n)); fill(); });
el.next.addEventListener("click", () => { lay(offset + model.limits.n); fill(); });
el.close.addEventListener("click", () => el.detail.close());
el.detail.addEventListener("close", () => { watching?.abort(); remember(); });
el.halt.addEventListener("click", () => watching?.abort());
el.scrub.addEventListener("input", () => look(Number(el.scrub.value)));
el.copy_address.addEventListener("click", () => copy(location.href, "Link"));
el.copy_image.addEventListener("click", () => copy(address(), "Image address"));
el.copy_curl.addEventListener("click", () => copy(curl(), "Command"));
el.copy_python.addEventListener("click", () => copy(python(), "Program"));
el.comparison.addEventListener("toggle", () => { if (el.comparison.open && shown.fields.seed) compare(); });
el.repaint.addEventListener("toggle", () => { if (el.repaint.open) clearMask(); });
el.mask.addEventListener("pointerdown", event => { el.mask.setPointerCapture(event.pointerId); brushAt(event); });
el.mask.addEventListener("pointermove", event => { if (event.buttons) brushAt(event); });
el.mask.addEventListener("keydown", event => {
  const [dx, dy] = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]}[event.key] ?? [0, 0];
  if (!dx && !dy && event.key !== " ") return;
  event.preventDefault();
  mask.x = Math.min(Math.max(mask.x + dx, 0), model.image_shape[2] - 1);
  mask.y = Math.min(Math.max(mask.y + dy, 0), model.image_shape[1] - 1);
  if (event.key === " ") brush(mask.x, mask.y);
  drawMask(true);
});
el.clear.addEventListener("click", clearMask);
el.paint.addEventListener("click", repaint);
begin();
