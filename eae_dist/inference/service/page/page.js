"use strict";
// The page of `python -m eae_dist.serve`. A picture on it is {source, label, key or latent or image}: `source` is what an
// <img> shows, the others are what the service takes for it.

const $ = (id) => document.getElementById(id);
const PNG = "data:image/png;base64,";
const SAMPLES = 48, IMAGES = 24, NEIGHBORS = 10, STEPS = 33, STRIP = 11;
const narrow = matchMedia("(max-width: 62rem)"); // as in page.css
let model, selected, frames = [], start, end;

// Asking the service.

class Problem extends Error {}

async function ask(path, body) {
  for (let attempt = 0; ; attempt++) {
    const options = body && { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body) };
    let answer;
    try {
      answer = await fetch(path, options);
    } catch {
      throw new Problem("the service does not answer");
    }
    if (answer.ok) return answer.json();
    if (answer.status === 429 && attempt < 5) {
      await new Promise((done) => setTimeout(done, 1000 * (Number(answer.headers.get("retry-after")) || 1)));
      continue;
    }
    const { detail } = await answer.json().catch(() => ({}));
    throw new Problem(detail || `the service answered ${answer.status}`);
  }
}

// Runs what a section does, and says there what went wrong. Of several at once only the last may show what it got.
const turns = new Map();

async function inside(id, work) {
  const section = $(id).closest("section"), status = section.querySelector(".status"), turn = (turns.get(section) || 0) + 1;
  const current = () => turns.get(section) === turn;
  turns.set(section, turn);
  section.setAttribute("aria-busy", "true");
  try {
    await work(current);
    if (current()) status.textContent = "";
  } catch (error) {
    if (!(error instanceof Problem)) throw error;
    if (current()) status.textContent = error.message;
  } finally {
    if (current()) section.removeAttribute("aria-busy");
  }
}

const once = async (current, promise) => {
  const value = await promise;
  return current() ? value : null;
};

// Pictures as buttons: one stop of the Tab key for a gallery, arrow keys inside.

function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

function gallery(id, pictures) {
  const tiles = pictures.map((picture, place) => {
    const tile = element("button", { type: "button", className: "tile", tabIndex: place ? -1 : 0 });
    tile.append(element("img", { src: picture.source, alt: picture.label }));
    if (picture.caption) tile.append(element("span", {}, element("b", { textContent: picture.caption[0] }), ` ${picture.caption[1]}`));
    tile.setAttribute("aria-pressed", picture === selected);
    tile.addEventListener("click", (event) => {
      select(picture, tile);
      if (event.detail && narrow.matches) $("inspector").scrollIntoView({ block: "nearest" }); // a tap; keys stay where they are
    });
    tile.addEventListener("focus", () => tiles.forEach((other) => (other.tabIndex = other === tile ? 0 : -1)));
    return tile;
  });
  $(id).replaceChildren(...tiles);
}

document.addEventListener("keydown", (event) => {
  const tiles = [...(event.target.closest?.(".gallery")?.children ?? [])], place = tiles.indexOf(event.target);
  if (place < 0) return;
  const across = tiles.filter((tile) => tile.offsetTop === tiles[0].offsetTop).length;
  const moves = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -across, ArrowDown: across, Home: -place, End: tiles.length - 1 - place };
  const next = tiles[place + moves[event.key]];
  if (!(event.key in moves)) return;
  event.preventDefault();
  next?.focus();
});

// What the service takes: exact where it knows the latent, else the pixels.
const pixels = async (picture) => picture.image ?? (picture.image = await loaded(picture.source));
const point = async (picture) =>
  picture.key !== undefined ? { key: picture.key } : picture.latent ? { latent: picture.latent } : { image: await pixels(picture) };

async function loaded(source) {
  const answer = await fetch(source);
  if (!answer.ok) throw new Problem((await answer.json()).detail);
  const bytes = new Uint8Array(await answer.arrayBuffer());
  return btoa(Array.from(bytes, (byte) => String.fromCharCode(byte)).join(""));
}

// The selected image: reconstruction and neighbors.

async function select(picture, tile) {
  selected = picture;
  document.querySelectorAll('.gallery [aria-pressed="true"]').forEach((other) => other.setAttribute("aria-pressed", "false"));
  tile?.setAttribute("aria-pressed", "true");
  $("nothing").hidden = true;
  $("selected").hidden = false;
  $("original").src = $("minuend").src = picture.source;
  $("caption").textContent = picture.label;
  $("selected").classList.add("waiting");
  await inside("inspector", async (current) => {
    const image = await pixels(picture);
    const near = model.index && ask("search", searched(picture, image));
    near?.catch(() => {}); // it is awaited below, perhaps after another error
    const found = await once(current, ask("reconstruct", { images: [image] }));
    if (!found) return;
    $("reconstruction").src = $("subtrahend").src = PNG + found.images[0];
    $("error").textContent = `squared error per pixel ${short(found.squared_error[0])}`;
    const neighbors = near && (await once(current, near));
    if (!neighbors) return;
    const others = neighbors.neighbors.filter(({ key }) => key !== picture.key).slice(0, neighborsWanted());
    gallery("neighbors", others.map(named).map((one, place) => ({ ...one, caption: captionOf(others[place]) })));
    $("near").hidden = false;
  });
  if (selected === picture) $("selected").classList.remove("waiting");
}

const neighborsWanted = () => Math.min(NEIGHBORS, model.index.rows);
// Of an image of the index one more is asked for: the first is itself.
const searched = (picture, image) =>
  picture.key === undefined ? { image, k: neighborsWanted() } : { key: picture.key, k: Math.min(NEIGHBORS + 1, model.index.rows) };
const named = ({ key, label }) => ({ source: `image?key=${encodeURIComponent(key)}`, label: label === null ? key : `${key}, class ${label}`, key });
const captionOf = ({ label, distance }) => [label ?? "", distance.toPrecision(3)];

// Where images come from.

async function draw() {
  await inside("samples", async (current) => {
    const density = new FormData($("draw")).get("density"), seed = Number($("seed").value);
    const found = await once(current, ask("sample", { density, seed, count: SAMPLES }));
    if (!found) return;
    const pictures = found.images.map((image, number) => ({
      source: PNG + image, image, latent: found.latents[number], label: `sample ${number} of ${density}, seed ${seed}`,
    }));
    gallery("samples", pictures);
    if (!start) setEnds(pictures[0], pictures[1]);
  });
}

let dataSeed = 0;
async function showData() {
  await inside("images", async (current) => {
    const found = await once(current, ask(`keys?count=${IMAGES}&seed=${dataSeed++}`));
    if (found) gallery("images", found.images.map(named));
  });
}

const uploads = [];
async function upload(files) {
  await inside("uploads", async () => {
    let first;
    for (const file of files) {
      const source = await fitted(file), picture = { source, image: source.slice(PNG.length), label: file.name };
      uploads.unshift(picture);
      first ??= picture;
    }
    gallery("uploads", uploads);
    if (first) await select(first, $("uploads").children[uploads.indexOf(first)]);
  });
}

// The central part of an image file in the model's size, halved step by step so that no pixel is skipped.
async function fitted(file) {
  const bitmap = await createImageBitmap(file).catch(() => {
    throw new Problem(`${file.name} is not an image that this browser reads`);
  });
  const [channels, height, width] = model.image_shape;
  const scale = Math.min(bitmap.width / width, bitmap.height / height);
  let [w, h] = [Math.round(width * scale), Math.round(height * scale)];
  let from = canvas(w, h, bitmap, (bitmap.width - w) / 2, (bitmap.height - h) / 2, w, h);
  while (w > 2 * width) {
    const [halfW, halfH] = [Math.max(width, w >> 1), Math.max(height, h >> 1)];
    from = canvas(halfW, halfH, from, 0, 0, w, h);
    [w, h] = [halfW, halfH];
  }
  const whole = canvas(width, height, from, 0, 0, w, h);
  return (channels === 1 ? gray(whole) : whole).toDataURL("image/png");
}

// Shows what a gray model sees, to the bit: the service weighs the colors alike.
function gray(made) {
  const pen = made.getContext("2d"), image = pen.getImageData(0, 0, made.width, made.height), { data } = image;
  for (let at = 0; at < data.length; at += 4)
    data.fill((19595 * data[at] + 38470 * data[at + 1] + 7471 * data[at + 2] + 32768) >> 16, at, at + 3);
  pen.putImageData(image, 0, 0);
  return made;
}

function canvas(width, height, image, ...part) {
  const made = element("canvas", { width, height }), pen = made.getContext("2d");
  pen.imageSmoothingQuality = "high";
  pen.fillStyle = "#fff";
  pen.fillRect(0, 0, width, height);
  pen.drawImage(image, ...part, 0, 0, width, height);
  return made;
}

// Between two images: every picture is there before the slider moves.

async function setEnds(first, last) {
  [start, end] = [first, last];
  show("start", start);
  show("end", end);
  await inside("between", async (current) => {
    const found = await once(current, ask("interpolate", { start: await point(start), end: await point(end), count: STEPS }));
    if (!found) return;
    frames = found.images.map((image, place) => ({
      source: PNG + image, image, latent: found.latents[place], label: `${Math.round((100 * place) / (STEPS - 1))} % from start to end`,
    }));
    const strip = Array.from({ length: STRIP }, (_, place) => frames[Math.round((place * (STEPS - 1)) / (STRIP - 1))]);
    $("strip").replaceChildren(...strip.map(({ source }) => element("img", { src: source, alt: "" })));
    slide();
  });
}

function slide() {
  const frame = frames[$("slider").value];
  if (!frame) return;
  show("middle", frame);
  $("where").textContent = `${Math.round((100 * $("slider").value) / (STEPS - 1))} %`;
  $("slider").setAttribute("aria-valuetext", frame.label);
}

const show = (id, picture) => $(id).replaceChildren(element("img", { src: picture.source, alt: picture.label }));

// Training curves, as SVG. Curves that belong together share a figure, and all figures share one cursor.

const FIGURES = [
  ["Loss", "loss", "validation_loss"],
  ["Squared error per pixel", "reconstruction_per_pixel", "validation_reconstruction_per_pixel"],
  ["Entropy, nats", "entropy", null, "entropy_gaussian_reference"],
  ["Gradient norm", "gradient_norm"],
  ["Learning rate", "learning_rate"],
  ["Images a second", "images_per_second"],
];
const ELSEWHERE = new Set(["reconstruction", "floored_pairs", "straggler_spread", "peak_memory_mib"]);
const NAMES = { first: "training", second: "validation", third: "of N(0, I)" };
const WIDTH = 320, HEIGHT = 150, LEFT = 44, BOTTOM = 20, TOP = 6, RIGHT = 6;
const figures = [];

function showCurves(curves) {
  const drawn = new Set(FIGURES.flat());
  const more = Object.keys(curves).filter((name) => !drawn.has(name) && !ELSEWHERE.has(name) && !name.startsWith("validation_"));
  for (const [title, ...names] of [...FIGURES, ...more.map((name) => [name.replaceAll("_", " "), name, `validation_${name}`])]) {
    const lines = ["first", "second", "third"].map((rank, place) => ({ rank, points: curves[names[place]] ?? [] }));
    if (lines[0].points.length > 1) $("curves").append(figure(title, lines.filter(({ points }) => points.length)));
  }
  $("training").hidden = !figures.length;
}

function figure(title, lines) {
  // The first steps of a run would leave nothing to see of the rest: they may lie outside.
  const last = Math.max(...lines.flatMap(({ points }) => points.map(([x]) => x)));
  const seen = lines.flatMap(({ points }) => points.filter(([x]) => x >= last / 8 || points.length < 4)).map(([, y]) => y);
  let [low, high] = [Math.min(...seen), Math.max(...seen)];
  const room = (high - low || Math.abs(high) || 1) * 0.06;
  [low, high] = [low - room, high + room];
  const x = (value) => LEFT + (value / last) * (WIDTH - LEFT - RIGHT);
  const y = (value) => TOP + ((high - value) / (high - low)) * (HEIGHT - TOP - BOTTOM);

  const drawing = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, "aria-hidden": "true" });
  const clip = `clip-${figures.length}`;
  const frame = svg("rect", { x: LEFT, y: TOP, width: WIDTH - LEFT - RIGHT, height: HEIGHT - TOP - BOTTOM });
  const path = svg("clipPath", { id: clip });
  path.append(frame);
  drawing.append(path);
  for (const tick of ticks(low, high, 4)) {
    drawing.append(svg("line", { class: "rule", x1: LEFT, x2: WIDTH - RIGHT, y1: y(tick), y2: y(tick) }));
    drawing.append(svg("text", { x: LEFT - 6, y: y(tick) + 3, "text-anchor": "end" }, short(tick)));
  }
  for (const tick of ticks(0, last, 4)) {
    drawing.append(svg("text", { x: x(tick), y: HEIGHT - 5, "text-anchor": "middle" }, thousands(tick)));
  }
  for (const { rank, points } of [...lines].reverse()) {
    const d = points.map(([px, py], place) => `${place ? "L" : "M"}${x(px).toFixed(1)} ${y(py).toFixed(1)}`).join("");
    drawing.append(svg("path", { class: rank, d, "clip-path": `url(#${clip})` }));
  }
  const cursor = svg("line", { class: "cursor", y1: TOP, y2: HEIGHT - BOTTOM, visibility: "hidden" });
  drawing.append(cursor);

  const caption = element("figcaption"), made = element("figure", { tabIndex: 0 }, element("h3", { textContent: title }), drawing, caption);
  made.setAttribute("role", "img");
  const one = { last, title, lines, made, caption, cursor, x, place: lines[0].points.length - 1 };
  figures.push(one);
  read(one, last, false);
  made.addEventListener("pointermove", (event) => {
    const box = drawing.getBoundingClientRect();
    const at = (((event.clientX - box.left) / box.width) * WIDTH - LEFT) / (WIDTH - LEFT - RIGHT);
    figures.forEach((other) => read(other, Math.min(Math.max(at, 0), 1) * last, true));
  });
  made.addEventListener("pointerleave", () => figures.forEach((other) => read(other, other.last, false)));
  made.addEventListener("blur", () => figures.forEach((other) => read(other, other.last, false)));
  made.addEventListener("keydown", (event) => {
    const points = lines[0].points, move = { ArrowLeft: -1, ArrowRight: 1, Home: -points.length, End: points.length }[event.key];
    if (!move) return;
    event.preventDefault();
    one.place = Math.min(Math.max(one.place + move, 0), points.length - 1);
    figures.forEach((other) => read(other, points[one.place][0], true));
  });
  return made;
}

// Says in the caption what the curves are at so many images; `moving`: with a cursor, else at the end.
function read(one, images, moving) {
  const spans = one.lines.map(({ rank, points }) => {
    const nearest = points.reduce((best, point) => (Math.abs(point[0] - images) < Math.abs(best[0] - images) ? point : best));
    const name = one.lines.length > 1 ? `${NAMES[rank]} ` : "";
    return element("span", { className: rank, textContent: name + short(nearest[1]) });
  });
  if (moving) spans.push(element("span", { textContent: `at ${thousands(images)}` }));
  one.caption.replaceChildren(...spans);
  one.made.setAttribute("aria-label", `${one.title}: ${spans.map((span) => span.textContent).join(", ")}`);
  one.cursor.setAttribute("visibility", moving ? "visible" : "hidden");
  one.cursor.setAttribute("x1", one.x(images));
  one.cursor.setAttribute("x2", one.x(images));
}

function svg(name, attributes, text) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

function ticks(low, high, count) {
  const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((times) => times * power).find((candidate) => candidate >= rough);
  const found = [];
  for (let number = Math.ceil(low / step); number * step <= high; number++) found.push(number * step);
  return found;
}

const short = (value) => {
  const size = Math.abs(value), plain = size === 0 || (size > 1e-3 && size < 1e5);
  return (value < 0 ? "−" : "") + (plain ? String(Number(size.toPrecision(3))) : size.toExponential(1));
};
const thousands = (value) =>
  value >= 1e6 ? `${Number((value / 1e6).toPrecision(3))} M` : value >= 1e3 ? `${Number((value / 1e3).toPrecision(3))} k` : String(Math.round(value));

// Pictures that the run made on its way.

let grids, steps, playing;
function showGrids(found) {
  grids = ["samples", "reconstructions", "interpolations"].filter((kind) => found[kind]?.length);
  steps = found[grids[0]] ?? [];
  const pictures = grids.map((kind) => element("figure", {}, element("img", { id: `picture-${kind}` }), element("figcaption", { textContent: kind })));
  $("pictures").replaceChildren(...pictures);
  $("time").hidden = !grids.length;
  $("step").max = $("step").value = steps.length - 1;
  if (grids.length) showPictures();
}

function showPictures() {
  const step = steps[$("step").value];
  for (const kind of grids) Object.assign($(`picture-${kind}`), { src: `grids/${kind}/${step}`, alt: `${kind} after ${step} steps` });
  $("at").textContent = step.toLocaleString("en");
  $("step").setAttribute("aria-valuetext", `step ${step}`);
}

function play() {
  if (playing) return stop();
  if ($("step").value === $("step").max) $("step").value = 0;
  $("play").textContent = "Pause";
  showPictures();
  playing = setInterval(() => {
    if ($("step").value === $("step").max) return stop();
    $("step").stepUp();
    showPictures();
  }, 400);
}

function stop() {
  clearInterval(playing);
  playing = undefined;
  $("play").textContent = "Play";
}

// The whole.

function choice(name, value, label, { checked = false, disabled = false, title = "" } = {}) {
  const input = element("input", { type: "radio", name, value, checked, disabled });
  return element("label", { title }, input, element("span", { textContent: label }));
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  $("theme").textContent = theme === "dark" ? "Light" : "Dark";
  $("theme").setAttribute("aria-label", `Change to ${theme === "dark" ? "light" : "dark"} colors`);
}

async function begin() {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  setTheme(localStorage.getItem("theme") ?? (dark.matches ? "dark" : "light"));
  $("theme").addEventListener("click", () => {
    setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark");
    localStorage.setItem("theme", document.documentElement.dataset.theme);
  });
  try {
    model = await ask("model");
  } catch (error) {
    $("facts").append(element("li", { textContent: error.message }));
    return;
  }
  const [channels, height, width] = model.image_shape;
  const facts = [
    `step ${model.step.toLocaleString("en")}`, `images ${channels}×${height}×${width}`, `${model.latent_dim} latent dimensions`,
    model.index ? `${model.index.rows.toLocaleString("en")} ${model.index.split} images of ${model.index.data} indexed` : "no index",
  ];
  $("title").textContent = document.title = model.objective;
  $("facts").append(...facts.map((textContent) => element("li", { textContent })));
  $("size").textContent = `${width}×${height}`;
  const densities = [...model.densities, ...Object.keys(model.missing)];
  $("densities").append(...densities.map((name, place) => choice("density", name, name, { checked: !place, disabled: name in model.missing, title: model.missing[name] })));
  $("data").hidden = $("and-neighbors").hidden = !model.index;
  if (model.index) $("near-of").textContent = `among ${model.index.split} images`;

  $("draw").addEventListener("submit", (event) => { event.preventDefault(); draw(); });
  $("densities").addEventListener("change", draw);
  $("next").addEventListener("click", () => { $("seed").stepUp(); draw(); });
  $("others").addEventListener("submit", (event) => { event.preventDefault(); showData(); });
  $("file").addEventListener("change", () => { upload([...$("file").files]).then(() => ($("file").value = "")); });
  $("own").addEventListener("dragover", (event) => { event.preventDefault(); $("own").classList.add("dropping"); });
  $("own").addEventListener("dragleave", () => $("own").classList.remove("dropping"));
  $("own").addEventListener("drop", (event) => {
    event.preventDefault();
    $("own").classList.remove("dropping");
    upload([...event.dataTransfer.files]);
  });
  $("as-start").addEventListener("click", () => setEnds(selected, end));
  $("as-end").addEventListener("click", () => setEnds(start, selected));
  $("slider").addEventListener("input", slide);
  $("start").addEventListener("click", () => start && select(start));
  $("end").addEventListener("click", () => end && select(end));
  $("middle").addEventListener("click", () => frames.length && select(frames[$("slider").value]));
  $("step").addEventListener("input", () => { stop(); showPictures(); });
  $("play").addEventListener("click", play);
  $("over").addEventListener("submit", (event) => event.preventDefault());

  await Promise.all([
    draw(),
    model.index && showData(),
    ask("curves").then(({ curves }) => showCurves(curves)),
    ask("grids").then(({ grids: found }) => showGrids(found)),
  ]);
}

begin();
