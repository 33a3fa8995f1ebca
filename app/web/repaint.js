// A mask drawn on the image, and that part painted again.
const mask = {drawn: null, x: 0, y: 0};  // which pixels are to be painted again; where the keyboard's brush is

function clearMask() {
  const [, height, width] = model.image_shape;
  mask.drawn = new Uint8Array(width * height);
  [mask.x, mask.y] = [width >> 1, height >> 1];
  el.paint_class.value = Math.max(0, model.class_names.indexOf(shown.name));
  [el.repainted.height, el.repainted.width] = [height, width];
  el.repainted_caption.textContent = "repainted";
  drawMask();
}

function drawMask(cursor = false) {
  const [, height, width] = model.image_shape;
  if (!shown.xt.length) return;
  draw(el.mask, shown.xt.at(-1).picture);
  const context = el.mask.getContext("2d");
  context.fillStyle = "#ff3d7fb0";
  for (let i = 0; i < width * height; i++) if (mask.drawn[i]) context.fillRect(i % width, Math.floor(i / width), 1, 1);
  if (cursor) {
    context.fillStyle = "#ffd800";
    context.fillRect(mask.x, mask.y, 1, 1);
  }
}

function brush(x, y) {
  const [, height, width] = model.image_shape, radius = Number(el.brush.value) / 2;
  for (let v = 0; v < height; v++) {
    for (let u = 0; u < width; u++) if (Math.hypot(u - x, v - y) <= radius) mask.drawn[v * width + u] = 1;
  }
}

function brushAt(event) {
  const box = el.mask.getBoundingClientRect(), [, height, width] = model.image_shape;
  brush(Math.floor((event.clientX - box.left) / box.width * width), Math.floor((event.clientY - box.top) / box.height * height));
  drawMask();
}

const png = canvas => new Promise(done => canvas.toBlob(done, "image/png"));

async function repaint() {
  const [, height, width] = model.image_shape;
  if (!mask.drawn?.some(Boolean)) {
    el.detail_status.textContent = "Draw over a part of the image first.";
    return el.mask.focus();
  }
  const image = node("canvas"), hole = node("canvas", "", {width, height}), pixels = new ImageData(width, height);
  draw(image, shown.xt.at(-1).picture);
  mask.drawn.forEach((drawn, i) => { pixels.data[4 * i + 3] = drawn ? 0 : 255; });  // transparent: paint this again
  hole.getContext("2d").putImageData(pixels, 0, 0);
  const form = new FormData();
  const seed = String(crypto.getRandomValues(new Uint32Array(1))[0]);
  form.append("image", await png(image), "image.png");
  form.append("mask", await png(hole), "mask.png");
  form.append("model", model.name);
  form.append("prompt", model.class_names[Number(el.paint_class.value)] ?? "");
  form.append("seed", seed);
  complain("", el.detail_alert);
  el.paint.disabled = true;
  el.detail_status.textContent = "Repainting…";
  try {
    const answer = await (await ask("v1/images/edits", {method: "POST", body: form})).json();
    draw(el.repainted, await decode(answer.data[0].b64_json));
    el.repainted_caption.textContent = `repainted with seed ${seed}`;
    el.detail_status.textContent = "Repainted. Once more gives another one.";
  } catch (error) {
    el.detail_status.textContent = "";
    complain(error.message, el.detail_alert);
  } finally {
    el.paint.disabled = false;
  }
}
