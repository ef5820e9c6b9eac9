"use strict";
// The page: one question (a drawn picture or an upload, perhaps a box), and one or two panes that answer it by a method.

const at = (id) => document.getElementById(id);
let about = null;
let question = null; // {prompt, seed, file}
let box = null; // [x0, y0, x1, y1] in pixels of the picture
let size = null; // [width, height] of the picture
const panes = [];

async function api(path, options = {}) {
  let response;
  try {
    response = await fetch(path, options);
  } catch {
    throw new Error("the server does not answer; is it still running?");
  }
  let value = {};
  try {
    value = await response.json();
  } catch {
    // An answer that is no JSON, such as that of a proxy.
  }
  if (!response.ok) throw new Error(value.error || `the server refused this (${response.status})`);
  return value;
}

function say(text) {
  at("message").hidden = !text;
  at("message").textContent = text || "";
}

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

// Asks and follows the request until it has ended.
async function follow(started, show, alive) {
  const name = started.request;
  let state = { state: "waiting", before: started.before };
  for (let first = true; alive(); first = false) {
    show(state, name);
    if (["done", "failed", "cancelled"].includes(state.state)) return state;
    if (!first) await new Promise((wake) => setTimeout(wake, state.state === "running" && state.share ? 300 : 60));
    state = await api(`/api/request/${name}${first ? "" : "?wait=1"}`);
  }
  return null;
}

function waiting(state) {
  if (state.state === "running") return state.share ? `${state.doing} …` : "working …";
  if (state.before) return `waiting: ${state.before} ${state.before === 1 ? "request" : "requests"} before yours`;
  return "starting …";
}

function number(score) {
  const size = Math.abs(score);
  return size && (size < 1e-3 || size >= 1e4) ? score.toExponential(2) : score.toPrecision(3);
}

class Pane {
  constructor(method) {
    this.root = at("pane").content.firstElementChild.cloneNode(true);
    this.select = this.find(".method");
    for (const [name, title] of Object.entries(about.methods)) this.select.append(new Option(title, name));
    this.select.value = method in about.methods ? method : Object.keys(about.methods)[0];
    this.select.addEventListener("change", () => this.ask());
    this.find(".cancel").addEventListener("click", () => this.stop());
    this.turn = 0;
    at("panes").append(this.root);
  }

  find(selector) {
    return this.root.querySelector(selector);
  }

  stop() {
    if (this.name) api(`/api/request/${this.name}/cancel`, { method: "POST" }).catch(() => {});
  }

  // A newer question makes this pane forget the one before, which is cancelled.
  async ask() {
    this.stop();
    const turn = ++this.turn;
    const status = this.find(".status");
    status.classList.remove("wrong");
    this.root.classList.add("busy");
    this.find(".links").hidden = true;
    try {
      const query = new URLSearchParams({ method: this.select.value, prompt: question.prompt, seed: question.seed });
      if (box) query.set("box", box.join(","));
      const started = await api(`/api/ask?${query}`, { method: "POST", body: question.file || "" });
      this.name = started.request;
      const bar = this.find("progress");
      const end = await follow(
        started,
        (state) => {
          const busy = state.state === "waiting" || state.state === "running";
          if (busy) status.textContent = waiting(state);
          this.find(".cancel").hidden = !busy;
          bar.hidden = !(busy && state.share);
          bar.value = state.share || 0;
        },
        () => turn === this.turn,
      );
      if (!end) return;
      if (end.state === "failed") throw new Error(end.error);
      if (end.state === "cancelled") status.textContent = "cancelled";
      else this.show(end, started.request);
    } catch (error) {
      if (turn !== this.turn) return;
      status.textContent = error.message;
      status.classList.add("wrong");
      this.find(".cancel").hidden = this.find("progress").hidden = true;
      say(panes.length === 1 && !size ? error.message : "");
    } finally {
      if (turn === this.turn) {
        this.name = null;
        this.root.classList.remove("busy");
      }
    }
  }

  show(answer, name) {
    showPicture(answer);
    const spent = answer.seconds < 1 ? `${Math.max(1, Math.round(1000 * answer.seconds))} ms` : `${answer.seconds.toFixed(1)} s`;
    this.find(".status").textContent = `${answer.scored.toLocaleString("en")} images in ${spent}`;
    this.find(".cards").replaceChildren(...answer.cards.map(card));
    const csv = ["rank,row_id,score,caption", ...answer.cards.map((c) => [c.rank, c.row, c.score, quote(c.caption)].join(","))];
    link(this.find(".csv"), new Blob([csv.join("\n") + "\n"], { type: "text/csv" }));
    if (answer.report) link(this.find(".report"), new Blob([answer.report], { type: "text/html" }));
    else this.find(".report").href = `/api/request/${name}/report`;
    this.find(".links").hidden = false;
  }
}

function quote(text) {
  return /[",\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

function link(anchor, blob) {
  if (anchor.href.startsWith("blob:")) URL.revokeObjectURL(anchor.href);
  anchor.href = URL.createObjectURL(blob);
}

function card(each) {
  const image = element("img", { src: `/api/training/${each.row}`, alt: each.caption, loading: "lazy" });
  const rank = element("span", { className: each.rank === 1 ? "rank best" : "rank", textContent: each.rank });
  const mat = element("span", { className: each.mirrored ? "mat mirrored" : "mat" }, image, rank);
  const share = element("i");
  share.style.width = `${(100 * (each.share ?? 0)).toFixed(1)}%`;
  const words = element(
    "span",
    { className: "words" },
    element("span", { className: "score", textContent: number(each.score) }),
    element("span", { className: "caption", textContent: each.caption, title: each.caption }),
  );
  const group = each.variant_of ? `variant of no. ${each.variant_of}` : (each.group ?? "");
  if (group) words.append(element("span", { className: "group", textContent: group }));
  const button = element(
    "button",
    { className: "card", type: "button", title: "Which queries would owe this image most?" },
    mat,
    element("span", { className: "share" }, share),
    words,
  );
  button.addEventListener("click", () => reverse(each));
  return element("li", {}, button);
}

async function reverse(each) {
  at("reverse-image").src = `/api/training/${each.row}`;
  at("reverse-caption").textContent = each.caption;
  at("reverse-list").replaceChildren();
  const status = at("reverse-status");
  status.textContent = "looking …";
  if (!at("reverse").open) at("reverse").showModal();
  try {
    const started = await api(`/api/reverse/${each.row}`, { method: "POST" });
    const end = await follow(started, (state) => (status.textContent = waiting(state)), () => at("reverse").open);
    if (!end) return;
    if (end.state !== "done") throw new Error(end.error || "cancelled");
    status.textContent = "Of the pictures that the index was trained with, those that it names for this image first:";
    at("reverse-list").replaceChildren(
      ...end.queries.map((query) =>
        element(
          "li",
          {},
          element("img", { src: query.image, alt: query.prompt }),
          element("div", {}, element("b", { textContent: number(query.score) }), element("br"), query.prompt),
        ),
      ),
    );
  } catch (error) {
    status.textContent = error.message;
  }
}

function showPicture(answer) {
  size = [answer.width, answer.height];
  at("image").src = answer.image;
  at("notes").hidden = !answer.notes.length;
  at("notes").replaceChildren(...answer.notes.map((note) => element("li", { textContent: note })));
}

function drawBox(corners) {
  at("box").hidden = !corners;
  at("unbox").hidden = !corners;
  if (!corners) return;
  const [x0, y0, x1, y1] = corners;
  Object.assign(at("box").style, {
    left: `${(100 * x0) / size[0]}%`,
    top: `${(100 * y0) / size[1]}%`,
    width: `${(100 * (x1 - x0)) / size[0]}%`,
    height: `${(100 * (y1 - y0)) / size[1]}%`,
  });
}

function dragBoxes() {
  const stage = at("stage");
  let start = null;
  const place = (event) => {
    const shown = stage.getBoundingClientRect();
    const share = [(event.clientX - shown.left) / shown.width, (event.clientY - shown.top) / shown.height];
    return share.map((value, axis) => Math.min(1, Math.max(0, value)) * size[axis]);
  };
  const corners = (end) => [
    Math.floor(Math.min(start[0], end[0])),
    Math.floor(Math.min(start[1], end[1])),
    Math.ceil(Math.max(start[0], end[0])),
    Math.ceil(Math.max(start[1], end[1])),
  ];
  stage.addEventListener("pointerdown", (event) => {
    if (!size) return;
    stage.setPointerCapture(event.pointerId);
    start = place(event);
    event.preventDefault();
  });
  stage.addEventListener("pointermove", (event) => start && drawBox(corners(place(event))));
  stage.addEventListener("pointerup", (event) => {
    if (!start) return;
    const drawn = corners(place(event));
    start = null;
    // A click is no box.
    box = drawn[2] - drawn[0] > 2 && drawn[3] - drawn[1] > 2 ? drawn : box;
    drawBox(box);
    if (box === drawn) panes.forEach((pane) => pane.ask());
  });
  stage.addEventListener("pointercancel", () => {
    start = null;
    drawBox(box);
  });
}

async function begin() {
  about = await api("/api/about");
  at("about").textContent =
    `${about.model}, trained on ${about.dataset}: ${about.images.toLocaleString("en")} images in the index. ` +
    "Instant answers come from the index, exact ones from the model itself, in minutes.";
  const credits = [about.model_credit, about.credit].filter(Boolean);
  at("credit").textContent = credits.join(" · ");
  at("prompt").maxLength = about.max_prompt;
  panes.push(new Pane("instant"));

  at("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    const file = at("upload").files[0] || null;
    const prompt = at("prompt").value;
    say("");
    if (!file && !prompt.trim()) return say("The prompt is empty: write what the picture shows, or choose an image.");
    if (file && file.size > about.max_bytes) {
      return say(`This file has ${file.size.toLocaleString("en")} bytes; at most ${about.max_bytes.toLocaleString("en")} are read.`);
    }
    if (!at("seed").checkValidity()) return say("The seed has to be a whole number from 0 to 4294967295.");
    question = { prompt, seed: at("seed").value || "0", file };
    box = size = null;
    drawBox(null);
    at("image").removeAttribute("src");
    at("result").hidden = false;
    panes.forEach((pane) => pane.ask());
  });
  at("two").addEventListener("change", () => {
    if (at("two").checked) {
      panes.push(new Pane("features"));
      if (question) panes[1].ask();
    } else {
      const pane = panes.pop();
      pane.stop();
      pane.turn++;
      pane.root.remove();
    }
  });
  at("unbox").addEventListener("click", () => {
    box = null;
    drawBox(null);
    panes.forEach((pane) => pane.ask());
  });
  at("close").addEventListener("click", () => at("reverse").close());
  at("upload").addEventListener("change", () => {
    say("");
    at("clear").hidden = !at("upload").files.length;
  });
  at("clear").addEventListener("click", () => {
    at("upload").value = "";
    at("clear").hidden = true;
  });
  dragBoxes();
}

begin().catch((error) => say(error.message));
