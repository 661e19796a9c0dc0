"use strict";
// The page shows `state`, which its link holds too. The worker draws the images.

const byId = id => document.getElementById(id);
const model = JSON.parse(byId("model").textContent);
const [, height, width] = model.shape;
const COUNT = 16, COLUMNS = 4;
const LARGEST_SEED = 10 ** 12;  // well below the largest exact integer
const TIMES = [1, 0.8, 0.6, 0.4, 0.2, 0];  // s
const CALL_MS = 80;  // the target time of a call, so that other calls get their turn
const FIRST_CALL = 4;  // images of the first call, when the time for one is unknown
const SQUARES_UP_TO = 32;  // pixels: images up to this size show sharp squares
const SAVED_SIZE = 128, SAVED_GAP = 8;  // pixels in a PNG: the least size of an image, and its gap
// Play must not flash (WCAG 2.3.1): below three changes a second, and fewer with reduced motion.
const PLAY_MS = matchMedia("(prefers-reduced-motion: reduce)").matches ? 1500 : 400;
const LINK_WAIT_MS = 300;  // browsers refuse to change the address too often

const stepChoices = Object.keys(model.steps).map(Number);
const samplerChoices = Object.keys(model.samplers);
const START = {class: null, seed: 0, steps: stepChoices[0], sampler: samplerChoices[0],
               pick: 0, to: 100, at: 500};
const state = {...START};
let isPlaying = false, playTimer = null;
let millisecondsPerImage = null;

// The worker

function unpackBytes(id) {
  const text = atob(byId(id).textContent), bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  byId(id).remove();  // frees megabytes
  return bytes;
}

async function unpack(id) {
  const packed = new Blob([unpackBytes(id)]).stream();
  const stream = packed.pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

const waiting = new Map();
let worker = null, asked = 0;

async function startWorker() {
  const [ort, wasm, graph] = await Promise.all(["ort", "wasm", "graph"].map(unpack));
  const script = new Blob(["const ort = ", ort, ";\n", byId("worker").textContent],
                          {type: "text/javascript"});
  worker = new Worker(URL.createObjectURL(script));
  worker.onerror = event => trouble(event.message ?? "the worker did not start");
  worker.onmessage = ({data: {id, found, error}}) => {
    const {resolve, reject} = waiting.get(id);
    waiting.delete(id);
    error ? reject(new Error(error)) : resolve(found);
  };
  await ask("create", {wasm, graph, model}, [wasm.buffer, graph.buffer]);
}

// The result of the engine's method `name`.
function ask(name, given, moved = []) {
  const id = asked++;
  return new Promise((resolve, reject) => {
    waiting.set(id, {resolve, reject});
    worker.postMessage({id, name, given}, moved);
  });
}

function trouble(text) {
  byId("trouble").textContent = `This does not work here: ${text}`;
  byId("trouble").hidden = false;
}

// A function that calls `draw` now, or once after the running call: changes in between are drawn
// together. `draw` gets a function that says whether its call is outdated.
function newest(draw) {
  let isRunning = false, isOutdated = false;
  return async () => {
    isOutdated = true;
    if (isRunning) return;
    isRunning = true;
    try {
      while (isOutdated) {
        isOutdated = false;
        await draw(() => isOutdated);
      }
    } catch (error) {
      trouble(error.message);
    } finally {
      isRunning = false;
    }
  };
}

// Pictures

function newCanvas(canvas = document.createElement("canvas")) {
  Object.assign(canvas, {width, height});
  return canvas;
}

// Draws image number `index` of several, RGBA, onto a canvas.
function show(canvas, pixels, index = 0) {
  const size = 4 * width * height;
  const data = pixels.subarray(index * size, (index + 1) * size);
  // Small images that change all the time are faster outside the graphics card.
  const context = canvas.getContext("2d", {willReadFrequently: true});
  context.putImageData(new ImageData(data, width, height), 0, 0);
}

// Shows images in a row, each with its caption.
function showStrip(strip, images, captions) {
  while (strip.children.length > images.length) strip.lastChild.remove();
  while (strip.children.length < images.length) {
    const figure = document.createElement("figure");
    figure.append(newCanvas(), document.createElement("figcaption"));
    strip.append(figure);
  }
  images.forEach((pixels, i) => {
    show(strip.children[i].firstChild, pixels);
    strip.children[i].lastChild.textContent = captions[i];
  });
}

const tiles = Array.from({length: COUNT}, (_, place) => {
  const tile = document.createElement("button");
  tile.type = "button";
  tile.append(newCanvas());
  tile.addEventListener("click", () => change({pick: place}));
  return tile;
});
byId("grid").append(...tiles);
["from", "between", "to"].forEach(id => newCanvas(byId(id)));
document.body.classList.toggle("pixels", width <= SQUARES_UP_TO);

const classOf = label => label === null ? "" : `, class ${model.classes[label]}`;
const settings = () => ({label: state.class, steps: state.steps, sampler: state.sampler});
const chosenSeed = () => state.seed + state.pick;
const stepsInWords = count => count === 1 ? "1 step" : `${count} steps`;

const drawGrid = newest(async isOutdated => {
  const first = state.seed, start = performance.now();
  let milliseconds = 0;
  for (let done = 0; done < COUNT;) {
    const affordable = Math.floor(CALL_MS / millisecondsPerImage);
    const wanted = affordable === Infinity ? FIRST_CALL : Math.max(1, affordable);
    const count = Math.min(COUNT - done, wanted);
    const images = Array.from({length: count}, (_, i) => ({seed: first + done + i}));
    const found = await ask("draw", {images, ...settings()});
    if (isOutdated()) return;
    images.forEach(({seed}, i) => {
      show(tiles[done + i].firstChild, found.pixels, i);
      tiles[done + i].setAttribute("aria-label", `seed ${seed}${classOf(found.labels[i])}`);
    });
    milliseconds += found.milliseconds;
    millisecondsPerImage = found.milliseconds / count;
    done += count;
  }
  showSpeed(milliseconds / COUNT);
  byId("grid").dataset.drawn = JSON.stringify({seed: first, ...settings()});
  clearTimeout(playTimer);
  if (isPlaying) playTimer = setTimeout(playOn, PLAY_MS - (performance.now() - start));
});

function showSpeed(milliseconds) {
  const bold = document.createElement("b");
  bold.textContent = `${milliseconds < 10 ? milliseconds.toFixed(1) : Math.round(milliseconds)} ms`;
  byId("speed").replaceChildren(bold, ` per image of ${stepsInWords(state.steps)}`);
}

const drawBetween = newest(async () => {
  const image = {seed: chosenSeed(), to: state.to, share: state.at / 1000};
  show(byId("between"), (await ask("draw", {images: [image], ...settings()})).pixels);
  byId("between").dataset.drawn = state.at;
});

const drawEnds = newest(async () => {
  const images = [0, 1].map(share => ({seed: chosenSeed(), to: state.to, share}));
  const {pixels} = await ask("draw", {images, ...settings()});
  ["from", "to"].forEach((id, i) => show(byId(id), pixels, i));
});

const drawFollowed = newest(async () => {
  const given = {seed: chosenSeed(), ...settings(), times: TIMES};
  const {after, along, label} = await ask("follow", given);
  showStrip(byId("after"), after, after.map((_, step) => step === 0 ? "noise" : `step ${step}`));
  const size = 4 * width * height;
  const images = TIMES.map((_, i) => along.subarray(i * size, (i + 1) * size));
  showStrip(byId("along"), images, TIMES.map(s => `s\u2009=\u2009${s}`));
  byId("chosen").textContent = `chosen: seed ${chosenSeed()}${classOf(label)}`;
  byId("follow-text").textContent = `The chosen image, seed ${chosenSeed()}, after each step`
    + (state.steps > 1 ? `, with ${model.samplers[state.sampler]}.` : ".");
  byId("python").textContent = inPython();
});

function inPython() {
  const given = [`seeds=[${chosenSeed()}]`, `steps=${state.steps}`];
  if (state.class !== null) given.unshift(`labels=[${model.labels[state.class]}]`);
  if (state.steps > 1) given.push(`sampler="${state.sampler}"`);
  return `model.sample(${given.join(", ")})`;
}

// The state

function change(values) {
  Object.assign(state, values);
  showControls();
  keepInLink();
  const names = Object.keys(values);
  const isOf = (...some) => some.some(name => names.includes(name));
  const isOfAll = isOf("class", "steps", "sampler");
  if (isOfAll || isOf("seed")) drawGrid();
  if (isPlaying) return;  // the rest is drawn when it stops
  if (isOfAll || isOf("seed", "pick", "to")) drawEnds();
  if (isOfAll || isOf("seed", "pick", "to", "at")) drawBetween();
  if (isOfAll || isOf("seed", "pick")) drawFollowed();
}

function play(shouldPlay) {
  isPlaying = shouldPlay;
  clearTimeout(playTimer);
  change({seed: shouldPlay ? nextSeed() : state.seed});
}

function playOn() {
  if (isPlaying) change({seed: nextSeed()});
}

const nextSeed = () => state.seed + COUNT > LARGEST_SEED ? 0 : state.seed + COUNT;
const anySeed = () => Math.floor(Math.random() * 100000);

function showControls() {
  const chosen = {classes: state.class ?? "", steps: state.steps, sampler: state.sampler};
  for (const [id, value] of Object.entries(chosen)) {
    for (const input of byId(id).querySelectorAll("input")) input.checked = input.value === `${value}`;
  }
  byId("sampler").disabled = state.steps === 1;
  const fields = {seed: state.seed, "to-seed": state.to, share: state.at};
  for (const [id, value] of Object.entries(fields)) {
    const isBeingTyped = byId(id) === document.activeElement && !byId(id).validity.valid;
    if (!isBeingTyped) setField(byId(id), value);
  }
  byId("from-seed").textContent = chosenSeed();
  byId("play").setAttribute("aria-pressed", isPlaying);
  byId("play").firstChild.textContent = isPlaying ? "Stop " : "Play ";
  tiles.forEach((tile, place) => {
    tile.setAttribute("aria-pressed", place === state.pick);
    tile.tabIndex = place === state.pick ? 0 : -1;
  });
}

// Shows the chosen one of many classes, without moving the page.
function scrollToClass() {
  const box = byId("classes").querySelector(".chips"), chosen = box.querySelector(":checked");
  box.scrollTop = chosen.parentNode.offsetTop - box.offsetTop - box.clientHeight / 2;
}

// The link: wrong values in it are ignored

const READERS = {
  class: text => isBelow(text, model.classes.length),
  seed: text => isBelow(text, LARGEST_SEED),
  steps: text => stepChoices.includes(Number(text)),
  sampler: text => samplerChoices.includes(text),
  pick: text => isBelow(text, COUNT),
  to: text => isBelow(text, LARGEST_SEED),
  at: text => isBelow(text, 1001),
};
const isBelow = (text, limit) => /^[0-9]{1,13}$/.test(text) && Number(text) < limit;

function readLink() {
  const found = {...START}, given = new URLSearchParams(location.hash.slice(1));
  for (const [name, isRight] of Object.entries(READERS)) {
    const text = given.get(name);
    if (text !== null && isRight(text)) found[name] = name === "sampler" ? text : Number(text);
  }
  return found;
}

let linkTimer = null;
function keepInLink() {
  clearTimeout(linkTimer);
  linkTimer = setTimeout(() => {
    const parts = Object.entries(state).filter(([name, value]) => value !== START[name]);
    const link = "#" + new URLSearchParams(parts);
    if (link !== location.hash && (parts.length || location.hash)) {
      history.replaceState(null, "", link);
    }
  }, LINK_WAIT_MS);
}

// Controls

function addChips(id, choices, name) {
  for (const [value, text, more] of choices) {
    const label = document.createElement("label"), input = document.createElement("input");
    const chip = document.createElement("span");
    Object.assign(input, {type: "radio", name, value});
    chip.textContent = text;
    if (more) chip.append(Object.assign(document.createElement("small"), {textContent: ` ${more}`}));
    label.append(input, chip);
    byId(id).querySelector(".chips").append(label);
  }
  byId(id).addEventListener("change", ({target}) => {
    const value = target.value === "" ? null : name === "sampler" ? target.value : Number(target.value);
    change({[name]: value});
  });
}

// Sets a valid value, and clears the mark of an invalid one.
function setField(field, value) {
  field.value = value;
  field.setCustomValidity("");
}

function whenSeed(id, name) {
  byId(id).addEventListener("input", () => {
    const isRight = isBelow(byId(id).value, LARGEST_SEED);
    byId(id).setCustomValidity(isRight ? "" : `a whole number below ${LARGEST_SEED}`);
    if (isRight) change({[name]: Number(byId(id).value)});
  });
}

function save() {
  const scale = Math.ceil(SAVED_SIZE / width);
  const stepX = scale * width + SAVED_GAP, stepY = scale * height + SAVED_GAP;
  const sheet = document.createElement("canvas"), context = sheet.getContext("2d");
  sheet.width = COLUMNS * stepX - SAVED_GAP;
  sheet.height = COUNT / COLUMNS * stepY - SAVED_GAP;
  context.fillStyle = "white";
  context.fillRect(0, 0, sheet.width, sheet.height);
  context.imageSmoothingEnabled = false;
  tiles.forEach((tile, place) => {
    const x = place % COLUMNS * stepX, y = Math.floor(place / COLUMNS) * stepY;
    context.drawImage(tile.firstChild, x, y, scale * width, scale * height);
  });
  sheet.toBlob(blob => {
    const name = state.class === null ? "" : `_class${state.class}`;
    const link = document.createElement("a");
    link.download = `${model.title}${name}_seed${state.seed}_${state.steps}.png`;
    link.href = URL.createObjectURL(blob);
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60000);
  });
}

async function copyLink() {
  const {pathname, search} = location;
  const parts = new URLSearchParams(Object.entries(state).filter(([, value]) => value !== null));
  const link = `${location.protocol}//${location.host}${pathname}${search}#${parts}`;
  let said = "Copied ";
  try {
    await navigator.clipboard.writeText(link);
  } catch {
    location.hash = parts;
    said = "See the address bar ";
  }
  byId("link").firstChild.textContent = said;
  setTimeout(() => { byId("link").firstChild.textContent = "Copy link "; }, 2000);
}

const KEYS = {
  n: () => change({seed: anySeed()}),
  p: () => play(!isPlaying),
  s: save,
  l: copyLink,
  ...Object.fromEntries(stepChoices.map(steps => [steps, () => change({steps})])),
};
const MOVES = {ArrowLeft: -1, ArrowRight: 1, ArrowUp: -COLUMNS, ArrowDown: COLUMNS};

function listen() {
  const classes = model.classes.map((name, label) => [label, name]);
  addChips("classes", [["", "any"], ...classes], "class");
  byId("classes").hidden = !model.isConditional;
  addChips("steps", stepChoices.map(steps => [steps, steps]), "steps");
  addChips("sampler", Object.entries(model.samplers).map(([name, text]) => [name, name, text]), "sampler");
  whenSeed("seed", "seed");
  whenSeed("to-seed", "to");
  byId("share").addEventListener("input", () => change({at: Number(byId("share").value)}));
  byId("another").addEventListener("click", KEYS.n);
  byId("play").addEventListener("click", KEYS.p);
  byId("save").addEventListener("click", KEYS.s);
  byId("link").addEventListener("click", KEYS.l);
  byId("controls").addEventListener("submit", event => event.preventDefault());
  addEventListener("hashchange", () => { change(readLink()); scrollToClass(); });
  document.addEventListener("keydown", event => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.type === "text") return;
    KEYS[event.key.toLowerCase()]?.();
  });
  byId("grid").addEventListener("keydown", event => {
    const place = state.pick + (MOVES[event.key] ?? 0);
    if (!(event.key in MOVES) || !tiles[place]) return;
    event.preventDefault();
    change({pick: place});
    tiles[place].focus();
  });
}

async function start() {
  listen();
  Object.assign(state, readLink());
  showControls();
  scrollToClass();
  try {
    await startWorker();
  } catch (error) {
    trouble(error.message);
    return;
  }
  change({...state});
}

start();
