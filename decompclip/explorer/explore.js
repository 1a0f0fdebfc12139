// The view of decompclip.explore: one module for the widget (anywidget calls `render`) and for saved pages (`openSaved`).
// It asks questions, [kind, ...about], and draws from their answers; see explore.py. Texts are only ever set as text.

const TYPES = { int8: Int8Array, uint8: Uint8Array, uint16: Uint16Array, float32: Float32Array };
const TONES = { positive: [213, 94, 0], negative: [0, 114, 178], attention: [230, 159, 0] }; // Okabe and Ito
const TOP = 12;
let views = 0;

function h(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "text") element.textContent = value;
    else if (value === true || value === false) element.toggleAttribute(name, value);
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

const signed = (x, digits = 4) => ({ positive: "+", negative: "−", none: "" })[tone(x, digits)] + Math.abs(x).toFixed(digits);
const tone = (x, digits = 4) => (Number(x.toFixed(digits)) === 0 ? "none" : x < 0 ? "negative" : "positive");
const mean = (values) => values.reduce((sum, x) => sum + x, 0) / values.length;
const largestOf = (values) => values.reduce((most, x) => Math.max(most, Math.abs(x)), 1e-12);
const place = (layer, head) => `${layer}.${head}`;

/** Facts and arrays of an answer, from a message's buffers or from the base64 of a saved page. */
function read(answer, buffers) {
  const found = { ...answer };
  answer.arrays.forEach(([name, type, shape, text], i) => {
    let bytes;
    if (text !== undefined) bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer;
    else {
      const view = buffers[i];
      bytes = view.buffer ? view.buffer.slice(view.byteOffset, view.byteOffset + view.byteLength) : view;
    }
    const values = new TYPES[type](bytes);
    const width = values.length / (shape[0] || 1);
    found[name] = { values, row: (at) => values.subarray(at * width, (at + 1) * width) };
  });
  return found;
}

/** Questions to Python, each asked once; `now` gives what is known, and says when more is. */
function asker(model, arrived) {
  const known = new Map();
  const waiting = new Map();
  let next = 0;
  const receive = (message, buffers) => {
    if (!message || !waiting.has(message.id)) return; // another view's
    const { key, resolve, reject } = waiting.get(message.id);
    waiting.delete(message.id);
    if (message.error !== undefined) {
      known.set(key, { error: message.error });
      reject(new Error(message.error));
    } else {
      known.set(key, { answer: read(message.answer, buffers) });
      resolve(known.get(key).answer);
    }
    arrived();
  };
  model.on("msg:custom", receive);
  const ask = (question) => {
    const key = JSON.stringify(question);
    const entry = known.get(key);
    if (entry?.answer) return Promise.resolve(entry.answer);
    if (entry?.promise) return entry.promise;
    const id = `${views}-${next++}-${Date.now()}`;
    const promise = new Promise((resolve, reject) => waiting.set(id, { key, resolve, reject }));
    known.set(key, { promise });
    model.send({ id, question });
    return promise;
  };
  const now = (question) => {
    const entry = known.get(JSON.stringify(question));
    if (!entry) ask(question).catch(() => {});
    return known.get(JSON.stringify(question)) ?? {};
  };
  return { ask, now, has: (question) => known.has(JSON.stringify(question)), stop: () => model.off("msg:custom", receive) };
}

/** One pixel a patch: opaque where the map is large. */
function paint(canvas, [rows, columns], shares, scale, tones) {
  canvas.width = columns;
  canvas.height = rows;
  const image = new ImageData(columns, rows);
  for (let i = 0; i < rows * columns; i++) {
    const share = Math.max(-1, Math.min(1, shares[i] * scale));
    image.data.set([...(share < 0 ? tones[1] : tones[0]), 225 * Math.abs(share)], 4 * i);
  }
  canvas.getContext("2d").putImageData(image, 0, 0);
}

/** Whether what lies behind is dark, whoever painted it: a notebook, an editor, or this page. */
function dark(element) {
  for (let at = element; at; at = at.parentElement) {
    const [red, green, blue, alpha = 1] = (getComputedStyle(at).backgroundColor.match(/[\d.]+/g) ?? [0, 0, 0, 0]).map(Number);
    if (alpha > 0.5) return 0.3 * red + 0.6 * green + 0.1 * blue < 128;
  }
  return matchMedia("(prefers-color-scheme: dark)").matches;
}

/** Radio buttons that look like one switch. */
function choice(name, label, options, chosen, changed) {
  const group = h("fieldset", { class: "switch" }, h("legend", { class: "unseen", text: label }));
  for (const [value, words] of options) {
    const input = h("input", { type: "radio", name, value, checked: value === chosen, onchange: () => changed(value) });
    group.append(h("label", {}, input, h("span", { text: words })));
  }
  return group;
}

function render({ model, el }) {
  const about = model.get("about");
  const { layers, heads, grid, names, pictures, saved } = about;
  const id = `dcx${++views}`;
  const local = { over: "image", map: "contribution" };
  const root = h("div", { class: "dcx" });
  const { ask, now, has, stop } = asker(model, () => later());
  const state = (name) => model.get(name);
  const choose = (changes) => {
    for (const [name, value] of Object.entries(changes)) model.set(name, value);
    model.save_changes();
    later();
  };
  const picture = (image, alt = names[image]) => h("img", { src: pictures[image], alt, draggable: "false" });

  // Text
  const said = h("p", { class: "said", role: "status" });
  const input = h("input", { type: "text", id: `${id}-text`, placeholder: "a text, such as a photo of a dog", autocomplete: "off", list: `${id}-classes`, maxlength: 300 });
  const form = h("form", { class: "ask", onsubmit: (event) => { event.preventDefault(); typed(); } },
    h("label", { for: `${id}-text`, text: "Text" }), input, h("button", { text: "Ask" }),
    h("datalist", { id: `${id}-classes` }, ...about.classes.map((value) => h("option", { value }))));
  const chips = h("fieldset", { class: "chips" }, h("legend", { class: "unseen", text: "Texts asked so far" }));
  async function typed() {
    const text = input.value.trim();
    if (!text) return void (said.textContent = "Type a text first.");
    said.textContent = "";
    try {
      await ask(["text", text]);
      input.value = "";
      if (!state("texts").includes(text)) model.set("texts", [...state("texts"), text]);
      choose({ text });
    } catch (error) {
      said.textContent = error.message;
    }
  }
  const vocabulary = h("details", { class: "vocabulary", hidden: Boolean(saved) || !about.vocabulary.length },
    h("summary", { text: `${about.model} knows ${about.vocabulary.length} words, and passes over others` }),
    h("p", { text: about.vocabulary.join(" ") }));

  // Images
  const shown = h("div", { class: "shown" });
  const thumbs = h("fieldset", { class: "thumbs" }, h("legend", { class: "unseen", text: "Image" }));
  names.forEach((name, image) => {
    const radio = h("input", { type: "radio", name: `${id}-image`, value: image, "aria-label": name, onchange: () => choose({ image }) });
    thumbs.append(h("label", { title: name }, radio, picture(image, "")));
  });

  // Layers by heads, the last layer above
  const cells = new Map();
  const table = h("div", { class: "grid", role: "grid", "aria-label": "Contribution of each head: layers by heads" });
  table.style.setProperty("--columns", heads + 1);
  table.append(h("div", { role: "row" }, h("span", { role: "columnheader", class: "corner", text: "layer" }),
    ...[...Array(heads).keys()].map((head) => h("span", { role: "columnheader", text: head })), h("span", { role: "columnheader", text: "MLP" })));
  for (let layer = layers - 1; layer >= 0; layer--) {
    const row = h("div", { role: "row" }, h("span", { role: "rowheader", text: layer }));
    for (let head = 0; head < heads; head++) {
      const cell = h("button", { type: "button", role: "gridcell", onclick: () => choose({ layer, head }) });
      cells.set(place(layer, head), cell);
      row.append(cell);
    }
    cells.set(place(layer, "mlp"), row.appendChild(h("span", { role: "gridcell", class: "mlp" })));
    table.append(row);
  }
  const moves = { ArrowUp: [1, 0], ArrowDown: [-1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1], Home: [0, -heads], End: [0, heads], PageUp: [layers, 0], PageDown: [-layers, 0] };
  table.addEventListener("keydown", (event) => {
    const move = moves[event.key];
    if (!move) return;
    event.preventDefault();
    const within = (x, size) => Math.max(0, Math.min(size - 1, x));
    const layer = within(state("layer") + move[0], layers), head = within(state("head") + move[1], heads);
    choose({ layer, head });
    cells.get(place(layer, head)).focus();
  });
  const legend = h("div", { class: "legend" }, h("span"), h("i"), h("span"), h("em"));
  const bars = h("ol", { class: "bars" });

  // One head
  const title = h("h3");
  const sum = h("p", { class: "sum" });
  const over = h("div", { class: "over" });
  const heat = h("canvas", { role: "img" });
  const caption = h("p", { class: "soft" });
  const words = h("ol", { class: "words" });
  const nearest = h("div", { class: "nearest" });
  const effect = h("table", { class: "effect" });
  const run = h("button", { type: "button", text: "Run", onclick: () => {
    ask(causal()).catch((error) => { said.textContent = error.message; });
    later();
  } });
  const causal = () => ["ablate", state("text"), state("layer"), state("head"), "causal"];

  // All heads of its layer
  const layerTitle = h("h3");
  const strip = h("div", { class: "strip" });
  const tiles = [...Array(heads).keys()].map((head) => {
    const canvas = h("canvas"), base = h("img", { alt: "", draggable: "false" });
    const label = h("span");
    const button = h("button", { type: "button", onclick: () => choose({ head }) }, h("div", { class: "over" }, base, canvas), label);
    strip.append(button);
    return { button, canvas, base, label };
  });

  const section = (name, ...children) => h("section", { class: name }, ...children);
  root.append(
    h("header", {}, h("p", { class: "model" }, h("strong", { text: about.model }),
      h("span", { text: ` ${layers} layers of ${heads} heads, ${names.length} images` })), saved ? h("p", { class: "saved", text: saved }) : form, chips, said, vocabulary),
    h("div", { class: "board" },
      section("images", shown, thumbs),
      section("model-map", h("div", { class: "line" }, h("h3", { text: "What each head adds" }),
        choice(`${id}-over`, "Shown of", [["image", "this image"], ["mean", "mean of all"]], local.over, (value) => { local.over = value; later(); })), table, legend,
        h("h3", { text: "Top components" }), bars),
      section("head", h("div", { class: "line" }, title,
        choice(`${id}-map`, "Map", [["contribution", "contribution"], ["attention", "attention"], ["picture", "image"]], local.map, (value) => { local.map = value; later(); })),
        sum, h("div", { class: "pair" }, h("div", {}, over, caption), h("div", {}, h("h4", { text: "In words", title: `Texts that explain most of its variance over ${about.means} (TEXTSPAN), and how much each adds` }), words)),
        h("h4", { text: "Images alike to this head" }), nearest, h("h4", { text: "Similarity without this head" }), effect,
        h("p", { class: "soft", text: `The head at its mean over ${about.means}. Direct: in the feature alone. Causal: in the forward pass, where later layers see it.` })),
      section("layer", layerTitle, strip)));
  el.append(root);

  let shownNotes = "";
  function drawTexts(text, answer) {
    const texts = state("texts");
    if (chips.dataset.texts !== JSON.stringify(texts)) {
      chips.dataset.texts = JSON.stringify(texts);
      chips.replaceChildren(chips.firstChild, ...texts.map((one) => h("label", {},
        h("input", { type: "radio", name: `${id}-texts`, onchange: () => choose({ text: one }) }), h("span", { text: one }))));
    }
    [...chips.querySelectorAll("input")].forEach((radio, i) => { radio.checked = texts[i] === text; });
    const notes = (answer?.notes ?? []).join(" ");
    if (notes !== shownNotes) said.textContent = shownNotes = notes;
  }

  function drawImage(image, text, answer) {
    const score = answer.score.values;
    const rank = 1 + score.filter((x) => x > score[image]).length;
    shown.replaceChildren(picture(image), h("p", {}, h("strong", { text: names[image] }),
      h("span", { text: `cosine ${score[image].toFixed(3)} to “${text}”, ${rank} of ${score.length}` })));
    [...thumbs.querySelectorAll("input")].forEach((radio, i) => { radio.checked = i === image; });
  }

  function overImages(array, image) {
    if (local.over === "image") return array.row(image);
    const all = names.map((_, i) => array.row(i));
    return all[0].map((_, at) => mean(all.map((row) => row[at])));
  }

  function drawModel(image, layer, head, answer) {
    const ofHeads = overImages(answer.heads, image), ofMlps = overImages(answer.mlps, image);
    const largest = largestOf(ofHeads), widest = Math.max(largest, largestOf(ofMlps));
    const parts = [];
    const tint = (cell, name, value) => {
      const share = Math.round(Math.min(100, 100 * Math.abs(value) / largest)); // MLPs may be past the end
      cell.style.setProperty("--share", `${share}%`);
      cell.style.setProperty("--tone", value < 0 ? "var(--negative)" : "var(--positive)");
      cell.title = `${name}: ${signed(value)}`;
      cell.setAttribute("aria-label", `${name}: ${signed(value)}`);
    };
    for (let l = 0; l < layers; l++) {
      for (let n = 0; n < heads; n++) {
        const cell = cells.get(place(l, n)), chosen = l === layer && n === head, value = ofHeads[l * heads + n];
        tint(cell, `layer ${l}, head ${n}`, value);
        cell.setAttribute("aria-selected", chosen);
        cell.tabIndex = chosen ? 0 : -1;
        parts.push({ name: `head ${place(l, n)}`, value, layer: l, head: n });
      }
      tint(cells.get(place(l, "mlp")), `layer ${l}, MLP`, ofMlps[l]);
      parts.push({ name: `MLP ${l}`, value: ofMlps[l] });
    }
    [signed(-largest, 3), "", signed(largest, 3), `MLPs up to ${largestOf(ofMlps).toFixed(3)}`].forEach((text, i) => { legend.children[i].textContent = text; });
    parts.sort((a, b) => Math.abs(b.value) - Math.abs(a.value));
    bars.replaceChildren(...parts.slice(0, TOP).map((part) => {
      const fill = h("i", { class: part.value < 0 ? "negative" : "positive" });
      fill.style.width = `${50 * Math.abs(part.value) / widest}%`;
      const line = [h("span", { text: part.name }), h("b", {}, fill), h("span", { class: "number", text: signed(part.value) })];
      const chosen = part.layer === layer && part.head === head;
      return h("li", {}, part.head === undefined ? h("div", {}, ...line)
        : h("button", { type: "button", "aria-pressed": String(chosen), onclick: () => choose({ layer: part.layer, head: part.head }) }, ...line));
    }));
    return { value: answer.heads.row(image)[layer * heads + head], score: answer.score.values[image] };
  }

  function drawMaps(image, layer, head, adds) {
    const attention = local.map === "attention";
    const { answer } = now(attention ? ["attention", image] : ["maps", state("text"), image]);
    const at = layer * heads + head, name = `layer ${layer}, head ${head}`;
    over.replaceChildren(picture(image), heat);
    over.classList.toggle("plain", local.map === "picture");
    strip.classList.toggle("plain", local.map === "picture");
    if (!answer) return false;
    const tones = attention ? [TONES.attention, TONES.attention] : [TONES.positive, TONES.negative];
    const sizes = answer.largest.values;
    paint(heat, grid, answer.patches.row(at), 1 / 127, tones);
    const percent = (x) => `${(100 * x).toFixed(0)} %`;
    caption.textContent = local.map === "picture" ? "" : attention
      ? `Where the head looks: up to ${percent(sizes[at])} on a patch, ${percent(answer.prefix.values[at])} on other tokens.`
      : `By patch, up to ${sizes[at].toFixed(4)}; other tokens ${signed(answer.prefix.values[at])}.`;
    heat.setAttribute("aria-label", `${local.map} of ${name} on ${names[image]}`);
    layerTitle.textContent = `All heads of layer ${layer}, on one scale`;
    const most = Math.max(...sizes.subarray(layer * heads, (layer + 1) * heads)) || 1;
    tiles.forEach(({ button, canvas, base, label }, n) => {
      const i = layer * heads + n;
      if (base.getAttribute("src") !== pictures[image]) base.src = pictures[image];
      paint(canvas, grid, answer.patches.row(i), sizes[i] / most / 127, tones);
      label.textContent = `${n}  ${signed(adds[i], 3)}`;
      button.setAttribute("aria-pressed", String(n === head));
      button.setAttribute("aria-label", `layer ${layer}, head ${n}: ${signed(adds[i])}`);
    });
    return true;
  }

  function drawWords(layer, head) {
    const { answer } = now(["words", layer, head]);
    if (!answer) return false;
    words.replaceChildren(...answer.words.map((word, i) => h("li", {}, h("span", { text: word }),
      h("span", { class: "number", text: `${(100 * answer.explained.values[i]).toFixed(0)} %` }))));
    if (answer.why) words.replaceChildren(h("li", { class: "soft", text: answer.why }));
    return true;
  }

  function drawNearest(image, layer, head) {
    const { answer } = now(["nearest", layer, head]);
    if (!answer) return false;
    const cosines = answer.cosines.row(image);
    nearest.replaceChildren(...[...answer.images.row(image)].map((other, i) => h("button", { type: "button", title: names[other],
      "aria-label": `${names[other]}, cosine ${cosines[i].toFixed(2)}`, onclick: () => choose({ image: other }) },
      picture(other, ""), h("span", { text: cosines[i].toFixed(2) }))));
    if (!nearest.children.length) nearest.replaceChildren(h("p", { class: "soft", text: "There is no other image." }));
    return true;
  }

  function drawEffect(image, layer, head, score) {
    const before = score.values;
    const line = (name, answer, without) => {
      const row = h("tr", {}, h("th", { scope: "row", text: name }));
      if (!answer) return row.append(h("td", { colspan: 2 }, without)), row;
      const values = answer.values, here = values[image] - before[image];
      const cell = (value, change) => h("td", {}, h("span", { text: value.toFixed(3) }),
        change === undefined ? "" : h("span", { class: tone(change, 3), text: signed(change, 3) }));
      row.append(...(values === before ? [cell(before[image]), cell(mean(before))]
        : [cell(values[image], here), cell(mean(values), mean(values) - mean(before))]));
      return row;
    };
    const direct = now(["ablate", state("text"), layer, head, "direct"]).answer;
    const asked = saved || has(causal()) ? now(causal()) : {};
    run.disabled = Boolean(asked.promise);
    run.textContent = run.disabled ? "running all images…" : "Run";
    const instead = saved ? h("span", { class: "soft", text: "needs a kernel" }) : (asked.error ?? run);
    effect.replaceChildren(h("tr", {}, h("td"), h("th", { scope: "col", text: "this image" }), h("th", { scope: "col", text: "mean of all" })),
      line("as it is", score, ""), line("direct", direct?.after, "…"), line("causal", asked.answer?.after, instead));
    return Boolean(direct);
  }

  function draw() {
    const [text, image, layer, head] = ["text", "image", "layer", "head"].map(state);
    const { answer, error } = now(["text", text]);
    if (error) said.textContent = error;
    drawTexts(text, answer);
    let whole = Boolean(answer);
    if (answer) {
      drawImage(image, text, answer);
      const { value, score } = drawModel(image, layer, head, answer);
      title.textContent = `Layer ${layer}, head ${head}`;
      sum.replaceChildren(h("strong", { class: tone(value), text: signed(value) }), ` of ${score.toFixed(3)} to “${text}” on this image`);
      const drawn = [drawMaps(image, layer, head, answer.heads.row(image)), drawEffect(image, layer, head, answer.score)];
      whole = drawn.every(Boolean);
    }
    whole = [drawWords(layer, head), drawNearest(image, layer, head), whole].every(Boolean);
    root.setAttribute("aria-busy", String(!whole));
  }

  let due = false;
  function later() { // once for all that changes together; no animation frame, which a tab in the background does not get
    if (due) return;
    due = true;
    queueMicrotask(() => { due = false; draw(); });
  }
  const watched = ["text", "texts", "image", "layer", "head"].map((name) => `change:${name}`);
  watched.forEach((event) => model.on(event, later));
  const fit = () => { root.dataset.scheme = dark(el) ? "dark" : "light"; };
  const scheme = matchMedia("(prefers-color-scheme: dark)");
  scheme.addEventListener("change", fit);
  const theme = new MutationObserver(fit);
  for (const element of [document.documentElement, document.body]) theme.observe(element, { attributes: true });
  fit();
  draw();
  return () => {
    stop();
    watched.forEach((event) => model.off(event, later));
    scheme.removeEventListener("change", fit);
    theme.disconnect();
    root.remove();
  };
}

/** What stands for a kernel in a saved page: the state, and the answers that were known. */
function openSaved(page) {
  const { state, answers } = JSON.parse(page.getElementById("saved").textContent);
  const known = new Map(answers.map(([question, answer]) => [JSON.stringify(question), answer]));
  const heard = {};
  const tell = (event, ...values) => (heard[event] ?? []).forEach((hear) => hear(...values));
  const model = {
    get: (name) => state[name],
    set: (name, value) => { state[name] = value; tell(`change:${name}`); },
    save_changes() {},
    on: (event, hear) => (heard[event] ??= []).push(hear),
    off: (event, hear) => { heard[event] = (heard[event] ?? []).filter((other) => other !== hear); },
    send({ id, question }) {
      const answer = known.get(JSON.stringify(question));
      queueMicrotask(() => tell("msg:custom", answer ? { id, answer } : { id, error: "This page was saved without the answer." }, []));
    },
  };
  render({ model, el: page.getElementById("explore") });
}

export default { render };
