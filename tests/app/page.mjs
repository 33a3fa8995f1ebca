// Runs the script of the page on just enough of a document, against a server that answers as `scenario` says.
// node page.mjs index.html < scenario.json: prints what the page shows after each deed.
import { readFileSync } from "node:fs";
import vm from "node:vm";

const html = readFileSync(process.argv[2], "utf8"), scenario = JSON.parse(readFileSync(0, "utf8"));
const document = { activeElement: null };

class Element {
  constructor(tag, range) {
    Object.assign(this, {tag, range, hidden: false, textContent: "", dataset: {}, style: {}, children: [], handlers: {}, text: ""});
    this.limit = 100;  // as HTML has it for a range
  }
  get max() { return String(this.limit); }
  set max(limit) { this.limit = Number(limit); if (this.range) this.value = this.text; }
  get value() { return this.tag === "select" && this.text === "" ? this.children[0]?.value ?? "" : this.text; }
  set value(value) { this.text = String(this.range ? Math.min(Math.max(Number(value), 0), this.limit) : value); }
  append(...nodes) { this.children.push(...nodes); }
  replaceChildren() { this.children = []; this.text = ""; }
  addEventListener(name, handler) { this.handlers[name] = handler; }
  setAttribute(name, value) { this[name] = value; }
  focus() { document.activeElement = this; }
}

const elements = [...html.split("<script>")[0].matchAll(/<(\w+)([^>]*?)\sid="(\w+)"([^>]*)>/g)].map(([, tag, before, id, after]) => {
  const element = new Element(tag, /type="range"/.test(before + after));
  return Object.assign(element, {id, hidden: /\shidden/.test(before + after)});
});
const el = Object.fromEntries(elements.map(element => [element.id, element]));
document.querySelectorAll = () => elements;
document.createElement = tag => new Element(tag);
const kept = new Map();
const asked = [];

async function fetch(path, options = {}) {
  asked.push(options.headers?.authorization ?? "");
  const {status = 200, body, stream} = scenario.answers.shift();
  return new Response(stream ?? JSON.stringify(body), {status, headers: {"x-ddpm-seed": "1"}});
}

const context = {
  document, fetch, TextDecoderStream, AbortController, URLSearchParams, URL, console,
  sessionStorage: {getItem: name => kept.get(name) ?? null, setItem: (k, v) => kept.set(k, v), removeItem: name => kept.delete(name)},
  ResizeObserver: class { observe() {} }, navigator: {}, location: {href: "http://x/"}, devicePixelRatio: 1,
};
vm.runInNewContext(html.split("<script>")[1].split("</script>")[0], context);
const settled = async () => { for (let i = 0; i < 50; i++) await new Promise(done => setTimeout(done, 1)); };
await settled();
const shown = [];
const look = () => shown.push({
  alert: el.alert.textContent, model: el.model.textContent, status: el.status.textContent, focus: document.activeElement?.id ?? null,
  entrance: !el.entrance.hidden, slider: [el.scrub.value, el.scrub.max], plan: [el.plan.value, el.sampler.value, el.steps.value, !el.plans.hidden], asked: asked.length,
});
look();
for (const [id, event, values] of scenario.deeds) {
  for (const [name, value] of Object.entries(values)) el[name].value = value;
  el[id].handlers[event]({preventDefault() {}});
  await settled();
  look();
}
console.log(JSON.stringify(shown));
